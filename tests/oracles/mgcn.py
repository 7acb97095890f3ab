"""MGCN (arXiv 2308.03588, Section 3) in plain NumPy float64, dense and one function per equation."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from tests.oracles import dream
from tests.oracles.dream import Array, sigmoid


def item_graph(X: ArrayLike, has: ArrayLike, k: int, include_self: bool) -> Array:
    """Cosine top-k that keeps the cosines (negative ones as 0), then D^-1/2 S D^-1/2 with D the row sums.

    Args:
        X: Item features of one modality (I, F).
        has: Whether each item has it (I,).
        k: Neighbours an item.
        include_self: Whether an item is one of its own k neighbours.

    Returns:
        The normalised graph (I, I).
    """
    similarity = dream.cosine(X)
    S = np.zeros_like(similarity)
    for item, chosen in enumerate(dream.top_k_neighbours(X, has, k, include_self)):
        for neighbour in chosen:
            S[item, neighbour] = max(similarity[item, neighbour], 0.0)
    return dream.normalised(S)


def purify(projected: ArrayLike, item: ArrayLike, W: ArrayLike, b: ArrayLike) -> Array:
    """The behavior-guided purifier: E_id * sigmoid(E_m W_2 + b_2).

    Args:
        projected: Projected features E_m (I, D).
        item: ID embeddings (I, D).
        W: (D, D).
        b: (D,).

    Returns:
        Purified features (I, D).
    """
    return np.asarray(item) * sigmoid(np.asarray(projected) @ np.asarray(W) + np.asarray(b))


def view(R: ArrayLike, S: ArrayLike, purified: ArrayLike, L: int) -> tuple[Array, Array]:
    """The item-item view: items propagate L times over S, users sum e_i / sqrt(|N_u| |N_i|) over their items.

    Args:
        R: Train interactions (U, I).
        S: The item-item graph of the modality (I, I).
        purified: Purified features (I, D).
        L: Layers over S.

    Returns:
        Users (U, D) and items (I, D).
    """
    R = np.asarray(R, dtype=np.float64)
    item = np.linalg.matrix_power(np.asarray(S), L) @ np.asarray(purified)
    user = np.zeros((len(R), item.shape[1]))
    for u, i in np.argwhere(R):
        user[u] += item[i] / math.sqrt(R[u].sum() * R[:, i].sum())
    return user, item


def fuse(
    views: list[ArrayLike],
    behavior: ArrayLike,
    attention: tuple[ArrayLike, ArrayLike, ArrayLike],
    preferences: list[tuple[ArrayLike, ArrayLike]],
    fusion: str,
) -> Array:
    """The behavior-aware fuser, one node at a time.

    Args:
        views: Representations in each modality (N, D).
        behavior: Representations in the user-item view (N, D).
        attention: W_3 (D, D), b_3 (D,) and q (D,) of the attention over modalities.
        preferences: W_4 (D, D) and b_4 (D,) of each modality's preference.
        fusion: 'mean' of the shared and all specific parts, or 'shared_plus_mean' of the specific ones.

    Returns:
        E_mul (N, D).
    """
    W_3, b_3, q = (np.asarray(part, dtype=np.float64) for part in attention)
    behavior = np.asarray(behavior, dtype=np.float64)
    fused = np.zeros_like(behavior)
    for node in range(len(behavior)):
        own = [np.asarray(rows, dtype=np.float64)[node] for rows in views]
        logits = np.array([math.fsum(q * np.tanh(row @ W_3 + b_3)) for row in own])
        weights = np.exp(logits - logits.max())
        weights /= weights.sum()
        shared = sum(weight * row for weight, row in zip(weights, own, strict=True))
        specific = np.zeros_like(shared)
        for row, (W_4, b_4) in zip(own, preferences, strict=True):
            specific += (row - shared) * sigmoid(behavior[node] @ np.asarray(W_4) + np.asarray(b_4))
        if fusion == "mean":
            fused[node] = (shared + specific) / (len(own) + 1)
        else:
            fused[node] = shared + specific / len(own)
    return fused
