"""Cosine k-nearest neighbours of the rows of a matrix with each other.

An engine gives each row a list of candidates; the candidates are then ranked by exact cosines, whatever the engine.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace

import numpy as np
import torch

from dream_pyg import ranks
from dream_pyg.data.progress import progress
from dream_pyg.errors import ConfigError
from dream_pyg.graph.knn.approximate import approximate_candidates
from dream_pyg.graph.knn.candidates import CandidateBlocks, Candidates
from dream_pyg.graph.knn.choice import ENGINES, ChosenEngine, Engine, check_memory, choose_engine
from dream_pyg.graph.knn.exact import Steps, exact_candidates
from dream_pyg.graph.knn.flat import flat_candidates
from dream_pyg.graph.knn.means import MeanRows
from dream_pyg.graph.knn.refine import as_neighbors, nearest_of
from dream_pyg.graph.knn.report import FoundNeighbors, SearchReport
from dream_pyg.graph.knn.rows import ArrayRows, Rows
from dream_pyg.graph.processor import has_bfloat16_units, has_int8_units

__all__ = [
    "ENGINES",
    "ArrayRows",
    "Candidates",
    "Engine",
    "FoundNeighbors",
    "MeanRows",
    "Rows",
    "SearchReport",
    "Steps",
    "check_num_neighbors",
    "cosine_knn",
    "nobody",
]

logger = logging.getLogger("dream_pyg")
_FEWEST_FEATURES_FOR_INTEGERS = 512
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
    steps: Steps | None = None,
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
            ``clusters`` (fast), ``ivf``, ``ivfpq``, ``hnsw`` or ``nndescent`` (faiss). ``auto`` is ``exact`` or
            ``clusters``, by size.
        min_recall: The share of the true neighbours that an approximate engine has to find at least.
        device: Where ``exact`` multiplies.
        dtype: In what ``exact`` multiplies; by default in bfloat16 where the processor has units for it, else float32,
            and in 8-bit integers where they are faster and tell these rows apart.
        what: What the rows are, for the progress bar and errors.
        steps: How the strips of ``exact`` are gone through; by default all of them, with a progress bar.

    Returns:
        Neighbours (N, K), the most similar first; of ties those with lower ids. ``-1`` fills rows that have fewer.
        Their ``report`` says how they were found. Of several processes only the first gets them; see
        :mod:`dream_pyg.ranks`.

    Raises:
        ConfigError: If K is not between 1 and N - 1 (N with self), or ``min_recall`` not above 0 and at most 1.
        SearchError: If an engine cannot reach ``min_recall``, or memory does not suffice for it.
    """
    started = time.perf_counter()
    count = check_num_neighbors(rows, num_neighbors, include_self, what)
    if not 0 < min_recall <= 1:
        raise ConfigError(f"min_recall must be above 0 and at most 1 (got {min_recall}).")
    num_rows, num_features = rows.shape
    chosen = choose_engine(engine, num_rows, num_features, what)
    similarity, index = np.zeros((num_rows, 0), dtype=np.float32), np.zeros((num_rows, 0), dtype=np.int64)
    report = SearchReport(chosen)
    # All processes share the exact search; any other the first does alone.
    if count and (chosen == "exact" or not ranks.rank()):
        check_memory(chosen, num_rows, num_features, count, what)
        candidates, report = _candidates(rows, count, chosen, min_recall, torch.device(device), dtype, what, steps)
        if not ranks.rank():
            similarity, index = nearest_of(rows, candidates, count)
    if ranks.rank():
        return nobody(rows, num_neighbors)
    found = as_neighbors(rows, similarity, index, include_self=include_self)
    report = replace(report, seconds=time.perf_counter() - started)
    return FoundNeighbors(found.index, found.similarity, report)


def check_num_neighbors(rows: Rows, num_neighbors: int, include_self: bool, what: str) -> int:
    """How many neighbours of each row are to be found, without the row itself.

    Raises:
        ConfigError: If K is not between 1 and N - 1 (N with self).
    """
    num_rows, _ = rows.shape
    limit = num_rows if include_self else num_rows - 1
    if not limit:
        raise ConfigError(
            f"{num_rows} {what} cannot have neighbours; expected at least 2. Give more rows{_or_fewer(what)}."
        )
    if not 1 <= num_neighbors <= limit:
        raise ConfigError(
            f"num_neighbors must be between 1 and {limit} for {num_rows} {what} (got {num_neighbors}). "
            f"Choose a number in that range{_or_fewer(what)}."
        )
    return num_neighbors - include_self


def _or_fewer(what: str) -> str:
    """What else helps where users are too few."""
    return ", or leave user graphs out with --no-user-graphs" if what.startswith("users ") else ""


def nobody(rows: Rows, num_neighbors: int) -> FoundNeighbors:
    """Lists without any neighbour."""
    shape = rows.shape[0], num_neighbors
    return FoundNeighbors(np.full(shape, -1), np.zeros(shape, dtype=np.float32), SearchReport("none"))


def _candidates(
    rows: Rows,
    count: int,
    engine: ChosenEngine,
    min_recall: float,
    device: torch.device,
    dtype: torch.dtype | None,
    what: str,
    steps: Steps | None,
) -> tuple[CandidateBlocks, SearchReport]:
    if engine != "exact" and device.type != "cpu":
        logger.info("kNN of %s: on the processor, for %s does not use %s", what, engine, device)
        device = torch.device("cpu")
    if engine == "exact":
        dtypes = [dtype] if dtype else _fastest_dtypes(rows, device)
        if dtypes == [torch.float32] and dtype is None:
            logger.info("kNN of %s: float32, for this processor has no units for smaller numbers", what)
        steps = steps or (lambda strips, lists: progress(strips, f"kNN of {what}", hidden=not ranks.speaks()))
        return exact_candidates(rows, count, dtypes=dtypes, device=device, steps=steps), SearchReport(engine)
    if engine == "flat" or not _has_rows(rows, max(_FEWEST_ROWS, _FEWEST_ROWS_PER_NEIGHBOR * count)):
        return flat_candidates(rows, count, what=what), SearchReport("flat")
    found = approximate_candidates(rows, count, engine, min_recall=min_recall, what=what)
    return found.candidates, SearchReport(
        engine, found.parameters, recall=found.recall, num_measured=found.num_measured
    )


def _fastest_dtypes(rows: Rows, device: torch.device) -> list[torch.dtype]:
    """What to multiply, the fastest first; the last suits all rows."""
    last = torch.bfloat16 if has_bfloat16_units(device) else torch.float32
    # With few features integers gain little over bfloat16: choosing candidates takes longer than the product.
    pays = last == torch.float32 or rows.shape[1] >= _FEWEST_FEATURES_FOR_INTEGERS
    return [torch.int8, last] if pays and has_int8_units(device) else [last]


def _has_rows(rows: Rows, enough: int) -> bool:
    """Whether at least so many rows differ from zero."""
    number, step = 0, 1024
    for start in range(0, rows.shape[0], step):
        number += int(rows.take(start, start + step).any(axis=1).sum())
        if number >= enough:
            return True
    return False
