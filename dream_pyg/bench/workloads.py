"""What the neighbours are searched among: matrices of the shapes of published data sets, or a file of yours.

Generated rows depend on the seed and their position alone, so that the first n rows of a workload are a smaller one of
the same kind.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from dream_pyg.data.features import FeatureMatrix, read_npy
from dream_pyg.data.files import existing_file, sha256_file
from dream_pyg.errors import ConfigError, DataError, did_you_mean
from dream_pyg.graph.knn import ArrayRows, MeanRows, Rows

Distribution = Literal["clustered", "gaussian"]

_BLOCK_ROWS = 8192
_LATENT_DIM = 32
_ROWS_PER_CLUSTER = 100
_SPREAD = 0.5  # of a row around the centre of its cluster, whose own coordinates have variance 1
_NOISE = 0.1  # of each feature, the signal's variance being 1 + _SPREAD**2
_FEWEST_ITEMS_OF_A_USER = 3
_USER_EXPONENT = 0.5  # of the power laws of activity and popularity
_ITEM_EXPONENT = 0.8


@dataclass(frozen=True)
class Workload:
    """N rows of F features, by name.

    Attributes:
        name: What reports call it.
        num_rows: N.
        num_features: F.
        dtype: How features are stored.
        origin: A distribution, or the digest of a file.
        seed: Of the generator; -1 for a file.
        num_items: Where rows are users, the items whose features they average; else 0.
        num_pairs: Where rows are users, their interactions; else 0.
        path: Where the rows lie, if they are not generated.
    """

    name: str
    num_rows: int
    num_features: int
    dtype: str = "float32"
    origin: str = "clustered"
    seed: int = 0
    num_items: int = 0
    num_pairs: int = 0
    path: str = ""

    def key(self) -> dict[str, Any]:
        """What tells this workload from others, wherever its file lies."""
        return {name: value for name, value in asdict(self).items() if name != "path" and value}

    def write(self, directory: Path) -> Source:
        """Generate the rows into files below ``directory``, unless they lie in one already."""
        if self.path:
            return Source(self.path, "")
        features = directory / "features.npy"
        shape = (self.num_items or self.num_rows, self.num_features)
        target = open_memmap(features, mode="w+", dtype=np.dtype(self.dtype), shape=shape)
        for start, block in _generate(*shape, self.origin, self.seed):
            target[start : start + len(block)] = block
        target.flush()
        if not self.num_items:
            return Source(str(features), "")
        pairs = directory / "pairs.npy"
        np.save(pairs, power_law_pairs(self.num_rows, self.num_items, self.num_pairs, self.seed))
        return Source(str(features), str(pairs))


@dataclass(frozen=True)
class Source:
    """The files of a workload."""

    features: str
    pairs: str  # train users and items (2, E); empty where rows are those of the features

    def open(self, num_rows: int) -> Rows:
        """The first rows, their features in memory as they are stored."""
        stored = np.load(self.features, mmap_mode="r", allow_pickle=False)
        if not self.pairs:
            return ArrayRows(np.array(stored[:num_rows]))
        pairs = np.load(self.pairs, allow_pickle=False)
        features = FeatureMatrix(np.array(stored), np.arange(len(stored)))
        return MeanRows(pairs[:, pairs[0] < num_rows], num_rows, features)


_SHAPES = {"baby": 7_050, "sports": 18_357, "clothing": 23_033, "electronics": 63_001}
PRESETS: dict[str, dict[str, Any]] = {
    **{name: {"num_rows": rows, "num_features": 4096} for name, rows in _SHAPES.items()},
    **{f"{name}-text": {"num_rows": rows, "num_features": 384} for name, rows in _SHAPES.items()},
    "clothing-users": {"num_rows": 39_387, "num_features": 4096, "num_items": 23_033, "num_pairs": 197_338},
    "million": {"num_rows": 1_000_000, "num_features": 384, "dtype": "float16"},
}
"""Numbers of items and users after the usual 5-core, with image features (4096) or text features (384)."""


def find_workload(name: str, *, distribution: Distribution = "clustered", seed: int = 0) -> Workload:
    """A workload by its name, by its shape ``ROWSxDIM``, or from a ``.npy`` file.

    Args:
        name: One of :data:`PRESETS`, a shape, or the path of a file with a matrix (N, F) of real numbers.
        distribution: ``clustered``: clusters of about a hundred rows, 32 latent dimensions seen through a random linear
            map, with some noise. ``gaussian``: independent normal features, in which nothing is near anything.
        seed: Of the generator.

    Raises:
        ConfigError: If no workload has this name.
        DataError: If the file is missing, or nothing can be searched in it.
    """
    generated: dict[str, Any] = {"origin": distribution, "seed": seed}
    if name in PRESETS:
        return Workload(name, **PRESETS[name], **generated)
    if shape := re.fullmatch(r"(\d+)x(\d+)", name):
        num_rows, num_features = map(int, shape.groups())
        _check_shape((num_rows, num_features), f"Dataset {name}", ConfigError)
        return Workload(name, num_rows, num_features, **generated)
    if name.endswith(".npy"):
        return _read_workload(name)
    raise ConfigError(
        f"There is no dataset {name!r}; choose one of {', '.join(PRESETS)}, a shape like 20000x384, or a .npy file."
        f"{did_you_mean(name, PRESETS)}"
    )


def _read_workload(name: str) -> Workload:
    path = existing_file(name, "Dataset")
    where = f"Dataset: {path}"
    matrix = read_npy(path, "Dataset")
    _check_shape(matrix.shape, where, DataError)
    present = sum(_checked(matrix[start : start + _BLOCK_ROWS], start, where) for start in _starts(len(matrix)))
    if present < 2:
        raise DataError(
            f"{where} has {present} rows that differ from zero, and zeros have no direction to compare. "
            "Check how it was made."
        )
    return Workload(
        name=path.stem, num_rows=len(matrix), num_features=matrix.shape[1], dtype=str(matrix.dtype),
        origin=sha256_file(path)[:16], seed=-1, path=str(path.absolute()),
    )  # fmt: skip


def _checked(rows: NDArray[Any], start: int, where: str) -> int:
    """How many of these rows differ from zero."""
    with np.errstate(over="ignore"):
        block = np.asarray(rows, dtype=np.float32)
    bad = np.argwhere(~np.isfinite(block))
    if len(bad):
        row, column = bad[0]
        raise DataError(
            f"{where} has {rows[row, column]} in row {start + row}, column {column} (counted from 0), which is not "
            "finite as float32. Fill such values, or make the row zeros."
        )
    return int(block.any(axis=1).sum())


def _check_shape(shape: tuple[int, ...], where: str, error: type[ConfigError | DataError]) -> None:
    num_rows, num_features = shape
    if num_rows < 2:
        raise error(f"{where} has {num_rows} rows; a search for neighbours needs at least 2.")
    if num_features < 2:
        raise error(
            f"{where} has {num_features} features a row; a cosine needs at least 2 to differ from 1 and -1. "
            "Save rows of several features."
        )


def _starts(num_rows: int) -> range:
    return range(0, num_rows, _BLOCK_ROWS)


def _generate(
    num_rows: int, num_features: int, distribution: str, seed: int
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    shared = np.random.default_rng(seed)
    num_clusters = max(1, num_rows // _ROWS_PER_CLUSTER)
    centre = shared.standard_normal((num_clusters, _LATENT_DIM), dtype=np.float32)
    seen = shared.standard_normal((_LATENT_DIM, num_features), dtype=np.float32) / np.sqrt(np.float32(_LATENT_DIM))
    for number, start in enumerate(_starts(num_rows)):
        own = np.random.default_rng((seed, number))
        size = min(_BLOCK_ROWS, num_rows - start)
        # Whole blocks are drawn, so that a smaller workload has the same rows.
        noise = own.standard_normal((_BLOCK_ROWS, num_features), dtype=np.float32)[:size]
        if distribution == "gaussian":
            yield start, noise
            continue
        latent = centre[own.integers(0, num_clusters, _BLOCK_ROWS)]
        latent += np.float32(_SPREAD) * own.standard_normal(latent.shape, dtype=np.float32)
        noise *= np.float32(_NOISE)
        noise += latent[:size] @ seen
        yield start, noise


def power_law_pairs(
    num_users: int, num_items: int, num_pairs: int, seed: int, item_exponent: float = _ITEM_EXPONENT
) -> NDArray[np.int64]:
    """Interactions whose users' activity and items' popularity follow power laws, none of them twice.

    Args:
        num_users: U, each of which has at least one item.
        num_items: I.
        num_pairs: E.
        seed: Of the generator.
        item_exponent: Of the power law of popularity.

    Returns:
        Users and items (2, E), users ascending.
    """
    generator = np.random.default_rng((seed, num_pairs))
    activity, popularity = (
        generator.permutation(np.arange(1, count + 1) ** -exponent)
        for count, exponent in ((num_users, _USER_EXPONENT), (num_items, item_exponent))
    )
    activity, popularity = activity / activity.sum(), popularity / popularity.sum()
    user = np.repeat(np.arange(num_users), min(_FEWEST_ITEMS_OF_A_USER, num_pairs // num_users))
    pairs = np.empty(0, dtype=np.int64)
    while len(pairs) < num_pairs:
        item = generator.choice(num_items, len(user), p=popularity)
        drawn = np.concatenate([pairs, user * num_items + item])
        # In the order of drawing, so that what was added last is cut off and every user keeps the first.
        pairs = drawn[np.sort(np.unique(drawn, return_index=True)[1])]
        user = generator.choice(num_users, max(1, num_pairs - len(pairs)), p=activity)
    pairs = np.sort(pairs[:num_pairs])
    return np.stack([pairs // num_items, pairs % num_items])
