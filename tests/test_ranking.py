"""Top-k rankings against sorting, in blocks of any size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from dream_pyg import ranking
from dream_pyg.graph.csr import UserItems
from dream_pyg.models import Embeddings, ItemWeights, Scorer, base
from dream_pyg.ranking import may_hit, rank_blocks, recommend
from dream_pyg.training.vote import VotedScores
from tests.oracles import ranking as oracle

SEEDS = st.integers(0, 2**32 - 1)


def scored(scores: np.ndarray) -> Embeddings:
    """Embeddings whose inner products are exactly these scores (U, I)."""
    return Embeddings(torch.from_numpy(scores), torch.eye(scores.shape[1], dtype=torch.float64))


def random_scores(generator: np.random.Generator, num_users: int, num_items: int) -> np.ndarray:
    """Distinct scores within each user, so that a ranking is the only one."""
    return np.stack([generator.permutation(num_items) for _ in range(num_users)]) / 4 - num_items / 8


def random_pairs(generator: np.random.Generator, num_users: int, num_items: int) -> np.ndarray:
    """Distinct pairs (2, E) in random order, some users with all items and some with none."""
    share = generator.choice([0.0, 0.3, 0.9, 1.0], num_users)
    pairs = np.stack(np.nonzero(generator.random((num_users, num_items)) < share[:, None]))
    return pairs[:, generator.permutation(pairs.shape[1])]


@settings(deadline=None)
@given(SEEDS, st.integers(1, 7), st.integers(1, 9), st.integers(1, 12), st.integers(1, 40))
def test_rankings_are_those_of_sorting_whatever_the_block(seed, num_users, num_items, k, block_scores):
    generator = np.random.default_rng(seed)
    scores, pairs = (make(generator, num_users, num_items) for make in (random_scores, random_pairs))
    users = generator.integers(0, num_users, generator.integers(0, 10))  # repeated, in any order, maybe none
    seen = UserItems.from_pairs(torch.from_numpy(pairs), num_users)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ranking, "_BLOCK_SCORES", block_scores)
        patched.setattr(ranking, "_LEAST_USERS", 1)
        ranked = recommend(scored(scores), torch.from_numpy(users), k, seen)
    width = min(k, num_items)
    assert ranked.item.shape == ranked.score.shape == (len(users), width)
    assert ranked.user.tolist() == users.tolist()
    for row, user in enumerate(users):
        expected = oracle.top_k(scores[user], pairs[1, pairs[0] == user], width)
        missing = width - len(expected)
        assert ranked.item[row].tolist() == expected + [-1] * missing
        assert ranked.score[row].tolist() == [*scores[user][expected], *[-np.inf] * missing]


@settings(deadline=None)
@given(SEEDS, st.integers(1, 6), st.integers(1, 8))
def test_seen_items_are_the_pairs_row_by_row(seed, num_users, num_items):
    generator = np.random.default_rng(seed)
    pairs = random_pairs(generator, num_users, num_items)
    users = generator.integers(0, num_users, 5)
    row, item = UserItems.from_pairs(torch.from_numpy(pairs), num_users).coordinates(torch.from_numpy(users))
    expected = sorted((position, i) for position, user in enumerate(users) for i in pairs[1, pairs[0] == user])
    assert sorted(zip(row.tolist(), item.tolist(), strict=True)) == expected


@settings(deadline=None)
@given(SEEDS, st.integers(1, 6), st.integers(1, 12))
def test_of_equal_scores_the_lower_id_comes_first_whatever_the_number(seed, num_users, num_items):
    scores = np.random.default_rng(seed).integers(0, 3, (num_users, num_items)).astype(float)
    expected = np.argsort(-scores, axis=1, kind="stable")
    for k in range(1, num_items + 1):
        ranked = recommend(scored(scores), torch.arange(num_users), k)
        np.testing.assert_array_equal(ranked.item, expected[:, :k])
        np.testing.assert_array_equal(ranked.score, np.take_along_axis(scores, expected, 1)[:, :k])


def test_without_seen_items_everything_is_ranked():
    scores = random_scores(np.random.default_rng(0), 4, 6)
    ranked = recommend(scored(scores), torch.arange(4), 6)
    np.testing.assert_array_equal(ranked.item, np.argsort(-scores, axis=1))


def test_an_item_of_score_minus_infinity_is_not_ranked():
    ranked = recommend(scored(np.array([[1.0, 0.0, 2.0]])), torch.tensor([0]), 2)
    assert ranked.item.tolist() == [[2, 0]]
    all_seen = UserItems.from_pairs(torch.tensor([[0, 0, 0], [0, 1, 2]]), 1)
    ranked = recommend(scored(np.array([[1.0, 0.0, 2.0]])), torch.tensor([0]), 2, all_seen)
    assert ranked.item.tolist() == [[-1, -1]]


def test_blocks_come_one_by_one_and_keep_what_they_gave(monkeypatch):
    monkeypatch.setattr(ranking, "_BLOCK_SCORES", 12)  # two users of six items
    monkeypatch.setattr(ranking, "_LEAST_USERS", 1)
    scores = random_scores(np.random.default_rng(0), 5, 6)
    blocks = list(rank_blocks(scored(scores), torch.arange(5), 3))
    assert [block.user.tolist() for block in blocks] == [[0, 1], [2, 3], [4]]
    # A buffer that is used again must not reach what was yielded.
    whole = torch.cat([block.score for block in blocks])
    np.testing.assert_array_equal(whole, -np.sort(-scores, axis=1)[:, :3])


class LargestTensor(TorchDispatchMode):
    """Remembers the most numbers that any one operation gave back."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel() if tensor.layout == torch.strided else tensor._nnz())
        return out


