"""Which users took the same items: the user-user graph of DualGNN, from train interactions alone."""

from __future__ import annotations

import torch
from torch import Tensor
from torch_geometric import EdgeIndex
from torch_geometric.data import HeteroData
from torch_geometric.utils import softmax

from dream_pyg.graph.schema import INTERACTS, ITEM, USER

_BLOCK_PAIRS = 1 << 24


def user_co_occurrence(graph: HeteroData, num_neighbors: int) -> tuple[EdgeIndex, Tensor]:
    r"""Connect each user with those who share most train items (DualGNN, doi 10.1109/TMM.2021.3138298).

    The number of shared items is an entry of :math:`\mathbf R \mathbf R^\top`. This product is computed sparsely and a
    block of users at a time, no more than some millions of user-item-user paths each, and only the K largest entries
    of a row are kept.

    Args:
        graph: The graph.
        num_neighbors: K.

    Returns:
        Edges from neighbour to user (2, E), sorted by user, then by neighbour; of users who share as many items those
        with lower ids are taken. And the number of shared items of each (E,).
    """
    num_users, num_items = int(graph[USER].num_nodes), int(graph[ITEM].num_nodes)
    # Sorted by user, so that the entries of a block of users lie together.
    user, item = graph[INTERACTS].edge_index.as_tensor()
    order = torch.argsort(user * num_items + item)
    user, item = user[order], item[order]
    users_of_item = torch.sparse_coo_tensor(
        torch.stack([item, user]),
        torch.ones(len(user), device=user.device),
        (num_items, num_users),
        check_invariants=False,
    ).coalesce()
    paths = torch.bincount(user, torch.bincount(item, minlength=num_items)[item].double(), minlength=num_users)
    block_of_user = paths.cumsum(0).div(_BLOCK_PAIRS, rounding_mode="floor").long()
    _, block_sizes = block_of_user.unique_consecutive(return_counts=True)
    pointer = torch.cat([user.new_zeros(1), torch.bincount(user, minlength=num_users).cumsum(0)])
    parts, start = [], 0
    for size in block_sizes.tolist():
        entries = slice(int(pointer[start]), int(pointer[start + size]))
        items_of_user = torch.sparse_coo_tensor(
            torch.stack([user[entries] - start, item[entries]]),
            torch.ones(entries.stop - entries.start, device=user.device),
            (size, num_items),
            check_invariants=False,
        )
        shared = torch.sparse.mm(items_of_user, users_of_item).coalesce()
        target, neighbor = shared.indices()
        parts.append(_most_shared(target + start, neighbor, shared.values(), num_neighbors))
        start += size
    edges, counts = (torch.cat(part, dim=-1) for part in zip(*parts, strict=True))
    return EdgeIndex(edges, sparse_size=(num_users, num_users), sort_order="col"), counts


def co_occurrence_weight(edge_index: EdgeIndex, counts: Tensor) -> Tensor:
    """The softmax of the number of shared items over each user's neighbours (E,), in float64."""
    return softmax(counts.double(), edge_index.as_tensor()[1], num_nodes=edge_index.get_sparse_size(1))


def _most_shared(target: Tensor, neighbor: Tensor, counts: Tensor, num_neighbors: int) -> tuple[Tensor, Tensor]:
    """The entries with the highest counts of each row, self left out; rows and their columns ascend."""
    others = target != neighbor
    target, neighbor, counts = target[others], neighbor[others], counts[others]
    if not len(target):
        return torch.stack([neighbor, target]), counts.long()
    # One stable sort, by row and within it by falling count; columns ascend already, which decides ties.
    falling = counts.max().long() - counts.long()
    order = torch.argsort(target * (falling.max() + 1) + falling, stable=True)
    _, row_sizes = target.unique_consecutive(return_counts=True)
    first = (row_sizes.cumsum(0) - row_sizes).repeat_interleave(row_sizes)
    kept = order[torch.arange(len(order), device=order.device) - first < num_neighbors].sort().values
    return torch.stack([neighbor[kept], target[kept]]), counts[kept].long()
