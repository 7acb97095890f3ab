"""The reference: faiss compares every row with every other in float32."""

from __future__ import annotations

import faiss
import numpy as np

from dream_pyg.data.progress import progress
from dream_pyg.graph.knn.candidates import Candidates
from dream_pyg.graph.knn.rows import Rows, present_unit_rows

_BLOCK_BYTES = 96 << 20
_ROUNDING = 1e-6
"""Many times what a cosine in float32 was ever seen to be wrong by."""


def flat_candidates(rows: Rows, count: int, *, what: str = "rows") -> Candidates:
    """The ``count`` most similar rows of each by ``faiss.knn``, in blocks of bounded memory.

    Args:
        rows: The rows (N, F).
        count: How many neighbours are wanted; one more is searched, so that ties at the last place show.
        what: What the rows are, for the progress bar.
    """
    num_rows, num_features = rows.shape
    wanted = count + 2  # Self is dropped by its id, for duplicates may rank before it.
    best = np.full((num_rows, wanted), -np.inf, dtype=np.float32)
    index = np.full((num_rows, wanted), -1, dtype=np.int64)
    step = max(1024, _BLOCK_BYTES // (4 * num_features))
    starts = range(0, num_rows, step)
    for base_start in progress(starts, f"kNN of {what}"):
        base, base_id = present_unit_rows(rows, base_start, base_start + step)
        for start in starts:
            query, target = (base, base_id) if start == base_start else present_unit_rows(rows, start, start + step)
            if not len(query) or not len(base):
                continue
            score, found = faiss.knn(query, base, min(wanted, len(base)), metric=faiss.METRIC_INNER_PRODUCT)
            joined = np.concatenate([best[target], score], axis=1)
            joined_index = np.concatenate([index[target], base_id[found]], axis=1)
            order = np.argsort(-joined, axis=1, kind="stable")[:, :wanted]
            best[target] = np.take_along_axis(joined, order, axis=1)
            index[target] = np.take_along_axis(joined_index, order, axis=1)
    left_out = best[:, -1] + _ROUNDING  # -inf where the list has room left, for then it holds all there are
    own = index == np.arange(num_rows)[:, None]
    order = np.argsort(own, axis=1, kind="stable")  # Self goes last.
    return Candidates(np.take_along_axis(np.where(own, -1, index), order, axis=1), left_out)
