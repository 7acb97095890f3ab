"""EASE, Add-EASE and item-kNN in plain NumPy float64, as regressions and cosines item by item.

No closed form is used: the weights of each item are a ridge regression on all the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from tests.oracles.dream import Array


def item_weights(X: ArrayLike, l2: float) -> Array:
    """Column j minimises |x_j - X b|^2 + l2 |b|^2 over all b with b_j = 0 (arXiv 1905.03375, Eq. 2 and 3).

    Args:
        X: Any matrix whose columns are items (N, I).
        l2: lambda.

    Returns:
        B (I, I).
    """
    X = np.asarray(X, dtype=np.float64)
    num_items = X.shape[1]
    B = np.zeros((num_items, num_items))
    for item in range(num_items):
        others = np.delete(np.arange(num_items), item)
        # Ridge regression is least squares with sqrt(l2) times the identity below the data.
        inputs = np.vstack([X[:, others], math.sqrt(l2) * np.eye(len(others))])
        target = np.concatenate([X[:, item], np.zeros(len(others))])
        B[others, item] = np.linalg.lstsq(inputs, target, rcond=None)[0]
    return B


def weighted_users(X: ArrayLike, exponent: float) -> Array:
    """Interactions such that users weigh what they have to the power -exponent, and all together what they did.

    Args:
        X: Train interactions (U, I).
        exponent: e.

    Returns:
        (U, I).
    """
    X = np.asarray(X, dtype=np.float64)
    weighted = np.zeros_like(X)
    for user, row in enumerate(X):
        if row.any():
            weighted[user] = row * row.sum() ** (-exponent / 2)
    return weighted * math.sqrt((X**2).sum() / (weighted**2).sum())


def unit_features(F: ArrayLike, has: ArrayLike, *, center: bool) -> Array:
    """Features less their mean over the items that have them, in rows of norm 1; zero for items without.

    Args:
        F: Item features (I, F).
        has: Which items have them (I,).
        center: Whether the mean is subtracted.

    Returns:
        (I, F).
    """
    F, has = np.asarray(F, dtype=np.float64), np.asarray(has, dtype=bool)
    mean = F[has].mean(axis=0) if center else np.zeros(F.shape[1])
    result = np.zeros_like(F)
    for item in np.flatnonzero(has):
        row = F[item] - mean
        result[item] = row / np.linalg.norm(row)
    return result


def add_ease(
    X: ArrayLike, features: Sequence[ArrayLike], weights: Sequence[float], *, l2: float, feature_l2: float, share: float
) -> Array:
    """The weighted sum of a regression on interactions and one on each modality (doi 10.1145/3383313.3418480).

    Args:
        X: Train interactions (U, I).
        features: One matrix a modality, each (I, F_m).
        weights: The modalities' weights, together 1.
        l2: lambda.
        feature_l2: lambda_F.
        share: beta.

    Returns:
        The weights (I, I).
    """
    total = (1 - share) * item_weights(X, l2)
    for F, weight in zip(features, weights, strict=True):
        total += share * weight * item_weights(np.asarray(F).T, feature_l2)
    return total


def item_knn(X: ArrayLike, count: int, shrinkage: float) -> Array:
    """Cosines of columns, each shrunk, with all but the ``count`` highest of each column left out.

    Args:
        X: Train interactions, zeros and ones (U, I).
        count: K; of equal similarities those of lower ids are kept.
        shrinkage: h.

    Returns:
        W (I, I): what item j says for item i is in row j and column i.
    """
    X = np.asarray(X, dtype=np.float64)
    num_items = X.shape[1]
    taken_by = [set(np.flatnonzero(X[:, item])) for item in range(num_items)]
    W = np.zeros((num_items, num_items))
    for scored in range(num_items):
        similar = []
        for other in range(num_items):
            both = len(taken_by[scored] & taken_by[other])
            if other != scored and both:
                norm = math.sqrt(len(taken_by[scored]) * len(taken_by[other]))
                similar.append((-both / (norm + shrinkage), other))
        for similarity, other in sorted(similar)[:count]:
            W[other, scored] = -similarity
    return W


def scores(X: ArrayLike, W: ArrayLike) -> Array:
    """What the items that each user took say for each item (U, I)."""
    X, W = np.asarray(X), np.asarray(W)
    result = np.zeros((X.shape[0], W.shape[1]))
    for user in range(len(X)):
        for item in np.flatnonzero(X[user]):
            result[user] += W[item]
    return result
