"""A table of the paper: means over seeds beside printed values, as Markdown, JSON and CSV."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from dream_pyg.analysis.plots import draw_accuracy, write_picture
from dream_pyg.data.files import write_json, write_text


class Cell(NamedTuple):
    """One metric of a row over its runs."""

    metric: str
    values: list[float]
    mean: float | None
    std: float | None
    """Of the sample, so None for a single value."""
    published: float | None
    ratio: float | None
    """The mean over the published value."""
    p_value: float | None = None
    """Of a paired test over users against the row that this one is compared with."""

    @classmethod
    def of(cls, metric: str, values: Sequence[float], published: float | None = None) -> Cell:
        """Mean and standard deviation of ``values``, and the mean against a printed value."""
        mean = statistics.fmean(values) if values else None
        std = statistics.stdev(values) if len(values) > 1 else None
        ratio = None if mean is None or not published else mean / published
        return cls(metric, list(values), mean, std, published, ratio)


class Row(NamedTuple):
    """A system, or for Table 1 a data set."""

    key: str
    name: str
    cells: list[Cell]
    runs: list[dict[str, Any]] = []  # noqa: RUF012 - read only
    """What is known of each run that is finished."""
    values_from: str = ""
    """Where its hyper-parameters come from."""
    compared_with: str | None = None
    """Name of the row that the p-values are against."""


class Table(NamedTuple):
    """A table so far."""

    name: str
    title: str
    dataset: str
    rows: list[Row]
    complete: bool
    about: dict[str, Any]
    """The graph, the machine and what else the numbers depend on."""
    notes: list[str]

    def write(self, directory: Path, name: str | None = None) -> None:
        """Write ``NAME.json``, ``NAME.csv`` and ``NAME.md``, each atomically; for accuracy a picture as well.

        Args:
            directory: Where to.
            name: What the files are called; by default as the table.
        """
        name = name or self.name
        write_json(directory / f"{name}.json", self.to_dict())
        write_text(directory / f"{name}.csv", self.to_csv())
        write_text(directory / f"{name}.md", self.to_markdown())
        if self.name == "accuracy":
            picture = directory / f"{name}.png"
            if self.complete:
                write_picture(draw_accuracy(self._frame()), picture)
            else:
                picture.unlink(missing_ok=True)  # What an earlier one shows is not in the table.

    def _frame(self) -> pl.DataFrame:
        records = [(row.name, cell.metric, cell.mean, cell.std) for row in self.rows for cell in row.cells]
        return pl.DataFrame(records, schema={"system": str, "metric": str, "mean": float, "std": float}, orient="row")

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        rows = [{**row._asdict(), "cells": [cell._asdict() for cell in row.cells]} for row in self.rows]
        return {**self._asdict(), "rows": rows}

    def to_csv(self) -> str:
        """One line for each metric of each row."""
        lines = [
            {"table": self.name, "dataset": self.dataset, "system": row.key, "name": row.name, "metric": cell.metric,
             "mean": cell.mean, "std": cell.std, "runs": len(cell.values), "published": cell.published,
             "ratio": cell.ratio, "values_from": row.values_from, "compared_with": row.compared_with,
             "p_value": cell.p_value}
            for row in self.rows for cell in row.cells
        ]  # fmt: skip
        return pl.DataFrame(lines, infer_schema_length=None).write_csv()

    def to_markdown(self) -> str:
        """For people."""
        records = self.records()
        columns = list(records[0])
        lines = [
            f"# {self.name.replace('table', 'Table ').capitalize()}: {self.title} ({self.dataset})",
            "",
            *([] if self.complete else ["**Unfinished: some runs are missing.**", ""]),
            f"| {' | '.join(columns)} |",
            f"|{'---|' * len(columns)}",
            *(f"| {' | '.join(record.values())} |" for record in records),
            "",
            *(f"- {note}" for note in self.notes),
            *(f"- {key}: {_plain(value)}" for key, value in self.about.items()),
        ]
        return "\n".join(lines) + "\n"

    def records(self) -> list[dict[str, str]]:
        """The rows as text, with printed values where the paper has any."""
        cells = [cell for row in self.rows for cell in row.cells]
        compared = any(cell.published is not None for cell in cells)
        tested = {cell.metric for cell in cells if cell.p_value is not None}
        whose = "printed" if self.name == "related" else "paper's"
        records = []
        for row in self.rows:
            record = {"": row.name}
            for cell in row.cells:
                record[cell.metric] = _spread(cell)
                if compared:
                    record[f"{whose} {cell.metric}"] = format_value(cell.metric, cell.published)
                    record[f"ratio of {cell.metric}"] = "" if cell.ratio is None else f"{cell.ratio:.3f}"
                if cell.metric in tested:
                    record[f"p of {cell.metric}"] = "" if cell.p_value is None else _probability(cell.p_value)
            if self.name != "table1":
                minutes = sum(run["seconds"] for run in row.runs) / 60
                record |= {"runs": str(len(row.runs)), "minutes": f"{minutes:.1f}", "values": row.values_from}
            records.append(record)
        return records


def format_value(metric: str, value: float | None) -> str:
    """A value as a table prints it: counts with separators, sparsity in percent, metrics with four digits."""
    if value is None:
        return ""
    if metric == "sparsity":
        return f"{value:.2f}%"
    return f"{value:.4f}" if "@" in metric else f"{value:,.0f}"


def _spread(cell: Cell) -> str:
    mean = format_value(cell.metric, cell.mean)
    return mean if cell.std is None else f"{mean} ± {format_value(cell.metric, cell.std)}"


def _probability(value: float) -> str:
    return "< 0.0001" if value < 0.0001 else f"{value:.4f}"


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {one}" for key, one in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
