"""Progress of long loops: a bar with rate and time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")

logger = logging.getLogger("dream_pyg")
_SECONDS_BETWEEN_LINES = 30.0


def progress(
    items: Iterable[T],
    description: str,
    *,
    total: int | None = None,
    leave: bool = False,
    initial: int = 0,
    hidden: bool = False,
) -> Iterator[T]:
    """Yield ``items`` while showing how far the loop has come, on standard error.

    Args:
        items: What is gone through.
        description: What is done.
        total: How many there are.
        leave: Whether the bar stays when it is done.
        initial: How many more were done before.
        hidden: Whether to show nothing, since another process shows it.
    """
    if hidden:
        yield from items
        return
    if total is None and isinstance(items, Sized):
        total = len(items) + initial
    if sys.stderr.isatty():
        yield from tqdm(items, desc=description, total=total, leave=leave, initial=initial, dynamic_ncols=True)
        return
    started = last_line = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if now - last_line > _SECONDS_BETWEEN_LINES:
            last_line = now
            left = f", {(now - started) / done * (total - initial - done):.0f} s left" if total and done else ""
            logger.info("%s: %d%s%s", description, initial + done, f"/{total}" if total else "", left)
        yield item
