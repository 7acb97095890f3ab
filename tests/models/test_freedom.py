"""FREEDOM against the oracle."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from dream_pyg.data.dataset import Modality
from dream_pyg.errors import ConfigError
from dream_pyg.graph.build import build_graph
from dream_pyg.graph.knn import cosine_knn
from dream_pyg.graph.schema import INTERACTS, REV_INTERACTS, label_name
from dream_pyg.models import FREEDOM, Batch
from dream_pyg.models.freedom import prune_interactions
from tests.graphs import ITEM_WITHOUT_FEATURES, MODALITIES, in_double, item_features, random_dataset, train_matrix
from tests.models.agreement import assert_rows, assert_terms_and_gradients, double_model, parameters_of, some_triplets
from tests.oracles import dream, freedom
from tests.oracles.features import scaled

NUM_NEIGHBORS = 3
CONFIGS = {
    "default": {},
    "no_bpr_on_modalities": {"modality_bpr_weight": 0.0},
    "raw": {"feature_scaling": "raw"},
    "rms": {"feature_scaling": "rms"},
    "layers": {"num_layers": 3, "num_item_layers": 2},
    "no_layers": {"num_layers": 0, "num_item_layers": 0},
    "weighted": {"modality_weights": {"image": 3.0}},
}

CASES = [
    *((name, 2, False) for name in CONFIGS),
    *(("default", num_modalities, True) for num_modalities in (1, 2, 3)),
]


def default_weights(modalities):
    if set(modalities) == {"image", "text"}:
        return {"image": 0.1, "text": 0.9}
    return {modality: 1 / len(modalities) for modality in modalities}


class Oracle:
    """FREEDOM from raw arrays and a model's parameters."""

    def __init__(self, dataset, config, include_self):
        self.config = config
        given = config.modality_weights or default_weights(dataset.modalities)
        total = sum(given.values())
        raw = {m: item_features(dataset, m) for m in given}
        self.has = {m: has for m, (_, has) in raw.items()}
        self.features = {m: scaled(X, config.feature_scaling) for m, (X, _) in raw.items()}
        X, has = [X for X, _ in raw.values()], list(self.has.values())
        weights = [weight / total for weight in given.values()]
        self.S = freedom.item_graph(X, has, weights, NUM_NEIGHBORS, include_self)

    def encode(self, p, R):
        """Users and items, from some of the interactions."""
        layers = self.config.num_layers, self.config.num_item_layers
        return freedom.encode(R, self.S, p["user_embedding"], p["item_embedding"], *layers)

    def terms(self, p, R, batch):
        """Each weighted term."""
        user, pos, neg = (part.numpy() for part in batch)
        h_user, h_item = self.encode(p, R)
        expected = {"bpr": dream.bpr(h_user[user], h_item[pos], h_item[neg], "mean")}
        if self.config.modality_bpr_weight:
            for m, X in self.features.items():
                h_modal = X @ p[f"projections.{m}.weight"]
                bpr = freedom.modality_bpr(h_user, h_modal, self.has[m], user, pos, neg)
                expected[f"{m}_bpr"] = self.config.modality_bpr_weight * bpr
        return expected


def matrix_of(graph, R):
    """The interactions of a pruned graph, dense, and that it is a graph of interactions."""
    kept = np.zeros_like(R)
    user, item = graph[INTERACTS].edge_index.as_tensor()
    kept[user, item] = 1.0
    assert kept.sum() == len(user)  # no interaction is drawn twice
    assert (kept <= R).all()
    back = graph[REV_INTERACTS].edge_index.as_tensor()
    assert set(zip(back[1].tolist(), back[0].tolist(), strict=True)) == set(
        zip(user.tolist(), item.tolist(), strict=True)
    )
    return kept


@pytest.mark.parametrize(("name", "num_modalities", "include_self"), CASES)
def test_embeddings_losses_and_gradients_are_the_equations(name, num_modalities, include_self):
    dataset = random_dataset(MODALITIES[:num_modalities], seed=num_modalities)
    graph = in_double(build_graph(dataset, num_neighbors=NUM_NEIGHBORS, include_self=include_self))
    config = {"embedding_dim": 3, "pruning_ratio": 0.4, "modality_bpr_weight": 0.6} | CONFIGS[name]
    model = double_model(FREEDOM, graph, **config)
    oracle, R, batch = Oracle(dataset, model.config, include_self), train_matrix(dataset), some_triplets(graph)

    # Before the first epoch, and whenever it ranks, the model has all interactions.
    assert_terms_and_gradients(model, model.loss(graph, batch), lambda p: oracle.terms(p, R, batch))
    model.on_epoch_start(graph, torch.Generator().manual_seed(0))
    assert_rows(model(graph), oracle.encode(parameters_of(model), R))
    pruned = matrix_of(in_double(model._pruned), R)
    assert pruned.sum() == int(R.sum() * (1 - 0.4))
    assert_terms_and_gradients(model, model.loss(graph, batch), lambda p: oracle.terms(p, pruned, batch))


