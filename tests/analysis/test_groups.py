"""Figures by groups of items and users against loops over sets."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dream_pyg.analysis.groups import ITEM_GROUPS, USER_GROUPS, measure_users
from dream_pyg.evaluation import evaluate
from dream_pyg.graph.schema import INTERACTS, label_name
from dream_pyg.graph.store import load_graph
from dream_pyg.models import Embeddings


@pytest.fixture(scope="module")
def graph(shop_graph):
    return load_graph(shop_graph).graph


@pytest.fixture(scope="module")
def embeddings(graph):
    random = torch.Generator().manual_seed(0)
    return Embeddings(*(torch.randn(graph[node].num_nodes, 8, generator=random) for node in ("user", "item")))


def thirds(degree):
    return np.array_split(np.argsort(degree, kind="stable"), 3)


@pytest.mark.parametrize("split", ["valid", "test"])
@pytest.mark.parametrize("k", [1, 7])
def test_figures_are_those_of_loops(graph, embeddings, k, split):
    train, pairs = (graph[INTERACTS][label_name(name)].T.tolist() for name in ("train", split))
    num_users, num_items = embeddings.num_users, embeddings.num_items
    taken = [{i for u, i in train if u == user} for user in range(num_users)]
    scores = (embeddings.user @ embeddings.item.T).numpy()
    users = sorted({u for u, _ in pairs})
    top = {
        u: sorted((i for i in range(num_items) if i not in taken[u]), key=lambda i: -scores[u, i])[:k] for u in users
    }
    item_degree = np.bincount([i for _, i in train], minlength=num_items)
    user_degree = np.array([len(items) for items in taken])
    expected = {}
    for name, group in zip(ITEM_GROUPS, thirds(item_degree), strict=True):
        of_group = [(u, i) for u, i in pairs if i in group]
        expected[f"recall@{k} of {name} items"] = sum(i in top[u] for u, i in of_group) / max(len(of_group), 1)
    for name, group in zip(USER_GROUPS, thirds(user_degree), strict=True):
        recalls = []
        for u in set(users) & set(group.tolist()):
            wanted = [i for v, i in pairs if v == u]
            recalls.append(sum(i in top[u] for i in wanted) / len(wanted))
        expected[f"recall@{k} of {name} users"] = sum(recalls) / max(len(recalls), 1)
    shown = [i for items in top.values() for i in items]
    expected[f"coverage@{k}"] = len(set(shown)) / num_items
    of_train = np.mean([item_degree[i] for _, i in train])
    expected[f"popularity@{k}"] = np.mean([item_degree[i] for i in shown]) / of_train
    figures, _ = measure_users(embeddings, graph, k, split)
    assert list(figures) == list(expected)
    assert figures == pytest.approx(expected, rel=1e-5)


def test_a_sample_of_users_is_the_one_that_is_evaluated(graph, embeddings):
    figures, recall = measure_users(embeddings, graph, num_users=10)
    expected = evaluate(embeddings, graph, "test", ks=[20], metrics=["recall", "coverage"], num_users=10)
    assert int((~recall.isnan()).sum()) == 10
    assert float(recall.nanmean()) == pytest.approx(expected["recall@20"])
    assert figures["coverage@20"] == pytest.approx(expected["coverage@20"])


def test_groups_of_users_average_to_the_metric_and_coverage_is_that_of_evaluation(graph, embeddings):
    figures, _ = measure_users(embeddings, graph, 20)
    overall = evaluate(embeddings, graph, "test", ks=(20,), metrics=("recall", "coverage"))
    assert figures["coverage@20"] == pytest.approx(overall["coverage@20"])
    train, test = (graph[INTERACTS][label_name(name)][0] for name in ("train", "test"))
    tested = torch.zeros(embeddings.num_users).index_fill_(0, test, 1.0).numpy()
    sizes = [tested[group].sum() for group in thirds(np.bincount(train, minlength=embeddings.num_users))]
    of_users = [figures[f"recall@20 of {name} users"] for name in USER_GROUPS]
    assert np.average(of_users, weights=sizes) == pytest.approx(overall["recall@20"], rel=1e-6)


@pytest.mark.parametrize("split", ["valid", "test"])
def test_the_recall_of_users_averages_to_that_of_all(graph, embeddings, split):
    _, recall = measure_users(embeddings, graph, 7, split)
    users = graph[INTERACTS][label_name(split)][0].unique()
    assert recall.isnan().nonzero().flatten().tolist() == sorted(set(range(len(recall))) - set(users.tolist()))
    assert 0 < recall[users].mean() < 1
    expected = evaluate(embeddings, graph, split, ks=[7], metrics=["recall"])
    assert float(recall.nanmean()) == pytest.approx(expected["recall@7"])
