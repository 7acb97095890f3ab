"""Top-k items of users, in blocks of users, with seen items left out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dream_pyg.graph.csr import UserItems
from dream_pyg.models.base import Scorer

_BLOCK_SCORES = 1 << 22
"""Scores held at a time: 16 MiB of float32, where those of a few users are no more."""
_LEAST_USERS = 32
"""With fewer at a time, reading all items takes longer than the product with them."""
_SCREENING_ITEMS = 256
"""Enough to tell nine users of ten that what they want is not in their top 20."""
_ASKED_USERS = 64
"""Of whose scores the mean says which items these are."""
_SCORES_A_READ = 32
"""Scores of a ranking that take as long as one read of memory for a single pair: on a CPU from 5 to 80."""


class Ranking(NamedTuple):
    """The best items of some users, best first, of equal ones the lower id; -1 with score -inf where one has fewer."""

    user: Tensor  # (N,)
    item: Tensor  # (N, K)
    score: Tensor  # (N, K)


def rank_blocks(scorer: Scorer, user: Tensor, k: int, seen: UserItems | None = None) -> Iterator[Ranking]:
    """Rank the whole catalogue for users, a block of users at a time.

    Args:
        scorer: What a model made of the graph: its embeddings, with a vote or not, or its item weights.
        user: User ids to rank for (N,).
        k: Number of items; the whole catalogue if it is smaller.
        seen: Items to leave out.

    Yields:
        One :class:`Ranking` per block, in the order of ``user``. Memory is bounded whatever N is.
    """
    num_items = scorer.num_items
    blocks = user.split(max(_LEAST_USERS, _BLOCK_SCORES // num_items))
    buffer: Tensor | None = None  # the first and largest block's scores, whose memory later blocks use again
    for block in blocks:
        score = scorer.scores(block, out=None if buffer is None else buffer[: len(block)])
        buffer = score if buffer is None else buffer
        if seen is not None:
            score[seen.coordinates(block)] = -torch.inf
        value, item = _top(score, min(k, num_items))
        yield Ranking(block, item.masked_fill(value == -torch.inf, -1), value)


def _top(score: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest scores of each row (B, I), and where they are: of equal ones the first, whatever k; each (B, K)."""
    value, item = score.topk(k, dim=1)
    least = value[:, -1:]
    tied = ((score >= least).sum(dim=1, dtype=torch.int32) > k).nonzero().squeeze(1)
    if len(tied):  # with the k-th, of which topk takes any
        rows, least = score[tied], least[tied]
        above, equal = rows > least, rows == least
        room = k - above.sum(dim=1, keepdim=True)
        item[tied] = (above | (equal & (equal.cumsum(dim=1) <= room))).nonzero()[:, 1].view(-1, k)
    item = item.sort(dim=1).values
    value, order = score.gather(1, item).sort(dim=1, descending=True, stable=True)
    return value, item.gather(1, order)


def recommend(scorer: Scorer, user: Tensor, k: int, seen: UserItems | None = None) -> Ranking:
    """The top-k items of users; see :func:`rank_blocks`, whose blocks this joins."""
    blocks = rank_blocks(scorer, user, k, seen)
    return Ranking(*(torch.cat(parts) for parts in zip(*blocks, strict=True)))


def may_hit(scorer: Scorer, user: Tensor, wanted: UserItems, k: int, seen: UserItems | None = None) -> Tensor:
    """Which users may have a wanted item in their top k; the others certainly have none, whatever their ranking.

    Scored are only the items that some users like best on average: where so many of them beat everything that a user
    wants that k are left without the seen ones, the top k holds nothing wanted. They must win by more than scores can
    differ for being summed in another order. Nothing is tried where users want so much that scoring it, pair by pair,
    would take longer than the ranking.

    Args:
        scorer: What a model made of the graph.
        user: User ids (N,).
        wanted: The items each user wants; none of them is seen.
        k: Length of the ranking.
        seen: Items to leave out.

    Returns:
        True where a full ranking is needed to tell (N,).
    """
    num_wanted = wanted.pointer.diff()[user]
    if int((num_wanted * scorer.pair_reads(user)).sum()) * _SCORES_A_READ > len(user) * scorer.num_items:
        return torch.ones_like(user, dtype=torch.bool)
    asked = user[:: max(1, len(user) // _ASKED_USERS)]
    blocks = asked.split(max(1, _BLOCK_SCORES // scorer.num_items))
    liked = torch.stack([scorer.scores(block).sum(dim=0) for block in blocks]).sum(dim=0)
    screen = scorer.only(liked.topk(min(_SCREENING_ITEMS, len(liked))).indices)
    row, item = wanted.coordinates(user)
    score = scorer.pair_scores(user[row], item)
    best = score.new_full((len(user),), -torch.inf).scatter_reduce_(0, row, score, "amax")
    # Each of two scores, summed here and in a ranking.
    safely = best + 4 * scorer.rounding(user)
    users = max(1, _BLOCK_SCORES // screen.num_items)
    better = [
        (screen.scores(block) > least.unsqueeze(1)).sum(dim=1, dtype=torch.int32)
        for block, least in zip(user.split(users), safely.split(users), strict=True)
    ]
    return torch.cat(better) < k + (0 if seen is None else seen.pointer.diff()[user])
