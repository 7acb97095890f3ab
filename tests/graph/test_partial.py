"""A build that was interrupted or killed goes on where it stopped, and ends in the same bits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dream_pyg import DatasetConfig, Interrupted, StoreError, build_store
from dream_pyg.data.files import load_tensors
from dream_pyg.graph import partial
from dream_pyg.graph.knn import ArrayRows, FoundNeighbors, Rows, cosine_knn, exact
from dream_pyg.graph.knn.candidates import CandidateLists
from dream_pyg.graph.knn.exact import RowProduct, Strip, select_candidates
from dream_pyg.graph.store import StoredGraph

SIGNALS = [signal.SIGINT, signal.SIGTERM]


class Strips:
    """Counts the strips that searches go through, and does something during one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(exact, "_TILE_ROWS", 16)
        monkeypatch.setattr(exact, "_FEW_FEATURES", 1)
        monkeypatch.setattr(exact, "_PANEL_BYTES", 1)
        monkeypatch.setattr(exact, "_INTEGER_PANEL_BYTES", 1)
        monkeypatch.setattr(partial, "progress", self._count)
        self.total = 0
        self.then: Callable[[], Any] = lambda: None
        self.after = -1

    def _count(self, strips: Sequence[Strip], description: str, **_: Any) -> Iterator[Strip]:
        for strip in strips:
            self.total += 1
            if self.total == self.after:
                self.then()
            yield strip


@pytest.fixture
def strips(monkeypatch: pytest.MonkeyPatch) -> Strips:
    """Searches in strips of few rows, so that small data has many."""
    return Strips(monkeypatch)


def build(shop: Path, out: Path, **options: Any) -> StoredGraph:
    return build_store(DatasetConfig.load(shop), out, num_neighbors=5, **options)[0]


def partial_files(parent: Path) -> list[str]:
    return sorted(str(file.relative_to(parent)) for file in parent.glob(".*/*"))


def assert_same_store(first: StoredGraph, second: StoredGraph) -> None:
    assert first.fingerprint == second.fingerprint
    assert first.info["files"] == second.info["files"]


