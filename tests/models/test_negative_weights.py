"""Popularity correction of in-batch negatives, in every model that aligns."""

from __future__ import annotations

import pytest
import torch

from dream_pyg.graph.build import build_graph
from dream_pyg.graph.schema import INTERACTS, ITEM, USER, label_name
from dream_pyg.models import MODELS
from dream_pyg.nn.alignment import NegativeWeights
from tests.graphs import random_dataset
from tests.models.agreement import some_triplets


@pytest.fixture(scope="module")
def graph():
    return build_graph(random_dataset(), num_neighbors=2)


def degrees(graph):
    """How many train interactions each user and each item has."""
    user, item = graph[INTERACTS][label_name("train")]
    return torch.bincount(user, minlength=graph[USER].num_nodes), torch.bincount(item, minlength=graph[ITEM].num_nodes)


@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_weights_fall_with_the_degree_and_are_1_on_average_over_a_batch(graph, exponent):
    everyone = torch.arange(graph[USER].num_nodes), torch.arange(graph[ITEM].num_nodes)
    weights = NegativeWeights(graph, exponent)(graph, *everyone)
    for weight, degree in zip(weights.values(), degrees(graph), strict=True):
        assert degree[degree > 0].unique().numel() > 1
        product = (weight.double() * degree.double() ** exponent)[degree > 0]
        torch.testing.assert_close(product, product[:1].expand_as(product), rtol=1e-5, atol=0)
        assert float((weight * degree).sum() / degree.sum()) == pytest.approx(1, abs=1e-6)


def test_without_a_correction_nothing_is_told_and_nothing_kept(graph):
    weights = NegativeWeights(graph, 0.0)
    assert weights(graph, torch.tensor([0]), torch.tensor([1])) == {}
    assert list(weights.buffers()) == list(NegativeWeights(graph, 1.0).state_dict()) == []


def test_nodes_of_a_sampled_graph_have_their_own_weights(graph):
    whole = NegativeWeights(graph, 1.0)
    sampled = graph.clone()
    sampled[USER].n_id, sampled[ITEM].n_id = torch.tensor([5, 2]), torch.tensor([3, 1, 0])
    found = whole(sampled, torch.tensor([1, 0]), torch.tensor([2, 0]))
    expected = whole(graph, torch.tensor([2, 5]), torch.tensor([0, 3]))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("name", ["dream", "vbpr", "bm3", "mgcn"])
def test_every_model_that_aligns_weighs_the_nodes_of_its_batch(graph, name):
    weights = {"intra_weight": 1.0, "inter_weight": 1.0}
    batch, told, terms = some_triplets(graph), [], {}
    for correction in (0.0, 1.0):
        torch.manual_seed(0)
        config = MODELS[name].Config(embedding_dim=4, popularity_correction=correction, **weights)
        model = MODELS[name](graph, config)
        aligning = model.alignment if name == "dream" else model.alignment.alignment
        aligning.register_forward_pre_hook(lambda *call: told.append(call[2]), with_kwargs=True)
        torch.manual_seed(0)
        terms[correction] = model.loss(graph, batch)
    assert not torch.equal(terms[0.0]["intra"], terms[1.0]["intra"])
    assert not torch.equal(terms[0.0]["inter"], terms[1.0]["inter"])
    plain, corrected = told
    assert not {"user_weight", "item_weight"} & plain.keys()
    for node, ids in (("user", batch.user), ("item", batch.pos_item)):
        degree = degrees(graph)[node == "item"]
        row = corrected.get(f"{node}_row")
        # DREAM has each node once, in order.
        nodes = ids if row is None else ids.unique()
        product = corrected[f"{node}_weight"] * degree[nodes]
        torch.testing.assert_close(product, product[:1].expand_as(product))
