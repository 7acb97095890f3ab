"""Edges as message passing wants them: sorted by target, sizes known, interactions weighted by degree."""

from __future__ import annotations

import torch
from torch import Tensor
from torch_geometric import EdgeIndex
from torch_geometric.data import HeteroData

from dream_pyg.graph.schema import INTERACTS, ITEM, REV_INTERACTS, USER, label_name


def add_interaction_edges(graph: HeteroData) -> None:
    r"""Add both directions of the train interactions, weighted :math:`1/\sqrt{d_u d_i}` (Eq. 1-2)."""
    user, item = graph[INTERACTS][label_name("train")]
    num_users, num_items = graph[USER].num_nodes, graph[ITEM].num_nodes
    user_degree = torch.bincount(user, minlength=num_users)
    item_degree = torch.bincount(item, minlength=num_items)
    weight = (user_degree[user].double() * item_degree[item].double()).rsqrt().float()
    for edge_type, source, target, size in (
        (INTERACTS, user, item, (num_users, num_items)),
        (REV_INTERACTS, item, user, (num_items, num_users)),
    ):
        order = torch.argsort(target * size[0] + source)
        set_edges(graph, edge_type, torch.stack([source[order], target[order]]), weight[order])


def set_edges(graph: HeteroData, edge_type: tuple[str, str, str], edge_index: Tensor, edge_weight: Tensor) -> None:
    """Set edges that are sorted by target as an :class:`~torch_geometric.EdgeIndex`, ready for fused propagation."""
    size = (graph[edge_type[0]].num_nodes, graph[edge_type[2]].num_nodes)
    graph[edge_type].edge_index = EdgeIndex(edge_index, sparse_size=size, sort_order="col")
    graph[edge_type].edge_weight = edge_weight
