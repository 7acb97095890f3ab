"""``dream-pyg demo``: the whole path on a synthetic catalogue, by the commands a user would type."""

from __future__ import annotations

import logging
import shlex
import statistics
import time
from pathlib import Path

import click
import polars as pl

from dream_pyg.cli.graph import build_graph
from dream_pyg.cli.output import print_table
from dream_pyg.cli.serve import recommend
from dream_pyg.cli.train import train
from dream_pyg.data.files import is_free, read_json
from dream_pyg.data.synthetic import make_synthetic
from dream_pyg.errors import StoreError
from dream_pyg.training.run import RunPaths

COMPARED = ("dream", "lightgcn", "bpr", "popularity")
METRICS = ("recall@10", "recall@20", "ndcg@20")
_TRAINING = ("training.learning_rate=0.005", "training.patience=10", "training.batch_size=1024")


@click.command(epilog="\b\nExample:\n  dream-pyg demo --out demo --seeds 1")
@click.option("--out", type=click.Path(path_type=Path), default=Path("demo"), show_default=True,
              help="Directory for data, graphs and runs.")  # fmt: skip
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="Catalogues and trainings.")
def demo(out: Path, seeds: int) -> None:
    """Make a synthetic bookshop, build its graph, train DREAM and three baselines, compare, and recommend.

    Every seed is another catalogue, another split and another initialisation, so that the comparison shows the
    planted structure and not chance.
    """
    if not is_free(out):
        raise StoreError(f"{out} exists already. Remove it, or choose another directory with --out.")
    started = time.perf_counter()
    logging.getLogger("dream_pyg").setLevel(logging.WARNING)  # a line an epoch would bury the results
    results: dict[str, dict[str, list[float]]] = {model: {metric: [] for metric in METRICS} for model in COMPARED}
    for seed in range(seeds):
        data, graph = out / f"data-{seed}", out / f"graph-{seed}"
        make_synthetic(data, seed=seed)
        _run(build_graph, str(data), "--out", str(graph))
        for model in COMPARED:
            run = out / f"{model}-{seed}"
            sets = [part for value in _TRAINING for part in ("--set", value)]
            _run(train, str(graph), "--model", model, "--run", str(run), "--seed", str(seed), *sets)
            general = read_json(RunPaths(run).test_metrics)["lines"]["general"]
            for metric in METRICS:
                results[model][metric].append(general[metric])
    spread = f", mean ± standard deviation over {seeds} catalogues" if seeds > 1 else ""
    click.echo(f"\nTest metrics{spread}:\n")
    print_table([{"model": model} | {m: _spread(v) for m, v in values.items()} for model, values in results.items()])
    click.echo("\nFive readers, what they bought, and what DREAM recommends them:\n")
    _examples(out)
    click.echo(f"\nDone in {time.perf_counter() - started:.0f} s; everything is in {out}.")


def _run(command: click.Command, *arguments: str) -> None:
    click.secho(f"\n$ dream-pyg {command.name} {shlex.join(arguments)}", bold=True)
    # The parent's settings count too: click remembers with a command which help options it was first run with.
    parent = click.get_current_context().parent
    command.main(args=list(arguments), prog_name=str(command.name), standalone_mode=False, parent=parent)


def _examples(out: Path) -> None:
    bought = pl.read_csv(out / "data-0" / "interactions.csv")
    users = bought["user_id"].unique().sort().head(5).to_list()
    for user in users:
        items = bought.filter(pl.col("user_id") == user)["item_id"].to_list()
        click.echo(f"{user} bought {', '.join(items)}")
    _run(recommend, str(out / "dream-0"), *(part for user in users for part in ("--user", user)), "-k", "3")


def _spread(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{deviation}"
