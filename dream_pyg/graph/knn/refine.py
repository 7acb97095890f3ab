"""From candidates to neighbours: exact cosines, ties in double precision, a full search where a list is too short."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dream_pyg.data.features import Neighbors
from dream_pyg.graph.csr import row_pointer, sampled_product
from dream_pyg.graph.knn.candidates import CandidateBlocks, Candidates
from dream_pyg.graph.knn.rows import Rows, measured, unit_rows
from dream_pyg.graph.processor import threads_of_one

Block = slice | NDArray[np.int64]
"""Some rows: from one to another, or those of some ids."""

_UNCERTAINTY = 2e-6
"""Cosines that differ by less in float32 may be in the wrong order: many times the rounding error measured."""
_TIE_DECIMALS = 12
"""Cosines that agree to this many decimals in float64 are ties."""
_PANEL_BYTES = 128 << 20
_PART_BYTES = 16 << 20
_RANKED_BYTES = 96 << 20
_BYTES_PER_CANDIDATE = 72
"""What a candidate takes while it is ranked."""
_GATHERED_BYTES = 32 << 20


def nearest_of(rows: Rows, candidates: CandidateBlocks, count: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The most similar rows of each, from its candidates or, where these may lack one, from all rows.

    Args:
        rows: The rows (N, F).
        candidates: Of all rows.
        count: K.

    Returns:
        Cosines (N, K) and ids (N, K) as :func:`rank_candidates` gives them.
    """
    similarity, index, certain = rank_candidates(rows, candidates, count)
    uncertain = ~certain
    if uncertain.any():
        for chosen, _, found in search_in_double(rows, np.flatnonzero(uncertain), count):
            index[chosen] = found
        similarity[uncertain] = similarities(rows, index, uncertain)[uncertain]
    return similarity, index


def as_neighbors(
    rows: Rows, similarity: NDArray[np.float32], index: NDArray[np.int64], *, include_self: bool
) -> Neighbors:
    """Lists of neighbours (N, K) of cosines and ids (N, K), or of (N, K - 1) with each row as its own first."""
    if include_self:
        num_rows, step = len(index), 1024
        own = np.concatenate(
            [
                np.where(rows.take(start, start + step).any(axis=1), np.arange(start, min(start + step, num_rows)), -1)
                for start in range(0, num_rows, step)
            ]
        )
        index = np.concatenate([own[:, None], index], axis=1)
        similarity = np.concatenate([np.ones((num_rows, 1), dtype=np.float32), similarity], axis=1)
    return Neighbors(index, np.where(index >= 0, np.clip(similarity, -1, 1), np.float32(0)))


def rank_candidates(
    rows: Rows, candidates: CandidateBlocks, count: int
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.bool_]]:
    """The most similar candidates of each row by exact cosine; of ties those with lower ids.

    Args:
        rows: The rows (N, F).
        candidates: Of all rows.
        count: K.

    Returns:
        Cosines in float32 (N, K), -inf where there are fewer candidates, and the same for a pair whatever else was
        asked; ids (N, K), -1 there; and whether a row's neighbours are certain (N,), for no row outside its list can be
        as similar as the last.
    """
    num_rows = rows.shape[0]
    similarity = np.empty((num_rows, count), dtype=np.float32)
    index = np.empty((num_rows, count), dtype=np.int64)
    certain = np.empty(num_rows, dtype=bool)
    measure = _Cosines(rows)

    def rank(here: Block) -> None:
        similarity[here], index[here], certain[here] = _rank_block(measure, candidates.block(here), here, count)

    if candidates.order is None:
        for here in measure.blocks(candidates.width):
            rank(here)
    else:
        with threads_of_one() as pool:
            list(pool.map(rank, measure.blocks(candidates.width, candidates.order)))
    return similarity, index, certain


