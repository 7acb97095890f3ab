"""Feature matrices and ready kNN graphs: every format, and everything that may be wrong with one."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch_file

from dream_pyg.data.features import FeatureMatrix, Neighbors, read_feature_ids, read_features, read_neighbors
from dream_pyg.data.files import release, whole_file
from dream_pyg.errors import DataError
from dream_pyg.graph.knn import ArrayRows

IDS = pl.Series("item_id", ["a", "b", "c", "d"])
VALUES = np.array([[1, 2, 3], [0, 0, 0], [-4, 5, 6], [7, 8, 9]], dtype=np.float32)
INDICES = np.array([[1, 2], [3, -1], [0, 1], [2, 3]])
COSINE = np.array([[0.5, 0.9], [0.1, 0.0], [0.3, 0.3], [0.2, 0.8]], dtype=np.float32)
SORTED_INDICES = [[2, 1], [3, -1], [0, 1], [3, 2]]


def write_features(directory: Path, form: str, values: np.ndarray = VALUES) -> Path:
    """Write features of the items a to d; the Parquet forms shuffle the rows."""
    order = [2, 0, 3, 1]
    path = directory / f"features.{form.partition(' ')[0]}"
    match form:
        case "npy":
            np.save(path, values)
        case "safetensors":
            save_file({"any": values}, path)
        case "parquet list":
            pl.DataFrame({"item_id": IDS[order], "features": values[order].tolist()}).write_parquet(path)
        case "parquet array":
            pl.DataFrame({"item_id": IDS[order], "features": values[order]}).write_parquet(path)
        case "parquet columns":
            columns = {f"f{column}": values[order, column] for column in range(values.shape[1])}
            pl.DataFrame({"item_id": IDS[order], **columns}).write_parquet(path)
    return path


FORMS = ["npy", "safetensors", "parquet list", "parquet array", "parquet columns"]


def test_the_index_of_a_pandas_frame_is_no_feature(tmp_path: Path):
    frame = pl.DataFrame({"item_id": [1, 2], "a": [0.5, 1.0], "b": [2.0, 3.0], "__index_level_0__": [17, 4]})
    frame.write_parquet(tmp_path / "image.parquet")
    assert read_features(tmp_path / "image.parquet", pl.Series([1, 2])).shape == (2, 2)


@pytest.mark.parametrize("form", ["parquet list", "parquet array"])
def test_the_one_column_of_lists_has_any_name(tmp_path: Path, form: str):
    path = write_features(tmp_path, form)
    expected = read_features(path, IDS).to_array()
    pl.read_parquet(path).rename({"features": "embedding"}).write_parquet(path)
    np.testing.assert_array_equal(read_features(path, IDS).to_array(), expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int8", "int64"])
def test_features_round_trip(tmp_path: Path, form: str, dtype: str) -> None:
    features = read_features(write_features(tmp_path, form, VALUES.astype(dtype)), IDS)
    assert (features.shape, features.num_features) == ((4, 3), 3)
    kept = np.float16 if features.dtype == np.float16 else np.float32
    assert features.to_array().dtype == kept
    assert form not in ("npy", "safetensors") or features.dtype == dtype
    np.testing.assert_array_equal(features.to_array(), VALUES)
    assert features.has.tolist() == [True, False, True, True]


@pytest.mark.parametrize("form", FORMS[:2])
def test_matrices_stay_on_disk(tmp_path: Path, form: str) -> None:
    path = write_features(tmp_path, form)
    features = read_features(path, IDS)
    # Changing the file changes what is taken: nothing was copied.
    content = bytearray(path.read_bytes())
    content[-4:] = np.float32(42).tobytes()
    with path.open("r+b") as stream:
        stream.write(content)
    assert features.take(3, 4).tolist() == [[7, 8, 42]]


def test_bfloat16(tmp_path: Path) -> None:
    save_torch_file({"x": torch.from_numpy(VALUES).bfloat16()}, tmp_path / "x.safetensors")
    np.testing.assert_array_equal(read_features(tmp_path / "x.safetensors", IDS).to_array(), VALUES)


def test_the_tensor_named_features_is_chosen(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": VALUES + 1, "features": VALUES}, path)
    np.testing.assert_array_equal(read_features(path, IDS).to_array(), VALUES)
    save_file({"a": VALUES, "b": VALUES}, path)
    with pytest.raises(DataError, match=r"one tensor or one named 'features', it holds .*a.*b"):
        read_features(path, IDS)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_take_gather_and_select_agree(dtype: type) -> None:
    stored = np.arange(1, 31, dtype=dtype).reshape(10, 3)
    row_of_item = np.array([4, 5, 6, -1, 9, 0, 0, 1])
    features = FeatureMatrix(stored, row_of_item)
    full = np.where(row_of_item[:, None] >= 0, stored[row_of_item], 0).astype(np.float32)
    np.testing.assert_array_equal(features.to_array(), full)
    assert features.dtype == dtype
    for start in range(9):
        for stop in range(start, 12):
            np.testing.assert_array_equal(features.take(start, stop), full[start:stop])
    items = np.array([7, 3, 3, 0])
    np.testing.assert_array_equal(features.take_rows(items), full[items])
    np.testing.assert_array_equal(features.select(items).to_array(), full[items])


def test_taken_rows_are_the_callers_own() -> None:
    stored = VALUES.copy()
    FeatureMatrix(stored, np.arange(4)).take(0, 4)[:] = 0
    np.testing.assert_array_equal(stored, VALUES)


def test_parquet_may_lack_items_and_know_others(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pl.DataFrame({"item_id": ["z", "c", "a"], "features": [[1.0], [2.0], None]}).write_parquet(path)
    features = read_features(path, IDS)
    assert features.has.tolist() == [False, False, True, False]
    assert features.to_array().tolist() == [[0], [0], [2], [0]]
    assert read_feature_ids(path).to_list() == ["z", "c", "a"]
    assert read_feature_ids(write_features(tmp_path, "npy")) is None


def test_blocks_of_a_large_matrix_are_scanned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dream_pyg.data.features._BLOCK_ELEMENTS", 4)
    values = VALUES.copy()
    assert read_features(write_features(tmp_path, "npy", values), IDS).has.tolist() == [True, False, True, True]
    values[2, 1] = values[3, 0] = values[3, 2] = np.nan
    with pytest.raises(DataError, match=r"3 values .* the first is nan in row 2, item 'c', column 1"):
        read_features(write_features(tmp_path, "npy", values), IDS)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("value", "dtype"), [(np.nan, "float32"), (-np.inf, "float32"), (1e300, "float64")])
def test_values_that_are_not_finite(tmp_path: Path, form: str, value: float, dtype: str) -> None:
    values = VALUES.astype(dtype)
    values[3, 1] = value
    with pytest.raises(DataError, match=r"image.* has 1 values that are not finite as float32.*item 'd', column 1"):
        read_features(write_features(tmp_path, form, values), IDS, "image")


@pytest.mark.parametrize("form", FORMS)
def test_only_zeros(tmp_path: Path, form: str) -> None:
    with pytest.raises(DataError, match="features for none of the 4 items, or only zeros"):
        read_features(write_features(tmp_path, form, np.zeros_like(VALUES)), IDS)


@pytest.mark.parametrize("form", FORMS[:2])
def test_wrong_number_of_rows(tmp_path: Path, form: str) -> None:
    with pytest.raises(DataError, match=r"has 3 rows, but the item catalogue has 4 items\. Give an items file"):
        read_features(write_features(tmp_path, form, VALUES[:3]), IDS)


@pytest.mark.parametrize("form", FORMS[:2])
@pytest.mark.parametrize(
    "values",
    [
        np.zeros(4, dtype=np.float32),
        np.zeros((4, 3, 1), dtype=np.float32),
        np.zeros((4, 0), dtype=np.float32),
        np.zeros((0, 3), dtype=np.float32),
        np.zeros((4, 3), dtype=bool),
    ],
)
def test_matrices_of_another_kind(tmp_path: Path, form: str, values: np.ndarray) -> None:
    with pytest.raises(DataError, match=r"not a readable .npy array|must be a matrix of real numbers") as caught:
        read_features(write_features(tmp_path, form, values), IDS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [np.array([["x"]] * 4), np.array([[{}]] * 4, dtype=object), np.zeros((4, 1), complex), np.zeros(4, dtype="f4,f4")],
)
def test_npy_without_numbers(tmp_path: Path, values: np.ndarray) -> None:
    np.save(tmp_path / "x.npy", values)
    with pytest.raises(DataError, match=r"not a readable .npy array|must be a matrix of real numbers"):
        read_features(tmp_path / "x.npy", IDS)


class _Trap:
    """Raises when unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise AssertionError('a pickle was loaded')",)


