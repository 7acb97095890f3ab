"""How cost grows with the number of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PowerLaw:
    r"""Seconds :math:`= c n^a`.

    Attributes:
        exponent: a.
        factor: c.
        num_sizes: From how many sizes it was fitted.
    """

    exponent: float
    factor: float
    num_sizes: int

    def __call__(self, num_rows: int) -> float:
        """Seconds for so many rows."""
        return float(self.factor * num_rows**self.exponent)


def fit_power_law(num_rows: Sequence[int], seconds: Sequence[float]) -> PowerLaw | None:
    """The power law through measured times, by least squares of their logarithms; None from fewer than two sizes."""
    if len(set(num_rows)) < 2:
        return None
    exponent, logarithm = np.polyfit(np.log(num_rows), np.log(seconds), 1)
    return PowerLaw(float(exponent), float(np.exp(logarithm)), len(set(num_rows)))


def ladder(num_rows: int, steps: int, at_least: int) -> list[int]:
    """Sizes that halve from ``num_rows``, the smallest first; none but the whole below ``at_least``."""
    return [num_rows >> step for step in range(steps, 0, -1) if num_rows >> step >= at_least] + [num_rows]
