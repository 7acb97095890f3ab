"""Lists of near rows, bettered by the neighbours of neighbours (after NN-descent, doi 10.1145/1963405.1963487).

Rows that lie side by side are compared at once, by one matrix product, with all rows that any of them may be near to:
those listed by the rows that they list, or that list them. Every list of a pass comes from those of the pass before, so
the order of the work and the number of threads do not matter.
"""

from __future__ import annotations

from concurrent.futures import Executor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dream_pyg.data.arrays import place_in_group
from dream_pyg.data.progress import progress
from dream_pyg.graph.processor import threads_of_one

LISTED = 20
"""So long lists should be at least; so many of a row's list are followed, more lead on to hardly more."""
_LISTING = 10
"""So many of those that list a row are followed."""
_JOINED_ROWS = 64
_BLOCK_BYTES = 8 << 20
_BYTES_PER_ORDERED = 4 * LISTED + 48
"""What a row takes while those that list it are put in order."""
BELOW_ALL = -2.0
"""Less than any cosine."""


def join(rows: Tensor, listed: NDArray[np.int32], what: str) -> NDArray[np.int32]:
    """One pass over all lists.

    Args:
        rows: Unit rows (P, D) in float16 or float32, similar ones side by side.
        listed: The rows that each lists (P, L), the nearest first, -1 for none.
        what: What the rows are, for the progress bar.

    Returns:
        Lists of the same shape, of the nearest among those they held and those they led to.
    """
    better = np.empty_like(listed)

    def work(first: int) -> None:
        span = slice(first, min(first + _JOINED_ROWS, len(listed)))
        better[span] = _nearest(rows, listed, listing, span)

    starts = range(0, len(listed), _JOINED_ROWS)
    with threads_of_one() as pool:
        listing = _listing(listed, pool)
        for _ in progress(pool.map(work, starts), f"joining {what}", total=len(starts)):
            pass
    return better


def _nearest(rows: Tensor, listed: NDArray[np.int32], listing: NDArray[np.int32], span: slice) -> NDArray[np.int32]:
    """The better lists of some rows (R, L)."""
    mine, own = np.arange(span.start, span.stop, dtype=np.int32), listed[span]
    near = _distinct(own[:, :LISTED], listing[span])
    candidate = _distinct(listed.take(near, axis=0)[:, :LISTED], listing.take(near, axis=0), own, mine)
    score = _products(rows[span].float(), rows, candidate)
    score[np.arange(len(mine)), candidate.searchsorted(mine)] = BELOW_ALL
    # Few are as near as the last of a list, and only these are put in order.
    known = np.take_along_axis(score, candidate.searchsorted(own.clip(min=candidate[0])), axis=1)
    last = np.where(own < 0, np.float32(BELOW_ALL), known).min(axis=1, keepdims=True)
    row, column = np.divmod(np.flatnonzero(score >= last), len(candidate))
    count = np.bincount(row, minlength=len(mine))
    slot = place_in_group(row, count)
    best = torch.full((len(mine), max(int(count.max()), own.shape[1])), BELOW_ALL)
    index = np.zeros(best.shape, dtype=np.int32)
    best.numpy()[row, slot], index[row, slot] = score[row, column], candidate[column]
    best, at = best.topk(own.shape[1], dim=1)
    return np.where(best.numpy() > BELOW_ALL, np.take_along_axis(index, at.numpy(), axis=1), -1)


def _products(query: Tensor, rows: Tensor, index: NDArray[np.int32]) -> NDArray[np.float32]:
    """Inner products of some rows (R, D) with others of given places (C,), these in float32 a part at a time (R, C)."""
    parts = torch.from_numpy(index).split(max(1, _BLOCK_BYTES // (4 * rows.size(1))))
    products = [query @ rows.index_select(0, part).float().T for part in parts]
    return np.asarray(products[0] if len(products) == 1 else torch.cat(products, dim=1))


def _distinct(*parts: NDArray[np.int32]) -> NDArray[np.int32]:
    """The different numbers in some arrays, ascending, without -1."""
    every = np.concatenate([part.ravel() for part in parts])
    every.sort()
    every = every[every.searchsorted(0) :]
    new = np.ones(len(every), dtype=bool)
    np.not_equal(every[1:], every[:-1], out=new[1:])
    return every[new]


def _listing(listed: NDArray[np.int32], pool: Executor) -> NDArray[np.int32]:
    """Some of those that list each row (P, B), for which it is the nearest of all first; -1 for none."""
    listing = np.full((len(listed), _LISTING), -1, dtype=np.int32)
    count: NDArray[np.int64] = np.zeros(len(listed), dtype=np.int64)
    columns = listed.T[:LISTED]
    for column, order in zip(columns, pool.map(_stable_order, columns), strict=True):
        of = column[order]
        order, of = order[of >= 0], of[of >= 0]
        number = np.bincount(of, minlength=len(count))
        rank = count[of] + place_in_group(of, number)
        room = rank < _LISTING
        listing[of[room], rank[room]] = order[room]
        count += number
    return listing


def _stable_order(column: NDArray[np.int32]) -> NDArray[np.int32]:
    return np.argsort(column, kind="stable").astype(np.int32)


def join_bytes(width: int) -> int:
    """About how much memory :func:`join` takes for each row, its result included."""
    return 4 * (2 * width + _LISTING) + _BYTES_PER_ORDERED
