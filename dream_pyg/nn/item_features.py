"""Item features of a modality, scaled and projected to the embeddings' width."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch_geometric.data import HeteroData

from dream_pyg.graph.processor import has_bfloat16_units, has_onednn_product, onednn_product
from dream_pyg.graph.schema import ITEM, feature_name, mask_name, norm_name

FeatureScaling = Literal["raw", "unit", "rms"]
"""Item features as given, in rows of norm 1, or in rows of norm sqrt(F)."""

_LEAST_ONEDNN_SIZE = 1024
_CONVERTED_ROWS = 1 << 14
_CONVERTED_NUMBERS = 1 << 20  # in float32 at a time, which a cache holds
_ROWS_TOGETHER = 512  # of a converted block, as oneDNN makes kernels for each shape


def multiply_features(features: Tensor, matrix: Tensor) -> Tensor:
    """Features, which mostly have no gradient, times a matrix, which has.

    Args:
        features: Features (N, F), or their transpose. Those in bfloat16 are multiplied as they are; those in float16
            in bfloat16 where the processor has units for it, and without a converted copy of all of them.
        matrix: The matrix (F, D).

    Returns:
        The product in the type of the matrix (N, D).
    """
    if features.dtype == torch.float16:
        rounded = matrix.dtype == torch.float32 and has_bfloat16_units(matrix.device)
        blocks = features.split(_CONVERTED_ROWS)
        converted = (_to_bfloat16(block) if rounded else block.to(matrix.dtype) for block in blocks)
        return torch.cat([multiply_features(block, matrix) for block in converted])[: len(features)]
    if features.dtype != torch.bfloat16 or features.requires_grad:
        features = features.to(matrix.dtype)
    is_fixed = features.dtype == torch.bfloat16 or _suits_onednn(features)
    return _FixedProduct.apply(features, matrix) if is_fixed else features @ matrix


def _to_bfloat16(features: Tensor) -> Tensor:
    """Features in float16 as bfloat16, by way of float32: the same numbers in a fifth of the time on a CPU.

    Zeros follow, up to a number of rows that comes often.
    """
    filled = len(features) + -len(features) % _ROWS_TOGETHER
    converted = torch.empty(filled, features.size(1), dtype=torch.bfloat16, device=features.device)
    converted[len(features) :] = 0
    rows = max(1, _CONVERTED_NUMBERS // max(1, features.size(1)))
    for part, target in zip(features.split(rows), converted[: len(features)].split(rows), strict=True):
        target.copy_(part.float())
    return converted


class _FixedProduct(torch.autograd.Function):
    """The product with features that have no gradient, forward and backward by the kernel that is fastest here."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, matrix: Tensor) -> Tensor:
        ctx.save_for_backward(features)
        return _product(features, matrix)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        (features,) = ctx.saved_tensors
        return None, _product(features.T, grad)


def _product(features: Tensor, matrix: Tensor) -> Tensor:
    # All kernels want features in rows: of a transpose, the product is transposed as a whole.
    in_rows = features.is_contiguous()
    if features.dtype == torch.bfloat16:
        factor = matrix.to(torch.bfloat16)
        return (features @ factor if in_rows else (factor.T @ features.T).T).to(matrix.dtype)
    # As long as `@` leaves float32 to a BLAS without kernels for such shapes.
    return onednn_product(features, matrix.T) if in_rows else onednn_product(matrix.T.contiguous(), features).T


def _suits_onednn(features: Tensor) -> bool:
    """Whether wide features were measured to be faster so: 1.2 to 1.6 times with AVX-512, 1.2 to 1.9 with AVX2."""
    return (
        features.dtype == torch.float32
        and not features.requires_grad
        and min(features.shape) >= _LEAST_ONEDNN_SIZE
        and has_onednn_product(features.device)
    )


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
        trained: Whether the features, scaled once, are where a table of parameters (I, F) begins, which is trained on.
    """

    def __init__(
        self,
        graph: HeteroData,
        modality: str,
        embedding_dim: int,
        *,
        scaling: FeatureScaling,
        bias: bool,
        trained: bool = False,
    ) -> None:
        super().__init__()
        self.modality = modality
        self.scaling = scaling
        self.weight = nn.Parameter(torch.empty(graph[ITEM][feature_name(modality)].size(1), embedding_dim))
        self.bias = nn.Parameter(torch.zeros(embedding_dim)) if bias else None
        self.features: nn.Parameter | None = None
        if trained:
            given = graph[ITEM][feature_name(modality)].to(self.weight.dtype)
            self.features = nn.Parameter(scale_projection(graph, modality, given, scaling).to(self.weight, copy=True))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, graph: HeteroData, item: Tensor | None = None) -> Tensor:
        """Project the features of all items (I, D), or of those with the given ids (B, D)."""
        features = graph[ITEM][feature_name(self.modality)] if self.features is None else self.features
        projected = multiply_features(features if item is None else features[item], self.weight)
        if self.features is None:
            projected = scale_projection(graph, self.modality, projected, self.scaling, item)
        if self.bias is not None:
            projected = projected + self.bias
        elif self.features is None:
            return projected
        has = graph[ITEM][mask_name(self.modality)]
        return projected * (has if item is None else has[item]).unsqueeze(1)


def feature_projections(
    graph: HeteroData, modalities: Iterable[str], embedding_dim: int, **options: Any
) -> nn.ModuleDict:
    """One :class:`FeatureProjection` for each modality, by name, all with the same options."""
    return nn.ModuleDict(
        {modality: FeatureProjection(graph, modality, embedding_dim, **options) for modality in modalities}
    )
