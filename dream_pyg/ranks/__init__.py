"""Several processes that work together, as ``torchrun`` starts them; the only place that knows ``torch.distributed``.

Each process has a rank. Without torchrun there is one, of rank 0, and every function here does the obvious thing at no
cost. Losses over a batch follow one rule, so that a model need not know how many processes train it: each process has a
slice of the batch, its terms have the value for the whole batch as their *mean over ranks*, what it needs of the
others' slices it gathers, and gradients are averaged.
"""

from dream_pyg.ranks.collectives import average, average_gradients, gather_rows, mean_count, span, sum_over_ranks
from dream_pyg.ranks.processes import (
    any_says,
    everyone_says,
    first_does,
    first_gets,
    first_says,
    joined,
    naming_lost_processes,
    num_launched,
    num_local_ranks,
    num_ranks,
    rank,
    reduce_highest,
    run_and_leave,
    share,
    speaks,
    tells_failure,
    together,
)
from dream_pyg.ranks.shards import RowShard, own_state, whole_state

__all__ = [
    "RowShard",
    "any_says",
    "average",
    "average_gradients",
    "everyone_says",
    "first_does",
    "first_gets",
    "first_says",
    "gather_rows",
    "joined",
    "mean_count",
    "naming_lost_processes",
    "num_launched",
    "num_local_ranks",
    "num_ranks",
    "own_state",
    "rank",
    "reduce_highest",
    "run_and_leave",
    "share",
    "span",
    "speaks",
    "sum_over_ranks",
    "tells_failure",
    "together",
    "whole_state",
]
