"""Approximate search that says how good it is: its effort is chosen by one sample, its recall measured by another."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import faiss
import numpy as np
from numpy.typing import NDArray

from dream_pyg.errors import SearchError
from dream_pyg.graph.knn.candidates import Candidates
from dream_pyg.graph.knn.clusters import ClusterIndex
from dream_pyg.graph.knn.faiss_indices import FaissEngine, FaissIndex
from dream_pyg.graph.knn.report import Setting
from dream_pyg.graph.knn.rows import Rows, present_unit_rows, some_unit_rows, unit_rows

ApproximateEngine = Literal["clusters"] | FaissEngine

logger = logging.getLogger("dream_pyg")
NUM_CHOOSING = 250
NUM_MEASURED = 400
_BLOCK_BYTES = 64 << 20
_GATHERED_BYTES = 32 << 20
_TIE = 2e-6
"""Cosines that differ by less in float32 are taken as equal."""
_AIM = 0.25
"""Which part of the loss allowed the choice keeps in reserve, for its sample is not the one that is measured."""


class Index(Protocol):
    """Rows prepared for a search whose effort can be chosen."""

    parameters: dict[str, Any]
    order: NDArray[np.int64] | None
    """All rows, similar ones side by side; None if the index knows of no such order."""

    @property
    def settings(self) -> Sequence[Setting]:
        """What can be chosen, in the order of rising effort."""

    def search(self, wanted: NDArray[np.int64], width: int, setting: Setting) -> NDArray[np.int64]:
        """Ids of candidates (Q, M) for the neighbours of some rows (Q,), -1 for none, never the row itself."""


class Approximation(NamedTuple):
    """Candidates of all rows and what is known of them."""

    candidates: Candidates
    parameters: dict[str, Any]
    recall: float
    num_measured: int


def approximate_candidates(
    rows: Rows,
    count: int,
    engine: ApproximateEngine,
    *,
    min_recall: float,
    seed: int = 0,
    what: str = "rows",
) -> Approximation:
    """Candidates for the ``count`` most similar rows of each that hold at least a share of these.

    Two random samples are searched exhaustively. By one the least effort that does is chosen; on the other, which the
    choice has not seen, the recall is measured. If it is too low after all, the effort is raised.

    Args:
        rows: The rows (N, F).
        count: K.
        engine: How to search.
        min_recall: The recall to reach.
        seed: Of samples and k-means.
        what: What the rows are, for the progress bar and errors.

    Raises:
        SearchError: If no effort reaches ``min_recall``.
    """
    choosing, measuring = _samples(rows, count, seed)
    width = max_candidates(engine, count)
    for index in _indices(rows, engine, count, seed, what):
        found, tried = _search(index, rows, width, min_recall, choosing, measuring, what)
        setting, recall = tried[-1]
        if found is not None:
            parameters = {**index.parameters, **setting, "min_recall": min_recall, "seed": seed}
            candidates = _unproven(rows, found, count, index.order)
            return Approximation(candidates, parameters, recall, len(measuring.id))
        del index  # before the next is made
    attempts = "; ".join(f"{_told(setting)}: {recall:.4f}" for setting, recall in tried)
    others = " or ".join(f"--engine {other}" for other in ("clusters", "exact") if other != engine)
    raise SearchError(
        f"{engine} finds {recall:.4f} of the {count} nearest {what}, measured on samples of "
        f"{len(choosing.id):,} and {len(measuring.id):,}; expected a recall of at least {min_recall} "
        f"(tried {attempts}). Choose {others}, or a lower --min-recall."
    )


def measured_recall(rows: Rows, index: NDArray[np.int64], count: int, seed: int = 0) -> tuple[float, int]:
    """The share of the ``count`` most similar rows in the lists of all (N, M), and on how many rows it was measured."""
    query, chosen, at = _drawn(rows, seed)
    sample = _Sample(chosen[at:], _exhaustive(rows, chosen[at:], query[at:], count))
    return sample.recall(rows, index[sample.id]), len(sample.id)


def _indices(rows: Rows, engine: ApproximateEngine, count: int, seed: int, what: str) -> Iterator[Index]:
    """The ways to prepare the rows, each to be tried when the last does not do."""
    if engine != "clusters":
        yield FaissIndex(rows, engine, count=count, seed=seed, what=what)
        return
    yield ClusterIndex(rows, count=count, seed=seed, what=what)
    logger.info("%s: too few are found in half precision; all %d features in float32", what, rows.shape[1])
    yield ClusterIndex(rows, count=count, seed=seed, what=what, fine=True)


def _search(
    index: Index,
    rows: Rows,
    width: int,
    min_recall: float,
    choosing: _Sample,
    measuring: _Sample,
    what: str,
) -> tuple[NDArray[np.int64] | None, list[tuple[Setting, float]]]:
    """Candidates of all rows (N, M) that reach the recall, None if none do; and the settings tried, with the recall."""
    tried: list[tuple[Setting, float]] = []
    wanted = min_recall + _AIM * (1 - min_recall)
    for setting in index.settings:
        if setting is index.settings[-1]:
            wanted = min_recall
        tried.append((setting, choosing.recall(rows, index.search(choosing.id, width, setting))))
        if tried[-1][1] < wanted:
            continue
        found = index.search(np.arange(rows.shape[0]), width, setting)
        tried[-1] = setting, measuring.recall(rows, found[measuring.id])
        if tried[-1][1] >= min_recall:
            return found, tried
        logger.info("%s: recall %.4f with %s, more effort", what, tried[-1][1], _told(setting))
    return None, tried


def _told(setting: Setting) -> str:
    return ", ".join(f"{name} {value}" for name, value in setting.items())


def max_candidates(engine: ApproximateEngine, count: int) -> int:
    """M, how many candidates are kept for ``count`` neighbours, so that coarse scores cannot push these out."""
    if engine == "clusters":
        return count + count // 4 + 2
    return 3 * count + 10 if engine == "ivfpq" else count + count // 2 + 8


@dataclass(frozen=True, eq=False)
class _Sample:
    """Some rows, their true neighbours and how similar these are."""

    id: NDArray[np.int64]  # (S,)
    cosine: NDArray[np.float32]  # (S, K), falling, -inf where there are fewer

    def recall(self, rows: Rows, candidate: NDArray[np.int64]) -> float:
        """The share of the true neighbours that are among candidates (S, M); rows as similar as they count as they."""
        count = self.cosine.shape[1]
        cosine = np.full((len(self.id), max(candidate.shape[1], count)), -np.inf)
        row, slot = np.nonzero(candidate >= 0)
        step = max(1, _GATHERED_BYTES // (8 * rows.shape[1]))
        for first in range(0, len(row), step):
            part = slice(first, first + step)
            left = unit_rows(rows.take_rows(self.id[row[part]]))
            right = unit_rows(rows.take_rows(candidate[row[part], slot[part]]))
            cosine[row[part], slot[part]] = np.einsum("pf,pf->p", left, right)
        found = -np.partition(-cosine, count - 1, axis=1)[:, :count]
        true = np.isfinite(self.cosine)
        last = np.where(true, self.cosine, np.inf).min(axis=1, initial=np.inf, keepdims=True)
        hits = np.minimum((found >= last - _TIE).sum(axis=1), true.sum(axis=1)).sum()
        return float(hits / true.sum()) if true.any() else 1.0


def _samples(rows: Rows, count: int, seed: int) -> tuple[_Sample, _Sample]:
    """Two samples without a common row, none of them of zeros: to choose by and to measure by."""
    query, chosen, at = _drawn(rows, seed)
    cosine = _exhaustive(rows, chosen, query, count)
    return _Sample(chosen[:at], cosine[:at]), _Sample(chosen[at:], cosine[at:])


def _drawn(rows: Rows, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int64], int]:
    """Unit rows of both samples (S, F), their ids (S,), and where the one to measure by begins."""
    query, chosen = some_unit_rows(rows, NUM_CHOOSING + NUM_MEASURED, np.random.default_rng(seed + 2))
    return query, chosen, len(chosen) * NUM_CHOOSING // (NUM_CHOOSING + NUM_MEASURED)


def _exhaustive(rows: Rows, chosen: NDArray[np.int64], query: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    """The highest cosines of some rows with others, in float32 (S, K)."""
    num_rows, num_features = rows.shape
    best = np.full((len(chosen), count), -np.inf, dtype=np.float32)
    step = max(1, _BLOCK_BYTES // (4 * num_features))
    for start in range(0, num_rows, step):
        base, base_id = present_unit_rows(rows, start, start + step)
        if not len(base):
            continue
        score, found = faiss.knn(query, base, min(count + 1, len(base)), metric=faiss.METRIC_INNER_PRODUCT)
        score[base_id[found] == chosen[:, None]] = -np.inf
        best = -np.sort(-np.concatenate([best, score], axis=1), axis=1)[:, :count]
    return best


def _unproven(rows: Rows, found: NDArray[np.int64], count: int, order: NDArray[np.int64] | None) -> Candidates:
    """Lists whose engine vouches for nothing: complete by agreement where they hold K others, and else to be completed.

    ``left_out`` of -inf keeps the ranking from doubting a list, and of inf has the row searched in full.
    """
    num_rows = rows.shape[0]
    step = max(1, _BLOCK_BYTES // (4 * rows.shape[1]))
    short = np.flatnonzero((found >= 0).sum(axis=1) < count)
    left_out = np.full(num_rows, -np.inf, dtype=np.float32)
    for first in range(0, len(short), step):
        part = short[first : first + step]
        left_out[part[rows.take_rows(part).any(axis=1)]] = np.inf
    return Candidates(found, left_out, order)
