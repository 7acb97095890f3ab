"""SLMRec (doi 10.1109/TMM.2022.3187556) with its task FAC, in plain NumPy float64."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from tests.oracles.dream import Array, adjacency, infonce, lightgcn, normalised


def encode(R: ArrayLike, user: ArrayLike, item: ArrayLike, L: int) -> Array:
    """LightGCN over one line: the mean over layers 0 to L.

    Args:
        R: Train interactions (U, I).
        user: User embeddings (U, D).
        item: ID embeddings of items, or their projected features (I, D).
        L: The number of layers.

    Returns:
        Rows, users first (U + I, D).
    """
    return lightgcn(normalised(adjacency(R)), np.concatenate([user, item]), L)[1]


def fuse(lines: list[ArrayLike], W: ArrayLike, b: ArrayLike) -> Array:
    """A linear map of all lines side by side, written as a sum of one map a line.

    Args:
        lines: One array a line, each (N, D).
        W: ((M + 1) D, D).
        b: (D,).

    Returns:
        Representations (N, D).
    """
    parts = np.split(np.asarray(W, dtype=np.float64), len(lines))
    return sum(np.asarray(line) @ part for line, part in zip(lines, parts, strict=True)) + np.asarray(b)


def fine_and_coarse(
    identity: ArrayLike,
    modalities: list[ArrayLike],
    coarse: list[tuple[ArrayLike, ArrayLike]],
    fine: list[ArrayLike],
    tau: float,
) -> float:
    """FAC: each modality against what came through all spaces before it, plain inner products, the mean over the batch.

    Args:
        identity: The batch's items by ID (B, D).
        modalities: The same items in each modality, each (B, D).
        coarse: Weight and bias of the map into each space.
        fine: The weight of each modality's map into its space.
        tau: The temperature.

    Returns:
        The sum over modalities.
    """
    loss = 0.0
    for number in range(len(modalities)):
        # From the beginning for each space, so that the chain is the composition of its maps.
        came = np.asarray(identity, dtype=np.float64)
        for A, a in coarse[: number + 1]:
            came = came @ np.asarray(A) + np.asarray(a)
        loss += infonce(came, np.asarray(modalities[number]) @ np.asarray(fine[number]), tau, False, "mean")
    return loss


def l2(user: ArrayLike, item: ArrayLike) -> float:
    """Half the squares of the batch's ID embeddings, over B.

    Args:
        user: Of the users (B, D).
        item: Of the items (B, D).

    Returns:
        The penalty.
    """
    return 0.5 * float((np.asarray(user) ** 2).sum() + (np.asarray(item) ** 2).sum()) / np.shape(user)[0]
