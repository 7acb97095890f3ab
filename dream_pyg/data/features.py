"""What a modality says of the items: a feature matrix, or a ready kNN graph, whose rows follow the item catalogue."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from dream_pyg.data.arrays import place_in_group
from dream_pyg.data.files import existing_file, float32_rows, whole_file
from dream_pyg.data.tables import ITEM_COLUMNS, Table, kind, positions, unique_ids
from dream_pyg.errors import DataError

FEATURE_SUFFIXES = (".npy", ".safetensors", ".parquet")
NEIGHBOR_SUFFIXES = (".npz", ".safetensors", ".parquet")

_BLOCK_ELEMENTS = 1 << 22
_SIMILARITY_NAMES = ("cosine", "similarity")


@dataclass(frozen=True, eq=False)
class FeatureMatrix:
    """Features of the items of a catalogue, left where they are (often a memory-mapped file) until rows are taken.

    Attributes:
        matrix: Stored rows (R, F) of real numbers, in any order.
        row_of_item: The stored row of each item (I,), int64; -1 for an item without the modality.
    """

    matrix: NDArray[Any]
    row_of_item: NDArray[np.int64]

    def __post_init__(self) -> None:
        """Check shapes, types and ranges.

        Raises:
            DataError: If one does not fit.
        """
        _check_matrix(self.matrix, "Features")
        if self.row_of_item.ndim != 1 or self.row_of_item.dtype != np.int64:
            raise DataError(
                f"row_of_item must be a vector of int64 (got {self.row_of_item.dtype} {self.row_of_item.shape})."
            )
        _check_index("row_of_item", self.row_of_item, len(self.matrix))

    @property
    def shape(self) -> tuple[int, int]:
        """Items and features, (I, F)."""
        return len(self.row_of_item), self.num_features

    @property
    def num_features(self) -> int:
        """F."""
        return int(self.matrix.shape[1])

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type in which the features are stored; rows are always given as float32."""
        return self.matrix.dtype

    @property
    def has(self) -> NDArray[np.bool_]:
        """Which items have the modality (I,)."""
        return self.row_of_item >= 0

    def take(self, start: int, stop: int) -> NDArray[np.float32]:
        """The features of items ``start`` to ``stop``, which is cut at I.

        Returns:
            Features (stop - start, F); zeros for an item without the modality.
        """
        rows = self.row_of_item[start:stop]
        if len(rows) and rows[0] >= 0 and (np.diff(rows) == 1).all():
            taken = float32_rows(self.matrix, slice(rows[0], rows[-1] + 1))
            return taken.copy() if np.may_share_memory(taken, self.matrix) else taken
        return self._gather(rows)

    def take_rows(self, items: NDArray[np.int64]) -> NDArray[np.float32]:
        """The features of some items.

        Args:
            items: Internal item ids (N,), in any order.

        Returns:
            Features (N, F); zeros for an item without the modality.
        """
        return self._gather(self.row_of_item[items])

    def to_array(self) -> NDArray[np.floating[Any]]:
        """All features (I, F), in memory: float16 if they are stored so, else float32."""
        result = np.empty(self.shape, dtype=np.float16 if self.dtype == np.float16 else np.float32)
        block = _rows_per_block(self.num_features)
        for start in range(0, len(result), block):
            result[start : start + block] = self.take(start, start + block)
        return result

    def select(self, items: NDArray[np.int64]) -> FeatureMatrix:
        """The features of a smaller catalogue.

        Args:
            items: The items that stay, by their id here (N,), in the new order.
        """
        return FeatureMatrix(self.matrix, self.row_of_item[items])

    def _gather(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        result = np.zeros((len(rows), self.num_features), dtype=np.float32)
        present = rows >= 0
        result[present] = float32_rows(self.matrix, rows[present])
        return result


@dataclass(frozen=True, eq=False)
class Neighbors:
    """A kNN graph over a catalogue: the neighbours of each item, the most similar first.

    Attributes:
        index: Neighbours of each item (I, K), int64; -1 fills rows that have fewer.
        similarity: Similarity to each neighbour (I, K), float32; 0 where there is none.
    """

    index: NDArray[np.int64]
    similarity: NDArray[np.float32]

    def __post_init__(self) -> None:
        """Check shapes, types, ranges and that no item has a neighbour twice.

        Raises:
            DataError: If one does not fit.
        """
        if self.index.ndim != 2 or self.index.dtype != np.int64 or not self.index.shape[1]:
            raise DataError(
                f"Neighbours must be an int64 matrix (I, K), K > 0 (got {self.index.dtype} {self.index.shape})."
            )
        if self.similarity.shape != self.index.shape or self.similarity.dtype != np.float32:
            raise DataError(
                f"Similarities must be a float32 matrix {self.index.shape} like the neighbours "
                f"(got {self.similarity.dtype} {self.similarity.shape})."
            )
        _check_index("neighbours", self.index, len(self.index))
        if not np.isfinite(self.similarity).all():
            item, slot = np.argwhere(~np.isfinite(self.similarity))[0]
            raise DataError(f"Similarities must be finite (got {self.similarity[item, slot]} at [{item}, {slot}]).")
        ordered = np.sort(self.index, axis=1)
        repeated = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
        if repeated.any():
            item, slot = np.argwhere(repeated)[0]
            raise DataError(f"Row {item} of the neighbours names {ordered[item, slot]} twice.")

    @classmethod
    def sort(cls, index: NDArray[Any], similarity: NDArray[Any]) -> Neighbors:
        """Order each row by falling similarity, then by id; entries of -1 go last.

        Args:
            index: Neighbours (I, K), -1 for none.
            similarity: Similarities (I, K).
        """
        similarity = np.where(index >= 0, similarity, 0).astype(np.float32)
        order = np.lexsort((index, np.where(index >= 0, -similarity, np.inf)), axis=1)
        return cls(
            np.take_along_axis(index, order, axis=1).astype(np.int64), np.take_along_axis(similarity, order, axis=1)
        )

    def select(self, items: NDArray[np.int64]) -> Neighbors:
        """The graph over a smaller catalogue; neighbours that left it are removed.

        Args:
            items: The items that stay, by their id here (N,), in the new order.
        """
        # One place more than there are items, so that the padding -1 maps to itself.
        new_id = np.full(len(self.index) + 1, -1, dtype=np.int64)
        new_id[items] = np.arange(len(items))
        return Neighbors.sort(new_id[self.index[items]], self.similarity[items])


def read_features(
    path: str | Path, item_ids: pl.Series, modality: str = "modality", column: str | None = None
) -> FeatureMatrix:
    """Read the features of one modality; rows of zeros count as missing.

    Args:
        path: A ``.npy`` file, or a ``.safetensors`` file with one tensor or one named ``features``: a matrix with a
            row for each item of the catalogue, in its order, which stays on disk. Or a ``.parquet`` file with a column
            of external item ids and either F numeric columns or one column of equally long lists, which has to be
            called ``features`` if there are others, for any of the items in any order, which is decoded into memory.
        item_ids: The catalogue: external item ids (I,).
        modality: Its name, for error messages.
        column: Of the ids in a ``.parquet`` file, if there is one of that name; else one with a well-known name.

    Raises:
        DataError: If the file is unusable, does not fit the catalogue, or holds a value that is not finite.
    """
    what = f"Features of {modality}"
    path = _file_of(path, what, FEATURE_SUFFIXES)
    if path.suffix.lower() == ".parquet":
        ids, matrix = _read_keyed_features(path, what, column)
        _check_kind(ids, item_ids, f"{what}: {path}")
        present = _scan(matrix, ids, f"{what}: {path}")
        row_of_item = positions(item_ids, ids)
    else:
        matrix = read_npy(path, what) if path.suffix.lower() == ".npy" else _read_tensor(path, what)
        _check_rows(len(matrix), len(item_ids), f"{what}: {path}")
        present = _scan(matrix, item_ids, f"{what}: {path}")
        row_of_item = np.arange(len(item_ids))
    row_of_item[(row_of_item >= 0) & ~present[row_of_item]] = -1
    if not (row_of_item >= 0).any():
        raise DataError(
            f"{what}: {path} has features for none of the {len(item_ids)} items, or only zeros. "
            "Check that it belongs to these interactions and uses the same item ids."
        )
    return FeatureMatrix(matrix, row_of_item)


def read_feature_ids(path: str | Path, modality: str = "modality", column: str | None = None) -> pl.Series | None:
    """The external ids of the items that a features file knows (R,), or None if its rows have no ids.

    Args:
        path: As for :func:`read_features`, like the others.
        modality: As there.
        column: As there.

    Raises:
        DataError: If the file is unusable, or an id is missing or repeated.
    """
    what = f"Features of {modality}"
    path = _file_of(path, what, FEATURE_SUFFIXES)
    if path.suffix.lower() != ".parquet":
        return None
    return _read_item_ids(Table.open(path, what), column)[1]


def read_neighbors(path: str | Path, item_ids: pl.Series, modality: str = "modality") -> Neighbors:
    """Read a ready kNN graph; whether an item counts as its own neighbour is left as it is.

    Args:
        path: A ``.npz`` or ``.safetensors`` file with ``indices`` (I, K), rows and values in the order of the
            catalogue and -1 for none, and optionally ``cosine`` or ``similarity`` (I, K). Or a ``.parquet`` file with
            the columns ``item_id`` and ``neighbor_id`` of external ids and optionally ``cosine`` or ``similarity``, a
            row for each pair.
        item_ids: The catalogue: external item ids (I,).
        modality: Its name, for error messages.

    Returns:
        The graph; similarities are 1 where the file has none.

    Raises:
        DataError: If the file is unusable or does not fit the catalogue.
    """
    what = f"Neighbours of {modality}"
    path = _file_of(path, what, NEIGHBOR_SUFFIXES)
    if path.suffix.lower() == ".parquet":
        index, similarity = _read_keyed_neighbors(path, item_ids, what)
    else:
        index, similarity = _read_neighbor_arrays(path, what)
        _check_rows(len(index), len(item_ids), f"{what}: {path}")
    try:
        _check_index("neighbours", index, len(item_ids))
        if (index < 0).all():
            raise DataError("No item has a neighbour.")
        return Neighbors.sort(index, similarity)
    except DataError as error:
        raise DataError(f"{what}: {path} is not a kNN graph of these items. {error} Compute it again.") from error


def _file_of(path: str | Path, what: str, suffixes: tuple[str, ...]) -> Path:
    path = existing_file(path, what)
    if path.suffix.lower() not in suffixes:
        raise DataError(f"{what}: expected a file ending in {', '.join(suffixes)}, got {path}. Convert it.")
    return path


def read_npy(path: Path, what: str) -> NDArray[Any]:
    """The matrix of real numbers (R, F) that a `.npy` file holds, memory-mapped.

    Raises:
        DataError: If it holds anything else, naming `what` it was wanted for.
    """
    try:
        matrix = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a damaged header raises whatever its parsers run into
        raise DataError(
            f"{what}: {path} is not a readable .npy array of numbers ({_first_line(error)}). "
            "Save it again with numpy.save(path, array.astype('float32'))."
        ) from error
    if not isinstance(matrix, np.ndarray):
        raise DataError(f"{what}: {path} is an archive of arrays, not one. Save one array with numpy.save.")
    _check_matrix(matrix, f"{what}: {path}")
    return matrix


def _read_tensor(path: Path, what: str) -> NDArray[Any]:
    tensors = _open_tensors(path, what)
    if len(tensors) != 1 and "features" not in tensors:
        raise DataError(
            f"{what}: {path} must hold one tensor or one named 'features', it holds {', '.join(tensors) or 'none'}. "
            "Rename the one to use."
        )
    matrix = tensors["features"] if "features" in tensors else next(iter(tensors.values()))
    _check_matrix(matrix, f"{what}: {path}")
    return matrix


def _open_tensors(path: Path, what: str) -> dict[str, NDArray[Any]]:
    """The tensors of a file by name, memory-mapped unless NumPy has no such type."""
    try:
        with safe_open(path, framework="pt") as stream:
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError, ValueError) as error:
        raise DataError(
            f"{what}: {path} is not a readable safetensors file ({_first_line(error)}). Restore or save it again."
        ) from error
    with path.open("rb") as stream:  # By NumPy, for what it maps can be asked for the size of its file.
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    return {name: _map(path, tensor, 8 + length + header[name]["data_offsets"][0]) for name, tensor in tensors.items()}


