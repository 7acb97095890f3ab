"""Whatever goes wrong: one ``Error:`` line that names it, exit code 1 or 2, no traceback, nothing half-written."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pytest
import torch
from click.testing import Result

from dream_pyg import DatasetConfig, StoreError, build_store, load_graph, load_run
from dream_pyg.data.files import load_tensors, save_tensors
from dream_pyg.errors import DreamPygError, ResumeError
from dream_pyg.graph import store
from dream_pyg.graph.knn import choice
from dream_pyg.graph.store import read_info
from dream_pyg.training import trainer
from dream_pyg.training.checkpoint import load_checkpoint
from dream_pyg.training.run import RunPaths, read_best, read_epochs, update_info

Command = Callable[..., Result]
STORE_FILES = ["graph.json", "edges.safetensors", "features.safetensors", "users.parquet", "items.parquet"]
CPU = ["--device", "cpu"]


def snapshot(directory: Path) -> dict[str, bytes | None]:
    """Everything below a directory: content by path, None for directories."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in sorted(directory.rglob("*"))
    }


@contextmanager
def refusal(directory: Path, exit_code: int, *fragments: str) -> Iterator[list[Result]]:
    """Expect the command whose result is put into the list to be refused, and ``directory`` to stay as it is."""
    before = snapshot(directory)
    results: list[Result] = []
    yield results
    (result,) = results
    assert_named(result.exit_code, result.stdout, result.stderr, exit_code, *fragments)
    assert isinstance(result.exception, SystemExit)
    assert snapshot(directory) == before


