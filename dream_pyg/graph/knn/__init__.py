"""Cosine k-nearest neighbours of the rows of a matrix with each other.

An engine gives each row a list of candidates; the candidates are then ranked by exact cosines, whatever the engine.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

from dream_pyg.data.features import Neighbors
from dream_pyg.data.progress import progress
from dream_pyg.errors import ConfigError
from dream_pyg.graph.knn import ranks
from dream_pyg.graph.knn.candidates import Candidates
from dream_pyg.graph.knn.exact import Steps, exact_candidates
from dream_pyg.graph.knn.flat import flat_candidates
from dream_pyg.graph.knn.means import MeanRows
from dream_pyg.graph.knn.refine import as_neighbors, nearest_of
from dream_pyg.graph.knn.rows import ArrayRows, Rows
from dream_pyg.graph.processor import has_bfloat16_units

__all__ = [
    "ArrayRows",
    "Candidates",
    "Engine",
    "MeanRows",
    "Rows",
    "Steps",
    "check_num_neighbors",
    "cosine_knn",
    "nobody",
]

Engine = Literal["exact", "flat"]


def cosine_knn(
    rows: Rows,
    num_neighbors: int,
    *,
    include_self: bool = False,
    engine: Engine = "exact",
    device: str | torch.device = "cpu",
    what: str = "rows",
    steps: Steps | None = None,
) -> Neighbors:
    """The most similar rows of each row by cosine, exactly.

    Cosines are compared in float64 wherever float32 cannot tell them apart, so that the graph depends on the features
    alone and not on engine, threads or blocks. Memory holds a few blocks of rows at a time, and never an (N, N) matrix.
    Rows of zeros have no direction: they get no neighbours and are nobody's neighbour.

    Args:
        rows: The rows (N, F).
        num_neighbors: K, how many neighbours a row gets.
        include_self: Whether a row is the first of its own K neighbours (as in FREEDOM) or excluded.
        engine: How candidates are found.
        device: Where ``exact`` multiplies.
        what: What the rows are, for the progress bar and errors.
        steps: How the strips of ``exact`` are gone through; by default all of them, with a progress bar.

    Returns:
        Neighbours (N, K), the most similar first; of ties those with lower ids. ``-1`` fills rows that have fewer. Of
        several processes only the first gets them; see :mod:`~dream_pyg.graph.knn.ranks`.

    Raises:
        ConfigError: If K is not between 1 and N - 1 (N with self).
    """
    count = check_num_neighbors(rows, num_neighbors, include_self, what)
    similarity, index = np.zeros((rows.shape[0], 0), dtype=np.float32), np.zeros((rows.shape[0], 0), dtype=np.int64)
    if ranks.rank() and engine == "flat":  # which one process does alone
        count = 0
    if count:
        candidates = _candidates(rows, count, engine, torch.device(device), what, steps)
        if not ranks.rank():
            similarity, index = nearest_of(rows, candidates, count)
    if ranks.rank():
        return nobody(rows, num_neighbors)
    return as_neighbors(rows, similarity, index, include_self=include_self)


def check_num_neighbors(rows: Rows, num_neighbors: int, include_self: bool, what: str) -> int:
    """How many neighbours of each row are to be found, without the row itself.

    Raises:
        ConfigError: If K is not between 1 and N - 1 (N with self).
    """
    num_rows, _ = rows.shape
    limit = num_rows if include_self else num_rows - 1
    if not 1 <= num_neighbors <= limit:
        raise ConfigError(
            f"num_neighbors must be between 1 and {limit} for {num_rows} {what} (got {num_neighbors}). "
            "Choose a smaller number of neighbours."
        )
    return num_neighbors - include_self


def nobody(rows: Rows, num_neighbors: int) -> Neighbors:
    """Lists without any neighbour."""
    shape = rows.shape[0], num_neighbors
    return Neighbors(np.full(shape, -1), np.zeros(shape, dtype=np.float32))


def _candidates(
    rows: Rows, count: int, engine: Engine, device: torch.device, what: str, steps: Steps | None
) -> Candidates:
    if engine == "flat":
        return flat_candidates(rows, count, what=what)
    dtype = torch.bfloat16 if has_bfloat16_units(device) else torch.float32
    steps = steps or (lambda strips, lists: progress(strips, f"kNN of {what}", hidden=not ranks.speaks()))
    return exact_candidates(rows, count, dtype=dtype, device=device, steps=steps)
