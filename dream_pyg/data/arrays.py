"""What NumPy leaves to be said in one line that is easily said wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def place_in_group(group: NDArray[Any], size: NDArray[np.int64]) -> NDArray[np.int64]:
    """The position of each within its group, from 0.

    Args:
        group: The groups of some (N,), ascending.
        size: How many are of each group (G,).
    """
    return np.arange(len(group)) - (np.cumsum(size) - size)[group]
