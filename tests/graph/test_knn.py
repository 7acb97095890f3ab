"""Cosine neighbours against brute force in float64."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dream_pyg.data.features import FeatureMatrix, Neighbors
from dream_pyg.errors import ConfigError, DataError
from dream_pyg.graph.knn import ArrayRows, MeanRows, cosine_knn, exact, flat, refine
from tests.oracles import dream as oracle


def search(matrix: NDArray[np.float32], num_neighbors: int, *, include_self: bool = False) -> Neighbors:
    """Neighbours of the rows of a matrix."""
    return cosine_knn(ArrayRows(matrix), num_neighbors, include_self=include_self)


def brute_force(matrix: NDArray[np.float32], num_neighbors: int, *, include_self: bool) -> NDArray[np.int64]:
    """The same by a dense matrix of cosines in float64, row by row; ties by lower id, -1 for none."""
    unit = matrix.astype(np.float64)
    present = np.flatnonzero(unit.any(axis=1))
    unit[present] /= np.linalg.norm(unit[present], axis=1, keepdims=True)
    cosine = np.round(unit @ unit.T, 12)
    index = np.full((len(matrix), num_neighbors), -1)
    for row in present:
        others = present[present != row]
        ranked = others[np.lexsort((others, -cosine[row, others]))]
        chosen = np.concatenate([[row], ranked] if include_self else [ranked])[:num_neighbors]
        index[row, : len(chosen)] = chosen
    return index


def signs(num_rows: int, num_features: int = 16, *, seed: int = 0) -> NDArray[np.float32]:
    """Rows of -1 and 1, every seventeenth of zeros: cosines are multiples of 1/8, so nearly everything is a tie."""
    matrix = np.random.default_rng(seed).choice([-1.0, 1.0], (num_rows, num_features)).astype(np.float32)
    matrix[::17] = 0
    return matrix


def use_small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every step of the search see the matrix in several parts."""
    monkeypatch.setattr(exact, "_PANEL_BYTES", 1)  # the fewest rows a panel can have
    monkeypatch.setattr(exact, "_INTEGER_PANEL_BYTES", 1)
    monkeypatch.setattr(flat, "_BLOCK_BYTES", 1)
    monkeypatch.setattr(refine, "_PANEL_BYTES", 700 * 4 * 16)
    monkeypatch.setattr(refine, "_PART_BYTES", 300 * 4 * 16)
    monkeypatch.setattr(refine, "_GATHERED_BYTES", 1)


@pytest.mark.parametrize("include_self", [False, True])
@pytest.mark.parametrize("num_neighbors", [1, 2, 5, 20, 39])
def test_ties_go_to_the_lower_id(num_neighbors: int, include_self: bool):
    matrix = signs(40)
    found = search(matrix, num_neighbors, include_self=include_self)
    np.testing.assert_array_equal(found.index, brute_force(matrix, num_neighbors, include_self=include_self))


@pytest.mark.parametrize("include_self", [False, True])
@pytest.mark.parametrize("num_neighbors", [1, 10])
def test_blocks_smaller_than_the_matrix_change_nothing(
    monkeypatch: pytest.MonkeyPatch, num_neighbors: int, include_self: bool
):
    matrix = signs(2500)
    matrix[1024:2048:3] = 0  # one block has fewer rows than the others
    whole = search(matrix, num_neighbors, include_self=include_self)
    np.testing.assert_array_equal(whole.index, brute_force(matrix, num_neighbors, include_self=include_self))
    use_small_blocks(monkeypatch)
    blocked = search(matrix, num_neighbors, include_self=include_self)
    np.testing.assert_array_equal(blocked.index, whole.index)
    np.testing.assert_array_equal(blocked.similarity, whole.similarity)


def test_a_block_of_zeros_is_passed_over(monkeypatch: pytest.MonkeyPatch):
    matrix = signs(2100)
    matrix[:1024] = 0
    use_small_blocks(monkeypatch)
    found = search(matrix, 3)
    np.testing.assert_array_equal(found.index, brute_force(matrix, 3, include_self=False))


@pytest.mark.parametrize("num_neighbors", [3, 30])
def test_duplicates_beyond_k_go_to_the_lower_id(num_neighbors: int):
    generator = np.random.default_rng(1)
    matrix = generator.normal(size=(12, 33)).astype(np.float32)[generator.integers(0, 12, 400)]
    matrix *= generator.choice([0.5, 1, 2, 1024], (400, 1))  # powers of two: directions stay the same bit for bit
    for include_self in (False, True):
        found = search(matrix, num_neighbors, include_self=include_self)
        expected = brute_force(matrix, num_neighbors, include_self=include_self)
        np.testing.assert_array_equal(np.sort(found.index, axis=1), np.sort(expected, axis=1))


def test_self_is_known_by_its_id_among_duplicates():
    matrix = np.ones((50, 4), dtype=np.float32)
    with_self = search(matrix, 3, include_self=True)
    np.testing.assert_array_equal(with_self.index[:, 0], np.arange(50))
    np.testing.assert_array_equal(with_self.index[10:, 1:], np.tile([0, 1], (40, 1)))
    without = search(matrix, 3)
    assert not (without.index == np.arange(50)[:, None]).any()
    np.testing.assert_array_equal(without.index[0], [1, 2, 3])
    np.testing.assert_array_equal(without.index[3:], np.tile([0, 1, 2], (47, 1)))
    np.testing.assert_allclose(without.similarity, 1.0, rtol=1e-6)


