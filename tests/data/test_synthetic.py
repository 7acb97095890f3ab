"""The synthetic bookshop holds what it declares, and its planted structure can be read back from its files."""

from __future__ import annotations

import dataclasses
import math
import tomllib
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from dream_pyg.data import synthetic
from dream_pyg.data.synthetic import GENRES, STYLES, SyntheticCatalogue, make_synthetic, sample_catalogue
from dream_pyg.errors import ConfigError, StoreError

SMALL = {"num_users": 60, "num_items": 80, "num_genres": 4, "num_styles": 4}


@pytest.fixture(scope="module")
def catalogue() -> SyntheticCatalogue:
    return sample_catalogue(seed=5)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_synthetic(tmp_path_factory.mktemp("bookshop") / "synthetic", seed=5).parent


def differing(first: SyntheticCatalogue, second: SyntheticCatalogue) -> set[str]:
    """Names of the fields in which two catalogues differ."""
    names = [field.name for field in dataclasses.fields(SyntheticCatalogue)]
    return {name for name in names if not np.array_equal(getattr(first, name), getattr(second, name))}


def neighbours(features: np.ndarray, count: int = 10) -> np.ndarray:
    """The rows (N, count) of largest cosine, without the row itself."""
    unit = features.astype(np.float64) / np.linalg.norm(features.astype(np.float64), axis=1, keepdims=True)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -np.inf)
    return np.argsort(-similarity, axis=1)[:, :count]


def test_same_seed_gives_same_catalogue_and_files(tmp_path: Path) -> None:
    assert differing(sample_catalogue(seed=3, **SMALL), sample_catalogue(seed=3, **SMALL)) == set()
    first, second = (make_synthetic(tmp_path / name, seed=3, **SMALL).parent for name in "ab")
    assert {path.name for path in first.iterdir()} == {
        "dataset.toml",
        "interactions.csv",
        "items.csv",
        "image.npy",
        "text.parquet",
    }
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name


def test_different_seeds_differ_in_everything_but_user_ids() -> None:
    every_field = {field.name for field in dataclasses.fields(SyntheticCatalogue)}
    assert differing(sample_catalogue(seed=3, **SMALL), sample_catalogue(seed=4, **SMALL)) == every_field - {"user_ids"}


def test_missing_share_leaves_the_interactions_alone() -> None:
    full, holes = (sample_catalogue(**SMALL, missing_share=share) for share in (0.0, 0.2))
    assert full.has_image.all()
    assert full.has_text.all()
    assert differing(full, holes) == {"image", "text", "has_image", "has_text"}


def test_scoring_in_blocks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sample_catalogue(**SMALL)
    monkeypatch.setattr(synthetic, "_BLOCK_CELLS", 7 * SMALL["num_items"])
    assert differing(whole, sample_catalogue(**SMALL)) == set()


def test_default_counts_and_shares(catalogue: SyntheticCatalogue) -> None:
    assert (len(set(catalogue.user_ids)), len(set(catalogue.item_ids))) == (3000, 2000)
    assert catalogue.is_cold.sum() == 60
    assert (~catalogue.has_image).sum() == 100
    assert (~catalogue.has_text).sum() == 100
    assert not np.array_equal(catalogue.has_image, catalogue.has_text)
    lengths = np.bincount(catalogue.users, minlength=3000)
    assert lengths.min() == 5
    # The standard error of the mean is 0.06.
    assert lengths.mean() == pytest.approx(8, abs=0.3)
    assert lengths.max() >= 3 * np.median(lengths)


def test_cold_items_are_untouched_and_hardly_any_other(catalogue: SyntheticCatalogue) -> None:
    untouched = np.bincount(catalogue.items, minlength=2000) == 0
    assert untouched[catalogue.is_cold].all()
    assert untouched[~catalogue.is_cold].mean() < 0.02


def test_popularity_has_a_long_tail(catalogue: SyntheticCatalogue) -> None:
    counts = np.sort(np.bincount(catalogue.items, minlength=2000))[::-1]
    # Were all items alike, the most popular tenth would take 15 %.
    assert counts[:200].sum() > 0.2 * counts.sum()


def test_no_pair_twice_and_time_moves_on(catalogue: SyntheticCatalogue) -> None:
    pairs = catalogue.users * 2000 + catalogue.items
    assert len(np.unique(pairs)) == len(pairs)
    assert (np.diff(catalogue.timestamps) >= 0).all()
    by_user = np.argsort(catalogue.users, kind="stable")
    same_user = np.diff(catalogue.users[by_user]) == 0
    assert (np.diff(catalogue.timestamps[by_user])[same_user] > 0).all()


