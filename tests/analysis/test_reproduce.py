"""The paper's tables: which runs they are made of, their statistics, and that they go on after any end."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import io
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

import numpy as np
import pytest
import torch

from dream_pyg.analysis import reproduce as reproduction
from dream_pyg.analysis.groups import measure_users
from dream_pyg.analysis.published import published_rows
from dream_pyg.analysis.reproduce import reproduce
from dream_pyg.analysis.significance import paired_p_value
from dream_pyg.analysis.systems import BEST_WITHOUT, choices
from dream_pyg.analysis.table import Cell, Row, Table
from dream_pyg.config import RunConfig
from dream_pyg.data import validation
from dream_pyg.data.dataset import DatasetConfig
from dream_pyg.data.files import held, load_tensors, read_json, save_tensors, write_json
from dream_pyg.errors import ConfigError, Interrupted, StoreError, TrainingError
from dream_pyg.graph.store import build_store, load_graph
from dream_pyg.models.bpr import BPR
from dream_pyg.training.run import RunPaths, load_run
from dream_pyg.training.trainer import train
from tests.analysis.conftest import Killed

STEPS = 4  # of an epoch: at most 240 pairs by 64
SET = ["training.epochs=2", "training.batch_size=64", "training.num_threads=1", "training.device=cpu"]


@pytest.fixture(scope="module")
def baby(shop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bookshop's graph, under the name of a data set that the paper has."""
    config = DatasetConfig.load(shop).model_copy(update={"name": "baby"})
    stored, _ = build_store(config, tmp_path_factory.mktemp("graphs") / "baby", num_neighbors=5)
    return stored.path


