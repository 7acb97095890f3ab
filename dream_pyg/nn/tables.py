"""Embedding tables, and the rows of them that a graph's nodes have."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torch_geometric.data.storage import NodeStorage


def embedding_rows(table: Tensor, nodes: NodeStorage, number: int | None = None) -> Tensor:
    """The rows of a table for the nodes of a graph.

    Args:
        table: One row for each node of the whole graph (N, D).
        nodes: The nodes' storage; that of a sampled graph says in ``n_id`` which of all nodes it holds.
        number: How many of a sampled graph's nodes are wanted, from the first on; by default all. To look rows up again
            costs less than the gradient of a slice, which has the size of the whole.

    Returns:
        The table itself for the whole graph; for a sampled one its nodes' rows, whose gradient is sparse.
    """
    if "n_id" not in nodes:
        return table
    return F.embedding(nodes.n_id[:number], table, sparse=True)