@pytest.mark.parametrize("block_scores", [1, 1000, 5000])
def test_memory_is_bounded_whatever_the_number_of_users(monkeypatch, block_scores):
    monkeypatch.setattr(ranking, "_BLOCK_SCORES", block_scores)
    monkeypatch.setattr(ranking, "_LEAST_USERS", 1)
    num_users, num_items = 400, 100
    generator = torch.Generator().manual_seed(0)
    embeddings = Embeddings(torch.randn(num_users, 2, generator=generator), torch.randn(num_items, 2))
    seen = UserItems.from_pairs(torch.stack([torch.arange(num_users), torch.arange(num_users) % num_items]), num_users)
    users = torch.arange(num_users)
    with LargestTensor() as largest:
        for _ in rank_blocks(embeddings, users, 10, seen):
            pass
    # Beside the inputs themselves, nothing exceeds one block, which is at least one user.
    assert num_users * num_items > 5000
    assert largest.numel <= max(block_scores, num_items, embeddings.user.numel())


def random_item_weights(generator: np.random.Generator, num_users: int, num_items: int, sparse: bool) -> ItemWeights:
    """Histories of any length and weights of which most are zero."""
    pairs = torch.from_numpy(random_pairs(generator, num_users, num_items))
    weight = torch.from_numpy(generator.standard_normal((num_items, num_items)))
    weight = weight * (torch.rand(weight.shape) < 0.4)
    return ItemWeights(UserItems.from_pairs(pairs, num_users), weight.to_sparse_csr() if sparse else weight)


@settings(deadline=None)
@given(SEEDS, st.integers(1, 7), st.integers(1, 9), st.booleans(), st.sampled_from([torch.float32, torch.float64]))
def test_item_weights_score_by_what_a_user_took(seed, num_users, num_items, sparse, dtype):
    generator = np.random.default_rng(seed)
    history, weight = random_item_weights(generator, num_users, num_items, sparse)
    scorer = ItemWeights(history, weight.to(dtype))
    assert (scorer.num_users, scorer.num_items) == (num_users, num_items)
    took = torch.zeros(num_users, num_items, dtype=torch.float64)
    took[history.coordinates(torch.arange(num_users))] = 1
    user = torch.from_numpy(generator.integers(0, num_users, generator.integers(0, 10)))
    expected = (took @ weight.to_dense())[user]
    for out in (None, torch.full((len(user), num_items), torch.nan, dtype=dtype)):
        scores = scorer.scores(user, out)
        assert scores.dtype == dtype
        np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sparse", [True, False])
def test_item_weights_rank_alike_in_blocks_and_never_all_at_once(sparse, monkeypatch):
    num_users, num_items = 90, 40
    scorer = random_item_weights(np.random.default_rng(0), num_users, num_items, sparse)
    seen, users = UserItems(*scorer.history), torch.arange(num_users)
    whole = recommend(scorer, users, 5, seen)
    monkeypatch.setattr(ranking, "_BLOCK_SCORES", 3 * num_items)
    monkeypatch.setattr(ranking, "_LEAST_USERS", 1)
    monkeypatch.setattr(base, "_NUMBERS_AT_ONCE", 7)
    with LargestTensor() as largest:
        blocks = list(rank_blocks(scorer, users, 5, seen))
    # Beside the weights themselves, nothing exceeds one block or the few weights that are added at a time.
    weights = scorer.weight.values().numel() if sparse else scorer.weight.numel()
    assert largest.numel <= max(3 * num_items, weights) < num_users * num_items / 2
    for part, parts in zip(whole, zip(*blocks, strict=True), strict=True):
        torch.testing.assert_close(torch.cat(parts), part, rtol=1e-12, atol=1e-12)


