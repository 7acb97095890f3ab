"""BPR, L2 and the similarity-supervised signal against the oracles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dream_pyg.nn.losses import bpr_loss, cosine_loss, l2_loss, similarity_signal, similarity_signal_norm
from tests.oracles import dream
from tests.oracles.gradients import numerical_gradient

WEIGHTS = {1: [1.0], 2: [0.3, 0.7], 3: [0.2, 0.5, 0.3]}


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def raw_features(num_modalities: int, batch: int) -> list[Tensor]:
    features = [rows(batch, 3 + 2 * modality, seed=10 + modality) for modality in range(num_modalities)]
    features[0][1] = 0  # one row lacks the first modality
    return features


def naive_signal(representation: Tensor, features: list[Tensor], weights: list[float], normalize: bool) -> Tensor:
    """Eq. 12 as it is written, with both (B, B) matrices."""
    z = F.normalize(representation, dim=-1) if normalize else representation
    units = [F.normalize(raw, dim=-1) for raw in features]
    target = sum(weight * unit @ unit.T for weight, unit in zip(weights, units, strict=True))
    return (z @ z.T - target).square().mean()


def test_bpr_is_the_oracle_and_its_gradient():
    parts = [rows(7, 4, seed=seed).requires_grad_() for seed in range(3)]
    loss = bpr_loss(*parts)
    loss.backward()
    arrays = [part.detach().numpy() for part in parts]
    np.testing.assert_allclose(loss.item(), dream.bpr(*arrays, "mean"), rtol=1e-13)
    for position, part in enumerate(parts):

        def oracle(x, position=position):
            return dream.bpr(*[x if other == position else array for other, array in enumerate(arrays)], "mean")

        np.testing.assert_allclose(part.grad, numerical_gradient(oracle, arrays[position]), atol=1e-8)


def test_bpr_of_equal_items_is_log_2_and_large_margins_do_not_overflow():
    user, item = rows(5, 4), rows(5, 4, seed=1)
    np.testing.assert_allclose(bpr_loss(user, item, item), np.log(2), rtol=1e-13)
    far = torch.full((1, 1), 1e4)
    assert bpr_loss(far, far, -far).item() == 0.0
    assert bpr_loss(far, -far, far).item() == 2e8


def test_l2_is_the_oracle():
    parts = [rows(7, 4, seed=seed) for seed in range(3)]
    np.testing.assert_allclose(l2_loss(*parts), dream.l2(*parts), rtol=1e-13)
    np.testing.assert_allclose(l2_loss(parts[0]), parts[0].square().sum() / 14, rtol=1e-13)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("num_modalities", [1, 2, 3])
def test_signal_is_equation_12_without_the_norm_of_its_target(normalize, num_modalities):
    Z, features, weights = rows(8, 4), raw_features(num_modalities, 8), WEIGHTS[num_modalities]
    constant = (dream.signal_target(features, weights) ** 2).sum() / 8**2
    expected = dream.similarity_signal(Z, features, weights, normalize=normalize) - constant
    np.testing.assert_allclose(
        similarity_signal(Z, features, weights, normalize=normalize), expected, rtol=1e-12, atol=1e-14
    )


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("num_modalities", [1, 2, 3])
def test_signal_has_the_gradient_of_the_mean_squared_error(normalize, num_modalities):
    Z, features, weights = rows(8, 4).requires_grad_(), raw_features(num_modalities, 8), WEIGHTS[num_modalities]
    (grad,) = torch.autograd.grad(similarity_signal(Z, features, weights, normalize=normalize), Z)
    (expected,) = torch.autograd.grad(naive_signal(Z, features, weights, normalize), Z)
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("num_modalities", [1, 2, 3])
def test_signal_norm_is_the_oracle_and_its_gradient(normalize, num_modalities):
    Z, features, weights = rows(6, 3).requires_grad_(), raw_features(num_modalities, 6), WEIGHTS[num_modalities]
    loss = similarity_signal_norm(Z, features, weights, normalize=normalize)
    loss.backward()

    def oracle(Z):
        return dream.similarity_signal(Z, features, weights, normalize=normalize, squared=False)

    np.testing.assert_allclose(loss.item(), oracle(Z.detach().numpy()), rtol=1e-12)
    np.testing.assert_allclose(Z.grad, numerical_gradient(oracle, Z.detach().numpy()), atol=1e-8)


@pytest.mark.parametrize("signal", [similarity_signal, similarity_signal_norm])
def test_no_gradient_runs_through_the_target(signal):
    Z, features = rows(6, 3).requires_grad_(), [raw.requires_grad_() for raw in raw_features(2, 6)]
    signal(Z, features, WEIGHTS[2]).backward()
    assert Z.grad is not None
    assert all(raw.grad is None for raw in features)


@pytest.mark.parametrize("signal", [similarity_signal, similarity_signal_norm])
def test_signal_is_smallest_where_the_similarities_agree(signal):
    features = [rows(6, 4)]
    agreeing, rotation = 3.0 * features[0], torch.linalg.qr(rows(4, 4, seed=1)).Q
    least = signal(agreeing, features, [1.0])
    torch.testing.assert_close(signal(agreeing @ rotation, features, [1.0]), least, rtol=1e-7, atol=1e-7)
    for seed in range(5):
        assert signal(agreeing + 0.1 * rows(6, 4, seed=2 + seed), features, [1.0]) > least + 1e-5


@pytest.mark.parametrize("signal", [similarity_signal, similarity_signal_norm])
def test_signal_wants_one_weight_a_modality(signal):
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        signal(rows(4, 3), raw_features(2, 4), [1.0])


@pytest.mark.parametrize("signal", [similarity_signal, similarity_signal_norm])
@pytest.mark.parametrize("normalize", [True, False])
def test_nodes_that_occur_again_may_share_their_features(signal, normalize):
    node = torch.tensor([2, 0, 2, 3, 2])
    Z, features = rows(5, 3).requires_grad_(), raw_features(2, 4)
    shared = signal(Z, features, WEIGHTS[2], node=node, normalize=normalize)
    repeated = signal(Z, [raw[node] for raw in features], WEIGHTS[2], normalize=normalize)
    torch.testing.assert_close(shared, repeated, rtol=1e-13, atol=1e-14)
    one, other = (torch.autograd.grad(value, Z)[0] for value in (shared, repeated))
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_cosine_loss_leaves_its_target_alone():
    online, target = (torch.randn(5, 3, requires_grad=True) for _ in range(2))
    of_online, of_target = torch.autograd.grad(cosine_loss(online, target), (online, target), allow_unused=True)
    assert of_online.any()
    assert of_target is None
