"""An updated store is the store that a build from nothing makes, bit for bit."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dream_pyg import ConfigError, DatasetConfig, StoredGraph, StoreError, build_store, load_graph, update_store
from dream_pyg.data.features import Neighbors
from dream_pyg.graph.knn import ArrayRows, cosine_knn, update
from dream_pyg.graph.knn.update import Known, Updated, update_knn
from dream_pyg.graph.relations import neighbors_of

# Rows


def draw(generator: np.random.Generator, kind: str, size: int, width: int = 8) -> NDArray[np.float32]:
    """Rows with many ties, with few, or with cosines that float32 cannot tell apart; some of them zero."""
    rows = generator.normal(size=(size, width))
    if kind == "signs":
        rows = np.sign(rows)
    elif kind == "nearly equal":
        rows = 1 + 1e-4 * rows
    elif kind == "duplicates":
        rows = generator.integers(-1, 2, (size, 2)) @ np.ones((2, width))
    rows[generator.random(size) < 0.1] = 0
    return rows.astype(np.float32)


@pytest.fixture
def search_all_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update, "_LARGEST_SHARE", 1)


@pytest.mark.usefixtures("search_all_one_by_one")
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 9999),
    kind=st.sampled_from(["signs", "normal", "nearly equal", "duplicates"]),
    edits=st.tuples(*[st.integers(0, 4)] * 3),
    num_neighbors=st.integers(1, 12),
    include_self=st.booleans(),
)
def test_updated_neighbours_are_those_of_a_search(
    seed: int, kind: str, edits: tuple[int, int, int], num_neighbors: int, include_self: bool
):
    generator = np.random.default_rng(seed)
    old = draw(generator, kind, 30)
    num_removed, num_added, num_changed = edits
    kept = np.sort(generator.permutation(30)[num_removed:])
    added = generator.choice(len(kept) + num_added, num_added, replace=False)
    old_id = np.full(len(kept) + num_added, -1)
    old_id[np.setdiff1d(np.arange(len(old_id)), added)] = kept
    new = np.where((old_id >= 0)[:, None], old[old_id], draw(generator, kind, len(old_id)))
    chosen = generator.choice(len(new), num_changed, replace=False)
    new[chosen] = draw(generator, kind, num_changed)
    if num_changed > 1:
        new[chosen[0]] = new[chosen[0] - 1]  # a duplicate of its neighbour in order
    before = cosine_knn(ArrayRows(old), num_neighbors, include_self=include_self)
    known = Known(before, ArrayRows(old), old_id)
    found = update_knn(ArrayRows(new), num_neighbors, known, include_self=include_self, what="rows")
    expected = cosine_knn(ArrayRows(new), num_neighbors, include_self=include_self)
    np.testing.assert_array_equal(found.neighbors.index, expected.index)
    np.testing.assert_array_equal(found.neighbors.similarity, expected.similarity)
    assert not found.reason
    assert found.num_changed == (
        found.num_rows - (new == np.where((old_id >= 0)[:, None], old[old_id], np.nan)).all(1).sum()
    )


# Lists of an approximate engine


def lacking(found: Neighbors, share: float, generator: np.random.Generator) -> Neighbors:
    """The same lists without a share of the rows in them."""
    lost = generator.random(found.index.shape) < share
    order = np.argsort(lost, axis=1, kind="stable")
    index, similarity = np.where(lost, -1, found.index), np.where(lost, 0, found.similarity)
    return Neighbors(np.take_along_axis(index, order, axis=1), np.take_along_axis(similarity, order, axis=1))


def hits(found: NDArray[np.int64], expected: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many of the expected neighbours (N, K) each row has found (N,)."""
    return (found[:, :, None] == expected[:, None, :]).any(axis=1).sum(axis=1)


