"""Item-kNN against cosines item by item."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dream_pyg.graph import co_occurrence
from dream_pyg.graph.build import build_graph
from dream_pyg.models import ItemKNN
from tests.graphs import interaction_graph, random_dataset, train_matrix
from tests.models.agreement import double_model
from tests.oracles import ease
from tests.test_ranking import LargestTensor


@pytest.mark.parametrize("shrinkage", [0.0, 3.0])
@pytest.mark.parametrize("k", [1, 3, 50])
@pytest.mark.parametrize("block", [1, 1 << 24])
def test_weights_and_scores_are_those_of_brute_force(k, shrinkage, block, monkeypatch):
    monkeypatch.setattr(co_occurrence, "_BLOCK_PAIRS", block)
    dataset = random_dataset(())
    graph = build_graph(dataset, num_neighbors=2)
    model = double_model(ItemKNN, graph, num_item_neighbors=k, shrinkage=shrinkage)
    model.fit(graph)
    R = train_matrix(dataset)
    W = ease.item_knn(R, k, shrinkage)
    assert (np.count_nonzero(W, axis=0) <= k).all()
    scorer = model(graph)
    np.testing.assert_allclose(scorer.weight.to_dense(), W, rtol=1e-12, atol=0)
    users = torch.tensor([3, 0, 3, 1])
    np.testing.assert_allclose(scorer.scores(users), ease.scores(R, W)[users], rtol=1e-12, atol=0)


def test_no_matrix_of_items_by_items_is_ever_built():
    num_users, num_items = 300, 2000
    matrix = np.zeros((num_users, num_items), dtype=bool)
    matrix[np.arange(num_users)[:, None], np.random.default_rng(0).integers(num_items, size=(num_users, 10))] = True
    graph = interaction_graph(matrix)
    with LargestTensor() as largest:
        model = ItemKNN(graph)
        model.fit(graph)
        scores = model(graph).scores(torch.arange(20))
    assert scores.any()
    # Ten items a user are at most a hundred paths, each with two coordinates.
    assert largest.numel <= 2 * 100 * num_users < num_items**2 / 10


def test_items_that_nobody_shares_score_nothing():
    graph = interaction_graph(np.eye(2, 3))
    model = ItemKNN(graph)
    model.fit(graph)
    assert not model(graph).scores(torch.arange(2)).any()
