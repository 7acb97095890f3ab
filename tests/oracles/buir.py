"""BUIR (arXiv 2105.06323) in plain NumPy float64, one function per equation."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from tests.oracles.dream import Array


def encode(to_user: ArrayLike, to_item: ArrayLike, user: ArrayLike, item: ArrayLike, L: int) -> tuple[Array, Array]:
    """LightGCN with a matrix of its own in each direction: the mean over layers 0 to L.

    Args:
        to_user: Weights of messages from items to users (U, I).
        to_item: Weights of messages from users to items (I, U).
        user: Table of users (U, D).
        item: Table of items (I, D).
        L: The number of layers.

    Returns:
        Users (U, D) and items (I, D).
    """
    users, items = [np.asarray(user, dtype=np.float64)], [np.asarray(item, dtype=np.float64)]
    for _ in range(L):
        next_user, next_item = np.asarray(to_user) @ items[-1], np.asarray(to_item) @ users[-1]
        users.append(next_user)
        items.append(next_item)
    return sum(users) / (L + 1), sum(items) / (L + 1)


def predict(h: ArrayLike, W: ArrayLike, b: ArrayLike) -> Array:
    """The predictor, h W + b.

    Args:
        h: Rows (N, D).
        W: (D, D).
        b: (D,).

    Returns:
        Rows (N, D).
    """
    return np.asarray(h, dtype=np.float64) @ np.asarray(W) + np.asarray(b)


def distance(predicted: ArrayLike, target: ArrayLike) -> float:
    """The squared distance of unit rows, the mean over the batch.

    Args:
        predicted: Rows (B, D).
        target: Rows (B, D).

    Returns:
        The loss.
    """
    values = []
    for one, other in zip(np.asarray(predicted, float), np.asarray(target, float), strict=True):
        difference = one / math.sqrt(math.fsum(one**2)) - other / math.sqrt(math.fsum(other**2))
        values.append(math.fsum(difference**2))
    return math.fsum(values) / len(values)


def follow(target: ArrayLike, online: ArrayLike, tau: float) -> Array:
    """The target's table after a step: tau T + (1 - tau) E.

    Args:
        target: T before (N, D).
        online: E after the step (N, D).
        tau: The momentum.

    Returns:
        T after (N, D).
    """
    return tau * np.asarray(target, dtype=np.float64) + (1 - tau) * np.asarray(online, dtype=np.float64)


def scores(user: ArrayLike, item: ArrayLike, W: ArrayLike, b: ArrayLike) -> Array:
    """q(u) . i + u . q(i) for each user and item.

    Args:
        user: Users from the online encoder (U, D).
        item: Items from the online encoder (I, D).
        W: The predictor's (D, D).
        b: The predictor's (D,).

    Returns:
        Scores (U, I).
    """
    user, item = np.asarray(user, dtype=np.float64), np.asarray(item, dtype=np.float64)
    result = np.zeros((len(user), len(item)))
    for u, i in np.ndindex(result.shape):
        result[u, i] = math.fsum(predict(user[u], W, b) * item[i]) + math.fsum(user[u] * predict(item[i], W, b))
    return result


def l2(user: ArrayLike, item: ArrayLike) -> float:
    """Half the squares of the batch's layer-0 rows, over B.

    Args:
        user: Of the users (B, D).
        item: Of the items (B, D).

    Returns:
        The penalty.
    """
    return 0.5 * float((np.asarray(user) ** 2).sum() + (np.asarray(item) ** 2).sum()) / np.shape(user)[0]