def test_incomplete_lists_gain_new_rows_and_lose_none():
    generator = np.random.default_rng(3)
    old, added = generator.normal(size=(2, 400, 6)).astype(np.float32)
    new = np.concatenate([old[10:], added[:5]])
    old_id = np.concatenate([np.arange(10, 400), np.full(5, -1)])
    before = lacking(cosine_knn(ArrayRows(old), 6), 0.02, generator)
    known = Known(before, ArrayRows(old), old_id, complete=False)
    found = update_knn(ArrayRows(new), 6, known, include_self=False, what="rows", engine="clusters", min_recall=0.9)
    expected = cosine_knn(ArrayRows(new), 6)
    lost = np.isin(before.index[10:], np.arange(10)).any(axis=1)
    searched = np.append(lost, np.ones(5, dtype=bool))
    assert found.num_searched == searched.sum() < 100
    np.testing.assert_array_equal(found.neighbors.index[searched], expected.index[searched])
    right = hits(found.neighbors.index, expected.index)
    known_or_new = hits(before.index[10:] - 10, expected.index[:390]) + (expected.index[:390] >= 390).sum(axis=1)
    np.testing.assert_array_equal(right[:390][~lost], known_or_new[~lost])
    report = found.neighbors.report
    assert (report.engine, report.parameters) == ("clusters", {"searched": found.num_searched})
    assert report.num_measured == 395 - 395 * 250 // 650  # all rows: 250 of 650 are for choosing
    assert report.recall == pytest.approx(right.sum() / (6 * 395), abs=0.02)
    assert right.sum() < 6 * 395  # what was lacking is not looked for


def test_complete_lists_stay_complete_where_a_build_would_not_be_exact():
    generator = np.random.default_rng(4)
    old = generator.normal(size=(300, 6)).astype(np.float32)
    new = np.concatenate([old, generator.normal(size=(3, 6)).astype(np.float32)])
    known = Known(cosine_knn(ArrayRows(old), 5), ArrayRows(old), np.append(np.arange(300), [-1] * 3))
    found = update_knn(ArrayRows(new), 5, known, include_self=False, what="rows", engine="clusters")
    np.testing.assert_array_equal(found.neighbors.index, cosine_knn(ArrayRows(new), 5).index)
    assert (found.neighbors.report.engine, found.neighbors.report.recall) == ("exact", 1.0)


@pytest.mark.parametrize(
    ("engine", "share", "most", "reason"),
    [
        ("exact", 0.0, 100, "the earlier lists may lack neighbours"),
        ("clusters", 0.5, 100, "a recall of 0.* is below 0.98"),
        ("clusters", 0.0, 2, "3 of 303 rows would have to be searched one by one"),
    ],
)
def test_all_are_searched_where_lists_cannot_be_continued(
    engine: Literal["exact", "clusters"], share: float, most: int, reason: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(update, "_MOST_ROWS", most)
    generator = np.random.default_rng(5)
    old = generator.normal(size=(300, 6)).astype(np.float32)
    new = np.concatenate([old, generator.normal(size=(3, 6)).astype(np.float32)])
    before = lacking(cosine_knn(ArrayRows(old), 5), share, generator)
    known = Known(before, ArrayRows(old), np.append(np.arange(300), [-1] * 3), complete=False)
    found = update_knn(ArrayRows(new), 5, known, include_self=False, what="rows", engine=engine)
    assert re.fullmatch(reason, found.reason), found.reason
    assert found.num_searched == 303
    assert found.neighbors.report.engine == engine
    assert hits(found.neighbors.index, cosine_knn(ArrayRows(new), 5).index).sum() >= 0.98 * 5 * 303


def updated(old: NDArray[np.float32], new: NDArray[np.float32], old_id: NDArray[np.int64], k: int = 5) -> Updated:
    """The update of the neighbours of some rows, which are compared with those of a search."""
    known = Known(cosine_knn(ArrayRows(old), k), ArrayRows(old), old_id)
    found = update_knn(ArrayRows(new), k, known, include_self=False, what="rows")
    np.testing.assert_array_equal(found.neighbors.index, cosine_knn(ArrayRows(new), k).index)
    return found


def test_only_what_changed_is_searched():
    generator = np.random.default_rng(0)
    old = generator.normal(size=(400, 8)).astype(np.float32)
    assert updated(old, old, np.arange(400)).num_searched == 0
    lists = cosine_knn(ArrayRows(old), 5).index
    new = old.copy()
    new[7] = generator.normal(size=8)
    found = updated(old, new, np.arange(400))
    assert (found.num_changed, found.reason) == (1, "")
    assert found.num_searched == 1 + (lists == 7).any(axis=1).sum()
    without = np.delete(np.arange(400), 7)
    assert updated(old, old[without], without).num_searched == (lists == 7).any(axis=1).sum()
    more = np.concatenate([old, new[7:8]])
    assert updated(old, more, np.append(np.arange(400), -1)).num_searched == 1


def test_when_much_changed_or_moved_all_are_searched():
    old = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)
    new = old.copy()
    new[:20] += 1
    found = updated(old, new, np.arange(40))
    assert "of 40 rows would have to be searched" in found.reason
    assert found.num_searched == 40
    found = updated(old, old[::-1].copy(), np.arange(40)[::-1])
    assert found.reason.startswith("the order of ids")
    found = updated(old, old[:, :6].copy(), np.arange(40))
    assert found.num_changed == 40