@pytest.mark.parametrize("name", ["x.npy", "x.npz", "x.safetensors", "x.parquet"])
@pytest.mark.parametrize(
    "content",
    [b"", b"\x93NUMPY", b"garbage" * 9, b"PK\x03\x04", b"\x93NUMPY\x01\x00\x03\x00{(\n", pickle.dumps(_Trap())],
)
def test_damaged_files_and_pickles(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    for read in (read_features, read_neighbors):
        with pytest.raises(DataError, match=r"x\.\w+") as caught:
            read(tmp_path / name, IDS)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", FORMS)
def test_truncated_features(tmp_path: Path, form: str) -> None:
    path = write_features(tmp_path, form)
    path.write_bytes(path.read_bytes()[:-6])
    with pytest.raises(DataError, match=r"readable|damaged"):
        read_features(path, IDS)


def test_an_archive_is_no_matrix(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", VALUES)
    (tmp_path / "x.npz").rename(tmp_path / "x.npy")
    with pytest.raises(DataError, match="an archive of arrays, not one"):
        read_features(tmp_path / "x.npy", IDS)


def test_unknown_suffix_and_missing_file(tmp_path: Path) -> None:
    (tmp_path / "x.pt").touch()
    with pytest.raises(DataError, match=r"ending in .npy, .safetensors, .parquet, got .*x\.pt"):
        read_features(tmp_path / "x.pt", IDS)
    with pytest.raises(DataError, match=r"ending in .npz, .safetensors, .parquet"):
        read_neighbors(tmp_path / "x.pt", IDS)
    with pytest.raises(DataError, match=r"Features of text: .* missing"):
        read_features(tmp_path / "x.npy", IDS, "text")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"item_id": [1, 2], "features": [[1.0], [2.0]]},
            "ids that are integers, but .* strings. Store them as strings",
        ),
        ({"item_id": ["a", "a"], "features": [[1.0], [2.0]]}, "the id 'a' occurs more than once"),
        ({"item_id": ["a", None], "features": [[1.0], [2.0]]}, "the id in row 2 is missing"),
        ({"item_id": [1.5, 2.0], "features": [[1.0], [2.0]]}, "got Float64"),
        ({"key": ["a", "b"], "features": [[1.0], [2.0]]}, "no column for the item_id: .* found 'key', 'features'"),
        ({"item_id": ["a", "b"]}, "no feature columns"),
        ({"item_id": ["a", "b"], "features": ["x", "y"]}, "expected lists of numbers, got String"),
        ({"item_id": ["a", "b"], "features": [["x"], ["y"]]}, "expected lists of numbers, got List"),
        ({"item_id": ["a", "b"], "features": [[1.0], [2.0, 3.0]]}, "item 'b' has 2 numbers and the first has 1"),
        ({"item_id": ["a", "b"], "features": [[1.0], [None]]}, "features of item 'b' contain a null"),
        ({"item_id": ["a", "b"], "features": [[], []]}, "must be a matrix of real numbers|expected lists of numbers"),
        ({"item_id": ["a", "b"], "x": [1.0, 2.0], "title": ["s", "t"]}, "numeric columns only.*'title' is String"),
        ({"item_id": ["a", "b"], "title": ["s", "t"]}, "column 'title': expected lists of numbers, got String"),
        (
            {"item_id": ["a", "b"], "vec": [[1.0], [2.0]], "embedding": [[1.0], [2.0]]},
            r"a single column of lists of numbers, but it has 2 columns of which 'vec' is List\(Float64\), "
            r"'embedding' is List\(Float64\)\. Remove what is no feature, or rename the column of lists to 'features'",
        ),
        ({"item_id": ["a", "b"], "x": [1.0, None]}, "1 values .* the first is nan in row 1, item 'b', column 0"),
        ({"item_id": ["y", "z"], "x": [1.0, 2.0]}, "features for none of the 4 items"),
        ({"item_id": [], "x": []}, "has a header but no rows"),
    ],
)
def test_parquet_features_refused(tmp_path: Path, columns: dict[str, list[Any]], message: str) -> None:
    pl.DataFrame(columns).write_parquet(tmp_path / "x.parquet")
    with pytest.raises(DataError, match=message):
        read_features(tmp_path / "x.parquet", IDS)


