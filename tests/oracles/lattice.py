"""LATTICE (arXiv 2104.09036, Section 2) in plain NumPy float64, dense and one function per equation."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from tests.oracles import dream
from tests.oracles.dream import Array

Neighbours = list[list[int]]


def weighted_graph(X: ArrayLike, neighbours: Neighbours) -> Array:
    """Equations (1) to (3): the cosines of chosen neighbours, negative ones as 0, then D^-1/2 S D^-1/2.

    Args:
        X: Features, raw or projected (I, F).
        neighbours: The neighbours of each item.

    Returns:
        The normalised graph (I, I).
    """
    X = np.asarray(X, dtype=np.float64)
    S = np.zeros((len(X), len(X)))
    for item, chosen in enumerate(neighbours):
        for neighbour in chosen:
            norms = math.sqrt(math.fsum(X[item] ** 2)) * math.sqrt(math.fsum(X[neighbour] ** 2))
            S[item, neighbour] = max(0.0, math.fsum(X[item] * X[neighbour]) / norms)
    return dream.normalised(S)


def joined(S_tilde: ArrayLike, A_tilde: ArrayLike, skip: float) -> Array:
    """Equation (5): A_m = lambda S_m + (1 - lambda) A_m.

    Args:
        S_tilde: The graph of raw features (I, I).
        A_tilde: The graph of projected features (I, I).
        skip: lambda.

    Returns:
        The latent structure of the modality (I, I).
    """
    return skip * np.asarray(S_tilde) + (1.0 - skip) * np.asarray(A_tilde)


def fused(graphs: list[Array], logits: ArrayLike) -> Array:
    """Equation (6): the sum of the modalities' graphs, weighted by a softmax.

    Args:
        graphs: A_m, each (I, I).
        logits: One a modality (M,).

    Returns:
        The latent structure (I, I).
    """
    exponentials = [math.exp(logit) for logit in np.asarray(logits)]
    total = np.zeros_like(graphs[0])
    for graph, exponential in zip(graphs, exponentials, strict=True):
        total += exponential / math.fsum(exponentials) * graph
    return total


def latent_items(A: ArrayLike, item: ArrayLike, L: int) -> Array:
    """Equation (7): A^L E.

    Args:
        A: The latent structure (I, I).
        item: ID embeddings (I, D).
        L: Layers.

    Returns:
        Items (I, D).
    """
    rows = np.asarray(item, dtype=np.float64)
    for _ in range(L):
        rows = np.asarray(A) @ rows
    return rows


def encode(R: ArrayLike, latent: ArrayLike, user: ArrayLike, item: ArrayLike, L: int) -> tuple[Array, Array]:
    """Equation (9): LightGCN's mean over layers, for items plus the latent rows scaled to norm 1.

    Args:
        R: Train interactions (U, I).
        latent: Items over the latent structure (I, D).
        user: ID embeddings of users (U, D).
        item: ID embeddings of items (I, D).
        L: LightGCN's layers.

    Returns:
        Users (U, D) and items (I, D).
    """
    A_hat = dream.normalised(dream.adjacency(R))
    _, mean = dream.lightgcn(A_hat, np.concatenate([user, item]), L)
    num_users = np.shape(user)[0]
    return mean[:num_users], mean[num_users:] + dream.unit_rows(latent)
