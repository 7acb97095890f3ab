"""The paired test over users against one that shuffles."""

from __future__ import annotations

import pytest
import torch

from dream_pyg.analysis.significance import paired_p_value


@pytest.mark.parametrize("shift", [0.0, 0.03, -0.08])
def test_the_probability_is_that_of_flipping_signs_at_random(shift):
    random = torch.Generator().manual_seed(1)
    first = torch.rand(500, generator=random)
    second = (first + shift + 0.5 * torch.randn(500, generator=random)).double()
    difference = first - second
    signs = torch.randint(0, 2, (20_000, 500), generator=random).double() * 2 - 1
    flipped = (signs @ difference) / 500
    expected = (flipped.abs() >= difference.mean().abs()).double().mean()
    assert paired_p_value(first, second) == pytest.approx(float(expected), abs=0.015)
    assert paired_p_value(second, first) == paired_p_value(first, second)


def test_users_who_do_not_count_change_nothing():
    first, second = torch.rand(2, 100)
    missing = torch.full((7,), torch.nan)
    assert paired_p_value(torch.cat([first, missing]), torch.cat([second, missing])) == paired_p_value(first, second)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [([0.5, 0.25], [0.5, 0.25], 1.0), ([0.5], [0.25], 1.0), ([], [], 1.0), ([1.0, 1.0], [0.0, 0.0], 0.0)],
)
def test_without_a_spread_there_is_no_doubt(first, second, expected):
    assert paired_p_value(torch.tensor(first), torch.tensor(second)) == expected
