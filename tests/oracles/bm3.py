"""BM3 (arXiv 2207.05969, Section 3) in plain NumPy float64, one function per equation.

Targets are arguments of their own, so that a numerical gradient can hold them still, as stop-gradient does.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from tests.oracles import dream
from tests.oracles.dream import Array


def encode(R: ArrayLike, user: ArrayLike, item: ArrayLike, L: int) -> tuple[Array, Array]:
    """Users are the mean over LightGCN's layers, items the same plus their own ID embedding.

    Args:
        R: Train interactions (U, I).
        user: ID embeddings of users (U, D).
        item: ID embeddings of items (I, D).
        L: The number of layers.

    Returns:
        h_u (U, D) and h_i (I, D).
    """
    A_hat = dream.normalised(dream.adjacency(R))
    _, mean = dream.lightgcn(A_hat, np.concatenate([user, item]), L)
    num_users = np.shape(user)[0]
    return mean[:num_users], mean[num_users:] + np.asarray(item, dtype=np.float64)


def predict(h: ArrayLike, W: ArrayLike, b: ArrayLike) -> Array:
    """The online view, h W_p + b_p.

    Args:
        h: Latent representations (N, D).
        W: (D, D).
        b: (D,).

    Returns:
        Predicted representations (N, D).
    """
    return np.asarray(h, dtype=np.float64) @ np.asarray(W, dtype=np.float64) + np.asarray(b, dtype=np.float64)


def dissimilarity(online: ArrayLike, target: ArrayLike, present: ArrayLike | None = None) -> float:
    """1 - cos(z, t), the mean over the rows that are present; 0 if none is.

    Args:
        online: z (B, D).
        target: t (B, D).
        present: Which rows count (B,); by default all.

    Returns:
        The loss.
    """
    online, target = np.asarray(online, dtype=np.float64), np.asarray(target, dtype=np.float64)
    rows = range(len(online)) if present is None else np.flatnonzero(present)
    values = []
    for row in rows:
        norms = math.sqrt(math.fsum(online[row] ** 2)) * math.sqrt(math.fsum(target[row] ** 2))
        values.append(1.0 - (math.fsum(online[row] * target[row]) / norms if norms else 0.0))
    return math.fsum(values) / len(values) if values else 0.0


def reconstruction(online_user: ArrayLike, online_item: ArrayLike, user: ArrayLike, item: ArrayLike) -> float:
    """The graph reconstruction loss, in both directions.

    Args:
        online_user: Online view of the batch's users (B, D).
        online_item: Online view of their items (B, D).
        user: Target view of the users (B, D).
        item: Target view of the items (B, D).

    Returns:
        The loss.
    """
    return dissimilarity(online_user, item) + dissimilarity(online_item, user)


def l2(user: ArrayLike, item: ArrayLike) -> float:
    """The norms of all latent representations, over the number of items.

    Args:
        user: h_u (U, D).
        item: h_i (I, D).

    Returns:
        The penalty.
    """
    norms = (math.sqrt(math.fsum((np.asarray(rows) ** 2).ravel())) for rows in (user, item))
    return math.fsum(norms) / np.shape(item)[0]


def modal_line(
    R: ArrayLike, projected: list[ArrayLike], has: list[ArrayLike], W: ArrayLike, b: ArrayLike
) -> tuple[Array, Array]:
    """What Behavior-Modal Alignment takes as the modal line: predicted means over modalities, users' over items first.

    Args:
        R: Train interactions (U, I).
        projected: h_m of all items, one array a modality, each (I, D).
        has: Whether each item has the modality, one array a modality, each (I,).
        W: The predictor's (D, D).
        b: The predictor's (D,).

    Returns:
        Users (U, D) and items (I, D).
    """
    users = [dream.user_features(R, h, present) for h, present in zip(projected, has, strict=True)]
    return predict(sum(users) / len(users), W, b), predict(sum(map(np.asarray, projected)) / len(projected), W, b)
