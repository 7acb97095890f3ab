"""Benchmark of all-kNN construction: every row's nearest neighbours by cosine, by many engines, at matched recall."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dream_pyg.analysis.continuable import continuable
from dream_pyg.bench.engines import Engine, find_engine
from dream_pyg.bench.machine import describe_machine
from dream_pyg.bench.processes import Outcome, run_job
from dream_pyg.bench.runs import Run, RunLog
from dream_pyg.bench.scaling import PowerLaw, fit_power_law, ladder
from dream_pyg.bench.workloads import Source, Workload
from dream_pyg.errors import BenchError, ConfigError

logger = logging.getLogger("dream_pyg")

RUNS_FILE = "runs.jsonl"
_SCRATCH = ".rows-"
_GEMM_SIZE = 4096
_GEMM_SECONDS = 3.0
_FEWEST_ROWS = 200  # below, starting threads takes longer than searching
_FITTED_SIZES = 3
_UNLIMITED = 1e6


@dataclass(frozen=True)
class Conditions:
    """What all runs of a benchmark share.

    Attributes:
        num_neighbors: K.
        threads: To how many threads every engine is held.
        repeats: How often all rows of a workload are searched, each time in a fresh process; parts of them once.
        limit: Seconds after which a run is stopped.
        min_recall: The recall at which approximate engines are compared.
        steps: How often the number of rows is halved to see how cost grows.
    """

    num_neighbors: int = 10
    threads: int = 2
    repeats: int = 3
    limit: float = 300.0
    min_recall: float = 0.98
    steps: int = 3

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("num_neighbors", "threads", "repeats"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1 (got {getattr(self, name)}).")
        if not 0 < self.min_recall <= 1:
            raise ConfigError(f"min_recall must be above 0 and at most 1 (got {self.min_recall}).")
        if not self.limit > 0:
            raise ConfigError(f"limit must be a positive number of seconds (got {self.limit}).")
        if self.steps < 0:
            raise ConfigError(f"steps must not be negative (got {self.steps}).")

    def key(self, workload: Workload, num_rows: int, engine: str, repetition: int) -> dict[str, Any]:
        """What tells a run from others; the limit, which does not change a measurement, is not in it."""
        return {
            "workload": workload.key(), "num_rows": num_rows, "engine": engine, "k": self.num_neighbors,
            "threads": self.threads, "min_recall": self.min_recall, "repetition": repetition,
        }  # fmt: skip


def bench_graph(
    workloads: Sequence[Workload], engines: Sequence[str], out: str | Path, conditions: Conditions | None = None
) -> RunLog:
    """Measure engines on workloads and on their first halves, quarters, ...; runs that are there already stay.

    Each run is a process of its own with a fixed number of threads, warmed up on a few rows. Engines take turns, so
    that what slows the machine for a while slows them all. In the first round an approximate engine looks for its
    cheapest setting that reaches the wanted recall; later rounds repeat that one. A run that its smaller sizes predict
    to exceed the limit is not begun.

    Args:
        workloads: What to search.
        engines: Names of :data:`~dream_pyg.bench.engines.ENGINES`.
        out: Directory of ``runs.jsonl``.
        conditions: K, threads, repetitions, limits.

    Raises:
        ConfigError: If an engine is unknown, two workloads have one name, or K does not fit a workload.
        StoreError: If ``out`` holds damaged runs or those of another machine, or another process measures into it.
        Interrupted: On SIGINT or SIGTERM; the same call continues.
    """
    conditions = conditions or Conditions()
    chosen = [find_engine(name) for name in engines]
    _check_names(workloads)
    for workload in workloads:
        if conditions.num_neighbors >= workload.num_rows:
            raise ConfigError(
                f"num_neighbors must be below the {workload.num_rows} rows of {workload.name} "
                f"(got {conditions.num_neighbors}). Choose a smaller number of neighbours."
            )
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with continuable(out, "the benchmark"):
        log = RunLog(out / RUNS_FILE, describe_machine())
        for left in out.glob(f"{_SCRATCH}*"):  # by a process that was killed
            shutil.rmtree(left)
        _measure_gemm(log, conditions)
        for workload in workloads:
            with tempfile.TemporaryDirectory(dir=out, prefix=_SCRATCH) as scratch:
                _Bench(workload, chosen, log, conditions, Path(scratch)).run()
    return log


def _check_names(workloads: Sequence[Workload]) -> None:
    """Refuse what a report could not tell apart."""
    by_name: dict[str, str] = {}
    for workload in workloads:
        what = workload.path or "a generated data set"
        if workload.name in by_name:
            raise ConfigError(
                f"Two data sets are called {workload.name!r}: {by_name[workload.name]} and {what}. A report tells data "
                "sets apart by their names: rename a file, or measure each with an --out of its own."
            )
        by_name[workload.name] = what


def sizes(workload: Workload, conditions: Conditions) -> list[int]:
    """The numbers of rows that are measured."""
    return ladder(workload.num_rows, conditions.steps, max(_FEWEST_ROWS, 4 * conditions.num_neighbors))


def growth(log: RunLog, workload: Workload, engine: str, conditions: Conditions, below: int) -> PowerLaw | None:
    """How the cost of an engine grows, from its fastest run of each of the largest sizes below some number of rows."""
    fastest: dict[int, float] = {}
    for run in log.runs:
        num_rows, repetition = (run["key"].get(name, 0) for name in ("num_rows", "repetition"))
        same = run["key"] == conditions.key(workload, num_rows, engine, repetition)
        if same and run["status"] == "done" and num_rows < below:
            seconds = run["best"]["seconds"]
            fastest[num_rows] = min(seconds, fastest.get(num_rows, seconds))
    # Of fewer rows the time is mostly that of starting, which would make growth look slower than it is.
    fitted = sorted(fastest)[-_FITTED_SIZES:]
    return fit_power_law(fitted, [fastest[size] for size in fitted])


def _measure_gemm(log: RunLog, conditions: Conditions) -> None:
    key = {"engine": "gemm", "threads": conditions.threads, "size": _GEMM_SIZE}
    if log.settled(key, _UNLIMITED):
        return
    outcome = run_job({"job": "gemm", "size": _GEMM_SIZE, "seconds": _GEMM_SECONDS}, conditions.threads, _UNLIMITED)
    _require(outcome, "The product of two matrices")
    log.add({"key": key, "status": "done", "gflops": outcome.events["rates"][0]})


@dataclass
class _Bench:
    """All runs of one workload."""

    workload: Workload
    engines: Sequence[Engine]
    log: RunLog
    conditions: Conditions
    scratch: Path

    def run(self) -> None:
        source: Source | None = None
        for num_rows in sizes(self.workload, self.conditions):
            reference: Path | None = None
            for repetition in range(self.conditions.repeats if num_rows == self.workload.num_rows else 1):
                for engine in self.engines:
                    key = self.conditions.key(self.workload, num_rows, engine.name, repetition)
                    if self.log.settled(key, self.conditions.limit):
                        continue
                    first = self.log.find({**key, "repetition": 0})
                    if repetition and (first is None or first["status"] != "done"):
                        continue  # What failed once is not repeated.
                    if not self._refused(key, engine):
                        source = source or self.workload.write(self.scratch)
                        reference = reference or self._write_reference(source, num_rows)
                        shared = {"source": vars(source), "reference": str(reference), "num_rows": num_rows}
                        self._measure(key, engine, shared, first if repetition else None)

    def _refused(self, key: Mapping[str, Any], engine: Engine) -> bool:
        """Record why a run is not begun, if it is not."""
        if not engine.installed:
            self._add({"key": key, "status": "not installed", "message": f"pip install {engine.package}"})
            return True
        law = growth(self.log, self.workload, engine.name, self.conditions, key["num_rows"])
        if law is None or law(key["num_rows"]) <= self.conditions.limit:
            return False
        message = f"would take about {law(key['num_rows']):.0f} s"
        self._add({"key": key, "status": "stopped", "message": message, "limit": self.conditions.limit})
        return True

    def _write_reference(self, source: Source, num_rows: int) -> Path:
        path = self.scratch / f"reference-{num_rows}.npz"
        job = {"job": "reference", "source": vars(source), "num_rows": num_rows, "reference": str(path)}
        outcome = run_job({**job, "k": self.conditions.num_neighbors}, self.conditions.threads, _UNLIMITED)
        _require(outcome, f"The reference for {num_rows} rows of {self.workload.name}")
        return path

    def _measure(self, key: Mapping[str, Any], engine: Engine, shared: Mapping[str, Any], first: Run | None) -> None:
        """One run: of all settings in the first round, later of the best alone."""
        settings: Sequence[Mapping[str, Any]] = engine.settings
        efforts = list(engine.effort[1])
        if first is not None:
            settings = [first["best"]["setting"]]
            efforts = [first["best"]["effort"].get(engine.effort[0])]
        points: list[dict[str, Any]] = []
        outcome = Outcome()
        for setting in settings:
            reaching = [point["seconds"] for point in points if self._reached(point)]
            # A setting that has not reached the recall in the time of one that has cannot be cheaper.
            bound = min([self.conditions.limit, *reaching])
            job = {
                "job": "engine", "engine": engine.name, "k": self.conditions.num_neighbors, "setting": setting,
                "efforts": efforts, "min_recall": self.conditions.min_recall if first is None else 0, **shared,
            }  # fmt: skip
            outcome = run_job(job, self.conditions.threads, bound)
            points += [{"setting": dict(setting), **point} for point in outcome.events.get("point", [])]
            if outcome.status != "done" and not points:
                break
        run: Run = {"key": key, "status": "done", "points": points, "limit": self.conditions.limit}
        if points:
            reaching_points = [point for point in points if self._reached(point)]
            best = (
                min(reaching_points, key=lambda point: point["seconds"])
                if reaching_points
                else max(points, key=lambda point: point["recall"])
            )
            run |= {"best": best, "reached": self._reached(best)}
        else:
            run |= {"status": outcome.status, "message": outcome.message}
        self._add(run)

    def _reached(self, point: Mapping[str, Any]) -> bool:
        return point["recall"] is None or point["recall"] >= self.conditions.min_recall

    def _add(self, run: Run) -> None:
        self.log.add(run)
        key = run["key"]
        said = f"{run['best']['seconds']:.2f} s" if "best" in run else f"{run['status']}: {run['message']}"
        where = f"{self.workload.name}, {key['num_rows']} rows, round {key['repetition'] + 1}"
        logger.info("%s, %s: %s", where, key["engine"], said)


def _require(outcome: Outcome, what: str) -> None:
    if outcome.status != "done":
        raise BenchError(f"{what} could not be computed: {outcome.status}, {outcome.message}.")
