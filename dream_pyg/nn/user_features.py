"""User features as means of item features, without ever building the (U, F) matrix."""

from __future__ import annotations

import torch
from torch import Tensor
from torch_geometric import EdgeIndex
from torch_geometric.data import HeteroData

from dream_pyg.graph.csr import csr_product
from dream_pyg.graph.schema import ITEM, REV_INTERACTS, USER, count_name, describes_edge, feature_name
from dream_pyg.nn.batch_shapes import take_items
from dream_pyg.nn.propagation import Propagation


def describing_edges(graph: HeteroData, modality: str) -> EdgeIndex:
    """From items to the users whose features of a modality they make: those drawn, or all train interactions."""
    drawn = describes_edge(modality)
    edge_index: EdgeIndex = graph[drawn if drawn in graph.edge_types else REV_INTERACTS].edge_index
    return edge_index


def mean_over_items(propagation: Propagation, graph: HeteroData, modality: str, projected: Tensor) -> Tensor:
    r"""The mean of a user's train items that have the modality (DREAM, Section 3.1), for all users.

    With :math:`\mathbf M` the row-normalised train matrix, :math:`\mathbf E_m^u \mathbf W = \mathbf M(\mathbf E_m^i
    \mathbf W)`: any linear map may be applied to the I item rows first.

    Args:
        propagation: The message passing layer.
        graph: The graph.
        modality: The modality whose missing items are left out of the mean; their rows must be zero.
        projected: One row per item (I, D).

    Returns:
        One row per user (U, D), zero for a user without such an item; in a sampled graph, one for each user that may
        send over the modality's relation graph.
    """
    edge_index = describing_edges(graph, modality)
    share = graph[USER][count_name(modality)].clamp(min=1).to(projected.dtype).reciprocal()
    return propagation(projected, edge_index, share[edge_index[1]], len(share))


def summed_features(graph: HeteroData, modality: str, user: Tensor) -> Tensor:
    """The sum of the raw features of the train items of some users; its direction is that of the mean.

    Args:
        graph: The graph.
        modality: The modality.
        user: User ids without repetition (B,).

    Returns:
        One row per given user (B, F), of the features' type; half precision becomes float32. In bfloat16 a sum over
        hundreds of items of one sign is coarse: less their mean, its direction is then off by a cosine of some percent.
    """
    (pointer, item), _ = describing_edges(graph, modality).get_csc()
    pointer, item = take_items(graph, pointer, item, user)
    features = graph[ITEM][feature_name(modality)]
    if features.dtype == torch.float16:  # only the rows in use are converted
        features, item = features.index_select(0, item).float(), torch.arange(len(item), device=item.device)
    return csr_product(pointer, item, None, (len(pointer) - 1, len(features)), features)[: len(user)]
