"""InfoNCE and the Behavior-Modal Alignment built from it."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch_geometric import EdgeIndex
from torch_geometric.data import HeteroData

from dream_pyg import ranks
from dream_pyg.graph.processor import has_bfloat16_units
from dream_pyg.graph.schema import INTERACTS, ITEM, REV_INTERACTS, USER

_LEAST_BOUNDED_TEMPERATURE = 0.025
"""exp(40) and its reciprocal leave float32 room for sums over any batch."""
_LEAST_ROUNDED_TEMPERATURE = 0.2
"""Rounding logits to bfloat16 moves the gradient by a few thousandths of itself from here on; at 0.1 by as much as a
tenth, where queries are near their keys."""
_NUMBERS_AT_ONCE = 1 << 22
"""Exponentials that are there at a time, so that memory grows with a batch and not with its square."""
_LEAST_QUERIES = 256
"""Whose exponentials are there at a time, however many keys there are: fewer make slow products."""
_ROWS_TOGETHER = 128
"""Queries and keys are as many times as many, filled up with some that do not count: oneDNN makes kernels for each
shape, and those of a batch's distinct rows are ever new."""


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
        normalize: Whether rows are scaled to unit length first.
        dtype: Type of the in-batch products, ``torch.bfloat16`` for speed; by default that of ``query``, as also where
            logits have no bound or a large one. The sum over a row is rounded to it once; the loss and both gradients
            have the type of ``query``.

    Returns:
        The mean over the batch, a scalar.
    """
    if normalize:
        query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
    return in_batch_contrast(query, key, temperature, is_unit=normalize, dtype=dtype)


class Pairs(NamedTuple):
    """The examples of a batch as positions of their rows, each (B,)."""

    query: Tensor
    key: Tensor


def in_batch_contrast(
    query: Tensor,
    key: Tensor,
    temperature: float,
    *,
    is_unit: bool,
    pairs: Pairs | None = None,
    key_weight: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """:func:`info_nce` of rows as they are, which a batch may have more than once.

    Args:
        query: Rows (Q, D).
        key: Rows (K, D).
        temperature: As there.
        is_unit: Whether the rows have unit length.
        pairs: Which query and which key each example of the batch has; by default row b of both. So a row is multiplied
            once however often the batch has it.
        key_weight: Factor of each key's exponential in the sum below the fraction (K,), by default 1.
        dtype: As there.
    """
    if pairs is not None and ranks.num_ranks() > 1:
        query, key = query[pairs.query], key[pairs.key]
        key_weight, pairs = None if key_weight is None else key_weight[pairs.key], None
    if pairs is None:
        key, first = ranks.gather_rows(key)
        own = torch.arange(len(query), device=query.device)
        pairs, count = Pairs(own, own + first), len(key) / ranks.num_ranks()
        key_count = key.new_ones(len(key)) if key_weight is None else ranks.gather_rows(key_weight)[0]
    else:
        key_count, count = _counts(pairs.key, key), len(pairs.key)
        if key_weight is not None:
            key_count.mul_(key_weight)
    is_bounded = is_unit and temperature >= _LEAST_BOUNDED_TEMPERATURE
    dtype = query.dtype if dtype is None or not is_bounded else dtype
    query, key, key_count = (_filled_up(rows) for rows in (query, key, key_count))
    return _InfoNCE.apply(query, key, *pairs, key_count, count, temperature, is_bounded, dtype)


def _filled_up(rows: Tensor) -> Tensor:
    """Rows (N, ...), then zeros."""
    return F.pad(rows, (0, 0) * (rows.dim() - 1) + (0, -len(rows) % _ROWS_TOGETHER))


def _counts(position: Tensor, rows: Tensor) -> Tensor:
    """How often each row comes among positions, in the type of the rows; unlike bincount, a GPU need not wait."""
    return rows.new_zeros(len(rows)).index_add_(0, position, rows.new_ones(len(position)))


class _InfoNCE(torch.autograd.Function):
    """InfoNCE and its gradients at once, from the exponentials of some queries at a time, which are not kept.

    A query and a key have one exponential, that counts as often as the batch has its key (times the weight of that
    key), in a term that counts as often as the batch has its query. ``count`` is what divides the sum over the batch.
    Queries and keys get the softmax-weighted sums of each other as gradients.

    Where rows are of unit length, logits lie between -1/temperature and 1/temperature: at a temperature that is not
    tiny no exponential, nor a sum of them over any batch, overflows or vanishes. Else the maximum is taken off first.
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
        is_bounded: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        if not is_bounded:  # The maximum is one over keys that count, so what they count joins the logits.
            bias, key_count = key_count.log(), torch.ones_like(key_count)
        factors, key_counts = key.to(dtype), key_count.to(dtype).unsqueeze(1)
        counted = (key * key_count.unsqueeze(1)).to(dtype)
        query_count = _counts(query_row, query)
        of_query, of_key = torch.empty_like(query), torch.zeros_like(key)
        log_sum = torch.empty_like(query_count)
        at_once = max(_LEAST_QUERIES, _NUMBERS_AT_ONCE // max(1, len(key)))
        parts = (x.split(at_once) for x in (query, query_count, of_query, log_sum))
        for rows, times, grad, log in zip(*parts, strict=True):
            exponentials = torch.mm((rows / temperature).to(dtype), factors.T)
            if not is_bounded:
                most = exponentials.add_(bias).amax(dim=1)
                exponentials.sub_(most.unsqueeze(1))
            row_sum = torch.mm(exponentials.exp_(), key_counts).squeeze(1).to(query.dtype)
            torch.log(row_sum, out=log)
            if not is_bounded:
                log += most
            weight = (times / row_sum).unsqueeze(1)
            torch.mul(torch.mm(exponentials, counted), weight, out=grad)
            # This order of the product spares the exponentials a transposition.
            of_key += torch.mm((rows * weight).to(dtype).T, exponentials).T
        of_key *= key_count.unsqueeze(1)
        queries, keys = query.index_select(0, query_row), key.index_select(0, key_row)
        positive = torch.zeros_like(log_sum).index_add_(0, query_row, (queries * keys).sum(dim=1))
        scale = 1.0 / (temperature * count)
        of_query.index_add_(0, query_row, keys, alpha=-1).mul_(scale)
        of_key.index_add_(0, key_row, queries, alpha=-1).mul_(scale)
        ctx.save_for_backward(of_query, of_key)
        # Query by query, as either sum may be large and both nearly the same.
        return (log_sum * query_count - positive / temperature).sum() / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        of_query, of_key = ctx.saved_tensors
        return of_query * grad, of_key * grad, *(None,) * 7


class NegativeWeights(nn.Module):
    r"""How much each user and item of a batch counts as an in-batch negative.

    Batches have popular items often, which in-batch negatives therefore push down for all users. A user or item of
    degree d weighs :math:`d^{-\eta}`: with :math:`\eta = 1` the sum over a batch estimates one in which all have the
    same share, as in sampling-bias-corrected retrieval (doi 10.1145/3298689.3346996).

    Args:
        graph: The graph, whose interactions give the degrees.
        exponent: :math:`\eta`; with 0 all count alike.
    """

    def __init__(self, graph: HeteroData, exponent: float) -> None:
        super().__init__()
        self.exponent = exponent
        if exponent:
            self.register_buffer(USER, _by_degree(graph[REV_INTERACTS].edge_index, exponent), persistent=False)
            self.register_buffer(ITEM, _by_degree(graph[INTERACTS].edge_index, exponent), persistent=False)

    def forward(self, graph: HeteroData, user: Tensor, item: Tensor) -> dict[str, Tensor]:
        """What :class:`BehaviorModalAlignment` is told of these users and items; nothing if all count alike."""
        if not self.exponent:
            return {}
        return {"user_weight": self._of(graph, USER, user), "item_weight": self._of(graph, ITEM, item)}

    def _of(self, graph: HeteroData, node: str, ids: Tensor) -> Tensor:
        return self.get_buffer(node)[graph[node].n_id[ids] if "n_id" in graph[node] else ids]


def _by_degree(edge_index: EdgeIndex, exponent: float) -> Tensor:
    """Each target's degree to minus the exponent, on average 1 over the edges, of which batches are drawn."""
    degree = torch.bincount(edge_index[1], minlength=edge_index.sparse_size(1))
    weight = degree.clamp(min=1).double().pow(-exponent)
    return (weight * degree.sum() / (weight * degree).sum()).float()


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
        auto = self.precision == "auto" and self.temperature >= _LEAST_ROUNDED_TEMPERATURE
        rounded = self.precision == "bfloat16" or (auto and has_bfloat16_units(query.device))
        return in_batch_contrast(
            query,
            key,
            self.temperature,
            is_unit=self.normalize,
            pairs=None if query_row is None or key_row is None else Pairs(query_row, key_row),
            key_weight=key_weight,
            dtype=torch.bfloat16 if rounded and query.dtype == torch.float32 else None,
        )

    def extra_repr(self) -> str:
        """What distinguishes this module in a printed model."""
        return (
            f"intra_weight={self.intra_weight}, inter_weight={self.inter_weight}, "
            f"temperature={self.temperature}, normalize={self.normalize}"
        )
