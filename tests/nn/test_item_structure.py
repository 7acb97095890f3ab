"""Item-item structure against brute force, and gradients of learned weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch_geometric import EdgeIndex

from dream_pyg.nn import item_structure
from dream_pyg.nn.item_structure import (
    edge_cosine,
    nearest_rows,
    normalized_weight,
    unit_or_zero,
)
from dream_pyg.nn.propagation import Propagation
from tests.oracles import dream

NUM_ROWS = 13


def random_rows(seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(NUM_ROWS, 4, generator=generator, dtype=torch.float64)
    return rows, torch.rand(NUM_ROWS, generator=generator) < 0.8


@pytest.mark.parametrize("include_self", [False, True])
@pytest.mark.parametrize("block", [1, NUM_ROWS * 3, 1 << 20])
@pytest.mark.parametrize("k", [1, 4, 100])
def test_nearest_rows_are_those_of_brute_force_in_blocks_of_any_size(k, block, include_self, monkeypatch):
    monkeypatch.setattr(item_structure, "_BLOCK_ELEMENTS", block)
    rows, present = random_rows()
    edges = nearest_rows(rows, present, k, include_self=include_self)
    expected = dream.top_k_neighbours(rows.numpy(), present.numpy(), k, include_self)
    wanted = [[neighbour, row] for row, chosen in enumerate(expected) for neighbour in sorted(chosen)]
    assert edges.as_tensor().T.tolist() == wanted
    edges.validate()


def test_self_is_known_by_id_among_duplicates():
    rows = torch.ones(4, 2)
    edges = nearest_rows(rows, torch.ones(4, dtype=torch.bool), 1, include_self=True)
    assert edges.as_tensor().tolist() == [[0, 1, 2, 3]] * 2
    source, target = nearest_rows(rows, torch.ones(4, dtype=torch.bool), 3, include_self=False).as_tensor()
    assert (source != target).all()


@pytest.mark.parametrize("num_present", [0, 1])
def test_without_another_row_there_is_no_neighbor(num_present):
    present = torch.arange(NUM_ROWS) < num_present
    edges = nearest_rows(random_rows()[0], present, 3, include_self=False)
    assert edges.size() == (2, 0)
    assert edges.get_sparse_size() == (NUM_ROWS, NUM_ROWS)
    rows = random_rows()[0].requires_grad_()
    weight = normalized_weight(edge_cosine(rows, edges), edges)
    Propagation()(rows, edges, weight).sum().backward()
    assert not rows.grad.any()


def test_gradients_of_rows_weights_and_similarities_are_right():
    rows, present = random_rows()
    edges = nearest_rows(rows, present, 3, include_self=False)
    x, similarity = torch.randn_like(rows), edge_cosine(rows, edges)
    assert (similarity < 0).any()  # so that clamping is differentiated too
    propagation = Propagation()
    for function, inputs in (
        (lambda x, weight: propagation(x, edges, weight), (x, similarity)),
        (lambda similarity: normalized_weight(similarity, edges), (similarity,)),
        (lambda rows: edge_cosine(rows, edges), (rows,)),
        (unit_or_zero, (rows,)),
    ):
        assert torch.autograd.gradcheck(function, [part.detach().clone().requires_grad_() for part in inputs])


def test_fused_and_gathered_messages_agree():
    rows, present = random_rows()
    edges = nearest_rows(rows, present, 3, include_self=True)
    weight = torch.rand(edges.size(1), dtype=torch.float64)
    fused, gathered = (Propagation()(rows, given, weight) for given in (edges, edges.as_tensor()))
    torch.testing.assert_close(fused, gathered, rtol=1e-13, atol=1e-13)


def test_weights_are_normalised_by_what_rows_chose_and_isolated_rows_have_none():
    edges = EdgeIndex([[1, 2, 0, 0], [0, 0, 1, 2]], sparse_size=(4, 4), sort_order="col")
    similarity = torch.tensor([0.5, 0.25, 0.8, -0.3], dtype=torch.float64, requires_grad=True)
    weight = normalized_weight(similarity, edges)
    # Row 0 chose 0.75 in all, row 1 chose 0.8, row 2 nothing that is positive.
    one = (0.75 * 0.8) ** -0.5
    np.testing.assert_allclose(weight.detach()[[0, 2, 3]], [0.5 * one, 0.8 * one, 0.0], rtol=1e-12)
    weight.sum().backward()
    assert similarity.grad.isfinite().all()
    assert similarity.grad[3] == 0


def test_zero_rows_stay_zero_with_a_bounded_gradient():
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.0]], requires_grad=True)
    unit = unit_or_zero(rows)
    torch.testing.assert_close(unit.detach(), torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
    unit.sum().backward()
    assert rows.grad.abs().max() <= 1
