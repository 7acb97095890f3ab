"""How long each stage takes on one dataset: building the graph, an epoch of each model, one full evaluation.

    python benchmarks/pipeline.py datasets/baby --data-dir path/to/baby --out pipeline.json

Epochs and validations are what a training itself reports, checkpoints and early stopping included. Every figure is the
minimum, median and maximum over repetitions in one process, after one that is not counted.
Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dream_pyg import DatasetConfig, RunConfig, build_store, evaluate, load_run, train
from dream_pyg.bench.machine import describe_process
from dream_pyg.data.files import write_json


def repeat(action: Callable[[], Any], repetitions: int) -> dict[str, float]:
    """Seconds of ``action``: minimum, median and maximum over repetitions, after one warm-up."""
    seconds = []
    for _ in range(repetitions + 1):
        started = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - started)
    return summary(seconds[1:])


def summary(seconds: list[float]) -> dict[str, float]:
    """Minimum, median and maximum."""
    return {"min": min(seconds), "median": statistics.median(seconds), "max": max(seconds)}


def main() -> None:
    """Parse the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path, help="folder with a dataset.toml, or that file")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--features", action="append", default=[], metavar="MODALITY=FILE")
    parser.add_argument("--models", nargs="*", default=["dream", "lightgcn", "bpr"])
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()

    config = DatasetConfig.load(arguments.dataset)
    for assignment in arguments.features:
        modality, _, file = assignment.partition("=")
        config = config.with_modality(modality, features=file)
    report: dict[str, Any] = {
        "dataset": config.name,
        **describe_process(),
        "repetitions": arguments.repetitions,
        "seconds": {},
    }
    with tempfile.TemporaryDirectory() as directory:
        store = Path(directory) / "graph"

        def build() -> None:
            build_store(config, store, data_dir=arguments.data_dir, overwrite=True)

        report["seconds"]["build-graph"] = repeat(build, arguments.repetitions)
        epochs = arguments.repetitions + 1
        for name in arguments.models:
            # Overrides of [model] are meant for the first model, those of [training] for all.
            overrides = [o for o in arguments.overrides if name == arguments.models[0] or o.startswith("training.")]
            overrides += [f"training.epochs={epochs}", f"training.patience={epochs}"]
            result = train(RunConfig.create(graph=store, model=name, overrides=overrides), Path(directory) / name)
            lines = [json.loads(line) for line in (result.run / "metrics.jsonl").read_text().splitlines()][1:]
            for stage, key in ("epoch", "train_seconds"), ("validation", "evaluate_seconds"):
                report["seconds"][f"{name} {stage}"] = summary([line[key] for line in lines])
            run = load_run(result.run)
            report["seconds"][f"{name} test, all metrics"] = repeat(
                lambda run=run: evaluate(run.scorer(), run.graph, "test"), arguments.repetitions
            )
    for stage, seconds in report["seconds"].items():
        print(f"{stage:<34}" + "  ".join(f"{key} {value:7.3f}" for key, value in seconds.items()))
    if arguments.out:
        write_json(arguments.out, report)
    else:
        print(json.dumps(report["machine"]))


if __name__ == "__main__":
    main()
