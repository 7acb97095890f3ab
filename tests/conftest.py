"""What tests of several layers share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

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