def assert_named(code: int, stdout: str, stderr: str, expected_code: int, *fragments: str) -> None:
    """One ``Error:`` line at the end of stderr holds the fragments, and stdout has no result."""
    assert code == expected_code, stderr
    assert stdout == ""
    assert "Traceback" not in stderr
    assert [line for line in stderr.splitlines() if line.startswith("Error: ")] == stderr.splitlines()[-1:]
    assert [fragment for fragment in fragments if fragment not in stderr.splitlines()[-1]] == []


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """Let every write beyond ``num_bytes`` of a file fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# Data


class Damage(NamedTuple):
    """A way to damage a dataset directory, and what is said about it."""

    name: str
    apply: Callable[[Path], Any]
    exit_code: int
    fragments: tuple[str, ...]


def edit(file: str, old: str, new: str) -> Callable[[Path], Any]:
    """Replace text of a file."""

    def apply(data: Path) -> None:
        text = (data / file).read_text()
        assert old in text
        (data / file).write_text(text.replace(old, new, 1))

    return apply


def put(row: int, column: int, value: float) -> Callable[[Path], Any]:
    """Put a value into the image features."""

    def apply(data: Path) -> None:
        image = np.load(data / "image.npy")
        image[row, column] = value
        np.save(data / "image.npy", image)

    return apply


def resave(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], Any]:
    """Change the image features."""
    return lambda data: np.save(data / "image.npy", change(np.load(data / "image.npy")))


def cut(file: str, num_bytes: int) -> Callable[[Path], Any]:
    """Keep the beginning of a file."""
    return lambda data: (data / file).write_bytes((data / file).read_bytes()[:num_bytes])


def only_short_histories(data: Path) -> None:
    rows = pl.read_csv(data / "interactions.csv").group_by("user_id", maintain_order=True).head(2)
    rows.write_csv(data / "interactions.csv")
    toml = (data / "dataset.toml").read_text()
    (data / "dataset.toml").write_text(toml.split("[expected]")[0])


def make_directory(data: Path) -> None:
    (data / "image.npy").unlink()
    (data / "image.npy").mkdir()


DAMAGES = [
    Damage("missing", lambda data: (data / "interactions.csv").unlink(), 1, ("interactions.csv", "missing")),
    Damage("missing features", lambda data: (data / "text.parquet").unlink(), 1, ("text.parquet", "missing")),
    Damage("directory for a file", make_directory, 1, ("image.npy", "a directory")),
    Damage("wrong column", edit("interactions.csv", "user_id", "reader"), 1, ("user", "'reader'")),
    Damage("empty", cut("interactions.csv", 0), 1, ("interactions.csv", "empty")),
    Damage("header only", cut("interactions.csv", 26), 1, ("interactions.csv",)),
    Damage("no text", lambda data: (data / "interactions.csv").write_bytes(b"\xff\xfe\x00\x80" * 99), 1, ("csv",)),
    Damage("unknown item", edit("items.csv", "\n", "\nanother"), 1, ("items.csv", "lacks 1")),
    Damage("rows missing", resave(lambda image: image[:-1]), 1, ("image.npy", "39 rows", "40 items")),
    Damage("one-dimensional", resave(lambda image: image[:, 0]), 1, ("image.npy", "(40,)")),
    Damage("not a number", put(3, 5, np.nan), 1, ("image.npy", "1 values", "row 3", "column 5")),
    Damage("infinite", put(39, 127, np.inf), 1, ("image.npy", "row 39", "column 127")),
    Damage("objects", resave(lambda image: image.astype(object)), 1, ("image.npy", "not a readable")),
    Damage("cut features", cut("image.npy", 3000), 1, ("image.npy",)),
    Damage("cut parquet", cut("text.parquet", 3000), 1, ("text.parquet",)),
    Damage("short histories", only_short_histories, 1, ("valid split is empty",)),
    Damage("other counts", edit("dataset.toml", "num_users = 60", "num_users = 61"), 1, ("61 expected, 60 found",)),
    Damage("broken TOML", edit("dataset.toml", "[split]", "[split"), 2, ("dataset.toml", "not valid TOML")),
    Damage("unknown key", edit("dataset.toml", "[split]", "[splitt]"), 2, ("'splitt'", "did you mean 'split'")),
    Damage("unknown nested key", edit("dataset.toml", "ratios", "ratio"), 2, ("'split.ratio'", "'ratios'")),
    Damage("unknown method", edit("dataset.toml", '"random"', '"randon"'), 2, ("split.method", "randon")),
    Damage("wrong ratios", edit("dataset.toml", "0.8", "0.9"), 2, ("split.ratios", "sum to 1")),
    Damage("bad modality name", edit("dataset.toml", "modalities.image", 'modalities."Front Cover"'), 2, ("Front",)),
    Damage("no description", lambda data: (data / "dataset.toml").unlink(), 2, ("dataset.toml",)),
]


@pytest.mark.parametrize("damage", DAMAGES, ids=[damage.name for damage in DAMAGES])
def test_unusable_data(command: Command, shop: Path, tmp_path: Path, damage: Damage):
    shutil.copytree(shop, tmp_path / "data")
    damage.apply(tmp_path / "data")
    with refusal(tmp_path, damage.exit_code, *damage.fragments) as results:
        results.append(command("build-graph", tmp_path / "data", "--out", tmp_path / "new" / "graph"))


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["-k", "40"], ("between 1 and", "got 40")),
        (["-k", "0"], ("got 0",)),
        (["--engine", "fast"], ("--engine", "'fast'", "nndescent")),
        (["--min-recall", "0"], ("--min-recall",)),
        (["--device", "cuda:99"], ("'cuda:99'", "CUDA devices")),
        (["--device", "gpu"], ("'gpu'", "cuda:N")),
        (["--min-recall", "1.01"], ("--min-recall",)),
        (["--without", "imag"], ("'imag'", "'image'")),
        (["--split-seed", "-1"], ("split.seed",)),
        (["--features", "Image=image.npy"], ("'Image'",)),
    ],
    ids=lambda value: " ".join(value),
)
def test_unusable_build_options(
    command: Command, shop: Path, tmp_path: Path, arguments: list[str], fragments: tuple[str, ...]
):
    with refusal(tmp_path, 2, *fragments) as results:
        results.append(command("build-graph", shop, *arguments, "--out", tmp_path / "graph"))


def test_features_of_other_items_are_refused(command: Command, tmp_path: Path):
    pairs = pl.DataFrame({"user_id": np.repeat(np.arange(9), 5), "item_id": np.arange(45) % 11})
    pairs.select(pl.all().cast(pl.String)).write_csv(tmp_path / "clicks.csv")
    pl.DataFrame({"item_id": np.arange(100, 120), "features": np.eye(20)}).write_parquet(tmp_path / "image.parquet")
    image = ("--features", f"image={tmp_path / 'image.parquet'}")
    with refusal(tmp_path, 1, "none of the 11 items with interactions: 100 is one of theirs, 0 one of") as results:
        results.append(command("build-graph", tmp_path / "clicks.csv", *image, "--out", tmp_path / "new" / "graph"))


def test_the_largest_number_of_neighbors_is_one_less_than_there_are_items(command: Command, shop: Path, tmp_path: Path):
    assert command("build-graph", shop, "-k", 39, "--no-user-graphs", "--out", tmp_path / "graph").exit_code == 0
    with refusal(tmp_path, 2, "between 1 and 39 for 40 items by image (got 40)") as results:
        results.append(command("build-graph", shop, "-k", 40, "--no-user-graphs", "--out", tmp_path / "other"))


def test_too_little_memory_for_a_search(command: Command, shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(choice, "available_bytes", lambda: 1 << 20)
    with refusal(tmp_path, 1, "items by image", "0.0 GiB are free", "Free some memory") as results:
        results.append(command("build-graph", shop, "--out", tmp_path / "graph"))


# Configuration

UNUSABLE_CONFIGURATIONS: list[tuple[list[str], tuple[str, ...]]] = [
    (["--model", "draem"], ("Unknown model 'draem'", "Did you mean 'dream'?")),
    (["--model", "popularty"], ("'popularity'",)),
    ([], ("no 'model'", "--model")),
    (["--model", "dream", "--set", "training.epoch=3"], ("'training.epoch'", "did you mean 'epochs'")),
    (["--model", "dream", "--set", "trainning.epochs=3"], ("'trainning'", "did you mean 'training'")),
    (["--model", "dream", "--set", "model.temprature=1"], ("'temprature'", "did you mean 'temperature'")),
    (["--model", "bpr", "--set", "model.num_layers=1"], ("'num_layers'", "embedding_dim, l2_weight")),
    (["--model", "dream", "--set", "model.temperature=0"], ("temperature", "greater than 0", "got 0")),
    (["--model", "dream", "--set", "model.modality_weights={imag = 1}"], ("'imag'", "Did you mean 'image'?")),
    (["--model", "dream", "--set", "model.modality_weights={image = 0}"], ("positive weight",)),
    (["--model", "ease", "--set", "model.max_memory_gb=1e-6"], ("3 matrices of 40 x 40 x 4 bytes", "1e-06", "itemknn")),
    (["--model", "dream", "--set", "epochs=3"], ("'epochs=3'", "SECTION.KEY=VALUE")),
    (["--model", "dream", "--num-neighbors", "6"], ("num_neighbors is 6", "keeps 5 neighbours", "at most 5")),
    (["--model", "dream", "--num-neighbors", "0"], ("num_neighbors", "got 0")),
    (["--model", "dream", "--set", "num_neighbors=few"], ("num_neighbors", "'few'")),
    (["--model", "dream", "--set", "feature_precision=float8"], ("feature_precision", "'bfloat16'", "'float8'")),
    (["--model", "dream", "--set", "training.epochs"], ("SECTION.KEY=VALUE",)),
    (["--model", "dream", "--set", "training.epochs.most=3"], ("training.epochs",)),
    (["--model", "dream", "--set", "model.name.short=x"], ("'name' is a value, not a table",)),
    (["--model", "dream", "--set", "training.epochs=many"], ("training.epochs", "'many'")),
    (["--model", "dream", "--set", "training.learning_rate=-1"], ("training.learning_rate", "got -1")),
    (["--model", "bpr", "--set", "training.learning_rate=inf"], ("training.learning_rate", "finite", "got inf")),
    (["--model", "addease", "--set", "model.feature_l2_weight=inf"], ("feature_l2_weight", "finite", "got inf")),
    (["--model", "dream", "--set", "training.metric=recal@20"], ("'recal@20'", "recall")),
    (["--model", "dream", "--set", "training.metric=recall@0"], ("'recall@0'",)),
    (["--model", "dream", "--set", "training.sampling={interactions=[4]}"], ("over 2 hops", "for 1: [4]")),
    (["--model", "dream", "--set", "training.sampling={relations=-2}"], ("training.sampling.relations", "got -2")),
    (
        ["--model", "dream", "--set", "training.sampling={features=0}"],
        ("training.sampling.features", "draws no neighbour", "-1 for all"),
    ),
    (["--model", "dream", "--set", "training.sampling={hops=2}"], ("training.sampling.hops",)),
    (
        ["--model", "bpr", "--set", "training.teacher.model={name=3}"],
        ("The name in the [training.teacher.model] table is 3", 'name = "addease"'),
    ),
    (
        ["--model", "bpr", "--set", "training.teacher.model.name=eas"],
        ("Unknown teacher 'eas'; expected one of addease, ease, itemknn. Did you mean 'ease'?",),
    ),
    (["--set", "model.name=3"], ("The name in the [model] table is 3", 'name = "dream"')),
    (["--model", "ease", "--set", "training.teacher.vote=0.5"], ("'ease' is solved and not trained", "Leave it out")),
    (["--model", "mgcn", "--sampled"], ("MGCN cannot be trained on sampled graphs",)),
    (
        ["--model", "dream", "--sampled", "--set", "model.user_modal=items"],
        ("with user_modal = 'items' it reads more",),
    ),
    (["--model", "dream", "--set", "training.eval_users=0"], ("training.eval_users", "got 0")),
    (["--model", "bpr", "--set", "training.batch_size=100000000000000000000"], ("batch_size", "less than 2147483648")),
    (["--model", "bpr", "--set", "training.batch_size=0"], ("training.batch_size", "greater than 0", "got 0")),
    (["--model", "bpr", "--set", "training.teacher.vote=1e300"], ("teacher.vote:", "or equal to 1000000", "1e+300")),
    (["--model", "bpr", "--set", "training.teacher.votes=[1e300]"], ("teacher.votes.0:", "or equal to 1000000")),
    (["--model", "bpr", "--set", "training.teacher.share=1e300"], ("teacher.share:", "or equal to 1000000", "1e+300")),
    (["--model", "bpr", "--set", "training.teacher.vote_weights=3000000000"], ("vote_weights", "less than 2147483648")),
    (["--model", "dream", "--set", "training.sampling={relations=3000000000}"], ("relations", "less than 2147483648")),
    (["--model", "dream", "--seed", "-1"], ("training.seed", "got -1")),
    (["--model", "dream", "--seed", str(2**40)], ("training.seed", str(2**40))),
    (
        ["--model", "bpr", "--epochs", "1", "--set", "training.epochs=2"],
        ("--epochs 1", "training.epochs=2", "Leave one"),
    ),
    (["--model", "bpr", "--seed", "1", "--set", "training.seed = 2"], ("--seed 1 and --set training.seed = 2",)),
    (
        ["--model", "dream", "--num-neighbors", "2", "--set", "num_neighbors=4"],
        ("--num-neighbors 2 and --set num_neighbors=4 say different things. Leave one out",),
    ),
    (
        ["--model", "dream", "--num-neighbors", "2", "--set", "num_neighbors=4", "--preset", "auto"],
        ("--num-neighbors 2 and --set num_neighbors=4",),
    ),
    (["--model", "dream", "--num-neighbors", "2", "--set", "num_neighbors=none"], ("--set num_neighbors=none say",)),
    (
        ["--model", "dream", "--sampled", "--set", "training.sampling=none"],
        ("--sampled and --set training.sampling=none",),
    ),
    (["--model", "dream", "--device", "cuda:7"], ("'cuda:7' is not here",)),
    (["--model", "dream", "--device", "gpu"], ("'gpu'", "auto, cpu, cuda")),
    (["--model", "dream", "--device", "mps"], ("'mps'", "auto, cpu, cuda")),
]


@pytest.mark.parametrize(("arguments", "fragments"), UNUSABLE_CONFIGURATIONS, ids=lambda value: " ".join(value))
def test_unusable_configuration(
    command: Command, shop_graph: Path, tmp_path: Path, arguments: list[str], fragments: tuple[str, ...]
):
    with refusal(tmp_path, 2, *fragments) as results:
        results.append(command("train", shop_graph, *arguments, "--run", tmp_path / "runs" / "run"))


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["evaluate", "RUN", "--split", "valid", "--mask-valid"], ("--mask-valid is for the test split", "'valid'")),
        (["recommend", "RUN", "--out", "top.csv", "--format", "json"], ("--format says how to print", "top.csv")),
        (["export", "RUN", "--out", "shipped", "--min-recall", "0.9"], ("--min-recall is for --index ivf",)),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_options_that_would_do_nothing(
    command: Command, shop_run: Path, tmp_path: Path, arguments: list[str], fragments: tuple[str, ...]
):
    with refusal(tmp_path, 2, *fragments) as results:
        results.append(command(*(shop_run if argument == "RUN" else argument for argument in arguments)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
@pytest.mark.parametrize("name", ["recommend", "evaluate"])
def test_a_device_that_is_not_here(command: Command, shop_run: Path, tmp_path: Path, name: str):
    with refusal(tmp_path, 2, "'cuda' is not here", "0 CUDA devices") as results:
        results.append(command(name, shop_run, "--device", "cuda"))


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("[model\n", ("run.toml", "not valid TOML")),
        ('model = "dream"\n', ("model",)),
        ("model = 3\n", ("model",)),
        ("[model]\ntemperature = 1.0\n", ("no name",)),
        ('training = 3\n[model]\nname = "bpr"\n', ("training",)),
        ('graph = 3\n[model]\nname = "bpr"\n', ("graph",)),
        ('sede = 3\n[model]\nname = "bpr"\n', ("'sede'",)),
    ],
    ids=lambda value: value.strip() if isinstance(value, str) else "",
)
@pytest.mark.parametrize("with_model", [False, True])
def test_unusable_config_files(
    command: Command, shop_graph: Path, tmp_path: Path, text: str, fragments: tuple[str, ...], with_model: bool
):
    if with_model and ("temperature" in text or text.startswith("model")):
        fragments = ()  # the name on the command line takes the place of the whole table
    if "graph" not in text:
        text = f'graph = "{shop_graph}"\n{text}'
    (tmp_path / "run.toml").write_text(text)
    arguments = ["--model", "bpr", "--set", "training.epochs=1", *CPU] if with_model else []
    if with_model and not fragments:
        assert command("train", "--config", tmp_path / "run.toml", *arguments, "--run", tmp_path / "run").exit_code == 0
        return
    with refusal(tmp_path, 2, *fragments) as results:
        results.append(command("train", "--config", tmp_path / "run.toml", *arguments, "--run", tmp_path / "run"))


def test_config_files_that_cannot_be_read(command: Command, tmp_path: Path):
    (tmp_path / "latin.toml").write_bytes(b'graph = "caf\xe9"\n')
    for name, fragment in (("missing.toml", "No such file"), ("latin.toml", "not valid TOML"), ("", "directory")):
        with refusal(tmp_path, 2, fragment) as results:
            results.append(command("train", "--config", tmp_path / name, "--run", tmp_path / "run"))


# Stores


@pytest.fixture
def damaged_store(shop_graph: Path, tmp_path: Path) -> Path:
    """A copy of the bookshop's store, to be damaged."""
    return Path(shutil.copytree(shop_graph, tmp_path / "graph"))


