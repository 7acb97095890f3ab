"""Neighbour sampling: the small graph that a batch's loss depends on, unbiased for the whole one."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch_geometric import EdgeIndex
from torch_geometric.data import HeteroData

from dream_pyg.graph.schema import (
    DESCRIBES,
    INTERACTS,
    ITEM,
    REV_INTERACTS,
    USER,
    EdgeType,
    count_name,
    feature_name,
    knn_edge,
    mask_name,
    norm_name,
)

Ids = NDArray[np.int64]


class ReceptiveField(NamedTuple):
    """What of a graph the representation of a node depends on, in a given model."""

    num_hops: int = 0
    """Hops over the interactions."""
    item_knn: tuple[str, ...] = ()
    """Modalities whose item-item graph passes one hop."""
    user_knn: tuple[str, ...] = ()
    """Modalities whose user-user graph passes one hop."""
    features: tuple[str, ...] = ()
    """Modalities whose features are read: of items, and of their neighbours in the item-item graphs."""
    user_features: bool = False
    """Whether features are also read of the items of users, and of the items of their neighbours."""


class FanOuts(NamedTuple):
    """How many neighbours are drawn for a node; -1 takes all of them."""

    interactions: tuple[int, ...]
    """By hop over the interactions, from the batch outwards."""
    relations: int
    """In each relation graph."""
    features: int
    """Items whose features stand for a user's."""


class DrawnEdges(NamedTuple):
    """Edges of one type, those of a target together, targets ascending."""

    source: Ids  # local (E,)
    target: Ids  # local (E,)
    edge: Ids  # position in the whole graph (E,)
    scale: NDArray[np.float64]  # one over the probability with which it was drawn (E,)


class Neighborhood(NamedTuple):
    """Nodes of the whole graph by type, and the edges drawn among them.

    Nodes come in an order of which parts can be cut off: first the batch's own, then those that have features, then
    the rest.
    """

    nodes: dict[str, Ids]
    num_seeds: dict[str, int]
    num_described: dict[str, int]
    """How many nodes of each type have features, or have items with features."""
    edges: dict[EdgeType, DrawnEdges]


class NeighborSampler:
    r"""Draws the neighbourhood of some users and items.

    Of a node's d in-edges n are drawn by systematic sampling: each (d / n)-th from a random start on, so that none
    comes twice and each is drawn with probability n / d. With edge weights times d / n the sum over what was drawn has
    the whole sum as its expectation:

    .. math::
        \mathbb E \sum_{j \in \mathcal S(i)} \tfrac{d_i}{n} w_{ji} \mathbf x_j
        = \sum_{j \in \mathcal N(i)} w_{ji} \mathbf x_j

    A node's neighbours are drawn once and serve all hops. Over two hops this is unbiased as well, since those of a
    user and of an item are drawn independently; from the third on, a walk that returns to a node finds the same edges.

    Args:
        graph: The whole graph, on the CPU.
        field: What the model depends on.
        fan_outs: How many neighbours are drawn.
    """

    def __init__(self, graph: HeteroData, field: ReceptiveField, fan_outs: FanOuts) -> None:
        self.graph = graph
        self.field = field
        self.fan_outs = fan_outs
        self._pointers: dict[EdgeType, Ids] = {}
        self._sources: dict[EdgeType, Ids] = {}
        for edge_type in (
            *((INTERACTS, REV_INTERACTS) if field.num_hops else ()),
            *((REV_INTERACTS,) if field.user_features else ()),
            *(knn_edge(ITEM, modality) for modality in field.item_knn),
            *(knn_edge(USER, modality) for modality in field.user_knn),
        ):
            (pointer, source), _ = graph[edge_type].edge_index.get_csc()
            self._pointers[edge_type], self._sources[edge_type] = pointer.numpy(), source.numpy()
        self._met = {node: _Met(int(graph[node].num_nodes)) for node in (USER, ITEM)}

    def draw(self, user: Tensor, item: Tensor, random: np.random.Generator) -> Neighborhood:
        """Draw the neighbourhood of some nodes, which become the first of it, ascending.

        Args:
            user: User ids (B,), repeated or not.
            item: Item ids (N,), repeated or not.
            random: Where chance comes from.
        """
        users, items = self._met[USER], self._met[ITEM]
        try:
            users.add(np.unique(user.numpy()))
            items.add(np.unique(item.numpy()))
            num_seeds = {USER: len(users), ITEM: len(items)}
            edges: dict[EdgeType, DrawnEdges] = {}
            for node, modalities in ((USER, self.field.user_knn), (ITEM, self.field.item_knn)):
                for modality in modalities:
                    edge_type, seeds = knn_edge(node, modality), np.arange(num_seeds[node])
                    edges[edge_type] = self._draw(edge_type, seeds, self.fan_outs.relations, random)
            if self.field.user_features:
                described = np.arange(len(users))
                edges[DESCRIBES] = self._draw(REV_INTERACTS, described, self.fan_outs.features, random)
            num_described = {USER: len(users), ITEM: len(items)}
            if self.field.num_hops:
                edges |= self._hops(num_seeds, random)
            return Neighborhood({USER: users.ids(), ITEM: items.ids()}, num_seeds, num_described, edges)
        finally:
            users.forget()
            items.forget()

    def _hops(self, num_seeds: dict[str, int], random: np.random.Generator) -> dict[EdgeType, DrawnEdges]:
        """Edges over the interactions, hop by hop from the seeds outwards."""
        ring = {node: np.arange(number) for node, number in num_seeds.items()}
        reached = dict(ring)
        drawn: dict[EdgeType, list[DrawnEdges]] = {INTERACTS: [], REV_INTERACTS: []}
        for fan_out in self.fan_outs.interactions:
            for edge_type in drawn:
                drawn[edge_type].append(self._draw(edge_type, ring[edge_type[2]], fan_out, random))
            for edge_type in drawn:
                node = edge_type[0]
                ring[node] = np.setdiff1d(drawn[edge_type][-1].source, reached[node])
                reached[node] = np.union1d(reached[node], ring[node])
        return {edge_type: _by_target(parts) for edge_type, parts in drawn.items()}

    def _draw(self, edge_type: EdgeType, target: Ids, fan_out: int, random: np.random.Generator) -> DrawnEdges:
        """In-edges of some nodes, which are given as places among those met (T,)."""
        pointer = self._pointers[edge_type]
        node = self._met[edge_type[2]].ids()[target]
        first, degree = pointer[node], pointer[node + 1] - pointer[node]
        count = degree if fan_out < 0 else np.minimum(degree, fan_out)
        stride = degree / np.maximum(count, 1)
        start = random.random(len(target)) * (count < degree)
        own = np.repeat(np.arange(len(target)), count)
        nth = np.arange(len(own)) - (np.cumsum(count) - count)[own]
        # Rounding upwards may leave the last point just outside.
        offset = np.minimum(((nth + start[own]) * stride[own]).astype(np.int64), degree[own] - 1)
        edge = first[own] + offset
        source = self._met[edge_type[0]].add(self._sources[edge_type][edge])
        return DrawnEdges(source, target[own], edge, stride[own])


