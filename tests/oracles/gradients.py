"""Gradients by central differences, to compare autograd with."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray


def numerical_gradient(
    f: Callable[[NDArray[np.float64]], float], x: ArrayLike, eps: float = 1e-6
) -> NDArray[np.float64]:
    """Central differences in float64: (f(x + eps e_j) - f(x - eps e_j)) / (2 eps), one entry at a time.

    Expect an error around 1e-9 times the size of f: truncation eps^2, rounding 1e-16 / eps.

    Args:
        f: A function of one array, of any shape, that returns one number. It gets a fresh array at each call.
        x: Where the gradient is taken. Not changed.
        eps: The step.

    Returns:
        The gradient, of the shape of x.
    """
    x = np.asarray(x, dtype=np.float64)
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        above = x.copy()
        above[index] += eps
        below = x.copy()
        below[index] -= eps
        gradient[index] = (float(f(above)) - float(f(below))) / (2.0 * eps)
    return gradient