def flip(path: Path, position: int, bit: int = 0) -> None:
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


@pytest.mark.parametrize("where", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("file", STORE_FILES)
def test_a_flipped_bit_in_a_store(command: Command, damaged_store: Path, file: str, where: float):
    flip(damaged_store / file, int(where * ((damaged_store / file).stat().st_size - 1)))
    with refusal(damaged_store.parent, 1, file) as results:
        results.append(command("inspect", damaged_store))
    with refusal(damaged_store.parent, 1, file) as results:
        results.append(command("train", damaged_store, "--model", "bpr", "--run", damaged_store.parent / "run"))


@pytest.mark.parametrize("kept", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("file", STORE_FILES)
def test_a_truncated_store(command: Command, damaged_store: Path, file: str, kept: float):
    content = (damaged_store / file).read_bytes()
    (damaged_store / file).write_bytes(content[: int(kept * (len(content) - 2))])
    with refusal(damaged_store.parent, 1, file) as results:
        results.append(command("inspect", damaged_store))


@pytest.mark.parametrize("file", STORE_FILES)
def test_a_store_without_a_file(command: Command, damaged_store: Path, file: str):
    (damaged_store / file).unlink()
    with refusal(damaged_store.parent, 1, file) as results:
        results.append(command("inspect", damaged_store))


def test_every_single_bit_of_graph_json_counts(damaged_store: Path):
    content = (damaged_store / "graph.json").read_bytes()
    undetected = []
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 1 << position % 8
        (damaged_store / "graph.json").write_bytes(changed)
        try:
            read_info(damaged_store)
        except StoreError:
            continue
        undetected.append(position)
    blank = b" \t\n\r"  # the only bytes whose change may leave the same JSON
    assert [position for position in undetected if content[position] not in blank] == []


def test_a_store_of_another_format(command: Command, damaged_store: Path):
    info = json.loads((damaged_store / "graph.json").read_text())
    (damaged_store / "graph.json").write_text(json.dumps({**info, "format_version": 99}))
    with refusal(damaged_store.parent, 1, "format 99", f"format {store.FORMAT_VERSION}", "--overwrite") as results:
        results.append(command("inspect", damaged_store))


def test_an_update_of_what_is_no_store(command: Command, shop: Path, tmp_path: Path):
    with refusal(tmp_path, 1, "not a graph store", "build-graph") as results:
        results.append(command("update-graph", tmp_path / "nowhere", shop))


def test_an_update_with_other_parameters(command: Command, shop: Path, damaged_store: Path):
    with refusal(damaged_store.parent, 1, "num_neighbors", "6 asked", "build-graph") as results:
        results.append(command("update-graph", damaged_store, shop, "-k", 6))


def test_an_update_from_a_damaged_store(command: Command, shop: Path, damaged_store: Path):
    content = bytearray((damaged_store / "edges.safetensors").read_bytes())
    content[-1] ^= 1
    (damaged_store / "edges.safetensors").write_bytes(content)
    with refusal(damaged_store.parent, 1, "edges.safetensors", "damaged") as results:
        results.append(command("update-graph", damaged_store, shop))


def test_an_update_to_a_place_that_is_taken(command: Command, shop: Path, damaged_store: Path):
    (damaged_store.parent / "home").mkdir()
    (damaged_store.parent / "home" / "thesis.tex").write_text("years of work")
    for options in ([], ["--overwrite"]):
        with refusal(damaged_store.parent, 1, "home") as results:
            results.append(
                command("update-graph", damaged_store, shop, "--out", damaged_store.parent / "home", *options)
            )


def test_an_update_from_data_that_is_not_there(command: Command, damaged_store: Path):
    with refusal(damaged_store.parent, 2, "nothing.toml") as results:
        results.append(command("update-graph", damaged_store, damaged_store.parent / "nothing.toml"))


@pytest.mark.parametrize("text", ["null", "[]", '"graph"', "{}", ""])
def test_a_graph_json_that_says_something_else(command: Command, damaged_store: Path, text: str):
    (damaged_store / "graph.json").write_text(text)
    with refusal(damaged_store.parent, 1) as results:
        results.append(command("inspect", damaged_store))


def test_a_damaged_store_is_built_again_with_overwrite(command: Command, shop: Path, damaged_store: Path):
    fingerprint = load_graph(damaged_store).fingerprint
    flip(damaged_store / "features.safetensors", 1000)
    arguments = ["build-graph", shop, "--out", damaged_store, "-k", 5]
    with refusal(damaged_store.parent, 1, "features.safetensors", "--overwrite") as results:
        results.append(command(*arguments))
    assert command(*arguments, "--overwrite").exit_code == 0
    assert load_graph(damaged_store).fingerprint == fingerprint


# Runs


@pytest.fixture
def damaged_run(shop_run: Path, tmp_path: Path) -> Path:
    """A copy of the bookshop's run, to be damaged."""
    return Path(shutil.copytree(shop_run, tmp_path / "run"))


@pytest.mark.parametrize("where", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_a_flipped_bit_in_the_best_weights(command: Command, damaged_run: Path, where: float):
    best = damaged_run / "checkpoints" / "best.safetensors"
    flip(best, int(where * (best.stat().st_size - 1)))
    for name in ("evaluate", "recommend"):
        with refusal(damaged_run.parent, 1, "best.safetensors") as results:
            results.append(command(name, damaged_run, *CPU))


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.999])
@pytest.mark.parametrize("file", ["last.pt", "best.safetensors"])
def test_truncated_checkpoints(command: Command, damaged_run: Path, file: str, kept: float):
    path = damaged_run / "checkpoints" / file
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    arguments = ["train", "--resume", "--run"] if file == "last.pt" else ["evaluate"]
    with refusal(damaged_run.parent, 1, file) as results:
        results.append(command(*arguments, damaged_run))


def same(first: Any, second: Any) -> bool:
    """Whether two nested states are equal, bit for bit."""
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


def test_a_flipped_bit_in_a_checkpoint_is_refused_or_harmless(damaged_run: Path):
    path = damaged_run / "checkpoints" / "last.pt"
    content, expected = path.read_bytes(), load_checkpoint(path)
    step = len(content) // 300
    # Densely where an archive keeps its directory, sparsely elsewhere.
    positions = [*range(0, 300, 3), *range(0, len(content), step), *range(len(content) - 3000, len(content), 11)]
    num_refused = 0
    for position in positions:
        path.write_bytes(content)
        flip(path, position, bit=position % 8)
        try:
            state = load_checkpoint(path)
        except ResumeError:
            num_refused += 1
        else:
            assert same(state, expected), position
    assert num_refused > 300  # not every byte of an archive means something


def test_a_changed_byte_in_config_or_run_json_is_refused_or_harmless(damaged_run: Path):
    expected = load_run(damaged_run, device="cpu").embeddings()
    num_refused = 0
    for file in ("config.toml", "run.json"):
        content = (damaged_run / file).read_bytes()
        for position in range(0, len(content), 5):
            flip(damaged_run / file, position)
            try:
                run = load_run(damaged_run, device="cpu")
            except DreamPygError:
                num_refused += 1
            else:
                assert torch.equal(run.embeddings().user, expected.user), (file, position)
            (damaged_run / file).write_bytes(content)
    assert num_refused > 0


@pytest.mark.parametrize(
    ("old", "new", "difference"),
    [
        ("num_layers = 2", "num_layers = 3", "model.num_layers: 3 here, 2 there"),
        (
            'feature_precision = "auto"',
            'feature_precision = "bfloat16"',
            "feature_precision: bfloat16 here, auto there",
        ),
    ],
)
def test_a_changed_config_is_refused_with_both_values(
    command: Command, damaged_run: Path, old: str, new: str, difference: str
):
    text = (damaged_run / "config.toml").read_text()
    (damaged_run / "config.toml").write_text(text.replace(old, new))
    with refusal(damaged_run.parent, 1, difference) as results:
        results.append(command("evaluate", damaged_run))
    with refusal(damaged_run.parent, 1, difference) as results:
        results.append(command("train", "--resume", "--run", damaged_run))


def test_a_run_whose_graph_has_moved(command: Command, shop_graph: Path, tmp_path: Path):
    graph = Path(shutil.copytree(shop_graph, tmp_path / "graph"))
    command("train", graph, "--model", "popularity", "--run", tmp_path / "run")
    graph.rename(tmp_path / "moved")
    with refusal(tmp_path, 1, "no longer at", "train GRAPH --resume --run") as results:
        results.append(command("train", "--resume", "--run", tmp_path / "run"))
    assert command("train", tmp_path / "moved", "--resume", "--run", tmp_path / "run").exit_code == 0


def test_fewer_epochs_than_there_are(command: Command, damaged_run: Path):
    with refusal(damaged_run.parent, 1, "epochs already, more than training.epochs = 1") as results:
        results.append(command("train", "--resume", "--run", damaged_run, "--set", "training.epochs=1"))


def test_a_seed_where_there_is_none_to_set(command: Command, shop_graph: Path, tmp_path: Path):
    seed = ("--set", "training.seed=4")
    with refusal(tmp_path, 2, "training.seed", "--seed") as results:
        results.append(command("tune", "lightgcn", shop_graph, "--out", tmp_path / "study", *seed))
    with refusal(tmp_path, 2, "training.seed", "--seeds") as results:
        results.append(command("reproduce", "table2", "--graph", shop_graph, "--out", tmp_path / "tables", *seed))


def test_a_budget_without_a_search(command: Command, shop_graph: Path, tmp_path: Path):
    with refusal(tmp_path, 2, "--budget is for --preset auto") as results:
        results.append(command("train", shop_graph, "--model", "bpr", "--run", tmp_path / "run", "--budget", 3))


def test_a_modality_with_two_files(command: Command, shop: Path, tmp_path: Path):
    twice = ("--features", f"image={shop / 'image.npy'}", "--features", f"image={shop / 'text.parquet'}")
    with refusal(tmp_path, 2, "--features is given twice for 'image'") as results:
        results.append(command("build-graph", shop, *twice, "--out", tmp_path / "graph"))


def test_a_run_from_before_an_option_is_opened_and_resumed(command: Command, damaged_run: Path):
    for name, text in (("run.json", '"center_signal": true,'), ("config.toml", "center_signal = true")):
        path = damaged_run / name
        without = path.read_text().replace(text, "")
        assert without != path.read_text()
        path.write_text(without)
    assert command("evaluate", damaged_run).exit_code == 0
    assert command("train", "--resume", "--run", damaged_run).exit_code == 0


def test_a_run_of_an_option_that_is_not_known_is_refused(command: Command, damaged_run: Path):
    path = damaged_run / "run.json"
    path.write_text(path.read_text().replace('"center_signal": true', '"centre_signal": true'))
    for arguments in (("evaluate", damaged_run), ("train", "--resume", "--run", damaged_run)):
        with refusal(damaged_run.parent, 1, "centre_signal", "another version of dream-pyg") as results:
            results.append(command(*arguments))


def test_resuming_with_another_config_shows_both_values(command: Command, damaged_run: Path):
    overrides = ["--set", "training.learning_rate=0.5", "--set", "model.temperature=0.7", "--seed", 9]
    shown = (
        "training.learning_rate: 0.5 here, 0.001 there",
        "model.temperature: 0.7 here, 0.2 there",
        "training.seed: 9 here, 0 there",
    )
    with refusal(damaged_run.parent, 1, *shown) as results:
        results.append(command("train", "--resume", "--run", damaged_run, *overrides))
    with refusal(damaged_run.parent, 1, "model.name: bpr here, dream there") as results:
        results.append(command("train", "--resume", "--run", damaged_run, "--model", "bpr"))


def test_resuming_with_another_graph_shows_both_fingerprints(command: Command, shop: Path, damaged_run: Path):
    other, _ = build_store(DatasetConfig.load(shop), damaged_run.parent / "other", num_neighbors=3)
    mine = json.loads((damaged_run / "run.json").read_text())["graph_fingerprint"]
    with refusal(damaged_run.parent, 1, mine[:12], other.fingerprint[:12]) as results:
        results.append(command("train", other.path, "--resume", "--run", damaged_run))


@pytest.mark.parametrize("name", ["evaluate", "recommend", "export", "train --resume --run"])
@pytest.mark.parametrize("kind", ["missing", "empty", "file", "store"])
def test_what_is_no_run(command: Command, shop_graph: Path, tmp_path: Path, name: str, kind: str):
    path = tmp_path / "run"
    if kind == "empty":
        path.mkdir()
    elif kind == "file":
        path.write_text("run")
    elif kind == "store":
        shutil.copytree(shop_graph, path)
    out = ["--out", tmp_path / "new" / "shipped"] if name == "export" else []
    with refusal(tmp_path, 1, str(path)) as results:
        results.append(command(*name.split(), path, *out))


def test_a_run_without_a_best_epoch_says_how_to_go_on(command: Command, damaged_run: Path):
    (damaged_run / "checkpoints" / "best.safetensors").unlink()
    with refusal(damaged_run.parent, 1, "no best epoch", "--resume") as results:
        results.append(command("evaluate", damaged_run))


@pytest.mark.parametrize(
    "lost", ["config.toml", "run.json", "metrics.jsonl", "taught.safetensors", "checkpoints/best.safetensors"]
)
def test_a_run_that_lost_a_file_says_what_to_do_when_it_is_resumed(
    command: Command, shop_graph: Path, tmp_path: Path, lost: str
):
    run = tmp_path / "run"
    teacher = ("--set", "training.teacher={model={name='itemknn'}}", "--epochs", 1)
    assert command("train", shop_graph, "--model", "bpr", *teacher, "--run", run).exit_code == 0
    (run / lost).unlink()
    with refusal(tmp_path, 1, f"it has no {lost}", f"Restore what is missing from a copy, or remove {run}") as results:
        results.append(command("train", "--resume", "--run", run))


@pytest.mark.parametrize("name", ["evaluate", "recommend", "export"])
def test_a_run_that_is_not_finished_is_opened_with_a_warning(
    command: Command, damaged_run: Path, tmp_path: Path, name: str
):
    arguments = [name, damaged_run, *(["--out", tmp_path / "shipped"] if name == "export" else [])]
    assert command(*arguments).stderr == ""
    best, _ = read_best(RunPaths(damaged_run))
    update_info(RunPaths(damaged_run), status="interrupted")
    result = command(*arguments, *(["--overwrite"] if name == "export" else []))
    assert result.exit_code == 0
    assert result.stderr == (
        f"{damaged_run} is not finished (interrupted): this is epoch {best}, the best so far. Continue it with "
        f"`dream-pyg train --resume --run {damaged_run}`.\n"
    )


@pytest.mark.parametrize("text", ["{}", "5", '{"epoch": 1}', '{"epoch": 1, "train_seconds": null}', "[]", "{"])
def test_metrics_that_are_those_of_no_epoch(damaged_run: Path, text: str):
    (damaged_run / "metrics.jsonl").write_text(f"{text}\n")
    with pytest.raises(StoreError, match=r"metrics\.jsonl is damaged.* Restore it from a copy, or train anew"):
        read_epochs(RunPaths(damaged_run))


@pytest.mark.parametrize("text", ['{"epoch": 3}', '{"epoch": 3, "lines": 5}', '{"epoch": 3, "lines": {}}', "{}"])
def test_a_test_without_its_metrics(command: Command, damaged_run: Path, text: str):
    path = damaged_run / "test_metrics.json"
    written = path.read_text()
    path.write_text(text)
    resume = ("train", "--resume", "--run", damaged_run)
    result = command(*resume)
    assert_named(result.exit_code, result.stdout, result.stderr, 1, "test_metrics.json is damaged", "Remove it")
    path.unlink()
    assert command(*resume).exit_code == 0
    assert path.read_text() == written


@pytest.mark.parametrize("key", ["config", "graph_fingerprint", "seed", "device", "versions", "epochs", "best_epoch"])
def test_a_run_json_without_what_a_run_records(command: Command, damaged_run: Path, key: str):
    path = damaged_run / "run.json"
    info = json.loads(path.read_text())
    for damaged in ({**info, key: None}, {name: value for name, value in info.items() if name != key}):
        path.write_text(json.dumps(damaged))
        with refusal(damaged_run.parent, 1, "run.json is damaged", "Restore it from a copy, or train anew") as results:
            results.append(command("evaluate", damaged_run))
    if key in {"epochs", "best_epoch"}:  # which are known when a run ends
        update_info(RunPaths(damaged_run), status="interrupted")
        assert command("evaluate", damaged_run).exit_code == 0


@pytest.mark.parametrize("metadata", [{}, {"epoch": "1"}, {"epoch": "first", "valid": "{}"}])
def test_weights_that_are_those_of_no_epoch(command: Command, damaged_run: Path, metadata: dict[str, str]):
    best = damaged_run / "checkpoints" / "best.safetensors"
    save_tensors(best, load_tensors(best)[0], metadata)
    with refusal(damaged_run.parent, 1, "best.safetensors is damaged", "Restore it from a copy") as results:
        results.append(command("evaluate", damaged_run))


@pytest.mark.parametrize("file", ["run.json", "checkpoints/last.pt"])
def test_a_run_without_a_file_is_not_resumed(command: Command, damaged_run: Path, file: str):
    (damaged_run / file).unlink()
    with refusal(damaged_run.parent, 1) as results:
        results.append(command("train", "--resume", "--run", damaged_run))


def test_a_model_without_what_it_needs(command: Command, shop: Path, tmp_path: Path):
    command("build-graph", shop / "interactions.csv", "--out", tmp_path / "graph")
    with refusal(tmp_path, 2, "features of any modality", "item-item", "user-user") as results:
        results.append(command("train", tmp_path / "graph", "--model", "dream", "--run", tmp_path / "run"))


def test_a_model_that_cannot_be_exported(command: Command, shop_graph: Path, tmp_path: Path):
    command("train", shop_graph, "--model", "itemknn", "--run", tmp_path / "run", *CPU)
    with refusal(tmp_path, 2, "'itemknn' has no embeddings", f"recommend {tmp_path / 'run'} --out") as results:
        results.append(command("export", tmp_path / "run", "--out", tmp_path / "shipped"))


# Disks, places and other processes


def test_a_full_disk_while_building(command: Command, shop: Path, tmp_path: Path):
    with refusal(tmp_path, 1, "Cannot write", "free some space") as results, file_size_limit(4096):
        results.append(command("build-graph", shop, "--out", tmp_path / "new" / "graph"))


def test_a_full_disk_while_replacing_keeps_the_old_store(command: Command, shop: Path, damaged_store: Path):
    with refusal(damaged_store.parent, 1, "Cannot write") as results, file_size_limit(4096):
        results.append(command("build-graph", shop, "--out", damaged_store, "-k", 3, "--overwrite"))
    assert load_graph(damaged_store).info["parameters"]["num_neighbors"] == 5


def test_a_full_disk_when_training_begins(command: Command, shop_graph: Path, tmp_path: Path):
    with refusal(tmp_path, 1, "Cannot write", "free some space") as results, file_size_limit(4096):
        results.append(command("train", shop_graph, "--model", "bpr", "--run", tmp_path / "runs" / "run", *CPU))


def test_a_full_disk_during_training_loses_nothing(command: Command, shop_graph: Path, tmp_path: Path):
    arguments = ["--model", "bpr", *CPU, "--set", "training.batch_size=64", "--set", "training.epochs=4"]
    command("train", shop_graph, *arguments, "--run", tmp_path / "whole")
    command("train", shop_graph, *arguments[:-1], "training.epochs=2", "--run", tmp_path / "run")
    before = (tmp_path / "run" / "checkpoints" / "last.pt").read_bytes()
    resume = ["train", "--resume", "--run", tmp_path / "run", "--set", "training.epochs=4"]
    with file_size_limit(4096):
        result = command(*resume)
    assert_named(result.exit_code, result.stdout, result.stderr, 1, "Cannot write", "free some space")
    assert (tmp_path / "run" / "checkpoints" / "last.pt").read_bytes() == before
    assert command(*resume).exit_code == 0
    weights = [load_tensors(tmp_path / name / "checkpoints" / "best.safetensors")[0] for name in ("run", "whole")]
    assert same(*weights)
    assert (tmp_path / "run" / "test_metrics.json").read_text() == (
        tmp_path / "whole" / "test_metrics.json"
    ).read_text()


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".json"])
def test_a_full_disk_while_recommending(command: Command, shop_run: Path, tmp_path: Path, suffix: str):
    (tmp_path / f"top{suffix}").write_text("yesterday's")
    for out in (tmp_path / f"top{suffix}", tmp_path / "new" / f"top{suffix}"):
        with refusal(tmp_path, 1, "Cannot write", str(out)) as results, file_size_limit(1000):
            results.append(command("recommend", shop_run, "--out", out))


