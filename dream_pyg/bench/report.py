"""Results as Markdown and plots."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path

from dream_pyg.bench.graph import Conditions
from dream_pyg.bench.machine import machine_in_words
from dream_pyg.bench.plots import plot_workload
from dream_pyg.bench.results import Result, gemm_rates, summarize
from dream_pyg.bench.runs import RunLog
from dream_pyg.bench.workloads import Workload
from dream_pyg.data.files import write_text

logger = logging.getLogger("dream_pyg")


def to_markdown(log: RunLog, workloads: Sequence[Workload], results: Sequence[Result], conditions: Conditions) -> str:
    """The machine, the conditions, and a table for each workload and number of rows."""
    rates = ", ".join(f"{rate:.0f} {name}" for name, rate in gemm_rates(log, conditions.threads).items())
    recall = f"recall@{conditions.num_neighbors}"
    repetitions = "one repetition" if conditions.repeats == 1 else f"{conditions.repeats} repetitions"
    limits = sorted({f"{run['limit']:g}" for run in log.runs if "limit" in run}, key=float)
    lines = [
        "# All-kNN construction",
        "",
        machine_in_words(log.machine, conditions.threads),
        f"Products of two {'{0} x {0}'.format(_gemm_size(log))} matrices: {rates} GFLOP/s.",
        "",
        f"K = {conditions.num_neighbors} by cosine, {repetitions} in fresh processes, taking turns; "
        f"approximate engines at their cheapest setting with {recall} of at least {conditions.min_recall:g}; a limit "
        f"of {' or '.join(limits) or f'{conditions.limit:g}'} s a run.",
        "GFLOP/s count all 2 N² F of the full product, of which a symmetric search computes half; the share is that of "
        "the machine's own rate. Extra memory is what was not resident before the search. ~ marks what was "
        "extrapolated from smaller sizes.",
        "Features: " + "; ".join(f"{workload.name} {_origin(workload)}" for workload in workloads) + ".",
    ]
    header = ("engine", "setting", recall, "seconds: min", "median", "max", "GFLOP/s", "of GEMM", "extra MB", "peak MB",
              "exponent")  # fmt: skip
    places = dict.fromkeys((result.workload, result.num_rows, result.num_features) for result in results)
    for workload, num_rows, num_features in places:
        lines += ["", f"## {workload}: {num_rows:,} x {num_features:,}", ""]
        lines += [_line(header), _line(["---"] * 2 + ["---:"] * (len(header) - 2))]
        here = [result for result in results if (result.workload, result.num_rows) == (workload, num_rows)]
        lines += [_line(_cells(result)) for result in sorted(here, key=_by_time)]
    return "\n".join(lines) + "\n"


def _origin(workload: Workload) -> str:
    return "from a file" if workload.path else f"generated, {workload.origin}"


def _gemm_size(log: RunLog) -> int:
    return int(next(run["key"]["size"] for run in log.runs if run["key"]["engine"] == "gemm"))


def _by_time(result: Result) -> float:
    return result.seconds[len(result.seconds) // 2] if result.seconds else float("inf")


def _cells(result: Result) -> list[str]:
    seconds = [f"{value:.3g}" if value < 100 else f"{value:.0f}" for value in result.seconds]
    if not seconds:
        said = f"{result.status}: {result.message}" if result.message else result.status
        return [result.engine, said, *[""] * 9]
    if len(seconds) == 1:
        seconds = ["", f"~{seconds[0]}", ""]
    setting = result.setting if result.status != "extrapolated" else result.message
    if result.status == "below recall":
        setting += " (below the wanted recall)"
    return [
        result.engine, setting, _number(result.recall, ".4f"), *seconds, _number(result.gflops, ".0f"),
        _number(result.gemm_share, ".0%"), _number(_mega(result.extra_bytes), ",.0f"),
        _number(_mega(result.peak_bytes), ",.0f"), _number(result.exponent, ".2f"),
    ]  # fmt: skip


def _mega(value: int | None) -> float | None:
    return None if value is None else value / 1e6


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def write_report(
    log: RunLog, workloads: Sequence[Workload], engines: Sequence[str], conditions: Conditions, out: Path
) -> tuple[list[Result], list[Path]]:
    """Write ``report.md``, and the plots where matplotlib is installed.

    Returns:
        The results, and the files that were written.
    """
    results = summarize(log, workloads, engines, conditions)
    report = out / "report.md"
    write_text(report, to_markdown(log, workloads, results, conditions))
    if importlib.util.find_spec("matplotlib") is None:
        logger.warning("matplotlib is not installed, so there are no plots. Install dream-pyg[bench] to get them.")
        return results, [report]
    return results, [report] + [
        path for workload in workloads for path in plot_workload(log, results, workload, conditions, out)
    ]
