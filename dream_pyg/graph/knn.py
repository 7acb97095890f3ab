"""Exact cosine k-nearest neighbours by faiss, in blocks of bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import faiss
import numpy as np

from dream_pyg.data.features import Neighbors
from dream_pyg.data.progress import progress
from dream_pyg.errors import ConfigError

RowSource = Callable[[int, int], np.ndarray]
"""Rows ``start`` to ``stop`` of a matrix as float32 (stop - start, F)."""

_BLOCK_BYTES = 256 << 20
_UNCERTAINTY = 2e-6
"""Cosines that differ by less in float32 may be in the wrong order: many times the rounding error measured."""
_TIE_DECIMALS = 12
"""Cosines that agree to this many decimals in float64 are ties."""


def cosine_knn(
    rows: RowSource, num_rows: int, num_features: int, num_neighbors: int, *, include_self: bool = False, what: str = ""
) -> Neighbors:
    """The most similar rows of each row by cosine, exactly.

    faiss searches in float32. Where the last neighbour and the first that is left out are too close to tell apart, as
    among duplicates, the row is searched again in float64, so that the graph depends on the features alone and not on
    threads or blocks. Memory holds a few blocks of rows at a time, and never an (N, N) matrix. Rows of zeros have no
    direction: they get no neighbours and are nobody's neighbour.

    Args:
        rows: Gives any block of the matrix.
        num_rows: N.
        num_features: F.
        num_neighbors: K, how many neighbours a row gets.
        include_self: Whether a row is the first of its own K neighbours (as in FREEDOM) or excluded.
        what: What the rows are, for the progress bar and errors.

    Returns:
        Neighbours (N, K), the most similar first; of ties at the last place those with lower ids are taken. ``-1``
        fills rows that have fewer.

    Raises:
        ConfigError: If K is not between 1 and N - 1 (N with self).
    """
    limit = num_rows if include_self else num_rows - 1
    if not 1 <= num_neighbors <= limit:
        raise ConfigError(
            f"num_neighbors must be between 1 and {limit} for {num_rows} {what or 'rows'} (got {num_neighbors}). "
            "Choose a smaller number of neighbours."
        )
    num_others = num_neighbors - include_self
    block = max(1024, _BLOCK_BYTES // (4 * num_features))
    starts = range(0, num_rows, block)
    # Two more than wanted: self, which is dropped by id since duplicates may rank before it, and one to compare with.
    similarity, index = _search(rows, num_rows, starts, num_others + 2, what)
    own = np.arange(num_rows)[:, None]
    present = index[:, 0] >= 0
    similarity, index = _ranked(np.where(index == own, -np.inf, similarity), index)
    if num_others:
        with np.errstate(invalid="ignore"):  # two missing neighbours
            gap = similarity[:, num_others - 1] - similarity[:, num_others]
        unsettled = np.flatnonzero(gap < _UNCERTAINTY)
        for chosen, settled_similarity, settled_index in _settle(rows, num_rows, starts, unsettled, num_others):
            similarity[chosen, :num_others], index[chosen, :num_others] = settled_similarity, settled_index
    similarity, index = similarity[:, :num_others], index[:, :num_others]
    index = np.where(similarity == -np.inf, -1, index)
    similarity = np.where(index >= 0, np.clip(similarity, -1.0, 1.0), 0.0)
    if include_self:
        index = np.concatenate([np.where(present[:, None], own, -1), index], axis=1)
        similarity = np.concatenate([present[:, None], similarity], axis=1)
    return Neighbors(index=index, similarity=similarity.astype(np.float32))


def _search(rows: RowSource, num_rows: int, starts: range, count: int, what: str) -> tuple[np.ndarray, np.ndarray]:
    """The ``count`` most similar rows of each, by faiss, a block against a block; -inf and -1 where there are fewer."""
    best_similarity = np.full((num_rows, count), -np.inf, dtype=np.float32)
    best_index = np.full((num_rows, count), -1, dtype=np.int64)
    for base_start in progress(starts, f"kNN of {what or 'rows'}"):
        base, base_id = _unit_rows(rows, base_start, min(base_start + starts.step, num_rows), np.float32)
        if not len(base):
            continue
        for start in starts:
            query, target = (
                (base, base_id)
                if start == base_start
                else _unit_rows(rows, start, min(start + starts.step, num_rows), np.float32)
            )
            if not len(query):
                continue
            similarity, found = faiss.knn(query, base, min(count, len(base)), metric=faiss.METRIC_INNER_PRODUCT)
            similarity, index = _ranked(
                np.concatenate([best_similarity[target], similarity], axis=1),
                np.concatenate([best_index[target], base_id[found]], axis=1),
            )
            best_similarity[target], best_index[target] = similarity[:, :count], index[:, :count]
    return best_similarity, best_index


def _settle(
    rows: RowSource, num_rows: int, starts: range, unsettled: np.ndarray, count: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Search again for some rows in float64; yields ids (Q,), similarities (Q, count) and neighbours (Q, count)."""
    at_once = max(1, _BLOCK_BYTES // (64 * min(starts.step, num_rows)))
    for start in starts:
        stop = min(start + starts.step, num_rows)
        wanted = unsettled[(unsettled >= start) & (unsettled < stop)]
        if not len(wanted):
            continue
        unit, unit_id = _unit_rows(rows, start, stop, np.float64)
        for first in range(0, len(wanted), at_once):
            chosen = wanted[first : first + at_once]
            query = unit[np.searchsorted(unit_id, chosen)]
            similarity = np.full((len(chosen), count), -np.inf)
            index = np.full((len(chosen), count), -1, dtype=np.int64)
            for base_start in starts:
                base, base_id = (
                    (unit, unit_id)
                    if base_start == start
                    else _unit_rows(rows, base_start, min(base_start + starts.step, num_rows), np.float64)
                )
                cosine = np.round(query @ base.T, _TIE_DECIMALS)
                cosine[chosen[:, None] == base_id] = -np.inf
                similarity = np.concatenate([similarity, cosine], axis=1)
                index = np.concatenate([index, np.broadcast_to(base_id, cosine.shape)], axis=1)
                taken = _highest(similarity, count)
                similarity, index = (np.take_along_axis(part, taken, axis=1) for part in (similarity, index))
            yield chosen, *_ranked(similarity, index)


def _highest(value: np.ndarray, count: int) -> np.ndarray:
    """The columns (Q, count), ascending, of the highest values (Q, N) of each row; of ties the first."""
    last = -np.partition(-value, count - 1, axis=1)[:, count - 1 : count]
    above, tied = value > last, value == last
    room = count - above.sum(axis=1, keepdims=True)
    taken = above | (tied & (np.cumsum(tied, axis=1) <= room))
    return np.nonzero(taken)[1].reshape(-1, count)


def _unit_rows(rows: RowSource, start: int, stop: int, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """The rows of a block that differ from zero, with norm 1 (P, F), and their ids (P,)."""
    block = np.array(rows(start, stop), dtype=dtype, order="C")
    norm = np.linalg.norm(block, axis=1)
    present = np.flatnonzero(norm > 0)
    return block[present] / norm[present, None], start + present


def _ranked(similarity: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each row in the order of falling similarity, then of ids."""
    order = np.lexsort((index, -similarity), axis=1)
    return np.take_along_axis(similarity, order, axis=1), np.take_along_axis(index, order, axis=1)
