"""Message passing along one edge type as one fused sparse product, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch_geometric import EdgeIndex
from torch_geometric.nn import MessagePassing

from dream_pyg.graph.csr import csr_product, sampled_product


class Propagation(MessagePassing):
    r"""One hop of weighted neighbourhood sums, the layer of LightGCN (arXiv 2002.02126, Eq. 3).

    .. math::
        \mathbf{x}^{\prime}_i = \sum_{j \in \mathcal{N}(i)} w_{ji} \, \mathbf{x}_j

    The weights already hold the normalisation, so one layer serves every edge type and has no state. They may be
    learned:

    .. math::
        \frac{\partial \mathcal L}{\partial w_{ji}}
        = \mathbf x_j \cdot \frac{\partial \mathcal L}{\partial \mathbf x^{\prime}_i}

    Messages are not materialised: an :class:`~torch_geometric.EdgeIndex` that is sorted by target and knows its sizes
    is a CSR matrix of a product, and backward multiplies by its transpose, whose index it caches. Any other
    ``edge_index`` takes PyG's gather-scatter path with the same result.

    Shapes:
        - **input:** source features :math:`(|V_s|, D)`, edge indices :math:`(2, |E|)`, weights :math:`(|E|)`
        - **output:** target features :math:`(|V_t|, D)`
    """

    SUPPORTS_FUSED_EDGE_INDEX = True

    def __init__(self) -> None:
        super().__init__(aggr="add")

    def forward(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor, num_targets: int | None = None) -> Tensor:
        """Sum the weighted source rows into each target.

        Args:
            x: Source rows (S, D).
            edge_index: Source and target of each edge (2, E).
            edge_weight: Weight of each edge (E,).
            num_targets: Number of target rows T; by default the ``EdgeIndex``'s own, or S.

        Returns:
            Target rows (T, D).
        """
        known = edge_index.sparse_size() if isinstance(edge_index, EdgeIndex) else (None, None)
        default = x.size(0) if known[1] is None else known[1]
        size = (x.size(0), default if num_targets is None else num_targets)
        if isinstance(edge_index, EdgeIndex) and known != size:
            edge_index = edge_index.as_tensor()
        return self.propagate(edge_index, x=x, edge_weight=edge_weight, size=size)

    def message(self, x_j: Tensor, edge_weight: Tensor) -> Tensor:
        """Weight one message per edge (the unfused path)."""
        return x_j * edge_weight.unsqueeze(-1)

    def message_and_aggregate(self, edge_index: EdgeIndex, x: Tensor, edge_weight: Tensor) -> Tensor:
        """Message and sum in one sparse product (the fused path)."""
        return _SparseProduct.apply(edge_index, edge_weight, x)


def mean_of_neighbors(propagation: Propagation, x: Tensor, edge_index: EdgeIndex) -> Tensor:
    """The mean over each target's sources, zero for a target without any.

    Args:
        propagation: The message passing layer.
        x: Source rows (S, D).
        edge_index: Source and target of each edge (2, E), with its sizes known.

    Returns:
        Target rows (T, D).
    """
    (pointer, _), _ = edge_index.get_csc()
    share = pointer.diff().to(x.dtype).reciprocal()  # A target without sources has infinity, and no edge that reads it.
    return propagation(x, edge_index, share[edge_index.as_tensor()[1]], len(share))


class _SparseProduct(torch.autograd.Function):
    """``A^T x`` for the weighted edges A, with ``A g`` as gradient of x and an inner product as that of each weight."""

    @staticmethod
    def forward(ctx: Any, edge_index: EdgeIndex, edge_weight: Tensor, x: Tensor) -> Tensor:
        ctx.edge_index = edge_index
        ctx.save_for_backward(edge_weight, x if ctx.needs_input_grad[1] else None)
        (colptr, row), _ = edge_index.get_csc()  # sorted by target, or PyG would not have fused
        num_sources, num_targets = edge_index.get_sparse_size()
        return csr_product(colptr, row, edge_weight, (num_targets, num_sources), x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, Tensor | None]:
        edge_weight, x = ctx.saved_tensors
        weight_grad = x_grad = None
        if ctx.needs_input_grad[1]:
            (colptr, row), _ = ctx.edge_index.get_csc()
            weight_grad = sampled_product(colptr, row, grad, x)
        if ctx.needs_input_grad[2]:
            (rowptr, col), perm = ctx.edge_index.get_csr()
            size = ctx.edge_index.get_sparse_size()
            weight = edge_weight if perm is None else edge_weight.index_select(0, perm)
            x_grad = csr_product(rowptr, col, weight, size, grad)
        return None, weight_grad, x_grad
