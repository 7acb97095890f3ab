"""Relation graphs: from lists of neighbours to weighted edges, to fewer neighbours, and back."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor
from torch_geometric.data import HeteroData

from dream_pyg.data.features import Neighbors
from dream_pyg.errors import ConfigError
from dream_pyg.graph.edges import set_edges
from dream_pyg.graph.schema import ITEM, USER, EdgeType, knn_edge, knn_modalities


def add_relation_edges(graph: HeteroData, node: str, modality: str, neighbors: Neighbors) -> None:
    r"""Add one relation graph, unweighted and symmetrically normalised, :math:`D^{-1/2} S D^{-1/2}` (Eq. 5).

    D holds the row sums of the directed graph S, so a node with all its K neighbours averages them. Messages run from
    neighbour to node; a node without neighbours receives none. Each edge keeps its similarity and its ``rank`` among
    the neighbours of its target, 0 for the most similar, and the edge type its K as ``num_neighbors``.
    """
    target, slot = np.nonzero(neighbors.index >= 0)
    source = neighbors.index[target, slot]
    order = np.lexsort((source, target))
    target, slot, source = target[order], slot[order], source[order]
    edge_type = knn_edge(node, modality)
    _set_relation(graph, edge_type, torch.from_numpy(np.stack([source, target])))
    graph[edge_type].similarity = torch.from_numpy(neighbors.similarity[target, slot])
    graph[edge_type].rank = torch.from_numpy(slot.astype(np.int32))
    graph[edge_type].num_neighbors = neighbors.index.shape[1]


def cut_neighbors(graph: HeteroData, num_neighbors: int | None) -> HeteroData:
    """Keep the first ``num_neighbors`` neighbours of each node in every relation graph.

    The result is that of a build with as many neighbours; a ready kNN graph is cut as well.

    Args:
        graph: The graph, which is left as it is.
        num_neighbors: K, or None for all that there are.

    Raises:
        ConfigError: If a relation graph has fewer.
    """
    if num_neighbors is None:
        return graph
    cut = copy.copy(graph)
    for node in (USER, ITEM):
        for modality in knn_modalities(graph, node):
            edge_type = knn_edge(node, modality)
            store = graph[edge_type]
            if num_neighbors > store.num_neighbors:
                raise ConfigError(
                    f"num_neighbors is {num_neighbors}, but the graph keeps {store.num_neighbors} neighbours of each "
                    f"{node} by {modality}. Choose at most {store.num_neighbors}, or build the graph with more "
                    "(a ready kNN graph has as many as its file)."
                )
            kept = store.rank < num_neighbors
            _set_relation(cut, edge_type, store.edge_index.as_tensor()[:, kept])
            cut[edge_type].similarity = store.similarity[kept]
            cut[edge_type].rank = store.rank[kept]
            cut[edge_type].num_neighbors = num_neighbors
    return cut


def neighbors_of(graph: HeteroData, node: str, modality: str) -> Neighbors:
    """The lists of neighbours from which a relation graph was made."""
    store = graph[knn_edge(node, modality)]
    source, target = store.edge_index.as_tensor().numpy()
    shape = int(graph[node].num_nodes), int(store.num_neighbors)
    index, similarity = np.full(shape, -1, dtype=np.int64), np.zeros(shape, dtype=np.float32)
    rank = store.rank.numpy()
    index[target, rank], similarity[target, rank] = source, store.similarity.numpy()
    return Neighbors(index, similarity)


def _set_relation(graph: HeteroData, edge_type: EdgeType, edges: Tensor) -> None:
    source, target = edges
    # A neighbour without neighbours of its own (possible in a ready graph) has no degree to normalise by.
    degree = torch.bincount(target, minlength=graph[edge_type[0]].num_nodes).clamp(min=1).double()
    weight = 1.0 / (degree[source] * degree[target]).sqrt()
    set_edges(graph, edge_type, edges, weight.float())
