"""The vote of a model in closed form beside a trained one: their scores are added, each in units of its spread."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch_geometric.data import HeteroData

from dream_pyg import ranks
from dream_pyg.config import TeacherConfig
from dream_pyg.graph.csr import UserItems
from dream_pyg.graph.schema import INTERACTS, USER, label_name
from dream_pyg.models import Embeddings, ItemWeights

_BLOCK_SCORES = 1 << 22
"""Scores held at a time."""
_MEASURED_USERS = 1 << 14
"""Users enough to say how far the scores of item weights spread."""


class VotedScores(NamedTuple):
    """Inner products of embeddings, and what item weights add to them; a :class:`~dream_pyg.models.Scorer`."""

    embeddings: Embeddings
    vote: ItemWeights

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
        return self.embeddings.scores(user, out).add_(self.vote.scores(user))

    def detach(self) -> VotedScores:
        """The same without gradients."""
        return VotedScores(self.embeddings.detach(), self.vote.detach())


class Vote(NamedTuple):
    r"""Few item weights of a teacher, for their scores to be added to the inner products of its pupil.

    .. math::
        \mathbf x_u \cdot \mathbf x_i + \omega \, \frac{\sigma_x}{\sigma_y} \, \hat y_{ui}

    where :math:`\sigma` are the standard deviations of both scores over all users and items, so that the share
    :math:`\omega` means the same whatever their scale and however long was trained.
    """

    weights: ItemWeights
    """W (I, I) in CSR, such that the standard deviation of its scores is 1."""
    share: float
    """omega."""

    @classmethod
    def of(cls, teacher: ItemWeights, config: TeacherConfig) -> Self:
        """The strongest weights of a teacher in all processes, as the first one finds them."""
        weight = _strongest(teacher.weight, config.vote_weights)
        kept = ItemWeights(teacher.history, weight)
        scaled = {**_parts(weight), "weight": weight.values() / _spread_of_sums(kept)}
        said = ranks.first_says({name: part.cpu() for name, part in scaled.items()})
        return cls(ItemWeights(teacher.history, _assembled(said, weight.device)), config.vote)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], config: TeacherConfig, graph: HeteroData) -> Self:
        """What :meth:`tensors` gave, for the graph that it was made for."""
        train = graph[INTERACTS][label_name("train")]
        history = UserItems.from_pairs(train, int(graph[USER].num_nodes))
        return cls(ItemWeights(history, _assembled(tensors, train.device)), config.vote)

    def tensors(self) -> dict[str, Tensor]:
        """The weights as a file keeps them: ``pointer`` (I + 1,), ``index`` and ``weight`` (N,)."""
        return {name: part.cpu() for name, part in _parts(self.weights.weight).items()}

    def beside(self, embeddings: Embeddings) -> VotedScores:
        """Its scores and those of embeddings, together."""
        parts = _parts(self.weights.weight)
        parts["weight"] = parts["weight"] * (self.share * _spread_of_products(embeddings))
        weight = _assembled(parts, embeddings.item.device)
        return VotedScores(embeddings, ItemWeights(self.weights.history, weight))


def _strongest(weight: Tensor, number: int) -> Tensor:
    """The largest weights in each column of a matrix (I, I), by size, in CSR."""
    row, column, value = (
        _largest_of_dense(weight, number) if weight.layout == torch.strided else _largest(weight, number)
    )
    row, order = torch.sort(row, stable=True)
    pointer = torch.cat([row.new_zeros(1), torch.bincount(row, minlength=len(weight)).cumsum(0)])
    return _assembled({"pointer": pointer, "index": column[order], "weight": value[order]}, weight.device)


def _largest_of_dense(weight: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor]:
    num_items = len(weight)
    number = min(number, num_items)
    blocks = weight.split(max(1, _BLOCK_SCORES // num_items), dim=1)
    row = torch.cat([block.abs().topk(number, dim=0).indices for block in blocks], dim=1).T.flatten()
    column = torch.arange(num_items, device=row.device).repeat_interleave(number)
    return row, column, weight[row, column]


def _largest(weight: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Those of a matrix in CSR."""
    num_items = len(weight)
    row = torch.arange(num_items, device=weight.device).repeat_interleave(weight.crow_indices().diff())
    order = weight.values().abs().argsort(descending=True, stable=True)
    column, by_column = weight.col_indices()[order].sort(stable=True)
    size = torch.bincount(column, minlength=num_items)
    place = torch.arange(len(column), device=column.device) - (size.cumsum(0) - size)[column]
    kept = order[by_column][place < number]
    return row[kept], weight.col_indices()[kept], weight.values()[kept]


def _parts(weight: Tensor) -> dict[str, Tensor]:
    return {"pointer": weight.crow_indices(), "index": weight.col_indices(), "weight": weight.values()}


def _assembled(parts: Mapping[str, Tensor], device: torch.device) -> Tensor:
    num_items = len(parts["pointer"]) - 1
    pointer, index, weight = (parts[name].to(device) for name in ("pointer", "index", "weight"))
    return torch.sparse_csr_tensor(pointer, index, weight, (num_items, num_items), check_invariants=False)


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
    """The standard deviation of the inner products of all users with all items, from their moments."""
    user, item = embeddings.detach()
    mean = float(user.mean(dim=0).double() @ item.mean(dim=0).double())
    squares = float((user.T @ user).double().mul_((item.T @ item).double()).sum()) / (len(user) * len(item))
    return max(squares - mean**2, 0.0) ** 0.5
