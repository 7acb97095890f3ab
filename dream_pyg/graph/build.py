"""From a dataset to a graph: HeteroData with train edges, features and relation graphs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch_geometric.data import HeteroData

from dream_pyg.data.dataset import Dataset
from dream_pyg.data.features import FeatureMatrix
from dream_pyg.errors import DataError
from dream_pyg.graph.edges import add_interaction_edges
from dream_pyg.graph.knn import Engine, FoundNeighbors, MeanRows, Rows, SearchReport, cosine_knn
from dream_pyg.graph.relations import add_relation_edges
from dream_pyg.graph.schema import (
    COLD,
    INTERACTS,
    ITEM,
    SPLITS,
    USER,
    EdgeType,
    count_name,
    feature_name,
    knn_edge,
    label_name,
    mask_name,
    norm_name,
)

Search = Callable[..., FoundNeighbors]
"""Finds neighbours with the arguments of :func:`~dream_pyg.graph.knn.cosine_knn`."""


def build_graph(
    dataset: Dataset,
    *,
    num_neighbors: int = 10,
    include_self: bool = False,
    user_graphs: bool = True,
    engine: Engine = "auto",
    min_recall: float = 0.98,
    reports: dict[EdgeType, SearchReport] | None = None,
    search: Search = cosine_knn,
) -> HeteroData:
    """Build the user-item graph and the relation graphs of every modality (DREAM, arXiv 2404.11119, Eq. 1 and 5).

    Only train interactions become edges and user features; valid and test pairs are labels. A ready kNN graph of a
    modality is taken as it is in place of the search.

    Args:
        dataset: Interactions, features and ready graphs.
        num_neighbors: K of every relation graph that is searched here.
        include_self: Whether a node counts as one of its own K neighbours.
        user_graphs: Whether user-user graphs are built as well.
        engine: How neighbours are searched; see :func:`dream_pyg.graph.knn.cosine_knn`.
        min_recall: The share of the true neighbours that an approximate engine has to find at least.
        reports: Takes what each search tells of itself, by edge type.
        search: What finds the neighbours.

    Returns:
        The graph; see :mod:`dream_pyg.graph.schema` for its names.

    Raises:
        ConfigError: If ``num_neighbors`` does not fit the number of items or users.
        SearchError: If an engine cannot reach ``min_recall``, or memory does not suffice for it.
    """

    def neighbors_by(rows: Rows, node: str, modality: str) -> FoundNeighbors:
        found = search(
            rows,
            num_neighbors,
            include_self=include_self,
            engine=engine,
            min_recall=min_recall,
            what=f"{node}s by {modality}",
        )
        if reports is not None:
            reports[knn_edge(node, modality)] = found.report
        return found

    interactions = dataset.interactions
    graph = HeteroData()
    graph[USER].num_nodes = interactions.num_users
    graph[ITEM].num_nodes = interactions.num_items
    for split in SPLITS:
        graph[INTERACTS][label_name(split)] = torch.from_numpy(interactions.pairs(split))
    if interactions.cold is not None and interactions.cold.size:
        graph[INTERACTS][label_name(COLD)] = torch.from_numpy(interactions.cold)
    add_interaction_edges(graph)
    for name, modality in dataset.modalities.items():
        neighbors = modality.neighbors
        if modality.features is not None:
            _add_features(graph, name, modality.features)
            if neighbors is None:
                neighbors = neighbors_by(modality.features, ITEM, name)
            if user_graphs:
                user_features = MeanRows(interactions.pairs("train"), interactions.num_users, modality.features)
                add_relation_edges(graph, USER, name, neighbors_by(user_features, USER, name))
        if neighbors is not None:
            add_relation_edges(graph, ITEM, name, neighbors)
    return graph


def _add_features(graph: HeteroData, modality: str, features: FeatureMatrix) -> None:
    # In float64, where no square of a float32 is too large or too small.
    blocks = (features.take(start, start + 4096) for start in range(0, features.shape[0], 4096))
    norm = np.concatenate([np.linalg.norm(rows.astype(np.float64), axis=1).astype(np.float32) for rows in blocks])
    if not np.isfinite(norm).all():
        raise DataError(
            f"Features of {modality}: the norm of row {int((~np.isfinite(norm)).argmax()) + 1} exceeds float32. Scale "
            "the features."
        )
    graph[ITEM][feature_name(modality)] = torch.from_numpy(features.to_array())
    graph[ITEM][mask_name(modality)] = torch.from_numpy(features.has)
    graph[ITEM][norm_name(modality)] = torch.from_numpy(norm)
    user, item = graph[INTERACTS][label_name("train")]
    has = graph[ITEM][mask_name(modality)]
    graph[USER][count_name(modality)] = torch.bincount(user[has[item]], minlength=graph[USER].num_nodes)
