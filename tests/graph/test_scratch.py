"""Tables that lie in files hold what was written, take memory only while in use, and say when the disk is full."""

from __future__ import annotations

import errno
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dream_pyg.errors import SearchError
from dream_pyg.graph.knn import ArrayRows, cosine_knn, exact, scratch
from dream_pyg.graph.knn.scratch import ScratchTables

CPU = torch.device("cpu")


def resident_bytes_of_files() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("RssFile"))


@pytest.mark.parametrize("most", [0, 1 << 30])
def test_a_table_holds_what_is_written(most: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scratch, "_MOST_IN_MEMORY", most)
    made = ScratchTables(CPU)
    score = made.full(3000, 7, -np.inf, torch.float32)
    index = made.full(3000, 7, -1, torch.int32)
    assert (score == -torch.inf).all()
    assert (index == -1).all()
    expected = torch.arange(21_000, dtype=torch.int32).view(3000, 7)
    index[:] = expected
    made.let_go()
    torch.testing.assert_close(index, expected)
    assert (score == -torch.inf).all()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_large_table_leaves_memory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scratch, "_MOST_IN_MEMORY", 1 << 20)
    made = ScratchTables(CPU)
    before = resident_bytes_of_files()
    table = made.full(1 << 18, 32, 0, torch.float32)  # 32 MiB
    assert resident_bytes_of_files() - before < 4 << 20
    table += 1
    assert resident_bytes_of_files() - before > 24 << 20
    made.let_go()
    assert resident_bytes_of_files() - before < 4 << 20
    assert (table == 1).all()


def test_a_full_disk_is_said_before_the_search(monkeypatch: pytest.MonkeyPatch):
    class Full:
        def __enter__(self) -> Full:
            return self

        def __exit__(self, *error: Any) -> None:
            pass

        def write(self, data: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(scratch, "_MOST_IN_MEMORY", 0)
    monkeypatch.setattr(tempfile, "TemporaryFile", Full)
    with pytest.raises(SearchError, match=r"64 rows need .* MiB in .* \(No space left on device\).*TMPDIR"):
        cosine_knn(ArrayRows(np.eye(50, dtype=np.float32)), 3, engine="exact")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_lists_in_files_and_many_panels_give_the_same_neighbors(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    matrix = np.random.default_rng(0).standard_normal((5000, 24)).astype(np.float32)
    matrix[100:110] = 0
    whole = cosine_knn(ArrayRows(matrix), 10, engine="flat")
    monkeypatch.setattr(scratch, "_MOST_IN_MEMORY", 0)
    monkeypatch.setattr(exact, "_MOST_PANEL_ROWS", 1 << 10)
    parted = cosine_knn(ArrayRows(matrix), 10, engine="exact", dtype=dtype)
    np.testing.assert_array_equal(parted.index, whole.index)
    np.testing.assert_allclose(parted.similarity, whole.similarity, atol=1e-6)