def _rank_block(
    measure: _Cosines, candidates: Candidates, mine: Block, count: int
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.bool_]]:
    """What :func:`rank_candidates` gives for some rows that have these candidates."""
    # One more than wanted shows whether the last is in doubt.
    index = np.pad(candidates.index, ((0, 0), (0, max(0, count + 1 - candidates.width))), constant_values=-1)
    cosine = np.full(index.shape, -np.inf)
    measure(mine, index, index >= 0, cosine)
    order = np.argsort(-cosine, axis=1)  # Ties are in doubt, and put in order below.
    cosine, index = (np.take_along_axis(part, order, axis=1) for part in (cosine, index))
    last = cosine[:, count - 1].copy()
    # Only what can be among the first K stays.
    within = cosine >= (last - 2 * _UNCERTAINTY)[:, None]
    width = max(int(within.sum(axis=1).max(initial=0)), count + 1)
    cosine, index = cosine[:, :width], np.where(within & (cosine > -np.inf), index, -1)[:, :width]
    cosine[index < 0] = -np.inf
    with np.errstate(invalid="ignore"):  # two missing candidates
        close = -np.diff(cosine, axis=1) < _UNCERTAINTY
    doubtful = np.pad(close, ((0, 0), (0, 1))) | np.pad(close, ((0, 0), (1, 0)))
    similarity, index = _rank_in_double(measure.rows, mine, cosine, index, doubtful & (index >= 0))
    full = np.isfinite(last)
    certain = np.where(full, last - _UNCERTAINTY > candidates.left_out, candidates.left_out == -np.inf)
    return similarity[:, :count], index[:, :count], certain


def similarities(rows: Rows, index: NDArray[np.int64], wanted: NDArray[np.bool_]) -> NDArray[np.float32]:
    """The cosines (N, K) of rows with their neighbours (N, K) as :func:`rank_candidates` gives them.

    Args:
        rows: The rows (N, F).
        index: Neighbours (N, K), -1 for none.
        wanted: Whose are wanted (N,); those of others are -inf.
    """
    cosine = np.full(index.shape, -np.inf, dtype=np.float32)
    measure = _Cosines(rows)
    for here in measure.blocks(index.shape[1]):
        measure(here, index[here], wanted[here, None] & (index[here] >= 0), cosine[here])
    return cosine


