"""A teacher's items: what it ranks highest, how often they are drawn, and training with them."""

from __future__ import annotations

import copy

import pytest
import torch

from dream_pyg.config import RunConfig, TeacherConfig
from dream_pyg.errors import ConfigError, StoreError
from dream_pyg.evaluation import evaluate
from dream_pyg.graph.schema import INTERACTS, label_name
from dream_pyg.models import find_model
from dream_pyg.training import trainer
from dream_pyg.training.run import RunPaths, load_run
from dream_pyg.training.teacher import TaughtItems, teach
from dream_pyg.training.trainer import train
from dream_pyg.training.triplets import TripletSampler
from tests.training.runs import configure


@pytest.mark.parametrize("name", ["addease", "ease", "itemknn"])
def test_taught_are_the_best_items_that_the_user_did_not_take(stored, name):
    graph, config = stored.graph, TeacherConfig(model={"name": name}, num_items=7)
    taught = teach(graph, config).taught
    model = find_model(name)(graph, config.candidates[0])
    model.fit(graph)
    user, item = graph[INTERACTS][label_name("train")]
    scores = model(graph).scores(torch.arange(model.num_users))
    scores[user, item] = -torch.inf
    assert taught.item.shape == (model.num_users, 7)
    best = scores.topk(7).values
    known = taught.item >= 0
    assert torch.equal(known, best > 0), "what is not scored is taught"
    torch.testing.assert_close(scores.gather(1, taught.item.clamp(min=0))[known], best[known])


def test_ranks_are_drawn_by_their_position():
    taught = TaughtItems(torch.arange(4).repeat(2, 1), torch.exp(-torch.arange(4, dtype=torch.float64) / 2), 1.0)
    drawn = taught.draw(torch.ones(40_000, dtype=torch.long), torch.Generator().manual_seed(0))
    expected = taught.chance / taught.chance.sum()
    torch.testing.assert_close(drawn.bincount() / 40_000, expected.float(), atol=0.01, rtol=0)


def test_an_epoch_has_all_of_train_and_a_share_that_is_taught(stored):
    graph = stored.graph
    user, item = graph[INTERACTS][label_name("train")]
    free = torch.ones(graph["user"].num_nodes, graph["item"].num_nodes).index_put((user, item), torch.tensor(0.0))
    taught = TaughtItems.of(free.topk(4).indices, TeacherConfig(share=0.5))
    plain, both = TripletSampler(graph), TripletSampler(graph, taught)
    triplets = both.epoch(torch.Generator().manual_seed(0))
    assert len(triplets.user) == len(plain) + round(0.5 * len(plain))
    key = triplets.user * 10_000 + triplets.pos_item
    is_train = torch.isin(key, user * 10_000 + item)
    assert is_train.sum() == len(plain)
    assert torch.equal(key[is_train].sort().values, (user * 10_000 + item).sort().values)
    rest = ~is_train
    assert (taught.item[triplets.user[rest]] == triplets.pos_item[rest, None]).any(dim=1).all()
    assert not is_train[: len(plain)].all(), "taught triplets stand apart"
    for number in range(1, 80):
        assert len(both.epoch(torch.Generator().manual_seed(0), number).user) in (number - 1, number)


def test_what_is_taught_is_no_more_often_a_negative_of_a_batch(stored):
    graph = stored.graph
    user, item = graph[INTERACTS][label_name("train")]
    rare = int(torch.bincount(item).argmin())
    best = torch.full((graph["user"].num_nodes, 1), rare)
    best[user[item == rare]] = -1
    taught = TaughtItems(best, torch.ones(1), 1.0)
    sampler, generator = TripletSampler(graph, taught, batch_size=64), torch.Generator().manual_seed(0)
    drawn = torch.cat([sampler.epoch(generator).neg_item for _ in range(50)])
    assert 0 < (drawn == rare).float().mean() < 2 / graph["item"].num_nodes
    alone = TripletSampler(graph, taught, batch_size=1).epoch(generator)
    assert len(alone.neg_item.unique()) > graph["item"].num_nodes / 2, "a triplet alone draws from all items"


def test_users_with_fewer_items_left_are_taught_those(stored):
    item = torch.tensor([[3, -1]]).expand(stored.graph["user"].num_nodes, 2)
    taught = TaughtItems(item, torch.ones(2), 1.0)
    sampler = TripletSampler(stored.graph, taught)
    triplets = sampler.epoch(torch.Generator().manual_seed(0))
    assert (triplets.pos_item >= 0).all()
    assert len(sampler) < len(triplets.user) < 2 * len(sampler)


