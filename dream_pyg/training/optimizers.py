"""Adam, over all parameters or, for sampled graphs, lazily over the rows of tables that a step touched."""

from __future__ import annotations

import torch

from dream_pyg.config import TrainingConfig
from dream_pyg.models import Recommender


def make_optimizers(model: Recommender, config: TrainingConfig) -> list[torch.optim.Optimizer]:
    """The optimizers of a training, none for a model without parameters.

    Args:
        model: The model.
        config: The training.
    """
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    optimizers: list[torch.optim.Optimizer] = []
    if config.sampling is not None:
        tables = [parameters.pop(name) for name in model.tables if name in parameters]
        optimizers.append(torch.optim.SparseAdam(tables, lr=config.learning_rate))
    if parameters:
        optimizers.append(torch.optim.Adam(parameters.values(), lr=config.learning_rate, fused=True))
    return optimizers
