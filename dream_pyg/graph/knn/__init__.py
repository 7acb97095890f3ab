"""Cosine k-nearest neighbours of the rows of a matrix with each other.

An engine gives each row a list of candidates; the candidates are then ranked by exact cosines, whatever the engine.
"""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import torch

from dream_pyg.errors import ConfigError
from dream_pyg.graph.knn.approximate import approximate_candidates
from dream_pyg.graph.knn.candidates import Candidates
from dream_pyg.graph.knn.choice import ENGINES, ChosenEngine, Engine, check_memory, choose_engine
from dream_pyg.graph.knn.exact import exact_candidates
from dream_pyg.graph.knn.flat import flat_candidates
from dream_pyg.graph.knn.means import MeanRows
from dream_pyg.graph.knn.refine import rank_candidates, search_in_double
from dream_pyg.graph.knn.report import FoundNeighbors, SearchReport
from dream_pyg.graph.knn.rows import ArrayRows, Rows
from dream_pyg.graph.processor import has_bfloat16_units

__all__ = [
    "ENGINES",
    "ArrayRows",
    "Candidates",
    "Engine",
    "FoundNeighbors",
    "MeanRows",
    "Rows",
    "SearchReport",
    "cosine_knn",
]

_FEWEST_ROWS, _FEWEST_ROWS_PER_NEIGHBOR = 256, 8
"""With fewer, nothing is gained by leaving any out, and NN-descent cannot begin."""


def cosine_knn(
    rows: Rows,
    num_neighbors: int,
    *,
    include_self: bool = False,
    engine: Engine = "exact",
    min_recall: float = 0.98,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    what: str = "rows",
) -> FoundNeighbors:
    """The most similar rows of each row by cosine.

    Cosines are compared in float64 wherever float32 cannot tell them apart, so that with the engines ``exact`` and
    ``flat`` the graph depends on the features alone and not on engine, threads or blocks. The others may leave
    neighbours out, but rank what they find exactly, and measure how much that is. Memory never holds an (N, N) matrix.
    Rows of zeros have no direction: they get no neighbours and are nobody's neighbour.

    Args:
        rows: The rows (N, F).
        num_neighbors: K, how many neighbours a row gets.
        include_self: Whether a row is the first of its own K neighbours (as in FREEDOM) or excluded.
        engine: How candidates are found: all of them by ``exact`` (fast) or ``flat`` (faiss), nearly all by
            ``clusters`` (fast), ``ivf``, ``hnsw`` or ``nndescent`` (faiss). ``auto`` is ``exact`` or ``clusters``, by
            size.
        min_recall: The share of the true neighbours that an approximate engine has to find at least.
        device: Where ``exact`` multiplies.
        dtype: In what ``exact`` and ``clusters`` multiply; by default bfloat16 where the processor has units for it,
            else float32.
        what: What the rows are, for the progress bar and errors.

    Returns:
        Neighbours (N, K), the most similar first; of ties those with lower ids. ``-1`` fills rows that have fewer.
        Their ``report`` says how they were found.

    Raises:
        ConfigError: If K is not between 1 and N - 1 (N with self), or ``min_recall`` not above 0 and at most 1.
        SearchError: If an engine cannot reach ``min_recall``, or memory does not suffice for it.
    """
    started = time.perf_counter()
    num_rows, num_features = rows.shape
    limit = num_rows if include_self else num_rows - 1
    if not 1 <= num_neighbors <= limit:
        raise ConfigError(
            f"num_neighbors must be between 1 and {limit} for {num_rows} {what} (got {num_neighbors}). "
            "Choose a smaller number of neighbours."
        )
    if not 0 < min_recall <= 1:
        raise ConfigError(f"min_recall must be above 0 and at most 1 (got {min_recall}).")
    count = num_neighbors - include_self
    chosen_engine = choose_engine(engine, num_rows, num_features, what)
    report = SearchReport(chosen_engine)
    cosine, index = np.zeros((num_rows, 0)), np.zeros((num_rows, 0), dtype=np.int64)
    if count:
        check_memory(chosen_engine, num_rows, num_features, count, what)
        candidates, report = _candidates(rows, count, chosen_engine, min_recall, torch.device(device), dtype, what)
        cosine, index, certain = rank_candidates(rows, candidates, count)
        for chosen, found_cosine, found in search_in_double(rows, np.flatnonzero(~certain), count):
            cosine[chosen], index[chosen] = found_cosine, found
    if include_self:
        step = 1024
        own = np.concatenate(
            [
                np.where(rows.take(start, start + step).any(axis=1), np.arange(start, min(start + step, num_rows)), -1)
                for start in range(0, num_rows, step)
            ]
        )
        index = np.concatenate([own[:, None], index], axis=1)
        cosine = np.concatenate([np.ones((num_rows, 1)), cosine], axis=1)
    similarity = np.where(index >= 0, np.clip(cosine, -1.0, 1.0), 0.0)
    report = replace(report, seconds=time.perf_counter() - started)
    return FoundNeighbors(index=index, similarity=similarity.astype(np.float32), report=report)


def _candidates(
    rows: Rows,
    count: int,
    engine: ChosenEngine,
    min_recall: float,
    device: torch.device,
    dtype: torch.dtype | None,
    what: str,
) -> tuple[Candidates, SearchReport]:
    dtype = dtype or (torch.bfloat16 if has_bfloat16_units(device) else torch.float32)
    if engine == "exact":
        return exact_candidates(rows, count, dtype=dtype, device=device), SearchReport(engine)
    if engine == "flat" or not _has_rows(rows, max(_FEWEST_ROWS, _FEWEST_ROWS_PER_NEIGHBOR * count)):
        return flat_candidates(rows, count, what=what), SearchReport("flat")
    found = approximate_candidates(rows, count, engine, min_recall=min_recall, dtype=dtype, what=what)
    return found.candidates, SearchReport(
        engine, found.parameters, recall=found.recall, num_measured=found.num_measured
    )


def _has_rows(rows: Rows, enough: int) -> bool:
    """Whether at least so many rows differ from zero."""
    number, step = 0, 1024
    for start in range(0, rows.shape[0], step):
        number += int(rows.take(start, start + step).any(axis=1).sum())
        if number >= enough:
            return True
    return False