def test_a_run_learns_from_a_teacher_and_resumes_to_the_same_bits(stored, tmp_path):
    teacher = {"share": 0.5, "model": {"l2_weight": 20.0}}
    config = configure(stored, "bpr", epochs=2, teacher=teacher)
    assert config.training.teacher.model["name"] == "addease"
    whole = train(config, tmp_path / "whole")
    short = configure(stored, "bpr", epochs=1, teacher=teacher)
    train(short, tmp_path / "parts", test=False)
    parts = train(config, tmp_path / "parts", resume=True)
    assert parts.test_metrics == whole.test_metrics
    plain = train(configure(stored, "bpr", epochs=2), tmp_path / "plain")
    assert plain.valid_metrics != whole.valid_metrics
    without = train(configure(stored, "bpr", epochs=2, teacher={"share": 0.0}), tmp_path / "without")
    assert without.test_metrics == plain.test_metrics
    assert load_run(tmp_path / "whole").config == RunConfig.load(RunPaths(tmp_path / "whole").config)


def test_a_run_keeps_what_it_was_taught(stored, tmp_path, monkeypatch):
    config = configure(stored, "bpr", epochs=2, teacher={})
    train(config.model_copy(update={"training": config.training.model_copy(update={"epochs": 1})}), tmp_path / "run")
    monkeypatch.setattr(trainer, "teach", None)  # it is not solved again
    train(config, tmp_path / "run", resume=True)
    RunPaths(tmp_path / "run").taught.unlink()
    with pytest.raises(StoreError, match="taught"):
        train(config, tmp_path / "run", resume=True)


def test_a_model_without_closed_form_cannot_teach(stored):
    with pytest.raises(ConfigError, match=r"'lightgcn' cannot be a teacher.*choose one of addease, ease, itemknn"):
        RunConfig.create(graph="g", model="bpr", overrides=["training.teacher.model.name=lightgcn"])


def test_validation_chooses_among_the_teachers_weights(stored):
    weights = (0.001, 3.0, 1e5)
    recalls = {}
    for weight in weights:
        (hyperparameters,) = TeacherConfig(model={"name": "ease"}, l2_weights=(weight,)).candidates
        model = find_model("ease")(stored.graph, hyperparameters)
        model.fit(stored.graph)
        recalls[weight] = evaluate(model(stored.graph), stored.graph, "valid", ks=(20,), metrics=("recall",))[
            "recall@20"
        ]
    best = max(recalls, key=recalls.get)
    assert len(set(recalls.values())) > 1
    chosen = teach(stored.graph, TeacherConfig(model={"name": "ease"}, l2_weights=weights)).taught
    alone = teach(stored.graph, TeacherConfig(model={"name": "ease", "l2_weight": best})).taught
    assert torch.equal(chosen.item, alone.item)
    with pytest.raises(ConfigError, match=r"itemknn.*l2_weight"):
        TeacherConfig(model={"name": "itemknn"}, l2_weights=weights)
    both = TeacherConfig(l2_weights=(1.0, 3.0), user_exponents=(0.0, 0.5)).candidates
    assert [(one.l2_weight, one.user_exponent) for one in both] == [(1.0, 0.0), (1.0, 0.5), (3.0, 0.0), (3.0, 0.5)]


def test_a_catalogue_too_large_for_the_teacher_is_told_what_to_do(stored):
    config = TeacherConfig(model={"max_memory_gb": 1e-9}, l2_weights=(1.0, 2.0))
    with pytest.raises(
        ConfigError,
        match=r"The teacher addease: AddEASE needs .*'itemknn'.*l2_weights=\[\].*user_exponents=\[\].*teacher=none",
    ):
        teach(stored.graph, config)
    without = copy.copy(stored.graph)
    for modality in ("image", "text"):
        del without["item"][f"x_{modality}"]
    with pytest.raises(ConfigError, match=r"The teacher addease: .* needs features .*teacher=none"):
        teach(without, TeacherConfig())
    free = ["training.teacher.l2_weights=[]", "training.teacher.user_exponents=[]"]
    overrides = ["training.teacher.model={name='itemknn'}", *free]
    chosen = RunConfig.create(graph="g", model="dream", preset="best", overrides=overrides).training.teacher
    assert (chosen.model["name"], chosen.l2_weights, chosen.user_exponents) == ("itemknn", (), ())
    named = ["training.teacher.model.name=itemknn", *free]
    assert RunConfig.create(graph="g", model="dream", preset="best", overrides=named).training.teacher == chosen
