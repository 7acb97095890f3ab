"""Top-k items of users by inner product, in blocks of users, with seen items left out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dream_pyg.models.base import Embeddings

_BLOCK_SCORES = 1 << 22
"""Scores held at a time: 16 MiB of float32."""


class SeenItems(NamedTuple):
    """The items to leave out for each user, as rows of a CSR matrix."""

    pointer: Tensor  # (U + 1,)
    item: Tensor  # (E,)

    @classmethod
    def from_pairs(cls, pairs: Tensor, num_users: int) -> SeenItems:
        """From user-item pairs (2, E) in any order."""
        user, order = torch.sort(pairs[0], stable=True)
        count = torch.bincount(user, minlength=num_users)
        return cls(torch.cat([count.new_zeros(1), count.cumsum(0)]), pairs[1][order])

    def coordinates(self, user: Tensor) -> tuple[Tensor, Tensor]:
        """Row (position in ``user``) and item of everything these users have seen, each (S,)."""
        start, count = self.pointer[user], self.pointer[user + 1] - self.pointer[user]
        row = torch.repeat_interleave(torch.arange(len(user), device=user.device), count)
        first = torch.cumsum(count, 0) - count
        return row, self.item[torch.arange(len(row), device=user.device) + (start - first)[row]]


class Ranking(NamedTuple):
    """The best items of some users, best first; item -1 with score -inf where a user has fewer."""

    user: Tensor  # (N,)
    item: Tensor  # (N, K)
    score: Tensor  # (N, K)


def rank_blocks(embeddings: Embeddings, user: Tensor, k: int, seen: SeenItems | None = None) -> Iterator[Ranking]:
    """Rank the whole catalogue for users, a block of users at a time.

    Args:
        embeddings: Representations of all users and items.
        user: User ids to rank for (N,).
        k: Number of items; the whole catalogue if it is smaller.
        seen: Items to leave out.

    Yields:
        One :class:`Ranking` per block, in the order of ``user``. Memory is bounded whatever N is.
    """
    users, items = (part.detach() for part in embeddings)
    num_items = len(items)
    blocks = user.split(max(1, _BLOCK_SCORES // num_items))
    buffer = items.new_empty(len(blocks[0]), num_items)
    for block in blocks:
        score = torch.mm(users[block], items.T, out=buffer[: len(block)])
        if seen is not None:
            score[seen.coordinates(block)] = -torch.inf
        top = score.topk(min(k, num_items), dim=1)
        yield Ranking(block, top.indices.masked_fill(top.values == -torch.inf, -1), top.values)


def recommend(embeddings: Embeddings, user: Tensor, k: int, seen: SeenItems | None = None) -> Ranking:
    """The top-k items of users; see :func:`rank_blocks`, whose blocks this joins."""
    blocks = rank_blocks(embeddings, user, k, seen)
    return Ranking(*(torch.cat(parts) for parts in zip(*blocks, strict=True)))
