"""DREAM as a whole, Eq. 1-16, against the oracle composed from raw arrays: interactions, features and parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch_geometric.data import HeteroData

from dream_pyg.config import RunConfig
from dream_pyg.data.dataset import Dataset
from dream_pyg.errors import ConfigError
from dream_pyg.graph.build import build_graph
from dream_pyg.models import DREAM, Batch
from dream_pyg.training.model import make_model
from dream_pyg.training.triplets import TripletSampler
from tests.graphs import MODALITIES, in_double, item_features, random_dataset, train_matrix
from tests.models.added_terms import default_weights, in_double_means, signal_features
from tests.oracles import dream
from tests.oracles.gradients import numerical_gradient

# Loss weights are large, so that no term hides behind another.
WEIGHTS = {"intra_weight": 0.7, "inter_weight": 0.4, "signal_weight": 1.3, "l2_weight": 0.2}
CONFIGS: dict[str, dict[str, Any]] = {
    "default": {},
    "gate_propagated": {"gate_input": "propagated"},
    "scaling_raw": {"feature_scaling": "raw"},
    "scaling_rms": {"feature_scaling": "rms"},
    "signal_norm": {"squared_signal": False},
    "signal_dot": {"normalize_signal": False},
    "signal_norm_dot": {"squared_signal": False, "normalize_signal": False},
    "signal_centered": {"center_signal": True},
    "signal_norm_centered": {"center_signal": True, "squared_signal": False},
    "signal_uncentered": {"center_signal": False},
    "signal_norm_uncentered": {"center_signal": False, "squared_signal": False},
    "alignment_dot": {"normalize_alignment": False},
    "temperature": {"temperature": 0.5},
    "three_layers": {"num_layers": 3},
    "no_layers": {"num_layers": 0},
    "weighted": {"modality_weights": {"image": 3.0, "text": 1.0}},
    "one_of_two": {"modality_weights": {"text": 2.0, "image": 0.0}},
    "no_gate": {"use_gate": False},
    "no_gate_propagated": {"use_gate": False, "gate_input": "propagated"},
    "no_item_graph": {"use_item_graph": False},
    "no_user_graph": {"use_user_graph": False},
    "no_graphs": {"use_item_graph": False, "use_user_graph": False},
    "users_from_items": {"user_modal": "items"},
    "users_from_items_without_graphs": {"user_modal": "items", "use_item_graph": False, "use_gate": False},
    "users_from_items_propagated": {"user_modal": "items", "gate_input": "propagated"},
    "no_intra": {"intra_weight": 0.0},
    "no_inter": {"inter_weight": 0.0},
    "no_signal": {"signal_weight": 0.0},
    "no_l2": {"l2_weight": 0.0},
    "paper_v1": {
        "feature_scaling": "raw",
        "squared_signal": False,
        "center_signal": False,
        "normalize_alignment": False,
    },
}
NUM_NEIGHBORS = 3


class Oracle:
    """DREAM from raw arrays and a model's parameters; nothing of the graph that the library built is used."""

    def __init__(self, dataset: Dataset, config: DREAM.Config, include_self: bool) -> None:
        self.config = config
        self.R = train_matrix(dataset)
        given = config.modality_weights or default_weights(dataset.modalities)
        used = {modality: weight for modality, weight in given.items() if weight > 0}
        self.weights = {modality: weight / math.fsum(used.values()) for modality, weight in used.items()}
        self.A_hat = dream.normalised(dream.adjacency(self.R))
        self.item_raw, self.user_raw, self.item_scaled, self.user_scaled = {}, {}, {}, {}
        self.item_graph, self.user_graph = {}, {}
        for m in self.weights:
            X, has = item_features(dataset, m)
            X_user, has_user = dream.user_features(self.R, X, has), dream.user_has(self.R, has)
            scaled = {"raw": X, "unit": dream.unit_rows(X), "rms": dream.unit_rows(X) * math.sqrt(X.shape[1])}
            self.user_raw[m], self.item_raw[m] = signal_features(dataset, m, center=config.center_signal)
            self.item_scaled[m] = scaled[config.feature_scaling]
            self.user_scaled[m] = dream.user_features(self.R, self.item_scaled[m], has)
            self.item_graph[m] = dream.relation_graph(X, has, NUM_NEIGHBORS, include_self)
            self.user_graph[m] = dream.relation_graph(X_user, has_user, NUM_NEIGHBORS, include_self)

    def lines(self, parameters: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Eq. 1-7: the behavior and the modal line, users first (U + I, D)."""
        E0 = np.concatenate([parameters["user_embedding"], parameters["item_embedding"]])
        _, E_B = dream.lightgcn(self.A_hat, E0, self.config.num_layers)
        source = E_B if self.config.gate_input == "propagated" else E0
        num_users = len(self.R)
        fused = []
        for m in self.weights:
            user, item = source[:num_users], source[num_users:]
            if self.config.use_gate:
                W, b = parameters[f"gates.{m}.weight"], parameters[f"gates.{m}.bias"]
                user, item = dream.gate(self.user_scaled[m], user, W, b), dream.gate(self.item_scaled[m], item, W, b)
            if self.config.use_user_graph:
                user = dream.relation_convolution(self.user_graph[m], user)
            if self.config.use_item_graph:
                item = dream.relation_convolution(self.item_graph[m], item)
            fused.append(np.concatenate([user, item]))
        E_M = dream.fuse(fused, list(self.weights.values()))
        if self.config.user_modal == "items":
            E_M[:num_users] = dream.mean_of_taken(self.R, E_M[num_users:])
        return E_B, E_M

    def terms(self, parameters: dict[str, np.ndarray], batch: Batch) -> dict[str, float]:
        """Eq. 8-14: each term of the loss, not yet weighted."""
        config, num_users = self.config, len(self.R)
        E_B, E_M = self.lines(parameters)
        E_G = dream.general(E_B, E_M)
        user, pos, neg = (part.numpy() for part in batch)
        aligned = (E_B[user], E_B[num_users + pos], E_M[user], E_M[num_users + pos])
        options = (config.temperature, config.normalize_alignment, "mean")
        weights = list(self.weights.values())
        item_raw = [self.item_raw[m][pos] for m in self.weights]
        user_raw = [self.user_raw[m][user] for m in self.weights]
        signal = dream.similarity_supervised(
            aligned[3],
            item_raw,
            aligned[2],
            user_raw,
            weights,
            normalize=config.normalize_signal,
            squared=config.squared_signal,
        )
        if config.squared_signal:  # the constants that the library leaves out
            for raw in (item_raw, user_raw):
                signal -= (dream.signal_target(raw, weights) ** 2).mean()
        return {
            "bpr": dream.bpr(E_G[user], E_G[num_users + pos], E_G[num_users + neg], "mean"),
            "intra": dream.intra(*aligned, *options),
            "inter": dream.inter(*aligned, *options),
            "signal": signal,
            "l2": dream.l2(
                parameters["user_embedding"][user], parameters["item_embedding"][pos], parameters["item_embedding"][neg]
            ),
        }

    def total(self, parameters: dict[str, np.ndarray], batch: Batch) -> float:
        """Eq. 15."""
        t, c = self.terms(parameters, batch), self.config
        weights = c.intra_weight, c.inter_weight, c.signal_weight
        return dream.total(t["bpr"], t["intra"], t["inter"], t["signal"], *weights, t["l2"], c.l2_weight)


@dataclass
class Case:
    """A model in float64, its graph, a batch, and the oracle of the same."""

    model: DREAM
    graph: HeteroData
    batch: Batch
    oracle: Oracle

    @property
    def parameters(self) -> dict[str, np.ndarray]:
        """The model's own parameters as arrays."""
        return {name: parameter.detach().numpy().copy() for name, parameter in self.model.named_parameters()}


def make_case(modalities=("image", "text"), *, include_self=False, seed=0, **config) -> Case:
    dataset = random_dataset(modalities, seed=seed)
    graph = in_double(build_graph(dataset, num_neighbors=NUM_NEIGHBORS, include_self=include_self))
    configured = DREAM.Config(**{"embedding_dim": 4, **WEIGHTS, **config})
    torch.manual_seed(seed)
    model = DREAM(graph, configured).double()
    in_double_means(model.signal, dataset, center=configured.center_signal)
    with torch.no_grad():
        for parameter in model.parameters():  # of a size at which gates and sigmoids are far from linear
            parameter.normal_()
    triplets = TripletSampler(graph).epoch(torch.Generator().manual_seed(seed))
    batch = Batch(*(part[:9] for part in triplets))
    return Case(model, graph, batch, Oracle(dataset, configured, include_self))


def assert_is_oracle(case: Case) -> None:
    E_B, E_M = case.oracle.lines(case.parameters)
    num_users = case.model.num_users
    behavior, modal = case.model.dual_representations(case.graph)
    user, item = case.model(case.graph)
    for actual, expected in (
        (behavior.user, E_B[:num_users]),
        (behavior.item, E_B[num_users:]),
        (modal.user, E_M[:num_users]),
        (modal.item, E_M[num_users:]),
    ):
        np.testing.assert_allclose(actual.detach(), expected, rtol=1e-11, atol=1e-13)
    expected_scores = dream.scores(*np.split(dream.general(E_B, E_M), [num_users]))
    np.testing.assert_allclose((user @ item.T).detach(), expected_scores, rtol=1e-11, atol=1e-12)

    config, expected = case.oracle.config, case.oracle.terms(case.parameters, case.batch)
    terms = case.model.loss(case.graph, case.batch)
    weights = {
        "bpr": 1.0,
        "intra": config.intra_weight,
        "inter": config.inter_weight,
        "signal": config.signal_weight,
        "l2": config.l2_weight,
    }
    assert list(terms) == [name for name, weight in weights.items() if weight]
    for name, term in terms.items():
        np.testing.assert_allclose(term.item(), weights[name] * expected[name], rtol=1e-11, atol=1e-13, err_msg=name)
    np.testing.assert_allclose(
        sum(terms.values()).item(), case.oracle.total(case.parameters, case.batch), rtol=1e-11, atol=1e-12
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_forward_and_loss_are_the_equations(name):
    assert_is_oracle(make_case(**CONFIGS[name]))


@pytest.mark.parametrize("include_self", [False, True])
@pytest.mark.parametrize("num_modalities", [1, 2, 3])
@pytest.mark.parametrize("seed", [0, 1])
def test_any_number_of_modalities_on_other_graphs(num_modalities, include_self, seed):
    assert_is_oracle(make_case(MODALITIES[:num_modalities], include_self=include_self, seed=seed))


@pytest.mark.parametrize(
    "name", ["default", "gate_propagated", "paper_v1", "weighted", "signal_dot", "signal_uncentered"]
)
def test_gradients_are_those_of_the_equations(name):
    case = make_case(**CONFIGS[name])
    torch.stack(list(case.model.loss(case.graph, case.batch).values())).sum().backward()
    gradients = {key: parameter.grad.numpy() for key, parameter in case.model.named_parameters()}
    own = case.parameters
    generator = np.random.default_rng(0)
    for key, value in own.items():
        chosen = generator.permutation(value.size)[:6]

        def total(entries, key=key, value=value, chosen=chosen):
            changed = value.copy()
            changed.flat[chosen] = entries
            return case.oracle.total({**own, key: changed}, case.batch)

        numerical = numerical_gradient(total, value.flat[chosen])
        scale = case.oracle.total(own, case.batch)
        np.testing.assert_allclose(gradients[key].flat[chosen], numerical, rtol=1e-6, atol=1e-8 * scale, err_msg=key)


def test_float32_is_float64_to_its_rounding():
    case = make_case()
    expected = case.model(case.graph)
    single = DREAM(build_graph(random_dataset(), num_neighbors=NUM_NEIGHBORS), case.oracle.config)
    single.load_state_dict({name: value.float() for name, value in case.model.state_dict().items()})
    for actual, wanted in zip(
        single(build_graph(random_dataset(), num_neighbors=NUM_NEIGHBORS)), expected, strict=True
    ):
        torch.testing.assert_close(actual.double(), wanted, rtol=1e-5, atol=1e-6)


def test_ready_made_defaults_and_config_agree_on_the_modalities():
    case = make_case(MODALITIES)
    assert case.model.modality_weights == dict.fromkeys(MODALITIES, 1 / 3)
    assert set(case.model.gates) == set(MODALITIES)
    two = make_case(MODALITIES, modality_weights={"image": 1.0, "audio": 3.0, "text": 0.0})
    assert two.model.modality_weights == {"image": 0.25, "audio": 0.75}
    assert set(two.model.gates) == {"image", "audio"}


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float32, ["intra", "inter"]), (torch.float64, [])])
def test_bfloat16_alignment_changes_only_the_alignment_of_float32(dtype, expected):
    graph = build_graph(random_dataset(), num_neighbors=NUM_NEIGHBORS)
    graph = in_double(graph) if dtype == torch.float64 else graph
    batch = Batch(torch.tensor([0, 1, 2]), torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5]))
    losses = {}
    for precision in ("float32", "bfloat16"):
        torch.manual_seed(0)
        model = DREAM(graph, DREAM.Config(embedding_dim=4, **WEIGHTS, alignment_precision=precision)).to(dtype)
        losses[precision] = model.loss(graph, batch)
    changed = [name for name, term in losses["float32"].items() if not torch.equal(term, losses["bfloat16"][name])]
    assert changed == expected


