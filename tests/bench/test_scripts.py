"""The scripts in benchmarks/ run and write what they say, on small data."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from dream_pyg.data.files import read_json, write_json

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks"

Script = Callable[..., ModuleType]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    """Import a script, and give it arguments."""
    monkeypatch.syspath_prepend(str(SCRIPTS))

    def load(name: str, *arguments: str | Path) -> ModuleType:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        return importlib.import_module(name)

    return load


@pytest.mark.slow
def test_train_step(script: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    module = script("train_step", "--rounds", "2", "--out", tmp_path / "out.json")
    for name, number in {"NUM_USERS": 300, "NUM_TRAIN": 2_000, "NUM_VALID": 200, "NUM_TEST": 200}.items():
        monkeypatch.setattr(module, name, number)
    monkeypatch.setattr(module, "FEATURES", {"image": "baby-text", "text": "baby-text"})
    monkeypatch.setattr(module, "BATCH_SIZE", 64)
    monkeypatch.setattr(module.Rates, "measure", lambda: module.Rates(1e9, 1e9, 1e9, 1e9))
    module.main()
    report = read_json(tmp_path / "out.json")
    for kind in ("float32", "as by default"):
        assert max(max(part.values()) for part in report["differences"][kind].values()) < 2e-2
    assert {"projection of features", "relation graphs", "InfoNCE, all four", "signal"} <= set(report["parts"]["DREAM"])
    assert all(ratio > 0 for ratio in report["ratios"].values())


@pytest.mark.slow
def test_scale_goes_on_after_an_interruption(script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = ("--work", tmp_path / "work", "--steps", "2", "--eval-users", "20", "--threads", "1", "--no-user-graphs")
    module = script("scale", "300", *options, "--out", tmp_path / "out")
    module.main()
    written = read_json(tmp_path / "out" / "results.json")["results"][0]
    assert {"build-graph", "train", "evaluate", "export"} <= set(written)
    stages = read_json(tmp_path / "work" / "300" / "result-2.json")
    del stages["evaluate"], stages["export"]
    write_json(tmp_path / "work" / "300" / "result-2.json", stages)
    module.main()
    again = read_json(tmp_path / "out" / "results.json")["results"][0]
    assert again["train"] == written["train"]
    assert again["export"]["recall"] == written["export"]["recall"]


def test_sampling(script: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    pytest.importorskip("torch_sparse")
    module = script("sampling", "--items", "200", "--rounds", "2", "--threads", "1", "--out", tmp_path / "out.json")
    monkeypatch.setattr(module, "BATCH_SIZE", 32)
    module.main()
    results = read_json(tmp_path / "out.json")["results"]
    assert set(results) == {"ours", "PyG"}
    assert all(len(result["milliseconds"]) == 2 for result in results.values())


@pytest.mark.slow
def test_pipeline(script: Script, shop: Path, tmp_path: Path):
    module = script("pipeline", shop, "--repetitions", "1", "--models", "dream", "bpr", "--out", tmp_path / "out.json")
    module.main()
    seconds = read_json(tmp_path / "out.json")["seconds"]
    assert {"build-graph", "dream epoch", "bpr validation", "dream test, all metrics"} <= set(seconds)


@pytest.mark.slow
def test_epoch(script: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    options = ("--device", "cpu", "--model", "dream", "--epochs", "1", "--out", tmp_path / "out.json")
    module = script("epoch", "baby", *options)
    monkeypatch.setattr(module, "SHAPES", {"baby": (300, 7_050, 3_000)})
    module.main()
    assert set(read_json(tmp_path / "out.json")["shapes"]["baby"]) == {"build_seconds", "dream", "PyG LightGCN"}


@pytest.mark.parametrize("name", ["knn_items", "knn_users", "knn_growth"])
def test_knn(name: str, script: Script, tmp_path: Path):
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).normal(size=(300, 16)).astype(np.float32))
    options = ("--engine", "exact", "--threads", "1", "--repeats", "1", "--steps", "1", "--out", tmp_path / "out")
    script(name, tmp_path / "rows.npy", *options).measure(None, name, (), (), 1)
    assert "exact" in (tmp_path / "out" / "report.md").read_text()
