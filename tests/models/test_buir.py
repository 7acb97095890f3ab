"""BUIR against the oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dream_pyg.graph.build import build_graph
from dream_pyg.graph.schema import INTERACTS, REV_INTERACTS
from dream_pyg.models import BUIR, Batch
from tests.graphs import MODALITIES, in_double, random_dataset, train_matrix
from tests.models.agreement import assert_terms_and_gradients, double_model, parameters_of, some_triplets
from tests.oracles import buir, dream

CONFIGS = {
    "default": {},
    "id": {"num_layers": 0},
    "one_layer": {"num_layers": 1, "max_edge_dropout": 0.7},
    "no_dropout": {"max_edge_dropout": 0.0},
}


class Oracle:
    """BUIR from raw arrays and a model's parameters."""

    def __init__(self, dataset, config):
        R = train_matrix(dataset)
        weight = dream.normalised(dream.adjacency(R))[: len(R), len(R) :]
        self.config, self.weights = config, (weight, weight.T)

    def encode(self, user, item, factors=(1.0, 1.0)):
        """Users and items, from tables and what dropout multiplied each direction by."""
        matrices = (matrix * factor for matrix, factor in zip(self.weights, factors, strict=True))
        return buir.encode(*matrices, user, item, self.config.num_layers)

    def terms(self, p, target, batch, online_factors, target_factors):
        """Each weighted term, from the target's tables."""
        user, pos, _ = (part.numpy() for part in batch)
        online_user, online_item = self.encode(p["user_embedding"], p["item_embedding"], online_factors)
        target_user, target_item = self.encode(*target, target_factors)
        predictor = p["predictor.weight"].T, p["predictor.bias"]
        loss = buir.distance(buir.predict(online_user[user], *predictor), target_item[pos])
        loss += buir.distance(buir.predict(online_item[pos], *predictor), target_user[user])
        l2 = buir.l2(p["user_embedding"][user], p["item_embedding"][pos])
        return {"bootstrap": loss, "l2": self.config.l2_weight * l2}


@pytest.fixture
def factors(monkeypatch):
    """What dropout multiplied edges by, in the order drawn, with the share it left out."""
    drawn = []
    original = F.dropout

    def recording(weight, share):
        drawn.append((original(torch.ones_like(weight), share), share))
        return weight * drawn[-1][0]

    monkeypatch.setattr(F, "dropout", recording)
    return drawn


def matrices(graph, drawn):
    """The factors of one encoder as matrices (U, I) and (I, U); it drew those of messages to items first."""
    result = []
    for edge_type, (factor, _) in zip((INTERACTS, REV_INTERACTS), drawn, strict=True):
        source, target = graph[edge_type].edge_index.as_tensor()
        matrix = np.zeros((graph[edge_type[2]].num_nodes, graph[edge_type[0]].num_nodes))
        matrix[target, source] = factor
        result.append(matrix)
    return result[::-1]


def target_of(model):
    return model.target_user.numpy().copy(), model.target_item.numpy().copy()


@pytest.mark.parametrize(
    ("name", "num_modalities"), [*dict.fromkeys(CONFIGS, 0).items(), *(("default", number) for number in (1, 2, 3))]
)
def test_scores_losses_and_gradients_are_the_equations(name, num_modalities, factors):
    dataset = random_dataset(MODALITIES[:num_modalities], seed=num_modalities)
    graph = in_double(build_graph(dataset, num_neighbors=2))
    model = double_model(BUIR, graph, embedding_dim=3, momentum=0.7, l2_weight=0.3, **CONFIGS[name])
    batch, oracle, own = some_triplets(graph), Oracle(dataset, model.config), parameters_of(model)

    user, item = model(graph)
    predictor = own["predictor.weight"].T, own["predictor.bias"]
    expected = buir.scores(*oracle.encode(own["user_embedding"], own["item_embedding"]), *predictor)
    np.testing.assert_allclose((user @ item.T).detach(), expected, rtol=1e-10, atol=1e-12)

    first = own["user_embedding"], own["item_embedding"]
    for step in range(2):
        factors.clear()
        terms = model.loss(graph, batch)
        drawn = [(1.0, 1.0)] * 2
        if model.config.max_edge_dropout:
            # Each encoder drew one share below the largest, for both directions.
            shares = [share for _, share in factors]
            assert shares[0] == shares[1] != shares[2] == shares[3]
            assert max(shares) < model.config.max_edge_dropout
            drawn = [matrices(graph, factors[:2]), matrices(graph, factors[2:])]
        own = parameters_of(model)
        online = own["user_embedding"], own["item_embedding"]
        target = first if step == 0 else [buir.follow(t, e, 0.7) for t, e in zip(first, online, strict=True)]
        for actual, wanted in zip(target_of(model), target, strict=True):
            np.testing.assert_allclose(actual, wanted, rtol=1e-12, atol=1e-14)
        assert_terms_and_gradients(
            model, terms, lambda p, target=target, drawn=drawn: oracle.terms(p, target, batch, *drawn)
        )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_()


def test_only_a_training_step_moves_the_target_and_only_by_one():
    graph = in_double(build_graph(random_dataset(()), num_neighbors=2))
    model, batch = double_model(BUIR, graph, embedding_dim=3, max_edge_dropout=0.0), some_triplets(graph)
    assert not model.has_target
    assert not model.target_user.any()
    model.loss(graph, batch)
    tables = model.user_embedding.detach(), model.item_embedding.detach()
    assert all(np.array_equal(one, other) for one, other in zip(target_of(model), tables, strict=True))
    # Nothing has been learned since, so a second loss leaves the target to the bit.
    model.loss(graph, batch)
    assert all(np.array_equal(one, other) for one, other in zip(target_of(model), tables, strict=True))

    with torch.no_grad():
        model.user_embedding.add_(1.0)
    before = target_of(model)
    model.eval()
    looked = model.loss(graph, batch)
    model(graph)
    assert all(np.array_equal(one, other) for one, other in zip(target_of(model), before, strict=True))
    model.train()
    model(graph)
    assert all(np.array_equal(one, other) for one, other in zip(target_of(model), before, strict=True))
    # What evaluation looked at is what training then took as its target.
    assert model.loss(graph, batch)["bootstrap"] == looked["bootstrap"]
    np.testing.assert_allclose(model.target_user, before[0] + 0.005, rtol=1e-12)


def test_the_target_is_state_and_not_learned():
    graph = build_graph(random_dataset(()), num_neighbors=2)
    model = BUIR(graph)
    state, parameters = set(model.state_dict()), {name for name, _ in model.named_parameters()}
    assert state - parameters == {"target_user", "target_item", "has_target"}


def test_negatives_are_not_used():
    graph = build_graph(random_dataset(()), num_neighbors=2)
    model, batch = BUIR(graph, BUIR.Config(max_edge_dropout=0.0)), some_triplets(graph)
    other = Batch(batch.user, batch.pos_item, batch.neg_item.flip(0))
    for name, term in model.loss(graph, batch).items():
        assert term == model.loss(graph, other)[name]


def test_edges_are_dropped_in_training_alone_and_in_shares_up_to_the_largest(monkeypatch):
    graph = build_graph(random_dataset(()), num_neighbors=2)
    model, batch, shares = BUIR(graph), some_triplets(graph), []
    original = F.dropout
    monkeypatch.setattr(F, "dropout", lambda weight, share: shares.append(share) or original(weight, share))
    model.eval()
    model.loss(graph, batch)
    assert shares == []
    model.train()
    for _ in range(100):
        model.loss(graph, batch)
    assert 0 <= min(shares) < 0.02
    assert 0.18 < max(shares) <= 0.2
