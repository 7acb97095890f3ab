"""What is wrong with a configuration, and in what two differ, in one clear sentence or line each."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel, ValidationError


def explain(error: ValidationError, where: str, schema: type[Any]) -> str:
    """Say what is wrong with a configuration: which key, what was expected, what was given, what was probably meant.

    Args:
        error: What pydantic raised.
        where: The file or section, to begin the sentence with.
        schema: The model or dataclass that was validated, for the names it knows.
    """
    return f"{where}: " + "; ".join(_one(item, schema) for item in error.errors()) + "."


def _one(item: Any, schema: type[Any]) -> str:
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] in {"extra_forbidden", "unexpected_keyword_argument"}:
        known = _known_keys(schema, item["loc"][:-1])
        close = get_close_matches(str(item["loc"][-1]), known, n=1)
        hint = f", did you mean {close[0]!r}?" if close else ""
        return f"unknown key {key!r}{hint} (known: {', '.join(known)})"
    if item["type"] == "missing":
        return f"{key!r} is missing"
    reason = str(item["msg"]).removeprefix("Value error, ").rstrip(".")
    return f"{key or 'value'}: {reason[0].lower() + reason[1:]} (got {item['input']!r})"


def _known_keys(schema: Any, location: tuple[Any, ...]) -> list[str]:
    for part in location:
        schema = _entry(schema, part)
    if isinstance(schema, type) and issubclass(schema, BaseModel):
        return list(schema.model_fields)
    if dataclasses.is_dataclass(schema):
        return [field.name for field in dataclasses.fields(schema)]
    return []


def _entry(schema: Any, key: Any) -> Any:
    """The type of what ``schema``, a model or a mapping to models, holds under ``key``."""
    fields = getattr(schema, "model_fields", {})
    annotation = fields[key].annotation if key in fields else next(reversed(get_args(schema)), None)
    optional = [kind for kind in get_args(annotation) if kind is not type(None)]
    return optional[0] if type(None) in get_args(annotation) else annotation


def differences(here: Mapping[str, Any], there: Mapping[str, Any], besides: Collection[str] = ()) -> list[str]:
    """One line for each key in which two nested tables of plain values differ, besides those left out."""
    mine, theirs = (flatten(without(table, besides)) for table in (here, there))
    return [
        f"{key}: {mine.get(key, 'not set')} here, {theirs.get(key, 'not set')} there"
        for key in sorted(mine.keys() | theirs.keys())
        if mine.get(key) != theirs.get(key)
    ]


def without(table: Mapping[str, Any], keys: Collection[str], prefix: str = "") -> dict[str, Any]:
    """Nested tables less some values and tables, whose keys are joined by dots."""
    return {
        key: without(value, keys, f"{prefix}{key}.") if isinstance(value, Mapping) else value
        for key, value in table.items()
        if f"{prefix}{key}" not in keys
    }


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one, whose keys are joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
