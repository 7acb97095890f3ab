"""The graph store: a directory that is written once, memory-mapped on load and never silently wrong.

Layout::

    graph.json            format version, fingerprint, counts, parameters, inputs, checksums, versions, timings
    edges.safetensors     labels of each split; relation graphs with weight, similarity and rank
    features.safetensors  feature matrices, masks, norms and counts
    users.parquet         external id of each user, in row order
    items.parquet         external id of each item, in row order
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch_geometric.data import HeteroData

from dream_pyg import ranks
from dream_pyg.data.dataset import Dataset, DatasetConfig, describe_inputs, load_dataset
from dream_pyg.data.files import (
    atomic_directory,
    check_replaceable,
    check_writable,
    is_free,
    load_tensors,
    read_json,
    save_tensors,
    sha256_file,
    where_replaced,
    write_json,
)
from dream_pyg.errors import ConfigError, StoreError
from dream_pyg.graph.build import Search, build_graph
from dream_pyg.graph.edges import add_interaction_edges, set_edges
from dream_pyg.graph.knn import Engine, SearchReport
from dream_pyg.graph.partial import PartialBuild
from dream_pyg.graph.processor import installed_version, resolve_device
from dream_pyg.graph.schema import COLD, INTERACTS, ITEM, SPLITS, USER, EdgeType, label_name, labelled_splits

FORMAT_VERSION = 2
INFO, EDGES, FEATURES, USERS, ITEMS = (
    "graph.json",
    "edges.safetensors",
    "features.safetensors",
    "users.parquet",
    "items.parquet",
)
DECIDED_ONCE = ("filter", "split")
"""The sections of a dataset's configuration that stay as they are when a store is updated."""
FILES = (INFO, EDGES, FEATURES, USERS, ITEMS)
_REBUILD = "Build the graph again with `dream-pyg build-graph --overwrite`."
_PACKAGES = ("dream-pyg", "torch", "torch-geometric", "faiss-cpu", "numpy", "polars")


@dataclass(frozen=True)
class StoredGraph:
    """A graph together with what the store knows of it."""

    graph: HeteroData
    info: dict[str, Any]
    user_ids: pl.Series
    item_ids: pl.Series
    path: Path

    @property
    def fingerprint(self) -> str:
        """Identifies inputs, parameters and format.

        Equal fingerprints mean equal graphs, but for rounding on another processor and for what an approximate search
        finds on another day: ``hnsw`` and ``nndescent`` with several threads, all of them in another version or in an
        update of an earlier graph.
        """
        return str(self.info["fingerprint"])

    @property
    def name(self) -> str:
        """The dataset's name."""
        return str(self.info["dataset"])


def build_store(
    config: DatasetConfig,
    path: str | Path,
    *,
    data_dir: str | Path | None = None,
    num_neighbors: int = 10,
    include_self: bool = False,
    user_graphs: bool = True,
    engine: Engine = "auto",
    min_recall: float = 0.98,
    device: str = "cpu",
    overwrite: bool = False,
) -> tuple[StoredGraph, bool]:
    """Build a dataset's graph into ``path``, or reuse what was built there from the same inputs and parameters.

    Processes that torchrun starts search together; the first of them writes.

    Args:
        config: The dataset.
        path: Directory of the store.
        data_dir: Where the dataset's files lie; by default as the config says.
        num_neighbors: K of every relation graph that is searched.
        include_self: Whether a node counts as one of its own K neighbours.
        user_graphs: Whether user-user graphs are built.
        engine: How neighbours are searched; see :func:`dream_pyg.graph.knn.cosine_knn`.
        min_recall: The share of the true neighbours that an approximate engine has to find at least.
        device: Where the engine `exact` multiplies: cpu, cuda, cuda:N, or auto. The graph is the same.
        overwrite: Whether a store of other inputs or parameters may be replaced.

    Returns:
        The stored graph and whether it was reused.

    Raises:
        ConfigError: If there is no such device, or several processes would share it.
        StoreError: If ``path`` holds something else and ``overwrite`` is off, or cannot be written.
        DataError: If an input is unusable.
        SearchError: If an engine cannot reach ``min_recall``, or memory does not suffice for it.
        Interrupted: On SIGINT or SIGTERM; what was found is saved, and the same call goes on from there.
    """
    path = Path(path)
    parameters: dict[str, Any] = {
        "num_neighbors": num_neighbors,
        "include_self": include_self,
        "user_graphs": user_graphs,
        "engine": engine,
        "min_recall": min_recall,
    }
    where = resolve_device(device)
    with ranks.joined():
        if where.type != "cpu" and ranks.num_ranks() > 1:
            raise ConfigError(f"Several processes cannot search on {where} together. Start one, without torchrun.")
        inputs, found = ranks.together(lambda: _look_up(config, path, data_dir, parameters, overwrite=overwrite))
        if found is not None:
            return found, True
        unfinished = PartialBuild(path, make_fingerprint(config, inputs, parameters))
        search = partial(unfinished.search, device=where)
        create_store(config, path, inputs, parameters, data_dir, overwrite=overwrite, searcher=lambda _: search)
        unfinished.discard()
    return load_graph(path), False


