"""Tables whose rows are shared out among processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Shard

from dream_pyg.ranks.processes import first_gets, naming_lost_processes, num_ranks, rank


class RowShard(nn.Parameter):
    """The rows of a table (N, D) that this process keeps, as ``Shard(0)`` of a :class:`DTensor` lays them out.

    It is a leaf of its own, and not the DTensor, so that gradients may be sparse and any optimizer steps on it; the
    optimizer's state is sharded with it. Gradients hold the sum over ranks.

    Args:
        rows: This process's rows, those of :meth:`range`.
        num_rows: N.
    """

    num_rows: int
    _mesh: DeviceMesh

    def __new__(cls, rows: Tensor, num_rows: int) -> Self:  # noqa: D102 - the class's docstring is its own
        shard = super().__new__(cls, rows)
        shard.num_rows, shard._mesh = num_rows, init_device_mesh(rows.device.type, (num_ranks(),))
        return shard

    @staticmethod
    def range(num_rows: int, of: int | None = None) -> range:
        """The rows that a process keeps, by default this one: as many as the others, but for the last ones."""
        each = -(-num_rows // num_ranks())
        first = each * (rank() if of is None else of)
        return range(min(first, num_rows), min(first + each, num_rows))

    def whole(self) -> Tensor:
        """All rows (N, D) in every process; backward sums over ranks."""
        shape = torch.Size((self.num_rows, self.size(1)))
        table = DTensor.from_local(self, self._mesh, [Shard(0)], run_check=False, shape=shape, stride=(self.size(1), 1))
        with naming_lost_processes():
            return table.full_tensor(grad_placements=[Partial()])

    def look_up(self, row: Tensor, *, sparse: bool = False) -> Tensor:
        """Some rows of the whole table, which may be others in each process; only these travel.

        Args:
            row: Ids (B,), repeated or not, in any order.
            sparse: Whether the gradient is sparse.

        Returns:
            The rows (B, D).
        """
        each = len(self.range(self.num_rows, 0))
        keeper = row // each
        order = torch.argsort(keeper, stable=True)
        asked = torch.bincount(keeper, minlength=num_ranks()).cpu()
        with naming_lost_processes():
            wanted = torch.empty_like(asked)
            dist.all_to_all_single(wanted, asked)
            splits = asked.tolist(), wanted.tolist()
            asked_of_me = _exchange(row[order], *splits)
        found = F.embedding(asked_of_me - self.range(self.num_rows).start, self, sparse=sparse)
        received = _Exchanged.apply(found, splits[1], splits[0])
        return received[torch.argsort(order)]


def whole_state(parameters: Sequence[Tensor], states: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
    """For each parameter, tensors that go with it, rows of shards brought together on the CPU of the first process.

    Args:
        parameters: Parameters, of which some may be shards.
        states: Tensors by name for each; those of a shard's shape have a row for each of its rows.

    Returns:
        The same for the whole tables; what other processes than the first return is of no use.
    """
    return [
        {name: _brought_together(parameter, value) for name, value in state.items()}
        for parameter, state in zip(parameters, states, strict=True)
    ]


def own_state(parameters: Sequence[Tensor], states: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What :func:`whole_state` brought together, with this process's rows of what belongs to shards."""
    return [
        {name: _own_rows(parameter, value) for name, value in state.items()}
        for parameter, state in zip(parameters, states, strict=True)
    ]


def _brought_together(parameter: Tensor, value: Tensor) -> Tensor:
    if not isinstance(parameter, RowShard) or value.shape != parameter.shape:
        return value
    own = value.detach().cpu()
    others = first_gets([own], lambda other: [(len(RowShard.range(parameter.num_rows, other)), own.size(1))])
    return torch.cat([own, *(rows for (rows,) in others)])


def _own_rows(parameter: Tensor, value: Any) -> Any:
    if not isinstance(parameter, RowShard) or not isinstance(value, Tensor) or value.dim() == 0:
        return value
    kept = RowShard.range(parameter.num_rows)
    return value[kept.start : kept.stop].clone()


def _exchange(rows: Tensor, give: list[int], get: list[int]) -> Tensor:
    received = rows.new_empty(sum(get), *rows.shape[1:])
    dist.all_to_all_single(received, rows.contiguous(), get, give)
    return received


class _Exchanged(torch.autograd.Function):
    """Rows given to and got from each process, one after the other; gradients go the way back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, give: list[int], get: list[int]) -> Tensor:
        ctx.give, ctx.get = give, get
        with naming_lost_processes():
            return _exchange(rows, give, get)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        with naming_lost_processes():
            return _exchange(grad, ctx.get, ctx.give), None, None
