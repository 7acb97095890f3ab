"""Every way to split, and what all of them promise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dream_pyg.data.interactions import TEST, TRAIN, VALID, read_interactions
from dream_pyg.data.splits import (
    check_nonempty,
    has_train_interaction,
    split_by_time,
    split_given,
    split_leave_last_out,
    split_random,
)
from dream_pyg.errors import ConfigError, DataError

HISTORIES = st.lists(st.integers(0, 40), min_size=1, max_size=8)
RATIOS = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)).map(
    lambda parts: tuple(part / sum(parts) for part in parts)
)


def users_of(lengths: list[int], seed: int = 0) -> np.ndarray:
    user = np.repeat(np.arange(len(lengths)), lengths)
    return np.random.default_rng(seed).permutation(user)


def sizes(split: np.ndarray) -> list[int]:
    return np.bincount(split, minlength=3).tolist()


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (1, [1, 0, 0]),
        (2, [2, 0, 0]),
        (3, [1, 1, 1]),
        (4, [2, 1, 1]),
        (5, [3, 1, 1]),
        (10, [8, 1, 1]),
        (14, [12, 1, 1]),
        (15, [12, 1, 2]),
        (19, [16, 1, 2]),
        (20, [16, 2, 2]),
        (25, [20, 2, 3]),
        (1000, [800, 100, 100]),
    ],
)
def test_random_sizes_of_the_field(length: int, expected: list[int]) -> None:
    assert sizes(split_random(np.zeros(length, dtype=np.int64))) == expected


@pytest.mark.parametrize("name", ["baby", "clothing"])
def test_random_sizes_equal_the_published_splits_user_by_user(real_data: Callable[[str], Path], name: str) -> None:
    frame = read_interactions(real_data(name) / f"{name}.inter")
    user, published = frame["user_id"].to_numpy(), frame["split"].to_numpy()
    ours = split_random(user, seed=1)
    for label in (TRAIN, VALID, TEST):
        np.testing.assert_array_equal(np.bincount(user[ours == label]), np.bincount(user[published == label]))


@given(HISTORIES, RATIOS, st.integers(0, 2**32))
def test_random_each_user_is_split_by_the_ratios(
    lengths: list[int], ratios: tuple[float, float, float], seed: int
) -> None:
    user = users_of(lengths)
    split = split_random(user, ratios, seed)
    assert split.dtype == np.uint8
    assert split.shape == user.shape
    for owner, length in enumerate(lengths):
        train, valid, test = sizes(split[user == owner])
        if length < 3:
            assert (train, valid, test) == (length, 0, 0)
            continue
        assert min(train, valid, test) >= 1
        if train > 1:
            assert valid == max(1, int(ratios[1] * length + 1e-9))
            assert test == max(1, int(ratios[2] * length + 0.5 + 1e-9))


def test_random_the_seed_decides() -> None:
    user = users_of([30, 40, 50])
    assert (split_random(user, seed=3) == split_random(user, seed=3)).all()
    assert (split_random(user, seed=3) != split_random(user, seed=4)).any()


def test_random_every_interaction_is_held_out_equally_often() -> None:
    user = users_of([10, 10])
    held_out = np.mean([split_random(user, seed=seed) == TEST for seed in range(2000)], axis=0)
    np.testing.assert_allclose(held_out, 0.1, atol=5 * np.sqrt(0.1 * 0.9 / 2000))


@pytest.mark.parametrize("ratios", [(0.8, 0.1, 0.2), (0.9, 0.0, 0.1), (1.0, 0.1, -0.1), (0.8, 0.2, np.nan), (0.5, 0.5)])
def test_random_refuses_ratios(ratios: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="three positive shares"):
        split_random(np.zeros(5, dtype=np.int64), ratios)


@pytest.mark.parametrize(("length", "expected"), [(2, [2, 0]), (3, [2, 1]), (10, [9, 1]), (19, [18, 1]), (40, [36, 4])])
def test_random_without_test(length: int, expected: list[int]) -> None:
    assert sizes(split_random(np.zeros(length, dtype=np.int64), (0.9, 0.1, 0.0))) == [*expected, 0]


@given(HISTORIES.filter(any), st.integers(2, 50), st.integers(0, 99))
def test_leave_last_out_equals_sorting_each_history(lengths: list[int], num_times: int, seed: int) -> None:
    user = users_of(lengths, seed)
    timestamp = np.random.default_rng(seed).integers(num_times, size=len(user))
    if len(user) > 1 and len(set(timestamp)) == 1:
        return
    expected = np.full(len(user), TRAIN)
    for owner in range(len(lengths)):
        rows = sorted(np.flatnonzero(user == owner), key=lambda row: timestamp[row])
        if len(rows) >= 3:
            expected[rows[-1]], expected[rows[-2]] = TEST, VALID
    np.testing.assert_array_equal(split_leave_last_out(user, timestamp), expected)


def test_leave_last_out_ties_follow_the_rows() -> None:
    split = split_leave_last_out(np.array([0, 0, 0, 0]), np.array([5, 1, 5, 5]))
    assert split.tolist() == [TRAIN, TRAIN, VALID, TEST]


def test_leave_last_out_refuses_a_placeholder() -> None:
    with pytest.raises(
        DataError, match=r"timestamp is 0 in every interaction.*split.method \(--split\) 'random' or 'given'"
    ):
        split_leave_last_out(np.array([0, 0, 0]), np.array([0, 0, 0]))


@given(st.lists(st.integers(0, 30), min_size=2, max_size=60).filter(lambda times: len(set(times)) > 1), RATIOS)
def test_by_time_no_split_overlaps_a_later_one(times: list[int], ratios: tuple[float, float, float]) -> None:
    timestamp = np.array(times)
    split = split_by_time(timestamp, ratios)
    order = np.argsort(timestamp, kind="stable")
    assert (np.diff(split[order].astype(int)) >= 0).all()
    for time in set(times):
        assert len(set(split[timestamp == time])) == 1


def test_by_time_shares_are_exact_without_ties() -> None:
    timestamp = np.random.default_rng(0).permutation(1000)
    split = split_by_time(timestamp)
    assert sizes(split) == [800, 100, 100]
    assert timestamp[split == TRAIN].max() == 799
    assert timestamp[split == VALID].max() == 899


def test_by_time_without_test() -> None:
    timestamp = np.random.default_rng(0).permutation(1000)
    split = split_by_time(timestamp, (0.9, 0.1, 0.0))
    assert sizes(split) == [900, 100, 0]
    assert timestamp[split == TRAIN].max() == 899


def test_by_time_refuses_a_placeholder() -> None:
    with pytest.raises(DataError, match="timestamp is 7 in every interaction"):
        split_by_time(np.full(4, 7))


def test_given_is_taken_as_it_is() -> None:
    labels = np.array([2, 0, 1])
    assert split_given(labels).tolist() == [2, 0, 1]
    assert split_given(labels).dtype == np.uint8
    with pytest.raises(DataError, match=r"must be 0, 1 or 2 \(got 0, 3\)"):
        split_given(np.array([0, 3]))


def test_users_without_train_interactions_are_found() -> None:
    user, split = np.array([0, 1, 1, 2, 0]), np.array([TRAIN, VALID, TEST, TRAIN, TEST], dtype=np.uint8)
    assert has_train_interaction(user, split).tolist() == [True, False, False, True, True]
    nobody = np.array([], dtype=np.int64)
    assert has_train_interaction(nobody, nobody.astype(np.uint8)).tolist() == []


@pytest.mark.parametrize(("labels", "name"), [([1, 2], "train"), ([0, 2], "valid"), ([0, 1], "test"), ([], "train")])
def test_an_empty_split_is_refused(labels: list[int], name: str) -> None:
    with pytest.raises(DataError, match=rf"The {name} split is empty .*Choose another"):
        check_nonempty(np.array(labels, dtype=np.uint8), given=False)
    with pytest.raises(DataError, match=rf"The {name} split is empty .*Label some of them {name}"):
        check_nonempty(np.array(labels, dtype=np.uint8), given=True)
    check_nonempty(np.array([0, 1, 2], dtype=np.uint8), given=False)


def test_only_test_may_be_empty_where_it_is_not_needed() -> None:
    check_nonempty(np.array([0, 1], dtype=np.uint8), given=True, needs_test=False)
    with pytest.raises(
        DataError, match=r"The valid split is empty .*Label some of them valid \(training stops by them"
    ):
        check_nonempty(np.array([0, 0], dtype=np.uint8), given=True, needs_test=False)
