"""The user-user graph of shared items against brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dream_pyg.graph import co_occurrence
from dream_pyg.graph.co_occurrence import co_occurrence_weight, user_co_occurrence
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
