"""Small graphs for tests, built by the package's own functions from arrays that an oracle can start from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch_geometric.data import HeteroData

from dream_pyg.data.dataset import Dataset, DatasetConfig, Modality
from dream_pyg.data.features import FeatureMatrix
from dream_pyg.data.interactions import SPLITS, TEST, TRAIN, VALID, Interactions
from dream_pyg.graph.build import build_graph
from dream_pyg.graph.edges import add_interaction_edges
from dream_pyg.graph.schema import (
    INTERACTS,
    ITEM,
    USER,
    feature_modalities,
    feature_name,
    knn_edge,
    label_name,
    norm_name,
)
from dream_pyg.graph.store import StoredGraph, build_store
from dream_pyg.models import Batch

MODALITIES = ("image", "text", "audio")
WIDTHS = {"image": 7, "text": 5, "audio": 3}

# Nodes of `random_dataset` that are special on purpose.
ITEM_WITHOUT_FEATURES = 0
ITEM_WITHOUT_FIRST_MODALITY = 1
USER_WITHOUT_FEATURES = 0
USER_WITHOUT_INTERACTIONS = 1


def random_dataset(modalities: Sequence[str] = MODALITIES[:2], *, seed: int = 0) -> Dataset:
    """A random dataset with every special case.

    Item 0 has no features at all, item 1 lacks the first modality, and the last item is cold (no train interaction).
    User 0 took only item 0 and so has no features, user 1 took nothing. Features are multiples of 1/64, so float32
    sums of them are exact.
    """
    num_users, num_items = 12, 10
    generator = np.random.default_rng(seed)
    train = generator.random((num_users, num_items)) < 0.35
    train[:, -1] = False
    train[USER_WITHOUT_FEATURES] = np.arange(num_items) == ITEM_WITHOUT_FEATURES
    train[USER_WITHOUT_INTERACTIONS] = False
    train[np.arange(2, num_users), 1 + np.arange(2, num_users) % (num_items - 2)] = True
    split = np.where(train, TRAIN, -1)
    for user in np.flatnonzero(train.any(axis=1)):
        split[user, generator.permutation(np.flatnonzero(~train[user]))[:3]] = [VALID, TEST, TEST]
    user, item = np.nonzero(split >= 0)
    shuffled = generator.permutation(len(user))
    features = {}
    for name in modalities:
        rows = generator.integers(-128, 129, (num_items, WIDTHS[name])) / 64
        lacking = [ITEM_WITHOUT_FEATURES, *([ITEM_WITHOUT_FIRST_MODALITY] if name == modalities[0] else [])]
        features[name] = Modality(_feature_matrix(rows, np.isin(np.arange(num_items), lacking)))
    interactions = _interactions(user[shuffled], item[shuffled], split[user, item][shuffled], (num_users, num_items))
    return Dataset("random", interactions, features, {})


def interaction_graph(matrix: NDArray[Any]) -> HeteroData:
    """The graph of some train interactions (U, I) and nothing else."""
    graph = HeteroData()
    graph[USER].num_nodes, graph[ITEM].num_nodes = matrix.shape
    graph[INTERACTS][label_name("train")] = torch.from_numpy(np.stack(np.nonzero(matrix)))
    add_interaction_edges(graph)
    return graph


def train_matrix(dataset: Dataset) -> NDArray[np.float64]:
    """The train interactions of a dataset, dense (U, I)."""
    interactions = dataset.interactions
    matrix = np.zeros((interactions.num_users, interactions.num_items))
    matrix[tuple(interactions.pairs("train"))] = 1.0
    return matrix


def item_features(dataset: Dataset, modality: str) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """The features of a modality in float64 (I, F), and which items have them (I,)."""
    features = dataset.modalities[modality].features
    assert features is not None
    matrix = np.zeros(features.shape)
    matrix[features.has] = features.matrix[features.row_of_item[features.has]]
    return matrix, features.has


def batches(graph: HeteroData, size: int) -> list[Batch]:
    """Three of a size, the last one of few interactions many times."""
    pairs = graph[INTERACTS].edge_index.as_tensor()
    generator = torch.Generator().manual_seed(0)
    chosen = [torch.randint(pairs.size(1), (size,), generator=generator) for _ in range(2)]
    chosen.append(chosen[0][:2].repeat(size)[:size])
    num_items = int(graph[ITEM].num_nodes)
    return [Batch(*pairs[:, some], torch.randint(num_items, (size,), generator=generator)) for some in chosen]


def in_double(graph: HeteroData) -> HeteroData:
    """The graph with features, norms and edge weights in float64, recomputed where float32 had rounded them."""
    for edge_type in graph.edge_types:
        source, target = graph[edge_type].edge_index.as_tensor()
        target_degree = torch.bincount(target)
        # Interactions count at each end; relation graphs count what a node chose, at both ends.
        source_degree = torch.bincount(source) if edge_type[0] != edge_type[2] else target_degree
        weight = (source_degree[source].double() * target_degree[target].double()).rsqrt()
        assert torch.equal(weight.float(), graph[edge_type].edge_weight)
        graph[edge_type].edge_weight = weight
    for modality in feature_modalities(graph):
        features = graph[ITEM][feature_name(modality)].double()
        norm = torch.linalg.vector_norm(features, dim=1)
        torch.testing.assert_close(norm.float(), graph[ITEM][norm_name(modality)], rtol=1e-6, atol=0)
        graph[ITEM][feature_name(modality)], graph[ITEM][norm_name(modality)] = features, norm
    return graph


def cosine_graph(dataset: Dataset, num_neighbors: int, include_self: bool = False) -> HeteroData:
    """The dataset's graph in float64, as :func:`in_double` makes it, cosines of neighbouring items included."""
    graph = in_double(build_graph(dataset, num_neighbors=num_neighbors, include_self=include_self))
    for modality in dataset.modalities:
        store = graph[knn_edge(ITEM, modality)]
        unit = torch.nn.functional.normalize(graph[ITEM][feature_name(modality)], dim=1)
        source, target = store.edge_index.as_tensor()
        similarity = (unit[source] * unit[target]).sum(dim=1)
        torch.testing.assert_close(similarity.float(), store.similarity, rtol=1e-5, atol=1e-6)
        store.similarity = similarity
    return graph


