"""GRCN against the oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dream_pyg.errors import ConfigError
from dream_pyg.graph.build import build_graph
from dream_pyg.graph.schema import INTERACTS, REV_INTERACTS
from dream_pyg.models import GRCN
from tests.graphs import (
    ITEM_WITHOUT_FEATURES,
    MODALITIES,
    USER_WITHOUT_INTERACTIONS,
    in_double,
    item_features,
    random_dataset,
    train_matrix,
)
from tests.models.agreement import assert_rows, assert_terms_and_gradients, double_model, parameters_of, some_triplets
from tests.oracles import dream, grcn
from tests.oracles.features import projection, scaled

CONFIGS = {
    "default": {},
    "one_layer": {"num_layers": 1},
    "three_layers": {"num_layers": 3},
    "no_routing": {"num_routings": 0},
    "one_routing": {"num_routings": 1},
    "raw": {"feature_scaling": "raw"},
    "rms": {"feature_scaling": "rms"},
}


class Oracle:
    """GRCN from raw arrays and a model's parameters."""

    def __init__(self, dataset, config):
        self.config = config
        self.R = train_matrix(dataset)
        raw = {m: item_features(dataset, m) for m in dataset.modalities}
        self.has = {m: has for m, (_, has) in raw.items()}
        self.features = {m: scaled(X, config.feature_scaling) for m, (X, _) in raw.items()}

    def contents(self, p):
        """Of each modality: users, items, users' and items' attention."""
        result = []
        for m, X in self.features.items():
            projected = projection(X, self.has[m], p[f"projections.{m}.weight"], p[f"projections.{m}.bias"])
            result.append(grcn.content(self.R, p[f"preferences.{m}"], projected, self.config.num_routings))
        return result

    def refined(self, p):
        """The weights of messages to users and to items."""
        _, _, to_user, to_item = zip(*self.contents(p), strict=True)
        return grcn.refined(to_user, p["item_confidence"]), grcn.refined(to_item, p["user_confidence"])

    def encode(self, p):
        """Users and items."""
        identity = grcn.convolve(*self.refined(p), p["user_embedding"], p["item_embedding"], self.config.num_layers)
        users, items, _, _ = zip(*self.contents(p), strict=True)
        return np.hstack([identity[0], *users]), np.hstack([identity[1], *items])

    def terms(self, p, batch):
        """Each weighted term."""
        user, pos, neg = (part.numpy() for part in batch)
        users, items = self.encode(p)
        free = [p["user_embedding"][user], p["item_embedding"][pos], p["item_embedding"][neg]]
        free += [p[f"preferences.{m}"][user] for m in self.features]
        return {
            "bpr": dream.bpr(users[user], items[pos], items[neg], "mean"),
            "l2": self.config.l2_weight * grcn.l2(*free),
        }


def refined_matrices(model, graph):
    """The model's own weights of messages, dense, receivers in rows."""
    attentions = [model.content(graph, modality)[1] for modality in model.projections]
    result = []
    for edge_type, weight in zip((REV_INTERACTS, INTERACTS), model.refine(graph, attentions), strict=True):
        source, target = graph[edge_type].edge_index.as_tensor()
        matrix = np.zeros((graph[edge_type[2]].num_nodes, graph[edge_type[0]].num_nodes))
        matrix[target, source] = weight.detach()
        result.append(matrix)
    return result


@pytest.mark.parametrize(
    ("name", "num_modalities"), [*dict.fromkeys(CONFIGS, 2).items(), ("default", 1), ("default", 3)]
)
def test_embeddings_losses_and_gradients_are_the_equations(name, num_modalities):
    dataset = random_dataset(MODALITIES[:num_modalities], seed=num_modalities)
    graph = in_double(build_graph(dataset, num_neighbors=2))
    config = {"embedding_dim": 3, "latent_dim": 4, "l2_weight": 0.3} | CONFIGS[name]
    model = double_model(GRCN, graph, **config)
    batch, oracle, own = some_triplets(graph), Oracle(dataset, model.config), parameters_of(model)
    refined = oracle.refined(own)
    for actual, expected in zip(refined_matrices(model, graph), refined, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-12)
    # Some messages are pruned and some are not, or the test would not see the difference.
    kept = refined[0][oracle.R > 0] > 0
    assert kept.any()
    assert not kept.all()
    assert_rows(model(graph), oracle.encode(own))
    assert_terms_and_gradients(model, model.loss(graph, batch), lambda p: oracle.terms(p, batch))


def test_routing_moves_users_towards_what_they_took():
    dataset = random_dataset()
    graph = in_double(build_graph(dataset, num_neighbors=2))
    R = torch.from_numpy(train_matrix(dataset))

    def agreement(num_routings):
        model = double_model(GRCN, graph, embedding_dim=3, latent_dim=4, num_routings=num_routings)
        user = model.content(graph, "text")[0].user
        item = torch.nn.functional.normalize(torch.nn.functional.leaky_relu(model.projections["text"](graph)))
        mean = (torch.nn.functional.normalize(user) @ item.T * R).sum() / R.sum()
        return mean.item()

    assert agreement(0) < agreement(1) < agreement(3)


def test_nodes_without_features_or_neighbours_keep_finite_gradients():
    graph = build_graph(random_dataset(), num_neighbors=2)
    model = GRCN(graph)
    user, item = model(graph)
    (user[USER_WITHOUT_INTERACTIONS].sum() + item[ITEM_WITHOUT_FEATURES].sum() + item[-1].sum()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_refuses_a_graph_without_features():
    with pytest.raises(ConfigError, match="GRCN needs at least one modality with features"):
        GRCN(build_graph(random_dataset(()), num_neighbors=2))
