"""``dream-pyg reproduce``: how it finds graphs, what it prints, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from dream_pyg.models.bpr import BPR
from tests.test_bad_input import refusal

Command = Callable[..., Result]
SHORT = ["--set", "training.epochs=2", "--set", "training.batch_size=64", "--set", "training.device=cpu", "--seeds", 2]


@pytest.fixture
def here(shop_graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with the bookshop's graph in ``graphs``, under its name and under another."""
    for name in ("synthetic", "mine"):
        shutil.copytree(shop_graph, tmp_path / "graphs" / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_table_by_the_name_of_its_dataset(command: Command, here: Path):
    arguments = ["reproduce", "table2", "--dataset", "synthetic", "--models", "bpr,popularity", *SHORT]
    result = command(*arguments, "--format", "json")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert told == json.loads((here / "tables" / "synthetic" / "table2.json").read_text())
    assert ([row["key"] for row in told["rows"]], told["complete"]) == (["bpr", "popularity"], True)
    printed = command(*arguments).stdout.splitlines()
    assert printed[0].split()[:4] == ["recall@10", "recall@20", "ndcg@10", "ndcg@20"]
    assert printed[1].split()[:2] == ["BPR", f"{told['rows'][0]['cells'][0]['mean']:.4f}"]
    assert printed[-1].endswith("written to tables/synthetic/table2.md, .json and .csv")


@pytest.mark.parametrize("table", ["table1", "table3", "table4"])
def test_every_table(command: Command, here: Path, table: str):
    models = ["--models", "vbpr"] if table == "table4" else []
    result = command("reproduce", table, "--graph", here / "graphs" / "mine", "--out", here / "out", *SHORT, *models)
    assert result.exit_code == 0, result.stderr
    assert json.loads((here / "out" / f"{table}.json").read_text())["complete"]


def test_a_published_table_is_named_after_the_directory_of_its_runs(command: Command, here: Path):
    for out in ([], ["--out", here / "second-split"]):
        result = command("reproduce", "table1", "--dataset", "synthetic", "--publish", here / "results", *out)
        assert result.exit_code == 0, result.stderr
    names = {f"table1-{name}.{kind}" for name in ("synthetic", "second-split") for kind in ("md", "json", "csv")}
    assert {path.name for path in (here / "results").iterdir()} == names


def test_an_interrupted_table_exits_with_130_and_goes_on(command: Command, here: Path, monkeypatch):
    arguments = ["reproduce", "table2", "--dataset", "synthetic", "--models", "popularity", "--models", "bpr", *SHORT]
    original = BPR.loss
    monkeypatch.setattr(BPR, "loss", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    result = command(*arguments)
    assert result.exit_code == 130
    last = result.stderr.splitlines()[-1]
    assert last == (
        "Error: Interrupted; what there is of the tables of synthetic at tables/synthetic is saved. "
        "Continue with the same command."
    )
    monkeypatch.setattr(BPR, "loss", original)
    assert command(*arguments).exit_code == 0
    assert json.loads((here / "tables" / "synthetic" / "table2.json").read_text())["complete"]


@pytest.mark.parametrize(
    ("arguments", "code", "fragments"),
    [
        (["table7", "--dataset", "synthetic"], 2, ["Unknown table 'table7'", "table4"]),
        (["table2"], 2, ["--dataset NAME", "--graph GRAPH"]),
        (["table2", "--dataset", "sinthetic"], 2, ["at graphs/sinthetic", "Did you mean 'synthetic'?"]),
        (["table2", "--dataset", "baby"], 2, ["no graph of data set 'baby' at graphs/baby. Build it"]),
        (["table2", "--dataset", "mine"], 2, ["is a graph of data set 'synthetic', not of 'mine'"]),
        (["table2", "--graph", "nowhere"], 1, ["nowhere is not a graph store"]),
        (["table2", "--dataset", "synthetic", "--models", "bpr,drem"], 2, ["Did you mean 'dream'?"]),
        (["table4", "--dataset", "synthetic", "--models", "bpr"], 2, ["it has vbpr, bm3, mgcn"]),
        (["table2", "--dataset", "synthetic", "--preset", "tictok"], 2, ["Did you mean 'tiktok'?"]),
        (["table2", "--dataset", "synthetic", "--out", "graphs"], 1, ["holds no tables"]),
    ],
)
def test_bad_input(command: Command, here: Path, arguments: list[str], code: int, fragments: list[str]):
    with refusal(here, code, *fragments) as results:
        results.append(command("reproduce", *arguments))


def test_what_a_graph_lacks_is_told_before_anything_is_trained(command: Command, shop: Path, tmp_path: Path):
    graph, out = tmp_path / "graph", tmp_path / "tables"
    assert command("build-graph", shop, "--no-user-graphs", "--out", graph).exit_code == 0
    result = command("reproduce", "table2", "--graph", graph, "--out", out, "--seeds", "1", "--models", "bpr,dream")
    assert result.exit_code == 2
    assert "needs a user-user kNN graph (--features, no --no-user-graphs)" in result.stderr
    assert not list(out.glob("runs/*/*"))


def test_tables_of_another_graph_are_left_alone(command: Command, here: Path):
    out = here / "out"
    assert command("reproduce", "table1", "--dataset", "synthetic", "--out", out).exit_code == 0
    described = json.loads((out / "reproduction.json").read_text())
    (out / "reproduction.json").write_text(json.dumps({**described, "dataset": "baby", "graph_fingerprint": "0" * 64}))
    with refusal(here, 1, "holds the tables of another graph: baby with fingerprint 000000000000") as results:
        results.append(command("reproduce", "table1", "--dataset", "synthetic", "--out", out))
