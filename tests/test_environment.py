"""What PyTorch and oneDNN read from the environment: set in time, and never against what it says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_NAMES = ("THP_MEM_ALLOC_ENABLE", "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


def output(code: str, **said: str) -> str:
    """What a fresh interpreter prints, whose environment says of these variables no more than this."""
    environment = {key: value for key, value in os.environ.items() if key not in _NAMES} | said
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize("said", [{}, dict.fromkeys(_NAMES, "7")])
def test_the_environment_has_the_last_word(said: dict[str, str]):
    found = output(f"import os, dream_pyg; print(*(os.environ[name] for name in {_NAMES}))", **said)
    assert found.split() == (list(said.values()) or ["1", "128", "128"])


@pytest.mark.skipif(
    not _PAGES.exists() or "[never]" in _PAGES.read_text(), reason="the system has no transparent huge pages"
)
def test_large_tensors_lie_in_huge_pages():
    code = (
        "import dream_pyg, torch\n"
        "before = [line.split()[1] for line in open('/proc/self/smaps_rollup') if 'AnonHugePages' in line][0]\n"
        "tensor = torch.ones(1 << 24)\n"
        "after = [line.split()[1] for line in open('/proc/self/smaps_rollup') if 'AnonHugePages' in line][0]\n"
        "print(int(after) - int(before))"
    )
    # 64 MiB, but for pages at both ends; where memory is in pieces, the system finds fewer.
    assert int(output(code)) > 4096
