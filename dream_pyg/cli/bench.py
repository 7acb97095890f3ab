"""``dream-pyg bench``."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from dream_pyg.bench.engines import ENGINES
from dream_pyg.bench.graph import Conditions, bench_graph
from dream_pyg.bench.report import write_report
from dream_pyg.bench.results import Result
from dream_pyg.bench.workloads import PRESETS, find_workload
from dream_pyg.cli.output import format_option, print_json, print_table

_EPILOG = """\b
Examples:
  dream-pyg bench graph --dataset baby
  dream-pyg bench graph --dataset image.npy --engine exact --engine faiss-flat -k 20 --out bench/image
"""

logger = logging.getLogger("dream_pyg")


@click.group(epilog=_EPILOG)
def bench() -> None:
    """Measure on this machine how fast graphs are built, against other packages."""


@bench.command("graph", epilog=_EPILOG)
@click.option(
    "--dataset",
    "datasets",
    multiple=True,
    default=("baby",),
    show_default=True,
    metavar="NAME|ROWSxDIM|FILE",
    help=f"What to search: {', '.join(PRESETS)}, a shape like 20000x384, or a .npy file. Repeatable.",
)
@click.option(
    "--engine",
    "engines",
    multiple=True,
    metavar="NAME",
    help=f"Which searches to compare; all unless given. Repeatable: {', '.join(ENGINES)}.",
)
@click.option("-k", "--num-neighbors", type=int, default=10, show_default=True, help="Neighbours of each row.")
@click.option("--threads", type=int, default=2, show_default=True, help="Threads of every engine.")
@click.option(
    "--repeats", type=int, default=3, show_default=True, help="Searches of all rows, each in a fresh process."
)
@click.option(
    "--limit",
    type=float,
    default=300,
    show_default=True,
    metavar="SECONDS",
    help="Stop a run after so long, and extrapolate from fewer rows.",
)
@click.option(
    "--min-recall",
    type=float,
    default=0.98,
    show_default=True,
    help="Compare approximate engines at their cheapest setting with this recall.",
)
@click.option(
    "--steps", type=int, default=3, show_default=True, help="How often to halve the rows to see how cost grows."
)
@click.option(
    "--distribution",
    type=click.Choice(["clustered", "gaussian"]),
    default="clustered",
    show_default=True,
    help="Of generated features.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of generated features.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("bench"),
    show_default=True,
    help="Directory of runs.jsonl, report.md and plots; runs that are there already are not repeated.",
)
@format_option
def graph(
    datasets: tuple[str, ...],
    engines: tuple[str, ...],
    out: Path,
    output_format: str,
    distribution: Any,
    seed: int,
    **conditions: Any,
) -> None:
    """Time how long engines take to find every row's nearest neighbours by cosine.

    Every run is a process of its own; engines take turns. Reports seconds, recall, memory, GFLOP/s against the
    machine's own rate, and the exponent with which cost grows. Run it on a machine that does nothing else.
    """
    shared = Conditions(**conditions)
    workloads = [find_workload(name, distribution=distribution, seed=seed) for name in dict.fromkeys(datasets)]
    names = list(dict.fromkeys(engines)) or list(ENGINES)
    log = bench_graph(workloads, names, out, shared)
    results, written = write_report(log, workloads, names, shared, out)
    if output_format == "json":
        print_json([asdict(result) for result in results])
    else:
        print_table([_row(result) for result in results])
    for path in written:
        logger.info("wrote %s", path)


def _row(result: Result) -> dict[str, Any]:
    """A line of the table; empty where there is nothing to say."""
    return {
        "dataset": result.workload,
        "rows": result.num_rows,
        "engine": result.engine,
        "status": result.status,
        "recall": "" if result.recall is None else f"{result.recall:.4f}",
        "seconds": f"{result.seconds[len(result.seconds) // 2]:.3f}" if result.seconds else "",
        "GFLOP/s": "" if result.gflops is None else f"{result.gflops:.0f}",
        "extra MB": "" if result.extra_bytes is None else f"{result.extra_bytes / 1e6:,.0f}",
        "exponent": "" if result.exponent is None else f"{result.exponent:.2f}",
        "with": result.setting or result.message,
    }
