"""Columns of text and Parquet files, and the external ids in them.

An external id is an integer or a string, as the user's file says it; an internal id is a position in a catalogue of
external ids. Text files have no types, so a column of theirs holds integers only if every value is written the one
way an integer is: ``7``, not ``007`` or ``7.0``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import polars as pl
from numpy.typing import NDArray

from dream_pyg.data.files import existing_file
from dream_pyg.errors import ConfigError, DataError

USER_COLUMNS = ("userID", "user_id", "user")
ITEM_COLUMNS = ("itemID", "item_id", "item", "asin")
CATALOGUE = "ids of all items"
"""What a column of a list of items is for."""
SEPARATORS = {".inter": "\t", ".item": "\t", ".tsv": "\t", ".csv": ","}
PARQUET = ".parquet"
_AGAIN = re.compile(r"_duplicated_\d+$")
_END = 1 << 10
"""Bytes at the end of a text file in which blank lines are looked for."""


@dataclass(frozen=True)
class Table:
    """A text or Parquet file whose header is known and whose rows are not read yet.

    Attributes:
        path: The file.
        what: What the file is for, to begin error messages with.
        columns: The name of each column in the file, by its name without RecBole's type suffix.
        separator: Between columns of a text file; None for Parquet.
        repeated: Names that the header of a text file has more than once.
    """

    path: Path
    what: str
    columns: Mapping[str, str]
    separator: str | None
    repeated: frozenset[str] = frozenset()

    @classmethod
    def open(cls, path: str | Path, what: str, separator: str | None = None) -> Self:
        """Read the header of ``path``; its suffix says the format.

        Args:
            path: A ``.inter``, ``.item``, ``.tsv``, ``.csv`` or ``.parquet`` file.
            what: What the file is for.
            separator: One character; by default by suffix, and a tab for a ``.csv`` whose header has tabs only.

        Raises:
            DataError: If the file is missing, empty, unreadable or of an unknown format.
            ConfigError: If ``separator`` is not one character.
        """
        path = existing_file(path, what)
        if separator is not None and (len(separator) != 1 or not separator.isascii()):
            raise ConfigError(f"{what}: separator must be one ASCII character (got {separator!r}).")
        suffix = path.suffix.lower()
        if suffix == PARQUET:
            names = _parse(lambda: list(pl.read_parquet_schema(path)), path, what)
            return cls(path, what, {name: name for name in names}, None)
        if separator is None and suffix not in SEPARATORS:
            known = ", ".join([*SEPARATORS, PARQUET])
            raise DataError(f"{what}: expected a file ending in {known}, got {path}. Convert or rename it.")
        separator = separator or SEPARATORS[suffix]
        names = _parse(lambda: _header(path, separator), path, what)
        if suffix == ".csv" and len(names) == 1 and "\t" in names[0]:
            separator, names = "\t", names[0].split("\t")
        columns: dict[str, str] = {}
        repeated = set()
        for name in names:
            # Where a header has a name again, it is read under another one.
            plain = _AGAIN.sub("", name) if _AGAIN.sub("", name) in names else name
            plain = plain.partition(":")[0].strip()
            if columns.setdefault(plain, name) != name or names.count(name) > 1:
                repeated.add(plain)
        return cls(path, what, columns, separator, frozenset(repeated))

    def find(self, role: str, known: Sequence[str], named: str | None = None) -> str:
        """The column for a role: the one named, else the only one with a well-known name.

        Args:
            role: What the column holds, as the configuration calls it.
            known: Names it usually has.
            named: The name the user gave.

        Returns:
            The name without type suffix.

        Raises:
            DataError: If there is no such column, or several.
        """
        candidates = [name for name in self.columns if name in ((named,) if named is not None else known)]
        candidates += [name for name in candidates if name in self.repeated]
        if len(candidates) == 1:
            return candidates[0]
        if candidates:
            cure = "Keep one" + ("" if len(set(candidates)) == 1 else _or_name(role))
            raise DataError(
                f"{self.what}: {self.path} has several columns for the {role}: {', '.join(candidates)}. {cure}."
            )
        expected = repr(named) if named is not None else f"one of {', '.join(known)}"
        cure = f"Rename one{_or_name(role)}."
        # A list of items may well have one column, whose name then looks like one.
        if (
            self.separator is not None
            and len(self.columns) == 1
            and (role != CATALOGUE or not next(iter(self.columns)).isidentifier())
        ):
            option = "`separator` under [items] of" if role == CATALOGUE else "--separator, or `separator` in"
            cure += f" If something else is between columns, say what ({option} a dataset.toml)."
        raise DataError(
            f"{self.what}: {self.path} has no column for the {role}: expected {expected}, found "
            f"{', '.join(map(repr, self.columns))}. {cure}"
        )

    def find_optional(self, role: str, known: Sequence[str], named: str | None = None) -> str | None:
        """Like :meth:`find`, but None if the user named no column and there is none with a well-known name."""
        if named is None and self.columns.keys().isdisjoint(known):
            return None
        return self.find(role, known, named)

    def read(self, names: Mapping[str, str]) -> pl.DataFrame:
        """Read some columns; those of a text file arrive as strings.

        Args:
            names: The column to read, by the name that it gets.

        Raises:
            DataError: If the file is damaged or has no rows.
        """
        columns = [self.columns[name] for name in names.values()]
        frame = _parse(lambda: self._read(columns), self.path, self.what)
        if frame.is_empty():
            raise DataError(f"{self.what}: {self.path} has a header but no rows.")
        return frame.select(pl.col(self.columns[name]).alias(role) for role, name in names.items())

    def read_ids(self, name: str) -> pl.Series:
        """Read a column of external ids.

        Returns:
            A series of Int64 or String.

        Raises:
            DataError: If an id is missing, or of another type than these.
        """
        parse = parse_ids if self.separator is None else parse_text_ids
        return parse(self.read({name: name})[name], f"{self.what}: {self.path}, column {name!r}")

    def _read(self, columns: list[str]) -> pl.DataFrame:
        if self.separator is None:
            return pl.read_parquet(self.path, columns=columns)
        rows = pl.scan_csv(
            self.path, separator=self.separator, infer_schema=False, quote_char=_quote(self.separator)
        ).select(columns)
        # A line of too many fields is noticed only where all columns are read, which streaming does a part at a time.
        whole = pl.QueryOptFlags(projection_pushdown=False)
        return _without_blank_end(rows.collect(engine="streaming", optimizations=whole), self.path)


def read_item_ids(
    path: str | Path, column: str | None = None, separator: str | None = None, elsewhere: str | None = None
) -> pl.Series:
    """Read a catalogue of items: one row for each, in the order of the rows of feature matrices.

    Args:
        path: A text or Parquet file.
        column: Of the external ids; by default ``elsewhere`` or a well-known name.
        separator: As for :meth:`Table.open`.
        elsewhere: The column of item ids in the interactions, which the list may have as well.

    Returns:
        External ids (I,).

    Raises:
        DataError: If the file is unusable, or an id is missing or repeated.
    """
    table = Table.open(path, "Item catalogue", separator)
    if column is None and elsewhere in table.columns:
        column = elsewhere
    name = table.find(CATALOGUE, ITEM_COLUMNS, column)
    return unique_ids(table.read_ids(name), f"Item catalogue: {table.path}, column {name!r}")


def parse_ids(values: pl.Series, where: str) -> pl.Series:
    """External ids as integers or strings, whichever the values are.

    Args:
        values: A column (N,).
        where: File and column, to begin error messages with.

    Returns:
        A series (N,) of Int64 or String.

    Raises:
        DataError: If an id is missing, or of another type than these.
    """
    if values.dtype in (pl.Categorical, pl.Enum):
        values = values.cast(pl.String)
    if not (values.dtype.is_integer() or values.dtype == pl.String):
        raise DataError(f"{where}: expected ids that are integers or strings, got {values.dtype}. Convert the column.")
    missing = values.is_null()
    if values.dtype == pl.String:
        missing |= values.eq_missing("")
    if missing.any():
        raise DataError(
            f"{where}: the id in row {int(missing.arg_max()) + 1} is missing ({missing.sum()} in all; rows count from "
            "1 below the header). Fill or remove these rows."
        )
    if values.dtype.is_integer():
        try:
            return values.cast(pl.Int64)
        except pl.exceptions.PolarsError as error:
            raise DataError(f"{where}: an id exceeds 64-bit signed integers. Store the ids as strings.") from error
    return values


def parse_text_ids(values: pl.Series, where: str) -> pl.Series:
    """Like :func:`parse_ids` for a text file's column: integers if every value is written as one."""
    values = parse_ids(values, where)
    if values.dtype != pl.String:
        return values
    integers = values.cast(pl.Int64, strict=False)
    is_canonical = integers.null_count() == 0 and (integers.cast(pl.String) == values).all()
    return integers if is_canonical else values


