"""A closed-form model as teacher: what it would recommend to a user are further positives of the user's triplets."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor
from torch_geometric.data import HeteroData

from dream_pyg.config import TeacherConfig
from dream_pyg.graph.schema import INTERACTS, USER, label_name
from dream_pyg.models import find_model
from dream_pyg.ranking import SeenItems, recommend
from dream_pyg.training.run import check_requirements


class TaughtItems(NamedTuple):
    """The items that a teacher ranks highest for each user, without those of train."""

    item: Tensor  # (U, N), best first; -1 where a user has fewer
    chance: Tensor  # of each rank to be drawn, but for a factor (N,)
    share: float
    """Taught triplets for each of train."""

    def draw(self, user: Tensor, generator: torch.Generator) -> Tensor:
        """One item for each of these users (B,), -1 where the rank that was drawn has none."""
        rank = torch.multinomial(self.chance, len(user), replacement=True, generator=generator)
        return self.item[user, rank]

    def digest(self) -> str:
        """What tells these items from others, to compare between processes."""
        return hashlib.sha256(self.item.numpy().tobytes()).hexdigest()[:12]


def teach(graph: HeteroData, config: TeacherConfig) -> TaughtItems:
    r"""Solve the teacher and rank for every user, as in Ranking Distillation (arXiv 1809.07428, Section 3).

    Of a user's N items the one of rank r = 0, 1, ... is drawn with probability proportional to :math:`e^{-r/\lambda}`,
    the position importance of that paper (Eq. 9).

    Args:
        graph: The graph.
        config: The teacher, N, :math:`\lambda`, and the share of taught triplets.

    Raises:
        ConfigError: If the graph lacks what the teacher needs, or the catalogue is too large for it.
    """
    check_requirements(config.model["name"], config.hyperparameters, graph)
    device = graph[INTERACTS].edge_index.device
    model = find_model(config.model["name"])(graph, config.hyperparameters).to(device)
    model.fit(graph)
    train = graph[INTERACTS][label_name("train")]
    num_users = int(graph[USER].num_nodes)
    with torch.no_grad():
        everyone = torch.arange(num_users, device=device)
        ranking = recommend(model(graph), everyone, config.num_items, SeenItems.from_pairs(train, num_users))
    rank = torch.arange(ranking.item.size(1), dtype=torch.float64)
    return TaughtItems(ranking.item.cpu(), torch.exp(-rank / config.rank_decay), config.share)
