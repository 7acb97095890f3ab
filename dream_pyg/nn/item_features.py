"""Item features of a modality, scaled and projected to the embeddings' width."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn
from torch_geometric.data import HeteroData

from dream_pyg.graph.schema import ITEM, feature_name, mask_name, norm_name

FeatureScaling = Literal["raw", "unit", "rms"]
"""Item features as given, in rows of norm 1, or in rows of norm sqrt(F)."""


def multiply_features(features: Tensor, weight: Tensor) -> Tensor:
    """Features (N, F) times a matrix (F, D) in the matrix's type; bfloat16 features are multiplied as they are."""
    if features.dtype == torch.bfloat16:
        return (features @ weight.to(torch.bfloat16)).to(weight.dtype)
    return features.to(weight.dtype) @ weight


def feature_rows(graph: HeteroData, modality: str, item: Tensor) -> Tensor:
    """The raw features of some items (B, F), for the caller to change; half precision becomes float32."""
    rows = graph[ITEM][feature_name(modality)].index_select(0, item)  # several times as fast as indexing
    return rows.float() if rows.dtype == torch.float16 else rows


def scale_projection(
    graph: HeteroData, modality: str, projected: Tensor, scaling: FeatureScaling, item: Tensor | None = None
) -> Tensor:
    """Turn the linear projection of raw features into that of scaled ones, which are never built.

    Args:
        graph: The graph.
        modality: The modality.
        projected: Projected raw features (I, D), or those of some items (B, D).
        scaling: How rows of features are scaled.
        item: The ids of these items (B,); by default all.

    Returns:
        The projection of the scaled features, of the same shape.
    """
    if scaling == "raw":
        return projected
    norm = graph[ITEM][norm_name(modality)]
    length = 1.0 if scaling == "unit" else graph[ITEM][feature_name(modality)].size(1) ** 0.5
    return projected * (length / (norm if item is None else norm[item]).clamp(min=1e-12)).unsqueeze(1)


class FeatureProjection(nn.Module):
    r"""The projection of one modality's features, :math:`\mathbf h_m = \mathbf x_m \mathbf W_m + \mathbf b_m`.

    The row of an item that lacks the modality is zero.

    Args:
        graph: The graph, for the width of the features F.
        modality: The modality.
        embedding_dim: Width of the projection D.
        scaling: How rows of features are scaled first.
        bias: Whether there is a :math:`\mathbf b_m`.
    """

    def __init__(
        self, graph: HeteroData, modality: str, embedding_dim: int, *, scaling: FeatureScaling, bias: bool
    ) -> None:
        super().__init__()
        self.modality = modality
        self.scaling = scaling
        self.weight = nn.Parameter(torch.empty(graph[ITEM][feature_name(modality)].size(1), embedding_dim))
        self.bias = nn.Parameter(torch.zeros(embedding_dim)) if bias else None
        nn.init.xavier_uniform_(self.weight)

    def forward(self, graph: HeteroData, item: Tensor | None = None) -> Tensor:
        """Project the features of all items (I, D), or of those with the given ids (B, D)."""
        features = graph[ITEM][feature_name(self.modality)]
        projected = multiply_features(features if item is None else features[item], self.weight)
        projected = scale_projection(graph, self.modality, projected, self.scaling, item)
        if self.bias is None:
            return projected
        has = graph[ITEM][mask_name(self.modality)]
        return projected + self.bias * (has if item is None else has[item]).unsqueeze(1)


def feature_projections(
    graph: HeteroData, modalities: Iterable[str], embedding_dim: int, *, scaling: FeatureScaling, bias: bool
) -> nn.ModuleDict:
    """One :class:`FeatureProjection` for each modality, by name."""
    return nn.ModuleDict(
        {
            modality: FeatureProjection(graph, modality, embedding_dim, scaling=scaling, bias=bias)
            for modality in modalities
        }
    )
