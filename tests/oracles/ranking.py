"""Full-ranking evaluation, one user at a time in plain Python: what the fast evaluation must agree with.

Shape letters: U users, I items, K the length of a ranking.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Set

from numpy.typing import ArrayLike


def top_k(scores_row: ArrayLike, masked_items: Iterable[int], k: int) -> list[int]:
    """The k best items that are not masked, best first; equal scores go to the lower item id.

    Args:
        scores_row: One user's scores (I,).
        masked_items: Items never to be ranked (the user's train items).
        k: The length of the ranking, K.

    Returns:
        Up to k item ids, fewer where fewer items are left.
    """
    row = [float(score) for score in scores_row]
    masked = {int(item) for item in masked_items}
    allowed = [item for item in range(len(row)) if item not in masked]
    allowed.sort(key=lambda item: (-row[item], item))
    return allowed[:k]


def recall(ranking: list[int], targets: Set[int]) -> float:
    """The share of the targets that the ranking holds: hits / |T_u|.

    Args:
        ranking: The user's top k, best first.
        targets: The user's target items T_u, at least one.

    Returns:
        A number in [0, 1].
    """
    return sum(item in targets for item in ranking) / len(targets)


def precision(ranking: list[int], targets: Set[int], k: int) -> float:
    """The share of k places that hold a target: hits / k, also where the ranking is shorter than k.

    Args:
        ranking: The user's top k, best first.
        targets: The user's target items.
        k: The places.

    Returns:
        A number in [0, 1].
    """
    return sum(item in targets for item in ranking) / k


def ndcg(ranking: list[int], targets: Set[int], k: int) -> float:
    """DCG over the best DCG that k places allow: the ideal has min(k, |T_u|) hits at the top.

    Args:
        ranking: The user's top k, best first.
        targets: The user's target items.
        k: The places.

    Returns:
        A number in [0, 1].
    """
    dcg = 0.0
    for rank, item in enumerate(ranking, start=1):
        if item in targets:
            dcg += 1.0 / math.log2(rank + 1)
    ideal = 0.0
    for rank in range(1, min(k, len(targets)) + 1):
        ideal += 1.0 / math.log2(rank + 1)
    return dcg / ideal


def hit(ranking: list[int], targets: Set[int]) -> float:
    """1 where the ranking holds any target, else 0.

    Args:
        ranking: The user's top k, best first.
        targets: The user's target items.

    Returns:
        0.0 or 1.0.
    """
    return float(any(item in targets for item in ranking))


def reciprocal_rank(ranking: list[int], targets: Set[int]) -> float:
    """One over the rank of the first hit; 0 where there is none within the ranking.

    Args:
        ranking: The user's top k, best first.
        targets: The user's target items.

    Returns:
        A number in [0, 1].
    """
    for rank, item in enumerate(ranking, start=1):
        if item in targets:
            return 1.0 / rank
    return 0.0


def average_precision(ranking: list[int], targets: Set[int], k: int) -> float:
    """The precision at each hit, summed, over min(k, |T_u|).

    Args:
        ranking: The user's top k, best first.
        targets: The user's target items.
        k: The places.

    Returns:
        A number in [0, 1].
    """
    hits = 0
    precisions = 0.0
    for rank, item in enumerate(ranking, start=1):
        if item in targets:
            hits += 1
            precisions += hits / rank
    return precisions / min(k, len(targets))


def evaluate(
    scores: ArrayLike,
    train_pairs: Iterable[tuple[int, int]],
    target_pairs: Iterable[tuple[int, int]],
    k: int,
) -> dict[str, float]:
    """Rank all items for each user with at least one target, train items masked, and average over those users.

    A pair that occurs twice counts once. Coverage is the share of all I items that stand in the top k of at least
    one evaluated user.

    Args:
        scores: One row a user (U, I).
        train_pairs: (user, item) pairs to mask.
        target_pairs: (user, item) pairs to find.
        k: The length of the rankings, K.

    Returns:
        'recall@k', 'precision@k', 'ndcg@k', 'hit@k', 'mrr@k', 'map@k' and 'coverage@k', k as a number.

    Raises:
        ValueError: No user has a target.
    """
    rows = [list(row) for row in scores]
    num_items = len(rows[0])
    seen: list[set[int]] = [set() for _ in rows]
    wanted: list[set[int]] = [set() for _ in rows]
    for user, item in train_pairs:
        seen[int(user)].add(int(item))
    for user, item in target_pairs:
        wanted[int(user)].add(int(item))

    per_user: dict[str, list[float]] = {name: [] for name in ("recall", "precision", "ndcg", "hit", "mrr", "map")}
    recommended: set[int] = set()
    for user, row in enumerate(rows):
        targets = wanted[user]
        if not targets:
            continue
        ranking = top_k(row, seen[user], k)
        recommended.update(ranking)
        per_user["recall"].append(recall(ranking, targets))
        per_user["precision"].append(precision(ranking, targets, k))
        per_user["ndcg"].append(ndcg(ranking, targets, k))
        per_user["hit"].append(hit(ranking, targets))
        per_user["mrr"].append(reciprocal_rank(ranking, targets))
        per_user["map"].append(average_precision(ranking, targets, k))
    if not per_user["recall"]:
        raise ValueError("no user has a target")

    metrics = {f"{name}@{k}": math.fsum(values) / len(values) for name, values in per_user.items()}
    metrics[f"coverage@{k}"] = len(recommended) / num_items
    return metrics
