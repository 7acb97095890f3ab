"""DREAM (arXiv 2404.11119, first version: DRepMRec) in plain NumPy float64, one function per equation.

Written from the paper alone, to be compared with: slow and dense on purpose, with no code shared with the library.
Where the paper leaves a choice open, the choice is an argument and the docstring says so.

Shape letters: U users, I items, N = U + I nodes (or any set of rows), B batch, D embedding, F feature, K neighbours.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

TIE_DECIMALS = 12
"""Cosines that agree to this many decimals are ties: proportional rows must tie whatever their rounding."""


def unit_rows(X: ArrayLike) -> Array:
    """Divide each row by its Euclidean norm; a zero row stays zero.

    Args:
        X: Any rows (B, D).

    Returns:
        Rows of norm one, or zero (B, D).
    """
    X = np.asarray(X, dtype=np.float64)
    unit = np.zeros_like(X)
    for row in range(X.shape[0]):
        norm = math.sqrt(math.fsum(X[row] * X[row]))
        if norm > 0:
            unit[row] = X[row] / norm
    return unit


# Behavior line


def adjacency(R: ArrayLike) -> Array:
    """Equation (1): the symmetric user-item adjacency, A = [[0, R], [R^T, 0]].

    Args:
        R: Train interactions, 1 where the user interacted with the item (U, I).

    Returns:
        The adjacency, users first (U + I, U + I).
    """
    R = np.asarray(R, dtype=np.float64)
    num_users, num_items = R.shape
    A = np.zeros((num_users + num_items, num_users + num_items))
    for user in range(num_users):
        for item in range(num_items):
            if R[user, item] != 0:
                A[user, num_users + item] = 1.0
                A[num_users + item, user] = 1.0
    return A


def normalised(A: ArrayLike) -> Array:
    """The normalisation inside equations (2) and (5): D^-1/2 A D^-1/2, with D_ii = sum_j A_ij.

    D counts rows also where A is directed. A node whose row is empty has D^-1/2 = 0.

    Args:
        A: A weighted or unweighted adjacency (N, N).

    Returns:
        The normalised adjacency (N, N).
    """
    A = np.asarray(A, dtype=np.float64)
    num_nodes = A.shape[0]
    inverse_root = np.zeros(num_nodes)
    for node in range(num_nodes):
        degree = A[node].sum()
        if degree > 0:
            inverse_root[node] = 1.0 / math.sqrt(degree)
    A_hat = np.zeros((num_nodes, num_nodes))
    for row in range(num_nodes):
        for column in range(num_nodes):
            A_hat[row, column] = inverse_root[row] * A[row, column] * inverse_root[column]
    return A_hat


def propagate(A_hat: ArrayLike, E0: ArrayLike, L: int) -> list[Array]:
    """Equation (2): E^(l+1) = A_hat E^l.

    Args:
        A_hat: The normalised adjacency (U + I, U + I).
        E0: ID embeddings, users first (U + I, D).
        L: The number of layers.

    Returns:
        The L + 1 layers E^0 .. E^L, each (U + I, D).
    """
    A_hat = np.asarray(A_hat, dtype=np.float64)
    layers = [np.asarray(E0, dtype=np.float64)]
    for _ in range(L):
        layers.append(A_hat @ layers[-1])
    return layers


def readout(layers: list[Array]) -> Array:
    """Equation (3): the mean over layers 0 .. L.

    Args:
        layers: L + 1 arrays, each (U + I, D).

    Returns:
        The behavior representations, users first (U + I, D).
    """
    total_of_layers = np.zeros_like(layers[0])
    for layer in layers:
        total_of_layers = total_of_layers + layer
    return total_of_layers / len(layers)


def lightgcn(A_hat: ArrayLike, E0: ArrayLike, L: int) -> tuple[list[Array], Array]:
    """Equations (2) and (3): all layers, and their mean.

    Args:
        A_hat: The normalised adjacency (U + I, U + I).
        E0: ID embeddings, users first (U + I, D).
        L: The number of layers.

    Returns:
        The L + 1 layers, and their mean (U + I, D).
    """
    layers = propagate(A_hat, E0, L)
    return layers, readout(layers)


# Modal line


def user_features(R: ArrayLike, X: ArrayLike, has: ArrayLike) -> Array:
    """Section 3.1: a user's feature is the mean feature of the user's train items, e_m^u = mean_{i in I_u} e_m^i.

    Only items that have the modality count, in the sum and in the number divided by (the paper has no missing items).

    Args:
        R: Train interactions (U, I).
        X: Item features of one modality (I, F).
        has: Whether each item has the modality (I,).

    Returns:
        User features, zero for a user with no such item (U, F).
    """
    R = np.asarray(R, dtype=np.float64)
    X = np.asarray(X, dtype=np.float64)
    has = np.asarray(has, dtype=bool)
    features = np.zeros((R.shape[0], X.shape[1]))
    for user in range(R.shape[0]):
        items = [item for item in range(R.shape[1]) if R[user, item] != 0 and has[item]]
        for item in items:
            features[user] += X[item]
        if items:
            features[user] /= len(items)
    return features


def user_has(R: ArrayLike, has: ArrayLike) -> NDArray[np.bool_]:
    """Whether each user has a train item that has the modality: the `has` of the user relation graph.

    Args:
        R: Train interactions (U, I).
        has: Whether each item has the modality (I,).

    Returns:
        One flag a user (U,).
    """
    R = np.asarray(R, dtype=np.float64)
    has = np.asarray(has, dtype=bool)
    return np.array([any(R[user, item] != 0 and has[item] for item in range(R.shape[1])) for user in range(R.shape[0])])


def sigmoid(x: ArrayLike) -> Array:
    """The logistic function 1 / (1 + exp(-x)), without overflow.

    Args:
        x: Any array.

    Returns:
        Values in [0, 1], of the same shape.
    """
    return np.exp(-np.logaddexp(0.0, -np.asarray(x, dtype=np.float64)))


def gate(E_m: ArrayLike, E_B: ArrayLike, W: ArrayLike, b: ArrayLike) -> Array:
    """Equation (4): the filter gate, sigmoid(E_m W + b) * E_B.

    One W and b a modality, shared by users and items. Equation (4) gives it the ID embedding table as E_B.

    Args:
        E_m: Raw features of one modality (N, F).
        E_B: Behavior embeddings of the same rows (N, D).
        W: (F, D).
        b: (D,).

    Returns:
        The filtered representation (N, D).
    """
    E_m = np.asarray(E_m, dtype=np.float64)
    E_B = np.asarray(E_B, dtype=np.float64)
    W = np.asarray(W, dtype=np.float64)
    b = np.asarray(b, dtype=np.float64)
    return sigmoid(E_m @ W + b) * E_B


def cosine(X: ArrayLike) -> Array:
    """Equation (5), first line: S_ij = x_i . x_j / (|x_i| |x_j|); 0 where either row is zero.

    Args:
        X: Features (N, F).

    Returns:
        Cosine similarities (N, N).
    """
    X = np.asarray(X, dtype=np.float64)
    S = np.zeros((X.shape[0], X.shape[0]))
    for i in range(X.shape[0]):
        for j in range(X.shape[0]):
            norms = math.sqrt(math.fsum(X[i] * X[i])) * math.sqrt(math.fsum(X[j] * X[j]))
            if norms > 0:
                S[i, j] = math.fsum(X[i] * X[j]) / norms
    return S


def top_k_neighbours(X: ArrayLike, has: ArrayLike, k: int, include_self: bool) -> list[list[int]]:
    """Equation (5), second line, as lists: the k most similar rows of each row, best first.

    Only rows that have the feature choose or are chosen; a row of zeros has no direction and counts as lacking it.
    Ties go to the lower id. Self is known by its id, not by its similarity of 1: with `include_self` it always is
    the first of the k (also among duplicates with lower ids), without it never is one of them.

    Args:
        X: Features (N, F).
        has: Whether each row has the feature (N,).
        k: Neighbours a row, K; where there are fewer candidates, all of them are taken.
        include_self: Whether a row counts as one of its own k neighbours (the paper does not say).

    Returns:
        For each of the N rows the ids of its neighbours; empty for a row without the feature.
    """
    X = np.asarray(X, dtype=np.float64)
    has = np.asarray(has, dtype=bool)
    S = np.round(cosine(X), TIE_DECIMALS)
    present = [row for row in range(X.shape[0]) if has[row] and np.any(X[row] != 0)]
    neighbours: list[list[int]] = [[] for _ in range(X.shape[0])]
    for row in present:
        others = [other for other in present if other != row]
        others.sort(key=lambda other, row=row: (-S[row, other], other))
        candidates = [row, *others] if include_self else others
        neighbours[row] = candidates[:k]
    return neighbours


def relation_graph(X: ArrayLike, has: ArrayLike, k: int, include_self: bool) -> Array:
    """Equation (5): the relation graph of one modality, for items or for users.

    Row i of the unweighted S_hat marks the neighbours that i chose, so S_hat is directed; the result is
    D^-1/2 S_hat D^-1/2 with D the row sums of S_hat.

    Args:
        X: Features (N, F).
        has: Whether each row has the feature (N,).
        k: Neighbours a row, K.
        include_self: Whether a row counts as one of its own k neighbours (the paper does not say).

    Returns:
        The dense normalised graph; rows and columns without the feature are zero (N, N).
    """
    neighbours = top_k_neighbours(X, has, k, include_self)
    S_hat = np.zeros((len(neighbours), len(neighbours)))
    for row, chosen in enumerate(neighbours):
        for column in chosen:
            S_hat[row, column] = 1.0
    return normalised(S_hat)


def relation_convolution(S_tilde: ArrayLike, E_hat: ArrayLike) -> Array:
    """Equation (6): one hop over the relation graph, S_tilde E_hat.

    Args:
        S_tilde: The normalised relation graph of one modality (N, N).
        E_hat: The filtered representation of that modality (N, D).

    Returns:
        The representation in that modality (N, D).
    """
    return np.asarray(S_tilde, dtype=np.float64) @ np.asarray(E_hat, dtype=np.float64)


def fuse(representations: list[ArrayLike], weights: list[float]) -> Array:
    """Equation (7): the weighted sum over modalities; the weights lie in [0, 1] and sum to 1.

    Args:
        representations: One array a modality, each (N, D).
        weights: One weight a modality.

    Returns:
        The modal representation (N, D).

    Raises:
        ValueError: The weights are not one a modality, leave [0, 1], or do not sum to 1.
    """
    check_weights(weights, len(representations))
    fused = np.zeros(np.shape(representations[0]))
    for representation, weight in zip(representations, weights, strict=True):
        fused = fused + weight * np.asarray(representation, dtype=np.float64)
    return fused


def mean_of_taken(R: ArrayLike, E: ArrayLike) -> Array:
    """Each user's mean over the items taken. R: (U, I). E: (I, D). Returns (U, D), zero for a user without any."""
    R, E = np.asarray(R, dtype=np.float64), np.asarray(E, dtype=np.float64)
    result = np.zeros((len(R), E.shape[1]))
    for u, row in enumerate(R):
        taken = [i for i, one in enumerate(row) if one]
        for i in taken:
            result[u] += E[i] / len(taken)
    return result


