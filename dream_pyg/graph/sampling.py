"""Neighbour sampling: the small graph that a batch's loss depends on, unbiased for the whole one."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch_geometric import EdgeIndex
from torch_geometric.data import HeteroData
from torch_geometric.data.storage import EdgeStorage, NodeStorage

from dream_pyg.graph.csr import row_entries, row_pointer
from dream_pyg.graph.schema import (
    INTERACTS,
    ITEM,
    REV_INTERACTS,
    USER,
    EdgeType,
    count_name,
    describes_edge,
    feature_name,
    knn_edge,
    mask_name,
    norm_name,
    senders_name,
)

Ids = NDArray[np.int64]
Mentions = NDArray[np.number[Any]]


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
    relations_after_hops: bool = False
    """Whether what relation graphs pass has made the hops over the interactions before, not only what nodes are."""


class FanOuts(NamedTuple):
    """How many neighbours are drawn for each mention of a node; -1 takes all of them.

    A node that a batch mentions several times, or that is reached over several edges, gets as many times more: the
    draws are those of one tree for each mention, made without repetition. Less than a mention gets less, at least one.
    That a node of the batch sends over a relation graph is no further mention.
    """

    interactions: tuple[int, ...]
    """By hop over the interactions, from the batch outwards."""
    relations: int
    """In each relation graph, beside those that are of the batch."""
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

    Nodes come in the order in which they were met: first the batch's own, then their neighbours in the relation graphs,
    then one ring over the interactions after the other.
    """

    nodes: dict[str, Ids]
    num_seeds: dict[str, int]
    """Nodes of the batch."""
    senders: dict[tuple[str, str], Ids]
    """Of a node type and a modality, the places of those that may send over its relation graph: the batch's nodes, then
    their neighbours in it."""
    num_within: list[dict[str, int]]
    """Nodes within 0, 1, ... hops of the batch, or of all senders: those that have a representation after all hops but
    as many."""
    described: dict[str, Ids]
    """By modality the items whose features are read: the senders, then those drawn for users that are senders."""
    edges: dict[EdgeType, DrawnEdges]
    """Sources and targets of those over the interactions are places among the nodes. Those of a modality's edges are
    places among its senders, or among what is described."""


