"""What tests of several layers share."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from dream_pyg import DatasetConfig, RunConfig, build_store, make_synthetic, train
from dream_pyg.cli import main
from dream_pyg.data.files import read_json, write_json
from dream_pyg.training.run import RunPaths

_REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def real_data() -> Callable[[str], Path]:
    """The directory of a published data set, below ``$DREAM_PYG_DATA``; the test skips where it is absent."""
    root = Path(os.environ.get("DREAM_PYG_DATA", _REPOSITORY.parent / "shared" / "data"))

    def directory(name: str) -> Path:
        if not (root / name).is_dir():
            pytest.skip(f"no {name!r} in {root}; set DREAM_PYG_DATA to the directory of the published data sets")
        return root / name

    return directory


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a small synthetic bookshop: 60 users, 40 items, string ids, images and texts."""
    directory = tmp_path_factory.mktemp("shop") / "data"
    make_synthetic(directory, num_users=60, num_items=40, num_genres=4, num_styles=3, interactions_per_user=6)
    return directory


@pytest.fixture(scope="session")
def shop_graph(shop: Path) -> Path:
    """The bookshop's graph store."""
    stored, _ = build_store(DatasetConfig.load(shop), shop.parent / "graph", num_neighbors=5)
    return stored.path


@pytest.fixture(scope="session")
def shop_run(shop_graph: Path) -> Path:
    """DREAM trained on the bookshop for three epochs."""
    config = RunConfig.create(
        graph=shop_graph,
        model="dream",
        overrides=["training.epochs=3", "training.device=cpu", "training.batch_size=64"],
    )
    return train(config, shop_graph.parent / "run").run


@pytest.fixture(scope="session")
def kept_run(shop_graph: Path) -> Path:
    """DREAM trained on the bookshop for two epochs, whose weights are kept."""
    overrides = ["epochs=2", "device=cpu", "batch_size=64", "learning_rate=0.02", "keep_every=1"]
    config = RunConfig.create(
        graph=shop_graph, model="dream", overrides=[f"training.{override}" for override in overrides]
    )
    return train(config, shop_graph.parent / "kept").run


@pytest.fixture
def variant(kept_run: Path, tmp_path: Path) -> Callable[..., Path]:
    """Make a run that claims another configuration and score: ``variant("a", "training.seed=1", score=0.1)``."""

    def make(name: str, *overrides: str, score: float = 0.5) -> Path:
        run = tmp_path / "variants" / name
        shutil.copytree(kept_run, run)
        paths = RunPaths(run)
        config = RunConfig.create(file=paths.config, overrides=overrides)
        config.save(paths.config)
        write_json(paths.info, {**read_json(paths.info), "config": config.to_dict()})
        metrics = read_json(paths.test_metrics)
        metrics["lines"]["general"]["recall@20"] = score
        write_json(paths.test_metrics, metrics)
        return run

    return make


@pytest.fixture
def command() -> Callable[..., Result]:
    """Run a command line in this process: ``command("evaluate", path, "-k", 5)``."""

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="dream-pyg")

    return run
