"""The oracles themselves, against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from . import dream, ranking
from .gradients import numerical_gradient

# Two users, three items: user 0 took items 0 and 1, user 1 took item 1, nobody took item 2.
R = np.array([[1, 1, 0], [0, 1, 0]])
S = 1 / math.sqrt(2)


def close(actual, expected) -> None:
    np.testing.assert_allclose(actual, expected, rtol=1e-13, atol=1e-14)


def test_adjacency_and_its_normalisation_by_hand():
    A = dream.adjacency(R)
    close(
        A,
        [
            [0, 0, 1, 1, 0],
            [0, 0, 0, 1, 0],
            [1, 0, 0, 0, 0],
            [1, 1, 0, 0, 0],
            [0, 0, 0, 0, 0],
        ],
    )
    # Degrees 2, 1 | 1, 2, 0: 1/sqrt(2*1) = S, 1/sqrt(2*2) = 0.5, 1/sqrt(1*2) = S.
    close(
        dream.normalised(A),
        [
            [0, 0, S, 0.5, 0],
            [0, 0, 0, S, 0],
            [S, 0, 0, 0, 0],
            [0.5, S, 0, 0, 0],
            [0, 0, 0, 0, 0],
        ],
    )


def test_normalisation_of_a_directed_graph_uses_row_sums_on_both_sides():
    directed = [[0, 1, 1], [0, 0, 1], [0, 0, 0]]
    # D = 2, 1, 0: only the edge 0 -> 1 keeps a weight, 1/sqrt(2) * 1/sqrt(1).
    close(dream.normalised(directed), [[0, S, 0], [0, 0, 0], [0, 0, 0]])


def test_lightgcn_two_layers_by_hand():
    A_hat = dream.normalised(dream.adjacency(R))
    layers, mean = dream.lightgcn(A_hat, [[1], [2], [3], [4], [5]], L=2)
    assert len(layers) == 3
    close(layers[0], [[1], [2], [3], [4], [5]])
    close(layers[1], [[2 + 3 * S], [4 * S], [S], [0.5 + 2 * S], [0]])
    close(layers[2], [[0.75 + S], [1 + 0.5 * S], [1.5 + 2 * S], [3 + 1.5 * S], [0]])
    close(mean, [[(3.75 + 4 * S) / 3], [1 + 1.5 * S], [1.5 + S], [(7.5 + 3.5 * S) / 3], [5 / 3]])


def test_lightgcn_without_layers_is_the_embedding():
    layers, mean = dream.lightgcn(np.ones((2, 2)), [[1, 2], [3, 4]], L=0)
    assert len(layers) == 1
    close(mean, [[1, 2], [3, 4]])


def test_user_features_average_only_items_that_have_the_modality():
    interactions = [[1, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]]
    X = [[2, 4], [6, 0], [9, 9], [100, 100]]
    has = [True, True, False, False]
    close(dream.user_features(interactions, X, has), [[4, 2], [0, 0], [0, 0]])
    assert dream.user_has(interactions, has).tolist() == [True, False, False]


def test_gate_by_hand():
    # Features (1, 2) through W and b: 1*ln3 + 2*0 + 0 = ln3, sigmoid 3/4; 1*0 + 2*1 - 2 = 0, sigmoid 1/2.
    W = [[math.log(3), 0], [0, 1]]
    close(dream.gate([[1, 2]], [[8, -6]], W, [0, -2]), [[6, -3]])


def test_sigmoid_does_not_overflow():
    close(dream.sigmoid([-1000, 0, 1000]), [0, 0.5, 1])


# Row 1 is row 0 scaled, row 3 is missing, row 4 lies at 45 degrees to rows 0, 1 and 2 alike.
FEATURES = np.array([[1, 0], [3, 0], [0, 1], [0, 0], [1, 1]])
HAS = np.array([True, True, True, False, True])


def test_cosine_by_hand():
    close(
        dream.cosine(FEATURES),
        [
            [1, 1, 0, 0, S],
            [1, 1, 0, 0, S],
            [0, 0, 1, 0, S],
            [0, 0, 0, 0, 0],
            [S, S, S, 0, 1],
        ],
    )


@pytest.mark.parametrize(
    ("k", "include_self", "expected"),
    [
        (1, False, [[1], [0], [4], [], [0]]),
        (2, False, [[1, 4], [0, 4], [4, 0], [], [0, 1]]),
        (1, True, [[0], [1], [2], [], [4]]),
        (2, True, [[0, 1], [1, 0], [2, 4], [], [4, 0]]),
        (9, False, [[1, 4, 2], [0, 4, 2], [4, 0, 1], [], [0, 1, 2]]),
        (9, True, [[0, 1, 4, 2], [1, 0, 4, 2], [2, 4, 0, 1], [], [4, 0, 1, 2]]),
    ],
)
def test_neighbours_with_duplicates_and_a_zero_row(k, include_self, expected):
    assert dream.top_k_neighbours(FEATURES, HAS, k, include_self) == expected
    graph = np.zeros((5, 5))
    for row, neighbours in enumerate(expected):
        graph[row, neighbours] = 1 / len(neighbours) if neighbours else 0
    # All rows that have any have equally many neighbours n, so D^-1/2 S D^-1/2 is S / n.
    close(dream.relation_graph(FEATURES, HAS, k, include_self), graph)


def test_relation_graph_written_out():
    # 0 -> {1, 4}, 1 -> {0, 4}, 2 -> {4, 0}, 4 -> {0, 1}: directed, for 2 chose 4 and 4 did not choose 2.
    close(
        dream.relation_graph(FEATURES, HAS, k=2, include_self=False),
        [
            [0, 0.5, 0, 0, 0.5],
            [0.5, 0, 0, 0, 0.5],
            [0.5, 0, 0, 0, 0.5],
            [0, 0, 0, 0, 0],
            [0.5, 0.5, 0, 0, 0],
        ],
    )


def test_three_copies_keep_self_by_id():
    copies = np.full((3, 4), 0.1)
    everyone = [True, True, True]
    assert dream.top_k_neighbours(copies, everyone, 1, include_self=True) == [[0], [1], [2]]
    assert dream.top_k_neighbours(copies, everyone, 2, include_self=True) == [[0, 1], [1, 0], [2, 0]]
    assert dream.top_k_neighbours(copies, everyone, 1, include_self=False) == [[1], [0], [0]]


def test_proportional_rows_tie_whatever_their_rounding():
    X = np.array([[1, 1], [1, 1], [3, 3]])
    S_ij = dream.cosine(X)
    assert S_ij[0, 1] < S_ij[0, 2]  # by one unit in the last place, and yet
    assert dream.top_k_neighbours(X, [True, True, True], 1, include_self=False) == [[1], [0], [0]]


def test_a_flag_without_a_feature_and_a_feature_without_a_flag_both_count_as_missing():
    X = [[1, 0], [0, 0], [1, 0], [1, 1]]
    assert dream.top_k_neighbours(X, [True, True, False, True], 3, include_self=False) == [[3], [], [], [0]]


def test_negative_similarity_is_still_chosen_when_nothing_is_closer():
    assert dream.top_k_neighbours([[1, 0], [-1, 0]], [True, True], 1, include_self=False) == [[1], [0]]


def test_the_only_row_with_a_feature_has_no_neighbour_but_itself():
    assert dream.top_k_neighbours([[1.0], [0.0]], [True, False], 1, include_self=False) == [[], []]
    close(dream.relation_graph([[1.0], [0.0]], [True, False], 1, include_self=True), [[1, 0], [0, 0]])


def test_convolution_and_fusion_by_hand():
    graph = [[0, 0.5, 0.5], [1, 0, 0], [0, 0, 0]]
    hop = dream.relation_convolution(graph, [[1, 2], [3, 4], [5, 6]])
    close(hop, [[4, 5], [1, 2], [0, 0]])
    close(dream.fuse([hop, np.ones((3, 2))], [0.25, 0.75]), [[1.75, 2], [1, 1.25], [0.75, 0.75]])


@pytest.mark.parametrize("weights", [[0.5, 0.6], [1.5, -0.5], [1.0]])
def test_fusion_refuses_weights_that_are_no_mixture(weights):
    with pytest.raises(ValueError, match="weights"):
        dream.fuse([np.ones((1, 1)), np.ones((1, 1))], weights)


def test_infonce_two_rows_by_hand():
    # Logits of query 0: 1*1/0.5 = 2 and 0; of query 1: 0 and 2*1/0.5 = 4. -log softmax = log(1 + e^-gap).
    Q, K = [[1, 0], [0, 2]], [[1, 0], [0, 1]]
    first, second = math.log(1 + math.exp(-2)), math.log(1 + math.exp(-4))
    close(dream.infonce(Q, K, 0.5, normalize=False, reduction="sum"), first + second)
    close(dream.infonce(Q, K, 0.5, normalize=False, reduction="mean"), (first + second) / 2)
    # Unit rows: both gaps are 2.
    close(dream.infonce(Q, K, 0.5, normalize=True, reduction="sum"), 2 * first)


def test_infonce_sums_over_keys_not_queries():
    # Query 0 sees logits 1 and 2: log(e + e^2) - 1 = log(1 + e). Query 1 is zero: log 2.
    value = dream.infonce([[1, 0], [0, 0]], [[1, 0], [2, 0]], 1.0, normalize=False, reduction="sum")
    close(value, math.log(1 + math.e) + math.log(2))


def test_infonce_does_not_overflow_and_refuses_another_reduction():
    close(dream.infonce([[1000.0], [1000.0]], [[1000.0], [0.0]], 0.2, normalize=False, reduction="sum"), 5e6)
    with pytest.raises(ValueError, match="reduction"):
        dream.infonce([[1.0]], [[1.0]], 1.0, normalize=False, reduction="none")


def test_intra_pairs_users_with_items_and_inter_pairs_behavior_with_modal():
    user_B, item_B = [[1, 0], [0, 1]], [[1, 0], [0, 1]]
    user_M, item_M = [[1, 0], [0, 1]], [[0, 1], [1, 0]]
    matched, crossed = 2 * math.log(1 + math.exp(-1)), 2 * math.log(1 + math.exp(1))
    setting = {"tau": 1.0, "normalize": False, "reduction": "sum"}
    close(dream.behavior_intra(user_B, item_B, **setting), matched)
    close(dream.modal_intra(user_M, item_M, **setting), crossed)
    close(dream.intra(user_B, item_B, user_M, item_M, **setting), matched + crossed)
    # Users: behavior equals modal. Items: modal is swapped.
    close(dream.inter(user_B, item_B, user_M, item_M, **setting), matched + crossed)
    # Intra: behavior crossed, modal matched. Inter: both crossed.
    close(dream.intra(user_B, item_M, user_M, item_B, **setting), crossed + matched)
    close(dream.inter(user_B, item_M, item_M, item_B, **setting), crossed + crossed)


def test_inter_has_the_behavior_representation_as_the_query():
    behavior, modal = [[1.0], [0.0]], [[1.0], [2.0]]
    # As in the keys test: log(1 + e) + log 2 a side. The other way round it would be log(1 + e^-1) + log(1 + e^2).
    value = dream.inter(behavior, behavior, modal, modal, tau=1.0, normalize=False, reduction="sum")
    close(value, 2 * (math.log(1 + math.e) + math.log(2)))


# Cosine of the two rows: 3/5 in Z, 0 in the first modality, 1 in the second.
Z = [[3, 4], [1, 0]]
RAW = [[[1, 0], [0, 1]], [[1, 1, 0], [2, 2, 0]]]
WEIGHTS = [0.25, 0.75]


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        # Target: diagonal 1, off it 0.75. Unit rows: diagonal 0, off it 0.6 - 0.75, twice.
        ({"reduction": "sum"}, 0.045),
        ({"reduction": "mean"}, 0.01125),
        ({"reduction": "sum", "squared": False}, math.sqrt(0.045)),
        ({"reduction": "mean", "squared": False}, math.sqrt(0.045) / 2),
        # Dot products 25, 3, 3, 1: (25-1)^2 + 2 (3-0.75)^2 + 0.
        ({"reduction": "sum", "normalize": False}, 586.125),
        # Raw target 0.25 I + 0.75 [[2, 4], [4, 8]]: 0.75^2 + 2 * 2.4^2 + 5.25^2.
        ({"reduction": "sum", "normalize_target": False}, 39.645),
    ],
)
def test_similarity_signal_by_hand(variant, expected):
    close(dream.similarity_signal(Z, RAW, WEIGHTS, **variant), expected)


def test_similarity_signal_is_items_plus_users():
    # The users' representation has their target's similarities exactly: cosine 0, and one modality with cosine 0.
    user_M, user_raw = [[2, 0], [0, 7]], [[[1, 0], [0, 1]], [[0, 1, 0], [5, 0, 0]]]
    both = dream.similarity_supervised(Z, RAW, user_M, user_raw, WEIGHTS, reduction="sum")
    close(both, 0.045)
    swapped = dream.similarity_supervised(user_M, RAW, Z, user_raw, WEIGHTS, reduction="sum")
    # Items: 0 - 0.75, twice. Users: 0.6 - 0, twice.
    close(swapped, 2 * 0.5625 + 2 * 0.36)


def test_missing_feature_is_similar_to_nothing():
    close(dream.signal_target([[[1, 0], [0, 0]], [[1.0], [1.0]]], [0.5, 0.5]), [[1, 0.5], [0.5, 0.5]])


def test_general_and_scores_by_hand():
    close(dream.general([[1, 2]], [[10, 20]]), [[11, 22]])
    close(dream.scores([[1, 2], [0, 1]], [[3, 4], [5, 6], [7, 8]]), [[11, 17, 23], [4, 6, 8]])


def test_bpr_by_hand():
    user, pos_item, neg_item = [[1, 0], [0, 1]], [[1, 0], [0, 2]], [[0, 1], [9, 5]]
    expected = math.log(1 + math.exp(-1)) + math.log(1 + math.exp(3))
    close(dream.bpr(user, pos_item, neg_item, "sum"), expected)
    close(dream.bpr(user, pos_item, neg_item, "mean"), expected / 2)
    close(dream.bpr([[1.0], [1.0]], [[0.0], [2000.0]], [[1000.0], [0.0]], "sum"), 1000)


def test_l2_by_hand():
    # Squares 5 + 9 + 1 = 15 in the first row, 0 + 4 + 1 = 5 in the second; half of 20 over B = 2.
    close(dream.l2([[1, 2], [0, 0]], [[3, 0], [0, 2]], [[0, 1], [1, 0]]), 5)


def test_total_by_hand():
    close(dream.total(1, 2, 3, 4, alpha=0.1, beta=0.01, gamma=0.001), 1.234)
    close(dream.total(1, 2, 3, 4, 0.1, 0.01, 0.001, l2_loss=5, l2_weight=1e-4), 1.2345)


# User 0: items 1, 2 on top, item 2 wanted. User 1: all tied. User 2: nothing wanted. User 3: items 3, 2, a miss.
SCORES = np.array(
    [
        [0.9, 0.8, 0.7, 0.6, 0.5],
        [1.0, 1.0, 1.0, 1.0, 1.0],
        [0.0, 0.0, 0.0, 5.0, 9.0],
        [0.0, 1.0, 2.0, 3.0, 4.0],
    ]
)
TRAIN = [(0, 0), (3, 4)]
TARGET = [(0, 2), (0, 4), (0, 3), (1, 0), (3, 0)]


def test_top_k_masks_and_breaks_ties_by_lower_id():
    assert ranking.top_k([3, 9, 3, 5], [], 4) == [1, 3, 0, 2]
    assert ranking.top_k([3, 9, 3, 5], [1, 0], 4) == [3, 2]
    assert ranking.top_k(SCORES[1], {0}, 2) == [1, 2]


def test_evaluation_by_hand():
    third = 1 / math.log2(3)
    # User 0 misses at rank 1 and hits at rank 2 of 3 wanted; user 1 hits its only one at rank 1; user 3 misses.
    expected = {
        "recall@2": (1 / 3 + 1 + 0) / 3,
        "precision@2": (1 / 2 + 1 / 2 + 0) / 3,
        "ndcg@2": (third / (1 + third) + 1 + 0) / 3,
        "hit@2": 2 / 3,
        "mrr@2": (1 / 2 + 1 + 0) / 3,
        "map@2": ((1 / 2) / 2 + 1 + 0) / 3,
        "coverage@2": 4 / 5,  # {1, 2}, {0, 1} and {3, 2}; user 2 is not evaluated, so item 4 is not covered
    }
    actual = ranking.evaluate(SCORES, TRAIN, TARGET, 2)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        close(actual[name], value)


def test_evaluation_with_several_hits_and_a_short_catalogue():
    # Ranking 0, 1, 2 (3 is masked), hits at ranks 1 and 3, k = 5: precision over 5 places, ideal over 3 targets.
    actual = ranking.evaluate([[4, 3, 2, 1]], [(0, 3)], [(0, 0), (0, 2), (0, 3), (0, 0)], 5)
    close(actual["recall@5"], 2 / 3)
    close(actual["precision@5"], 2 / 5)
    close(actual["ndcg@5"], (1 + 0.5) / (1 + 1 / math.log2(3) + 0.5))
    close(actual["mrr@5"], 1)
    close(actual["map@5"], (1 + 2 / 3) / 3)
    close(actual["coverage@5"], 3 / 4)


def test_evaluation_without_a_target_has_no_mean():
    with pytest.raises(ValueError, match="target"):
        ranking.evaluate(SCORES, TRAIN, [], 2)


def test_numerical_gradient_by_hand():
    x = np.array([[1.0, -2.0], [0.5, 3.0]])
    before = x.copy()
    gradient = numerical_gradient(lambda y: float((y**3).sum() + y[0, 0] * y[1, 1]), x)
    np.testing.assert_allclose(gradient, 3 * before**2 + np.array([[3.0, 0], [0, 1.0]]), rtol=1e-8)
    np.testing.assert_array_equal(x, before)


def test_numerical_gradient_of_bpr_is_the_logistic_slope():
    # One triple with difference x - 0 and user 1: d/dx log(1 + e^-x) = -sigmoid(-x), at ln 3 exactly -1/4.
    gradient = numerical_gradient(lambda y: dream.bpr([[1.0]], y, [[0.0]], "sum"), [[math.log(3)]])
    np.testing.assert_allclose(gradient, [[-0.25]], rtol=1e-8)