@pytest.fixture(scope="module")
def whole(shop: Path, tmp_path_factory: pytest.TempPathFactory) -> StoredGraph:
    """The store of a build that nothing interrupted."""
    return build(shop, tmp_path_factory.mktemp("whole") / "graph")


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("after", [1, 5, 6, 7, 20])
def test_an_interrupted_build_goes_on(
    strips: Strips, shop: Path, whole: StoredGraph, tmp_path: Path, after: int, number: signal.Signals
):
    build(shop, tmp_path / "counted")
    total, strips.total = strips.total, 0
    assert total == 2 * (3 * 4 // 2) + 2 * (4 * 5 // 2)  # 40 items and 60 users, 16 at a time, in two modalities
    strips.after, strips.then = after, lambda: signal.raise_signal(number)
    with pytest.raises(Interrupted, match=r"saved in .*\.graph\.\w{16}\.partial\. Continue with the same command"):
        build(shop, tmp_path / "graph")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not (tmp_path / "graph").exists()
    assert partial_files(tmp_path)
    assert_same_store(build(shop, tmp_path / "graph"), whole)
    assert strips.total == total  # none was done twice
    assert partial_files(tmp_path) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["counted", "graph"]


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_an_approximate_search_ends_at_once_and_those_before_it_are_kept(
    shop: Path, tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
):
    searched = []

    def search(rows: Rows, num_neighbors: int, *, what: str, **_: Any) -> FoundNeighbors:
        searched.append(what)
        if len(searched) == 2:
            signal.raise_signal(number)
            searched.append("more")
        return cosine_knn(rows, num_neighbors, what=what)

    monkeypatch.setattr(partial, "cosine_knn", search)
    with pytest.raises(Interrupted, match=r"saved in .*\.graph\.\w{16}\.partial\. Continue with the same command"):
        build(shop, tmp_path / "graph", engine="clusters")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == (
        signal.default_int_handler,
        signal.SIG_DFL,
    )
    first, second = searched
    assert len(partial_files(tmp_path)) == 1
    searched.append("again")
    build(shop, tmp_path / "graph", engine="clusters")
    assert searched[3] == second
    assert first not in searched[3:]


def test_an_interruption_after_every_strip(strips: Strips, shop: Path, whole: StoredGraph, tmp_path: Path):
    strips.then = lambda: signal.raise_signal(signal.SIGINT)
    for strips.after in range(1, 33):
        with pytest.raises(Interrupted):
            build(shop, tmp_path / "graph")
    assert_same_store(build(shop, tmp_path / "graph"), whole)
    assert strips.total == 32


@pytest.mark.slow
def test_a_killed_build_goes_on(shop: Path, whole: StoredGraph, strips: Strips, tmp_path: Path):
    code = f"""
import os, signal
from dream_pyg import DatasetConfig, build_store
from dream_pyg.graph import partial
from dream_pyg.graph.knn import exact
exact._FEW_FEATURES, exact._TILE_ROWS, exact._PANEL_BYTES, exact._INTEGER_PANEL_BYTES = 1, 16, 1, 1
partial._SECONDS_BETWEEN_SAVES, partial._SAVING_SHARE = 0, 0
def progress(strips, description, **_):
    for strip in strips:
        yield strip
        if description == "kNN of users by image" and strip.row == 32:
            os.kill(os.getpid(), signal.SIGKILL)
partial.progress = progress
build_store(DatasetConfig.load({str(shop)!r}), {str(tmp_path / "graph")!r}, num_neighbors=5)
"""
    killed = subprocess.run([sys.executable, "-c", code], env=dict(os.environ), capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    names = [Path(file).name for file in partial_files(tmp_path)]
    assert names == ["items_by_image.safetensors", "users_by_image.search.safetensors"]
    assert_same_store(build(shop, tmp_path / "graph"), whole)
    assert strips.total == 32 - 6 - 4  # without the items, and without the users that were compared
    assert partial_files(tmp_path) == []


def interrupt(shop: Path, out: Path, strips: Strips, after: int, **options: Any) -> None:
    strips.total, strips.after, strips.then = 0, after, lambda: signal.raise_signal(signal.SIGINT)
    with pytest.raises(Interrupted):
        build(shop, out, **options)
    strips.total, strips.after = 0, -1


@pytest.mark.parametrize("file", ["items_by_image.safetensors", "users_by_image.search.safetensors"])
def test_a_damaged_part_is_searched_again(
    strips: Strips,
    shop: Path,
    whole: StoredGraph,
    tmp_path: Path,
    file: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(partial.logger, "propagate", True)
    interrupt(shop, tmp_path / "graph", strips, after=9)
    (path,) = tmp_path.glob(f".*/{file}")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert_same_store(build(shop, tmp_path / "graph"), whole)
    assert f"{file} is damaged" in caplog.text
    assert "searched again" in caplog.text
    assert strips.total == 32 - 9 + {"items": 6, "users": 3}[file.split("_")[0]]


def test_other_builds_do_not_take_what_was_found(strips: Strips, shop: Path, tmp_path: Path):
    interrupt(shop, tmp_path / "graph", strips, after=9)
    interrupt(shop, tmp_path / "graphs", strips, after=9)
    build(shop, tmp_path / "graph", include_self=True)
    assert strips.total == 32
    # What was begun for the same place is gone, for another place it stays.
    assert [file.split("/")[0].split(".")[1] for file in partial_files(tmp_path)] == ["graphs", "graphs"]


def lists_of(product: RowProduct, count: int, *, search: bool) -> CandidateLists:
    """The lists after a search, or before it."""
    kept = []

    def steps(strips: Sequence[Strip], lists: CandidateLists) -> Sequence[Strip]:
        kept.append(lists)
        return strips if search else []

    select_candidates(product, count, steps)
    return kept[0]


def test_lists_of_another_precision_or_size_are_not_taken():
    rows = ArrayRows(np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32))
    product, rounded = (RowProduct(rows, dtype, torch.device("cpu")) for dtype in (torch.float32, torch.bfloat16))
    found = lists_of(product, 3, search=True)
    for other, count, taken in ((product, 3, True), (product, 4, False), (rounded, 3, False)):
        fresh = lists_of(other, count, search=False)
        assert fresh.restore(found.state()) == taken
        assert fresh.index.equal(found.index) == taken


def test_a_full_disk_does_not_end_the_search(
    strips: Strips,
    shop: Path,
    whole: StoredGraph,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    def refuse(*args: Any) -> None:
        raise StoreError("Cannot write: no space left on device.")

    monkeypatch.setattr(partial.logger, "propagate", True)
    monkeypatch.setattr(partial, "save_tensors", refuse)
    monkeypatch.setattr(partial, "_SECONDS_BETWEEN_SAVES", 0)
    assert_same_store(build(shop, tmp_path / "graph"), whole)
    assert "no space left" in caplog.text


def test_a_search_is_saved_when_its_time_has_come(
    strips: Strips, shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    saved: list[str] = []
    monkeypatch.setattr(partial, "save_tensors", lambda path, *_: saved.append(path.name))
    clock = iter(range(0, 10_000, 7))  # seconds at each look
    monkeypatch.setattr(partial.time, "monotonic", lambda: next(clock))
    build(shop, tmp_path / "graph")
    searches = [name for name in saved if ".search" in name]
    assert 2 <= len(searches) <= 36 * 7 // 60 + 1
    assert {name for name in saved if ".search" not in name} <= {
        f"{node}_by_{name}.safetensors" for node in ("items", "users") for name in ("image", "text")
    }


def test_nothing_is_saved_of_a_short_build(strips: Strips, shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(partial, "save_tensors", lambda *_: pytest.fail("saved"))
    build(shop, tmp_path / "graph")
    assert load_tensors(tmp_path / "graph" / "edges.safetensors")
