"""MMGCN: Multi-modal Graph Convolution Network for Personalized Recommendation of Micro-video (MM 2019)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor, nn
from torch_geometric.data import HeteroData

from dream_pyg.graph.schema import INTERACTS, REV_INTERACTS, feature_modalities
from dream_pyg.models.base import (
    Batch,
    Embeddings,
    Recommender,
    model_config,
    require_modalities,
    xavier_embedding,
)
from dream_pyg.models.space import Choice, LogRange, Space
from dream_pyg.nn.item_features import FeatureScaling, feature_projections
from dream_pyg.nn.losses import bpr_loss, l2_loss
from dream_pyg.nn.propagation import Propagation, mean_of_neighbors


class MMGCN(Recommender):
    r"""A graph convolution in each modality, with the ID embedding beside it (doi 10.1145/3343031.3351034, Section 2).

    In modality m users begin as a free preference :math:`\mathbf p_{m,u}` and items as
    :math:`\mathbf x_{m,i} \mathbf W_m + \mathbf b_m`, both in unit rows. Every layer takes the mean over neighbours
    (Eq. 2), keeps the node's own state with its ID embedding :math:`\mathbf e`, which all modalities share, beside it
    (Eq. 5), and combines the two, adding (Eq. 7) or concatenating them (Eq. 6):

    .. math::
        \mathbf h_m = \phi\left(\frac{1}{|\mathcal N|} \sum_{j \in \mathcal N} \mathbf x_{m,j} \mathbf W_1\right),
        \qquad \hat{\mathbf x}_m = \phi(\mathbf x_m \mathbf W_2 + \mathbf b_2) + \mathbf e

    .. math::
        \mathbf x_m \leftarrow \phi(\mathbf h_m \mathbf W_3 + \mathbf b_3 + \hat{\mathbf x}_m)
        \quad \text{or} \quad \phi([\mathbf h_m, \hat{\mathbf x}_m] \mathbf W_3 + \mathbf b_3)

    with :math:`\phi` LeakyReLU and weights for each modality and layer. Representations are the means over
    modalities of the last layer, and training minimises BPR with L2.

    Note:
        Fidelity: aggregation, both combinations and BPR are EXACT; biases, unit rows before the first layer, three
        layers, a width of 256 before them and the mean over modalities, which the paper sums, follow MMRec's
        implementation. That one means to add but tests a string that is always true, so tables made with it concatenate
        (``combination="concat"``); it also leaves ID embeddings and preferences as they begin
        (``train_embeddings=False``), which the paper trains, as here. CHOSEN: features are in rows of norm 1; every
        modality is projected to that width, there only images; L2 is on the batch's ID embeddings and preferences, per
        example; the row of an item that lacks a modality begins as zero.
    """

    @model_config
    class Config:
        """Hyper-parameters of MMGCN."""

        embedding_dim: PositiveInt = 64
        """Width of the embeddings."""
        latent_dim: PositiveInt = 256
        """Width of preferences and projected features, before the first layer."""
        num_layers: PositiveInt = 3
        """Hops over the user-item graph in each modality."""
        combination: Literal["add", "concat"] = "add"
        """Whether neighbours and the node's own state are added (Eq. 7) or concatenated (Eq. 6)."""
        train_embeddings: bool = True
        """Whether ID embeddings and preferences are trained, or stay the random numbers that they begin as."""
        l2_weight: NonNegativeFloat = 1e-4
        """Weight of the L2 term on the batch's ID embeddings and preferences, where these are trained."""
        feature_scaling: FeatureScaling = "unit"
        """Item features before the projection: as given, in rows of norm 1, or in rows of norm sqrt(F)."""

    # MMRec: learning rate from 0.0001 to 0.01, L2 from 0 to 0.1; the paper: both combinations.
    search_space: ClassVar[Space] = {
        "training.learning_rate": LogRange(1e-4, 1e-2),
        "model.num_layers": Choice((1, 2, 3)),
        "model.combination": Choice(("add", "concat")),
        "model.train_embeddings": Choice((True, False)),
        "model.l2_weight": LogRange(1e-6, 1e-1),
    }

    needs_features: ClassVar[bool] = True

    def __init__(self, graph: HeteroData, config: Any = None) -> None:
        super().__init__(graph, config)
        modalities = require_modalities(feature_modalities(graph), "MMGCN")
        dim, latent, concat = self.config.embedding_dim, self.config.latent_dim, self.config.combination == "concat"
        self.user_embedding = xavier_embedding(self.num_users, dim)
        self.item_embedding = xavier_embedding(self.num_items, dim)
        self.projections = feature_projections(
            graph, modalities, latent, scaling=self.config.feature_scaling, bias=True
        )
        self.preferences = nn.ParameterDict(
            {modality: xavier_embedding(self.num_users, latent) for modality in modalities}
        )
        for embedding in (self.user_embedding, self.item_embedding, *self.preferences.values()):
            embedding.requires_grad_(self.config.train_embeddings)
        widths = [latent, *[dim] * (self.config.num_layers - 1)]
        self.layers = nn.ModuleDict(
            {modality: nn.ModuleList(ModalLayer(width, dim, concat) for width in widths) for modality in modalities}
        )

    def forward(self, graph: HeteroData) -> Embeddings:
        """The mean over modalities."""
        lines = [self.modal_line(graph, modality) for modality in self.projections]
        user, item = zip(*lines, strict=True)
        return Embeddings(torch.stack(user).mean(dim=0), torch.stack(item).mean(dim=0))

    def modal_line(self, graph: HeteroData, modality: str) -> Embeddings:
        """Users and items in one modality, from the last layer."""
        identity = Embeddings(self.user_embedding, self.item_embedding)
        nodes = Embeddings(F.normalize(self.preferences[modality]), F.normalize(self.projections[modality](graph)))
        for layer in cast(nn.ModuleList, self.layers[modality]):
            nodes = layer(graph, nodes, identity)
        return nodes

    def loss(self, graph: HeteroData, batch: Batch) -> dict[str, Tensor]:
        """BPR on the representations, L2 on the batch's free embeddings."""
        user, item = self(graph)
        terms = {"bpr": bpr_loss(*batch.rows(user, item))}
        if not self.config.train_embeddings:
            return terms
        free = [*batch.rows(self.user_embedding, self.item_embedding)]
        free += [preference[batch.user] for preference in self.preferences.values()]
        return terms | {"l2": self.config.l2_weight * l2_loss(*free)}


