"""What a GPU finds, learns and recommends is what a CPU does. All of it skips where there is none."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from dream_pyg.config import RunConfig
from dream_pyg.evaluation import evaluate
from dream_pyg.graph.build import build_graph
from dream_pyg.graph.csr import UserItems, csr_product
from dream_pyg.graph.knn import ArrayRows, MeanRows, cosine_knn
from dream_pyg.graph.schema import INTERACTS, label_name
from dream_pyg.graph.store import StoredGraph
from dream_pyg.models import MODELS, Batch
from dream_pyg.ranking import recommend
from dream_pyg.serving import recommend_table
from dream_pyg.training.model import make_model, prepare_graph
from dream_pyg.training.run import load_run
from dream_pyg.training.trainer import train
from tests.contract.test_contract import PERSONAL, TRAINED, first_batch
from tests.graph.test_exact_knn import KINDS, make
from tests.graphs import PlantedBlocks, random_dataset
from tests.training.runs import assert_learns, assert_resumes_inside_an_epoch, assert_same_run, configure, read_metrics

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BLOCKS = PlantedBlocks()
UNDRAWN = {"bm3": ["model.dropout=0"]}
"""What keeps a loss from drawing at random in evaluation too, from the generator of each device."""


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> StoredGraph:
    return BLOCKS.store(tmp_path_factory.mktemp("planted"))


def config_for(stored: StoredGraph, name: str, **training) -> RunConfig:
    return configure(stored, name, device="cuda", **training)


@pytest.mark.parametrize("name", TRAINED)
def test_scores_losses_and_gradients_are_those_of_the_cpu(name):
    raw = build_graph(random_dataset(), num_neighbors=3)
    config = RunConfig.create(graph="g", model=name, overrides=UNDRAWN.get(name, ()))
    found = []
    weights = None
    for device in (CPU, CUDA):
        graph = prepare_graph(raw, device)
        torch.manual_seed(0)
        model = make_model(config, graph, device)
        if weights is None:
            weights = {key: value.clone() for key, value in model.state_dict().items()}
        model.load_state_dict(weights)
        model.eval()  # Dropout draws from the generator of each device.
        batch = Batch(*(part.to(device) for part in first_batch(graph)))
        terms = model.loss(graph, batch)
        torch.stack(list(terms.values())).sum().backward()
        scores = model(graph).scores(torch.arange(model.num_users, device=device))
        gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
        values = {"scores": scores, **terms, **gradients}
        found.append({key: value.detach().cpu() for key, value in values.items()})
    for key, expected in found[0].items():
        torch.testing.assert_close(found[1][key], expected, rtol=2e-4, atol=2e-5, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", PERSONAL)
def test_learns_the_planted_blocks(name, stored, tmp_path):
    options = {"epochs": 30, "evaluate_every": 30, "batch_size": 64, "learning_rate": 0.02}
    assert_learns(BLOCKS, config_for(stored, name, **options), tmp_path / "run")


@pytest.mark.parametrize("name", TRAINED)
def test_interrupted_and_resumed_is_uninterrupted_bit_for_bit(name, stored, tmp_path, monkeypatch):
    assert_resumes_inside_an_epoch(config_for(stored, name, epochs=3), tmp_path, monkeypatch)


@pytest.mark.parametrize("name", MODELS)
def test_a_run_recommends_the_same_on_either(name, stored, tmp_path):
    train(config_for(stored, name, epochs=2), tmp_path / "run")
    runs = [load_run(tmp_path / "run", device=device) for device in ("cpu", "cuda")]
    if name in TRAINED:  # Others have items that are equally good, and take any of them.
        metrics = [evaluate(run.scorer(), run.graph, "test") for run in runs]
        assert metrics[0] == pytest.approx(metrics[1], abs=0.02)
    scores = [run.scorer().scores(torch.arange(4).to(run.graph[INTERACTS].edge_index.device)).cpu() for run in runs]
    torch.testing.assert_close(*scores, rtol=1e-3, atol=1e-4)
    tables = [recommend_table(run, 5) for run in runs]
    assert tables[0].height == tables[1].height
    seen = UserItems.from_pairs(runs[1].graph[INTERACTS][label_name("train")], runs[1].model.num_users)
    users = torch.arange(runs[1].model.num_users, device=CUDA)
    best = recommend(runs[1].scorer(), users, 3, seen)
    assert best.item.device.type == "cuda"


@pytest.mark.parametrize("name", [name for name in TRAINED if MODELS[name].recordable])
def test_recorded_steps_are_those_launched_one_by_one(name, stored, tmp_path):
    options = {"epochs": 3, "batch_size": 8}
    recorded, launched = (config_for(stored, name, cuda_graphs=on, **options) for on in (True, False))
    train(recorded, tmp_path / "recorded")
    train(launched, tmp_path / "launched")
    recordings = [read_metrics(tmp_path / run) for run in ("recorded", "launched")]
    for one, other in zip(*recordings, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["valid"] == pytest.approx(other["valid"], abs=0.02)


@pytest.mark.parametrize("option", ["training.sampling={}", "training.teacher.vote=0.3", "feature_precision=bfloat16"])
def test_every_way_to_train_learns_and_resumes(option, stored, tmp_path):
    def config(**training: Any) -> RunConfig:
        plain = config_for(stored, "dream", batch_size=64, learning_rate=0.02, **training)
        plain.save(tmp_path / "config.toml")
        return RunConfig.create(file=tmp_path / "config.toml", overrides=[option])

    assert_learns(BLOCKS, config(epochs=30, evaluate_every=30), tmp_path / "run")
    train(config(epochs=4), tmp_path / "whole")
    train(config(epochs=2), tmp_path / "parts")
    train(config(epochs=4), tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_process_of_torchrun_trains_what_one_without_it_does(stored, tmp_path):
    config = config_for(stored, "dream", epochs=2)
    config.save(tmp_path / "config.toml")
    train(config, tmp_path / "one")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launch = ["torch.distributed.run", "--nproc-per-node=1", f"--master-port={port}", "-m", "dream_pyg", "train"]
    options = ["--config", str(tmp_path / "config.toml"), "--out", str(tmp_path / "two")]
    command = [sys.executable, "-m", *launch, *options]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line["loss"] for line in read_metrics(tmp_path / "one")] == [
        line["loss"] for line in read_metrics(tmp_path / "two")
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float32])
def test_neighbours_are_those_of_faiss(kind, dtype):
    matrix = make(kind, 1300, 16, 4)
    matrix[::50] = 0
    reference = cosine_knn(ArrayRows(matrix), 6, engine="flat")
    found = cosine_knn(ArrayRows(matrix), 6, device="cuda", dtype=dtype)
    np.testing.assert_array_equal(found.index, reference.index)
    np.testing.assert_allclose(found.similarity, reference.similarity, atol=1e-6)


def test_neighbours_of_users_are_those_of_faiss():
    generator = np.random.default_rng(0)
    features = random_dataset().modalities["image"].features
    items = len(features.row_of_item)
    pairs = np.stack([np.repeat(np.arange(900), 3), generator.integers(0, items, 2700)])
    rows = MeanRows(np.unique(pairs, axis=1), 900, features)
    reference = cosine_knn(rows, 5, engine="flat")
    found = cosine_knn(rows, 5, device="cuda")
    np.testing.assert_array_equal(found.index, reference.index)


def test_products_of_sparse_rows_are_those_of_the_cpu():
    generator = torch.Generator().manual_seed(0)
    pairs = torch.stack(
        [torch.randint(50, (400,), generator=generator), torch.randint(70, (400,), generator=generator)]
    )
    pointer, index = UserItems.from_pairs(pairs, 50)
    for value in (None, torch.rand(400, generator=generator)):
        x = torch.randn(70, 64, generator=generator)
        here = csr_product(pointer, index, value, (50, 70), x)
        there = csr_product(
            *(None if part is None else part.to(CUDA) for part in (pointer, index, value)), (50, 70), x.to(CUDA)
        )
        torch.testing.assert_close(there.cpu(), here, rtol=1e-5, atol=1e-5)