def test_ids_name_style_and_genre(catalogue: SyntheticCatalogue) -> None:
    assert catalogue.user_ids[42] == "user-00042"
    assert catalogue.item_ids[7] == f"{STYLES[catalogue.item_styles[7]]}-{GENRES[catalogue.item_genres[7]]}-0007"
    assert len(set(GENRES)) == len(GENRES)
    assert not any("-" in word for word in GENRES + STYLES)


def test_genres_and_styles_share_the_items_evenly(catalogue: SyntheticCatalogue) -> None:
    for labels, number in ((catalogue.item_genres, len(GENRES)), (catalogue.item_styles, len(STYLES))):
        sizes = np.bincount(labels, minlength=number)
        assert sizes.max() - sizes.min() <= 1


def test_features_are_finite_and_zero_exactly_where_missing(catalogue: SyntheticCatalogue) -> None:
    assert (catalogue.image.shape, catalogue.image.dtype) == ((2000, 128), np.float16)
    assert (catalogue.text.shape, catalogue.text.dtype) == ((2000, 64), np.float32)
    for features, has in ((catalogue.image, catalogue.has_image), (catalogue.text, catalogue.has_text)):
        assert np.isfinite(features).all()
        assert np.array_equal(features.any(axis=1), has)


def test_image_tells_the_style_and_text_the_genre(catalogue: SyntheticCatalogue) -> None:
    complete = catalogue.has_image & catalogue.has_text
    genres, styles = catalogue.item_genres[complete], catalogue.item_styles[complete]
    near_image, near_text = neighbours(catalogue.image[complete]), neighbours(catalogue.text[complete])

    def purity(labels: np.ndarray, rows: np.ndarray) -> float:
        return (labels[rows] == labels[:, None]).mean()

    assert purity(styles, near_image) > 0.8
    assert purity(genres, near_text) > 0.8
    # Each carries a faint trace, above chance, of what the other says aloud.
    assert 2 / len(STYLES) < purity(styles, near_text) < 0.3
    assert 2 / len(GENRES) < purity(genres, near_image) < 0.3


def test_both_modalities_recommend_better_than_either_and_either_than_popularity(
    catalogue: SyntheticCatalogue,
) -> None:
    num_users, num_items = 1500, 2000
    # The last choice of each user is held out; the interactions are sorted by time.
    last = len(catalogue.users) - 1 - np.unique(catalogue.users[::-1], return_index=True)[1]
    target = catalogue.items[last][:num_users]
    kept = np.setdiff1d(np.arange(len(catalogue.users)), last)
    popularity = np.bincount(catalogue.items[kept], minlength=num_items)
    kept = kept[catalogue.users[kept] < num_users]
    history = np.zeros((num_users, num_items), dtype=np.float32)
    history[catalogue.users[kept], catalogue.items[kept]] = 1

    def hit_rate(scores: np.ndarray) -> float:
        scores = np.where(history > 0, -np.inf, scores)
        own = scores[np.arange(num_users), target][:, None]
        return ((scores >= own).sum(axis=1) <= 20).mean()

    def content_scores(features: np.ndarray) -> np.ndarray:
        wide = features.astype(np.float32)
        unit = wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12)
        return history @ unit @ unit.T

    image, text = content_scores(catalogue.image), content_scores(catalogue.text)
    by_popularity = hit_rate(np.broadcast_to(popularity, history.shape))
    either = hit_rate(image), hit_rate(text)
    assert min(either) > 2 * by_popularity
    assert hit_rate(image + text) > 1.2 * max(either)


def test_users_follow_their_planted_taste(catalogue: SyntheticCatalogue) -> None:
    scores = catalogue.choice_scores()
    assert np.isneginf(scores[:, catalogue.is_cold]).all()
    assert np.array_equal(catalogue.choice_scores(np.array([3, 1])), scores[[3, 1]])
    chosen = scores[catalogue.users, catalogue.items]
    rank = (scores[catalogue.users[:2000]] > chosen[:2000, None]).sum(axis=1)
    popularity = np.bincount(catalogue.items, minlength=2000)
    rank_by_popularity = (popularity[None, :] > popularity[catalogue.items[:2000], None]).sum(axis=1)
    assert np.median(rank) < 0.1 * np.median(rank_by_popularity)


def test_choices_are_drawn_without_replacement_from_the_softmax() -> None:
    generator = np.random.default_rng(0)
    num_users, popularity = 40_000, np.log([0.4, 0.3, 0.2, 0.1])
    lengths = np.full(num_users, 2)
    nothing = np.zeros((num_users, 1)), np.zeros((4, 1))
    users, items = synthetic._choices(generator, *nothing, popularity, lengths)
    assert np.array_equal(users, np.repeat(np.arange(num_users), 2))
    first, second = items.reshape(-1, 2).T
    found = np.zeros((4, 4))
    np.add.at(found, (first, second), 1 / num_users)
    p = np.exp(popularity)
    expected = np.array([[0 if i == j else p[i] * p[j] / (1 - p[i]) for j in range(4)] for i in range(4)])
    # Six standard errors of the largest cell.
    np.testing.assert_allclose(found, expected, atol=6 * math.sqrt(0.25 / num_users))