def _map(path: Path, tensor: torch.Tensor, offset: int) -> NDArray[Any]:
    try:
        like = tensor.numpy()
    except TypeError:  # bfloat16 and the 8-bit floats
        return np.asarray(tensor.float().numpy())
    return np.memmap(path, like.dtype, "r", offset, like.shape) if like.size else like


def _read_keyed_features(path: Path, what: str, column: str | None) -> tuple[pl.Series, NDArray[Any]]:
    """External ids (R,) and features (R, F) of a Parquet file; a null list counts as missing, so as zeros."""
    table = Table.open(path, what)
    id_column, ids = _read_item_ids(table, column)
    # pandas writes the index of a frame as a column of such a name.
    names = [name for name in table.columns if name != id_column and not re.fullmatch(r"__index_level_\d+__", name)]
    if not names:
        raise DataError(f"{what}: {path} has no feature columns beside {id_column!r}. Add a column 'features'.")
    if "features" in names:
        names = ["features"]
    frame = table.read({name: name for name in names})
    unusable = [name for name in names if not frame[name].dtype.is_numeric()]
    if len(names) == 1 and unusable:
        return ids, _matrix_of_lists(frame[names[0]], ids, f"{what}: {path}")
    if unusable:
        found = ", ".join(f"{name!r} is {frame[name].dtype}" for name in unusable[:3])
        raise DataError(
            f"{what}: {path} must have, beside {id_column!r}, numeric columns only or a single column of lists of "
            f"numbers, but it has {len(names)} columns of which {found}. Remove what is no feature, or rename the "
            "column of lists to 'features', so that the others are left out."
        )
    # In a floating type of its own NumPy shows nulls as NaN, which the scan reports with row and column.
    return ids, np.asarray(frame.to_numpy())


