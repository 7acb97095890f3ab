"""What ``dream-pyg tune`` searches in each model, as data.

Bounds enclose the grids that the papers, or MMRec (github.com/enoche/MMRec at e775373), give; weights and learning
rates are searched on a logarithmic scale between them. What a paper holds fixed for all data sets is not searched.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from dream_pyg.config import RunConfig
from dream_pyg.errors import ConfigError
from dream_pyg.models import find_model
from dream_pyg.models.base import fusion_weights


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, uniform."""

    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class LogRange(Range):
    """Numbers from ``low`` to ``high``, uniform in their logarithm."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of a few values."""

    values: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class ImageShare(Range):
    """The weight of the image modality against the one other: left out where a graph has other than two modalities."""

    of_paper: float
    """The model's default where the other is text; with any other, the default is one half."""


Dimension = Range | Choice
Space = dict[str, Dimension]

_RATE = {"training.learning_rate": LogRange(3e-4, 1e-2)}

SEARCH_SPACES: dict[str, Space] = {
    # Sections 4.4 and 4.8, Figures 8 and 9; layers and temperature are fixed there. A learning rate of 0.003 is better
    # than the paper's 0.001 with any weights, and what is best for one weight depends on the others.
    "dream": {
        **_RATE,
        "model.intra_weight": LogRange(1e-4, 1.0),
        "model.inter_weight": LogRange(1e-4, 1.0),
        "model.signal_weight": LogRange(1e-4, 1.0),
        "model.l2_weight": LogRange(1e-6, 1e-1),
        "model.modality_weights": ImageShare(0.0, 1.0, of_paper=0.3),
    },
    # arXiv 2308.03588, Section 4.1: contrastive weight from 0.001 to 0.1, decay of the learning rate in the code.
    "mgcn": {
        **_RATE,
        "training.learning_rate_decay": Choice((1.0, 0.96)),
        "model.contrastive_weight": LogRange(1e-3, 1e-1),
        "model.l2_weight": LogRange(1e-6, 1e-1),
    },
    # arXiv 2211.06924, Section 4.1: pruning 0.8 or 0.9, lambda from 0 to 0.001.
    "freedom": {
        **_RATE,
        "model.pruning_ratio": Choice((0.7, 0.8, 0.9)),
        "model.modality_bpr_weight": LogRange(1e-5, 1e-1),
        "model.modality_weights": ImageShare(0.0, 1.0, of_paper=0.1),
    },
    # arXiv 2111.00678, Section 4.1.4.
    "micro": {
        **_RATE,
        "model.contrastive_weight": LogRange(1e-3, 1e-1),
        "model.skip_weight": Choice((0.5, 0.7, 0.9)),
        "model.l2_weight": LogRange(1e-6, 1e-1),
    },
    # MMRec: learning rate from 0.0001 to 0.005, L2 from 0 to 0.001.
    "lattice": {
        **_RATE,
        "training.learning_rate_decay": Choice((1.0, 0.96)),
        "model.num_item_layers": Choice((1, 2)),
        "model.l2_weight": LogRange(1e-6, 1e-1),
    },
    # arXiv 2301.12097 and MMRec: L2 from 0.00001 to 0.1.
    "dragon": {
        **_RATE,
        "model.l2_weight": LogRange(1e-5, 1e-1),
        "model.modality_weights": ImageShare(0.0, 1.0, of_paper=0.1),
    },
    # MMRec: L2 from 0.00001 to 0.1.
    "dualgnn": {**_RATE, "model.l2_weight": LogRange(1e-5, 1e-1)},
    # arXiv 2207.05969, Section 4.1.4: one or two layers, dropout 0.3 or 0.5, L2 0.1 or 0.01.
    "bm3": {
        **_RATE,
        "model.num_layers": Choice((1, 2)),
        "model.dropout": Choice((0.3, 0.5)),
        "model.l2_weight": LogRange(1e-3, 1.0),
    },
    # MMRec: alpha from 0.01 to 1, tau_s from 0.1 to 1, L2 from 0.0001 to 0.1.
    "slmrec": {
        **_RATE,
        "model.contrastive_weight": LogRange(1e-2, 1.0),
        "model.contrastive_temperature": LogRange(0.1, 1.0),
        "model.l2_weight": LogRange(1e-5, 1e-1),
    },
    # MMRec: L2 from 0.00001 to 0.1.
    "grcn": {**_RATE, "model.l2_weight": LogRange(1e-5, 1e-1)},
    # MMRec: learning rate from 0.0001 to 0.01, L2 from 0 to 0.1; the paper: both combinations.
    "mmgcn": {
        "training.learning_rate": LogRange(1e-4, 1e-2),
        "model.num_layers": Choice((1, 2, 3)),
        "model.combination": Choice(("add", "concat")),
        "model.train_embeddings": Choice((True, False)),
        "model.l2_weight": LogRange(1e-6, 1e-1),
    },
    # MMRec: L2 from 0.00001 to 2.
    "vbpr": {**_RATE, "model.l2_weight": LogRange(1e-5, 2.0)},
    # MMRec: one to four layers, L2 from 0.000001 to 0.01.
    "lightgcn": {
        **_RATE,
        "model.num_layers": Choice((1, 2, 3, 4)),
        "model.l2_weight": LogRange(1e-6, 1e-1),
    },
    # arXiv 2105.06323, Section 5.1: momentum and one to four layers; L2 as for LightGCN.
    "buir": {
        **_RATE,
        "model.num_layers": Choice((1, 2, 3, 4)),
        "model.momentum": Choice((0.98, 0.99, 0.995, 0.999)),
        "model.max_edge_dropout": Choice((0.0, 0.1, 0.2)),
        "model.l2_weight": LogRange(1e-6, 1e-1),
    },
    # MMRec: L2 from 0.00001 to 2.
    "bpr": {**_RATE, "model.l2_weight": LogRange(1e-5, 2.0)},
    # Grids of arXiv 1905.03375 and doi 10.1145/3383313.3418480, rounded outwards.
    "ease": {"model.l2_weight": LogRange(1.0, 1e4)},
    "addease": {
        "model.l2_weight": LogRange(1.0, 1e4),
        "model.feature_l2_weight": LogRange(1.0, 1e4),
        "model.feature_share": Range(0.0, 1.0),
        "model.modality_weights": ImageShare(0.0, 1.0, of_paper=0.1),
    },
    "itemknn": {
        "model.num_item_neighbors": Choice((20, 50, 100, 200, 500, 1000)),
        "model.shrinkage": LogRange(1.0, 1e3),
    },
}


