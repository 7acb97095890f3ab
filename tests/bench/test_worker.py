"""A measurement does not outlive who asked for it."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

_PARENT = """
import multiprocessing, time
from dream_pyg.bench.worker import do_job
if __name__ == "__main__":
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    job = {"job": "gemm", "size": 8, "seconds": 300, "threads": 1, "environment": {}}
    process = context.Process(target=do_job, args=(job, sender))
    process.start()
    if WAIT:
        receiver.recv()
    print(process.pid, flush=True)
    time.sleep(300)
"""


def runs(pid: int) -> bool:
    """Whether there is such a process, and it is not only waiting to be buried."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks the process table of Linux")
@pytest.mark.parametrize("wait", [True, False], ids=["at work", "before its first line"])
def test_a_worker_ends_with_its_parent(wait):
    parent = subprocess.Popen(
        [sys.executable, "-c", _PARENT.replace("WAIT", str(wait))], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert runs(child)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 60
    while runs(child) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not runs(child)
