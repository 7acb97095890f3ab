"""What an epoch of triplets promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_geometric.data import HeteroData

from dream_pyg.errors import TrainingError
from dream_pyg.graph.schema import INTERACTS, ITEM, USER, label_name
from dream_pyg.training.triplets import TripletSampler

MATRICES = st.tuples(st.integers(1, 6), st.integers(1, 7), st.integers(0, 2**32 - 1)).map(
    lambda sizes: np.random.default_rng(sizes[2]).random(sizes[:2]) < 0.5
)


def graph_of(train: np.ndarray) -> HeteroData:
    """A graph of the train pairs of a matrix (U, I), in random order."""
    graph = HeteroData()
    graph[USER].num_nodes, graph[ITEM].num_nodes = train.shape
    pairs = torch.from_numpy(np.stack(np.nonzero(train)))
    order = torch.randperm(pairs.size(1), generator=torch.Generator().manual_seed(0))
    graph[INTERACTS][label_name("train")] = pairs[:, order]
    return graph


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(deadline=None)
@given(MATRICES, st.integers(0, 1000))
def test_every_rankable_pair_once_with_a_train_item_the_user_did_not_take(train, seed):
    train_items = train.any(axis=0)
    rankable = train & ~train[:, train_items].all(axis=1, keepdims=True)
    if not rankable.any():
        with pytest.raises(TrainingError, match="nothing to rank"):
            TripletSampler(graph_of(train))
        return
    sampler = TripletSampler(graph_of(train))
    user, pos_item, neg_item = sampler.epoch(seeded(seed))
    assert len(sampler) == len(user) == rankable.sum()
    assert sorted(zip(user.tolist(), pos_item.tolist(), strict=True)) == list(zip(*np.nonzero(rankable), strict=True))
    assert not train[user, neg_item].any()
    assert train_items[neg_item].all()


@settings(deadline=None)
@given(MATRICES, st.integers(0, 1000), st.integers(1, 12))
def test_a_negative_of_a_batch_is_a_train_item_that_the_user_did_not_take(train, seed, batch_size):
    train_items = train.any(axis=0)
    if not (train & ~train[:, train_items].all(axis=1, keepdims=True)).any():
        return
    sampler, plain = TripletSampler(graph_of(train), batch_size=batch_size), TripletSampler(graph_of(train))
    triplets = sampler.epoch(seeded(seed))
    for one, other in zip(triplets[:2], plain.epoch(seeded(seed))[:2], strict=True):
        assert torch.equal(one, other)
    assert not train[triplets.user, triplets.neg_item].any()
    assert train_items[triplets.neg_item].all()


def test_negatives_of_a_batch_are_positives_of_it_each_item_as_often_however_popular_it_is():
    """Of users with one item each, whose batches have many items of everybody else."""
    degree = np.array([2, 4, 8, 16, 32, 64])
    train = np.zeros((degree.sum(), len(degree)), dtype=bool)
    train[np.arange(degree.sum()), np.repeat(np.arange(len(degree)), degree)] = True
    sampler, generator, counts = TripletSampler(graph_of(train), batch_size=63), seeded(0), np.zeros(len(degree))
    rounds = 500
    for _ in range(rounds):
        _, pos_item, neg_item = sampler.epoch(generator)
        for positive, negative in zip(pos_item.split(63), neg_item.split(63), strict=True):
            assert torch.isin(negative, positive).all()
        counts += np.bincount(neg_item, minlength=len(degree))
    # A user's own item is none of its negatives: the popular ones lose more.
    possible = degree.sum() - degree
    share = counts / possible / (counts / possible).sum()
    assert np.abs(share - 1 / len(degree)).max() < 0.05


def test_an_epoch_is_a_function_of_the_generator_and_differs_between_epochs():
    sampler = TripletSampler(graph_of(np.random.default_rng(0).random((20, 15)) < 0.3))
    generator = seeded(7)
    first, second = sampler.epoch(generator), sampler.epoch(generator)
    again = sampler.epoch(seeded(7))
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    for one, other in zip(first, second, strict=True):
        assert not torch.equal(one, other)


def test_a_short_epoch_has_different_pairs_each_as_likely_as_any_other():
    train = np.random.default_rng(0).random((12, 10)) < 0.5
    sampler = TripletSampler(graph_of(train))
    generator, counts, rounds, short = seeded(0), np.zeros(train.shape), 4000, len(sampler) // 10
    first = np.zeros(train.shape)
    for _ in range(rounds):
        user, pos_item, neg_item = sampler.epoch(generator, short)
        assert len(set(zip(user.tolist(), pos_item.tolist(), strict=True))) == len(neg_item) == short
        counts[user, pos_item] += 1
        first[user[0], pos_item[0]] += 1
    for drawn, expected in ((counts, rounds * short / len(sampler)), (first, rounds / len(sampler))):
        assert not drawn[~train].any()
        assert np.abs(drawn[train] - expected).max() < 5 * np.sqrt(expected)


def test_the_order_of_the_stored_pairs_does_not_move_the_negatives_out_of_place():
    train = np.random.default_rng(1).random((9, 8)) < 0.4
    graph = graph_of(train)
    graph[INTERACTS][label_name("train")] = graph[INTERACTS][label_name("train")].flip(1)
    user, _, neg_item = TripletSampler(graph).epoch(seeded(0))
    assert not train[user, neg_item].any()


def test_negatives_are_uniform_over_the_train_items_that_the_user_did_not_take():
    train = np.zeros((3, 12), dtype=bool)
    train[0, [0, 1]] = True
    train[1, [2, 3, 4, 5, 6]] = True
    train[2, [7, 8, 0]] = True  # items 9 to 11 occur in no train interaction
    sampler = TripletSampler(graph_of(train))
    generator, counts = seeded(0), np.zeros(train.shape)
    for _ in range(2000):
        user, _, neg_item = sampler.epoch(generator)
        np.add.at(counts, (user, neg_item), 1)
    allowed = ~train & train.any(axis=0)
    assert not counts[~allowed].any()
    for user in range(3):
        observed = counts[user, allowed[user]]
        expected = 2000 * train[user].sum() / allowed[user].sum()
        statistic = ((observed - expected) ** 2 / expected).sum()
        degrees = torch.tensor((len(observed) - 1) / 2)
        p_value = torch.special.gammaincc(degrees, torch.tensor(statistic / 2, dtype=torch.float32))
        assert p_value > 0.01, f"user {user}: chi-square {statistic:.1f}"


def test_shuffling_is_uniform_over_positions():
    train = np.eye(4, dtype=bool)
    sampler, generator = TripletSampler(graph_of(train)), seeded(0)
    counts = np.zeros((4, 4))
    for _ in range(2000):
        counts[np.arange(4), sampler.epoch(generator).user] += 1
    statistic = ((counts - 500) ** 2 / 500).sum()  # a doubly stochastic table: (4 - 1)^2 degrees of freedom
    assert torch.special.gammaincc(torch.tensor(4.5), torch.tensor(statistic / 2, dtype=torch.float32)) > 0.01


def test_a_user_with_every_train_item_is_left_out_and_drawing_ends():
    train = np.zeros((2, 100), dtype=bool)
    train[0, :99] = True  # everything that occurs in train: no negative
    train[1, :98] = True  # one negative in 99, so drawing repeats hundreds of times
    sampler = TripletSampler(graph_of(train))
    user, pos_item, neg_item = sampler.epoch(seeded(0))
    assert (user == 1).all()
    assert pos_item.sort().values.tolist() == list(range(98))
    assert (neg_item == 98).all()


def test_a_user_with_almost_everything_gets_what_is_left() -> None:
    graph = HeteroData()
    graph["user"].num_nodes, graph["item"].num_nodes = 2, 500
    user = torch.cat([torch.zeros(499, dtype=torch.long), torch.ones(1, dtype=torch.long)])
    graph[INTERACTS].train_edge_label_index = torch.stack([user, torch.arange(500)])
    triplets = TripletSampler(graph).epoch(torch.Generator().manual_seed(0))
    assert triplets.neg_item[triplets.user == 0].unique().tolist() == [499]