def unique_ids(ids: pl.Series, where: str) -> pl.Series:
    """Return ``ids`` (N,) if no two are equal.

    Raises:
        DataError: Naming one that occurs again.
    """
    if ids.n_unique() == len(ids):
        return ids
    repeated = ids.filter(ids.is_duplicated())
    raise DataError(
        f"{where}: the id {repeated[0]!r} occurs more than once ({repeated.n_unique()} such ids). "
        "Keep one row for each id."
    )


def same_kind(first: pl.Series, second: pl.Series) -> tuple[pl.Series, pl.Series]:
    """Write both as strings if one is; nothing is lost, since an integer has one spelling."""
    if first.dtype == second.dtype:
        return first, second
    return first.cast(pl.String), second.cast(pl.String)


def positions(ids: pl.Series, catalogue: pl.Series) -> NDArray[np.int64]:
    """Where each id (N,) stands in a catalogue of unique ids (C,), or -1.

    Args:
        ids: External ids.
        catalogue: External ids of the same type.
    """
    row = pl.Series("row", np.arange(len(catalogue)), dtype=pl.Int64)
    known = pl.DataFrame({"id": catalogue, "row": row})
    found = pl.DataFrame({"id": ids}).join(known, on="id", how="left", maintain_order="left")
    return np.array(found["row"].fill_null(-1), dtype=np.int64)


