"""InfoNCE and the Behavior-Modal Alignment built from it."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dream_pyg import ranks
from dream_pyg.graph.processor import has_bfloat16_units

_LEAST_FUSED_TEMPERATURE = 0.025
"""exp(40) and its reciprocal leave float32 room for sums over any batch."""
_LEAST_ROUNDED_TEMPERATURE = 0.1
"""Rounding logits to bfloat16 moves the gradient by less than 1% from here on, by 0.1% at 0.2; below, by far more."""
_SUMMED_COLUMNS = 256


Precision = Literal["auto", "float32", "bfloat16"]
"""Type of the in-batch products of InfoNCE; ``auto`` is bfloat16 on processors that have units for it, unless the
temperature is so low that the rounding would show."""


def info_nce(
    query: Tensor, key: Tensor, temperature: float, *, normalize: bool = True, dtype: torch.dtype | None = None
) -> Tensor:
    r"""In-batch InfoNCE (arXiv 1807.03748, Eq. 4) where row b of ``key`` is the positive of row b of ``query``.

    .. math::
        -\frac{1}{B} \sum_b \log \frac{\exp(\mathbf{q}_b \cdot \mathbf{k}_b / \tau)}
        {\sum_{b'} \exp(\mathbf{q}_b \cdot \mathbf{k}_{b'} / \tau)}

    Args:
        query: Rows (B, D).
        key: Rows (B, D).
        temperature: :math:`\tau > 0`.
        normalize: Whether rows are scaled to unit length first. Then logits cannot exceed :math:`1/\tau`, and for
            any :math:`\tau` in use one fused function with a single (B, B) buffer computes loss and gradients.
        dtype: Type of the (B, B) buffer and of the products with it, ``torch.bfloat16`` for speed; by default that
            of ``query``. Sums over rows, the loss and both gradients keep the type of ``query``.

    Returns:
        The mean over the batch, a scalar.
    """
    if normalize:
        return unit_info_nce(F.normalize(query, dim=-1), F.normalize(key, dim=-1), temperature, dtype=dtype)
    return _cross_entropy(query, key, temperature)


def unit_info_nce(query: Tensor, key: Tensor, temperature: float, *, dtype: torch.dtype | None = None) -> Tensor:
    """:func:`info_nce` of rows that have unit length already."""
    if temperature < _LEAST_FUSED_TEMPERATURE:
        return _cross_entropy(query, key, temperature)
    key, first = ranks.gather_rows(key)
    return _UnitInfoNCE.apply(query, key, first, len(key) / ranks.num_ranks(), temperature, dtype or query.dtype)


def _cross_entropy(query: Tensor, key: Tensor, temperature: float) -> Tensor:
    key, first = ranks.gather_rows(key)
    positive = torch.arange(first, first + len(query), device=query.device)
    total = F.cross_entropy(query @ key.T / temperature, positive, reduction="sum")
    return total / (len(key) / ranks.num_ranks())


class _UnitInfoNCE(torch.autograd.Function):
    """InfoNCE over unit rows.

    Logits lie between -1/temperature and 1/temperature, so at a temperature that is not tiny no exponential, nor a sum
    of them over any batch, overflows or vanishes, and no pass for the maximum is needed. Backward needs only the
    exponentials and their row sums: q and k get the softmax-weighted sums of each other.

    Queries may be a slice of the batch: their positives are the keys from ``first`` on, and ``count`` is what divides
    the sum over them.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, first: int, count: float, temperature: float, dtype: torch.dtype
    ) -> Tensor:
        bound = 1.0 / temperature
        exponentials = torch.mm((query * bound).to(dtype), key.to(dtype).T).exp_()
        # A bfloat16 sum is precise over a short stretch only, and one in float32 would first copy the whole buffer.
        stretches = exponentials.split(_SUMMED_COLUMNS, dim=1)
        row_sum = torch.stack([stretch.sum(dim=1) for stretch in stretches]).to(query.dtype).sum(dim=0)
        ctx.save_for_backward(query, key, exponentials, row_sum)
        ctx.scale, ctx.own = bound / count, slice(first, first + len(query))
        positive = (query * key[ctx.own]).sum(dim=1) * bound
        return (row_sum.log() - positive).sum() / count

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        query, key, exponentials, row_sum = ctx.saved_tensors
        dtype, scale = exponentials.dtype, grad * ctx.scale
        inverse = row_sum.reciprocal().unsqueeze(1)
        query_grad = key_grad = None
        if ctx.needs_input_grad[0]:
            expected_key = (exponentials @ key.to(dtype)).to(query.dtype) * inverse
            query_grad = (expected_key - key[ctx.own]).mul_(scale)
        if ctx.needs_input_grad[1]:
            # This order of the product spares the large buffer a transposition.
            expected_query = ((query * inverse).to(dtype).T @ exponentials).T.to(query.dtype)
            expected_query[ctx.own] -= query
            key_grad = expected_query.mul_(scale)
        return query_grad, key_grad, None, None, None, None


