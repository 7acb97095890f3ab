"""VBPR (arXiv 1510.01784) in plain NumPy float64, as Eq. 2 and 3 write it: one projection, two inner products."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from tests.oracles.dream import Array


def visual_factors(features: list[ArrayLike], projections: list[ArrayLike]) -> Array:
    """Equation (3): theta_i = E f_i, for f_i the concatenation of all modalities and E that of their projections.

    Args:
        features: Item features, one array a modality, each (I, F_m).
        projections: Their parts of E, each (F_m, D).

    Returns:
        theta of all items (I, D).
    """
    f = np.concatenate([np.asarray(part, dtype=np.float64) for part in features], axis=1)
    E = np.concatenate([np.asarray(part, dtype=np.float64) for part in projections], axis=0)
    return f @ E


def scores(gamma_user: ArrayLike, theta_user: ArrayLike, gamma_item: ArrayLike, theta_item: ArrayLike) -> Array:
    """Equation (2) without its biases: gamma_u . gamma_i + theta_u . theta_i.

    Args:
        gamma_user: ID factors of users (U, D).
        theta_user: Preferences of users (U, D).
        gamma_item: ID factors of items (I, D).
        theta_item: Visual factors of items (I, D).

    Returns:
        The score of each user for each item (U, I).
    """
    result = np.zeros((np.shape(gamma_user)[0], np.shape(gamma_item)[0]))
    for user, item in np.ndindex(result.shape):
        by_id = math.fsum(np.asarray(gamma_user)[user] * np.asarray(gamma_item)[item])
        by_features = math.fsum(np.asarray(theta_user)[user] * np.asarray(theta_item)[item])
        result[user, item] = by_id + by_features
    return result


def bpr(score: ArrayLike, user: ArrayLike, pos_item: ArrayLike, neg_item: ArrayLike) -> float:
    """The mean of -log sigmoid(x_ui - x_uj) over the batch.

    Args:
        score: Scores (U, I).
        user: Users (B,).
        pos_item: Their positive items (B,).
        neg_item: Their negative items (B,).

    Returns:
        The loss.
    """
    score = np.asarray(score, dtype=np.float64)
    margins = [score[u, i] - score[u, j] for u, i, j in zip(user, pos_item, neg_item, strict=True)]
    return math.fsum(np.logaddexp(0.0, -margin) for margin in margins) / len(margins)
