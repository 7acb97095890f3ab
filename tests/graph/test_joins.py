"""Joining lists of near rows, against the definition: the best of what a group's lists lead to."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dream_pyg.graph.knn import joins
from dream_pyg.graph.knn.joins import join

NUM_ROWS, LENGTH = 300, 6


@pytest.fixture
def rows() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.nn.functional.normalize(torch.randn(NUM_ROWS, 12, generator=generator))


@pytest.fixture
def listed(rows: torch.Tensor) -> NDArray[np.int32]:
    """Random others, the nearest first; some lists are shorter, and one is empty."""
    random, cosine = np.random.default_rng(1), (rows @ rows.T).numpy()
    result = np.full((NUM_ROWS, LENGTH), -1, dtype=np.int32)
    for row in range(NUM_ROWS):
        size = 0 if row == 7 else LENGTH - row % 3
        others = random.choice(np.delete(np.arange(NUM_ROWS), row), size, replace=False)
        result[row, :size] = others[np.argsort(-cosine[row, others])]
    return result


def listing(listed: NDArray[np.int32]) -> list[list[int]]:
    """Those that list each row, for which it is the nearest first, by loops."""
    found: list[list[int]] = [[] for _ in listed]
    for column in listed[:, : joins.LISTED].T:
        for row, other in enumerate(column.tolist()):
            if other >= 0:
                found[other].append(row)
    return [of_row[: joins._LISTING] for of_row in found]


def test_a_pass_is_the_best_of_what_lists_lead_to(
    rows: torch.Tensor, listed: NDArray[np.int32], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(joins, "_JOINED_ROWS", 7)
    monkeypatch.setattr(joins, "_LISTING", 3)
    monkeypatch.setattr(joins, "LISTED", 4)
    backward, cosine = listing(listed), rows @ rows.T
    result = join(rows, listed, "rows")
    for first in range(0, NUM_ROWS, 7):
        group = range(first, min(first + 7, NUM_ROWS))
        near = {other for row in group for other in [*listed[row, :4].tolist(), *backward[row]]} - {-1}
        led = {other for row in near for other in [*listed[row, :4].tolist(), *backward[row]]}
        for row in group:
            candidate = sorted((led | set(group) | set(listed[list(group)].ravel().tolist())) - {-1, row})
            best = sorted(candidate, key=lambda other, row=row: -float(cosine[row, other]))[:LENGTH]
            assert result[row].tolist() == best + [-1] * (LENGTH - len(best))


def test_nothing_is_lost_and_in_the_end_nearly_all_is_found(
    rows: torch.Tensor, listed: NDArray[np.int32], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(joins, "_JOINED_ROWS", 4)
    monkeypatch.setattr(joins, "_LISTING", 4)
    monkeypatch.setattr(joins, "LISTED", 5)
    cosine = rows @ rows.T
    cosine.fill_diagonal_(-2)
    wanted = cosine.topk(LENGTH).values.sum(dim=1)

    def worst(lists: NDArray[np.int32]) -> torch.Tensor:
        score = cosine.gather(1, torch.from_numpy(lists.clip(0)).long())
        return score.masked_fill(torch.from_numpy(lists < 0), -2).amin(dim=1)

    before, shares = listed, []
    for _ in range(5):
        after = join(rows, before, "rows")
        assert (worst(after) >= worst(before)).all()
        shares.append(float((cosine.gather(1, torch.from_numpy(after.clip(0)).long()).sum(dim=1) / wanted).mean()))
        before = after
    assert shares == sorted(shares)
    assert shares[0] < 0.95 < 0.99 < shares[-1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_neither_threads_nor_parts_matter(
    rows: torch.Tensor, listed: NDArray[np.int32], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    expected = join(rows.to(dtype), listed, "rows")
    monkeypatch.setattr(joins, "_BLOCK_BYTES", 4 * 12 * 17)
    before = torch.get_num_threads()
    try:
        for num_threads in (1, 3):
            torch.set_num_threads(num_threads)
            np.testing.assert_array_equal(join(rows.to(dtype), listed, "rows"), expected)
    finally:
        torch.set_num_threads(before)


def test_equal_rows_list_others(rows: torch.Tensor):
    rows = rows[:1].expand(NUM_ROWS, -1).contiguous()
    listed = ((np.arange(NUM_ROWS)[:, None] + np.arange(1, LENGTH + 1)) % NUM_ROWS).astype(np.int32)
    result = join(rows, listed, "rows")
    assert (result >= 0).all()
    assert (result != np.arange(NUM_ROWS)[:, None]).all()
    assert all(len(set(of_row)) == LENGTH for of_row in result.tolist())
