"""SLMRec: Self-supervised Learning for Multimedia Recommendation (IEEE Transactions on Multimedia, 2022)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch_geometric.data import HeteroData

from dream_pyg.graph.schema import feature_modalities
from dream_pyg.models.base import (
    Batch,
    Embeddings,
    Recommender,
    model_config,
    require_modalities,
    xavier_embedding,
)
from dream_pyg.models.lightgcn import propagate_interactions
from dream_pyg.models.space import RATE, LogRange, Space
from dream_pyg.nn.alignment import info_nce
from dream_pyg.nn.item_features import FeatureScaling, feature_projections
from dream_pyg.nn.losses import l2_loss
from dream_pyg.nn.propagation import Propagation


class SLMRec(Recommender):
    r"""LightGCN in each modality, and modalities told apart from ever coarser spaces (doi 10.1109/TMM.2022.3187556).

    Of the paper's three self-supervised tasks this is FAC, feature fine and coarse spaces, which its authors' code
    takes by default. LightGCN runs once over ID embeddings and once over each modality
    :math:`\mathbf x_m \mathbf W_m + \mathbf b_m`, always from the same user embeddings; :math:`\bar{\mathbf e}` are the
    means over its layers. Representations are a linear map of them side by side, one for users and one for items:

    .. math::
        \mathbf h = [\bar{\mathbf e}_0, \bar{\mathbf e}_1, \dots, \bar{\mathbf e}_M] \mathbf W + \mathbf b

    Items pass from the space of IDs into one shared with the first modality, from there into one shared with the
    second as well, and so on, the last of several being half as wide; there each modality is contrasted:

    .. math::
        \mathbf c_0 = \bar{\mathbf e}_0, \qquad \mathbf c_m = \mathbf c_{m-1} \mathbf A_m + \mathbf a_m, \qquad
        \mathcal L = \mathrm{NCE}_\tau(\mathbf h_u, \mathbf h_i)
        + \alpha \sum_m \mathrm{NCE}_{\tau_s}(\mathbf c_m, \bar{\mathbf e}_m \mathbf B_m) + \lambda \mathcal L_2

    Both are InfoNCE over the batch, the first of unit rows, the second of plain inner products. Negatives are not used.

    Note:
        Fidelity: encoders, fusion, chain of spaces, both losses and temperatures 0.2, :math:`\alpha` = 0.1 and three
        layers are EXACT to the authors' code, with modalities in the graph's order (theirs: visual, acoustic, textual);
        :math:`\mathbf B_m` has no bias, as one would cancel. MMRec's, for two modalities, leaves the map of the absent
        third in the chain, one more linear map in a row. CHOSEN: features are in rows of norm 1, theirs are unscaled;
        L2 is ours on the batch's ID embeddings, theirs is Adam's weight decay on everything; an item that lacks a
        modality begins as zero in it. The paper's other two tasks, feature dropout and feature masking, are left out.
    """

    @model_config
    class Config:
        """Hyper-parameters of SLMRec."""

        embedding_dim: PositiveInt = 64
        """Width of the embeddings."""
        num_layers: NonNegativeInt = 3
        """Hops over the user-item graph."""
        temperature: PositiveFloat = 0.2
        """tau: temperature of users against items."""
        contrastive_weight: NonNegativeFloat = 0.1
        """alpha: weight of the self-supervised loss."""
        contrastive_temperature: PositiveFloat = 0.2
        """tau_s: temperature of the self-supervised loss."""
        l2_weight: NonNegativeFloat = 1e-4
        """lambda: weight of the L2 term on the batch's ID embeddings."""
        feature_scaling: FeatureScaling = "unit"
        """Item features before the projection: as given, in rows of norm 1, or in rows of norm sqrt(F)."""

    # MMRec: alpha from 0.01 to 1, tau_s from 0.1 to 1, L2 from 0.0001 to 0.1.
    search_space: ClassVar[Space] = {
        **RATE,
        "model.contrastive_weight": LogRange(1e-2, 1.0),
        "model.contrastive_temperature": LogRange(0.1, 1.0),
        "model.l2_weight": LogRange(1e-5, 1e-1),
    }

    needs_features: ClassVar[bool] = True

    def __init__(self, graph: HeteroData, config: Any = None) -> None:
        super().__init__(graph, config)
        modalities = require_modalities(feature_modalities(graph), "SLMRec")
        dim = self.config.embedding_dim
        self.user_embedding = xavier_embedding(self.num_users, dim)
        self.item_embedding = xavier_embedding(self.num_items, dim)
        self.projections = feature_projections(graph, modalities, dim, scaling=self.config.feature_scaling, bias=True)
        self.user_fusion = nn.Linear((len(modalities) + 1) * dim, dim)
        self.item_fusion = nn.Linear((len(modalities) + 1) * dim, dim)
        # Spaces are for their own loss only; without it, they would be parameters that nothing trains.
        spaces = modalities if self.config.contrastive_weight else []
        widths = dict.fromkeys(spaces, dim)
        if len(spaces) > 1:
            widths[spaces[-1]] = max(1, dim // 2)
        self.coarse = nn.ModuleDict({modality: nn.Linear(dim, width) for modality, width in widths.items()})
        self.fine = nn.ModuleDict({modality: nn.Linear(dim, width, bias=False) for modality, width in widths.items()})
        for linear in self.modules():
            if isinstance(linear, nn.Linear):
                nn.init.xavier_uniform_(linear.weight)
        self.propagation = Propagation()

    def forward(self, graph: HeteroData) -> Embeddings:
        """The fusion of all lines."""
        user, item = self.lines(graph)
        return Embeddings(self.user_fusion(user), self.item_fusion(item))

    def lines(self, graph: HeteroData) -> Embeddings:
        """The mean over LightGCN's layers, of IDs and of each modality, side by side in rows of (M + 1) D."""
        item = torch.cat([self.item_embedding, *(projection(graph) for projection in self.projections.values())], dim=1)
        # One propagation of wide rows is several narrow ones.
        user = self.user_embedding.repeat(1, len(self.projections) + 1)
        return propagate_interactions(self.propagation, graph, user, item, self.config.num_layers)

    def loss(self, graph: HeteroData, batch: Batch) -> dict[str, Tensor]:
        """Users against items, the self-supervised loss and L2; negatives are not used."""
        config = self.config
        lines = self.lines(graph)
        user, item = lines.user[batch.user], lines.item[batch.pos_item]
        terms = {"info_nce": info_nce(self.user_fusion(user), self.item_fusion(item), config.temperature)}
        if config.contrastive_weight:
            terms["contrastive"] = config.contrastive_weight * self._fine_and_coarse(item)
        initial = self.user_embedding[batch.user], self.item_embedding[batch.pos_item]
        return terms | {"l2": config.l2_weight * l2_loss(*initial)}

    def _fine_and_coarse(self, item: Tensor) -> Tensor:
        """The contrast of each modality with what came into its space, for items given as lines (B, (M + 1) D)."""
        coarse, *modalities = item.chunk(len(self.projections) + 1, dim=1)
        total = item.new_zeros(())
        for modality, rows in zip(self.coarse, modalities, strict=True):
            coarse = self.coarse[modality](coarse)
            fine = self.fine[modality](rows)
            total = total + info_nce(coarse, fine, self.config.contrastive_temperature, normalize=False)
        return total