def test_files_hold_the_catalogue(directory: Path, catalogue: SyntheticCatalogue) -> None:
    interactions = pl.read_csv(directory / "interactions.csv")
    assert interactions.columns == ["user_id", "item_id", "timestamp"]
    assert interactions["user_id"].to_list() == [catalogue.user_ids[user] for user in catalogue.users]
    assert interactions["item_id"].to_list() == [catalogue.item_ids[item] for item in catalogue.items]
    assert np.array_equal(interactions["timestamp"].to_numpy(), catalogue.timestamps)

    items = pl.read_csv(directory / "items.csv")
    assert items["item_id"].to_list() == list(catalogue.item_ids)

    image = np.load(directory / "image.npy", allow_pickle=False)
    assert image.dtype == np.float16
    assert np.array_equal(image, catalogue.image)

    text = pl.read_parquet(directory / "text.parquet")
    assert text.schema == {"item_id": pl.String, "features": pl.List(pl.Float32)}
    rows = np.flatnonzero(catalogue.has_text)
    assert text["item_id"].to_list() == [catalogue.item_ids[row] for row in rows]
    assert np.array_equal(np.array(text["features"].to_list(), dtype=np.float32), catalogue.text[rows])


def test_description_declares_what_was_written(directory: Path, catalogue: SyntheticCatalogue) -> None:
    assert tomllib.loads((directory / "dataset.toml").read_text(encoding="utf-8")) == {
        "name": "synthetic",
        "interactions": {"path": "interactions.csv"},
        "items": {"path": "items.csv", "column": "item_id"},
        "split": {"method": "random", "ratios": [0.8, 0.1, 0.1], "seed": 5},
        "modalities": {"image": {"features": "image.npy"}, "text": {"features": "text.parquet"}},
        "expected": {"num_users": 3000, "num_items": 2000, "num_interactions": len(catalogue.users)},
    }


@pytest.mark.parametrize("occupant", ["empty directory", "directory", "file", "dangling link"])
def test_existing_path_is_refused_and_left_alone(tmp_path: Path, occupant: str) -> None:
    target = tmp_path / "synthetic"
    if occupant == "file":
        target.write_text("mine")
    elif occupant == "dangling link":
        target.symlink_to(tmp_path / "nowhere")
    else:
        target.mkdir()
        if occupant == "directory":
            (target / "mine").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(StoreError, match="already exists"):
        make_synthetic(target, **SMALL)
    assert sorted(tmp_path.rglob("*")) == before


def test_bad_argument_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="num_users"):
        make_synthetic(tmp_path / "synthetic", num_users=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, "seed must be an integer from 0, but it is -1"),
        ({"num_users": 0}, "num_users must be an integer from 1, but it is 0"),
        ({"num_users": True}, "num_users must be an integer"),
        ({"num_users": 10.0}, "num_users must be an integer"),
        ({"num_items": 1}, "num_items must be an integer from 2, but it is 1"),
        ({"num_genres": 41}, "num_genres must be an integer from 1 to 40, but it is 41"),
        ({"num_styles": 0}, "num_styles must be an integer from 1 to 24, but it is 0"),
        ({"cold_share": 0.6}, "cold_share must be a share from 0 to 0.5, but it is 0.6"),
        ({"missing_share": -0.1}, "missing_share must be a share"),
        ({"missing_share": math.nan}, "missing_share must be a share"),
        ({"interactions_per_user": 0.5}, "interactions_per_user must be a number from 1, but it is 0.5"),
        ({"interactions_per_user": math.inf}, "interactions_per_user must be a number from 1"),
        ({"num_items": 20, "cold_share": 0.5}, "at most half of the 10 items that are not cold, but it is 8.0"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sample_catalogue(**arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_users": 1, "num_items": 2, "interactions_per_user": 1, "num_genres": 1, "num_styles": 1},
        {"num_users": 3, "num_items": 16, "cold_share": 0.0},
        {"num_users": 50, "num_items": 20, "cold_share": 0.5, "missing_share": 0.5, "interactions_per_user": 5},
        {"num_users": 40, "num_items": 40, "interactions_per_user": 2.5},
    ],
)
def test_smallest_catalogues_still_hold_together(arguments: dict[str, float]) -> None:
    catalogue = sample_catalogue(**arguments)
    assert set(catalogue.users) == set(range(arguments["num_users"]))
    assert not catalogue.is_cold[catalogue.items].any()
    pairs = list(zip(catalogue.users, catalogue.items, strict=True))
    assert len(set(pairs)) == len(pairs)
