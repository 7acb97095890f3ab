"""BUIR: Bootstrapping User and Item Representations for One-Class Collaborative Filtering (arXiv 2105.06323)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor, nn
from torch_geometric.data import HeteroData

from dream_pyg.graph.schema import INTERACTS, REV_INTERACTS
from dream_pyg.models.base import Batch, Embeddings, Recommender, model_config, xavier_embedding
from dream_pyg.models.lightgcn import propagate_interactions
from dream_pyg.models.space import RATE, Choice, LogRange, Space
from dream_pyg.nn.losses import cosine_loss, l2_loss
from dream_pyg.nn.propagation import Propagation


class BUIR(Recommender):
    r"""An online encoder that learns to predict a slower copy of itself, without negatives (arXiv 2105.06323).

    Both encoders are LightGCN, which leaves out interactions at random while it trains; without layers they are the
    tables themselves, the paper's BUIR-id. With :math:`\mathbf h` what the online encoder gives, :math:`\mathbf t`
    what the target encoder gives, and the predictor :math:`q(\mathbf h) = \mathbf h \mathbf W + \mathbf b`,

    .. math::
        \mathcal L = \frac1B \sum \left\lVert \overline{q(\mathbf h_u)} - \bar{\mathbf t}_i \right\rVert^2
        + \left\lVert \overline{q(\mathbf h_i)} - \bar{\mathbf t}_u \right\rVert^2 + \lambda \mathcal L_2,
        \qquad \hat y_{ui} = q(\mathbf h_u) \cdot \mathbf h_i + \mathbf h_u \cdot q(\mathbf h_i)

    where bars scale to norm 1. Only the online encoder gets gradients; the target's tables follow its own,
    :math:`\mathbf T \leftarrow \tau \mathbf T + (1 - \tau) \mathbf E`, once after each step. The score is one inner
    product, of :math:`[q(\mathbf h_u), \mathbf h_u]` and :math:`[\mathbf h_i, q(\mathbf h_i)]`.

    The target is state of the model. It begins as a copy in the first :meth:`loss` in training mode; each later one
    first moves it by one step, so that it is to be called once for each step of the optimizer. :meth:`forward`, and
    anything in evaluation mode, changes nothing.

    Note:
        Fidelity: encoders, loss, score, momentum 0.995, three layers and the share of interactions left out, drawn for
        each encoder from 0 to 0.2 and made up for by the others' weights, are EXACT to the authors' code, where leaving
        out is an option. CHOSEN: that option is on by default; L2 is ours on the batch's tables, theirs is Adam's
        weight decay on everything; 64 dimensions, like all models here, where theirs are 250.
    """

    @model_config
    class Config:
        """Hyper-parameters of BUIR."""

        embedding_dim: PositiveInt = 64
        """Width of the embeddings."""
        num_layers: NonNegativeInt = 3
        """Hops over the user-item graph; 0 is the paper's BUIR-id."""
        momentum: Annotated[float, Field(ge=0, le=1)] = 0.995
        """tau: how much of itself the target keeps at each step."""
        max_edge_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2
        """The largest share of interactions that an encoder leaves out at a step."""
        l2_weight: NonNegativeFloat = 1e-4
        """lambda: weight of the L2 term on the batch's layer-0 embeddings."""

    # arXiv 2105.06323, Section 5.1: momentum and one to four layers; L2 as for LightGCN.
    search_space: ClassVar[Space] = {
        **RATE,
        "model.num_layers": Choice((1, 2, 3, 4)),
        "model.momentum": Choice((0.98, 0.99, 0.995, 0.999)),
        "model.max_edge_dropout": Choice((0.0, 0.1, 0.2)),
        "model.l2_weight": LogRange(1e-6, 1e-1),
    }

    recordable = False  # Each step draws how many edges it drops.

    target_user: Tensor
    target_item: Tensor
    has_target: Tensor

    def __init__(self, graph: HeteroData, config: Any = None) -> None:
        super().__init__(graph, config)
        dim = self.config.embedding_dim
        self.user_embedding = xavier_embedding(self.num_users, dim)
        self.item_embedding = xavier_embedding(self.num_items, dim)
        self.predictor = nn.Linear(dim, dim)
        self.propagation = Propagation()
        self.register_buffer("target_user", torch.zeros(self.num_users, dim))
        self.register_buffer("target_item", torch.zeros(self.num_items, dim))
        self.register_buffer("has_target", torch.tensor(False))

    def forward(self, graph: HeteroData) -> Embeddings:
        """Predictions beside representations, whose inner product is the score in both directions."""
        user, item = self._encode(graph, self.user_embedding, self.item_embedding)
        return Embeddings(
            torch.cat([self.predictor(user), user], dim=1), torch.cat([item, self.predictor(item)], dim=1)
        )

    def loss(self, graph: HeteroData, batch: Batch) -> dict[str, Tensor]:
        """Both predictions against the target, and L2; negatives are not used."""
        user, item = self._encode(self._augmented(graph), self.user_embedding, self.item_embedding)
        with torch.no_grad():
            target_user, target_item = self._encode(self._augmented(graph), *self._next_target())
        from_user = cosine_loss(self.predictor(user[batch.user]), target_item[batch.pos_item])
        from_item = cosine_loss(self.predictor(item[batch.pos_item]), target_user[batch.user])
        # The squared distance of unit rows is twice what their cosine lacks to 1.
        initial = self.user_embedding[batch.user], self.item_embedding[batch.pos_item]
        return {"bootstrap": 2.0 * (from_user + from_item), "l2": self.config.l2_weight * l2_loss(*initial)}

    def _encode(self, graph: HeteroData, user: Tensor, item: Tensor) -> Embeddings:
        return propagate_interactions(self.propagation, graph, user, item, self.config.num_layers)

    def _augmented(self, graph: HeteroData) -> HeteroData:
        """The interactions as one encoder sees them at one step."""
        if not (self.training and self.config.max_edge_dropout):
            return graph
        share = self.config.max_edge_dropout * float(torch.rand(()))
        augmented = HeteroData()
        for edge_type in (INTERACTS, REV_INTERACTS):
            augmented[edge_type].edge_index = graph[edge_type].edge_index
            augmented[edge_type].edge_weight = F.dropout(graph[edge_type].edge_weight, share)
        return augmented

    def _next_target(self) -> Embeddings:
        """The target's tables once they follow the last step, which only training remembers."""
        online = Embeddings(self.user_embedding.detach(), self.item_embedding.detach())
        # Without a branch a GPU need not be waited for; and weighing by 1 copies exactly.
        one = online.user.new_ones(())
        weight = torch.where(self.has_target, one - self.config.momentum, one)
        target = Embeddings(self.target_user.lerp(online.user, weight), self.target_item.lerp(online.item, weight))
        if self.training:
            self.target_user.copy_(target.user)
            self.target_item.copy_(target.item)
            self.has_target.fill_(True)
        return target
