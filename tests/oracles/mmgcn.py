"""MMGCN (doi 10.1145/3343031.3351034, Section 2) in plain NumPy float64, one function per equation."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from tests.oracles.dream import Array, adjacency, unit_rows


def leaky_relu(x: ArrayLike) -> Array:
    """X where it is positive, x / 100 elsewhere.

    Args:
        x: Any array.

    Returns:
        An array of the same shape.
    """
    x = np.asarray(x, dtype=np.float64)
    return np.where(x > 0, x, 0.01 * x)


def neighbour_mean(R: ArrayLike, x: ArrayLike) -> Array:
    """Equation (2) before its activation: the mean over a node's neighbours, zero for a node without any.

    Args:
        R: Train interactions (U, I).
        x: Rows, users first (U + I, D).

    Returns:
        Rows, users first (U + I, D).
    """
    A, x = adjacency(R), np.asarray(x, dtype=np.float64)
    mean = np.zeros_like(x)
    for node in range(len(x)):
        neighbours = np.flatnonzero(A[node])
        for neighbour in neighbours:
            mean[node] += x[neighbour] / len(neighbours)
    return mean


def layer(
    R: ArrayLike,
    x: ArrayLike,
    identity: ArrayLike,
    W_1: ArrayLike,
    own: tuple[ArrayLike, ArrayLike],
    combine: tuple[ArrayLike, ArrayLike],
    concat: bool,
) -> Array:
    """Equations (2), (5) and (6) or (7): one layer in one modality.

    Args:
        R: Train interactions (U, I).
        x: States, users first (U + I, D_in).
        identity: ID embeddings, users first (U + I, D).
        W_1: Of the neighbours (D_in, D_in).
        own: W_2 (D_in, D) and b_2 (D,) of the own state.
        combine: W_3 (D_in, D), or (D_in + D, D) if it concatenates, and b_3 (D,).
        concat: Whether equation (6) combines, not (7).

    Returns:
        The next states (U + I, D).
    """
    x = np.asarray(x, dtype=np.float64)
    h = leaky_relu(neighbour_mean(R, x @ np.asarray(W_1)))
    x_hat = leaky_relu(x @ np.asarray(own[0]) + np.asarray(own[1])) + np.asarray(identity)
    W_3, b_3 = (np.asarray(part, dtype=np.float64) for part in combine)
    if concat:
        return leaky_relu(np.concatenate([h, x_hat], axis=1) @ W_3 + b_3)
    return leaky_relu(h @ W_3 + b_3 + x_hat)


def first_states(preference: ArrayLike, projected: ArrayLike) -> Array:
    """Users' preferences and items' projected features, in unit rows.

    Args:
        preference: Of users (U, D_in).
        projected: Features of items (I, D_in).

    Returns:
        States, users first (U + I, D_in).
    """
    return unit_rows(np.concatenate([preference, projected]))


def l2(*rows: ArrayLike) -> float:
    """Half the squares of all rows, over B.

    Args:
        rows: Free embeddings of the batch, each with B rows.

    Returns:
        The penalty.
    """
    return sum(float((np.asarray(part) ** 2).sum()) for part in rows) / (2 * np.shape(rows[0])[0])
