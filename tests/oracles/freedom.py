"""FREEDOM (arXiv 2211.06924, Section 3) in plain NumPy float64, dense and one function per equation."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from tests.oracles import dream
from tests.oracles.dream import Array


def item_graph(
    features: list[ArrayLike], has: list[ArrayLike], weights: list[float], k: int, include_self: bool
) -> Array:
    """The frozen graph: S = sum_m alpha_m D^-1/2 S_m D^-1/2, each S_m the unweighted cosine top-k of a modality.

    Args:
        features: Item features, one array a modality, each (I, F_m).
        has: Whether each item has the modality, one array a modality, each (I,).
        weights: alpha_m.
        k: Neighbours an item.
        include_self: Whether an item is one of its own k neighbours.

    Returns:
        The fused graph (I, I).
    """
    num_items = np.shape(features[0])[0]
    S = np.zeros((num_items, num_items))
    for X, present, weight in zip(features, has, weights, strict=True):
        S += weight * dream.relation_graph(X, present, k, include_self)
    return S


def pruning_probabilities(R: ArrayLike) -> Array:
    """Degree-sensitive pruning: the probability of an edge to be kept is proportional to 1 / sqrt(d_u d_i).

    Args:
        R: Train interactions (U, I).

    Returns:
        The probability of each interaction to be the first that is drawn (U, I).
    """
    R = np.asarray(R, dtype=np.float64)
    p = np.zeros_like(R)
    for user, item in np.argwhere(R):
        p[user, item] = 1.0 / math.sqrt(R[user].sum() * R[:, item].sum())
    return p / p.sum()


def encode(R: ArrayLike, S: ArrayLike, user: ArrayLike, item: ArrayLike, L_ui: int, L_ii: int) -> tuple[Array, Array]:
    """h_u is the mean over LightGCN's layers, h_i the same plus S^L_ii times the ID embeddings.

    Args:
        R: The interactions to propagate over, pruned or all (U, I).
        S: The frozen item-item graph (I, I).
        user: ID embeddings of users (U, D).
        item: ID embeddings of items (I, D).
        L_ui: Layers over R.
        L_ii: Layers over S.

    Returns:
        h_u (U, D) and h_i (I, D).
    """
    A_hat = dream.normalised(dream.adjacency(R))
    _, mean = dream.lightgcn(A_hat, np.concatenate([user, item]), L_ui)
    num_users = np.shape(user)[0]
    return mean[:num_users], mean[num_users:] + np.linalg.matrix_power(np.asarray(S), L_ii) @ np.asarray(item)


def modality_bpr(
    h_user: ArrayLike, h_modal: ArrayLike, has: ArrayLike, user: ArrayLike, pos_item: ArrayLike, neg_item: ArrayLike
) -> float:
    """BPR of users against a modality's projected features, the mean over triplets whose items both have it.

    Args:
        h_user: h_u (U, D).
        h_modal: x_m W_m of all items (I, D).
        has: Whether each item has the modality (I,).
        user: Users (B,).
        pos_item: Their positive items (B,).
        neg_item: Their negative items (B,).

    Returns:
        The loss; 0 if there is no such triplet.
    """
    losses = []
    for u, i, j in zip(user, pos_item, neg_item, strict=True):
        if np.asarray(has)[i] and np.asarray(has)[j]:
            difference = np.asarray(h_modal)[i] - np.asarray(h_modal)[j]
            losses.append(float(np.logaddexp(0.0, -math.fsum(np.asarray(h_user)[u] * difference))))
    return math.fsum(losses) / len(losses) if losses else 0.0