def test_many_new_duplicates_do_not_overflow_a_list(search_all_one_by_one: None):
    old = np.random.default_rng(1).normal(size=(300, 4)).astype(np.float32)
    new = np.concatenate([old, np.tile(old[3], (200, 1))])
    assert updated(old, new, np.append(np.arange(300), np.full(200, -1)), 3).num_changed == 200


def test_blocks_change_nothing(search_all_one_by_one: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(update, "_BLOCK_BYTES", 1)
    generator = np.random.default_rng(2)
    old = draw(generator, "signs", 700)
    new = old.copy()
    new[::3] = draw(generator, "signs", len(new[::3]))
    assert updated(old, new, np.arange(700)).num_changed > 100


# Stores


@pytest.fixture
def data(shop: Path, tmp_path: Path) -> Path:
    """A copy of the bookshop with a split for each interaction, so that users change one by one."""
    data = Path(shutil.copytree(shop, tmp_path / "data"))
    rows = pl.read_csv(data / "interactions.csv").with_row_index("row")
    fold = pl.when(pl.col("row") % 6 == 0).then(pl.lit("test")).when(pl.col("row") % 6 == 1).then(pl.lit("valid"))
    rows.with_columns(fold.otherwise(pl.lit("train")).alias("split")).drop("row").write_csv(data / "interactions.csv")
    toml = (data / "dataset.toml").read_text()
    (data / "dataset.toml").write_text(
        toml.split("[split]")[0] + "[modalities" + toml.split("[modalities", 1)[1].split("[expected]")[0]
    )
    return data


def rewrite_interactions(change: Callable[[pl.DataFrame], pl.DataFrame]) -> Callable[[Path], None]:
    def apply(data: Path) -> None:
        change(pl.read_csv(data / "interactions.csv")).write_csv(data / "interactions.csv")

    return apply


def new_users(rows: pl.DataFrame) -> pl.DataFrame:
    newcomers = [rows.head(4 + n).with_columns(pl.lit(f"a-user-{n}").alias("user_id")) for n in range(2)]
    return pl.concat([rows, *newcomers])


def without_items(data: Path) -> None:
    items = pl.read_csv(data / "items.csv")
    gone = items["item_id"][[3, 20]]
    rewrite_interactions(lambda rows: rows.filter(~pl.col("item_id").is_in(gone.implode())))(data)
    np.save(data / "image.npy", np.delete(np.load(data / "image.npy"), [3, 20], axis=0))
    items.filter(~pl.col("item_id").is_in(gone.implode())).write_csv(data / "items.csv")


def with_items(data: Path) -> None:
    items, image = pl.read_csv(data / "items.csv"), np.load(data / "image.npy")
    rows = [items.head(7), items.head(1).with_columns(pl.lit("brand-new").alias("item_id")), items[7:]]
    pl.concat(rows).write_csv(data / "items.csv")
    np.save(data / "image.npy", np.insert(image, 7, image[4], axis=0))


def other_features(data: Path) -> None:
    image = np.load(data / "image.npy")
    image[[2, 9]] = image[[9, 2]]
    image[11] = 0
    np.save(data / "image.npy", image)


def items_in_another_order(data: Path) -> None:
    pl.read_csv(data / "items.csv").reverse().write_csv(data / "items.csv")
    np.save(data / "image.npy", np.load(data / "image.npy")[::-1])


def without_texts(data: Path) -> None:
    toml = (data / "dataset.toml").read_text()
    kept = [part for part in toml.split("\n\n") if "modalities.text" not in part]
    assert len(kept) == toml.count("\n\n")
    (data / "dataset.toml").write_text("\n\n".join(kept) + "\n")


EDITS: dict[str, Callable[[Path], Any]] = {
    "users added": rewrite_interactions(new_users),
    "users removed": rewrite_interactions(lambda rows: rows.filter(~pl.col("user_id").str.ends_with("3"))),
    "interactions removed": rewrite_interactions(lambda rows: rows[:-9]),
    "items removed": without_items,
    "items added": with_items,
    "features changed": other_features,
    "items in another order": items_in_another_order,
    "a modality removed": without_texts,
    "everything": lambda data: [
        edit(data) for edit in (with_items, other_features, without_items, rewrite_interactions(new_users))
    ],
}


def build(data: Path, out: Path, **options: Any) -> StoredGraph:
    return build_store(DatasetConfig.load(data), out, num_neighbors=4, **options)[0]


@pytest.mark.parametrize("include_self", [False, True])
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
def test_an_updated_store_is_a_rebuilt_one(
    search_all_one_by_one: None, data: Path, tmp_path: Path, edit: Callable[[Path], Any], include_self: bool
):
    build(data, tmp_path / "old", include_self=include_self)
    edit(data)
    found, updates = update_store(DatasetConfig.load(data), tmp_path / "old", tmp_path / "new")
    rebuilt = build(data, tmp_path / "rebuilt", include_self=include_self)
    assert found.fingerprint == rebuilt.fingerprint
    assert found.info["files"] == rebuilt.info["files"]
    assert build_store(DatasetConfig.load(data), tmp_path / "new", num_neighbors=4, include_self=include_self)[1]
    counts = found.graph["user"].num_nodes, found.graph["item"].num_nodes
    assert {what: one.num_rows for what, one in updates.items()} == {
        f"{node}s by {modality}": count
        for node, count in zip(("user", "item"), counts, strict=True)
        for modality in ("image", *(["text"] if "x_text" in found.graph["item"] else []))
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "new", "old", "rebuilt"]


def test_a_new_modality_is_searched_as_a_whole(data: Path, tmp_path: Path):
    whole = DatasetConfig.load(data)
    build_store(whole.without_modality("text"), tmp_path / "old", num_neighbors=4)
    found, updates = update_store(whole, tmp_path / "old", tmp_path / "new")
    assert found.info["files"] == build(data, tmp_path / "rebuilt").info["files"]
    assert [updates[f"{node} by image"].num_searched for node in ("items", "users")] == [0, 0]
    assert updates["items by text"].num_searched == 40
    assert "earlier store" in updates["users by text"].reason


def test_ready_lists_are_not_taken_for_found_ones(data: Path, tmp_path: Path):
    ids = pl.read_csv(data / "items.csv")["item_id"].to_list()
    pl.DataFrame({"item_id": ids, "neighbor_id": ids[1:] + ids[:1]}).write_parquet(tmp_path / "ring.parquet")
    whole = DatasetConfig.load(data)
    ready = whole.with_modality("image", neighbors=tmp_path / "ring.parquet")
    build_store(ready, tmp_path / "old", num_neighbors=4)
    found, updates = update_store(whole, tmp_path / "old", tmp_path / "new")
    assert found.info["files"] == build(data, tmp_path / "rebuilt").info["files"]
    assert updates["items by image"].num_searched == 40
    assert updates["users by image"].num_searched == 0


def test_in_place_and_nothing_to_do(data: Path, tmp_path: Path):
    build(data, tmp_path / "graph")
    same, updates = update_store(DatasetConfig.load(data), tmp_path / "graph")
    assert (same.fingerprint, updates) == (load_graph(tmp_path / "graph").fingerprint, None)
    other_features(data)
    with pytest.raises(StoreError, match=r"changed inputs.*--out DIR, or replace it with --overwrite"):
        update_store(DatasetConfig.load(data), tmp_path / "graph")
    found, updates = update_store(DatasetConfig.load(data), tmp_path / "graph", overwrite=True)
    assert len(updates) == 4
    assert load_graph(tmp_path / "graph").fingerprint == found.fingerprint != same.fingerprint
    again, updates = update_store(DatasetConfig.load(data), tmp_path / "graph", tmp_path / "graph")
    assert (again.fingerprint, updates) == (found.fingerprint, None)


def test_what_cannot_be_updated_is_refused(data: Path, tmp_path: Path):
    config = DatasetConfig.load(data)
    build(data, tmp_path / "graph")
    with pytest.raises(StoreError, match=r"num_neighbors 4 stored, 5 asked.*build the graph anew"):
        update_store(config, tmp_path / "graph", num_neighbors=5)
    update_store(config, tmp_path / "graph", num_neighbors=4, include_self=None)


def test_another_split_or_filter_is_refused(data: Path, tmp_path: Path):
    config = DatasetConfig.load(data)
    build(data, tmp_path / "graph")
    before = load_graph(tmp_path / "graph").info
    with pytest.raises(StoreError, match=r"split.seed: 7 here, 0 there"):
        update_store(config.with_section("split", seed=7), tmp_path / "graph")
    with pytest.raises(StoreError, match=r"filter.k_core: 2 here, 0 there"):
        update_store(config.with_section("filter", k_core=2), tmp_path / "graph")
    assert load_graph(tmp_path / "graph").info == before


def test_another_store_is_replaced_only_when_asked(data: Path, tmp_path: Path):
    build(data, tmp_path / "graph")
    build(data, tmp_path / "other", include_self=True)
    other_features(data)
    config = DatasetConfig.load(data)
    with pytest.raises(StoreError, match="other inputs or parameters"):
        update_store(config, tmp_path / "graph", tmp_path / "other")
    found, _ = update_store(config, tmp_path / "graph", tmp_path / "other", overwrite=True)
    assert found.info["parameters"]["include_self"] is False


def test_too_few_items_are_refused_as_in_a_build(data: Path, tmp_path: Path):
    build_store(DatasetConfig.load(data), tmp_path / "graph", num_neighbors=39)
    without_items(data)
    with pytest.raises(ConfigError, match="between 1 and 37 for 38 items by image"):
        update_store(DatasetConfig.load(data), tmp_path / "graph", overwrite=True)


def test_a_store_of_an_approximate_engine_is_continued(tmp_path: Path):
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(20, 12))
    features = (centres[np.arange(600) % 20] + 0.5 * generator.normal(size=(600, 12))).astype(np.float32)
    pairs = [(f"u{user}", f"i{item:03}") for user in range(300) for item in (user, user + 150, 599 - user)]
    pl.DataFrame(pairs, schema=["user_id", "item_id"], orient="row").write_csv(tmp_path / "clicks.csv")
    ids = [f"i{item:03}" for item in range(600)]

    def config(features: NDArray[np.float32]) -> DatasetConfig:
        pl.DataFrame({"item_id": ids, "features": features.tolist()}).write_parquet(tmp_path / "image.parquet")
        of_clicks = DatasetConfig.create(interactions=tmp_path / "clicks.csv")
        return of_clicks.with_modality("image", features=tmp_path / "image.parquet")

    old, _ = build_store(config(features), tmp_path / "graph", num_neighbors=5, engine="clusters")
    assert old.info["knn"]["item image_knn item"]["engine"] == "clusters"
    features[[5, 77]] = features[[77, 5]] + 0.01
    found, updates = update_store(config(features), tmp_path / "graph", tmp_path / "new")
    items = updates["items by image"]
    assert 2 < items.num_searched < 60
    assert not items.reason
    report = found.info["knn"]["item image_knn item"]
    assert report["engine"] == "clusters"
    assert report["recall"] >= 0.98
    assert report["num_measured"] > 200
    expected = cosine_knn(ArrayRows(features), 5)
    index = neighbors_of(found.graph, "item", "image").index
    np.testing.assert_array_equal(index[[5, 77]], expected.index[[5, 77]])
    assert hits(index, expected.index).sum() >= 0.98 * 5 * 600
    # A build with these inputs and parameters would reuse it.
    assert build_store(config(features), tmp_path / "new", num_neighbors=5, engine="clusters")[1]