def search_space(model: str, modalities: Sequence[str], *, fixed: Sequence[str] = ()) -> Space:
    """What is searched for a model on a graph.

    Args:
        model: The model's name.
        modalities: The graph's modalities.
        fixed: Keys that keep the value they were given.

    Raises:
        ConfigError: If the model is unknown or nothing is left to search.
    """
    find_model(model)
    two_with_image = len(modalities) == 2 and "image" in modalities
    space = {
        key: dimension
        for key, dimension in SEARCH_SPACES.get(model, {}).items()
        if not any(key == one or one.startswith(f"{key}.") for one in fixed)
        and (two_with_image or not isinstance(dimension, ImageShare))
    }
    if not space:
        raise ConfigError(
            f"Model {model!r} has nothing to tune{' besides what was set' if fixed else ''}. Train it with "
            "`dream-pyg train`, or set fewer values."
        )
    return space


def default_point(space: Space, config: RunConfig, modalities: Sequence[str]) -> dict[str, Any]:
    """Where in a space a configuration lies.

    Raises:
        ConfigError: If a value of it is none of a few to choose from, or not positive on a logarithmic scale, or a
            weight is for a modality that the graph does not have.
    """
    values = config.to_dict()
    point: dict[str, Any] = {}
    for key, dimension in space.items():
        section, name = key.split(".")
        if isinstance(dimension, ImageShare):
            given = values[section].get(name)
            point[key] = dimension.of_paper if "text" in modalities else 0.5
            if given:
                point[key] = fusion_weights(modalities, given).get("image", 0.0)
        else:
            point[key] = values[section][name]
            if isinstance(dimension, Choice) and point[key] not in dimension.values:
                searched = ", ".join(map(str, dimension.values))
                raise ConfigError(
                    f"{key} is {point[key]}, which is none of what is searched ({searched}). "
                    f"Begin at one of these, or keep it with --set {key}={point[key]}."
                )
            if isinstance(dimension, LogRange) and not point[key] > 0:
                raise ConfigError(
                    f"{key} is {point[key]}, and what is searched on a logarithmic scale must be positive. Begin at a "
                    f"positive value, or keep it with --set {key}={point[key]}."
                )
    return point


def configure(config: RunConfig, space: Space, point: Mapping[str, Any], modalities: Sequence[str]) -> RunConfig:
    """A configuration with a point of the space put in, numbers rounded to the three digits that a preset shows.

    Raises:
        ConfigError: If the model refuses a value.
    """
    values = config.to_dict()
    for key, dimension in space.items():
        section, name = key.split(".")
        value = point[key]
        if isinstance(dimension, Range):
            value = float(f"{value:.3g}")
        if isinstance(dimension, ImageShare):
            (other,) = (modality for modality in modalities if modality != "image")
            value = {"image": value, other: round(1 - value, 6)}
        values[section] = {**values[section], name: value}
    return RunConfig.from_dict(values, "what the search space gives")


def describe_space(space: Space) -> dict[str, dict[str, Any]]:
    """The space as plain values, to be written down and compared."""
    return {
        key: {"kind": type(dimension).__name__, **{name: _plain(value) for name, value in vars(dimension).items()}}
        for key, dimension in space.items()
    }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