def test_no_gradient_is_kept():
    embeddings = Embeddings(torch.randn(3, 2, requires_grad=True), torch.randn(4, 2, requires_grad=True))
    assert not recommend(embeddings, torch.arange(3), 2).score.requires_grad


def test_nobody_to_rank_for():
    ranked = recommend(scored(np.zeros((3, 4))), torch.empty(0, dtype=torch.long), 2)
    assert ranked.item.shape == ranked.score.shape == (0, 2)
    assert ranked.item.dtype == torch.long


def random_scorer(kind: str, generator: np.random.Generator, num_users: int, num_items: int) -> Scorer:
    """Embeddings of few dimensions and values, so that many scores are equal, some of them but for rounding."""
    user, item = (torch.from_numpy(generator.integers(-2, 3, (n, 3)) / 3).float() for n in (num_users, num_items))
    history, weight = random_item_weights(generator, num_users, num_items, sparse=kind != "dense item weights")
    weights = ItemWeights(history, weight.float())
    if kind.endswith("item weights"):
        return weights
    embeddings = Embeddings(user, item)
    return embeddings if kind == "embeddings" else VotedScores(embeddings, weights, float(generator.choice([0.3, -2])))


SCORERS = st.sampled_from(["embeddings", "dense item weights", "sparse item weights", "voted scores"])


@settings(deadline=None)
@given(SCORERS, SEEDS, st.integers(1, 7), st.integers(1, 9))
def test_pairs_and_few_items_score_as_in_the_whole(kind, seed, num_users, num_items):
    generator = np.random.default_rng(seed)
    scorer = random_scorer(kind, generator, num_users, num_items)
    users = torch.arange(num_users)
    whole, rounding = scorer.scores(users), scorer.rounding(users)
    user, item = (torch.from_numpy(generator.integers(0, n, 20)) for n in (num_users, num_items))
    few = torch.from_numpy(generator.permutation(num_items)[: generator.integers(1, num_items + 1)])
    of_pairs, of_few = scorer.pair_scores(user, item), scorer.only(few)
    assert (of_few.num_users, of_few.num_items) == (num_users, len(few))
    assert of_pairs.dtype == whole.dtype == torch.float32
    assert ((of_pairs - whole[user, item]).abs() <= 2 * rounding[user]).all()
    assert ((of_few.scores(users) - whole[:, few]).abs() <= 2 * rounding.unsqueeze(1)).all()
    assert (rounding <= 1e-4).all()


@pytest.mark.parametrize("kind", ["embeddings", "dense item weights", "sparse item weights", "voted scores"])
def test_pairs_of_users_with_long_histories_are_scored_some_at_a_time(kind, monkeypatch):
    generator, num_users, num_items = np.random.default_rng(0), 100, 40
    scorer = random_scorer(kind, generator, num_users, num_items)
    user, item = (torch.from_numpy(generator.integers(0, n, 3000)) for n in (num_users, num_items))
    whole = scorer.pair_scores(user, item), scorer.rounding(user)
    assert scorer.pair_reads(user).sum() >= (3000 if kind == "embeddings" else 30_000)
    monkeypatch.setattr(base, "_NUMBERS_AT_ONCE", 100)
    with LargestTensor() as largest:
        parts = scorer.pair_scores(user, item), scorer.rounding(user)
    for one, other in zip(whole, parts, strict=True):
        assert torch.equal(one, other)
    # Beside the pairs and the weights themselves there are only those of some pairs.
    assert largest.numel <= max(3000, num_items**2)
    nobody = torch.empty(0, dtype=torch.long)
    assert scorer.pair_scores(nobody, nobody).shape == scorer.rounding(nobody).shape == (0,)


def test_columns_of_few_items_ascend_as_those_of_all():
    weights = random_item_weights(np.random.default_rng(0), 3, 9, sparse=True)
    for scorer in (weights, weights.only(torch.tensor([7, 2, 5, 0, 8]))):
        row = torch.repeat_interleave(torch.arange(9), scorer.weight.crow_indices().diff())
        assert (torch.diff(row * 9 + scorer.weight.col_indices()) > 0).all()


def summed_in_order(products: np.ndarray) -> np.ndarray:
    """Sums over the last axis in float32, one number after the other, the worst that a processor may do."""
    return np.add.accumulate(products.astype(np.float32), axis=-1)[..., -1]


