"""MICRO (arXiv 2111.00678, Section 3) in plain NumPy float64; its graphs are those of LATTICE."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from tests.oracles import dream
from tests.oracles.dream import Array


def attention(views: list[Array], W: ArrayLike, b: ArrayLike, q: ArrayLike) -> Array:
    """h_i = sum_m a_m h_mi with a = softmax_m(q . tanh(h_mi W + b)).

    Args:
        views: Items over each latent structure, each (I, D).
        W: (D, D).
        b: (D,).
        q: (D,).

    Returns:
        Fused items (I, D).
    """
    fused = np.zeros_like(views[0])
    for item in range(len(fused)):
        scores = [math.exp(np.tanh(view[item] @ np.asarray(W) + np.asarray(b)) @ np.asarray(q)) for view in views]
        for view, score in zip(views, scores, strict=True):
            fused[item] += score / math.fsum(scores) * view[item]
    return fused


def contrast(view: ArrayLike, fused: ArrayLike, tau: float) -> float:
    """The mean of -log exp(v.f / tau) / (all exp(v.f' / tau) and all other exp(v.v' / tau)), with unit rows.

    Args:
        view: Rows of a modality (B, D).
        fused: Fused rows of the same items (B, D).
        tau: The temperature.

    Returns:
        The loss, 0 without rows.
    """
    v, f = dream.unit_rows(view), dream.unit_rows(fused)
    values = []
    for row in range(len(v)):
        across = [math.exp(math.fsum(v[row] * other) / tau) for other in f]
        within = [math.exp(math.fsum(v[row] * v[other]) / tau) for other in range(len(v)) if other != row]
        values.append(-math.log(across[row] / math.fsum(across + within)))
    return math.fsum(values) / len(values) if values else 0.0
