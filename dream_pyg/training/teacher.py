"""A closed-form model as teacher: its recommendations are further positives, and its scores may have a vote."""

from __future__ import annotations

import functools
import logging
import time
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch_geometric.data import HeteroData

from dream_pyg import ranks
from dream_pyg.config import TeacherConfig
from dream_pyg.data.files import load_tensors, save_tensors
from dream_pyg.errors import ConfigError
from dream_pyg.evaluation import evaluate
from dream_pyg.graph.csr import UserItems
from dream_pyg.graph.schema import INTERACTS, label_name
from dream_pyg.models import ItemWeights, Recommender, find_model
from dream_pyg.ranking import recommend
from dream_pyg.training.model import check_requirements
from dream_pyg.training.vote import Vote

logger = logging.getLogger("dream_pyg")


class TaughtItems(NamedTuple):
    r"""The items that a teacher ranks highest for each user, without those of train.

    Of a user's N items the one of rank r = 0, 1, ... is drawn with probability proportional to :math:`e^{-r/\lambda}`,
    the position importance of Ranking Distillation (arXiv 1809.07428, Section 3 and Eq. 9).
    """

    item: Tensor  # (U, N), best first; -1 where a user has fewer
    chance: Tensor  # of each rank to be drawn, but for a factor (N,)
    share: float
    """Taught triplets for each of train."""

    def draw(self, user: Tensor, generator: torch.Generator) -> Tensor:
        """One item for each of these users (B,), -1 where the rank that was drawn has none."""
        if len(user) == 0:
            return user
        rank = torch.multinomial(self.chance, len(user), replacement=True, generator=generator)
        return self.item[user, rank]

    @classmethod
    def of(cls, item: Tensor, config: TeacherConfig) -> Self:
        """These items, drawn as the configuration says."""
        rank = torch.arange(item.size(1), dtype=torch.float64)
        return cls(item, torch.exp(-rank / config.rank_decay), config.share)


class Teaching(NamedTuple):
    """What a run has of its teacher: of either what the configuration asks for."""

    taught: TaughtItems | None
    vote: Vote | None

    @classmethod
    def load(cls, path: Path, config: TeacherConfig, graph: HeteroData) -> Self:
        """What :meth:`save` wrote.

        Raises:
            StoreError: If it is missing or damaged.
        """
        tensors = load_tensors(path)[0]
        return cls(
            TaughtItems.of(tensors["item"], config) if config.share else None,
            Vote.restore(tensors, path, config, graph) if config.vote else None,
        )

    def save(self, path: Path) -> None:
        """Keep it in a file, atomically."""
        taught = {} if self.taught is None else {"item": self.taught.item}
        save_tensors(path, taught | ({} if self.vote is None else self.vote.tensors()))


def teach(graph: HeteroData, config: TeacherConfig) -> Teaching:
    """Solve the teacher; several processes all do, and take what the first one finds.

    Args:
        graph: The graph.
        config: The teacher, and what it is asked for.

    Raises:
        ConfigError: If the graph lacks what the teacher needs, or the catalogue is too large for it.
    """
    with torch.no_grad():
        scorer = _solve(graph, config)
        taught = TaughtItems.of(_best_items(scorer, graph, config.num_items), config) if config.share else None
        return Teaching(taught, Vote.of(scorer, config, graph) if config.vote else None)


def _best_items(scorer: ItemWeights, graph: HeteroData, number: int) -> Tensor:
    """The items each user did not take that score highest (U, N), -1 where there are no more."""
    train = graph[INTERACTS][label_name("train")]
    everyone = torch.arange(scorer.num_users, device=train.device)
    ranking = recommend(scorer, everyone, number, UserItems.from_pairs(train, scorer.num_users))
    # What a teacher does not score, as item-kNN most items, it knows nothing of: its order there is that of ids.
    return ranks.first_says(ranking.item.masked_fill(ranking.score <= 0, -1).cpu())


def _solve(graph: HeteroData, config: TeacherConfig) -> ItemWeights:
    """The teacher, or the best of its candidates on validation."""
    name, candidates = config.model["name"], config.candidates
    best: tuple[float, ItemWeights] | None = None
    for hyperparameters in candidates:
        started = time.perf_counter()
        model = ranks.together(functools.partial(_made, name, hyperparameters, graph))
        model.fit(graph)
        scorer, recall, told = model(graph), 0.0, ""
        if len(candidates) > 1:
            recall = evaluate(scorer, graph, "valid", ks=(20,), metrics=("recall",))["recall@20"]
            values = ", ".join(f"{key} {getattr(hyperparameters, key):g}" for key in config.choices)
            told = f" with {values}: validation recall@20 {recall:.4f}"
        logger.info("Teacher %s%s, %.1f s", name, told, time.perf_counter() - started)
        if best is None or recall > best[0]:
            best = recall, scorer
    assert best is not None
    return best[1]


def _made(name: str, hyperparameters: Any, graph: HeteroData) -> Recommender:
    try:
        check_requirements(name, hyperparameters, graph)
        return find_model(name)(graph, hyperparameters).to(graph[INTERACTS].edge_index.device)
    except ConfigError as error:
        raise ConfigError(
            f"The teacher {name}: {error} For another teacher, --set \"training.teacher.model={{name='itemknn'}}\" "
            "--set training.teacher.l2_weights=[] --set training.teacher.user_exponents=[]; for none, "
            "--set training.teacher=none."
        ) from error
