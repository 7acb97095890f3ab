"""``dream-pyg update-graph``: what it prints, writes and refuses."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from click.testing import Result

from dream_pyg import load_graph
from dream_pyg.graph.schema import feature_modalities

Command = Callable[..., Result]


@pytest.fixture
def data(shop: Path, tmp_path: Path) -> Path:
    """A new version of the bookshop, in which one image is another."""
    data = Path(shutil.copytree(shop, tmp_path / "data"))
    image = np.load(data / "image.npy")
    image[5] = -image[5]
    np.save(data / "image.npy", image)
    return data


def told(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.stderr
    return dict(json.loads(result.stdout))


def test_a_new_store_beside_the_old(command: Command, shop_graph: Path, data: Path, tmp_path: Path):
    summary = told(command("update-graph", shop_graph, data, "--out", tmp_path / "new", "--format", "json"))
    assert (summary["state"], summary["graph"]) == ("updated", str(tmp_path / "new"))
    assert summary["searched items by text"] == "0 of 40"
    number = int(summary["searched items by image"].split(" of 40")[0])
    assert number > 0
    rebuilt = told(command("build-graph", data, "-k", 5, "--out", tmp_path / "rebuilt", "--format", "json"))
    assert summary["fingerprint"] == rebuilt["fingerprint"]
    assert load_graph(tmp_path / "new").info["files"] == load_graph(tmp_path / "rebuilt").info["files"]
    again = told(command("build-graph", data, "-k", 5, "--out", tmp_path / "new", "--format", "json"))
    assert again["state"] == "reused"


def test_in_place_and_the_table(command: Command, shop_graph: Path, data: Path, tmp_path: Path):
    graph = Path(shutil.copytree(shop_graph, tmp_path / "graph"))
    refused = command("update-graph", graph, data)
    assert refused.exit_code == 1
    assert "Write the new store beside it with --out DIR, or replace it with --overwrite." in refused.stderr
    assert load_graph(graph).fingerprint == load_graph(shop_graph).fingerprint
    table = command("update-graph", graph, data, "--overwrite").stdout
    assert "searched users by text" in table
    assert "updated" in table
    assert load_graph(graph).fingerprint != load_graph(shop_graph).fingerprint
    assert "reused" in command("update-graph", graph, data).stdout


def test_an_interaction_file_has_the_columns_and_the_split_of_the_graph(command: Command, tmp_path: Path):
    clicks = pl.DataFrame(
        {"who": np.repeat(np.arange(8), 5), "what": np.tile(np.arange(10), 4), "timestamp": np.arange(40)}
    )
    clicks.write_csv(tmp_path / "january.csv")
    more = pl.concat([clicks, clicks.select(pl.col("who"), (pl.col("what") + 3) % 10, pl.col("timestamp") + 40)])
    more.write_csv(tmp_path / "february.csv")
    columns = ("--user-column", "who", "--item-column", "what")
    build = ("build-graph", *columns, "--split", "leave_last_out", "--format", "json")
    told(command(*build, tmp_path / "january.csv", "--out", tmp_path / "graph"))
    february = (tmp_path / "february.csv", "--overwrite", "--format", "json")
    updated = told(command("update-graph", tmp_path / "graph", *february))
    rebuilt = told(command(*build, tmp_path / "february.csv", "--out", tmp_path / "rebuilt"))
    assert (updated["state"], updated["fingerprint"]) == ("updated", rebuilt["fingerprint"])
    assert load_graph(tmp_path / "graph").info["config"]["split"]["method"] == "leave_last_out"


def test_options_of_the_build_need_not_be_given_again(command: Command, data: Path, tmp_path: Path):
    options = ("--split", "leave_last_out", "--k-core", 2)
    told(command("build-graph", data, *options, "-k", 5, "--out", tmp_path / "old", "--format", "json"))
    image = np.load(data / "image.npy")
    image[7] = -image[7]
    np.save(data / "image.npy", image)
    rebuilt = told(command("build-graph", data, *options, "-k", 5, "--out", tmp_path / "rebuilt", "--format", "json"))
    for old, new in (("old", "new"), ("new", "newer")):  # an update remembers them as well
        updated = told(command("update-graph", tmp_path / old, data, "--out", tmp_path / new, "--format", "json"))
        assert updated["fingerprint"] == rebuilt["fingerprint"]
    refused = command("update-graph", tmp_path / "old", data, "--split", "random", "--out", tmp_path / "other")
    assert refused.exit_code == 1
    assert "split.method: random here, leave_last_out there" in refused.stderr
    assert "Leave out the options or undo the change of the dataset.toml that say otherwise" in refused.stderr


def test_a_changed_description_is_no_option_that_was_left_out(command: Command, data: Path, tmp_path: Path):
    told(command("build-graph", data, "--k-core", 2, "-k", 5, "--out", tmp_path / "old", "--format", "json"))
    described = (data / "dataset.toml").read_text()
    (data / "dataset.toml").write_text(described.replace('method = "random"', 'method = "leave_last_out"'))
    refused = command("update-graph", tmp_path / "old", data, "--out", tmp_path / "new")
    assert refused.exit_code == 1
    assert "split.method: leave_last_out here, random there. An update keeps that" in refused.stderr


def test_a_split_is_not_changed_by_a_column_that_came_or_went(command: Command, tmp_path: Path):
    clicks = pl.DataFrame({"user_id": np.repeat(np.arange(8), 5), "item_id": np.tile(np.arange(10), 4)})
    clicks.write_csv(tmp_path / "plain.csv")
    split = pl.Series("split", ["train", "train", "train", "valid", "test"] * 8)
    clicks.with_columns(split).write_csv(tmp_path / "given.csv")
    for first, second, methods in (("plain", "given", "'random'.*'given'"), ("given", "plain", "'given'.*'random'")):
        told(command("build-graph", tmp_path / f"{first}.csv", "--out", tmp_path / first, "--format", "json"))
        refused = command("update-graph", tmp_path / first, tmp_path / f"{second}.csv", "--out", tmp_path / "new")
        assert refused.exit_code == 1
        assert re.search(f"split by the method {methods}, as the file of one has a column of splits", refused.stderr)
        assert not (tmp_path / "new").exists()


def test_a_ready_graph_is_not_lost_unless_it_is_left_out(command: Command, tmp_path: Path):
    clicks = pl.DataFrame({"user_id": np.repeat(np.arange(8), 5), "item_id": np.tile(np.arange(10), 4)})
    clicks.write_csv(tmp_path / "clicks.csv")
    np.save(tmp_path / "image.npy", np.random.default_rng(0).normal(size=(10, 4)).astype(np.float32))
    np.savez(tmp_path / "ring.npz", indices=np.roll(np.arange(10), 1)[:, None])
    files = [
        f"--{kind}=image={tmp_path / name}" for kind, name in (("features", "image.npy"), ("neighbors", "ring.npz"))
    ]
    told(
        command("build-graph", tmp_path / "clicks.csv", *files, "-k", 3, "--out", tmp_path / "old", "--format", "json")
    )
    update = ("update-graph", tmp_path / "old", tmp_path / "clicks.csv", "--out", tmp_path / "new")
    refused = command(*update, files[0])
    assert refused.exit_code == 2
    assert "The graph has neighbors of image, for which no file is given. Add --neighbors image=FILE" in refused.stderr
    unused = command(*update, *files, "--data-dir", tmp_path)
    assert "--data-dir says where the files that a dataset.toml names lie" in unused.stderr


def test_a_list_of_items_keeps_its_column(command: Command, shop: Path, tmp_path: Path):
    data = Path(shutil.copytree(shop, tmp_path / "data"))
    pl.read_csv(data / "items.csv").rename({"item_id": "sku"}).write_csv(data / "items.csv", separator=";")
    described = (data / "dataset.toml").read_text()
    described = described.replace('column = "item_id"', 'column = "sku"\nseparator = ";"')
    (data / "dataset.toml").write_text(described)
    told(command("build-graph", data, "-k", 5, "--out", tmp_path / "old", "--format", "json"))
    files = ["--items", data / "items.csv", f"--features=image={data / 'image.npy'}"]
    files += [f"--features=text={data / 'text.parquet'}"]
    update = ("update-graph", tmp_path / "old", data / "interactions.csv", *files)
    told(command(*update, "--out", tmp_path / "new", "--format", "json"))


def test_rows_of_features_are_not_taken_for_other_items(command: Command, shop_graph: Path, data: Path, tmp_path: Path):
    features = [f"--features={name}={data / file}" for name, file in (("image", "image.npy"), ("text", "text.parquet"))]
    refused = command("update-graph", shop_graph, data / "interactions.csv", *features, "--out", tmp_path / "new")
    assert refused.exit_code == 2
    assert "The graph has a list of all its items, for which no file is given. Add --items FILE" in refused.stderr
    assert not (tmp_path / "new").exists()


def test_no_modality_is_lost_unless_it_is_left_out(command: Command, shop_graph: Path, data: Path, tmp_path: Path):
    clicks = data / "interactions.csv"
    text = ("--items", data / "items.csv", "--features", f"text={data / 'text.parquet'}")
    refused = command("update-graph", shop_graph, clicks, *text, "--out", tmp_path / "new")
    assert refused.exit_code == 2
    assert "The graph has image, for which no file is given. Add --features image=FILE" in refused.stderr
    assert not (tmp_path / "new").exists()
    told(
        command(
            "update-graph",
            shop_graph,
            clicks,
            *text,
            "--without",
            "image",
            "--out",
            tmp_path / "new",
            "--format",
            "json",
        )
    )
    assert feature_modalities(load_graph(tmp_path / "new").graph) == ["text"]


def test_progress_says_what_was_searched(command: Command, shop_graph: Path, data: Path, tmp_path: Path):
    result = command("update-graph", shop_graph, data, "--out", tmp_path / "new")
    assert "kNN of items by text: 0 of 40 searched" in result.stderr
    assert command("-q", "update-graph", shop_graph, data, "--out", tmp_path / "quiet").stderr == ""