class NeighborSampler:
    r"""Draws the neighbourhood of some users and items.

    Of a node's d in-edges n are drawn by systematic sampling: each (d / n)-th from a random start on, so that none
    comes twice and each is drawn with probability n / d. With edge weights times d / n the sum over what was drawn has
    the whole sum as its expectation:

    .. math::
        \mathbb E \sum_{j \in \mathcal S(i)} \tfrac{d_i}{n} w_{ji} \mathbf x_j
        = \sum_{j \in \mathcal N(i)} w_{ji} \mathbf x_j

    In a relation graph those of a node's neighbours that are of the batch are taken all, and n of the others.

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
        self._positions: dict[EdgeType, Ids] = {}
        for edge_type in (
            *((INTERACTS, REV_INTERACTS) if field.num_hops else ()),
            *(knn_edge(ITEM, modality) for modality in field.item_knn),
            *(knn_edge(USER, modality) for modality in field.user_knn),
        ):
            (pointer, source), _ = graph[edge_type].edge_index.get_csc()
            self._pointers[edge_type], self._sources[edge_type] = pointer.numpy(), source.numpy()
        for modality in field.features if field.user_features else ():
            # Of the items of a user only those that have the modality can stand for the others.
            (pointer, source), _ = graph[REV_INTERACTS].edge_index.get_csc()
            has, edge_type = graph[ITEM][mask_name(modality)], describes_edge(modality)
            if not has.all():
                kept = has[source]
                self._positions[edge_type] = kept.nonzero().squeeze(1).numpy()
                pointer, source = row_pointer(kept)[pointer], source[kept]
            self._pointers[edge_type], self._sources[edge_type] = pointer.numpy(), source.numpy()
        self._met = {node: _Met(int(graph[node].num_nodes)) for node in (USER, ITEM)}
        senders = {
            ITEM: dict.fromkeys((*field.item_knn, *field.features)),
            USER: dict.fromkeys((*field.user_knn, *(field.features if field.user_features else ()))),
        }
        self._senders = {
            (node, modality): _Met(int(graph[node].num_nodes))
            for node, modalities in senders.items()
            for modality in modalities
        }

    def draw(
        self, user: Tensor, item: Tensor, random: np.random.Generator, item_mentions: Tensor | None = None
    ) -> Neighborhood:
        """Draw the neighbourhood of some nodes, which become the first of it, ascending.

        Args:
            user: User ids (B,), repeated or not.
            item: Item ids (N,), repeated or not.
            random: Where chance comes from.
            item_mentions: How much of a mention each of the items is (N,); by default one.
        """
        met = self._met
        try:
            mentions = {
                USER: met[USER].begin(user.numpy()),
                ITEM: met[ITEM].begin(item.numpy(), None if item_mentions is None else item_mentions.numpy()),
            }
            num_seeds = {node: len(met[node]) for node in met}
            edges, places, sender_mentions, inner_mentions = self._relations(mentions, num_seeds, random)
            for modality in self.field.features if self.field.user_features else ():
                users, items = self._senders[USER, modality], self._senders[ITEM, modality]
                wanted = _wanted(sender_mentions[USER, modality], self.fan_outs.features)
                # The senders among items go on to be what is described.
                edges[describes_edge(modality)] = self._draw(
                    describes_edge(modality), users.ids(), wanted, items, random
                )
            described = {modality: self._senders[ITEM, modality].ids() for modality in self.field.features}
            if self.field.relations_after_hops:
                mentions, num_within = inner_mentions, [{node: len(met[node]) for node in met}]
            else:
                num_within = [num_seeds]
            edges |= self._hops(mentions, num_within, random)
            nodes = {node: met[node].ids() for node in met}
            return Neighborhood(nodes, num_seeds, places, num_within, described, edges)
        finally:
            for one in (*met.values(), *self._senders.values()):
                one.forget()

    def _relations(
        self, mentions: dict[str, Mentions], num_seeds: dict[str, int], random: np.random.Generator
    ) -> tuple[
        dict[EdgeType, DrawnEdges], dict[tuple[str, str], Ids], dict[tuple[str, str], Mentions], dict[str, Mentions]
    ]:
        """Edges to the batch over each relation graph, and the places of the senders that they make.

        Also how often the senders of each modality were mentioned, and how often all nodes met so far.
        """
        edges: dict[EdgeType, DrawnEdges] = {}
        places, of_senders, of_all = {}, {}, dict(mentions)
        for (node, modality), senders in self._senders.items():
            senders.add(self._met[node].ids()[: num_seeds[node]])
            reached = np.zeros(len(senders), dtype=np.int64)
            edge_type = knn_edge(node, modality)
            if edge_type in self._pointers:
                wanted = _wanted(mentions[node], self.fan_outs.relations)
                edges[edge_type] = drawn = self._draw_relation(edge_type, wanted, senders, random)
                # That the batch's own nodes send more than once says little of how much they matter.
                reached = np.bincount(drawn.source, minlength=len(senders))
                reached[: num_seeds[node]] = 0
            of_senders[node, modality] = _sum(mentions[node], reached)
            places[node, modality] = place = self._met[node].add(senders.ids())
            of_all[node] = _sum(of_all[node], np.bincount(place, reached, minlength=len(self._met[node])))
        return edges, places, of_senders, of_all

    def _hops(
        self, mentions: dict[str, Mentions], num_within: list[dict[str, int]], random: np.random.Generator
    ) -> dict[EdgeType, DrawnEdges]:
        """Edges over the interactions, from some nodes outwards; appends how many nodes lie within each hop.

        Args:
            mentions: How often each node was mentioned, by place; 0 for those that have their edges already.
            num_within: Of these nodes.
            random: Where chance comes from.
        """
        drawn: dict[EdgeType, list[DrawnEdges]] = {INTERACTS: [], REV_INTERACTS: []}
        reached = {node: np.ones(len(number), dtype=bool) for node, number in mentions.items()}
        for fan_out in self.fan_outs.interactions:
            for edge_type, parts in drawn.items():
                source, _, target = edge_type
                ring = np.flatnonzero(mentions[target])
                wanted = _wanted(mentions[target][ring], fan_out)
                of_ring = self._draw(edge_type, self._met[target].ids()[ring], wanted, self._met[source], random)
                parts.append(of_ring._replace(target=ring[of_ring.target]))
            for (node, *_), parts in drawn.items():
                number = len(self._met[node])
                reached[node] = np.pad(reached[node], (0, number - len(reached[node])))
                mentions[node] = np.bincount(parts[-1].source, minlength=number) * ~reached[node]
                reached[node] |= mentions[node] > 0
            num_within.append({node: len(met) for node, met in self._met.items()})
        return {edge_type: _by_target(parts) for edge_type, parts in drawn.items() if parts}

    def _draw(
        self, edge_type: EdgeType, node: Ids, wanted: Ids, sources: _Met, random: np.random.Generator
    ) -> DrawnEdges:
        """In-edges of some nodes, whose places among them are the targets.

        Args:
            edge_type: Their type.
            node: The nodes (T,).
            wanted: How many for each (T,), all where it is negative.
            sources: Where the other ends are met.
            random: Where chance comes from.
        """
        pointer = self._pointers[edge_type]
        own, nth, stride = _systematic(pointer[node + 1] - pointer[node], wanted, random)
        edge = pointer[node][own] + nth
        source = sources.add(self._sources[edge_type][edge])
        if edge_type in self._positions:
            edge = self._positions[edge_type][edge]
        return DrawnEdges(source, own, edge, stride)

    def _draw_relation(
        self, edge_type: EdgeType, wanted: Ids, senders: _Met, random: np.random.Generator
    ) -> DrawnEdges:
        """In-edges of the batch over a relation graph: all from the batch itself, and some of the others.

        The rows of the batch are there anyway, that of a node which is its own neighbour among them.

        Args:
            edge_type: Their type.
            wanted: How many of the others for each node of the batch (T,), all where it is negative.
            senders: Of which the nodes of the batch (T,) have been met, and the others are now.
            random: Where chance comes from.
        """
        node = senders.ids()
        entries = row_entries(torch.from_numpy(self._pointers[edge_type]), torch.from_numpy(node))
        target, edge = (part.numpy() for part in entries)
        is_known = senders.has(self._sources[edge_type][edge])
        others = np.flatnonzero(~is_known)
        num_others = np.bincount(target[others], minlength=len(node))
        own, nth, stride = _systematic(num_others, wanted, random)
        scale = is_known.astype(np.float64)
        scale[others[(np.cumsum(num_others) - num_others)[own] + nth]] = stride
        drawn = np.flatnonzero(scale)
        source = senders.add(self._sources[edge_type][edge[drawn]])
        return DrawnEdges(source, target[drawn], edge[drawn], scale[drawn])


def sampled_graph(graph: HeteroData, neighborhood: Neighborhood) -> HeteroData:
    """A neighbourhood as a graph of its own, with what a model reads: ``n_id``, edges, weights, features.

    Weights hold the inverse probabilities. Features are read from the whole graph, which may be a file, for the items
    that are described; users' counts are those of the items drawn for them.

    Args:
        graph: The whole graph.
        neighborhood: What was drawn.
    """
    sampled = HeteroData()
    for node, ids in neighborhood.nodes.items():
        sampled[node].n_id = torch.from_numpy(ids)
        sampled[node].num_nodes = len(ids)
    for edge_type, drawn in neighborhood.edges.items():
        if edge_type in (INTERACTS, REV_INTERACTS):
            sampled[edge_type].hops = _hops(neighborhood, edge_type, _index(drawn), _weight(graph, edge_type, drawn))
    for (node, modality), place in neighborhood.senders.items():
        sampled[node][senders_name(modality)] = torch.from_numpy(place)
        edge_type = knn_edge(node, modality)
        if edge_type in neighborhood.edges:
            drawn, size = neighborhood.edges[edge_type], (len(place), neighborhood.num_seeds[node])
            sampled[edge_type].edge_index = EdgeIndex(_index(drawn), sparse_size=size, sort_order="col")
            sampled[edge_type].edge_weight = _weight(graph, edge_type, drawn)
    for modality, ids in neighborhood.described.items():
        item = torch.from_numpy(ids)
        for name in (feature_name(modality), mask_name(modality), norm_name(modality)):
            sampled[ITEM][name] = graph[ITEM][name].index_select(0, item)
        edge_type = describes_edge(modality)
        if edge_type in neighborhood.edges:
            index = _index(neighborhood.edges[edge_type])
            size = len(item), len(neighborhood.senders[USER, modality])
            sampled[edge_type].edge_index = EdgeIndex(index, sparse_size=size, sort_order="col")
            sampled[USER][count_name(modality)] = torch.bincount(index[1], minlength=size[1])
    return sampled


def sending_rows(nodes: NodeStorage, modality: str, rows: Tensor) -> Tensor:
    """The rows of the nodes that may send over a modality's relation graph: in a whole graph all of them."""
    name = senders_name(modality)
    return rows.index_select(0, nodes[name]) if name in nodes else rows


