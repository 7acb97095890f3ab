"""All-kNN construction on the shapes of the published data sets: every engine, at matched recall.

    python benchmarks/knn_items.py                       # Baby by images and texts
    python benchmarks/knn_items.py sports clothing electronics --repeats 1 --steps 3 --out benchmarks/results/knn-large

Writes ``runs.jsonl``, ``report.md`` and plots below ``benchmarks/results/knn-items``; what is there is not measured
again. Needs ``pip install .[bench]`` and a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from dream_pyg.bench.engines import ENGINES
from dream_pyg.bench.graph import Conditions, bench_graph
from dream_pyg.bench.report import write_report
from dream_pyg.bench.workloads import find_workload

RESULTS = Path(__file__).parent / "results"


def measure(description: str | None, name: str, datasets: Sequence[str], engines: Sequence[str], steps: int) -> None:
    """Parse the command line, measure, and write the report."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("datasets", nargs="*", default=datasets)
    parser.add_argument("--engine", dest="engines", action="append")
    parser.add_argument("--distribution", choices=["clustered", "gaussian"], default="clustered")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=60)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--out", type=Path, default=RESULTS / name)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    conditions = Conditions(threads=options.threads, repeats=options.repeats, limit=options.limit, steps=options.steps)
    workloads = [find_workload(dataset, distribution=options.distribution) for dataset in options.datasets]
    chosen = options.engines or list(engines)
    log = bench_graph(workloads, chosen, options.out, conditions)
    write_report(log, workloads, chosen, conditions, options.out)


if __name__ == "__main__":
    measure(__doc__, "knn-items", ("baby", "baby-text"), list(ENGINES), steps=1)