class BehaviorModalAlignment(nn.Module):
    r"""Aligns two kinds of representation of the same users and items (DREAM, arXiv 2404.11119, Eq. 8-11).

    Intra-alignment pulls a user and an interacted item together inside each line,
    :math:`\mathcal{L}_{Intra} = \mathcal{L}_{BIA} + \mathcal{L}_{MIA}`; inter-alignment pulls the two
    representations of one user, and of one item, together.

    It has no parameters and knows nothing of the model, so any model with two kinds of representation can add it.

    Args:
        intra_weight: Weight of intra-alignment; 0 leaves it out.
        inter_weight: Weight of inter-alignment; 0 leaves it out.
        temperature: :math:`\tau` of every InfoNCE.
        normalize: Whether InfoNCE compares unit rows.
        precision: Type of the in-batch products of float32 representations.

    Note:
        Fidelity: the terms and their direction (users query items, behavior queries modal) are EXACT; unit rows and
        the mean over the batch (the paper writes a sum) are CHOSEN.
    """

    def __init__(
        self,
        intra_weight: float,
        inter_weight: float,
        *,
        temperature: float = 0.2,
        normalize: bool = True,
        precision: Precision = "auto",
    ) -> None:
        super().__init__()
        self.intra_weight = intra_weight
        self.inter_weight = inter_weight
        self.temperature = temperature
        self.normalize = normalize
        self.precision = precision

    def forward(
        self, behavior_user: Tensor, behavior_item: Tensor, modal_user: Tensor, modal_item: Tensor
    ) -> dict[str, Tensor]:
        """Both alignment losses for the users and positive items of a batch.

        Args:
            behavior_user: Behavior representation of the users (B, D).
            behavior_item: Behavior representation of the positive items (B, D).
            modal_user: Modal representation of the same users (B, D).
            modal_item: Modal representation of the same items (B, D).

        Returns:
            The weighted scalars ``intra`` (Eq. 10) and ``inter`` (Eq. 11), without those of weight 0.
        """
        if self.normalize:
            behavior_user, behavior_item, modal_user, modal_item = (
                F.normalize(rows, dim=-1) for rows in (behavior_user, behavior_item, modal_user, modal_item)
            )
        terms = {}
        if self.intra_weight:
            intra = self._info_nce(behavior_user, behavior_item) + self._info_nce(modal_user, modal_item)
            terms["intra"] = self.intra_weight * intra
        if self.inter_weight:
            inter = self._info_nce(behavior_user, modal_user) + self._info_nce(behavior_item, modal_item)
            terms["inter"] = self.inter_weight * inter
        return terms

    def _info_nce(self, query: Tensor, key: Tensor) -> Tensor:
        if not self.normalize:
            return info_nce(query, key, self.temperature, normalize=False)
        auto = self.precision == "auto" and self.temperature >= _LEAST_ROUNDED_TEMPERATURE
        rounded = self.precision == "bfloat16" or (auto and has_bfloat16_units(query.device))
        dtype = torch.bfloat16 if rounded and query.dtype == torch.float32 else None
        return unit_info_nce(query, key, self.temperature, dtype=dtype)

    def extra_repr(self) -> str:
        """What distinguishes this module in a printed model."""
        return (
            f"intra_weight={self.intra_weight}, inter_weight={self.inter_weight}, "
            f"temperature={self.temperature}, normalize={self.normalize}"
        )
