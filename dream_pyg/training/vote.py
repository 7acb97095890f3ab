"""The vote of a model in closed form beside a trained one: their scores are added, each in units of its spread."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch_geometric.data import HeteroData

from dream_pyg import ranks
from dream_pyg.config import TeacherConfig
from dream_pyg.data.files import load_tensors
from dream_pyg.errors import StoreError
from dream_pyg.graph.co_occurrence import highest_of_rows
from dream_pyg.graph.csr import UserItems, row_pointer
from dream_pyg.graph.schema import INTERACTS, ITEM, USER
from dream_pyg.models import Embeddings, ItemWeights

_PARTS = ("pointer", "index", "weight")
_BLOCK_SCORES = 1 << 22
"""Scores held at a time."""
_MEASURED_USERS = 1 << 14
"""Users enough to say how far the scores of item weights spread."""


class VotedScores(NamedTuple):
    """Inner products of embeddings, and what item weights add to them; a :class:`~dream_pyg.models.Scorer`."""

    embeddings: Embeddings
    vote: ItemWeights
    factor: float
    """Of the vote's scores."""

    @property
    def num_users(self) -> int:
        """U."""
        return self.embeddings.num_users

    @property
    def num_items(self) -> int:
        """I."""
        return self.embeddings.num_items

    def scores(self, user: Tensor, out: Tensor | None = None) -> Tensor:
        """The sum of both for these users and all items (B, I)."""
        return self.embeddings.scores(user, out).add_(self.vote.scores(user), alpha=self.factor)

    def pair_scores(self, user: Tensor, item: Tensor) -> Tensor:
        """The sum of both for single pairs (N,)."""
        return self.embeddings.pair_scores(user, item).add_(self.vote.pair_scores(user, item), alpha=self.factor)

    def pair_reads(self, user: Tensor) -> Tensor:
        """What both read (B,)."""
        return self.embeddings.pair_reads(user) + self.vote.pair_reads(user)

    def only(self, item: Tensor) -> VotedScores:
        """What both say of these items."""
        return VotedScores(self.embeddings.only(item), self.vote.only(item), self.factor)

    def rounding(self, user: Tensor) -> Tensor:
        """What both are off by, and as much again at most for the factor and the sum (B,)."""
        return 2 * self.embeddings.rounding(user).add_(self.vote.rounding(user), alpha=abs(self.factor))

    def detach(self) -> VotedScores:
        """The same without gradients."""
        return VotedScores(self.embeddings.detach(), self.vote.detach(), self.factor)


