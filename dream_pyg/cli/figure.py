"""``dream-pyg figure``."""

from __future__ import annotations

from pathlib import Path

import click

from dream_pyg.analysis.figures import FIGURES, FigureOptions, make_figure
from dream_pyg.cli.output import format_option, print_json, print_table

_DEFAULTS = FigureOptions()
_EPILOG = (
    "\b\nFigures:\n"
    + "\n".join(f"  {name:<4}{figure.what}" for name, figure in FIGURES.items())
    + """

\b
Examples:
  dream-pyg figure 5 runs/dream --out figures
  dream-pyg train graphs/baby --model dream --run runs/kept --set training.keep_every=1
  dream-pyg figure 6 runs/kept runs/kept-without-signal --out figures
"""
)


@click.command(epilog=_EPILOG)
@click.argument("name", metavar="FIGURE")
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Directory for figure-NAME.png, .svg, .csv."
)
@click.option("--metric", default=_DEFAULTS.metric, show_default=True, help="Test metric of figures 8 and 9.")
@click.option(
    "--nodes", "num_nodes", default=_DEFAULTS.num_nodes, show_default=True, help="Users and items in figure 7."
)
@click.option("--seed", default=_DEFAULTS.seed, show_default=True,
              help="Seed of the triplets in figure 1a; of nodes and t-SNE in figure 7.")  # fmt: skip
@click.option("--graph", type=click.Path(path_type=Path), help="The graph store, if it has moved since training.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1.")
@format_option
def figure(
    name: str,
    runs: tuple[Path, ...],
    out: Path,
    metric: str,
    num_nodes: int,
    seed: int,
    graph: Path | None,
    device: str,
    output_format: str,
) -> None:
    """Draw a FIGURE of the paper from finished RUNs, with its numbers as CSV beside it.

    Figures by epoch (1a, 1b, 6) need runs trained with training.keep_every=1. Figures 8 and 9 compare runs that differ
    in the weights shown, and in the seed.
    """
    options = FigureOptions(metric=metric, num_nodes=num_nodes, seed=seed)
    files = make_figure(name, runs, out, options=options, device=device, graph=graph)
    if output_format == "json":
        print_json({"figure": name, "png": files.png, "svg": files.svg, "csv": files.csv,
                    "rows": files.table.to_dicts()})  # fmt: skip
    else:
        print_table([{"figure": name, "rows": len(files.table), "png": files.png, "svg": files.svg, "csv": files.csv}])
