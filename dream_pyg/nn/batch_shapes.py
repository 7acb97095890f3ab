"""What a loss makes of a batch, in shapes that are the same for every batch of a size.

Without them a GPU would have to be waited for, to learn how many different users a batch has, or how many items these
took; and what is launched on it could not be recorded (:mod:`dream_pyg.training.gradients`). A CPU is better off with
what a batch really has.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch_geometric.data import HeteroData

from dream_pyg.graph.csr import row_pointer, span_entries, take_rows
from dream_pyg.graph.schema import REV_INTERACTS


def fix_shapes(graph: HeteroData) -> None:
    """Have every batch of a size get the same shapes from now on.

    Args:
        graph: A whole graph, which notes how many train items 0, 1, 2, ... users can have together at most.
    """
    (pointer, _), _ = graph[REV_INTERACTS].edge_index.get_csc()
    # In NumPy, as reading a tensor's number would look as if a device were waited for.
    graph.most_taken = row_pointer(pointer.diff().sort(descending=True).values).cpu().numpy()


def has_fixed_shapes(graph: HeteroData) -> bool:
    """Whether :func:`fix_shapes` was asked for."""
    return hasattr(graph, "most_taken")


def distinct_nodes(graph: HeteroData, node: str, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The different nodes among some, ascending; with fixed shapes others follow, until they are as many as the given.

    Args:
        graph: The graph.
        node: The type of the nodes.
        ids: Their ids (B,).

    Returns:
        Ids without repetition (N,), and the position among them of each given one (B,).
    """
    if not has_fixed_shapes(graph):
        return torch.unique(ids, return_inverse=True)
    num_nodes = int(graph[node].num_nodes)
    is_given = torch.zeros(num_nodes, dtype=torch.bool, device=ids.device).index_fill_(0, ids, True)
    num_given = is_given.cumsum(0)
    every = torch.arange(num_nodes, device=ids.device)
    place = torch.where(is_given, num_given - 1, num_given[-1] + every - num_given)
    return torch.empty_like(every).scatter_(0, place, every)[: len(ids)], place[ids]


def take_items(graph: HeteroData, pointer: Tensor, item: Tensor, user: Tensor) -> tuple[Tensor, Tensor]:
    """The items of some users, as the pattern of a matrix of their own.

    Args:
        graph: The graph.
        pointer: Where the items of each of all users begin and the last ends (U + 1,).
        item: The items (E,).
        user: Ids, with fixed shapes without repetition (B,).

    Returns:
        Where the items of each begin and the last ends (B + 1,), and the items (S,). With fixed shapes S is what the B
        most active users have, often twice as many, and one more row has what these users lack of it.
    """
    if not has_fixed_shapes(graph):
        return take_rows(pointer, item, user)
    size = int(graph.most_taken[len(user)])
    count = pointer[user + 1] - pointer[user]
    count = torch.cat([count, size - count.sum(0, keepdim=True)])
    row, entry = span_entries(F.pad(pointer[user], (0, 1)), count, size)
    return row_pointer(count), item[entry.where(row < len(user), 0)]