@pytest.mark.parametrize("file_format", ["safetensors", "parquet"])
def test_a_full_disk_while_exporting(command: Command, shop_run: Path, tmp_path: Path, file_format: str):
    with refusal(tmp_path, 1, "Cannot write") as results, file_size_limit(4096):
        results.append(command("export", shop_run, "--as", file_format, "--out", tmp_path / "new" / "shipped"))


@pytest.mark.slow
def test_a_full_disk_in_a_process_of_its_own(shop: Path, tmp_path: Path):
    before = snapshot(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "dream_pyg", "build-graph", str(shop), "--out", str(tmp_path / "new" / "graph")],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192)),
        capture_output=True,
        text=True,
    )
    assert_named(done.returncode, done.stdout, done.stderr, 1, "Cannot write", "File too large")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("place", ["/proc/dream/graph", "file/graph", "x" * 300])
def test_places_where_nothing_can_be_written(
    command: Command, shop: Path, shop_graph: Path, tmp_path: Path, place: str
):
    (tmp_path / "file").write_text("a file")
    with refusal(tmp_path, 1) as results:
        results.append(command("build-graph", shop, "--out", tmp_path / place))
    with refusal(tmp_path, 1) as results:
        results.append(command("train", shop_graph, "--model", "bpr", "--run", tmp_path / place, *CPU))