def check_weights(weights: list[float], num_modalities: int) -> None:
    """The condition under equation (7): one weight a modality, each in [0, 1], together 1.

    Args:
        weights: One weight a modality.
        num_modalities: How many modalities there are.

    Raises:
        ValueError: The condition does not hold.
    """
    if len(weights) != num_modalities:
        raise ValueError(f"{len(weights)} weights for {num_modalities} modalities")
    if any(weight < 0 or weight > 1 for weight in weights) or abs(math.fsum(weights) - 1) > 1e-12:
        raise ValueError(f"modality weights must lie in [0, 1] and sum to 1, got {weights}")


# Behavior-Modal Alignment


def reduced(values: list[float], reduction: str) -> float:
    """The sum over the batch that the paper writes, or the mean that most code takes.

    Args:
        values: One value a row of the batch (B,).
        reduction: 'sum' or 'mean'.

    Returns:
        One number.

    Raises:
        ValueError: The reduction is neither.
    """
    if reduction == "sum":
        return math.fsum(values)
    if reduction == "mean":
        return math.fsum(values) / len(values)
    raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}")


def infonce(Q: ArrayLike, K: ArrayLike, tau: float, normalize: bool, reduction: str) -> float:
    """The form of equations (8), (9) and (11): -log( exp(q_b . k_b / tau) / sum_b' exp(q_b . k_b' / tau) ).

    The denominator runs over all keys of the batch, the positive one included, in one direction only (query to key).
    Rows are taken as given: a user or item that stands in the batch twice counts twice.

    Args:
        Q: Queries (B, D).
        K: Keys, row b the positive of query b (B, D).
        tau: The temperature.
        normalize: Whether rows are made unit first (the paper writes plain dot products).
        reduction: 'sum' as the paper writes, or 'mean'.

    Returns:
        The loss.
    """
    Q = np.asarray(Q, dtype=np.float64)
    K = np.asarray(K, dtype=np.float64)
    if normalize:
        Q = unit_rows(Q)
        K = unit_rows(K)
    losses = []
    for b in range(Q.shape[0]):
        logits = np.array([Q[b] @ K[other] / tau for other in range(K.shape[0])])
        largest = logits.max()
        log_denominator = largest + math.log(math.fsum(np.exp(logits - largest)))
        losses.append(log_denominator - logits[b])
    return reduced(losses, reduction)


