"""MMGCN against the oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dream_pyg.errors import ConfigError
from dream_pyg.graph.build import build_graph
from dream_pyg.models import MMGCN
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
from tests.oracles import dream, mmgcn
from tests.oracles.features import projection, scaled

CONFIGS = {
    "default": {},
    "concat": {"combination": "concat"},
    "one_layer": {"num_layers": 1},
    "two_layers_concat": {"num_layers": 2, "combination": "concat"},
    "raw": {"feature_scaling": "raw"},
    "rms": {"feature_scaling": "rms"},
}


class Oracle:
    """MMGCN from raw arrays and a model's parameters."""

    def __init__(self, dataset, config):
        self.config = config
        self.R = train_matrix(dataset)
        raw = {m: item_features(dataset, m) for m in dataset.modalities}
        self.has = {m: has for m, (_, has) in raw.items()}
        self.features = {m: scaled(X, config.feature_scaling) for m, (X, _) in raw.items()}

    def line(self, p, m):
        """Users and items in one modality, users first."""
        projected = projection(self.features[m], self.has[m], p[f"projections.{m}.weight"], p[f"projections.{m}.bias"])
        x = mmgcn.first_states(p[f"preferences.{m}"], projected)
        identity = np.concatenate([p["user_embedding"], p["item_embedding"]])
        for number in range(self.config.num_layers):
            at = f"layers.{m}.{number}"
            own, combine = ((p[f"{at}.{part}.weight"].T, p[f"{at}.{part}.bias"]) for part in ("own", "combine"))
            concat = self.config.combination == "concat"
            x = mmgcn.layer(self.R, x, identity, p[f"{at}.aggregate.weight"].T, own, combine, concat)
        return x

    def encode(self, p):
        """Users and items."""
        lines = [self.line(p, m) for m in self.features]
        return np.split(sum(lines) / len(lines), [len(self.R)])

    def terms(self, p, batch):
        """Each weighted term."""
        user, pos, neg = (part.numpy() for part in batch)
        users, items = self.encode(p)
        free = [p["user_embedding"][user], p["item_embedding"][pos], p["item_embedding"][neg]]
        free += [p[f"preferences.{m}"][user] for m in self.features]
        return {
            "bpr": dream.bpr(users[user], items[pos], items[neg], "mean"),
            "l2": self.config.l2_weight * mmgcn.l2(*free),
        }


@pytest.mark.parametrize(
    ("name", "num_modalities"), [*dict.fromkeys(CONFIGS, 2).items(), ("default", 1), ("default", 3), ("concat", 3)]
)
def test_embeddings_losses_and_gradients_are_the_equations(name, num_modalities):
    dataset = random_dataset(MODALITIES[:num_modalities], seed=num_modalities)
    graph = in_double(build_graph(dataset, num_neighbors=2))
    config = {"embedding_dim": 3, "latent_dim": 4, "l2_weight": 0.3} | CONFIGS[name]
    model = double_model(MMGCN, graph, **config)
    batch, oracle, own = some_triplets(graph), Oracle(dataset, model.config), parameters_of(model)

    for modality in dataset.modalities:
        assert_rows(model.modal_line(graph, modality), np.split(oracle.line(own, modality), [model.num_users]))
    assert_rows(model(graph), oracle.encode(own))
    assert_terms_and_gradients(model, model.loss(graph, batch), lambda p: oracle.terms(p, batch))


def test_embeddings_that_are_not_trained_get_no_gradient_and_change_no_other():
    graph = in_double(build_graph(random_dataset(), num_neighbors=2))
    trained, fixed = (double_model(MMGCN, graph, latent_dim=4, train_embeddings=choice) for choice in (True, False))
    fixed.load_state_dict(trained.state_dict())
    batch = some_triplets(graph)
    for model in (trained, fixed):
        model.loss(graph, batch)["bpr"].backward()
    assert list(fixed.loss(graph, batch)) == ["bpr"]
    of_fixed = dict(fixed.named_parameters())
    for name, parameter in trained.named_parameters():
        if name in ("user_embedding", "item_embedding") or name.startswith("preferences"):
            assert parameter.grad is not None
            assert of_fixed[name].grad is None
        else:
            assert torch.equal(parameter.grad, of_fixed[name].grad)


def test_the_length_of_a_preference_does_not_matter():
    graph = in_double(build_graph(random_dataset(), num_neighbors=2))
    model = double_model(MMGCN, graph, embedding_dim=3, latent_dim=4, num_layers=1)
    before = model.modal_line(graph, "image").item
    with torch.no_grad():
        model.preferences["image"].mul_(3.0)
    torch.testing.assert_close(model.modal_line(graph, "image").item, before, rtol=1e-12, atol=1e-12)


def test_nodes_without_features_or_neighbours_keep_finite_gradients():
    graph = build_graph(random_dataset(), num_neighbors=2)
    model = MMGCN(graph)
    user, item = model(graph)
    (user[USER_WITHOUT_INTERACTIONS].sum() + item[ITEM_WITHOUT_FEATURES].sum()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_refuses_a_graph_without_features():
    with pytest.raises(ConfigError, match="MMGCN needs at least one modality with features"):
        MMGCN(build_graph(random_dataset(()), num_neighbors=2))
