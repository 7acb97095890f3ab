"""Bringing a store up to date with a new version of its dataset, searching only what has changed."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from torch_geometric.data import HeteroData

from dream_pyg import ranks
from dream_pyg.data.dataset import Dataset, DatasetConfig, describe_inputs
from dream_pyg.data.features import FeatureMatrix
from dream_pyg.data.files import check_replaceable, is_free
from dream_pyg.data.tables import positions
from dream_pyg.data.validation import differences
from dream_pyg.errors import StoreError
from dream_pyg.graph.build import Search
from dream_pyg.graph.knn import Engine, FoundNeighbors, MeanRows, Rows, cosine_knn
from dream_pyg.graph.knn.choice import EXACT, choose_engine
from dream_pyg.graph.knn.update import Known, Updated, update_knn
from dream_pyg.graph.relations import neighbors_of
from dream_pyg.graph.schema import (
    INTERACTS,
    ITEM,
    USER,
    feature_modalities,
    feature_name,
    knn_edge,
    knn_modalities,
    label_name,
    mask_name,
)
from dream_pyg.graph.store import (
    DECIDED_ONCE,
    FILES,
    StoredGraph,
    create_store,
    load_graph,
    make_fingerprint,
    refuse_other,
)

logger = logging.getLogger("dream_pyg")

_REBUILD = "build the graph anew with `dream-pyg build-graph`."


def update_store(
    config: DatasetConfig,
    graph: str | Path,
    out: str | Path | None = None,
    *,
    data_dir: str | Path | None = None,
    overwrite: bool = False,
    **parameters: Any,
) -> tuple[StoredGraph, dict[str, Updated] | None]:
    """Build the store of a new version of a dataset from the store of an earlier version.

    Users and items are known by their external ids. The result is that of :func:`~dream_pyg.graph.store.build_store`
    with the parameters of the earlier store, which finds and reuses it. Where an approximate engine searches, new rows
    find all their neighbours, older ones what that engine had found and new rows; the recall is measured again.

    Args:
        config: The dataset as it is now.
        graph: Directory of the earlier store.
        out: Directory of the new one; by default that of the earlier store.
        data_dir: Where the dataset's files lie; by default as the config says.
        overwrite: Whether the store that is at ``out`` may be replaced, the earlier one or another. Runs that were
            trained on it cannot be opened afterwards.
        **parameters: Parameters of a build that the earlier store is expected to have; None for whatever it has.

    Returns:
        The new store and, by relation graph such as ``"items by image"``, how it was found; None if it was there.

    Raises:
        StoreError: If the earlier store has other parameters, another split or filter, or ``out`` holds something else
            or, without ``overwrite``, another store.
        SearchError: If an engine cannot reach ``min_recall``, or memory does not suffice for it.
        DataError: If an input is unusable.
    """
    known = load_graph(graph)
    _check_parameters(known, parameters)
    _check_same(known, config)
    path = known.path if out is None else Path(out)
    inputs = describe_inputs(config, data_dir)
    fingerprint = make_fingerprint(config, inputs, known.info["parameters"])
    if fingerprint == known.fingerprint and path.resolve() == known.path.resolve():
        return known, None
    if out is None and not overwrite:
        raise StoreError(
            f"{path} has changed inputs, and to replace it would leave the runs that were trained on it without their "
            "graph. Write the new store beside it with --out DIR, or replace it with --overwrite."
        )
    if overwrite:
        check_replaceable(path, FILES)
    elif not is_free(path):
        refuse_other(path, fingerprint)
        return load_graph(path), None
    updates: dict[str, Updated] = {}
    with ranks.joined():
        create_store(
            config,
            path,
            inputs,
            known.info["parameters"],
            data_dir,
            overwrite=overwrite,
            searcher=lambda dataset: _continued(known, dataset, updates),
        )
    return load_graph(path), updates


def _continued(known: StoredGraph, dataset: Dataset, updates: dict[str, Updated]) -> Search:
    """What finds the neighbours in a dataset that is split as the stored one."""
    if known.info.get("split_method", dataset.split_method) != dataset.split_method:  # which older stores do not say
        raise StoreError(
            f"The interactions of {known.path} were split by the method {known.info['split_method']!r}, these would be "
            f"by {dataset.split_method!r}, as the file of one has a column of splits and that of the other has none. "
            f"An update keeps the split. Give the file such a column as well or take it out, or {_REBUILD}"
        )
    return _Continuation(known, dataset, updates).search


class _Continuation:
    """Finds the neighbours in a dataset from those in a store of its earlier version."""

    def __init__(self, stored: StoredGraph, dataset: Dataset, updates: dict[str, Updated]) -> None:
        graph, interactions = stored.graph, dataset.interactions
        old_id = {
            USER: _positions(interactions.user_ids, stored.user_ids),
            ITEM: _positions(interactions.item_ids, stored.item_ids),
        }
        self._known: dict[str, Known] = {}
        for node in (USER, ITEM):
            searched = [
                modality
                for modality in knn_modalities(graph, node)
                if modality in feature_modalities(graph)
                and (node == USER or f"{modality}.neighbors" not in stored.info["inputs"])
            ]
            for modality in searched:
                rows = _features(graph, node, modality)
                complete = stored.info["knn"][" ".join(knn_edge(node, modality))]["engine"] in EXACT
                neighbors = neighbors_of(graph, node, modality)
                self._known[f"{node}s by {modality}"] = Known(neighbors, rows, old_id[node], complete)
        self._updates = updates

    def search(self, rows: Rows, num_neighbors: int, *, engine: Engine, what: str, **how: Any) -> FoundNeighbors:
        """As :func:`~dream_pyg.graph.knn.cosine_knn`, from what is known."""
        chosen = choose_engine(engine, *rows.shape, what)
        if what in self._known:
            update = update_knn(rows, num_neighbors, self._known[what], engine=chosen, what=what, **how)
        else:
            found = cosine_knn(rows, num_neighbors, engine=chosen, what=what, **how)
            update = Updated(found, rows.shape[0], rows.shape[0], "the earlier store did not search them")
        because = f", all, since {update.reason}" if update.reason else ""
        logger.info("kNN of %s: %d of %d searched%s", what, update.num_searched, update.num_rows, because)
        self._updates[what] = update
        return update.neighbors


def _check_parameters(stored: StoredGraph, parameters: Mapping[str, Any]) -> None:
    found = stored.info["parameters"]
    other = [
        f"{name} {found.get(name)} stored, {value} asked"
        for name, value in parameters.items()
        if value is not None and value != found.get(name)
    ]
    if other:
        raise StoreError(
            f"{stored.path} has other parameters ({'; '.join(other)}), and an update keeps them. Leave them out, or "
            f"{_REBUILD}"
        )


def _check_same(stored: StoredGraph, config: DatasetConfig) -> None:
    """Refuse a dataset that is filtered or split in another way than the stored one."""
    earlier: dict[str, Any] = stored.info["config"]
    now = config.model_dump(mode="json", exclude_none=True)
    other = differences(*({name: config[name] for name in DECIDED_ONCE} for config in (now, earlier)))
    if other:
        raise StoreError(
            f"{stored.path} was made in another way (here = this dataset, there = the store): {'; '.join(other)}. An "
            "update keeps that. Leave out the options or undo the change of the dataset.toml that say otherwise (a "
            f"store of an older version does not know the options of its build: give them again), or {_REBUILD}"
        )


def _positions(ids: pl.Series, known: pl.Series) -> NDArray[np.int64]:
    if ids.dtype != known.dtype:  # Then none of them is the same.
        return np.full(len(ids), -1, dtype=np.int64)
    return positions(ids, known)


def _features(graph: HeteroData, node: str, modality: str) -> Rows:
    has = graph[ITEM][mask_name(modality)].numpy()
    row_of_item = np.where(has, np.arange(len(has)), -1)
    features = FeatureMatrix(graph[ITEM][feature_name(modality)].numpy(), row_of_item)
    if node == ITEM:
        return features
    return MeanRows(graph[INTERACTS][label_name("train")].numpy(), int(graph[USER].num_nodes), features)
