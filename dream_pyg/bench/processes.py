"""Fresh processes with a fixed number of threads and a limit of time."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from typing import Any

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

    Args:
        job: What to do.
        threads: To how many threads everything is held.
        limit: Seconds for building, and for building and one search together; then the process is killed.
    """
    environment = {**os.environ, **dict.fromkeys(_THREAD_VARIABLES, str(threads))}
    outcome = Outcome()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "dream_pyg.bench.worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment, text=True,
        )  # fmt: skip
        try:
            _follow(process, {**job, "threads": threads}, limit, outcome)
        finally:
            process.kill()
            process.wait()
        if outcome.status == "done" and process.returncode:
            errors.seek(0)
            lines = errors.read().strip().splitlines()
            killed = process.returncode == -9
            outcome.status = "out of memory" if killed else "failed"
            outcome.message = (
                "killed by the system" if killed else (lines[-1] if lines else f"exit {process.returncode}")
            )
    return outcome


def _follow(process: subprocess.Popen[str], job: dict[str, Any], limit: float, outcome: Outcome) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    lines: queue.Queue[str] = queue.Queue()

    def read(stream: Any = process.stdout) -> None:
        for line in stream:
            lines.put(line)
        lines.put("")

    threading.Thread(target=read, daemon=True).start()
    try:
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
    except BrokenPipeError:  # It ended before it read; its exit says why.
        pass
    deadline = time.monotonic() + _START_SECONDS
    built = 0.0
    while True:
        try:
            line = lines.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            outcome.status, outcome.message = "stopped", f"longer than {limit:g} s"
            return
        if not line:
            process.wait()
            return
        event = json.loads(line)
        kind = event.pop("event")
        outcome.events.setdefault(kind, []).append(event)
        if kind == "out of memory":
            outcome.status, outcome.message = kind, event["message"]
        elif kind == "built":
            built = event["seconds"]
        deadline = time.monotonic() + limit - built
