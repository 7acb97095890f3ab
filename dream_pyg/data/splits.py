"""Ways to split interactions into train, valid and test, all as (E,) uint8 labels."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dream_pyg.data.arrays import place_in_group
from dream_pyg.data.interactions import SPLITS, TEST, TRAIN, VALID
from dream_pyg.errors import ConfigError, DataError

Ratios = tuple[float, float, float]
Labels = NDArray[np.uint8]

DEFAULT_RATIOS: Ratios = (0.8, 0.1, 0.1)
EXPECTED_RATIOS = "must be three positive shares of train, valid and test that sum to 1, but that of test may be 0"
# With fewer, valid or test would take the last interaction to learn from.
FEWEST_TO_SPLIT = 3


def split_given(labels: NDArray[Any]) -> Labels:
    """Take the split that the file says.

    Args:
        labels: 0, 1 or 2 for train, valid or test (E,).

    Raises:
        DataError: If a label is none of these.
    """
    if not np.isin(labels, (TRAIN, VALID, TEST)).all():
        raise DataError(f"Split labels must be 0, 1 or 2 (got {', '.join(map(str, np.unique(labels)[:5]))}).")
    return labels.astype(np.uint8)


def split_random(user: NDArray[np.int64], ratios: Ratios = DEFAULT_RATIOS, seed: int = 0) -> Labels:
    """Split each user's interactions at random, in the proportions of the field's published splits.

    A user with n interactions has ``max(1, floor(valid * n))`` in valid, ``max(1, floor(test * n + 1/2))`` in test and
    the others in train: 3/1/1 of 5, 12/1/2 of 15. Where the share of test is 0, none has any in test. Users with fewer
    than three have all in train.

    Args:
        user: Internal user id of each interaction (E,).
        ratios: Shares of train, valid and test; that of test may be 0.
        seed: Equal seeds give equal splits of equal interactions.

    Returns:
        Labels (E,).

    Raises:
        ConfigError: If the shares are not positive or do not sum to 1.
    """
    check_ratios(ratios)
    count = np.bincount(user)
    num_valid, num_test = _held_out(count, ratios)
    shuffled = np.random.default_rng(seed).permutation(len(user))
    rank = _rank_within(user, shuffled[np.argsort(user[shuffled], kind="stable")], count)
    split = np.full(len(user), TRAIN, dtype=np.uint8)
    split[rank < (num_valid + num_test)[user]] = VALID
    split[rank < num_test[user]] = TEST
    return split


def split_leave_last_out(user: NDArray[np.int64], timestamp: NDArray[Any]) -> Labels:
    """Put each user's last interaction in test, the one before in valid, and the others in train.

    Of equal times the later row is the later interaction. Users with fewer than three have all in train.

    Args:
        user: Internal user id of each interaction (E,).
        timestamp: Time of each interaction (E,).

    Returns:
        Labels (E,).

    Raises:
        DataError: If all times are equal.
    """
    _check_times(timestamp)
    count = np.bincount(user)
    rank = _rank_within(user, np.lexsort((timestamp, user)), count)
    from_last = count[user] - 1 - rank
    has_enough = count[user] >= FEWEST_TO_SPLIT
    split = np.full(len(user), TRAIN, dtype=np.uint8)
    split[has_enough & (from_last == 1)] = VALID
    split[has_enough & (from_last == 0)] = TEST
    return split


def split_by_time(timestamp: NDArray[Any], ratios: Ratios = DEFAULT_RATIOS) -> Labels:
    """Split at two points in time, the same for all users, so that nothing in train is later than anything in test.

    Interactions of equal time stay together, so the shares are met as closely as ties allow.

    Args:
        timestamp: Time of each interaction (E,).
        ratios: Shares of train, valid and test; that of test may be 0.

    Returns:
        Labels (E,).

    Raises:
        ConfigError: If the shares are not positive or do not sum to 1.
        DataError: If all times are equal.
    """
    check_ratios(ratios)
    _check_times(timestamp)
    shares_before = (ratios[0], ratios[0] + ratios[1]) if ratios[2] else (ratios[0],)
    first_of_next = [min(round(share * len(timestamp)), len(timestamp) - 1) for share in shares_before]
    cuts = np.partition(timestamp, first_of_next)[first_of_next]
    return np.searchsorted(cuts, timestamp, side="right").astype(np.uint8)


def has_train_interaction(user: NDArray[np.int64], split: Labels) -> NDArray[np.bool_]:
    """Which interactions (E,) are of users with at least one in train: nothing can be recommended to the others."""
    is_warm = np.zeros(int(user.max(initial=-1)) + 1, dtype=bool)
    is_warm[user[split == TRAIN]] = True
    return is_warm[user]


def check_nonempty(split: Labels, *, given: bool, needs_test: bool = True) -> None:
    """Check that train, valid and test all have interactions.

    Args:
        split: Labels (E,).
        given: Whether they come with the interactions.
        needs_test: Whether test must have some. Valid always must: training stops by it.

    Raises:
        DataError: Naming the first that has none.
    """
    sizes = np.bincount(split, minlength=len(SPLITS))
    for name, size in zip(SPLITS, sizes, strict=True):
        if not size and (needs_test or name != SPLITS[TEST]):
            found = ", ".join(f"{count} {other}" for other, count in zip(SPLITS, sizes, strict=True))
            why = " (training stops by them)" if name == SPLITS[VALID] else ""
            cure = (
                f"Label some of them {name}{why}, or choose another split.method (--split)"
                if given
                else "Choose another split.method (--split) or split.ratios (--split-ratios), or add interactions: a "
                "user needs at least three for each split to get one"
            )
            raise DataError(f"The {name} split is empty (interactions: {found}). {cure}.")


def check_ratios(ratios: Ratios) -> None:
    """Check that the shares of train, valid and test are positive, but for that of test, which may be 0, and sum to 1.

    Raises:
        ConfigError: If they are not.
    """
    in_range = len(ratios) == len(SPLITS) and min(ratios[:2]) > 0 and ratios[2] >= 0
    if not in_range or not abs(sum(ratios) - 1) <= 1e-6:  # false for NaN, too
        raise ConfigError(f"ratios {EXPECTED_RATIOS} (got {ratios}).")


def _held_out(count: NDArray[np.int64], ratios: Ratios) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How many interactions of each user (U,) go to valid and to test; at least one stays in train."""
    tiny = 1e-9  # 0.3 * 10 must not be floored to 2
    num_test = np.maximum(1 if ratios[2] else 0, np.floor(ratios[2] * count + 0.5 + tiny)).astype(np.int64)
    num_test = np.minimum(num_test, count - 2)
    num_valid = np.maximum(1, np.floor(ratios[1] * count + tiny)).astype(np.int64)
    num_valid = np.minimum(num_valid, count - 1 - num_test)
    has_enough = count >= FEWEST_TO_SPLIT
    return np.where(has_enough, num_valid, 0), np.where(has_enough, num_test, 0)


def _rank_within(user: NDArray[np.int64], order: NDArray[np.int64], count: NDArray[np.int64]) -> NDArray[np.int64]:
    """The place of each interaction (E,) among its user's, where ``order`` sorts by user and then as wanted."""
    rank = np.empty(len(user), dtype=np.int64)
    rank[order] = place_in_group(user[order], count)
    return rank


def _check_times(timestamp: NDArray[Any]) -> None:
    if len(timestamp) > 1 and timestamp.min() == timestamp.max():
        raise DataError(
            f"A split by time needs times that differ, but the timestamp is {timestamp[0]} in every interaction "
            "(many published files carry a placeholder). Use split.method (--split) 'random' or 'given'."
        )
