"""Sparse rows, and the one sparse product everything here runs on."""

from __future__ import annotations

import warnings
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor


def csr_product(pointer: Tensor, index: Tensor, value: Tensor | None, size: tuple[int, int], x: Tensor) -> Tensor:
    """Multiply a CSR matrix, given by its parts, with dense rows; no gradient.

    Args:
        pointer: Where each row begins and the last ends (N + 1,).
        index: Column of each entry (E,).
        value: Each entry (E,); None if all are 1.
        size: (N, M).
        x: Dense rows (M, D).

    Returns:
        The product (N, D).
    """
    if not x.is_cuda and x.dtype in (torch.float32, torch.bfloat16) and len(index):
        # A weighted sum over bags of rows is the same product, by a kernel three times as fast on a CPU.
        value = None if value is None else value.to(x.dtype)
        return F.embedding_bag(
            index, x.contiguous(), pointer, mode="sum", per_sample_weights=value, include_last_offset=True
        )
    value = x.new_ones(len(index)) if value is None else value
    matrix = torch.sparse_csr_tensor(pointer, index, value.to(x.dtype), size, check_invariants=False)
    if x.is_cuda:
        return matrix @ x
    # The reducing product is several times faster than `@` on a CPU, and only exists there.
    return torch.sparse.mm(matrix, x.contiguous(), "sum")


def sampled_product(pointer: Tensor, index: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The entries of ``x y^T`` that a CSR pattern asks for; no gradient.

    Args:
        pointer: Where each row of the pattern begins and the last ends (N + 1,).
        index: Column of each entry (E,), within a row in any order.
        x: Dense rows (N, D).
        y: Dense rows (M, D).

    Returns:
        The inner products (E,).
    """
    if x.is_cuda or x.dtype not in (torch.float32, torch.float64):
        row = torch.repeat_interleave(pointer.diff(), output_size=len(index))
        return (x[row] * y[index]).sum(dim=1)
    # On a CPU many times as fast as rows that are taken apart first.
    size = len(x), len(y)
    pattern = torch.sparse_csr_tensor(pointer, index, x.new_zeros(len(index)), size, check_invariants=False)
    return torch.sparse.sampled_addmm(pattern, x, y.T, beta=0.0).values()


def row_pointer(count: Tensor) -> Tensor:
    """Where each row of a CSR matrix begins and the last ends (N + 1,), from the number of entries of each (N,)."""
    return torch.cat([count.new_zeros(1), count.cumsum(0)])


def row_entries(pointer: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
    """Where the entries of some rows of a CSR matrix lie.

    Args:
        pointer: Where each row begins and the last ends (N + 1,).
        row: The rows wanted (B,), in any order, repeated or not.

    Returns:
        For each of their entries the position in ``row`` (S,), ascending, and the entry (S,).
    """
    start = pointer[row]
    return span_entries(start, pointer[row + 1] - start)


def span_entries(start: Tensor, count: Tensor, total: int | None = None) -> tuple[Tensor, Tensor]:
    """The numbers in some spans.

    Args:
        start: Where each span begins (B,).
        count: How long each is (B,).
        total: How long all are together, if that is known: a GPU need not be waited for then.

    Returns:
        For each number the position of its span (S,), ascending, and the number (S,).
    """
    position = torch.repeat_interleave(torch.arange(len(count), device=count.device), count, output_size=total)
    first = torch.cumsum(count, 0) - count
    return position, torch.arange(len(position), device=count.device) + (start - first)[position]


def take_rows(pointer: Tensor, index: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
    """Some rows (B,) of a CSR matrix, given by its pattern, as the pattern of a matrix of their own."""
    count = pointer[row + 1] - pointer[row]
    _, entry = row_entries(pointer, row)
    return row_pointer(count), index[entry]


class UserItems(NamedTuple):
    """Some items of each user, as rows of a CSR matrix."""

    pointer: Tensor  # (U + 1,)
    item: Tensor  # (E,)

    @classmethod
    def from_pairs(cls, pairs: Tensor, num_users: int) -> Self:
        """From user-item pairs (2, E) in any order."""
        user, order = torch.sort(pairs[0], stable=True)
        return cls(row_pointer(torch.bincount(user, minlength=num_users)), pairs[1][order])

    def coordinates(self, user: Tensor) -> tuple[Tensor, Tensor]:
        """Row (position in ``user``, ascending) and item of everything these users have, each (S,)."""
        row, entry = row_entries(self.pointer, user)
        return row, self.item[entry]


with warnings.catch_warnings():
    # PyTorch says once per process that CSR is in beta: let it say so to nobody, here.
    warnings.simplefilter("ignore", UserWarning)
    torch.sparse_csr_tensor([0, 0], [], [], (1, 1), check_invariants=False)