def test_scores_of_many_summands_are_no_further_off_than_is_said():
    generator, size = np.random.default_rng(0), 4096
    user, item = (torch.from_numpy(generator.random((n, size), dtype=np.float32)) for n in (3, 5))
    embeddings = Embeddings(user, item)
    history = UserItems.from_pairs(torch.stack([torch.zeros(size, dtype=torch.long), torch.arange(size)]), 1)
    weights = ItemWeights(history, torch.from_numpy(generator.random((size, 5), dtype=np.float32)))
    for scorer, summands in (
        (embeddings, user.numpy()[:, None] * item.numpy()),
        (weights, weights.weight.numpy().T[None]),
    ):
        off = np.abs(summed_in_order(summands) - summands.astype(np.float64).sum(axis=-1)).max(axis=1)
        said = scorer.rounding(torch.arange(len(summands))).numpy()
        assert (off <= said).all()
        assert (off > said / size).all()  # so that as many summands matter


@pytest.mark.parametrize(("size", "finite"), [(1e18, True), (1e25, False), (float("nan"), False)])
@pytest.mark.parametrize("num_dims", [1, 64])
def test_nothing_is_said_of_how_far_scores_are_off_that_are_too_large(size, finite, num_dims):
    embeddings = Embeddings(torch.full((1, num_dims), size), torch.full((2, num_dims), size))
    history = UserItems.from_pairs(torch.tensor([[0, 0], [0, 1]]), 1)
    weights = ItemWeights(history, torch.full((2, 2), size if finite else 10 * size**1.5))
    for scorer in (embeddings, weights):
        assert scorer.scores(torch.tensor([0])).isfinite().all() == finite
        assert scorer.rounding(torch.tensor([0])).isfinite().all() == finite


@settings(deadline=None)
@given(SCORERS, SEEDS, st.integers(1, 7), st.integers(2, 30), st.integers(1, 12), st.integers(1, 8), st.integers(1, 40))
def test_who_cannot_hit_has_no_wanted_item_in_the_top(
    kind, seed, num_users, num_items, k, screening_items, block_scores
):
    generator = np.random.default_rng(seed)
    scorer = random_scorer(kind, generator, num_users, num_items)
    taken = generator.random((num_users, num_items)) < 0.3
    wants = (generator.random((num_users, num_items)) < 0.2) & ~taken
    wanted, seen = (
        UserItems.from_pairs(torch.from_numpy(np.stack(np.nonzero(pairs))), num_users) for pairs in (wants, taken)
    )
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ranking, "_SCORES_A_READ", 0)  # however few the items are
        patched.setattr(ranking, "_SCREENING_ITEMS", screening_items)
        patched.setattr(ranking, "_BLOCK_SCORES", block_scores)
        patched.setattr(ranking, "_LEAST_USERS", 1)
        possible = may_hit(scorer, torch.arange(num_users), wanted, k, seen)
    top = recommend(scorer, torch.arange(num_users), k, seen).item
    for row in range(num_users):
        assert possible[row] or not set(top[row].tolist()) & set(np.flatnonzero(wants[row]).tolist())


def test_most_users_are_told_apart_without_a_ranking():
    # Items fall from liked to disliked; the even users want the best item, the odd ones one of the worst.
    item = torch.linspace(1, -1, 1000).unsqueeze(1)
    wanted = UserItems(torch.arange(11), torch.tensor([0, 990] * 5))
    possible = may_hit(Embeddings(torch.ones(10, 1), item), torch.arange(10), wanted, 20)
    assert possible.tolist() == [True, False] * 5


def test_nobody_is_told_apart_where_scoring_what_is_wanted_takes_longer_than_ranking():
    # Each user took eight items and wants one: 8 reads of memory, which 32 scores each are worth.
    history = UserItems(torch.arange(0, 81, 8), torch.arange(80))
    wanted = UserItems(torch.arange(11), torch.full((10,), 100))
    for num_items, told_apart in ((8 * 32, True), (8 * 32 - 1, False)):
        weight = torch.ones(num_items, num_items)
        weight[:, 100] = 0
        possible = may_hit(ItemWeights(history, weight), torch.arange(10), wanted, 20)
        assert possible.tolist() == [not told_apart] * 10


@pytest.mark.parametrize("sparse", [False, True])
def test_weights_are_read_through_once_whatever_the_number_of_users(sparse, monkeypatch):
    scorer = random_item_weights(np.random.default_rng(0), 90, 40, sparse)
    wanted = UserItems(torch.arange(91), torch.arange(90) % 40)
    read = []
    for name in ("_largest", "_known"):
        through = getattr(ItemWeights, name)
        monkeypatch.setattr(ItemWeights, name, lambda self, of=through: read.append(of) or of(self))
    monkeypatch.setattr(ranking, "_BLOCK_SCORES", 80)
    monkeypatch.setattr(ranking, "_SCORES_A_READ", 0)
    may_hit(scorer, torch.arange(90), wanted, 5)
    assert len(read) == 1 + sparse