def _look_up(
    config: DatasetConfig, path: Path, data_dir: str | Path | None, parameters: Mapping[str, Any], *, overwrite: bool
) -> tuple[dict[str, dict[str, str]], StoredGraph | None]:
    """The inputs, and what was built from them before."""
    inputs = describe_inputs(config, data_dir)
    if overwrite:
        check_replaceable(path, FILES)
    elif not is_free(path):
        refuse_other(path, make_fingerprint(config, inputs, parameters))
        return inputs, load_graph(path)
    return inputs, None


def create_store(
    config: DatasetConfig,
    path: Path,
    inputs: Mapping[str, Mapping[str, str]],
    parameters: Mapping[str, Any],
    data_dir: str | Path | None,
    *,
    overwrite: bool,
    searcher: Callable[[Dataset], Search],
) -> None:
    """Read a dataset, build its graph and write the store.

    Args:
        config: The dataset.
        path: Directory of the store.
        inputs: What :func:`~dream_pyg.data.dataset.describe_inputs` says of it.
        parameters: Of the build.
        data_dir: Where the dataset's files lie.
        overwrite: Whether a store that is there is replaced.
        searcher: Gives what finds the neighbours in a dataset.
    """
    started = time.perf_counter()
    ranks.first_does(lambda: check_writable(path))
    dataset = ranks.together(lambda: load_dataset(config, data_dir))
    read = time.perf_counter()
    reports: dict[EdgeType, SearchReport] = {}
    graph = build_graph(dataset, **parameters, reports=reports, search=searcher(dataset))
    built = time.perf_counter()
    info = {
        "format_version": FORMAT_VERSION,
        "fingerprint": make_fingerprint(config, inputs, parameters),
        "dataset": dataset.name,
        "config": config.model_dump(mode="json", exclude_none=True),
        "overrides": {name: dict(config.overrides[name]) for name in DECIDED_ONCE if name in config.overrides},
        "split_method": dataset.split_method,
        "parameters": dict(parameters),
        "inputs": inputs,
        "counts": _counts(graph),
        "report": dict(dataset.report),
        "knn": {" ".join(edge_type): report.to_dict() for edge_type, report in reports.items()},
        "seconds": {"read": round(read - started, 3), "build": round(built - read, 3)},
        "versions": {name: installed_version(name) for name in _PACKAGES} | {"python": platform.python_version()},
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    ranks.first_does(lambda: save_graph(path, graph, dataset, info, overwrite=overwrite))


def save_graph(
    path: str | Path, graph: HeteroData, dataset: Dataset, info: Mapping[str, Any], *, overwrite: bool = False
) -> None:
    """Write a store as a whole or not at all."""
    with atomic_directory(path, replace=FILES if overwrite else None) as directory:
        edges, features = _tensors(graph)
        save_tensors(directory / EDGES, edges)
        save_tensors(directory / FEATURES, features)
        pl.DataFrame({"user_id": dataset.interactions.user_ids}).write_parquet(directory / USERS)
        pl.DataFrame({"item_id": dataset.interactions.item_ids}).write_parquet(directory / ITEMS)
        files = {
            file: {"bytes": (directory / file).stat().st_size, "sha256": sha256_file(directory / file)}
            for file in FILES
            if file != INFO
        }
        described = {**info, "files": files}
        write_json(directory / INFO, {**described, "checksum": _checksum(described)})


def load_graph(path: str | Path, *, verify: bool = True) -> StoredGraph:
    """Load a store; feature matrices stay memory-mapped.

    Args:
        path: Directory of the store.
        verify: Whether every file's checksum is compared (its size always is).

    Raises:
        StoreError: If this is no store, one of another format version, or a damaged one.
    """
    path = Path(path)
    info = read_info(path)
    for file, expected in info["files"].items():
        _verify_file(path / file, expected, verify)
    edges, _ = load_tensors(path / EDGES, verify=False)
    features, _ = load_tensors(path / FEATURES, verify=False)
    graph = HeteroData()
    graph[USER].num_nodes = info["counts"]["users"]
    graph[ITEM].num_nodes = info["counts"]["items"]
    for split in (*SPLITS, COLD) if label_name(COLD) in edges else SPLITS:
        graph[INTERACTS][label_name(split)] = edges.pop(label_name(split))
    add_interaction_edges(graph)
    for name in sorted(name for name in edges if name.endswith("/edge_index")):
        node, relation, _ = name.split("/")
        prefix = f"{node}/{relation}"
        set_edges(graph, (node, relation, node), edges[name], edges[f"{prefix}/edge_weight"])
        store = graph[node, relation, node]
        store.similarity, store.rank = edges[f"{prefix}/similarity"], edges[f"{prefix}/rank"]
        store.num_neighbors = int(edges[f"{prefix}/num_neighbors"])
    for name in sorted(features):
        node, attribute = name.split("/")
        graph[node][attribute] = features[name]
    user_ids = pl.read_parquet(path / USERS)["user_id"]
    item_ids = pl.read_parquet(path / ITEMS)["item_id"]
    return StoredGraph(graph, info, user_ids, item_ids, path)


def read_info(path: str | Path) -> dict[str, Any]:
    """What ``graph.json`` says, once it is known to be of this format version.

    Raises:
        StoreError: If there is no store at ``path``, or one that this version cannot read.
    """
    path = Path(path)
    if path.is_file():
        raise StoreError(f"{path} is a file; a graph store is a directory. Give another path.")
    if not (path / INFO).is_file():
        raise StoreError(
            f"{path} is not a graph store: it has no {INFO}. Build one with `dream-pyg build-graph`."
            f"{where_replaced(path)}"
        )
    info = read_json(path / INFO)
    version = info.get("format_version")
    if version != FORMAT_VERSION:
        raise StoreError(
            f"{path} has store format {version}, this version of dream_pyg reads format {FORMAT_VERSION}. {_REBUILD}"
        )
    if info.pop("checksum", None) != _checksum(info):
        raise StoreError(f"{path / INFO} is damaged: its content does not match its checksum. {_REBUILD}")
    return info


def refuse_other(path: Path, fingerprint: str) -> None:
    """Raise a StoreError if ``path`` is not the store of this fingerprint."""
    if path.is_dir() and not (path / INFO).is_file():
        raise StoreError(f"{path} exists and is not a graph store: it has no {INFO}. Choose another path.")
    existing = read_info(path)["fingerprint"]
    if existing != fingerprint:
        raise StoreError(
            f"{path} holds a graph of other inputs or parameters (its fingerprint is {existing[:12]}, these would "
            f"make {fingerprint[:12]}). Choose another path, or replace it with --overwrite."
        )


def _verify_file(path: Path, expected: Mapping[str, Any], verify: bool) -> None:
    if not path.is_file():
        raise StoreError(f"{path} is missing from the store. {_REBUILD}")
    size = path.stat().st_size
    if size != expected["bytes"]:
        raise StoreError(
            f"{path} is truncated or overwritten: expected {expected['bytes']} bytes, got {size}. {_REBUILD}"
        )
    if verify and sha256_file(path) != expected["sha256"]:
        raise StoreError(f"{path} is damaged: its content does not match the checksum in {INFO}. {_REBUILD}")


def _checksum(info: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(info, sort_keys=True).encode()).hexdigest()


def make_fingerprint(config: DatasetConfig, inputs: Mapping[str, Any], parameters: Mapping[str, Any]) -> str:
    """The fingerprint of the store that is built from a dataset."""
    # What a file holds counts, not where it lies or what it is called.
    unnamed: Any = {"interactions": {"path"}, "items": {"path"}, "modalities": True, "name": True, "expected": True}
    meaning = config.model_dump(mode="json", exclude_none=True, exclude=unnamed)
    content = {role: description["sha256"] for role, description in inputs.items()}
    canonical = json.dumps([FORMAT_VERSION, meaning, content, parameters], sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _tensors(graph: HeteroData) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    edges = {label_name(split): graph[INTERACTS][label_name(split)] for split in labelled_splits(graph)}
    for source, relation, target in graph.edge_types:
        if source == target:
            store = graph[source, relation, target]
            prefix = f"{source}/{relation}"
            edges[f"{prefix}/edge_index"] = store.edge_index.as_tensor()
            edges[f"{prefix}/num_neighbors"] = torch.tensor(store.num_neighbors)
            edges |= {f"{prefix}/{name}": store[name] for name in ("edge_weight", "similarity", "rank")}
    features = {
        f"{node}/{name}": value
        for node in (USER, ITEM)
        for name, value in graph[node].items()
        if isinstance(value, torch.Tensor)
    }
    return edges, features


def _counts(graph: HeteroData) -> dict[str, Any]:
    return {
        "users": graph[USER].num_nodes,
        "items": graph[ITEM].num_nodes,
        **{split: graph[INTERACTS][label_name(split)].size(1) for split in SPLITS},
        "edges": {" ".join(edge_type): graph[edge_type].num_edges for edge_type in graph.edge_types},
    }
