"""Losses over a batch, each a scalar with its source."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dream_pyg import ranks
from dream_pyg.nn.item_features import multiply_features

_LEAST_NORM = 1e-12


def bpr_loss(user: Tensor, pos_item: Tensor, neg_item: Tensor, present: Tensor | None = None) -> Tensor:
    r"""Bayesian Personalized Ranking (arXiv 1205.2618).

    .. math::
        -\frac1B \sum \log \sigma(\mathbf u \cdot (\mathbf i - \mathbf j))

    Args:
        user: Users (B, D).
        pos_item: An interacted item of each (B, D).
        neg_item: An item of each that was not interacted with (B, D).
        present: Which examples count (B,); by default all.

    Returns:
        The mean over the batch, 0 if no example counts.
    """
    return batch_mean(F.softplus((user * (neg_item - pos_item)).sum(dim=-1)), present)


def cosine_loss(online: Tensor, target: Tensor, present: Tensor | None = None) -> Tensor:
    r"""Bootstrap without negatives: one minus the cosine to a target that gets no gradient (BM3, arXiv 2207.05969).

    .. math::
        1 - \frac1B \sum \frac{\mathbf z \cdot \mathrm{sg}(\mathbf t)}{\lVert\mathbf z\rVert \lVert\mathbf t\rVert}

    Args:
        online: Rows that learn (B, D).
        target: Rows to be like (B, D).
        present: Which examples count (B,); by default all.

    Returns:
        The mean over the batch, 0 if no example counts.
    """
    return batch_mean(1.0 - F.cosine_similarity(online, target.detach(), dim=-1), present)


def l2_loss(*rows: Tensor) -> Tensor:
    r"""Half the squared norm of the batch's embeddings, per example: :math:`\frac{1}{2B}\sum\lVert\mathbf e\rVert^2`.

    Args:
        rows: Embeddings (B, D), such as those of the users, the positive and the negative items before propagation.
    """
    squares = sum((row.square().sum() for row in rows), start=rows[0].new_zeros(()))
    return 0.5 * squares / ranks.mean_count(len(rows[0]))


def similarity_signal(
    representation: Tensor,
    features: Sequence[Tensor],
    weights: Sequence[float],
    *,
    node: Tensor | None = None,
    normalize: bool = True,
) -> Tensor:
    r"""The similarity-supervised signal (DREAM, arXiv 2404.11119, Eq. 12) for users or for items of a batch.

    With :math:`\mathbf Z` the modal representation and :math:`\mathbf R_m` the raw features in unit rows,

    .. math::
        \frac1{B^2} \left( \lVert \mathbf Z \mathbf Z^\top - \mathbf T \rVert_F^2 - \lVert \mathbf T \rVert_F^2 \right)
        = \frac{1}{B^2} \left( \lVert \mathbf Z^\top \mathbf Z \rVert_F^2
        - 2 \sum_m w_m \lVert \mathbf R_m^\top \mathbf Z \rVert_F^2 \right),
        \qquad \mathbf T = \sum_m w_m \mathbf R_m \mathbf R_m^\top

    The right-hand side never builds a (B, B) matrix. The target's own norm depends on no parameter and is left out,
    so the value may be negative; its gradient is that of the mean squared error.

    Args:
        representation: Modal representation (B, D).
        features: Raw features of the same nodes, (B, F_m) per modality; no gradient flows into them.
        weights: One weight per modality.
        node: Which row of the features belongs to each row of the representation (B,); by default the same. So the
            features of a node, (N, F_m), are multiplied once, however often the batch has it.
        normalize: Whether the representation is compared by cosine, as the features are, instead of dot product.

    Returns:
        A scalar.

    Note:
        Fidelity: cosine as the similarity of raw features is that of Eq. 5 (EXACT there, CHOSEN here), and so is their
        weighted mean over modalities (the paper adds features up before it multiplies them, which takes features of
        one width and compares those of different modalities); the squared norm is the MSE of the paper's second
        version (its first writes the norm itself).
    """
    z = F.normalize(representation, dim=-1) if normalize else representation
    total = ranks.sum_over_ranks(z.T @ z).square().sum()
    of_node = z if node is None else z.new_zeros(len(features[0]), z.size(1)).index_add(0, node, z)
    for raw, weight in zip(features, weights, strict=True):
        raw = raw.detach()
        # Scaling these rows costs a fraction of what scaling the features would.
        scaled = of_node / torch.linalg.vector_norm(raw, dim=-1, keepdim=True).to(z.dtype).clamp(min=_LEAST_NORM)
        total = total - 2.0 * weight * ranks.sum_over_ranks(multiply_features(raw.T, scaled)).square().sum()
    return total / ranks.span(len(z))[1] ** 2


def similarity_signal_norm(
    representation: Tensor,
    features: Sequence[Tensor],
    weights: Sequence[float],
    *,
    node: Tensor | None = None,
    normalize: bool = True,
) -> Tensor:
    r"""Eq. 12 as a norm, as the paper's first version: :math:`\lVert\mathbf Z\mathbf Z^\top-\mathbf T\rVert_F / B`.

    A root does not separate, so the (B, B) matrices are built: slower than :func:`similarity_signal`, same arguments.
    Each of several processes builds them whole.
    """
    z, _ = ranks.gather_rows(F.normalize(representation, dim=-1) if normalize else representation)
    target = torch.zeros(len(z), len(z), dtype=z.dtype, device=z.device)
    for raw, weight in zip(features, weights, strict=True):
        unit, _ = ranks.gather_rows(F.normalize((raw if node is None else raw[node]).detach().to(z.dtype), dim=-1))
        target.addmm_(unit, unit.T, alpha=weight)
    return torch.linalg.matrix_norm(z @ z.T - target) / len(z)


def batch_mean(values: Tensor, present: Tensor | None = None) -> Tensor:
    """The mean over the batch; where its rows are shared out among processes, this one's share of it.

    Shares have the mean as their mean over ranks (:mod:`dream_pyg.ranks`).

    Args:
        values: One or several numbers for each example (B, ...).
        present: Which examples count (B,), of one number each; by default all.
    """
    if present is None:
        return values.sum() / ranks.mean_count(values.numel())
    count = ranks.sum_over_ranks(present.sum()).clamp(min=1)
    return (values * present).sum() * ranks.num_ranks() / count
