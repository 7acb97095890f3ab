"""A step that a GPU may record launches the same on the same tensors, whatever its batch. All of it runs on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch_geometric.data import HeteroData

from dream_pyg.config import SamplingConfig, TrainingConfig
from dream_pyg.graph.build import build_graph
from dream_pyg.models import MODELS, Recommender
from dream_pyg.models.base import Embeddings, model_config
from dream_pyg.nn.batch_shapes import fix_shapes
from dream_pyg.nn.losses import bpr_loss
from dream_pyg.training.gradients import Gradients, can_record
from tests.contract.test_contract import TRAINED, make
from tests.graphs import batches, random_dataset

WAITING = ("_local_scalar_dense", "nonzero", "_unique", "unique", "masked_select")
"""Operations whose result a CPU must wait for: numbers that Python reads, and shapes that depend on values."""


class Launches(TorchDispatchMode):
    """Lists each operation with its numbers and the shapes of its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs, result))
        self.found.append((str(func), [tuple(x.shape) if isinstance(x, torch.Tensor) else x for x in leaves]))
        return result


def kept(model: Recommender) -> list[torch.Tensor]:
    """Everything that the model keeps. While these are held, nothing else can get their memory."""
    return [tensor.detach() for tensor in (*model.parameters(), *model.buffers())]


def launches_the_same(model: Recommender, graph: HeteroData) -> bool:
    """Whether steps on unlike batches of a size could be replays of one another, once caches are there."""
    model.on_epoch_start(graph, torch.Generator().manual_seed(0))
    gradients = Gradients(model)
    first, *others = batches(graph, 5)
    gradients(graph, first)
    before, found = kept(model), []
    for batch in others:
        with Launches() as listed:
            gradients(graph, batch)
        found.append(listed.found)
    waits = any(name in launched for launched, _ in found[0] for name in (f"aten.{waiting}" for waiting in WAITING))
    stays = all(now.data_ptr() == then.data_ptr() for now, then in zip(kept(model), before, strict=True))
    return found[0] == found[1] and stays and not waits


@pytest.fixture(scope="module")
def graph() -> HeteroData:
    graph = build_graph(random_dataset(), num_neighbors=3)
    fix_shapes(graph)
    return graph


@pytest.mark.parametrize("name", TRAINED)
def test_a_model_is_recordable_if_and_only_if_it_says_so(name, graph):
    assert launches_the_same(make(name, graph), graph) is MODELS[name].recordable


@pytest.mark.parametrize(
    "config",
    [
        {"popularity_correction": 0.5},
        {"user_modal": "items"},
        {"squared_signal": False, "normalize_alignment": False},
        {"gate_input": "propagated", "feature_scaling": "rms"},
    ],
)
def test_every_dream_is_recordable(config, graph):
    assert launches_the_same(make("dream", graph, **config), graph)


@pytest.mark.parametrize("name", ["vbpr", "bm3", "mgcn"])
def test_every_aligned_model_is_recordable(name, graph):
    added = {"intra_weight": 0.1, "inter_weight": 0.2, "signal_weight": 0.3, "popularity_correction": 0.5}
    assert launches_the_same(make(name, graph, **added), graph)


@pytest.mark.parametrize("name", MODELS)
def test_only_what_learns_and_is_recordable_is_recorded_on_a_gpu(name, graph):
    model, cuda = make(name, graph), torch.device("cuda")
    assert can_record(TrainingConfig(), model, cuda) is (name in TRAINED and MODELS[name].recordable)
    others = [TrainingConfig(cuda_graphs=False), TrainingConfig(sampling=SamplingConfig())]
    assert not any(can_record(other, model, cuda) for other in others)
    assert not can_record(TrainingConfig(), model, torch.device("cpu"))


class _Careless(MODELS["bpr"]):
    """BPR that does in a step what no recording sees."""

    @model_config
    class Config:
        habit: str

    def __init__(self, graph: HeteroData, config: Any) -> None:
        Recommender.__init__(self, graph, config)
        self.user_embedding = torch.nn.Parameter(torch.ones(self.num_users, 2))
        self.item_embedding = torch.nn.Parameter(torch.ones(self.num_items, 2))
        self.register_buffer("mean", torch.zeros(2))

    def loss(self, graph, batch):
        rows = batch.rows(*Embeddings(self.user_embedding, self.item_embedding))
        if self.config.habit == "reads" and not bool((batch.user >= 0).all()):
            return {}
        if self.config.habit == "replaces":
            self.mean = self.mean.lerp(rows[0].detach().mean(dim=0), 0.1)
        if self.config.habit == "draws":
            rows = (rows[0] * float(torch.rand(())), *rows[1:])
        if self.config.habit == "selects":
            rows = tuple(row[: len(batch.user.unique())] for row in rows)
        return {"bpr": bpr_loss(*rows)}


@pytest.mark.parametrize("habit", ["none", "reads", "replaces", "draws", "selects"])
def test_what_cannot_be_recorded_is_seen(habit, graph):
    model = _Careless(graph, _Careless.Config(habit=habit))
    assert launches_the_same(model, graph) is (habit == "none")
