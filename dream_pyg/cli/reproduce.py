"""``dream-pyg reproduce``."""

from __future__ import annotations

from pathlib import Path

import click

from dream_pyg.analysis.published import published_datasets
from dream_pyg.analysis.reproduce import reproduce as make_table
from dream_pyg.analysis.systems import TABLES
from dream_pyg.cli.output import format_option, print_json, print_table
from dream_pyg.errors import ConfigError, did_you_mean
from dream_pyg.graph.store import read_info

GRAPHS = Path("graphs")
_EPILOG = """\b
Examples:
  dream-pyg reproduce table1 --dataset baby
  dream-pyg reproduce accuracy --dataset baby --seeds 3 --jobs 2 --publish docs/results
  dream-pyg reproduce table2 --graph graphs/tiktok --models bpr,dream --seeds 3 --preset tiktok --jobs 2
"""


@click.command(epilog=_EPILOG)
@click.argument("table")
@click.option("--dataset", metavar="NAME", help="Data set, whose graph is at graphs/NAME.")
@click.option("--graph", type=click.Path(path_type=Path), help="The graph store, if it is elsewhere.")
@click.option("--seeds", type=click.IntRange(min=1), default=5, show_default=True, help="Runs of each system.")
@click.option(
    "--models",
    multiple=True,
    metavar="NAME[,NAME...]",
    help="What to train, for table2 and accuracy any; others stay if all seeds are there.  [default: the table's]",
)
@click.option("--preset", metavar="NAME|FILE", help="Values that suit a data set, for the models it knows.")
@click.option("--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="A value for every run.")
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Trainings at a time; if more than one, in processes of one thread each.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="Directory of a graph's tables and runs.  [default: tables/DATASET]"
)
@click.option(
    "--publish",
    type=click.Path(path_type=Path, file_okay=False),
    help="A directory to write the finished table to as well, as TABLE-NAME.*, after the directory of --out.",
)
@click.option(
    "--note", "notes", multiple=True, metavar="TEXT", help="What else to say below the table; may be repeated."
)
@format_option
def reproduce(
    table: str,
    dataset: str | None,
    graph: Path | None,
    seeds: int,
    models: tuple[str, ...],
    preset: str | None,
    overrides: tuple[str, ...],
    jobs: int,
    out: Path | None,
    publish: Path | None,
    notes: tuple[str, ...],
    output_format: str,
) -> None:
    """Make one of the paper's tables, one of related systems, or one of DREAM's accuracy.

    table1 has the data, table2 all systems, table3 ablations, table4 alignment in other models; related has systems
    that the paper names without comparing them. accuracy has DREAM as published and at its best, without each
    addition, and for groups of items and users; choices has the preset paper with each value changed that the paper
    leaves open, on validation.

    accuracy takes DREAM's presets paper and best, whatever --preset says, and needs the extra `dream-pyg[plots]`;
    table1 and choices take no --preset.

    Runs that are there are used, those missing are trained, and the table is written as Markdown, JSON and CSV beside
    what the paper prints. An interrupted table goes on with the same command; tables share their runs.
    """
    path, name = _find_graph(graph, dataset)
    out = out or Path("tables") / name
    chosen = [model for one in models for model in one.split(",") if model]
    made = make_table(
        table, path, out, num_seeds=seeds, models=chosen, preset=preset, overrides=overrides, jobs=jobs, notes=notes
    )
    if publish is not None:
        made.write(publish, f"{table}-{out.resolve().name}")
    if output_format == "json":
        print_json(made.to_dict())
    else:
        print_table(made.records())
        click.echo(f"{TABLES[table]}; written to {out / table}.md, .json and .csv")


def _find_graph(graph: Path | None, dataset: str | None) -> tuple[Path, str]:
    """The graph store and the name of its data set."""
    if graph is None:
        if dataset is None:
            raise ConfigError("Say on what: give --dataset NAME for graphs/NAME, or --graph GRAPH.")
        graph = GRAPHS / dataset
        if not graph.exists():
            there = [path.name for path in sorted(GRAPHS.iterdir())] if GRAPHS.is_dir() else []
            known = {*there, *published_datasets()} - {dataset}
            raise ConfigError(
                f"There is no graph of data set {dataset!r} at {graph}.{did_you_mean(dataset, sorted(known))} "
                "Build it with `dream-pyg build-graph`, or say where it is with --graph."
            )
    name = str(read_info(graph)["dataset"])
    if dataset is not None and name != dataset:
        raise ConfigError(f"{graph} is a graph of data set {name!r}, not of {dataset!r}. Give the right --graph.")
    return graph, name
