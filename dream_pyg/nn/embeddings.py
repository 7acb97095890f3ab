"""Embedding tables, and the rows of them that a graph's nodes have."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.data.storage import NodeStorage

from dream_pyg.ranks import RowShard

_ROWS_AT_ONCE = 1 << 16
_shard_device: ContextVar[torch.device | None] = ContextVar("shard_device", default=None)


@contextmanager
def sharded_tables(device: torch.device) -> Iterator[None]:
    """Let every :func:`xavier_embedding` made meanwhile keep this process's rows only, on a device."""
    token = _shard_device.set(device)
    try:
        yield
    finally:
        _shard_device.reset(token)


def xavier_embedding(num_rows: int, embedding_dim: int) -> nn.Parameter:
    """An embedding table (N, D), Xavier-uniform as the paper initialises it; see also :func:`sharded_tables`."""
    device = _shard_device.get()
    if device is None:
        return nn.Parameter(nn.init.xavier_uniform_(torch.empty(num_rows, embedding_dim)))
    # The same numbers, of which those of other processes are drawn and forgotten.
    bound = math.sqrt(3.0) * math.sqrt(2.0 / float(embedding_dim + num_rows))
    kept = RowShard.range(num_rows)
    rows = torch.empty(len(kept), embedding_dim, device=device)
    for start in range(0, num_rows, _ROWS_AT_ONCE):
        block = torch.empty(min(_ROWS_AT_ONCE, num_rows - start), embedding_dim).uniform_(-bound, bound)
        own = range(max(start, kept.start), min(start + len(block), kept.stop))
        if own:
            rows[own.start - kept.start : own.stop - kept.start] = block[own.start - start : own.stop - start]
    return RowShard(rows, num_rows)


def embedding_rows(table: Tensor, nodes: NodeStorage) -> Tensor:
    """The rows of a table for the nodes of a graph.

    Args:
        table: One row for each node of the whole graph (N, D), or this process's shard of it.
        nodes: The nodes' storage; that of a sampled graph says in ``n_id`` which of all nodes it holds.

    Returns:
        The table itself for the whole graph; for a sampled one its nodes' rows, whose gradient is sparse. Those of a
        sharded table are brought from where they are: all of them, or those of the sampled nodes.
    """
    if "n_id" not in nodes:
        return table.whole() if isinstance(table, RowShard) else table
    if isinstance(table, RowShard):
        return table.look_up(nodes.n_id, sparse=True)
    return F.embedding(nodes.n_id, table, sparse=True)
