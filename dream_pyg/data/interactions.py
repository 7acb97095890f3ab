"""Who interacted with what: reading interactions, cleaning them, and the value object that holds the result."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from dream_pyg.data.tables import ITEM_COLUMNS, USER_COLUMNS, Table, parse_ids, parse_text_ids, positions
from dream_pyg.errors import ConfigError, DataError

logger = logging.getLogger("dream_pyg")

SPLITS = ("train", "valid", "test")
TRAIN, VALID, TEST = range(3)

TIMESTAMP_COLUMNS = ("timestamp",)
RATING_COLUMNS = ("rating",)
SPLIT_COLUMNS = ("x_label", "split")
_LABELS = {
    "0": TRAIN,
    "1": VALID,
    "2": TEST,
    "train": TRAIN,
    "valid": VALID,
    "validation": VALID,
    "val": VALID,
    "test": TEST,
}


@dataclass(frozen=True, eq=False)
class Interactions:
    """Interactions by internal id, each in one split, and the external id of every user and item.

    Attributes:
        user: Internal user id of each interaction (E,), int64.
        item: Internal item id of each interaction (E,), int64.
        split: :data:`TRAIN`, :data:`VALID` or :data:`TEST` of each interaction (E,), uint8.
        timestamp: Time of each interaction (E,) in the file's own unit, or None.
        user_ids: External user ids (U,); the row is the internal id.
        item_ids: External item ids (I,); the row is the internal id. Items without interactions may be among them.
        cold: Users and items of interactions that are in no split, as their users have none in train (2, C), or None.
    """

    user: NDArray[np.int64]
    item: NDArray[np.int64]
    split: NDArray[np.uint8]
    timestamp: NDArray[Any] | None
    user_ids: pl.Series
    item_ids: pl.Series
    cold: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        """Check lengths, ranges and that external ids are unique.

        Raises:
            DataError: Naming the attribute at fault.
        """
        for name, dtype in (("user", np.int64), ("item", np.int64), ("split", np.uint8)):
            array = getattr(self, name)
            if array.ndim != 1 or array.dtype != dtype:
                raise DataError(f"{name} must be a vector of {dtype.__name__} (got {array.dtype} {array.shape}).")
        for name in ("item", "split", "timestamp"):
            array = getattr(self, name)
            if array is not None and array.shape != self.user.shape:
                raise DataError(f"{name} must be as long as user, {self.user.shape} (got {array.shape}).")
        for name, ids in (("user", self.user_ids), ("item", self.item_ids)):
            if ids.null_count() or ids.n_unique() != len(ids):
                raise DataError(f"{name}_ids must be unique and without nulls.")
            _check_range(name, getattr(self, name), len(ids))
        _check_range("split", self.split, len(SPLITS))

    @property
    def num_users(self) -> int:
        """U, including users without a train interaction."""
        return len(self.user_ids)

    @property
    def num_items(self) -> int:
        """I, including items without any interaction."""
        return len(self.item_ids)

    def pairs(self, split_name: str) -> NDArray[np.int64]:
        """The interactions of one split.

        Args:
            split_name: One of :data:`SPLITS`.

        Returns:
            User and item of each (2, E of the split), in the order of the file.

        Raises:
            ConfigError: If there is no such split.
        """
        if split_name not in SPLITS:
            raise ConfigError(f"The splits are {', '.join(SPLITS)} (got {split_name!r}).")
        chosen = self.split == SPLITS.index(split_name)
        return np.stack([self.user[chosen], self.item[chosen]])


def read_interactions(
    path: str | Path,
    *,
    user: str | None = None,
    item: str | None = None,
    timestamp: str | None = None,
    rating: str | None = None,
    split: str | None = None,
    separator: str | None = None,
    with_ratings: bool = False,
) -> pl.DataFrame:
    """Read interactions as MMRec or RecBole write them (``.inter``), or as ``.csv``, ``.tsv`` or ``.parquet``.

    Args:
        path: The file; text files have a header.
        user: Column of the user ids; by default a well-known name, as for the others.
        item: Column of the item ids.
        timestamp: Column of the time, a number or a date.
        rating: Column of the rating, a number; read only if asked for.
        split: Column that says ``train``, ``valid`` or ``test``, or 0, 1 or 2.
        separator: Between the columns of a text file; by default by suffix.
        with_ratings: Whether ratings are read, which the file must have then.

    Returns:
        One row for each row of the file (E,) with the columns ``user_id`` and ``item_id`` (Int64 or String), where the
        file has them ``timestamp`` (Int64 or Float64) and ``split`` (UInt8), and if asked for ``rating`` (Float64).

    Raises:
        DataError: If the file is missing or damaged, a column is missing, or a value is missing or not understood.
    """
    table = Table.open(path, "Interactions", separator)
    found = {
        "user_id": table.find("user", USER_COLUMNS, user),
        "item_id": table.find("item", ITEM_COLUMNS, item),
        "timestamp": table.find_optional("timestamp", TIMESTAMP_COLUMNS, timestamp),
        "split": table.find_optional("split", SPLIT_COLUMNS, split),
    }
    if with_ratings or (rating is not None and rating not in table.columns):
        found["rating"] = table.find("rating", RATING_COLUMNS, rating)
    elif ignored := [name for name in (rating, *RATING_COLUMNS) if name in table.columns]:
        logger.info(
            "Ratings are not looked at: each row of %s is an interaction, whatever its %r. To leave low ones out, give "
            "--min-rating, or min_rating in [filter] of a dataset.toml",
            table.path,
            ignored[0],
        )
    columns = {role: name for role, name in found.items() if name is not None}
    for name in columns.values():
        if len(roles := [role for role, other in columns.items() if other == name]) > 1:
            raise DataError(
                f"Interactions: {table.path} has one column, {name!r}, for both {' and '.join(roles)}. Name another."
            )
    frame = table.read(columns)
    ids = parse_ids if table.separator is None else parse_text_ids
    parsers = {
        "user_id": ids,
        "item_id": ids,
        "timestamp": _parse_timestamps,
        "rating": _parse_ratings,
        "split": _parse_splits,
    }
    return frame.select(
        parsers[role](frame[role], f"Interactions: {table.path}, column {name!r}").alias(role)
        for role, name in columns.items()
    )


def drop_duplicates(frame: pl.DataFrame) -> pl.DataFrame:
    """Keep one row for each pair of user and item, and the order of rows.

    Of several, the one in train wins over valid over test (an item seen in training is no longer held out), then the
    earliest, then the first in the file.

    Args:
        frame: As :func:`read_interactions` returns it (E,).
    """
    pair = ["user_id", "item_id"]
    rows = frame.with_row_index("row")
    preference = [column for column in ("split", "timestamp") if column in frame.columns]
    repeated = rows.filter(frame.select(pair).is_duplicated())
    if repeated.is_empty():
        return frame
    kept = repeated.sort([*preference, "row"]).unique(subset=pair, keep="first", maintain_order=True)
    dropped = repeated.join(kept.select("row"), on="row", how="anti")
    keep = np.ones(len(frame), dtype=bool)
    keep[dropped["row"].to_numpy()] = False
    return frame.filter(pl.Series(keep))


def at_least(frame: pl.DataFrame, min_rating: float) -> pl.DataFrame:
    """Keep interactions with a rating that is not too low, and leave the column out.

    Args:
        frame: Interactions (E,) with the column ``rating``.
        min_rating: The lowest rating that is kept.

    Raises:
        DataError: If nothing remains.
    """
    kept = frame.filter(pl.col("rating") >= min_rating).drop("rating")
    if kept.is_empty():
        raise DataError(
            f"None of the {len(frame)} ratings is at least {min_rating:g}; the highest is {frame['rating'].max():g}. "
            "Lower filter.min_rating (--min-rating), or leave it out."
        )
    return kept


def k_core(frame: pl.DataFrame, k: int) -> pl.DataFrame:
    """Drop users and items with fewer than ``k`` interactions until there are none.

    Args:
        frame: Interactions without duplicates (E,), with the columns ``user_id`` and ``item_id``.
        k: The fewest interactions of a user and of an item; 0 and 1 change nothing.

    Returns:
        The rows that remain, in their order: the largest subset with that property.

    Raises:
        DataError: If nothing remains.
    """
    if k <= 1:
        return frame
    sides = [positions(frame[column], frame[column].unique()) for column in ("user_id", "item_id")]
    rows = np.arange(len(frame))
    while len(rows):
        enough = np.logical_and(*(np.bincount(side[rows])[side[rows]] >= k for side in sides))
        if enough.all():
            return frame[rows]
        rows = rows[enough]
    raise DataError(
        f"The {k}-core of the {len(frame)} interactions is empty: no set of users and items has at least {k} "
        "interactions each. Lower filter.k_core (--k-core), or set it to 0."
    )


def _parse_timestamps(values: pl.Series, where: str) -> pl.Series:
    if values.dtype == pl.String and not values.is_empty():
        dates = _as_dates(values)
        values = values if dates is None else dates
    if values.dtype in (pl.Date, pl.Datetime):
        values = values.cast(pl.Datetime("us")).dt.timestamp("us")
    if not (values.dtype.is_numeric() or values.dtype == pl.String):
        raise DataError(f"{where}: expected numbers or dates, got {values.dtype}. Convert the column, or remove it.")
    numbers = values.cast(pl.Float64, strict=False)
    if values.dtype.is_integer() or values.dtype == pl.String:
        integers = values.cast(pl.Int64, strict=False)
        numbers = numbers if integers.null_count() else integers
    expected, cure = "a number or a date such as 2023-12-31", "Give every row its time, or remove the column."
    return _all_finite(numbers, values, where, expected, cure)


def _parse_ratings(values: pl.Series, where: str) -> pl.Series:
    if values.dtype in (pl.Categorical, pl.Enum):
        values = values.cast(pl.String)
    if not (values.dtype.is_numeric() or values.dtype == pl.String):
        raise DataError(
            f"{where}: expected numbers, got {values.dtype}. Convert the column, or leave min_rating out "
            "(--min-rating)."
        )
    cure = "Give every row its rating, or leave min_rating out (--min-rating)."
    return _all_finite(values.cast(pl.Float64, strict=False), values, where, "a number", cure)


def _all_finite(numbers: pl.Series, values: pl.Series, where: str, expected: str, cure: str) -> pl.Series:
    """The numbers that values of a file were read as, if each of them is one."""
    finite = numbers.is_finite().fill_null(False)
    if finite.all():
        return numbers
    row = int((~finite).arg_max())
    raise DataError(
        f"{where}: expected {expected} in each row, got {values[row]!r} in row {row + 1} (rows count from 1 below the "
        f"header). {cure}"
    )


def _as_dates(values: pl.Series) -> pl.Series | None:
    """Text as dates and times of day, if it is that: ISO 8601, or with a blank in place of the T.

    Dates that begin with another number than the year are none: 01/02/2023 is January to some, February to others.
    """
    if not values.str.contains(r"^\s*\d{4}-").all():
        return None
    try:
        return values.str.to_datetime(time_unit="us", strict=True).dt.replace_time_zone(None)
    except pl.exceptions.PolarsError:  # Numbers, or dates of some other form.
        return None


def _parse_splits(values: pl.Series, where: str) -> pl.Series:
    words = values.cast(pl.String).str.strip_chars().str.to_lowercase()
    splits = words.replace_strict(_LABELS, default=None, return_dtype=pl.UInt8)
    if not splits.null_count():
        return splits
    row = int(splits.is_null().arg_max())
    raise DataError(
        f"{where}: expected 0, 1 or 2 for train, valid or test, or these words, got {values[row]!r} in row {row + 1} "
        "(rows count from 1 below the header). Correct the value, or remove the column to split anew."
    )


def _check_range(name: str, array: NDArray[Any], count: int) -> None:
    if len(array) and not 0 <= int(array.min()) <= int(array.max()) < count:
        raise DataError(f"{name} must be from 0 to {count - 1} (got {array.min()} to {array.max()}).")