@pytest.mark.parametrize("lists", [[None, None], [[], []], [[], None]])
def test_lists_without_any_number_are_refused(tmp_path: Path, lists: list[list[float] | None]) -> None:
    features = pl.Series("features", lists, dtype=pl.List(pl.Float32))
    pl.DataFrame({"item_id": ["a", "b"], "features": features}).write_parquet(tmp_path / "x.parquet")
    with pytest.raises(DataError, match="no item has a feature"):
        read_features(tmp_path / "x.parquet", IDS)


@pytest.mark.parametrize(
    ("matrix", "rows", "message"),
    [
        (VALUES, np.array([0, 4]), "row_of_item must be from -1"),
        (VALUES, np.array([-2]), "row_of_item must be from -1"),
        (VALUES, np.array([0.0]), "row_of_item must be a vector of int64"),
        (VALUES, np.array([[0]]), "row_of_item must be a vector of int64"),
        (VALUES[0], np.array([0]), "must be a matrix of real numbers"),
    ],
)
def test_feature_matrix_refuses(matrix: np.ndarray, rows: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        FeatureMatrix(matrix, rows)


def write_neighbors(directory: Path, form: str, name: str | None = "cosine") -> Path:
    path = directory / f"neighbors.{form}"
    arrays = {"indices": INDICES, **({name: COSINE} if name else {})}
    if form == "npz":
        np.savez(path, **arrays)
    elif form == "safetensors":
        save_file(arrays, path)
    else:
        item, slot = np.nonzero(INDICES >= 0)
        columns = {"item_id": IDS[item], "neighbor_id": IDS[INDICES[item, slot]]}
        frame = pl.DataFrame({**columns, **({name: COSINE[item, slot]} if name else {})})
        frame.sample(fraction=1, shuffle=True, seed=0).write_parquet(path)
    return path


@pytest.mark.parametrize("form", ["npz", "safetensors", "parquet"])
@pytest.mark.parametrize("name", ["cosine", "similarity"])
def test_neighbors_are_sorted_by_similarity_then_id(tmp_path: Path, form: str, name: str) -> None:
    neighbors = read_neighbors(write_neighbors(tmp_path, form, name), IDS)
    assert neighbors.index.tolist() == SORTED_INDICES
    np.testing.assert_array_equal(
        neighbors.similarity, np.array([[0.9, 0.5], [0.1, 0], [0.3, 0.3], [0.8, 0.2]], dtype=np.float32)
    )


@pytest.mark.parametrize("form", ["npz", "safetensors", "parquet"])
def test_neighbors_without_similarity(tmp_path: Path, form: str) -> None:
    neighbors = read_neighbors(write_neighbors(tmp_path, form, None), IDS)
    assert neighbors.index.tolist() == [[1, 2], [3, -1], [0, 1], [2, 3]]
    assert neighbors.similarity.tolist() == [[1, 1], [1, 0], [1, 1], [1, 1]]


@given(st.data(), st.integers(1, 6), st.integers(1, 4))
def test_selecting_neighbors_equals_filtering_lists(data: st.DataObject, num_items: int, k: int) -> None:
    k = min(k, num_items)
    index = np.array([data.draw(st.permutations(range(num_items)))[:k] for _ in range(num_items)])
    similarity = np.array(data.draw(st.lists(st.integers(0, 3), min_size=index.size, max_size=index.size)))
    graph = Neighbors.sort(index, similarity.reshape(index.shape))
    items = np.array(data.draw(st.lists(st.integers(0, num_items - 1), min_size=1, unique=True)))
    selected = graph.select(items)
    for new, old in enumerate(items):
        edges = dict(zip(index[old].tolist(), similarity.reshape(index.shape)[old].tolist(), strict=True))
        kept = sorted((-edges[item], row) for row, item in enumerate(items.tolist()) if item in edges)
        padding = [-1] * (k - len(kept))
        assert selected.index[new].tolist() == [row for _, row in kept] + padding
        assert selected.similarity[new].tolist() == [-value for value, _ in kept] + [0] * len(padding)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"cosine": COSINE}, "must hold an array 'indices'"),
        ({"indices": INDICES.astype(float)}, "must be an integer matrix"),
        ({"indices": INDICES[:, 0]}, "must be an integer matrix"),
        ({"indices": INDICES[:, :0]}, "must be an integer matrix"),
        ({"indices": INDICES[:3]}, "has 3 rows, but the item catalogue has 4 items"),
        ({"indices": INDICES, "cosine": COSINE[:, :1]}, "'cosine' .* like 'indices'"),
        ({"indices": INDICES, "similarity": COSINE.astype(complex)}, "'similarity' .* like 'indices'"),
        ({"indices": INDICES + 1}, r"must be from -1 \(none\) to 3 \(got 0 to 4\)"),
        ({"indices": INDICES - 1}, "must be from -1"),
        ({"indices": (INDICES - 1).astype(np.uint64)}, "must be from -1"),
        ({"indices": np.ones_like(INDICES)}, "Row 0 of the neighbours names 1 twice"),
        ({"indices": INDICES, "cosine": COSINE * np.float32("nan")}, "Similarities must be finite"),
    ],
)
def test_neighbor_arrays_refused(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(DataError, match=message) as caught:
        read_neighbors(tmp_path / "x.npz", IDS)
    assert "x.npz" in str(caught.value)


def test_pickled_arrays_are_not_loaded(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", indices=np.array([[_Trap()]], dtype=object))
    with pytest.raises(DataError, match=r"not a readable .npz archive of numbers"):
        read_neighbors(tmp_path / "x.npz", IDS)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"item_id": ["a", "a"], "neighbor_id": ["b", "b"]}, "names 1 twice"),
        (
            {"item_id": ["a", "b"], "neighbor_id": ["b", "z"]},
            "the neighbor_id 'z' in row 2 is not in the item catalogue",
        ),
        ({"item_id": ["a", "z"], "neighbor_id": ["b", "b"]}, "the item_id 'z' in row 2"),
        ({"item_id": [0, 1], "neighbor_id": [1, 0]}, "ids that are integers"),
        ({"item_id": ["a"], "neighbor": ["b"]}, "no column for the neighbor_id"),
        ({"item_id": ["a"], "neighbor_id": [None]}, "expected ids|is missing"),
        ({"item_id": ["a"], "neighbor_id": ["b"], "cosine": ["x"]}, "'cosine' must hold a number"),
        ({"item_id": ["a", "b"], "neighbor_id": ["b", "a"], "cosine": [1.0, None]}, "'cosine' must hold a number"),
        ({"item_id": ["a"], "neighbor_id": ["b"], "cosine": [float("inf")]}, "must be finite"),
    ],
)
def test_parquet_neighbors_refused(tmp_path: Path, columns: dict[str, list[Any]], message: str) -> None:
    pl.DataFrame(columns).write_parquet(tmp_path / "x.parquet")
    with pytest.raises(DataError, match=message):
        read_neighbors(tmp_path / "x.parquet", IDS)