def search_in_double(
    rows: Rows, wanted: NDArray[np.int64], count: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]]:
    """Search the neighbours of some rows among all, in float64, and never themselves.

    Yields:
        Ids (Q,), cosines (Q, K) and neighbours (Q, K), as :func:`rank_candidates` gives them.
    """
    num_rows, num_features = rows.shape
    step = max(256, _PANEL_BYTES // (32 * num_features))
    at_once = max(1, min(step, _PANEL_BYTES // (64 * step)))
    for first in range(0, len(wanted), at_once):
        chosen = wanted[first : first + at_once]
        query = unit_rows(rows.take_rows(chosen))
        cosine = np.full((len(chosen), count), -np.inf)
        index = np.full((len(chosen), count), -1, dtype=np.int64)
        for start in range(0, num_rows, step):
            stop = min(start + step, num_rows)
            base = unit_rows(rows.take(start, stop))
            score = np.round(query @ base.T, _TIE_DECIMALS)
            score[:, ~base.any(axis=1)] = -np.inf
            score[~query.any(axis=1)] = -np.inf
            ids = np.broadcast_to(np.arange(start, stop), score.shape)
            score[chosen[:, None] == ids] = -np.inf
            cosine = np.concatenate([cosine, score], axis=1)
            index = np.concatenate([index, ids], axis=1)
            taken = _highest(cosine, count)
            cosine, index = (np.take_along_axis(part, taken, axis=1) for part in (cosine, index))
        yield chosen, *ranked(cosine, np.where(cosine == -np.inf, -1, index))


def ranked(cosine: NDArray[Any], index: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Each row in the order of falling cosine, then of ids."""
    order = np.lexsort((index, -cosine), axis=1)
    return np.take_along_axis(cosine, order, axis=1), np.take_along_axis(index, order, axis=1)


class _Cosines:
    """Cosines of some pairs of rows in float32, from a panel of rows against small parts of all rows."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self._step = max(1, _PART_BYTES // (4 * rows.shape[1]))
        self._norm = torch.full((rows.shape[0],), torch.nan)
        self._divisor = torch.ones(rows.shape[0], 1)

    def blocks(self, width: int, order: NDArray[np.int64] | None = None) -> Iterator[Block]:
        """All rows, as they come or in an order, in blocks that memory has room for with ``width`` candidates each."""
        num_rows, num_features = self.rows.shape
        at_once = 1 if order is None else torch.get_num_threads()
        step = min(_PANEL_BYTES // (4 * num_features), _RANKED_BYTES // (_BYTES_PER_CANDIDATE * max(1, width)))
        step = max(1, step // at_once)
        for start in range(0, num_rows, step):
            span = slice(start, min(start + step, num_rows))
            yield span if order is None else order[span]

    def __call__(self, mine: Block, index: NDArray[Any], wanted: NDArray[np.bool_], cosine: NDArray[Any]) -> None:
        """Fill in the cosines (R, M) of some rows with those of the rows ``index`` that are wanted."""
        row, slot = np.nonzero(wanted)
        if not len(row):
            return
        panel, position = self._load(mine), index[row, slot]
        asked = None
        if not isinstance(mine, slice):  # Rows in order ask for few others, which alone are read.
            flags = np.zeros(self.rows.shape[0], dtype=bool)
            flags[position] = True
            asked, position = np.flatnonzero(flags), flags.cumsum(dtype=np.int32)[position] - 1
        num_asked = self.rows.shape[0] if asked is None else len(asked)
        starts = range(0, num_asked, self._step)
        number = (position // self._step).astype(np.min_scalar_type(len(starts)))  # Small numbers are sorted fast.
        order = np.argsort(number, kind="stable")  # Rows go on rising within a part.
        row, slot, position, number = (of_pair[order] for of_pair in (row, slot, position, number))
        bounds = np.searchsorted(number, np.arange(len(starts) + 1))
        for start, first, last in zip(starts, bounds, bounds[1:], strict=False):
            if first == last:
                continue
            span = slice(start, min(start + self._step, num_asked))
            theirs = span if asked is None else asked[span]
            if isinstance(mine, slice) and mine.start <= span.start and span.stop <= mine.stop:
                part = panel[span.start - mine.start : span.stop - mine.start]
            else:
                part = self._load(theirs)
            left, right = row[first:last], position[first:last] - start
            value = _sampled_product(panel, part, left, right) / self._norm[mine].numpy()[left]
            cosine[left, slot[first:last]] = value / self._norm[theirs].numpy()[right]

    def _load(self, rows: Block) -> torch.Tensor:
        taken = self.rows.take(rows.start, rows.stop) if isinstance(rows, slice) else self.rows.take_rows(rows)
        panel = torch.from_numpy(taken)
        if self._norm[rows].isnan().any():
            divisor, self._norm[rows] = measured(panel)
            if divisor is not None:
                self._divisor[rows] = divisor
        divisor = self._divisor[rows]
        return panel if (divisor == 1).all() else panel / divisor


def _sampled_product(
    left: torch.Tensor, right: torch.Tensor, row: NDArray[np.int64], column: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Inner products of rows of two matrices at the given pairs, in rising order of row."""
    pointer = row_pointer(torch.bincount(torch.from_numpy(row), minlength=len(left)))
    return sampled_product(pointer, torch.from_numpy(column), left, right).numpy()


def _rank_in_double(
    rows: Rows, mine: Block, cosine: NDArray[np.float64], index: NDArray[np.int64], doubtful: NDArray[np.bool_]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Order some rows by their cosines (R, M), a few of which are computed again in float64 for that."""
    own = np.arange(mine.start, mine.stop) if isinstance(mine, slice) else mine
    similarity = cosine.astype(np.float32)
    row, slot = np.nonzero(doubtful)
    step = max(1, _GATHERED_BYTES // (8 * rows.shape[1]))
    for first in range(0, len(row), step):
        at = row[first : first + step], slot[first : first + step]
        left, right = (unit_rows(rows.take_rows(ids)) for ids in (own[at[0]], index[at]))
        cosine[at] = np.round(np.einsum("pf,pf->p", left, right), _TIE_DECIMALS)
    changed = np.unique(row)
    order = np.lexsort((index[changed], -cosine[changed]), axis=1)
    for part in (similarity, index):
        part[changed] = np.take_along_axis(part[changed], order, axis=1)
    return similarity, index


def _highest(value: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """The columns (Q, count), ascending, of the highest values (Q, N) of each row; of ties the first."""
    last = -np.partition(-value, count - 1, axis=1)[:, count - 1 : count]
    above, tied = value > last, value == last
    room = count - above.sum(axis=1, keepdims=True)
    taken = above | (tied & (np.cumsum(tied, axis=1) <= room))
    return np.nonzero(taken)[1].reshape(-1, count)
