"""Relation graphs with fewer neighbours are those that a build with fewer would have made."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_geometric.data import HeteroData

from dream_pyg.data.features import Neighbors
from dream_pyg.errors import ConfigError
from dream_pyg.graph.build import build_graph
from dream_pyg.graph.knn import ArrayRows, cosine_knn
from dream_pyg.graph.relations import add_relation_edges, cut_neighbors, neighbors_of
from dream_pyg.graph.schema import ITEM, USER, knn_edge
from tests.graph.test_store import assert_equal_graphs
from tests.graphs import MODALITIES, random_dataset


@pytest.mark.parametrize("include_self", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_a_cut_is_a_build_with_fewer_neighbours(seed: int, include_self: bool):
    dataset = random_dataset(seed=seed)
    full = build_graph(dataset, num_neighbors=9, include_self=include_self)
    for k in range(1, 10):
        fresh = build_graph(dataset, num_neighbors=k, include_self=include_self)
        assert_equal_graphs(cut_neighbors(full, k), fresh)
        for kind in full.edge_types[2:]:
            assert cut_neighbors(full, k)[kind].num_neighbors == fresh[kind].num_neighbors == k
    assert cut_neighbors(full, None) is full


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 999), values=st.sampled_from(["signs", "normal", "nearly equal"]), include_self=st.booleans()
)
def test_the_first_of_many_neighbours_are_those_of_a_search_for_few(seed: int, values: str, include_self: bool):
    generator = np.random.default_rng(seed)
    matrix = generator.normal(size=(60, 12)).astype(np.float32)
    if values == "signs":
        matrix = np.sign(matrix)
    elif values == "nearly equal":  # Cosines that float32 cannot tell apart.
        matrix = (1 + 1e-4 * matrix).astype(np.float32)
    matrix[generator.integers(0, 60, 4)] = 0
    many = cosine_knn(ArrayRows(matrix), 50, include_self=include_self)
    for k in (1, 2, 7, 30):
        few = cosine_knn(ArrayRows(matrix), k, include_self=include_self)
        np.testing.assert_array_equal(few.index, many.index[:, :k])
        np.testing.assert_array_equal(few.similarity, many.similarity[:, :k])


def test_a_cut_leaves_the_graph_as_it_is():
    dataset = random_dataset()
    graph = build_graph(dataset, num_neighbors=5)
    cut_neighbors(graph, 2)
    assert_equal_graphs(graph, build_graph(dataset, num_neighbors=5))


def test_more_neighbours_than_there_are_are_refused():
    graph = build_graph(random_dataset(), num_neighbors=4)
    with pytest.raises(ConfigError, match="num_neighbors is 5, but the graph keeps 4 neighbours of each user by image"):
        cut_neighbors(graph, 5)


def test_a_ready_graph_has_as_many_neighbours_as_its_rows():
    graph = HeteroData()
    graph[USER].num_nodes, graph[ITEM].num_nodes = 1, 3
    ready = Neighbors(np.array([[1, 2], [0, -1], [-1, -1]]), np.array([[0.9, 0.5], [0.9, 0], [0, 0]], dtype=np.float32))
    add_relation_edges(graph, ITEM, "shelf", ready)
    assert cut_neighbors(graph, 1)[knn_edge(ITEM, "shelf")].edge_index.as_tensor().tolist() == [[1, 0], [0, 1]]
    with pytest.raises(ConfigError, match="keeps 2 neighbours of each item by shelf"):
        cut_neighbors(graph, 3)


@pytest.mark.parametrize("include_self", [False, True])
def test_edges_give_back_the_lists_they_were_made_from(include_self: bool):
    dataset = random_dataset()
    graph = build_graph(dataset, num_neighbors=8, include_self=include_self)
    for name in MODALITIES[:2]:
        features = dataset.modalities[name].features
        assert features is not None
        expected = cosine_knn(features, 8, include_self=include_self)
        found = neighbors_of(graph, ITEM, name)
        np.testing.assert_array_equal(found.index, expected.index)
        np.testing.assert_array_equal(found.similarity, expected.similarity)
