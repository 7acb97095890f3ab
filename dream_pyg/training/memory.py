"""Whether memory suffices for a training, told before it starts instead of by the system in the middle."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch_geometric.data import HeteroData

from dream_pyg import ranks
from dream_pyg.config import RunConfig, SamplingConfig
from dream_pyg.errors import ConfigError
from dream_pyg.graph.processor import available_bytes, gibibytes
from dream_pyg.graph.schema import ITEM, USER, feature_modalities, feature_name
from dream_pyg.models import Recommender, find_model

_KEPT = 3
"""Copies of the tables that a training keeps: weights and Adam's two moments."""
_PASSING = 2
"""Copies that come and go: gradients, or the rows that a validation propagates, and the weights as they are saved. What
a model adds to that is its own."""
_BYTES = {"float32": 4, "bfloat16": 2, "stored": 0}


class Needs(NamedTuple):
    """Bytes that a training takes at least."""

    tables: int
    features: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.tables + self.features


def least_bytes(config: RunConfig, graph: HeteroData) -> Needs:
    """What the tables of a model, with gradients and optimizer, and the features it is given take at least.

    Args:
        config: The run; a model without ``embedding_dim`` has no tables.
        graph: The graph as it is stored.
    """
    num_rows = int(graph[USER].num_nodes) + int(graph[ITEM].num_nodes)
    table = 4 * num_rows * config.model.get("embedding_dim", 0)
    kept = _KEPT * table // (ranks.num_ranks() if config.training.shard_tables else 1)
    needs_features = find_model(config.model_name).requirements(config.hyperparameters).features
    per_number = _BYTES[config.held_precision] if needs_features else 0
    numbers = sum(graph[ITEM][feature_name(modality)].numel() for modality in feature_modalities(graph))
    return Needs(kept + _PASSING * table, per_number * numbers)


def check_memory(config: RunConfig, graph: HeteroData, device: torch.device) -> None:
    """Refuse a training that cannot fit, and say what would.

    Args:
        config: The run.
        graph: The graph as it is stored.
        device: Where the model computes.

    Raises:
        ConfigError: If even the least that it takes is more than what is free.
    """
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes()
    needs = least_bytes(config, graph)
    if free is None or needs.total * ranks.num_local_ranks() <= free:
        return
    fitting = [
        change
        for change, other in _savings(config).items()
        if least_bytes(other, graph).total * ranks.num_local_ranks() <= free
    ]
    cure = (
        f"with --set {' or '.join(fitting)} it may fit" if fitting else "it wants a larger machine, or shorter tables"
    )
    raise ConfigError(
        f"Training {config.model_name} on this graph takes at least {gibibytes(needs.total)} of memory in each process "
        f"(tables with gradients and optimizer {gibibytes(needs.tables)}, features {gibibytes(needs.features)}), but "
        f"{gibibytes(free)} are free: {cure}."
    )


def _savings(config: RunConfig) -> dict[str, RunConfig]:
    """What takes less memory, each as an override and as the configuration it makes."""
    savings = {}
    if config.held_precision == "float32":
        savings["feature_precision=bfloat16"] = config.model_copy(update={"feature_precision": "bfloat16"})
    can_sample = find_model(config.model_name).receptive_field is not Recommender.receptive_field
    if can_sample and config.training.sampling is None:
        training = config.training.model_copy(update={"sampling": SamplingConfig()})
        savings["training.sampling={}"] = config.model_copy(update={"training": training})
    if dim := config.model.get("embedding_dim", 0) // 2:
        model = {**config.model, "embedding_dim": dim}
        savings[f"model.embedding_dim={dim}"] = config.model_copy(update={"model": model})
    return savings
