"""Where the rows of a search come from, and what is left of them after scaling to unit length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from dream_pyg.data.files import float32_rows

_SAMPLED_BYTES = 32 << 20
"""What is read at a time of a sample."""


class Rows(Protocol):
    """A matrix (N, F) that gives its rows as float32, wherever they lie."""

    @property
    def shape(self) -> tuple[int, int]:
        """(N, F)."""

    def take(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows ``start`` to ``stop``, which is cut at N."""

    def take_rows(self, index: NDArray[np.int64]) -> NDArray[np.float32]:
        """Some rows (P, F), in any order."""


@dataclass(frozen=True, eq=False)
class ArrayRows:
    """The rows of an array (N, F) of any real type, which may be memory-mapped."""

    array: NDArray[Any]

    @property
    def shape(self) -> tuple[int, int]:
        """(N, F)."""
        return self.array.shape[0], self.array.shape[1]

    def take(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows ``start`` to ``stop``: a view where the array is float32 in memory."""
        return float32_rows(self.array, slice(start, stop))

    def take_rows(self, index: NDArray[np.int64]) -> NDArray[np.float32]:
        """Some rows (P, F)."""
        return float32_rows(self.array, index)


def unit_rows(rows: NDArray[np.float32], dtype: Any = np.float64) -> NDArray[Any]:
    """Rows (P, F) scaled to norm 1 in ``dtype``, a copy; rows of zeros stay."""
    # Several times as fast as by NumPy, which passes over the rows more often.
    unit = torch.from_numpy(rows.astype(dtype, copy=False))
    norm = unit.norm(dim=1, keepdim=True)
    return np.asarray(unit / norm.masked_fill_(norm == 0, 1))


def some_unit_rows(
    rows: Rows, number: int, generator: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Random rows that differ from zero, at most ``number``, with norm 1 in float32 (P, F), and their ids (P,)."""
    num_rows, num_features = rows.shape
    order = generator.permutation(num_rows)
    step = min(number, max(1, _SAMPLED_BYTES // (4 * num_features)))
    units, ids, found = [], [], 0
    for start in range(0, num_rows, step):
        chosen = order[start : start + step]
        unit = unit_rows(rows.take_rows(chosen), np.float32)
        present = unit.any(axis=1)
        units.append(unit[present])
        ids.append(chosen[present])
        found += len(ids[-1])
        if found >= number:
            break
    return np.concatenate(units)[:number], np.concatenate(ids)[:number]


def present_unit_rows(rows: Rows, start: int, stop: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The rows of a block that differ from zero, with norm 1 in float32 (P, F), and their ids (P,)."""
    block = unit_rows(rows.take(start, stop), np.float32)
    present = np.flatnonzero(block.any(axis=1))
    return block if len(present) == len(block) else block[present], start + present
