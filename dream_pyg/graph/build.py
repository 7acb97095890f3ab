"""From a dataset to a graph: HeteroData with train edges, features and relation graphs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch_geometric.data import HeteroData

from dream_pyg.data.dataset import Dataset
from dream_pyg.data.features import FeatureMatrix, Neighbors
from dream_pyg.graph.csr import csr_product
from dream_pyg.graph.edges import add_interaction_edges
from dream_pyg.graph.knn import cosine_knn
from dream_pyg.graph.relations import add_relation_edges
from dream_pyg.graph.schema import (
    INTERACTS,
    ITEM,
    SPLITS,
    USER,
    count_name,
    feature_name,
    label_name,
    mask_name,
    norm_name,
)

Search = Callable[..., Neighbors]
"""Finds neighbours with the arguments of :func:`~dream_pyg.graph.knn.cosine_knn`."""

_USER_BLOCK_ELEMENTS = 1 << 26


def build_graph(
    dataset: Dataset,
    *,
    num_neighbors: int = 10,
    include_self: bool = False,
    user_graphs: bool = True,
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
        search: What finds the neighbours.

    Returns:
        The graph; see :mod:`dream_pyg.graph.schema` for its names.

    Raises:
        ConfigError: If ``num_neighbors`` does not fit the number of items or users.
    """
    interactions = dataset.interactions
    graph = HeteroData()
    graph[USER].num_nodes = interactions.num_users
    graph[ITEM].num_nodes = interactions.num_items
    for split in SPLITS:
        graph[INTERACTS][label_name(split)] = torch.from_numpy(interactions.pairs(split))
    add_interaction_edges(graph)
    for name, modality in dataset.modalities.items():
        neighbors = modality.neighbors
        if modality.features is not None:
            _add_features(graph, name, modality.features)
            if neighbors is None:
                neighbors = search(
                    modality.features,
                    num_neighbors,
                    include_self=include_self,
                    what=f"items by {name}",
                )
            if user_graphs:
                user_features = UserFeatures(interactions.pairs("train"), interactions.num_users, modality.features)
                user_neighbors = search(
                    user_features,
                    num_neighbors,
                    include_self=include_self,
                    what=f"users by {name}",
                )
                add_relation_edges(graph, USER, name, user_neighbors)
        if neighbors is not None:
            add_relation_edges(graph, ITEM, name, neighbors)
    return graph


class UserFeatures:
    """User features, the mean of the features of a user's train items (Section 3.1), a block of users at a time.

    Args:
        pairs: Train users and items (2, E).
        num_users: U.
        features: Item features (I, F).
    """

    def __init__(self, pairs: np.ndarray, num_users: int, features: FeatureMatrix) -> None:
        order = np.argsort(pairs[0], kind="stable")
        self._item = pairs[1][order]
        self._pointer = np.concatenate([[0], np.bincount(pairs[0], minlength=num_users).cumsum()])
        self._features = features
        self._has = features.has.astype(np.float32)
        self.shape = (num_users, features.shape[1])

    def take(self, start: int, stop: int) -> np.ndarray:
        """The features of users ``start`` to ``stop`` as float32 (stop - start, F); zeros for a user without any."""
        return self.take_rows(np.arange(start, min(stop, self.shape[0])))

    def take_rows(self, index: np.ndarray) -> np.ndarray:
        """The features of some users as float32 (N, F), in any order."""
        count = self._pointer[index + 1] - self._pointer[index]
        pointer = np.concatenate([[0], count.cumsum()])
        entry = np.arange(pointer[-1]) + np.repeat(self._pointer[index] - pointer[:-1], count)
        unique, position = np.unique(self._item[entry], return_inverse=True)
        total = np.zeros((len(index), self.shape[1]), dtype=np.float32)
        count_with = np.zeros((len(index), 1), dtype=np.float32)
        # Item rows arrive in chunks, so memory stays bounded however many items the users of a block have.
        chunk = max(1, _USER_BLOCK_ELEMENTS // self.shape[1])
        for first in range(0, len(unique), chunk):
            items = unique[first : first + chunk]
            within = (position >= first) & (position < first + chunk)
            kept_before = np.concatenate([[0], np.cumsum(within)])
            rows = self._features.take_rows(items)
            with_count = torch.from_numpy(np.concatenate([rows, self._has[items, None]], axis=1))
            summed = csr_product(
                torch.from_numpy(kept_before[pointer]),
                torch.from_numpy(position[within] - first),
                torch.ones(int(within.sum())),
                (len(index), len(items)),
                with_count,
            ).numpy()
            total += summed[:, :-1]
            count_with += summed[:, -1:]
        return total / np.maximum(count_with, 1)


def _add_features(graph: HeteroData, modality: str, features: FeatureMatrix) -> None:
    norm = np.concatenate(
        [np.linalg.norm(features.take(start, start + 4096), axis=1) for start in range(0, features.shape[0], 4096)]
    )
    graph[ITEM][feature_name(modality)] = torch.from_numpy(features.to_array())
    graph[ITEM][mask_name(modality)] = torch.from_numpy(features.has)
    graph[ITEM][norm_name(modality)] = torch.from_numpy(norm)
    user, item = graph[INTERACTS][label_name("train")]
    has = graph[ITEM][mask_name(modality)]
    graph[USER][count_name(modality)] = torch.bincount(user[has[item]], minlength=graph[USER].num_nodes)
