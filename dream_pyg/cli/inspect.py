"""``dream-pyg inspect`` and ``dream-pyg models``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast

import click

from dream_pyg.cli.output import format_option, print_json, print_table
from dream_pyg.config import RunConfig
from dream_pyg.data.files import read_json
from dream_pyg.data.validation import flatten
from dream_pyg.graph.store import load_graph
from dream_pyg.models import MODELS
from dream_pyg.presets import load_presets, preset_names
from dream_pyg.training.run import RunPaths


@click.command(epilog="\b\nExample:\n  dream-pyg inspect graphs/baby")
@click.argument("path", type=click.Path(path_type=Path))
@format_option
def inspect(path: Path, output_format: str) -> None:
    """Show what a graph store or a run holds; a store's checksums are verified."""
    paths = RunPaths(path)
    described = _describe_run(paths) if paths.config.is_file() else load_graph(path).info
    if output_format == "json":
        print_json(described)
    else:
        print_table([{"": key, "value": _plain(value)} for key, value in flatten(described).items()])


@click.command(epilog="\b\nExample:\n  dream-pyg models --format json")
@format_option
def models(output_format: str) -> None:
    """List the models, their papers, their hyper-parameters with defaults, and the presets that know them."""
    presets = {name: load_presets(name) for name in preset_names()}
    listed: list[dict[str, Any]] = [
        {
            "model": name,
            "what": (model.__doc__ or "").strip().splitlines()[0],
            "hyper-parameters": {field.name: field.default for field in dataclasses.fields(cast(Any, model.Config))},
            "presets": {preset: known[name]._asdict() for preset, known in presets.items() if name in known},
        }
        for name, model in MODELS.items()
    ]
    if output_format == "json":
        print_json(listed)
        return
    for entry in listed:
        click.echo(f"{entry['model']:<12}{entry['what']}")
        for name, default in entry["hyper-parameters"].items():
            click.echo(f"{'':<14}{name} = {default}")
        for name, preset in entry["presets"].items():
            values = ", ".join(f"{key} = {value}" for key, value in flatten(preset["values"]).items())
            click.echo(f"{'':<12}preset {name}: {values} ({preset['source']})")


def _plain(value: Any) -> str:
    """A value as it would be written in a configuration: 3e-05 is not 0.0000, and a seed has no separators."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _describe_run(paths: RunPaths) -> dict[str, Any]:
    described = {**read_json(paths.info), "config": RunConfig.load(paths.config).to_dict()}
    if paths.test_metrics.is_file():
        described["test"] = read_json(paths.test_metrics)
    return described
