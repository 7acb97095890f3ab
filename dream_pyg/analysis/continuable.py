"""Long work in a directory of its own, that one process does at a time and that goes on after any interruption."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from dream_pyg.data.files import held, read_json
from dream_pyg.data.signals import termination_as_interrupt
from dream_pyg.errors import Interrupted
from dream_pyg.training.run import RunPaths, read_epochs


@contextlib.contextmanager
def continuable(directory: Path, what: str) -> Iterator[None]:
    """Hold ``directory`` for this process alone, and turn Ctrl-C and SIGTERM into :class:`Interrupted`.

    Args:
        directory: The directory; it exists.
        what: What lies there, for messages.

    Raises:
        StoreError: If another process holds the directory.
        Interrupted: On a signal, saying that the same command continues.
    """
    try:
        with held(directory, what), termination_as_interrupt():
            yield
    except (KeyboardInterrupt, Interrupted) as error:
        raise Interrupted(
            f"Interrupted; what there is of {what} at {directory} is saved. Continue with the same command."
        ) from error


def lost_files(paths: RunPaths, *, to_resume: bool) -> list[str]:
    """The files of a run that are gone, of those that it had.

    Args:
        paths: The run; something is there.
        to_resume: Whether the checkpoint to resume from is needed.
    """
    finished = paths.info.is_file() and read_json(paths.info).get("status") == "finished"
    evaluated = finished or any("valid" in epoch for epoch in read_epochs(paths))
    needed = {
        paths.config: True,
        paths.info: True,
        paths.metrics: finished,
        paths.best: evaluated,
        paths.last: to_resume,
    }
    return [str(path.relative_to(paths.root)) for path in needed if needed[path] and not path.is_file()]
