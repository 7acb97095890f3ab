"""Reading and writing files so that a crash, a full disk or a flipped bit is never silent.

Files and directories are written beside their destination, flushed, and renamed, so a path holds either the old
content or the new (a directory that is replaced is missing for a moment; if the process is killed just then, the old
one lies beside). Tensors travel as safetensors with a digest of their content in the header.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import logging
import mmap
import os
import shutil
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from polars.exceptions import PolarsError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dream_pyg.errors import ConfigError, DataError, StoreError

logger = logging.getLogger("dream_pyg")

_CHUNK = 1 << 22
_TEMPORARY = ".tmp"
_SECONDS_TO_LOCK = 60.0
"""After which a process that makes a temporary file has locked it."""
_UMASK = os.umask(0)
os.umask(_UMASK)  # which cannot be read without being set


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary sibling of ``path``; on success it replaces ``path``, on failure it vanishes.

    Raises:
        StoreError: If the file system refuses (disk full, no permission, not a directory).
    """
    path = Path(path).resolve()  # A link stays, and what it points to is replaced.
    with _refusals_named(path), _parents_of(path):
        _remove_abandoned(path)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_TEMPORARY)
        temporary = Path(name)
        try:
            with suppress(OSError):  # Not every file system knows locks.
                _lock(handle)
            yield temporary
            _flush(temporary)
            temporary.chmod(0o666 & ~_UMASK)
            temporary.replace(path)
            _flush(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
            os.close(handle)


@contextmanager
def atomic_directory(path: str | Path, *, replace: Sequence[str] | None = None) -> Iterator[Path]:
    """Yield a temporary sibling directory that becomes ``path`` as a whole, or not at all.

    Args:
        path: The directory to create.
        replace: Names of files; an existing directory that holds the first and no others than these may be replaced.

    Raises:
        StoreError: If ``path`` exists and may not be replaced (also when another process created it meanwhile), or
            the file system refuses.
    """
    path = Path(path).resolve()  # A link stays, and what it points to is replaced.
    if replace is not None:
        check_replaceable(path, replace)
    with _refusals_named(path), _parents_of(path):
        _remove_abandoned(path)
        with temporary_directory(path) as temporary:
            replaced = temporary.with_suffix(".old")
            try:
                yield temporary
                for child in temporary.rglob("*"):
                    if child.is_file():
                        _flush(child)
                temporary.chmod(0o777 & ~_UMASK)
                if replace is not None and path.exists():
                    path.rename(replaced)
                _rename_to_free(temporary, path)
                _flush(path.parent)
                shutil.rmtree(replaced, ignore_errors=True)
            except BaseException:
                if replaced.exists() and not path.exists():
                    replaced.rename(path)
                raise


@contextmanager
def temporary_directory(path: Path) -> Iterator[Path]:
    """Yield a sibling directory of ``path`` that vanishes.

    If the process is killed, it is removed when ``path`` is next written with :func:`atomic_path` or
    :func:`atomic_directory`.
    """
    path = path.resolve()
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=_TEMPORARY))
    handle = os.open(temporary, os.O_RDONLY)
    try:
        with suppress(OSError):  # Not every file system knows locks.
            _lock(handle)
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(handle)


def _lock(handle: int) -> bool:
    """Lock a file or directory for as long as it is open here, if nobody else has it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove_abandoned(path: Path) -> None:
    """Remove what processes that were killed had begun to write to ``path``: what is written is locked."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*{_TEMPORARY}"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime < _SECONDS_TO_LOCK:
                continue
            handle = os.open(left, os.O_RDONLY)
            try:
                if _lock(handle):
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
            finally:
                os.close(handle)


def where_replaced(path: Path) -> str:
    """What to tell of a directory that is missing because the process that was replacing it was killed, or nothing."""
    path = path.resolve()
    kept = [other for other in path.parent.glob(f".{path.name}.*.old") if not path.exists()]
    return f" It was being replaced when that was cut off; rename {kept[0]} to have the old one back." if kept else ""


