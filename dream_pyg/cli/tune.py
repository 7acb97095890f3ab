"""``dream-pyg tune``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dream_pyg.analysis.tune import BEST
from dream_pyg.analysis.tune import tune as run_study
from dream_pyg.cli.output import format_option, print_json, print_table
from dream_pyg.graph.store import read_info

_EPILOG = """\b
Examples:
  dream-pyg tune dream graphs/baby --trials 40 --epochs 60 --patience 10 --out studies/dream-baby
  dream-pyg train graphs/baby --model dream --preset studies/dream-baby/best.toml --run runs/dream
"""


@click.command(epilog=_EPILOG)
@click.argument("model")
@click.argument("graph", type=click.Path(path_type=Path))
@click.option(
    "--trials",
    type=click.IntRange(min=1),
    default=20,
    show_default=True,
    help="Trials in all; a study that has fewer is continued.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="Directory of the study.  [default: studies/MODEL-DATASET]"
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the search and of every training.")
@click.option("--preset", metavar="NAME|FILE", help="Values where the search begins, instead of the defaults.")
@click.option("--epochs", type=int, help="Short for --set training.epochs=N.")
@click.option("--patience", type=int, help="Short for --set training.patience=N.")
@click.option("--device", help="Short for --set training.device=NAME: auto, cpu, cuda, cuda:1.")
@click.option("--timeout", type=click.FloatRange(min=0), metavar="SECONDS", help="Begin no trial after this time.")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="SECTION.KEY=VALUE",
    help="A value for all trials, which is then not searched.",
)
@format_option
def tune(
    model: str,
    graph: Path,
    trials: int,
    out: Path | None,
    seed: int,
    preset: str | None,
    epochs: int | None,
    patience: int | None,
    device: str | None,
    timeout: float | None,
    overrides: tuple[str, ...],
    output_format: str,
) -> None:
    """Search the hyper-parameters of a MODEL on a GRAPH store by validation, then test the best once.

    The first trial is the default configuration, or --preset's. A study that was interrupted goes on with the same
    command. It leaves a table of trials and `best.toml`, a preset for `train`. Needs the extra `dream-pyg[tune]`.
    """
    short = {"epochs": epochs, "patience": patience, "device": device}
    overrides = (*overrides, *(f"training.{key}={value}" for key, value in short.items() if value is not None))
    result = run_study(
        model,
        graph,
        out or Path("studies") / f"{model}-{read_info(graph)['dataset']}",
        num_trials=trials,
        seed=seed,
        overrides=overrides,
        preset=preset,
        timeout=timeout,
    )
    if output_format == "json":
        listed = [trial._asdict() for trial in result.trials]
        print_json({**result._asdict(), "path": str(result.path), "trials": listed, "best": result.best._asdict()})
        return
    print_table([_row(trial._asdict(), result.metric) for trial in result.trials])
    test = "".join(f", test {name} {result.test_metrics[name]:.4f}" for name in (result.metric,) if result.test_metrics)
    click.echo(f"best: trial {result.best.number}, validation {result.metric} {result.best.value:.4f}{test}")
    if not result.test_metrics:
        click.echo(f"{len(result.trials)} of {trials} trials are done; continue with the same command")
    click.echo(f"use it with `dream-pyg train --preset {result.path / BEST}`")


def _row(trial: dict[str, Any], metric: str) -> dict[str, Any]:
    values = {key.partition(".")[2]: value for key, value in trial.pop("values").items()}
    value = trial.pop("value")
    return {"trial": trial.pop("number"), "state": trial.pop("state"), metric: value or "", **trial, **{
        key: f"{one:g}" if isinstance(one, float) else one for key, one in values.items()
    }}  # fmt: skip
