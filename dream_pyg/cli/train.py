"""``dream-pyg train`` and ``dream-pyg evaluate``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click

from dream_pyg import ranks
from dream_pyg.analysis.tune import search_run
from dream_pyg.cli.output import format_option, print_json, print_table
from dream_pyg.config import SEED, RunConfig, override_key
from dream_pyg.errors import ConfigError
from dream_pyg.graph.store import load_graph
from dream_pyg.training.preparation import check_splits
from dream_pyg.training.run import RunPaths, evaluate_lines, load_run
from dream_pyg.training.trainer import train as train_run

_BUDGET = 30.0
"""Minutes of a search."""
_TRAIN_EPILOG = """\b
Examples:
  dream-pyg train graphs/baby --model dream --run runs/dream --set training.seed=1
  dream-pyg train graphs/baby --model dream --run runs/tuned --preset baby
  dream-pyg train graphs/mine --model dream --run runs/mine --preset auto --budget 20
  dream-pyg train --resume --run runs/dream
"""
_EVALUATE_EPILOG = """\b
Example:
  dream-pyg evaluate runs/dream --split test -k 20 --format json
"""


@click.command(epilog=_TRAIN_EPILOG)
@click.argument("graph", required=False, type=click.Path(path_type=Path))
@click.option(
    "--run", "--out", "run", required=True, type=click.Path(path_type=Path),
    help="Directory of the run to write. Under torchrun say --out: it takes --run for an option of its own.",
)  # fmt: skip
@click.option("--model", help="Model to train; see `dream-pyg models`.")
@click.option(
    "--config", "file", type=click.Path(path_type=Path), help="A TOML file with graph, [model] and [training]."
)
@click.option("--preset", metavar="NAME|FILE", help="Ready values; see `dream-pyg models`. auto finds some.")
@click.option(
    "--budget", type=click.FloatRange(min=0), metavar="MINUTES",
    help=f"With --preset auto: after this time, no further trial begins.  [default: {_BUDGET:g}]",
)  # fmt: skip
@click.option("--num-neighbors", type=int, help="Neighbours of each node to train with; by default all of GRAPH's.")
@click.option(
    "--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Override one value; none for its default."
)
@click.option("--seed", type=int, help="Short for --set training.seed=N.")
@click.option("--epochs", type=int, help="Short for --set training.epochs=N.")
@click.option("--patience", type=int, help="Short for --set training.patience=N.")
@click.option("--device", help="Short for --set training.device=NAME: auto, cpu, cuda, cuda:1.")
@click.option(
    "--sampled", is_flag=True, help="Train on sampled neighbourhoods, for large catalogues: --set training.sampling={}."
)
@click.option("--no-test", is_flag=True, help="Do not read the test split; a later --resume does.")
@click.option("--resume", is_flag=True, help="Continue the run that is there.")
@format_option
def train(
    graph: Path | None,
    run: Path,
    model: str | None,
    file: Path | None,
    preset: str | None,
    budget: float | None,
    num_neighbors: int | None,
    overrides: tuple[str, ...],
    seed: int | None,
    epochs: int | None,
    patience: int | None,
    device: str | None,
    sampled: bool,
    no_test: bool,
    resume: bool,
    output_format: str,
) -> None:
    """Train a model on a GRAPH store, stop early on validation, and evaluate its best epoch on test once.

    Values come from the defaults, then --preset, then --config, then --set: the later, the stronger. With --preset auto
    a study on validation finds them first, beside the run in RUN.study (needs the extra `dream-pyg[tune]`).
    """
    if budget is not None and preset != "auto":
        raise ConfigError("--budget is for --preset auto. Leave it out, or add that.")
    short = {
        "training.seed": seed,
        "training.epochs": epochs,
        "training.patience": patience,
        "training.device": device,
        "num_neighbors": num_neighbors,
    }
    _check_given_once(short, overrides)
    if sampled:
        if any(override.partition("=")[::2] == ("training.sampling", "none") for override in overrides):
            raise ConfigError("--sampled and --set training.sampling=none say different things. Leave one out.")
        overrides = ("training.sampling={}", *overrides)
    overrides = (*overrides, *(f"{key}={value}" for key, value in short.items() if value is not None))

    def configure() -> tuple[RunConfig, bool]:
        """The configuration, and whether it is that of a run which is there and goes on."""
        config = RunPaths(run).config
        if resume and file is None:
            RunPaths(run).check_resumable()
        if preset == "auto" and not resume:
            minutes = _BUDGET if budget is None else budget
            return _tuned(graph, model, file, run, overrides, minutes, test=not no_test)
        source, on, what = file, graph, model
        if resume and file is None:
            if preset in (None, "auto"):
                source = config
            else:  # What the preset says is then compared with what the run was begun with.
                begun = RunConfig.load(config)
                on, what = graph or Path(begun.graph), model or begun.model_name
        created = RunConfig.create(
            file=source,
            graph=on,
            model=what,
            preset=None if preset == "auto" else preset,
            overrides=overrides,
        )
        return created, resume

    with ranks.joined():
        config, goes_on = ranks.together(configure)
        result = train_run(config, run, resume=goes_on, test=not no_test)
    if not ranks.speaks():
        return
    if output_format == "json":
        print_json({**result._asdict(), "run": str(result.run)})
    else:
        figures = {"valid": result.valid_metrics} | ({} if no_test else {"test": result.test_metrics})
        print_table([{"split": split, **_at(metrics, 20)} for split, metrics in figures.items()])
        click.echo(f"best epoch {result.best_epoch} of {result.epochs}; everything is in {result.run}")


def _check_given_once(short: Mapping[str, Any], overrides: Iterable[str]) -> None:
    """Refuse a value of an option beside another of the ``--set`` that it is short for."""
    for override in overrides:
        key, _, text = override.partition("=")
        value = short.get(key.strip())
        if value is not None and text.strip().strip("\"'") != str(value):
            option = key.strip().removeprefix("training.").replace("_", "-")
            raise ConfigError(f"--{option} {value} and --set {override} say different things. Leave one out.")


def _tuned(
    graph: Path | None,
    model: str | None,
    file: Path | None,
    run: Path,
    overrides: tuple[str, ...],
    budget: float,
    *,
    test: bool,
) -> tuple[RunConfig, bool]:
    """What --preset auto stands for, and whether the search left the run of its best trial at RUN."""
    if graph is None or model is None or file is not None:
        raise ConfigError("--preset auto needs GRAPH and --model, and no --config. Give other values with --set.")
    if ranks.num_ranks() > 1:
        raise ConfigError(
            "--preset auto works in one process. Start it without torchrun, then train with RUN's values."
        )
    RunPaths(run).check_absent()
    check_splits(load_graph(graph, verify=False).graph, test=test)
    seed = RunConfig.create(graph=graph, model=model, overrides=overrides).training.seed
    overrides = tuple(override for override in overrides if override_key(override) != SEED)
    study = run.with_name(f"{run.name}.study")
    return search_run(model, graph, study, run, timeout=60 * budget, seed=seed, overrides=overrides)


@click.command(epilog=_EVALUATE_EPILOG)
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--split", default="test", show_default=True, help="train, valid or test.")
@click.option(
    "-k", "ks", type=int, multiple=True, default=(10, 20), show_default=True, help="Cut-off; repeat for more."
)
@click.option(
    "--mask-valid", is_flag=True, help="Leave validation items out of the test ranking (published tables do not)."
)
@click.option("--users", "num_users", type=click.IntRange(min=1), help="Rank for so many users, drawn at random.")
@click.option("--graph", type=click.Path(path_type=Path), help="The graph store, if it has moved since training.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1.")
@format_option
def evaluate(
    run: Path,
    split: str,
    ks: tuple[int, ...],
    mask_valid: bool,
    num_users: int | None,
    graph: Path | None,
    device: str,
    output_format: str,
) -> None:
    """Rank the whole catalogue with a RUN's best epoch: the model, and each of its lines alone where it has two."""
    if mask_valid and split != "test":
        raise ConfigError(f"--mask-valid is for the test split, and this is {split!r}. Leave it out.")
    opened = load_run(run, device=device, graph=graph)
    lines = evaluate_lines(opened, split, ks=ks, mask_valid=mask_valid, num_users=num_users)
    if output_format == "json":
        print_json({"run": str(run), "split": split, "mask_valid": mask_valid, "lines": lines})
    else:
        print_table([{"representation": name, **metrics} for name, metrics in lines.items()])


def _at(metrics: dict[str, float], k: int) -> dict[str, float]:
    return {name: metrics[name] for name in (f"recall@{k}", f"ndcg@{k}") if name in metrics}
