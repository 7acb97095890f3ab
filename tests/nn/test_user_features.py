"""User features: never built, yet those of Section 3.1."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dream_pyg.graph.build import build_graph
from dream_pyg.nn.propagation import Propagation
from dream_pyg.nn.user_features import mean_over_items, summed_features
from tests.graphs import (
    MODALITIES,
    USER_WITHOUT_FEATURES,
    USER_WITHOUT_INTERACTIONS,
    WIDTHS,
    in_double,
    item_features,
    random_dataset,
    train_matrix,
)
from tests.oracles import dream

FEATURELESS = [USER_WITHOUT_FEATURES, USER_WITHOUT_INTERACTIONS]


@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize("seed", [0, 1])
def test_projecting_items_first_is_projecting_the_mean(modality, seed):
    dataset = random_dataset(MODALITIES, seed=seed)
    graph = in_double(build_graph(dataset, num_neighbors=2))
    X, has = item_features(dataset, modality)
    W = np.random.default_rng(seed).standard_normal((WIDTHS[modality], 4))
    means = mean_over_items(Propagation(), graph, modality, torch.from_numpy(X @ W))
    np.testing.assert_allclose(means, dream.user_features(train_matrix(dataset), X, has) @ W, rtol=1e-12, atol=1e-14)
    assert not means[FEATURELESS].any()


@pytest.mark.parametrize("modality", MODALITIES)
def test_sums_point_where_the_means_point(modality):
    dataset = random_dataset(MODALITIES)
    graph = build_graph(dataset, num_neighbors=2)
    R = train_matrix(dataset)
    X, has = item_features(dataset, modality)
    user = torch.tensor([5, 0, 11, 5, 1, 7])  # in any order, repeated, with and without features
    sums = summed_features(graph, modality, user)
    # Features are multiples of 1/64: these float32 sums are exact.
    np.testing.assert_array_equal(sums, (R @ X)[user])
    means = dream.user_features(R, X, has)[user]
    np.testing.assert_allclose(dream.unit_rows(sums), dream.unit_rows(means), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize(
    ("dtype", "result", "roundoff"), [("float16", "float32", 0.0), ("bfloat16", "bfloat16", 2.0**-8)]
)
def test_sums_of_features_in_other_types(dtype, result, roundoff):
    dataset = random_dataset(MODALITIES)
    graph = build_graph(dataset, num_neighbors=2)
    X, _ = item_features(dataset, "image")  # multiples of 1/64 up to 2, which both types hold exactly
    graph["item"].x_image = graph["item"].x_image.to(getattr(torch, dtype))
    sums = summed_features(graph, "image", torch.arange(12))
    assert sums.dtype == getattr(torch, result)
    np.testing.assert_allclose(sums.float(), train_matrix(dataset) @ X, rtol=roundoff, atol=0)


def test_sums_of_no_users():
    graph = build_graph(random_dataset(), num_neighbors=2)
    assert summed_features(graph, "image", torch.empty(0, dtype=torch.long)).shape == (0, WIDTHS["image"])
