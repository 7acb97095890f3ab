"""Fusion of what several modalities say of the same rows, by attention and by contrast."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dream_pyg import ranks
from dream_pyg.nn.item_structure import unit_or_zero


def weighted_sum(views: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The sum of views (N, D), each times its weight, without a copy of any but the first."""
    total = views[0] * weights[0]
    for view, weight in zip(views[1:], weights[1:], strict=True):
        total = torch.add(total, view, alpha=weight)
    return total


class AttentionFusion(nn.Module):
    r"""The sum of views, weighted row by row (MICRO, arXiv 2111.00678, Section 3).

    .. math::
        a_m = \mathrm{softmax}_m\left(\mathbf q \cdot \tanh(\mathbf h_m \mathbf W + \mathbf b)\right), \qquad
        \mathbf h = \sum_m a_m \mathbf h_m

    Args:
        dim: Width of the rows D.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(dim, dim)
        self.query = nn.Linear(dim, 1, bias=False)

    def forward(self, views: Sequence[Tensor]) -> Tensor:
        """Fuse views (N, D) of the same rows into one (N, D)."""
        stacked = torch.stack(list(views))
        return (self.query(torch.tanh(self.hidden(stacked))).softmax(dim=0) * stacked).sum(dim=0)


def view_contrast(view: Tensor, fused: Tensor, temperature: float) -> Tensor:
    r"""Tells each row of a view from all others by its fused row (MICRO, arXiv 2111.00678, Section 3).

    With :math:`\theta` the cosine over :math:`\tau`,

    .. math::
        -\frac1B \sum_b \log \frac{\exp \theta(\mathbf v_b, \mathbf f_b)}
        {\sum_{b'} \exp \theta(\mathbf v_b, \mathbf f_{b'}) + \sum_{b' \ne b} \exp \theta(\mathbf v_b, \mathbf v_{b'})}

    Args:
        view: Rows of one modality (B, D), of different nodes.
        fused: Fused rows of the same nodes (B, D).
        temperature: :math:`\tau`.

    Returns:
        The mean over the rows, 0 if there are none.
    """
    view, fused = unit_or_zero(view), unit_or_zero(fused)
    (views, first), (fused, _) = ranks.gather_rows(view), ranks.gather_rows(fused)
    positive = torch.arange(first, first + len(view), device=view.device)
    own = torch.arange(len(views), device=view.device) == positive.unsqueeze(1)
    within = (view @ views.T).masked_fill(own, -torch.inf)
    logits = torch.cat([view @ fused.T, within], dim=1) / temperature
    total = F.cross_entropy(logits, positive, reduction="sum")
    return total * ranks.num_ranks() / max(len(views), 1)