@pytest.mark.parametrize(
    ("index", "similarity", "message"),
    [
        (INDICES.astype(np.int32), COSINE, "int64 matrix"),
        (INDICES[:, :0], COSINE[:, :0], "int64 matrix"),
        (INDICES, COSINE.astype(np.float64), "float32 matrix"),
        (INDICES, COSINE[:2], "float32 matrix"),
    ],
)
def test_neighbors_refuse(index: np.ndarray, similarity: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Neighbors(index, similarity)


@pytest.mark.parametrize("modality", ["image", "text"])
def test_published_graphs_keep_their_edges(real_data: Callable[[str], Path], modality: str) -> None:
    path = real_data("baby") / f"{modality}_knn10.npz"
    neighbors = read_neighbors(path, pl.Series(np.arange(7050)))
    published = np.load(path)
    np.testing.assert_array_equal(np.sort(neighbors.index, axis=1), np.sort(published["indices"], axis=1))
    np.testing.assert_array_equal(neighbors.similarity, -np.sort(-published["cosine"], axis=1))
    assert (neighbors.similarity[:, 0] > 0.9999).all()  # the item itself, or a duplicate of it


@pytest.mark.parametrize("form", FORMS[:2])
@pytest.mark.parametrize("num_bytes", [200, 0])
def test_a_file_that_is_cut_after_it_was_opened(tmp_path: Path, form: str, num_bytes: int) -> None:
    rows = np.ones((4, 4096), dtype=np.float32)
    path = write_features(tmp_path, form, rows)
    features = read_features(path, IDS)
    size = path.stat().st_size
    os.truncate(path, num_bytes)
    for take in (lambda: features.take(2, 4), lambda: features.take_rows(np.array([3, 0]))):
        with pytest.raises(DataError, match=rf"{path.name} was cut .* expected {size} bytes, got {num_bytes}\."):
            take()


def test_a_file_that_is_cut_while_it_is_read(tmp_path: Path) -> None:
    path = write_features(tmp_path, "npy")
    matrix = np.load(path, mmap_mode="r")
    with pytest.raises(DataError, match="was cut"), whole_file(matrix[1:]):
        os.truncate(path, path.stat().st_size - 1)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's account of mapped memory")
@pytest.mark.parametrize("form", ["npy", "features"])
def test_what_was_read_of_a_mapped_file_does_not_stay_in_memory(tmp_path: Path, form: str) -> None:
    path = tmp_path / "x.npy"
    np.save(path, np.ones((2048, 512), dtype=np.float16))
    matrix = np.load(path, mmap_mode="r")
    rows = ArrayRows(matrix) if form == "npy" else FeatureMatrix(matrix, np.arange(2048))

    def resident() -> int:
        lines = Path("/proc/self/smaps").read_text().splitlines()
        start = next(number for number, line in enumerate(lines) if line.endswith(str(path)))
        return next(int(line.split()[1]) for line in lines[start:] if line.startswith("Rss:"))

    assert matrix.sum(dtype=np.float64) == 2048 * 512
    assert resident() >= 2048
    assert (rows.take(0, 2048) == 1).all()
    assert resident() == 0
    assert (rows.take_rows(np.arange(0, 2048, 3)) == 1).all()
    assert resident() == 0


def test_changes_to_a_private_copy_of_a_file_are_not_lost(tmp_path: Path) -> None:
    path = write_features(tmp_path, "npy")
    matrix = np.load(path, mmap_mode="c")
    matrix[0] = 7
    release(matrix[:1])
    assert (matrix[0] == 7).all()


def test_a_file_that_is_replaced_is_read_as_it_was(tmp_path: Path) -> None:
    path = write_features(tmp_path, "npy")
    features = read_features(path, IDS)
    np.save(tmp_path / "smaller.npy", VALUES[:1])
    (tmp_path / "smaller.npy").replace(path)
    np.testing.assert_array_equal(features.to_array(), VALUES)