@dataclass(frozen=True)
class PlantedBlocks:
    """Users and items in blocks of tastes: a user takes items of the own block only, and features tell the block.

    So the answer is known: whatever a user has not seen yet of the own block belongs above everything else.
    """

    num_blocks: int = 3
    users_per_block: int = 8
    items_per_block: int = 10
    num_modalities: int = 2
    noise: float = 0.2
    seed: int = 0

    @property
    def user_block(self) -> NDArray[np.int64]:
        """The block of each user (U,)."""
        return np.repeat(np.arange(self.num_blocks), self.users_per_block)

    @property
    def item_block(self) -> NDArray[np.int64]:
        """The block of each item (I,)."""
        return np.repeat(np.arange(self.num_blocks), self.items_per_block)

    def dataset(self) -> Dataset:
        """The dataset: of a block's items each user leaves out two, and has one for valid and one for test."""
        generator = np.random.default_rng(self.seed)
        num_users, num_items = len(self.user_block), len(self.item_block)
        split = np.full((num_users, num_items), -1)
        for user, block in enumerate(self.user_block):
            items = generator.permutation(np.flatnonzero(self.item_block == block))
            split[user, items[:-2]] = TRAIN
            split[user, items[:2]] = [VALID, TEST]
        user, item = np.nonzero(split >= 0)
        modalities = {}
        for name in MODALITIES[: self.num_modalities]:
            rows = np.eye(self.num_blocks)[self.item_block]
            rows = rows + self.noise * generator.standard_normal(rows.shape)
            modalities[name] = Modality(_feature_matrix(rows, np.zeros(num_items, dtype=bool)))
        interactions = _interactions(user, item, split[user, item], (num_users, num_items))
        return Dataset("planted", interactions, modalities, {})

    def store(self, directory: Path) -> StoredGraph:
        """The same dataset as files, built into ``directory / "graph"`` as the command line would."""
        dataset = self.dataset()
        stored, _ = build_store(write_files(dataset, directory / "data"), directory / "graph", num_neighbors=4)
        assert stored.user_ids.to_list() == dataset.interactions.user_ids.to_list()
        assert stored.item_ids.to_list() == dataset.interactions.item_ids.to_list()
        return stored


def write_files(dataset: Dataset, directory: Path) -> DatasetConfig:
    """Write a dataset whose items all have features as files, and say how to read them."""
    directory.mkdir(parents=True)
    interactions = dataset.interactions
    pl.DataFrame(
        {
            "user_id": interactions.user_ids[interactions.user],
            "item_id": interactions.item_ids[interactions.item],
            "split": [SPLITS[number] for number in interactions.split],
        }
    ).write_csv(directory / "interactions.csv")
    pl.DataFrame({"item_id": interactions.item_ids}).write_csv(directory / "items.csv")
    for name in dataset.modalities:
        features, has = item_features(dataset, name)
        assert has.all()
        np.save(directory / f"{name}.npy", features.astype(np.float32))
    return DatasetConfig.create(
        directory=directory,
        name=dataset.name,
        interactions={"path": "interactions.csv"},
        items={"path": "items.csv"},
        modalities={name: {"features": f"{name}.npy"} for name in dataset.modalities},
    )


def _feature_matrix(rows: NDArray[np.float64], lacking: NDArray[np.bool_]) -> FeatureMatrix:
    # Rows are stored in reverse, so that an item's row is not its id.
    row_of_item = np.where(lacking, -1, np.arange(len(rows))[::-1])
    return FeatureMatrix(rows[::-1].astype(np.float32), row_of_item)


def _interactions(
    user: NDArray[np.int64], item: NDArray[np.int64], split: NDArray[np.int64], size: tuple[int, int]
) -> Interactions:
    user_ids, item_ids = (
        pl.Series(f"{kind}_id", [f"{kind}{number:03}" for number in range(count)])
        for kind, count in zip(("u", "i"), size, strict=True)
    )
    return Interactions(user, item, split.astype(np.uint8), None, user_ids, item_ids)