def test_a_place_where_no_run_can_be_written_is_known_before_the_teacher_is_solved(
    command: Command, shop_graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "file").write_text("a file")
    monkeypatch.setattr(trainer, "teach", lambda *given: pytest.fail("the teacher is solved"))
    teacher = ["--set", "training.teacher={}", *CPU]
    for place in ("/proc/dream/run", "file/run"):
        with refusal(tmp_path, 1, "Cannot write", place) as results:
            results.append(command("train", shop_graph, "--model", "bpr", *teacher, "--run", tmp_path / place))


@pytest.mark.parametrize("place", ["/proc/dream/top.csv", "file/top.csv", "directory.csv"])
def test_places_where_no_table_can_be_written(command: Command, shop_run: Path, tmp_path: Path, place: str):
    (tmp_path / "file").write_text("a file")
    (tmp_path / "directory.csv").mkdir()
    with refusal(tmp_path, 1, "Cannot write") as results:
        results.append(command("recommend", shop_run, "--out", tmp_path / place))


@pytest.fixture
def as_nobody() -> Iterator[Path]:
    """Run as a user without privileges, in a directory that everybody may enter."""
    if os.getuid() != 0:
        pytest.skip("only root can become another user")
    directory = Path(tempfile.mkdtemp())
    directory.chmod(0o755)
    os.setresuid(65534, 65534, 0)
    try:
        yield directory
    finally:
        os.setresuid(0, 0, 0)
        shutil.rmtree(directory)


