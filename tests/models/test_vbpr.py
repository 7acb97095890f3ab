"""VBPR against the oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dream_pyg.errors import ConfigError
from dream_pyg.graph.build import build_graph
from dream_pyg.models import VBPR
from tests.graphs import ITEM_WITHOUT_FEATURES, MODALITIES, in_double, item_features, random_dataset
from tests.models.added_terms import added_terms, in_double_means
from tests.models.agreement import assert_rows, assert_terms_and_gradients, double_model, parameters_of, some_triplets
from tests.oracles import dream, vbpr
from tests.oracles.features import scaled

CONFIGS = {
    "default": {"l2_weight": 0.3},
    "raw": {"feature_scaling": "raw"},
    "rms": {"feature_scaling": "rms"},
    "aligned": {"intra_weight": 0.7, "inter_weight": 0.4},
    "intra": {"intra_weight": 0.7, "alignment_temperature": 0.5},
    "inter": {"inter_weight": 0.4},
    "signal": {"signal_weight": 1.3},
}


def oracle_of(dataset, config):
    features = {m: scaled(item_features(dataset, m)[0], config.feature_scaling) for m in dataset.modalities}

    def parts(p):
        theta_item = vbpr.visual_factors(list(features.values()), [p[f"projections.{m}.weight"] for m in features])
        return p["user_embedding"], p["user_preference"], p["item_embedding"], theta_item

    def terms(p, batch):
        user, pos, neg = (part.numpy() for part in batch)
        gamma_user, theta_user, gamma_item, theta_item = parts(p)
        wide_user, wide_item = np.hstack([gamma_user, theta_user]), np.hstack([gamma_item, theta_item])
        aligned = gamma_user[user], gamma_item[pos], theta_user[user], theta_item[pos]
        expected = {
            "bpr": vbpr.bpr(vbpr.scores(*parts(p)), user, pos, neg),
            "l2": config.l2_weight * dream.l2(wide_user[user], wide_item[pos], wide_item[neg]),
        }
        return expected | added_terms(dataset, config, (user, pos), aligned)

    return parts, terms


@pytest.mark.parametrize(
    ("name", "num_modalities"), [*dict.fromkeys(CONFIGS, 2).items(), ("default", 1), ("default", 3)]
)
def test_scores_loss_and_gradients_are_the_equations(name, num_modalities):
    dataset = random_dataset(MODALITIES[:num_modalities], seed=num_modalities)
    graph = in_double(build_graph(dataset, num_neighbors=2))
    model = double_model(VBPR, graph, embedding_dim=3, **CONFIGS[name])
    in_double_means(model.alignment.signal, dataset)
    batch = some_triplets(graph)
    parts, terms = oracle_of(dataset, model.config)

    gamma_user, theta_user, gamma_item, theta_item = parts(parameters_of(model))
    behavior, modal = model.dual_representations(graph)
    assert_rows([*behavior, *modal], [gamma_user, gamma_item, theta_user, theta_item])
    user, item = model(graph)
    expected = vbpr.scores(gamma_user, theta_user, gamma_item, theta_item)
    np.testing.assert_allclose((user @ item.T).detach(), expected, rtol=1e-10, atol=1e-12)
    assert_terms_and_gradients(model, model.loss(graph, batch), lambda p: terms(p, batch))


def test_an_item_without_features_is_scored_by_its_id_alone():
    graph = build_graph(random_dataset(MODALITIES), num_neighbors=2)
    model = double_model(VBPR, graph, embedding_dim=3)
    _, modal = model.dual_representations(graph)
    assert not modal.item[ITEM_WITHOUT_FEATURES].any()
    assert modal.item[2:].all()


def test_alignment_is_one_switch():
    graph = in_double(build_graph(random_dataset(), num_neighbors=2))
    plain = double_model(VBPR, graph, embedding_dim=3)
    aligned = double_model(VBPR, graph, embedding_dim=3, intra_weight=1.0, inter_weight=1.0, signal_weight=1.0)
    assert plain.state_dict().keys() == aligned.state_dict().keys()
    batch = some_triplets(graph)
    without, with_alignment = plain.loss(graph, batch), aligned.loss(graph, batch)
    assert list(with_alignment) == [*without, "intra", "inter", "signal"]
    assert all(torch.equal(with_alignment[name], term) for name, term in without.items())


def test_refuses_a_graph_without_features():
    with pytest.raises(ConfigError, match="VBPR needs at least one modality with features"):
        VBPR(build_graph(random_dataset(()), num_neighbors=2))
