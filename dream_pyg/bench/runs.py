"""What was measured, one JSON line a run, so that an interrupted benchmark goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dream_pyg.errors import StoreError

Run = dict[str, Any]
"""A ``key``, a ``status``, and what was measured."""

_SETTLED = ("done", "out of memory")
_SAME_MACHINE = ("processor", "units", "cores")
"""Of these an earlier measurement may have noted only some."""


class RunLog:
    """Runs by their keys, in a file that only grows; of runs with one key the last counts.

    Args:
        path: The file; a last line that was cut off is dropped.
        machine: What this machine is (see :func:`~dream_pyg.bench.machine.describe_machine`).

    Raises:
        StoreError: If a line is damaged, or the runs are of another machine.
    """

    def __init__(self, path: Path, machine: Mapping[str, Any]) -> None:
        self.path = path
        self.machine = dict(machine)
        self._runs: dict[str, Run] = {}
        last: Mapping[str, Any] | None = None
        for number, line in enumerate(_whole_lines(path), 1):
            try:
                record = json.loads(line)
                earlier = record.get("machine")
                if earlier is None:
                    self._runs[_name(record["key"])] = record
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise StoreError(f"{path}, line {number} is no run ({error}). Remove the line, or the file.") from error
            if earlier is not None:
                self._check(earlier)
                last = earlier
        if last != self.machine:
            self._append({"machine": self.machine})

    @property
    def runs(self) -> list[Run]:
        """All runs, in the order in which their keys first came."""
        return list(self._runs.values())

    def find(self, key: Mapping[str, Any]) -> Run | None:
        """The run of a key."""
        return self._runs.get(_name(key))

    def settled(self, key: Mapping[str, Any], limit: float) -> bool:
        """Whether a run need not be repeated: it ended, or was stopped by a limit that was not lower."""
        run = self.find(key)
        return run is not None and (run["status"] in _SETTLED or (run["status"] == "stopped" and run["limit"] >= limit))

    def add(self, run: Run) -> None:
        """Append a run; it is on the disk when this returns."""
        self._append(run)
        self._runs[_name(run["key"])] = run

    def _append(self, record: Mapping[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def _check(self, earlier: Mapping[str, Any]) -> None:
        for name in _SAME_MACHINE:
            if name in earlier and earlier[name] != self.machine.get(name):
                raise StoreError(
                    f"{self.path} was measured on another machine ({name}: {earlier.get(name)}, here "
                    f"{self.machine.get(name)}). Choose another directory with --out."
                )


def _name(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)


def _whole_lines(path: Path) -> list[str]:
    """The lines of a file; what follows the last line's end is removed from it."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with path.open("r+b") as stream:
            stream.truncate(len(whole))
    return whole.decode("utf-8", errors="replace").splitlines()
