"""FREEDOM: Freezing and Denoising Graph Structures for Multimodal Recommendation (arXiv 2211.06924)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor
from torch_geometric.data import HeteroData

from dream_pyg.graph.edges import add_interaction_edges
from dream_pyg.graph.schema import (
    INTERACTS,
    ITEM,
    USER,
    feature_modalities,
    knn_edge,
    knn_modalities,
    label_name,
    mask_name,
)
from dream_pyg.models.base import (
    Batch,
    Embeddings,
    Recommender,
    fusion_weights,
    model_config,
    require_modalities,
    xavier_embedding,
)
from dream_pyg.models.lightgcn import propagate_interactions
from dream_pyg.models.space import RATE, Choice, ImageShare, LogRange, Space
from dream_pyg.nn.fusion import weighted_sum
from dream_pyg.nn.item_features import FeatureScaling, feature_projections
from dream_pyg.nn.losses import bpr_loss
from dream_pyg.nn.propagation import Propagation

_PAPER_WEIGHTS = {"image": 0.1, "text": 0.9}


class FREEDOM(Recommender):
    r"""LightGCN over pruned interactions, plus items over a frozen item-item graph (arXiv 2211.06924, Section 3).

    With :math:`\mathbf S = \sum_m \alpha_m \mathbf S_m` the weighted sum of the modalities' normalised kNN graphs and
    :math:`\bar{\mathbf E}` the mean over LightGCN's layers,

    .. math::
        \mathbf h_u = \bar{\mathbf e}_u, \qquad
        \mathbf h_i = \bar{\mathbf e}_i + (\mathbf S^{L_i} \mathbf E^{(0)})_i, \qquad
        \mathbf h_{m,i} = \mathbf x_{m,i} \mathbf W_m

    .. math::
        \mathcal L = -\frac1B \sum \log \sigma(\mathbf h_u \cdot (\mathbf h_i - \mathbf h_j))
        - \lambda \sum_m \frac1{B_m} \sum \log \sigma(\mathbf h_u \cdot (\mathbf h_{m,i} - \mathbf h_{m,j}))

    with :math:`B_m` the number of triplets whose items have the modality. Training propagates over a share of the
    interactions, drawn without replacement with probability proportional to :math:`1 / \sqrt{d_u d_i}` and normalised
    again; scores :math:`\mathbf h_u \cdot \mathbf h_i` come from them all. The fused graph is never built: each of its
    hops is the weighted sum of the modalities' hops.

    Note:
        Fidelity: both graphs, the pruning and the losses are EXACT, if the graph was built with self as one of the
        neighbours (``include_self``), which is how the authors build it. The projection has no bias, as one would
        cancel. The weight of images, the layers and the absence of L2 are the authors' own. CHOSEN: features are
        inputs in rows of norm 1, while the authors' code trains them on as parameters, unscaled; a triplet counts for a
        modality if both its items have it; :math:`\lambda` and the pruned share are each one end of the range that the
        authors search.
    """

    @model_config
    class Config:
        """Hyper-parameters of FREEDOM."""

        embedding_dim: PositiveInt = 64
        """Width of the embeddings."""
        num_layers: NonNegativeInt = 2
        """Hops over the user-item graph."""
        num_item_layers: NonNegativeInt = 1
        """Hops over the item-item graph."""
        pruning_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.8
        """Share of the interactions that an epoch leaves out of propagation."""
        modality_bpr_weight: NonNegativeFloat = 1e-3
        """lambda: weight of BPR on each modality."""
        modality_weights: dict[str, NonNegativeFloat] | None = None
        """alpha_m by modality, scaled to sum to 1; by default 0.1 image and 0.9 text if these are all, else equal."""
        feature_scaling: FeatureScaling = "unit"
        """Item features before the projection: as given, in rows of norm 1, or in rows of norm sqrt(F)."""

    # arXiv 2211.06924, Section 4.1: pruning 0.8 or 0.9, lambda from 0 to 0.001.
    search_space: ClassVar[Space] = {
        **RATE,
        "model.pruning_ratio": Choice((0.7, 0.8, 0.9)),
        "model.modality_bpr_weight": LogRange(1e-5, 1e-1),
        "model.modality_weights": ImageShare(0.0, 1.0, of_paper=0.1),
    }

    needs_item_knn: ClassVar[bool] = True

    @classmethod
    def reads_features(cls, config: Any) -> bool:
        """If they have a BPR of their own."""
        return bool(config.modality_bpr_weight)

    def __init__(self, graph: HeteroData, config: Any = None) -> None:
        super().__init__(graph, config)
        self.modality_weights = item_graph_weights(graph, self.config.modality_weights, "FREEDOM")
        dim, scaling = self.config.embedding_dim, self.config.feature_scaling
        self.user_embedding = xavier_embedding(self.num_users, dim)
        self.item_embedding = xavier_embedding(self.num_items, dim)
        # Features are for their own BPR only; without it, they would be parameters that nothing trains.
        with_features = feature_modalities(graph) if self.config.modality_bpr_weight else []
        with_features = [modality for modality in with_features if modality in self.modality_weights]
        self.projections = feature_projections(graph, with_features, dim, scaling=scaling, bias=False)
        self.propagation = Propagation()
        self._pruned: HeteroData | None = None

    def on_epoch_start(self, graph: HeteroData, generator: torch.Generator) -> None:
        """Draw the interactions that the epoch propagates over."""
        self._pruned = prune_interactions(graph, self.config.pruning_ratio, generator)

    def forward(self, graph: HeteroData) -> Embeddings:
        """Users and items from all interactions."""
        return self.propagate(graph, graph)

    def propagate(self, graph: HeteroData, interactions: HeteroData) -> Embeddings:
        """LightGCN over ``interactions``, plus items over the fused item-item graph of ``graph``."""
        user, item = propagate_interactions(
            self.propagation, interactions, self.user_embedding, self.item_embedding, self.config.num_layers
        )
        neighborhood: Tensor = self.item_embedding
        for _ in range(self.config.num_item_layers):
            neighborhood = fused_item_hop(self.propagation, graph, self.modality_weights, neighborhood)
        return Embeddings(user, item + neighborhood)

    def loss(self, graph: HeteroData, batch: Batch) -> dict[str, Tensor]:
        """BPR on the representations and on each modality, from the interactions that the epoch drew."""
        embeddings = self.propagate(graph, graph if self._pruned is None else self._pruned)
        user, *own_items = batch.rows(*embeddings)
        terms = {"bpr": bpr_loss(user, *own_items)}
        items = torch.cat([batch.pos_item, batch.neg_item])
        for modality, projection in self.projections.items():
            pos_item, neg_item = projection(graph, items).chunk(2)
            has_pos, has_neg = graph[ITEM][mask_name(modality)][items].chunk(2)
            bpr = bpr_loss(user, pos_item, neg_item, has_pos & has_neg)
            terms[f"{modality}_bpr"] = self.config.modality_bpr_weight * bpr
        return terms


def item_graph_weights(graph: HeteroData, weights: Mapping[str, float] | None, model: str) -> dict[str, float]:
    """The weight of each modality in the fused item-item graph, together 1.

    Args:
        graph: The graph.
        weights: Relative weights; by default the paper's if the modalities are its own, else all are equal.
        model: Who asks, for errors.

    Raises:
        ConfigError: If there is no such graph, or none for a modality with a weight.
    """
    available = require_modalities(knn_modalities(graph), model, "an item-item kNN graph")
    return fusion_weights(available, weights, published=_PAPER_WEIGHTS, what="item-item kNN graphs")


def fused_item_hop(propagation: Propagation, graph: HeteroData, weights: Mapping[str, float], item: Tensor) -> Tensor:
    """One hop over the weighted sum of the modalities' item-item graphs, which is never built."""
    stores = [graph[knn_edge(ITEM, modality)] for modality in weights]
    views = [propagation(item, store.edge_index, store.edge_weight) for store in stores]
    return weighted_sum(views, list(weights.values()))


