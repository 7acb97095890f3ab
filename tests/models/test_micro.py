"""MICRO against the oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dream_pyg.errors import ConfigError
from dream_pyg.graph.build import build_graph
from dream_pyg.models import MICRO, Batch
from dream_pyg.nn.fusion import view_contrast
from tests.graphs import (
    ITEM_WITHOUT_FEATURES,
    MODALITIES,
    cosine_graph,
    item_features,
    random_dataset,
    train_matrix,
)
from tests.models.agreement import assert_rows, assert_terms_and_gradients, double_model, parameters_of, some_triplets
from tests.oracles import dream, lattice, micro
from tests.oracles.features import projection, scaled

NUM_NEIGHBORS = 5  # of at most nine items, so that some cosines are negative
CONFIGS = {
    "default": {},
    "without_self": {"include_self": False},
    "raw": {"feature_scaling": "raw"},
    "rms": {"feature_scaling": "rms"},
    "layers": {"num_layers": 3, "num_item_layers": 2},
    "no_layers": {"num_layers": 0},
    "mined_alone": {"skip_weight": 0.0},
    "temperature": {"temperature": 0.2},
    "no_contrast": {"contrastive_weight": 0.0},
}

CASES = [
    *((name, 2, False) for name in CONFIGS),
    *(("default", num_modalities, True) for num_modalities in (1, 2, 3)),
]


class Oracle:
    """MICRO from raw arrays and a model's parameters."""

    def __init__(self, dataset, config, include_self):
        self.config = config
        self.R = train_matrix(dataset)
        raw = {m: item_features(dataset, m) for m in dataset.modalities}
        self.has = {m: has for m, (_, has) in raw.items()}
        self.features = {m: scaled(X, config.feature_scaling) for m, (X, _) in raw.items()}
        self.S = {}
        for m, (X, has) in raw.items():
            self.S[m] = lattice.weighted_graph(X, dream.top_k_neighbours(X, has, NUM_NEIGHBORS, include_self))

    def projected(self, p, m):
        """h_m of all items."""
        weights = p[f"structure.projections.{m}.weight"], p[f"structure.projections.{m}.bias"]
        return projection(self.features[m], self.has[m], *weights)

    def mine(self, p):
        """The neighbours in projected features."""
        k, include_self = self.config.num_neighbors, self.config.include_self
        return {m: dream.top_k_neighbours(self.projected(p, m), self.has[m], k, include_self) for m in self.features}

    def views(self, p, mined):
        """Items over each latent structure, by modality, and fused."""
        views = {}
        for m, S in self.S.items():
            A = lattice.joined(S, lattice.weighted_graph(self.projected(p, m), mined[m]), self.config.skip_weight)
            views[m] = lattice.latent_items(A, p["item_embedding"], self.config.num_item_layers)
        if len(views) == 1:
            return views, *views.values()
        weights = p["fusion.hidden.weight"].T, p["fusion.hidden.bias"], p["fusion.query.weight"][0]
        return views, micro.attention(list(views.values()), *weights)

    def encode(self, p, mined):
        """Users and items."""
        _, fused = self.views(p, mined)
        return lattice.encode(self.R, fused, p["user_embedding"], p["item_embedding"], self.config.num_layers)

    def terms(self, p, mined, batch):
        """Each weighted term."""
        user, pos, neg = (part.numpy() for part in batch)
        users, items = self.encode(p, mined)
        rows = users[user], items[pos], items[neg]
        expected = {"bpr": dream.bpr(*rows, "mean")}
        if self.config.contrastive_weight and len(self.S) > 1:
            views, fused = self.views(p, mined)
            different = sorted(set(pos.tolist()))
            contrast = 0.0
            for m, view in views.items():
                present = [item for item in different if self.has[m][item]]
                contrast += micro.contrast(view[present], fused[present], self.config.temperature)
            expected["contrastive"] = self.config.contrastive_weight * contrast
        expected["l2"] = self.config.l2_weight * dream.l2(*rows)
        return expected


@pytest.mark.parametrize(("name", "num_modalities", "include_self"), CASES)
def test_embeddings_losses_and_gradients_are_the_equations(name, num_modalities, include_self):
    dataset = random_dataset(MODALITIES[:num_modalities], seed=num_modalities)
    graph = cosine_graph(dataset, NUM_NEIGHBORS, include_self)
    sizes = {"embedding_dim": 3, "num_neighbors": 4, "skip_weight": 0.4}
    model = double_model(MICRO, graph, **(sizes | {"contrastive_weight": 0.6, "l2_weight": 0.2} | CONFIGS[name]))
    oracle, batch = Oracle(dataset, model.config, include_self), some_triplets(graph)
    assert len(batch.pos_item.unique()) < len(batch.pos_item)  # an item that comes twice is no negative of itself

    before = oracle.mine(parameters_of(model))
    assert_rows(model(graph), oracle.encode(parameters_of(model), before))
    # Before the first epoch, a loss comes from the neighbours of the moment.
    assert_terms_and_gradients(model, model.loss(graph, batch), lambda p: oracle.terms(p, before, batch))

    # Within an epoch neighbours stay, whatever the weights become; representations have those of the moment.
    model.on_epoch_start(graph, torch.Generator())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    after = oracle.mine(parameters_of(model))
    assert before != after
    assert_rows(model(graph), oracle.encode(parameters_of(model), after))
    assert_terms_and_gradients(model, model.loss(graph, batch), lambda p: oracle.terms(p, before, batch))


def test_a_batch_without_a_modality_has_nothing_to_contrast():
    graph = build_graph(random_dataset(), num_neighbors=NUM_NEIGHBORS)
    lacking = torch.tensor([ITEM_WITHOUT_FEATURES] * 2)
    terms = MICRO(graph).loss(graph, Batch(torch.tensor([2, 3]), lacking, torch.tensor([4, 5])))
    assert terms["contrastive"] == 0.0
    sum(terms.values()).backward()


def test_one_modality_is_its_own_fusion():
    graph = build_graph(random_dataset(MODALITIES[:1]), num_neighbors=NUM_NEIGHBORS)
    model = MICRO(graph)
    views, fused = model.views(graph, model.structure.mine(graph))
    assert views["image"] is fused
    assert list(model.loss(graph, some_triplets(graph))) == ["bpr", "l2"]


def test_contrast_by_hand():
    view, fused = [[2.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [1.0, 0.0]]
    e = np.e
    # Row 0 is like both fused rows and unlike row 1; row 1 is unlike everything.
    expected = (-np.log(e / (2 * e + 1)) - np.log(1 / 3)) / 2
    np.testing.assert_allclose(micro.contrast(view, fused, 1.0), expected, rtol=1e-12)
    np.testing.assert_allclose(view_contrast(torch.tensor(view), torch.tensor(fused), 1.0), expected, rtol=1e-6)


def test_refuses_a_graph_without_features():
    with pytest.raises(ConfigError, match="MICRO needs at least one modality with features"):
        MICRO(build_graph(random_dataset(()), num_neighbors=2))
