"""The user-user graph of shared items against brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dream_pyg.graph import co_occurrence
from dream_pyg.graph.co_occurrence import co_occurrence_weight, item_co_occurrence, user_co_occurrence
from tests.graphs import interaction_graph
from tests.oracles import dualgnn


@pytest.mark.parametrize("block", [1, 20, 1 << 24])
@pytest.mark.parametrize("k", [1, 3, 50])
@pytest.mark.parametrize("density", [0.0, 0.05, 0.3, 1.0])
def test_neighbors_counts_and_weights_are_those_of_brute_force(density, k, block, monkeypatch):
    monkeypatch.setattr(co_occurrence, "_BLOCK_PAIRS", block)
    matrix = np.random.default_rng(0).random((14, 9)) < density
    edges, shared = user_co_occurrence(interaction_graph(matrix), k)
    expected = dualgnn.co_occurrence(matrix, k)
    wanted = [[other, user, row[other]] for user, row in enumerate(expected) for other in sorted(row)]
    assert torch.cat([edges.as_tensor(), shared[None]]).T.tolist() == wanted
    edges.validate()
    dense = np.zeros((14, 14))
    source, target = edges.as_tensor()
    dense[target, source] = co_occurrence_weight(edges, shared)
    np.testing.assert_allclose(dense, dualgnn.user_graph(expected), rtol=1e-12)


def test_many_shared_items_do_not_overflow():
    edges, shared = user_co_occurrence(interaction_graph(np.ones((3, 2000), dtype=bool)), 2)
    assert shared.tolist() == [2000] * 6
    assert co_occurrence_weight(edges, shared).tolist() == [0.5] * 6


@pytest.mark.parametrize("block", [1, 1 << 24])
@pytest.mark.parametrize(("k", "shrinkage"), [(2, 0.0), (50, 3.0)])
def test_items_are_related_as_products_of_normalised_interactions_say(k, shrinkage, block, monkeypatch):
    monkeypatch.setattr(co_occurrence, "_BLOCK_PAIRS", block)
    matrix = np.random.default_rng(1).random((17, 12)) < 0.3
    matrix[:, 3] = False  # an item that nobody took
    edges, similarity = item_co_occurrence(interaction_graph(matrix), k, shrinkage=shrinkage)
    norm = np.sqrt(matrix.sum(axis=0))
    with np.errstate(invalid="ignore"):
        expected = (matrix.T.astype(np.float32) @ matrix) / (np.outer(norm, norm) + shrinkage)
    np.fill_diagonal(expected, 0)
    wanted = {}
    for item, row in enumerate(np.nan_to_num(expected)):
        nearest = [other for other in np.argsort(-row, kind="stable")[:k] if row[other] > 0]
        wanted |= {(int(other), item): float(row[other]) for other in nearest}
    assert dict(zip(map(tuple, edges.as_tensor().T.tolist()), similarity.tolist(), strict=True)) == pytest.approx(
        wanted
    )
    edges.validate()
