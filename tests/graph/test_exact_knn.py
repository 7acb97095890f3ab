"""The bound that makes the exact engine exact, and what happens where it does not settle a row."""

from __future__ import annotations

import gc
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils._pytree as pytree
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode

from dream_pyg.graph.knn import ArrayRows, cosine_knn, exact, refine
from dream_pyg.graph.knn.candidates import CandidateLists
from dream_pyg.graph.knn.exact import RowProduct, exact_candidates
from dream_pyg.graph.processor import exact_products

CPU = torch.device("cpu")


def make(kind: str, num_rows: int, num_features: int, seed: int) -> NDArray[np.float32]:
    """Rows of the kinds that a bound may fail on."""
    generator = np.random.default_rng(seed)
    matrix = generator.standard_normal((num_rows, num_features))
    if kind == "common":  # as of positive features: all cosines near 1
        matrix = matrix + 20
    elif kind == "duplicates":
        matrix = matrix[generator.integers(0, max(1, num_rows // 5), num_rows)] + 1e-4 * matrix
    elif kind == "sparse":
        matrix = matrix * (generator.random(matrix.shape) < 0.05)
    elif kind == "scales":
        matrix = matrix * 10.0 ** generator.integers(-15, 16, (num_rows, 1))
    return matrix.astype(np.float32)


def unit(matrix: NDArray[np.float32]) -> NDArray[np.float64]:
    """Rows of norm 1, zeros staying."""
    rows = matrix.astype(np.float64)
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, norm, out=rows, where=norm > 0)


KINDS = ["normal", "common", "duplicates", "sparse", "scales"]


@settings(max_examples=90, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    num_rows=st.integers(2, 90),
    num_features=st.integers(1, 70),
    dtype=st.sampled_from([torch.int8, torch.bfloat16, torch.float32]),
    seed=st.integers(0, 99),
)
def test_no_score_is_wrong_by_more_than_its_bound(
    kind: str, num_rows: int, num_features: int, dtype: torch.dtype, seed: int
):
    matrix = make(kind, num_rows, num_features, seed)
    product = RowProduct(ArrayRows(matrix), dtype, CPU)
    cosine = unit(matrix) @ unit(matrix).T
    seen = np.zeros_like(cosine, dtype=int)
    for tile in product.tiles():
        score = tile.score.float()[: num_rows - tile.row, : num_rows - tile.column]
        rows, columns = slice(tile.row, tile.row + len(score)), slice(tile.column, tile.column + score.size(1))
        seen[rows, columns] += 1
        true = cosine[rows, columns]
        for number, row in enumerate(range(tile.row, tile.row + len(score))):
            bound = product.error(torch.full((score.size(1),), row), score[number]).numpy()
            assert (np.abs(score[number].numpy() - true[number]) <= bound).all()
    assert (seen[np.tril_indices(num_rows)] == 1).all()


def test_products_are_exact_whatever_precision_the_process_asks_for():
    before = torch.get_float32_matmul_precision()
    matmul = torch.backends.cuda.matmul
    try:
        torch.set_float32_matmul_precision("medium")
        with exact_products():
            assert matmul.fp32_precision == torch.backends.mkldnn.matmul.fp32_precision == "ieee"
            assert not matmul.allow_bf16_reduced_precision_reduction
        assert torch.get_float32_matmul_precision() == "medium"
        assert matmul.allow_bf16_reduced_precision_reduction
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32])
def test_candidates_hold_the_neighbours_or_say_what_they_may_lack(kind: str, dtype: torch.dtype):
    matrix = make(kind, 1100, 24, 3)
    blocks = exact_candidates(ArrayRows(matrix), 7, dtypes=[dtype], device=CPU)
    candidates = blocks.block(slice(0, len(matrix)))
    cosine = unit(matrix) @ unit(matrix).T
    np.fill_diagonal(cosine, -np.inf)
    for row in range(len(matrix)):
        listed = candidates.index[row][candidates.index[row] >= 0]
        others = np.setdiff1d(np.flatnonzero(np.isfinite(cosine[row])), listed)
        assert cosine[row, others].max(initial=-np.inf) <= candidates.left_out[row] + 1e-6
    if kind == "normal" and dtype != torch.int8:  # Here nothing needs a second search.
        certain = refine.rank_candidates(ArrayRows(matrix), candidates, 7)[2]
        assert certain.all()