def test_pruning_is_a_function_of_the_generator_and_of_nothing_else():
    graph = build_graph(random_dataset(()), num_neighbors=2)
    drawn = []
    for seed, other in ((3, 0), (3, 1), (4, 1)):
        torch.manual_seed(other)
        pruned = prune_interactions(graph, 0.5, torch.Generator().manual_seed(seed))
        drawn.append(pruned[INTERACTS].edge_index.as_tensor().tolist())
    assert drawn[0] == drawn[1] != drawn[2]


def test_no_pruning_keeps_every_edge_and_weight():
    graph = build_graph(random_dataset(()), num_neighbors=2)
    pruned = prune_interactions(graph, 0.0, torch.Generator())
    for edge_type in (INTERACTS, REV_INTERACTS):
        assert torch.equal(pruned[edge_type].edge_index.as_tensor(), graph[edge_type].edge_index.as_tensor())
        assert torch.equal(pruned[edge_type].edge_weight, graph[edge_type].edge_weight)


def test_valid_and_test_pairs_never_come_back():
    graph = build_graph(random_dataset(()), num_neighbors=2)
    pruned = prune_interactions(graph, 0.3, torch.Generator().manual_seed(0))
    assert list(pruned[INTERACTS].keys()) == [label_name("train"), "edge_index", "edge_weight"]


def test_the_first_edge_is_drawn_by_degree():
    dataset = random_dataset(())
    graph = build_graph(dataset, num_neighbors=2)
    probability = freedom.pruning_probabilities(train_matrix(dataset))
    generator, count, draws = torch.Generator().manual_seed(0), np.zeros_like(probability), 4000
    for _ in range(draws):
        user, item = prune_interactions(graph, 0.99, generator)[INTERACTS].edge_index.as_tensor()
        assert len(user) == 1
        count[user, item] += 1
    # Five standard errors of a frequency, and uniform drawing would be further off.
    error = 5 * np.sqrt(probability * (1 - probability) / draws)
    assert (np.abs(count / draws - probability) <= error).all()
    uniform = (probability > 0) / (probability > 0).sum()
    assert (np.abs(uniform - probability) > error).any()


def test_the_item_graph_is_enough():
    dataset = random_dataset()
    ready = {}
    for name in dataset.modalities:
        features = dataset.modalities[name].features
        ready[name] = Modality(neighbors=cosine_knn(features, NUM_NEIGHBORS))
    graph = in_double(build_graph(dataclasses.replace(dataset, modalities=ready)))
    model = double_model(FREEDOM, graph, embedding_dim=3)
    oracle = Oracle(dataset, model.config, include_self=False)
    assert_rows(model(graph), oracle.encode(parameters_of(model), train_matrix(dataset)))
    assert list(model.loss(graph, some_triplets(graph))) == ["bpr"]


def test_a_batch_without_a_modality_has_no_loss_on_it():
    graph = build_graph(random_dataset(), num_neighbors=NUM_NEIGHBORS)
    lacking = torch.tensor([ITEM_WITHOUT_FEATURES] * 2)
    terms = FREEDOM(graph).loss(graph, Batch(torch.tensor([2, 3]), lacking, torch.tensor([4, 5])))
    assert terms["image_bpr"] == terms["text_bpr"] == 0.0


def test_weights_of_modalities_are_the_papers_for_images_and_texts_and_else_equal():
    def weights(*modalities, **config):
        graph = build_graph(random_dataset(modalities), num_neighbors=2)
        return FREEDOM(graph, FREEDOM.Config(**config)).modality_weights

    assert weights("image", "text") == {"image": 0.1, "text": 0.9}
    assert weights("text", "audio") == {"text": 0.5, "audio": 0.5}
    assert weights("image") == {"image": 1.0}
    assert weights("image", "text", modality_weights={"image": 1.0, "text": 3.0}) == {"image": 0.25, "text": 0.75}


def test_refuses_what_the_graph_lacks():
    with pytest.raises(ConfigError, match="FREEDOM needs at least one modality with an item-item kNN graph"):
        FREEDOM(build_graph(random_dataset(()), num_neighbors=2))
    graph = build_graph(random_dataset(), num_neighbors=2)
    with pytest.raises(ConfigError, match=r"names 'txt'.*item-item kNN graphs for 'image', 'text'.*mean 'text'"):
        FREEDOM(graph, FREEDOM.Config(modality_weights={"txt": 1.0}))


def test_every_epoch_prunes_anew():
    graph, generator = build_graph(random_dataset(), num_neighbors=2), torch.Generator().manual_seed(0)
    model, batch = FREEDOM(graph, FREEDOM.Config(pruning_ratio=0.6)), some_triplets(graph)
    terms = []
    for _ in range(3):
        model.on_epoch_start(graph, generator)
        terms.append(model.loss(graph, batch)["bpr"].item())
    assert len(set(terms)) == 3
