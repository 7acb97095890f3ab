"""InfoNCE and the Behavior-Modal Alignment built from it."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

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


def unit_info_nce(
    query: Tensor,
    key: Tensor,
    temperature: float,
    *,
    pairs: Pairs | None = None,
    key_weight: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """:func:`info_nce` of rows that have unit length already.

    Args:
        query: Rows (Q, D).
        key: Rows (K, D).
        temperature: As there.
        pairs: Which query and which key each example of the batch has; by default row b of both. So a row is multiplied
            once however often the batch has it.
        key_weight: Factor of each key's exponential in the sum below the fraction (K,), by default 1.
        dtype: As there.
    """
    fused = temperature >= _LEAST_FUSED_TEMPERATURE
    if pairs is not None and (not fused or ranks.num_ranks() > 1):
        query, key, key_weight = pairs.examples(query, key, key_weight)
        pairs = None
    if not fused:
        return _cross_entropy(query, key, temperature, key_weight)
    if pairs is None:
        key, first = ranks.gather_rows(key)
        own = torch.arange(len(query), device=query.device)
        pairs, count = Pairs(own, own + first), len(key) / ranks.num_ranks()
        key_count = key.new_ones(len(key)) if key_weight is None else ranks.gather_rows(key_weight)[0]
    else:
        key_count, count = _counts(pairs.key, key), len(pairs.key)
        if key_weight is not None:
            key_count.mul_(key_weight)
    return _UnitInfoNCE.apply(query, key, *pairs, key_count, count, temperature, dtype or query.dtype)


class Pairs(NamedTuple):
    """The examples of a batch as positions of their rows, each (B,)."""

    query: Tensor
    key: Tensor

    def examples(self, query: Tensor, key: Tensor, key_weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """The query, the key and its weight of each example, repeated as the batch has them."""
        return query[self.query], key[self.key], None if key_weight is None else key_weight[self.key]


def _counts(position: Tensor, rows: Tensor) -> Tensor:
    """How often each row comes among positions, in the type of the rows; unlike bincount, a GPU need not wait."""
    return rows.new_zeros(len(rows)).index_add_(0, position, rows.new_ones(len(position)))


def _cross_entropy(query: Tensor, key: Tensor, temperature: float, key_weight: Tensor | None = None) -> Tensor:
    key, first = ranks.gather_rows(key)
    positive = torch.arange(first, first + len(query), device=query.device)
    logits, constant = query @ key.T / temperature, query.new_zeros(())
    if key_weight is not None:
        bias = ranks.gather_rows(key_weight)[0].log()
        logits, constant = logits + bias, bias[positive].sum()
    total = F.cross_entropy(logits, positive, reduction="sum") + constant
    return total / (len(key) / ranks.num_ranks())


class _UnitInfoNCE(torch.autograd.Function):
    """InfoNCE over unit rows.

    Logits lie between -1/temperature and 1/temperature, so at a temperature that is not tiny no exponential, nor a sum
    of them over any batch, overflows or vanishes, and no pass for the maximum is needed. Backward needs only the
    exponentials and their row sums: q and k get the softmax-weighted sums of each other.

    A pair of rows has one exponential, that counts as often as the batch has its key (times the weight of that key), in
    a term that counts as often as the batch has its query. ``count`` is what divides the sum over the batch.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        query_row: Tensor,
        key_row: Tensor,
        key_count: Tensor,
        count: float,
        temperature: float,
        dtype: torch.dtype,
    ) -> Tensor:
        bound = 1.0 / temperature
        exponentials = torch.mm((query * bound).to(dtype), key.to(dtype).T).exp_()
        row_sum = _row_sum(exponentials, key_count)
        query_count = _counts(query_row, query)
        ctx.save_for_backward(query, key, query_row, key_row, key_count, query_count / row_sum, exponentials)
        ctx.scale = bound / count
        positive = (query[query_row] * key[key_row]).sum() * bound
        return (row_sum.log().dot(query_count) - positive) / count

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, query_row, key_row, key_count, weight, exponentials = ctx.saved_tensors
        dtype, scale = exponentials.dtype, grad * ctx.scale
        query_grad = key_grad = None
        if ctx.needs_input_grad[0]:
            expected = exponentials @ (key * key_count.unsqueeze(1)).to(dtype)
            query_grad = expected.to(query.dtype) * weight.unsqueeze(1)
            query_grad.index_add_(0, query_row, key[key_row], alpha=-1).mul_(scale)
        if ctx.needs_input_grad[1]:
            # This order of the product spares the large buffer a transposition.
            expected = ((query * weight.unsqueeze(1)).to(dtype).T @ exponentials).T
            key_grad = expected.to(query.dtype) * key_count.unsqueeze(1)
            key_grad.index_add_(0, key_row, query[query_row], alpha=-1).mul_(scale)
        return query_grad, key_grad, *(None,) * 6