def test_real_features_and_their_cosines():
    matrix = np.random.default_rng(2).normal(size=(700, 48)).astype(np.float32)
    found = search(matrix, 10)
    np.testing.assert_array_equal(found.index, brute_force(matrix, 10, include_self=False))
    unit = matrix / np.linalg.norm(matrix.astype(np.float64), axis=1, keepdims=True)
    expected = np.take_along_axis(unit @ unit.T, found.index, axis=1)
    np.testing.assert_allclose(found.similarity, expected, atol=1e-6)


def test_rows_of_zeros_have_no_neighbours_and_are_nobody_s():
    matrix = np.array([[0, 0], [1, 0], [0, 0], [1, 1]], dtype=np.float32)
    for include_self, expected in (
        (False, [[-1, -1], [3, -1], [-1, -1], [1, -1]]),
        (True, [[-1, -1], [1, 3], [-1, -1], [3, 1]]),
    ):
        found = search(matrix, 2, include_self=include_self)
        np.testing.assert_array_equal(found.index, expected)
        assert (found.similarity[found.index < 0] == 0).all()
    assert (search(np.zeros((4, 2), dtype=np.float32), 2).index == -1).all()


def test_opposite_rows_are_neighbours_when_nothing_is_closer():
    found = search(np.array([[1, 0], [-2, 0]], dtype=np.float32), 1)
    np.testing.assert_array_equal(found.index, [[1], [0]])
    np.testing.assert_array_equal(found.similarity, [[-1], [-1]])


def test_scale_does_not_matter():
    matrix = np.random.default_rng(3).normal(size=(100, 5)).astype(np.float32)
    scaled = matrix * (2.0 ** np.random.default_rng(4).integers(-30, 30, (100, 1))).astype(np.float32)
    np.testing.assert_array_equal(search(scaled, 4).index, search(matrix, 4).index)


@pytest.mark.parametrize(
    ("num_rows", "num_neighbors", "include_self", "most"),
    [(5, 5, False, 4), (5, 6, True, 5), (5, 0, False, 4), (5, -1, True, 5), (2, 2, False, 1)],
)
def test_k_out_of_range_is_refused(num_rows: int, num_neighbors: int, include_self: bool, most: int):
    matrix = np.ones((num_rows, 2), dtype=np.float32)
    with pytest.raises(ConfigError, match=rf"between 1 and {most} for {num_rows} rows \(got {num_neighbors}\)"):
        search(matrix, num_neighbors, include_self=include_self)


def test_one_row_has_no_neighbours():
    with pytest.raises(ConfigError, match=r"1 rows cannot have neighbours; expected at least 2\. Give more rows\."):
        search(np.ones((1, 2), dtype=np.float32), 1)
    assert search(np.ones((1, 2), dtype=np.float32), 1, include_self=True).index.tolist() == [[0]]


def test_every_k_in_range_is_accepted():
    matrix = np.array([[1, 0], [0, 1]], dtype=np.float32)
    np.testing.assert_array_equal(search(matrix, 1).index, [[1], [0]])
    np.testing.assert_array_equal(search(matrix, 1, include_self=True).index, [[0], [1]])
    np.testing.assert_array_equal(search(matrix, 2, include_self=True).index, [[0, 1], [1, 0]])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_small_integer_features_agree_with_the_oracle(data: st.DataObject):
    num_rows = data.draw(st.integers(2, 12))
    width = data.draw(st.integers(1, 4))
    values = st.lists(st.integers(-2, 2), min_size=width, max_size=width)
    matrix = np.array(data.draw(st.lists(values, min_size=num_rows, max_size=num_rows)), dtype=np.float32)
    include_self = data.draw(st.booleans())
    num_neighbors = data.draw(st.integers(1, num_rows - 1))
    found = search(matrix, num_neighbors, include_self=include_self)
    expected = oracle.top_k_neighbours(matrix, np.ones(num_rows, dtype=bool), num_neighbors, include_self)
    assert [set(row[row >= 0]) for row in found.index] == [set(row) for row in expected]


@pytest.mark.parametrize("num_taken", [0, 1, 7])
@pytest.mark.parametrize("users", [False, True])
def test_a_file_that_is_cut_during_the_search_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, users: bool, num_taken: int
):
    use_small_blocks(monkeypatch)
    path = tmp_path / "image.npy"
    np.save(path, signs(1500))
    features = FeatureMatrix(np.load(path, mmap_mode="r"), np.arange(1500))
    rows = MeanRows(np.stack([np.arange(1500), np.arange(1500)]), 1500, features) if users else features
    taken: list[int] = []
    take = type(rows).take

    def take_and_cut(self: Any, start: int, stop: int) -> NDArray[np.float32]:
        taken.append(start)
        if len(taken) > num_taken:
            os.truncate(path, 5000)
        return take(self, start, stop)

    monkeypatch.setattr(type(rows), "take", take_and_cut)
    with pytest.raises(DataError, match=r"image\.npy was cut while it was read: expected 96128 bytes, got 5000"):
        cosine_knn(rows, 3)
    assert len(taken) == num_taken + 1
