"""``dream-pyg build-graph``."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from dream_pyg import ranks
from dream_pyg.cli.output import format_option, print_json, print_table
from dream_pyg.data.dataset import DatasetConfig
from dream_pyg.errors import ConfigError
from dream_pyg.graph.knn import ENGINES, SearchReport
from dream_pyg.graph.schema import ITEM, SPLITS, feature_modalities, feature_name
from dream_pyg.graph.store import StoredGraph, build_store

_EPILOG = """\b
Examples:
  dream-pyg build-graph datasets/baby --data-dir ~/data/baby --out graphs/baby
  dream-pyg build-graph clicks.csv --user-column uid --item-column sku \\
      --features image=image.parquet --features text=text.parquet --split random --out graphs/mine
  dream-pyg build-graph datasets/catalogue --engine clusters --min-recall 0.95 --out graphs/catalogue
  torchrun --nproc-per-node 2 -m dream_pyg build-graph datasets/baby --data-dir ~/data/baby --out graphs/baby
"""


_DATASET_OPTIONS = (
    click.option("--data-dir", type=click.Path(path_type=Path), help="Where the files named in dataset.toml lie."),
    click.option(
        "--features", multiple=True, metavar="MODALITY=FILE", help="Item features (.npy, .safetensors, .parquet)."
    ),
    click.option(
        "--neighbors",
        multiple=True,
        metavar="MODALITY=FILE",
        help="A ready item kNN graph (.npz, .safetensors, .parquet).",
    ),
    click.option(
        "--items",
        type=click.Path(path_type=Path),
        help="All items in the order of the rows of .npy and .safetensors files: a table with a column of item ids.",
    ),
    click.option("--without", multiple=True, metavar="MODALITY", help="Leave a modality of dataset.toml out."),
    click.option("--user-column", help="Column of user ids, for a SOURCE that is an interaction file."),
    click.option("--item-column", help="Column of item ids."),
    click.option("--timestamp-column", help="Column of timestamps."),
    click.option("--rating-column", help="Column of ratings."),
    click.option("--split-column", help="Column that gives each row's split."),
    click.option("--separator", metavar="CHARACTER", help="Between the columns of SOURCE; by default by its suffix."),
    click.option(
        "--split",
        type=click.Choice(["given", "random", "leave_last_out", "time"]),
        help="How to split.  [default: given if there is a split column, else random by user, 8:1:1 with seed 0, "
        "unless a dataset.toml or the graph that is updated says otherwise]",
    ),
    click.option(
        "--split-ratios",
        type=float,
        nargs=3,
        metavar="TRAIN VALID TEST",
        help="Shares of a random split or of one by time; that of test may be 0.",
    ),
    click.option("--split-seed", type=int, help="Seed of a random split."),
    click.option("--min-rating", type=float, help="Keep interactions with at least this rating; by default all."),
    click.option(
        "--k-core", type=click.IntRange(min=0), help="Keep users and items with at least this many interactions."
    ),
)


def dataset_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say what a SOURCE holds; :func:`dataset_config` understands them."""
    for option in reversed(_DATASET_OPTIONS):
        command = option(command)
    return command


@click.command("build-graph", epilog=_EPILOG)
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Directory of the graph store to write.")
@dataset_options
@click.option(
    "-k",
    "--num-neighbors",
    type=int,
    default=10,
    show_default=True,
    help="Neighbours per node in every relation graph that is searched here; a ready one is taken as it is.",
)
@click.option("--include-self", is_flag=True, help="Count a node as one of its own neighbours.")
@click.option("--user-graphs/--no-user-graphs", default=True, show_default=True, help="Build user-user graphs.")
@click.option(
    "--engine",
    type=click.Choice(ENGINES),
    default="auto",
    show_default=True,
    help="How neighbours are searched: exact and flat find all; clusters, ivf, ivfpq, hnsw and nndescent nearly all, "
    "and measure how many; auto is exact, or clusters where that would take more than a few minutes.",
)
@click.option(
    "--min-recall",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.98,
    show_default=True,
    help="Share of the true neighbours that an approximate engine must find.",
)
@click.option(
    "--device",
    default="cpu",
    show_default=True,
    help="Where the engine exact multiplies: cpu, cuda, cuda:1, or auto; the graph is the same.",
)
@click.option("--overwrite", is_flag=True, help="Replace a store of other inputs or parameters.")
@format_option
def build_graph(source: Path, out: Path, data_dir: Path | None, output_format: str, **options: Any) -> None:
    """Build the graph store of SOURCE: a folder with a dataset.toml, that file, or an interaction file.

    Reads interactions and features, finds the k nearest items and users by cosine for every modality, and writes
    everything once. Run again with the same inputs and parameters, it reuses what is there; interrupted or
    killed, it goes on where it stopped. Processes started by torchrun search together.
    """
    started = time.perf_counter()
    config = dataset_config(source, data_dir, options)
    stored, reused = build_store(
        config,
        out,
        data_dir=data_dir,
        num_neighbors=options["num_neighbors"],
        include_self=options["include_self"],
        user_graphs=options["user_graphs"],
        engine=options["engine"],
        min_recall=options["min_recall"],
        device=options["device"],
        overwrite=options["overwrite"],
    )
    print_description(describe(stored, "reused" if reused else "built", time.perf_counter() - started), output_format)


def print_description(summary: dict[str, Any], output_format: str) -> None:
    """Print what :func:`describe` gives, in one of the processes that torchrun started."""
    if not ranks.speaks():
        return
    if output_format == "json":
        print_json(summary)
    else:
        print_table([{"": key, "value": value} for key, value in summary.items()])


