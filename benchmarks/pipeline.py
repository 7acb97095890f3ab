"""How long each stage takes on one dataset: building the graph, an epoch of each model, one full evaluation.

    python benchmarks/pipeline.py datasets/baby --data-dir path/to/baby --out benchmarks/results/pipeline-baby.json

Every figure is the minimum, median and maximum over repetitions in one process, after one that is not counted.
Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dream_pyg import DatasetConfig, RunConfig, build_store, evaluate
from dream_pyg.data.files import write_json
from dream_pyg.models import MODELS, Batch
from dream_pyg.training.run import make_model, prepare_graph
from dream_pyg.training.triplets import TripletSampler


def repeat(action: Callable[[], Any], repetitions: int) -> dict[str, float]:
    """Seconds of ``action``: minimum, median and maximum over repetitions, after one warm-up."""
    seconds = []
    for _ in range(repetitions + 1):
        started = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - started)
    counted = seconds[1:]
    return {"min": min(counted), "median": statistics.median(counted), "max": max(counted)}


def processor() -> str:
    """The processor's name, as Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def train_epoch(model: torch.nn.Module, graph: Any, sampler: TripletSampler, optimizer: torch.optim.Optimizer) -> None:
    """One epoch in batches of 2048, negative sampling included."""
    triplets = sampler.epoch(torch.Generator().manual_seed(0))
    for batch in zip(*(part.split(2048) for part in triplets), strict=True):
        loss = torch.stack(list(model.loss(graph, Batch(*batch)).values())).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


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
        "machine": {
            "processor": processor(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "date": time.strftime("%Y-%m-%d"),
        "repetitions": arguments.repetitions,
        "seconds": {},
    }
    with tempfile.TemporaryDirectory() as directory:
        store = Path(directory) / "graph"

        def build() -> None:
            build_store(config, store, data_dir=arguments.data_dir, overwrite=True)

        report["seconds"]["build-graph"] = repeat(build, arguments.repetitions)
        stored, _ = build_store(config, store, data_dir=arguments.data_dir)
        graph = prepare_graph(stored.graph, torch.device("cpu"))
        sampler = TripletSampler(graph)
        for name in arguments.models:
            # Overrides of [model] are meant for the first model, those of [training] for all.
            overrides = [o for o in arguments.overrides if name == arguments.models[0] or o.startswith("training.")]
            run = RunConfig.create(graph=store, model=name, overrides=overrides)
            torch.manual_seed(0)
            model = make_model(run, graph)
            assert isinstance(model, MODELS[name])
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
            report["seconds"][f"{name} epoch"] = repeat(
                lambda m=model, o=optimizer: train_epoch(m, graph, sampler, o), arguments.repetitions
            )
            with torch.no_grad():
                report["seconds"][f"{name} evaluation, all metrics"] = repeat(
                    lambda m=model: evaluate(m(graph), graph, "test"), arguments.repetitions
                )
    for stage, seconds in report["seconds"].items():
        print(f"{stage:<34}" + "  ".join(f"{key} {value:7.3f}" for key, value in seconds.items()))
    if arguments.out:
        write_json(arguments.out, report)
    else:
        print(json.dumps(report["machine"]))


if __name__ == "__main__":
    main()
