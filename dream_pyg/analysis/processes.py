"""Several trainings at once, each by ``dream-pyg train`` in a process of its own with one thread."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dream_pyg.config import RunConfig
from dream_pyg.data.files import is_free
from dream_pyg.errors import TrainingError

logger = logging.getLogger("dream_pyg")

_POLL_SECONDS = 0.1
_DREAM_PYG = """
import runpy
from dream_pyg.analysis.processes import end_with_parent
end_with_parent()
runpy.run_module("dream_pyg", run_name="__main__", alter_sys=True)
"""
"""``python -m dream_pyg`` that does not outlive the process that started it."""


def train_in_processes(tasks: Sequence[tuple[RunConfig, Path, bool]], jobs: int) -> Iterator[Path]:
    """Train runs, or what is left of them.

    Whatever ends this early, an interrupt or a failure, asks the processes to save and waits for them; if this process
    is killed, they save and end by themselves.

    Args:
        tasks: Configurations, run directories, and whether the test split is read.
        jobs: Processes at a time.

    Yields:
        Each run as it is finished.

    Raises:
        TrainingError: If a training fails, with what it said.
    """
    waiting = list(tasks)[::-1]
    running: dict[Path, tuple[subprocess.Popen[bytes], Path]] = {}
    with tempfile.TemporaryDirectory() as scratch, _lifeline() as lifeline:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    config, run, test = waiting.pop()
                    files = Path(scratch) / str(len(waiting))
                    running[run] = (_start(config, run, files, lifeline, test=test), files)
                    logger.info("Training %s", run)
                ended = [run for run, (process, _) in running.items() if process.poll() is not None]
                for run in ended:
                    process, files = running.pop(run)
                    if process.returncode:
                        said = files.with_suffix(".log").read_text(encoding="utf-8", errors="replace").splitlines()
                        reason = _reason(process.returncode, said)
                        raise TrainingError(f"The training of {run} failed: {reason}")
                    yield run
                if not ended:
                    time.sleep(_POLL_SECONDS)
        finally:
            for process, _ in running.values():
                process.terminate()
            for process, _ in running.values():
                process.wait()


def end_with_parent() -> None:
    """Have SIGTERM end this process, which saves then, as soon as the end of standard input says that its parent did.

    Nobody else would: a training that goes on holds its run, and the parent's command could not continue.
    """

    def watch() -> None:
        os.read(0, 1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _lifeline() -> Iterator[int]:
    """A pipe in which nothing is ever written, to read from: it ends with this process."""
    watched, kept = os.pipe()
    try:
        yield watched
    finally:
        os.close(watched)
        os.close(kept)


def _reason(exit_code: int, said: list[str]) -> str:
    """Why a training ended, from its exit code and what it wrote to stderr."""
    if exit_code < 0:
        return f"it was ended by {signal.Signals(-exit_code).name}"
    errors = [line.removeprefix("Error: ") for line in said if line.startswith("Error: ")]
    return (errors or said or [f"exit code {exit_code}"])[-1]


def _start(config: RunConfig, run: Path, files: Path, lifeline: int, *, test: bool) -> subprocess.Popen[bytes]:
    one_thread = config.training.model_copy(update={"num_threads": 1})
    config.model_copy(update={"training": one_thread}).save(files.with_suffix(".toml"))
    command = [sys.executable, "-c", _DREAM_PYG, "--quiet", "train", "--config", str(files.with_suffix(".toml"))]
    command += ["--run", str(run), *([] if is_free(run) else ["--resume"]), *([] if test else ["--no-test"])]
    with files.with_suffix(".log").open("wb") as log:
        # A session of its own: Ctrl-C reaches this process alone, which then asks for a save, once.
        return subprocess.Popen(
            command,
            stdin=lifeline,
            stdout=subprocess.DEVNULL,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
