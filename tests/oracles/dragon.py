"""DRAGON (arXiv 2301.12097, Section 3) in plain NumPy float64, dense and one function per equation."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from tests.oracles.dream import Array


def side_by_side(users: list[Array], items: list[Array], W: ArrayLike) -> tuple[Array, Array]:
    """Modalities concatenated, each user's multiplied by that user's weight of it.

    Args:
        users: Users by modality, each (U, D).
        items: Items by modality, each (I, D).
        W: Each user's weight of each modality (U, M).

    Returns:
        Users (U, M D) and items (I, M D).
    """
    num_users, dim = users[0].shape
    user = np.zeros((num_users, dim * len(users)))
    item = np.zeros((len(items[0]), dim * len(items)))
    for m, (view_users, view_items) in enumerate(zip(users, items, strict=True)):
        for row in range(num_users):
            user[row, m * dim : (m + 1) * dim] = np.asarray(W)[row, m] * view_users[row]
        item[:, m * dim : (m + 1) * dim] = view_items
    return user, item


def enhance(user: ArrayLike, item: ArrayLike, C: ArrayLike, S: ArrayLike, L: int) -> tuple[Array, Array]:
    """Users plus C times users, items plus S^L times items.

    Args:
        user: Users (U, M D).
        item: Items (I, M D).
        C: The user-user graph (U, U).
        S: The item-item graph (I, I).
        L: Layers over S.

    Returns:
        Users (U, M D) and items (I, M D).
    """
    user, item = np.asarray(user, dtype=np.float64), np.asarray(item, dtype=np.float64)
    return user + np.asarray(C) @ user, item + np.linalg.matrix_power(np.asarray(S), L) @ item
