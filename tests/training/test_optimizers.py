"""The lazy Adam against PyTorch's own for sparse gradients."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dream_pyg.training.optimizers import LazyAdam


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def steps(optimizer_class: type[torch.optim.Optimizer], table: Tensor) -> Tensor:
    table = torch.nn.Parameter(table.clone())
    optimizer = optimizer_class([table], lr=0.1)
    for step in range(5):
        optimizer.zero_grad()
        first, second = torch.tensor([step, 2, 5]), torch.tensor([2, 7])
        loss = F.embedding(first, table, sparse=True).square().sum() + F.embedding(second, table, sparse=True).sum()
        loss.backward()
        optimizer.step()
    return table.detach()


@pytest.fixture(params=[1, 8, 1 << 17])
def numbers_at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dream_pyg.training.optimizers._NUMBERS_AT_ONCE", request.param)


@pytest.mark.usefixtures("numbers_at_once")
def test_touched_rows_step_as_sparse_adam_does():
    """But for eps, which Adam adds to the corrected root and SparseAdam to the uncorrected one."""
    table = torch.randn(10, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moved = steps(LazyAdam, table)
    torch.testing.assert_close(moved, steps(torch.optim.SparseAdam, table), rtol=1e-4, atol=0)
    untouched = [6, 8, 9]
    assert torch.equal(moved[untouched], table[untouched])
    assert not torch.equal(moved[2], table[2])


@pytest.mark.usefixtures("numbers_at_once")
def test_rows_that_are_all_touched_step_as_adam_does():
    one = torch.nn.Parameter(torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    other = torch.nn.Parameter(one.detach().clone())
    lazy, dense = LazyAdam([one], lr=0.1), torch.optim.Adam([other], lr=0.1)
    everything = torch.arange(6)
    for _ in range(5):
        for table, optimizer, sparse in ((one, lazy, True), (other, dense, False)):
            optimizer.zero_grad()
            F.embedding(everything, table, sparse=sparse).pow(3).sum().backward()
            optimizer.step()
    torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


def test_state_is_saved_and_loaded():
    table = torch.nn.Parameter(torch.ones(4, 2))
    first, second = LazyAdam([table], lr=0.1), LazyAdam([table], lr=0.1)
    F.embedding(torch.tensor([1]), table, sparse=True).sum().backward()
    first.step()
    second.load_state_dict(first.state_dict())
    for name, value in first.state[table].items():
        assert torch.equal(second.state[table][name], value)


@pytest.mark.usefixtures("deterministic")
def test_a_deterministic_process_stays_one_and_gets_the_same_weights():
    table = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    moved = steps(LazyAdam, table)
    assert torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    assert torch.equal(moved, steps(LazyAdam, table))
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_number_of_steps_follows_the_table_to_its_device(monkeypatch):
    table = torch.nn.Parameter(torch.ones(4, 2))
    optimizer = LazyAdam([table], lr=0.1)
    F.embedding(torch.tensor([1]), table, sparse=True).sum().backward()
    optimizer.step()
    other = torch.nn.Parameter(torch.ones(4, 2, device="meta"))
    loaded = LazyAdam([other], lr=0.1)
    loaded.load_state_dict(optimizer.state_dict())
    other.grad = torch.sparse_coo_tensor(torch.zeros(1, 1), torch.ones(1, 2), (4, 2), device="meta", is_coalesced=True)
    devices = []
    monkeypatch.setattr("dream_pyg.training.optimizers.adam", lambda *lists, **_: devices.extend(lists[5]))
    loaded.step()
    assert [step.device.type for step in devices] == ["meta"]
