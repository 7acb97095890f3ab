"""DualGNN against the oracle."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from dream_pyg.errors import ConfigError
from dream_pyg.graph.build import build_graph
from dream_pyg.models import DualGNN
from tests.graphs import (
    MODALITIES,
    USER_WITHOUT_INTERACTIONS,
    in_double,
    item_features,
    random_dataset,
    train_matrix,
)
from tests.models.agreement import assert_rows, assert_terms_and_gradients, double_model, parameters_of, some_triplets
from tests.oracles import dream, dualgnn
from tests.oracles.features import scaled

CONFIGS = {
    "default": {},
    "raw": {"feature_scaling": "raw"},
    "rms": {"feature_scaling": "rms"},
    "layers": {"num_layers": 3},
    "no_layers": {"num_layers": 0},
    "all_neighbors": {"num_user_neighbors": 100},
    "one_neighbor": {"num_user_neighbors": 1},
    "no_l2": {"l2_weight": 0.0},
}

CASES = [
    *((name, 2) for name in CONFIGS),
    *(("default", num_modalities) for num_modalities in (1, 3)),
]


class Oracle:
    """DualGNN from raw arrays and a model's parameters."""

    def __init__(self, dataset, config):
        self.config = config
        self.R = train_matrix(dataset)
        raw = {m: item_features(dataset, m) for m in dataset.modalities}
        self.has = {m: has for m, (_, has) in raw.items()}
        self.features = {m: scaled(X, config.feature_scaling) for m, (X, _) in raw.items()}
        self.C = dualgnn.user_graph(dualgnn.co_occurrence(self.R, config.num_user_neighbors))

    def views(self, p):
        """Users and items of each modality."""
        views = []
        for m, X in self.features.items():
            first = p[f"encoders.{m}.hidden.weight"], p[f"encoders.{m}.hidden.bias"]
            second = p[f"encoders.{m}.output.weight"].T, p[f"encoders.{m}.output.bias"]
            item = dualgnn.encode_items(X, self.has[m], *first, *second)
            views.append(dualgnn.view(self.R, p[f"encoders.{m}.user_embedding"], item, self.config.num_layers))
        return views

    def encode(self, p):
        """Users and items."""
        views = self.views(p)
        user = dualgnn.preferences([user for user, _ in views], p.get("modality_weight", np.ones((len(self.R), 1))))
        return user + self.C @ user, sum(item for _, item in views)

    def terms(self, p, batch):
        """Each weighted term."""
        user, pos, neg = (part.numpy() for part in batch)
        users, items = self.encode(p)
        free = [p[f"encoders.{m}.user_embedding"][user] for m in self.features]
        penalty = dualgnn.l2(free, p.get("modality_weight"))
        return {
            "bpr": dream.bpr(users[user], items[pos], items[neg], "mean"),
            "l2": self.config.l2_weight * penalty,
        }


@pytest.mark.parametrize(("name", "num_modalities"), CASES)
def test_embeddings_losses_and_gradients_are_the_equations(name, num_modalities):
    dataset = random_dataset(MODALITIES[:num_modalities], seed=num_modalities)
    graph = in_double(build_graph(dataset, num_neighbors=3))
    config = {"embedding_dim": 3, "num_user_neighbors": 4, "l2_weight": 0.2} | CONFIGS[name]
    model = double_model(DualGNN, graph, **config)
    oracle, batch = Oracle(dataset, model.config), some_triplets(graph)
    assert_rows(model(graph), oracle.encode(parameters_of(model)))
    assert_terms_and_gradients(model, model.loss(graph, batch), lambda p: oracle.terms(p, batch))


def test_a_user_without_neighbors_hears_nobody():
    graph = in_double(build_graph(random_dataset(), num_neighbors=3))
    model = double_model(DualGNN, graph, embedding_dim=3)
    user = torch.randn(model.num_users, 3, dtype=torch.float64)
    assert not model.neighborhood(user)[USER_WITHOUT_INTERACTIONS].any()


def test_the_user_graph_is_not_saved_and_survives_a_copy():
    graph = build_graph(random_dataset(), num_neighbors=3)
    model = DualGNN(graph)
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}
    for one, two in zip(model(graph), copy.deepcopy(model).to("cpu")(graph), strict=True):
        assert torch.equal(one, two)


def test_modalities_start_equal():
    graph = build_graph(random_dataset(MODALITIES), num_neighbors=3)
    torch.testing.assert_close(DualGNN(graph).modality_weight.detach(), torch.full((12, 3), 1 / 3))


def test_refuses_a_graph_without_features():
    with pytest.raises(ConfigError, match="DualGNN needs at least one modality with features"):
        DualGNN(build_graph(random_dataset(()), num_neighbors=2))
