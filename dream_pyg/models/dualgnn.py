"""DualGNN: Dual Graph Neural Network for Multimedia Recommendation (doi 10.1109/TMM.2021.3138298)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor, nn
from torch_geometric.data import HeteroData

from dream_pyg.graph.co_occurrence import co_occurrence_weight, user_co_occurrence
from dream_pyg.graph.schema import ITEM, feature_modalities, mask_name
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
from dream_pyg.nn.item_features import FeatureProjection, FeatureScaling
from dream_pyg.nn.losses import batch_mean, bpr_loss
from dream_pyg.nn.propagation import Propagation


class ModalityEncoder(nn.Module):
    r"""Users and items of one modality: free users, items by two layers over features, both of norm 1.

    .. math::
        \mathbf x_i = \mathrm{LeakyReLU}(\mathbf f_i \mathbf W_1 + \mathbf b_1) \mathbf W_2 + \mathbf b_2

    The row of an item that lacks the modality is zero.
    """

    def __init__(self, graph: HeteroData, modality: str, num_users: int, dim: int, scaling: FeatureScaling) -> None:
        super().__init__()
        self.modality = modality
        self.user_embedding = xavier_embedding(num_users, dim)
        self.hidden = FeatureProjection(graph, modality, 4 * dim, scaling=scaling, bias=True)
        self.output = nn.Linear(4 * dim, dim)

    def forward(self, graph: HeteroData) -> Embeddings:
        """Users (U, D) and items (I, D) before propagation."""
        item = self.output(F.leaky_relu(self.hidden(graph))) * graph[ITEM][mask_name(self.modality)].unsqueeze(1)
        return Embeddings(F.normalize(self.user_embedding, dim=1), F.normalize(item, dim=1))


class DualGNN(Recommender):
    r"""LightGCN in each modality, weighed by each user and smoothed over users who took the same items.

    Dual Graph Neural Network for Multimedia Recommendation (Wang et al., IEEE Transactions on Multimedia 2021,
    doi 10.1109/TMM.2021.3138298). In each modality, users are free vectors, items two layers over features, both
    scaled to norm 1, propagated over the user-item graph and summed over layers:

    .. math::
        \mathbf x_{m,i} = \mathrm{LeakyReLU}(\mathbf f_{m,i} \mathbf W_{1,m} + \mathbf b_{1,m}) \mathbf W_{2,m}
        + \mathbf b_{2,m}, \qquad
        \mathbf E_m = \sum_{l=0}^{L} (\mathbf D^{-1/2} \mathbf A \mathbf D^{-1/2})^l \, \mathrm{norm}(\mathbf X_m)

    Items sum their modalities. Users weigh theirs, and add what the K users who share most train items with them
    prefer, by the softmax of :math:`c_{uv}`, how many items they share:

    .. math::
        \mathbf h_i = \sum_m \mathbf e_{m,i}, \qquad \mathbf p_u = \sum_m w_{u,m} \mathbf e_{m,u}, \qquad
        \mathbf h_u = \mathbf p_u + \sum_{v \in \mathcal N_K(u)} \mathrm{softmax}_v(c_{uv}) \, \mathbf p_v

    .. math::
        \mathcal L = -\frac1B \sum \log \sigma(\mathbf h_u \cdot (\mathbf h_i - \mathbf h_j)) + \lambda \left(
        \sum_m \mathrm{mean}_{u, d} \, x_{m,u,d}^2 + \mathrm{mean}_{u, m} \, w_{u,m}^2 \right)

    The user-user graph follows from the train interactions of the graph that the model is made with, and is neither
    saved nor learned.

    Note:
        Fidelity: EXACT to the authors' code, which is what this follows: encoders, layers, fusion by weighted sum, K =
        40, softmax and the shape of the L2 term; dropped modalities, which that code prepares, it never uses. CHOSEN:
        features are in rows of norm 1, theirs are unscaled; the natural logarithm in place of the binary one, which
        scales :math:`\lambda` by 0.69; every user begins with equal weights, the authors' are equal but for a little
        noise; a user with fewer than K neighbours has the softmax over those there are, where the authors repeat some
        of them at random until there are K; an item that lacks a modality begins it at zero; :math:`\lambda` is the
        middle of the range that public re-runs search. One modality alone is not weighed. MMRec's implementation, which
        tables are made with, adds the second modality of users to the first in place before it weighs them, which the
        authors' does not.
    """

    @model_config
    class Config:
        """Hyper-parameters of DualGNN."""

        embedding_dim: PositiveInt = 64
        """Width of each modality; the hidden layer over features has four times as many."""
        num_layers: NonNegativeInt = 2
        """Hops over the user-item graph."""
        num_user_neighbors: PositiveInt = 40
        """K: how many users with shared items each user listens to."""
        l2_weight: NonNegativeFloat = 1e-3
        """lambda: weight of the mean squares of the batch's users and of the modality weights."""
        feature_scaling: FeatureScaling = "unit"
        """Item features before the first layer: as given, in rows of norm 1, or in rows of norm sqrt(F)."""

    # MMRec: L2 from 0.00001 to 0.1.
    search_space: ClassVar[Space] = {**RATE, "model.l2_weight": LogRange(1e-5, 1e-1)}

    needs_features: ClassVar[bool] = True

    modality_weight: nn.Parameter | None
    user_edge_index: Tensor
    user_edge_weight: Tensor

    def __init__(self, graph: HeteroData, config: Any = None) -> None:
        super().__init__(graph, config)
        modalities = require_modalities(feature_modalities(graph), type(self).__name__)
        dim, scaling = self.config.embedding_dim, self.config.feature_scaling
        self.encoders = nn.ModuleDict(
            {modality: ModalityEncoder(graph, modality, self.num_users, dim, scaling) for modality in modalities}
        )
        # A single modality has nothing to be weighed against.
        count = len(modalities)
        self.modality_weight = nn.Parameter(torch.full((self.num_users, count), 1 / count)) if count > 1 else None
        self.propagation = Propagation()
        edge_index, shared = user_co_occurrence(graph, self.config.num_user_neighbors)
        self.register_buffer("user_edge_index", edge_index, persistent=False)
        self.register_buffer("user_edge_weight", co_occurrence_weight(edge_index, shared), persistent=False)

    def forward(self, graph: HeteroData) -> Embeddings:
        """Users over the co-occurrence graph, and items."""
        user, item = self.fuse(self.views(graph))
        return Embeddings(user + self.neighborhood(user), item)

    def views(self, graph: HeteroData) -> list[Embeddings]:
        """Each modality's users and items, summed over layers."""
        num_layers, views = self.config.num_layers, []
        for encoder in self.encoders.values():
            user, item = encoder(graph)
            mean = propagate_interactions(self.propagation, graph, user, item, num_layers)
            views.append(Embeddings(mean.user * (num_layers + 1), mean.item * (num_layers + 1)))
        return views

    def weighed_users(self, views: list[Embeddings]) -> list[Tensor]:
        """Each modality's users, as far as they prefer it."""
        weight = self.modality_weight
        if weight is None:
            return [view.user for view in views]
        return [view.user * share.unsqueeze(1) for view, share in zip(views, weight.unbind(dim=1), strict=True)]

    def fuse(self, views: list[Embeddings]) -> Embeddings:
        """Sums over modalities, weighed for users."""
        user = torch.stack(self.weighed_users(views)).sum(dim=0)
        return Embeddings(user, torch.stack([view.item for view in views]).sum(dim=0))

    def neighborhood(self, user: Tensor) -> Tensor:
        """The weighted mean over each user's neighbours, zero without any (U, D)."""
        return self.propagation(user, self.user_edge_index, self.user_edge_weight)

    def loss(self, graph: HeteroData, batch: Batch) -> dict[str, Tensor]:
        """BPR and L2 over the batch."""
        user, item = self(graph)
        encoders = cast(Iterable[ModalityEncoder], self.encoders.values())
        squares = [batch_mean(encoder.user_embedding[batch.user].square()) for encoder in encoders]
        if self.modality_weight is not None:
            squares.append(self.modality_weight.square().mean())
        return {
            "bpr": bpr_loss(*batch.rows(user, item)),
            "l2": self.config.l2_weight * torch.stack(squares).sum(),
        }
