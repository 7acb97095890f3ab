"""Most-popular against counting."""

from __future__ import annotations

import numpy as np

from dream_pyg.graph.build import build_graph
from dream_pyg.models import MostPopular
from tests.graphs import random_dataset, train_matrix


def test_every_user_scores_items_by_their_train_interactions():
    dataset = random_dataset(())
    graph = build_graph(dataset, num_neighbors=2)
    user, item = MostPopular(graph)(graph)
    R = train_matrix(dataset)
    counts = R.sum(axis=0)
    assert counts[-1] == 0  # the cold item
    np.testing.assert_array_equal(user @ item.T, np.broadcast_to(counts, R.shape))
