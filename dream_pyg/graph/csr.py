"""The one sparse product everything here runs on."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor


def csr_product(pointer: Tensor, index: Tensor, value: Tensor, size: tuple[int, int], x: Tensor) -> Tensor:
    """Multiply a CSR matrix, given by its parts, with dense rows; no gradient.

    Args:
        pointer: Where each row begins and the last ends (N + 1,).
        index: Column of each entry (E,).
        value: Each entry (E,).
        size: (N, M).
        x: Dense rows (M, D).

    Returns:
        The product (N, D).
    """
    if not x.is_cuda and x.dtype == torch.float32 and len(index):
        # A weighted sum over bags of rows is the same product, by a kernel three times as fast on a CPU.
        return F.embedding_bag(
            index, x.contiguous(), pointer, mode="sum", per_sample_weights=value.to(x.dtype), include_last_offset=True
        )
    matrix = torch.sparse_csr_tensor(pointer, index, value.to(x.dtype), size, check_invariants=False)
    if x.is_cuda:
        return matrix @ x
    # The reducing product is several times faster than `@` on a CPU, and only exists there.
    return torch.sparse.mm(matrix, x.contiguous(), "sum")


with warnings.catch_warnings():
    # PyTorch says once per process that CSR is in beta: let it say so to nobody, here.
    warnings.simplefilter("ignore", UserWarning)
    torch.sparse_csr_tensor([0, 0], [], [], (1, 1), check_invariants=False)
