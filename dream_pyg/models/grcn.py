"""GRCN: Graph-Refined Convolutional Network for Multimedia Recommendation (doi 10.1145/3394171.3413556)."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt
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
from dream_pyg.models.space import RATE, LogRange, Space
from dream_pyg.nn.attention import attend
from dream_pyg.nn.item_features import FeatureScaling, feature_projections
from dream_pyg.nn.losses import bpr_loss, l2_loss
from dream_pyg.nn.propagation import Propagation


class Refined(NamedTuple):
    """Weights of the interactions in each direction, in the order of the graph's edges."""

    to_user: Tensor  # (E,)
    to_item: Tensor  # (E,)


class GRCN(Recommender):
    r"""ID embeddings over interactions that features have weighed (doi 10.1145/3394171.3413556).

    In each modality users are prototypes of what they took. From a free preference
    :math:`\mathbf p_u` in unit rows they move towards their items
    :math:`\mathbf x_i = \overline{\phi(\mathbf x_{m,i} \mathbf W_m + \mathbf b_m)}`, in a few rounds of routing:

    .. math::
        \alpha_{iu} = \underset{i \in \mathcal N(u)}{\mathrm{softmax}} \left( \mathbf x_i \cdot \mathbf p_u \right),
        \qquad \mathbf p_u \leftarrow \overline{\mathbf p_u + \sum_i \alpha_{iu} \mathbf x_i}

    with :math:`\phi` LeakyReLU and bars for norm 1. Then users attend to items, and items to users, by that softmax.
    A node's content is its own row plus what it attends to, :math:`\mathbf x_i + \sum_j \alpha_{ji} \mathbf x_j`. The
    weight of a message from j to i is the attention of the best modality, each scaled by the confidence
    :math:`s_{m,j}` that the sender has in it, and a message that no modality supports is pruned:

    .. math::
        w_{ji} = \max\left(0, \max_m s_{m,j} \, \alpha_{m,ji}\right), \qquad
        \mathbf e^{(l+1)}_i = \sum_{j \in \mathcal N(i)} w_{ji} \, \mathbf e^{(l)}_j

    ID embeddings in unit rows pass over the refined graph, their layers are summed, and representations are that sum
    beside the contents of all modalities. Training minimises BPR with L2.

    Note:
        Fidelity: attention, confidence, pruning, both convolutions, fusion by concatenation, three rounds and two
        layers are EXACT to the authors' code. Routing is that of the paper: in their code, as in MMRec's, the rounds
        change nothing, since messages run from users to items there and prototypes receive none (``num_routings=0``
        does the same). CHOSEN: features are in rows of norm 1, theirs are unscaled; L2 is on the batch's ID embeddings
        and preferences, per example; an item that lacks a modality is zero in it, so users attend to it as to an
        unrelated one.
    """

    @model_config
    class Config:
        """Hyper-parameters of GRCN."""

        embedding_dim: PositiveInt = 64
        """Width of the embeddings."""
        latent_dim: PositiveInt = 64
        """Width of preferences and projected features."""
        num_layers: PositiveInt = 2
        """Hops over the refined user-item graph."""
        num_routings: NonNegativeInt = 3
        """Rounds in which users move towards their items, in each modality."""
        l2_weight: NonNegativeFloat = 1e-4
        """Weight of the L2 term on the batch's ID embeddings and preferences."""
        feature_scaling: FeatureScaling = "unit"
        """Item features before the projection: as given, in rows of norm 1, or in rows of norm sqrt(F)."""

    # MMRec: L2 from 0.00001 to 0.1.
    search_space: ClassVar[Space] = {**RATE, "model.l2_weight": LogRange(1e-5, 1e-1)}

    needs_features: ClassVar[bool] = True

    def __init__(self, graph: HeteroData, config: Any = None) -> None:
        super().__init__(graph, config)
        modalities = require_modalities(feature_modalities(graph), "GRCN")
        dim, latent = self.config.embedding_dim, self.config.latent_dim
        self.user_embedding = xavier_embedding(self.num_users, dim)
        self.item_embedding = xavier_embedding(self.num_items, dim)
        self.projections = feature_projections(
            graph, modalities, latent, scaling=self.config.feature_scaling, bias=True
        )
        self.preferences = nn.ParameterDict(
            {modality: xavier_embedding(self.num_users, latent) for modality in modalities}
        )
        self.user_confidence = xavier_embedding(self.num_users, len(modalities))
        self.item_confidence = xavier_embedding(self.num_items, len(modalities))
        self.propagation = Propagation()

    def forward(self, graph: HeteroData) -> Embeddings:
        """ID embeddings over the refined graph, beside the contents of all modalities."""
        contents, attentions = zip(*(self.content(graph, modality) for modality in self.projections), strict=True)
        identity = self.propagate(graph, self.refine(graph, list(attentions)))
        users, items = zip(identity, *contents, strict=True)
        return Embeddings(torch.cat(users, dim=1), torch.cat(items, dim=1))

    def content(self, graph: HeteroData, modality: str) -> tuple[Embeddings, Refined]:
        """Users and items in one modality, and how much each attends to its neighbours."""
        to_user, to_item = graph[REV_INTERACTS].edge_index, graph[INTERACTS].edge_index
        user = F.normalize(self.preferences[modality])
        item = F.normalize(F.leaky_relu(self.projections[modality](graph)))
        for _ in range(self.config.num_routings):
            user = F.normalize(user + attend(self.propagation, item, user, to_user)[0])
        from_items, to_user_weight = attend(self.propagation, item, user, to_user)
        from_users, to_item_weight = attend(self.propagation, user, item, to_item)
        return Embeddings(user + from_items, item + from_users), Refined(to_user_weight, to_item_weight)

    def refine(self, graph: HeteroData, attentions: list[Refined]) -> Refined:
        """The weight of each message, from the attention in each modality and its sender's confidence in them."""
        to_user, to_item = (torch.stack(weights, dim=1) for weights in zip(*attentions, strict=True))
        item, user = (graph[edge_type].edge_index.as_tensor()[0] for edge_type in (REV_INTERACTS, INTERACTS))
        return Refined(
            (to_user * self.item_confidence[item]).max(dim=1).values.relu(),
            (to_item * self.user_confidence[user]).max(dim=1).values.relu(),
        )

    def propagate(self, graph: HeteroData, refined: Refined) -> Embeddings:
        """The sum over layers of unit ID embeddings on the refined graph."""
        to_user, to_item = graph[REV_INTERACTS].edge_index, graph[INTERACTS].edge_index
        user, item = F.normalize(self.user_embedding), F.normalize(self.item_embedding)
        user_sum, item_sum = user, item
        for _ in range(self.config.num_layers):
            user, item = (
                self.propagation(item, to_user, refined.to_user, self.num_users),
                self.propagation(user, to_item, refined.to_item, self.num_items),
            )
            user_sum, item_sum = user_sum + user, item_sum + item
        return Embeddings(user_sum, item_sum)

    def loss(self, graph: HeteroData, batch: Batch) -> dict[str, Tensor]:
        """BPR on the representations, L2 on the batch's free embeddings."""
        user, item = self(graph)
        free = [*batch.rows(self.user_embedding, self.item_embedding)]
        free += [preference[batch.user] for preference in self.preferences.values()]
        return {
            "bpr": bpr_loss(*batch.rows(user, item)),
            "l2": self.config.l2_weight * l2_loss(*free),
        }