@contextmanager
def held(directory: Path, what: str) -> Iterator[None]:
    """Hold a directory for this process alone, where the file system knows locks; where it does not, warn and go on.

    Args:
        directory: The directory; it exists.
        what: What lies there, for messages.

    Raises:
        StoreError: If another process holds it.
    """
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            ours = _lock(handle)
        except OSError as error:  # Not every file system knows locks.
            logger.warning("%s cannot be locked (%s): start no other process on %s meanwhile.", directory, error, what)
            ours = True
        if not ours:
            raise StoreError(f"Another process works on {what} at {directory}. Wait for it, or end it.")
        yield
    finally:
        os.close(handle)


def check_writable(path: Path) -> None:
    """Find out before the work whether its result can be written to ``path``.

    Raises:
        StoreError: If the file system refuses.
    """
    path = path.resolve()
    with _refusals_named(path), tempfile.TemporaryFile(dir=next(parent for parent in path.parents if parent.exists())):
        pass


def is_free(path: Path) -> bool:
    """Whether something can be made at ``path``: nothing is there, or an empty directory.

    The directory that the process is in cannot: what is made takes its place.
    """
    if path.is_dir():
        if path.resolve() == Path.cwd():
            return False
        with suppress(OSError):  # not readable: it may hold anything
            return not any(path.iterdir())
    return not path.exists()


