"""What the paper's figures measure, in plain NumPy float64, written from the definitions alone.

Shape letters: N nodes, B triplets, D embedding, F feature.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from tests.oracles.dream import Array, unit_rows


def cosine_distance(X: ArrayLike, Y: ArrayLike) -> float:
    """One minus the mean cosine of corresponding rows, without those that are zero in either.

    Args:
        X: Rows (N, D).
        Y: Rows (N, D).
    """
    cosines = [x @ y for x, y in zip(unit_rows(X), unit_rows(Y), strict=True) if x.any() and y.any()]
    return 1.0 - math.fsum(cosines) / len(cosines)


def structure_distance(X: ArrayLike, Y: ArrayLike) -> float:
    """One minus the cosine between the two matrices of cosines, centred by rows and by columns.

    Args:
        X: Rows (N, D).
        Y: Rows (N, F).
    """
    centred = []
    for rows in (X, Y):
        K = unit_rows(rows) @ unit_rows(rows).T
        centred.append(K - K.mean(axis=0) - K.mean(axis=1)[:, None] + K.mean())
    K, T = centred
    return 1.0 - float((K * T).sum() / math.sqrt((K * K).sum() * (T * T).sum()))


def bpr_gradients(user: ArrayLike, item: ArrayLike, triplets: list[tuple[int, int, int]]) -> tuple[Array, Array]:
    """The gradients of BPR's mean over triplets with respect to both tables.

    Args:
        user: Users (U, D).
        item: Items (I, D).
        triplets: User, positive and negative item.

    Returns:
        Gradients (U, D) and (I, D).
    """
    user, item = np.asarray(user, dtype=np.float64), np.asarray(item, dtype=np.float64)
    user_gradient, item_gradient = np.zeros_like(user), np.zeros_like(item)
    for u, i, j in triplets:
        slope = -1.0 / (1.0 + math.exp(user[u] @ (item[i] - item[j]))) / len(triplets)
        user_gradient[u] += slope * (item[i] - item[j])
        item_gradient[i] += slope * user[u]
        item_gradient[j] -= slope * user[u]
    return user_gradient, item_gradient
