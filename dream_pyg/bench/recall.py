"""How many of the true neighbours were found, on a sample of rows, by a search that shares no code with ours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dream_pyg.graph.knn import Rows

SAMPLE_ROWS = 1000
_TIE = 1e-6
"""Neighbours whose cosine is lower than the K-th by less count as found: float32 cannot tell them apart."""
_BLOCK_BYTES = 64 << 20


@dataclass(frozen=True, eq=False)
class Reference:
    """What some rows' true neighbours are like.

    Attributes:
        row: The sampled rows (S,).
        last: The cosine of each one's K-th neighbour (S,).
        num_wanted: How many neighbours a row can have, K at most.
    """

    row: NDArray[np.int64]
    last: NDArray[np.float64]
    num_wanted: int

    @classmethod
    def compute(cls, rows: Rows, num_neighbors: int, *, seed: int = 0) -> Reference:
        """Compare a random sample of the rows that differ from zero with all, in float64."""
        num_rows, num_features = rows.shape
        step = max(1, _BLOCK_BYTES // (8 * num_features))
        starts = range(0, num_rows, step)
        present = np.concatenate([rows.take(start, start + step).any(axis=1) for start in starts]).nonzero()[0]
        generator = np.random.default_rng(seed)
        row = np.sort(generator.choice(present, min(SAMPLE_ROWS, len(present)), replace=False))
        query = _unit(rows.take_rows(row))
        num_wanted = min(num_neighbors, len(present) - 1)
        best = np.full((len(row), num_wanted), -np.inf)
        for start in starts:
            base = rows.take(start, start + step)
            kept = np.flatnonzero(base.any(axis=1))
            cosine = query @ _unit(base[kept]).T
            cosine[row[:, None] == start + kept] = -np.inf
            best = np.partition(np.concatenate([best, cosine], axis=1), -num_wanted, axis=1)[:, -num_wanted:]
        return cls(row, best.min(axis=1), num_wanted)

    def save(self, path: Path) -> None:
        """Write to a ``.npz`` file."""
        np.savez(path, row=self.row, last=self.last, num_wanted=self.num_wanted)

    @classmethod
    def load(cls, path: Path) -> Reference:
        """Read what :meth:`save` wrote."""
        with np.load(path, allow_pickle=False) as archive:
            return cls(archive["row"], archive["last"], int(archive["num_wanted"]))

    def recall(self, rows: Rows, index: NDArray[np.int64]) -> float:
        """The mean share of true neighbours among those found.

        Args:
            rows: The rows (N, F).
            index: Neighbours of every row (N, K), -1 for none. A row itself and repeated ids count for nothing.
        """
        hits = 0
        step = max(1, _BLOCK_BYTES // (8 * rows.shape[1] * index.shape[1]))
        for first in range(0, len(self.row), step):
            chosen = self.row[first : first + step]
            found = np.sort(index[chosen], axis=1)
            valid = (found >= 0) & (found != chosen[:, None])
            valid[:, 1:] &= found[:, 1:] != found[:, :-1]
            at, slot = valid.nonzero()
            neighbor = rows.take_rows(found[at, slot])
            cosine = np.einsum("pf,pf->p", _unit(rows.take_rows(chosen))[at], _unit(neighbor))
            near = (cosine >= self.last[first + at] - _TIE) & neighbor.any(axis=1)
            hits += np.minimum(np.bincount(at[near], minlength=len(chosen)), self.num_wanted).sum()
        return float(hits / (len(self.row) * self.num_wanted))


def _unit(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = rows.astype(np.float64)
    return wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), np.finfo(np.float64).tiny)
