"""Several processes that search together, as ``torchrun`` starts them: each does its share, the first has the result.

Without torchrun there is one process, which does everything.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from dream_pyg.errors import DreamPygError, StoreError
from dream_pyg.graph.knn.candidates import CandidateLists

T = TypeVar("T")

_ROWS_AT_ONCE = 1 << 16
# A process that ended is noticed at once; one that is busy is waited for.
_PATIENCE = timedelta(days=7)


def speaks() -> bool:
    """Whether this process shows progress, results and errors: the first that torchrun started, for all of them."""
    return not dist.is_torchelastic_launched() or os.environ["RANK"] == "0"


def rank() -> int:
    """The number of this process among those that search together, 0 for the first."""
    return dist.get_rank() if dist.is_initialized() else 0


def num_ranks() -> int:
    """How many processes search together."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def joined() -> Iterator[None]:
    """Search together with the other processes, if torchrun started some."""
    if not dist.is_torchelastic_launched() or dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def share(work: Sequence[T]) -> Sequence[T]:
    """What of some work this process does."""
    return work[rank() :: num_ranks()] if num_ranks() > 1 else work


def together(work: Callable[[], T]) -> T:
    """Do some work in every process; if it fails in one, all fail with its error.

    Raises:
        StoreError: If another process is gone, or failed in a way that has no name.
    """
    if num_ranks() == 1:
        return work()
    result, error = None, None
    try:
        result = work()
    except Exception as raised:
        error = raised
    failures: list[tuple[type[DreamPygError], str] | None] = [None] * num_ranks()
    kind = type(error) if isinstance(error, DreamPygError) else StoreError
    with _losses_named():
        dist.all_gather_object(failures, None if error is None else (kind, str(error) or type(error).__name__))
    if error is not None:
        raise error
    for failure in failures:
        if failure is not None:
            raise failure[0](failure[1])
    return result  # type: ignore[return-value]


def first_says(value: T) -> T:
    """What the first process gives here, in all of them."""
    if num_ranks() == 1:
        return value
    said = [value]
    with _losses_named():
        dist.broadcast_object_list(said, 0)
    return said[0]


def merge(lists: CandidateLists) -> None:
    """Add what the other processes found to the lists of the first."""
    if num_ranks() == 1:
        return
    lists.flush()
    with _losses_named():
        for highest in (lists.cut, lists.dropped):
            dist.reduce(highest, 0, dist.ReduceOp.MAX)
        if rank():
            dist.send(lists.score, 0)
            dist.send(lists.index, 0)
            return
        for other in range(1, num_ranks()):
            score, index = torch.empty_like(lists.score), torch.empty_like(lists.index)
            dist.recv(score, other)
            dist.recv(index, other)
            for start in range(0, len(score), _ROWS_AT_ONCE):
                row, slot = (index[start : start + _ROWS_AT_ONCE] >= 0).nonzero().T
                lists.add(row + start, index[row + start, slot], score[row + start, slot])


@contextmanager
def _losses_named() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise StoreError(
            f"A process that this one worked with is gone ({str(error).splitlines()[0]}). Look for what ended it, "
            "often a lack of memory; the same command goes on from what was saved."
        ) from error
