"""Long work in a directory of its own, that one process does at a time and that goes on after any interruption."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dream_pyg.errors import Interrupted, StoreError


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
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StoreError(f"Another process works on {what} at {directory}. Wait for it, or end it.") from error
        with _termination_as_interrupt():
            yield
    except (KeyboardInterrupt, Interrupted) as error:
        raise Interrupted(
            f"Interrupted; {what} at {directory} is saved so far. Continue with the same command."
        ) from error
    finally:
        os.close(handle)


@contextlib.contextmanager
def _termination_as_interrupt() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
