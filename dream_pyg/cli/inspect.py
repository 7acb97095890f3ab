"""``dream-pyg inspect`` and ``dream-pyg models``."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import textwrap
from collections.abc import Iterator
from inspect import get_annotations, getsource
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin

import click
from pydantic import BaseModel

from dream_pyg.cli.output import format_option, print_json, print_table
from dream_pyg.config import RunConfig
from dream_pyg.data.files import read_json
from dream_pyg.data.validation import flatten
from dream_pyg.graph.store import load_graph
from dream_pyg.models import MODELS, find_model
from dream_pyg.presets import load_presets, preset_names
from dream_pyg.training.run import RunPaths


@click.command(epilog="\b\nExample:\n  dream-pyg inspect graphs/baby")
@click.argument("path", type=click.Path(path_type=Path))
@format_option
def inspect(path: Path, output_format: str) -> None:
    """Show what a graph store or a run holds; a store's checksums are verified.

    The table has a run's test metrics at the cut-off of training.metric, JSON at all cut-offs.
    """
    paths = RunPaths(path)
    described = _describe_run(paths) if paths.config.is_file() else load_graph(path).info
    if output_format == "json":
        print_json(described)
    else:
        rows = flatten(described)
        _, at, cut_off = str(rows.get("config.training.metric", "")).partition("@")
        print_table(
            [
                {"": key, "value": _plain(value)}
                for key, value in rows.items()
                if not key.startswith("test.lines.") or key.endswith(at + cut_off)
            ]
        )


@click.command(epilog="\b\nExamples:\n  dream-pyg models\n  dream-pyg models dream")
@click.argument("name", required=False)
@format_option
def models(name: str | None, output_format: str) -> None:
    """List the models, their papers, hyper-parameters and presets; of NAME, what each value of a training means.

    The latter are all that --set can change, with their defaults.
    """
    listed = _all_models() if name is None else list(_settings_of(name))
    if output_format == "json":
        print_json(listed)
        return
    for entry in listed:
        (_print_model if name is None else _print_setting)(entry)


def _all_models() -> list[dict[str, Any]]:
    presets = {name: load_presets(name) for name in preset_names()}
    return [
        {
            "model": name,
            "what": (model.__doc__ or "").strip().splitlines()[0],
            "hyper-parameters": {field.name: field.default for field in dataclasses.fields(cast(Any, model.Config))},
            "presets": {preset: known[name]._asdict() for preset, known in presets.items() if name in known},
        }
        for name, model in MODELS.items()
    ]


def _print_model(entry: dict[str, Any]) -> None:
    click.echo(f"{entry['model']:<12}{entry['what']}")
    for name, default in entry["hyper-parameters"].items():
        click.echo(f"{'':<14}{name} = {default}")
    for name, preset in entry["presets"].items():
        values = ", ".join(f"{key} = {value}" for key, value in flatten(preset["values"]).items())
        click.echo(f"{'':<12}preset {name}: {values} ({preset['source']})")


def _settings_of(name: str) -> Iterator[dict[str, Any]]:
    """What can be set of a model's training, section by section."""
    for key, kind in (("model", find_model(name).Config), ("", RunConfig)):
        yield from _settings(kind, key)


def _settings(kind: Any, section: str) -> Iterator[dict[str, Any]]:
    for name, field in kind.__pydantic_fields__.items():
        key = f"{section}.{name}" if section else name
        within = next((part for part in (field.annotation, *get_args(field.annotation)) if _is_section(part)), None)
        if key not in ("graph", "model") and field.annotation is not within:
            choices = list(get_args(field.annotation)) if get_origin(field.annotation) is Literal else None
            yield {"key": key, "default": field.default, "choices": choices, "what": _meaning(kind, name)}
        if within is not None:
            yield from _settings(within, key)


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _meaning(kind: Any, name: str) -> str:
    """The line below a field, in the class or in the one that it is inherited from, as plain text."""
    declaring = next(base for base in kind.__mro__ if name in get_annotations(base))
    (tree,) = ast.parse(textwrap.dedent(getsource(declaring))).body
    for field, below in pairwise(ast.iter_child_nodes(tree)):
        if isinstance(field, ast.AnnAssign) and ast.unparse(field.target) == name and isinstance(below, ast.Expr):
            text = str(ast.literal_eval(below.value))
            return " ".join(re.sub(r":\w+:`~?(?:[\w.]+\.)?([^`]*)`", r"\1", text).replace("``", "").split())
    return ""


def _print_setting(entry: dict[str, Any]) -> None:
    default = entry["default"] if isinstance(entry["default"], str) else json.dumps(entry["default"])
    click.echo(f"{entry['key']} = {'none' if entry['default'] is None else default}")
    choices = f" ({', '.join(map(str, entry['choices']))})" if entry["choices"] else ""
    click.echo(click.wrap_text(entry["what"] + choices, 100, "    ", "    "))


def _plain(value: Any) -> str:
    """A value as it would be written in a configuration: 3e-05 is not 0.0000, and a seed has no separators."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _describe_run(paths: RunPaths) -> dict[str, Any]:
    described = {**read_json(paths.info), "config": RunConfig.load(paths.config).to_dict()}
    if paths.test_metrics.is_file():
        described["test"] = read_json(paths.test_metrics)
    return described
