"""BPR-MF against the oracle."""

from __future__ import annotations

import numpy as np
import torch

from dream_pyg.graph.build import build_graph
from dream_pyg.models import BPR, Batch
from dream_pyg.training.triplets import TripletSampler
from tests.graphs import random_dataset
from tests.oracles import dream
from tests.oracles.gradients import numerical_gradient


def test_scores_loss_and_gradients_are_those_of_matrix_factorisation():
    graph = build_graph(random_dataset(()), num_neighbors=2)
    torch.manual_seed(0)
    model = BPR(graph, BPR.Config(embedding_dim=3, l2_weight=0.3)).double()
    batch = TripletSampler(graph).epoch(torch.Generator().manual_seed(0))
    user, pos, neg = (part.numpy() for part in Batch(*batch))
    tables = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    assert list(tables) == ["user_embedding", "item_embedding"]

    def total(user_embedding, item_embedding):
        rows = user_embedding[user], item_embedding[pos], item_embedding[neg]
        return dream.total(dream.bpr(*rows, "mean"), 0, 0, 0, 0, 0, 0, dream.l2(*rows), 0.3)

    embedded = model(graph)
    np.testing.assert_array_equal(embedded.user.detach(), tables["user_embedding"])
    np.testing.assert_array_equal(embedded.item.detach(), tables["item_embedding"])
    terms = model.loss(graph, batch)
    assert list(terms) == ["bpr", "l2"]
    loss = torch.stack(list(terms.values())).sum()
    np.testing.assert_allclose(loss.item(), total(**tables), rtol=1e-13)
    loss.backward()
    for name, parameter in model.named_parameters():
        numerical = numerical_gradient(lambda table, name=name: total(**{**tables, name: table}), tables[name])
        np.testing.assert_allclose(parameter.grad, numerical, atol=1e-8)
