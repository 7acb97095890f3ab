"""What ``dream-pyg tune`` may search in a model, as data.

Bounds enclose the grids that the papers, or MMRec (github.com/enoche/MMRec at e775373), give; weights and learning
rates are searched on a logarithmic scale between them. What a paper holds fixed for all data sets is not searched.
"""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, uniform."""

    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class LogRange(Range):
    """Numbers from ``low`` to ``high``, uniform in their logarithm."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of a few values."""

    values: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class ImageShare(Range):
    """The weight of the image modality against the one other: left out where a graph has other than two modalities."""

    of_paper: float
    """The model's default where the other is text; with any other, the default is one half."""


Dimension = Range | Choice
Space = dict[str, Dimension]
"""What is searched, by the keys that ``--set`` takes."""

RATE = {"training.learning_rate": LogRange(3e-4, 1e-2)}
"""The learning rate, in models that learn."""
