"""Search spaces: every key exists, every default lies inside, and the default point is the default configuration."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from dream_pyg.analysis.search_spaces import configure, default_point, describe_space, search_space
from dream_pyg.config import RunConfig, TrainingConfig
from dream_pyg.errors import ConfigError
from dream_pyg.graph.build import build_graph
from dream_pyg.models import MODELS
from dream_pyg.models.space import Choice, ImageShare, LogRange, Range
from dream_pyg.training.model import make_model, prepare_graph
from tests.graphs import random_dataset

MODALITIES = ["image", "text"]
SEARCH_SPACES = {name: model.search_space for name, model in MODELS.items() if model.search_space}


def test_every_model_with_hyper_parameters_has_a_space():
    tunable = {name for name, model in MODELS.items() if dataclasses.fields(model.Config)}
    assert set(SEARCH_SPACES) == tunable


@pytest.mark.parametrize("model", SEARCH_SPACES)
def test_keys_exist_and_defaults_lie_inside(model: str):
    defaults = {
        **{f"model.{field.name}": field.default for field in dataclasses.fields(MODELS[model].Config)},
        **{f"training.{name}": value for name, value in TrainingConfig().model_dump().items()},
    }
    space = SEARCH_SPACES[model]
    assert space.keys() - defaults.keys() == set()
    for key, dimension in space.items():
        if isinstance(dimension, ImageShare):
            assert defaults[key] is None
            assert 0 <= dimension.low < dimension.of_paper < dimension.high <= 1
        elif isinstance(dimension, Range):
            assert dimension.low < defaults[key] < dimension.high, key
            assert not isinstance(dimension, LogRange) or dimension.low > 0, key
        else:
            assert isinstance(dimension, Choice)
            assert defaults[key] in dimension.values, key
            assert len(set(dimension.values)) == len(dimension.values) > 1, key


@pytest.mark.parametrize("modalities", [MODALITIES, ["image", "audio"], ["image"]], ids="+".join)
@pytest.mark.parametrize("model", SEARCH_SPACES)
def test_the_default_point_is_the_default_model(model: str, modalities: list[str]):
    graph = prepare_graph(build_graph(random_dataset(modalities), num_neighbors=3), torch.device("cpu"))
    config = RunConfig.create(graph="graph", model=model)
    space = search_space(model, modalities)
    point = default_point(space, config, modalities)
    scores = []
    for one in (config, configure(config, space, point, modalities)):
        torch.manual_seed(0)
        made = make_model(one, graph).eval()
        made.fit(graph)
        scores.append(made(graph).scores(torch.arange(made.num_users)).clone())
    torch.testing.assert_close(*scores)
    assert configure(config, space, point, modalities).training == config.training


@pytest.mark.parametrize("model", SEARCH_SPACES)
def test_both_ends_of_every_dimension_are_valid(model: str):
    config, space = RunConfig.create(graph="graph", model=model), search_space(model, MODALITIES)
    for end in (0, -1):
        point = {
            key: (one.low, one.high)[end] if isinstance(one, Range) else one.values[end] for key, one in space.items()
        }
        values = configure(config, space, point, MODALITIES).to_dict()
        for key, dimension in space.items():
            section, name = key.split(".")
            expected = point[key]
            if isinstance(dimension, ImageShare):
                expected = {"image": point[key], "text": 1 - point[key]}
            assert values[section][name] == expected


def test_numbers_are_rounded_to_three_digits():
    config = RunConfig.create(graph="graph", model="bpr")
    space = search_space("bpr", [])
    tuned = configure(config, space, {"training.learning_rate": 0.00312345, "model.l2_weight": 1.23456}, [])
    assert (tuned.training.learning_rate, tuned.model["l2_weight"]) == (0.00312, 1.23)


def test_what_is_fixed_is_not_searched():
    fixed = ["model.modality_weights.image", "training.learning_rate", "training.epochs"]
    assert search_space("freedom", MODALITIES, fixed=fixed).keys() == {
        "model.pruning_ratio",
        "model.modality_bpr_weight",
    }


@pytest.mark.parametrize(
    ("model", "fixed", "message"),
    [
        ("popularity", [], "Model 'popularity' has nothing to tune. "),
        ("bpr", ["model.l2_weight", "training.learning_rate"], "nothing to tune besides what was set"),
        ("bpq", [], "Did you mean 'bpr'?"),
    ],
)
def test_nothing_to_search(model: str, fixed: list[str], message: str):
    with pytest.raises(ConfigError) as caught:
        search_space(model, MODALITIES, fixed=fixed)
    assert message in str(caught.value)


def test_a_described_space_is_plain_and_tells_spaces_apart():
    described = [describe_space(search_space(model, MODALITIES)) for model in SEARCH_SPACES]
    assert json.loads(json.dumps(described)) == described
    assert describe_space({"a": Range(0.1, 1)}) != describe_space({"a": LogRange(0.1, 1)})
