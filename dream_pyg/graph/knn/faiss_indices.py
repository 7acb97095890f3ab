"""The approximate indices of faiss: inverted files, of rows or of product-quantised ones, HNSW and NN-descent.

All work by Euclidean distance, which orders unit rows as their cosine does and, unlike it, survives the centring of
PCA. Rows of many features are first reduced by it, and stored in float16 or in four bits a feature where the index
can; the exact ranking makes good for all that.

Note:
    HNSW and NN-descent insert rows from several threads at once, so that only one thread gives the same lists again.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import faiss
import numpy as np
import torch
from numpy.typing import NDArray

from dream_pyg.data.progress import progress
from dream_pyg.graph.knn.report import Setting
from dream_pyg.graph.knn.rows import Rows, present_unit_rows, some_unit_rows, unit_rows

FaissEngine = Literal["ivf", "ivfpq", "hnsw", "nndescent"]

_BLOCK_BYTES = 32 << 20
_REDUCED_FEATURES = 128
_REDUCED_FROM = 256
_PCA_ROWS = 1 << 12
_IVF_ROWS_PER_LIST = 64
_FAST_SCANNED_ROWS = 1 << 12
"""What the fast scan of faiss notes down for each row and list adds up, so few rows are searched at a time."""
_HNSW_LINKS = 32
_HNSW_BUILD_EFFORT = 80
_DEGREES = (32, 64, 128)
_POOL_BEYOND_DEGREE = 50


class FaissIndex:
    """An index of faiss over unit rows.

    Args:
        rows: The rows (N, F), of which at least 256 are not zero.
        engine: Which index.
        count: K.
        seed: Of the rows that are trained on.
        what: What the rows are, for the progress bar.
    """

    order: NDArray[np.int64] | None = None

    def __init__(self, rows: Rows, engine: FaissEngine, *, count: int, seed: int, what: str) -> None:
        num_rows, num_features = rows.shape
        self._rows, self._engine, self._what = rows, engine, what
        self._step = max(1, _BLOCK_BYTES // (4 * num_features))
        generator = np.random.default_rng(seed)
        self._index: Any = None
        self._reduce: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None
        if num_features > _REDUCED_FROM:
            self._reduce = _pca(some_unit_rows(rows, _PCA_ROWS, generator)[0], seed)
        width = _width(num_features)
        self._id: NDArray[np.int64] = np.zeros(0, dtype=np.int64)  # of each row in the index; rows of zeros are not
        self.parameters: dict[str, Any] = {"features": width}
        self.settings: list[Setting]
        if engine == "nndescent":
            degrees = [degree for degree in _DEGREES if degree >= count] or [2 * count]
            self.settings = [{"degree": degree} for degree in degrees]
            self._graph: tuple[int, NDArray[np.int64]] = (0, np.zeros((0, 0), dtype=np.int64))
            return
        if engine in ("ivf", "ivfpq"):
            num_lists = max(1, min(round(2 * num_rows**0.5), num_rows // 40))
            self.settings = [{"nprobe": 2**power} for power in range(int(math.log2(num_lists)))]
            self.settings.append({"nprobe": num_lists})
            stored = "SQfp16" if engine == "ivf" else f"PQ{width}x4fs"
            self._index = faiss.index_factory(width, f"IVF{num_lists},{stored}")
            self._index.cp.seed = seed + 1
            self._index.cp.min_points_per_centroid = 1  # else faiss prints that there are few; the recall is measured
            self.parameters |= {"lists": num_lists}
            self._index.train(self._sample(generator, _IVF_ROWS_PER_LIST * num_lists))
        else:
            first = 1 << (2 * count).bit_length()
            self.settings = [{"efSearch": first * 2**power} for power in range(7)]
            self._index = faiss.index_factory(width, f"HNSW{_HNSW_LINKS}_SQfp16")
            self._index.hnsw.efConstruction = _HNSW_BUILD_EFFORT
            self.parameters |= {"links": _HNSW_LINKS, "efConstruction": _HNSW_BUILD_EFFORT}
            self._index.train(self._sample(generator, _PCA_ROWS))
        self._add(self._index)

    def search(self, wanted: NDArray[np.int64], width: int, setting: Setting) -> NDArray[np.int64]:
        """Candidates for the neighbours of some rows.

        Args:
            wanted: Their ids (Q,).
            width: M, how many candidates are wanted.
            setting: One of :attr:`settings`.

        Returns:
            Ids (Q, M), -1 for none.
        """
        if self._engine == "nndescent":
            return self._neighbors(setting["degree"])[wanted, :width]
        if self._engine in ("ivf", "ivfpq"):
            self._index.nprobe = setting["nprobe"]
        else:
            self._index.hnsw.efSearch = setting["efSearch"]
        result = np.full((len(wanted), width), -1, dtype=np.int64)
        step = min(self._step, _FAST_SCANNED_ROWS) if self._engine == "ivfpq" else self._step
        starts = range(0, len(wanted), step)
        for start in progress(starts, f"kNN of {self._what}") if len(wanted) == self._rows.shape[0] else starts:
            ids = wanted[start : start + step]
            block = unit_rows(self._rows.take_rows(ids), np.float32)
            present = block.any(axis=1)
            found = self._index.search(self._project(block[present]), width + 1)[1]
            found = np.where(found >= 0, self._id[found], -1)
            found[found == ids[present, None]] = -1
            order = np.argsort(found < 0, axis=1, kind="stable")[:, :width]
            result[start + np.flatnonzero(present)] = np.take_along_axis(found, order, axis=1)
        return result

    def _neighbors(self, degree: int) -> NDArray[np.int64]:
        """The graph of NN-descent: neighbours by id (N, degree), without self."""
        if self._graph[0] != degree:
            index = faiss.IndexNNDescentFlat(self.parameters["features"], degree, faiss.METRIC_L2)
            index.nndescent.L = degree + _POOL_BEYOND_DEGREE
            self._add(index)
            found = faiss.vector_to_array(index.nndescent.final_graph).reshape(len(self._id), degree)
            neighbors = np.full((self._rows.shape[0], degree), -1, dtype=np.int64)
            neighbors[self._id] = np.where(found >= 0, self._id[found], -1)
            self._graph = degree, neighbors
        return self._graph[1]

    def _add(self, index: Any) -> None:
        """Add all rows but those of zeros; NN-descent wants them all at once."""
        num_rows = self._rows.shape[0]
        ids, held = [], []
        for start in progress(range(0, num_rows, self._step), f"{self._engine} index of {self._what}"):
            present, present_id = present_unit_rows(self._rows, start, start + self._step)
            ids.append(present_id)
            projected = self._project(present)
            if self._engine == "nndescent":
                held.append(projected)
            elif len(present):
                index.add(projected)
        self._id = np.concatenate(ids)
        if held:
            index.add(np.concatenate(held))

    def _sample(self, generator: np.random.Generator, size: int) -> NDArray[np.float32]:
        return some_unit_rows(self._rows, size, generator, self._project)[0]

    def _project(self, block: NDArray[np.float32]) -> NDArray[np.float32]:
        if self._reduce is None:
            return np.ascontiguousarray(block)
        directions, centre = self._reduce
        return block @ directions - centre


def faiss_bytes(engine: FaissEngine, num_rows: int, num_features: int) -> int:
    """About how much memory a :class:`FaissIndex` of some rows takes, beside the candidates."""
    width = _width(num_features)
    num_trained = max(_PCA_ROWS, _IVF_ROWS_PER_LIST * 2 * round(num_rows**0.5))
    training = 4 * (num_features * min(num_rows, _PCA_ROWS) + width * min(num_rows, num_trained))
    per_row = {
        "ivf": 2 * width + 16,
        "ivfpq": width // 2 + 16,
        "hnsw": 2 * width + 4 * (2 * _HNSW_LINKS + 16),
        # rows twice, for all are added at once; a pool of neighbours with distances; the graph in two forms
        "nndescent": 2 * 4 * width + 24 * (_DEGREES[1] + _POOL_BEYOND_DEGREE) + 16 * _DEGREES[1],
    }[engine]
    return num_rows * per_row + training


def _width(num_features: int) -> int:
    return _REDUCED_FEATURES if num_features > _REDUCED_FROM else num_features


def _pca(sample: NDArray[np.float32], seed: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Principal directions (F, D), rotated at random for even components, and the projected mean (D,).

    By a randomised decomposition: that of faiss takes minutes where rows have thousands of features.
    """
    rows = torch.from_numpy(sample)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        directions = torch.pca_lowrank(rows, _REDUCED_FEATURES)[2]
        directions = directions @ torch.linalg.qr(torch.randn(2 * [directions.size(1)])).Q
    return directions.numpy(), (rows.mean(dim=0) @ directions).numpy()