@pytest.mark.parametrize("kind", KINDS)
def test_engines_agree(kind: str, monkeypatch: pytest.MonkeyPatch):
    matrix = make(kind, 1300, 16, 4)
    matrix[::50] = 0
    reference = cosine_knn(ArrayRows(matrix), 6, engine="flat")
    monkeypatch.setattr(exact, "_PANEL_BYTES", 1)
    monkeypatch.setattr(exact, "_INTEGER_PANEL_BYTES", 1)
    for integers, rounded in ((False, False), (False, True), (True, False)):
        monkeypatch.setattr("dream_pyg.graph.knn.has_bfloat16_units", lambda device, answer=rounded: answer)
        monkeypatch.setattr("dream_pyg.graph.knn.has_int8_units", lambda device, answer=integers: answer)
        found = cosine_knn(ArrayRows(matrix), 6)
        np.testing.assert_array_equal(found.index, reference.index)
        np.testing.assert_allclose(found.similarity, reference.similarity, atol=1e-6)


def true_neighbors(matrix: NDArray[np.float32], num_neighbors: int) -> NDArray[np.int64]:
    """By double precision; of ties those with lower ids, -1 where there are fewer."""
    rows = unit(matrix)
    cosine = np.round(rows @ rows.T, 12)
    cosine[:, ~rows.any(axis=1)] = cosine[~rows.any(axis=1)] = -np.inf
    np.fill_diagonal(cosine, -np.inf)
    order = np.argsort(-cosine, axis=1, kind="stable")[:, :num_neighbors]
    return np.where(np.take_along_axis(cosine, order, axis=1) == -np.inf, -1, order)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32])
