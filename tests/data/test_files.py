"""Files that are read and written, directories that are replaced or held."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from dream_pyg.data import files
from dream_pyg.data.files import atomic_directory, atomic_path, held, read_json
from dream_pyg.errors import StoreError
from dream_pyg.graph.store import read_info


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / "store"
    with atomic_directory(path) as directory:
        (directory / "graph.json").write_text("old")
    return path


def replace(path: Path) -> None:
    with atomic_directory(path, replace=["graph.json", "edges"]) as directory:
        (directory / "graph.json").write_text("new")


def test_what_is_written_is_as_private_as_the_umask_says(tmp_path: Path):
    code = """
from dream_pyg.data.files import atomic_directory, write_text
with atomic_directory("store"):
    pass
write_text("file", "text")
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, umask=0o027, check=True)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("store", "file")] == [0o750, 0o640]


@pytest.mark.parametrize(("content", "said"), [("[]", "expected an object, got list"), ("{", "Expecting")])
def test_json_that_is_no_object_is_refused(tmp_path: Path, content: str, said: str):
    path = tmp_path / "run.json"
    path.write_text(content)
    with pytest.raises(StoreError, match=f"run.json is not readable JSON .{said}.* restore it"):
        read_json(path)


def test_a_directory_is_replaced_as_a_whole(old: Path):
    replace(old)
    assert (old / "graph.json").read_text() == "new"
    assert list(old.parent.iterdir()) == [old]


def test_a_directory_that_holds_anything_else_stays(old: Path):
    (old / "edges").write_text("old")
    (old / "run").mkdir()
    with pytest.raises(StoreError, match=r"holds run beside what was written with it.*Move these away"):
        replace(old)
    assert sorted(path.name for path in old.iterdir()) == ["edges", "graph.json", "run"]
    assert list(old.parent.iterdir()) == [old]


def test_what_a_link_points_to_is_replaced_and_the_link_stays(old: Path):
    link = old.parent / "links" / "store"
    link.parent.mkdir()
    link.symlink_to(old)
    replace(link)
    assert (old / "graph.json").read_text() == "new"
    assert link.is_symlink()
    files.write_text(link / "graph.json", "newer")
    assert (old / "graph.json").read_text() == "newer"
    assert list(link.parent.iterdir()) == [link]
    assert sorted(old.parent.iterdir()) == [link.parent, old]


def test_what_a_killed_process_had_begun_is_removed_by_the_next(tmp_path: Path):
    code = """
import os, signal
from pathlib import Path
from dream_pyg.data.files import atomic_directory, atomic_path, temporary_directory
with atomic_directory("store") as store, atomic_path("file") as file, temporary_directory(Path("file")) as parts:
    file.write_text("half")
    (store / "half").write_text("")
    (parts / "half").write_text("")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False).returncode == -signal.SIGKILL
    left = sorted(tmp_path.iterdir())
    assert [path.suffix for path in left] == [".tmp", ".tmp", ".tmp"]

    def write_both() -> None:
        files.write_text(tmp_path / "file", "whole")
        with atomic_directory(tmp_path / "store", replace=["mark"]) as store:
            (store / "mark").write_text("")

    write_both()  # What was begun a moment ago may not be locked yet.
    assert sorted(tmp_path.iterdir()) == sorted([*left, tmp_path / "file", tmp_path / "store"])
    for path in left:
        os.utime(path, (0, 0))
    handle = os.open(left[0], os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    write_both()
    assert sorted(tmp_path.iterdir()) == sorted([left[0], tmp_path / "file", tmp_path / "store"])
    os.close(handle)
    write_both()
    assert sorted(tmp_path.iterdir()) == [tmp_path / "file", tmp_path / "store"]


def test_what_is_being_written_is_not_abandoned(tmp_path: Path):
    with atomic_path(tmp_path / "file") as first, atomic_directory(tmp_path / "store") as store:
        os.utime(first, (0, 0))
        os.utime(store, (0, 0))
        files.write_text(tmp_path / "file", "second")
        with pytest.raises(StoreError), atomic_directory(tmp_path / "store", replace=["mark"]):
            raise StoreError("not now")
        first.write_text("first")
    assert (tmp_path / "file").read_text() == "first"
    assert (tmp_path / "store").is_dir()


def test_the_directory_one_is_in_is_not_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "here").mkdir()
    assert files.is_free(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    assert not files.is_free(Path())
    files.check_writable(Path())


def test_what_is_kept_of_a_linked_directory_is_named(old: Path):
    link = old.parent / "link"
    link.symlink_to(old)
    kept = old.rename(old.parent / f".{old.name}.abc.old")
    assert f"rename {kept} to have the old one back" in files.where_replaced(link)


def test_the_old_directory_is_put_back_if_the_new_cannot_be_renamed(old: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files, "_rename_to_free", lambda *paths: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(StoreError):
        replace(old)
    assert (old / "graph.json").read_text() == "old"
    assert list(old.parent.iterdir()) == [old]


def test_the_old_directory_is_named_if_it_could_not_even_be_put_back(old: Path, monkeypatch: pytest.MonkeyPatch):
    def cut_off(*paths: Path) -> None:
        monkeypatch.setattr(Path, "rename", lambda *given: (_ for _ in ()).throw(OSError("gone")))
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "_rename_to_free", cut_off)
    with pytest.raises(StoreError, match="gone"):
        replace(old)
    (kept,) = old.parent.iterdir()
    with pytest.raises(StoreError, match=f"It was being replaced .*; rename {kept} to have the old one back"):
        read_info(old)
    monkeypatch.undo()
    kept.rename(old)
    assert (old / "graph.json").read_text() == "old"


def test_a_directory_is_held_once_and_free_again_afterwards(tmp_path: Path):
    refused = pytest.raises(StoreError, match=f"works on the table at {tmp_path}. Wait")
    with held(tmp_path, "the table"), refused, held(tmp_path, "the table"):
        pass
    with held(tmp_path, "the table"):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_directory_where_there_are_no_locks_is_worked_on_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
):
    def refuse(handle: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    done = []
    with held(tmp_path, "the run"):
        done.append("what is done there")
    assert done
    assert f"{tmp_path} cannot be locked" in caplog.text
    assert f"{os.strerror(number)}): start no other process on the run" in caplog.text
    with pytest.raises(OSError, match="of the work"), held(tmp_path, "the run"):
        raise OSError("of the work")
