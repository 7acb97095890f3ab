"""What a training works on: the graph where it is trained, the model, and what each step sees."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch_geometric.data import HeteroData

from dream_pyg.config import RunConfig
from dream_pyg.errors import ConfigError, DataError
from dream_pyg.graph.schema import INTERACTS, label_name
from dream_pyg.models import Recommender
from dream_pyg.training.memory import check_memory
from dream_pyg.training.model import make_model, prepare_graph, teacher_of
from dream_pyg.training.steps import SampledSteps, WholeGraphSteps


class Prepared(NamedTuple):
    """All that a training needs and that a configuration and a graph determine."""

    graph: HeteroData
    model: Recommender
    steps: WholeGraphSteps | SampledSteps


def check_splits(graph: HeteroData, *, test: bool) -> None:
    """Refuse a graph that lacks what a training ranks.

    Args:
        graph: The graph.
        test: Whether the test split will be read.

    Raises:
        DataError: If the graph has no validation split, or no test split that will be read.
    """
    if graph[INTERACTS][label_name("valid")].size(1) == 0:
        raise DataError(
            "The valid split is empty, so the best epoch cannot be chosen. Build the graph with another split."
        )
    if test and graph[INTERACTS][label_name("test")].size(1) == 0:
        raise DataError(
            "The test split is empty, so nothing can be evaluated on it. Build the graph with another split; "
            "`dream-pyg train` can do without (--no-test)."
        )


def prepare(config: RunConfig, graph: HeteroData, device: torch.device, *, test: bool) -> Prepared:
    """Make what a configuration says of a graph, or say why it cannot be trained.

    Args:
        config: The configuration, whose seed draws the model's first weights.
        graph: The graph as it is stored.
        device: Where the model goes.
        test: Whether the test split will be read.

    Raises:
        ConfigError: If the model cannot be trained on the graph as configured, or memory is too small.
        DataError: As :func:`check_splits`.
    """
    check_splits(graph, test=test)
    check_memory(config, graph, device)
    prepared = prepare_graph(graph, device, config.num_neighbors, config.held_precision)
    torch.manual_seed(config.training.seed)
    model = make_model(config, prepared, device)
    teacher = config.training.teacher
    if teacher is not None and teacher.is_used and teacher_of(config.training, model) is None:
        raise ConfigError(
            f"Model {config.model_name!r} is solved and not trained, so training.teacher has nobody to teach. Leave it "
            "out."
        )
    sampling = config.training.sampling
    if sampling is None:
        return Prepared(prepared, model, WholeGraphSteps(prepared, device))
    here = torch.device("cpu")
    whole = prepared if device == here else prepare_graph(graph, here, config.num_neighbors, config.held_precision)
    steps = SampledSteps(whole, model, sampling, seed=config.training.seed, device=device)
    return Prepared(prepared, model, steps)
