"""The searches that are compared, each as a function from rows to a search of adjustable effort.

An engine is given the raw rows and has to do whatever it needs: converting to float32, scaling to norm 1 and building
an index all count as its time, and copies of the rows as its memory. Packages are imported by the engine that needs
them, in the process that measures it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dream_pyg.errors import ConfigError, did_you_mean
from dream_pyg.graph.knn import Rows, cosine_knn
from dream_pyg.graph.knn.choice import APPROXIMATE
from dream_pyg.graph.knn.rows import unit_rows
from dream_pyg.graph.processor import available_bytes

Setting = Mapping[str, Any]
Search = Callable[[Any], NDArray[np.int64] | None]
"""From an effort to neighbours (N, K); None if it finds none."""
Build = Callable[[Rows, int, Setting, int], Search]
"""From rows, K, a setting and a number of threads to a search."""

_BLOCK_ROWS = 4096
_SCORE_ELEMENTS = 1 << 25
_NNDESCENT_OVERHANG = 50  # of the list that is refined over the graph that is kept


@dataclass(frozen=True)
class Engine:
    """One way to find all neighbours.

    Attributes:
        name: As on the command line.
        build: What it does.
        package: The package it needs beside ours, as it is imported.
        kind: ``exact``, ``approximate``, or ``yardstick`` for what finds no neighbours at all.
        settings: How an index can be built, in rising order of effort.
        effort: The name of what a search can spend, and its values in rising order.
        multiplies: In what an exact engine multiplies; ``best`` is what is fastest on the machine.
    """

    name: str
    build: Build
    package: str = ""
    kind: str = "exact"
    settings: Sequence[Setting] = field(default=({},))
    effort: tuple[str, Sequence[Any]] = ("", (None,))
    multiplies: str = "fp32"

    @property
    def installed(self) -> bool:
        """Whether its package is there."""
        return not self.package or importlib.util.find_spec(self.package) is not None


def find_engine(name: str) -> Engine:
    """The engine of a name.

    Raises:
        ConfigError: If there is none.
    """
    if name not in ENGINES:
        raise ConfigError(
            f"There is no engine {name!r}; choose from {', '.join(ENGINES)}.{did_you_mean(name, ENGINES)}"
        )
    return ENGINES[name]


def unit_matrix(rows: Rows) -> NDArray[np.float32]:
    """All rows scaled to norm 1, as float32 (N, F); rows of zeros stay."""
    unit = np.empty(rows.shape, dtype=np.float32)
    for start in range(0, len(unit), _BLOCK_ROWS):
        unit[start : start + _BLOCK_ROWS] = unit_rows(rows.take(start, start + _BLOCK_ROWS), np.float32)
    return unit


def without_self(found: NDArray[Any], num_neighbors: int) -> NDArray[np.int64]:
    """The first K of the ids found (N, K + 1), without each row's own."""
    index = found.astype(np.int64)  # An unsigned id of a missing neighbour becomes -1.
    own = index == np.arange(len(index))[:, None]
    order = np.argsort(own, axis=1, kind="stable")
    return np.take_along_axis(np.where(own, -1, index), order, axis=1)[:, :num_neighbors]


def _done(index: NDArray[np.int64] | None) -> Search:
    return lambda _: index


def _own_exact(rows: Rows, k: int, setting: Setting, threads: int, dtype: torch.dtype | None) -> Search:
    return _done(cosine_knn(rows, k, engine="exact", dtype=dtype).index)


def _own_flat(rows: Rows, k: int, setting: Setting, threads: int) -> Search:
    return _done(cosine_knn(rows, k, engine="flat").index)


def _own(rows: Rows, k: int, setting: Setting, threads: int, name: Any) -> Search:
    # All of it is its search: the wanted recall chooses every parameter.
    return lambda min_recall: cosine_knn(rows, k, engine=name, min_recall=min_recall).index


def _faiss_flat(rows: Rows, k: int, setting: Setting, threads: int) -> Search:
    import faiss

    unit = unit_matrix(rows)
    return _done(without_self(faiss.knn(unit, unit, k + 1, metric=faiss.METRIC_INNER_PRODUCT)[1], k))