def dataset_config(
    source: Path, data_dir: Path | None, options: dict[str, Any], earlier: Mapping[str, Any] | None = None
) -> DatasetConfig:
    """The dataset that a SOURCE and the :func:`dataset_options` describe.

    Args:
        source: A ``dataset.toml``, its directory, or a file of interactions.
        data_dir: Where the files lie that a ``dataset.toml`` names.
        options: The other options.
        earlier: What the store of an earlier version says of itself. How that build's options filtered and split holds
            on unless options say otherwise; a file of interactions also has its columns, and needs all files of each
            of its modalities that is not left out.
    """
    previous, overrides = ({} if earlier is None else earlier.get(key, {}) for key in ("config", "overrides"))
    toml = source / "dataset.toml" if source.is_dir() else source
    asked = {name: options[f"{name}_column"] for name in ("user", "item", "timestamp", "rating", "split")}
    asked["separator"] = options["separator"]
    columns = {name: value for name, value in asked.items() if value is not None}
    known: Mapping[str, Mapping[str, str]] = {}
    if toml.suffix == ".toml":
        if columns:
            raise ConfigError(
                "Column options and --separator are about an interaction file; set them in dataset.toml instead."
            )
        config = DatasetConfig.load(toml)
    else:
        if data_dir is not None:
            raise ConfigError(
                "--data-dir says where the files that a dataset.toml names lie. Leave it out, and give the path of "
                "each file."
            )
        if previous.get("items") and options["items"] is None:
            raise ConfigError(
                "The graph has a list of all its items, for which no file is given. Add --items FILE, with the items "
                "in the order of the new feature rows."
            )
        interactions = {**previous.get("interactions", {}), **columns, "path": str(source.absolute())}
        kept = {key: previous[key] for key in ("name", "items", "filter", "split") if key in previous}
        config = DatasetConfig.create(interactions=interactions, **kept)
        known = previous.get("modalities", {})
    if options["items"] is not None:
        config = config.with_section("items", path=str(options["items"].absolute()))
    sections = {
        "split": {"method": "split", "ratios": "split_ratios", "seed": "split_seed"},
        "filter": {"min_rating": "min_rating", "k_core": "k_core"},
    }
    for section, keys in sections.items():
        given = {key: options[option] for key, option in keys.items() if options[option] is not None}
        if values := {**overrides.get(section, {}), **given}:
            config = config.with_section(section, **values)
    if options["split_seed"] is not None and config.split.method not in (None, "random"):
        raise ConfigError(f"--split-seed is for a random split, and this one is {config.split.method!r}. Leave it out.")
    if options["split_ratios"] is not None and config.split.method not in (None, "random", "time"):
        raise ConfigError(
            f"--split-ratios is for a random split or one by time, and this one is {config.split.method!r}. Leave it "
            "out."
        )
    for modality in options["without"]:
        config = config if modality in known else config.without_modality(modality)
    for kind in ("features", "neighbors"):
        named = set()
        for assignment in options[kind]:
            modality, equals, file = assignment.partition("=")
            if not equals or not modality or not file:
                raise ConfigError(f"--{kind} wants MODALITY=FILE (got {assignment!r}), for example image=image.npy.")
            if modality in named:
                raise ConfigError(f"--{kind} is given twice for {modality!r}. Give each modality one file.")
            named.add(modality)
            config = config.with_modality(modality, **{kind: file})
    given_files = config.model_dump(include={"modalities"}, exclude_none=True)["modalities"]
    for modality in sorted(known.keys() - set(options["without"])):
        if missing := sorted(known[modality].keys() - given_files.get(modality, {}).keys()):
            lost = f"{' and '.join(missing)} of {modality}" if modality in given_files else modality
            add = " ".join(f"--{kind} {modality}=FILE" for kind in missing)
            raise ConfigError(
                f"The graph has {lost}, for which no file is given. Add {add}, or leave it out with --without "
                f"{modality}."
            )
    return config


def describe(stored: StoredGraph, state: str, seconds: float) -> dict[str, Any]:
    """What is printed of a store."""
    counts, reports = stored.info["counts"], stored.info["knn"]
    searches = {
        edge_type: str(SearchReport(**reports[edge_type])) if edge_type in reports else "none, a ready graph"
        for edge_type in counts["edges"]
        if "_knn " in edge_type
    }
    counted = {"num_users", "num_items", "num_interactions", *SPLITS}
    return {
        "graph": str(stored.path),
        "state": state,
        "seconds": round(seconds, 2),
        "split": _split_in_words(stored.info),
        **{key: value for key, value in counts.items() if key != "edges"},
        **{
            f"features {modality}": f"{stored.graph[ITEM][feature_name(modality)].size(1):,} numbers an item"
            for modality in feature_modalities(stored.graph)
        },
        **{f"edges {edge_type}": count for edge_type, count in counts["edges"].items()},
        **{f"search {edge_type}": how for edge_type, how in searches.items()},
        **{key.replace("_", " "): value for key, value in stored.info["report"].items() if key not in counted},
        "fingerprint": stored.fingerprint[:12],
    }


def _split_in_words(info: Mapping[str, Any]) -> str:
    """How the interactions of a store were split."""
    config = info["config"]["split"]
    method = info.get("split_method", config.get("method", "not recorded"))  # by older stores
    shares = ":".join(f"{share:g}" for share in config["ratios"])
    return {"random": f"random by user, {shares}, seed {config['seed']}", "time": f"time, {shares}"}.get(method, method)
