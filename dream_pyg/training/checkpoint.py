"""Resumable checkpoints: the whole state of a training in one file that is never half-written or silently damaged."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch

from dream_pyg.data.files import atomic_path
from dream_pyg.errors import ResumeError

FORMAT_VERSION = 1


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` (tensors, numbers, strings and containers of them) atomically.

    Raises:
        StoreError: If the file system refuses.
    """
    with atomic_path(path) as temporary:
        try:
            torch.save({"format_version": FORMAT_VERSION, **state}, temporary)
        except RuntimeError as error:  # what PyTorch makes of a full disk
            raise OSError("the checkpoint could not be written completely") from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what :func:`save_checkpoint` wrote; no code in it is ever run.

    Raises:
        ResumeError: If the file is missing, truncated, damaged or of another format version.
    """
    cure = "Restore it from a copy, or start the run anew in another directory."
    if not path.is_file():
        raise ResumeError(f"There is no checkpoint at {path}, so there is nothing to resume. {cure}")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is None:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # A damaged archive fails in as many ways as it has bytes.
        raise ResumeError(f"The checkpoint {path} is truncated or damaged ({error}). {cure}") from error
    if damaged is not None:
        raise ResumeError(f"The checkpoint {path} is damaged: checksum of {damaged!r} does not match. {cure}")
    version = state.get("format_version") if isinstance(state, dict) else None
    if version != FORMAT_VERSION:
        raise ResumeError(f"The checkpoint {path} has format {version}, expected {FORMAT_VERSION}. {cure}")
    return state
