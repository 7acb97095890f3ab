"""Whether memory suffices for a training, told before it starts instead of by the system in the middle."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch_geometric.data import HeteroData

from dream_pyg import ranks
from dream_pyg.config import RunConfig, SamplingConfig
from dream_pyg.errors import ConfigError
from dream_pyg.graph.processor import available_bytes, gibibytes
from dream_pyg.graph.schema import ITEM, USER, feature_modalities, feature_name
from dream_pyg.models import find_model

_KEPT = 3
"""Copies of the tables that a training keeps: weights and Adam's two moments."""
_PASSING = 2
"""Copies that come and go: gradients, or the rows that a validation propagates, and the weights as they are saved. What
a model adds to that is its own."""


class Needs(NamedTuple):
    """Bytes that a training takes at least."""

    tables: int
    features: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


def least_bytes(config: RunConfig, graph: HeteroData, device: torch.device) -> Needs:
    """What a model's tables with gradients and optimizer, and the features it is given, take at least.

    Args:
        config: The run; a model without ``embedding_dim`` has no tables.
        graph: The graph as it is stored. On the CPU its features are read from their file, and take no memory of their
            own, where they have the type that they are held in.
        device: Where the model computes.
    """
    num_rows = int(graph[USER].num_nodes) + int(graph[ITEM].num_nodes)
    table = 4 * num_rows * config.model.get("embedding_dim", 0)
    kept = _KEPT * table // (ranks.num_ranks() if config.training.shard_tables else 1)
    trained = 0
    if config.model.get("train_features", False):
        trained = 4 * sum(graph[ITEM][feature_name(modality)].numel() for modality in feature_modalities(graph))
    features, precision = 0, config.held_precision
    for modality in feature_modalities(graph):
        stored = graph[ITEM][feature_name(modality)]
        held = getattr(torch, precision) if precision in ("float32", "bfloat16") else stored.dtype
        if (device.type != "cpu" and precision is not None) or stored.dtype != held:
            features += held.itemsize * stored.numel()
    return Needs(kept + _KEPT * trained + _PASSING * (table + trained), features)


def check_memory(config: RunConfig, graph: HeteroData, device: torch.device) -> None:
    """Refuse a training that cannot fit, and say what would.

    Args:
        config: The run.
        graph: The graph as it is stored.
        device: Where the model computes.

    Raises:
        ConfigError: If even the least that it takes is more than what is free.
    """
    free, sharing = available_bytes(device), 1 if device.type == "cuda" else ranks.num_local_ranks()
    needs = least_bytes(config, graph, device)
    if free is None or needs.total * sharing <= free:
        return
    fitting = [
        next((text for text, other in steps if least_bytes(other, graph, device).total * sharing <= free), None)
        for steps in _savings(config)
    ]
    cures = [text for text in fitting if text is not None]
    cure = f"with --set {' or '.join(cures)} it may fit" if cures else "it wants a larger machine"
    raise ConfigError(
        f"Training {config.model_name} on this graph takes at least {gibibytes(needs.total)} of memory in each process "
        f"(tables with gradients and optimizer {gibibytes(needs.tables)}, features {gibibytes(needs.features)}), but "
        f"{gibibytes(free)} are free: {cure}."
    )


Saving = tuple[str, RunConfig]
"""An override that may take less memory, and the configuration that it makes."""


def _savings(config: RunConfig) -> Iterator[list[Saving]]:
    """What may take less memory, each in steps, the first of which changes least."""

    def model(**values: object) -> RunConfig:
        return config.model_copy(update={"model": {**config.model, **values}})

    def training(**values: object) -> RunConfig:
        return config.model_copy(update={"training": config.training.model_copy(update=values)})

    if config.model.get("train_features", False):
        yield [("model.train_features=false", model(train_features=False))]
    if config.held_precision == "float32":
        yield [("feature_precision=bfloat16", config.model_copy(update={"feature_precision": "bfloat16"}))]
    can_be_sampled = find_model(config.model_name).needs_whole_graph(config.hyperparameters) is None
    if can_be_sampled and config.training.sampling is None:
        yield [("training.sampling={}", training(sampling=SamplingConfig()))]
    width = config.model.get("embedding_dim", 0)
    halves = [width >> times for times in range(1, width.bit_length())]
    yield [(f"model.embedding_dim={dim}", model(embedding_dim=dim)) for dim in halves]
