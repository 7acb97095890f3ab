"""SLMRec against the oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dream_pyg.errors import ConfigError
from dream_pyg.graph.build import build_graph
from dream_pyg.models import Batch, SLMRec
from tests.graphs import MODALITIES, in_double, item_features, random_dataset, train_matrix
from tests.models.agreement import assert_rows, assert_terms_and_gradients, double_model, parameters_of, some_triplets
from tests.oracles import dream, slmrec
from tests.oracles.features import projection, scaled

CONFIGS = {
    "default": {},
    "no_layers": {"num_layers": 0},
    "one_layer": {"num_layers": 1},
    "temperatures": {"temperature": 0.5, "contrastive_temperature": 1.5},
    "no_contrastive": {"contrastive_weight": 0.0},
    "raw": {"feature_scaling": "raw"},
    "rms": {"feature_scaling": "rms"},
    "one_dimension": {"embedding_dim": 1},
}


class Oracle:
    """SLMRec from raw arrays and a model's parameters."""

    def __init__(self, dataset, config):
        self.config = config
        self.R = train_matrix(dataset)
        raw = {m: item_features(dataset, m) for m in dataset.modalities}
        self.has = {m: has for m, (_, has) in raw.items()}
        self.features = {m: scaled(X, config.feature_scaling) for m, (X, _) in raw.items()}

    def lines(self, p):
        """The lines of users and those of items, IDs first."""
        projected = [
            projection(X, self.has[m], p[f"projections.{m}.weight"], p[f"projections.{m}.bias"])
            for m, X in self.features.items()
        ]
        starts = [p["item_embedding"], *projected]
        encoded = [slmrec.encode(self.R, p["user_embedding"], item, self.config.num_layers) for item in starts]
        return [rows[: len(self.R)] for rows in encoded], [rows[len(self.R) :] for rows in encoded]

    def encode(self, p):
        """Users and items."""
        user, item = self.lines(p)
        return (
            slmrec.fuse(user, p["user_fusion.weight"].T, p["user_fusion.bias"]),
            slmrec.fuse(item, p["item_fusion.weight"].T, p["item_fusion.bias"]),
        )

    def terms(self, p, batch):
        """Each weighted term."""
        config, (user, pos, _) = self.config, (part.numpy() for part in batch)
        h_user, h_item = self.encode(p)
        expected = {"info_nce": dream.infonce(h_user[user], h_item[pos], config.temperature, True, "mean")}
        if config.contrastive_weight:
            identity, *modal = (line[pos] for line in self.lines(p)[1])
            coarse = [(p[f"coarse.{m}.weight"].T, p[f"coarse.{m}.bias"]) for m in self.features]
            fine = [p[f"fine.{m}.weight"].T for m in self.features]
            loss = slmrec.fine_and_coarse(identity, modal, coarse, fine, config.contrastive_temperature)
            expected["contrastive"] = config.contrastive_weight * loss
        l2 = slmrec.l2(p["user_embedding"][user], p["item_embedding"][pos])
        return expected | {"l2": config.l2_weight * l2}


@pytest.mark.parametrize(
    ("name", "num_modalities"), [*dict.fromkeys(CONFIGS, 2).items(), ("default", 1), ("default", 3)]
)
def test_embeddings_losses_and_gradients_are_the_equations(name, num_modalities):
    dataset = random_dataset(MODALITIES[:num_modalities], seed=num_modalities)
    graph = in_double(build_graph(dataset, num_neighbors=2))
    model = double_model(SLMRec, graph, **{"embedding_dim": 4, "l2_weight": 0.3} | CONFIGS[name])
    batch, oracle = some_triplets(graph), Oracle(dataset, model.config)
    assert_rows(model(graph), oracle.encode(parameters_of(model)))
    assert_terms_and_gradients(model, model.loss(graph, batch), lambda p: oracle.terms(p, batch))


def test_the_last_of_several_spaces_is_half_as_wide():
    def widths(num_modalities):
        graph = build_graph(random_dataset(MODALITIES[:num_modalities]), num_neighbors=2)
        model = SLMRec(graph)
        assert {m: len(fine.weight) for m, fine in model.fine.items()} == {
            m: len(coarse.weight) for m, coarse in model.coarse.items()
        }
        return [len(fine.weight) for fine in model.fine.values()]

    assert [widths(number) for number in (1, 2, 3)] == [[64], [64, 32], [64, 64, 32]]


def test_negatives_are_not_used():
    graph = build_graph(random_dataset(), num_neighbors=2)
    model, batch = SLMRec(graph), some_triplets(graph)
    other = Batch(batch.user, batch.pos_item, batch.neg_item.flip(0))
    for name, term in model.loss(graph, batch).items():
        assert term == model.loss(graph, other)[name]


def test_a_bias_of_the_fine_maps_would_cancel():
    graph = in_double(build_graph(random_dataset(), num_neighbors=2))
    model, batch = double_model(SLMRec, graph, embedding_dim=4), some_triplets(graph)
    before = model.loss(graph, batch)["contrastive"].item()
    shift = torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64)
    model.fine["image"].register_forward_hook(lambda module, inputs, output: output + shift)
    np.testing.assert_allclose(model.loss(graph, batch)["contrastive"].item(), before, rtol=1e-12)


def test_refuses_a_graph_without_features():
    with pytest.raises(ConfigError, match="SLMRec needs at least one modality with features"):
        SLMRec(build_graph(random_dataset(()), num_neighbors=2))
