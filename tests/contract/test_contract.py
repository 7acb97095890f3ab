"""What every registered model promises. A model that is added to ``MODELS`` is held to all of it."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch

from dream_pyg.config import RunConfig
from dream_pyg.data.dataset import Dataset
from dream_pyg.data.files import load_tensors, save_tensors
from dream_pyg.data.interactions import TEST, VALID
from dream_pyg.errors import ConfigError, TrainingError
from dream_pyg.graph.build import build_graph
from dream_pyg.graph.schema import (
    INTERACTS,
    SPLITS,
    count_name,
    feature_modalities,
    feature_name,
    knn_edge,
    label_name,
    mask_name,
    norm_name,
)
from dream_pyg.graph.store import StoredGraph, build_store
from dream_pyg.models import MODELS, Batch, Embeddings, Recommender
from dream_pyg.models.base import ClosedForm
from dream_pyg.serving import EXPORT_FORMATS, export_run, recommend_table
from dream_pyg.training.checkpoint import load_checkpoint
from dream_pyg.training.run import load_run
from dream_pyg.training.trainer import train
from dream_pyg.training.triplets import TripletSampler
from tests.graphs import MODALITIES, PlantedBlocks, random_dataset, write_files
from tests.training.runs import (
    assert_learns,
    assert_resumes_inside_an_epoch,
    assert_same,
    assert_same_run,
    configure,
    read_checkpoint,
    read_metrics,
)

IMPERSONAL = {"popularity": "the same ranking for every user cannot know anyone's block, and nothing is trained"}
PERSONAL = [name for name in MODELS if name not in IMPERSONAL]
CLOSED_FORM = [name for name in MODELS if issubclass(MODELS[name], ClosedForm)]
TRAINED = [name for name in PERSONAL if name not in CLOSED_FORM]
BLOCKS = PlantedBlocks()


each_model = pytest.mark.parametrize("name", MODELS)
each_personal_model = pytest.mark.parametrize("name", PERSONAL)
each_trained_model = pytest.mark.parametrize("name", TRAINED)
each_closed_form = pytest.mark.parametrize("name", CLOSED_FORM)


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> StoredGraph:
    return BLOCKS.store(tmp_path_factory.mktemp("planted"))


def make(name: str, graph, seed: int = 0, **config: Any) -> Recommender:
    torch.manual_seed(seed)
    model = MODELS[name](graph, MODELS[name].Config(**config))
    model.fit(graph)
    return model


def all_scores(model: Recommender, graph) -> torch.Tensor:
    return model(graph).scores(torch.arange(model.num_users))


def first_batch(graph) -> Batch:
    return TripletSampler(graph).epoch(torch.Generator().manual_seed(0))


def total_loss(model: Recommender, graph) -> torch.Tensor:
    return torch.stack(list(model.loss(graph, first_batch(graph)).values())).sum()


@each_personal_model
def test_learns_the_planted_blocks(name, stored, tmp_path):
    # 30 epochs of 3 steps; only the last is evaluated, so nothing but training decides.
    options = {"epochs": 30, "evaluate_every": 30, "batch_size": 64, "learning_rate": 0.02}
    assert_learns(BLOCKS, configure(stored, name, **options), tmp_path / "run")


def test_only_models_without_parameters_are_excused_from_gradients_and_only_those_alike_for_all_from_learning(stored):
    for name in {*MODELS} - {*TRAINED}:
        model = make(name, stored.graph)
        assert list(model.parameters()) == []
        assert model.loss(stored.graph, first_batch(stored.graph)) == {}
        scores = all_scores(model, stored.graph)
        assert (scores == scores[0]).all() == (name in IMPERSONAL)


@each_model
@pytest.mark.parametrize("num_modalities", [1, 2, 3])
def test_scores_every_item_for_every_user_whatever_the_modalities(name, num_modalities):
    graph = build_graph(random_dataset(MODALITIES[:num_modalities]), num_neighbors=3)
    model = make(name, graph)
    size = (graph["user"].num_nodes, graph["item"].num_nodes)
    scorer = model(graph)
    assert (scorer.num_users, scorer.num_items) == size
    assert scorer.scores(torch.arange(size[0])).shape == size
    assert scorer.scores(torch.arange(size[0])).isfinite().all()
    if isinstance(scorer, Embeddings):
        assert (len(scorer.user), len(scorer.item)) == size
        assert scorer.user.isfinite().all()
        assert scorer.item.isfinite().all()
    assert isinstance(scorer, Embeddings) == (name not in CLOSED_FORM)


@each_model
def test_needs_modalities_only_if_it_says_so(name):
    graph = build_graph(random_dataset(()), num_neighbors=3)
    needs = MODELS[name].requirements(MODELS[name].Config())
    if needs.features or needs.item_knn:
        with pytest.raises(ConfigError, match="needs at least one modality"):
            make(name, graph)
    else:
        assert all_scores(make(name, graph), graph).isfinite().all()


SWITCHES = [
    (name, {field.name: not field.default})
    for name, model in MODELS.items()
    for field in dataclasses.fields(model.Config)
    if isinstance(field.default, bool)
]


@pytest.mark.parametrize(("name", "config"), [*((name, {}) for name in MODELS), *SWITCHES])
def test_a_graph_with_what_it_says_it_needs_is_enough(name, config):
    graph = build_graph(random_dataset(), num_neighbors=3)
    needs = MODELS[name].requirements(MODELS[name].Config(**config))
    for modality in feature_modalities(graph):
        if not needs.features:
            for attribute in (feature_name(modality), mask_name(modality), norm_name(modality)):
                del graph["item"][attribute]
            del graph["user"][count_name(modality)]
        for node, needed in (("item", needs.item_knn), ("user", needs.user_knn)):
            if not needed:
                del graph[knn_edge(node, modality)]
    model = make(name, graph, **config)
    assert all_scores(model, graph).isfinite().all()
    assert all(term.isfinite() for term in model.loss(graph, first_batch(graph)).values())


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
    model = make(name, graph, seed=0)
    torch.manual_seed(1)
    other = MODELS[name](graph)  # Nothing is solved again: what is loaded is the solution.
    if name in TRAINED:
        assert not torch.equal(all_scores(model, graph), all_scores(other, graph))
    save_tensors(tmp_path / "weights.safetensors", model.state_dict())
    other.load_state_dict(load_tensors(tmp_path / "weights.safetensors")[0])
    assert torch.equal(all_scores(model, graph), all_scores(other, graph))
    assert_same(dict(model.state_dict()), dict(other.state_dict()))


@each_closed_form
def test_a_closed_form_says_that_it_is_not_solved_yet(name, stored):
    graph = stored.graph
    with pytest.raises(TrainingError, match=rf"{MODELS[name].__name__} has not been solved yet.*fit\(graph\)"):
        MODELS[name](graph)(graph)


@each_closed_form
def test_a_closed_form_is_solved_once_by_training_and_never_by_what_opens_it(name, stored, tmp_path, monkeypatch):
    solved = []
    fit = MODELS[name].fit
    monkeypatch.setattr(MODELS[name], "fit", lambda model, graph: solved.append(fit(model, graph)))
    run = load_run(train(configure(stored, name), tmp_path / "run").run, device="cpu")
    assert len(solved) == 1
    assert len(read_metrics(tmp_path / "run")) == 1
    assert torch.equal(run.scorer().scores(torch.arange(3)), all_scores(make(name, stored.graph), stored.graph)[:3])
    assert load_checkpoint(run.paths.last)["model"].keys() == dict(run.model.named_buffers()).keys()


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
    one, other = (load_run(tmp_path / run, device="cpu") for run in ("one", "other"))
    assert torch.equal(all_scores(one.model, one.graph), all_scores(other.model, one.graph)) == (name not in TRAINED)
    if name in TRAINED:
        assert not any(torch.equal(*parts) for parts in zip(one.embeddings(), other.embeddings(), strict=True))


@each_model
def test_resumed_is_uninterrupted_bit_for_bit(name, stored, tmp_path):
    train(configure(stored, name, epochs=4), tmp_path / "whole")
    train(configure(stored, name, epochs=2), tmp_path / "parts")
    train(configure(stored, name, epochs=4), tmp_path / "parts", resume=True)
    assert_same_run_or_untrained(name, tmp_path / "whole", tmp_path / "parts")


@each_trained_model
def test_interrupted_inside_an_epoch_and_resumed_is_uninterrupted(name, stored, tmp_path, monkeypatch):
    assert_resumes_inside_an_epoch(configure(stored, name, epochs=3), tmp_path, monkeypatch)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in CLOSED_FORM])
@pytest.mark.parametrize("file_format", EXPORT_FORMATS)
def test_exports_its_embeddings(name, file_format, stored, tmp_path):
    run = load_run(train(configure(stored, name, epochs=1), tmp_path / "run").run, device="cpu")
    info = export_run(run, tmp_path / "export", format=file_format)
    assert (info["users"], info["items"]) == tuple(len(rows) for rows in run.embeddings())
    index = faiss.read_index(str(tmp_path / "export" / "items.faiss"))
    np.testing.assert_array_equal(index.reconstruct_n(0, index.ntotal), run.embeddings().item.numpy())


@each_closed_form
def test_item_weights_are_recommended_from_and_not_exported(name, stored, tmp_path):
    run = load_run(train(configure(stored, name), tmp_path / "run").run, device="cpu")
    with pytest.raises(ConfigError, match=rf"'{name}' has no embeddings .*cannot be exported.*dream-pyg recommend"):
        export_run(run, tmp_path / "export")
    assert not (tmp_path / "export").exists()
    assert len(recommend_table(run, 3)) == 3 * run.model.num_users


def assert_same_run_or_untrained(name: str, one: Path, other: Path) -> None:
    assert_same_run(one, other)
    assert read_checkpoint(one)["epoch"] == (read_checkpoint(other)["epoch"] if name in TRAINED else 0)


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
    assert torch.equal(all_scores(model, graph), all_scores(model, other))
    assert torch.equal(all_scores(model, graph), all_scores(make(name, other), other))
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
    assert_same(one["optimizers"], two["optimizers"])
    assert [line["loss"] for line in one["lines"]] == [line["loss"] for line in two["lines"]]


@each_personal_model
def test_docstring_names_its_paper(name):
    assert re.search(r"arXiv \d{4}\.\d{4,5}|doi 10\.\d{4}/\S+", MODELS[name].__doc__ or "")


@each_model
def test_docstrings_of_models_and_configs_are_their_own(name):
    model = MODELS[name]
    assert model.__doc__
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
