"""VBPR: Visual Bayesian Personalized Ranking from Implicit Feedback (arXiv 1510.01784)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor
from torch_geometric.data import HeteroData

from dream_pyg.graph.sampling import ReceptiveField
from dream_pyg.graph.schema import USER, feature_modalities
from dream_pyg.models.added_alignment import AddedAlignment, AlignmentConfig
from dream_pyg.models.base import (
    Batch,
    DualRepresentations,
    Embeddings,
    Recommender,
    model_config,
    require_modalities,
    xavier_embedding,
)
from dream_pyg.models.space import RATE, LogRange, Space
from dream_pyg.nn.embeddings import embedding_rows
from dream_pyg.nn.item_features import FeatureScaling, feature_projections
from dream_pyg.nn.losses import bpr_loss, l2_loss


class VBPR(Recommender):
    r"""Matrix factorisation with a second inner product on projected features (arXiv 1510.01784, Eq. 2-3).

    .. math::
        \hat y_{ui} = \boldsymbol\gamma_u \cdot \boldsymbol\gamma_i + \boldsymbol\theta_u \cdot \boldsymbol\theta_i,
        \qquad \boldsymbol\theta_i = \sum_m \mathbf E_m \mathbf f_{m,i}

    .. math::
        \mathcal L = -\frac1B \sum \log \sigma(\hat y_{ui} - \hat y_{uj}) + \lambda \mathcal L_2
        + \alpha \mathcal L_{Intra} + \beta \mathcal L_{Inter} + \gamma \mathcal L_{SSS}

    Scores are one inner product of concatenated parts. Several modalities have a projection each, which together are
    the one projection :math:`\mathbf E` of their concatenated features.

    Note:
        Fidelity: the score but for its biases, and the objective, are EXACT. CHOSEN: features in rows of norm 1, no
        item bias and no visual bias (:math:`\beta_i` and :math:`\boldsymbol\beta' \cdot \mathbf f_i` of Eq. 4), more
        modalities than images, and L2 on all that is multiplied, projected features too, as in the implementation
        behind the field's tables; there the norms are not squared, so its weights are not ours. UNKNOWN: what DREAM's
        authors aligned; here the lines are :math:`\boldsymbol\gamma` and :math:`\boldsymbol\theta`. An item without
        features has :math:`\boldsymbol\theta_i = 0`.
    """

    @model_config
    class Config(AlignmentConfig):
        """Hyper-parameters of VBPR."""

        embedding_dim: PositiveInt = 64
        """Width of each part, so representations are twice as wide."""
        l2_weight: NonNegativeFloat = 1e-2
        """Weight of the L2 term on the batch's representations."""
        feature_scaling: FeatureScaling = "unit"
        """Item features before the projection: as given, in rows of norm 1, or in rows of norm sqrt(F)."""

    # MMRec: L2 from 0.00001 to 2.
    search_space: ClassVar[Space] = {**RATE, "model.l2_weight": LogRange(1e-5, 2.0)}

    needs_features: ClassVar[bool] = True
    tables: ClassVar[tuple[str, ...]] = (*Recommender.tables, "user_preference")

    def __init__(self, graph: HeteroData, config: Any = None) -> None:
        super().__init__(graph, config)
        modalities = require_modalities(feature_modalities(graph), "VBPR")
        dim = self.config.embedding_dim
        self.user_embedding = xavier_embedding(self.num_users, dim)
        self.item_embedding = xavier_embedding(self.num_items, dim)
        self.user_preference = xavier_embedding(self.num_users, dim)
        self.projections = feature_projections(graph, modalities, dim, scaling=self.config.feature_scaling, bias=False)
        self.alignment = AddedAlignment(graph, self.config, modalities)

    def forward(self, graph: HeteroData) -> Embeddings:
        """Both parts side by side, (U, 2D) and (I, 2D)."""
        behavior, modal = self.dual_representations(graph)
        return Embeddings(torch.cat([behavior.user, modal.user], dim=1), torch.cat([behavior.item, modal.item], dim=1))

    def dual_representations(self, graph: HeteroData) -> DualRepresentations:
        """The part of IDs and the part of features, whose scores add up to the model's."""
        return DualRepresentations(
            self.initial_embeddings(graph), Embeddings(self._preferences(graph), self.project(graph))
        )

    def receptive_field(self) -> ReceptiveField:
        """The batch itself, and the features of its items; for the signal those of its users' items as well."""
        return ReceptiveField(features=tuple(self.projections), user_features=self.config.signal_weight > 0)

    def project(self, graph: HeteroData, item: Tensor | None = None) -> Tensor:
        """The modal part of all items (I, D), or of those with the given ids (B, D)."""
        return torch.stack([projection(graph, item) for projection in self.projections.values()]).sum(dim=0)

    def loss(self, graph: HeteroData, batch: Batch) -> dict[str, Tensor]:
        """BPR, L2 and alignment over the batch, for which only its own items are projected."""
        initial = self.initial_embeddings(graph)
        behavior_user, modal_user = (
            table.index_select(0, batch.user) for table in (initial.user, self._preferences(graph))
        )
        behavior_item, behavior_neg = batch.split_items(initial.item)
        modal_item, modal_neg = self.project(graph, torch.cat([batch.pos_item, batch.neg_item])).chunk(2)
        user = torch.cat([behavior_user, modal_user], dim=1)
        pos_item = torch.cat([behavior_item, modal_item], dim=1)
        neg_item = torch.cat([behavior_neg, modal_neg], dim=1)
        return {
            "bpr": bpr_loss(user, pos_item, neg_item),
            "l2": self.config.l2_weight * l2_loss(user, pos_item, neg_item),
            **self.alignment(graph, batch, behavior_user, behavior_item, modal_user, modal_item),
        }

    def _preferences(self, graph: HeteroData) -> Tensor:
        return embedding_rows(self.user_preference, graph[USER])
