"""The terms of Behavior-Modal Alignment from raw arrays, weighed by the options of any model that has them."""

from __future__ import annotations

from typing import Any

import torch

from dream_pyg.data.dataset import Dataset
from dream_pyg.nn.signal import SimilaritySignal
from tests.graphs import item_features, train_matrix
from tests.oracles import dream
from tests.oracles.dream import Array


def signal_features(dataset: Dataset, modality: str, *, center: bool = True) -> tuple[Array, Array]:
    """What the signal compares of users (U, F) and of items (I, F)."""
    R = train_matrix(dataset)
    X, has = item_features(dataset, modality)
    X_user, has_user = dream.user_features(R, X, has), dream.user_has(R, has)
    if center:  # where there are features at all
        mean = X[has].mean(axis=0)
        X, X_user = (X - mean) * has[:, None], (X_user - mean) * has_user[:, None]
    return X_user, X


def default_weights(modalities) -> dict[str, float]:
    """Section 4.8.2: the image weight that is best on all data sets of the paper, whose modalities are these two."""
    if set(modalities) == {"image", "text"}:
        return {"image": 0.3, "text": 0.7}
    return {modality: 1.0 / len(modalities) for modality in modalities}


def added_terms(
    dataset: Dataset, config: Any, batch: Any, aligned: tuple[Array, Array, Array, Array]
) -> dict[str, float]:
    """Each weighted term.

    Args:
        dataset: The data.
        config: The model's options.
        batch: Users and positive items as arrays (B,).
        aligned: Behavior of these users and items, and their modal representations (B, D).
    """
    options = config.alignment_temperature, True, "mean"
    terms = {}
    if config.intra_weight:
        terms["intra"] = config.intra_weight * dream.intra(*aligned, *options)
    if config.inter_weight:
        terms["inter"] = config.inter_weight * dream.inter(*aligned, *options)
    if config.signal_weight:
        weights = default_weights(dataset.modalities)
        features = [signal_features(dataset, modality) for modality in weights]
        user_raw, item_raw = ([both[side][ids] for both in features] for side, ids in enumerate(batch))
        shares = list(weights.values())
        signal = dream.similarity_supervised(aligned[3], item_raw, aligned[2], user_raw, shares)
        for raw in (item_raw, user_raw):  # the constants that the library leaves out
            signal -= (dream.signal_target(raw, shares) ** 2).mean()
        terms["signal"] = config.signal_weight * signal
    return terms


def in_double_means(signal: SimilaritySignal, dataset: Dataset, *, center: bool = True) -> None:
    """Recompute the means of features in float64, which float32 had rounded."""
    for modality in signal.modality_weights if signal.weight else ():
        X, has = item_features(dataset, modality)
        mean = torch.from_numpy(X[has].mean(axis=0) * center)
        torch.testing.assert_close(signal.get_buffer(f"mean_{modality}"), mean, rtol=1e-6, atol=1e-6)
        signal.get_buffer(f"mean_{modality}").copy_(mean)
