"""DREAM: A Dual Representation Learning Model for Multimodal Recommendation (arXiv 2404.11119)."""

from __future__ import annotations

import functools
import operator
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch_geometric.data import HeteroData

from dream_pyg.graph.sampling import ReceptiveField, sending_rows
from dream_pyg.graph.schema import (
    ITEM,
    REV_INTERACTS,
    USER,
    feature_modalities,
    feature_name,
    knn_edge,
)
from dream_pyg.models.added_alignment import PUBLISHED_WEIGHTS
from dream_pyg.models.base import (
    Batch,
    DualRepresentations,
    Embeddings,
    Recommender,
    Requirements,
    fusion_weights,
    model_config,
    require_modalities,
    xavier_embedding,
)
from dream_pyg.models.lightgcn import propagate_interactions
from dream_pyg.models.space import RATE, ImageShare, LogRange, Space
from dream_pyg.nn.alignment import BehaviorModalAlignment, NegativeWeights, Precision
from dream_pyg.nn.batch_shapes import distinct_nodes
from dream_pyg.nn.gates import FilterGate
from dream_pyg.nn.item_features import FeatureScaling, scale_projection
from dream_pyg.nn.losses import bpr_loss, l2_loss
from dream_pyg.nn.propagation import Propagation, mean_of_neighbors
from dream_pyg.nn.signal import SimilaritySignal
from dream_pyg.nn.user_features import mean_over_items