@pytest.fixture(scope="module")
def tables(baby: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Table 2 with three seeds of two systems."""
    out = tmp_path_factory.mktemp("tables") / "baby"
    reproduce("table2", baby, out, num_seeds=3, models=["bpr", "popularity"], overrides=SET)
    return out


def metric_of(run: Path, name: str) -> float:
    """A test metric of a run."""
    return float(json.loads(RunPaths(run).test_metrics.read_text())["lines"]["general"][name])


def untimed(path: Path) -> Any:
    """A table's JSON without durations."""
    table = json.loads(path.read_text())
    for row in table["rows"]:
        for run in row["runs"]:
            del run["seconds"], run["run"]
    return table


def test_cells_are_mean_sample_deviation_and_ratio(tables: Path):
    (bpr, popularity) = json.loads((tables / "table2.json").read_text())["rows"]
    for row in (bpr, popularity):
        for cell in row["cells"]:
            values = np.array([metric_of(Path(run["run"]), cell["metric"]) for run in row["runs"]])
            assert cell["values"] == values.tolist()
            assert cell["mean"] == pytest.approx(np.mean(values))
            assert cell["std"] == pytest.approx(np.std(values, ddof=1))
    assert len(set(bpr["cells"][0]["values"])) > 1
    printed = published_rows("table2", "baby")["bpr"]
    assert [(cell["metric"], cell["published"]) for cell in bpr["cells"]] == list(printed.items())
    assert [cell["ratio"] for cell in bpr["cells"]] == pytest.approx(
        [cell["mean"] / printed[cell["metric"]] for cell in bpr["cells"]]
    )
    assert (
        {cell["published"] for cell in popularity["cells"]} == {cell["ratio"] for cell in popularity["cells"]} == {None}
    )


def test_the_table_of_accuracy_has_groups_and_each_addition_taken_away(baby: Path, tmp_path: Path):
    table = reproduce("accuracy", baby, tmp_path / "out", num_seeds=1, models=["lightgcn", "dream"], overrides=SET)
    configs = {row.key: row.runs[0]["config"] for row in table.rows}
    assert list(configs) == ["lightgcn", "lightgcn_taught", "paper", "best", *BEST_WITHOUT]
    assert "teacher" not in configs["lightgcn"]["training"]
    assert configs["lightgcn_taught"]["training"]["teacher"] == configs["best"]["training"]["teacher"]
    asked = {
        key: tuple(config["training"]["teacher"][of] > 0 for of in ("share", "vote"))
        for key, config in configs.items()
        if key.startswith("best")
    }
    assert asked["best"] == asked["best_with_user_graphs"] == (True, True)
    assert asked["best_without_vote"] == (True, False)
    assert asked["best_untaught"] == (False, True)
    assert asked["best_without_teacher"] == (False, False)
    assert (
        configs["best_with_user_graphs"]["model"]["user_modal"]
        == "user_graph"
        != configs["best"]["model"]["user_modal"]
    )
    best = next(row for row in table.rows if row.key == "best")
    run = load_run(best.runs[0]["run"])
    figures, _ = measure_users(run.scorer(), run.graph)
    assert {cell.metric: cell.mean for cell in best.cells if cell.metric in figures} == pytest.approx(figures)
    assert best.values_from == "best"
    assert "# Accuracy: DREAM as published" in (tmp_path / "out" / "accuracy.md").read_text()
    assert (tmp_path / "out" / "accuracy.png").stat().st_size > 10_000


def test_the_table_of_choices_changes_one_value_each_and_reads_validation_alone(baby: Path, tmp_path: Path):
    short = ["training.epochs=1", "training.batch_size=1000", "training.device=cpu", "training.num_threads=1"]
    table = reproduce("choices", baby, tmp_path / "out", num_seeds=1, overrides=short)
    configs = {row.key: row.runs[0]["config"] for row in table.rows}
    changed_by = choices(5)
    assert list(configs) == ["paper", *changed_by]
    assert configs["neighbors_half"]["num_neighbors"] == 2
    paper = configs.pop("paper")
    for key, config in configs.items():
        (changed,) = validation.differences(config, paper)
        assert changed.startswith(changed_by[key][1].partition("=")[0])
    first = table.rows[0]
    run = RunPaths(Path(first.runs[0]["run"]))
    assert not run.test_metrics.exists()
    (epoch,) = (json.loads(line) for line in run.metrics.read_text().splitlines())
    assert {cell.metric: cell.mean for cell in first.cells} == epoch["valid"]
    assert "test" not in first.runs[0]
    loaded = load_run(run.root)
    _, recall = measure_users(loaded.scorer(), loaded.graph, split="valid")
    assert float(recall[~recall.isnan()].mean()) == pytest.approx(epoch["valid"]["recall@20"], abs=1e-6)
    tested = {cell.metric for row in table.rows[1:] for cell in row.cells if cell.p_value is not None}
    assert tested == {"recall@20"}
    assert "against DREAM (paper)." in (tmp_path / "out" / "choices.md").read_text()


def test_the_table_of_related_systems_says_who_prints_them(baby: Path, tmp_path: Path):
    table = reproduce("related", baby, tmp_path / "out", num_seeds=1, models=["ease", "itemknn"])
    assert [row.name for row in table.rows] == ["ItemKNN", "EASE"]
    printed = [cell.published for row in table.rows for cell in row.cells]
    assert printed == [None, None, *published_rows("related", "baby")["ease"].values()]
    assert table.about["left out"] == ["AddEASE", "BUIR", "GRCN", "SLMRec", "LATTICE", "MICRO", "DRAGON", "DREAM"]
    markdown = (tmp_path / "out" / "related.md").read_text()
    assert markdown.startswith("# Related: systems that the paper names but does not compare")
    assert "| printed recall@20 |" in markdown
    assert "what other papers print.\n- EASE and Add-EASE: supplement of SCOPE;" in markdown


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_run_without_test_figures_gets_them_when_a_table_of_test_asks(jobs: int, baby: Path, tmp_path: Path):
    config = RunConfig.create(graph=baby, model="dream", preset="paper", overrides=SET)
    fingerprint = load_graph(baby).info["fingerprint"]
    out = tmp_path / "out"
    for test in (False, True):
        task = reproduction.Task(config, out / "run", test)
        assert not reproduction._is_finished(task, fingerprint)
        assert list(reproduction._train_all([task], jobs)) == [out / "run"]
        assert reproduction._is_finished(task, fingerprint)
        assert RunPaths(out / "run").test_metrics.exists() == test


def test_a_single_value_has_no_deviation_and_no_value_has_no_mean():
    assert Cell.of("recall@20", [0.25], 0.5) == Cell("recall@20", [0.25], 0.25, None, 0.5, 0.5)
    assert Cell.of("recall@20", [], 0.5) == Cell("recall@20", [], None, None, 0.5, None)


def test_the_three_files_say_the_same(tables: Path):
    table = json.loads((tables / "table2.json").read_text())
    cells = [(row["key"], cell) for row in table["rows"] for cell in row["cells"]]
    lines = list(csv.DictReader((tables / "table2.csv").open()))
    assert [(line["system"], line["metric"], float(line["mean"]), float(line["std"])) for line in lines] == [
        (key, cell["metric"], cell["mean"], cell["std"]) for key, cell in cells
    ]
    markdown = (tables / "table2.md").read_text()
    assert [cell for _, cell in cells if f"| {cell['mean']:.4f} ± {cell['std']:.4f} |" not in markdown] == []
    assert "| paper's recall@20 | ratio of recall@20 |" in markdown
    assert table["complete"]
    assert "Unfinished" not in markdown


def test_rows_are_tested_over_users(tables: Path, baby: Path, tmp_path: Path):
    shutil.copytree(tables, tmp_path / "out")
    table = reproduce(
        "table2", baby, tmp_path / "out", num_seeds=2, models=["bpr", "popularity", "dream"], overrides=SET
    )
    *others, dream = table.rows
    recalls = {}
    for row in table.rows:
        runs = [load_run(run["run"]) for run in row.runs]
        recalls[row.key] = torch.stack([measure_users(run.scorer(), run.graph)[1] for run in runs]).mean(dim=0)
    for row in others:
        tested = {cell.metric: cell.p_value for cell in row.cells if cell.p_value is not None}
        assert tested == {"recall@20": paired_p_value(recalls[row.key], recalls["dream"])}
        assert 0 < tested["recall@20"] < 1
    kept = Path(dream.runs[0]["run"]) / "users_test.safetensors"  # as if more epochs had been trained since
    save_tensors(kept, {"recall@20": torch.zeros(3)}, {"epoch": "99", "figures": "{}"})
    assert (
        reproduce("table2", baby, tmp_path / "out", num_seeds=2, models=["bpr", "popularity", "dream"], overrides=SET)
        == table
    )
    assert [row.compared_with for row in table.rows] == ["DREAM", "DREAM", None]
    assert all(cell.p_value is None for cell in dream.cells)
    markdown = (tmp_path / "out" / "table2.md").read_text()
    assert "| p of recall@20 |" in markdown
    assert "being the mean over the seeds, against DREAM." in markdown


def test_a_table_says_what_its_numbers_depend_on(tables: Path, baby: Path):
    about = json.loads((tables / "table2.json").read_text())["about"]
    assert about["fingerprint"] == load_graph(baby).fingerprint
    assert about["built with"]["num_neighbors"] == 5
    assert len(about["built from"]) == len(set(about["built from"])) > 1
    assert (about["seeds"], about["threads"], about["devices"]) == ([0, 1, 2], [1], ["cpu"])
    assert {"machine", "versions", "set for every run"} <= about.keys()


def test_what_is_there_is_not_trained_again(tables: Path, baby: Path, monkeypatch):
    before = untimed(tables / "table2.json")
    monkeypatch.setattr(reproduction, "train", None)
    reproduce("table2", baby, tables, num_seeds=3, models=["bpr", "popularity"], overrides=SET)
    assert untimed(tables / "table2.json") == before


def test_systems_that_are_there_stay_in_the_table_of_others_and_those_that_are_not_are_named(
    tables: Path, baby: Path, tmp_path: Path, monkeypatch
):
    shutil.copytree(tables, tmp_path / "out")
    monkeypatch.setattr(reproduction, "train", None)
    given = {"num_seeds": 3, "models": ["popularity"], "overrides": SET, "notes": ["Features are noise."]}
    table = reproduce("table2", baby, tmp_path / "out", **given)
    assert [(row.key, len(row.runs)) for row in table.rows] == [("popularity", 3), ("bpr", 3)]
    assert table.complete
    assert table.about["left out"] == ["LightGCN", "VBPR", "MMGCN", "DualGNN", "BM3", "FREEDOM", "MGCN", "DREAM"]
    written = (tmp_path / "out" / "table2.md").read_text()
    assert "- left out: LightGCN, VBPR" in written
    assert "\n- Features are noise.\n" in written


def test_what_is_set_for_a_model_may_mean_nothing_to_the_others(baby: Path, tmp_path: Path, planned):
    overrides = [*SET, "model.num_layers=1"]
    table = reproduce("table2", baby, tmp_path / "out", num_seeds=1, models=["lightgcn"], overrides=overrides)
    assert [row.key for row in table.rows] == ["lightgcn"]
    with pytest.raises(ConfigError, match="num_layers"):
        reproduce("table2", baby, tmp_path / "out", num_seeds=1, models=["bpr"], overrides=overrides)


def test_what_an_older_version_trained_is_not_trained_again(tables: Path, baby: Path, tmp_path: Path, planned):
    # As if BPR's L2 weight and a name that depends on it were new.
    shutil.copytree(tables, tmp_path / "out")
    (old,) = (tmp_path / "out" / "runs").glob("bpr-*")
    for path in old.glob("seed-*/run.json"):
        info = json.loads(path.read_text())
        assert info["config"]["model"].pop("l2_weight") == RunConfig.create(graph="", model="bpr").model["l2_weight"]
        path.write_text(json.dumps(info))
    old.rename(old.with_name("bpr-0123456789"))
    table = reproduce("table2", baby, tmp_path / "out", num_seeds=3, models=["bpr"], overrides=SET)
    assert planned == []
    assert [run["test"] for run in table.rows[0].runs] == [
        run["test"] for run in json.loads((tables / "table2.json").read_text())["rows"][0]["runs"]
    ]


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[tuple[RunConfig, Path]]:
    """The runs that a table would train, none of which is trained."""
    runs: list[tuple[RunConfig, Path]] = []

    def take_all(tasks, jobs):
        runs.extend((task.config, task.run) for task in tasks)
        yield from ()

    monkeypatch.setattr(reproduction, "_train_all", take_all)
    return runs


def test_other_values_are_other_runs(tables: Path, baby: Path, tmp_path: Path, planned):
    shutil.copytree(tables, tmp_path / "out")
    for change, seeds in (([], 4), (["training.learning_rate=0.5"], 1), (["model.l2_weight=0"], 1)):
        reproduce("table2", baby, tmp_path / "out", num_seeds=seeds, models=["bpr"], overrides=[*SET, *change])
    assert [(one.training.seed, one.training.learning_rate, one.model["l2_weight"]) for one, _ in planned] == [
        (3, 1e-3, 1e-2),
        (0, 0.5, 1e-2),
        (0, 1e-3, 0.0),
    ]


def differences(one: RunConfig, other: RunConfig) -> list[str]:
    """The keys in which two configurations differ."""
    return [line.partition(":")[0] for line in one.differences(other)]


def test_table_2_compares_the_systems_of_the_paper(baby: Path, tmp_path: Path, planned):
    table = reproduce("table2", baby, tmp_path / "out", num_seeds=2, preset="baby")
    assert [row.name for row in table.rows] == [
        "BPR", "LightGCN", "VBPR", "MMGCN", "DualGNN", "BM3", "FREEDOM", "MGCN", "DREAM",
    ]  # fmt: skip
    assert not table.complete
    assert [config.training.seed for config, _ in planned] == [0, 1] * 9
    assert [row.values_from for row in table.rows] == [
        "baby", "baby", "baby", "baby", "baby", "baby", "defaults", "baby", "baby",
    ]  # fmt: skip
    expected = RunConfig.create(graph=baby, model="dream", preset="baby", overrides=["training.seed=1"])
    assert planned[-1][0] == expected
    assert len({run for _, run in planned}) == 18


def test_table_3_sets_weights_to_zero(baby: Path, tmp_path: Path, planned):
    table = reproduce("table3", baby, tmp_path / "out", num_seeds=1)
    assert [row.key for row in table.rows] == [
        "dream", "without_intra", "without_inter", "without_alignment", "without_signal",
    ]  # fmt: skip
    dream, *ablations = (config for config, _ in planned)
    assert dream == RunConfig.create(graph=baby, model="dream")
    assert [differences(dream, one) for one in ablations] == [
        ["model.intra_weight"],
        ["model.inter_weight"],
        ["model.inter_weight", "model.intra_weight"],
        ["model.signal_weight"],
    ]
    assert all(one.model[key.split(".")[1]] == 0 for one in ablations for key in differences(dream, one))


def test_table_4_adds_the_alignment_of_dream_and_changes_nothing_else(baby: Path, tmp_path: Path, planned):
    preset = tmp_path / "preset.toml"
    preset.write_text(
        '[dream]\nsource = "test"\n[dream.model]\nintra_weight = 0.5\ninter_weight = 0.25\n'
        '[bm3]\nsource = "test"\n[bm3.alignment]\nintra_weight = 1.5\n'
    )
    table = reproduce("table4", baby, tmp_path / "out", num_seeds=1, preset=preset)
    assert [row.name for row in table.rows] == ["VBPR", "VBPR + BMA", "BM3", "BM3 + BMA", "MGCN", "MGCN + BMA"]
    pairs = list(zip(planned[::2], planned[1::2], strict=True))
    assert [differences(plain, aligned) for (plain, _), (aligned, _) in pairs] == [
        ["model.inter_weight", "model.intra_weight"],
        ["model.inter_weight", "model.intra_weight"],
        ["model.intra_weight"],
    ]
    assert [(one.model["intra_weight"], one.model["inter_weight"]) for _, (one, _) in pairs] == [
        (0.5, 0.25),
        (1.5, 0.25),
        (0.5, 0.0),
    ]
    assert [row.cells[0].published for row in table.rows[:2]] == [0.0664, 0.0682]


def test_tables_share_their_runs(baby: Path, tmp_path: Path, planned):
    for table, model in (("table2", "dream"), ("table3", "dream"), ("table2", "vbpr"), ("table4", "vbpr")):
        reproduce(table, baby, tmp_path / "out", num_seeds=1, models=[model])
    runs = [run for _, run in planned]
    assert runs[0] == runs[1]
    assert runs[6] == runs[7]
    assert len(set(runs)) == len(runs) - 2


def test_table_1_counts_and_compares(baby: Path, tmp_path: Path):
    table = reproduce("table1", baby, tmp_path / "out")
    counts = load_graph(baby).info["counts"]
    users, items, total = counts["users"], counts["items"], sum(counts[split] for split in ("train", "valid", "test"))
    (row,) = table.rows
    assert [cell.mean for cell in row.cells] == pytest.approx([users, items, total, 100 - 100 * total / users / items])
    assert [cell.ratio for cell in row.cells] == pytest.approx(
        [users / 19445, items / 7050, total / 160792, (100 - 100 * total / users / items) / 99.88]
    )
    assert f"| {users} | 19,445 |" in (tmp_path / "out" / "table1.md").read_text()


def test_a_dataset_of_one_s_own_has_no_published_columns(shop_graph: Path, tmp_path: Path, planned):
    for table in ("table1", "table2"):
        reproduce(table, shop_graph, tmp_path / "out", num_seeds=1)
        assert "paper" not in (tmp_path / "out" / f"{table}.md").read_text()
        published = {line["published"] for line in csv.DictReader((tmp_path / "out" / f"{table}.csv").open())}
        assert published == {""}


def test_values_that_a_table_prints():
    cells = [Cell.of("users", [19445.0], 20000), Cell.of("sparsity", [99.876]), Cell.of("recall@20", [0.25, 0.5], 0.5)]
    table = Table("table2", "title", "mine", [Row("bpr", "BPR", cells)], True, {"threads": [1, 2]}, ["a note"])
    (record,) = table.records()
    assert record["users"] == "19,445"
    assert record["paper's users"] == "20,000"
    assert record["sparsity"] == "99.88%"
    assert record["paper's sparsity"] == record["ratio of sparsity"] == ""
    assert record["recall@20"] == "0.3750 ± 0.1768"
    assert record["ratio of recall@20"] == "0.750"
    assert table.to_markdown().endswith("\n- a note\n- threads: 1, 2\n")
    assert len(list(csv.reader(io.StringIO(table.to_csv())))) == 4


@pytest.mark.parametrize("step", [1, STEPS * 2 + 3])
def test_a_table_that_was_stopped_goes_on(
    baby: Path, tables: Path, tmp_path: Path, stop_at: Callable[[int], None], step: int
):
    stop_at(step)
    arguments = {"num_seeds": 3, "models": ["bpr", "popularity"], "overrides": SET}
    with pytest.raises((Interrupted, Killed)):
        reproduce("table2", baby, tmp_path / "out", **arguments)
    unfinished = json.loads((tmp_path / "out" / "table2.json").read_text())
    assert not unfinished["complete"]
    assert len(unfinished["rows"][0]["runs"]) == (0 if step == 1 else 1)
    assert "**Unfinished" in (tmp_path / "out" / "table2.md").read_text()
    stop_at(0)
    assert reproduce("table2", baby, tmp_path / "out", **arguments).complete
    assert untimed(tmp_path / "out" / "table2.json") == untimed(tables / "table2.json")


@pytest.mark.parametrize(
    ("table", "options", "message"),
    [
        (
            "table5",
            {},
            "Unknown table 'table5'; expected one of table1, table2, table3, table4, related, accuracy, choices.",
        ),
        ("table2", {"models": ["brp"]}, "Did you mean 'bpr'?"),
        ("table3", {"models": ["bpr"]}, "table3 has no model 'bpr'; it has dream."),
        ("table1", {"models": ["bpr"]}, "table1 has no model 'bpr'; it has none."),
        ("table2", {"preset": "babi"}, "Did you mean 'baby'?"),
        ("table1", {"preset": "baby"}, "table1 uses no preset"),
        ("choices", {"preset": "baby"}, "choices uses no preset"),
        ("table2", {"overrides": ["graph=graphs/other"]}, "The graph is given twice"),
        ("table2", {"overrides": ["model.name=vbpr"]}, "The model is given twice"),
        ("table2", {"overrides": ["training.epoch=1"]}, "did you mean 'epochs'?"),
    ],
)
def test_what_is_unknown_is_named_before_anything_is_written(
    baby: Path, tmp_path: Path, table: str, options: dict, message: str
):
    with pytest.raises(ConfigError) as caught:
        reproduce(table, baby, tmp_path / "out", **options)
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_tables_of_another_graph_are_refused(tables: Path, shop_graph: Path):
    with pytest.raises(StoreError, match="holds the tables of another graph: baby"):
        reproduce("table1", shop_graph, tables)


def test_a_run_on_another_graph_is_refused(baby: Path, tmp_path: Path):
    arguments = {"num_seeds": 1, "models": ["popularity"], "overrides": SET}
    reproduce("table2", baby, tmp_path / "out", **arguments)
    (info,) = (tmp_path / "out").glob("runs/*/*/run.json")
    info.write_text(json.dumps({**json.loads(info.read_text()), "graph_fingerprint": "0" * 64}))
    with pytest.raises(StoreError, match="is a run on another graph: fingerprint 0000"):
        reproduce("table2", baby, tmp_path / "out", **arguments)


def test_a_run_that_was_trained_on_is_not_taken_for_what_it_was(tables: Path, baby: Path, tmp_path: Path):
    arguments = {"num_seeds": 3, "models": ["bpr"], "overrides": SET}
    shutil.copytree(tables, tmp_path / "out")
    (run,) = (tmp_path / "out").glob("runs/bpr-*/seed-0")
    longer = RunConfig.create(file=run / "config.toml", overrides=["training.epochs=3"])
    train(longer, run, resume=True)
    with pytest.raises(
        StoreError, match=r"seed-0 is a run of another configuration .*training.epochs: 2 here, 3 there"
    ):
        reproduce("table2", baby, tmp_path / "out", **arguments)


def test_figures_and_p_values_are_of_the_users_that_are_evaluated(baby: Path, tmp_path: Path):
    overrides = [*SET, "training.eval_users=20"]
    table = reproduce(
        "accuracy", baby, tmp_path / "out", num_seeds=1, models=["popularity", "lightgcn"], overrides=overrides
    )
    for row in table.rows:
        (users,) = Path(row.runs[0]["run"]).glob("users_test.safetensors")
        recall = load_tensors(users)[0]["recall@20"]
        assert int((~recall.isnan()).sum()) == 20
        assert float(recall.nanmean()) == pytest.approx(row.runs[0]["test"]["recall@20"])


def test_damaged_figures_of_users_are_made_again(tables: Path, baby: Path, tmp_path: Path):
    shutil.copytree(tables, tmp_path / "out")
    arguments = {"num_seeds": 3, "models": ["bpr", "dream"], "overrides": SET}
    before = reproduce("table2", baby, tmp_path / "out", **arguments)
    for path in (tmp_path / "out").glob("runs/*/*/users_test.safetensors"):
        path.write_bytes(path.read_bytes()[:40])
    assert reproduce("table2", baby, tmp_path / "out", **arguments).to_dict() == before.to_dict()


def test_test_metrics_of_another_epoch_are_read_again(tables: Path, baby: Path, tmp_path: Path):
    shutil.copytree(tables, tmp_path / "out")
    for path in (tmp_path / "out").glob("runs/bpr-*/*/test_metrics.json"):
        path.write_text(path.read_text().replace('"epoch": ', '"epoch": 7'))
    table = reproduce("table2", baby, tmp_path / "out", num_seeds=3, models=["bpr"], overrides=SET)
    expected = json.loads((tables / "table2.json").read_text())["rows"][0]["cells"]
    assert [cell._asdict() for cell in table.rows[0].cells] == expected


@pytest.mark.parametrize(
    ("lost", "status"),
    [
        ("config.toml", "finished"),
        ("run.json", "finished"),
        ("metrics.jsonl", "finished"),
        ("checkpoints/best.safetensors", "finished"),
        ("checkpoints/best.safetensors", "interrupted"),
        ("checkpoints/last.pt", "interrupted"),
    ],
)
def test_a_run_that_lost_a_file_is_named_with_its_cure(
    tables: Path, baby: Path, tmp_path: Path, lost: str, status: str
):
    shutil.copytree(tables, tmp_path / "out")
    arguments = {"num_seeds": 3, "models": ["bpr"], "overrides": SET}
    run = next((tmp_path / "out").glob("runs/bpr-*/seed-1"))
    write_json(run / "run.json", {**read_json(run / "run.json"), "status": status})
    (run / lost).unlink()
    with pytest.raises(StoreError) as caught:
        reproduce("table2", baby, tmp_path / "out", **arguments)
    assert f"{run} is not whole: it has no {lost}. Restore" in str(caught.value)
    assert f"or remove {run}; then give the same command." in str(caught.value)
    shutil.rmtree(run)
    run.mkdir()  # as good as nothing
    assert reproduce("table2", baby, tmp_path / "out", **arguments).complete


def test_a_checkpoint_that_nothing_needs_may_be_gone(tables: Path, baby: Path, tmp_path: Path, planned):
    shutil.copytree(tables, tmp_path / "out")
    for path in (tmp_path / "out").glob("runs/*/*/checkpoints/last.pt"):
        path.unlink()
    assert reproduce("table2", baby, tmp_path / "out", num_seeds=3, models=["bpr"], overrides=SET).complete
    assert planned == []


def test_a_damaged_line_of_an_epoch_is_named(tables: Path, baby: Path, tmp_path: Path):
    shutil.copytree(tables, tmp_path / "out")
    metrics = next((tmp_path / "out").glob("runs/bpr-*/seed-1/metrics.jsonl"))
    metrics.write_bytes(metrics.read_bytes()[:150])
    with pytest.raises(StoreError, match=r"seed-1/metrics\.jsonl is damaged"):
        reproduce("table2", baby, tmp_path / "out", num_seeds=3, models=["bpr"], overrides=SET)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overrides": [*SET, "training.sampling={}"]}, "MGCN cannot be trained on sampled graphs"),
        ({"overrides": SET, "preset": "tiktok"}, "modality_weights names 'audio'"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is(
    baby: Path, tmp_path: Path, monkeypatch, options: dict, message: str
):
    monkeypatch.setattr(reproduction, "_train_all", None)
    with pytest.raises(ConfigError, match=message):
        reproduce("table2", baby, tmp_path / "out", num_seeds=1, models=["bpr", "mgcn", "dream"], **options)


def test_the_picture_of_an_unfinished_table_is_not_that_of_an_earlier_one(baby: Path, tmp_path: Path, request):
    arguments = {"models": ["popularity"], "overrides": SET}
    reproduce("accuracy", baby, tmp_path / "out", num_seeds=1, **arguments)
    assert (tmp_path / "out" / "accuracy.png").is_file()
    request.getfixturevalue("planned")
    assert not reproduce("accuracy", baby, tmp_path / "out", num_seeds=2, **arguments).complete
    assert not (tmp_path / "out" / "accuracy.png").exists()


def test_a_directory_without_tables_is_refused(baby: Path, tmp_path: Path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(StoreError, match="holds no tables"):
        reproduce("table1", baby, tmp_path)


def test_two_processes_do_not_work_on_the_same_tables(baby: Path, tables: Path):
    handle = os.open(tables, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(StoreError, match="Another process works on the tables of baby"):
            reproduce("table1", baby, tables)
    finally:
        os.close(handle)


def test_a_failed_run_leaves_those_before_it(baby: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(BPR, "loss", lambda self, graph, batch: {"bpr": self.user_embedding.sum() * float("nan")})
    with pytest.raises(TrainingError, match="became nan"):
        reproduce("table2", baby, tmp_path / "out", num_seeds=1, models=["popularity", "bpr"], overrides=SET)
    popularity, bpr = json.loads((tmp_path / "out" / "table2.json").read_text())["rows"]
    assert (len(popularity["runs"]), len(bpr["runs"])) == (1, 0)


@pytest.mark.slow
def test_two_processes_give_what_one_gives(baby: Path, tables: Path, tmp_path: Path):
    arguments = {"num_seeds": 3, "models": ["bpr", "popularity"], "overrides": SET}
    assert reproduce("table2", baby, tmp_path / "out", jobs=2, **arguments).complete
    assert untimed(tmp_path / "out" / "table2.json") == untimed(tables / "table2.json")


def test_processes_beside_each_other_have_one_thread(baby: Path, tmp_path: Path, planned):
    overrides = [*SET, "training.num_threads=2"]
    with pytest.raises(ConfigError, match="one thread each"):
        reproduce("table2", baby, tmp_path / "out", num_seeds=1, models=["bpr"], overrides=overrides, jobs=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_failure_in_a_process_is_told(baby: Path, tmp_path: Path):
    overrides = [*SET, "training.learning_rate=1e38"]
    with pytest.raises(TrainingError, match=r"The training of .*bpr-.* failed: The loss term 'bpr' became"):
        reproduce("table2", baby, tmp_path / "out", num_seeds=1, models=["bpr"], overrides=overrides, jobs=2)


def two_trainings(graph: Path, out: Path) -> subprocess.Popen[str]:
    """A table whose two trainings beside each other have begun and will not end by themselves."""
    sets = [part for value in ("training.epochs=100000", "training.patience=100000") for part in ("--set", value)]
    command = [sys.executable, "-m", "dream_pyg", "reproduce", "table2", "--graph", str(graph), "--out", str(out)]
    command += ["--models", "bpr", "--seeds", "2", "--jobs", "2", *sets]
    parent = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while len(list(out.glob("runs/*/*/metrics.jsonl"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    return parent


def is_left(run: Path) -> bool:
    """Whether no process trains a run."""
    with contextlib.suppress(StoreError), held(run, "the run"):
        return True
    return False


def statuses(out: Path) -> list[str]:
    """How the runs of tables ended."""
    return [json.loads(path.read_text())["status"] for path in out.glob("runs/*/*/run.json")]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_parent_saves_every_process(baby: Path, tmp_path: Path, number: int):
    parent = two_trainings(baby, tmp_path / "out")
    parent.send_signal(number)
    _, said = parent.communicate(timeout=300)
    assert parent.returncode == 130
    assert said.splitlines()[-1].startswith("Error: Interrupted; what there is of the tables of baby at")
    assert statuses(tmp_path / "out") == ["interrupted"] * 2


@pytest.mark.slow
def test_a_parent_that_is_killed_leaves_no_process_behind(baby: Path, tmp_path: Path):
    parent = two_trainings(baby, tmp_path / "out")
    parent.kill()
    parent.communicate(timeout=300)
    deadline = time.monotonic() + 60
    runs = list((tmp_path / "out").glob("runs/*/*"))
    while not all(is_left(run) for run in runs) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [is_left(run) for run in runs] == [True] * 2
    assert statuses(tmp_path / "out") == ["interrupted"] * 2
    for run in runs:
        config = RunConfig.load(run / "config.toml")
        done = int(json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["epoch"])
        shorter = config.model_copy(update={"training": config.training.model_copy(update={"epochs": done + 1})})
        assert train(shorter, run, resume=True, test=False).epochs == done + 1
