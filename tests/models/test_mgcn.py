"""MGCN against the oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dream_pyg.errors import ConfigError
from dream_pyg.graph.build import build_graph
from dream_pyg.graph.schema import ITEM, knn_edge
from dream_pyg.models import MGCN
from tests.graphs import MODALITIES, cosine_graph, in_double, item_features, random_dataset, train_matrix
from tests.models.added_terms import added_terms, in_double_means
from tests.models.agreement import assert_rows, assert_terms_and_gradients, double_model, parameters_of, some_triplets
from tests.oracles import dream, mgcn
from tests.oracles.features import projection, scaled

NUM_NEIGHBORS = 5  # of at most nine items, so that some cosines are negative
CONFIGS = {
    "default": {},
    "shared_plus_mean": {"fusion": "shared_plus_mean"},
    "raw": {"feature_scaling": "raw"},
    "rms": {"feature_scaling": "rms"},
    "layers": {"num_layers": 3, "num_item_layers": 2},
    "no_layers": {"num_layers": 0, "num_item_layers": 0},
    "temperature": {"temperature": 0.5},
    "no_contrastive": {"contrastive_weight": 0.0},
    "intra": {"intra_weight": 0.7},
    "aligned": {"intra_weight": 0.7, "inter_weight": 0.4, "alignment_temperature": 0.3},
    "signal": {"intra_weight": 0.7, "signal_weight": 1.3},
}

CASES = [
    *((name, 2, False) for name in CONFIGS),
    *(("default", num_modalities, True) for num_modalities in (1, 2, 3)),
]


class Oracle:
    """MGCN from raw arrays and a model's parameters."""

    def __init__(self, dataset, config, include_self):
        self.dataset = dataset
        self.config = config
        self.R = train_matrix(dataset)
        raw = {m: item_features(dataset, m) for m in dataset.modalities}
        self.has = {m: has for m, (_, has) in raw.items()}
        self.features = {m: scaled(X, config.feature_scaling) for m, (X, _) in raw.items()}
        self.S = {m: mgcn.item_graph(*raw[m], NUM_NEIGHBORS, include_self) for m in raw}

    def lines(self, p):
        """The behavior and the modal line, users first (U + I, D)."""
        A_hat = dream.normalised(dream.adjacency(self.R))
        E0 = np.concatenate([p["user_embedding"], p["item_embedding"]])
        _, behavior = dream.lightgcn(A_hat, E0, self.config.num_layers)
        views = []
        for m, X in self.features.items():
            projected = projection(X, self.has[m], p[f"projections.{m}.weight"], p[f"projections.{m}.bias"])
            gate = p[f"purifiers.{m}.weight"], p[f"purifiers.{m}.bias"]
            purified = mgcn.purify(projected, p["item_embedding"], *gate)
            views.append(np.concatenate(mgcn.view(self.R, self.S[m], purified, self.config.num_item_layers)))
        # The library leaves out what one modality does not depend on; here it is there, with any values.
        W, b = np.ones((self.config.embedding_dim,) * 2), np.ones(self.config.embedding_dim)
        attention, preferences = (W, b, b), [(W, b)]
        if len(views) > 1:
            attention = p["attention.hidden.weight"].T, p["attention.hidden.bias"], p["attention.query.weight"][0]
            preferences = [(p[f"preferences.{m}.weight"], p[f"preferences.{m}.bias"]) for m in self.features]
        return behavior, mgcn.fuse(views, behavior, attention, preferences, self.config.fusion)

    def terms(self, p, batch):
        """Each weighted term."""
        config, num_users = self.config, len(self.R)
        user, pos, neg = (part.numpy() for part in batch)
        behavior, modal = self.lines(p)
        final = behavior + modal
        rows = final[user], final[num_users + pos], final[num_users + neg]
        aligned = behavior[user], behavior[num_users + pos], modal[user], modal[num_users + pos]
        expected = {"bpr": dream.bpr(*rows, "mean")}
        if config.contrastive_weight:
            # The fused modalities are the query here, behavior the key.
            swapped = *aligned[2:], *aligned[:2]
            contrastive = dream.inter(*swapped, config.temperature, True, "mean")
            expected["contrastive"] = config.contrastive_weight * contrastive
        expected["l2"] = config.l2_weight * dream.l2(*rows)
        return expected | added_terms(self.dataset, config, (user, pos), aligned)


@pytest.mark.parametrize(("name", "num_modalities", "include_self"), CASES)
def test_lines_losses_and_gradients_are_the_equations(name, num_modalities, include_self):
    dataset = random_dataset(MODALITIES[:num_modalities], seed=num_modalities)
    graph = cosine_graph(dataset, NUM_NEIGHBORS, include_self)
    config = {"embedding_dim": 3, "contrastive_weight": 0.6, "l2_weight": 0.2} | CONFIGS[name]
    model = double_model(MGCN, graph, **config)
    in_double_means(model.alignment.signal, dataset)
    oracle, batch = Oracle(dataset, model.config, include_self), some_triplets(graph)

    behavior, modal = oracle.lines(parameters_of(model))
    split = [model.num_users]
    lines = model.dual_representations(graph)
    assert_rows([*lines.behavior, *lines.modal], [*np.split(behavior, split), *np.split(modal, split)])
    assert_rows(model(graph), np.split(behavior + modal, split))
    assert_terms_and_gradients(model, model.loss(graph, batch), lambda p: oracle.terms(p, batch))


def test_negative_cosines_weigh_nothing_and_no_weight_is_lost_to_nan():
    dataset = random_dataset(MODALITIES[:1], seed=1)
    graph = cosine_graph(dataset, NUM_NEIGHBORS)
    similarity = graph[knn_edge(ITEM, "image")].similarity
    assert (similarity < 0).any()
    edge_index, weight = MGCN(graph).item_graph(graph, "image")
    assert torch.equal(weight == 0, similarity <= 0)
    similarity.fill_(-1.0)
    assert not MGCN(graph).item_graph(graph, "image")[1].any()
    assert torch.equal(edge_index.as_tensor(), graph[knn_edge(ITEM, "image")].edge_index.as_tensor())


def test_one_modality_is_all_shared():
    graph = cosine_graph(random_dataset(MODALITIES[:1]), NUM_NEIGHBORS)
    model = double_model(MGCN, graph, embedding_dim=3)
    _, modal = model.dual_representations(graph)
    user, item = model.view(graph, "image")
    torch.testing.assert_close(modal.user, user / 2)
    torch.testing.assert_close(modal.item, item / 2)


def test_alignment_is_one_switch():
    graph = in_double(build_graph(random_dataset(), num_neighbors=2))
    plain = double_model(MGCN, graph, embedding_dim=3)
    aligned = double_model(MGCN, graph, embedding_dim=3, intra_weight=1.0, signal_weight=1.0)
    assert plain.state_dict().keys() == aligned.state_dict().keys()
    batch = some_triplets(graph)
    without, with_alignment = plain.loss(graph, batch), aligned.loss(graph, batch)
    assert list(with_alignment) == [*without, "intra", "signal"]
    assert all(torch.equal(with_alignment[name], term) for name, term in without.items())


def test_refuses_a_graph_without_features():
    with pytest.raises(ConfigError, match="MGCN needs at least one modality with features"):
        MGCN(build_graph(random_dataset(()), num_neighbors=2))
