"""Attention over the neighbours of each node, one number an edge, with a gradient to both ends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch_geometric import EdgeIndex

from dream_pyg.graph.csr import csr_product, sampled_product
from dream_pyg.nn.propagation import Propagation


def attend(propagation: Propagation, source: Tensor, target: Tensor, edge_index: EdgeIndex) -> tuple[Tensor, Tensor]:
    r"""The mean of each target's sources, weighted by a softmax of inner products (GRCN, doi 10.1145/3394171.3413556).

    .. math::
        \alpha_{ji} = \frac{\exp(\mathbf x_j \cdot \mathbf y_i)}
        {\sum_{j' \in \mathcal N(i)} \exp(\mathbf x_{j'} \cdot \mathbf y_i)}, \qquad
        \mathbf y^{\prime}_i = \sum_{j \in \mathcal N(i)} \alpha_{ji} \, \mathbf x_j

    Args:
        propagation: The message passing layer.
        source: Source rows (S, D), of norm at most 1, so that exponentials need no maximum taken off first.
        target: Target rows (T, D), likewise.
        edge_index: Source and target of each edge (2, E), sorted by target.

    Returns:
        The means (T, D), zero for a target without sources, and the weights (E,).
    """
    exponential = edge_products(source, target, edge_index).exp()
    # A product: on a GPU scattered sums come in any order, and the CPU would wait for those of segments.
    total = propagation(source.new_ones(len(source), 1), edge_index, exponential, len(target)).squeeze(1)
    weight = exponential / total.clamp(min=1e-12)[edge_index.as_tensor()[1]]
    return propagation(source, edge_index, weight, len(target)), weight


def edge_products(source: Tensor, target: Tensor, edge_index: EdgeIndex) -> Tensor:
    """The inner product of the two ends of each edge.

    Args:
        source: Source rows (S, D).
        target: Target rows (T, D).
        edge_index: Source and target of each edge (2, E), sorted by target.

    Returns:
        One number an edge (E,).
    """
    product: Tensor = _EdgeProducts.apply(source, target, edge_index)
    return product


class _EdgeProducts(torch.autograd.Function):
    """Sampled entries of ``x y^T``; the gradients are sparse products, not scatters of (E, D)."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, target: Tensor, edge_index: EdgeIndex) -> Tensor:
        ctx.edge_index = edge_index
        ctx.save_for_backward(source, target)
        (colptr, row), _ = edge_index.get_csc()
        return sampled_product(colptr, row, target, source)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        source, target = ctx.saved_tensors
        num_sources, num_targets = len(source), len(target)
        source_grad = target_grad = None
        if ctx.needs_input_grad[0]:
            (rowptr, col), perm = ctx.edge_index.get_csr()
            source_grad = csr_product(rowptr, col, grad[perm], (num_sources, num_targets), target)
        if ctx.needs_input_grad[1]:
            (colptr, row), _ = ctx.edge_index.get_csc()
            target_grad = csr_product(colptr, row, grad, (num_targets, num_sources), source)
        return source_grad, target_grad, None
