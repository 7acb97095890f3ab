"""Products with features, by whatever kernel, against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch_geometric.data import HeteroData

from dream_pyg.graph.build import build_graph
from dream_pyg.graph.schema import ITEM, feature_name
from dream_pyg.nn import item_features
from dream_pyg.nn.embeddings import xavier_embedding
from dream_pyg.nn.gates import FilterGate
from dream_pyg.nn.item_features import FeatureProjection, feature_rows, multiply_features
from tests.graphs import random_dataset

WIDE, NARROW = (1100, 1030), (40, 30)  # the former suits oneDNN where there are kernels for it


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def product_and_gradient(features: Tensor, matrix: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    matrix = matrix.clone().requires_grad_()
    product = multiply_features(features, matrix)
    return product.detach(), torch.autograd.grad(product, matrix, upstream)[0]


def assert_close(actual: Tensor, left: Tensor, right: Tensor, roundoff: float) -> None:
    """Within the bound of Higham (2002, Eq. 3.13) for any order of summation, both factors and the result rounded."""
    left, right = left.double(), right.double()
    bound = (left.size(1) * 2.0**-24 + 3 * roundoff) * (left.abs() @ right.abs())
    assert ((actual - left @ right).abs() <= bound).all()


@pytest.mark.parametrize("shape", [WIDE, NARROW])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("dtype", "roundoff"), [(torch.float32, 2.0**-24), (torch.bfloat16, 2.0**-8)])
def test_product_and_gradient_are_those_of_float64(shape, transposed, dtype, roundoff):
    features = rows(*shape).to(dtype)
    features = features.T if transposed else features
    matrix, upstream = rows(features.size(1), 5, seed=1), rows(len(features), 5, seed=2)
    product, gradient = product_and_gradient(features, matrix, upstream)
    assert product.dtype == gradient.dtype == torch.float32
    assert_close(product, features, matrix, roundoff)
    assert_close(gradient, features.T, upstream, roundoff)


def test_the_kernel_for_wide_features_agrees_with_the_usual_one(monkeypatch):
    features, matrix, upstream = rows(*WIDE), rows(WIDE[1], 5, seed=1), rows(WIDE[0], 5, seed=2)
    here = product_and_gradient(features, matrix, upstream)
    monkeypatch.setattr(item_features, "_suits_onednn", lambda features: False)
    for one, other in zip(here, product_and_gradient(features, matrix, upstream), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


def test_features_that_learn_keep_their_gradient():
    features, matrix = rows(*WIDE).requires_grad_(), rows(WIDE[1], 5, seed=1)
    (gradient,) = torch.autograd.grad(multiply_features(features, matrix).sum(), features)
    torch.testing.assert_close(gradient, matrix.sum(dim=1).expand(*WIDE), rtol=1e-5, atol=1e-5)


def test_rows_of_features_are_the_callers_own():
    graph = build_graph(random_dataset(), num_neighbors=2)
    before = graph[ITEM][feature_name("image")].clone()
    item = torch.tensor([3, 1, 3])
    taken = feature_rows(graph, "image", item)
    np.testing.assert_array_equal(taken, before[item])
    taken.zero_()
    assert torch.equal(graph[ITEM][feature_name("image")], before)
    graph[ITEM][feature_name("image")] = before.half()
    assert feature_rows(graph, "image", item).dtype == torch.float32


@pytest.mark.parametrize("transposed", [False, True])
def test_half_precision_is_multiplied_in_bfloat16_as_if_converted_at_once(monkeypatch, transposed):
    monkeypatch.setattr(item_features, "has_bfloat16_units", lambda device: True)
    monkeypatch.setattr(item_features, "_CONVERTED_NUMBERS", 100)  # several parts, the last one shorter
    features = rows(*NARROW).half()
    features[0, :4] = torch.tensor([65504.0, 6e-8, -6e-5, 0.0])  # largest, subnormal, nearly so, zero
    features = features.T if transposed else features
    matrix = rows(features.size(1), 5, seed=1)
    expected = (features.to(torch.bfloat16) @ matrix.to(torch.bfloat16)).float()
    assert torch.equal(multiply_features(features, matrix), expected)


def test_features_that_are_trained_on_are_a_copy():
    graph = build_graph(random_dataset(), num_neighbors=2)
    given = graph[ITEM][feature_name("image")]
    assert given.dtype == torch.float32
    before = given.clone()
    projection = FeatureProjection(graph, "image", 3, scaling="raw", bias=True, trained=True)
    with torch.no_grad():
        projection.features.add_(1.0)
    assert torch.equal(given, before)


def wide_graph() -> HeteroData:
    graph = HeteroData()
    graph[ITEM].x_image = torch.zeros(3, 500)
    return graph


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: FeatureProjection(wide_graph(), "image", 100, scaling="raw", bias=False).weight, (500, 100)),
        (lambda: FilterGate(500, 100).weight, (500, 100)),
        (lambda: xavier_embedding(400, 100), (400, 100)),
    ],
)
def test_parameters_begin_uniform_within_xaviers_bound(make, shape):
    torch.manual_seed(0)
    weight, bound = make().detach(), (6 / sum(shape)) ** 0.5
    assert weight.shape == shape
    assert 0.99 * bound < weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
