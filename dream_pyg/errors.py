"""Every error that a user can cause, by what has to be mended.

A message says what is wrong and where, what was expected, what was found and how to cure it. The command line
prints it as one ``Error:`` line; :class:`ConfigError` exits with 2, the others with 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class DreamPygError(Exception):
    """Base of all errors that this package raises on purpose."""


class DataError(DreamPygError):
    """An input file or array is missing, unreadable or contradicts the others."""


class ConfigError(DreamPygError):
    """A configuration value, option or name is unknown or out of range."""


class StoreError(DreamPygError):
    """A graph store or run directory is damaged, incomplete, occupied or of another format version."""


class ResumeError(DreamPygError):
    """A run cannot be continued with what was given."""


class SearchError(DreamPygError):
    """A search of neighbours cannot be as good as was asked for, or memory does not suffice for it."""


class TrainingError(DreamPygError):
    """Training cannot go on: a loss is no longer finite, or nothing can be learned from the graph."""


class ProcessError(DreamPygError):
    """Another of several processes that work together is gone."""


class MissingExtraError(DreamPygError):
    """An optional package is not installed."""


class BenchError(DreamPygError):
    """A measurement that others need did not come about."""


class Interrupted(DreamPygError):
    """A signal asked to stop, and what was done so far is saved."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question that ends a message about an unknown name, after a blank; nothing where no known name is like it."""
    close = get_close_matches(name, known, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
