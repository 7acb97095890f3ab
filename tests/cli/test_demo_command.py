"""``dream-pyg demo``, as a newcomer runs it first."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
from click.testing import Result

from dream_pyg.cli.demo import _spread

Command = Callable[..., Result]


@pytest.mark.slow
def test_demo_compares_four_models_and_recommends_to_five_readers(command: Command, tmp_path: Path):
    out = tmp_path / "demo"
    result = command("demo", "--seeds", 1, "--out", out)
    assert result.exit_code == 0, result.stderr
    assert "\nTest metrics:\n" in result.stdout
    assert "±" not in result.stdout
    lines = result.stdout.partition("\nTest metrics:\n")[2].splitlines()[2:6]
    table = {line.split()[0]: line.split() for line in lines}
    assert list(table) == ["dream", "lightgcn", "bpr", "popularity"]
    recall = {}
    for model, cells in table.items():
        recall[model] = json.loads((out / f"{model}-0" / "test_metrics.json").read_text())["lines"]["general"][
            "recall@20"
        ]
        assert cells[2] == f"{recall[model]:.4f}"
    assert sorted(recall, key=recall.__getitem__, reverse=True) == list(table)

    told = dict(re.findall(r"^(user-\d+) bought (.+)$", result.stdout, flags=re.MULTILINE))
    bought = pl.read_csv(out / "data-0" / "interactions.csv")
    assert len(told) == 5
    recommended = re.findall(r"^(user-\d+) +\d  (\S+) +\d+\.\d{4}$", result.stdout, flags=re.MULTILINE)
    assert [user for user, _ in recommended] == [user for user in told for _ in range(3)]
    for user, items in told.items():
        assert set(items.split(", ")) == set(bought.filter(pl.col("user_id") == user)["item_id"])
        assert not set(items.split(", ")) & {item for other, item in recommended if other == user}

    assert command("train", "-h").exit_code == 0  # what the demo ran are still the same commands


def test_the_spread_is_that_over_catalogues():
    assert _spread([0.25, 0.5]) == "0.3750 ± 0.1768"
    assert _spread([0.25]) == "0.2500"


def test_demo_leaves_an_existing_directory_alone(command: Command, tmp_path: Path):
    (tmp_path / "notes.txt").touch()
    result = command("demo", "--out", tmp_path)
    assert result.exit_code == 1
    assert "exists already" in result.stderr
    assert list(tmp_path.iterdir()) == [tmp_path / "notes.txt"]
