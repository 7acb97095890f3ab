"""The modal-specific filter gate of DREAM."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dream_pyg.nn.item_features import multiply_features


class FilterGate(nn.Module):
    r"""Filters behavior-unrelated noise from a modality (DREAM, arXiv 2404.11119, Eq. 4).

    .. math::
        \hat{\mathbf{E}}_m = \sigma(\mathbf{E}_m \mathbf{W} + \mathbf{b}) \odot \mathbf{E}_B

    The product :math:`\mathbf{E}_m \mathbf{W}` is taken apart from the gate: a user's modal feature is the mean of
    item features, so :math:`\mathbf{E}_m^u \mathbf{W} = \mathbf{M} (\mathbf{E}_m^i \mathbf{W})` and only the item
    rows are ever projected.

    Args:
        num_features: Width of the raw features F.
        embedding_dim: Width of the ID embeddings D.
    """

    def __init__(self, num_features: int, embedding_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_features, embedding_dim))
        self.bias = nn.Parameter(torch.zeros(embedding_dim))
        nn.init.xavier_uniform_(self.weight)

    def project(self, features: Tensor) -> Tensor:
        """Project raw features (N, F) to (N, D), without the bias."""
        return multiply_features(features, self.weight)

    def forward(self, projected: Tensor, embedding: Tensor) -> Tensor:
        """Gate ID embeddings (N, D) by projected features (N, D)."""
        return torch.sigmoid_(projected + self.bias) * embedding
