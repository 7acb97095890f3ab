"""Full-ranking evaluation by the field's protocol, with metrics from torch_geometric."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor
from torch_geometric.data import HeteroData

from dream_pyg import ranks
from dream_pyg.errors import ConfigError, DataError
from dream_pyg.graph.csr import UserItems
from dream_pyg.graph.processor import exact_products
from dream_pyg.graph.schema import INTERACTS, ITEM, SPLITS, USER, label_name
from dream_pyg.models.base import Scorer
from dream_pyg.ranking import may_hit, rank_blocks

METRICS = {
    "recall": "LinkPredRecall",
    "ndcg": "LinkPredNDCG",
    "precision": "LinkPredPrecision",
    "map": "LinkPredMAP",
    "hit": "LinkPredHitRatio",
    "mrr": "LinkPredMRR",
}
"""What each metric is called in :mod:`torch_geometric.metrics`, whose import takes a quarter of a command's start."""
COVERAGE = "coverage"
KS = (5, 10, 20, 50)
"""Cut-offs that are measured unless others are asked for."""
_USERS_AT_ONCE = 1 << 16
_CUT_OFF = re.compile(r"[1-9][0-9]{0,6}")
"""The digits of a cut-off, which name it in one way only; ndcg keeps a number for each place."""


@exact_products()
def evaluate(
    scorer: Scorer,
    graph: HeteroData,
    split: str,
    *,
    ks: Sequence[int] = KS,
    metrics: Sequence[str] = (*METRICS, COVERAGE),
    mask_valid: bool = False,
    num_users: int | None = None,
) -> dict[str, float]:
    r"""Rank the whole catalogue for every user of a split and average over users.

    With :math:`T_u` the user's items of the split: :math:`recall@k = hits / |T_u|`; ndcg@k has gain
    :math:`1/\log_2(rank+1)` and an ideal truncated at :math:`\min(k, |T_u|)`; precision@k divides hits by k; map@k
    divides by :math:`\min(k, |T_u|)`; hit@k and mrr@k look at the first hit; coverage@k is the share of the catalogue
    that is recommended to anyone. Train items are never ranked. Validation items compete at test, as in every
    published table, unless ``mask_valid``. Several processes rank a share of the users each, and all get the result.

    Users who surely have no hit, see :func:`~dream_pyg.ranking.may_hit`, count without being ranked, unless coverage is
    asked for: this changes no metric, and takes an eighth of the time.

    Args:
        scorer: What a model made of the graph: its embeddings, with a vote or not, or its item weights.
        graph: The graph with the labels.
        split: ``"train"``, ``"valid"`` or ``"test"``; on ``"train"`` nothing is masked.
        ks: Cut-offs.
        metrics: Names without cut-off, of ``METRICS`` or ``"coverage"``.
        mask_valid: Whether validation items are left out of the test ranking.
        num_users: How many users to rank for, a random sample that is the same each time; by default all.

    Returns:
        ``{"recall@20": ...}`` for every metric and cut-off, means over the users with an item in the split.

    Raises:
        ConfigError: If a split, metric or cut-off is unknown.
        DataError: If the split has no interactions.
    """
    _check(split, ks, metrics)
    store = graph[INTERACTS]
    targets = store[label_name(split)]
    if targets.size(1) == 0:
        raise DataError(
            f"The {split} split has no interactions to evaluate. Evaluate another (--split valid), or build the graph "
            "with another split."
        )
    num_items = graph[ITEM].num_nodes
    masked = [] if split == "train" else [store[label_name("train")]]
    if mask_valid and split == "test":
        masked.append(store[label_name("valid")])
    seen = UserItems.from_pairs(torch.cat(masked, dim=1), graph[USER].num_nodes) if masked else None
    wanted = UserItems.from_pairs(targets, graph[USER].num_nodes)

    from torch_geometric import metrics as of_pyg

    device = targets.device
    # A collection may not be empty, as it would be for coverage alone.
    asked = {(name, k) for name in metrics if name != COVERAGE for k in ks} | {("recall", max(ks))}
    made = {f"{name}@{k}": getattr(of_pyg, METRICS[name])(k) for name, k in sorted(asked)}
    ranked = of_pyg.LinkPredMetricCollection(made).to(device)
    coverage = {k: of_pyg.LinkPredCoverage(k, num_items).to(device) for k in ks if COVERAGE in metrics}
    users = evaluated_users(targets, num_users)[ranks.rank() :: ranks.num_ranks()]
    if not coverage:
        undecided = may_hit(scorer, users, wanted, max(ks), seen)
        for block in users[~undecided].split(_USERS_AT_ONCE):
            ranked.update(torch.full_like(block, num_items).unsqueeze(1), wanted.coordinates(block))
        users = users[undecided]
    for block in rank_blocks(scorer, users, max(ks), seen):
        # Empty places get an id that no item has, for an id of -1 would match another user's item.
        ranked.update(block.item.masked_fill(block.item < 0, num_items), wanted.coordinates(block.user))
        for k, metric in coverage.items():
            top = block.item[:, :k]
            metric.update(top[top >= 0].unsqueeze(1), targets)
    values = {name: float(value) for name, value in ranked.compute().items()}
    values |= {f"{COVERAGE}@{k}": float(metric.compute()) for k, metric in coverage.items()}
    return {f"{name}@{k}": values[f"{name}@{k}"] for name in metrics for k in ks}


def evaluated_users(targets: Tensor, num_users: int | None = None) -> Tensor:
    """The users of a split, or a random sample of them that is the same each time.

    Args:
        targets: Users and items of the split (2, S).
        num_users: How many users there are at most; by default all.

    Raises:
        ConfigError: If ``num_users`` is not positive.
    """
    if num_users is not None and num_users < 1:
        raise ConfigError(f"The number of users to evaluate is {num_users}; expected at least 1.")
    users = torch.unique(targets[0])
    if num_users is None or num_users >= len(users):
        return users
    sample = torch.randperm(len(users), generator=torch.Generator().manual_seed(0))[:num_users]
    return users[sample.sort().values.to(users.device)]


def parse_metric(metric: str) -> tuple[str, int]:
    """Split ``"recall@20"`` into its name and cut-off.

    Raises:
        ConfigError: If it is not a known metric with a cut-off from 1 to 9,999,999.
    """
    name, _, k = metric.partition("@")
    if (name not in METRICS and name != COVERAGE) or not _CUT_OFF.fullmatch(k):
        raise ConfigError(
            f"Unknown metric {metric!r}; expected NAME@K with NAME one of {', '.join((*METRICS, COVERAGE))} and K a "
            "number from 1 to 9,999,999 without leading zeros, for example recall@20."
        )
    return name, int(k)


def _check(split: str, ks: Sequence[int], metrics: Sequence[str]) -> None:
    if split not in SPLITS:
        raise ConfigError(f"Unknown split {split!r}; expected one of {', '.join(SPLITS)}.")
    if not ks or not metrics:
        raise ConfigError("Evaluation needs at least one metric and one cut-off.")
    for name in metrics:
        for k in ks:
            parse_metric(f"{name}@{k}")
