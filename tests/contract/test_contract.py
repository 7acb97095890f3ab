"""What every registered model promises. A model that is added to ``MODELS`` is held to all of it."""

from __future__ import annotations

import dataclasses
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dream_pyg.config import RunConfig
from dream_pyg.data.dataset import Dataset
from dream_pyg.data.files import load_tensors, save_tensors
from dream_pyg.data.interactions import TEST, VALID
from dream_pyg.errors import ConfigError, Interrupted
from dream_pyg.graph.build import build_graph
from dream_pyg.graph.schema import INTERACTS, SPLITS, label_name
from dream_pyg.graph.store import StoredGraph, build_store
from dream_pyg.models import MODELS, Batch, Recommender
from dream_pyg.ranking import SeenItems, recommend
from dream_pyg.serving import EXPORT_FORMATS, export_run, load_index
from dream_pyg.training import trainer
from dream_pyg.training.run import load_run
from dream_pyg.training.trainer import train
from dream_pyg.training.triplets import TripletSampler
from tests.graphs import MODALITIES, PlantedBlocks, random_dataset, write_files
from tests.training.runs import assert_same, assert_same_run, configure, read_checkpoint

IMPERSONAL = {"popularity": "the same ranking for every user cannot know anyone's block, and nothing is trained"}
TRAINED = [name for name in MODELS if name not in IMPERSONAL]
BLOCKS = PlantedBlocks()

each_model = pytest.mark.parametrize("name", MODELS)
each_trained_model = pytest.mark.parametrize("name", TRAINED)


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> StoredGraph:
    return BLOCKS.store(tmp_path_factory.mktemp("planted"))


def make(name: str, graph, seed: int = 0) -> Recommender:
    torch.manual_seed(seed)
    return MODELS[name](graph)


def first_batch(graph) -> Batch:
    return TripletSampler(graph).epoch(torch.Generator().manual_seed(0))


def total_loss(model: Recommender, graph) -> torch.Tensor:
    return torch.stack(list(model.loss(graph, first_batch(graph)).values())).sum()


@each_trained_model
def test_learns_the_planted_blocks(name, stored, tmp_path):
    # 30 epochs of 3 steps; only the last is evaluated, so nothing but training decides.
    options = {"epochs": 30, "evaluate_every": 30, "batch_size": 64, "learning_rate": 0.02}
    train(configure(stored, name, **options), tmp_path / "run")
    run = load_run(tmp_path / "run", device="cpu")
    users = torch.arange(len(BLOCKS.user_block))
    seen = SeenItems.from_pairs(stored.graph[INTERACTS][label_name("train")], len(users))
    best = recommend(run.embeddings(), users, 1, seen).item.squeeze(1)
    np.testing.assert_array_equal(BLOCKS.item_block[best], BLOCKS.user_block)


def test_only_models_without_parameters_are_excused_from_learning(stored):
    for name in IMPERSONAL:
        model = make(name, stored.graph)
        assert list(model.parameters()) == []
        scores = model(stored.graph).user @ model(stored.graph).item.T
        assert (scores == scores[0]).all()


@each_model
@pytest.mark.parametrize("num_modalities", [1, 2, 3])
def test_embeds_every_node_whatever_the_modalities(name, num_modalities):
    graph = build_graph(random_dataset(MODALITIES[:num_modalities]), num_neighbors=3)
    model = make(name, graph)
    user, item = model(graph)
    assert (len(user), len(item)) == (graph["user"].num_nodes, graph["item"].num_nodes)
    assert user.size(1) == item.size(1)
    assert user.isfinite().all()
    assert item.isfinite().all()


@each_model
def test_needs_modalities_only_if_it_says_so(name):
    graph = build_graph(random_dataset(()), num_neighbors=3)
    if MODELS[name].needs_features or MODELS[name].needs_item_knn:
        with pytest.raises(ConfigError, match="needs at least one modality"):
            make(name, graph)
    else:
        assert all(part.isfinite().all() for part in make(name, graph)(graph))


@each_trained_model
@pytest.mark.parametrize("num_modalities", [1, 2, 3])
def test_every_parameter_gets_a_finite_gradient(name, num_modalities):
    graph = build_graph(random_dataset(MODALITIES[:num_modalities]), num_neighbors=3)
    model = make(name, graph)
    total_loss(model, graph).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        # One modality alone leaves nothing to weigh against another, but two leave no parameter idle.
        assert parameter.grad.any() or num_modalities == 1, parameter_name