def test_rows_that_are_like_none_or_want_all_have_neighbours_among_those_that_exist(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    num_rows = 1203  # no multiple of 16, and more than a tile has
    monkeypatch.setattr("dream_pyg.graph.knn.has_bfloat16_units", lambda device: dtype == torch.bfloat16)
    monkeypatch.setattr("dream_pyg.graph.knn.has_int8_units", lambda device: dtype == torch.int8)
    generator = np.random.default_rng(0)
    outlier = (1 + 0.1 * generator.standard_normal((num_rows, 32))).astype(np.float32)
    outlier[5] *= -1
    signs = np.ones((num_rows, 1), dtype=np.float32)
    signs[[3, 700]] = -1
    for matrix, num_neighbors in ((outlier, 10), (outlier, 50), (outlier, num_rows - 1), (signs, 10)):
        found = cosine_knn(ArrayRows(matrix), num_neighbors, engine="exact")
        np.testing.assert_array_equal(found.index, true_neighbors(matrix, num_neighbors))


@pytest.mark.parametrize("engine", ["exact", "flat"])
@pytest.mark.parametrize("scale", [1e-37, 1e-22, 1e-16, 1e19, 1e36])
def test_the_length_of_a_row_does_not_matter(scale: float, engine: str):
    matrix = np.random.default_rng(0).standard_normal((1203, 24)).astype(np.float32)
    everywhere = cosine_knn(ArrayRows(matrix * np.float32(scale)), 10, engine=engine)
    np.testing.assert_array_equal(everywhere.index, true_neighbors(matrix, 10))
    matrix[[7, 900]] *= np.float32(scale)
    matrix[11] = 0
    found = cosine_knn(ArrayRows(matrix), 10, engine=engine)
    np.testing.assert_array_equal(found.index, true_neighbors(matrix, 10))


@pytest.mark.parametrize(("latent", "multiplied"), [(3, torch.int8), (2000, torch.bfloat16)])
def test_integers_multiply_rows_that_they_tell_apart(latent: int, multiplied: torch.dtype):
    generator = np.random.default_rng(0)
    matrix = generator.standard_normal((1500, latent)) @ generator.standard_normal((latent, 2000))
    seen: list[torch.dtype] = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (torch.ops.aten._int_mm.out, torch.ops.aten.mm.out):
                seen.append(args[0].dtype)
            return func(*args, **(kwargs or {}))

    with Products():
        exact_candidates(ArrayRows(matrix.astype(np.float32)), 5, dtypes=[torch.int8, torch.bfloat16], device=CPU)
    assert seen[-1] == multiplied


def test_smaller_k_is_the_beginning_of_a_larger_one():
    matrix = make("duplicates", 400, 9, 5)
    many = cosine_knn(ArrayRows(matrix), 30)
    for num_neighbors in (1, 4, 12):
        np.testing.assert_array_equal(cosine_knn(ArrayRows(matrix), num_neighbors).index, many.index[:, :num_neighbors])


def test_a_row_with_more_ties_than_its_list_has_room_is_searched_again():
    matrix = np.ones((300, 8), dtype=np.float32)
    candidates = exact_candidates(ArrayRows(matrix), 5, dtypes=[torch.bfloat16], device=CPU)
    assert not refine.rank_candidates(ArrayRows(matrix), candidates, 5)[2].any()
    found = cosine_knn(ArrayRows(matrix), 5)
    np.testing.assert_array_equal(found.index[0], [1, 2, 3, 4, 5])
    np.testing.assert_array_equal(found.index[10:], np.tile(np.arange(5), (290, 1)))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_lists_keep_the_best_of_whatever_order_it_comes_in(data: st.DataObject):
    num_rows, count = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 3))
    generator = np.random.default_rng(data.draw(st.integers(0, 99)))
    error = 0.01
    lists = CandidateLists(num_rows, count, lambda row, score: torch.full_like(score, error), CPU)
    room = lists.score.size(1)
    offers = []
    for _ in range(data.draw(st.integers(1, 12))):
        size = int(generator.integers(1, 40))
        row = generator.integers(0, num_rows, size)
        index = sum(len(earlier) for earlier, _ in offers) + np.arange(size)
        score = generator.random(size, dtype=np.float32)
        offers.append((row, score))
        lists.add(*(torch.from_numpy(part) for part in (row, index, score)))
        if data.draw(st.booleans()):
            lists.flush()
    row, score = (np.concatenate(parts) for parts in zip(*offers, strict=True))
    found = lists.block(slice(0, num_rows))
    for target in range(num_rows):
        mine = np.sort(score[row == target])[::-1]
        listed = score[found.index[target][found.index[target] >= 0]]
        needed = mine[mine >= (mine[count - 1] - 2 * error if len(mine) >= count else -np.inf)]
        kept = min(len(needed), room)
        np.testing.assert_allclose(listed[:kept], needed[:kept], atol=1e-6)
        if len(needed) > room:
            assert found.left_out[target] >= needed[room]


class LargestTensor(TorchDispatchMode):
    """Sees how large the largest tensor is that an operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.nbytes = max(self.nbytes, tensor.nbytes)
        return result


def test_ranking_takes_no_more_memory_for_more_rows(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(refine, "_PANEL_BYTES", 256 * 4 * 8)
    monkeypatch.setattr(refine, "_PART_BYTES", 64 * 4 * 8)

    def extra_bytes(num_rows: int) -> tuple[int, int]:
        rows = ArrayRows(make("normal", num_rows, 8, 0))
        candidates = exact_candidates(rows, 10, dtypes=[torch.float32], device=CPU)
        candidates.block(slice(0, 1))  # What was waiting is in the lists now.
        with LargestTensor() as largest:
            tracemalloc.start()
            found = refine.rank_candidates(rows, candidates, 10)
            peak = tracemalloc.get_traced_memory()[1] - sum(part.nbytes for part in found)
            tracemalloc.stop()
        return largest.nbytes, peak

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # How many blocks are held at a time is left to chance otherwise.
    try:
        few, many = extra_bytes(1000), extra_bytes(8000)
    finally:
        torch.set_num_threads(num_threads)
    assert many[0] <= few[0]
    # A little, for the lists of more rows are fuller; whatever had a place for each candidate would take eight times.
    assert many[1] <= 1.5 * few[1]


def test_no_panel_outlives_the_search():
    lists = exact_candidates(ArrayRows(make("normal", 900, 32, 0)), 4, dtypes=[torch.bfloat16], device=CPU)
    assert lists.width
    kept = [part for part in gc.get_objects() if type(part) is torch.Tensor and part.dtype == torch.bfloat16]
    assert not any(part.shape[-1:] == (32,) for part in kept)
