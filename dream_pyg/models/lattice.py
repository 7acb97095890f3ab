"""LATTICE: Mining Latent Structures for Multimedia Recommendation (arXiv 2104.09036)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor, nn
from torch_geometric import EdgeIndex
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
from dream_pyg.models.space import RATE, Choice, LogRange, Space
from dream_pyg.nn.item_features import FeatureScaling
from dream_pyg.nn.item_structure import LatentStructure, unit_or_zero
from dream_pyg.nn.losses import bpr_loss, l2_loss
from dream_pyg.nn.propagation import Propagation


class LATTICE(Recommender):
    r"""LightGCN, plus items over an item-item graph mined from projected features (arXiv 2104.09036, Section 2).

    For each modality, the cosine top-K graph of raw features (Eq. 1-3) and that of projected features (Eq. 4) are
    normalised and joined (Eq. 5), and modalities weighed (Eq. 6):

    .. math::
        \tilde{\mathbf S}_m = \mathbf D^{-1/2} \hat{\mathbf S}_m \mathbf D^{-1/2}, \qquad
        \mathbf A_m = \lambda \tilde{\mathbf S}_m + (1 - \lambda) \tilde{\mathbf A}_m, \qquad
        \mathbf A = \sum_m \mathrm{softmax}_m(a_m) \, \mathbf A_m

    Items pass their ID embeddings over the result (Eq. 7), which joins LightGCN's mean over layers (Eq. 9):

    .. math::
        \mathbf h_i = \frac{(\mathbf A^{L_i} \mathbf E^{(0)})_i}{\lVert (\mathbf A^{L_i} \mathbf E^{(0)})_i \rVert},
        \qquad \hat{\mathbf e}_u = \bar{\mathbf e}_u, \qquad \hat{\mathbf e}_i = \bar{\mathbf e}_i + \mathbf h_i

    .. math::
        \mathcal L = -\frac1B \sum \log \sigma(\hat{\mathbf e}_u \cdot (\hat{\mathbf e}_i - \hat{\mathbf e}_j))
        + \mu \mathcal L_2

    An epoch trains on the neighbours mined when it began; whoever asks for representations gets those mined from the
    weights of that moment.

    Note:
        Fidelity: graphs, skip connection with :math:`\lambda = 0.9`, weighted sum, normalised addition, K = 10 and L2
        on the batch's representations are EXACT; the raw graph counts an item among its own neighbours, as the authors'
        does, if the graph was built so (``include_self``). CHOSEN: the mined graph of each modality is normalised
        before the weighted sum, as the paper writes, while the authors' code normalises the sum; the similarity of
        mined neighbours gets a gradient in every batch, while the authors' code trains the graph in the first batch of
        an epoch and detaches it for the others; negative cosines, whose root has no meaning, count as 0; LightGCN is
        that of its own paper, while the authors' code adds self-loops and divides by the row sum; features are inputs
        in rows of norm 1, while the authors' code trains them on as parameters, unscaled; an item that lacks a modality
        has no neighbours there, nor more weight on those of the others; the weight of L2 is one of the values that
        public re-runs search. The authors train with a learning rate that decays by 0.96 every 50 epochs, which is an
        option of the training (``training.learning_rate_decay=0.96``), not of the model.
    """

    @model_config
    class Config:
        """Hyper-parameters of LATTICE."""

        embedding_dim: PositiveInt = 64
        """Width of the embeddings and of the projected features."""
        num_layers: NonNegativeInt = 2
        """Hops over the user-item graph."""
        num_item_layers: PositiveInt = 1
        """Hops over the item-item graph."""
        num_neighbors: PositiveInt = 10
        """K of the mined graphs."""
        include_self: bool = True
        """Whether an item is one of its own K neighbours in the mined graphs."""
        skip_weight: Annotated[float, Field(ge=0, le=1)] = 0.9
        """lambda: weight of the graph of raw features against the mined one."""
        l2_weight: NonNegativeFloat = 1e-4
        """mu: weight of the L2 term on the batch's representations."""
        feature_scaling: FeatureScaling = "unit"
        """Item features before the projection: as given, in rows of norm 1, or in rows of norm sqrt(F)."""

    # MMRec: learning rate from 0.0001 to 0.005, L2 from 0 to 0.001.
    search_space: ClassVar[Space] = {
        **RATE,
        "training.learning_rate_decay": Choice((1.0, 0.96)),
        "model.num_item_layers": Choice((1, 2)),
        "model.l2_weight": LogRange(1e-6, 1e-1),
    }

    needs_features: ClassVar[bool] = True
    needs_item_knn: ClassVar[bool] = True

    def __init__(self, graph: HeteroData, config: Any = None) -> None:
        super().__init__(graph, config)
        config = self.config
        modalities = require_modalities(feature_modalities(graph), type(self).__name__)
        self.user_embedding = xavier_embedding(self.num_users, config.embedding_dim)
        self.item_embedding = xavier_embedding(self.num_items, config.embedding_dim)
        self.structure = LatentStructure(
            graph,
            modalities,
            config.embedding_dim,
            skip_weight=config.skip_weight,
            num_neighbors=config.num_neighbors,
            include_self=config.include_self,
            scaling=config.feature_scaling,
        )
        self.propagation = Propagation()
        self._mined: dict[str, EdgeIndex] | None = None
        self._add_fusion(len(modalities))

    def _add_fusion(self, num_modalities: int) -> None:
        # A single modality has nothing to be weighed against.
        self.modality_logits = nn.Parameter(torch.zeros(num_modalities)) if num_modalities > 1 else None

    def on_epoch_start(self, graph: HeteroData, generator: torch.Generator) -> None:
        """Mine the neighbours that the epoch trains on."""
        self._mined = self.structure.mine(graph)

    def forward(self, graph: HeteroData) -> Embeddings:
        """Users and items, from the neighbours that the weights give now."""
        return self.join(graph, self.latent(graph, self.structure.mine(graph)))

    def latent(self, graph: HeteroData, mined: dict[str, EdgeIndex]) -> Tensor:
        """Items over the latent structure (I, D)."""
        weights = self.structure.weights(graph, mined)
        latent: Tensor = self.item_embedding
        shares = latent.new_ones(1) if self.modality_logits is None else self.modality_logits.softmax(dim=0)
        for _ in range(self.config.num_item_layers):
            hops = [self.structure.hop(graph, mined, modality, weights[modality], latent) for modality in weights]
            latent = torch.stack([share * hop for share, hop in zip(shares.unbind(), hops, strict=True)]).sum(dim=0)
        return latent

    def join(self, graph: HeteroData, latent: Tensor) -> Embeddings:
        """LightGCN, with what items are over the latent structure added in rows of norm 1."""
        user, item = propagate_interactions(
            self.propagation, graph, self.user_embedding, self.item_embedding, self.config.num_layers
        )
        return Embeddings(user, item + unit_or_zero(latent))

    def loss(self, graph: HeteroData, batch: Batch) -> dict[str, Tensor]:
        """BPR and L2 over the batch, from the neighbours that the epoch mined."""
        rows = batch.rows(*self.join(graph, self.latent(graph, self._mined or self.structure.mine(graph))))
        return {"bpr": bpr_loss(*rows), "l2": self.config.l2_weight * l2_loss(*rows)}
