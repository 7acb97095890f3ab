"""Add-EASE against ridge regressions on interactions and on features."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dream_pyg.errors import ConfigError
from dream_pyg.graph.build import build_graph
from dream_pyg.models import EASE, AddEASE
from tests.graphs import (
    ITEM_WITHOUT_FEATURES,
    MODALITIES,
    PlantedBlocks,
    in_double,
    item_features,
    random_dataset,
    train_matrix,
)
from tests.models.agreement import double_model
from tests.oracles import ease


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("num_modalities", [1, 2, 3])
def test_weights_are_those_of_regressions(num_modalities, center):
    dataset = random_dataset(MODALITIES[:num_modalities], seed=num_modalities)
    graph = in_double(build_graph(dataset, num_neighbors=2))
    shares = {"image": 3.0, "text": 2.0, "audio": 1.0}
    shares = {name: shares[name] for name in dataset.modalities}
    options = {"l2_weight": 2.0, "feature_l2_weight": 0.3, "feature_share": 0.4, "center_features": center}
    model = double_model(AddEASE, graph, modality_weights=shares, **options)
    model.fit(graph)
    features = [ease.unit_features(*item_features(dataset, name), center=center) for name in dataset.modalities]
    weights = [share / sum(shares.values()) for share in shares.values()]
    expected = ease.add_ease(train_matrix(dataset), features, weights, l2=2.0, feature_l2=0.3, share=0.4)
    np.testing.assert_allclose(model.weight, expected, rtol=1e-8, atol=1e-11)


def test_weights_are_those_of_regressions_with_more_items_than_features():
    dataset = PlantedBlocks(num_modalities=1).dataset()
    graph = in_double(build_graph(dataset, num_neighbors=2))
    model = double_model(AddEASE, graph, feature_share=1.0, feature_l2_weight=0.1)
    model.fit(graph)
    features, has = item_features(dataset, "image")
    assert features.shape == (30, 3)
    unit = ease.unit_features(features, has, center=True)
    np.testing.assert_allclose(model.weight, ease.item_weights(unit.T, 0.1), rtol=1e-8, atol=1e-11)


def test_without_a_share_of_features_it_is_ease():
    graph = build_graph(random_dataset(), num_neighbors=2)
    both = AddEASE(graph, AddEASE.Config(feature_share=0.0)), EASE(graph)
    for model in both:
        model.fit(graph)
    np.testing.assert_array_equal(both[0].weight, both[1].weight)


def test_an_item_without_features_is_scored_by_interactions_alone():
    graph = build_graph(random_dataset(MODALITIES), num_neighbors=2)
    model = AddEASE(graph, AddEASE.Config(feature_share=1.0))
    model.fit(graph)
    assert not model.weight[ITEM_WITHOUT_FEATURES].any()
    assert not model.weight[:, ITEM_WITHOUT_FEATURES].any()
    assert model.weight[2:, 2:].count_nonzero() == 8 * 7


def test_refuses_a_graph_without_features_and_unknown_modalities():
    with pytest.raises(ConfigError, match="Add-EASE needs at least one modality with features"):
        AddEASE(build_graph(random_dataset(()), num_neighbors=2))
    with pytest.raises(ConfigError, match=r"'txt'.*Did you mean 'text'"):
        AddEASE(build_graph(random_dataset(), num_neighbors=2), AddEASE.Config(modality_weights={"txt": 1.0}))


def test_weights_of_float32_features_are_solved_in_float64():
    """Items that others reproduce almost: of 1 - |z|^2, which is 1e-4, float32 would leave three digits."""
    dataset = random_dataset(MODALITIES[:1], seed=3)
    options = {"l2_weight": 2.0, "feature_l2_weight": 1e-4, "feature_share": 1.0}
    model = AddEASE(build_graph(dataset, num_neighbors=2), AddEASE.Config(**options))
    model.fit(build_graph(dataset, num_neighbors=2))
    features = [ease.unit_features(*item_features(dataset, "image"), center=True)]
    expected = ease.add_ease(train_matrix(dataset), features, [1.0], l2=2.0, feature_l2=1e-4, share=1.0)
    assert model.weight.dtype == torch.float32
    np.testing.assert_allclose(model.weight, expected, rtol=1e-5, atol=1e-5)