def behavior_intra(user_B: ArrayLike, item_B: ArrayLike, tau: float, normalize: bool, reduction: str) -> float:
    """Equation (8): L_BIA, the behavior representations of users against those of their items.

    Args:
        user_B: Behavior representations of the batch's users (B, D).
        item_B: Behavior representations of the batch's positive items (B, D).
        tau: The temperature.
        normalize: Whether rows are made unit first.
        reduction: 'sum' or 'mean'.

    Returns:
        The loss.
    """
    return infonce(user_B, item_B, tau, normalize, reduction)


def modal_intra(user_M: ArrayLike, item_M: ArrayLike, tau: float, normalize: bool, reduction: str) -> float:
    """Equation (9): L_MIA, the modal representations of users against those of their items.

    Args:
        user_M: Modal representations of the batch's users (B, D).
        item_M: Modal representations of the batch's positive items (B, D).
        tau: The temperature.
        normalize: Whether rows are made unit first.
        reduction: 'sum' or 'mean'.

    Returns:
        The loss.
    """
    return infonce(user_M, item_M, tau, normalize, reduction)


def intra(
    user_B: ArrayLike,
    item_B: ArrayLike,
    user_M: ArrayLike,
    item_M: ArrayLike,
    tau: float,
    normalize: bool,
    reduction: str,
) -> float:
    """Equation (10): L_Intra = L_BIA + L_MIA.

    Args:
        user_B: Behavior representations of the batch's users (B, D).
        item_B: Behavior representations of the batch's positive items (B, D).
        user_M: Modal representations of the batch's users (B, D).
        item_M: Modal representations of the batch's positive items (B, D).
        tau: The temperature.
        normalize: Whether rows are made unit first.
        reduction: 'sum' or 'mean'.

    Returns:
        The loss.
    """
    bia = behavior_intra(user_B, item_B, tau, normalize, reduction)
    mia = modal_intra(user_M, item_M, tau, normalize, reduction)
    return bia + mia


