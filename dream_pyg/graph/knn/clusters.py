r"""All-kNN by clusters: k-means, then every cluster against all rows that are near it, by one matrix product.

This is an inverted file turned round. A row is looked for in the p clusters whose centroids are nearest to it; since
all rows ask, a cluster is multiplied with all the rows that come to it at once, and nothing is looked up one by one.

A score in bfloat16 has eight bits. Two more columns subtract each row's cut, the lowest score in its list so far,
within the product and before it is rounded: the bits are spent on the difference, and whatever can enter the list is
positive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dream_pyg.data.progress import progress
from dream_pyg.graph.knn.rows import Rows, unit_rows

_CLUSTERS_PER_SQRT = 2.0
"""Twice the square root of N: about where assigning rows to clusters costs as much as searching these."""
_ITERATIONS = 8
_TRAINING_ROWS_PER_CLUSTER = 48
_LARGEST = 4
"""Clusters of more than this many times the mean size are divided, so that many equal rows do not cost their square."""
_FEWEST_DIVIDED = 512
_QUERIES_AT_ONCE = 1 << 16
_TILE_SCORES = 1 << 20
_BLOCK_BYTES = 16 << 20
_COLUMN_ALIGNMENT = 32
_COARSE = 2.0**-8
"""By how much a cosine may be wrong in bfloat16."""
_FINE = 2.0**-14
"""About what rounding of the rows does to a cosine. Without it, rows that are equal would displace each other."""
_BELOW_ALL = -2.0
"""Less than any cosine."""


class ClusterIndex:
    """Unit rows in low precision, ordered by cluster: 2 bytes a feature.

    Args:
        rows: The rows (N, F).
        dtype: In which to multiply: ``torch.bfloat16``, or ``torch.float32`` (rows are then kept in float16).
        seed: Of k-means and the rows it is trained on.
        what: What the rows are, for the progress bar.
    """

    effort_name = "clusters_searched"

    def __init__(self, rows: Rows, *, dtype: torch.dtype, seed: int, what: str) -> None:
        self._num_rows, self._num_features = rows.shape
        self._rows, self._dtype, self._what = rows, dtype, what
        self._step = max(1, _BLOCK_BYTES // (4 * self._num_features))
        centroid = self._train(seed)
        label = self._assign(torch.from_numpy(centroid).to(dtype))
        present = np.flatnonzero(label >= 0)
        self._id = present[np.argsort(label[present], kind="stable")]
        self._place = np.full(self._num_rows, -1, dtype=np.int64)
        self._place[self._id] = np.arange(len(self._id))
        self._start, centroid = _divide(np.bincount(label[present], minlength=len(centroid)), centroid)
        self._centroid = torch.from_numpy(centroid).to(dtype)
        self._stored = self._store()
        self.parameters: dict[str, Any] = {"clusters": len(centroid), "dtype": str(dtype).removeprefix("torch.")}

    @property
    def efforts(self) -> Sequence[int]:
        """How many clusters a row can be looked for in: in all of them, the search is exhaustive."""
        return range(1, len(self._centroid) + 1)

    def guess(self, wanted: NDArray[np.int64], nearest: NDArray[np.int64], recall: float) -> int:
        """The effort at which a share of the true neighbours (Q, K) of some rows (Q,) are in clusters looked in."""
        place = self._place[wanted]
        score = self._take(place)[:, : self._num_features] @ self._centroid.T
        own, theirs = (torch.from_numpy(self._cluster_of(where)) for where in (place, self._place[nearest]))
        rank = (-score.float()).argsort(dim=1, stable=True).argsort(dim=1, stable=True)
        needed = rank.gather(1, theirs.clamp(min=0)) + 1
        needed[theirs == own[:, None]] = 1
        needed = needed[torch.from_numpy(nearest >= 0)].sort().values
        return int(needed[min(int(recall * len(needed)), len(needed) - 1)]) if len(needed) else 1

    def search(self, wanted: NDArray[np.int64], count: int, width: int, effort: int) -> NDArray[np.int64]:
        """Candidates for the neighbours of some rows.

        Args:
            wanted: Their ids (Q,).
            count: K; rows that have found fewer are looked for in more clusters.
            width: M, how many candidates to keep.
            effort: In how many clusters to look.

        Returns:
            Ids (Q, M), the likeliest first, -1 for none.
        """
        result = np.full((len(wanted), width), -1, dtype=np.int64)
        order = np.argsort(self._place[wanted], kind="stable")
        order = order[np.searchsorted(self._place[wanted[order]], 0) :]  # without rows of zeros
        blocks = [order[start : start + _QUERIES_AT_ONCE] for start in range(0, len(order), _QUERIES_AT_ONCE)]

        def search(block: NDArray[np.int64]) -> None:
            result[block] = self._search_block(self._place[wanted[block]], count, width, effort)

        with _threads_of_one() as pool:
            done = pool.map(search, blocks)
            for _ in progress(done, f"kNN of {self._what}", total=len(blocks)):
                pass
        return result

    def _search_block(self, place: NDArray[np.int64], count: int, width: int, effort: int) -> NDArray[np.int64]:
        lists = _Lists(len(place), width)
        own = self._cluster_of(place)
        active = np.arange(len(place))
        while len(active):
            for cluster, query in _grouped(own[active]):
                self._visit(lists, place, active[query], cluster, first=True)
            near = self._nearest(place[active], min(effort, len(self._centroid)))
            row, slot = np.nonzero(near != own[active, None])
            for cluster, pair in _grouped(near[row, slot]):
                self._visit(lists, place, active[row[pair]], cluster)
            if effort >= len(self._centroid):
                break
            active = active[lists.score[active, count - 1].numpy() == -np.inf]
            effort *= 2
            lists.clear(active)
        return np.where(lists.score.numpy() > -np.inf, self._id[lists.place.numpy()], -1)

    def _cluster_of(self, place: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.searchsorted(self._start, place, side="right") - 1

    def _nearest(self, place: NDArray[np.int64], effort: int) -> NDArray[np.int64]:
        """The clusters whose centroids are nearest to some rows (Q, effort)."""
        near: NDArray[np.int64] = np.empty((len(place), effort), dtype=np.int64)
        step = max(1, _TILE_SCORES // len(self._centroid))
        for first in range(0, len(place), step):
            query = self._take(place[first : first + step])[:, : self._num_features]
            near[first : first + step] = (query @ self._centroid.T).topk(effort, dim=1).indices.numpy()
        return near

    def _visit(
        self, lists: _Lists, place: NDArray[np.int64], query: NDArray[np.int64], cluster: int, *, first: bool = False
    ) -> None:
        """Compare some rows with a cluster, for the first time with their own."""
        span = slice(int(self._start[cluster]), int(self._start[cluster + 1]))
        columns = self._stored[span].to(self._dtype)
        step = max(1, _TILE_SCORES // max(1, len(columns)))
        for begin in range(0, len(query), step):
            part = query[begin : begin + step]
            left = self._take(place[part])
            row = torch.from_numpy(part)
            own = torch.from_numpy(place[part] - span.start) if first else None
            if own is not None and len(columns) > lists.width:
                left[:, self._num_features :] = 0
                score = (left @ columns.T).float()
                score[torch.arange(len(part)), own] = _BELOW_ALL
                lists.cut[row] = score.topk(lists.width, dim=1).values[:, -1] - _COARSE
            cut = lists.cut[row]
            high = cut.to(self._dtype)
            low = (cut - high).to(self._dtype)
            left[:, self._num_features], left[:, self._num_features + 1] = -high, -low
            score = left @ columns.T
            if own is not None:
                score[torch.arange(len(part)), own] = -1
            lists.merge(row, _positive(score), score, high.float() + low.float(), span.start)

    def _take(self, place: NDArray[np.int64]) -> Tensor:
        return self._stored[torch.from_numpy(place)].to(self._dtype)

    def _train(self, seed: int) -> NDArray[np.float32]:
        num_clusters = max(1, round(_CLUSTERS_PER_SQRT * self._num_rows**0.5))
        num_trained = min(self._num_rows, _TRAINING_ROWS_PER_CLUSTER * num_clusters)
        chosen = np.sort(np.random.default_rng(seed).choice(self._num_rows, num_trained, replace=False))
        sample = np.empty((num_trained, self._num_features), dtype=np.float32)
        for first in range(0, num_trained, self._step):
            part = slice(first, first + self._step)
            sample[part] = unit_rows(self._rows.take_rows(chosen[part]), np.float32)
        sample = sample[sample.any(axis=1)]
        if len(sample) <= num_clusters:  # few rows, or nearly nothing but rows of zeros
            return sample if len(sample) else np.eye(1, self._num_features, dtype=np.float32)
        kmeans = faiss.Kmeans(
            self._num_features,
            num_clusters,
            niter=_ITERATIONS,
            seed=seed + 1,
            spherical=True,
            min_points_per_centroid=1,
            max_points_per_centroid=_TRAINING_ROWS_PER_CLUSTER,
        )
        kmeans.train(sample)
        return np.asarray(kmeans.centroids)

    def _for_blocks(self, work: Callable[[slice, Tensor], None], description: str) -> None:
        """Give blocks of unit rows to some threads."""

        def load(start: int) -> None:
            block = unit_rows(self._rows.take(start, start + self._step), np.float32)
            work(slice(start, start + len(block)), torch.from_numpy(block))

        starts = range(0, self._num_rows, self._step)
        with _threads_of_one() as pool:
            for _ in progress(pool.map(load, starts), f"{description} {self._what}", total=len(starts)):
                pass

    def _assign(self, centroid: Tensor) -> NDArray[np.int64]:
        """The cluster of each row (N,), -1 for rows of zeros."""
        label = np.empty(self._num_rows, dtype=np.int64)

        def work(span: slice, block: Tensor) -> None:
            nearest = (block.to(self._dtype) @ centroid.T).argmax(dim=1)
            label[span] = torch.where(block.any(dim=1), nearest, -1).numpy()

        self._for_blocks(work, "clusters of")
        return label

    def _store(self) -> Tensor:
        """The rows by cluster, with the columns that meet the cut."""
        padded = -(-(self._num_features + 2) // _COLUMN_ALIGNMENT) * _COLUMN_ALIGNMENT
        dtype = torch.bfloat16 if self._dtype == torch.bfloat16 else torch.float16
        stored = torch.zeros(len(self._id), padded, dtype=dtype)
        stored[:, self._num_features : self._num_features + 2] = 1

        def work(span: slice, block: Tensor) -> None:
            place = torch.from_numpy(self._place[span])
            present = place >= 0
            stored[place[present], : self._num_features] = block[present].to(dtype)

        self._for_blocks(work, "reading")
        return stored


class _Lists:
    """The best scores of some rows so far (Q, M), falling, and whose they are."""

    def __init__(self, num_queries: int, width: int) -> None:
        self.width = width
        self.score = torch.full((num_queries, width), -torch.inf)
        self.place = torch.zeros((num_queries, width), dtype=torch.int32)
        self.cut = torch.full((num_queries,), _BELOW_ALL)

    def clear(self, row: NDArray[np.int64]) -> None:
        """Forget what some rows have found."""
        self.score[row] = -torch.inf
        self.cut[row] = _BELOW_ALL

    def merge(self, row: Tensor, position: NDArray[np.int64], score: Tensor, shift: Tensor, first: int) -> None:
        """Put scores (R, C) at some positions, ascending, into the lists of some rows (R,).

        Args:
            row: The rows.
            position: Which scores, in flattened form.
            score: Scores less the shift.
            shift: What was subtracted from each row's scores (R,).
            first: The place of the first column.
        """
        line, column = np.divmod(position, score.size(1))
        changed, begin, size = np.unique(line, return_index=True, return_counts=True)
        if not len(changed):
            return
        old = row[torch.from_numpy(changed)]
        width = self.width
        joined = torch.full((len(changed), width + int(size.max())), -torch.inf)
        joined_place = torch.zeros(joined.shape, dtype=torch.int32)
        joined[:, :width], joined_place[:, :width] = self.score[old], self.place[old]
        target = torch.from_numpy(np.repeat(np.arange(len(changed)), size))
        slot = torch.from_numpy(np.arange(len(line)) - np.repeat(begin - width, size))
        joined[target, slot] = score.view(-1)[torch.from_numpy(position)].float() + shift[torch.from_numpy(line)]
        joined_place[target, slot] = torch.from_numpy((column + first).astype(np.int32))
        best, taken = joined.topk(width, dim=1)
        self.score[old] = best
        self.place[old] = joined_place.gather(1, taken)
        self.cut[old] = torch.maximum(self.cut[old], best[:, -1] + _FINE)


def cluster_bytes(num_rows: int, num_features: int, width: int) -> int:
    """About how much memory a :class:`ClusterIndex` of some rows takes, and its search of all of them."""
    num_clusters = _CLUSTERS_PER_SQRT * num_rows**0.5
    training = 2 * 4 * num_features * min(num_rows, _TRAINING_ROWS_PER_CLUSTER * num_clusters)
    stored = num_rows * (2 * (num_features + _COLUMN_ALIGNMENT) + 24)
    return int(
        max(training, stored + 16 * width * min(num_rows, _QUERIES_AT_ONCE * torch.get_num_threads()))
        + 8 * num_rows * width
    )


def _divide(size: NDArray[np.int64], centroid: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Divide clusters far larger than the mean, and drop empty ones: beginnings (C + 1,) and centroids (C, F)."""
    limit = max(_LARGEST * int(size.mean()), _FEWEST_DIVIDED)
    parts = -(-size // limit)
    end = size.cumsum()
    bounds = [np.linspace(last - number, last, part, endpoint=False, dtype=np.int64)
              for number, last, part in zip(size, end, parts, strict=True)]  # fmt: skip
    return np.concatenate([*bounds, end[-1:]]), np.repeat(centroid, parts, axis=0)


def _grouped(label: NDArray[Any]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Each label that occurs and where."""
    order = np.argsort(label, kind="stable")
    values, start = np.unique(label[order], return_index=True)
    for value, where in zip(values, np.split(order, start[1:]), strict=True) if len(values) else ():
        yield int(value), where


@contextmanager
def _threads_of_one() -> Iterator[ThreadPoolExecutor]:
    """As many threads as PyTorch has, each of which computes alone.

    Results do not depend on their number, and no thread waits for the others after every step.
    """
    num_threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(num_threads)  # PyTorch also keeps the number for threads to come.


def _positive(score: Tensor) -> NDArray[np.int64]:
    """Where a matrix is positive, in its flattened form."""
    # The bits of a positive bfloat16 are those of a positive int16, which NumPy compares many times as fast.
    bits = score.view(torch.int16) if score.dtype == torch.bfloat16 else score
    return np.flatnonzero(bits.numpy() > 0)
