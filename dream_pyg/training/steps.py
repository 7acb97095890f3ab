"""What each step of a training sees: the whole graph and a batch, or a sampled graph and the batch's places in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch_geometric.data import HeteroData

from dream_pyg import ranks
from dream_pyg.config import SamplingConfig
from dream_pyg.errors import ConfigError
from dream_pyg.graph.sampling import FanOuts, NeighborSampler, sampled_graph
from dream_pyg.graph.schema import ITEM, USER
from dream_pyg.models import Batch, Recommender


def _own_slice(batch: Batch) -> Batch:
    """What of a batch this process takes."""
    return Batch(*(part.tensor_split(ranks.num_ranks())[ranks.rank()] for part in batch))


class WholeGraphSteps:
    """Every step sees the same whole graph.

    Args:
        graph: The graph, on the device of the model.
        device: That device.
    """

    def __init__(self, graph: HeteroData, device: torch.device) -> None:
        self._graph = graph
        self._device = device

    def __call__(self, batches: Sequence[Batch], epoch: int, first: int) -> Iterator[tuple[HeteroData, Batch]]:
        """The graph with each batch from the ``first`` on."""
        for batch in batches[first:]:
            yield self._graph, self._sent(_own_slice(batch))

    def _sent(self, batch: Batch) -> Batch:
        """The batch where the model is; a GPU is not waited for."""
        if self._device.type == "cpu":
            return batch
        return Batch(*torch.stack(batch).pin_memory().to(self._device, non_blocking=True))


class SampledSteps:
    """Every step sees the neighbourhood of its batch, drawn by chance that depends on seed, epoch, step and rank alone.

    Drawing the next one in another thread meanwhile was a quarter slower on two cores, whose threads a step uses all.

    Args:
        graph: The whole graph, on the CPU.
        model: The model, whose receptive field is drawn.
        sampling: How many neighbours are drawn.
        seed: The run's seed.
        device: Where the model computes.

    Raises:
        ConfigError: If the model cannot be trained so, or propagates over more hops than there are fan-outs.
    """

    def __init__(
        self, graph: HeteroData, model: Recommender, sampling: SamplingConfig, *, seed: int, device: torch.device
    ) -> None:
        field, why = model.receptive_field(), model.needs_whole_graph(model.config)
        name = type(model).__name__
        if field is None or why is not None:
            raise ConfigError(f"{name} cannot be trained on sampled graphs: {why}. Train it on the whole graph.")
        if field.num_hops > len(sampling.interactions):
            raise ConfigError(
                f"{name} propagates over {field.num_hops} hops, but training.sampling.interactions has fan-outs for "
                f"{len(sampling.interactions)}: {list(sampling.interactions)}. Give one for each hop."
            )
        fan_outs = FanOuts(sampling.interactions[: field.num_hops], sampling.relations, sampling.features)
        self._graph = graph
        self._sampler = NeighborSampler(graph, field, fan_outs)
        self._negatives = sampling.negatives
        self._in_batch = sampling.in_batch_negatives
        self._seed = seed
        self._device = device

    def __call__(self, batches: Sequence[Batch], epoch: int, first: int) -> Iterator[tuple[HeteroData, Batch]]:
        """The neighbourhood of each batch from the ``first`` on."""
        for step in range(first, len(batches)):
            graph, batch = self._draw(batches[step], epoch, step)
            yield graph.to(self._device), Batch(*(part.to(self._device) for part in batch))

    def _draw(self, batch: Batch, epoch: int, step: int) -> tuple[HeteroData, Batch]:
        batch = _own_slice(batch)
        random = np.random.default_rng([self._seed, epoch, step, ranks.rank()])
        item = torch.cat([batch.pos_item, batch.neg_item])
        mentions = torch.ones(2, len(batch.user))
        mentions[1] = self._negatives
        if self._in_batch:  # Some are no positives of this process's slice, or of no batch.
            mentions[1].masked_fill_(torch.isin(batch.neg_item, batch.pos_item), 0)
        neighborhood = self._sampler.draw(batch.user, item, random, mentions.flatten())
        seeds = {
            node: torch.from_numpy(ids[: neighborhood.num_seeds[node]]) for node, ids in neighborhood.nodes.items()
        }
        pos_item, neg_item = torch.searchsorted(seeds[ITEM], item).chunk(2)
        local = Batch(torch.searchsorted(seeds[USER], batch.user), pos_item, neg_item)
        return sampled_graph(self._graph, neighborhood), local
