"""What the runs of one engine on one number of rows amount to."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dream_pyg.bench.engines import ENGINES
from dream_pyg.bench.graph import Conditions, growth, sizes
from dream_pyg.bench.runs import Run, RunLog
from dream_pyg.bench.workloads import Workload


@dataclass(frozen=True)
class Result:
    """What one engine did with one number of rows.

    Attributes:
        workload: The name of what was searched.
        num_rows: N.
        num_features: F.
        engine: Its name.
        status: ``done``, ``below recall``, ``extrapolated``, ``stopped``, ``not installed``, ``out of memory`` or
            ``failed``.
        message: Why not ``done``.
        setting: The setting and the effort that were chosen.
        recall: Of K neighbours, on a sample of rows.
        seconds: Minimum, median and maximum over repetitions; one number if extrapolated.
        peak_bytes: The most memory resident, the greatest over repetitions.
        extra_bytes: Of it what was not there before the search.
        gflops: What computing all N x N products in the time would take; of exact engines only.
        gemm_share: That rate over the machine's own for products of the same type.
        exponent: With which the cost grows, over the largest sizes measured.
        num_sizes: How many these were.
    """

    workload: str
    num_rows: int
    num_features: int
    engine: str
    status: str
    message: str = ""
    setting: str = ""
    recall: float | None = None
    seconds: tuple[float, ...] = ()
    peak_bytes: int | None = None
    extra_bytes: int | None = None
    gflops: float | None = None
    gemm_share: float | None = None
    exponent: float | None = None
    num_sizes: int = 0


def summarize(
    log: RunLog, workloads: Sequence[Workload], engines: Sequence[str], conditions: Conditions
) -> list[Result]:
    """A result for every workload, number of rows and engine that was asked for."""
    rates = gemm_rates(log, conditions.threads)
    return [
        _summarize_one(log, workload, num_rows, engine, conditions, rates)
        for workload in workloads
        for num_rows in sizes(workload, conditions)
        for engine in engines
    ]


def gemm_rates(log: RunLog, threads: int) -> dict[str, float]:
    """The machine's rates in GFLOP/s by type."""
    found = [run for run in log.runs if run["key"]["engine"] == "gemm" and run["key"]["threads"] == threads]
    return dict(found[-1]["gflops"]) if found else {}


def _summarize_one(
    log: RunLog,
    workload: Workload,
    num_rows: int,
    engine: str,
    conditions: Conditions,
    rates: Mapping[str, float],
) -> Result:
    keys = [conditions.key(workload, num_rows, engine, repetition) for repetition in range(conditions.repeats)]
    runs = [run for key in keys if (run := log.find(key)) is not None]
    shape = (workload.name, num_rows, workload.num_features, engine)
    law = growth(log, workload, engine, conditions, workload.num_rows + 1)
    trend: dict[str, Any] = {} if law is None else {"exponent": law.exponent, "num_sizes": law.num_sizes}
    done = [run for run in runs if run["status"] == "done"]
    if not done:
        run = runs[0] if runs else {"status": "not run", "message": ""}
        below = growth(log, workload, engine, conditions, num_rows)
        if run["status"] == "stopped" and below is not None:
            message = f"{run['message']}, from {below.num_sizes} sizes"
            return Result(*shape, "extrapolated", message, seconds=(below(num_rows),), **trend)
        return Result(*shape, run["status"], run["message"], **trend)
    seconds = [run["best"]["seconds"] for run in done]
    median = statistics.median(seconds)
    best = done[0]["best"]
    recalls = [run["best"]["recall"] for run in done if run["best"]["recall"] is not None]
    gflops = 2e-9 * num_rows**2 * workload.num_features / median
    multiplies = ENGINES[engine].multiplies
    rate = max(rates.values(), default=None) if multiplies == "best" else rates.get(multiplies)
    exact = ENGINES[engine].kind != "approximate"
    return Result(
        *shape,
        status="done" if done[0]["reached"] else "below recall",
        setting=", ".join(f"{name} {value}" for name, value in {**best["setting"], **best["effort"]}.items()),
        recall=statistics.fmean(recalls) if recalls else None,
        seconds=(min(seconds), median, max(seconds)),
        peak_bytes=max(run["best"]["peak_bytes"] for run in done),
        extra_bytes=max(run["best"]["extra_bytes"] for run in done),
        gflops=gflops if exact else None,
        gemm_share=gflops / rate if exact and rate else None,
        **trend,
    )


def points(log: RunLog, workload: Workload, num_rows: int, engine: str, conditions: Conditions) -> list[Run]:
    """Everything that was tried in the first round: points with their recall and seconds."""
    run = log.find(conditions.key(workload, num_rows, engine, 0))
    return [] if run is None else [point for point in run.get("points", []) if point["recall"] is not None]
