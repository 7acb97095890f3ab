"""Sparse products against dense ones."""

from __future__ import annotations

import pytest
import torch

from dream_pyg.graph.csr import row_pointer, sampled_product


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [(5, 7), (7, 5), (1, 1)])
def test_a_sampled_product_has_the_entries_of_the_dense_one_in_the_order_asked_for(size: tuple[int, int], dtype):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randint(-4, 5, (rows, 3), generator=generator).to(dtype) for rows in size)
    row, column = (torch.rand(size, generator=generator) < 0.5).nonzero().T
    column = column[torch.argsort(row * size[1] - column)]  # descending within a row
    values = sampled_product(row_pointer(torch.bincount(row, minlength=size[0])), column, x, y)
    assert values.dtype == dtype
    assert torch.equal(values, (x @ y.T)[row, column])


def test_a_sampled_product_may_ask_for_nothing():
    x = torch.ones(3, 2)
    assert sampled_product(torch.zeros(4, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), x, x).shape == (0,)
