"""``dream-pyg build-graph``: every kind of input, every option, reuse and refusal."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from click.testing import Result

from dream_pyg import load_graph, make_synthetic
from dream_pyg.graph import partial, store

Command = Callable[..., Result]
LABELS = ("train_edge_label_index", "valid_edge_label_index", "test_edge_label_index")


def summary(result: Result) -> dict[str, Any]:
    """What the command printed as JSON."""
    assert result.exit_code == 0, result.stderr
    return dict(json.loads(result.stdout))


def test_toml_directory_and_toml_file_give_the_same_graph(command: Command, shop: Path, tmp_path: Path):
    built = [
        summary(command("build-graph", source, "--out", tmp_path / str(index), "-k", 5, "--format", "json"))
        for index, source in enumerate([shop, shop / "dataset.toml"])
    ]
    assert [one["state"] for one in built] == ["built", "built"]
    assert built[0]["fingerprint"] == built[1]["fingerprint"]
    assert {key: built[0][key] for key in ("users", "items", "rows read", "items without image")} == {
        "users": 60,
        "items": 40,
        "rows read": len(pl.read_csv(shop / "interactions.csv")),
        "items without image": 2,
    }
    first, second = (load_graph(tmp_path / str(index)).graph for index in (0, 1))
    for name in LABELS:
        assert torch.equal(first["user", "interacts", "item"][name], second["user", "interacts", "item"][name])


def test_table_and_json_say_the_same(command: Command, shop: Path, tmp_path: Path):
    told = summary(command("build-graph", shop, "--out", tmp_path / "graph", "--format", "json"))
    table = command("build-graph", shop, "--out", tmp_path / "graph").stdout
    rows = dict(line.split("  ", 1) for line in table.splitlines()[1:])
    rows = {key.strip(): value.strip() for key, value in rows.items()}
    assert rows.keys() == told.keys()
    changing = ("state", "seconds")
    assert {k: v for k, v in rows.items() if k not in changing} == {
        key: f"{value:,}" if isinstance(value, int) else str(value)
        for key, value in told.items()
        if key not in changing
    }


def test_a_csv_file_alone(command: Command, shop: Path, tmp_path: Path):
    told = summary(command("build-graph", shop / "interactions.csv", "--out", tmp_path / "graph", "--format", "json"))
    rows = pl.read_csv(shop / "interactions.csv")
    assert told["users"] == 60
    assert told["items"] == rows["item_id"].n_unique()
    assert told["split"] == "random by user, 0.8:0.1:0.1, seed 0"
    assert told["train"] + told["valid"] + told["test"] == len(rows)
    assert load_graph(tmp_path / "graph").item_ids.to_list() == sorted(set(rows["item_id"]))


def test_a_csv_file_with_features_and_neighbors(command: Command, shop: Path, tmp_path: Path):
    text = pl.read_parquet(shop / "text.parquet")
    ids = text["item_id"].to_list()
    ring = pl.DataFrame({"item_id": ids, "neighbor_id": ids[1:] + ids[:1]})
    ring.write_parquet(tmp_path / "ring.parquet")
    arguments = ["--features", f"blurb={shop / 'text.parquet'}", "--neighbors", f"shelf={tmp_path / 'ring.parquet'}"]
    told = summary(
        command("build-graph", shop / "interactions.csv", *arguments, "--out", tmp_path / "graph", "--format", "json")
    )
    stored = load_graph(tmp_path / "graph")
    assert told["edges item shelf_knn item"] == len(ids)
    assert told["search item shelf_knn item"] == "none, a ready graph"
    assert told["search item blurb_knn item"] == "exact"
    source, target = stored.graph["item", "shelf_knn", "item"].edge_index.as_tensor().numpy()
    name = stored.item_ids.to_list()
    edges = {(name[t], name[s]) for s, t in zip(source, target, strict=True)}
    assert edges == set(zip(ring["item_id"], ring["neighbor_id"], strict=True))
    assert stored.graph["item"].x_blurb.shape == (stored.graph["item"].num_nodes, 64)
    row = name.index(ids[0])
    np.testing.assert_array_equal(stored.graph["item"].x_blurb[row].numpy(), text["features"][0].to_numpy())
    assert ("user", "shelf_knn", "user") not in stored.graph.edge_types
    assert ("user", "blurb_knn", "user") in stored.graph.edge_types


def test_inter_file_with_integer_ids_and_a_given_split(command: Command, tmp_path: Path):
    rows = [(user, 100 + item, 2 if item == user % 5 else 1 if item == (user + 1) % 5 else 0)
            for user in range(1, 7) for item in range(5)]  # fmt: skip
    lines = ["userID\titemID\tx_label", *("\t".join(map(str, row)) for row in rows)]
    (tmp_path / "shop.inter").write_text("\n".join(lines) + "\n")
    told = summary(command("build-graph", tmp_path / "shop.inter", "--out", tmp_path / "graph", "--format", "json"))
    assert [told[key] for key in ("users", "items", "train", "valid", "test")] == [6, 5, 18, 6, 6]
    stored = load_graph(tmp_path / "graph")
    assert stored.user_ids.dtype == pl.Int64
    user, item = stored.graph["user", "interacts", "item"].test_edge_label_index.tolist()
    pairs = {(stored.user_ids[u], stored.item_ids[i]) for u, i in zip(user, item, strict=True)}
    assert pairs == {(user, item) for user, item, split in rows if split == 2}


def test_columns_by_name_and_leave_last_out(command: Command, shop: Path, tmp_path: Path):
    renamed = pl.read_csv(shop / "interactions.csv").rename({"user_id": "who", "item_id": "what", "timestamp": "when"})
    renamed.write_csv(tmp_path / "clicks.csv")
    columns = ["--user-column", "who", "--item-column", "what", "--timestamp-column", "when"]
    told = summary(
        command("build-graph", tmp_path / "clicks.csv", *columns, "--split", "leave_last_out",
                "--out", tmp_path / "graph", "--format", "json")
    )  # fmt: skip
    assert (told["split"], told["valid"], told["test"]) == ("leave_last_out", 60, 60)
    stored = load_graph(tmp_path / "graph")
    last = dict(renamed.sort("when").group_by("who").agg(pl.col("what").last()).iter_rows())
    user, item = stored.graph["user", "interacts", "item"].test_edge_label_index.tolist()
    assert {stored.user_ids[u]: stored.item_ids[i] for u, i in zip(user, item, strict=True)} == last


def test_split_column(command: Command, shop: Path, tmp_path: Path):
    frame = pl.read_csv(shop / "interactions.csv").with_row_index("row")
    fold = pl.when(pl.col("row") % 10 == 0).then(pl.lit("test")).when(pl.col("row") % 10 == 1).then(pl.lit("valid"))
    frame.with_columns(fold.otherwise(pl.lit("train")).alias("fold")).write_csv(tmp_path / "clicks.csv")
    told = summary(
        command("build-graph", tmp_path / "clicks.csv", "--split-column", "fold", "--out", tmp_path / "graph",
                "--format", "json")
    )  # fmt: skip
    assert told["split"] == "given"
    assert (told["test"], told["valid"]) == (len(range(0, len(frame), 10)), len(range(1, len(frame), 10)))


def test_split_seed_changes_the_split_and_nothing_else(command: Command, shop: Path, tmp_path: Path):
    told = [
        summary(command("build-graph", shop, "--split-seed", seed, "--out", tmp_path / str(seed), "--format", "json"))
        for seed in (0, 1)
    ]
    assert told[0]["fingerprint"] != told[1]["fingerprint"]
    pairs = [
        [
            set(map(tuple, load_graph(tmp_path / str(seed)).graph["user", "interacts", "item"][name].T.tolist()))
            for name in LABELS
        ]
        for seed in (0, 1)
    ]
    assert set().union(*pairs[0]) == set().union(*pairs[1])
    assert pairs[0] != pairs[1]


def test_split_ratios(command: Command, shop: Path, tmp_path: Path):
    build = ["build-graph", shop / "interactions.csv", "--format", "json"]
    told = summary(command(*build, "--split-ratios", 0.5, 0.25, 0.25, "--out", tmp_path / "quarters"))
    rows = pl.read_csv(shop / "interactions.csv").group_by("user_id").len()["len"].to_list()
    assert told["split"] == "random by user, 0.5:0.25:0.25, seed 0"
    assert told["valid"] == sum(max(1, n // 4) for n in rows)
    assert told["test"] == sum(max(1, int(n / 4 + 0.5)) for n in rows)
    by_time = summary(command(*build, "--split", "time", "--split-ratios", 0.9, 0.1, 0, "--out", tmp_path / "time"))
    assert by_time["split"] == "time, 0.9:0.1:0"
    assert by_time["train"] == round(0.9 * sum(rows))
    assert load_graph(tmp_path / "time").info["config"]["split"]["ratios"] == [0.9, 0.1, 0]


def test_a_graph_without_test_is_trained_and_recommends(command: Command, shop: Path, tmp_path: Path):
    built = command("build-graph", shop, "--split-ratios", 0.9, 0.1, 0, "--out", tmp_path / "graph", "--format", "json")
    told = summary(built)
    assert (told["valid"], told["test"]) == (60, 0)
    assert "train on this graph with --no-test" in built.stderr
    training = (
        "train",
        tmp_path / "graph",
        "--model",
        "bpr",
        "--epochs",
        1,
        "--device",
        "cpu",
        "--run",
        tmp_path / "run",
    )
    assert command(*training, "--no-test").exit_code == 0
    assert command("recommend", tmp_path / "run", "--user", "user-00007").exit_code == 0


def test_k_core_neighbors_self_and_modalities(command: Command, shop: Path, tmp_path: Path):
    text = (shop / "dataset.toml").read_text().split("[expected]")[0]
    shutil.copytree(shop, tmp_path / "data")
    (tmp_path / "data" / "dataset.toml").write_text(text)
    arguments = ["--k-core", 5, "-k", 3, "--include-self", "--no-user-graphs", "--without", "text"]
    told = summary(
        command("build-graph", tmp_path / "data", *arguments, "--out", tmp_path / "graph", "--format", "json")
    )
    graph = load_graph(tmp_path / "graph").graph
    pairs = torch.cat([graph["user", "interacts", "item"][name] for name in LABELS], dim=1)
    assert min(int(torch.bincount(side).min()) for side in pairs) >= 5
    relations = [relation for _, relation, _ in graph.edge_types if relation.endswith("_knn")]
    assert relations == ["image_knn"]
    has = int(graph["item"].has_image.sum())
    assert told["edges item image_knn item"] == 3 * has
    source, target = graph["item", "image_knn", "item"].edge_index.as_tensor()
    assert int((source == target).sum()) == has


def test_same_inputs_are_reused_and_untouched(command: Command, shop: Path, tmp_path: Path):
    out = tmp_path / "graph"
    first = summary(command("build-graph", shop, "--out", out, "--format", "json"))
    before = {file.name: (file.stat().st_mtime_ns, file.stat().st_ino) for file in out.iterdir()}
    again = summary(command("build-graph", shop, "--out", out, "--format", "json"))
    assert (first["state"], again["state"]) == ("built", "reused")
    assert {file.name: (file.stat().st_mtime_ns, file.stat().st_ino) for file in out.iterdir()} == before
    assert "reused" in command("build-graph", shop, "--out", out).stdout


def test_other_parameters_are_refused_until_overwrite(command: Command, shop: Path, tmp_path: Path):
    out = tmp_path / "graph"
    first = summary(command("build-graph", shop, "--out", out, "--format", "json"))
    refused = command("build-graph", shop, "--out", out, "-k", 4)
    assert refused.exit_code == 1
    assert refused.stdout == ""
    assert first["fingerprint"] in refused.stderr
    assert "--overwrite" in refused.stderr
    assert load_graph(out).fingerprint.startswith(first["fingerprint"])
    replaced = summary(command("build-graph", shop, "--out", out, "-k", 4, "--overwrite", "--format", "json"))
    assert replaced["state"] == "built"
    assert replaced["fingerprint"] in refused.stderr
    assert load_graph(out).info["parameters"]["num_neighbors"] == 4
    assert [path.name for path in tmp_path.iterdir()] == ["graph"]


def test_engines_and_what_they_tell(command: Command, tmp_path: Path):
    shop = make_synthetic(tmp_path / "shop", num_users=300, num_items=600, num_genres=8, num_styles=8).parent
    arguments = ["build-graph", shop, "--without", "image", "-k", 5, "--format", "json"]
    exact = command(*arguments, "--out", tmp_path / "exact")
    assert "kNN of items by text: exact for 600 x 64" in exact.stderr
    assert summary(exact)["search item text_knn item"] == "exact"
    clusters = [*arguments, "--engine", "clusters", "--min-recall", 0.9, "--out", tmp_path / "clusters"]
    told = summary(command(*clusters))
    assert told["fingerprint"] != summary(exact)["fingerprint"]
    stored = load_graph(tmp_path / "clusters")
    report = stored.info["knn"]["item text_knn item"]
    assert report["engine"] == "clusters"
    assert report["recall"] >= 0.9
    assert report["parameters"]["min_recall"] == 0.9
    assert report["num_measured"] > 0
    assert report["seconds"] > 0
    assert told["search item text_knn item"] == (
        f"clusters, recall {report['recall']:.4f} on {report['num_measured']} rows"
    )
    edges = [
        set(zip(*stored.graph["item", "text_knn", "item"].edge_index.tolist(), strict=True))
        for stored in (stored, load_graph(tmp_path / "exact"))
    ]
    assert len(edges[0] & edges[1]) >= 0.88 * len(edges[1])
    again = summary(command(*clusters))
    assert again["state"] == "reused"
    assert again["search item text_knn item"] == told["search item text_knn item"]


def test_overwrite_leaves_alone_what_is_no_store(command: Command, shop: Path, tmp_path: Path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    result = command("build-graph", shop, "--out", tmp_path / "home", "--overwrite")
    assert result.exit_code == 1
    assert "left as it is" in result.stderr
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["thesis.tex"]


def test_overwrite_takes_nothing_that_lies_in_a_store(command: Command, shop: Path, tmp_path: Path):
    assert command("build-graph", shop, "-k", 5, "--out", tmp_path / "graph").exit_code == 0
    (tmp_path / "graph" / "run").mkdir()
    for arguments in (["build-graph", shop, "-k", 4, "--out"], ["update-graph"]):
        source = [shop] if arguments == ["update-graph"] else []
        result = command(*arguments, tmp_path / "graph", *source, "--overwrite", "--without", "text")
        assert result.exit_code == 1
        assert "holds run beside what was written with it" in result.stderr
    assert (tmp_path / "graph" / "run").is_dir()


def test_a_directory_of_something_else_is_no_place_for_a_store(command: Command, shop: Path, tmp_path: Path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    result = command("build-graph", shop, "--out", tmp_path / "home")
    assert result.exit_code == 1
    assert "exists and is not a graph store: it has no graph.json. Choose another path." in result.stderr


def test_termination_ends_a_command_like_an_interrupt(
    command: Command, shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(store, "load_dataset", lambda *_: signal.raise_signal(signal.SIGTERM))
    result = command("build-graph", shop, "--out", tmp_path / "graph")
    assert result.exit_code == 130
    assert "Error: Interrupted; what was written before is whole." in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("section", "key"), [("seed = 5", "seed"), ("ratios = [0.6, 0.2, 0.2]", "ratios")])
def test_what_a_given_split_cannot_use_is_refused(command: Command, shop: Path, tmp_path: Path, section: str, key: str):
    clicks = pl.read_csv(shop / "interactions.csv")
    split = pl.Series("split", [("train", "valid", "test")[row % 3] for row in range(len(clicks))])
    clicks.with_columns(split).write_csv(tmp_path / "clicks.csv")
    (tmp_path / "dataset.toml").write_text(f'name = "shop"\ninteractions = "clicks.csv"\n[split]\n{section}\n')
    result = command("build-graph", tmp_path, "--out", tmp_path / "graph")
    assert result.exit_code == 2
    assert f"split.{key} is given, but the split is 'given', which has none. Leave it out." in result.stderr
    if key == "seed":
        seeded = command("build-graph", tmp_path / "clicks.csv", "--split-seed", 5, "--out", tmp_path / "graph")
        assert "split.seed is given, but the split is 'given'" in seeded.stderr


def test_a_separator_and_ids_that_have_one_name_everywhere(command: Command, shop: Path, tmp_path: Path):
    clicks = pl.read_csv(shop / "interactions.csv").rename({"item_id": "sku"})
    clicks.write_csv(tmp_path / "clicks.csv", separator=";")
    text = pl.read_parquet(shop / "text.parquet").rename({"item_id": "sku"})
    text.write_parquet(tmp_path / "text.parquet")
    build = ["build-graph", tmp_path / "clicks.csv", "--features", f"text={tmp_path / 'text.parquet'}", "-k", 5]
    build += ["--item-column", "sku", "--out", tmp_path / "graph"]
    refused = command(*build)
    assert refused.exit_code == 1
    assert "If something else is between columns, say what (--separator" in refused.stderr
    assert command(*build, "--separator", ";").exit_code == 0
    unnamed = command("build-graph", shop / "interactions.csv", *build[2:6], "--out", tmp_path / "other")
    assert "has no column for the item_id: expected one of" in unnamed.stderr
    assert unnamed.stderr.rstrip().endswith("Rename one.")


def test_quiet_leaves_standard_error_empty(command: Command, shop: Path, tmp_path: Path):
    result = command("--quiet", "build-graph", shop, "--out", tmp_path / "graph", "--format", "json")
    assert summary(result)["state"] == "built"
    assert result.stderr == ""


@pytest.mark.parametrize("assignment", ["image", "=image.npy", "image="])
def test_features_want_a_name_and_a_file(command: Command, shop: Path, tmp_path: Path, assignment: str):
    result = command("build-graph", shop, "--features", assignment, "--out", tmp_path / "graph")
    assert result.exit_code == 2
    assert "MODALITY=FILE" in result.stderr


def test_columns_belong_into_the_toml(command: Command, shop: Path, tmp_path: Path):
    result = command("build-graph", shop, "--user-column", "user_id", "--out", tmp_path / "graph")
    assert result.exit_code == 2
    assert "dataset.toml" in result.stderr


def test_an_interrupt_says_how_to_go_on(command: Command, shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    arguments = ["build-graph", shop, "--out", tmp_path / "graph", "--format", "json"]
    with monkeypatch.context() as patch:
        patch.setattr(partial, "progress", lambda strips, *_, **__: (signal.raise_signal(signal.SIGINT), *strips)[1:])
        result = command(*arguments)
    assert result.exit_code == 130
    assert result.stdout == ""
    *_, line = result.stderr.splitlines()
    assert line.startswith("Error: Interrupted; what was found so far is saved in ")
    assert line.endswith("Continue with the same command.")
    assert summary(command(*arguments))["state"] == "built"
    assert [path.name for path in tmp_path.iterdir()] == ["graph"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data-dir", "."], "--data-dir says where the files that a dataset.toml names lie"),
        (["--split", "leave_last_out", "--split-seed", "1"], "--split-seed is for a random split"),
        (
            ["--split", "leave_last_out", "--split-ratios", "0.9", "0.1", "0"],
            "--split-ratios is for a random split or one",
        ),
        (["--split-ratios", "0.9", "0", "0.1"], "split.ratios: must be three positive shares"),
        (["--user-column", "user_id", "--item-column", "user_id"], "item and user are both the column 'user_id'"),
    ],
)
def test_options_that_would_do_nothing_or_contradict_are_refused(
    command: Command, shop: Path, tmp_path: Path, arguments: list[str], message: str
):
    result = command("build-graph", shop / "interactions.csv", *arguments, "--out", tmp_path / "graph")
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_file_is_no_place_for_a_store(command: Command, shop: Path):
    result = command("build-graph", shop, "--out", shop / "interactions.csv")
    assert result.exit_code == 1
    assert "is a file; a graph store is a directory" in result.stderr
