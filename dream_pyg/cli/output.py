"""Printing results as a table for people or as JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any
from unicodedata import category, east_asian_width

import click

format_option = click.option(
    "--format", "output_format", type=click.Choice(["table", "json"]), default="table", show_default=True,
    help="How to print the result.",
)  # fmt: skip


def print_json(value: Any) -> None:
    """Print as indented JSON."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows under the keys of the first as columns aligned by what a terminal shows; numbers align right."""
    if not rows:
        return
    columns = list(rows[0])
    cells = [columns] + [[_cell(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(_width(line[i]) for line in cells) for i in range(len(columns))]
    right = [all(isinstance(row.get(column), int | float) for row in rows) for column in columns]
    for line in cells:
        blanks = (" " * (width - _width(cell)) for cell, width in zip(line, widths, strict=True))
        padded = (blank + cell if r else cell + blank for cell, blank, r in zip(line, blanks, right, strict=True))
        click.echo("  ".join(padded).rstrip())


def _width(text: str) -> int:
    """How many places of a terminal a text takes: those of East Asia two each, marks on another character none."""
    return sum(
        0 if category(one) in ("Mn", "Me", "Cf") else 2 if east_asian_width(one) in ("W", "F") else 1 for one in text
    )


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
