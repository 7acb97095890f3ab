"""Add-EASE: Closed-Form Models for Collaborative Filtering with Side-Information (doi 10.1145/3383313.3418480)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor
from torch_geometric.data import HeteroData

from dream_pyg.graph.schema import ITEM, feature_modalities, feature_name, mask_name
from dream_pyg.models.base import fusion_weights, model_config, require_modalities
from dream_pyg.models.ease import EASE
from dream_pyg.models.space import ImageShare, LogRange, Range, Space

_CHOSEN_WEIGHTS = {"image": 0.1, "text": 0.9}


class AddEASE(EASE):
    r"""EASE on interactions plus EASE on each modality's features (doi 10.1145/3383313.3418480, Section 3.2).

    Features are a second matrix whose columns are items: :math:`\mathbf B_m` reproduces, without self-connections, the
    features of each item from those of the others. Both are solved apart and added,

    .. math::
        \mathbf P_m = (\mathbf F_m \mathbf F_m^\top + \lambda_F \mathbf I)^{-1}, \qquad
        \hat y_{ui} = \mathbf x_u \Big( (1 - \beta) \mathbf B
        + \beta \sum_m \alpha_m \mathbf B_m \Big)_{:i}

    with :math:`\mathbf F_m` (I, F) the features, centred and in rows of norm 1. A matrix of rank F needs no (I, I)
    inverse: with :math:`\mathbf F_m^\top \mathbf F_m + \lambda_F \mathbf I = \mathbf L \mathbf L^\top` and
    :math:`\mathbf Z = \mathbf F_m \mathbf L^{-\top}`,

    .. math::
        \lambda_F \mathbf P_m = \mathbf I - \mathbf Z \mathbf Z^\top, \qquad
        B_{m,ij} = \frac{\mathbf z_i \cdot \mathbf z_j}{1 - \lVert \mathbf z_j \rVert^2} \; (i \ne j)

    so that features add no (I, I) matrix to the memory of :class:`~dream_pyg.models.ease.EASE`, but some of (I, F) in
    float64, of one modality at a time. An item that lacks a modality has neither weights nor influence in it.

    Note:
        Fidelity: both regressions and their sum are EXACT; the paper's features are sparse tags. CHOSEN: dense features
        that are centred and scaled to norm 1, as public re-runs on the field's data do ("Add-EASE-emb"), and several
        modalities, each solved apart like the paper's one. The defaults were chosen on the validation split of Amazon
        Baby; a larger ``feature_l2_weight`` makes :math:`\mathbf B_m` smaller and asks for a larger share.
    """

    @model_config
    class Config(EASE.Config):
        """Hyper-parameters of Add-EASE."""

        feature_l2_weight: PositiveFloat = 50.0
        """lambda_F: weight of the squared norm of B_m."""
        feature_share: Annotated[float, Field(ge=0, le=1)] = 0.45
        """beta: the share of features in the weights."""
        modality_weights: dict[str, NonNegativeFloat] | None = None
        """alpha_m by modality, scaled to sum to 1; by default 0.1 image and 0.9 text if these are all, else equal."""
        center_features: bool = True
        """Whether features are taken as differences from their mean over the items that have them."""

    # Grids of arXiv 1905.03375 and doi 10.1145/3383313.3418480, rounded outwards.
    search_space: ClassVar[Space] = {
        "model.l2_weight": LogRange(1.0, 1e4),
        "model.feature_l2_weight": LogRange(1.0, 1e4),
        "model.feature_share": Range(0.0, 1.0),
        "model.modality_weights": ImageShare(0.0, 1.0, of_paper=0.1),
    }

    needs_features: ClassVar[bool] = True

    def __init__(self, graph: HeteroData, config: Any = None) -> None:
        super().__init__(graph, config)
        available = require_modalities(feature_modalities(graph), "Add-EASE")
        self.modality_weights = fusion_weights(available, self.config.modality_weights, published=_CHOSEN_WEIGHTS)

    @torch.no_grad()
    def fit(self, graph: HeteroData) -> None:
        """Compute the sum of all B (I, I), the only matrix that stays."""
        super().fit(graph)
        share = self.config.feature_share
        self.weight.mul_(1 - share)
        for modality, weight in self.modality_weights.items():
            factor = self._factor(graph, modality)
            scale = share * weight / (1 - factor.square().sum(dim=1))
            self.weight.addmm_(factor.to(self.weight.dtype), (factor * scale[:, None]).to(self.weight.dtype).T)
        self.weight.fill_diagonal_(0)

    def _factor(self, graph: HeteroData, modality: str) -> Tensor:
        """Z of a modality (I, F), in float64: 1 - |z|^2 is small for an item that others reproduce badly."""
        features, has = graph[ITEM][feature_name(modality)].double(), graph[ITEM][mask_name(modality)][:, None]
        if self.config.center_features:
            features = (features - features.sum(dim=0) / has.sum().clamp(min=1)) * has
        features = torch.nn.functional.normalize(features, dim=1)
        gram = features.T @ features
        gram.diagonal().add_(self.config.feature_l2_weight)
        return torch.linalg.solve_triangular(torch.linalg.cholesky(gram), features.T, upper=False).T