def _matrix_of_lists(lists: pl.Series, ids: pl.Series, where: str) -> NDArray[Any]:
    if not lists.dtype.is_nested() or isinstance(lists.dtype, pl.Struct) or not lists.dtype.inner.is_numeric():
        raise DataError(
            f"{where}, column {lists.name!r}: expected lists of numbers, got {lists.dtype}. Convert the column."
        )
    lists = lists.cast(pl.List(lists.dtype.inner))
    lengths = lists.list.len()
    present = lengths.drop_nulls()
    width = int(present[0]) if len(present) else 0
    differs = (lengths != width).fill_null(False)
    if differs.any():
        row = int(differs.arg_max())
        raise DataError(
            f"{where}: feature lists must be equally long, but that of item {ids[row]!r} has {lengths[row]} numbers "
            f"and the first has {width}. Make them equal, or leave out items without features."
        )
    if not width:
        raise DataError(f"{where}: no item has a feature, since all lists are empty or missing. Give at least one.")
    matrix = np.zeros((len(lists), width), dtype=_numpy_type(lists.dtype.inner))
    values = lists.drop_nulls().explode()
    if values.null_count():
        row = int(lists.list.eval(pl.element().is_null()).list.any().fill_null(False).arg_max())
        raise DataError(f"{where}: the features of item {ids[row]!r} contain a null. Fill it, or leave out the item.")
    matrix[lengths.is_not_null().to_numpy()] = values.to_numpy().reshape(-1, width)
    _check_matrix(matrix, where)
    return matrix


