"""Long work in a directory of its own, that one process does at a time and that goes on after any interruption."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from dream_pyg.data.files import held
from dream_pyg.data.signals import termination_as_interrupt
from dream_pyg.errors import Interrupted


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
