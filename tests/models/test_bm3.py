"""BM3 against the oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dream_pyg.errors import ConfigError
from dream_pyg.graph.build import build_graph
from dream_pyg.models import BM3, Batch
from tests.graphs import (
    ITEM_WITHOUT_FEATURES,
    MODALITIES,
    in_double,
    item_features,
    random_dataset,
    train_matrix,
)
from tests.models.added_terms import added_terms, in_double_means
from tests.models.agreement import assert_rows, assert_terms_and_gradients, double_model, parameters_of, some_triplets
from tests.oracles import bm3
from tests.oracles.features import projection, scaled

CONFIGS = {
    "default": {"l2_weight": 0.3},
    "no_dropout": {"dropout": 0.0},
    "no_layers": {"num_layers": 0},
    "three_layers": {"num_layers": 3, "modality_weight": 0.5},
    "raw": {"feature_scaling": "raw"},
    "rms": {"feature_scaling": "rms", "train_features": False},
    "fixed_features": {"train_features": False},
    "aligned": {"intra_weight": 0.7, "inter_weight": 0.4},
    "intra": {"intra_weight": 0.7, "alignment_temperature": 0.5},
    "signal": {"signal_weight": 1.3},
}


class Oracle:
    """BM3 from raw arrays and a model's parameters."""

    def __init__(self, dataset, config):
        self.dataset = dataset
        self.config = config
        self.R = train_matrix(dataset)
        raw = {m: item_features(dataset, m) for m in dataset.modalities}
        self.has = {m: has for m, (_, has) in raw.items()}
        self.features = {m: scaled(X, config.feature_scaling) for m, (X, _) in raw.items()}

    def latent(self, p):
        """h_u, h_i and each h_m."""
        user, item = bm3.encode(self.R, p["user_embedding"], p["item_embedding"], self.config.num_layers)
        modal = {
            m: projection(
                p.get(f"projections.{m}.features", X),
                self.has[m],
                p[f"projections.{m}.weight"],
                p[f"projections.{m}.bias"],
            )
            for m, X in self.features.items()
        }
        return user, item, modal

    def lines(self, p):
        """The behavior and the modal line."""
        user, item, modal = self.latent(p)
        predictor = p["predictor.weight"].T, p["predictor.bias"]
        behavior = bm3.predict(user, *predictor), bm3.predict(item, *predictor)
        return behavior, bm3.modal_line(self.R, list(modal.values()), list(self.has.values()), *predictor)

    def terms(self, p, fixed, batch, masks):
        """Each weighted term; targets come from the parameters ``fixed`` and the masks of users, items, modalities."""
        config, (user, pos, _) = self.config, (part.numpy() for part in batch)
        predictor = p["predictor.weight"].T, p["predictor.bias"]
        h_user, h_item, h_modal = self.latent(p)
        still_user, still_item, still_modal = self.latent(fixed)
        target_user, target_item = still_user[user] * masks[0], still_item[pos] * masks[1]
        online_user, online_item = bm3.predict(h_user[user], *predictor), bm3.predict(h_item[pos], *predictor)
        inter_modality = intra_modality = 0.0
        for m, mask in zip(self.features, masks[2:], strict=True):
            online, present = bm3.predict(h_modal[m][pos], *predictor), self.has[m][pos]
            inter_modality += bm3.dissimilarity(online, target_item, present)
            intra_modality += bm3.dissimilarity(online, still_modal[m][pos] * mask, present)
        expected = {
            "reconstruction": bm3.reconstruction(online_user, online_item, target_user, target_item),
            "inter_modality": config.modality_weight * inter_modality,
            "intra_modality": config.modality_weight * intra_modality,
            "l2": config.l2_weight * bm3.l2(h_user, h_item),
        }
        _, (modal_user, modal_item) = self.lines(p)
        aligned = online_user, online_item, modal_user[user], modal_item[pos]
        return expected | added_terms(self.dataset, config, (user, pos), aligned)


@pytest.fixture
def masks(monkeypatch):
    """The factors by which dropout multiplied, in the order drawn."""
    drawn = []
    original = F.dropout

    def recording(rows, share):
        drawn.append(original(torch.ones_like(rows), share))
        return rows * drawn[-1]

    monkeypatch.setattr(F, "dropout", recording)
    return drawn


@pytest.mark.parametrize(
    ("name", "num_modalities"), [*dict.fromkeys(CONFIGS, 2).items(), ("default", 1), ("default", 3)]
)
def test_views_losses_and_gradients_are_the_equations(name, num_modalities, masks):
    dataset = random_dataset(MODALITIES[:num_modalities], seed=num_modalities)
    graph = in_double(build_graph(dataset, num_neighbors=2))
    model = double_model(BM3, graph, embedding_dim=4, **CONFIGS[name])
    in_double_means(model.alignment.signal, dataset)
    batch = some_triplets(graph)
    oracle, own = Oracle(dataset, model.config), parameters_of(model)

    behavior, modal = oracle.lines(own)
    lines = model.dual_representations(graph)
    assert_rows([*lines.behavior, *lines.modal], [*behavior, *modal])
    assert_rows(model(graph), behavior)
    terms = model.loss(graph, batch)
    factors = [mask.numpy() for mask in masks]
    # Targets first of users, of items, then of each modality in turn; cosines do not see how the rest is scaled.
    assert len(factors) == 2 + num_modalities
    values = {0.0, 2.0} if model.config.dropout else {1.0}
    assert all(set(np.unique(factor)) == values for factor in factors)
    assert_terms_and_gradients(model, terms, lambda p: oracle.terms(p, own, batch, factors))


def test_dropout_comes_from_the_global_generator():
    graph = build_graph(random_dataset(), num_neighbors=2)
    model, batch = BM3(graph), some_triplets(graph)
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(model.loss(graph, batch)["reconstruction"].item())
    assert losses[0] == losses[1] != losses[2]


def test_negatives_are_not_used():
    graph = build_graph(random_dataset(), num_neighbors=2)
    model, batch = BM3(graph, BM3.Config(dropout=0.0, intra_weight=1.0)), some_triplets(graph)
    other = Batch(batch.user, batch.pos_item, batch.neg_item.flip(0))
    for name, term in model.loss(graph, batch).items():
        assert term == model.loss(graph, other)[name]


def test_a_batch_without_a_modality_has_no_loss_on_it():
    graph = build_graph(random_dataset(), num_neighbors=2)
    lacking = torch.tensor([ITEM_WITHOUT_FEATURES] * 2)
    terms = BM3(graph).loss(graph, Batch(torch.tensor([0, 2]), lacking, lacking))
    assert terms["inter_modality"] == terms["intra_modality"] == 0.0
    torch.stack(list(terms.values())).sum().backward()


def test_alignment_is_one_switch():
    graph = in_double(build_graph(random_dataset(), num_neighbors=2))
    plain = double_model(BM3, graph, embedding_dim=3, dropout=0.0)
    aligned = double_model(
        BM3, graph, embedding_dim=3, dropout=0.0, intra_weight=1.0, inter_weight=1.0, signal_weight=1.0
    )
    assert plain.state_dict().keys() == aligned.state_dict().keys()
    batch = some_triplets(graph)
    without, with_alignment = plain.loss(graph, batch), aligned.loss(graph, batch)
    assert list(with_alignment) == [*without, "intra", "inter", "signal"]
    assert all(torch.equal(with_alignment[name], term) for name, term in without.items())


def test_refuses_a_graph_without_features():
    with pytest.raises(ConfigError, match="BM3 needs at least one modality with features"):
        BM3(build_graph(random_dataset(()), num_neighbors=2))
