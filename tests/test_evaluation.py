"""Full-ranking metrics against a plain oracle, one user at a time."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_geometric.data import HeteroData

from dream_pyg import ranking
from dream_pyg.errors import ConfigError, DataError
from dream_pyg.evaluation import COVERAGE, METRICS, evaluate, parse_metric
from dream_pyg.graph.build import build_graph
from dream_pyg.graph.schema import INTERACTS, ITEM, SPLITS, USER, label_name
from dream_pyg.models import Embeddings
from tests.graphs import random_dataset
from tests.oracles import ranking as oracle
from tests.test_ranking import random_scores, scored

ALL = [*METRICS, COVERAGE]


def random_graph(generator: np.random.Generator, num_users: int, num_items: int) -> HeteroData:
    """Every pair in at most one split; users without train, valid or test pairs, and users who have seen nearly all."""
    shares = generator.dirichlet([0.5] * 4, num_users)
    split = np.array([generator.choice(4, num_items, p=share) for share in shares])
    split[generator.integers(num_users), generator.integers(num_items)] = 2  # at least one test pair
    return graph_of(*(np.stack(np.nonzero(split == number)) for number in range(3)), num_users, num_items)


def graph_of(train, valid, test, num_users: int, num_items: int) -> HeteroData:
    graph = HeteroData()
    graph[USER].num_nodes, graph[ITEM].num_nodes = num_users, num_items
    for split, pairs in zip(SPLITS, (train, valid, test), strict=True):
        graph[INTERACTS][label_name(split)] = torch.as_tensor(np.asarray(pairs)).reshape(2, -1).long()
    return graph


def pairs_of(graph: HeteroData, split: str) -> list[tuple[int, int]]:
    return [tuple(pair) for pair in graph[INTERACTS][label_name(split)].T.tolist()]


def expected_metrics(scores: np.ndarray, graph: HeteroData, masked: list[str], split: str, ks) -> dict[str, float]:
    train = [pair for name in masked for pair in pairs_of(graph, name)]
    metrics: dict[str, float] = {}
    for k in ks:
        metrics |= oracle.evaluate(scores, train, pairs_of(graph, split), k)
    return {f"{name}@{k}": metrics[f"{name}@{k}"] for name in ALL for k in ks}


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 8),
    st.integers(2, 12),
    st.sets(st.integers(1, 15), min_size=1, max_size=3),
    st.sampled_from([("test", False, ["train"]), ("test", True, ["train", "valid"]), ("train", False, [])]),
    st.sampled_from([1, 17, 1 << 22]),
)
def test_metrics_are_the_oracle(seed, num_users, num_items, ks, protocol, block_scores):
    generator = np.random.default_rng(seed)
    graph, scores = random_graph(generator, num_users, num_items), random_scores(generator, num_users, num_items)
    split, mask_valid, masked = protocol
    if not pairs_of(graph, split):
        return
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ranking, "_BLOCK_SCORES", block_scores)
        patched.setattr(ranking, "_LEAST_USERS", 1)
        metrics = evaluate(scored(scores), graph, split, ks=sorted(ks), mask_valid=mask_valid)
        options = {"ks": sorted(ks), "mask_valid": mask_valid, "metrics": list(METRICS)}
        screened = evaluate(scored(scores), graph, split, **options)
    expected = expected_metrics(scores, graph, masked, split, sorted(ks))
    assert list(metrics) == list(expected)
    # Without coverage, users who surely miss are not ranked; what is summed is the same, in another order.
    assert screened == pytest.approx({name: metrics[name] for name in screened}, rel=1e-6, abs=1e-7)
    assert list(screened) == [name for name in metrics if not name.startswith(COVERAGE)]
    # torch_geometric sums in float32: 2^-24 for each of a handful of operations.
    assert metrics == pytest.approx(expected, rel=1e-6, abs=1e-7)


def test_by_hand():
    # User 0: train 0, test 1 and 3; ranks 2, 3, 1 -> hits at rank 2 of [2, 3, 1]. User 1: train 1, test 0, first.
    # User 2 has no test pair and counts nowhere.
    scores = np.array([[9.0, 1, 3, 2], [8, 9, 2, 1], [1, 2, 3, 4]])
    graph = graph_of([[0, 1, 2], [0, 1, 3]], [[2], [0]], [[0, 0, 1], [1, 3, 0]], 3, 4)
    metrics = evaluate(scored(scores), graph, "test", ks=[2])
    log3 = np.log2(3)
    assert metrics == pytest.approx(
        {
            "recall@2": (1 / 2 + 1) / 2,
            "ndcg@2": ((1 / log3) / (1 + 1 / log3) + 1) / 2,
            "precision@2": (1 / 2 + 1 / 2) / 2,
            "map@2": ((1 / 2) / 2 + 1) / 2,
            "hit@2": 1.0,
            "mrr@2": (1 / 2 + 1) / 2,
            "coverage@2": 3 / 4,
        },
        rel=1e-6,
    )


def test_places_that_stay_empty_are_nobody_elses_items():
    # User 0 has one unseen item for three places; had the empty ones an id of -1, they could match another's target.
    graph = graph_of([[0, 0], [0, 1]], [[], []], [[0, 1, 1], [2, 1, 2]], 2, 3)
    scores = np.array([[3.0, 2, 1], [1, 2, 3]])
    metrics = evaluate(scored(scores), graph, "test", ks=[3])
    expected = expected_metrics(scores, graph, ["train"], "test", [3])
    assert metrics == pytest.approx(expected, rel=1e-6)
    assert metrics["recall@3"] == 1.0
    assert metrics["precision@3"] == pytest.approx((1 / 3 + 2 / 3) / 2)


def test_train_items_are_never_ranked_and_valid_items_compete_unless_masked():
    # Scores fall with the id: 0 is a train item, 1 a valid item, 2 the test item.
    graph, scores = graph_of([[0], [0]], [[0], [1]], [[0], [2]], 1, 4), np.array([[4.0, 3, 2, 1]])
    assert evaluate(scored(scores), graph, "test", ks=[2])["mrr@2"] == 0.5
    assert evaluate(scored(scores), graph, "test", ks=[2], mask_valid=True)["mrr@2"] == 1.0
    # Validation itself is ranked the same with and without.
    assert evaluate(scored(scores), graph, "valid", ks=[2], mask_valid=True)["mrr@2"] == 1.0


def test_only_what_is_asked_for_in_that_order():
    graph, scores = graph_of([[0], [0]], [[0], [1]], [[0], [2]], 1, 4), np.array([[4.0, 3, 2, 1]])
    assert list(evaluate(scored(scores), graph, "test", ks=[3, 1], metrics=["mrr", COVERAGE])) == [
        "mrr@3",
        "mrr@1",
        "coverage@3",
        "coverage@1",
    ]
    assert list(evaluate(scored(scores), graph, "test", ks=[2], metrics=[COVERAGE])) == ["coverage@2"]


def test_a_random_permutation_of_ids_changes_nothing():
    generator = np.random.default_rng(5)
    graph, scores = random_graph(generator, 8, 12), random_scores(generator, 8, 12)
    user, item = generator.permutation(8), generator.permutation(12)
    pairs = {split: np.array(pairs_of(graph, split)).reshape(-1, 2) for split in SPLITS}
    renamed = graph_of(*(np.stack([user[pairs[s][:, 0]], item[pairs[s][:, 1]]]) for s in SPLITS), 8, 12)
    moved = np.empty_like(scores)
    moved[np.ix_(user, item)] = scores
    assert evaluate(scored(moved), renamed, "test", ks=[3]) == pytest.approx(
        evaluate(scored(scores), graph, "test", ks=[3]), rel=1e-6
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "tset"}, r"Unknown split 'tset'; expected one of train, valid, test"),
        ({"metrics": ["recal"]}, r"Unknown metric 'recal@20'.*recall, ndcg, precision, map, hit, mrr, coverage"),
        ({"ks": [0]}, "Unknown metric 'recall@0'"),
        ({"ks": [-1]}, "Unknown metric 'recall@-1'"),
        ({"ks": []}, "at least one metric and one cut-off"),
        ({"metrics": []}, "at least one metric and one cut-off"),
    ],
)
def test_refuses_what_it_does_not_know(options, message):
    graph = graph_of([[0], [0]], [[0], [1]], [[0], [2]], 1, 4)
    arguments = {"split": "test", "ks": [20], "metrics": ["recall"], **options}
    with pytest.raises(ConfigError, match=message):
        evaluate(scored(np.zeros((1, 4))), graph, **arguments)


def test_refuses_an_empty_split():
    with pytest.raises(DataError, match="valid split has no interactions"):
        evaluate(scored(np.zeros((1, 4))), graph_of([[0], [0]], [[], []], [[0], [2]], 1, 4), "valid")


def test_parses_every_metric():
    for name in ALL:
        assert parse_metric(f"{name}@7") == (name, 7)


@pytest.mark.parametrize(
    "metric",
    [
        *("recall", "recall@", "recall@0", "recall@-1", "recall@x", "recall@1.5", "@20", "f1@2"),
        *("recall@020", "recall@\uff12\uff10", "recall@20\n", "recall@10000000", f"recall@{2**31}"),
        f"recall@{'9' * 5000}",
    ],
    ids=lambda metric: ascii(metric)[:20],
)
def test_refuses_what_is_no_metric(metric):
    with pytest.raises(ConfigError, match=rf"Unknown metric {re.escape(repr(metric))}; expected NAME@K"):
        parse_metric(metric)


def test_a_cut_off_may_be_far_beyond_the_catalogue():
    graph, scores = graph_of([[0], [0]], [[0], [1]], [[0], [2]], 1, 4), np.array([[4.0, 3, 2, 1]])
    assert evaluate(scored(scores), graph, "test", ks=[9_999_999], metrics=["recall"]) == {"recall@9999999": 1.0}


def test_a_sample_of_users_is_the_mean_over_these_users():
    dataset = random_dataset()
    graph = build_graph(dataset, num_neighbors=3)
    torch.manual_seed(0)
    scorer = Embeddings(torch.randn(graph[USER].num_nodes, 4), torch.randn(graph[ITEM].num_nodes, 4))
    everyone = graph[INTERACTS][label_name("test")][0].unique()
    one_by_one = []
    for user in everyone.tolist():
        alone = graph.clone()
        targets = graph[INTERACTS][label_name("test")]
        alone[INTERACTS][label_name("test")] = targets[:, targets[0] == user]
        one_by_one.append(evaluate(scorer, alone, "test", ks=[3], metrics=["recall", "ndcg"]))
    sample = evaluate(scorer, graph, "test", ks=[3], metrics=["recall", "ndcg"], num_users=4)
    order = torch.randperm(len(everyone), generator=torch.Generator().manual_seed(0))[:4]
    for name, value in sample.items():
        assert value == pytest.approx(np.mean([one_by_one[user][name] for user in order]))
    assert evaluate(scorer, graph, "test", num_users=len(everyone)) == evaluate(scorer, graph, "test")
    with pytest.raises(ConfigError, match="at least 1"):
        evaluate(scorer, graph, "test", num_users=0)