def test_without_permission(command: Command, shop: Path, as_nobody: Path):
    data = as_nobody / "data"
    os.seteuid(0)
    shutil.copytree(shop, data)
    (data / "image.npy").chmod(0o000)
    (as_nobody / "locked").mkdir(mode=0o700)
    os.seteuid(65534)
    for arguments, fragments in (
        ([data, "--out", "/tmp/x/graph"], ("image.npy", "not readable")),
        ([data, "--without", "image", "--out", as_nobody / "graph"], ("Cannot write", "Permission denied")),
        ([data, "--without", "image", "--out", as_nobody / "locked" / "graph"], ("Permission denied",)),
        ([as_nobody / "locked" / "clicks.csv", "--out", as_nobody / "graph"], ("Permission denied",)),
    ):
        result = command("build-graph", *arguments)
        assert_named(result.exit_code, result.stdout, result.stderr, 1, *fragments)
    assert {path.name for path in as_nobody.iterdir()} == {"data", "locked"}


def test_a_store_that_another_process_built_meanwhile_stays(
    command: Command, shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    build, other = store.build_graph, []

    def build_after_another(*arguments: Any, **options: Any) -> Any:
        if not other:
            other.append(None)
            other[0] = build_store(DatasetConfig.load(shop), tmp_path / "graph", num_neighbors=3)[0].fingerprint
        return build(*arguments, **options)

    monkeypatch.setattr(store, "build_graph", build_after_another)
    result = command("build-graph", shop, "--out", tmp_path / "graph", "-k", 5)
    assert_named(result.exit_code, result.stdout, result.stderr, 1, "another process", "discarded")
    assert load_graph(tmp_path / "graph").fingerprint == other[0]
    assert [path.name for path in tmp_path.iterdir()] == ["graph"]


@pytest.mark.slow
def test_two_processes_that_build_into_one_path(shop: Path, tmp_path: Path):
    out = tmp_path / "graph"
    line = [sys.executable, "-m", "dream_pyg", "build-graph", str(shop), "--out", str(out), "--format", "json"]
    processes = [
        subprocess.Popen([*line, "-k", k], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for k in ("3", "4")
    ]
    outputs = [process.communicate() for process in processes]
    won, lost = sorted((0, 1), key=lambda index: processes[index].returncode)
    assert processes[won].returncode == 0
    assert json.loads(outputs[won][0])["state"] == "built"
    assert_named(processes[lost].returncode, *outputs[lost], 1)
    assert load_graph(out).fingerprint.startswith(json.loads(outputs[won][0])["fingerprint"])
    assert [path.name for path in tmp_path.iterdir()] == ["graph"]


@pytest.fixture
def graph_without_test(command: Command, shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A graph all of whose interactions are in train or valid, in the current directory."""
    monkeypatch.chdir(tmp_path)
    built = command("build-graph", shop / "interactions.csv", "--split-ratios", 0.8, 0.2, 0, "--out", "graph")
    assert built.exit_code == 0, built.stderr
    return "graph"


def test_training_and_study_that_would_read_an_empty_test_split(command: Command, graph_without_test: str):
    model = ("--model", "bpr")
    for arguments in (
        ("train", graph_without_test, *model, "--run", "run"),
        ("tune", "bpr", graph_without_test, "--trials", 1, "--out", "study"),
    ):
        with refusal(Path(), 1, "The test split is empty", "can do without (--no-test)") as results:
            results.append(command(*arguments))
    trained = command("train", graph_without_test, *model, "--epochs", 1, "--no-test", "--run", "run")
    assert trained.exit_code == 0, trained.stderr
    assert command("recommend", "run", "-k", 3, "--out", "top.csv").exit_code == 0


def test_a_table_that_would_read_an_empty_test_split(command: Command, graph_without_test: str):
    arguments = ("--dataset", "interactions", "--graph", graph_without_test, "--models", "bpr", "--out", "tables")
    result = command("reproduce", "table2", *arguments)
    assert_named(result.exit_code, result.stdout, result.stderr, 1, "The test split is empty")
    assert not Path("tables/runs").exists()
