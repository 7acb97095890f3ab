"""EASE against ridge regressions item by item."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dream_pyg.errors import ConfigError, TrainingError
from dream_pyg.graph import co_occurrence
from dream_pyg.graph.build import build_graph
from dream_pyg.models import EASE
from dream_pyg.models.ease import invert_
from tests.graphs import interaction_graph, random_dataset, train_matrix
from tests.models.agreement import double_model
from tests.oracles import ease


@pytest.mark.parametrize("l2_weight", [0.5, 20.0])
@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("block", [1, 1 << 24])
def test_weights_and_scores_are_those_of_regressions(l2_weight, exponent, block, monkeypatch):
    monkeypatch.setattr(co_occurrence, "_BLOCK_PAIRS", block)
    dataset = random_dataset(())
    graph = build_graph(dataset, num_neighbors=2)
    model = double_model(EASE, graph, l2_weight=l2_weight, user_exponent=exponent)
    model.fit(graph)
    R = train_matrix(dataset)
    B = ease.item_weights(ease.weighted_users(R, exponent), l2_weight)
    np.testing.assert_allclose(model.weight, B, rtol=1e-9, atol=1e-12)
    assert not model.weight.diagonal().any()
    users = torch.tensor([3, 0, 3, 1])
    np.testing.assert_allclose(model(graph).scores(users), ease.scores(R, B)[users], rtol=1e-9, atol=1e-12)


def test_float32_is_exact_enough_to_rank():
    dataset = random_dataset(())
    graph = build_graph(dataset, num_neighbors=2)
    model = EASE(graph)
    model.fit(graph)
    assert model.weight.dtype == torch.float32
    expected = ease.item_weights(train_matrix(dataset), EASE.Config().l2_weight)
    np.testing.assert_allclose(model.weight, expected, rtol=1e-4, atol=1e-9)


def test_the_inverse_takes_no_second_matrix():
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(6, 9, generator=generator, dtype=torch.float64)
    matrix = factor @ factor.T + torch.eye(6)
    expected, place = np.linalg.inv(matrix.numpy()), matrix.data_ptr()
    inverse = invert_(matrix)
    assert inverse.data_ptr() == place
    assert inverse.is_contiguous()
    np.testing.assert_allclose(inverse, expected, rtol=1e-10, atol=1e-12)


def test_a_matrix_without_an_inverse_is_named():
    graph = interaction_graph(np.ones((3, 2)))
    model = EASE(graph, EASE.Config(l2_weight=1e-30))
    with pytest.raises(TrainingError, match=r"l2_weight = 1e-30.*Raise it"):
        model.fit(graph)


def test_refuses_what_the_machine_has_no_room_for(monkeypatch):
    graph = interaction_graph(np.eye(3))
    model = EASE(graph)
    monkeypatch.setattr("dream_pyg.models.ease.available_bytes", lambda device: 3 * 4 * 3**2 - 1)
    with pytest.raises(ConfigError, match=r"for 3 items, and 0\.0 GiB are free.*itemknn"):
        model.fit(graph)
    monkeypatch.setattr("dream_pyg.models.ease.available_bytes", lambda device: 3 * 4 * 3**2)
    model.fit(graph)


def test_refuses_a_catalogue_that_does_not_fit_before_it_allocates_anything():
    graph = build_graph(random_dataset(()), num_neighbors=2)
    graph["item"].num_nodes = 10**7
    with pytest.raises(ConfigError, match=r"1200000\.0 GB for 10,000,000 items \(3 .*max_memory_gb = 16 .*itemknn"):
        EASE(graph)
    assert EASE(graph, EASE.Config(max_memory_gb=1.2e6)).weight.numel() == 0
