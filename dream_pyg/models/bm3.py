"""BM3: Bootstrap Latent Representations for Multi-modal Recommendation (arXiv 2207.05969)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor, nn
from torch_geometric.data import HeteroData

from dream_pyg import ranks
from dream_pyg.graph.schema import ITEM, feature_modalities, mask_name
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
from dream_pyg.models.lightgcn import propagate_interactions
from dream_pyg.models.space import RATE, Choice, LogRange, Space
from dream_pyg.nn.item_features import FeatureScaling, feature_projections
from dream_pyg.nn.losses import cosine_loss
from dream_pyg.nn.propagation import Propagation
from dream_pyg.nn.user_features import mean_over_items


class BM3(Recommender):
    r"""LightGCN and features that learn to predict dropped-out views of each other (arXiv 2207.05969, Section 3).

    Negatives are not used. Users :math:`\mathbf h_u` are means over LightGCN's layers, items :math:`\mathbf h_i` the
    same plus their ID embedding, modalities :math:`\mathbf h_m = \mathbf x_m \mathbf W_m + \mathbf b_m`. Each has an
    online view through one shared predictor, :math:`\tilde{\mathbf h} = \mathbf h \mathbf W_p + \mathbf b_p`, and a
    target view :math:`\dot{\mathbf h}`, its dropout without gradient. With
    :math:`C(\mathbf z, \mathbf t) = 1 - \cos(\mathbf z, \mathrm{sg}(\mathbf t))`, the mean over the batch's pairs,

    .. math::
        \mathcal L = C(\tilde{\mathbf h}_u, \dot{\mathbf h}_i) + C(\tilde{\mathbf h}_i, \dot{\mathbf h}_u)
        + \mu \sum_m \left( C(\tilde{\mathbf h}_m, \dot{\mathbf h}_i)
        + C(\tilde{\mathbf h}_m, \dot{\mathbf h}_m) \right)
        + \lambda \mathcal L_2 + \alpha \mathcal L_{Intra} + \beta \mathcal L_{Inter} + \gamma \mathcal L_{SSS}

    Scores are :math:`\tilde{\mathbf h}_u \cdot \tilde{\mathbf h}_i`.

    Note:
        Fidelity: representations, views, the three losses and the score are EXACT (one minus the cosine in place of its
        negative, a constant apart); weight :math:`\mu = 2`, one layer and dropout 0.5 are those the authors published
        for Baby. As in their code, :math:`\mathcal L_2` is the norm of all :math:`\mathbf h_u` plus that of all
        :math:`\mathbf h_i`, over the number of items (squares of the batch's rows, as elsewhere, would weigh on popular
        items), and features are trained on as parameters. CHOSEN: features begin in rows of norm 1, theirs unscaled;
        dropout masks are drawn for each row of the batch; an item that lacks a modality is left out of its two losses.
        UNKNOWN: what DREAM's authors aligned, for users of BM3 have no modal representation; here the lines are the
        online views of LightGCN and of the mean over modalities, a user's being the mean of the train items'.
    """

    @model_config
    class Config(AlignmentConfig):
        """Hyper-parameters of BM3."""

        embedding_dim: PositiveInt = 64
        """Width of the embeddings."""
        num_layers: NonNegativeInt = 1
        """Hops over the user-item graph."""
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5
        """Share of entries that target views lose."""
        modality_weight: NonNegativeFloat = 2.0
        """mu: weight of the losses on modalities."""
        l2_weight: NonNegativeFloat = 1e-1
        """lambda: weight of the norms of all propagated embeddings."""
        feature_scaling: FeatureScaling = "unit"
        """Item features before the projection: as given, in rows of norm 1, or in rows of norm sqrt(F)."""
        train_features: bool = True
        """Whether the scaled features are parameters (I, F), trained on as in the authors' code, or fixed inputs."""

    # arXiv 2207.05969, Section 4.1.4: one or two layers, dropout 0.3 or 0.5, L2 0.1 or 0.01.
    search_space: ClassVar[Space] = {
        **RATE,
        "model.num_layers": Choice((1, 2)),
        "model.dropout": Choice((0.3, 0.5)),
        "model.l2_weight": LogRange(1e-3, 1.0),
    }

    needs_features: ClassVar[bool] = True

    def __init__(self, graph: HeteroData, config: Any = None) -> None:
        super().__init__(graph, config)
        modalities = require_modalities(feature_modalities(graph), "BM3")
        dim = self.config.embedding_dim
        self.user_embedding = xavier_embedding(self.num_users, dim)
        self.item_embedding = xavier_embedding(self.num_items, dim)
        self.projections = feature_projections(
            graph, modalities, dim, scaling=self.config.feature_scaling, bias=True, trained=self.config.train_features
        )
        self.predictor = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.predictor.weight)
        self.propagation = Propagation()
        self.alignment = AddedAlignment(graph, self.config, modalities)

    def forward(self, graph: HeteroData) -> Embeddings:
        """The online views of users and items."""
        user, item = self.propagate(graph)
        return Embeddings(self.predictor(user), self.predictor(item))

    def propagate(self, graph: HeteroData) -> Embeddings:
        """LightGCN, with the ID embedding added to items once more."""
        user, item = propagate_interactions(
            self.propagation, graph, self.user_embedding, self.item_embedding, self.config.num_layers
        )
        return Embeddings(user, item + self.item_embedding)

    def dual_representations(self, graph: HeteroData) -> DualRepresentations:
        """The online views of LightGCN and of the features."""
        return DualRepresentations(self(graph), self.modal_line(graph))

    def modal_line(self, graph: HeteroData) -> Embeddings:
        """The online view of the mean over modalities, for users of the mean over their train items."""
        items = {modality: projection(graph) for modality, projection in self.projections.items()}
        users = [mean_over_items(self.propagation, graph, modality, item) for modality, item in items.items()]
        user, item = torch.stack(users).mean(dim=0), torch.stack(list(items.values())).mean(dim=0)
        return Embeddings(self.predictor(user), self.predictor(item))

    def loss(self, graph: HeteroData, batch: Batch) -> dict[str, Tensor]:
        """Reconstruction of the interactions, both losses on modalities, L2 and alignment; negatives are not used."""
        config = self.config
        propagated = self.propagate(graph)
        user, item = propagated.user[batch.user], propagated.item[batch.pos_item]
        online_user, online_item = self.predictor(user), self.predictor(item)
        target_user, target_item = self._target(user), self._target(item)
        inter_modality, intra_modality = user.new_zeros(()), user.new_zeros(())
        for modality, projection in self.projections.items():
            modal = projection(graph, batch.pos_item)
            online, present = self.predictor(modal), graph[ITEM][mask_name(modality)][batch.pos_item]
            inter_modality = inter_modality + cosine_loss(online, target_item, present)
            intra_modality = intra_modality + cosine_loss(online, self._target(modal), present)
        terms = {
            "reconstruction": cosine_loss(online_user, target_item) + cosine_loss(online_item, target_user),
            "inter_modality": config.modality_weight * inter_modality,
            "intra_modality": config.modality_weight * intra_modality,
            "l2": config.l2_weight * (propagated.user.norm() + propagated.item.norm()) / self.num_items,
        }
        if config.aligns:
            modal_user, modal_item = self.modal_line(graph)
            modal_rows = modal_user[batch.user], modal_item[batch.pos_item]
            terms |= self.alignment(graph, batch, online_user, online_item, *modal_rows)
        return terms

    def _target(self, rows: Tensor) -> Tensor:
        # Drawn for the whole batch, of which several processes have a slice each.
        first, total = ranks.span(len(rows))
        kept = F.dropout(rows.new_ones(total, rows.size(1)), self.config.dropout)
        return rows.detach() * kept[first : first + len(rows)]
