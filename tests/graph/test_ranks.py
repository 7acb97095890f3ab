"""Two processes find together what one finds alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dream_pyg import DatasetConfig, build_store, load_graph

pytestmark = pytest.mark.slow

# Searches in strips of few rows, so that both processes have some; then as `python -m dream_pyg`.
_DRIVER = """
import os, signal, sys
from dream_pyg.cli import main
from dream_pyg import ranks
from dream_pyg.graph.knn import exact
exact._TILE_ROWS, exact._FEW_FEATURES, exact._PANEL_BYTES, exact._INTEGER_PANEL_BYTES = 16, 1, 1, 1
def share(work):
    mine = work[ranks.rank() :: ranks.num_ranks()]
    assert 0 < len(mine) < len(work)
    for number, strip in enumerate(mine):
        if number == 1 and ranks.rank() == 1 and "--die" in sys.argv:
            os.kill(os.getpid(), signal.SIGKILL)
        yield strip
ranks.share = lambda work: list(share(work)) if "--die" not in sys.argv else _Lazy(share(work), work)
class _Lazy(list):
    def __init__(self, items, work):
        super().__init__(work[ranks.rank() :: ranks.num_ranks()])
        self.items = items
    def __getitem__(self, key):
        return self.items
if __name__ == "__main__":
    main([argument for argument in sys.argv[1:] if argument != "--die"])
"""


def run_two(directory: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A command line in two processes."""
    (directory / "driver.py").write_text(_DRIVER)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launch += ["--monitor-interval", "5"]  # time for the other to say something before it is asked to stop
    return subprocess.run(
        [*launch, str(directory / "driver.py"), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_two_processes_find_what_one_finds(shop: Path, tmp_path: Path):
    done = run_two(tmp_path, "build-graph", shop, "-k", 5, "--out", tmp_path / "two", "--format", "json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["state"] == "built"  # one of them speaks
    one, _ = build_store(DatasetConfig.load(shop), tmp_path / "one", num_neighbors=5)
    two = load_graph(tmp_path / "two")
    assert two.fingerprint == one.fingerprint
    assert two.info["files"] == one.info["files"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["driver.py", "one", "two"]


def error_lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("Error: ")]


def test_what_is_wrong_is_said_once(shop: Path, tmp_path: Path):
    done = run_two(tmp_path, "build-graph", shop, "-k", 500, "--out", tmp_path / "graph")
    assert done.returncode != 0
    (line,) = error_lines(done)
    assert "num_neighbors must be between 1 and 39" in line


def test_a_process_that_dies_ends_all_with_one_error(shop: Path, tmp_path: Path):
    done = run_two(tmp_path, "--die", "build-graph", shop, "-k", 5, "--out", tmp_path / "graph")
    assert done.returncode != 0
    (line,) = error_lines(done)
    assert "is gone" in line or "Interrupted" in line  # torchrun asks the other to stop, which may be faster
    assert "same command" in line
    assert not (tmp_path / "graph").exists()
