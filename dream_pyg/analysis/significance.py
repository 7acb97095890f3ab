"""Whether two systems differ by more than which users there happen to be."""

from __future__ import annotations

import math

from torch import Tensor


def paired_p_value(first: Tensor, second: Tensor) -> float:
    r"""Two-sided p-value of the mean difference of two systems over the same users.

    The statistic is that of the paired t-test, :math:`t = \bar d / (s_d / \sqrt n)`, against the normal distribution,
    which is that of t but for 1/n: made for thousands of users.

    Args:
        first: A figure of each user (U,), NaN for those who do not count.
        second: The same of the other system.

    Returns:
        The probability of a mean difference at least as large if users had none on average; 1 if there is none, or if
        fewer than two users count.
    """
    difference = (first - second).double()
    difference = difference[~difference.isnan()]
    if len(difference) < 2 or not difference.any():
        return 1.0
    deviation = float(difference.std()) / math.sqrt(len(difference))
    return math.erfc(abs(float(difference.mean())) / deviation / math.sqrt(2)) if deviation else 0.0
