"""How the C library treats memory that is freed."""

from __future__ import annotations

import ctypes

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # of mallopt(3)
_LARGEST_KEPT = 1 << 28


def keep_freed_memory() -> bool:
    """Let glibc keep freed blocks of up to 256 MiB for the process, instead of giving them back to the system.

    A training step frees what the next one allocates again, and by default the system takes large blocks back and
    hands out zeroed pages one fault at a time: on a CPU that alone may take a third of a step. The setting is the
    process's own, changes no result, and lasts; larger blocks are given back as ever.

    Returns:
        Whether the C library has the setting; others than glibc are left as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT) and mallopt(_TRIM_THRESHOLD, -1))
