"""Fresh processes with a fixed number of threads and a limit of time."""

from __future__ import annotations

import multiprocessing
import os
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from dream_pyg.bench.worker import do_job

_THREAD_VARIABLES = (
    "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS", "NUMBA_NUM_THREADS",
)  # fmt: skip
_START_SECONDS = 900.0
"""Loading and warming up may take so long; some packages compile first."""


@dataclass
class Outcome:
    """How a job ended.

    Attributes:
        status: ``done``, ``stopped``, ``out of memory`` or ``failed``.
        message: Why not ``done``.
        events: What the job said, by kind.
    """

    status: str = "done"
    message: str = ""
    events: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


def run_job(job: dict[str, Any], threads: int, limit: float) -> Outcome:
    """Run a job of :mod:`dream_pyg.bench.worker` in a process of its own.

    The process is forked from a server that has imported what all jobs need and computed nothing. NumPy reads its
    number of threads when the server starts, so all jobs of one program must use the same.

    Args:
        job: What to do.
        threads: To how many threads everything is held.
        limit: Seconds for building, and for building and one search together; then the process is killed.
    """
    # A fork inherits the environment of the server, which starts with the first job; jobs set theirs once more.
    environment = dict.fromkeys(_THREAD_VARIABLES, str(threads))
    os.environ.update(environment)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dream_pyg.bench.worker"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=do_job, args=({**job, "threads": threads, "environment": environment}, sender))
    process.start()
    sender.close()
    outcome = Outcome()
    try:
        _follow(receiver, limit, outcome)
    finally:
        if outcome.status != "done" or "end" not in outcome.events:
            process.kill()
        process.join()
    if outcome.status == "done" and "end" not in outcome.events:
        outcome.status, outcome.message = "failed", f"ended with exit code {process.exitcode}"
        if process.exitcode == -9:  # by the system, which has run out of memory
            outcome.status, outcome.message = "out of memory", "killed by the system"
    return outcome


def _follow(receiver: Connection, limit: float, outcome: Outcome) -> None:
    """Collect events until the job ends or exceeds its time."""
    deadline = time.monotonic() + _START_SECONDS
    built = 0.0
    while receiver.poll(max(0.0, deadline - time.monotonic())):
        try:
            kind, values = receiver.recv()
        except EOFError:
            return
        outcome.events.setdefault(kind, []).append(values)
        if kind in ("out of memory", "failed"):
            outcome.status, outcome.message = kind, values["message"]
            return
        if kind == "built":
            built = values["seconds"]
        deadline = time.monotonic() + limit - built
    outcome.status, outcome.message = "stopped", f"longer than {limit:g} s"
