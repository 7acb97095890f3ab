"""What ``dream-pyg tune`` searches in a model on a graph, and what a point of it means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dream_pyg.config import RunConfig
from dream_pyg.errors import ConfigError
from dream_pyg.models import find_model
from dream_pyg.models.base import fusion_weights
from dream_pyg.models.space import Choice, ImageShare, LogRange, Range, Space


def search_space(model: str, modalities: Sequence[str], *, fixed: Sequence[str] = ()) -> Space:
    """What is searched for a model on a graph.

    Args:
        model: The model's name.
        modalities: The graph's modalities.
        fixed: Keys that keep the value they were given.

    Raises:
        ConfigError: If the model is unknown or nothing is left to search.
    """
    two_with_image = len(modalities) == 2 and "image" in modalities
    space = {
        key: dimension
        for key, dimension in find_model(model).search_space.items()
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
