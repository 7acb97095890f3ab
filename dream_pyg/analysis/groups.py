"""What a ranking does beyond its mean: for popular and rare items, for active and quiet users, and to the catalogue."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch_geometric.data import HeteroData

from dream_pyg.evaluation import evaluated_users
from dream_pyg.graph.csr import UserItems
from dream_pyg.graph.schema import INTERACTS, ITEM, USER, label_name
from dream_pyg.models.base import Scorer
from dream_pyg.ranking import rank_blocks

ITEM_GROUPS = ("rare", "middle", "popular")
USER_GROUPS = ("quiet", "middle", "active")


def measure_users(
    scorer: Scorer, graph: HeteroData, k: int = 20, split: str = "test", num_users: int | None = None
) -> tuple[dict[str, float], Tensor]:
    r"""Recall in groups, coverage and popularity of the top k; ranks as :func:`~dream_pyg.evaluation.evaluate` does.

    Items are sorted by train interactions and cut into thirds of the catalogue, users likewise into thirds of all
    users; of equals those with lower ids come first. With :math:`T_u` a user's items of the split and G a group,

    - ``recall@k of rare items`` (middle, popular): :math:`\sum_u |top_k(u) \cap T_u \cap G| / \sum_u |T_u \cap G|`;
    - ``recall@k of quiet users`` (middle, active): the mean of :math:`|top_k(u) \cap T_u| / |T_u|` over users in G;
    - ``coverage@k``: the share of the catalogue in anyone's top k;
    - ``popularity@k``: the mean number of train interactions of what is recommended over that of what was taken in
      train; above 1 the ranking makes popular items more so.

    Args:
        scorer: What a model made of the graph.
        graph: The graph with the labels.
        k: Length of the ranking.
        split: ``"valid"`` or ``"test"``.
        num_users: How many users to rank for, the sample that :func:`~dream_pyg.evaluation.evaluate` draws; by default
            all.

    Returns:
        Each figure by name, 0 where a group has nothing to find; and recall@k of each user (U,), NaN for those without
        an item in the split, or not in the sample.
    """
    train, targets = graph[INTERACTS][label_name("train")], graph[INTERACTS][label_name(split)]
    users = evaluated_users(targets, num_users)
    targets = targets[:, torch.isin(targets[0], users)]
    all_users, num_items = int(graph[USER].num_nodes), int(graph[ITEM].num_nodes)
    degree = {USER: train[0].bincount(minlength=all_users), ITEM: train[1].bincount(minlength=num_items)}
    count = {USER: targets[0].bincount(minlength=all_users), ITEM: targets[1].bincount(minlength=num_items)}
    hits = torch.zeros(all_users, device=train.device)
    found, shown = (torch.zeros(num_items, device=train.device) for _ in range(2))
    seen, wanted = UserItems.from_pairs(train, all_users), UserItems.from_pairs(targets, all_users)
    for targeted in _hits(scorer, users, seen, wanted, k):
        hits.index_add_(0, targeted.user, targeted.hit)
        found.index_add_(0, targeted.item, targeted.hit)
        shown += targeted.ranking[targeted.ranking >= 0].bincount(minlength=num_items)
    recall = hits / count[USER]
    figures = {}
    for name, group in zip(ITEM_GROUPS, _thirds(degree[ITEM]), strict=True):
        figures[f"recall@{k} of {name} items"] = _ratio(found[group].sum(), count[ITEM][group].sum())
    for name, group in zip(USER_GROUPS, _thirds(degree[USER]), strict=True):
        figures[f"recall@{k} of {name} users"] = _ratio(recall[group].nansum(), (count[USER][group] > 0).sum())
    figures[f"coverage@{k}"] = float((shown > 0).float().mean())
    of_shown = _ratio((shown * degree[ITEM]).sum(), shown.sum())
    figures[f"popularity@{k}"] = of_shown / _ratio(degree[ITEM].square().sum(), degree[ITEM].sum())
    return figures, recall


class _Hits(NamedTuple):
    """A block of users' rankings (B, k), and of each pair of theirs in the split (S,) whether it was found."""

    ranking: Tensor
    user: Tensor
    item: Tensor
    hit: Tensor


def _hits(scorer: Scorer, users: Tensor, seen: UserItems, wanted: UserItems, k: int) -> Iterator[_Hits]:
    """Rank the catalogue less what was seen for some users, who want something else."""
    for block in rank_blocks(scorer, users, k, seen):
        row, item = wanted.coordinates(block.user)
        hit = (block.item[row] == item.unsqueeze(1)).any(dim=1).float()
        yield _Hits(block.item, block.user[row], item, hit)


def _thirds(degree: Tensor) -> tuple[Tensor, ...]:
    return torch.argsort(degree, stable=True).tensor_split(3)


def _ratio(numerator: Tensor, denominator: Tensor) -> float:
    return float(numerator / denominator) if denominator else 0.0
