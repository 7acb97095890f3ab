"""What DREAM's paper and others print in tables, to stand beside what is measured here."""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path
from typing import Any

_FILE = Path(__file__).parent / "published.toml"


def table_metrics(table: str) -> list[str]:
    """The columns of a table of the paper."""
    return list(_tables()[table]["metrics"])


def published_rows(table: str, dataset: str) -> dict[str, dict[str, float]]:
    """The rows of a table on a data set, each value by its column; none for a data set that the paper does not have."""
    rows = _tables()[table]["rows"].get(dataset, {})
    return {row: dict(zip(table_metrics(table), values, strict=True)) for row, values in rows.items()}


def published_by(table: str) -> str:
    """Who prints a table's values, as the end of a sentence."""
    tables = _tables()
    return str(tables[table].get("source", tables["source"]))


def published_note(table: str, dataset: str) -> str | None:
    """What has to be known of a table's printed values."""
    note = _tables()[table].get("notes", {}).get(dataset)
    return None if note is None else str(note)


def published_datasets() -> list[str]:
    """The data sets that the paper has."""
    return list(_tables()["table2"]["rows"])


@cache
def _tables() -> dict[str, Any]:
    return tomllib.loads(_FILE.read_text(encoding="utf-8"))
