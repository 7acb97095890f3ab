"""LATTICE against the oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dream_pyg.errors import ConfigError
from dream_pyg.graph.build import build_graph
from dream_pyg.models import LATTICE
from tests.graphs import MODALITIES, cosine_graph, item_features, random_dataset, train_matrix
from tests.models.agreement import assert_rows, assert_terms_and_gradients, double_model, parameters_of, some_triplets
from tests.oracles import dream, lattice
from tests.oracles.features import projection, scaled

NUM_NEIGHBORS = 5  # of at most nine items, so that some cosines are negative
CONFIGS = {
    "default": {},
    "without_self": {"include_self": False},
    "raw": {"feature_scaling": "raw"},
    "rms": {"feature_scaling": "rms"},
    "layers": {"num_layers": 3, "num_item_layers": 2},
    "no_layers": {"num_layers": 0},
    "frozen_alone": {"skip_weight": 1.0},
    "mined_alone": {"skip_weight": 0.0, "include_self": False},
    "all_neighbors": {"num_neighbors": 100},
}

CASES = [
    *((name, 2, False) for name in CONFIGS),
    *(("default", num_modalities, True) for num_modalities in (1, 2, 3)),
]


class Oracle:
    """LATTICE from raw arrays and a model's parameters."""

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

    def encode(self, p, mined):
        """Users and items."""
        graphs = []
        for m, S in self.S.items():
            A = lattice.weighted_graph(self.projected(p, m), mined[m])
            graphs.append(lattice.joined(S, A, self.config.skip_weight))
        A = lattice.fused(graphs, p.get("modality_logits", [0.0]))
        latent = lattice.latent_items(A, p["item_embedding"], self.config.num_item_layers)
        return lattice.encode(self.R, latent, p["user_embedding"], p["item_embedding"], self.config.num_layers)

    def terms(self, p, mined, batch):
        """Each weighted term."""
        user, pos, neg = (part.numpy() for part in batch)
        users, items = self.encode(p, mined)
        rows = users[user], items[pos], items[neg]
        return {"bpr": dream.bpr(*rows, "mean"), "l2": self.config.l2_weight * dream.l2(*rows)}


@pytest.mark.parametrize(("name", "num_modalities", "include_self"), CASES)
def test_embeddings_losses_and_gradients_are_the_equations(name, num_modalities, include_self):
    dataset = random_dataset(MODALITIES[:num_modalities], seed=num_modalities)
    graph = cosine_graph(dataset, NUM_NEIGHBORS, include_self)
    config = {"embedding_dim": 3, "num_neighbors": 4, "skip_weight": 0.4, "l2_weight": 0.2} | CONFIGS[name]
    model = double_model(LATTICE, graph, **config)
    oracle, batch = Oracle(dataset, model.config, include_self), some_triplets(graph)

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
    same = [set(one) == set(other) for m in before for one, other in zip(before[m], after[m], strict=True)]
    assert all(same) == (name == "all_neighbors")
    assert_rows(model(graph), oracle.encode(parameters_of(model), after))
    assert_terms_and_gradients(model, model.loss(graph, batch), lambda p: oracle.terms(p, before, batch))
    model.on_epoch_start(graph, torch.Generator())
    assert_terms_and_gradients(model, model.loss(graph, batch), lambda p: oracle.terms(p, after, batch))


def test_raw_features_alone_leave_the_projection_without_influence():
    graph = cosine_graph(random_dataset(), NUM_NEIGHBORS)
    model = double_model(LATTICE, graph, embedding_dim=3, skip_weight=1.0)
    sum(model.loss(graph, some_triplets(graph)).values()).backward()
    assert not any(projection.weight.grad.any() for projection in model.structure.projections.values())


def test_modalities_start_equal():
    graph = build_graph(random_dataset(MODALITIES), num_neighbors=3)
    np.testing.assert_allclose(LATTICE(graph).modality_logits.softmax(dim=0).detach(), np.full(3, 1 / 3), rtol=1e-6)


def test_refuses_a_graph_without_features():
    with pytest.raises(ConfigError, match="LATTICE needs at least one modality with features"):
        LATTICE(build_graph(random_dataset(()), num_neighbors=2))
