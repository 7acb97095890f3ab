"""Exact cosine k-nearest neighbours by faiss, in blocks of bounded memory."""

from __future__ import annotations

from collections.abc import Callable

import faiss
import numpy as np

from dream_pyg.data.features import Neighbors
from dream_pyg.data.progress import progress
from dream_pyg.errors import ConfigError

RowSource = Callable[[int, int], np.ndarray]
"""Rows ``start`` to ``stop`` of a matrix as float32 (stop - start, F)."""

_BLOCK_BYTES = 256 << 20


def cosine_knn(
    rows: RowSource, num_rows: int, num_features: int, num_neighbors: int, *, include_self: bool = False, what: str = ""
) -> Neighbors:
    """The most similar rows of each row by cosine, exactly.

    At most two blocks of rows are in memory at a time, and never an (N, N) matrix. Rows of zeros have no direction:
    they get no neighbours and are nobody's neighbour.

    Args:
        rows: Gives any block of the matrix.
        num_rows: N.
        num_features: F.
        num_neighbors: K, how many neighbours a row gets.
        include_self: Whether a row is the first of its own K neighbours (as in FREEDOM) or excluded.
        what: What the rows are, for the progress bar and errors.

    Returns:
        Neighbours (N, K), the most similar first, ties by lower id; ``-1`` fills rows that have fewer.

    Raises:
        ConfigError: If K is not between 1 and N - 1 (N with self).
    """
    limit = num_rows if include_self else num_rows - 1
    if not 1 <= num_neighbors <= limit:
        raise ConfigError(
            f"num_neighbors must be between 1 and {limit} for {num_rows} {what or 'rows'} (got {num_neighbors}). "
            "Choose a smaller number of neighbours."
        )
    # One more than wanted, since self comes back as well and is dropped by id: duplicates may rank before it.
    wanted = num_neighbors + 1
    block = max(1024, _BLOCK_BYTES // (4 * num_features))
    starts = range(0, num_rows, block)
    best_similarity = np.full((num_rows, wanted), -np.inf, dtype=np.float32)
    best_index = np.full((num_rows, wanted), -1, dtype=np.int64)
    for base_start in progress(starts, f"kNN of {what or 'rows'}"):
        base, base_present = _unit_rows(rows, base_start, min(base_start + block, num_rows))
        base_id = base_start + np.flatnonzero(base_present)
        base = base[base_present]
        if not len(base):
            continue
        for start in starts:
            stop = min(start + block, num_rows)
            query, present = (base, base_present) if start == base_start else _present_unit_rows(rows, start, stop)
            if not len(query):
                continue
            similarity, found = faiss.knn(query, base, min(wanted, len(base)), metric=faiss.METRIC_INNER_PRODUCT)
            target = start + np.flatnonzero(present)
            best_similarity[target], best_index[target] = _merge(
                best_similarity[target], best_index[target], similarity, base_id[found], wanted
            )
    return _finish(best_similarity, best_index, num_neighbors, include_self)


def _unit_rows(rows: RowSource, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    block = np.array(rows(start, stop), dtype=np.float32, order="C")
    norm = np.linalg.norm(block, axis=1)
    present = norm > 0
    block[present] /= norm[present, None]
    return block, present


def _present_unit_rows(rows: RowSource, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    block, present = _unit_rows(rows, start, stop)
    return block[present], present


def _merge(
    similarity: np.ndarray, index: np.ndarray, new_similarity: np.ndarray, new_index: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    similarity = np.concatenate([similarity, new_similarity], axis=1)
    index = np.concatenate([index, new_index], axis=1)
    order = _ranking(similarity, index)[:, :count]
    return np.take_along_axis(similarity, order, axis=1), np.take_along_axis(index, order, axis=1)


def _ranking(similarity: np.ndarray, index: np.ndarray) -> np.ndarray:
    return np.lexsort((index, -similarity), axis=1)


def _finish(similarity: np.ndarray, index: np.ndarray, num_neighbors: int, include_self: bool) -> Neighbors:
    own = np.arange(len(index))[:, None]
    present = index[:, :1] >= 0
    similarity = np.where(index == own, np.inf if include_self else -np.inf, similarity)
    if include_self:
        # Self may have been crowded out by duplicates: it takes the last place, then sorts to the first.
        crowded_out = present[:, 0] & ~(index == own).any(axis=1)
        index[crowded_out, -1] = own[crowded_out, 0]
        similarity[crowded_out, -1] = np.inf
    order = _ranking(similarity, index)[:, :num_neighbors]
    similarity, index = np.take_along_axis(similarity, order, axis=1), np.take_along_axis(index, order, axis=1)
    index = np.where(similarity == -np.inf, -1, index)
    similarity = np.where(index == own, 1.0, np.clip(similarity, -1.0, 1.0))
    return Neighbors(index=index, similarity=np.where(index >= 0, similarity, 0.0).astype(np.float32))
