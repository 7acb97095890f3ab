"""One measurement, in a process that does nothing else.

It is told a job and answers with events: ``ready`` after loading and warming up, ``built`` with the seconds, ``point``
for each effort that was searched with, ``end``; or why not.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from dream_pyg.bench.engines import find_engine
from dream_pyg.bench.recall import Reference
from dream_pyg.bench.workloads import Source
from dream_pyg.graph.processor import give_back_memory, has_bfloat16_units, has_int8_units

Emit = Callable[..., None]

_WARM_UP_ROWS = 1024
_LONGEST_MESSAGE = 300


class PeakMemory:
    """The most memory the process ever had resident, and had since the last reset where the system can tell."""

    def __init__(self) -> None:
        self.before = 0
        self._highest = 0

    def reset(self) -> None:
        """Forget the peak so far, keep :attr:`before` as what is resident now."""
        give_back_memory()  # What was freed would be used again and seem to cost nothing.
        with suppress(OSError):  # Not Linux, or not allowed: the peak includes loading and warming up.
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        self.before = self._highest = _resident("VmRSS")

    def skip(self, action: Callable[[], Any]) -> Any:
        """Do something whose memory does not count."""
        self.read()
        result = action()
        before = self.before
        highest = self._highest
        self.reset()
        self.before, self._highest = before, highest
        return result

    def read(self) -> int:
        """Bytes."""
        self._highest = max(self._highest, _resident("VmHWM"))
        return self._highest


def _resident(field: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak << 10


def measure_engine(job: dict[str, Any], emit: Emit) -> None:
    """Build once, then search with rising effort until the wanted recall is reached."""
    engine = find_engine(job["engine"])
    k, setting, threads = job["k"], job["setting"], job["threads"]
    rows = Source(**job["source"]).open(job["num_rows"])
    small = Source(**job["source"]).open(min(_WARM_UP_ROWS, job["num_rows"]))
    engine.build(small, k, setting, threads)(job["efforts"][0])
    del small
    reference = Reference.load(Path(job["reference"]))
    memory = PeakMemory()
    memory.reset()
    emit("ready")
    started = time.perf_counter()
    search = engine.build(rows, k, setting, threads)
    build_seconds = time.perf_counter() - started
    emit("built", seconds=build_seconds)
    for effort in job["efforts"]:
        started = time.perf_counter()
        index = search(effort)
        search_seconds = time.perf_counter() - started
        peak = memory.read()
        recall = None
        if index is not None:
            recall = memory.skip(partial(reference.recall, rows, index))
        emit(
            "point",
            effort={engine.effort[0]: effort} if engine.effort[0] else {},
            build_seconds=build_seconds,
            search_seconds=search_seconds,
            # A yardstick is the product alone, for an exact engine searches while it builds.
            seconds=search_seconds + build_seconds * (engine.kind != "yardstick"),
            recall=recall,
            peak_bytes=peak,
            extra_bytes=peak - memory.before,
        )
        if recall is None or recall >= job["min_recall"]:
            return


def measure_reference(job: dict[str, Any], emit: Emit) -> None:
    """Write the reference of a workload."""
    emit("ready")
    Reference.compute(Source(**job["source"]).open(job["num_rows"]), job["k"]).save(Path(job["reference"]))


def measure_gemm(job: dict[str, Any], emit: Emit) -> None:
    """Multiply two different square matrices again and again: what the machine gives at best, in GFLOP/s.

    Of bfloat16 and of integers only where the processor has units for them: elsewhere a product takes a minute.
    """
    size, here = job["size"], torch.device("cpu")
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, size, size, generator=generator)
    products: dict[str, list[Callable[[], Any]]] = {
        "fp32": [lambda: left @ right.T, lambda: left.numpy() @ right.numpy().T]
    }
    if has_bfloat16_units(here):
        low_left, low_right = left.bfloat16(), right.bfloat16()
        products["bf16"] = [lambda: low_left @ low_right.T]
    if has_int8_units(here):
        whole_left, whole_right = (part.mul(25).clamp(-127, 127).to(torch.int8) for part in (left, right))
        products["int8"] = [lambda: torch._int_mm(whole_left, whole_right.T)]
    emit("ready")
    emit(
        "rates",
        **{dtype: max(_rate(product, size, job["seconds"]) for product in which) for dtype, which in products.items()},
    )


def _rate(product: Callable[[], Any], size: int, seconds: float) -> float:
    product()
    best, until = 0.0, time.perf_counter() + seconds
    while not best or time.perf_counter() < until:
        started = time.perf_counter()
        product()
        best = max(best, 2e-9 * size**3 / (time.perf_counter() - started))
    return best


def pin_threads(threads: int) -> None:
    """Hold to a number of threads what the environment does not."""
    torch.set_num_threads(threads)
    try:
        import faiss
    except ImportError:
        return
    faiss.omp_set_num_threads(threads)


JOBS: dict[str, Callable[[dict[str, Any], Emit], None]] = {
    "engine": measure_engine,
    "reference": measure_reference,
    "gemm": measure_gemm,
}


def end_with_parent() -> None:
    """End this process with the one that started it, whose death would leave it computing for nobody."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def do_job(job: dict[str, Any], sender: Connection) -> None:
    """Do one job, and say how it ends; standard output stays clean, whatever a library prints."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent ends this process.
    end_with_parent()
    os.environ.update(job["environment"])
    os.dup2(2, 1)

    def emit(event: str, **values: Any) -> None:
        sender.send((event, values))

    try:
        pin_threads(job["threads"])
        JOBS[job["job"]](job, emit)
    except Exception as error:  # whatever other packages raise is a result
        text = " ".join(str(error).split())
        if isinstance(error, MemoryError) or "can't allocate memory" in text or "bad_alloc" in text:
            emit("out of memory", message=text or "an allocation failed")
        else:
            emit("failed", message=f"{type(error).__name__}: {text}"[:_LONGEST_MESSAGE])
    else:
        emit("end")
