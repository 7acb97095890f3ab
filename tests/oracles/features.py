"""Item features as models take them, in NumPy float64."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from tests.oracles.dream import Array, unit_rows


def scaled(X: ArrayLike, scaling: str) -> Array:
    """Feature rows as given ('raw'), of norm 1 ('unit'), or of norm sqrt(F) ('rms'); a zero row stays zero.

    Args:
        X: Item features (I, F).
        scaling: Which of the three.

    Returns:
        Scaled features (I, F).
    """
    X = np.asarray(X, dtype=np.float64)
    return {"raw": X, "unit": unit_rows(X), "rms": unit_rows(X) * math.sqrt(X.shape[1])}[scaling]


def projection(X: ArrayLike, has: ArrayLike, W: ArrayLike, b: ArrayLike) -> Array:
    """h_m = x_m W + b, zero for an item that lacks the modality.

    Args:
        X: Item features (I, F).
        has: Whether each item has the modality (I,).
        W: (F, D).
        b: (D,).

    Returns:
        Projected features (I, D).
    """
    projected = np.zeros((np.shape(X)[0], np.shape(W)[1]))
    for item in np.flatnonzero(has):
        projected[item] = np.asarray(X)[item] @ np.asarray(W) + np.asarray(b)
    return projected
