"""Tables of a row for each row searched, which may be too many to stay in memory at once."""

from __future__ import annotations

import mmap
import tempfile

import torch
from torch import Tensor

from dream_pyg.errors import SearchError

_MOST_IN_MEMORY = 32 << 20
_WRITTEN_AT_ONCE = 8 << 20


class ScratchTables:
    """Makes tables on a device; large ones beside a CPU lie in files, of which only what is in use takes memory.

    The files have no name, are where temporary files go (``TMPDIR``), and end with their tables.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._mapped: list[mmap.mmap] = []

    def full(self, num_rows: int, width: int, fill: float, dtype: torch.dtype) -> Tensor:
        """A table (N, W) filled with one value.

        Raises:
            SearchError: If there is no room on the disk.
        """
        size = num_rows * width * dtype.itemsize
        if self._device.type != "cpu" or size <= _MOST_IN_MEMORY:
            return torch.full((num_rows, width), fill, dtype=dtype, device=self._device)
        block = torch.full((_WRITTEN_AT_ONCE // dtype.itemsize,), fill, dtype=dtype).numpy().tobytes()
        try:
            with tempfile.TemporaryFile() as file:
                # What is written has its place on the disk; a mapping without one would end the process if it is full.
                for start in range(0, size, len(block)):
                    file.write(block[: size - start])
                file.flush()
                mapped = mmap.mmap(file.fileno(), size)
        except OSError as error:
            raise SearchError(
                f"Lists of neighbours of {num_rows:,} rows need {size >> 20:,} MiB in {tempfile.gettempdir()}, where "
                f"writing failed ({error.strerror}). Free some room there, or set TMPDIR to a directory that has it."
            ) from error
        self._mapped.append(mapped)
        return torch.frombuffer(mapped, dtype=dtype).view(num_rows, width)

    def let_go(self) -> None:
        """Leave what lies in files to the system's cache, from where it comes back when it is asked for."""
        for mapped in self._mapped:
            mapped.madvise(mmap.MADV_DONTNEED)