def interaction_hops(store: EdgeStorage, num_hops: int) -> list[tuple[EdgeIndex, Tensor]]:
    """Edges and weights of each hop over one direction of the interactions, in the order in which they are made.

    A hop over the whole graph is the same each time; over a sampled one it only reaches what later hops need.
    """
    if num_hops == 0:
        return []
    return store.hops if "hops" in store else [(store.edge_index, store.edge_weight)] * num_hops


def _index(drawn: DrawnEdges) -> Tensor:
    return torch.from_numpy(np.stack([drawn.source, drawn.target]))


def _weight(graph: HeteroData, edge_type: EdgeType, drawn: DrawnEdges) -> Tensor:
    """The whole graph's weights over the probabilities."""
    weight: Tensor = graph[edge_type].edge_weight.index_select(0, torch.from_numpy(drawn.edge))
    return weight.mul_(torch.from_numpy(drawn.scale))


def _hops(
    neighborhood: Neighborhood, edge_type: EdgeType, index: Tensor, weight: Tensor
) -> list[tuple[EdgeIndex, Tensor]]:
    source, _, target = edge_type
    hops = []
    for near, far in reversed(list(pairwise(neighborhood.num_within))):
        # Edges go by target, so those to the nearer nodes are the first.
        last = int(torch.searchsorted(index[1].contiguous(), near[target]))
        edges = EdgeIndex(index[:, :last].contiguous(), sparse_size=(far[source], near[target]), sort_order="col")
        hops.append((edges, weight[:last]))
    return hops


