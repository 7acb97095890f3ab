"""DRAGON against the oracle."""

from __future__ import annotations

import numpy as np
import pytest

from dream_pyg.errors import ConfigError
from dream_pyg.graph.build import build_graph
from dream_pyg.models import DRAGON
from tests.graphs import MODALITIES, in_double, item_features, random_dataset, train_matrix
from tests.models.agreement import assert_rows, assert_terms_and_gradients, double_model, parameters_of, some_triplets
from tests.oracles import dragon, dream, dualgnn, freedom
from tests.oracles.features import scaled

NUM_NEIGHBORS = 3
CONFIGS = {
    "default": {},
    "raw": {"feature_scaling": "raw"},
    "rms": {"feature_scaling": "rms"},
    "layers": {"num_layers": 3, "num_item_layers": 2},
    "no_layers": {"num_layers": 0, "num_item_layers": 0},
    "all_neighbors": {"num_user_neighbors": 100},
    "weighted": {"modality_weights": {"image": 3.0}},
}

CASES = [
    *((name, 2, False) for name in CONFIGS),
    *(("default", num_modalities, True) for num_modalities in (1, 2, 3)),
]


def default_weights(modalities):
    if set(modalities) == {"image", "text"}:
        return {"image": 0.1, "text": 0.9}
    return {modality: 1 / len(modalities) for modality in modalities}


class Oracle:
    """DRAGON from raw arrays and a model's parameters."""

    def __init__(self, dataset, config, include_self):
        self.config = config
        self.R = train_matrix(dataset)
        raw = {m: item_features(dataset, m) for m in dataset.modalities}
        self.has = {m: has for m, (_, has) in raw.items()}
        self.features = {m: scaled(X, config.feature_scaling) for m, (X, _) in raw.items()}
        given = config.modality_weights or default_weights(dataset.modalities)
        weights = [weight / sum(given.values()) for weight in given.values()]
        X, has = [raw[m][0] for m in given], [raw[m][1] for m in given]
        self.S = freedom.item_graph(X, has, weights, NUM_NEIGHBORS, include_self)
        self.C = dualgnn.user_graph(dualgnn.co_occurrence(self.R, config.num_user_neighbors))

    def encode(self, p):
        """Users and items."""
        users, items = [], []
        for m, X in self.features.items():
            first = p[f"encoders.{m}.hidden.weight"], p[f"encoders.{m}.hidden.bias"]
            second = p[f"encoders.{m}.output.weight"].T, p[f"encoders.{m}.output.bias"]
            item = dualgnn.encode_items(X, self.has[m], *first, *second)
            user, item = dualgnn.view(self.R, p[f"encoders.{m}.user_embedding"], item, self.config.num_layers)
            users.append(user)
            items.append(item)
        W = p.get("modality_weight", np.ones((len(self.R), 1)))
        return dragon.enhance(*dragon.side_by_side(users, items, W), self.C, self.S, self.config.num_item_layers)

    def terms(self, p, batch):
        """Each weighted term."""
        user, pos, neg = (part.numpy() for part in batch)
        users, items = self.encode(p)
        free = [p[f"encoders.{m}.user_embedding"][user] for m in self.features]
        return {
            "bpr": dream.bpr(users[user], items[pos], items[neg], "mean"),
            "l2": self.config.l2_weight * dualgnn.l2(free, p.get("modality_weight")),
        }


@pytest.mark.parametrize(("name", "num_modalities", "include_self"), CASES)
def test_embeddings_losses_and_gradients_are_the_equations(name, num_modalities, include_self):
    dataset = random_dataset(MODALITIES[:num_modalities], seed=num_modalities)
    graph = in_double(build_graph(dataset, num_neighbors=NUM_NEIGHBORS, include_self=include_self))
    config = {"embedding_dim": 3, "num_user_neighbors": 4, "l2_weight": 0.2} | CONFIGS[name]
    model = double_model(DRAGON, graph, **config)
    oracle, batch = Oracle(dataset, model.config, include_self), some_triplets(graph)
    user, item = model(graph)
    assert user.size(1) == item.size(1) == 3 * num_modalities
    assert_rows((user, item), oracle.encode(parameters_of(model)))
    assert_terms_and_gradients(model, model.loss(graph, batch), lambda p: oracle.terms(p, batch))


def test_refuses_what_the_graph_lacks():
    with pytest.raises(ConfigError, match="DRAGON needs at least one modality with features"):
        DRAGON(build_graph(random_dataset(()), num_neighbors=2))
    graph = build_graph(random_dataset(), num_neighbors=2)
    with pytest.raises(ConfigError, match=r"names 'txt'.*item-item kNN graphs for 'image', 'text'.*mean 'text'"):
        DRAGON(graph, DRAGON.Config(modality_weights={"txt": 1.0}))
