"""``dream-pyg tune``: what it prints and writes, and that its best trial can be trained as a preset."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from tests.test_bad_input import assert_named, refusal

Command = Callable[..., Result]
SHORT = ["--epochs", 2, "--set", "training.batch_size=64", "--device", "cpu"]


def test_a_study_prints_its_trials_and_its_best_one_is_a_preset(command: Command, shop_graph: Path, tmp_path: Path):
    out, run = tmp_path / "studies" / "bpr", tmp_path / "run"
    study = ["tune", "bpr", shop_graph, "--out", out, "--patience", 5, *SHORT, "--trials", 3]
    result = command(*study, "--format", "json")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["best"]["value"] == max(trial["value"] for trial in told["trials"])
    assert [trial["number"] for trial in told["trials"]] == [0, 1, 2]
    table = command(*study).stdout.splitlines()
    assert table[0].split() == [
        "trial", "state", "recall@20", "best_epoch", "epochs", "seconds", "learning_rate", "l2_weight",
    ]  # fmt: skip
    assert f"best: trial {told['best']['number']}, validation recall@20 {told['best']['value']:.4f}" in table[4]
    assert f", test recall@20 {told['test_metrics']['recall@20']:.4f}" in table[4]
    preset = ["--preset", out / "best.toml", "--set", "training.patience=5", "--set", "training.epochs=2"]
    trained = command(
        "train", shop_graph, "--model", "bpr", "--run", run, *preset, "--device", "cpu", "--format", "json"
    )
    assert trained.exit_code == 0, trained.stderr
    assert json.loads(trained.stdout)["test_metrics"] == told["test_metrics"]


def test_a_study_that_has_no_time_left_says_how_to_go_on(command: Command, shop_graph: Path, tmp_path: Path):
    result = command("tune", "bpr", shop_graph, "--out", tmp_path / "study", *SHORT, "--trials", 3, "--timeout", 0)
    assert result.exit_code == 0, result.stderr
    assert "1 of 3 trials are done; continue with the same command" in result.stdout
    assert ", test " not in result.stdout


def test_studies_lie_in_studies_by_default_named_after_model_and_dataset(
    command: Command, shop_graph: Path, tmp_path: Path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert command("tune", "bpr", shop_graph, *SHORT, "--trials", 1).exit_code == 0
    assert (tmp_path / "studies" / "bpr-synthetic" / "study.json").is_file()


@pytest.mark.parametrize(
    ("model", "options", "code", "fragments"),
    [
        ("drem", [], 2, ["Unknown model 'drem'", "Did you mean 'dream'?"]),
        ("popularity", [], 2, ["has nothing to tune"]),
        ("bpr", ["--epochs", 0], 2, ["training.epochs"]),
        ("bpr", ["--set", "model.l2=1"], 2, ["unknown key 'l2'"]),
        ("bpr", ["--device", "tpu"], 2, ["Unknown device 'tpu'"]),
    ],
)
def test_bad_input(
    command: Command, shop_graph: Path, tmp_path: Path, model: str, options: list, code: int, fragments: list[str]
):
    result = command("tune", model, shop_graph, "--out", tmp_path / "study", "--trials", 1, *options)
    assert_named(result.exit_code, result.stdout, result.stderr, code, *fragments)


def test_a_study_of_other_options_or_no_graph_is_refused(command: Command, shop_graph: Path, tmp_path: Path):
    out = tmp_path / "study"
    assert command("tune", "bpr", shop_graph, "--out", out, *SHORT, "--trials", 1).exit_code == 0
    with refusal(tmp_path, 1, "is another one: seed is 1 here, 0 there") as results:
        results.append(command("tune", "bpr", shop_graph, "--out", out, *SHORT, "--seed", 1))
    with refusal(tmp_path, 1, "is another one: model is lightgcn here, bpr there") as results:
        results.append(command("tune", "lightgcn", shop_graph, "--out", out, *SHORT))
    for where in (["--out", out], []):
        with refusal(tmp_path, 1, "is not a graph store") as results:
            results.append(command("tune", "bpr", tmp_path / "nowhere", *where, *SHORT))


def test_a_missing_extra_is_named_with_its_cure(command: Command, shop_graph: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with refusal(tmp_path, 1, 'pip install "dream-pyg[tune]"') as results:
        results.append(command("tune", "bpr", shop_graph, "--out", tmp_path / "study"))


def test_train_names_an_unknown_preset(command: Command, shop_graph: Path, tmp_path: Path):
    with refusal(tmp_path, 2, "Unknown preset 'babi'", "Did you mean 'baby'?") as results:
        results.append(command("train", shop_graph, "--model", "bpr", "--run", tmp_path / "run", "--preset", "babi"))
    with refusal(tmp_path, 2, "has nothing for model 'popularity'") as results:
        arguments = ["--model", "popularity", "--run", tmp_path / "run", "--preset", "baby"]
        results.append(command("train", shop_graph, *arguments))
