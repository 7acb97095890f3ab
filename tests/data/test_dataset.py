"""From a dataset.toml and its files to aligned, split and counted data."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dream_pyg.data.dataset import Dataset, DatasetConfig, Modality, describe_inputs, load_dataset
from dream_pyg.data.features import FeatureMatrix, Neighbors
from dream_pyg.data.synthetic import make_synthetic
from dream_pyg.errors import ConfigError, DataError

CARDS = Path(__file__).resolve().parents[2] / "datasets"


def write_interactions(path: Path, rows: list[tuple[Any, ...]], columns: str = "user,item,split") -> Path:
    pl.DataFrame(rows, schema=columns.split(","), orient="row").write_csv(path)
    return path


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """Three users, three items 10, 20, 30 and a split, with one duplicate and one user that is only in test."""
    write_interactions(
        tmp_path / "shop.csv",
        [
            ("bo", 30, "train"),
            ("al", 10, "train"),
            ("al", 20, "valid"),
            ("al", 30, "test"),
            ("bo", 10, "test"),
            ("al", 10, "test"),
            ("cy", 20, "test"),
        ],
    )
    return tmp_path


def load(directory: Path, **values: Any) -> Dataset:
    return load_dataset(DatasetConfig.create(directory=directory, **{"interactions": "shop.csv", **values}))


def external_pairs(dataset: Dataset, split: str) -> list[tuple[Any, Any]]:
    users, items = dataset.interactions.pairs(split)
    return list(zip(dataset.interactions.user_ids[users], dataset.interactions.item_ids[items], strict=True))


def test_a_shop(shop: Path) -> None:
    dataset = load(shop)
    interactions = dataset.interactions
    assert interactions.user_ids.to_list() == ["al", "bo", "cy"]
    assert interactions.item_ids.to_list() == [10, 20, 30]
    assert external_pairs(dataset, "train") == [("bo", 30), ("al", 10)]
    assert external_pairs(dataset, "valid") == [("al", 20)]
    assert external_pairs(dataset, "test") == [("al", 30), ("bo", 10)]
    assert dataset.name == "shop"
    assert dataset.modalities == {}
    assert dataset.report == {
        "rows_read": 7,
        "duplicates_dropped": 1,
        "k_core_dropped": 0,
        "cold_start_dropped": 1,
        "num_users": 3,
        "num_items": 3,
        "num_interactions": 5,
        "train": 2,
        "valid": 1,
        "test": 2,
        "cold_items": 0,
    }
    digest = hashlib.sha256((shop / "shop.csv").read_bytes()).hexdigest()
    described = describe_inputs(DatasetConfig.create(directory=shop, interactions="shop.csv"))
    assert described == {"interactions": {"path": "shop.csv", "sha256": digest}}


def test_integer_ids_are_ordered_as_numbers_and_strings_as_text(tmp_path: Path) -> None:
    rows = [(user, item, split) for user in (2, 10, 1) for item, split in (("b", 0), ("a", 1), ("ä", 2), ("B", 0))]
    write_interactions(tmp_path / "shop.csv", rows)
    interactions = load(tmp_path).interactions
    assert interactions.user_ids.to_list() == [1, 2, 10]
    assert interactions.item_ids.to_list() == ["B", "a", "b", "ä"]


WORD = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=4)
IDS = st.one_of(
    st.lists(st.integers(-(2**63), 2**63 - 1), unique=True, min_size=3, max_size=12),
    st.lists(WORD, unique=True, min_size=3, max_size=12),
    st.lists(st.one_of(WORD, st.integers(-9, 999).map(str)), unique=True, min_size=3, max_size=12),
)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
@given(users=IDS, items=IDS, seed=st.integers(0, 2**16))
def test_external_ids_survive(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, users: list[Any], items: list[Any], seed: int
) -> None:
    path = tmp_path_factory.mktemp("ids") / f"shop.{suffix}"
    rows = [(user, item) for user in users for item in items]
    rows = [rows[row] for row in np.random.default_rng(seed).permutation(len(rows))]
    frame = pl.DataFrame(rows, schema=["user", "item"], orient="row")
    frame.write_csv(path, quote_style="always") if suffix == "csv" else frame.write_parquet(path)
    dataset = load_dataset(DatasetConfig.create(interactions=path))
    found = [pair for split in ("train", "valid", "test") for pair in external_pairs(dataset, split)]
    assert sorted((str(user), str(item)) for user, item in found) == sorted((str(u), str(i)) for u, i in rows)
    for ids in (dataset.interactions.user_ids, dataset.interactions.item_ids):
        assert ids.equals(ids.sort())


def test_rows_of_features_follow_the_sorted_ids(shop: Path) -> None:
    np.save(shop / "image.npy", np.array([[1.0], [2.0], [3.0]]))
    features = load(shop, modalities={"image": {"features": "image.npy"}}).modalities["image"].features
    assert features is not None
    assert features.to_array().tolist() == [[1], [2], [3]]


def test_rows_of_features_follow_the_items_file(shop: Path) -> None:
    write_interactions(shop / "items.csv", [(30, "x"), (99, "y"), (10, "z"), (20, "z")], "item_id,title")
    np.save(shop / "image.npy", np.array([[30.0], [99.0], [10.0], [0.0]]))
    dataset = load(shop, items="items.csv", modalities={"image": {"features": "image.npy"}})
    assert dataset.interactions.item_ids.to_list() == [30, 99, 10, 20]
    assert dataset.modalities["image"].features.to_array().tolist() == [[30], [99], [10], [0]]
    assert external_pairs(dataset, "train") == [("bo", 30), ("al", 10)]
    assert dataset.report["cold_items"] == 1
    assert dataset.report["items_without_image"] == 1


def test_a_list_of_items_may_call_its_column_as_the_interactions_do(shop: Path) -> None:
    interactions = {"path": "sold.csv", "item": "sku"}
    pl.read_csv(shop / "shop.csv").rename({"item": "sku"}).write_csv(shop / "sold.csv")
    write_interactions(shop / "items.csv", [(30,), (20,), (10,), (40,)], "sku")
    assert load(shop, interactions=interactions, items="items.csv").interactions.item_ids.to_list() == [30, 20, 10, 40]
    write_interactions(shop / "items.csv", [(30,), (20,), (10,)], "item_id")
    assert load(shop, interactions=interactions, items="items.csv").interactions.item_ids.to_list() == [30, 20, 10]


def test_items_known_to_parquet_features_join_the_catalogue(shop: Path) -> None:
    pl.DataFrame({"item_id": [15, 30, 10], "x": [1.5, 3.0, 1.0]}).write_parquet(shop / "text.parquet")
    np.save(shop / "image.npy", np.ones((4, 2)))
    dataset = load(shop, modalities={"text": {"features": "text.parquet"}, "image": {"features": "image.npy"}})
    assert dataset.interactions.item_ids.to_list() == [10, 15, 20, 30]
    assert dataset.modalities["text"].features.to_array().tolist() == [[1], [1.5], [0], [3]]
    assert (dataset.report["cold_items"], dataset.report["items_without_text"]) == (1, 1)


def test_with_an_items_file_other_items_of_parquet_features_are_left_out(shop: Path) -> None:
    write_interactions(shop / "items.csv", [(30,), (20,), (10,)], "item_id")
    pl.DataFrame({"item_id": [15, 30, 10], "x": [1.5, 3.0, 1.0]}).write_parquet(shop / "text.parquet")
    dataset = load(shop, items="items.csv", modalities={"text": {"features": "text.parquet"}})
    assert dataset.modalities["text"].features.to_array().tolist() == [[3], [0], [1]]


def test_integer_like_ids_match_a_catalogue_of_strings(shop: Path) -> None:
    write_interactions(shop / "items.csv", [("10",), ("B7",), ("20",), ("30",)], "asin")
    dataset = load(shop, items={"path": "items.csv", "column": "asin"})
    assert dataset.interactions.item_ids.to_list() == ["10", "B7", "20", "30"]
    assert external_pairs(dataset, "valid") == [("al", "20")]


def test_low_ratings_are_left_out_first_or_said_not_to_be_looked_at(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [("al", 10, 5), ("al", 10, 1), ("al", 20, 3.5), ("bo", 10, 4), ("bo", 20, 3), ("bo", 30, 5), ("cy", 30, 2)]
    rows = [(*row, "train") for row in rows] + [("al", 40, 5, "test"), ("bo", 40, 5, "valid")]
    write_interactions(tmp_path / "shop.csv", rows, "user,item,rating:float,split")
    with caplog.at_level("INFO", "dream_pyg"):
        assert len(external_pairs(load(tmp_path), "train")) == 6
    assert "shop.csv is an interaction, whatever its 'rating'. To leave low ones out, give --min-rating" in caplog.text
    caplog.clear()
    with caplog.at_level("INFO", "dream_pyg"):
        dataset = load(tmp_path, filter={"min_rating": 3.5})
    assert caplog.text == ""
    assert sorted(external_pairs(dataset, "train")) == [("al", 10), ("al", 20), ("bo", 10), ("bo", 30)]
    assert [dataset.report[key] for key in ("rows_read", "low_ratings_dropped", "duplicates_dropped")] == [9, 3, 0]
    assert list(dataset.interactions.user_ids) == ["al", "bo"]
    write_interactions(tmp_path / "shop.csv", [("al", 1, "5"), ("al", 2, "good")], "user,item,stars")
    lowest = {"min_rating": 3}
    with pytest.raises(DataError, match=r"column 'stars': expected a number in each row, got 'good' in row 2"):
        load(tmp_path, interactions={"path": "shop.csv", "rating": "stars"}, filter=lowest)
    for rating in ("starts", None):
        with pytest.raises(DataError, match="rating") as caught:
            load(tmp_path, interactions={"path": "shop.csv", "rating": rating}, filter=lowest)
        assert "stars" in str(caught.value)
    with pytest.raises(ConfigError, match="rating and item are both the column 'item'"):
        load(tmp_path, interactions={"path": "shop.csv", "item": "item", "rating": "item"}, filter=lowest)
    write_interactions(tmp_path / "shop.csv", [("al", 1, 5), ("al", 2, 4)], "user,item,rating")
    with pytest.raises(
        DataError, match=r"None of the 2 ratings is at least 6; the highest is 5. Lower filter.min_rating \(--min-rat"
    ):
        load(tmp_path, filter={"min_rating": 6})


def test_the_k_core_keeps_features_and_neighbours_aligned(tmp_path: Path) -> None:
    square = [(user, item) for user in (1, 2, 3) for item in ("b", "d", "e")]
    write_interactions(tmp_path / "shop.csv", [*square, (1, "a"), (2, "c"), (9, "b")], "user,item")
    np.save(tmp_path / "image.npy", np.arange(1, 6)[:, None])
    indices = np.array([[1, 3], [0, 3], [0, 1], [4, 1], [2, 3]])
    np.savez(tmp_path / "knn.npz", indices=indices, cosine=np.array([[0.9, 0.8]] * 5))
    modalities = {"image": {"features": "image.npy", "neighbors": "knn.npz"}}
    dataset = load(tmp_path, filter={"k_core": 2}, modalities=modalities)
    assert dataset.interactions.item_ids.to_list() == ["b", "d", "e"]
    assert dataset.interactions.user_ids.to_list() == [1, 2, 3]
    image = dataset.modalities["image"]
    assert image.features.to_array().tolist() == [[2], [4], [5]]
    assert image.neighbors.index.tolist() == [[1, -1], [2, 0], [1, -1]]
    np.testing.assert_allclose(image.neighbors.similarity, [[0.8, 0], [0.9, 0.8], [0.8, 0]])
    assert (dataset.report["k_core_dropped"], dataset.report["cold_items"]) == (3, 0)


def test_the_default_split_is_given_or_else_random(shop: Path) -> None:
    rows = [(user, item, 0) for user in range(20) for item in range(10)]
    write_interactions(shop / "full.csv", rows, "user,item,split")
    with pytest.raises(DataError, match="The valid split is empty"):
        load(shop, interactions="full.csv")
    random = load(shop, interactions="full.csv", split={"method": "random", "seed": 1})
    write_interactions(shop / "plain.csv", [row[:2] for row in rows], "user,item")
    assert load(shop, interactions="plain.csv", split={"seed": 1}).report == random.report
    assert [random.report[split] for split in ("train", "valid", "test")] == [160, 20, 20]


def test_test_may_be_empty_unless_something_was_to_be_in_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [(user, item, int(item == 9)) for user in range(20) for item in range(10)]
    write_interactions(tmp_path / "shop.csv", rows)
    with caplog.at_level("INFO", "dream_pyg"):
        report = load(tmp_path).report
    assert [report[split] for split in ("train", "valid", "test")] == [180, 20, 0]
    assert "train on this graph with --no-test" in caplog.text
    assert load(tmp_path, split={"method": "random", "ratios": [0.9, 0.1, 0]}).report["test"] == 0
    write_interactions(tmp_path / "shop.csv", [*rows, (99, 0, 2)])  # of a user without any in train
    with pytest.raises(DataError, match="The test split is empty"):
        load(tmp_path)


@pytest.mark.parametrize("method", ["leave_last_out", "time"])
def test_splits_by_time(tmp_path: Path, method: str) -> None:
    rows = [(user, item, 100 * item + user) for user in range(5) for item in range(10)]
    write_interactions(tmp_path / "shop.csv", rows[::-1], "user,item,timestamp")
    dataset = load(tmp_path, split={"method": method})
    assert {item for _, item in external_pairs(dataset, "test")} == {9}
    assert {item for _, item in external_pairs(dataset, "valid")} == {8}
    latest = dataset.interactions.timestamp[dataset.interactions.split == 0].max()
    assert latest == 704


def test_random_splits_forget_the_label_of_duplicates(tmp_path: Path) -> None:
    rows = [(0, item, 2, 5) for item in range(9)] + [(0, 0, 0, 7)]
    write_interactions(tmp_path / "shop.csv", rows, "user,item,split,timestamp")
    dataset = load(tmp_path, split={"method": "random"})
    assert (dataset.interactions.timestamp == 5).all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"interactions": "none.csv"}, r"Dataset 'none', interactions: expected a file at .*none\.csv.*data_dir"),
        ({"modalities": {"image": {"features": "x.npy"}}}, r"Dataset 'shop', image\.features: .* missing"),
        ({"modalities": {"image": {"neighbors": "x.npz"}}}, r"Dataset 'shop', image\.neighbors: .* missing"),
        ({"items": "none.csv"}, r"Dataset 'shop', items: .* missing"),
        ({"split": {"method": "time"}}, r"'time', but .* no timestamp column.*interactions.timestamp \(--timestamp-c"),
        (
            {"interactions": "plain.csv", "split": {"method": "given"}},
            r"'given', but .* no split column\. Name it with interactions.split \(--split-column\), or .*\(--split\)",
        ),
        ({"interactions": "plain.csv", "split": {"method": "leave_last_out"}}, "timestamp is 0 in every interaction"),
        ({"filter": {"k_core": 4}}, r"The 4-core of the 6 interactions is empty.*Lower filter.k_core \(--k-core\)"),
        ({"items": "items.csv"}, r"lacks 1 of the 3 items with interactions, for example 20\. List .* \(--items\)"),
        ({"items": "twice.csv"}, "the id 10 occurs more than once"),
        ({"items": "gap.csv"}, "the id in row 2 is missing"),
        ({"items": {"path": "items.csv", "column": "sku"}}, "expected 'sku', found 'item_id'"),
        ({"items": "sku.csv"}, r"found 'sku'\. Rename one, or name it \(`column` .*, or --item-column if .* so\)\.$"),
        (
            {"items": "semicolons.csv"},
            r"found 'sku;title'\..* say what \(`separator` under \[items\] of a dataset.toml",
        ),
        (
            {"modalities": {"image": {"features": "image.npy"}}},
            r"Features of image: .* has 5 rows, .* has 3 items.*--items",
        ),
        ({"modalities": {"text": {"features": "text.parquet"}}}, "are strings, but those of the interactions are int"),
        ({"expected": {"train": 3, "num_items": 3, "test": 1}}, "train 3 expected, 2 found; test 1 expected, 3 found"),
    ],
)
def test_datasets_refused(shop: Path, values: dict[str, Any], message: str) -> None:
    write_interactions(shop / "plain.csv", [(1, item, 0) for item in range(5)], "user,item,timestamp")
    write_interactions(shop / "items.csv", [(10,), (30,), (40,)], "item_id")
    write_interactions(shop / "sku.csv", [(10,), (20,), (30,)], "sku")
    write_interactions(shop / "semicolons.csv", [("10;x",), ("20;y",)], "sku;title")
    write_interactions(shop / "twice.csv", [(10,), (10,), (20,), (30,)], "item_id")
    write_interactions(shop / "gap.csv", [(10, 1), (None, 1), (20, 1), (30, 1)], "item_id,x")
    np.save(shop / "image.npy", np.ones((5, 2)))
    pl.DataFrame({"item_id": ["10"], "x": [1.0]}).write_parquet(shop / "text.parquet")
    with pytest.raises(DataError, match=message) as caught:
        load(shop, **values)
    assert "\n" not in str(caught.value)


def test_modalities_cover_the_catalogue(shop: Path) -> None:
    dataset = load(shop)
    with pytest.raises(DataError, match="'image' covers 2 items, the interactions have 3"):
        dataclasses.replace(dataset, modalities={"image": Modality(FeatureMatrix(np.ones((2, 1)), np.array([0, 1])))})
    with pytest.raises(DataError, match="features, neighbours or both"):
        Modality()
    graph = Neighbors.sort(np.array([[1], [-1]]), np.ones((2, 1)))
    assert Modality(neighbors=graph).has.tolist() == [True, False]


FULL = """
name = "shop"
[interactions]
path = "shop.csv"
user = "user"
item = "item"
split = "split"
separator = ","
[items]
path = "items.csv"
column = "asin"
[filter]
k_core = 5
[split]
method = "time"
ratios = [0.7, 0.1, 0.2]
seed = 3
[modalities.image]
features = "image.npy"
[modalities.audio_2]
neighbors = "audio.npz"
[expected]
num_users = 4
"""


def test_config_of_a_file_and_of_its_directory(tmp_path: Path) -> None:
    (tmp_path / "dataset.toml").write_text(FULL, encoding="utf-8")
    config = DatasetConfig.load(tmp_path)
    assert config == DatasetConfig.load(tmp_path / "dataset.toml")
    assert config.split.ratios == (0.7, 0.1, 0.2)
    assert config.filter.k_core == 5
    assert config.files() == {
        "interactions": tmp_path / "shop.csv",
        "items": tmp_path / "items.csv",
        "image.features": tmp_path / "image.npy",
        "audio_2.neighbors": tmp_path / "audio.npz",
    }
    assert config.files("/else")["items"] == Path("/else/items.csv")
    assert DatasetConfig.create(directory=tmp_path, **config.model_dump()) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name =", "is not valid TOML"),
        ("", "'interactions' is missing"),
        ("interaction = 'x.csv'", "unknown key 'interaction', did you mean 'interactions'"),
        ("[interactions]\npth = 'x'", "unknown key 'interactions.pth', did you mean 'path'"),
        ("[interactions]\nuser = 'x'", "'interactions.path' is missing"),
        ("interactions = 3", "interactions: .*got 3"),
        ("interactions = 'x'\nname = ' '", "name: must not be blank"),
        ("interactions = 'x'\n[items]\npath = 'x'\ncolumm = 'y'", "'items.columm', did you mean 'column'"),
        ("interactions = 'x'\n[filter]\nk_core = -1", "filter.k_core: .*got -1"),
        ("interactions = 'x'\n[filter]\nk_core = 1.5", "filter.k_core: .*got 1.5"),
        ("interactions = 'x'\n[split]\nmethod = 'randon'", "split.method: .*'leave_last_out'.*got 'randon'"),
        ("interactions = 'x'\n[split]\nratios = [0.8, 0.1]", "split.ratios"),
        ("interactions = 'x'\n[split]\nratios = [0.8, 0.1, 0.2]", "split.ratios: must be three positive shares"),
        ("[interactions]\npath = 'x'\nuser = 'a'\nitem = 'a'", "item and user are both the column 'a'"),
        ("interactions = 'x'\n[modalities.image]", "modalities.image: a modality needs features, neighbors or both"),
        (
            "interactions = 'x'\n[modalities.image]\nfeature = 'y'",
            "'modalities.image.feature', did you mean 'features'",
        ),
        ("interactions = 'x'\n[modalities.Image]\nfeatures = 'y'", "the modality 'Image' must be named with a-z"),
        ("interactions = 'x'\n[modalities.'a/b']\nfeatures = 'y'", "the modality 'a/b' must be named"),
        ("interactions = 'x'\n[expected]\nnum_user = 3", "'expected.num_user', did you mean 'num_users'"),
    ],
)
def test_config_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "dataset.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message) as caught:
        DatasetConfig.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_config_missing_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Cannot read .*dataset\.toml: No such file"):
        DatasetConfig.load(tmp_path)
    (tmp_path / "dataset.toml").write_bytes(b"name = '\xff'")
    with pytest.raises(ConfigError, match="is not valid TOML"):
        DatasetConfig.load(tmp_path)


def test_modalities_are_replaced_added_and_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dataset.toml").write_text(FULL, encoding="utf-8")
    config = DatasetConfig.load(tmp_path)
    monkeypatch.chdir(tmp_path.parent)
    changed = config.with_modality("image", features="clip.npy").with_modality("text", neighbors=Path("/knn.npz"))
    changed = changed.with_modality("audio_2", features="/audio.npy").without_modality("image")
    assert list(changed.modalities) == ["audio_2", "text"]
    assert list(config.modalities) == ["image", "audio_2"]
    files = changed.files(tmp_path)
    assert files["audio_2.features"] == Path("/audio.npy")
    assert files["audio_2.neighbors"] == tmp_path / "audio.npz"
    assert files["text.neighbors"] == Path("/knn.npz")
    # A path given beside the file is relative to where the user stands, not to the dataset.
    assert config.with_modality("image", features="clip.npy").files()["image.features"] == Path.cwd() / "clip.npy"
    with pytest.raises(ConfigError, match=r"no modality 'video' \(it has: image, audio_2\)"):
        config.without_modality("video")
    with pytest.raises(ConfigError, match="needs features, neighbors or both"):
        config.with_modality("video")
    with pytest.raises(ConfigError, match="the modality 'Video' must be named"):
        config.with_modality("Video", features="x.npy")


def test_sections_are_changed(tmp_path: Path) -> None:
    (tmp_path / "dataset.toml").write_text(FULL, encoding="utf-8")
    config = DatasetConfig.load(tmp_path)
    changed = config.with_section("split", method="random").with_section("filter", k_core=2)
    assert (changed.split.method, changed.split.seed, changed.filter.k_core) == ("random", 3, 2)
    assert changed.files() == config.files()
    changed = changed.with_section("split", seed=5).without_modality("image")
    assert changed.overrides == {"split": {"method": "random", "seed": 5}, "filter": {"k_core": 2}}
    assert config.overrides == {}
    assert (config.expected.num_users, changed.expected.num_users) == (4, None)
    plain = DatasetConfig.create(interactions="x.csv").with_section("items", path="items.csv")
    assert plain.files()["items"] == Path("items.csv")
    with pytest.raises(ConfigError, match=r"'split.sed', did you mean 'seed'"):
        config.with_section("split", sed=4)
    with pytest.raises(ConfigError, match="'splits', did you mean 'split'"):
        config.with_section("splits", seed=4)


def test_inputs_are_described_by_content(shop: Path) -> None:
    np.save(shop / "a.npy", np.ones((3, 1)))
    os.link(shop / "a.npy", shop / "b.npy")
    digests = [
        describe_inputs(DatasetConfig.create(directory=shop, interactions="shop.csv").with_modality("x", features=path))
        for path in (shop / "a.npy", shop / "b.npy")
    ]
    assert [inputs["x.features"]["path"] for inputs in digests] == ["a.npy", "b.npy"]
    assert digests[0]["x.features"]["sha256"] == digests[1]["x.features"]["sha256"]


def test_the_synthetic_shop(tmp_path: Path) -> None:
    path = make_synthetic(tmp_path / "shop", num_users=200, num_items=150)
    dataset = load_dataset(DatasetConfig.load(path))
    assert set(dataset.modalities) == {"image", "text"}
    assert dataset.report["items_without_image"] == dataset.report["items_without_text"] == round(0.05 * 150)
    raw = pl.read_csv(path.parent / "interactions.csv")
    found = [pair for split in ("train", "valid", "test") for pair in external_pairs(dataset, split)]
    assert sorted(found) == sorted(raw.select("user_id", "item_id").rows())


@pytest.mark.parametrize("name", ["baby", "sports", "clothing", "tiktok", "synthetic"])
def test_cards(name: str) -> None:
    config = DatasetConfig.load(CARDS / name)
    card = (CARDS / name / "README.md").read_text(encoding="utf-8")
    assert config.name == name
    for count in config.expected.model_dump(exclude_none=True).values():
        assert f"{count:,}" in card


@pytest.mark.parametrize("name", ["baby", "clothing", "tiktok"])
def test_published_counts(real_data: Callable[[str], Path], name: str) -> None:
    config = DatasetConfig.load(CARDS / name)
    for modality in config.modalities:
        config = config.without_modality(modality)
    report = load_dataset(config, real_data(name)).report
    expected = config.expected
    # Published counts include the interactions of users that never occur in train; only TikTok has any.
    dropped = {"tiktok": {"valid": 5, "test": 5}}.get(name, {})
    assert report["rows_read"] == expected.num_interactions
    assert report["cold_start_dropped"] == sum(dropped.values())
    for key in ("num_users", "num_items", "train", "valid", "test"):
        assert report[key] == getattr(expected, key) - dropped.get(key, 0)
    assert report["duplicates_dropped"] == 0


def test_published_features_and_graphs(real_data: Callable[[str], Path]) -> None:
    config = DatasetConfig.load(CARDS / "tiktok")
    dataset = load_dataset(config, real_data("tiktok"))
    for modality in ("image", "audio"):
        features = dataset.modalities[modality].features
        assert (features.shape, features.dtype) == ((6710, 128), np.float16)
        assert isinstance(features.matrix, np.memmap)
        assert features.has.all()
    baby = real_data("baby")
    config = DatasetConfig.load(CARDS / "baby").without_modality("image").without_modality("text")
    config = config.with_modality("text", features=baby / "text_rec_feat.npy", neighbors=baby / "text_knn10.npz")
    text = load_dataset(config, baby).modalities["text"]
    unit = text.features.to_array()
    cosine = np.einsum("if,ikf->ik", unit, unit[text.neighbors.index])
    # The published features were fitted to the cosines of the graph.
    assert abs(cosine - text.neighbors.similarity).mean() < 0.01