def inter(
    user_B: ArrayLike,
    item_B: ArrayLike,
    user_M: ArrayLike,
    item_M: ArrayLike,
    tau: float,
    normalize: bool,
    reduction: str,
) -> float:
    """Equation (11): L_Inter, behavior (query) against modal (key), for the users plus for the items.

    Args:
        user_B: Behavior representations of the batch's users (B, D).
        item_B: Behavior representations of the batch's positive items (B, D).
        user_M: Modal representations of the batch's users (B, D).
        item_M: Modal representations of the batch's positive items (B, D).
        tau: The temperature.
        normalize: Whether rows are made unit first.
        reduction: 'sum' or 'mean'.

    Returns:
        The loss.
    """
    users = infonce(user_B, user_M, tau, normalize, reduction)
    items = infonce(item_B, item_M, tau, normalize, reduction)
    return users + items


def signal_target(raw: list[ArrayLike], weights: list[float], normalize_target: bool = True) -> Array:
    """The constant inside sg() of equation (12), modality by modality: sum_m w_m sim(x_m_b, x_m_b').

    The paper adds the raw features themselves, which have different widths; the similarities do add.

    Args:
        raw: Raw features of the batch's rows, one array a modality, each (B, F_m). A missing feature is a zero row,
            similar to nothing, itself included.
        weights: One weight a modality, summing to 1.
        normalize_target: Cosine similarity, or plain dot products.

    Returns:
        The target similarities (B, B).
    """
    check_weights(weights, len(raw))
    num_rows = np.shape(raw[0])[0]
    target = np.zeros((num_rows, num_rows))
    for features, weight in zip(raw, weights, strict=True):
        X = unit_rows(features) if normalize_target else np.asarray(features, dtype=np.float64)
        for i in range(num_rows):
            for j in range(num_rows):
                target[i, j] += weight * math.fsum(X[i] * X[j])
    return target


