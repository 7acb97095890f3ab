"""MICRO: Latent Structure Mining with Contrastive Modality Fusion for Multimedia Recommendation (arXiv 2111.00678)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor
from torch_geometric import EdgeIndex
from torch_geometric.data import HeteroData

from dream_pyg import ranks
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
from dream_pyg.nn.fusion import AttentionFusion, view_contrast
from dream_pyg.nn.item_features import FeatureScaling
from dream_pyg.nn.item_structure import LatentStructure, unit_or_zero
from dream_pyg.nn.losses import bpr_loss, l2_loss
from dream_pyg.nn.propagation import Propagation


class MICRO(Recommender):
    r"""LATTICE with a latent structure and a view for each modality, fused by attention (arXiv 2111.00678, Section 3).

    :math:`\mathbf A_m` joins a modality's frozen and mined item-item graph as in
    :class:`~dream_pyg.models.lattice.LATTICE`. Items pass their ID embeddings over each, views are fused item by item,
    and the result joins LightGCN's mean over layers:

    .. math::
        \mathbf H_m = \mathbf A_m^{L_i} \mathbf E^{(0)}, \qquad
        a_m = \mathrm{softmax}_m\left(\mathbf q \cdot \tanh(\mathbf h_{m,i} \mathbf W + \mathbf b)\right), \qquad
        \mathbf h_i = \sum_m a_m \mathbf h_{m,i}

    .. math::
        \hat{\mathbf e}_u = \bar{\mathbf e}_u, \qquad
        \hat{\mathbf e}_i = \bar{\mathbf e}_i + \frac{\mathbf h_i}{\lVert \mathbf h_i \rVert}

    Contrastive fusion tells each item's view from those of other items by the item's fused row, with
    :math:`\theta` the cosine over :math:`\tau`:

    .. math::
        \mathcal L_C = -\sum_m \frac{1}{|\mathcal I_m|} \sum_{i \in \mathcal I_m}
        \log \frac{\exp \theta(\mathbf h_{m,i}, \mathbf h_i)}
        {\sum_j \exp \theta(\mathbf h_{m,i}, \mathbf h_j)
        + \sum_{j \ne i} \exp \theta(\mathbf h_{m,i}, \mathbf h_{m,j})}, \qquad
        \mathcal L = \mathcal L_{BPR} + \beta \mathcal L_C + \mu \mathcal L_2

    An epoch trains on the neighbours mined when it began; whoever asks for representations gets those mined from the
    weights of that moment.

    Note:
        Fidelity: structures, views, attention, normalised addition and the shape of all losses are EXACT;
        :math:`\lambda = 0.9`, K = 10, :math:`\beta = 0.03` and the weight of L2 are the defaults of the authors' code,
        :math:`\tau = 0.5` that of code built on it; the raw graph counts an item among its own neighbours, as theirs
        does, if the graph was built so (``include_self``). The authors train with a learning rate of 0.0005 that
        decays by 0.96 every 50 epochs, which are options of the training, not of the model. CHOSEN:
        :math:`\mathcal I_m` are the batch's different positive items that have the modality, while the authors
        contrast all items in every batch; the similarity of mined neighbours gets a gradient in every batch, theirs in
        the first of an epoch; negative cosines, whose root has no meaning, count as 0; LightGCN is that of its own
        paper; features are inputs, while the authors' code trains them on as parameters. One modality alone has
        nothing to fuse, by attention or by contrast.
    """

    @model_config
    class Config:
        """Hyper-parameters of MICRO."""

        embedding_dim: PositiveInt = 64
        """Width of the embeddings and of the projected features."""
        num_layers: NonNegativeInt = 2
        """Hops over the user-item graph."""
        num_item_layers: PositiveInt = 1
        """Hops over the item-item graphs."""
        num_neighbors: PositiveInt = 10
        """K of the mined graphs."""
        include_self: bool = True
        """Whether an item is one of its own K neighbours in the mined graphs."""
        skip_weight: Annotated[float, Field(ge=0, le=1)] = 0.9
        """lambda: weight of the graph of raw features against the mined one."""
        contrastive_weight: NonNegativeFloat = 0.03
        """beta: weight of the contrastive fusion."""
        temperature: PositiveFloat = 0.5
        """tau of the contrastive fusion."""
        l2_weight: NonNegativeFloat = 1e-5
        """mu: weight of the L2 term on the batch's representations."""
        feature_scaling: FeatureScaling = "unit"
        """Item features before the projection: as given, in rows of norm 1, or in rows of norm sqrt(F)."""

    needs_features: ClassVar[bool] = True
    needs_item_knn: ClassVar[bool] = True

    def __init__(self, graph: HeteroData, config: Any = None) -> None:
        super().__init__(graph, config)
        config = self.config
        modalities = require_modalities(feature_modalities(graph), "MICRO")
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
        self.fusion = AttentionFusion(config.embedding_dim) if len(modalities) > 1 else None
        self.propagation = Propagation()
        self._mined: dict[str, EdgeIndex] | None = None

    def on_epoch_start(self, graph: HeteroData, generator: torch.Generator) -> None:
        """Mine the neighbours that the epoch trains on."""
        self._mined = self.structure.mine(graph)

    def forward(self, graph: HeteroData) -> Embeddings:
        """Users and items, from the neighbours that the weights give now."""
        _, fused = self.item_views(graph, self.structure.mine(graph))
        return self.propagate(graph, fused)

    def item_views(self, graph: HeteroData, mined: dict[str, EdgeIndex]) -> tuple[dict[str, Tensor], Tensor]:
        """Items over each modality's latent structure (I, D), and fused (I, D)."""
        views = self.structure(graph, mined, self.item_embedding, self.config.num_item_layers)
        rows = list(views.values())
        return views, rows[0] if self.fusion is None else self.fusion(rows)

    def propagate(self, graph: HeteroData, fused: Tensor) -> Embeddings:
        """LightGCN, with fused items added in rows of norm 1."""
        user, item = propagate_interactions(
            self.propagation, graph, self.user_embedding, self.item_embedding, self.config.num_layers
        )
        return Embeddings(user, item + unit_or_zero(fused))

    def loss(self, graph: HeteroData, batch: Batch) -> dict[str, Tensor]:
        """BPR, contrastive fusion and L2 over the batch, from the neighbours that the epoch mined."""
        config = self.config
        views, fused = self.item_views(graph, self.structure.mine(graph) if self._mined is None else self._mined)
        user, item = self.propagate(graph, fused)
        rows = user[batch.user], *batch.split_items(item)
        terms = {"bpr": bpr_loss(*rows)}
        if config.contrastive_weight and self.fusion is not None:
            different = _different(batch.pos_item)
            contrast = fused.new_zeros(())
            for modality, view in views.items():
                present = different[graph[ITEM][mask_name(modality)][different]]
                contrast = contrast + view_contrast(view[present], fused[present], config.temperature)
            terms["contrastive"] = config.contrastive_weight * contrast
        terms["l2"] = config.l2_weight * l2_loss(*rows)
        return terms


def _different(item: Tensor) -> Tensor:
    """The different items of a batch; of several processes, each has those that none before it has."""
    items, first = ranks.gather_rows(item)
    own = item.unique()
    return own[~torch.isin(own, items[:first])]