def kind(ids: pl.Series) -> str:
    """The type of external ids in words."""
    return "strings" if ids.dtype == pl.String else "integers"


def _header(path: Path, separator: str) -> list[str]:
    frame = pl.read_csv(path, separator=separator, n_rows=0, infer_schema=False, quote_char=_quote(separator))
    return list(frame.columns)


def _without_blank_end(frame: pl.DataFrame, path: Path) -> pl.DataFrame:
    """The rows of a text file less those of blank lines at its end, which an editor may have left."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _END))
        end = file.read()
    blank = end[len(end.rstrip(b"\r\n")) :].count(b"\n") - 1
    while blank > 0 and len(frame) and all(value is None for value in frame.row(-1)):
        frame, blank = frame.head(-1), blank - 1
    return frame


def _quote(separator: str) -> str | None:
    # Tab-separated files of the field do not quote; a stray quotation mark there belongs to the id.
    return None if separator == "\t" else '"'


def _parse(read: Any, path: Path, what: str) -> Any:
    try:
        return read()
    except pl.exceptions.NoDataError as error:
        raise DataError(f"{what}: {path} is empty. Restore it from its source.") from error
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise DataError(
            f"{what}: {path} is damaged or not what its suffix says ({reason}). "
            "Restore it, or convert it to UTF-8 text or Parquet."
        ) from error


def _or_name(role: str) -> str:
    """How to say which column it is, where that can be said."""
    if role in ("user", "item", "timestamp", "rating", "split"):
        return f", or name it (`{role}` in a dataset.toml, or --{role}-column)"
    if role == CATALOGUE:
        return (
            ", or name it (`column` under [items] of a dataset.toml, or --item-column if the interactions call it so)"
        )
    return ""
