"""Where the rows of a search come from, and what is left of them after scaling to unit length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dream_pyg.data.files import float32_rows

_SAMPLED_BYTES = 32 << 20
"""What is read at a time of a sample."""
_LEAST_NORM = 1e-15
"""Squares of smaller entries lose digits in float32."""


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
    return np.asarray(unit(torch.from_numpy(rows.astype(dtype, copy=False))))


def unit(rows: Tensor) -> Tensor:
    """Rows (P, F) scaled to norm 1, a copy; rows of zeros stay."""
    divisor, norm = measured(rows)
    if divisor is not None:
        rows = rows / divisor
    return rows / norm.masked_fill(norm == 0, 1).unsqueeze(1)


def measured(rows: Tensor) -> tuple[Tensor | None, Tensor]:
    """What to divide rows (P, F) by lest their squares be too large or small for float32, and their norms after that.

    Returns:
        The largest entry of such a row and 1 for any other (P, 1), or None where there is none; and norms (P,).
    """
    norm = rows.norm(dim=1)
    extreme = (~norm.isfinite() | (norm < _LEAST_NORM)).nonzero().view(-1)
    if not len(extreme):
        return None, norm
    largest = rows[extreme].abs().amax(dim=1)
    extreme, largest = extreme[largest > 0], largest[largest > 0]
    if not len(extreme):
        return None, norm
    divisor = rows.new_ones(len(rows), 1)
    divisor[extreme, 0] = largest
    norm[extreme] = (rows[extreme] / divisor[extreme]).norm(dim=1)
    return divisor, norm


def some_unit_rows(
    rows: Rows,
    number: int,
    generator: np.random.Generator,
    reduce: Callable[[NDArray[np.float32]], NDArray[np.float32]] | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Random rows that differ from zero, at most ``number``, with norm 1 in float32 (P, F), and their ids (P,).

    Args:
        rows: The rows (N, F).
        number: How many are wanted.
        generator: What draws them.
        reduce: Applied to some rows at a time (B, F), so that memory never holds all whole.
    """
    num_rows, num_features = rows.shape
    order = generator.permutation(num_rows)
    step = min(number, max(1, _SAMPLED_BYTES // (4 * num_features)))
    units, ids, found = [], [], 0
    for start in range(0, num_rows, step):
        chosen = order[start : start + step]
        unit = unit_rows(rows.take_rows(chosen), np.float32)
        present = unit.any(axis=1)
        units.append(unit[present] if reduce is None else reduce(unit[present]))
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