class Vote(NamedTuple):
    r"""Few item weights of a teacher, for their scores to be added to the inner products of its pupil.

    .. math::
        \mathbf x_u \cdot \mathbf x_i + \omega \, \frac{\sigma_x}{\sigma_y} \, \hat y_{ui}

    where :math:`\sigma` are the standard deviations of both scores over users and items, so that the share
    :math:`\omega` means the same whatever their scale and however long was trained.
    """

    weights: ItemWeights
    """W (I, I) in CSR, such that the standard deviation of its scores is 1."""
    share: float
    """omega."""

    @classmethod
    def of(cls, teacher: ItemWeights, config: TeacherConfig, graph: HeteroData) -> Self:
        """The strongest weights of a teacher in all processes, as the first one finds them."""
        weight = _strongest(teacher.weight, config.vote_weights)
        spread = _spread_of_sums(ItemWeights(teacher.history, weight))
        tensors = {name: part.cpu() for name, part in _parts(weight).items()}
        tensors["weight"] /= spread
        return cls._of(ranks.first_says(tensors), config, graph)

    @classmethod
    def load(cls, path: Path, config: TeacherConfig, graph: HeteroData) -> Self:
        """From a file with the tensors that :meth:`tensors` gave, for the graph that it was made for.

        Raises:
            StoreError: If it is missing or damaged, or holds no vote of this graph's items.
        """
        return cls.restore(load_tensors(path)[0], path, config, graph)

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], path: Path, config: TeacherConfig, graph: HeteroData) -> Self:
        """From what was loaded of such a file.

        Raises:
            StoreError: If it is no vote of this graph's items.
        """
        num_items = int(graph[ITEM].num_nodes)
        pointer, index, weight = (tensors.get(name, torch.empty(0)) for name in _PARTS)
        fits = len(pointer) == num_items + 1 and len(index) == len(weight) == int(pointer[-1])
        if not fits or (len(index) and not 0 <= int(index.min()) <= int(index.max()) < num_items):
            raise StoreError(
                f"{path} holds no vote of a teacher on {num_items:,} items. Restore the file that was written with the "
                "run, or train anew."
            )
        return cls._of(tensors, config, graph)

    @classmethod
    def _of(cls, tensors: Mapping[str, Tensor], config: TeacherConfig, graph: HeteroData) -> Self:
        edges = graph[INTERACTS].edge_index.as_tensor()
        pointer, index, weight = (tensors[name].to(edges.device) for name in _PARTS)
        size = (len(pointer) - 1, len(pointer) - 1)
        matrix = torch.sparse_csr_tensor(pointer, index, weight, size, check_invariants=False)
        history = UserItems.from_pairs(edges, int(graph[USER].num_nodes))
        return cls(ItemWeights(history, matrix), config.vote)

    def tensors(self) -> dict[str, Tensor]:
        """What a file keeps: where each row of weights begins (I + 1,), and the column and value of each (N,)."""
        return {name: part.cpu() for name, part in _parts(self.weights.weight).items()}

    def beside(self, embeddings: Embeddings) -> VotedScores:
        """Its scores and those of embeddings, together."""
        return VotedScores(embeddings, self.weights, self.share * _spread_of_products(embeddings))


def _strongest(weight: Tensor, number: int) -> Tensor:
    """The largest weights in each column of a matrix (I, I), by size, in CSR."""
    num_items = len(weight)
    if weight.layout == torch.strided:
        number = min(number, num_items)
        blocks = weight.split(max(1, _BLOCK_SCORES // num_items), dim=1)
        row = torch.cat([block.abs().topk(number, dim=0).indices for block in blocks], dim=1).T.flatten()
        column = torch.arange(num_items, device=row.device).repeat_interleave(number)
        value = weight[row, column]
    else:  # of similarities, none of which is negative
        row = torch.arange(num_items, device=weight.device).repeat_interleave(weight.crow_indices().diff())
        column, order = weight.col_indices().sort(stable=True)
        column, row, value = highest_of_rows(column, row[order], weight.values()[order], number)
    row, order = row.sort(stable=True)
    pointer = row_pointer(torch.bincount(row, minlength=num_items))
    return torch.sparse_csr_tensor(pointer, column[order], value[order], (num_items, num_items), check_invariants=False)


def _parts(weight: Tensor) -> dict[str, Tensor]:
    return dict(zip(_PARTS, (weight.crow_indices(), weight.col_indices(), weight.values()), strict=True))


def _spread_of_sums(scorer: ItemWeights) -> float:
    """The standard deviation of the scores of item weights, over all items and some random users."""
    users = torch.randperm(scorer.num_users, generator=torch.Generator().manual_seed(0))[:_MEASURED_USERS]
    count, total, squares = 0, 0.0, 0.0
    for block in users.to(scorer.history.item.device).split(max(1, _BLOCK_SCORES // scorer.num_items)):
        scores = scorer.scores(block)
        count += scores.numel()
        total += float(scores.sum(dtype=torch.float64))
        squares += float(scores.square_().sum(dtype=torch.float64))
    return max(squares / count - (total / count) ** 2, 1e-24) ** 0.5


def _spread_of_products(embeddings: Embeddings) -> float:
    """The standard deviation of the inner products of all users with all items, from the moments of either."""
    (user_mean, user), (item_mean, item) = (_moments(rows.detach()) for rows in embeddings)
    variance = (user * item).sum() + user_mean @ item @ user_mean + item_mean @ user @ item_mean
    return float(variance) ** 0.5


def _moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of rows (D,) and their covariance (D, D), in float64."""
    mean = rows.mean(dim=0)
    centred = rows - mean
    return mean.double(), (centred.T @ centred).double() / len(rows)