def similarity_signal(
    Z: ArrayLike,
    raw: list[ArrayLike],
    weights: list[float],
    normalize: bool = True,
    normalize_target: bool = True,
    reduction: str = "mean",
    squared: bool = True,
) -> float:
    """One of the two terms of equation (12): || Z Z^T - sg(sum_m w_m X_m X_m^T) || over the batch, diagonal included.

    With `reduction` 'mean' the squared norm is divided by B * B. With `squared` false the result is the square root
    of that: the Frobenius norm, or with 'mean' the Frobenius norm divided by B.

    Args:
        Z: Modal representations of the batch's rows (B, D).
        raw: Raw features of the same rows, one array a modality, each (B, F_m). No gradient runs through them.
        weights: One weight a modality, summing to 1.
        normalize: Whether Z is made unit first, or plain dot products are compared.
        normalize_target: Whether the raw features are.
        reduction: 'sum' or 'mean'.
        squared: Whether the norm is squared (the paper writes ||.||_2).

    Returns:
        The loss of one side, items or users.
    """
    rows = unit_rows(Z) if normalize else np.asarray(Z, dtype=np.float64)
    target = signal_target(raw, weights, normalize_target)
    squares = []
    for i in range(rows.shape[0]):
        for j in range(rows.shape[0]):
            difference = math.fsum(rows[i] * rows[j]) - target[i, j]
            squares.append(difference * difference)
    value = reduced(squares, reduction)
    return value if squared else math.sqrt(value)


def similarity_supervised(
    item_M: ArrayLike,
    item_raw: list[ArrayLike],
    user_M: ArrayLike,
    user_raw: list[ArrayLike],
    weights: list[float],
    normalize: bool = True,
    normalize_target: bool = True,
    reduction: str = "mean",
    squared: bool = True,
) -> float:
    """Equation (12): L_SSS, the similarity-supervised signal of the items plus that of the users.

    Args:
        item_M: Modal representations of the batch's positive items (B, D).
        item_raw: Their raw features, one array a modality, each (B, F_m).
        user_M: Modal representations of the batch's users (B, D).
        user_raw: Their mean features, one array a modality, each (B, F_m).
        weights: One weight a modality, summing to 1.
        normalize: Whether representations are made unit first.
        normalize_target: Whether raw features are.
        reduction: 'sum' or 'mean'.
        squared: Whether the norms are squared.

    Returns:
        The loss.
    """
    items = similarity_signal(item_M, item_raw, weights, normalize, normalize_target, reduction, squared)
    users = similarity_signal(user_M, user_raw, weights, normalize, normalize_target, reduction, squared)
    return items + users


