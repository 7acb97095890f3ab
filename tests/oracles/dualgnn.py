"""DualGNN (doi 10.1109/TMM.2021.3138298) in plain NumPy float64, dense and one function per equation."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from tests.oracles import dream
from tests.oracles.dream import Array


def co_occurrence(R: ArrayLike, k: int) -> list[dict[int, int]]:
    """The k users that share most train items with each user, those with lower ids first among equals.

    Args:
        R: Train interactions (U, I).
        k: Neighbours a user, K; fewer where fewer share any item.

    Returns:
        For each user, how many items are shared with each neighbour.
    """
    items = [set(np.flatnonzero(row).tolist()) for row in np.asarray(R)]
    neighbours = []
    for user, own in enumerate(items):
        shared = {other: len(own & theirs) for other, theirs in enumerate(items) if other != user and own & theirs}
        chosen = sorted(shared, key=lambda other, shared=shared: (-shared[other], other))[:k]
        neighbours.append({other: shared[other] for other in chosen})
    return neighbours


def user_graph(neighbours: list[dict[int, int]]) -> Array:
    """Row u holds the softmax of the shared items over u's neighbours; it is zero without any.

    Args:
        neighbours: What `co_occurrence` returned.

    Returns:
        The graph (U, U).
    """
    C = np.zeros((len(neighbours), len(neighbours)))
    for user, shared in enumerate(neighbours):
        total = math.fsum(math.exp(count) for count in shared.values())
        for other, count in shared.items():
            C[user, other] = math.exp(count) / total
    return C


def encode_items(X: ArrayLike, has: ArrayLike, W1: ArrayLike, b1: ArrayLike, W2: ArrayLike, b2: ArrayLike) -> Array:
    """LeakyReLU(f W_1 + b_1) W_2 + b_2 with slope 0.01, zero for an item that lacks the modality.

    Args:
        X: Scaled features (I, F).
        has: Whether each item has the modality (I,).
        W1: (F, 4 D).
        b1: (4 D,).
        W2: (4 D, D).
        b2: (D,).

    Returns:
        Items before propagation (I, D).
    """
    items = np.zeros((len(np.asarray(X)), np.shape(W2)[1]))
    for item in np.flatnonzero(has):
        hidden = np.asarray(X)[item] @ np.asarray(W1) + np.asarray(b1)
        items[item] = np.where(hidden > 0, hidden, 0.01 * hidden) @ np.asarray(W2) + np.asarray(b2)
    return items


def view(R: ArrayLike, user: ArrayLike, item: ArrayLike, L: int) -> tuple[Array, Array]:
    """Rows of norm 1, propagated over the user-item graph; the sum of layers 0 .. L.

    Args:
        R: Train interactions (U, I).
        user: Users of the modality (U, D).
        item: Items of the modality (I, D).
        L: Layers.

    Returns:
        Users (U, D) and items (I, D).
    """
    A_hat = dream.normalised(dream.adjacency(R))
    x = np.concatenate([dream.unit_rows(user), dream.unit_rows(item)])
    layers, _ = dream.lightgcn(A_hat, x, L)
    total = np.zeros_like(x)
    for layer in layers:
        total += layer
    return total[: len(np.asarray(user))], total[len(np.asarray(user)) :]


def preferences(users: list[Array], W: ArrayLike) -> Array:
    """p_u = sum_m w_um e_mu.

    Args:
        users: Users by modality, each (U, D).
        W: Each user's weight of each modality (U, M).

    Returns:
        Users (U, D).
    """
    p = np.zeros_like(users[0])
    for user in range(len(p)):
        for m, view_users in enumerate(users):
            p[user] += np.asarray(W)[user, m] * view_users[user]
    return p


def l2(users: list[ArrayLike], W: ArrayLike | None) -> float:
    """The mean square of the batch's free users, summed over modalities, plus that of all weights.

    Args:
        users: The free users of the batch by modality, each (B, D).
        W: Weights of modalities (U, M), if there are any.

    Returns:
        The penalty.
    """
    penalty = math.fsum(float(np.mean(np.asarray(rows) ** 2)) for rows in users)
    return penalty if W is None else penalty + float(np.mean(np.asarray(W) ** 2))
