"""Configuring tiny runs, and telling whether two runs are the same bit for bit."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dream_pyg.config import RunConfig
from dream_pyg.data.files import load_tensors, read_json
from dream_pyg.errors import Interrupted
from dream_pyg.graph.csr import UserItems
from dream_pyg.graph.schema import INTERACTS, label_name
from dream_pyg.graph.store import StoredGraph
from dream_pyg.ranking import recommend
from dream_pyg.training import trainer
from dream_pyg.training.checkpoint import load_checkpoint
from dream_pyg.training.run import RunPaths, load_run
from dream_pyg.training.trainer import train
from tests.graphs import PlantedBlocks

_TIMINGS = ("train_seconds", "evaluate_seconds", "triplets_per_second")


def configure(stored: StoredGraph, model: str = "dream", **training: Any) -> RunConfig:
    """A run of a few epochs of a few steps, on one CPU thread."""
    values = {"epochs": 4, "batch_size": 32, "learning_rate": 0.01, "device": "cpu", "num_threads": 1, **training}
    return RunConfig(graph=str(stored.path), model={"name": model}, training=values)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl`` without timings."""
    return [_untimed(line) for line in RunPaths(run).metrics.read_text().splitlines()]


def read_checkpoint(run: Path) -> dict[str, Any]:
    """The resumable checkpoint, its metric lines without timings."""
    state = load_checkpoint(RunPaths(run).last)
    return {**state, "lines": [_untimed(line) for line in state["lines"]]}


def assert_same(first: Any, second: Any, where: str = "") -> None:
    """Compare nested containers of tensors and plain values bit for bit."""
    assert type(first) is type(second), where
    if isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first:
            assert_same(first[key], second[key], f"{where}/{key}")
    elif isinstance(first, list):
        assert len(first) == len(second), where
        for position, (one, other) in enumerate(zip(first, second, strict=True)):
            assert_same(one, other, f"{where}/{position}")
    elif isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype, where
        assert torch.equal(first, second), where
    else:
        assert first == second, where


def assert_same_run(first: Path, second: Path) -> None:
    """Both runs ended with the same configuration, weights, optimizer, counters and metrics, bit for bit."""
    one, other = RunPaths(first), RunPaths(second)
    assert one.config.read_text() == other.config.read_text()
    assert_same(read_checkpoint(first), read_checkpoint(second))
    assert read_metrics(first) == read_metrics(second)
    assert_same(list(load_tensors(one.best)), list(load_tensors(other.best)))
    assert read_json(one.test_metrics) == read_json(other.test_metrics)
    outcome = ("status", "epochs", "best_epoch", "graph_fingerprint", "seed")
    infos = [read_json(paths.info) for paths in (one, other)]
    assert [infos[0][key] for key in outcome] == [infos[1][key] for key in outcome]


def assert_learns(blocks: PlantedBlocks, config: RunConfig, run: Path) -> None:
    """A model that is trained so puts an item of a user's own block first, for every user."""
    train(config, run)
    trained = load_run(run, device="cpu")
    users = torch.arange(len(blocks.user_block))
    seen = UserItems.from_pairs(trained.graph[INTERACTS][label_name("train")], len(users))
    best = recommend(trained.scorer(), users, 1, seen).item.squeeze(1)
    np.testing.assert_array_equal(blocks.item_block[best], blocks.user_block)


def assert_resumes_inside_an_epoch(config: RunConfig, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training that is interrupted in the middle of its second epoch, and resumed, is one that was not."""
    train(config, directory / "whole")
    step = trainer._Session._train_step
    with monkeypatch.context() as patched:

        def interrupted_step(session: Any, *given: Any) -> None:
            step(session, *given)
            if (session.epoch, session.step) == (1, 2):
                signal.raise_signal(signal.SIGINT)

        patched.setattr(trainer._Session, "_train_step", interrupted_step)
        with pytest.raises(Interrupted):
            train(config, directory / "parts")
    train(config, directory / "parts", resume=True)
    assert_same_run(directory / "whole", directory / "parts")


def _untimed(line: str) -> dict[str, Any]:
    return {key: value for key, value in json.loads(line).items() if key not in _TIMINGS}
