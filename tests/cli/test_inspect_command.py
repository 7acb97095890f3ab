"""``dream-pyg inspect``."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from dream_pyg.config import RunConfig
from dream_pyg.data.validation import flatten
from dream_pyg.models import MODELS

Command = Callable[..., Result]


def test_a_store_is_described_by_its_graph_json(command: Command, shop_graph: Path):
    told = json.loads(command("inspect", shop_graph, "--format", "json").stdout)
    stored = json.loads((shop_graph / "graph.json").read_text())
    stored.pop("checksum")
    assert told == stored


def test_a_run_is_described_by_its_files(command: Command, shop_run: Path):
    told = json.loads(command("inspect", shop_run, "--format", "json").stdout)
    assert told["config"] == tomllib.loads((shop_run / "config.toml").read_text())
    assert told["test"] == json.loads((shop_run / "test_metrics.json").read_text())
    recorded = json.loads((shop_run / "run.json").read_text())
    assert {key: told[key] for key in recorded} == recorded


def test_tables_have_a_line_for_every_value(command: Command, shop_graph: Path, shop_run: Path):
    for path, expected in ((shop_graph, ["counts.users", "60"]), (shop_run, ["config.model.name", "dream"])):
        lines = [line.split() for line in command("inspect", path).stdout.splitlines()]
        assert expected in lines


def test_the_table_has_test_metrics_at_one_cut_off(command: Command, shop_run: Path):
    tested = json.loads((shop_run / "test_metrics.json").read_text())["lines"]
    rows = [line.split()[0] for line in command("inspect", shop_run).stdout.splitlines()[1:]]
    assert [row for row in rows if row.startswith("test.lines.")] == [
        f"test.lines.{line}.{metric}" for line in tested for metric in tested[line] if metric.endswith("@20")
    ]
    assert "test.lines.modal.recall@20" in rows


def test_hyperparameters_are_shown_as_they_are_written(command: Command, shop_graph: Path, tmp_path: Path):
    values = {
        "training.seed": "123456",
        "training.epochs": "1",
        "model.l2_weight": "3e-05",
        "model.inter_weight": "0.00125",
    }
    sets = [part for key, value in values.items() for part in ("--set", f"{key}={value}")]
    assert command("train", shop_graph, "--model", "dream", *sets, "--run", tmp_path / "run").exit_code == 0
    lines = [line.split() for line in command("inspect", tmp_path / "run").stdout.splitlines()]
    assert [[f"config.{key}", value] for key, value in values.items() if [f"config.{key}", value] not in lines] == []


def test_what_is_neither_is_refused(command: Command, tmp_path: Path):
    for path in (tmp_path, tmp_path / "missing"):
        result = command("inspect", path)
        assert result.exit_code == 1
        assert result.stdout == ""
        assert "is not a graph store" in result.stderr


@pytest.mark.parametrize("name", MODELS)
def test_everything_that_can_be_set_of_a_training_is_explained(command: Command, name: str):
    settings = {entry["key"]: entry for entry in json.loads(command("models", name, "--format", "json").stdout)}
    assert [key for key, entry in settings.items() if not entry["what"]] == []
    defaults = RunConfig.create(graph="g", model=name).to_dict()
    assert [key for key in flatten(defaults) if key not in {*settings, "graph", "model.name"}] == []
    for key in ("num_neighbors", "training.seed", "training.sampling.relations", "training.teacher.vote"):
        assert key in settings


def test_settings_are_shown_as_set_takes_them(command: Command, shop_graph: Path, tmp_path: Path):
    lines = command("models", "dream").stdout.splitlines()
    shown = [line for line in lines if not line.startswith(" ")]
    for line in (
        "training.teacher = none",
        "model.use_gate = true",
        "model.gate_input = id",
        "feature_precision = auto",
    ):
        assert line in shown
    assert "    What the gate filters: the ID embedding (layer 0) or the behavior representation (mean over" in lines
    assert any(line.endswith("(id, propagated)") for line in lines)
    left_out = ("training.sampling", "training.teacher", "training.epochs")
    sets = [part for line in shown if not line.startswith(left_out) for part in ("--set", line.replace(" = ", "="))]
    arguments = ("train", shop_graph, "--model", "dream", "--epochs", 1, "--no-test", "--run")
    assert command(*arguments, tmp_path / "set", *sets).exit_code == 0
    assert command(*arguments, tmp_path / "plain").exit_code == 0
    assert (tmp_path / "set" / "config.toml").read_text() == (tmp_path / "plain" / "config.toml").read_text()


def test_an_unknown_model_is_refused(command: Command):
    result = command("models", "draem")
    assert result.exit_code == 2
    assert "Unknown model 'draem'" in result.stderr
    assert "dream" in result.stderr