def _numpy_type(dtype: Any) -> np.dtype[Any]:
    return pl.Series([], dtype=dtype).to_numpy().dtype


def _scan(matrix: NDArray[Any], row_ids: pl.Series, where: str) -> NDArray[np.bool_]:
    """Read the matrix once, block by block: which rows (R,) differ from zero.

    Raises:
        DataError: If a value is not finite, or not once it is a float32.
    """
    _check_matrix(matrix, where)
    present = np.zeros(len(matrix), dtype=bool)
    first: tuple[int, int] | None = None
    count = 0
    block = _rows_per_block(matrix.shape[1])
    for start in range(0, len(matrix), block):
        with np.errstate(over="ignore"), whole_file(matrix):
            rows = np.array(matrix[start : start + block], dtype=np.float32)
        present[start : start + block] = rows.any(axis=1)
        # A finite sum proves that all are finite, without a mask of them.
        with np.errstate(over="ignore", invalid="ignore"):
            if math.isfinite(rows.sum(dtype=np.float64)):
                continue
        bad = ~np.isfinite(rows)
        count += int(bad.sum())
        if first is None and count:
            row, column = np.argwhere(bad)[0]
            first = (start + int(row), int(column))
    if first is not None:
        row, column = first
        raise DataError(
            f"{where} has {count} values that are not finite as float32; the first is {matrix[row, column]} in row "
            f"{row}, item {row_ids[row]!r}, column {column} (counted from 0). Fill them, or give an item without "
            "features a row of zeros."
        )
    return present


def _read_neighbor_arrays(path: Path, what: str) -> tuple[NDArray[Any], NDArray[Any]]:
    arrays = _read_npz(path, what) if path.suffix.lower() == ".npz" else _open_tensors(path, what)
    if "indices" not in arrays:
        raise DataError(f"{what}: {path} must hold an array 'indices', it holds {', '.join(arrays) or 'none'}.")
    index = arrays["indices"]
    if index.ndim != 2 or index.dtype.kind not in "iu" or not index.shape[1]:
        raise DataError(
            f"{what}: 'indices' in {path} must be an integer matrix (items, K), K > 0 "
            f"(got {index.dtype} {index.shape})."
        )
    names = [name for name in _SIMILARITY_NAMES if name in arrays]
    similarity = arrays[names[0]] if names else np.ones(index.shape, dtype=np.float32)
    if similarity.shape != index.shape or similarity.dtype.kind not in "fiu":
        raise DataError(
            f"{what}: {names[0]!r} in {path} must be a matrix of numbers like 'indices', {index.shape} "
            f"(got {similarity.dtype} {similarity.shape})."
        )
    return index, similarity


