"""Top-k items of users, in blocks of users, with seen items left out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dream_pyg.graph.csr import UserItems
from dream_pyg.models.base import Scorer

_BLOCK_SCORES = 1 << 22
"""Scores held at a time: 16 MiB of float32."""


class SeenItems(UserItems):
    """The items to leave out for each user."""


class Ranking(NamedTuple):
    """The best items of some users, best first; item -1 with score -inf where a user has fewer."""

    user: Tensor  # (N,)
    item: Tensor  # (N, K)
    score: Tensor  # (N, K)


def rank_blocks(scorer: Scorer, user: Tensor, k: int, seen: SeenItems | None = None) -> Iterator[Ranking]:
    """Rank the whole catalogue for users, a block of users at a time.

    Args:
        scorer: What a model made of the graph: its embeddings, or its item weights.
        user: User ids to rank for (N,).
        k: Number of items; the whole catalogue if it is smaller.
        seen: Items to leave out.

    Yields:
        One :class:`Ranking` per block, in the order of ``user``. Memory is bounded whatever N is.
    """
    num_items = scorer.num_items
    blocks = user.split(max(1, _BLOCK_SCORES // num_items))
    buffer: Tensor | None = None  # the first and largest block's scores, whose memory later blocks use again
    for block in blocks:
        score = scorer.scores(block, out=None if buffer is None else buffer[: len(block)])
        buffer = score if buffer is None else buffer
        if seen is not None:
            score[seen.coordinates(block)] = -torch.inf
        top = score.topk(min(k, num_items), dim=1)
        yield Ranking(block, top.indices.masked_fill(top.values == -torch.inf, -1), top.values)


def recommend(scorer: Scorer, user: Tensor, k: int, seen: SeenItems | None = None) -> Ranking:
    """The top-k items of users; see :func:`rank_blocks`, whose blocks this joins."""
    blocks = rank_blocks(scorer, user, k, seen)
    return Ranking(*(torch.cat(parts) for parts in zip(*blocks, strict=True)))