class ModalLayer(nn.Module):
    """One layer of MMGCN in one modality.

    Args:
        in_dim: Width of the states that come in.
        dim: Width of the ID embeddings and of the states that go out.
        concat: Whether neighbours and own state are concatenated instead of added.
    """

    def __init__(self, in_dim: int, dim: int, concat: bool) -> None:
        super().__init__()
        self.concat = concat
        self.aggregate = nn.Linear(in_dim, in_dim, bias=False)
        self.own = nn.Linear(in_dim, dim)
        self.combine = nn.Linear(in_dim + dim if concat else in_dim, dim)
        for linear in (self.aggregate, self.own, self.combine):
            nn.init.xavier_normal_(linear.weight)
        self.propagation = Propagation()

    def forward(self, graph: HeteroData, nodes: Embeddings, identity: Embeddings) -> Embeddings:
        """The next states of users and items, from their states and ID embeddings."""
        to_item, to_user = graph[INTERACTS].edge_index, graph[REV_INTERACTS].edge_index
        from_items = mean_of_neighbors(self.propagation, self.aggregate(nodes.item), to_user)
        # The projection is linear: that of the means is the mean of projections, and items are mostly fewer than users.
        from_users = self.aggregate(mean_of_neighbors(self.propagation, nodes.user, to_item))
        return Embeddings(
            self._combine(from_items, nodes.user, identity.user), self._combine(from_users, nodes.item, identity.item)
        )

    def _combine(self, neighbors: Tensor, own: Tensor, identity: Tensor) -> Tensor:
        neighbors = F.leaky_relu(neighbors)
        own = F.leaky_relu(self.own(own)) + identity
        if self.concat:
            # The product with both side by side, without laying them there.
            of_neighbors, of_own = self.combine.weight.split([neighbors.size(1), own.size(1)], dim=1)
            return F.leaky_relu(torch.addmm(F.linear(own, of_own, self.combine.bias), neighbors, of_neighbors.T))
        return F.leaky_relu(self.combine(neighbors) + own)
