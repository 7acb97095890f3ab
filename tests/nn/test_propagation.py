"""One hop of message passing, by every path, against a dense matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch_geometric import EdgeIndex

from dream_pyg.nn.propagation import Propagation, mean_of_neighbors

SIZES = [(6, 6), (5, 8), (8, 5), (1, 4), (4, 1)]


def random_edges(num_sources: int, num_targets: int, num_edges: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Distinct edges sorted by target, and a float64 weight of each."""
    generator = torch.Generator().manual_seed(seed)
    key = torch.randperm(num_sources * num_targets, generator=generator)[:num_edges].sort().values
    return torch.stack([key % num_sources, key // num_sources]), torch.randn(
        len(key), dtype=torch.float64, generator=generator
    )


def dense(edge_index: Tensor, edge_weight: Tensor, num_sources: int, num_targets: int) -> Tensor:
    matrix = torch.zeros(num_targets, num_sources, dtype=edge_weight.dtype)
    matrix[edge_index[1], edge_index[0]] = edge_weight
    return matrix


def as_edge_index(edge_index: Tensor, size: tuple[int, int], order: str | None) -> tuple[EdgeIndex, Tensor]:
    """An ``EdgeIndex`` in some order, and the permutation that belongs to it."""
    if order == "col":
        permutation = torch.arange(edge_index.size(1))
    elif order == "row":
        permutation = torch.argsort(edge_index[0], stable=True)
    else:
        permutation = torch.randperm(edge_index.size(1), generator=torch.Generator().manual_seed(1))
    return EdgeIndex(edge_index[:, permutation], sparse_size=size, sort_order=order), permutation


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("order", ["col", "row", None])
def test_every_path_is_the_dense_product_forward_and_backward(size, order):
    edge_index, weight = random_edges(*size, num_edges=size[0] * size[1] // 2 + 1)
    x = torch.randn(size[0], 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True)
    upstream = torch.randn(size[1], 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    matrix = dense(edge_index, weight, *size)
    expected, expected_grad = matrix @ x, matrix.T @ upstream

    sparse, permutation = as_edge_index(edge_index, size, order)
    for edges, weights in ((sparse, weight[permutation]), (edge_index, weight)):
        out = Propagation()(x, edges, weights, size[1])
        (grad,) = torch.autograd.grad(out, x, upstream)
        torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(grad, expected_grad, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("size", [(None, None), (4, 2), (2, 5)])
def test_an_edge_index_of_other_sizes_gives_the_rows_asked_for(size):
    edge_index, weight = torch.tensor([[0, 1], [0, 1]]), torch.tensor([2.0, 3.0])
    x = torch.arange(8.0).reshape(4, 2).requires_grad_()
    out = Propagation()(x, EdgeIndex(edge_index, sparse_size=size, sort_order="col"), weight, 5)
    assert out.tolist() == [[0.0, 2.0], [6.0, 9.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert grad.tolist() == [[2.0, 2.0], [3.0, 3.0], [0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("order", ["col", "row", None])
def test_gradcheck_of_the_fused_product(order):
    edge_index, weight = random_edges(4, 6, num_edges=11)
    edges, permutation = as_edge_index(edge_index, (4, 6), order)
    x = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weight = weight[permutation].requires_grad_()
    assert torch.autograd.gradcheck(lambda x, weight: Propagation()(x, edges, weight, 6), (x, weight))


def test_fused_path_never_makes_messages(monkeypatch):
    edge_index, weight = random_edges(5, 5, num_edges=9)
    edges, _ = as_edge_index(edge_index, (5, 5), "col")
    layer, x = Propagation(), torch.ones(5, 2, dtype=torch.float64)

    class MessagesMadeError(Exception):
        pass

    def message(*_, **__):
        raise MessagesMadeError

    monkeypatch.setattr(layer, "message", message)
    torch.testing.assert_close(layer(x, edges, weight), dense(edge_index, weight, 5, 5) @ x)
    with pytest.raises(MessagesMadeError):
        layer(x, edge_index, weight)


def test_sources_are_the_targets_by_default():
    edge_index, weight = random_edges(5, 5, num_edges=7)
    edges, _ = as_edge_index(edge_index, (5, 5), "col")
    x = torch.eye(5, dtype=torch.float64)
    for given in (edges, edge_index):
        torch.testing.assert_close(Propagation()(x, given, weight), dense(edge_index, weight, 5, 5))


@pytest.mark.parametrize("size", [(3, 4), (3, 0), (0, 4), (0, 0)])
@pytest.mark.parametrize("fused", [True, False])
def test_a_graph_without_edges_gives_zeros(size, fused):
    edges = torch.empty(2, 0, dtype=torch.long)
    if fused:
        edges = EdgeIndex(edges, sparse_size=size, sort_order="col")
    x = torch.ones(size[0], 2, dtype=torch.float64, requires_grad=True)
    out = Propagation()(x, edges, torch.empty(0, dtype=torch.float64), size[1])
    assert torch.equal(out, torch.zeros(size[1], 2, dtype=torch.float64))
    out.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_float32_weights_take_the_type_of_the_rows():
    edge_index, weight = random_edges(4, 4, num_edges=8)
    edges, _ = as_edge_index(edge_index, (4, 4), "col")
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out = Propagation()(x, edges, weight.float())
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, dense(edge_index, weight.float().double(), 4, 4) @ x, rtol=1e-13, atol=1e-13)


def test_the_mean_of_neighbors_is_that_of_their_rows_and_zero_without_any():
    edges = EdgeIndex(torch.tensor([[0, 2, 1], [0, 0, 2]]), sparse_size=(3, 4), sort_order="col")
    x = torch.tensor([[2.0, 4.0], [3.0, 5.0], [6.0, 0.0]], requires_grad=True)
    mean = mean_of_neighbors(Propagation(), x, edges)
    assert mean.tolist() == [[4.0, 2.0], [0.0, 0.0], [3.0, 5.0], [0.0, 0.0]]
    mean.sum().backward()
    assert x.grad.tolist() == [[0.5, 0.5], [1.0, 1.0], [0.5, 0.5]]