# Optimisation and scores


def general(E_B: ArrayLike, E_M: ArrayLike) -> Array:
    """Equation (13): E_G = E_B + E_M.

    Args:
        E_B: Behavior representations (N, D).
        E_M: Modal representations of the same rows (N, D).

    Returns:
        The general representations (N, D).
    """
    return np.asarray(E_B, dtype=np.float64) + np.asarray(E_M, dtype=np.float64)


def bpr(user: ArrayLike, pos_item: ArrayLike, neg_item: ArrayLike, reduction: str) -> float:
    """Equation (14): -log sigmoid(e_u . e_i - e_u . e_i'), as log(1 + exp(-difference)), which does not overflow.

    Args:
        user: General representations of the batch's users (B, D).
        pos_item: Those of the positive items (B, D).
        neg_item: Those of the negative items (B, D).
        reduction: 'sum' as the paper writes, or 'mean'.

    Returns:
        The loss.
    """
    user = np.asarray(user, dtype=np.float64)
    pos_item = np.asarray(pos_item, dtype=np.float64)
    neg_item = np.asarray(neg_item, dtype=np.float64)
    losses = []
    for b in range(user.shape[0]):
        difference = math.fsum(user[b] * pos_item[b]) - math.fsum(user[b] * neg_item[b])
        losses.append(float(np.logaddexp(0.0, -difference)))
    return reduced(losses, reduction)


def l2(user: ArrayLike, pos_item: ArrayLike, neg_item: ArrayLike) -> float:
    """Section 4.4's regularisation, before its coefficient: half the squares of the batch's layer-0 rows, over B.

    Args:
        user: ID embeddings of the batch's users, repeated as they repeat in the batch (B, D).
        pos_item: ID embeddings of the positive items (B, D).
        neg_item: ID embeddings of the negative items (B, D).

    Returns:
        The penalty.
    """
    squares = 0.0
    for rows in (user, pos_item, neg_item):
        squares += float((np.asarray(rows, dtype=np.float64) ** 2).sum())
    return 0.5 * squares / np.shape(user)[0]


def total(
    general_loss: float,
    intra_loss: float,
    inter_loss: float,
    signal_loss: float,
    alpha: float,
    beta: float,
    gamma: float,
    l2_loss: float = 0.0,
    l2_weight: float = 0.0,
) -> float:
    """Equation (15): L = L_general + alpha L_Intra + beta L_Inter + gamma L_SSS, plus lambda times the L2 term.

    Args:
        general_loss: Equation (14).
        intra_loss: Equation (10).
        inter_loss: Equation (11).
        signal_loss: Equation (12).
        alpha: The weight of the intra-alignment.
        beta: The weight of the inter-alignment.
        gamma: The weight of the similarity-supervised signal.
        l2_loss: What `l2` gives.
        l2_weight: Section 4.4's lambda (the paper sets 1e-4).

    Returns:
        The loss to minimise.
    """
    return general_loss + alpha * intra_loss + beta * inter_loss + gamma * signal_loss + l2_weight * l2_loss


def scores(user_G: ArrayLike, item_G: ArrayLike) -> Array:
    """Equation (16): y_ui = e_G^u . e_G^i.

    Args:
        user_G: General representations of the users (U, D).
        item_G: General representations of the items (I, D).

    Returns:
        The preference scores (U, I).
    """
    return np.asarray(user_G, dtype=np.float64) @ np.asarray(item_G, dtype=np.float64).T
