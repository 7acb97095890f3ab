"""Approximate searches: what they find, what they say of it, and what they refuse."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dream_pyg.data.features import FeatureMatrix
from dream_pyg.data.synthetic import make_clustered_features
from dream_pyg.errors import ConfigError, SearchError
from dream_pyg.graph.knn import (
    ArrayRows,
    Candidates,
    Engine,
    FoundNeighbors,
    approximate,
    choice,
    clusters,
    cosine_knn,
    faiss_indices,
    refine,
)
from dream_pyg.graph.knn.choice import APPROXIMATE
from dream_pyg.graph.knn.clusters import ClusterIndex
from dream_pyg.graph.knn.rows import unit_rows

K = 10


def cosines(matrix: NDArray[np.floating]) -> NDArray[np.float64]:
    """Of all pairs, in float64; -inf for a row with itself and with rows of zeros."""
    unit = matrix.astype(np.float64)
    norm = np.linalg.norm(unit, axis=1, keepdims=True)
    cosine = (unit / np.where(norm > 0, norm, 1)) @ (unit / np.where(norm > 0, norm, 1)).T
    zero = norm[:, 0] == 0
    cosine[zero] = cosine[:, zero] = -np.inf
    np.fill_diagonal(cosine, -np.inf)
    return cosine


def recall(found: FoundNeighbors, matrix: NDArray[np.floating], count: int = K) -> float:
    """The share of found rows among the most similar ones, by brute force; ties count."""
    cosine = cosines(matrix)
    last = -np.sort(-cosine, axis=1)[:, count - 1 : count]
    reached = np.take_along_axis(cosine, np.maximum(found.index, 0), axis=1) >= last - 1e-6
    present = np.isfinite(last[:, 0])
    return float(((found.index >= 0) & reached)[present].sum() / (count * present.sum()))


@pytest.fixture(scope="module")
def clustered(tmp_path_factory: pytest.TempPathFactory) -> NDArray[np.float16]:
    """1,500 rows in 30 clusters, memory-mapped."""
    path = tmp_path_factory.mktemp("features") / "clustered.npy"
    make_clustered_features(path, 1500, 48, num_clusters=30, intrinsic_dim=6)
    return np.load(path, mmap_mode="r")


@pytest.mark.parametrize("engine", APPROXIMATE)
def test_recall_is_what_the_report_says_and_what_was_asked_for(clustered: NDArray[np.float16], engine: Engine):
    found = cosine_knn(ArrayRows(clustered), K, engine=engine, min_recall=0.97)
    true = recall(found, clustered)
    assert found.report.engine == engine
    assert found.report.recall >= 0.97
    # The rows that the choice was not made by; their share of true neighbours estimates that of all.
    assert found.report.num_measured == approximate.NUM_MEASURED
    assert true == pytest.approx(found.report.recall, abs=0.01)
    assert not (found.index == np.arange(len(clustered))[:, None]).any()
    expected = np.take_along_axis(cosines(clustered), found.index, axis=1)
    np.testing.assert_allclose(found.similarity, expected, atol=1e-6)
    assert (np.diff(found.similarity, axis=1) <= 0).all()


@pytest.mark.parametrize("engine", APPROXIMATE)
def test_features_that_are_reduced_first(engine: Engine):
    generator = np.random.default_rng(0)
    matrix = (generator.normal(size=(600, 8)) @ generator.normal(size=(8, 300))).astype(np.float32)
    found = cosine_knn(ArrayRows(matrix), K, engine=engine)
    assert recall(found, matrix) >= 0.97


def setting(num_lists: int, joins: int = 0) -> dict[str, int]:
    return {"clusters_of_a_row": num_lists, "joins": joins}


def index_of(matrix: NDArray[np.floating], count: int = K) -> ClusterIndex:
    return ClusterIndex(ArrayRows(matrix), count=count, seed=0, what="rows")


def test_many_joins_find_everything():
    matrix = np.random.default_rng(1).normal(size=(700, 24)).astype(np.float32)
    index = index_of(matrix)
    candidates = index.search(np.arange(700), approximate.max_candidates("clusters", K), index.settings[-1])
    expected = np.argsort(-cosines(matrix), axis=1)[:, :K]
    missed = [len(set(mine) - set(theirs)) for mine, theirs in zip(expected, candidates, strict=True)]
    assert sum(missed) == 0
    assert all(len(set(row[row >= 0])) == (row >= 0).sum() for row in candidates)
    assert not (candidates == np.arange(700)[:, None]).any()


def found_share(
    index: ClusterIndex, matrix: NDArray[np.floating], wanted: NDArray[np.int64], at: dict[str, int]
) -> float:
    expected = np.argsort(-cosines(matrix)[wanted], axis=1)[:, :K]
    found = index.search(wanted, approximate.max_candidates("clusters", K), at)
    return float(np.mean([np.isin(mine, theirs) for mine, theirs in zip(expected, found, strict=True)]))


def test_more_clusters_of_a_row_and_more_joins_find_more():
    matrix = np.random.default_rng(5).normal(size=(2000, 20)).astype(np.float32)
    index, wanted = index_of(matrix), np.arange(0, 2000, 7)
    shares = [found_share(index, matrix, wanted, at) for at in index.settings]
    assert [at["clusters_of_a_row"] for at in index.settings] == [2, 3, 4, 4, 4, 4, 4, 4, 4]
    assert [at["joins"] for at in index.settings] == [0, 0, 0, 1, 2, 3, 4, 5, 6]
    assert shares[0] < shares[1] < shares[2] < shares[3] <= shares[4], shares
    assert shares[4] > 0.99
    assert found_share(index, matrix, wanted, setting(4, joins=1)) == shares[3]  # fewer joins than were done before


def test_clusters_in_regions_find_as_much_as_those_made_at_once(
    clustered: NDArray[np.float16], monkeypatch: pytest.MonkeyPatch
):
    wanted = np.arange(0, 1500, 5)
    at_once = found_share(index_of(clustered), clustered, wanted, setting(3))
    monkeypatch.setattr(clusters, "_UNDIVIDED", 8)
    assert found_share(index_of(clustered), clustered, wanted, setting(3)) == pytest.approx(at_once, abs=0.03)


def test_rows_of_small_clusters_are_compared_with_all(monkeypatch: pytest.MonkeyPatch):
    random = np.random.default_rng(0)
    crowd, apart = random.normal(size=(400, 24)) * 0.1 + 1, random.normal(size=(3, 24)) * 0.01 - 1
    rows = ArrayRows(np.concatenate([crowd, apart]).astype(np.float32))
    index = ClusterIndex(rows, count=10, seed=0, what="rows", fine=True)
    found = index.search(np.arange(403), 14, setting(1))
    assert (found[:, :10] >= 0).all()
    assert (found != np.arange(403)[:, None]).all()
    assert all(len(set(of_row)) == 10 for of_row in found[:, :10].tolist())
    unit = unit_rows(rows.array)
    for row in (400, 401, 402):
        cosine = unit @ unit[row]
        cosine[row] = -np.inf
        assert set(found[row].tolist()) == set(np.argsort(-cosine)[:14].tolist())
    monkeypatch.setattr(clusters, "_COMPARED_AT_ONCE", 50)
    assert np.array_equal(np.sort(index.search(np.arange(403), 14, setting(1))), np.sort(found))


def test_the_order_holds_all_rows_and_similar_ones_side_by_side(clustered: NDArray[np.float16]):
    matrix = np.array(clustered, dtype=np.float32)
    matrix[::9] = 0
    order = index_of(matrix).order
    assert order is not None
    np.testing.assert_array_equal(np.sort(order), np.arange(1500))
    assert not matrix[order[-167:]].any()
    cosine = cosines(matrix)
    side_by_side = cosine[order[:1332], order[1:1333]]
    assert side_by_side.mean() > np.mean(cosine[np.isfinite(cosine)]) + 0.3


def test_components_are_taken_where_few_hold_nearly_all():
    generator = np.random.default_rng(0)
    few = generator.normal(size=(900, 12)) @ generator.normal(size=(12, 96))
    assert index_of(few.astype(np.float32)).parameters["components"] == 12
    assert index_of(generator.normal(size=(900, 96)).astype(np.float32)).parameters["components"] == 96


def test_what_cannot_tell_neighbours_apart_is_given_up(caplog: pytest.LogCaptureFixture):
    generator = np.random.default_rng(0)
    common = 30 * generator.normal(size=(20, 3)) @ generator.normal(size=(3, 64))
    matrix = common[generator.integers(0, 20, 1500)] + generator.normal(size=(1500, 64))
    assert index_of(matrix.astype(np.float32)).parameters["components"] < 10
    with caplog.at_level(logging.INFO, logger="dream_pyg"):
        found = cosine_knn(ArrayRows(matrix.astype(np.float32)), K, engine="clusters", min_recall=0.95)
    assert found.report.parameters["components"] == 64
    assert "all 64 features in float32" in caplog.text
    assert recall(found, matrix) >= 0.94


@pytest.mark.parametrize("at", [setting(3), setting(4, joins=2)])
def test_rows_in_parts_find_the_same(
    clustered: NDArray[np.float16], at: dict[str, int], monkeypatch: pytest.MonkeyPatch
):
    matrix = np.array(clustered)
    matrix[::9] = 0
    whole = index_of(matrix).search(np.arange(1500), 20, at)
    assert ((whole < 0).all(axis=1) == ~matrix.any(axis=1)).all()
    monkeypatch.setattr(clusters, "_LISTED_BYTES", 8 * 3 * 20 * 111)
    monkeypatch.setattr(clusters, "_BLOCK_BYTES", 24 * 3 * 20 * 17)
    np.testing.assert_array_equal(index_of(matrix).search(np.arange(1500), 20, at), whole)
    some = np.random.default_rng(0).permutation(1500)[:40]
    np.testing.assert_array_equal(index_of(matrix).search(some, 20, at), whole[some])


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    approximate.faiss.omp_set_num_threads(1)
    torch.set_num_threads(1)
    yield
    approximate.faiss.omp_set_num_threads(before)
    torch.set_num_threads(before)


@pytest.mark.parametrize("engine", APPROXIMATE)
def test_one_thread_and_one_seed_give_one_graph(clustered: NDArray[np.float16], engine: Engine, one_thread: None):
    first, second = (cosine_knn(ArrayRows(clustered), K, engine=engine, min_recall=0.9) for _ in range(2))
    np.testing.assert_array_equal(first.index, second.index)
    np.testing.assert_array_equal(first.similarity, second.similarity)
    assert first.report.parameters == second.report.parameters
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("at", [setting(3), setting(4, joins=2)])
def test_the_number_of_threads_does_not_matter_to_clusters(clustered: NDArray[np.float16], at: dict[str, int]):
    before = torch.get_num_threads()
    found = []
    for num_threads in (1, 3):
        torch.set_num_threads(num_threads)
        found.append(index_of(clustered).search(np.arange(1500), 20, at))
        assert torch.get_num_threads() == num_threads
    torch.set_num_threads(before)
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("engine", APPROXIMATE)
def test_rows_of_zeros_and_duplicates(clustered: NDArray[np.float16], engine: Engine):
    matrix = np.array(clustered[:600], dtype=np.float32)
    matrix[::3] = 0
    matrix[1::30] = matrix[1]  # 20 equal rows
    found = cosine_knn(ArrayRows(matrix), 5, engine=engine, include_self=True)
    zero = ~matrix.any(axis=1)
    assert (found.index[zero] == -1).all()
    assert not np.isin(found.index, np.flatnonzero(zero)).any()
    np.testing.assert_array_equal(found.index[~zero, 0], np.flatnonzero(~zero))
    np.testing.assert_allclose(found.similarity[1::30], 1, rtol=1e-6)
    others = FoundNeighbors(found.index[:, 1:], found.similarity[:, 1:], found.report)
    assert recall(others, matrix, 4) >= 0.97


def test_many_equal_rows_do_not_displace_others(clustered: NDArray[np.float16], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(clusters, "_FEWEST_DIVIDED", 16)  # so that their cluster is divided
    matrix = np.array(clustered, dtype=np.float32)
    matrix[500:1000] = matrix[500]
    found = cosine_knn(ArrayRows(matrix), K, engine="clusters")
    np.testing.assert_allclose(found.similarity[500:1000], 1, rtol=1e-6)
    assert recall(found, matrix) >= 0.97


@pytest.mark.parametrize("engine", APPROXIMATE)
def test_more_neighbours_than_a_cluster_has_rows(clustered: NDArray[np.float16], engine: Engine):
    found = cosine_knn(ArrayRows(clustered), 60, engine=engine, min_recall=0.5)
    assert found.report.engine == engine
    assert (found.index >= 0).all()
    assert recall(found, clustered, 60) >= 0.49
    most = cosine_knn(ArrayRows(clustered), 1499, engine=engine)
    assert str(most.report) == "flat"  # next to all rows: there is nothing to leave out
    np.testing.assert_array_equal(np.sort(most.index[7]), np.delete(np.arange(1500), 7))


@pytest.mark.parametrize("engine", APPROXIMATE)
@pytest.mark.parametrize("num_rows", [2, 40, 255])
def test_a_few_rows_are_searched_exhaustively(engine: Engine, num_rows: int):
    matrix = np.random.default_rng(2).normal(size=(num_rows, 7)).astype(np.float32)
    count = min(K, num_rows - 1)
    found = cosine_knn(ArrayRows(matrix), count, engine=engine)
    np.testing.assert_array_equal(found.index, cosine_knn(ArrayRows(matrix), count).index)
    assert str(found.report) == "flat"
    zeros = cosine_knn(ArrayRows(np.zeros((261, 3), np.float32)), 3, engine=engine)
    assert (zeros.index == -1).all()


def test_few_rows_among_zeros(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(clusters, "_CLUSTER_ROWS", 300)  # a single cluster, which finds all
    matrix = np.zeros((30_000, 16), dtype=np.float32)
    matrix[::100] = np.random.default_rng(0).normal(size=(300, 16))
    found = cosine_knn(ArrayRows(matrix), K, engine="clusters")
    assert found.report.num_measured > 100
    present = found.index[::100]
    np.testing.assert_array_equal(present, cosine_knn(ArrayRows(matrix), K).index[::100])


@pytest.mark.parametrize("num_threads", [1, 3])
def test_ranking_in_an_order_gives_the_same(
    clustered: NDArray[np.float16], num_threads: int, monkeypatch: pytest.MonkeyPatch
):
    matrix = np.array(clustered, dtype=np.float32)
    matrix[::7] = 0
    generator = np.random.default_rng(1)
    index = generator.integers(0, 1500, (1500, 25))
    index[index == np.arange(1500)[:, None]] = -1
    index[::7] = -1
    index[index % 7 == 0] = -1  # Rows of zeros are nobody's candidates.
    for row in index:  # no row twice
        row[np.isin(np.arange(25), np.unique(row, return_index=True)[1], invert=True)] = -1
    left_out = np.full(1500, -np.inf, dtype=np.float32)
    expected = refine.rank_candidates(ArrayRows(matrix), Candidates(index, left_out), K)
    monkeypatch.setattr(refine, "_PANEL_BYTES", 4 * 48 * 100)
    monkeypatch.setattr(refine, "_PART_BYTES", 4 * 48 * 30)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    ordered = Candidates(index, left_out, generator.permutation(1500))
    found = refine.rank_candidates(ArrayRows(matrix), ordered, K)
    torch.set_num_threads(before)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_rows_out_of_order(clustered: NDArray[np.float16]):
    order = np.random.default_rng(3).permutation(1500)
    order[::11] = -1
    features = FeatureMatrix(clustered, order)
    found = cosine_knn(features, K, engine="clusters")
    assert recall(found, features.to_array()) >= 0.97


def test_a_recall_out_of_reach_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(faiss_indices, "_DEGREES", (11, 12))
    monkeypatch.setattr(approximate, "NUM_MEASURED", 1200)
    matrix = np.random.default_rng(4).normal(size=(1500, 100)).astype(np.float32)  # no structure to go by
    with pytest.raises(SearchError) as caught:
        cosine_knn(ArrayRows(matrix), K, engine="nndescent", min_recall=1.0, what="items by noise")
    message = str(caught.value)
    for part in (
        "nndescent finds 0.",
        "nearest items by noise",
        "at least 1.0",
        "degree 11: 0.",
        "degree 12: 0.",
        "--engine exact",
    ):
        assert part in message
    assert recall(cosine_knn(ArrayRows(matrix), K, engine="clusters", min_recall=1.0), matrix) >= 0.9999


def test_a_miss_on_the_measured_rows_is_mended(clustered: NDArray[np.float16], monkeypatch: pytest.MonkeyPatch):
    # The rows to choose by are told to be content, so that the choice is the least effort.
    monkeypatch.setattr(approximate, "NUM_CHOOSING", 1)
    found = cosine_knn(ArrayRows(clustered), K, engine="clusters", min_recall=0.999)
    assert recall(found, clustered) >= 0.998


@pytest.mark.parametrize("value", [0, -1, 1.5, float("nan")])
def test_recalls_that_are_none(value: float):
    with pytest.raises(ConfigError, match=r"min_recall must be above 0 and at most 1"):
        cosine_knn(ArrayRows(np.eye(4, dtype=np.float32)), 2, engine="clusters", min_recall=value)


def test_auto_goes_by_the_size_and_says_so(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, logger="dream_pyg"):
        assert choice.choose_engine("auto", 200, 24, "users by text") == "exact"
        assert choice.choose_engine("auto", 7050, 4096, "items by image") == "exact"
        assert choice.choose_engine("auto", 1_000_000, 384, "items by text") == "clusters"
        assert choice.choose_engine("hnsw", 1_000_000, 384, "items by text") == "hnsw"
    tiny, small, large = (record.getMessage() for record in caplog.records)
    assert tiny == "kNN of users by text: exact for 200 x 24 (--engine to choose)"
    assert small.startswith("kNN of items by image: exact for 7,050 x 4096")
    assert "2e+11 operations or 1.4 s" in small  # 7050^2 * 4096 / 1.5e11 s
    assert "clusters for 1,000,000 x 384" in large
    assert "4e+14 operations or 43 min" in large  # 1e12 * 384 / 1.5e11 s
    assert "--engine" in large


@pytest.mark.parametrize("engine", ["exact", "flat", *APPROXIMATE])
def test_too_little_memory_is_told_before_the_start(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    class Untouched:
        shape = (1_000_000, 384)

    monkeypatch.setattr(choice, "available_bytes", lambda: 100 << 20)
    with pytest.raises(SearchError, match=rf"{engine} needs about .* GiB .* but 0\.1 GiB are free.*fewer neighbours"):
        cosine_knn(Untouched(), K, engine=engine)
    needed = {other: choice.needed_bytes(other, *Untouched.shape, K) for other in choice.ENGINES if other != "auto"}
    least = min(needed, key=lambda other: needed[other])
    monkeypatch.setattr(choice, "available_bytes", lambda: needed[least])
    if engine != least:
        with pytest.raises(SearchError, match=rf"choose --engine .*{least}.*would fit"):
            cosine_knn(Untouched(), K, engine=engine)


def test_available_memory_is_less_than_there_is():
    available = choice.available_bytes()
    assert available is not None
    psutil = pytest.importorskip("psutil")
    assert 0 < available <= psutil.virtual_memory().total


def test_clustered_features_are_seeded_and_of_low_dimension(tmp_path: Path):
    paths = [
        make_clustered_features(tmp_path / f"{i}.npy", 3000, 40, num_clusters=7, intrinsic_dim=3, seed=seed)
        for i, seed in enumerate([5, 5, 6])
    ]
    first, again, other = (np.load(path) for path in paths)
    assert first.dtype == np.float16
    assert first.shape == (3000, 40)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    spectrum = np.linalg.svd(first.astype(np.float64), compute_uv=False) ** 2
    assert spectrum[:12].sum() > 0.99 * spectrum.sum()  # 4 x 3 hidden units and a little noise
    with pytest.raises(ConfigError, match="num_clusters"):
        make_clustered_features(tmp_path / "none.npy", 10, 4, num_clusters=0)
