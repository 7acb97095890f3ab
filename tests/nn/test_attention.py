"""Attention over edges against dense matrices."""

from __future__ import annotations

import pytest
import torch
from torch_geometric import EdgeIndex

from dream_pyg.nn.attention import attend, edge_products
from dream_pyg.nn.propagation import Propagation

SIZES = [(6, 6), (5, 8), (8, 5), (1, 4), (4, 1)]


def random_case(num_sources, num_targets):
    """Edges sorted by target, the last target without any if there are several, and unit rows at both ends."""
    generator = torch.Generator().manual_seed(num_sources)
    present = torch.rand(num_targets, num_sources, generator=generator) < 0.6
    present[0] = True
    if num_targets > 1:
        present[-1] = False
    target, source = present.nonzero().T
    edges = EdgeIndex(torch.stack([source, target]), sparse_size=(num_sources, num_targets), sort_order="col")
    rows = [torch.randn(size, 3, dtype=torch.float64, generator=generator) for size in (num_sources, num_targets)]
    return edges, present, *(torch.nn.functional.normalize(part).requires_grad_() for part in rows)


@pytest.mark.parametrize("size", SIZES)
def test_attention_is_the_dense_softmax_forward_and_backward(size):
    edges, present, source, target = random_case(*size)
    rows, weight = attend(Propagation(), source, target, edges)
    logits = (target @ source.T).masked_fill(~present, -torch.inf)
    dense = torch.where(present, logits.softmax(dim=1), 0.0)
    torch.testing.assert_close(weight, dense[present], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(rows, dense @ source, rtol=1e-12, atol=1e-14)
    upstream = torch.randn(rows.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    factor = torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    actual = torch.autograd.grad((rows * upstream).sum() + (weight * factor).sum(), (source, target))
    # A row of nothing but minus infinity has no gradient but NaN, so it is left out of the dense sum.
    some = present.any(dim=1)
    dense = logits[some].softmax(dim=1)
    loss = (dense @ source * upstream[some]).sum() + (dense[present[some]] * factor).sum()
    for own, wanted in zip(actual, torch.autograd.grad(loss, (source, target)), strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-12, atol=1e-14)


def test_gradcheck_of_edge_products():
    edges, _, source, target = random_case(4, 6)
    assert torch.autograd.gradcheck(lambda x, y: edge_products(x, y, edges), (source, target))
    fixed = target.detach()
    assert torch.autograd.gradcheck(lambda x: edge_products(x, fixed, edges), (source,))
