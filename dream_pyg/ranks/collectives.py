"""Tensors of all processes together, with gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from dream_pyg.ranks.processes import naming_lost_processes, num_ranks, rank
from dream_pyg.ranks.shards import RowShard

# PyTorch 2.13 gave them other names, and warns of the earlier ones.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def span(count: int) -> tuple[int, int]:
    """Where this process's rows begin among those of all, one rank after the other, and how many all have.

    Args:
        count: How many rows this process has.
    """
    counts = _counts(count)
    return sum(counts[: rank()]), sum(counts)


def mean_count(count: int) -> float:
    """The mean over ranks of a count: divided by it, sums over slices have the mean over all slices as their mean."""
    return sum(_counts(count)) / num_ranks()


def gather_rows(rows: Tensor) -> tuple[Tensor, int]:
    """The rows of all processes, one rank after the other.

    Backward sums over ranks: a row's gradient is that of all processes' losses together.

    Args:
        rows: The rows of this process (B_r, ...), of which each may have another number.

    Returns:
        All rows (B, ...), and where this process's own begin.
    """
    if num_ranks() == 1:
        return rows, 0
    counts = _counts(len(rows))
    most = max(counts)
    if most == 0:
        return rows, 0
    padded = F.pad(rows, [0] * (2 * rows.dim() - 1) + [most - len(rows)])
    blocks = _Gathered.apply(padded).split(most)
    return torch.cat([block[:count] for block, count in zip(blocks, counts, strict=True)]), sum(counts[: rank()])


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum over ranks of what each has; backward sums over ranks as well."""
    return values if num_ranks() == 1 else _Summed.apply(values)


def average(values: Tensor) -> Tensor:
    """The mean over ranks of what each has, without gradient."""
    return values if num_ranks() == 1 else _Summed.apply(values.detach()) / num_ranks()


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Make gradients those of the mean over ranks of the losses that they came from.

    Those of shards hold the sum over ranks already, since each process sent its part to where the rows are.
    """
    if num_ranks() == 1:
        return
    pending = []
    with naming_lost_processes():
        for parameter in parameters:
            if parameter.grad is None:
                continue
            if isinstance(parameter, RowShard):
                parameter.grad.div_(num_ranks())
            elif parameter.grad.is_sparse:
                parameter.grad = _average_of_sparse(parameter.grad)
            else:
                parameter.grad.div_(num_ranks())
                pending.append(dist.all_reduce(parameter.grad, async_op=True))
        for work in pending:
            work.wait()


def _average_of_sparse(grad: Tensor) -> Tensor:
    """The mean over ranks of gradients of some rows each, as entries that are yet to be added up."""
    grad = grad.coalesce()
    row, _ = gather_rows(grad.indices()[0])
    values, _ = gather_rows(grad.values())
    return torch.sparse_coo_tensor(row.unsqueeze(0), values / num_ranks(), grad.shape, check_invariants=False)


def _counts(count: int) -> list[int]:
    if num_ranks() == 1:
        return [count]
    # On the CPU whatever the device, so that no GPU is waited for.
    counts = torch.empty(num_ranks(), dtype=torch.int64)
    with naming_lost_processes():
        _all_gather(counts, torch.tensor([count]))
    return [int(number) for number in counts]


class _Gathered(torch.autograd.Function):
    """Blocks of equal shape of all ranks, one after the other; the gradient of a block is the sum of all ranks'."""

    @staticmethod
    def forward(ctx: Any, block: Tensor) -> Tensor:
        gathered = block.new_empty(num_ranks() * len(block), *block.shape[1:])
        with naming_lost_processes():
            _all_gather(gathered, block.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        summed = grad.new_empty(len(grad) // num_ranks(), *grad.shape[1:])
        with naming_lost_processes():
            _reduce_scatter(summed, grad.contiguous())
        return summed


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        summed = values.clone(memory_format=torch.contiguous_format)
        with naming_lost_processes():
            dist.all_reduce(summed)
        return summed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _Summed.forward(ctx, grad)
