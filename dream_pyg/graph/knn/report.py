"""What a search tells of itself."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from dream_pyg.data.features import Neighbors

Setting = dict[str, int]
"""What makes one search of an engine more thorough than another, by name."""


@dataclass(frozen=True)
class SearchReport:
    """How neighbours were found, how long that took and how many of the true ones they are.

    Attributes:
        engine: How candidates were found.
        parameters: Of the engine, as they were chosen.
        seconds: Wall-clock time of the whole search.
        recall: The share of the K most similar rows that were found, a tie counting as found. An engine that leaves
            nothing out has 1 by construction, any other what was measured.
        num_measured: On how many random rows, which the choice of parameters had not seen; 0 if it was not measured.
    """

    engine: str
    parameters: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    recall: float = 1.0
    num_measured: int = 0

    def to_dict(self) -> dict[str, Any]:
        """For a JSON file; the recall is rounded down, to be never more than was measured."""
        return asdict(self) | {"seconds": round(self.seconds, 3), "recall": math.floor(self.recall * 1e4) / 1e4}

    def __str__(self) -> str:
        if not self.num_measured:
            return self.engine
        return f"{self.engine}, recall {self.recall:.4f} on {self.num_measured:,} rows"


@dataclass(frozen=True, eq=False)
class FoundNeighbors(Neighbors):
    """Neighbours together with how they were found."""

    report: SearchReport