@each_trained_model
def test_loss_terms_are_finite_scalars(name):
    graph = build_graph(random_dataset(), num_neighbors=3)
    terms = make(name, graph).loss(graph, first_batch(graph))
    assert terms
    for term_name, term in terms.items():
        assert term.shape == (), term_name
        assert term.isfinite(), term_name


@each_model
def test_weights_saved_and_loaded_give_equal_scores(name, tmp_path):
    graph = build_graph(random_dataset(), num_neighbors=3)
    model, other = make(name, graph, seed=0), make(name, graph, seed=1)
    if name in TRAINED:
        assert not torch.equal(model(graph).user, other(graph).user)
    save_tensors(tmp_path / "weights.safetensors", model.state_dict())
    other.load_state_dict(load_tensors(tmp_path / "weights.safetensors")[0])
    for one, two in zip(model(graph), other(graph), strict=True):
        assert torch.equal(one, two)


@each_model
def test_state_that_is_not_learned_follows_from_the_graph(name):
    graph = build_graph(random_dataset(), num_neighbors=3)
    one, other = make(name, graph, seed=0).state_dict(), make(name, graph, seed=1).state_dict()
    learned = {parameter_name for parameter_name, _ in make(name, graph).named_parameters()}
    assert learned <= set(one)
    for key in set(one) - learned:
        assert torch.equal(one[key], other[key]), key


@each_model
def test_same_seed_same_bits_and_another_seed_others(name, stored, tmp_path):
    config = configure(stored, name, epochs=2)
    for run in ("one", "two"):
        train(config, tmp_path / run)
    assert_same_run_or_untrained(name, tmp_path / "one", tmp_path / "two")
    train(configure(stored, name, epochs=2, seed=1), tmp_path / "other")
    equal = [
        torch.equal(one, other)
        for one, other in zip(
            load_run(tmp_path / "one", device="cpu").embeddings(),
            load_run(tmp_path / "other", device="cpu").embeddings(),
            strict=True,
        )
    ]
    assert equal == [name in IMPERSONAL] * 2


@each_model
def test_resumed_is_uninterrupted_bit_for_bit(name, stored, tmp_path):
    train(configure(stored, name, epochs=4), tmp_path / "whole")
    train(configure(stored, name, epochs=2), tmp_path / "parts")
    train(configure(stored, name, epochs=4), tmp_path / "parts", resume=True)
    assert_same_run_or_untrained(name, tmp_path / "whole", tmp_path / "parts")


