"""Fixed shapes hold what a batch has, and change no number."""

from __future__ import annotations

import pytest
import torch
from torch_geometric.data import HeteroData

from dream_pyg.graph.build import build_graph
from dream_pyg.graph.csr import take_rows
from dream_pyg.graph.schema import ITEM, REV_INTERACTS, USER
from dream_pyg.nn.batch_shapes import distinct_nodes, fix_shapes, take_items
from dream_pyg.training.gradients import Gradients
from tests.contract.test_contract import make
from tests.graphs import batches, random_dataset


def fixed() -> HeteroData:
    graph = build_graph(random_dataset(), num_neighbors=3)
    fix_shapes(graph)
    return graph


@pytest.mark.parametrize("node", [USER, ITEM])
@pytest.mark.parametrize("ids", [[4], [7, 2, 7, 2, 2], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [5] * 30])
def test_others_follow_the_distinct_nodes(node, ids):
    graph, given = fixed(), torch.tensor(ids)
    found, row = distinct_nodes(graph, node, given)
    expected = given.unique()
    assert len(found) == min(len(ids), graph[node].num_nodes) == len(found.unique())
    assert torch.equal(found[: len(expected)], expected)
    assert torch.equal(found[row], given)


@pytest.mark.parametrize("users", [[0], [3, 1], [11, 0, 5, 7, 2], list(range(12))])
def test_users_have_their_items_and_the_row_behind_them_the_rest(users):
    graph, user = fixed(), torch.tensor(users)
    (pointer, item), _ = graph[REV_INTERACTS].edge_index.get_csc()
    own, taken = take_items(graph, pointer, item, user)
    expected_own, expected = take_rows(pointer, item, user)
    assert torch.equal(own[:-1], expected_own)
    assert torch.equal(taken[: len(expected)], expected)
    most = pointer.diff().sort(descending=True).values[: len(users)].sum()
    assert own[-1] == len(taken) == most >= len(expected)


def test_a_batch_has_less_than_the_most_active_users():
    """Else the row behind would be empty everywhere, and prove nothing."""
    graph, user = fixed(), torch.tensor([11, 0, 5, 7, 2])
    (pointer, item), _ = graph[REV_INTERACTS].edge_index.get_csc()
    own, _ = take_items(graph, pointer, item, user)
    assert own[-1] > own[-2]


@pytest.mark.parametrize("size", [5, 40])
@pytest.mark.parametrize("config", [{}, {"squared_signal": False}, {"popularity_correction": 1.0, "temperature": 0.02}])
def test_no_loss_or_gradient_changes(config, size):
    found = []
    for graph in (build_graph(random_dataset(), num_neighbors=3), fixed()):
        model = make("dream", graph, signal_weight=1.0, **config)
        for batch in batches(graph, size):
            terms = Gradients(model)(graph, batch)
            found.append({**terms, **{name: value.grad.clone() for name, value in model.named_parameters()}})
    for plain, other in zip(found[:3], found[3:], strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-4, atol=1e-6)