def _read_npz(path: Path, what: str) -> dict[str, NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files if name in ("indices", *_SIMILARITY_NAMES)}
    except Exception as error:  # a damaged archive raises whatever zipfile, zlib or numpy run into
        raise DataError(
            f"{what}: {path} is not a readable .npz archive of numbers ({_first_line(error)}). "
            "Save it again with numpy.savez(path, indices=..., cosine=...)."
        ) from error


def _read_keyed_neighbors(path: Path, item_ids: pl.Series, what: str) -> tuple[NDArray[Any], NDArray[Any]]:
    table = Table.open(path, what)
    where = f"{what}: {path}"
    sides = []
    for role in ("item_id", "neighbor_id"):
        ids = table.read_ids(table.find(role, (role,)))
        _check_kind(ids, item_ids, where)
        position = positions(ids, item_ids)
        if (position < 0).any():
            row = int((position < 0).argmax())
            raise DataError(
                f"{where}: the {role} {ids[row]!r} in row {row + 1} is not in the item catalogue of {len(item_ids)} "
                f"items ({int((position < 0).sum())} such rows). Remove these rows, or give the full catalogue."
            )
        sides.append(position)
    item, neighbor = sides
    name = table.find_optional("similarity", _SIMILARITY_NAMES)
    values = np.ones(len(item), dtype=np.float32)
    if name is not None:
        column = table.read({name: name})[name]
        if not column.dtype.is_numeric() or column.null_count():
            raise DataError(f"{where}: column {name!r} must hold a number in each row (got {column.dtype}).")
        values = column.to_numpy().astype(np.float32)
    order = np.argsort(item, kind="stable")
    count = np.bincount(item, minlength=len(item_ids))
    slot = place_in_group(item[order], count)
    index = np.full((len(item_ids), int(count.max())), -1, dtype=np.int64)
    similarity = np.zeros(index.shape, dtype=np.float32)
    index[item[order], slot] = neighbor[order]
    similarity[item[order], slot] = values[order]
    return index, similarity


def _read_item_ids(table: Table, column: str | None = None) -> tuple[str, pl.Series]:
    """The name and the content of the column that keys the rows of a Parquet file, each id once.

    It may have the name that it has in the interactions.
    """
    name = table.find("item_id", ITEM_COLUMNS, column if column in table.columns else None)
    return name, unique_ids(table.read_ids(name), f"{table.what}: {table.path}, column {name!r}")


def _check_matrix(matrix: NDArray[Any], where: str) -> None:
    if matrix.ndim != 2 or matrix.dtype.kind not in "fiu" or not matrix.size:
        _refuse_matrix(matrix, where)


def _refuse_matrix(matrix: NDArray[Any], where: str) -> NoReturn:
    raise DataError(
        f"{where} must be a matrix of real numbers (rows, features), neither of them 0 (got {matrix.dtype} "
        f"{matrix.shape}). Save a two-dimensional array, for example of float32."
    )


def _check_rows(num_rows: int, num_items: int, where: str) -> None:
    if num_rows != num_items:
        raise DataError(
            f"{where} has {num_rows} rows, but the item catalogue has {num_items} items. Give an items file that lists "
            "the item id of each row ([items] path, --items), or store the rows in Parquet with a column item_id."
        )


def _check_kind(ids: pl.Series, item_ids: pl.Series, where: str) -> None:
    if ids.dtype != item_ids.dtype:
        raise DataError(
            f"{where} has item ids that are {kind(ids)}, but those of the interactions are {kind(item_ids)}. "
            f"Store them as {kind(item_ids)}."
        )


def _check_index(name: str, index: NDArray[Any], count: int) -> None:
    if index.size and not -1 <= int(index.min()) <= int(index.max()) < count:
        raise DataError(f"{name} must be from -1 (none) to {count - 1} (got {index.min()} to {index.max()}).")


def _rows_per_block(num_features: int) -> int:
    return max(1, _BLOCK_ELEMENTS // num_features)


def _first_line(error: Exception) -> str:
    return (str(error).strip().split("\n")[0] or type(error).__name__).rstrip(".")
