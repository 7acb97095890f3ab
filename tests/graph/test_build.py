"""The graph against the paper's equations, and user features against a plain loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch_geometric.data import HeteroData

from dream_pyg.data.dataset import Dataset, Modality
from dream_pyg.data.features import FeatureMatrix, Neighbors
from dream_pyg.errors import ConfigError, DataError
from dream_pyg.graph.build import build_graph
from dream_pyg.graph.knn import MeanRows, means
from dream_pyg.graph.schema import (
    INTERACTS,
    ITEM,
    REV_INTERACTS,
    USER,
    count_name,
    feature_modalities,
    knn_edge,
    knn_modalities,
    label_name,
)
from tests.graphs import MODALITIES, item_features, random_dataset, train_matrix
from tests.oracles import dream as oracle


def dense(graph: HeteroData, edge_type: tuple[str, str, str]) -> NDArray[np.float64]:
    """The weights of one edge type, a row for each target and a column for each source."""
    store = graph[edge_type]
    matrix = np.zeros((graph[edge_type[2]].num_nodes, graph[edge_type[0]].num_nodes))
    source, target = store.edge_index.as_tensor().numpy()
    matrix[target, source] = store.edge_weight.double().numpy()
    assert np.count_nonzero(matrix) == len(source)  # no edge twice
    return matrix


@pytest.mark.parametrize("seed", range(3))
def test_interaction_edges_are_the_normalised_adjacency(seed: int):
    dataset = random_dataset(seed=seed)
    graph = build_graph(dataset, num_neighbors=2)
    num_users = dataset.interactions.num_users
    expected = oracle.normalised(oracle.adjacency(train_matrix(dataset)))
    np.testing.assert_allclose(dense(graph, INTERACTS), expected[num_users:, :num_users], rtol=1e-6)
    np.testing.assert_allclose(dense(graph, REV_INTERACTS), expected[:num_users, num_users:], rtol=1e-6)


@pytest.mark.parametrize("include_self", [False, True])
@pytest.mark.parametrize("modalities", [MODALITIES[:count] for count in (1, 2, 3)], ids=len)
def test_relation_graphs_of_one_to_three_modalities(modalities: Sequence[str], include_self: bool):
    dataset = random_dataset(modalities)
    graph = build_graph(dataset, num_neighbors=3, include_self=include_self)
    assert feature_modalities(graph) == knn_modalities(graph, ITEM) == knn_modalities(graph, USER) == list(modalities)
    for name in modalities:
        features, has = item_features(dataset, name)
        users = oracle.user_features(train_matrix(dataset), features, has)
        for node, rows, present in (
            (ITEM, features, has),
            (USER, users, oracle.user_has(train_matrix(dataset), has)),
        ):
            expected = oracle.relation_graph(rows, present, 3, include_self)
            np.testing.assert_allclose(dense(graph, knn_edge(node, name)), expected, rtol=1e-6)


def test_similarities_stand_at_their_edges():
    dataset = random_dataset()
    graph = build_graph(dataset, num_neighbors=3)
    for name in feature_modalities(graph):
        cosine = oracle.cosine(item_features(dataset, name)[0])
        store = graph[knn_edge(ITEM, name)]
        source, target = store.edge_index.as_tensor().numpy()
        np.testing.assert_allclose(store.similarity.numpy(), cosine[target, source], atol=1e-6)


def test_edges_are_sorted_by_target_and_say_so():
    graph = build_graph(random_dataset(), num_neighbors=3)
    for edge_type in graph.edge_types:
        edge_index = graph[edge_type].edge_index
        assert edge_index.sort_order == "col"
        edge_index.validate()
        assert edge_index.sparse_size() == (graph[edge_type[0]].num_nodes, graph[edge_type[2]].num_nodes)


def test_labels_are_the_splits_and_only_train_propagates():
    dataset = random_dataset()
    graph = build_graph(dataset, num_neighbors=2)
    for split in ("train", "valid", "test"):
        np.testing.assert_array_equal(graph[INTERACTS][label_name(split)].numpy(), dataset.interactions.pairs(split))
    train = set(map(tuple, dataset.interactions.pairs("train").T))
    assert set(map(tuple, graph[INTERACTS].edge_index.as_tensor().T.numpy())) == train
    assert set(map(tuple, graph[REV_INTERACTS].edge_index.as_tensor().flip(0).T.numpy())) == train


def test_node_attributes():
    dataset = random_dataset()
    graph = build_graph(dataset, num_neighbors=2)
    for name in MODALITIES[:2]:
        features, has = item_features(dataset, name)
        np.testing.assert_array_equal(graph[ITEM][f"x_{name}"].double().numpy(), features)
        np.testing.assert_array_equal(graph[ITEM][f"has_{name}"].numpy(), has)
        np.testing.assert_allclose(graph[ITEM][f"norm_{name}"].numpy(), np.linalg.norm(features, axis=1), rtol=1e-6)
        np.testing.assert_array_equal(graph[USER][count_name(name)].numpy(), train_matrix(dataset) @ has)


@pytest.mark.parametrize(("scale", "fits"), [(1e25, True), (1e-30, True), (3.3e38, False)])
def test_features_of_any_size_have_a_norm(scale: float, fits: bool):
    dataset = random_dataset()
    features = dataset.modalities[MODALITIES[0]].features.to_array()
    scaled = (features / np.abs(features).max() * scale).astype(np.float32)
    huge = Modality(FeatureMatrix(scaled, np.where(features.any(axis=1), np.arange(len(features)), -1)))
    dataset = dataclasses.replace(dataset, modalities={MODALITIES[0]: huge})
    if not fits:
        with pytest.raises(DataError, match=f"Features of {MODALITIES[0]}: the norm of row .* exceeds float32"):
            build_graph(dataset, num_neighbors=2)
        return
    norm = build_graph(dataset, num_neighbors=2)[ITEM][f"norm_{MODALITIES[0]}"].numpy()
    np.testing.assert_allclose(norm, np.linalg.norm(scaled.astype(np.float64), axis=1), rtol=1e-6)


def test_without_modalities_there_are_interactions_only():
    graph = build_graph(random_dataset(()), num_neighbors=2)
    assert graph.edge_types == [INTERACTS, REV_INTERACTS]


def test_without_user_graphs_items_stay_the_same():
    dataset = random_dataset()
    full, items_only = (build_graph(dataset, num_neighbors=3, user_graphs=flag) for flag in (True, False))
    assert knn_modalities(items_only, USER) == []
    for name in MODALITIES[:2]:
        np.testing.assert_array_equal(dense(items_only, knn_edge(ITEM, name)), dense(full, knn_edge(ITEM, name)))


def with_neighbors(dataset: Dataset, name: str, index: list[list[int]], *, keep_features: bool) -> Dataset:
    """The dataset with a ready kNN graph for one modality."""
    neighbors = Neighbors(np.array(index), np.where(np.array(index) >= 0, 0.5, 0).astype(np.float32))
    modality = Modality(dataset.modalities[name].features if keep_features else None, neighbors)
    modalities = {**dataset.modalities, name: modality}
    return Dataset(dataset.name, dataset.interactions, modalities, dataset.report)


@pytest.mark.parametrize("keep_features", [True, False])
def test_ready_neighbours_are_taken_as_they_are(keep_features: bool):
    num_items = 10
    index = [[(item + 1) % num_items, item, -1] if item % 3 else [-1, -1, -1] for item in range(num_items)]
    dataset = random_dataset()
    searched = build_graph(dataset, num_neighbors=2)
    graph = build_graph(with_neighbors(dataset, "image", index, keep_features=keep_features), num_neighbors=2)
    chosen = np.zeros((num_items, num_items))
    for item, row in enumerate(index):
        chosen[item, [neighbor for neighbor in row if neighbor >= 0]] = 1
    degree = np.maximum(chosen.sum(axis=1), 1)  # a neighbour without neighbours counts as if it had one
    np.testing.assert_allclose(
        dense(graph, knn_edge(ITEM, "image")), chosen / np.sqrt(np.outer(degree, degree)), rtol=1e-6
    )
    assert set(graph[knn_edge(ITEM, "image")].similarity.tolist()) == {0.5}
    np.testing.assert_array_equal(dense(graph, knn_edge(ITEM, "text")), dense(searched, knn_edge(ITEM, "text")))
    assert feature_modalities(graph) == (["image", "text"] if keep_features else ["text"])
    assert knn_modalities(graph, USER) == feature_modalities(graph)


@pytest.mark.parametrize(("num_neighbors", "fits"), [(9, True), (10, False)])
def test_k_must_be_below_the_number_of_items(num_neighbors: int, fits: bool):
    dataset = random_dataset()
    if fits:
        build_graph(dataset, num_neighbors=num_neighbors)
        return
    with pytest.raises(ConfigError, match="between 1 and 9 for 10 items by image"):
        build_graph(dataset, num_neighbors=num_neighbors)


def loop_of_means(dataset: Dataset, name: str) -> NDArray[np.float64]:
    """User features (U, F), user by user and item by item."""
    features, has = item_features(dataset, name)
    return oracle.user_features(train_matrix(dataset), features, has)


@pytest.mark.parametrize("elements", [1 << 26, 1, 20], ids=["one chunk", "an item a chunk", "a few items a chunk"])
@pytest.mark.parametrize("seed", range(3))
def test_user_features_are_means_over_train_items(monkeypatch: pytest.MonkeyPatch, seed: int, elements: int):
    monkeypatch.setattr(means, "_BLOCK_ELEMENTS", elements)
    dataset = random_dataset(seed=seed)
    for name in MODALITIES[:2]:
        features = dataset.modalities[name].features
        assert features is not None
        users = MeanRows(dataset.interactions.pairs("train"), dataset.interactions.num_users, features)
        expected = loop_of_means(dataset, name)
        assert users.shape == expected.shape
        for start in range(len(expected) + 1):
            for stop in range(start, len(expected) + 3):
                taken = users.take(start, stop)
                assert taken.dtype == np.float32
                np.testing.assert_allclose(taken, expected[start:stop], rtol=1e-6, atol=1e-7)


def test_user_features_do_not_depend_on_the_order_of_pairs():
    dataset = random_dataset()
    features = dataset.modalities["image"].features
    assert features is not None
    pairs = dataset.interactions.pairs("train")
    shuffled = pairs[:, np.random.default_rng(5).permutation(pairs.shape[1])]
    first, second = (MeanRows(order, dataset.interactions.num_users, features) for order in (pairs, shuffled))
    # Features are multiples of 1/64, so sums are exact in any order.
    np.testing.assert_array_equal(first.take(0, 12), second.take(0, 12))


def test_equal_data_gives_equal_graphs():
    first, second = (build_graph(random_dataset(seed=7), num_neighbors=3) for _ in range(2))
    for edge_type in first.edge_types:
        assert torch.equal(first[edge_type].edge_index.as_tensor(), second[edge_type].edge_index.as_tensor())
        assert torch.equal(first[edge_type].edge_weight, second[edge_type].edge_weight)
