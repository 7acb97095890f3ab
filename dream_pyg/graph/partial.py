"""What an unfinished build has found so far: saved now and then beside its target, so that the same command goes on.

Layout, in a hidden directory beside the target that is named after the build's fingerprint::

    items_by_image.safetensors           the neighbours of a relation graph that is finished
    users_by_image.search.safetensors    the lists of candidates of a search, and how many of its strips are done
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dream_pyg import ranks
from dream_pyg.data.files import load_tensors, save_tensors
from dream_pyg.data.progress import progress
from dream_pyg.data.signals import interruptible, termination_as_interrupt
from dream_pyg.errors import Interrupted, StoreError
from dream_pyg.graph.knn import FoundNeighbors, Rows, SearchReport, cosine_knn, nobody
from dream_pyg.graph.knn.candidates import CandidateLists
from dream_pyg.graph.knn.exact import Strip

logger = logging.getLogger("dream_pyg")

_SECONDS_BETWEEN_SAVES = 60.0
_SAVING_SHARE = 20
"""Saving takes at most this part of the time."""


class PartialBuild:
    """The searches of one build, which go on where an earlier attempt at the same build stopped.

    While it searches, SIGINT and SIGTERM save what was found and raise :class:`~dream_pyg.errors.Interrupted`: of an
    exact search what it has done of its strips, of any other the searches that are finished.

    Args:
        path: The directory that is to be built.
        fingerprint: Of what is to be built there.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self._target = path
        self._directory = path.parent / f".{path.name}.{fingerprint[:16]}.partial"
        self._unsaved: dict[str, FoundNeighbors] = {}
        self._next_save = time.monotonic() + _SECONDS_BETWEEN_SAVES
        self._interrupted = threading.Event()

    def search(self, rows: Rows, num_neighbors: int, *, what: str, **options: Any) -> FoundNeighbors:
        """The neighbours that were found before, or else those of :func:`~dream_pyg.graph.knn.cosine_knn`."""
        name = what.replace(" ", "_")
        kept = None if ranks.rank() else self._load(name)
        if ranks.first_says(kept is not None):
            if kept is None:
                return nobody(rows, num_neighbors)
            neighbors = {part: tensor.numpy() for part, tensor in kept[0].items()}
            report = SearchReport(**json.loads(kept[1]["report"]))
            return FoundNeighbors(neighbors["index"].astype(np.int64), neighbors["similarity"], report)
        try:
            with termination_as_interrupt():
                found = cosine_knn(rows, num_neighbors, what=what, steps=partial(self._steps, name, what), **options)
        except KeyboardInterrupt:  # of a search without steps, of which nothing can be saved
            self._interrupted.set()
            self._look_up()
            raise
        if not ranks.rank():
            self._unsaved[name] = found
        self._look_up()
        return found

    def discard(self) -> None:
        """Remove what was saved, also by builds of other fingerprints that were never finished."""
        for directory in self._target.parent.glob(".*.partial"):
            if directory.name.rsplit(".", 2)[0] == f".{self._target.name}":
                shutil.rmtree(directory, ignore_errors=True)

    def _steps(self, name: str, what: str, strips: Sequence[Strip], lists: CandidateLists) -> Iterator[Strip]:
        search = f"{name}.search" + (f"-{ranks.rank()}-of-{ranks.num_ranks()}" if ranks.num_ranks() > 1 else "")
        kept = self._load(search)
        done = 0
        if kept is not None and kept[1]["strips"] == str(len(strips)) and lists.restore(kept[0]):
            done = int(kept[1]["done"])
            logger.info("kNN of %s goes on at %d%%", what, 100 * done // len(strips))
        with interruptible() as self._interrupted:
            for strip in progress(strips[done:], f"kNN of {what}", initial=done, hidden=not ranks.speaks()):
                yield strip
                done += 1
                self._look_up(search, lists, {"done": str(done), "strips": str(len(strips))})

    def _look_up(
        self, name: str = "", lists: CandidateLists | None = None, position: dict[str, str] | None = None
    ) -> None:
        """Look whether a signal came or it is time to save."""
        interrupted = self._interrupted.is_set()
        started = time.monotonic()
        if not interrupted and started < self._next_save:
            return
        try:
            for finished, neighbors in self._unsaved.items():
                index = torch.from_numpy(neighbors.index.astype(np.int32))
                tensors = {"index": index, "similarity": torch.from_numpy(neighbors.similarity)}
                save_tensors(self._file(finished), tensors, {"report": json.dumps(neighbors.report.to_dict())})
                for search in self._directory.glob(f"{finished}.search*"):
                    search.unlink(missing_ok=True)
            self._unsaved.clear()
            if lists is not None:
                save_tensors(self._file(name), lists.state(), position)
        except StoreError as error:
            if interrupted:
                raise
            logger.warning("An interruption would lose what was found so far: %s", error)
        now = time.monotonic()
        self._next_save = now + max(_SECONDS_BETWEEN_SAVES, _SAVING_SHARE * (now - started))
        if interrupted:
            raise Interrupted(
                f"Interrupted; what was found so far is saved in {self._directory}. Continue with the same command."
            )

    def _load(self, name: str) -> tuple[dict[str, torch.Tensor], dict[str, str]] | None:
        if not self._file(name).exists():
            return None
        try:
            return load_tensors(self._file(name))
        except StoreError as error:
            logger.warning("%s That part is searched again.", error)
            return None

    def _file(self, name: str) -> Path:
        return self._directory / f"{name}.safetensors"
