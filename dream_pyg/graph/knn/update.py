"""Neighbours of rows that have changed a little: old lists are kept where nothing can have changed.

A row whose features changed is searched among all rows, and so is one that lost a neighbour from its list. Any other
row keeps its list, into which those of the changed rows come that are similar enough. All that is exact: a list that
lacked nothing lacks nothing then, and one that did finds no fewer than before.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dream_pyg import ranks
from dream_pyg.data.features import Neighbors
from dream_pyg.data.progress import progress
from dream_pyg.graph.knn import check_num_neighbors, cosine_knn
from dream_pyg.graph.knn.approximate import measured_recall
from dream_pyg.graph.knn.candidates import CandidateBlocks, CandidateLists, Candidates
from dream_pyg.graph.knn.choice import EXACT, ChosenEngine
from dream_pyg.graph.knn.refine import as_neighbors, nearest_of
from dream_pyg.graph.knn.report import FoundNeighbors, SearchReport
from dream_pyg.graph.knn.rows import Rows, unit_rows

_BLOCK_BYTES = 48 << 20
_ROUNDING = 2.0**-15
"""Many times what a cosine in float32 is wrong by."""
_LARGEST_SHARE = 0.25
"""Of rows to search: a search of all costs no more, for it multiplies each pair once and in lower precision."""
_MOST_ROWS = 5_000
"""To search where an approximate engine could search all: it takes about as long as to compare so many with all."""


class Known(NamedTuple):
    """Neighbours that were found before: of M rows, some of which are still there."""

    neighbors: Neighbors
    rows: Rows  # (M, F)
    old_id: NDArray[np.int64]  # (N,) what each of the rows of today was then, -1 for a new one
    complete: bool = True  # whether no neighbour was left out


class Updated(NamedTuple):
    """The neighbours of today, and what it took to find them."""

    neighbors: FoundNeighbors
    num_changed: int
    num_searched: int
    reason: str
    """Why all rows were searched, or empty."""

    @property
    def num_rows(self) -> int:
        """N."""
        return len(self.neighbors.index)


def update_knn(
    rows: Rows,
    num_neighbors: int,
    known: Known,
    *,
    include_self: bool,
    what: str,
    engine: ChosenEngine = "exact",
    min_recall: float = 0.98,
) -> Updated:
    """The neighbours that :func:`~dream_pyg.graph.knn.cosine_knn` finds, from those of an earlier state of the rows.

    From complete lists they become complete lists. From others, of which neighbours may be missing, as many are
    missing at most, and the recall is measured; where it is too low, all rows are searched.

    Args:
        rows: The rows (N, F).
        num_neighbors: K, as of the known neighbours.
        known: What was found before.
        include_self: As for the known neighbours.
        what: What the rows are, for progress and errors.
        engine: What searches all rows if that is faster, or needed to leave none out.
        min_recall: The share of the true neighbours that an approximate engine has to find at least.

    Raises:
        ConfigError: If K is not between 1 and N - 1 (N with self).
        SearchError: If an engine cannot reach ``min_recall``, or memory does not suffice for it.
    """
    started = time.perf_counter()
    exactly = engine in EXACT
    count = check_num_neighbors(rows, num_neighbors, include_self, what)
    old_id = known.old_id
    changed = _changed(rows, known)
    # What each old row is now; one place more, so that the padding -1 maps to itself.
    new_id = np.full(known.rows.shape[0] + 1, -1, dtype=np.int64)
    new_id[old_id[~changed]] = np.flatnonzero(~changed)
    old_index = np.where(changed[:, None], -1, known.neighbors.index[old_id])[:, include_self:]
    index = new_id[old_index]
    searched = changed | ((index < 0) & (old_index >= 0)).any(axis=1)
    num_searched, num_changed = int(searched.sum()), int(changed.sum())

    def search_all(reason: str) -> Updated:
        neighbors = cosine_knn(
            rows, num_neighbors, include_self=include_self, engine=engine, min_recall=min_recall, what=what
        )
        return Updated(neighbors, num_changed, len(searched), reason)

    if exactly and not known.complete:
        return search_all("the earlier lists may lack neighbours")
    if (np.diff(old_id[~changed]) < 0).any():
        return search_all("the order of ids, which decides ties, is another")
    most = _LARGEST_SHARE * len(searched)
    if num_searched > (most if exactly else min(most, _MOST_ROWS)):
        return search_all(f"{num_searched:,} of {len(searched):,} rows would have to be searched one by one")
    similarity = np.where(searched[:, None], 0, known.neighbors.similarity[old_id][:, include_self:]).astype(np.float32)
    if num_searched and count:
        found = _search(rows, changed, searched, np.where(index >= 0, similarity, -np.inf), count, what)
        similarity, index = _join(rows, found, searched, similarity, index)
    report = SearchReport("exact" if known.complete and not exactly else engine, {"searched": num_searched})
    if not known.complete:
        recall, num_measured = measured_recall(rows, index, count)
        report = replace(report, recall=recall, num_measured=num_measured)
        if report.recall < min_recall:
            return search_all(f"a recall of {report.recall:.4f} is below {min_recall}")
    neighbors = as_neighbors(rows, similarity, index, include_self=include_self)
    report = replace(report, seconds=time.perf_counter() - started)
    return Updated(FoundNeighbors(neighbors.index, neighbors.similarity, report), num_changed, num_searched, "")


def _changed(rows: Rows, known: Known) -> NDArray[np.bool_]:
    """Which rows are not what they were (N,)."""
    if rows.shape[1] != known.rows.shape[1]:
        return np.ones(rows.shape[0], dtype=bool)
    changed = known.old_id < 0
    step = max(1, _BLOCK_BYTES // (4 * rows.shape[1]))
    for start in range(0, len(changed), step):
        here = slice(start, start + step)
        there = np.flatnonzero(~changed[here])
        before = known.rows.take_rows(known.old_id[here][there])
        changed[here][there] = (rows.take(start, start + step)[there] != before).any(axis=1)
    return changed


def _search(
    rows: Rows,
    changed: NDArray[np.bool_],
    searched: NDArray[np.bool_],
    known: NDArray[np.float32],
    count: int,
    what: str,
) -> CandidateLists:
    """Candidates among all rows for those that are searched, and among the changed rows for the others.

    Args:
        rows: The rows (N, F).
        changed: Which rows have changed (N,).
        searched: Which rows are searched, the changed ones among them (N,).
        known: Cosines with the neighbours that a row is known to have (N, K), -inf for none.
        count: K.
        what: What the rows are.
    """
    num_rows, num_features = rows.shape
    lists = CandidateLists(num_rows, count, _error, torch.device("cpu"))
    others = torch.from_numpy(np.flatnonzero(~searched))
    lists.raise_cut(others, torch.from_numpy(known)[others, count - 1])
    of_others = torch.from_numpy(~searched)
    step = max(256, _BLOCK_BYTES // (8 * num_features))
    wanted = np.flatnonzero(searched)
    parts = range(0, len(wanted), step)
    for start in progress(range(0, num_rows, step), f"kNN of {len(wanted):,} {what}", hidden=not ranks.speaks()):
        base = torch.from_numpy(unit_rows(rows.take(start, start + step))).float()
        absent = ~base.any(dim=1)
        columns = slice(start, start + len(base))
        for part in parts:
            ids = torch.from_numpy(wanted[part : part + step])
            query = torch.from_numpy(unit_rows(rows.take_rows(ids.numpy()))).float()
            score = query @ base.T
            score[:, absent] = -torch.inf
            score[~query.any(dim=1)] = -torch.inf
            score[ids[:, None] == torch.arange(start, start + len(base))] = -torch.inf
            if start == 0 and len(base) >= count:  # A first cut, for rows that know nobody yet.
                lists.raise_cut(ids, score.topk(count, dim=1).values[:, -1])
            row, column = _above(score, lists.cut[ids][:, None])
            lists.add(ids[row], column + start, score[row, column])
            new = torch.from_numpy(changed)[ids][:, None] & of_others[columns]
            row, column = _above(score.masked_fill(~new, -torch.inf), lists.cut[columns])
            lists.add(column + start, ids[row], score[row, column])
    return lists


def _error(row: Tensor | slice, score: Tensor) -> Tensor:
    return torch.full_like(score, _ROUNDING)


def _above(score: Tensor, cut: Tensor) -> tuple[Tensor, Tensor]:
    row, column = ((score >= cut) & (score > -torch.inf)).nonzero().T
    return row, column


@dataclass(frozen=True, eq=False)
class _Joined:
    """What was found, for rows that were not searched but found something together with the neighbours they had."""

    found: CandidateBlocks
    searched: NDArray[np.bool_]  # (N,)
    known: NDArray[np.int64]  # (N, K)

    @property
    def width(self) -> int:
        return self.found.width + self.known.shape[1]

    @property
    def order(self) -> None:
        """None, for any will do."""

    def block(self, rows: slice | NDArray[np.int64]) -> Candidates:
        found, searched = self.found.block(rows), self.searched[rows]
        some = (found.index >= 0).any(axis=1)
        known = np.where((some & ~searched)[:, None], self.known[rows], -1)
        return Candidates(
            np.concatenate([found.index, known], axis=1),
            np.where(some | searched, found.left_out, np.float32(-np.inf)),
        )


def _join(
    rows: Rows,
    found: CandidateBlocks,
    searched: NDArray[np.bool_],
    similarity: NDArray[np.float32],
    index: NDArray[np.int64],
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Rank what was found; rows that were not searched and found nothing keep what they had (N, K)."""
    now_similarity, now_index = nearest_of(rows, _Joined(found, searched, index), index.shape[1])
    ranked_anew = (searched | (now_index[:, 0] >= 0))[:, None]
    return np.where(ranked_anew, now_similarity, similarity), np.where(ranked_anew, now_index, index)
