"""Which users took the same items, and which items the same users took, from train interactions alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch_geometric import EdgeIndex
from torch_geometric.data import HeteroData
from torch_geometric.utils import softmax

from dream_pyg.graph.csr import row_pointer
from dream_pyg.graph.schema import INTERACTS, ITEM, USER

_BLOCK_PAIRS = 1 << 24


def user_co_occurrence(graph: HeteroData, num_neighbors: int) -> tuple[EdgeIndex, Tensor]:
    r"""Connect each user with those who share most train items (DualGNN, doi 10.1109/TMM.2021.3138298).

    The number of shared items is an entry of :math:`\mathbf R \mathbf R^\top`, which is computed sparsely and a block
    of users at a time; only the K largest entries of a row are kept.

    Args:
        graph: The graph.
        num_neighbors: K.

    Returns:
        Edges from neighbour to user (2, E), sorted by user, then by neighbour; of users who share as many items those
        with lower ids are taken. And the number of shared items of each (E,).
    """
    num_users, num_items = int(graph[USER].num_nodes), int(graph[ITEM].num_nodes)
    user, item = graph[INTERACTS].edge_index.as_tensor()
    parts = []
    for target, neighbor, shared in co_occurrence_blocks(user, item, (num_users, num_items)):
        others = target != neighbor
        parts.append(highest_of_rows(target[others], neighbor[others], shared[others], num_neighbors))
    target, neighbor, shared = (torch.cat(part) for part in zip(*parts, strict=True))
    edges = EdgeIndex(torch.stack([neighbor, target]), sparse_size=(num_users, num_users), sort_order="col")
    return edges, shared.long()


def item_co_occurrence(graph: HeteroData, num_neighbors: int, *, shrinkage: float = 0.0) -> tuple[EdgeIndex, Tensor]:
    r"""Connect each item with those that are most often taken by the same users (doi 10.1145/371920.372071).

    With :math:`n_i` the number of users who took item i in train and h the shrinkage,

    .. math::
        s_{ij} = \frac{n_{ij}}{\sqrt{n_i n_j} + h}

    where :math:`n_{ij}` users took both. It is computed sparsely and a block of items at a time.

    Args:
        graph: The graph.
        num_neighbors: K, how many neighbours an item has at most; of equally similar ones those with lower ids.
        shrinkage: h; the larger it is, the less few users in common count.

    Returns:
        Edges from neighbour to item (2, E), sorted by item, then by neighbour, and s of each (E,), in float64. An item
        that no other was taken with has none.
    """
    num_users, num_items = int(graph[USER].num_nodes), int(graph[ITEM].num_nodes)
    user, item = graph[INTERACTS].edge_index.as_tensor()
    norm = torch.bincount(item, minlength=num_items).double().sqrt()
    parts = []
    for target, neighbor, shared in co_occurrence_blocks(item, user, (num_items, num_users)):
        similarity = shared / (norm[target] * norm[neighbor] + shrinkage)
        others = target != neighbor
        parts.append(highest_of_rows(target[others], neighbor[others], similarity[others], num_neighbors))
    target, neighbor, similarity = (torch.cat(part) for part in zip(*parts, strict=True))
    return EdgeIndex(torch.stack([neighbor, target]), sparse_size=(num_items, num_items), sort_order="col"), similarity


def co_occurrence_blocks(
    row: Tensor, column: Tensor, size: tuple[int, int], column_weight: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    r"""The entries of :math:`\mathbf M \,\mathrm{diag}(\mathbf w) \mathbf M^\top`, a block of rows at a time.

    M is of zeros and ones. No block follows more than some millions of row-column-row paths, unless a single row has
    more.

    Args:
        row: Rows of the ones (E,), in any order.
        column: Their columns (E,).
        size: Numbers of rows N and columns M.
        column_weight: w (M,), by default ones.

    Yields:
        Row, column and value of the entries of some rows (S,), the diagonal included, in the order of rows and within
        them of columns; values have the type of w, by default float32.
    """
    # Sorted by row, so that the entries of a block of rows lie together.
    order = torch.argsort(row * size[1] + column)
    row, column = row[order], column[order]
    weight = torch.ones(len(row), device=row.device) if column_weight is None else column_weight[column]
    ones = torch.ones_like(weight)
    transposed = _matrix(column, row, weight, (size[1], size[0])).coalesce()
    taken = torch.bincount(column, minlength=size[1])
    paths = taken.new_zeros(size[0]).index_add_(0, row, taken[column])
    block_of_row = paths.cumsum(0) // _BLOCK_PAIRS
    _, block_sizes = block_of_row.unique_consecutive(return_counts=True)
    pointer = row_pointer(torch.bincount(row, minlength=size[0]))
    start = 0
    for count in block_sizes.tolist():
        entries = slice(int(pointer[start]), int(pointer[start + count]))
        block = _matrix(row[entries] - start, column[entries], ones[entries], (count, size[1]))
        shared = torch.sparse.mm(block, transposed).coalesce()
        within, other = shared.indices()
        yield within + start, other, shared.values()
        start += count


def highest_of_rows(row: Tensor, column: Tensor, value: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The entries with the highest values of each row, of equal ones those of lower columns.

    Args:
        row: Rows of the entries (S,), ascending.
        column: Their columns (S,), ascending within a row.
        value: Their values (S,).
        count: The most entries that a row keeps.

    Returns:
        Row, column and value of those kept, in the order they came in.
    """
    order = torch.argsort(value, descending=True, stable=True)
    order = order[torch.argsort(row[order], stable=True)]
    _, row_sizes = row.unique_consecutive(return_counts=True)
    first = (row_sizes.cumsum(0) - row_sizes).repeat_interleave(row_sizes)
    kept = order[torch.arange(len(order), device=order.device) - first < count].sort().values
    return row[kept], column[kept], value[kept]


def co_occurrence_weight(edge_index: EdgeIndex, counts: Tensor) -> Tensor:
    """The softmax of the number of shared items over each user's neighbours (E,), in float64."""
    return softmax(counts.double(), edge_index.as_tensor()[1], num_nodes=edge_index.get_sparse_size(1))


def _matrix(row: Tensor, column: Tensor, value: Tensor, size: tuple[int, int]) -> Tensor:
    return torch.sparse_coo_tensor(torch.stack([row, column]), value, size, check_invariants=False)
