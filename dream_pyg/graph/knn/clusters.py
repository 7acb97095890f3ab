r"""All-kNN by small overlapping clusters: rows that share one of their nearest clusters are compared with each other.

Every row is a member of the T clusters whose centroids are nearest to it, and each cluster's members are compared by
one small matrix product. Two rows on both sides of a border are then together on one of them at least: with two to
four clusters of 32 rows, nearly all neighbours are found among a few hundred rows, however many there are. Where that
is too few, lists are joined with those of the rows that they hold.

Rows are compared by their principal components, where half as many as there are features hold nearly all of them, and
in float16; the exact ranking makes good for both. Rows that these cannot tell apart are compared as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dream_pyg.data.arrays import place_in_group
from dream_pyg.data.progress import progress
from dream_pyg.graph.knn.joins import BELOW_ALL, LISTED, join, join_bytes
from dream_pyg.graph.knn.report import Setting
from dream_pyg.graph.knn.rows import Rows, some_unit_rows, unit_rows
from dream_pyg.graph.processor import threads_of_one

_CLUSTER_ROWS = 32
_MOST_CLUSTERS, _MOST_JOINS = 4, 6
_ITERATIONS = 12
_TRAINED_ROWS = 64
"""Of each centroid that k-means makes."""
_UNDIVIDED = 256
"""So many clusters are made at once, and all looked at for each row; more are made in regions, and found by a graph."""
_LINKS, _LINKING_EFFORT = 16, 40
"""Of the graph by which the centroids nearest to a row are found."""
_FINDING_EFFORT = 24
_BYTES_PER_MEMBER = 64
_LARGEST, _FEWEST_DIVIDED = 8, 512
"""Clusters of more than so many times the mean size, or rows, are divided: many equal rows would cost their square."""
_PCA_ROWS = 1 << 11
_KEPT_SHARE = 0.985
"""Of the squared norms, what the principal components have to hold."""
_LEAST_EIGENVALUE = 1e-9
_BLOCK_BYTES = 16 << 20
_BATCH_BYTES = 4 << 20
"""Of the products of clusters that are compared at once, and of their rows."""
_SIZES_TOGETHER = 8
"""Clusters are compared at once if the larger have at most one more than a multiple."""
_FOUND_AT_ONCE = 1 << 16
_COMPARED_AT_ONCE = 1 << 12
"""Of all rows with those for which their clusters are too small."""
_BYTES_PER_THREAD = 64 << 20
_BYTES_PER_LISTED = 24
"""What a member of a list takes while lists are merged."""
_LISTED_BYTES = 512 << 20
"""What the lists of all clusters that are merged at once may take."""


class ClusterIndex:
    """Unit rows, mostly reduced and in float16, in the order of their clusters.

    Args:
        rows: The rows (N, F).
        count: K.
        seed: Of k-means and the rows it is trained on.
        what: What the rows are, for the progress bar.
        fine: Whether rows are compared by all features in float32.
    """

    def __init__(self, rows: Rows, *, count: int, seed: int, what: str, fine: bool = False) -> None:
        self._rows, self._count, self._what = rows, count, what
        self._step = max(1, _BLOCK_BYTES // (4 * rows.shape[1]))
        self._basis = None if fine else self._components(np.random.default_rng(seed))
        reduced, self._id = self._reduce(torch.float32 if fine else torch.float16)
        self._centroid, order = _clusters(reduced, max(_CLUSTER_ROWS, 2 * count), seed + 1)
        self._id = self._id[order]
        self._stored = reduced[torch.from_numpy(order)]
        self._place = np.full(rows.shape[0], -1, dtype=np.int64)
        self._place[self._id] = np.arange(len(self._id))
        self.order: NDArray[np.int64] | None = np.concatenate([self._id, np.flatnonzero(self._place < 0)])
        self._nearest: NDArray[np.int32] = np.empty((0, 0), dtype=np.int32)
        self._members: _Members | None = None
        self._listed: NDArray[np.int32] | None = None
        self._num_joins = 0
        most = self._most_clusters = min(_MOST_CLUSTERS, len(self._centroid))
        self.settings: Sequence[Setting] = [
            {"clusters_of_a_row": clusters, "joins": 0} for clusters in range(min(2, most), most + 1)
        ] + [{"clusters_of_a_row": most, "joins": 1 + join} for join in range(_MOST_JOINS)]
        self.parameters: dict[str, Any] = {
            "clusters": len(self._centroid),
            "components": self._stored.size(1),
            "dtype": str(self._stored.dtype).removeprefix("torch."),
        }

    def search(self, wanted: NDArray[np.int64], width: int, setting: Setting) -> NDArray[np.int64]:
        """Candidates for the neighbours of some rows.

        Args:
            wanted: Their ids (Q,).
            width: M, how many candidates to keep.
            setting: Of how many clusters each row is a member, and how often lists are joined.

        Returns:
            Ids (Q, M), -1 for none.
        """
        place = self._place[wanted]
        present = np.flatnonzero(place >= 0)
        present = present[np.argsort(place[present], kind="stable")]
        result = np.full((len(wanted), width), -1, dtype=np.int64)
        num_lists, joins = setting["clusters_of_a_row"], setting["joins"]
        if joins:
            found = self._joined(max(width, LISTED), joins)[place[present], :width]
        else:
            found = self._in_clusters(place[present], width, num_lists)
        result[present] = self._ids_at(found)
        # A cluster may have fewer members than there are neighbours.
        short = present[(result[present] >= 0).sum(axis=1) < min(self._count, len(self._id) - 1)]
        step = max(1, _BLOCK_BYTES // (4 * _COMPARED_AT_ONCE))
        for first in range(0, len(short), step):
            part = short[first : first + step]
            result[part] = self._ids_at(self._search_all(place[part], width))
        return result

    def _ids_at(self, place: NDArray[Any]) -> NDArray[np.int64]:
        return np.where(place >= 0, self._id[place], -1)

    def _search_all(self, place: NDArray[np.int64], width: int) -> NDArray[np.int64]:
        """The places (Q, M) that score highest for the rows at others (Q,), among all."""
        asked, own = self._stored[torch.from_numpy(place)].float(), torch.from_numpy(place)
        best = torch.full((len(place), width), BELOW_ALL)
        found = torch.full((len(place), width), -1)
        for first in range(0, len(self._stored), _COMPARED_AT_ONCE):
            others = self._stored[first : first + _COMPARED_AT_ONCE].float()
            others_place = torch.arange(first, first + len(others)).expand(len(place), -1)
            score = (asked @ others.T).masked_fill_(others_place == own.unsqueeze(1), BELOW_ALL)
            best, at = torch.cat([best, score], dim=1).topk(width, dim=1)
            found = torch.cat([found, others_place], dim=1).gather(1, at)
        return found.masked_fill_(best <= BELOW_ALL, -1).numpy()

    def _joined(self, width: int, joins: int) -> NDArray[np.int32]:
        """The places (P, L) that each row is found to be near to; further joins go on from those that are done."""
        if self._listed is None or self._num_joins > joins or self._listed.shape[1] != width:
            self._listed, self._num_joins = self._in_clusters(np.arange(len(self._id)), width, self._most_clusters), 0
            self._members = None
        while self._num_joins < joins:
            self._listed = join(self._stored, self._listed, self._what)
            self._num_joins += 1
        return self._listed

    def _in_clusters(self, place: NDArray[np.int64], width: int, num_lists: int) -> NDArray[np.int32]:
        """The places (Q, M) that score highest for the rows at others (Q,), ascending, in any of their clusters."""
        members = self._members_at(num_lists)
        found = np.empty((len(place), width), dtype=np.int32)
        step = max(1, _LISTED_BYTES // (8 * num_lists * width))
        for first in range(0, len(place), step):
            part = slice(first, first + step)
            found[part] = self._compared(members, place[part], width, whole=len(place) == len(self._id))
        return found

    def _compared(self, members: _Members, place: NDArray[np.int64], width: int, *, whole: bool) -> NDArray[np.int32]:
        """What :meth:`_in_clusters` finds for so many rows as memory has room for."""
        num_asked, num_lists = len(place), members.num_lists
        score = torch.full((num_asked, num_lists, width), BELOW_ALL)
        other = torch.full((num_asked, num_lists, width), -1, dtype=torch.int32)
        asked = np.full(len(self._id), -1, dtype=np.int64)
        asked[place] = np.arange(num_asked)

        def compare(clusters: NDArray[np.int64]) -> None:
            row, number = members.of(clusters)
            there = row >= 0
            rows = self._stored[torch.from_numpy(np.where(there, row, 0)).flatten()].float().view(*row.shape, -1)
            product = rows @ rows.mT
            product.masked_fill_(torch.from_numpy(~there).unsqueeze(1), BELOW_ALL)
            product.diagonal(dim1=1, dim2=2).fill_(BELOW_ALL)
            best, at = product.topk(min(width, row.shape[1]), dim=2)
            own = np.nonzero(there & (asked[row] >= 0))
            target, slot = torch.from_numpy(asked[row[own]]), torch.from_numpy(number[own])
            cluster, place = (torch.from_numpy(part) for part in own)
            score[target, slot, : best.size(2)] = best[cluster, place]
            others = torch.from_numpy(row)[cluster.unsqueeze(1), at[cluster, place]]
            other[target, slot, : best.size(2)] = others

        found = torch.empty(num_asked, width, dtype=torch.int32)
        at_once = max(1, _BLOCK_BYTES // (_BYTES_PER_LISTED * num_lists * width))

        def merge(first: int) -> None:
            part = slice(first, first + at_once)
            index, order = other[part].flatten(1).sort(dim=1)
            value = score[part].flatten(1).gather(1, order)
            value[:, 1:][index[:, 1:] == index[:, :-1]] = BELOW_ALL
            best, at = value.topk(width, dim=1)
            found[part] = index.gather(1, at).masked_fill(best <= BELOW_ALL, -1)

        batches = members.batches(np.unique(members.label[place]), self._stored.size(1))
        with threads_of_one() as pool:
            done = pool.map(compare, batches)
            for _ in progress(done, f"kNN of {self._what}", total=len(batches), hidden=not whole):
                pass
            list(pool.map(merge, range(0, num_asked, at_once)))
        return found.numpy()

    def _members_at(self, num_lists: int) -> _Members:
        """The members of each cluster, made once for a trial and the search that follows it."""
        if self._members is None or self._members.num_lists != num_lists:
            self._members = None  # before the next are made
            if not len(self._nearest):
                self._nearest = self._find_nearest(self._most_clusters)
            self._members = _Members(self._nearest[:, :num_lists])
        return self._members

    def _find_nearest(self, count: int) -> NDArray[np.int32]:
        """The clusters whose centroids are nearest to each row (P, T), the nearest first."""
        centroid = self._centroid.numpy()
        index: Any = faiss.IndexFlatL2(centroid.shape[1])
        if len(centroid) > _UNDIVIDED:
            index = faiss.IndexHNSWFlat(centroid.shape[1], _LINKS)
            index.hnsw.efConstruction = _LINKING_EFFORT
            index.hnsw.efSearch = _FINDING_EFFORT
        for one in centroid:  # One after the other, so that the graph does not depend on the number of threads.
            index.add(one[None])
        nearest = np.empty((len(self._id), count), dtype=np.int32)
        starts = range(0, len(nearest), _FOUND_AT_ONCE)
        for start in progress(starts, f"clusters of {self._what}"):
            part = slice(start, start + _FOUND_AT_ONCE)
            rows = self._stored[part].float().numpy()
            found = index.search(rows, count)[1]
            lost = np.flatnonzero((found < 0).any(axis=1))  # as happens where centroids are equal
            if len(lost):
                found[lost] = faiss.knn(rows[lost], centroid, count)[1]
            nearest[part] = found
        return nearest

    def _components(self, generator: np.random.Generator) -> Tensor | None:
        """The directions (F, D) that hold nearly all of the rows; None if that takes more than half as many as F.

        They are found on one half of a sample and judged by the other, of which they know nothing.
        """
        sample = torch.from_numpy(some_unit_rows(self._rows, _PCA_ROWS, generator)[0])
        known, judge = sample[::2].double(), sample[1::2].double()
        values, mixture = torch.linalg.eigh(known @ known.T)
        largest = values.flip(0) > _LEAST_EIGENVALUE * values[-1]
        basis = known.T @ (mixture.flip(1)[:, largest] / values.flip(0)[largest].sqrt())
        held = (judge @ basis).square().sum(dim=0).cumsum(0)
        enough = int((held < _KEPT_SHARE * judge.square().sum()).sum()) + 1
        return basis[:, :enough].float() if enough <= min(len(basis) // 2, basis.size(1)) else None

    def _reduce(self, dtype: torch.dtype) -> tuple[Tensor, NDArray[np.int64]]:
        """The rows that are not zero, unit and reduced (P, D), and their ids (P,)."""
        num_rows, num_features = self._rows.shape
        reduced = torch.empty(num_rows, num_features if self._basis is None else self._basis.size(1), dtype=dtype)
        present: NDArray[np.bool_] = np.empty(num_rows, dtype=bool)

        def reduce(start: int) -> None:
            block = torch.from_numpy(unit_rows(self._rows.take(start, start + self._step), np.float32))
            span = slice(start, start + len(block))
            present[span] = block.any(dim=1).numpy()
            reduced[span] = block if self._basis is None else block @ self._basis

        starts = range(0, num_rows, self._step)
        with threads_of_one() as pool:
            for _ in progress(pool.map(reduce, starts), f"reading {self._what}", total=len(starts)):
                pass
        ids = np.flatnonzero(present)
        return (reduced if len(ids) == num_rows else reduced[torch.from_numpy(ids)]), ids


def _clusters(rows: Tensor, rows_per_cluster: int, seed: int) -> tuple[Tensor, NDArray[np.int64]]:
    """Centroids of clusters (C, D) of rows (P, D), and the rows in an order that has similar ones side by side (P,).

    Many are made within regions, which k-means has made before.
    """
    num_clusters = max(1, len(rows) // rows_per_cluster)
    num_regions = round(num_clusters**0.5) if num_clusters > _UNDIVIDED else 1
    order: NDArray[np.int64] = np.arange(len(rows))
    bounds = np.array([0, len(rows)])
    if num_regions > 1:
        sample = np.random.default_rng(seed).choice(len(rows), _TRAINED_ROWS * num_regions, replace=False)
        centre = _k_means(rows[torch.from_numpy(np.sort(sample))].float(), num_regions, seed)
        region = np.concatenate([_nearest_of(part.float(), centre) for part in rows.split(_FOUND_AT_ONCE)])
        order = np.argsort(region, kind="stable")
        bounds = np.concatenate([[0], np.bincount(region, minlength=num_regions).cumsum()])
    centroids = []
    for first, last in pairwise(bounds):
        if first < last:
            members = rows[torch.from_numpy(order[first:last])].float()
            # A region may have nearly all rows, if these are equal.
            wanted = min(round(len(members) / rows_per_cluster), _LARGEST * -(-num_clusters // num_regions))
            centroids.append(_k_means(members, max(1, wanted), seed))
            within = np.argsort(_nearest_of(members, centroids[-1]), kind="stable")
            order[first:last] = order[first:last][within]
    return torch.cat(centroids), order


def _k_means(rows: Tensor, num_clusters: int, seed: int) -> Tensor:
    """Centroids (C, D) of rows (N, D)."""
    if num_clusters == 1:
        return rows.mean(dim=0, keepdim=True)
    kmeans = faiss.Kmeans(
        rows.size(1),
        num_clusters,
        niter=_ITERATIONS,
        seed=seed,
        min_points_per_centroid=1,
        max_points_per_centroid=_TRAINED_ROWS,
    )
    kmeans.train(rows.numpy())
    return torch.from_numpy(kmeans.centroids)


def _nearest_of(rows: Tensor, centroid: Tensor) -> NDArray[np.int64]:
    """Which of some centroids (C, D) is the nearest to each row (N, D)."""
    return np.asarray(faiss.knn(rows.numpy(), centroid.numpy(), 1)[1][:, 0])


class _Members:
    """Which rows each cluster has, clusters with far more than the mean being divided.

    Args:
        label: The clusters of each row (N, T), the nearest first.

    Attributes:
        label: The same after dividing.
        num_lists: T.
    """

    def __init__(self, label: NDArray[np.int32]) -> None:
        num_rows, self.num_lists = label.shape
        flat = label.ravel()
        order = np.argsort(flat, kind="stable")
        size = np.bincount(flat)
        mean = flat.size // max(1, int(np.count_nonzero(size)))
        parts = -(-size // max(_FEWEST_DIVIDED, _LARGEST * mean))
        of = flat[order]
        rank = place_in_group(of, size)
        divided = (parts.cumsum() - parts)[of] + rank * parts[of] // size[of]
        self.label = np.empty((num_rows, self.num_lists), dtype=np.int32)
        self.label.ravel()[order] = divided
        self._row, self._number = (part.astype(np.int32) for part in np.divmod(order, self.num_lists))
        self._start = np.searchsorted(divided, np.arange(parts.sum() + 1))

    def batches(self, clusters: NDArray[np.int64], num_features: int) -> list[NDArray[np.int64]]:
        """The given clusters, of rows of so many features, in batches of about the same size, the small ones first."""
        size = self._start[clusters + 1] - self._start[clusters]
        order = np.argsort(size, kind="stable")
        clusters, size = clusters[order], size[order]
        batches, first = [], 0
        while first < len(clusters):
            largest = int(size[first]) + max(1, int(size[first]) // _SIZES_TOGETHER)
            fitting = max(1, _BATCH_BYTES // (4 * largest * max(largest, num_features)))
            last = min(first + fitting, int(np.searchsorted(size, largest, side="right")))
            batches.append(clusters[first:last])
            first = last
        return batches

    def of(self, clusters: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """The members of some clusters, ascending, and the rank of the cluster among those near each, both (G, S).

        Where a cluster has fewer members than the largest, -1 follows.
        """
        first, last = self._start[clusters, None], self._start[clusters + 1, None]
        at = first + np.arange((last - first).max())
        there = at < last
        at = np.where(there, at, 0)
        return np.where(there, self._row[at], -1), self._number[at]


def cluster_bytes(num_rows: int, num_features: int, width: int) -> int:
    """About how much memory a :class:`ClusterIndex` of some rows takes, and its search of all of them.

    Rows that need float32 take more.
    """
    length = max(width, LISTED)
    in_clusters = _BYTES_PER_MEMBER * _MOST_CLUSTERS + min(_LISTED_BYTES // num_rows, 8 * _MOST_CLUSTERS * length)
    of_row = 2 * 2 * num_features + 16 + max(in_clusters + 8 * length, join_bytes(length)) + 8 * width
    return num_rows * of_row + torch.get_num_threads() * _BYTES_PER_THREAD
