"""``dream-pyg figure``: what it draws, writes and refuses."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import polars as pl
import pytest
from click.testing import Result
from PIL import Image
from polars.testing import assert_frame_equal

from dream_pyg import DatasetConfig, build_store
from dream_pyg.analysis.figures import FIGURES
from tests.test_bad_input import refusal

Command = Callable[..., Result]
CPU = ("--device", "cpu")


@pytest.fixture
def runs(variant: Callable[..., Path]) -> list[Path]:
    """A run, one that differs in a weight of figure 9, and one in a weight of figure 8."""
    return [variant("base"), variant("intra", "model.intra_weight=0.5"), variant("signal", "model.signal_weight=0.5")]


def runs_for(name: str, runs: list[Path]) -> list[Path]:
    """Two of them that a figure compares."""
    return {"8": [runs[0], runs[2]], "9": runs[:2]}.get(name, runs[:2])


@pytest.mark.parametrize("name", FIGURES)
def test_each_figure_is_a_picture_twice_and_its_numbers(command: Command, runs: list[Path], tmp_path: Path, name: str):
    chosen = runs_for(name, runs)
    result = command("figure", name, *chosen, "--out", tmp_path / "figures", "--nodes", 40, *CPU, "--format", "json")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    files = {suffix: tmp_path / "figures" / f"figure-{name}.{suffix}" for suffix in ("png", "svg", "csv")}
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {path.name for path in files.values()}
    assert {suffix: told[suffix] for suffix in files} == {suffix: str(path) for suffix, path in files.items()}
    with Image.open(files["png"]) as picture:
        picture.verify()
        assert min(picture.size) > 500
    assert ElementTree.parse(files["svg"]).getroot().tag.endswith("svg")
    table = pl.read_csv(files["csv"])
    assert_frame_equal(table, pl.DataFrame(told["rows"]), check_dtypes=False)
    if "run" in table.columns:
        assert table["run"].unique(maintain_order=True).to_list() == [run.name for run in chosen]


@pytest.mark.parametrize("name", ["1a", "7"])
def test_the_same_runs_give_the_same_bytes(command: Command, runs: list[Path], tmp_path: Path, name: str):
    for out in ("first", "second"):
        result = command("figure", name, runs[0], "--out", tmp_path / out, "--nodes", 30, *CPU)
        assert result.exit_code == 0, result.stderr
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes(), path.name


def test_figures_are_replaced(command: Command, runs: list[Path], tmp_path: Path):
    assert command("figure", "5", runs[0], "--out", tmp_path / "out", *CPU).exit_code == 0
    assert command("figure", "5", *runs, "--out", tmp_path / "out", *CPU).exit_code == 0
    assert pl.read_csv(tmp_path / "out" / "figure-5.csv")["run"].n_unique() == 3


def test_runs_of_one_name_are_told_apart_by_what_they_lie_in(command: Command, runs: list[Path], tmp_path: Path):
    twin = tmp_path / "elsewhere" / runs[0].name
    shutil.copytree(runs[0], twin)
    assert command("figure", "5", runs[0], twin, "--out", tmp_path / "out", *CPU).exit_code == 0
    table = pl.read_csv(tmp_path / "out" / "figure-5.csv")
    assert table["run"].unique(maintain_order=True).to_list() == [
        f"variants/{runs[0].name}",
        f"elsewhere/{runs[0].name}",
    ]


def test_help_lists_every_figure(command: Command):
    told = command("figure", "--help").stdout
    assert [name for name, figure in FIGURES.items() if f"    {name:<4}{figure.what}\n" not in told] == []


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["1d", "RUN"], ["Unknown figure '1d'", "expected one of 1a, 1b, 5, 6, 7, 8, 9"]),
        (["8", "RUN"], ["Figure 8 compares runs; expected at least 2, got 1"]),
        (["5", "RUN", "RUN"], ["given twice"]),
        (["8", "RUN", "OTHER", "--metric", "recall"], ["Unknown metric 'recall'"]),
        (["8", "RUN", "OTHER", "--metric", "recall@7"], ["no test metric 'recall@7'", "recall@20"]),
        (["7", "RUN", "--nodes", "1"], ["at least 2 nodes (got 1)"]),
        (["7", "RUN", "--seed", "-1"], ["The seed must be from 0"]),
        (
            ["9", "RUN", "OTHER"],
            ["Runs may differ only in intra_weight, inter_weight", "model.signal_weight: 0.5 here"],
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_arguments(
    command: Command, runs: list[Path], tmp_path: Path, arguments: list[str], fragments: list[str]
):
    given = [{"RUN": runs[0], "OTHER": runs[2]}.get(argument, argument) for argument in arguments]
    with refusal(tmp_path, 2, *fragments) as results:
        results.append(command("figure", *given, "--out", tmp_path / "out", *CPU))


def test_a_model_without_two_lines_is_refused_before_epochs_are_asked_for(
    command: Command, shop_graph: Path, tmp_path: Path
):
    run = tmp_path / "bpr"
    trained = command("train", shop_graph, "--model", "bpr", "--run", run, "--epochs", 1, *CPU)
    assert trained.exit_code == 0, trained.stderr
    with refusal(tmp_path, 2, "BPR has no behavior and modal line") as results:
        results.append(command("figure", "6", run, "--out", tmp_path / "out", *CPU))


@pytest.mark.parametrize("name", ["1a", "1b", "6"])
def test_a_run_that_kept_no_epochs_says_how_to_train_one(command: Command, shop_run: Path, tmp_path: Path, name: str):
    with refusal(tmp_path, 1, "kept no epochs", "--model dream", "--set training.keep_every=1") as results:
        results.append(command("figure", name, shop_run, "--out", tmp_path / "out", *CPU))


def test_runs_of_different_graphs(command: Command, shop: Path, runs: list[Path], tmp_path: Path):
    build_store(DatasetConfig.load(shop), tmp_path / "graph", num_neighbors=3)
    trained = command("train", tmp_path / "graph", "--model", "dream", "--run", tmp_path / "run", *CPU,
                      "--set", "training.epochs=1", "--set", "training.batch_size=64")  # fmt: skip
    assert trained.exit_code == 0
    with refusal(tmp_path, 2, "different graphs", "here = run, there = base", "graph: 'synthetic'") as results:
        results.append(command("figure", "8", runs[0], tmp_path / "run", "--out", tmp_path / "out", *CPU))


@pytest.mark.parametrize("name", ["1a", "1b", "5", "6", "7", "8", "9"])
def test_a_model_without_two_lines(command: Command, shop_graph: Path, tmp_path: Path, name: str):
    runs = [tmp_path / "run-0", tmp_path / "run-1"]
    for run in runs:
        trained = command("train", shop_graph, "--model", "bpr", "--run", run, *CPU,
                          "--set", "training.epochs=1", "--set", "training.keep_every=1")  # fmt: skip
        assert trained.exit_code == 0
    lacking = {"8": "has no signal_weight", "9": "has no intra_weight"}.get(name, "no behavior and modal line")
    with refusal(tmp_path, 2, lacking, "dream") as results:
        results.append(command("figure", name, *runs, "--out", tmp_path / "out", *CPU))


def test_lines_that_share_no_embeddings(command: Command, shop_graph: Path, tmp_path: Path):
    trained = command("train", shop_graph, "--model", "vbpr", "--run", tmp_path / "run", *CPU,
                      "--set", "training.epochs=1", "--set", "training.keep_every=1")  # fmt: skip
    assert trained.exit_code == 0
    with refusal(tmp_path, 2, "share no ID embeddings", "mgcn") as results:
        results.append(command("figure", "1a", tmp_path / "run", "--out", tmp_path / "out", *CPU))


def test_a_map_of_one_dimension(command: Command, shop_graph: Path, tmp_path: Path):
    trained = command("train", shop_graph, "--model", "dream", "--run", tmp_path / "run", *CPU,
                      "--set", "training.epochs=1", "--set", "model.embedding_dim=1")  # fmt: skip
    assert trained.exit_code == 0
    with refusal(tmp_path, 2, "have 1 dimension; a map needs at least 2") as results:
        results.append(command("figure", "7", tmp_path / "run", "--out", tmp_path / "out", *CPU))


def test_a_run_that_is_not_finished(command: Command, runs: list[Path], tmp_path: Path):
    (runs[0] / "test_metrics.json").unlink()
    with refusal(tmp_path, 1, "is not finished", "train --resume --run") as results:
        results.append(command("figure", "5", runs[0], "--out", tmp_path / "out", *CPU))


def test_a_damaged_kept_epoch(command: Command, runs: list[Path], tmp_path: Path):
    path = runs[0] / "checkpoints" / "epoch-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with refusal(tmp_path, 1, "epoch-00001.safetensors is damaged") as results:
        results.append(command("figure", "6", runs[0], "--out", tmp_path / "out", *CPU))


@pytest.mark.parametrize("module", ["matplotlib", "sklearn"])
def test_a_missing_extra(
    command: Command, runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
):
    monkeypatch.setitem(sys.modules, module, None)
    with refusal(tmp_path, 1, module, 'pip install "dream-pyg[plots]"') as results:
        results.append(command("figure", "5", runs[0], "--out", tmp_path / "out", *CPU))


def test_a_file_in_place_of_the_directory(command: Command, runs: list[Path], tmp_path: Path):
    (tmp_path / "out").write_text("")
    with refusal(tmp_path, 1, "Cannot write") as results:
        results.append(command("figure", "5", runs[0], "--out", tmp_path / "out", *CPU))
