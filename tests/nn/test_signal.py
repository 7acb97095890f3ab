"""The similarity-supervised signal of a batch; its value and gradient are checked with each model that has it."""

from __future__ import annotations

import torch

from dream_pyg.graph.build import build_graph
from dream_pyg.graph.schema import ITEM
from dream_pyg.nn.signal import SimilaritySignal
from tests.graphs import random_dataset
from tests.models.agreement import some_triplets


def test_users_and_items_may_be_given_once():
    graph = build_graph(random_dataset(), num_neighbors=2)
    signal = SimilaritySignal(graph, {"image": 0.3, "text": 0.7}, 2.0)
    user, item, _ = some_triplets(graph)
    (users, user_row), (items, item_row) = (torch.unique(ids, return_inverse=True) for ids in (user, item))
    assert len(users) < len(user)
    modal_user, modal_item = torch.randn(len(users), 4), torch.randn(len(items), 4)
    once = signal(graph, users, items, modal_user, modal_item, user_row=user_row, item_row=item_row)
    often = signal(graph, user, item, modal_user[user_row], modal_item[item_row])
    torch.testing.assert_close(once, often)


def test_a_mean_of_half_precision_features_does_not_overflow():
    graph = build_graph(random_dataset(), num_neighbors=2)
    graph[ITEM].x_image = graph[ITEM].has_image.unsqueeze(1) * torch.full((1, 7), 6e4, dtype=torch.float16)
    signal = SimilaritySignal(graph, {"image": 1.0}, 1.0)
    assert (signal.get_buffer("mean_image") == 6e4).all()


def test_without_a_weight_there_is_neither_a_term_nor_anything_kept():
    graph = build_graph(random_dataset(), num_neighbors=2)
    signal = SimilaritySignal(graph, {"image": 1.0}, 0.0)
    nobody, nothing = torch.arange(0), torch.zeros(0, 3)
    assert signal(graph, nobody, nobody, nothing, nothing) == {}
    assert list(signal.buffers()) == []