@each_trained_model
def test_interrupted_inside_an_epoch_and_resumed_is_uninterrupted(name, stored, tmp_path, monkeypatch):
    train(configure(stored, name, epochs=3), tmp_path / "whole")
    step = trainer._Session._train_step
    with monkeypatch.context() as patched:

        def interrupted_step(session, batch, monitor):
            step(session, batch, monitor)
            if (session.epoch, session.step) == (1, 2):
                signal.raise_signal(signal.SIGINT)

        patched.setattr(trainer._Session, "_train_step", interrupted_step)
        with pytest.raises(Interrupted):
            train(configure(stored, name, epochs=3), tmp_path / "parts")
    train(configure(stored, name, epochs=3), tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@each_model
@pytest.mark.parametrize("file_format", EXPORT_FORMATS)
def test_exports_its_embeddings(name, file_format, stored, tmp_path):
    run = load_run(train(configure(stored, name, epochs=1), tmp_path / "run").run, device="cpu")
    info = export_run(run, tmp_path / "export", format=file_format)
    assert (info["users"], info["items"]) == tuple(len(rows) for rows in run.embeddings())
    index = load_index(tmp_path / "export" / "items.faiss")
    np.testing.assert_array_equal(index.reconstruct_n(0, index.ntotal), run.embeddings().item.numpy())


def assert_same_run_or_untrained(name: str, one: Path, other: Path) -> None:
    assert_same_run(one, other)
    assert read_checkpoint(one)["epoch"] == (0 if name in IMPERSONAL else read_checkpoint(other)["epoch"])


def with_other_held_out_items(dataset: Dataset) -> Dataset:
    """The same train interactions, but every user's valid and test items lie in the next block."""
    held_out = np.isin(dataset.interactions.split, [VALID, TEST])
    moved = (dataset.interactions.item + BLOCKS.items_per_block) % dataset.interactions.num_items
    interactions = dataclasses.replace(dataset.interactions, item=np.where(held_out, moved, dataset.interactions.item))
    return dataclasses.replace(dataset, interactions=interactions)


@each_model
def test_no_held_out_interaction_ever_propagates(name):
    dataset = BLOCKS.dataset()
    graph, other = (build_graph(given, num_neighbors=4) for given in (dataset, with_other_held_out_items(dataset)))
    same_labels = [torch.equal(graph[INTERACTS][label_name(s)], other[INTERACTS][label_name(s)]) for s in SPLITS]
    assert same_labels == [True, False, False]
    model = make(name, graph)
    for one, two in zip(model(graph), model(other), strict=True):
        assert torch.equal(one, two)
    batch = first_batch(graph)
    assert all(torch.equal(one, two) for one, two in zip(batch, first_batch(other), strict=True))
    losses = []
    for given in (graph, other):
        torch.manual_seed(0)  # dropout draws from it
        losses.append(model.loss(given, batch))
    assert_same(*losses)
    # Nor is there room for one: each interaction is one edge in each direction, and all of them are train pairs.
    pairs = {tuple(pair) for pair in graph[INTERACTS][label_name("train")].T.tolist()}
    assert {tuple(pair) for pair in graph[INTERACTS].edge_index.as_tensor().T.tolist()} == pairs
    reverse = graph["item", "rev_interacts", "user"].edge_index.as_tensor()
    assert {tuple(pair) for pair in reverse.flip(0).T.tolist()} == pairs


@each_model
def test_training_learns_nothing_from_held_out_interactions(name, stored, tmp_path):
    config = write_files(with_other_held_out_items(BLOCKS.dataset()), tmp_path / "data")
    other, _ = build_store(config, tmp_path / "graph", num_neighbors=4)
    assert other.fingerprint != stored.fingerprint
    train(configure(stored, name, epochs=3), tmp_path / "one")
    train(configure(other, name, epochs=3), tmp_path / "other")
    one, two = read_checkpoint(tmp_path / "one"), read_checkpoint(tmp_path / "other")
    assert_same(one["model"], two["model"])
    assert_same(one["optimizer"], two["optimizer"])
    assert [line["loss"] for line in one["lines"]] == [line["loss"] for line in two["lines"]]


@each_trained_model
def test_docstring_names_its_paper(name):
    assert re.search(r"arXiv \d{4}\.\d{4,5}|doi 10\.\d{4}/\S+", MODELS[name].__doc__ or "")


@each_model
def test_docstrings_of_models_and_configs_are_their_own(name):
    model = MODELS[name]
    assert model.__doc__ != Recommender.__doc__
    assert model.Config.__doc__


def config_of(name: str, **values: Any) -> RunConfig:
    return RunConfig.create(overrides=[f"model.{key}={value}" for key, value in values.items()], graph="g", model=name)


def out_of_range(field: dataclasses.Field) -> list[Any]:
    """Values that no field of this kind takes; its kind is told by its default."""
    if isinstance(field.default, bool):
        return ["maybe", 2]
    if isinstance(field.default, int):
        return [-1, 1.5, "many"]
    if isinstance(field.default, float):
        return [-1.0, "much"]
    return ["nonsense", -1]


FIELDS = [(name, field.name) for name, model in MODELS.items() for field in dataclasses.fields(model.Config)]


@pytest.mark.parametrize(("name", "key"), FIELDS)
def test_config_refuses_values_out_of_range(name, key):
    (field,) = [field for field in dataclasses.fields(MODELS[name].Config) if field.name == key]
    for value in out_of_range(field):
        with pytest.raises(ConfigError, match=rf"model '{name}': .*{key}.*got {re.escape(repr(value))}"):
            config_of(name, **{key: value})


@each_model
def test_config_refuses_unknown_fields(name):
    with pytest.raises(ConfigError, match=rf"model '{name}': unknown key 'no_such_field'"):
        config_of(name, no_such_field=1)


@each_model
def test_config_is_frozen_and_fully_spelled_out(name, tmp_path):
    config = config_of(name)
    for field in dataclasses.fields(MODELS[name].Config):
        if field.default is not None:
            assert config.model[field.name] == field.default
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config.hyperparameters, field.name, field.default)
    config.save(tmp_path / "config.toml")
    assert RunConfig.load(tmp_path / "config.toml") == config


def test_an_unknown_model_names_those_there_are():
    with pytest.raises(ConfigError, match=rf"expected one of {', '.join(MODELS)}\. Did you mean 'dream'"):
        config_of("dreem")