def prune_interactions(graph: HeteroData, ratio: float, generator: torch.Generator) -> HeteroData:
    r"""Degree-sensitive edge pruning: keep interactions with probability proportional to :math:`1/\sqrt{d_u d_i}`.

    Args:
        graph: The graph; its ``edge_weight`` on interactions is that probability, but for a factor.
        ratio: Share of the interactions to leave out; at least one stays.
        generator: What chance is drawn from.

    Returns:
        A graph of the interactions kept, in both directions, normalised by their own degrees.
    """
    edges = graph[INTERACTS]
    num_kept = max(1, int(edges.edge_weight.numel() * (1 - ratio)))
    # The first arrivals among independent exponential clocks are a draw without replacement by their rates; unlike
    # torch.multinomial, this has no limit of 2^24 edges.
    clock = torch.empty(edges.edge_weight.numel()).exponential_(generator=generator)
    arrival = clock.to(edges.edge_weight.device) / edges.edge_weight
    kept = arrival.topk(num_kept, largest=False, sorted=False).indices
    pruned = HeteroData()
    pruned[USER].num_nodes, pruned[ITEM].num_nodes = graph[USER].num_nodes, graph[ITEM].num_nodes
    pruned[INTERACTS][label_name("train")] = edges.edge_index.as_tensor()[:, kept]
    add_interaction_edges(pruned)
    return pruned
