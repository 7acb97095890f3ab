"""How a model is compared with its oracle: each loss term, and the gradient of their sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch_geometric.data import HeteroData

from dream_pyg.models import Batch, Recommender
from dream_pyg.training.triplets import TripletSampler
from tests.oracles.gradients import numerical_gradient

Parameters = dict[str, NDArray[np.float64]]


def double_model(model_class: type[Recommender], graph: HeteroData, seed: int = 0, **config: Any) -> Recommender:
    """A model in float64 whose parameters are of a size at which gates and sigmoids are far from linear."""
    torch.manual_seed(seed)
    model = model_class(graph, model_class.Config(**config)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def parameters_of(model: Recommender) -> Parameters:
    """A model's parameters as arrays."""
    return {name: parameter.detach().numpy().copy() for name, parameter in model.named_parameters()}


def some_triplets(graph: HeteroData, size: int = 11, seed: int = 0) -> Batch:
    """The first triplets of an epoch."""
    triplets = TripletSampler(graph).epoch(torch.Generator().manual_seed(seed))
    return Batch(*(part[:size] for part in triplets))


def assert_rows(actual: Any, expected: Any) -> None:
    """Each pair of a model's and an oracle's representations agrees."""
    for own, wanted in zip(actual, expected, strict=True):
        np.testing.assert_allclose(own.detach(), wanted, rtol=1e-10, atol=1e-12)


def assert_terms_and_gradients(
    model: Recommender,
    terms: dict[str, torch.Tensor],
    oracle: Callable[[Parameters], dict[str, float]],
    *,
    num_entries: int = 6,
) -> None:
    """Every weighted term is the oracle's, in its order, and so is the gradient of the sum to every parameter.

    Args:
        model: The model.
        terms: Its loss.
        oracle: The weighted terms as a function of parameters.
        num_entries: How many entries of each parameter are differentiated numerically.
    """
    own = parameters_of(model)
    expected = oracle(own)
    assert list(terms) == list(expected)
    for name, term in terms.items():
        np.testing.assert_allclose(term.item(), expected[name], rtol=1e-10, atol=1e-12, err_msg=name)
    model.zero_grad()
    torch.stack(list(terms.values())).sum().backward()
    generator = np.random.default_rng(0)
    for name, parameter in model.named_parameters():
        chosen = generator.permutation(parameter.numel())[:num_entries]

        def total(entries: NDArray[np.float64], name: str = name, chosen: Any = chosen) -> float:
            changed = own[name].copy()
            changed.flat[chosen] = entries
            return sum(oracle({**own, name: changed}).values())

        numerical = numerical_gradient(total, own[name].flat[chosen])
        scale = max(1.0, abs(sum(expected.values())))
        assert parameter.grad is not None, name
        np.testing.assert_allclose(
            parameter.grad.numpy().flat[chosen], numerical, rtol=1e-6, atol=2e-8 * scale, err_msg=name
        )