def test_refuses_a_modality_that_the_graph_lacks():
    graph = build_graph(random_dataset(), num_neighbors=NUM_NEIGHBORS)
    with pytest.raises(ConfigError, match=r"names 'imag'.*features for 'image', 'text'.*Did you mean 'image'"):
        DREAM(graph, DREAM.Config(modality_weights={"imag": 1.0}))


def test_refuses_weights_that_are_all_zero():
    graph = build_graph(random_dataset(), num_neighbors=NUM_NEIGHBORS)
    for weights in ({}, {"image": 0.0, "text": 0.0}):
        with pytest.raises(ConfigError, match="at least one modality a positive weight"):
            DREAM(graph, DREAM.Config(modality_weights=weights))


def test_refuses_a_graph_without_features():
    with pytest.raises(ConfigError, match="at least one modality with features"):
        DREAM(build_graph(random_dataset(()), num_neighbors=NUM_NEIGHBORS))


def test_refuses_a_graph_without_user_graphs():
    graph = build_graph(random_dataset(), num_neighbors=NUM_NEIGHBORS, user_graphs=False)
    with pytest.raises(ConfigError, match="needs a user-user kNN graph"):
        make_model(RunConfig(graph="unused", model={"name": "dream"}), graph)
    without = {"name": "dream", "use_user_graph": False}
    model = make_model(RunConfig(graph="unused", model=without), graph)
    assert model(graph).scores(torch.arange(model.num_users)).isfinite().all()