def _faiss_ivf(rows: Rows, k: int, setting: Setting, threads: int) -> Search:
    import faiss

    unit = unit_matrix(rows)
    num_lists = max(1, min(len(unit) // 40, int(setting["lists_per_root_n"] * len(unit) ** 0.5)))
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(unit.shape[1]), unit.shape[1], num_lists, faiss.METRIC_INNER_PRODUCT)
    index.train(unit)
    index.add(unit)

    def search(num_probes: int) -> NDArray[np.int64]:
        index.nprobe = min(num_probes, num_lists)
        return without_self(index.search(unit, k + 1)[1], k)

    return search


def _faiss_hnsw(rows: Rows, k: int, setting: Setting, threads: int) -> Search:
    import faiss

    unit = unit_matrix(rows)
    index = faiss.IndexHNSWFlat(unit.shape[1], setting["M"], faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = setting["efConstruction"]
    index.add(unit)

    def search(expansion: int) -> NDArray[np.int64]:
        index.hnsw.efSearch = expansion
        return without_self(index.search(unit, k + 1)[1], k)

    return search


def _faiss_nndescent(rows: Rows, k: int, setting: Setting, threads: int) -> Search:
    import faiss

    unit = unit_matrix(rows)
    degree = max(setting["K"], k)
    index = faiss.IndexNNDescentFlat(unit.shape[1], degree)  # Euclidean: the order of unit rows is the same.
    index.nndescent.L = degree + _NNDESCENT_OVERHANG
    index.nndescent.iter = setting["iter"]
    index.add(unit)
    graph = faiss.vector_to_array(index.nndescent.final_graph).reshape(len(unit), degree)
    return _done(without_self(graph[:, : k + 1], k))


def _faiss_nsg(rows: Rows, k: int, setting: Setting, threads: int) -> Search:
    import faiss

    unit = unit_matrix(rows)
    index = faiss.IndexNSGFlat(unit.shape[1], setting["R"])
    index.build_type = 1  # its graph by NNDescent and not by comparing all with all
    index.GK = setting["GK"]
    setattr(index, "nndescent_L", setting["GK"] + _NNDESCENT_OVERHANG)  # noqa: B010 - absent from its stubs
    index.add(unit)

    def search(length: int) -> NDArray[np.int64]:
        index.nsg.search_L = min(length, len(unit) - 1)  # A longer list than there are rows never fills.
        return without_self(index.search(unit, k + 1)[1], k)

    return search


def _torch_dense(rows: Rows, k: int, setting: Setting, threads: int) -> Search:
    needed, available = 4 * rows.shape[0] ** 2, available_bytes()
    if available is not None and needed > available:
        raise MemoryError(f"the (N, N) matrix takes {needed / 1e9:.1f} GB, {available / 1e9:.1f} GB are free")
    unit = torch.from_numpy(unit_matrix(rows))
    score = torch.mm(unit, unit.T)
    score.fill_diagonal_(-torch.inf)
    return _done(score.topk(k, dim=1).indices.numpy())


def _numpy_product(rows: Rows, k: int, setting: Setting, threads: int) -> Search:
    unit = unit_matrix(rows)
    other = unit.copy()  # Of one array with itself BLAS would compute half.
    step = max(64, _SCORE_ELEMENTS // len(unit))
    score = np.empty((step, len(unit)), dtype=np.float32)

    def search(_: None) -> None:
        for start in range(0, len(unit), step):
            block = unit[start : start + step]
            np.matmul(block, other.T, out=score[: len(block)])

    return search


def _scikit_learn(rows: Rows, k: int, setting: Setting, threads: int) -> Search:
    from sklearn.neighbors import NearestNeighbors

    # On unit rows the Euclidean order is that of cosines, and several times as fast here as metric="cosine".
    search = NearestNeighbors(n_neighbors=k, algorithm="brute", metric="euclidean", n_jobs=threads)
    return _done(search.fit(unit_matrix(rows)).kneighbors(return_distance=False))


def _pynndescent(rows: Rows, k: int, setting: Setting, threads: int) -> Search:
    import pynndescent

    raw = rows.take(0, rows.shape[0])

    # All of it is its search, so that one process, which compiles for long, can try several numbers of neighbours.
    def search(num_candidates: int) -> NDArray[np.int64]:
        descent = pynndescent.NNDescent(
            raw, metric="cosine", n_neighbors=max(num_candidates, k + 1), n_jobs=threads, random_state=0
        )
        return without_self(descent.neighbor_graph[0][:, : k + 1], k)

    return search


def _hnswlib(rows: Rows, k: int, setting: Setting, threads: int) -> Search:
    import hnswlib

    raw = rows.take(0, rows.shape[0])
    index = hnswlib.Index(space="cosine", dim=raw.shape[1])
    index.init_index(len(raw), M=setting["M"], ef_construction=setting["ef_construction"], random_seed=0)
    index.add_items(raw, num_threads=threads)

    def search(expansion: int) -> NDArray[np.int64]:
        index.set_ef(max(expansion, k + 1))
        return without_self(index.knn_query(raw, k + 1, num_threads=threads)[0], k)

    return search


def _usearch(rows: Rows, k: int, setting: Setting, threads: int) -> Search:
    from usearch.index import Index

    raw = rows.take(0, rows.shape[0])
    index = Index(
        ndim=raw.shape[1],
        metric="cos",
        dtype=setting["dtype"],
        connectivity=setting["connectivity"],
        expansion_add=setting["expansion_add"],
    )
    index.add(np.arange(len(raw)), raw, threads=threads)

    def search(expansion: int) -> NDArray[np.int64]:
        index.expansion_search = expansion
        matches = index.search(raw, k + 1, threads=threads)
        found = matches.keys.astype(np.int64)
        found[np.arange(k + 1) >= matches.counts[:, None]] = -1
        return without_self(found, k)

    return search


_EXPANSIONS = (16, 32, 64, 128, 256, 512)
ENGINES: dict[str, Engine] = {
    engine.name: engine
    for engine in (
        Engine("exact", partial(_own_exact, dtype=None), multiplies="best"),
        Engine("exact-bf16", partial(_own_exact, dtype=torch.bfloat16), multiplies="bf16"),
        Engine("exact-fp32", partial(_own_exact, dtype=torch.float32)),
        Engine("flat", _own_flat),
        *(
            Engine(name, partial(_own, name=name), kind="approximate", effort=("min_recall", (0.98, 0.985, 0.99)))
            for name in APPROXIMATE
        ),
        Engine("faiss-flat", _faiss_flat, "faiss"),
        Engine("faiss-ivf", _faiss_ivf, "faiss", "approximate", ({"lists_per_root_n": 1}, {"lists_per_root_n": 4}),
               ("nprobe", (1, 2, 4, 8, 16, 32, 64, 128, 256))),
        Engine("faiss-hnsw", _faiss_hnsw, "faiss", "approximate",
               ({"M": 16, "efConstruction": 40}, {"M": 32, "efConstruction": 100}), ("efSearch", _EXPANSIONS)),
        Engine("faiss-nndescent", _faiss_nndescent, "faiss", "approximate",
               ({"K": 16, "iter": 5}, {"K": 32, "iter": 5}, {"K": 64, "iter": 10})),
        Engine("faiss-nsg", _faiss_nsg, "faiss", "approximate", ({"R": 16, "GK": 32}, {"R": 32, "GK": 64}),
               ("search_L", _EXPANSIONS)),
        Engine("torch-dense", _torch_dense),
        Engine("numpy-product", _numpy_product, kind="yardstick"),
        Engine("scikit-learn", _scikit_learn, "sklearn"),
        Engine("pynndescent", _pynndescent, "pynndescent", "approximate", effort=("n_neighbors", (11, 20, 30, 45))),
        Engine("hnswlib", _hnswlib, "hnswlib", "approximate",
               ({"M": 16, "ef_construction": 40}, {"M": 32, "ef_construction": 100}), ("ef", _EXPANSIONS)),
        Engine("usearch", _usearch, "usearch", "approximate",
               tuple({"dtype": dtype, "connectivity": 16, "expansion_add": 40} for dtype in ("f16", "f32")),
               ("expansion_search", _EXPANSIONS)),
    )
}  # fmt: skip
"""Every engine by name, in the order in which they take turns."""
