"""The model of a configuration and the graph it is trained on: what they need, and what is made of them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import HeteroData

from dream_pyg import ranks
from dream_pyg.config import FeaturePrecision, RunConfig, TeacherConfig, TrainingConfig
from dream_pyg.errors import ConfigError
from dream_pyg.graph.relations import cut_neighbors
from dream_pyg.graph.schema import ITEM, USER, feature_modalities, feature_name, knn_modalities
from dream_pyg.models import MODELS, Embeddings, Recommender, Scorer, find_model
from dream_pyg.nn.embeddings import sharded_tables
from dream_pyg.training.vote import Vote


def make_model(config: RunConfig, graph: HeteroData, device: torch.device | None = None) -> Recommender:
    """The model of a configuration, on a graph that has what it needs.

    Args:
        config: The configuration; with ``training.shard_tables`` and several processes each keeps a part of the tables.
        graph: The graph.
        device: Where the model goes; by default the CPU.

    Raises:
        ConfigError: If the graph lacks features or relation graphs, or the model's tables cannot be sharded.
    """
    check_requirements(config.model_name, config.hyperparameters, graph)
    model_class = find_model(config.model_name)
    device = device or torch.device("cpu")
    if not config.training.shard_tables:
        return model_class(graph, config.hyperparameters).to(device)
    if model_class.receptive_field is Recommender.receptive_field:
        able = (name for name, known in MODELS.items() if known.receptive_field is not Recommender.receptive_field)
        raise ConfigError(
            f"Model {config.model_name!r} cannot have its tables sharded, since it reads them as a whole. Leave out "
            f"training.shard_tables, or choose one of {', '.join(able)}."
        )
    with sharded_tables(device) if ranks.num_ranks() > 1 else nullcontext():
        return model_class(graph, config.hyperparameters).to(device)


def check_requirements(name: str, hyperparameters: Any, graph: HeteroData) -> None:
    """Refuse a graph that lacks what a model needs.

    Args:
        name: The model's registered name.
        hyperparameters: Its ``Config``.
        graph: The graph.

    Raises:
        ConfigError: If features or relation graphs are missing; the message says which.
    """
    needs = find_model(name).requirements(hyperparameters)
    lacking = [
        what
        for needed, present, what in (
            (needs.features, feature_modalities(graph), "features of any modality (--features)"),
            (needs.item_knn, knn_modalities(graph, ITEM), "an item-item kNN graph (--features or --neighbors)"),
            (needs.user_knn, knn_modalities(graph, USER), "a user-user kNN graph (--features, no --no-user-graphs)"),
        )
        if needed and not present
    ]
    if lacking:
        raise ConfigError(
            f"Model {name!r} needs {' and '.join(lacking)}, which the graph does not have. "
            "Build the graph anew with what is said in brackets, or choose a model or options without it."
        )


def prepare_graph(
    graph: HeteroData,
    device: torch.device,
    num_neighbors: int | None = None,
    feature_precision: FeaturePrecision | None = "float32",
) -> HeteroData:
    """The graph on a device, as a model is trained on it; the given graph is left as it is.

    Args:
        graph: The graph.
        device: Where to put it.
        num_neighbors: How many neighbours to keep in its relation graphs; see
            :func:`~dream_pyg.graph.relations.cut_neighbors`.
        feature_precision: Type of the feature matrices in memory; with ``stored`` they stay as they are, on the CPU in
            their file, and with None also if the device is another.
    """
    prepared = copy.copy(cut_neighbors(graph, num_neighbors))
    names = [feature_name(modality) for modality in feature_modalities(prepared)]
    features = {name: prepared[ITEM].pop(name) for name in names}
    prepared = prepared.to(device)
    for name, feature in features.items():
        if feature_precision is not None:
            feature = feature.to(device)
            if feature_precision != "stored":
                feature = feature.to(getattr(torch, feature_precision))
        prepared[ITEM][name] = feature
    return prepared


def teacher_of(config: TrainingConfig, model: Recommender) -> TeacherConfig | None:
    """The teacher of a model, if there is one with anything to do, and the model learns."""
    teacher = config.teacher
    return teacher if model.learns and teacher is not None and teacher.is_used else None


def scorer_of(model: Recommender, graph: HeteroData, vote: Vote | None = None) -> Scorer:
    """What a model, as it is now, makes of a graph, and a vote beside it; without gradients."""
    with torch.no_grad():
        model.eval()
        scorer: Scorer = model(graph)
        # A model may return its parameters themselves, which know gradients even here.
        scorer = scorer.detach()
        return vote.beside(scorer) if vote is not None and isinstance(scorer, Embeddings) else scorer


def whole_weights(model: Recommender) -> dict[str, Tensor]:
    """A model's ``state_dict`` with all rows of its tables, in the first process; the others take part."""
    weights = model.state_dict()
    shards = {name: value for name, value in model.named_parameters() if isinstance(value, ranks.RowShard)}
    whole = ranks.whole_state(list(shards.values()), [{name: weights[name]} for name in shards])
    for state in whole:
        weights.update(state)
    return weights


def load_weights(model: Recommender, weights: Mapping[str, Tensor]) -> None:
    """Load what :func:`whole_weights` gave, or of tables the rows that this process keeps."""
    shards = {name: value for name, value in model.named_parameters() if isinstance(value, ranks.RowShard)}
    own = ranks.own_state(list(shards.values()), [{name: weights[name]} for name in shards if name in weights])
    model.load_state_dict({**weights, **{name: value for state in own for name, value in state.items()}})