class DREAM(Recommender):
    r"""Two lines of representation, aligned and added (arXiv 2404.11119; equations as numbered in its first version).

    The behavior line is LightGCN over the user-item graph (Eq. 1-3). The modal line filters the ID embeddings by
    each modality's features (Eq. 4), passes them once over the modality's item-item and user-user graphs (Eq. 5-6)
    and fuses modalities by weight (Eq. 7). Representations are the sum of both lines (Eq. 13), scores inner products
    (Eq. 16), and the loss is

    .. math::
        \mathcal L = \mathcal L_{BPR} + \alpha \mathcal L_{Intra} + \beta \mathcal L_{Inter}
        + \gamma \mathcal L_{SSS} + \lambda \mathcal L_2
        \qquad (8\text{-}12, 14, 15)

    Args:
        graph: A graph with features, and with the item-item and user-user edges that the config uses, for every
            modality in use.
        config: Hyper-parameters.

    Raises:
        ConfigError: If the graph lacks a modality that the config names, or has none.

    Note:
        Fidelity, by field of :class:`Config`. EXACT: ``embedding_dim``, ``num_layers``, ``temperature``, the value of
        ``l2_weight``, the additive fusion. CHOSEN by measurement: ``feature_scaling``,
        ``normalize_alignment``, ``normalize_signal``, ``center_signal``, ``squared_signal``, and batch means in place
        of sums; and the target of Eq. 12, which is the weighted mean over modalities of the cosines of their raw
        features, where the paper multiplies weighted sums over modalities, whose features must have one width then; L2
        is on the batch's ID embeddings, per example; an item or user that lacks a modality has zeros there, and the
        others weigh no more for it. UNKNOWN in the paper: the three loss weights and the number of neighbours, whose
        defaults were chosen on validation, and ``gate_input``, by default as in MGCN, whose gate it is; the other
        reading measures better in DREAM, and the presets ``paper`` and ``baby`` have it.
    """

    @model_config
    class Config:
        """Hyper-parameters of DREAM; a loss weight of 0 removes its term (the ablations of Table 3)."""

        embedding_dim: PositiveInt = 64
        """Width of a user's and of an item's row, in each line."""
        num_layers: NonNegativeInt = 2
        """Hops of the behavior line (Eq. 2)."""
        temperature: PositiveFloat = 0.2
        """Temperature of every InfoNCE (Eq. 8-11)."""
        intra_weight: NonNegativeFloat = 0.01
        """alpha of Eq. 15."""
        inter_weight: NonNegativeFloat = 0.001
        """beta of Eq. 15."""
        signal_weight: NonNegativeFloat = 0.01
        """gamma of Eq. 15."""
        l2_weight: NonNegativeFloat = 1e-4
        """lambda: weight of the L2 term on the batch's ID embeddings."""
        modality_weights: dict[str, NonNegativeFloat] | None = None
        """alpha_m of Eq. 7 by modality, scaled to sum to 1; by default 0.3 image and 0.7 text (Section 4.8.2) if these
        are all the graph has, else equal."""
        gate_input: Literal["id", "propagated"] = "id"
        """What the gate filters: the ID embedding (layer 0) or the behavior representation (mean over layers)."""
        feature_scaling: FeatureScaling = "unit"
        """Item features in the gate: as given, in rows of norm 1, or in rows of norm sqrt(F)."""
        use_gate: bool = True
        """Whether features gate the ID embedding; without, the modal line propagates it unfiltered."""
        use_item_graph: bool = True
        """Whether items pass messages over the relation graph (Eq. 6)."""
        use_user_graph: bool = True
        """Whether users pass messages over the relation graph (Eq. 6)."""
        normalize_alignment: bool = True
        """Whether InfoNCE compares unit rows."""
        normalize_signal: bool = True
        """Whether the signal compares the modal representation by cosine instead of dot product."""
        center_signal: bool = True
        """Whether the signal's target compares features after subtracting their mean over all items that have them.
        Features of one sign (many image and audio encoders) have cosines near 1 for every pair, and an uncentred
        target then only pulls all representations together."""
        squared_signal: bool = True
        """Mean squared error (second version of the paper) instead of the norm (first version) in Eq. 12."""

        user_modal: Literal["user_graph", "items"] = "user_graph"
        """What a user's part of the modal line is: the filtered ID embedding passed over the user-user graphs (Eq. 6),
        or the mean of the modal line over the items that the user took. Not in the paper."""
        popularity_correction: Annotated[float, Field(ge=0, le=1)] = 0.0
        """How far in-batch negatives are corrected for how often batches have them
        (:class:`~dream_pyg.nn.alignment.NegativeWeights`). Not in the paper."""
        alignment_precision: Precision = "auto"
        """Type of the in-batch products of InfoNCE: float32, bfloat16, or by default the latter where it is faster."""

    # Sections 4.4 and 4.8, Figures 8 and 9; layers and temperature are fixed there. A learning rate of 0.003 is better
    # than the paper's 0.001 with any weights, and what is best for one weight depends on the others.
    search_space: ClassVar[Space] = {
        **RATE,
        "model.intra_weight": LogRange(1e-4, 1.0),
        "model.inter_weight": LogRange(1e-4, 1.0),
        "model.signal_weight": LogRange(1e-4, 1.0),
        "model.l2_weight": LogRange(1e-6, 1e-1),
        "model.modality_weights": ImageShare(0.0, 1.0, of_paper=0.3),
    }

    @classmethod
    def reads_features(cls, config: Any) -> bool:
        """For the gates and for the signal."""
        return bool(config.use_gate or config.signal_weight)

    @classmethod
    def requirements(cls, config: Any) -> Requirements:
        """Features, and the relation graphs in use."""
        user_knn = config.use_user_graph and config.user_modal == "user_graph"
        return Requirements(features=True, item_knn=config.use_item_graph, user_knn=user_knn)

    def __init__(self, graph: HeteroData, config: Any = None) -> None:
        super().__init__(graph, config)
        available = require_modalities(feature_modalities(graph), "DREAM")
        self.modality_weights = fusion_weights(available, self.config.modality_weights, published=PUBLISHED_WEIGHTS)
        self.user_embedding = xavier_embedding(self.num_users, self.config.embedding_dim)
        self.item_embedding = xavier_embedding(self.num_items, self.config.embedding_dim)
        self.gates = nn.ModuleDict(
            {
                modality: FilterGate(graph[ITEM][feature_name(modality)].size(1), self.config.embedding_dim)
                for modality in self.modality_weights
                if self.config.use_gate
            }
        )
        self.propagation = Propagation()
        self.negative_weights = NegativeWeights(graph, self.config.popularity_correction)
        self.alignment = BehaviorModalAlignment(
            self.config.intra_weight,
            self.config.inter_weight,
            temperature=self.config.temperature,
            normalize=self.config.normalize_alignment,
            precision=self.config.alignment_precision,
        )
        self.signal = SimilaritySignal(
            graph,
            self.modality_weights,
            self.config.signal_weight,
            normalize=self.config.normalize_signal,
            center=self.config.center_signal,
            squared=self.config.squared_signal,
        )

    def forward(self, graph: HeteroData) -> Embeddings:
        """The sum of both lines (Eq. 13)."""
        behavior, modal = self.dual_representations(graph)
        return Embeddings(behavior.user + modal.user, behavior.item + modal.item)

    def dual_representations(self, graph: HeteroData) -> DualRepresentations:
        """The behavior line (Eq. 3) and the modal line (Eq. 7)."""
        return self._lines(graph, self.initial_embeddings(graph))

    @classmethod
    def needs_whole_graph(cls, config: Any) -> str | None:
        """The option for which a batch's neighbours are not enough."""
        reads_more = config.user_modal == "items"
        return "with user_modal = 'items' it reads more than a batch's neighbours" if reads_more else None

    def receptive_field(self) -> ReceptiveField:
        """The behavior line's hops, a hop over each relation graph, and the features of what passes it."""
        modalities = tuple(self.modality_weights)
        return ReceptiveField(
            num_hops=self.config.num_layers,
            item_knn=modalities if self.config.use_item_graph else (),
            user_knn=modalities if self.config.use_user_graph else (),
            features=modalities if self.reads_features(self.config) else (),
            user_features=self.reads_features(self.config),
            relations_after_hops=self.config.gate_input == "propagated",
        )

    def _lines(self, graph: HeteroData, initial: Embeddings) -> DualRepresentations:
        behavior = propagate_interactions(self.propagation, graph, *initial, self.config.num_layers)
        source = behavior if self.config.gate_input == "propagated" else initial
        modal = self.modal_line(graph, source)
        if len(behavior.user) != len(modal.user) or len(behavior.item) != len(modal.item):
            # Of a sampled graph, the behavior line has come to the batch's neighbours as well.
            behavior = Embeddings(behavior.user[: len(modal.user)], behavior.item[: len(modal.item)])
        return DualRepresentations(behavior, modal)

    def modal_line(self, graph: HeteroData, source: Embeddings) -> Embeddings:
        """Filter gates, one hop over each relation graph, and the weighted sum over modalities (Eq. 4-7).

        Args:
            graph: The graph.
            source: What the gates filter.
        """
        filtered = {modality: self.filter(graph, modality, source) for modality in self.modality_weights}
        item = self._fuse(graph, ITEM, {modality: rows.item for modality, rows in filtered.items()})
        if self.config.user_modal == "items":
            return Embeddings(mean_of_neighbors(self.propagation, item, graph[REV_INTERACTS].edge_index), item)
        return Embeddings(self._fuse(graph, USER, {modality: rows.user for modality, rows in filtered.items()}), item)

    def filter(self, graph: HeteroData, modality: str, source: Embeddings) -> Embeddings:
        """The modality's filter gate on users and items (Eq. 4).

        In a sampled graph these are the nodes that may send over its relation graph. Users whose modal line comes from
        their items are left as they are.
        """
        user = sending_rows(graph[USER], modality, source.user)
        source = Embeddings(user, sending_rows(graph[ITEM], modality, source.item))
        if not self.config.use_gate:
            return source
        gate = cast(FilterGate, self.gates[modality])
        item = gate.project(graph[ITEM][feature_name(modality)])
        item = scale_projection(graph, modality, item, self.config.feature_scaling)
        filtered = gate(item[: len(source.item)], source.item)
        if self.config.user_modal == "items":
            return Embeddings(source.user, filtered)
        return Embeddings(gate(mean_over_items(self.propagation, graph, modality, item), source.user), filtered)

    def loss(self, graph: HeteroData, batch: Batch) -> dict[str, Tensor]:
        """The terms of Eq. 15 and the L2 term, weighted."""
        config = self.config
        initial = self.initial_embeddings(graph)
        behavior, modal = self._lines(graph, initial)
        # A batch has some users and many items more than once: what is done with them is done once.
        user, user_row = distinct_nodes(graph, USER, batch.user)
        item, item_row = distinct_nodes(graph, ITEM, batch.pos_item)
        behavior_user, modal_user = behavior.user.index_select(0, user), modal.user.index_select(0, user)
        items = torch.cat([item, batch.neg_item])
        (behavior_item, behavior_neg), (modal_item, modal_neg) = (
            line.item.index_select(0, items).split([len(item), len(batch.neg_item)]) for line in (behavior, modal)
        )

        general_user = (behavior_user + modal_user).index_select(0, user_row)
        general_item = (behavior_item + modal_item).index_select(0, item_row)
        terms = {"bpr": bpr_loss(general_user, general_item, behavior_neg + modal_neg)}
        terms |= self.alignment(
            behavior_user,
            behavior_item,
            modal_user,
            modal_item,
            user_row=user_row,
            item_row=item_row,
            **self.negative_weights(graph, user, item),
        )
        terms |= self.signal(graph, user, item, modal_user, modal_item, user_row=user_row, item_row=item_row)
        if config.l2_weight:
            terms["l2"] = config.l2_weight * l2_loss(*batch.rows(*initial))
        return terms

    def _fuse(self, graph: HeteroData, node: str, filtered: dict[str, Tensor]) -> Tensor:
        """One hop over each modality's relation graph (Eq. 6), and the weighted sum (Eq. 7)."""
        use_graph = self.config.use_user_graph if node == USER else self.config.use_item_graph
        views = []
        for modality, x in filtered.items():
            weight = self.modality_weights[modality]
            if use_graph:
                store = graph[knn_edge(node, modality)]
                views.append(self.propagation(x, store.edge_index, weight * store.edge_weight))
            else:
                views.append(weight * x)
        return functools.reduce(operator.add, views)
