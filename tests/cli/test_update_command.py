"""``dream-pyg update-graph``: what it prints, writes and refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result

from dream_pyg import load_graph

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
    table = command("update-graph", graph, data).stdout
    assert "searched users by text" in table
    assert "updated" in table
    assert load_graph(graph).fingerprint != load_graph(shop_graph).fingerprint
    assert "reused" in command("update-graph", graph, data).stdout


def test_progress_says_what_was_searched(command: Command, shop_graph: Path, data: Path, tmp_path: Path):
    result = command("update-graph", shop_graph, data, "--out", tmp_path / "new")
    assert "kNN of items by text: 0 of 40 searched" in result.stderr
    assert command("-q", "update-graph", shop_graph, data, "--out", tmp_path / "quiet").stderr == ""