def _row_sum(exponentials: Tensor, key_count: Tensor) -> Tensor:
    """What the exponentials (Q, K) of each query sum to, each times the count of its key (K,), in the latter's type."""
    if exponentials.is_cuda:  # A copy of the buffer costs it less than many small products.
        return (exponentials * key_count).sum(dim=1)
    # A bfloat16 sum is precise over a short stretch only, and one in float32 would first copy the whole buffer.
    counts = key_count.to(exponentials.dtype).split(_SUMMED_COLUMNS)
    stretches = zip(exponentials.split(_SUMMED_COLUMNS, 1), counts, strict=True)
    return torch.stack([stretch @ count for stretch, count in stretches]).to(key_count.dtype).sum(dim=0)


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
        self,
        behavior_user: Tensor,
        behavior_item: Tensor,
        modal_user: Tensor,
        modal_item: Tensor,
        *,
        user_row: Tensor | None = None,
        item_row: Tensor | None = None,
        user_weight: Tensor | None = None,
        item_weight: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Both alignment losses for the users and positive items of a batch.

        Args:
            behavior_user: Behavior representation of the users (B, D); or with ``user_row`` and ``item_row`` of those
                that the batch has, each once (U, D), which is faster.
            behavior_item: Behavior representation of the positive items (B, D), or (I, D).
            modal_user: Modal representation of the same users.
            modal_item: Modal representation of the same items.
            user_row: Which of the users each example has (B,).
            item_row: Which of the items each example has (B,).
            user_weight: How much each of the users counts as a negative, by default 1.
            item_weight: How much each of the items counts as a negative.

        Returns:
            The weighted scalars ``intra`` (Eq. 10) and ``inter`` (Eq. 11), without those of weight 0.
        """
        if self.normalize:
            behavior_user, behavior_item, modal_user, modal_item = (
                F.normalize(rows, dim=-1) for rows in (behavior_user, behavior_item, modal_user, modal_item)
            )
        terms = {}
        if self.intra_weight:
            behavior = self._info_nce(behavior_user, behavior_item, user_row, item_row, item_weight)
            modal = self._info_nce(modal_user, modal_item, user_row, item_row, item_weight)
            terms["intra"] = self.intra_weight * (behavior + modal)
        if self.inter_weight:
            user = self._info_nce(behavior_user, modal_user, user_row, user_row, user_weight)
            item = self._info_nce(behavior_item, modal_item, item_row, item_row, item_weight)
            terms["inter"] = self.inter_weight * (user + item)
        return terms

    def _info_nce(
        self, query: Tensor, key: Tensor, query_row: Tensor | None, key_row: Tensor | None, key_weight: Tensor | None
    ) -> Tensor:
        pairs = None if query_row is None or key_row is None else Pairs(query_row, key_row)
        if not self.normalize:
            if pairs is not None:
                query, key, key_weight = pairs.examples(query, key, key_weight)
            return _cross_entropy(query, key, self.temperature, key_weight)
        auto = self.precision == "auto" and self.temperature >= _LEAST_ROUNDED_TEMPERATURE
        rounded = self.precision == "bfloat16" or (auto and has_bfloat16_units(query.device))
        dtype = torch.bfloat16 if rounded and query.dtype == torch.float32 else None
        return unit_info_nce(query, key, self.temperature, pairs=pairs, key_weight=key_weight, dtype=dtype)

    def extra_repr(self) -> str:
        """What distinguishes this module in a printed model."""
        return (
            f"intra_weight={self.intra_weight}, inter_weight={self.inter_weight}, "
            f"temperature={self.temperature}, normalize={self.normalize}"
        )
