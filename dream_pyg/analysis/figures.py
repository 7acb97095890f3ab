"""Which figure of the paper shows what, and how it is made: opened runs, a table, a picture, three files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from dream_pyg.analysis.measures import (
    gradient_conflict,
    line_distance,
    line_map,
    line_scores,
    modal_forgetting,
    sensitivity,
)
from dream_pyg.analysis.plots import (
    draw_gradient_conflict,
    draw_line_distance,
    draw_line_map,
    draw_line_scores,
    draw_modal_forgetting,
    draw_sensitivity,
    require_plots,
    write_picture,
)
from dream_pyg.data.files import atomic_path
from dream_pyg.errors import ConfigError
from dream_pyg.evaluation import parse_metric
from dream_pyg.training.run import Run, load_run


@dataclass(frozen=True)
class FigureOptions:
    """What can be chosen about a figure; each figure uses what concerns it."""

    metric: str = "recall@20"
    """Test metric of figures 8 and 9."""
    num_nodes: int = 1000
    """How many users and items figure 7 shows."""
    seed: int = 0
    """Seed of the triplets of figure 1a, and of the nodes and of t-SNE in figure 7."""


class FigureFiles(NamedTuple):
    """What was drawn, and where it lies."""

    table: pl.DataFrame
    csv: Path
    png: Path
    svg: Path


def make_figure(
    name: str,
    runs: Sequence[str | Path],
    out: str | Path,
    *,
    options: FigureOptions | None = None,
    device: str = "auto",
    graph: str | Path | None = None,
) -> FigureFiles:
    """Draw one of ``FIGURES`` from finished runs: ``figure-NAME.png`` and ``.svg``, and its numbers beside them as CSV.

    The same runs give the same bytes (on the same device and versions). Figures by epoch (1a, 1b, 6) need runs that
    kept epochs: ``training.keep_every=1``.

    Args:
        name: The figure's number in the paper.
        runs: Run directories.
        out: Directory for the files; those of the same names are replaced.
        options: What can be chosen.
        device: Where models go.
        graph: The runs' graph store, if it has moved since training.

    Returns:
        The numbers and the files.

    Raises:
        ConfigError: If the figure is unknown, or the runs are not what it compares.
        StoreError: If a path is no finished run, or the run lacks what the figure needs.
        MissingExtraError: If matplotlib or scikit-learn is not installed.
    """
    figure, options = find_figure(name), options or FigureOptions()
    if len(runs) < figure.fewest_runs:
        raise ConfigError(f"Figure {name} compares runs; expected at least {figure.fewest_runs}, got {len(runs)}.")
    _check(options)
    require_plots()
    opened = ((label, load_run(path, device=device, graph=graph)) for label, path in run_labels(runs).items())
    table = figure.measure(opened, options)
    stem = Path(out) / f"figure-{name}"
    files = FigureFiles(table, *(stem.with_suffix(suffix) for suffix in (".csv", ".png", ".svg")))
    picture = figure.draw(table)
    write_picture(picture, files.png)
    write_picture(picture, files.svg)
    with atomic_path(files.csv) as temporary:
        table.write_csv(temporary)
    return files


def find_figure(name: str) -> PaperFigure:
    """The figure of a name.

    Raises:
        ConfigError: If there is none; the message lists those there are.
    """
    if name in FIGURES:
        return FIGURES[name]
    raise ConfigError(f"Unknown figure {name!r}; expected one of {', '.join(FIGURES)}.")


def run_labels(runs: Sequence[str | Path]) -> dict[str, Path]:
    """Runs by directory name, with as many directories above as it takes to tell them apart.

    Raises:
        ConfigError: If a run is given twice.
    """
    paths = [Path(run) for run in runs]
    parts = [path.resolve().parts for path in paths]
    if len(set(parts)) < len(parts):
        raise ConfigError(f"A run is given twice among {', '.join(map(str, paths))}. Give each once.")
    depth = 1
    while len({part[-depth:] for part in parts}) < len(parts):
        depth += 1
    return {"/".join(part[-depth:]): path for part, path in zip(parts, paths, strict=True)}


def _check(options: FigureOptions) -> None:
    if options.num_nodes < 2:
        raise ConfigError(f"A map needs at least 2 nodes (got {options.num_nodes}).")
    if not 0 <= options.seed < 2**32:
        raise ConfigError(f"The seed must be from 0 to {2**32 - 1} (got {options.seed}).")
    parse_metric(options.metric)


Runs = Iterable[tuple[str, Run]]


@dataclass(frozen=True)
class PaperFigure:
    """A figure of the paper: what it shows, how it is measured and how it is drawn."""

    what: str
    measure: Callable[[Runs, FigureOptions], pl.DataFrame]
    draw: Callable[[pl.DataFrame], Any]
    fewest_runs: int = 1


def _each(measure: Callable[[Run, FigureOptions], pl.DataFrame]) -> Callable[[Runs, FigureOptions], pl.DataFrame]:
    """One table of what is measured of each run by itself."""

    def measure_all(runs: Runs, options: FigureOptions) -> pl.DataFrame:
        return pl.concat([measure(run, options).select(pl.lit(label).alias("run"), pl.all()) for label, run in runs])

    return measure_all


FIGURES: dict[str, PaperFigure] = {
    "1a": PaperFigure(
        "gradients of behavior and modal loss on shared embeddings, by epoch",
        _each(lambda run, options: gradient_conflict(run, seed=options.seed)),
        draw_gradient_conflict,
    ),
    "1b": PaperFigure(
        "distance of modal representations from raw features, by epoch",
        _each(lambda run, options: modal_forgetting(run)),
        draw_modal_forgetting,
    ),
    "5": PaperFigure(
        "behavior, modal and general representation scored apart",
        _each(lambda run, options: line_scores(run)),
        draw_line_scores,
    ),
    "6": PaperFigure(
        "cosine distance of the two lines, by epoch",
        _each(lambda run, options: line_distance(run)),
        draw_line_distance,
    ),
    "7": PaperFigure(
        "t-SNE of the two lines",
        _each(lambda run, options: line_map(run, num_nodes=options.num_nodes, seed=options.seed)),
        draw_line_map,
    ),
    "8": PaperFigure(
        "sensitivity to signal weight and image weight",
        lambda runs, options: sensitivity(runs, ("signal_weight", "image_weight"), metric=options.metric),
        draw_sensitivity,
        fewest_runs=2,
    ),
    "9": PaperFigure(
        "sensitivity to intra-alignment and inter-alignment weight",
        lambda runs, options: sensitivity(runs, ("intra_weight", "inter_weight"), metric=options.metric),
        draw_sensitivity,
        fewest_runs=2,
    ),
}
