"""LightGCN: Simplifying and Powering Graph Convolution Network for Recommendation (arXiv 2002.02126)."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor
from torch_geometric.data import HeteroData

from dream_pyg.graph.sampling import ReceptiveField, interaction_hops
from dream_pyg.graph.schema import INTERACTS, REV_INTERACTS
from dream_pyg.models.base import Batch, Embeddings, Recommender, model_config, xavier_embedding
from dream_pyg.models.space import RATE, Choice, LogRange, Space
from dream_pyg.nn.losses import bpr_loss, l2_loss
from dream_pyg.nn.propagation import Propagation


def propagate_interactions(
    propagation: Propagation, graph: HeteroData, user: Tensor, item: Tensor, num_layers: int
) -> Embeddings:
    r"""Propagate over the user-item graph and average the layers (LightGCN, Eq. 7-8; DREAM, Eq. 2-3).

    .. math::
        \mathbf E^{(l+1)} = \mathbf D^{-1/2} \mathbf A \mathbf D^{-1/2} \mathbf E^{(l)}, \qquad
        \bar{\mathbf E} = \frac{1}{L+1} \sum_{l=0}^{L} \mathbf E^{(l)}

    Args:
        propagation: The message passing layer.
        graph: A graph with normalised ``edge_weight`` on both directions of the interactions.
        user: Users at layer 0 (U, D).
        item: Items at layer 0 (I, D).
        num_layers: L.

    Returns:
        The mean over layers 0..L; of a sampled graph, for the nodes of the batch.
    """
    hops = (interaction_hops(graph[edge_type], num_layers) for edge_type in (INTERACTS, REV_INTERACTS))
    user_sum, item_sum = user, item
    for (to_item, item_weight), (to_user, user_weight) in zip(*hops, strict=True):
        user, item = (
            propagation(item, to_user, user_weight, to_user.get_sparse_size(1)),
            propagation(user, to_item, item_weight, to_item.get_sparse_size(1)),
        )
        user_sum, item_sum = user_sum[: len(user)] + user, item_sum[: len(item)] + item
    return Embeddings(user_sum / (num_layers + 1), item_sum / (num_layers + 1))


class LightGCN(Recommender):
    r"""Linear propagation of ID embeddings over the user-item graph, trained by BPR (arXiv 2002.02126, Eq. 7-8, 15).

    Note:
        Fidelity: EXACT with uniform layer weights :math:`\alpha_l = 1/(L+1)`; L2 on layer 0 only, as in the paper.
    """

    @model_config
    class Config:
        """Hyper-parameters of LightGCN."""

        embedding_dim: PositiveInt = 64
        """Width of the embeddings."""
        num_layers: NonNegativeInt = 2
        """Hops over the user-item graph."""
        l2_weight: NonNegativeFloat = 1e-3
        """Weight of the L2 term on the batch's layer-0 embeddings."""

    # MMRec: one to four layers, L2 from 0.000001 to 0.01.
    search_space: ClassVar[Space] = {
        **RATE,
        "model.num_layers": Choice((1, 2, 3, 4)),
        "model.l2_weight": LogRange(1e-6, 1e-1),
    }

    def __init__(self, graph: HeteroData, config: Any = None) -> None:
        super().__init__(graph, config)
        self.user_embedding = xavier_embedding(self.num_users, self.config.embedding_dim)
        self.item_embedding = xavier_embedding(self.num_items, self.config.embedding_dim)
        self.propagation = Propagation()

    def forward(self, graph: HeteroData) -> Embeddings:
        """Mean of layers 0..L."""
        return self._propagate(graph, self.initial_embeddings(graph))

    def receptive_field(self) -> ReceptiveField:
        """L hops over the interactions."""
        return ReceptiveField(num_hops=self.config.num_layers)

    def loss(self, graph: HeteroData, batch: Batch) -> dict[str, Tensor]:
        """BPR on the propagated, L2 on the initial embeddings of the batch."""
        initial = self.initial_embeddings(graph)
        user, item = self._propagate(graph, initial)
        return {
            "bpr": bpr_loss(*batch.rows(user, item)),
            "l2": self.config.l2_weight * l2_loss(*batch.rows(*initial)),
        }

    def _propagate(self, graph: HeteroData, initial: Embeddings) -> Embeddings:
        return propagate_interactions(self.propagation, graph, *initial, self.config.num_layers)
