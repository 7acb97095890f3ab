"""README and CONTRIBUTING do what they say."""

from __future__ import annotations

import re
import shlex
import shutil
import tomllib
from collections.abc import Callable
from importlib.metadata import requires
from pathlib import Path

import polars as pl
import pytest
import torch
from click.testing import Result

from dream_pyg import MODELS, RunConfig, train
from dream_pyg.cli import main

_REPOSITORY = Path(__file__).resolve().parents[1]
README = (_REPOSITORY / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (_REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
MAKEFILE = (_REPOSITORY / "Makefile").read_text(encoding="utf-8")


def block(text: str, language: str) -> str:
    """The only fenced block of a language."""
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return str(found)


@pytest.fixture
def own_data(shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with the files that the README speaks of."""
    shutil.copytree(shop, tmp_path / "demo" / "data-0")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_python_of_the_readme_runs(own_data: Path):
    code = block(README, "python")
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    top, user, item = names["top"], names["user"], names["item"]
    assert isinstance(top, pl.DataFrame)
    assert isinstance(user, torch.Tensor)
    assert isinstance(item, torch.Tensor)
    assert top.columns == ["user_id", "rank", "item_id", "score"]
    assert (len(top), len(user), len(item)) == (600, 60, 40)


def test_the_commands_of_the_readme_run(command: Callable[..., Result], own_data: Path):
    lines = block(README, "console").splitlines()
    assert all(line.startswith("$ dream-pyg ") for line in lines)
    for line in lines:
        result = command(*shlex.split(line)[2:])
        assert result.exit_code == 0, (line, result.stderr)
    assert len(pl.read_parquet("top50.parquet")) > 600
    assert Path("shipped/items.faiss").is_file()


def test_the_readme_lists_every_command():
    listed = re.findall(r"^\| `([a-z-]+)", README, flags=re.MULTILINE)
    assert sorted(listed) == sorted(main.commands)


def test_the_readme_lists_the_files_of_stores_and_runs(shop_graph: Path, tmp_path: Path):
    overrides = ["training.epochs=1", "training.device=cpu", "training.teacher={}"]
    run = train(RunConfig.create(graph=shop_graph, model="bpr", overrides=overrides), tmp_path / "run").run
    listed = set(re.findall(r"^    (?:GRAPH/|RUN/|   )\s+(\S+\.\w+)", README, flags=re.MULTILINE))
    written = {str(file.relative_to(root)) for root in (shop_graph, run) for file in root.rglob("*") if file.is_file()}
    assert listed == written


def test_contributing_shows_the_smallest_model_as_it_is():
    models = _REPOSITORY / "dream_pyg" / "models"
    assert block(CONTRIBUTING, "python") == (models / "bpr.py").read_text()
    sizes = {name: len((models / f"{name}.py").read_text().splitlines()) for name in MODELS if name != "popularity"}
    assert min(sizes, key=sizes.__getitem__) == "bpr"


def test_contributing_draws_the_layers_that_are_checked():
    contracts = tomllib.loads((_REPOSITORY / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = [name.removeprefix("dream_pyg.") for name in contracts[0]["layers"]]
    house = CONTRIBUTING.split("## The house")[1].split("## Names")[0]
    assert re.findall(r"^    (\w+)  ", house, flags=re.MULTILINE) == layers
    modules = {path.stem for path in (_REPOSITORY / "dream_pyg").iterdir() if not path.name.startswith("__")}
    assert modules == set(layers)


def test_only_one_layer_knows_torch_distributed():
    # import-linter sees no further than the name of an external package.
    knowing = [
        str(path.relative_to(_REPOSITORY / "dream_pyg"))
        for path in (_REPOSITORY / "dream_pyg").rglob("*.py")
        if re.search(r"torch\.distributed|from torch import .*\bdistributed\b", path.read_text())
    ]
    assert {path.split("/")[0] for path in knowing} == {"ranks"}
    assert "Only `ranks` knows\n`torch.distributed`" in CONTRIBUTING


def test_every_make_verb_of_the_documents_exists():
    verbs = set(re.findall(r"`?make ([a-z-]+)", README + CONTRIBUTING)) - {"a"}
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, flags=re.MULTILINE))
    assert verbs - targets == set()
    assert {"demo", "test", "test-fast", "check", "format"} <= targets


def test_ci_runs_the_test_command_of_the_readme():
    script = _REPOSITORY / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert script.read_text().splitlines()[-1] == "make test"
    assert "    make test " in README


def test_the_changelog_names_every_model():
    changelog = (_REPOSITORY / "CHANGELOG.md").read_text().lower()
    assert [name for name in MODELS if name not in changelog.replace("most-popular", "popularity")] == []


def test_pins_agree_with_what_is_declared():
    pinned = dict(
        re.split(r"==", line)
        for line in (_REPOSITORY / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )
    pinned = {name.lower().replace("_", "-"): version for name, version in pinned.items()}
    declared = [re.split(r"[;\s]", text)[0] for text in requires("dream-pyg") or []]
    names = {re.match(r"[\w.-]+", text).group().lower().replace("_", "-"): text for text in declared}  # type: ignore[union-attr]
    assert names.keys() - pinned.keys() == set()
    exact = {name: text.split("==")[1] for name, text in names.items() if "==" in text}
    assert {name: pinned[name] for name in exact} == exact
