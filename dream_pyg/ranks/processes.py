"""Who works together, and what they tell each other."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dream_pyg.errors import DreamPygError, ProcessError

T = TypeVar("T")

# A process that ended is noticed at once; one that is busy is waited for.
_PATIENCE = timedelta(days=7)
_store: dist.Store | None = None


def speaks() -> bool:
    """Whether this process shows progress, results and errors: the first that torchrun started, for all of them."""
    return not dist.is_torchelastic_launched() or os.environ["RANK"] == "0"


def tells_failure() -> bool:
    """Whether this process says why all of them end: whichever failed first, which knows the cause."""
    if _store is None:
        return speaks()
    try:
        return _store.add("failures told", 1) == 1
    except RuntimeError:  # the machine that keeps the store is gone as well
        return speaks()


def num_launched() -> int:
    """How many processes torchrun started, whether they are joined yet or not."""
    return int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1


def rank() -> int:
    """The number of this process among those that work together, 0 for the first."""
    return dist.get_rank() if dist.is_initialized() else 0


def num_ranks() -> int:
    """How many processes work together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def num_local_ranks() -> int:
    """How many of them run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if dist.is_initialized() else 1


@contextmanager
def joined() -> Iterator[None]:
    """Work together with the other processes, if torchrun started some; each takes a GPU of its own, if there are."""
    global _store
    if not dist.is_torchelastic_launched() or dist.is_initialized():
        yield
        return
    with_gpus = torch.cuda.is_available() and dist.is_nccl_available()
    if with_gpus and (local := int(os.environ["LOCAL_RANK"])) < torch.cuda.device_count():
        torch.cuda.set_device(local)
    backend = "cpu:gloo,cuda:nccl" if with_gpus else "gloo"
    _store, own, number = next(dist.rendezvous("env://"))
    dist.init_process_group(backend, store=_store, rank=own, world_size=number, timeout=_PATIENCE)
    try:
        yield
        _store = None  # which only a failure needs
    finally:
        dist.destroy_process_group()


def run_and_leave(command: Callable[[], object]) -> None:
    """Run a command line and, in a process that torchrun started, end at once by its exit code.

    What libraries take down after Python, threads of gloo among it, now and then aborts a process that has done all its
    work, and torchrun would take that for a failure.
    """
    if num_launched() == 1:
        command()
        return
    code = 1
    try:
        command()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def share(work: Sequence[T]) -> Sequence[T]:
    """What of some work this process does."""
    return work[rank() :: num_ranks()] if num_ranks() > 1 else work


def together(work: Callable[[], T]) -> T:
    """Do some work in every process; if it fails in one, all fail with its error.

    Raises:
        ProcessError: If another process is gone, or failed in a way that has no name.
    """
    if num_ranks() == 1:
        return work()
    result, error = None, None
    try:
        result = work()
    except Exception as raised:
        error = raised
    kind = type(error) if isinstance(error, DreamPygError) else ProcessError
    try:
        failures = everyone_says(None if error is None else (kind, str(error) or type(error).__name__))
    finally:
        if error is not None:
            raise error
    for failure in failures:
        if failure is not None:
            raise failure[0](failure[1])
    return result  # type: ignore[return-value]


def first_does(work: Callable[[], None]) -> None:
    """Do some work in the first process alone; if it fails, all fail with its error."""
    together(lambda: None if rank() else work())


def everyone_says(value: T) -> list[T]:
    """What each process gives here, by rank."""
    if num_ranks() == 1:
        return [value]
    said: list[T] = [value] * num_ranks()
    with naming_lost_processes():
        dist.all_gather_object(said, value)
    return said


def first_says(value: T) -> T:
    """What the first process gives here, in all of them."""
    if num_ranks() == 1:
        return value
    said = [value]
    with naming_lost_processes():
        dist.broadcast_object_list(said, 0)
    return said[0]


def any_says(flag: bool) -> bool:
    """Whether any process gives true here."""
    if num_ranks() == 1:
        return flag
    said = torch.tensor(int(flag))
    with naming_lost_processes():
        dist.all_reduce(said, dist.ReduceOp.MAX)
    return bool(said)


def reduce_highest(values: Tensor) -> None:
    """Make each entry, in the first process, the highest that any process has there."""
    if num_ranks() > 1:
        with naming_lost_processes():
            dist.reduce(values, 0, dist.ReduceOp.MAX)


def first_gets(parts: Sequence[Tensor], shapes: Callable[[int], Sequence[Sequence[int]]]) -> Iterator[list[Tensor]]:
    """In the first process, what each of the others gives, one after the other; the others give it and get nothing.

    Args:
        parts: Tensors of this process.
        shapes: The shapes of those of another, by its rank.
    """
    with naming_lost_processes():
        if rank():
            for part in parts:
                dist.send(part.contiguous(), 0)
    for other in range(1, num_ranks() if rank() == 0 else 0):
        received = [part.new_empty(shape) for part, shape in zip(parts, shapes(other), strict=True)]
        with naming_lost_processes():
            for part in received:
                dist.recv(part, other)
        yield received


@contextmanager
def naming_lost_processes() -> Iterator[None]:
    """Say of an exchange that failed that another process is gone."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if num_ranks() == 1:
            raise
        raise ProcessError(
            f"A process that this one worked with is gone ({str(error).splitlines()[0]}). Look for what ended it, "
            "often a lack of memory. What was saved is whole: the same command goes on from it, `train` with --resume."
        ) from error
