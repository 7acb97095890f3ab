"""An epoch of training and a validation at the shapes of Baby, Sports and Clothing, on a GPU if there is one.

    python benchmarks/epoch.py --out benchmarks/results/epoch-h200.json

Data of the published numbers of users, items and interactions, with power-law activity and popularity, images of 4,096
and texts of 384 features, 10 neighbours searched in them. Every model is trained as `dream-pyg train` does it, for one
epoch that is not counted and some that are; beside them is the body of the loop in PyG's own example for LightGCN. With
``--profile`` it lists what a step of DREAM spends its time on instead.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch.profiler import ProfilerActivity, profile
from train_step import batches_of, held_out_pairs, our_step, pyg_step

from dream_pyg import DREAM, Batch, DatasetConfig, RunConfig, build_store, load_graph, train
from dream_pyg.bench.machine import describe_process
from dream_pyg.bench.workloads import find_workload, power_law_pairs
from dream_pyg.data.files import write_json, write_text
from dream_pyg.graph.processor import processor_name, resolve_device
from dream_pyg.training.model import prepare_graph
from dream_pyg.training.triplets import TripletSampler

SHAPES = {
    "baby": (19_445, 7_050, 160_792),
    "sports": (35_598, 18_357, 296_337),
    "clothing": (39_387, 23_033, 278_677),
}
"""Users, items and interactions of each data set (DREAM, Table 1)."""
MODELS = ("dream", "lightgcn", "bpr", "vbpr", "bm3", "freedom", "mgcn", "dualgnn")


def make_store(name: str, directory: Path, device: str) -> float:
    """Write the data and its graph below ``directory``; the seconds that the graph took."""
    num_users, num_items, num_pairs = SHAPES[name]
    data = directory / "data"
    data.mkdir()
    user, item = power_law_pairs(num_users, num_items, num_pairs, seed=0, item_exponent=0.5)
    held_out = held_out_pairs(user, num_pairs // 5)
    split = np.full(num_pairs, "train")
    split[held_out[::2]], split[held_out[1::2]] = "valid", "test"
    pl.DataFrame({"user_id": user, "item_id": item, "split": split}).write_parquet(data / "interactions.parquet")
    pl.DataFrame({"item_id": np.arange(num_items)}).write_parquet(data / "items.parquet")
    sections = ""
    for seed, (modality, preset) in enumerate({"image": name, "text": f"{name}-text"}.items()):
        source = find_workload(preset, seed=seed).write(directory)
        shutil.move(source.features, data / f"{modality}.npy")
        sections += f'\n[modalities.{modality}]\nfeatures = "{modality}.npy"\n'
    write_text(
        data / "dataset.toml",
        f'name = "{name}-shape"\n[interactions]\npath = "interactions.parquet"\n[items]\npath = "items.parquet"\n'
        f'[split]\nmethod = "given"\n{sections}',
    )
    started = time.perf_counter()
    build_store(DatasetConfig.load(data), directory / "graph", num_neighbors=10, device=device)
    return time.perf_counter() - started


def measure_model(graph: Path, model: str, run: Path, device: str, epochs: int, options: list[str]) -> dict[str, Any]:
    """Seconds of an epoch and of a validation, and the most memory of the GPU."""
    on_gpu = resolve_device(device).type == "cuda"
    config = RunConfig.create(
        graph=graph,
        model=model,
        overrides=[
            f"training.device={device}",
            f"training.epochs={epochs + 1}",
            "training.checkpoint_every=99",
            *options,
        ],
    )
    train(config, run, test=False)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(run)
    return {
        "epoch_seconds": statistics.median(line["train_seconds"] for line in lines[1:]),
        "validation_seconds": statistics.median(line["evaluate_seconds"] for line in lines[1:]),
        "triplets_per_second": statistics.median(line["triplets_per_second"] for line in lines[1:]),
        "gpu_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0,
    }


def measure_pyg(path: Path, device: str, epochs: int) -> dict[str, Any]:
    """The same for PyG's LightGCN, without validation."""
    graph = prepare_graph(load_graph(path).graph, resolve_device(device))
    on_gpu = resolve_device(device).type == "cuda"
    with torch.device(device):
        step = pyg_step(graph, 2)
    seconds = []
    for epoch in range(epochs + 1):
        started = time.perf_counter()
        for batch in batches_of(graph, epoch):
            step(Batch(*(part.to(device) for part in batch)))
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return {
        "epoch_seconds": statistics.median(seconds[1:]),
        "triplets_per_second": len(TripletSampler(graph)) / statistics.median(seconds[1:]),
        "gpu_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0,
    }


def in_a_process(measure: Callable[..., dict[str, Any]], *given: Any) -> dict[str, Any]:
    """What is measured in a process of its own, where no library holds what it needed for another model."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(measure, *given).result()


def print_profile(path: Path, device: str) -> None:
    """Where a step of DREAM spends its time, by operation."""
    graph = prepare_graph(load_graph(path).graph, resolve_device(device))
    torch.manual_seed(0)
    model = DREAM(graph).to(device)
    step = our_step(model, graph)
    batches = [Batch(*(part.to(device) for part in batch)) for batch in batches_of(graph)[:-1]]
    for batch in batches[:10]:
        step(batch)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for batch in batches[10:20]:
            step(batch)
        if device != "cpu":
            torch.cuda.synchronize()
    averages = profiler.key_averages()
    print(averages.table(sort_by="self_cuda_time_total", row_limit=28, max_name_column_width=60))
    print(averages.table(sort_by="self_cpu_time_total", row_limit=28, max_name_column_width=60))


def main() -> None:
    """Parse the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", default=list(SHAPES), metavar="SHAPE", help=", ".join(SHAPES))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--model", dest="models", action="append", metavar="NAME", help=f"default: {', '.join(MODELS)}")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = str(resolve_device(options.device))
    results: dict[str, Any] = {}
    for shape in options.shapes:
        with tempfile.TemporaryDirectory() as directory:
            graph = Path(directory) / "graph"
            seconds = make_store(shape, Path(directory), device)
            print(f"\n{shape}: graph built in {seconds:.1f} s on {device}")
            if options.profile:
                print_profile(graph, device)
                continue
            print(
                "| model | epoch, s | validation, s | triplets/s | GPU memory, GiB |\n|---|---:|---:|---:|---:|",
                flush=True,
            )
            rows = {"build_seconds": seconds}
            for name in [*(options.models or MODELS), "PyG LightGCN"]:
                if name == "PyG LightGCN":
                    row = in_a_process(measure_pyg, graph, device, options.epochs)
                else:
                    run = Path(directory) / "run"
                    row = in_a_process(measure_model, graph, name, run, device, options.epochs, options.overrides)
                rows[name] = row
                print(
                    f"| {name} | {row['epoch_seconds']:.3f} | {row.get('validation_seconds', float('nan')):.3f} "
                    f"| {row['triplets_per_second']:,.0f} | {row['gpu_gib']:.2f} |",
                    flush=True,
                )
            results[shape] = rows
        if options.out:
            about = {**describe_process(), "device": processor_name(torch.device(device))}
            write_json(options.out, {**about, "options": {**vars(options), "out": None}, "shapes": results})


if __name__ == "__main__":
    main()
