"""``dream-pyg recommend`` and ``dream-pyg export``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dream_pyg.cli.output import format_option, print_json, print_table
from dream_pyg.data.files import read_lines
from dream_pyg.errors import ConfigError
from dream_pyg.serving import (
    EXPORT_FORMATS,
    EXPORT_INDICES,
    check_table_path,
    export_run,
    recommend_blocks,
    recommend_table,
    write_table,
)
from dream_pyg.training.run import load_run

_RECOMMEND_EPILOG = """\b
Examples:
  dream-pyg recommend runs/dream --user A1HK2FQW6KXQB2 -k 5
  dream-pyg recommend runs/dream -k 50 --items-file in-stock.txt --out top50.parquet
"""
_EXPORT_EPILOG = """\b
Example:
  dream-pyg export runs/dream --out shipped
"""


@click.command(epilog=_RECOMMEND_EPILOG)
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--user", "users", multiple=True, help="External id of a user; repeat for more. By default all users.")
@click.option("--users-file", type=click.Path(path_type=Path), help="A text file with one external user id a line.")
@click.option("--items-file", type=click.Path(path_type=Path), help="Recommend only these: a text file, one id a line.")
@click.option("-k", type=int, default=10, show_default=True, help="Items per user.")
@click.option("--out", type=click.Path(path_type=Path), help="Write .parquet, .csv or .json instead of printing.")
@click.option("--include-seen", is_flag=True, help="Allow items that the user has interacted with.")
@click.option("--skip-cold", is_flag=True, help="Leave out users without an interaction in train.")
@click.option("--graph", type=click.Path(path_type=Path), help="The graph store, if it has moved since training.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1.")
@format_option
def recommend(
    run: Path,
    users: tuple[str, ...],
    users_file: Path | None,
    items_file: Path | None,
    k: int,
    out: Path | None,
    include_seen: bool,
    skip_cold: bool,
    graph: Path | None,
    device: str,
    output_format: str,
) -> None:
    """Recommend the top k items to users, by the external ids of the data."""
    if out is not None:
        if output_format == "json":
            raise ConfigError(
                f"--format says how to print, and nothing is printed with --out; what is written, the suffix of {out} "
                "says: .parquet, .csv or .json. Leave one of them out."
            )
        check_table_path(out)
    named = [*users, *(read_lines(users_file, "Users file") if users_file is not None else [])]
    wanted = named if users or users_file is not None else None
    items = None if items_file is None else read_lines(items_file, "Items file")
    options: dict[str, Any] = {"items": items, "include_seen": include_seen, "skip_cold": skip_cold}
    loaded = load_run(run, device=device, graph=graph)
    if out is not None:
        blocks = recommend_blocks(loaded, k, wanted, **options)
        click.echo(f"{write_table(blocks, out):,} recommendations written to {out}")
        return
    frame = recommend_table(loaded, k, wanted, **options)
    if output_format == "json":
        print_json(frame.to_dicts())
    else:
        # Ids as they are: a number would get thousands separators.
        print_table(frame.with_columns(frame["user_id"].cast(str), frame["item_id"].cast(str)).to_dicts())


@click.command(epilog=_EXPORT_EPILOG)
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Directory to create.")
@click.option("--as", "file_format", type=click.Choice(EXPORT_FORMATS), default="safetensors", show_default=True,
              help="How embeddings are stored.")  # fmt: skip
@click.option("--index", type=click.Choice(EXPORT_INDICES), default="flat", show_default=True,
              help="Exact, or an inverted file for large catalogues.")  # fmt: skip
@click.option("--min-recall", type=float,
              help="What an inverted file has to find of the true top 20.  [default: 0.95]")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace the directory if it exists.")
@click.option("--graph", type=click.Path(path_type=Path), help="The graph store, if it has moved since training.")
def export(
    run: Path, out: Path, file_format: str, index: str, min_recall: float | None, overwrite: bool, graph: Path | None
) -> None:
    """Write embeddings, external ids and a faiss index that answers the same top-k, before seen items are left out.

    A teacher's vote is no inner product, and left out: `recommend` has it.
    """
    if min_recall is not None and index == "flat":
        raise ConfigError("--min-recall is for --index ivf; a flat index finds all. Leave it out, or add that.")
    info = export_run(
        load_run(run, device="cpu", graph=graph),
        out,
        format=file_format,
        index=index,
        min_recall=0.95 if min_recall is None else min_recall,
        overwrite=overwrite,
    )
    click.echo(f"{info['users']:,} users and {info['items']:,} items x {info['embedding_dim']} written to {out}")
    if info["vote_left_out"]:
        click.echo(f"the vote of its teacher is left out; `dream-pyg recommend {run} --out top.parquet` has it")
    if index == "ivf":
        about = info["index"]
        click.echo(
            f"the index looks at {about['lists_searched']:,} of {about['lists']:,} lists and finds "
            f"{about['recall']:.1%} of the top {about['measured_at']}"
        )
