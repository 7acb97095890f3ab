"""``dream-pyg update-graph``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from dream_pyg.cli.graph import dataset_config, dataset_options, describe, print_description
from dream_pyg.cli.output import format_option
from dream_pyg.graph.store import read_info
from dream_pyg.graph.update import update_store

_EPILOG = """\b
Examples:
  dream-pyg update-graph graphs/january shop/february --out graphs/february
  dream-pyg update-graph graphs/mine clicks.csv --features image=image.parquet --features text=text.parquet --overwrite
"""


@click.command("update-graph", epilog=_EPILOG)
@click.argument("graph", type=click.Path(path_type=Path))
@click.argument("source", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), help="Directory of the store to write; GRAPH itself with --overwrite."
)
@dataset_options
@click.option("-k", "--num-neighbors", type=int, help="Neighbours per node that GRAPH must have; by default as it has.")
@click.option(
    "--overwrite",
    is_flag=True,
    help="Replace GRAPH, or what is at --out; runs trained on it cannot be opened any more.",
)
@format_option
def update_graph(
    graph: Path,
    source: Path,
    out: Path | None,
    data_dir: Path | None,
    num_neighbors: int | None,
    overwrite: bool,
    output_format: str,
    **options: Any,
) -> None:
    """Bring GRAPH up to date with SOURCE, a new version of its dataset, as build-graph would build it.

    Items and users are known by their ids, and they, their features and interactions may be new, changed or gone. Only
    new and changed rows are searched, and those that lost a neighbour. The parameters, the split and the filter are
    those of GRAPH, also where options of its build said so, and where SOURCE is an interaction file, so are its
    columns. Files that were options, and --without, are to be given again.
    """
    started = time.perf_counter()
    config = dataset_config(source, data_dir, options, read_info(graph))
    stored, updates = update_store(
        config, graph, out, data_dir=data_dir, overwrite=overwrite, num_neighbors=num_neighbors
    )
    searched = {
        f"searched {what}": f"{update.num_searched:,} of {update.num_rows:,}"
        + (f" ({update.reason})" if update.reason else "")
        for what, update in (updates or {}).items()
    }
    state = "reused" if updates is None else "updated"
    print_description({**describe(stored, state, time.perf_counter() - started), **searched}, output_format)
