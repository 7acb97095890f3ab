"""DRAGON: Enhancing Dyadic Relations with Homogeneous Graphs for Multimodal Recommendation (arXiv 2301.12097)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import NonNegativeFloat, NonNegativeInt
from torch import Tensor
from torch_geometric.data import HeteroData

from dream_pyg.models.base import Embeddings, model_config
from dream_pyg.models.dualgnn import DualGNN
from dream_pyg.models.freedom import fused_item_hop, item_graph_weights
from dream_pyg.models.space import RATE, ImageShare, LogRange, Space


class DRAGON(DualGNN):
    r"""DualGNN's users, FREEDOM's frozen item-item graph, and modalities side by side (arXiv 2301.12097, Section 3).

    Each modality's :math:`\mathbf E_m` is that of :class:`~dream_pyg.models.dualgnn.DualGNN`. Modalities are
    concatenated, users' after weighing:

    .. math::
        \mathbf q_i = \big\Vert_m \, \mathbf e_{m,i}, \qquad
        \mathbf p_u = \big\Vert_m \, w_{u,m} \mathbf e_{m,u}

    Users then add what the K users who share most train items prefer, items what similar items are:

    .. math::
        \mathbf h_u = \mathbf p_u + \sum_{v \in \mathcal N_K(u)} \mathrm{softmax}_v(c_{uv}) \, \mathbf p_v, \qquad
        \mathbf h_i = \mathbf q_i + (\mathbf S^{L_i} \mathbf Q)_i, \qquad
        \mathbf S = \sum_m \alpha_m \mathbf S_m

    with :math:`c_{uv}` how many items two users share, and :math:`\mathbf S_m` a modality's unweighted cosine top-K
    graph, symmetrically normalised. The loss is BPR and the L2 term of DualGNN. Representations are as wide as all
    modalities together.

    Note:
        Fidelity: EXACT to the authors' code in both graphs, if the graph was built with self as one of the neighbours
        (``include_self``), in the concatenation, the layers and the weight of images. CHOSEN: what DualGNN says of
        its logarithm, weights, short neighbourhoods, missing features and :math:`\lambda`. One modality alone is not
        weighed.
    """

    @model_config
    class Config(DualGNN.Config):
        """Hyper-parameters of DRAGON."""

        num_item_layers: NonNegativeInt = 1
        """Hops over the item-item graph."""
        modality_weights: dict[str, NonNegativeFloat] | None = None
        """alpha_m by modality, scaled to sum to 1; by default 0.1 image and 0.9 text if these are all, else equal."""

    # arXiv 2301.12097 and MMRec: L2 from 0.00001 to 0.1.
    search_space: ClassVar[Space] = {
        **RATE,
        "model.l2_weight": LogRange(1e-5, 1e-1),
        "model.modality_weights": ImageShare(0.0, 1.0, of_paper=0.1),
    }

    needs_item_knn: ClassVar[bool] = True

    def __init__(self, graph: HeteroData, config: Any = None) -> None:
        super().__init__(graph, config)
        self.modality_weights = item_graph_weights(graph, self.config.modality_weights, "DRAGON")

    def forward(self, graph: HeteroData) -> Embeddings:
        """Users over the co-occurrence graph, and items over the fused item-item graph."""
        user, item = super().forward(graph)
        neighborhood: Tensor = item
        for _ in range(self.config.num_item_layers):
            neighborhood = fused_item_hop(self.propagation, graph, self.modality_weights, neighborhood)
        return Embeddings(user, item + neighborhood)

    def fuse(self, views: list[Embeddings]) -> Embeddings:
        """Modalities side by side, weighed for users."""
        item = torch.cat([view.item for view in views], dim=1)
        return Embeddings(torch.cat(self.weighed_users(views), dim=1), item)