def sampled_graph(graph: HeteroData, neighborhood: Neighborhood, modalities: tuple[str, ...]) -> HeteroData:
    """A neighbourhood as a graph of its own, with what a model reads: ``n_id``, edges, weights, features.

    Weights hold the inverse probabilities. Features are read from the whole graph, which may be a file, for the nodes
    that have any; users' counts are those of the items drawn for them.

    Args:
        graph: The whole graph.
        neighborhood: What was drawn.
        modalities: Modalities whose features are read.
    """
    sampled = HeteroData()
    for node, ids in neighborhood.nodes.items():
        sampled[node].n_id = torch.from_numpy(ids)
        sampled[node].num_nodes = len(ids)
    for edge_type, drawn in neighborhood.edges.items():
        store = sampled[edge_type]
        size = _size(neighborhood, edge_type)
        index = torch.from_numpy(np.stack([drawn.source, drawn.target]))
        store.edge_index = EdgeIndex(index, sparse_size=size, sort_order="col")
        if edge_type != DESCRIBES:
            scale = torch.from_numpy(drawn.scale)
            store.edge_weight = graph[edge_type].edge_weight[torch.from_numpy(drawn.edge)].mul_(scale)
    described = sampled[ITEM].n_id[: neighborhood.num_described[ITEM]]
    for modality in modalities:
        for name in (feature_name(modality), mask_name(modality), norm_name(modality)):
            sampled[ITEM][name] = graph[ITEM][name][described]
        features = sampled[ITEM][feature_name(modality)]
        sampled[ITEM][feature_name(modality)] = features.to(torch.promote_types(features.dtype, torch.float32))
        if DESCRIBES in neighborhood.edges:
            source, target = sampled[DESCRIBES].edge_index.as_tensor()
            has = sampled[ITEM][mask_name(modality)][source]
            count = torch.bincount(target[has], minlength=neighborhood.num_described[USER])
            sampled[USER][count_name(modality)] = count
    return sampled


def _size(neighborhood: Neighborhood, edge_type: EdgeType) -> tuple[int, int]:
    """Sources that have rows, and targets that get one."""
    source, _, target = edge_type
    if edge_type in (INTERACTS, REV_INTERACTS):
        return len(neighborhood.nodes[source]), len(neighborhood.nodes[target])
    targets = neighborhood.num_described if edge_type == DESCRIBES else neighborhood.num_seeds
    return neighborhood.num_described[source], targets[target]


def _by_target(parts: list[DrawnEdges]) -> DrawnEdges:
    source, target, edge = (np.concatenate([part[column] for part in parts]) for column in range(3))
    scale = np.concatenate([part.scale for part in parts])
    if (np.diff(target) >= 0).all():
        return DrawnEdges(source, target, edge, scale)
    order = np.argsort(target, kind="stable")
    return DrawnEdges(source[order], target[order], edge[order], scale[order])


class _Met:
    """The nodes of one type in the order in which they were met, each with its place in that order."""

    def __init__(self, num_nodes: int) -> None:
        self._place = np.full(num_nodes, -1, dtype=np.int64)
        self._ids = np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ids)

    def ids(self) -> Ids:
        """All nodes met."""
        return self._ids

    def add(self, ids: Ids) -> Ids:
        """Meet some nodes, new or not; their places."""
        new = ids[self._place[ids] < 0]
        # Of a node that comes several times the last mention stays.
        mention = np.arange(len(new))
        self._place[new] = mention
        new = new[self._place[new] == mention]
        self._place[new] = len(self._ids) + np.arange(len(new))
        self._ids = np.concatenate([self._ids, new])
        return self._place[ids]

    def forget(self) -> None:
        """Begin anew; costs as much as what was met."""
        self._place[self._ids] = -1
        self._ids = self._ids[:0]
