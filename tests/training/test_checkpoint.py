"""A checkpoint gives back what was saved, or is refused."""

from __future__ import annotations

import pickle
import random
import struct
import zipfile

import pytest
import torch

from dream_pyg.errors import ResumeError
from dream_pyg.training.checkpoint import FORMAT_VERSION, load_checkpoint, save_checkpoint


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def state():
    generator = torch.Generator().manual_seed(0)
    return {
        "model": {"weight": torch.randn(40, 8, generator=generator), "half": torch.ones(3, dtype=torch.float16)},
        "rng": torch.get_rng_state(),
        "epoch": 3,
        "best": {"recall@20": 0.1 + 0.2},
        "lines": ["one\n", "two\n"],
    }


def assert_equal(loaded, expected):
    assert type(loaded) is type(expected)
    if isinstance(expected, dict):
        assert list(loaded) == list(expected)
        for key in expected:
            assert_equal(loaded[key], expected[key])
    elif isinstance(expected, torch.Tensor):
        assert loaded.dtype == expected.dtype
        assert torch.equal(loaded, expected)
    else:
        assert loaded == expected


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "checkpoints" / "last.pt"
    save_checkpoint(path, state())
    return path


def test_gives_back_every_bit(path):
    assert_equal(load_checkpoint(path), {"format_version": FORMAT_VERSION, **state()})


def test_replaces_the_previous_one_and_leaves_nothing_else(path):
    save_checkpoint(path, {"epoch": 4})
    assert load_checkpoint(path) == {"format_version": FORMAT_VERSION, "epoch": 4}
    assert list(path.parent.iterdir()) == [path]


def test_missing(tmp_path):
    with pytest.raises(ResumeError, match=r"no checkpoint at .*last\.pt"):
        load_checkpoint(tmp_path / "last.pt")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_truncated(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ResumeError, match=r"last\.pt is truncated or damaged.*Restore it from a copy"):
        load_checkpoint(path)


def test_a_flipped_bit_is_refused_or_harmless(path):
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        entries = [_content_range(content, entry) for entry in archive.infolist()]
    chosen = random.Random(0)
    positions = {chosen.randrange(len(content)) for _ in range(300)}
    positions |= {chosen.randrange(*entry) for entry in entries for _ in range(20) if entry[0] < entry[1]}
    refused = 0
    for position in sorted(positions):
        damaged = bytearray(content)
        damaged[position] ^= 1 << chosen.randrange(8)
        path.write_bytes(damaged)
        try:
            loaded = load_checkpoint(path)
        except ResumeError:
            refused += 1
        else:  # padding and dates of the archive
            assert not any(start <= position < stop for start, stop in entries)
            assert_equal(loaded, {"format_version": FORMAT_VERSION, **state()})
    assert refused >= 100


def _content_range(content: bytes, entry: zipfile.ZipInfo) -> tuple[int, int]:
    name_length, extra_length = struct.unpack_from("<HH", content, entry.header_offset + 26)
    start = entry.header_offset + 30 + name_length + extra_length
    return start, start + entry.compress_size


@pytest.mark.parametrize("version", [None, 0, FORMAT_VERSION + 1, "1"])
def test_another_format_version(path, version):
    torch.save({**state(), **({} if version is None else {"format_version": version})}, path)
    with pytest.raises(ResumeError, match=rf"has format {version}, expected {FORMAT_VERSION}"):
        load_checkpoint(path)


def test_something_that_is_no_state(path):
    torch.save([1, 2, 3], path)
    with pytest.raises(ResumeError, match="has format None"):
        load_checkpoint(path)


@pytest.mark.parametrize("content", [b"", b"not a zip", bytes(1000)])
def test_not_an_archive(path, content):
    path.write_bytes(content)
    with pytest.raises(ResumeError, match="truncated or damaged"):
        load_checkpoint(path)


def test_an_archive_of_something_else(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(ResumeError, match="truncated or damaged"):
        load_checkpoint(path)


@pytest.mark.parametrize("legacy", [False, True])
def test_nothing_pickled_is_ever_run(path, tmp_path, legacy):
    bomb = tmp_path / "bomb"
    if legacy:
        path.write_bytes(pickle.dumps(Bomb(bomb)))
    else:
        torch.save({"format_version": FORMAT_VERSION, "model": Bomb(bomb)}, path)
    with pytest.raises(ResumeError):
        load_checkpoint(path)
    assert not bomb.exists()
    if legacy:
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert bomb.exists(), "the bomb itself must work for this test to mean anything"
