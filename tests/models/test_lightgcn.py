"""LightGCN against the oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dream_pyg.graph.build import build_graph
from dream_pyg.models import LightGCN
from dream_pyg.training.triplets import TripletSampler
from tests.graphs import in_double, random_dataset, train_matrix
from tests.oracles import dream
from tests.oracles.gradients import numerical_gradient


@pytest.mark.parametrize("num_layers", [0, 1, 2, 4])
@pytest.mark.parametrize("seed", [0, 1])
def test_embeddings_loss_and_gradients_are_the_equations(num_layers, seed):
    dataset = random_dataset((), seed=seed)
    graph = in_double(build_graph(dataset, num_neighbors=2))
    torch.manual_seed(seed)
    model = LightGCN(graph, LightGCN.Config(embedding_dim=3, num_layers=num_layers, l2_weight=0.3)).double()
    batch = TripletSampler(graph).epoch(torch.Generator().manual_seed(seed))
    user, pos, neg = (part.numpy() for part in batch)
    tables = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    assert list(tables) == ["user_embedding", "item_embedding"]
    A_hat = dream.normalised(dream.adjacency(train_matrix(dataset)))

    def embed(user_embedding, item_embedding):
        _, mean = dream.lightgcn(A_hat, np.concatenate([user_embedding, item_embedding]), num_layers)
        return np.split(mean, [len(user_embedding)])

    def total(user_embedding, item_embedding):
        users, items = embed(user_embedding, item_embedding)
        general = dream.bpr(users[user], items[pos], items[neg], "mean")
        # The L2 term is on layer 0, not on what was propagated.
        l2 = dream.l2(user_embedding[user], item_embedding[pos], item_embedding[neg])
        return dream.total(general, 0, 0, 0, 0, 0, 0, l2, 0.3)

    for actual, expected in zip(model(graph), embed(**tables), strict=True):
        np.testing.assert_allclose(actual.detach(), expected, rtol=1e-12, atol=1e-14)
    loss = torch.stack(list(model.loss(graph, batch).values())).sum()
    np.testing.assert_allclose(loss.item(), total(**tables), rtol=1e-12)
    loss.backward()
    for name, parameter in model.named_parameters():
        numerical = numerical_gradient(lambda table, name=name: total(**{**tables, name: table}), tables[name])
        np.testing.assert_allclose(parameter.grad, numerical, atol=1e-8)
