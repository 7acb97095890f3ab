"""Which engine to search with, and whether memory suffices for it."""

from __future__ import annotations

import logging
from typing import Literal

from dream_pyg.errors import SearchError
from dream_pyg.graph.knn.approximate import ApproximateEngine, max_candidates
from dream_pyg.graph.knn.candidates import list_room
from dream_pyg.graph.knn.clusters import cluster_bytes
from dream_pyg.graph.knn.faiss_indices import faiss_bytes
from dream_pyg.graph.processor import available_bytes, gibibytes

ChosenEngine = Literal["exact", "flat"] | ApproximateEngine
Engine = Literal["auto"] | ChosenEngine
EXACT: tuple[ChosenEngine, ...] = ("exact", "flat")
"""Those that leave no neighbour out."""
APPROXIMATE: tuple[ChosenEngine, ...] = ("clusters", "ivf", "ivfpq", "hnsw", "nndescent")
ENGINES: tuple[Engine, ...] = ("auto", *EXACT, *APPROXIMATE)

logger = logging.getLogger("dream_pyg")
_OPERATIONS_PER_SECOND = 1.5e11
"""What ``exact`` does on two server cores that multiply bfloat16; fixed, for the machine must not change the choice."""
_PATIENCE_SECONDS = 300
_WORKSPACE_BYTES = 600 << 20
_EXACT_BYTES, _ROWS_WITH_LISTS = 64, 1 << 17
"""What ``exact`` needs to know of a row, and how many have their lists in memory at most."""
_RESULT_BYTES = 24
"""What a neighbour that was found costs, with a copy."""


def choose_engine(engine: Engine, num_rows: int, num_features: int, what: str) -> ChosenEngine:
    """The engine for a search: ``auto`` is ``exact`` as long as that takes a few minutes, and else ``clusters``.

    The choice depends on the size alone, so that equal inputs make equal graphs on every machine.
    """
    if engine != "auto":
        return engine
    operations = num_rows * num_rows * num_features  # N^2 / 2 pairs, 2 F operations each
    seconds = operations / _OPERATIONS_PER_SECOND
    chosen: ChosenEngine = "exact" if seconds <= _PATIENCE_SECONDS else "clusters"
    time = f"{seconds / 60:.0f} min" if seconds >= 60 else f"{seconds:.1f} s"
    cost = f", which exactly is about {operations:.1g} operations or {time} at 150 GFLOP/s" if seconds >= 1 else ""
    logger.info("kNN of %s: %s for %s x %s%s (--engine to choose)", what, chosen, f"{num_rows:,}", num_features, cost)
    return chosen


def check_memory(engine: ChosenEngine, num_rows: int, num_features: int, count: int, what: str) -> None:
    """Check before a search that memory suffices for it.

    Raises:
        SearchError: If it does not, with what would fit.
    """
    available = available_bytes()
    needed = {other: needed_bytes(other, num_rows, num_features, count) for other in ENGINES if other != "auto"}
    if available is None or needed[engine] <= available:
        return
    fitting = [other for other in needed if needed[other] <= available]
    cure = f"choose --engine {' or '.join(fitting)}, which would fit" if fitting else "choose fewer neighbours"
    raise SearchError(
        f"kNN of {what}: {engine} needs about {gibibytes(needed[engine])} of memory for {num_rows:,} rows of "
        f"{num_features} features and {count} neighbours, but {gibibytes(available)} are free. "
        f"Free some memory, or {cure}."
    )


def needed_bytes(engine: ChosenEngine, num_rows: int, num_features: int, count: int) -> int:
    """About how much memory a search takes at most, beside the rows themselves."""
    workspace, index = _WORKSPACE_BYTES, 0
    if engine == "exact":  # Of lists that are many only those of some rows stay in memory.
        workspace += 8 * list_room(count) * min(num_rows, _ROWS_WITH_LISTS)
        lists = _EXACT_BYTES
    elif engine == "flat":
        lists = 48 * (count + 2)
    else:
        width = max_candidates(engine, count)
        lists = 12 * width
        if engine == "clusters":
            index = cluster_bytes(num_rows, num_features, width)
        else:
            index = faiss_bytes(engine, num_rows, num_features)
    # The index is gone by the time of the ranking.
    return workspace + num_rows * lists + max(index, num_rows * _RESULT_BYTES * count)
