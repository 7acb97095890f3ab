"""Two processes train what one trains; what one of them cannot do, none does."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

from dream_pyg import ranks
from dream_pyg.errors import ConfigError
from dream_pyg.graph.processor import resolve_device
from dream_pyg.graph.store import StoredGraph
from dream_pyg.training.checkpoint import load_checkpoint
from dream_pyg.training.run import RunPaths
from dream_pyg.training.trainer import train
from tests.graphs import PlantedBlocks
from tests.training import workers

pytestmark = pytest.mark.slow

_REPOSITORY = Path(__file__).resolve().parents[2]
_LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
_ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(_REPOSITORY)}


def in_two(*arguments: object, module: str = "tests.training.workers") -> subprocess.CompletedProcess[str]:
    """A module in two processes."""
    line = [*_LAUNCH, module, *map(str, arguments)]
    return subprocess.run(line, env=_ENVIRONMENT, capture_output=True, text=True, timeout=300)


def error_lines(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("Error: ")]


def assert_close_runs(first: Path, second: Path) -> None:
    """The losses of each step, the weights, the optimizer's state and the metrics of two runs agree."""
    for one, other in zip(torch.load(first / "steps.pt"), torch.load(second / "steps.pt"), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    states = [load_checkpoint(RunPaths(run).last) for run in (first, second)]
    for part in ("model", "optimizers"):
        assert_close(states[0][part], states[1][part])
    tests = [json.loads(RunPaths(run).test_metrics.read_text()) for run in (first, second)]
    assert_close(*tests)


def assert_close(one: Any, other: Any) -> None:
    """Nested containers agree, numbers to what Adam makes of the order of sums."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_close(one[key], other[key])
    elif isinstance(one, list):
        for parts in zip(one, other, strict=True):
            assert_close(*parts)
    elif isinstance(one, torch.Tensor):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=1e-6, abs=1e-7)
    else:
        assert one == other


@pytest.fixture(scope="module")
def by_one(stored: StoredGraph, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases, trained by one process."""
    out = tmp_path_factory.mktemp("one")
    workers.train_cases(str(stored.path), str(out))
    return out


@pytest.fixture(scope="module")
def by_two(stored: StoredGraph, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases, trained by two."""
    out = tmp_path_factory.mktemp("two")
    done = in_two("train_cases", stored.path, out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize("case", workers.CASES)
def test_two_processes_train_what_one_trains(by_one: Path, by_two: Path, case: str):
    # Not bit for bit: sums over the batch are made of two sums. In float64 that is far below any mistake.
    assert_close_runs(by_one / case, by_two / case)
    assert sorted(path.name for path in (by_one / case).rglob("*")) == sorted(
        path.name for path in (by_two / case).rglob("*")
    )


def test_what_some_processes_saved_others_go_on_from(stored: StoredGraph, by_one: Path, by_two: Path, tmp_path: Path):
    for name, out in (("one", by_one), ("two", by_two)):
        for case in workers.RESUMED:
            shutil.copytree(out / case, tmp_path / name / case)
    workers.resume_cases(str(stored.path), str(tmp_path / "two"))
    done = in_two("resume_cases", stored.path, tmp_path / "one")
    assert done.returncode == 0, done.stderr
    for case in workers.RESUMED:
        whole = tmp_path / "whole" / case
        workers.train_in_double(workers.configure(str(stored.path), workers.CASES[case], epochs=2), whole)
        second_epoch = torch.load(whole / "steps.pt")[12:]
        torch.save(second_epoch, whole / "steps.pt")
        assert_close_runs(whole, tmp_path / "one" / case)
        assert_close_runs(whole, tmp_path / "two" / case)


def test_shards_are_the_table_and_refusals_are_the_same_in_each_process(stored: StoredGraph, tmp_path: Path):
    other = PlantedBlocks(seed=1).store(tmp_path)
    done = in_two("tables_and_refusals", stored.path, other.path, tmp_path)
    assert done.returncode == 0, done.stderr
    told = (tmp_path / "told").read_text().splitlines()
    layers, resume, batch, sharded, missing, graph, test, elsewhere = told
    assert "here = rank 0, there = rank 1): model.num_layers: 1 here, 2 there" in layers
    assert "resume: False here, True there" in resume
    assert "training.batch_size is 1, which 2 processes cannot share" in batch
    assert "'buir' cannot have its tables sharded" in sharded
    assert "choose one of dream, vbpr, lightgcn, bpr" in sharded
    assert "elsewhere is not a graph store" in missing
    assert f"graph fingerprint: {stored.fingerprint} here, {other.fingerprint} there" in graph
    assert "test: True here, False there" in test
    assert "Rank 1 does not see the run that rank 0 writes" in elsewhere


def test_a_killed_process_ends_the_run_which_resumes(stored: StoredGraph, tmp_path: Path):
    run = tmp_path / "run"
    line = ["train", stored.path, "--model", "dream", "--out", run, "--device", "cpu"]
    line += ["--set", "training.batch_size=13", "--set", "training.epochs=2"]
    started = time.monotonic()
    done = in_two("die", 12 + 3, *line)
    assert time.monotonic() - started < 60
    assert done.returncode == 1
    (told,) = error_lines(done.stderr)
    assert "is gone" in told
    assert "--resume" in told
    assert load_checkpoint(RunPaths(run).last)["epoch"] == 1
    done = in_two("train", "--resume", "--out", run, module="dream_pyg")
    assert done.returncode == 0, done.stderr
    assert json.loads(RunPaths(run).info.read_text())["num_processes"] == 2
    assert "best epoch" in done.stdout
    assert done.stdout.count("best epoch") == 1


def test_an_interrupt_of_torchrun_saves_and_the_run_resumes_to_the_same(stored: StoredGraph, tmp_path: Path):
    run, log = tmp_path / "run", tmp_path / "stderr"
    options = {"batch_size": 13, "patience": 10**6, "learning_rate": 0.001}
    config = workers.configure(str(stored.path), workers.Case("lightgcn", {}, options), epochs=10**6)
    config.save(tmp_path / "config.toml")
    line = [*_LAUNCH, "dream_pyg", "train", "--config", tmp_path / "config.toml", "--out", run]
    with log.open("w") as stderr, subprocess.Popen(line, env=_ENVIRONMENT, stderr=stderr) as process:
        try:
            deadline = time.monotonic() + 120
            while not (RunPaths(run).metrics.is_file() and len(RunPaths(run).metrics.read_text().splitlines()) >= 2):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=60) != 0
        finally:
            process.kill()
    (told,) = error_lines(log.read_text())
    assert told.startswith("Error: Interrupted in epoch ")
    state = load_checkpoint(RunPaths(run).last)
    assert state["step"] > 0
    ending = workers.configure(str(stored.path), workers.Case("lightgcn", {}, options), epochs=state["epoch"] + 1)
    train(ending, run, resume=True)
    train(ending, tmp_path / "whole")
    ended = [load_checkpoint(RunPaths(path).last) for path in (run, tmp_path / "whole")]
    assert [path["epoch"] for path in ended] == [state["epoch"] + 1] * 2
    for name, value in ended[0]["model"].items():
        torch.testing.assert_close(value, ended[1]["model"][name], rtol=1e-3, atol=1e-4)


def test_commands_that_do_not_share_their_work_are_refused(command: Callable[..., Result], monkeypatch):
    monkeypatch.setattr(ranks, "num_launched", lambda: 2)
    result = command("models")
    assert result.exit_code == 2
    assert "`dream-pyg models` works in one process" in result.stderr


@pytest.mark.parametrize(
    ("name", "num_gpus", "message"),
    [
        ("auto", 1, "1 CUDA devices for 2 processes"),
        ("cuda", 1, "1 CUDA devices for 2 processes"),
        ("cuda:0", 2, "is that of another process"),
        ("cuda:2", 2, "is not here"),
    ],
)
def test_each_process_needs_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch, name: str, num_gpus: int, message: str):
    for what, value in (("is_available", True), ("device_count", num_gpus), ("current_device", 1)):
        monkeypatch.setattr(torch.cuda, what, lambda value=value: value)
    monkeypatch.setattr(ranks, "num_ranks", lambda: 2)
    monkeypatch.setattr(ranks, "num_local_ranks", lambda: 2)
    with pytest.raises(ConfigError, match=message):
        resolve_device(name)


def test_each_process_takes_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch):
    for what, value in (("is_available", True), ("device_count", 2), ("current_device", 1)):
        monkeypatch.setattr(torch.cuda, what, lambda value=value: value)
    monkeypatch.setattr(ranks, "num_ranks", lambda: 2)
    monkeypatch.setattr(ranks, "num_local_ranks", lambda: 2)
    assert [str(resolve_device(name)) for name in ("auto", "cuda", "cuda:1", "cpu")] == [*["cuda:1"] * 3, "cpu"]
