"""GRCN (doi 10.1145/3394171.3413556, Section 2) in plain NumPy float64, one function per equation.

Attention is a dense matrix whose row is the receiver, zero where there is no interaction.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from tests.oracles.dream import Array, unit_rows


def attention(R: ArrayLike, receiver: ArrayLike, sender: ArrayLike) -> Array:
    """The softmax of inner products over the neighbours of each receiver.

    Args:
        R: Which senders are neighbours of each receiver (N, M).
        receiver: Rows (N, D).
        sender: Rows (M, D).

    Returns:
        Weights (N, M); those of a receiver without neighbours are zero.
    """
    R, weight = np.asarray(R), np.zeros(np.shape(R))
    for node in range(len(R)):
        neighbours = np.flatnonzero(R[node])
        logits = [math.fsum(np.asarray(receiver)[node] * np.asarray(sender)[other]) for other in neighbours]
        if len(neighbours):
            exponentials = np.exp(np.array(logits) - max(logits))
            weight[node, neighbours] = exponentials / math.fsum(exponentials)
    return weight


def prototypes(R: ArrayLike, preference: ArrayLike, item: ArrayLike, rounds: int) -> Array:
    """Users that move towards their items, in unit rows.

    Args:
        R: Train interactions (U, I).
        preference: Where users begin (U, D).
        item: Items in unit rows (I, D).
        rounds: How often they move.

    Returns:
        Users (U, D).
    """
    user = unit_rows(preference)
    for _ in range(rounds):
        user = unit_rows(user + attention(R, user, item) @ np.asarray(item))
    return user


def content(
    R: ArrayLike, preference: ArrayLike, projected: ArrayLike, rounds: int
) -> tuple[Array, Array, Array, Array]:
    """Content of users and items in one modality, and both attentions.

    Args:
        R: Train interactions (U, I).
        preference: Of users (U, D).
        projected: Projected features of items, before the activation (I, D).
        rounds: Of routing.

    Returns:
        Users (U, D), items (I, D), users' attention to items (U, I), items' attention to users (I, U).
    """
    R, projected = np.asarray(R), np.asarray(projected, dtype=np.float64)
    item = unit_rows(np.where(projected > 0, projected, 0.01 * projected))
    user = prototypes(R, preference, item, rounds)
    to_user, to_item = attention(R, user, item), attention(R.T, item, user)
    return user + to_user @ item, item + to_item @ user, to_user, to_item


def refined(attentions: list[ArrayLike], confidence: ArrayLike) -> Array:
    """The best modality by attention times the sender's confidence, at least zero.

    Args:
        attentions: One a modality, each (N, M).
        confidence: Of each sender in each modality (M, number of modalities).

    Returns:
        Weights (N, M).
    """
    weight = np.zeros(np.shape(attentions[0]))
    for receiver, sender in np.ndindex(weight.shape):
        supports = [
            np.asarray(a)[receiver, sender] * np.asarray(confidence)[sender, m] for m, a in enumerate(attentions)
        ]
        weight[receiver, sender] = max(0.0, *supports)
    return weight


def convolve(to_user: ArrayLike, to_item: ArrayLike, user: ArrayLike, item: ArrayLike, L: int) -> tuple[Array, Array]:
    """The sum of layers 0 to L of unit ID embeddings on the refined graph.

    Args:
        to_user: Weights of messages to users (U, I).
        to_item: Weights of messages to items (I, U).
        user: ID embeddings (U, D).
        item: ID embeddings (I, D).
        L: The number of layers.

    Returns:
        Users (U, D) and items (I, D).
    """
    users, items = [unit_rows(user)], [unit_rows(item)]
    for _ in range(L):
        next_user, next_item = np.asarray(to_user) @ items[-1], np.asarray(to_item) @ users[-1]
        users.append(next_user)
        items.append(next_item)
    return sum(users), sum(items)


def l2(*rows: ArrayLike) -> float:
    """Half the squares of all rows, over B.

    Args:
        rows: Free embeddings of the batch, each with B rows.

    Returns:
        The penalty.
    """
    return sum(float((np.asarray(part) ** 2).sum()) for part in rows) / (2 * np.shape(rows[0])[0])
