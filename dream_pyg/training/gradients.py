"""What a step of a training computes: the terms of the loss, and the gradient of each parameter."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch_geometric.data import HeteroData

from dream_pyg import ranks
from dream_pyg.config import TrainingConfig
from dream_pyg.models import Batch, Recommender

_STEPS_BEFORE = 3
"""Steps that compute as ever before one is recorded, until all libraries are ready."""


class Gradients:
    """Computes the loss and its gradients, operation by operation.

    Args:
        model: The model, whose parameters get the gradients.
    """

    def __init__(self, model: Recommender) -> None:
        self._model = model

    def __call__(self, graph: HeteroData, batch: Batch) -> dict[str, Tensor]:
        """The terms of the loss; each parameter's ``grad`` is that of their sum."""
        terms = self._model.loss(graph, batch)
        total = torch.stack(list(terms.values())).sum()
        self._model.zero_grad(set_to_none=True)
        with ranks.naming_lost_processes():
            total.backward()
        ranks.average_gradients(self._model.parameters())
        return terms

    def forget(self) -> None:
        """Note that the model now reads other tensors than before."""


class _Recording(NamedTuple):
    """What one step launched on a GPU, and the tensors that it reads and writes each time."""

    launches: torch.cuda.CUDAGraph
    batch: Tensor  # (3, B)
    terms: dict[str, Tensor]
    gradients: Sequence[tuple[Tensor, Tensor | None]]  # of each parameter


class RecordedGradients(Gradients):
    """The same on a GPU, by a CUDA graph: what one step launches is recorded, and launched at once for later ones.

    A step is hundreds of operations, small ones of which take a GPU less time than the CPU takes to launch them. All
    steps must be given the same graph.

    Args:
        model: A model that is :attr:`~dream_pyg.models.Recommender.recordable`.
        batch_size: Triplets of the steps to record; those of another size, as an epoch's last, compute as ever.
        device: The GPU.
    """

    def __init__(self, model: Recommender, batch_size: int, device: torch.device) -> None:
        super().__init__(model)
        self._batch_size = batch_size
        self._stream = _recorded_stream(device)
        self._steps_before = 0
        self._recording: _Recording | None = None

    def __call__(self, graph: HeteroData, batch: Batch) -> dict[str, Tensor]:
        """As without a recording; the terms hold their values until the next step."""
        if len(batch.user) != self._batch_size:
            return super().__call__(graph, batch)
        if self._steps_before < _STEPS_BEFORE:
            self._steps_before += 1
            return self._aside(graph, batch)
        recording = self._recording = self._recording or self._record(graph, batch)
        torch.stack(batch, out=recording.batch)
        recording.launches.replay()
        for parameter, gradient in recording.gradients:
            parameter.grad = gradient
        return recording.terms

    def forget(self) -> None:
        """Record anew, after a single step: only what the model keeps of its own has to be made again."""
        self._recording = None
        self._steps_before = min(self._steps_before, _STEPS_BEFORE - 1)

    def _aside(self, graph: HeteroData, batch: Batch) -> dict[str, Tensor]:
        """A step on the stream that will be recorded, as PyTorch asks for.

        What it makes is memory of that stream, which takes it back for nothing before it has waited for the usual one.
        """
        usual = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(usual)
        with torch.cuda.stream(self._stream):
            terms = super().__call__(graph, batch)
        usual.wait_stream(self._stream)
        return terms

    def _record(self, graph: HeteroData, batch: Batch) -> _Recording:
        own, launches = torch.stack(batch), torch.cuda.CUDAGraph()
        self._model.zero_grad(set_to_none=True)  # Gradients shall be among the recording's own tensors.
        with torch.cuda.device(self._stream.device), torch.cuda.graph(launches, stream=self._stream):
            terms = super().__call__(graph, Batch(*own))
        gradients = [(parameter, parameter.grad) for parameter in self._model.parameters()]
        return _Recording(launches, own, {name: term.detach() for name, term in terms.items()}, gradients)


def can_record(config: TrainingConfig, model: Recommender, device: torch.device) -> bool:
    """Whether :class:`RecordedGradients` are wanted and possible."""
    is_same_graph = config.sampling is None and ranks.num_ranks() == 1
    return config.cuda_graphs and device.type == "cuda" and is_same_graph and model.learns and model.recordable


@functools.cache
def _recorded_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all trainings: PyTorch keeps working memory for each stream that ever multiplied."""
    return torch.cuda.Stream(device)
