"""A step that a GPU may record launches the same for every batch, and fixed shapes change no number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch_geometric.data import HeteroData

from dream_pyg.graph.build import build_graph
from dream_pyg.graph.schema import USER
from dream_pyg.models import MODELS, Batch
from dream_pyg.nn.batch_shapes import fix_shapes
from dream_pyg.training.gradients import Gradients
from tests.contract.test_contract import TRAINED, make
from tests.graphs import random_dataset

VARYING = {"buir", "micro"}


class Launches(TorchDispatchMode):
    """Lists each operation with its numbers and the shapes of its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        leaves = torch.utils._pytree.tree_leaves((args, kwargs, result))
        self.found.append((str(func), [tuple(x.shape) if isinstance(x, torch.Tensor) else x for x in leaves]))
        return result


def batches_of(graph: HeteroData) -> list[Batch]:
    """Three of a size, of many different users and items and of few."""
    edges = graph["user", "interacts", "item"].edge_index.as_tensor()
    generator = torch.Generator().manual_seed(0)
    chosen = [torch.randperm(edges.size(1), generator=generator)[:24] for _ in range(2)]
    chosen.append(chosen[0][:5].repeat(5)[:24])
    return [
        Batch(*edges[:, some].contiguous(), torch.randint(graph["item"].num_nodes, (24,), generator=generator))
        for some in chosen
    ]


def launches(name: str, graph: HeteroData, **config: Any) -> list[Any]:
    """What each batch's step launches, once caches are there."""
    model = make(name, graph, **config)
    model.on_epoch_start(graph, torch.Generator().manual_seed(0))
    gradients = Gradients(model)
    first, *others = batches_of(graph)
    gradients(graph, first)
    found = []
    for batch in others:
        with Launches() as listed:
            gradients(graph, batch)
        found.append(listed.found)
    return found


@pytest.mark.parametrize("name", TRAINED)
def test_a_recordable_model_launches_the_same_for_every_batch(name):
    graph = build_graph(random_dataset(), num_neighbors=3)
    fix_shapes(graph)
    few, many = launches(name, graph)
    assert (few == many) is MODELS[name].recordable is (name not in VARYING)


@pytest.mark.parametrize(
    "config",
    [
        {"popularity_correction": 0.5},
        {"user_modal": "items"},
        {"squared_signal": False, "normalize_alignment": False},
        {"gate_input": "propagated", "feature_scaling": "rms"},
    ],
)
def test_every_dream_is_recordable(config):
    graph = build_graph(random_dataset(), num_neighbors=3)
    fix_shapes(graph)
    few, many = launches("dream", graph, **config)
    assert few == many


def test_fixed_shapes_change_no_number():
    graph, fixed = (build_graph(random_dataset(), num_neighbors=3) for _ in range(2))
    fix_shapes(fixed)
    found = []
    for one in (graph, fixed):
        model = make("dream", one, signal_weight=1.0)
        for batch in batches_of(one):
            terms = Gradients(model)(one, batch)
            found.append({**terms, **{name: value.grad.clone() for name, value in model.named_parameters()}})
    for plain, other in zip(found[:3], found[3:], strict=True):
        torch.testing.assert_close(other, plain)


def test_a_batch_larger_than_the_users_has_all_of_them():
    graph = build_graph(random_dataset(), num_neighbors=3)
    num_users = graph[USER].num_nodes
    fix_shapes(graph)
    first = batches_of(graph)[0]
    batch = Batch(*(part.repeat(1 + num_users // 24) for part in first))
    plain = build_graph(random_dataset(), num_neighbors=3)
    terms = [Gradients(make("dream", one))(one, batch) for one in (graph, plain)]
    torch.testing.assert_close(*terms)
