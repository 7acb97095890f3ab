"""BPR-MF: Bayesian Personalized Ranking from Implicit Feedback (arXiv 1205.2618)."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor
from torch_geometric.data import HeteroData

from dream_pyg.graph.sampling import ReceptiveField
from dream_pyg.models.base import Batch, Embeddings, Recommender, model_config, xavier_embedding
from dream_pyg.models.space import RATE, LogRange, Space
from dream_pyg.nn.losses import bpr_loss, l2_loss


class BPR(Recommender):
    r"""Matrix factorisation trained by BPR (arXiv 1205.2618, Eq. 4 and Section 4.3.1).

    .. math::
        \hat y_{ui} = \mathbf e_u \cdot \mathbf e_i, \qquad
        \mathcal L = -\frac1B \sum \log \sigma(\hat y_{ui} - \hat y_{uj}) + \lambda \mathcal L_2

    Note:
        Fidelity: objective EXACT; Adam over shuffled epochs instead of single SGD draws, as every table since does.
    """

    @model_config
    class Config:
        """Hyper-parameters of BPR-MF."""

        embedding_dim: PositiveInt = 64
        """Width of the embeddings."""
        l2_weight: NonNegativeFloat = 1e-2
        """Weight of the L2 term on the batch's embeddings."""

    # MMRec: L2 from 0.00001 to 2.
    search_space: ClassVar[Space] = {**RATE, "model.l2_weight": LogRange(1e-5, 2.0)}

    def __init__(self, graph: HeteroData, config: Any = None) -> None:
        super().__init__(graph, config)
        self.user_embedding = xavier_embedding(self.num_users, self.config.embedding_dim)
        self.item_embedding = xavier_embedding(self.num_items, self.config.embedding_dim)

    def forward(self, graph: HeteroData) -> Embeddings:
        """The embedding tables themselves."""
        return self.initial_embeddings(graph)

    def receptive_field(self) -> ReceptiveField:
        """The batch itself."""
        return ReceptiveField()

    def loss(self, graph: HeteroData, batch: Batch) -> dict[str, Tensor]:
        """BPR and L2 over the batch."""
        users, items = self(graph)
        user = users.index_select(0, batch.user)
        pos_item, neg_item = batch.split_items(items)
        return {
            "bpr": bpr_loss(user, pos_item, neg_item),
            "l2": self.config.l2_weight * l2_loss(user, pos_item, neg_item),
        }
