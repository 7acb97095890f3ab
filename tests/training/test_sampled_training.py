"""Training on sampled graphs: it learns, resumes to the same bits, and refuses what cannot be."""

from __future__ import annotations

import signal

import pytest
import torch

from dream_pyg.config import SamplingConfig
from dream_pyg.errors import ConfigError, Interrupted
from dream_pyg.graph.schema import INTERACTS, USER, label_name
from dream_pyg.models import MODELS, Batch
from dream_pyg.training import trainer
from dream_pyg.training.model import make_model
from dream_pyg.training.steps import SampledSteps
from dream_pyg.training.trainer import train
from tests.graphs import PlantedBlocks
from tests.training.runs import assert_learns, assert_same_run, configure, read_metrics

BLOCKS = PlantedBlocks()
FEW = {"interactions": [2, 1], "relations": 2, "features": 2}


def sampled_models(stored):
    fields = {name: make_model(configure(stored, name), stored.graph).receptive_field() for name in MODELS}
    return {name for name, field in fields.items() if field is not None}


def test_models_that_train_on_sampled_graphs(stored):
    assert sampled_models(stored) == {"bpr", "lightgcn", "vbpr", "dream"}


@pytest.mark.parametrize("in_batch", [False, True])
@pytest.mark.parametrize("name", ["bpr", "lightgcn", "vbpr", "dream"])
def test_learns_the_planted_blocks(name, in_batch, stored, tmp_path):
    sampling = {**FEW, "in_batch_negatives": in_batch}
    options = {"epochs": 30, "evaluate_every": 30, "batch_size": 64, "learning_rate": 0.02, "sampling": sampling}
    assert_learns(BLOCKS, configure(stored, name, **options), tmp_path / "run")


@pytest.mark.parametrize("step", [2, 5, 9])
def test_interrupted_and_resumed_is_uninterrupted(stored, tmp_path, monkeypatch, step):
    config = configure(stored, sampling=FEW, epoch_steps=3)
    train(config, tmp_path / "whole")
    steps = 0
    train_step = trainer._Session._train_step

    def interrupted(session, graph, batch, monitor):
        nonlocal steps
        train_step(session, graph, batch, monitor)
        steps += 1
        if steps == step:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(trainer._Session, "_train_step", interrupted)
    with pytest.raises(Interrupted):
        train(config, tmp_path / "parts")
    monkeypatch.undo()
    train(config, tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_the_draws_follow_the_seed(stored, tmp_path):
    for run, seed in (("one", 0), ("same", 0), ("other", 1)):
        train(configure(stored, sampling=FEW, seed=seed, epochs=1), tmp_path / run)
    one, same, other = (read_metrics(tmp_path / run) for run in ("one", "same", "other"))
    assert one == same != other
    user, item = stored.graph[INTERACTS][label_name("train")][:, :20]
    model, drawn = make_model(configure(stored), stored.graph), []
    for seed, epoch in ((0, 0), (0, 0), (1, 0), (0, 1)):
        steps = SampledSteps(stored.graph, model, SamplingConfig(**FEW), seed=seed, device=torch.device("cpu"))
        ((sampled, _),) = steps([Batch(user, item, item.flip(0))], epoch, 0)
        *_, (edges, _) = sampled[INTERACTS].hops
        drawn.append(sampled[USER].n_id[edges[0]].tolist())
    assert drawn[0] == drawn[1]
    assert drawn[2] != drawn[0] != drawn[3]


def test_negative_items_get_their_share_of_neighbours(stored):
    graph, device = stored.graph, torch.device("cpu")
    user, item = graph[INTERACTS][label_name("train")]
    popular = item.bincount().topk(2).indices
    batch = Batch(user[:1], *popular.split(1))
    model = make_model(configure(stored, "lightgcn"), graph)
    for negatives, expected in ((1.0, [4, 4]), (0.5, [4, 2]), (0.1, [4, 1])):
        steps = SampledSteps(graph, model, SamplingConfig(negatives=negatives), seed=0, device=device)
        ((sampled, local),) = steps([batch], 0, 0)
        *_, (edges, _) = sampled[INTERACTS].hops
        assert edges[1].bincount()[torch.cat(local[1:])].tolist() == expected


def test_a_negative_of_the_batch_gets_the_neighbours_of_a_positive_and_any_other_its_own(stored):
    graph, device = stored.graph, torch.device("cpu")
    train_user, train_item = graph[INTERACTS][label_name("train")]
    first, second, other = torch.bincount(train_item).topk(3).indices
    batch = Batch(train_user[:2], torch.stack([first, second]), torch.stack([second, other]))
    model = make_model(configure(stored, "lightgcn"), graph)
    sampling = SamplingConfig(interactions=(2, 1), in_batch_negatives=True)
    ((sampled, local),) = SampledSteps(graph, model, sampling, seed=0, device=device)([batch], 0, 0)
    degree = sampled[INTERACTS].hops[-1][0].as_tensor()[1].bincount()
    assert local.neg_item[0] == local.pos_item[1]
    assert degree[torch.cat([local.pos_item, local.neg_item[1:]])].tolist() == [2, 2, 1]


def test_models_that_need_the_whole_graph_say_so(stored, tmp_path):
    with pytest.raises(ConfigError, match="MGCN cannot be trained on sampled graphs"):
        train(configure(stored, "mgcn", sampling={}), tmp_path / "run")
    config = configure(stored, sampling={})
    config = config.model_validate({**config.to_dict(), "model": {"name": "dream", "user_modal": "items"}})
    with pytest.raises(ConfigError, match="with user_modal = 'items' it reads more"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_there_must_be_a_fan_out_for_each_hop(stored, tmp_path):
    with pytest.raises(ConfigError, match=r"over 2 hops.*fan-outs for 1: \[3\]"):
        train(configure(stored, sampling={"interactions": [3]}), tmp_path / "run")
    with pytest.raises(ValueError, match="greater than or equal to -1"):
        configure(stored, sampling={"relations": -2})
