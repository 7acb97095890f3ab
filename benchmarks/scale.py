"""Whether a catalogue that outgrows memory trains: time and memory of every stage, and triplets a second, as it grows.

    python benchmarks/scale.py 10000 100000 1000000 --out benchmarks/results/scale

For each number of items I: 2 I users, 20 I interactions with power laws on both sides, two modalities of 384 features
in float16. The stages are commands of the package, each a process of its own: `build-graph`, `train` on sampled graphs
for a number of steps after which it validates, `evaluate` on a sample of users, `export` with an approximate index.
What was measured already is not measured again, so an interrupted measurement goes on with the stage that it was in.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from dream_pyg.bench.machine import describe_machine, machine_in_words
from dream_pyg.bench.workloads import power_law_pairs
from dream_pyg.data.files import atomic_path, write_json, write_text
from dream_pyg.data.synthetic import make_clustered_features

MODALITIES = {"image": 1, "text": 2}
NUM_FEATURES = 384
HELD_OUT_USERS = 20_000
"""Users whose last item is for validation, and as many for test."""


def generate(directory: Path, num_items: int) -> None:
    """Write interactions, features and the description of the dataset."""
    directory.mkdir(parents=True, exist_ok=True)
    user, item = power_law_pairs(2 * num_items, num_items, 20 * num_items, seed=0)
    order = np.random.default_rng(0).permutation(len(user))
    split = np.full(len(user), "train")
    held_out = min(HELD_OUT_USERS, num_items // 5)
    split[order[:held_out]], split[order[held_out : 2 * held_out]] = "valid", "test"
    frame = pl.DataFrame({"user_id": user, "item_id": item, "split": split})
    with atomic_path(directory / "interactions.parquet") as temporary:
        frame.write_parquet(temporary)
    with atomic_path(directory / "items.parquet") as temporary:
        pl.DataFrame({"item_id": np.arange(num_items)}).write_parquet(temporary)
    for modality, seed in MODALITIES.items():
        path = directory / f"{modality}.npy"
        make_clustered_features(path, num_items, NUM_FEATURES, num_clusters=max(10, num_items // 100), seed=seed)
    sections = "".join(f'\n[modalities.{modality}]\nfeatures = "{modality}.npy"\n' for modality in MODALITIES)
    write_text(
        directory / "dataset.toml",
        f'name = "scale-{num_items}"\n[interactions]\npath = "interactions.parquet"\n[items]\npath = "items.parquet"\n'
        f'[split]\nmethod = "given"\n{sections}',
    )


def run_stage(arguments: list[str], log: Path) -> dict[str, float]:
    """Run a command of the package; its seconds and its peak resident memory, files that it maps included."""
    started = time.perf_counter()
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "dream_pyg", *arguments], stdout=stream, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(arguments)} failed; see {log}\n{log.read_text()[-2000:]}")
    return {"seconds": time.perf_counter() - started, "peak_gib": usage.ru_maxrss / 2**20}


def measure(directory: Path, num_items: int, options: argparse.Namespace) -> dict[str, Any]:
    """All stages of one size."""
    result_file = directory / f"result-{options.steps}.json"
    if not (directory / "dataset.toml").is_file():
        generate(directory, num_items)
    graph, run = directory / "graph", directory / f"run-{options.steps}"
    users = str(options.eval_users)
    stages = {
        "build-graph": [
            *("build-graph", str(directory), "-k", "10", "--out", str(graph), "--overwrite"),
            *(["--no-user-graphs"] if options.no_user_graphs else []),
        ],
        "train": [
            "train", str(graph), "--model", options.model, "--run", str(run), "--sampled",
            *(f"--set={value}" for value in (
                "training.epochs=2", f"training.epoch_steps={options.steps}", f"training.eval_users={users}",
                "training.learning_rate=0.003", f"training.num_threads={options.threads}",
                *(["model.use_user_graph=false"] if options.no_user_graphs else []), *options.overrides,
            )),
        ],
        "evaluate": ["evaluate", str(run), "--users", users],
        "export": ["export", str(run), "--out", str(directory / "shipped"), "--index", "ivf", "--overwrite"],
    }  # fmt: skip
    result: dict[str, Any] = {"items": num_items, "users": 2 * num_items, "interactions": 20 * num_items}
    if result_file.is_file():
        result = json.loads(result_file.read_text())
    for stage, arguments in stages.items():
        if stage not in result:
            if stage == "train":
                shutil.rmtree(run, ignore_errors=True)
            result[stage] = run_stage(arguments, directory / f"{stage}.log")
            write_json(result_file, result)
        print("{:>9,} {:<12} {seconds:.0f} s  {peak_gib:.1f} GiB".format(num_items, stage, **result[stage]))
    epochs = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # The first epoch reads the features from disk.
    result["triplets_per_second"] = [epoch["triplets_per_second"] for epoch in epochs]
    result["evaluate_seconds"] = [epoch["evaluate_seconds"] for epoch in epochs]
    result["export"] |= json.loads((directory / "shipped" / "export.json").read_text())["index"]
    write_json(result_file, result)
    return result


def main() -> None:
    """Parse the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("items", type=int, nargs="+", help="numbers of items")
    parser.add_argument("--work", type=Path, default=Path("scale"), help="where data, stores and runs go")
    parser.add_argument("--model", default="dream")
    parser.add_argument("--steps", type=int, default=200, help="steps of each of the two epochs")
    parser.add_argument("--eval-users", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--no-user-graphs", action="store_true", help="build no user-user graphs, and train without")
    parser.add_argument("--out", type=Path, help="directory for results.json and README.md")
    options = parser.parse_args()
    results = [measure(options.work / str(number), number, options) for number in sorted(options.items)]
    lines = [
        "| items | build-graph | train, triplets/s | train, peak | evaluate | evaluate, peak | IVF recall@20 |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for result in results:
        build, train, evaluation, export = (result[stage] for stage in ("build-graph", "train", "evaluate", "export"))
        lines.append(
            f"| {result['items']:,} | {build['seconds']:.0f} s, {build['peak_gib']:.1f} GiB "
            f"| {result['triplets_per_second'][-1]:,} | {train['peak_gib']:.1f} GiB | {evaluation['seconds']:.0f} s "
            f"| {evaluation['peak_gib']:.1f} GiB | {export['recall']:.3f} |"
        )
    print("\n".join(lines))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        machine = describe_machine()
        about = {"machine": machine, "options": {**vars(options), "work": None, "out": None}}
        write_json(options.out / "results.json", {**about, "results": results})
        graphs = "no user graphs" if options.no_user_graphs else "with user graphs"
        head = [
            "# Large catalogues",
            "",
            machine_in_words(machine, options.threads),
            f"{options.model}, {options.steps} steps of 2,048 triplets an epoch, of which the second counts; "
            f"{options.eval_users:,} users ranked; {graphs}.",
            "",
        ]
        write_text(options.out / "README.md", "\n".join([*head, *lines]) + "\n")


if __name__ == "__main__":
    main()