def check_replaceable(path: Path, names: Sequence[str]) -> None:
    """Check that ``path`` is free, or a directory of some files, the first of them surely: all else is not ours.

    Raises:
        StoreError: If it is something else, or holds anything else.
    """
    if is_free(path):
        return
    if not (path / names[0]).is_file():
        raise StoreError(
            f"{path} exists and has no {names[0]}, so it is left as it is even with --overwrite. "
            "Remove it or choose another path."
        )
    if others := sorted(child.name for child in path.iterdir() if child.name not in names):
        raise StoreError(
            f"{path} holds {', '.join(others[:3])}{' and more' if len(others) > 3 else ''} beside what was written "
            "with it, which would be lost, so it is left as it is even with --overwrite. Move these away, or choose "
            "another path."
        )


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` to ``path`` atomically as indented JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        StoreError: If the file is missing, is not JSON, or holds something else.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"expected an object, got {type(content).__name__}")
        return content
    except FileNotFoundError as error:
        raise StoreError(f"{path} does not exist.") from error
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} is not readable JSON ({error}). Create it anew or restore it from a copy.") from error


def existing_file(path: str | Path, what: str) -> Path:
    """Return ``path`` if it is a readable file.

    Raises:
        DataError: Naming ``what`` the file was wanted for.
    """
    path = Path(path)
    if not path.is_file():
        kind = "a directory" if path.is_dir() else "missing"
        raise DataError(f"{what}: expected a file at {path}, but it is {kind}. Check the path.")
    if not os.access(path, os.R_OK):
        raise DataError(f"{what}: {path} is not readable by this user. Change its permissions.")
    return path


@contextmanager
def whole_file(array: NDArray[Any]) -> Iterator[None]:
    """Read from an array that may be mapped from a file, which must not have become shorter.

    A program is killed when it reads what is mapped beyond the end of a file, and finds zeros on the last page. So the
    size is compared before, and after; only a file that shrinks in between, while one block is read, still kills.

    Raises:
        DataError: If the file is shorter than when it was mapped.
    """
    _check_whole(array)
    yield
    _check_whole(array)


def float32_rows(array: NDArray[Any], rows: slice | NDArray[np.int64]) -> NDArray[np.float32]:
    """Some rows of an array as float32: a view where it is float32 in memory and they are a slice.

    What was read of a file that the array is mapped from does not stay in memory.
    """
    with whole_file(array):
        taken = array[rows]
        if taken.dtype == np.float16:
            found = torch.from_numpy(np.array(taken, order="C")).float().numpy()  # many times as fast as NumPy
        else:
            # What is mapped is copied while its file is known to be whole.
            copied = True if isinstance(taken, np.memmap) else None
            found = np.array(taken, dtype=np.float32, order="C", copy=copied)
    release(array)
    return found


def release(array: NDArray[Any]) -> None:
    """Give back the memory of what was read of an array that is mapped from a file; reading it again is allowed.

    The system takes such memory when it has none left, but until then it counts as this process's.
    """
    mapped = _mapped(array)
    # What was written into a private copy would be lost.
    if mapped is not None and not mapped.flags.writeable and sys.platform == "linux":
        mapped.base.madvise(mmap.MADV_DONTNEED)


def read_lines(path: str | Path, what: str) -> list[str]:
    """The lines of a UTF-8 text file that are not blank, with or without a byte order mark, as they are written.

    Raises:
        DataError: If it is missing or not text.
    """
    try:
        lines = existing_file(path, what).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{what}: {path} is not UTF-8 text ({error}). Save it as UTF-8.") from error
    return [line.removesuffix("\r") for line in lines if line.strip()]


def sha256_file(path: str | Path) -> str:
    """The SHA-256 digest of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def read_toml(path: str | Path, what: str, cure: str = "Check the path.") -> dict[str, Any]:
    """Read a file that people write.

    Args:
        path: The file.
        what: What it is, for messages.
        cure: What to do where it cannot be read.

    Raises:
        ConfigError: If it cannot be read, or is no TOML.
    """
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"Cannot read the {what} {path}: {error.strerror}. {cure}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"The {what} {path} is not valid TOML: {error}.") from error


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write named tensors atomically as safetensors; the header keeps ``metadata`` and a digest of all content."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = dict(metadata or {})
    header["sha256"] = _digest(contiguous, header)
    with atomic_path(path) as temporary:
        save_file(contiguous, temporary, metadata=header)


def load_tensors(path: str | Path, *, verify: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Load what :func:`save_tensors` wrote, memory-mapped.

    Args:
        path: The safetensors file.
        verify: Whether to read every byte and compare the digest.

    Returns:
        The tensors by name and the metadata.

    Raises:
        StoreError: If the file is missing, truncated, or differs from its digest.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="pt") as stream:
            metadata = dict(stream.metadata() or {})
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 - not a mapping
    except FileNotFoundError as error:
        raise StoreError(f"{path} does not exist.") from error
    except (OSError, SafetensorError, ValueError) as error:
        raise StoreError(f"{path} is truncated or damaged ({error}). Create it anew or restore it.") from error
    expected = metadata.pop("sha256", None)
    if verify and expected != _digest(tensors, metadata):
        raise StoreError(f"{path} is damaged: its content does not match its checksum. Create it anew or restore it.")
    return tensors, metadata


def _check_whole(array: NDArray[Any]) -> None:
    mapped = _mapped(array)
    if mapped is None:
        return
    expected, size = mapped.offset + mapped.nbytes, mapped.base.size()
    if size < expected:
        raise DataError(
            f"{mapped.filename} was cut while it was read: expected {expected} bytes, got {size}. "
            "Restore it, leave it alone until this is done, and start again."
        )


def _mapped(array: Any) -> Any:
    """The array that maps a file, of which this one is a part; None for an array in memory."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array if isinstance(array, np.memmap) and isinstance(array.base, mmap.mmap) else None


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def _refusals_named(path: Path) -> Iterator[None]:
    """Turn what the file system says into a StoreError about ``path``."""
    try:
        yield
    except (OSError, SafetensorError, PolarsError) as error:
        raise StoreError(
            f"Cannot write {path}: {error}. Nothing was left behind; free some space or choose another path."
        ) from error


@contextmanager
def _parents_of(path: Path) -> Iterator[None]:
    """Create the missing directories above ``path``; on failure they vanish again."""
    missing = [parent for parent in path.parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for parent in missing:
            with suppress(OSError):  # not empty: another process uses it
                parent.rmdir()
        raise


def _rename_to_free(source: Path, path: Path) -> None:
    try:
        source.rename(path)
    except OSError as error:
        if not is_free(path):
            raise StoreError(
                f"{path} was created by another process meanwhile; this result was discarded. "
                "Run the command again to reuse what is there, or choose another path."
            ) from error
        raise


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
