"""``dream-pyg train`` and ``dream-pyg evaluate``: what they print, write, resume and refuse."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

from dream_pyg.config import RunConfig, SamplingConfig
from dream_pyg.data.files import load_tensors
from dream_pyg.models import MODELS
from dream_pyg.training import trainer

Command = Callable[..., Result]
CPU = ("--device", "cpu", "--set", "training.batch_size=64")
UNTRAINED = {"addease", "ease", "itemknn", "popularity"}
RUN_FILES = {
    "config.toml",
    "run.json",
    "metrics.jsonl",
    "test_metrics.json",
    "checkpoints/last.pt",
    "checkpoints/best.safetensors",
}


def files_of(run: Path) -> set[str]:
    """The files of a run, relative to it."""
    return {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}


def assert_same_result(first: Path, second: Path) -> None:
    """Two runs ended in the same weights and the same test metrics, bit for bit."""
    assert (first / "test_metrics.json").read_text() == (second / "test_metrics.json").read_text()
    (mine, my_metadata), (theirs, their_metadata) = (
        load_tensors(run / "checkpoints" / "best.safetensors") for run in (first, second)
    )
    assert my_metadata == their_metadata
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


@pytest.mark.parametrize("model", MODELS)
def test_train_writes_the_run_directory(command: Command, shop_graph: Path, tmp_path: Path, model: str):
    run = tmp_path / "runs" / model
    arguments = ["--model", model, "--run", run, *CPU, "--set", "training.epochs=2", "--seed", 7]
    result = command("train", shop_graph, *arguments, "--format", "json")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["run"] == str(run)
    assert told["test_metrics"] == json.loads((run / "test_metrics.json").read_text())["lines"]["general"]
    assert files_of(run) == RUN_FILES
    config = tomllib.loads((run / "config.toml").read_text())
    assert config["graph"] == str(shop_graph)
    assert config["model"].items() >= {"name": model}.items()
    assert config["training"].items() >= {"epochs": 2, "seed": 7, "device": "cpu", "batch_size": 64}.items()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == ([0] if model in UNTRAINED else [1, 2])
    assert json.loads((run / "run.json").read_text())["status"] == "finished"


def test_results_on_stdout_progress_on_stderr(command: Command, shop_graph: Path, tmp_path: Path):
    result = command(
        "train", shop_graph, "--model", "bpr", "--run", tmp_path / "run", *CPU, "--set", "training.epochs=2"
    )
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["split", "valid", "test", "best"]
    assert [line.split()[:2] for line in result.stderr.splitlines()] == [["epoch", "1"], ["epoch", "2"]]


def test_config_file_and_overrides(command: Command, shop_graph: Path, tmp_path: Path):
    (tmp_path / "run.toml").write_text(
        f'graph = "{shop_graph}"\n[model]\nname = "lightgcn"\nnum_layers = 1\nl2_weight = 0.5\n'
        "[training]\nepochs = 1\nbatch_size = 64\nseed = 3\n"
    )
    overrides = ["--set", "model.num_layers=3", "--seed", 4, "--device", "cpu"]
    result = command("train", "--config", tmp_path / "run.toml", "--run", tmp_path / "run", *overrides)
    assert result.exit_code == 0, result.stderr
    config = tomllib.loads((tmp_path / "run" / "config.toml").read_text())
    assert config["model"] == {"name": "lightgcn", "embedding_dim": 64, "num_layers": 3, "l2_weight": 0.5}
    assert (config["training"]["epochs"], config["training"]["seed"]) == (1, 4)


def test_hyperparameters_of_another_model_in_a_config_file_are_said_to_be_left_out(
    command: Command, shop_graph: Path, tmp_path: Path
):
    file = tmp_path / "run.toml"
    file.write_text('[model]\nname = "lightgcn"\nnum_layers = 1\nembedding_dim = 8\n[training]\nepochs = 1\n')
    result = command("train", shop_graph, "--config", file, "--model", "bpr", "--run", tmp_path / "run", *CPU)
    assert result.exit_code == 0, result.stderr
    told = f"{file} is for another model than bpr; left out: embedding_dim, num_layers"
    assert result.stderr.splitlines()[0] == told
    assert RunConfig.load(tmp_path / "run" / "config.toml").hyperparameters.embedding_dim == 64
    same = command("train", shop_graph, "--config", file, "--model", "lightgcn", "--run", tmp_path / "same", *CPU)
    assert "left out" not in same.stderr


def test_a_value_may_be_given_twice_if_it_is_the_same(command: Command, shop_graph: Path, tmp_path: Path):
    twice = ["--epochs", 1, "--set", "training.epochs=1", "--num-neighbors", 3, "--set", "num_neighbors=3"]
    result = command("train", shop_graph, "--model", "dream", *twice, *CPU, "--run", tmp_path / "run")
    assert result.exit_code == 0, result.stderr


def test_two_epochs_and_two_resumed_are_four(command: Command, shop_graph: Path, tmp_path: Path):
    arguments = ["--model", "dream", *CPU]
    command("train", shop_graph, *arguments, "--run", tmp_path / "whole", "--set", "training.epochs=4")
    command("train", shop_graph, *arguments, "--run", tmp_path / "parts", "--set", "training.epochs=2")
    resumed = command("train", "--resume", "--run", tmp_path / "parts", "--set", "training.epochs=4")
    assert resumed.exit_code == 0, resumed.stderr
    assert "Resuming" in resumed.stderr
    assert files_of(tmp_path / "parts") == RUN_FILES
    assert (tmp_path / "parts" / "config.toml").read_text() == (tmp_path / "whole" / "config.toml").read_text()
    assert_same_result(tmp_path / "parts", tmp_path / "whole")


def test_a_run_resumes_with_its_preset_and_no_other(command: Command, shop_graph: Path, tmp_path: Path):
    begun = ["--model", "dream", "--preset", "paper", *CPU, "--run", tmp_path / "run"]
    assert command("train", shop_graph, *begun, "--set", "training.epochs=1").exit_code == 0
    for arguments in ([shop_graph, *begun], ["--preset", "paper", *CPU, "--run", tmp_path / "run"]):
        again = command("train", *arguments, "--resume", "--set", "training.epochs=2")
        assert again.exit_code == 0, again.stderr
    refused = command("train", "--resume", "--preset", "best", *CPU, "--run", tmp_path / "run")
    assert refused.exit_code == 1
    assert "another configuration" in refused.stderr
    assert "model.user_modal" in refused.stderr


def test_a_finished_run_resumes_to_the_same(command: Command, shop_graph: Path, tmp_path: Path):
    for model in ("lightgcn", "ease", "itemknn", "popularity"):
        run = tmp_path / model
        first = command("train", shop_graph, "--model", model, "--run", run, *CPU, "--set", "training.epochs=1")
        again = command("train", "--resume", "--run", run)
        assert again.exit_code == 0, again.stderr
        assert again.stdout == first.stdout


def test_test_is_read_when_it_is_asked_for_and_forgotten_when_another_epoch_is_best(
    command: Command, shop_graph: Path, tmp_path: Path
):
    run, arguments = tmp_path / "run", ["--model", "dream", *CPU, "--set", "training.epochs=1"]
    plain = command("train", shop_graph, *arguments, "--run", run, "--no-test")
    assert [line.split()[0] for line in plain.stdout.splitlines()] == ["split", "valid", "best"]
    assert files_of(run) == RUN_FILES - {"test_metrics.json"}
    resumed = command("train", "--resume", "--run", run)
    assert [line.split()[0] for line in resumed.stdout.splitlines()] == ["split", "valid", "test", "best"]
    assert json.loads((run / "test_metrics.json").read_text())["epoch"] == 1
    same = command("train", "--resume", "--run", run, "--no-test")
    assert same.exit_code == 0
    assert (run / "test_metrics.json").exists()
    longer = command("train", "--resume", "--run", run, "--no-test", "--set", "training.epochs=6")
    assert "best epoch 1 of" not in longer.stdout
    assert files_of(run) == RUN_FILES - {"test_metrics.json"}


def test_a_run_on_sampled_graphs_resumes_and_is_evaluated_on_some_users(
    command: Command, shop_graph: Path, tmp_path: Path
):
    arguments = ["--model", "dream", "--sampled", *CPU, "--set", "training.epoch_steps=2"]
    command("train", shop_graph, *arguments, "--run", tmp_path / "whole", "--set", "training.epochs=4")
    command("train", shop_graph, *arguments, "--run", tmp_path / "parts", "--set", "training.epochs=2")
    resumed = command("train", "--resume", "--run", tmp_path / "parts", "--set", "training.epochs=4")
    assert resumed.exit_code == 0, resumed.stderr
    assert_same_result(tmp_path / "parts", tmp_path / "whole")
    config = tomllib.loads((tmp_path / "whole" / "config.toml").read_text())
    assert config["training"]["sampling"] == SamplingConfig().model_dump(mode="json")
    told = [command("evaluate", tmp_path / "whole", "--users", 7, "--format", "json") for _ in range(2)]
    assert told[0].exit_code == 0, told[0].stderr
    assert told[0].stdout == told[1].stdout != command("evaluate", tmp_path / "whole", "--format", "json").stdout


def test_an_existing_directory_is_refused(command: Command, shop_graph: Path, tmp_path: Path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "notes.txt").touch()
    result = command("train", shop_graph, "--model", "bpr", "--run", run)
    assert result.exit_code == 1
    assert "--resume" in result.stderr
    assert files_of(run) == {"notes.txt"}


def test_an_empty_directory_is_as_good_as_none(command: Command, shop: Path, tmp_path: Path):
    for name in ("graph", "run", "shipped"):
        (tmp_path / name).mkdir()
    for arguments in (
        ("build-graph", shop, "-k", 5, "--out", tmp_path / "graph"),
        ("train", tmp_path / "graph", "--model", "popularity", "--run", tmp_path / "run"),
        ("train", tmp_path / "graph", "--model", "bpr", "--set", "training.epochs=1", "--run", tmp_path / "bpr"),
        ("export", tmp_path / "bpr", "--out", tmp_path / "shipped"),
    ):
        result = command(*arguments)
        assert result.exit_code == 0, result.stderr
    assert (tmp_path / "shipped" / "export.json").is_file()


def test_memory_that_the_allocator_cannot_have_is_told_in_one_line_and_other_errors_are_not_hidden(
    command: Command, shop_graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(message: str) -> None:
        def loss(*_: object) -> None:
            raise RuntimeError(message)

        monkeypatch.setattr("dream_pyg.models.bpr.BPR.loss", loss)

    arguments = ("train", shop_graph, "--model", "bpr", "--device", "cpu", "--run")
    fail("DefaultCPUAllocator: can't allocate memory: you tried to allocate 6084960000 bytes.")
    result = command(*arguments, tmp_path / "one")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("Error: Out of memory: DefaultCPUAllocator: can't allocate")
    fail("another")
    assert isinstance(command(*arguments, tmp_path / "two").exception, RuntimeError)


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.slow
def test_an_interrupt_saves_exits_with_130_and_resumes_exactly(
    command: Command, shop_graph: Path, tmp_path: Path, signal_number: int
):
    arguments = ["--model", "dream", *CPU, "--set", "training.patience=1000", "--set", "training.epochs"]
    run = tmp_path / "run"
    line = [sys.executable, "-m", "dream_pyg", "train", str(shop_graph), "--run", str(run), *arguments[:-1]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*line, "training.epochs=100000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stderr is not None
        assert process.stdout is not None
        for told in process.stderr:
            if told.startswith("epoch   3"):
                break
        process.send_signal(signal_number)
        rest = process.stderr.read().splitlines()
        assert process.stdout.read() == ""
    assert process.returncode == 130
    assert rest[-1].startswith("Error: Interrupted")
    assert f"dream-pyg train --resume --run {run}" in rest[-1]
    done = len((run / "metrics.jsonl").read_text().splitlines())
    epochs = f"training.epochs={done + 2}"
    assert command("train", "--resume", "--run", run, "--set", epochs).exit_code == 0
    assert command("train", shop_graph, "--run", tmp_path / "whole", *arguments[:-1], epochs).exit_code == 0
    assert_same_result(run, tmp_path / "whole")


def test_evaluate_repeats_the_test_metrics(command: Command, shop_run: Path):
    expected = json.loads((shop_run / "test_metrics.json").read_text())["lines"]
    result = command("evaluate", shop_run, "-k", 5, "-k", 10, "-k", 20, "-k", 50, "--device", "cpu", "--format", "json")
    told = json.loads(result.stdout)
    assert told == {"run": str(shop_run), "split": "test", "mask_valid": False, "lines": expected}
    assert list(expected) == ["general", "behavior", "modal"]


def test_evaluate_tables_round_the_same_numbers(command: Command, shop_run: Path):
    expected = json.loads((shop_run / "test_metrics.json").read_text())["lines"]
    header, *rows = [line.split() for line in command("evaluate", shop_run, "-k", 20).stdout.splitlines()]
    assert [row[0] for row in rows] == list(expected)
    for row in rows:
        assert dict(zip(header[1:], row[1:], strict=True)) == {
            name: f"{value:.4f}" for name, value in expected[row[0]].items() if name.endswith("@20")
        }


def test_evaluate_on_valid_gives_what_chose_the_epoch(command: Command, shop_run: Path):
    told = json.loads(command("evaluate", shop_run, "--split", "valid", "--format", "json").stdout)
    lines = [json.loads(line)["valid"] for line in (shop_run / "metrics.jsonl").read_text().splitlines()]
    best = max(lines, key=lambda metrics: metrics["recall@20"])
    # The training leaves out users without a hit, so that sums are made in another order.
    assert {name: told["lines"]["general"][name] for name in best} == pytest.approx(best, rel=1e-6)


def test_epochs_and_patience_have_options_of_their_own(command: Command, shop_graph: Path, tmp_path: Path):
    short = ("--epochs", 2, "--patience", 7, "--seed", 3)
    assert command("train", shop_graph, "--model", "bpr", *short, *CPU, "--run", tmp_path / "run").exit_code == 0
    training = RunConfig.load(tmp_path / "run" / "config.toml").training
    assert (training.epochs, training.patience, training.seed) == (2, 7, 3)


def test_masking_validation_items_never_lowers_a_hit(command: Command, shop_run: Path):
    plain, masked = (
        json.loads(command("evaluate", shop_run, *flag, "--format", "json").stdout)["lines"]["general"]
        for flag in ([], ["--mask-valid"])
    )
    assert masked["mrr@20"] > plain["mrr@20"]
    assert all(masked[name] >= plain[name] for name in plain if not name.startswith("coverage"))


@pytest.mark.parametrize("arguments", [["--split", "tset"], ["-k", "0"], ["-k", "-3"]], ids=" ".join)
def test_evaluate_refuses_unknown_splits_and_cut_offs(command: Command, shop_run: Path, arguments: list[str]):
    result = command("evaluate", shop_run, *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""


def test_neighbors_are_chosen_at_training(command: Command, shop: Path, shop_graph: Path, tmp_path: Path):
    assert command("build-graph", shop, "-k", 2, "--out", tmp_path / "few").exit_code == 0
    arguments = ["--model", "dream", *CPU, "--set", "training.epochs=1", "--seed", 3]
    runs = {}
    for name, graph, chosen in (
        ("option", shop_graph, ["--num-neighbors", 2]),
        ("set", shop_graph, ["--set", "num_neighbors=2"]),
        ("few", tmp_path / "few", []),
        ("all", shop_graph, []),
    ):
        runs[name] = tmp_path / name
        result = command("train", graph, *arguments, *chosen, "--run", runs[name] / "run")
        assert result.exit_code == 0, result.stderr
    assert_same_result(runs["option"] / "run", runs["few"] / "run")
    assert_same_result(runs["set"] / "run", runs["few"] / "run")
    with pytest.raises(AssertionError):
        assert_same_result(runs["all"] / "run", runs["few"] / "run")
    config = runs["option"] / "run" / "config.toml"
    assert tomllib.loads(config.read_text())["num_neighbors"] == 2
    evaluated = [
        json.loads(command("evaluate", run / "run", "--device", "cpu", "--format", "json").stdout)["lines"]
        for run in (runs["option"], runs["few"])
    ]
    assert evaluated[0] == evaluated[1]
    refused = command("train", "--resume", "--run", runs["option"] / "run", "--num-neighbors", 3)
    assert refused.exit_code == 1
    assert "num_neighbors: 3 here, 2 there" in refused.stderr
    config.write_text(config.read_text().replace("num_neighbors = 2", "num_neighbors = 3"))
    refused = command("evaluate", runs["option"] / "run")
    assert refused.exit_code == 1
    assert "num_neighbors: 3 here, 2 there" in refused.stderr


def counted(function: Callable[..., Any], calls: list[Any]) -> Callable[..., Any]:
    """The same function, whose calls are counted."""

    def call(*arguments: Any) -> Any:
        calls.append(arguments)
        return function(*arguments)

    return call


def test_preset_auto_finds_values_within_a_budget_and_trains_with_them(
    command, shop_graph: Path, tmp_path: Path, monkeypatch
):
    run = tmp_path / "run"
    short = ["--set", "training.epochs=2", "--set", "training.batch_size=64", "--set", "training.num_threads=1"]
    line = ["train", shop_graph, "--model", "dream", "--preset", "auto", "--budget", "0", "--run", run, *short]
    line += ["--num-neighbors", "2", "--seed", "3"]
    trained = []
    monkeypatch.setattr(trainer._Session, "_train_epoch", counted(trainer._Session._train_epoch, trained))
    assert command(*line).exit_code == 0
    assert len(trained) == 2, "the best trial was trained again"
    best = RunConfig.load(run.with_name("run.study") / "trials" / "000" / "config.toml")
    config = RunConfig.load(run / "config.toml")
    assert config == best
    assert (config.num_neighbors, config.training.seed) == (2, 3)
    assert config.training.teacher is not None, "the study did not begin at the preset best"
    assert not list(run.with_name("run.study").glob("trials/*/test_metrics.json")), "test was read more than once"
    refused = command(*line[:-4], "--sampled", "--run", tmp_path / "sampled")
    assert "it reads more than a batch's neighbours" in refused.stderr
    assert command(*line[:-4], "--run", tmp_path / "sampled").exit_code == 0, "a refused study is in the way"
    again = command(*line)
    assert again.exit_code != 0
    assert "exists already. Continue it with --resume" in again.stderr
    refused = command("train", "--model", "dream", "--preset", "auto", "--run", tmp_path / "other")
    assert "--preset auto needs GRAPH and --model" in refused.stderr
