"""The wheel: it builds without a compiler, holds the package alone, and runs away from the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

_REPOSITORY = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package's wheel, built offline from a copy of the sources, and without a compiler in reach."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(_REPOSITORY / name, source)
    shutil.copytree(_REPOSITORY / "dream_pyg", source / "dream_pyg", ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", out, source],
        env={**os.environ, "CC": "false", "CXX": "false"}, capture_output=True, check=True,
    )  # fmt: skip
    (built,) = out.iterdir()
    return built


def test_the_wheel_is_pure_python_and_holds_only_the_package(wheel: Path):
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    modules = {name for name in names if name.endswith(".py")}
    assert {top.split("-")[0] for top in tops} == {"dream_pyg"}
    expected = {str(path.relative_to(_REPOSITORY)) for path in (_REPOSITORY / "dream_pyg").rglob("*.py")}
    assert modules == expected
    data = {str(path.relative_to(_REPOSITORY)) for path in (_REPOSITORY / "dream_pyg").rglob("*.toml")}
    assert {name for name in names if name.endswith(".toml")} == data
    assert len(data) > 1


def test_the_wheel_runs_the_demo_in_an_environment_of_its_own(wheel: Path, tmp_path: Path):
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    install = [python, "-m", "pip", "install", "--no-deps", "--no-index", wheel]
    subprocess.run(install, env=environment, capture_output=True, check=True)
    # The dependencies come from the environment of the tests, so that no network is needed. Only its packages: an
    # editable install of the checkout works through a .pth file, which is not read from there.
    packages = Path(sysconfig.get_paths(vars={"base": str(tmp_path / "venv")})["purelib"])
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def run(*arguments: str | Path) -> str:
        done = subprocess.run(
            arguments, cwd=tmp_path, env={**environment, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert Path(run(python, "-c", "import dream_pyg; print(dream_pyg.__file__)").strip()).is_relative_to(packages)
    told = run(tmp_path / "venv" / "bin" / "dream-pyg", "demo", "--seeds", "1")
    assert "what DREAM recommends them" in told
    assert told.splitlines()[-1].startswith("Done in ")
    assert (tmp_path / "demo" / "dream-0" / "test_metrics.json").is_file()
