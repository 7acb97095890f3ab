"""InfoNCE and Behavior-Modal Alignment against Eq. 8-11."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dream_pyg.nn import alignment
from dream_pyg.nn.alignment import BehaviorModalAlignment, Pairs, in_batch_contrast, info_nce
from tests.oracles import dream
from tests.oracles.gradients import numerical_gradient

TAU = 0.2


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("temperature", [0.07, 0.2, 2.0])
@pytest.mark.parametrize("batch", [1, 2, 9])
def test_info_nce_is_the_oracle_and_its_gradient(normalize, temperature, batch):
    query, key = rows(batch, 4, seed=1).requires_grad_(), rows(batch, 4, seed=2).requires_grad_()
    loss = info_nce(query, key, temperature, normalize=normalize)
    loss.backward()
    Q, K = query.detach().numpy(), key.detach().numpy()

    def oracle(Q, K):
        return dream.infonce(Q, K, temperature, normalize, "mean")

    np.testing.assert_allclose(loss.item(), oracle(Q, K), rtol=1e-12, atol=1e-13)
    # Central differences themselves are only good to about 1e-9 of a loss of this size.
    np.testing.assert_allclose(query.grad, numerical_gradient(lambda Q: oracle(Q, K), Q), atol=2e-8)
    np.testing.assert_allclose(key.grad, numerical_gradient(lambda K: oracle(Q, K), K), atol=2e-8)


@pytest.mark.parametrize("normalize", [True, False])
def test_info_nce_is_cross_entropy_of_the_logits(normalize):
    query, key = rows(33, 16, seed=3).requires_grad_(), rows(33, 16, seed=4).requires_grad_()
    left, right = (F.normalize(query, dim=-1), F.normalize(key, dim=-1)) if normalize else (query, key)
    expected = F.cross_entropy(left @ right.T / TAU, torch.arange(33))
    expected_grads = torch.autograd.grad(expected, (query, key))
    loss = info_nce(query, key, TAU, normalize=normalize)
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=1e-14)
    for grad, expected_grad in zip(torch.autograd.grad(loss, (query, key)), expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("wanted", ["query", "key"])
def test_info_nce_gives_the_same_gradient_when_only_one_side_wants_it(wanted):
    query, key = rows(6, 4, seed=1).requires_grad_(), rows(6, 4, seed=2).requires_grad_()
    both = dict(zip(("query", "key"), torch.autograd.grad(info_nce(query, key, TAU), (query, key)), strict=True))
    sides = {"query": query.detach(), "key": key.detach()}
    sides[wanted].requires_grad_()
    (alone,) = torch.autograd.grad(info_nce(sides["query"], sides["key"], TAU), sides[wanted])
    assert torch.equal(alone, both[wanted])


REPEATED = Pairs(torch.tensor([0, 2, 2, 1, 0, 2, 3]), torch.tensor([4, 1, 1, 0, 4, 3, 2]))


@pytest.mark.parametrize("temperature", [0.01, 0.2])
def test_rows_given_once_are_those_of_the_batch(temperature):
    query, key = (F.normalize(rows(n, 4, seed=n), dim=-1).requires_grad_() for n in (4, 5))
    loss = in_batch_contrast(query, key, temperature, is_unit=True, pairs=REPEATED)
    expected = in_batch_contrast(query[REPEATED.query], key[REPEATED.key], temperature, is_unit=True)
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=1e-14)
    expected_grads = torch.autograd.grad(expected, (query, key))
    for grad, expected_grad in zip(torch.autograd.grad(loss, (query, key)), expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-11, atol=1e-14)


def test_rows_given_once_may_be_rounded():
    random = torch.Generator().manual_seed(0)
    pairs = Pairs(torch.randint(0, 40, (900,), generator=random), torch.randint(0, 30, (900,), generator=random))
    query, key = (F.normalize(rows(n, 16, seed=n), dim=-1).float().requires_grad_() for n in (40, 30))
    exact = in_batch_contrast(query, key, TAU, is_unit=True, pairs=pairs)
    rounded = in_batch_contrast(query, key, TAU, is_unit=True, pairs=pairs, dtype=torch.bfloat16)
    torch.testing.assert_close(rounded, exact, rtol=1e-3, atol=0)
    for one, other in zip(
        torch.autograd.grad(rounded, (query, key)), torch.autograd.grad(exact, (query, key)), strict=True
    ):
        assert (one - other).norm() < 0.02 * other.norm()


@pytest.mark.parametrize("normalize", [True, False])
def test_alignment_of_rows_given_once(normalize):
    users, items = (rows(4, 3, seed=s) for s in (1, 2)), (rows(5, 3, seed=s) for s in (3, 4))
    (behavior_user, modal_user), (behavior_item, modal_item) = users, items
    alignment = BehaviorModalAlignment(0.3, 0.7, temperature=TAU, normalize=normalize)
    user, item = REPEATED
    once = alignment(behavior_user, behavior_item, modal_user, modal_item, user_row=user, item_row=item)
    often = alignment(behavior_user[user], behavior_item[item], modal_user[user], modal_item[item])
    torch.testing.assert_close(once, often, rtol=1e-12, atol=0)


@pytest.mark.parametrize("temperature", [0.005, 0.2])
def test_keys_that_no_example_has_do_not_count(temperature):
    query = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    key = torch.tensor([[-1.0, 0.0], [0.0, -1.0], [1.0, 0.0]], requires_grad=True)  # the last is nobody's
    pairs = Pairs(torch.tensor([0, 1]), torch.tensor([0, 1]))
    loss = in_batch_contrast(query, key, temperature, is_unit=True, pairs=pairs)
    expected = F.cross_entropy(query @ key[:2].T / temperature, torch.arange(2))
    torch.testing.assert_close(loss, expected)
    for grad, other in zip(
        torch.autograd.grad(loss, (query, key)), torch.autograd.grad(expected, (query, key)), strict=True
    ):
        torch.testing.assert_close(grad, other)


def test_a_small_loss_of_large_logits_is_no_noise():
    both = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0))
    assert F.cross_entropy(both @ both.T / TAU, torch.arange(2000)) == 0
    assert info_nce(both, both, TAU, normalize=False).abs() < 1e-5


@pytest.mark.parametrize("temperature", [0.01, 0.2])
def test_weights_of_keys_are_factors_of_their_exponentials(temperature):
    query, key = (F.normalize(rows(n, 4, seed=n), dim=-1).requires_grad_() for n in (4, 5))
    weight = torch.tensor([0.5, 2.0, 1.0, 4.0, 0.25], dtype=torch.float64)
    loss = in_batch_contrast(query, key, temperature, is_unit=True, pairs=REPEATED, key_weight=weight)
    logits = query[REPEATED.query] @ key[REPEATED.key].T / temperature
    expected = ((logits + weight[REPEATED.key].log()).logsumexp(dim=1) - logits.diagonal()).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-14)
    expected_grads = torch.autograd.grad(expected, (query, key))
    for grad, expected_grad in zip(torch.autograd.grad(loss, (query, key)), expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("normalize", [True, False])
def test_alignment_weighs_users_and_items_as_negatives(normalize):
    parts = [rows(6, 4, seed=seed) for seed in range(4)]  # behavior user, behavior item, modal user, modal item
    user_weight, item_weight = rows(6, seed=5).exp(), rows(6, seed=6).exp()
    alignment = BehaviorModalAlignment(0.3, 0.7, temperature=TAU, normalize=normalize)
    terms = alignment(*parts, user_weight=user_weight, item_weight=item_weight)
    behavior_user, behavior_item, modal_user, modal_item = (
        F.normalize(part, dim=-1) if normalize else part for part in parts
    )

    def weighed(query, key, weight):
        logits = query @ key.T / TAU
        return ((logits + weight.log()).logsumexp(dim=1) - logits.diagonal()).mean()

    intra = weighed(behavior_user, behavior_item, item_weight) + weighed(modal_user, modal_item, item_weight)
    inter = weighed(behavior_user, modal_user, user_weight) + weighed(behavior_item, modal_item, item_weight)
    torch.testing.assert_close(terms, {"intra": 0.3 * intra, "inter": 0.7 * inter}, rtol=1e-12, atol=0)


def test_weights_of_keys_make_a_batch_an_estimate_of_the_whole_catalogue():
    key, query = F.normalize(rows(40, 8, seed=1), dim=-1), F.normalize(rows(1, 8, seed=2), dim=-1)
    popularity = torch.arange(10, 50, dtype=torch.float64)
    drawn = torch.multinomial(popularity, 100_000, replacement=True, generator=torch.Generator().manual_seed(0))
    query_row = torch.zeros_like(drawn)
    weight = popularity.sum() / (len(key) * popularity)
    logits = (query @ key.T).squeeze(0) / TAU
    positive = logits[drawn].mean()

    def sum_of(loss):
        return (loss + positive).exp() / len(drawn)

    corrected = sum_of(
        in_batch_contrast(query, key, TAU, is_unit=True, pairs=Pairs(query_row, drawn), key_weight=weight)
    )
    torch.testing.assert_close(corrected, logits.exp().mean(), rtol=0.02, atol=0)
    assert not torch.isclose(
        sum_of(in_batch_contrast(query, key, TAU, is_unit=True, pairs=Pairs(query_row, drawn))), corrected, rtol=0.05
    )


def test_gradcheck_of_info_nce_over_unit_rows():
    inputs = (rows(5, 3, seed=1).requires_grad_(), rows(5, 3, seed=2).requires_grad_())
    assert torch.autograd.gradcheck(lambda query, key: info_nce(query, key, TAU), inputs)


def test_gradient_is_scaled_by_what_comes_from_above():
    query, key = rows(5, 3, seed=1).requires_grad_(), rows(5, 3, seed=2)
    (once,) = torch.autograd.grad(info_nce(query, key, TAU), query)
    (weighted,) = torch.autograd.grad(0.25 * info_nce(query, key, TAU), query)
    assert torch.equal(weighted, 0.25 * once)


def test_normalised_info_nce_ignores_the_length_of_rows():
    query, key = rows(8, 4, seed=1), rows(8, 4, seed=2)
    # Powers of two scale without rounding, so nothing at all may change.
    lengths = 2.0 ** torch.arange(-4, 4, dtype=torch.float64).unsqueeze(1)
    assert torch.equal(info_nce(query * lengths, key * lengths.flip(0), TAU), info_nce(query, key, TAU))
    assert not torch.isclose(
        info_nce(query * lengths, key, TAU, normalize=False), info_nce(query, key, TAU, normalize=False)
    )


def test_info_nce_of_equal_rows_is_the_log_of_the_batch():
    same = rows(1, 4).expand(7, 4)
    for normalize in (True, False):
        np.testing.assert_allclose(info_nce(same, same, TAU, normalize=normalize), np.log(7), rtol=1e-13)


@pytest.mark.parametrize("temperature", [0.005, 0.0249, 0.025, 0.05])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_info_nce_neither_overflows_nor_vanishes_at_low_temperatures(temperature, dtype):
    query = torch.eye(4).requires_grad_()
    key = -torch.ones(4, 4) / 2
    # The farthest keys there are: every one opposite to the query, at similarity -1.
    loss = info_nce(query[:1].expand(4, 4), -query[:1].detach().expand(4, 4), temperature, dtype=dtype)
    # bfloat16 rounds the logit, -1 / temperature, and its exponential, to 2^-8 of each.
    rounding = 1e-5 if dtype is None else 2.0**-8 * (1 / temperature + 1)
    np.testing.assert_allclose(loss.item(), np.log(4), rtol=0, atol=rounding)
    loss = info_nce(query, key - 1e-3 * torch.eye(4), temperature, dtype=dtype)
    loss.backward()
    assert loss.isfinite()
    assert query.grad.isfinite().all()
    assert query.grad.any()


def test_a_row_without_direction_is_equally_far_from_every_key():
    query = rows(5, 3, seed=1)
    query[2] = 0
    key = rows(5, 3, seed=2)
    np.testing.assert_allclose(info_nce(query, key, TAU), dream.infonce(query, key, TAU, True, "mean"), rtol=1e-13)


def test_bfloat16_is_float32_to_the_rounding_of_its_logits():
    query, key = rows(64, 32, seed=1).float().requires_grad_(), rows(64, 32, seed=2).float().requires_grad_()
    exact, rounded = info_nce(query, key, TAU), info_nce(query, key, TAU, dtype=torch.bfloat16)
    assert rounded.dtype == torch.float32
    # bfloat16 rounds to 2^-8 of a number: both factors and the product (at most 1 / TAU), then its exponential. The
    # logarithm of a sum moves by no more than its logits do.
    bound = 2.0**-8 * (3 / TAU + 1)
    assert 0 < abs(exact.item() - rounded.item()) <= bound
    for exact_grad, rounded_grad in zip(
        torch.autograd.grad(exact, (query, key)), torch.autograd.grad(rounded, (query, key)), strict=True
    ):
        assert rounded_grad.dtype == torch.float32
        # The same rounding moves each probability by at most a factor e^(2 bound), rows of length 1 / (B TAU).
        length = query.detach().norm(dim=1).min().item(), key.detach().norm(dim=1).min().item()
        limit = (np.exp(2 * bound) - 1 + 2.0**-7) / (len(query) * TAU * min(length))
        assert (exact_grad - rounded_grad).norm(dim=1).max() <= 2 * limit


def test_bfloat16_rounds_the_sum_of_a_row_once():
    # All exponentials are exactly 1: what is rounded after each addition would come no further than 256.
    query, key = (row.expand(3000, 4) for row in torch.eye(4)[:2].split(1))
    loss = info_nce(query, key, 0.25, dtype=torch.bfloat16).item()
    np.testing.assert_allclose(loss, np.log(3000), rtol=0, atol=2.0**-8)


def test_info_nce_of_many_rows_at_once_is_that_of_few(monkeypatch):
    query, key = rows(40, 8, seed=1).requires_grad_(), rows(40, 8, seed=2).requires_grad_()

    def of_all(normalize):
        loss = info_nce(query, key, TAU, normalize=normalize)
        return loss, *torch.autograd.grad(loss, (query, key))

    expected = [of_all(normalize) for normalize in (True, False)]
    monkeypatch.setattr(alignment, "_NUMBERS_AT_ONCE", 0)
    monkeypatch.setattr(alignment, "_LEAST_QUERIES", 7)
    torch.testing.assert_close([of_all(normalize) for normalize in (True, False)], expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("normalize", [True, False])
def test_alignment_is_equations_10_and_11(normalize):
    parts = [rows(6, 4, seed=seed) for seed in range(4)]  # behavior user, behavior item, modal user, modal item
    alignment = BehaviorModalAlignment(0.3, 0.7, temperature=TAU, normalize=normalize)
    terms = alignment(*parts)
    assert list(terms) == ["intra", "inter"]
    np.testing.assert_allclose(terms["intra"], 0.3 * dream.intra(*parts, TAU, normalize, "mean"), rtol=1e-12)
    np.testing.assert_allclose(terms["inter"], 0.7 * dream.inter(*parts, TAU, normalize, "mean"), rtol=1e-12)


@pytest.mark.parametrize(
    ("intra_weight", "inter_weight", "names"), [(0, 0, []), (0.5, 0, ["intra"]), (0, 0.5, ["inter"])]
)
def test_alignment_leaves_out_terms_of_weight_zero(intra_weight, inter_weight, names):
    parts = [rows(6, 4, seed=seed) for seed in range(4)]
    assert list(BehaviorModalAlignment(intra_weight, inter_weight)(*parts)) == names


def test_alignment_has_no_parameters_and_says_its_settings():
    alignment = BehaviorModalAlignment(0.3, 0.7, temperature=0.5, normalize=False)
    assert list(alignment.parameters()) == []
    assert repr(alignment) == (
        "BehaviorModalAlignment(intra_weight=0.3, inter_weight=0.7, temperature=0.5, normalize=False)"
    )


def aligned(temperature: float, precision: alignment.Precision) -> torch.Tensor:
    users, items, modal_users, modal_items = (rows(40, 16, seed=seed).float() for seed in range(4))
    terms = BehaviorModalAlignment(1.0, 1.0, temperature=temperature, precision=precision)(
        users, items, modal_users, modal_items
    )
    return torch.stack(list(terms.values()))


@pytest.mark.parametrize(
    ("temperature", "has_units", "rounds"), [(0.2, True, True), (0.1, True, False), (0.2, False, False)]
)
def test_auto_rounds_where_it_is_fast_and_does_not_show(temperature, has_units, rounds, monkeypatch):
    monkeypatch.setattr(alignment, "has_bfloat16_units", lambda device: has_units)
    exact, rounded, chosen = (aligned(temperature, how) for how in ("float32", "bfloat16", "auto"))
    assert not torch.equal(exact, rounded)
    assert torch.equal(chosen, rounded if rounds else exact)


@pytest.mark.parametrize(("temperature", "is_unit"), [(TAU, False), (0.02, True)])
def test_logits_without_a_bound_or_with_a_large_one_are_not_rounded(temperature, is_unit):
    query, key = (F.normalize(rows(40, 16, seed=seed), dim=-1).float() for seed in (1, 2))
    exact, asked = (
        in_batch_contrast(query, key, temperature, is_unit=is_unit, dtype=dtype) for dtype in (None, torch.bfloat16)
    )
    assert torch.equal(exact, asked)
