"""Too little memory is told before training, with what would fit."""

from __future__ import annotations

import copy

import pytest
import torch

from dream_pyg.config import RunConfig
from dream_pyg.errors import ConfigError
from dream_pyg.graph.schema import label_name
from dream_pyg.training import memory
from dream_pyg.training.memory import check_memory, least_bytes
from dream_pyg.training.model import make_model, prepare_graph
from dream_pyg.training.optimizers import make_optimizers
from dream_pyg.training.trainer import train
from tests.models.agreement import some_triplets
from tests.training.runs import configure

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "stored"])
@pytest.mark.parametrize("name", ["dream", "lightgcn", "bpr", "bm3", "popularity"])
def test_what_it_takes_is_no_more_than_what_a_training_holds(stored, name, precision):
    config = RunConfig.create(graph=stored.path, model=name, overrides=[f"feature_precision={precision}"])
    graph = prepare_graph(stored.graph, CPU, None, precision)
    model = make_model(config, graph)
    held = 0
    if optimizers := make_optimizers(model, config.training):
        sum(model.loss(graph, some_triplets(graph)).values()).backward()
        for optimizer in optimizers:
            optimizer.step()
            held += sum(value.nbytes for state in optimizer.state.values() for value in state.values())
        held += sum(2 * p.nbytes + p.grad.nbytes for p in model.parameters())  # as it is, and as it is saved
    for modality in ("image", "text"):
        before, after = (one["item"][f"x_{modality}"] for one in (stored.graph, graph))
        held += 0 if after.data_ptr() == before.data_ptr() else after.nbytes
    least = least_bytes(config, stored.graph, CPU)
    assert (least.tables + least.features > 0) == (name != "popularity" or precision == "bfloat16")
    assert least.tables + least.features <= held


def test_features_count_where_they_are_converted_or_on_another_device(stored):
    graph = copy.copy(stored.graph)
    for modality in ("image", "text"):
        graph["item"][f"x_{modality}"] = graph["item"][f"x_{modality}"].float()
    numbers = sum(graph["item"][f"x_{modality}"].numel() for modality in ("image", "text"))
    config = RunConfig.create(graph=stored.path, model="dream")
    half = config.model_copy(update={"feature_precision": "bfloat16"})
    sampled = RunConfig.create(graph=stored.path, model="dream", overrides=["training.sampling={}"])
    assert least_bytes(config, graph, CPU).features == least_bytes(sampled, graph, CPU).features == 0
    assert least_bytes(config, graph, CUDA).features == least_bytes(sampled, graph, CUDA).features == 4 * numbers
    assert least_bytes(half, graph, CPU).features == 2 * numbers


@pytest.mark.parametrize(
    ("model", "overrides", "read"),
    [
        ("lightgcn", [], False),
        ("lightgcn", ["training.teacher={}"], True),
        ("lightgcn", ["training.teacher={share=0}"], False),
        ("lightgcn", ["training.teacher={share=0, vote=0.2}"], True),
        ("freedom", [], True),
        ("freedom", ["model.modality_bpr_weight=0"], False),
        ("vbpr", [], True),
    ],
)
def test_features_that_nothing_reads_are_not_converted(stored, model, overrides, read):
    config = RunConfig.create(graph=stored.path, model=model, overrides=overrides)
    graph = copy.copy(stored.graph)
    graph["item"].x_image = graph["item"].x_image.half()
    held = prepare_graph(graph, CPU, None, config.held_precision)["item"].x_image
    assert held.dtype == (torch.float32 if read else torch.float16)
    elsewhere = torch.device("meta")
    prepared = prepare_graph(graph, elsewhere, None, config.held_precision)
    assert prepared["user", "interacts", "item"][label_name("train")].device == elsewhere
    assert prepared["item"].x_image.device == (elsewhere if read else CPU)
    for device in (CPU, elsewhere):
        assert (least_bytes(config, graph, device).features > 0) == read


def test_a_training_that_cannot_fit_is_refused_with_what_would(stored, tmp_path, monkeypatch):
    config = configure(stored)
    smaller = RunConfig.create(graph=stored.path, model="dream", overrides=["model.embedding_dim=32"])
    monkeypatch.setattr(memory, "available_bytes", lambda device: least_bytes(smaller, stored.graph, CPU).total)
    with pytest.raises(ConfigError) as caught:
        train(config, tmp_path / "run")
    message = str(caught.value)
    assert "Training dream on this graph takes at least" in message
    assert "with --set model.embedding_dim=32 it may fit" in message
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(memory, "available_bytes", lambda device: 1)
    with pytest.raises(ConfigError, match="it wants a larger machine"):
        check_memory(config, stored.graph, CPU)


def test_sampling_is_advised_only_where_it_can_be_had(stored):
    plain = RunConfig.create(graph=stored.path, model="dream")
    best = RunConfig.create(graph=stored.path, model="dream", preset="best")
    mgcn = RunConfig.create(graph=stored.path, model="mgcn")
    advised = [
        "training.sampling={}" in [text for steps in memory._savings(config) for text, _ in steps]
        for config in (plain, best, mgcn)
    ]
    assert advised == [True, False, False]


@pytest.mark.parametrize("free", [None, 1 << 40])
def test_what_fits_or_cannot_be_known_is_not_refused(stored, monkeypatch, free):
    monkeypatch.setattr(memory, "available_bytes", lambda device: free)
    check_memory(configure(stored), stored.graph, CPU)