def _wanted(mentions: Mentions, fan_out: int) -> Ids:
    """How many neighbours nodes get that are mentioned so often; all are a negative number."""
    # Shares of a mention add up to a whole one but for rounding.
    return np.ceil(mentions * fan_out - 1e-6).astype(np.int64) if fan_out >= 0 else np.full(len(mentions), -1)


def _systematic(degree: Ids, wanted: Ids, random: np.random.Generator) -> tuple[Ids, Ids, NDArray[np.float64]]:
    """Some of each of several rows of edges: the row, the place in it and one over the probability of each (E,).

    Args:
        degree: Length of each row (T,).
        wanted: How many are drawn of each (T,), all where it is negative.
        random: Where chance comes from.
    """
    count = np.where(wanted < 0, degree, np.minimum(degree, wanted))
    stride = degree / np.maximum(count, 1)
    start = random.random(len(degree)) * (count < degree)
    own = np.repeat(np.arange(len(degree)), count)
    nth = np.arange(len(own)) - (np.cumsum(count) - count)[own]
    # Rounding upwards may leave the last point just outside.
    place = np.minimum(((nth + start[own]) * stride[own]).astype(np.int64), degree[own] - 1)
    return own, place, stride[own]


def _sum(mentions: Mentions, more: Mentions) -> Mentions:
    """Mentions of some nodes and of these and further ones, together."""
    return np.pad(mentions, (0, len(more) - len(mentions))) + more


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

    def begin(self, ids: Ids, share: NDArray[np.float32] | None = None) -> Mentions:
        """Meet the first nodes, ascending; how often each comes in ``ids``, or the sum of its shares."""
        first, place = np.unique(ids, return_inverse=True)
        self.add(first)
        return np.bincount(place, share)

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

    def has(self, ids: Ids) -> NDArray[np.bool_]:
        """Which of some nodes have been met."""
        return self._place[ids] >= 0

    def forget(self) -> None:
        """Begin anew; costs as much as what was met."""
        self._place[self._ids] = -1
        self._ids = self._ids[:0]
