"""Behavior-Modal Alignment as an option of models that were published without it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor, nn
from torch_geometric.data import HeteroData

from dream_pyg.models.base import Batch, fusion_weights, model_config
from dream_pyg.nn.alignment import BehaviorModalAlignment, NegativeWeights
from dream_pyg.nn.signal import SimilaritySignal

PUBLISHED_WEIGHTS = {"image": 0.3, "text": 0.7}
"""Of modalities, as DREAM's authors found them best (Section 4.8.2)."""


@model_config
class AlignmentConfig:
    """Behavior-Modal Alignment added to a model with two lines (Table 4 of DREAM); weights of 0 leave it as it was."""

    intra_weight: NonNegativeFloat = 0.0
    """alpha: weight of the alignment of users with items, in each line (DREAM, Eq. 10)."""
    inter_weight: NonNegativeFloat = 0.0
    """beta: weight of the alignment of the two lines (DREAM, Eq. 11)."""
    signal_weight: NonNegativeFloat = 0.0
    """gamma: weight of the similarity-supervised signal on the modal line (DREAM, Eq. 12)."""
    alignment_temperature: PositiveFloat = 0.2
    """Temperature of both alignments."""
    popularity_correction: Annotated[float, Field(ge=0, le=1)] = 0.0
    """How far in-batch negatives of both alignments are corrected for how often batches have them
    (:class:`~dream_pyg.nn.alignment.NegativeWeights`). Not in the paper."""

    @property
    def aligns(self) -> bool:
        """Whether anything is added."""
        return bool(self.intra_weight or self.inter_weight or self.signal_weight)


class AddedAlignment(nn.Module):
    """Both alignments and the similarity-supervised signal over a batch, as a model's options weigh them.

    Args:
        graph: A graph with the features of every modality.
        config: The weights.
        modalities: The modalities in use.
    """

    def __init__(self, graph: HeteroData, config: AlignmentConfig, modalities: Sequence[str]) -> None:
        super().__init__()
        self.alignment = BehaviorModalAlignment(
            config.intra_weight, config.inter_weight, temperature=config.alignment_temperature
        )
        self.negative_weights = NegativeWeights(graph, config.popularity_correction)
        weights = fusion_weights(modalities, None, published=PUBLISHED_WEIGHTS)
        self.signal = SimilaritySignal(graph, weights, config.signal_weight)

    def forward(
        self,
        graph: HeteroData,
        batch: Batch,
        behavior_user: Tensor,
        behavior_item: Tensor,
        modal_user: Tensor,
        modal_item: Tensor,
    ) -> dict[str, Tensor]:
        """The weighted terms that are added for the users and positive items of a batch, each (B, D) in either line."""
        weights = self.negative_weights(graph, batch.user, batch.pos_item)
        terms = self.alignment(behavior_user, behavior_item, modal_user, modal_item, **weights)
        return terms | self.signal(graph, batch.user, batch.pos_item, modal_user, modal_item)
