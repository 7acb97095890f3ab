"""MGCN: Multi-View Graph Convolutional Network for Multimedia Recommendation (arXiv 2308.03588)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch_geometric.data import HeteroData

from dream_pyg.graph.schema import ITEM, REV_INTERACTS, feature_modalities, knn_edge
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
from dream_pyg.nn.alignment import info_nce
from dream_pyg.nn.fusion import AttentionFusion
from dream_pyg.nn.gates import FilterGate
from dream_pyg.nn.item_features import FeatureScaling, feature_projections
from dream_pyg.nn.item_structure import normalized_weight
from dream_pyg.nn.losses import bpr_loss, l2_loss
from dream_pyg.nn.propagation import Propagation


class MGCN(Recommender):
    r"""ID embeddings purified by features, enriched in separate views, fused by behavior (arXiv 2308.03588, Section 3).

    Behavior-guided purifier, for items and each modality:

    .. math::
        \dot{\mathbf E}_m = \mathbf X_m \mathbf W_1 + \mathbf b_1, \qquad
        \ddot{\mathbf E}_m = \mathbf E_{id} \odot \sigma(\dot{\mathbf E}_m \mathbf W_2 + \mathbf b_2)

    Multi-view encoder: :math:`\bar{\mathbf E}_{id}` is LightGCN over the user-item graph; items pass
    :math:`\ddot{\mathbf E}_m` over the item-item graph :math:`\mathbf S_m`, cosine top-K keeping the cosine as weight,
    symmetrically normalised; users sum the result over their items, weighted :math:`1/\sqrt{d_u d_i}`.

    Behavior-aware fuser, for users and items alike:

    .. math::
        a_m = \mathrm{softmax}_m\left(\mathbf q \cdot \tanh(\bar{\mathbf E}_m \mathbf W_3 + \mathbf b_3)\right), \quad
        \mathbf E_s = \sum_m a_m \bar{\mathbf E}_m, \quad
        \tilde{\mathbf E}_m = (\bar{\mathbf E}_m - \mathbf E_s)
        \odot \sigma(\bar{\mathbf E}_{id} \mathbf W_{4,m} + \mathbf b_{4,m}), \quad
        \mathbf E_{mul} = \frac{1}{M+1} \left( \mathbf E_s + \sum_m \tilde{\mathbf E}_m \right)

    Representations are :math:`\bar{\mathbf E}_{id} + \mathbf E_{mul}`, scores inner products, and

    .. math::
        \mathcal L = \mathcal L_{BPR} + \lambda_C \mathcal L_C + \lambda \mathcal L_2
        + \alpha \mathcal L_{Intra} + \beta \mathcal L_{Inter} + \gamma \mathcal L_{SSS}

    with :math:`\mathcal L_C` the InfoNCE of :math:`\mathbf E_{mul}` against :math:`\bar{\mathbf E}_{id}` over the
    batch's users, plus that over its positive items.

    Note:
        Fidelity: purifier, views, fuser, loss, temperature 0.2 and weights are EXACT to the authors' code, if the graph
        was built with self as one of the neighbours (``include_self``). The paper writes the fusion as :math:`\mathbf
        E_s + \frac1M \sum_m \tilde{\mathbf E}_m`: ``fusion="shared_plus_mean"``. The authors train with a learning rate
        that decays by 0.96 every 50 epochs, which is an option of the training (``training.learning_rate_decay=0.96``),
        not of the model; re-runs without it fell well short of the paper. CHOSEN: features are inputs in rows of norm
        1, while the authors' code trains them on as parameters, unscaled; negative cosines, whose root has no meaning,
        count as 0; an item that lacks a modality has a view of zeros there, which is fused like any other. DREAM's
        authors add only intra-alignment here, as :math:`\mathcal L_C` is like inter-alignment; UNKNOWN is where, here
        between users and items of :math:`\bar{\mathbf E}_{id}` and of :math:`\mathbf E_{mul}`.
    """

    @model_config
    class Config(AlignmentConfig):
        """Hyper-parameters of MGCN."""

        embedding_dim: PositiveInt = 64
        """Width of the embeddings."""
        num_layers: NonNegativeInt = 2
        """Hops over the user-item graph."""
        num_item_layers: NonNegativeInt = 1
        """Hops over the item-item graphs."""
        contrastive_weight: NonNegativeFloat = 0.01
        """lambda_C."""
        temperature: PositiveFloat = 0.2
        """Temperature of the contrastive loss."""
        l2_weight: NonNegativeFloat = 1e-4
        """lambda: weight of the L2 term on the batch's representations."""
        fusion: Literal["mean", "shared_plus_mean"] = "mean"
        """The mean of the shared and all specific parts, or the shared part plus the mean of the specific ones."""
        feature_scaling: FeatureScaling = "unit"
        """Item features before the projection: as given, in rows of norm 1, or in rows of norm sqrt(F)."""

    # arXiv 2308.03588, Section 4.1: contrastive weight from 0.001 to 0.1, decay of the learning rate in the code.
    search_space: ClassVar[Space] = {
        **RATE,
        "training.learning_rate_decay": Choice((1.0, 0.96)),
        "model.contrastive_weight": LogRange(1e-3, 1e-1),
        "model.l2_weight": LogRange(1e-6, 1e-1),
    }

    needs_features: ClassVar[bool] = True
    needs_item_knn: ClassVar[bool] = True

    def __init__(self, graph: HeteroData, config: Any = None) -> None:
        super().__init__(graph, config)
        modalities = require_modalities(feature_modalities(graph), "MGCN")
        dim = self.config.embedding_dim
        self.user_embedding = xavier_embedding(self.num_users, dim)
        self.item_embedding = xavier_embedding(self.num_items, dim)
        self.projections = feature_projections(graph, modalities, dim, scaling=self.config.feature_scaling, bias=True)
        self.purifiers = nn.ModuleDict({modality: FilterGate(dim, dim) for modality in modalities})
        # A single modality shares all it has: there is nothing to attend to or prefer, nor to train.
        several = len(modalities) > 1
        self.preferences = nn.ModuleDict({modality: FilterGate(dim, dim) for modality in modalities if several})
        self.attention = AttentionFusion(dim) if several else None
        self.propagation = Propagation()
        self.alignment = AddedAlignment(graph, self.config, modalities)

    def forward(self, graph: HeteroData) -> Embeddings:
        """The sum of behavior and fused modalities."""
        behavior, modal = self.dual_representations(graph)
        return Embeddings(behavior.user + modal.user, behavior.item + modal.item)

    def dual_representations(self, graph: HeteroData) -> DualRepresentations:
        """The user-item view, and the fused item-item views."""
        behavior, views = self.encode(graph)
        users, items = zip(*views, strict=True)
        return DualRepresentations(
            behavior, Embeddings(self.fuse(users, behavior.user), self.fuse(items, behavior.item))
        )

    def encode(self, graph: HeteroData) -> tuple[Embeddings, list[Embeddings]]:
        """The user-item view, and that of each modality."""
        behavior = propagate_interactions(
            self.propagation, graph, self.user_embedding, self.item_embedding, self.config.num_layers
        )
        return behavior, [self.view(graph, modality) for modality in self.projections]

    def view(self, graph: HeteroData, modality: str) -> Embeddings:
        """A modality's purified items over its item-item graph, and users as sums of theirs."""
        purifier = cast(FilterGate, self.purifiers[modality])
        item = purifier(purifier.project(self.projections[modality](graph)), self.item_embedding)
        edge_index, edge_weight = self.item_graph(graph, modality)
        for _ in range(self.config.num_item_layers):
            item = self.propagation(item, edge_index, edge_weight)
        to_user = graph[REV_INTERACTS]
        return Embeddings(self.propagation(item, to_user.edge_index, to_user.edge_weight, self.num_users), item)

    def item_graph(self, graph: HeteroData, modality: str) -> tuple[Tensor, Tensor]:
        """A modality's kNN edges, weighted by cosine and normalised by the sums of what each item chose."""
        store = graph[knn_edge(ITEM, modality)]
        return store.edge_index, normalized_weight(store.similarity, store.edge_index)

    def fuse(self, views: Sequence[Tensor], behavior: Tensor) -> Tensor:
        """What the modalities of some rows share, and what is specific to each as far as behavior prefers it."""
        shared = views[0] if self.attention is None else self.attention(views)
        specific = torch.zeros_like(shared)
        for view, preference in zip(views, self.preferences.values(), strict=False):
            gate = cast(FilterGate, preference)
            specific = specific + gate(gate.project(behavior), view - shared)
        if self.config.fusion == "shared_plus_mean":
            return shared + specific / len(views)
        return (shared + specific) / (len(views) + 1)

    def loss(self, graph: HeteroData, batch: Batch) -> dict[str, Tensor]:
        """BPR, the contrastive loss, L2 and alignment over the batch."""
        config = self.config
        behavior, views = self.encode(graph)
        # Rows are fused each for itself, so those of the batch will do.
        behavior_rows, view_rows = batch.rows(*behavior), zip(*(batch.rows(*view) for view in views), strict=True)
        modal_rows = [self.fuse(*both) for both in zip(view_rows, behavior_rows, strict=True)]
        rows = [of_behavior + modal for of_behavior, modal in zip(behavior_rows, modal_rows, strict=True)]
        (behavior_user, behavior_item, _), (modal_user, modal_item, _) = behavior_rows, modal_rows
        terms = {"bpr": bpr_loss(*rows)}
        if config.contrastive_weight:
            contrastive = info_nce(modal_user, behavior_user, config.temperature)
            contrastive = contrastive + info_nce(modal_item, behavior_item, config.temperature)
            terms["contrastive"] = config.contrastive_weight * contrastive
        terms["l2"] = config.l2_weight * l2_loss(*rows)
        return terms | self.alignment(graph, batch, behavior_user, behavior_item, modal_user, modal_item)
