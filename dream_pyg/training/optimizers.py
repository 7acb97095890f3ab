"""Adam, over all parameters or, for sampled graphs, lazily over the rows of tables that a step touched."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.adam import adam

from dream_pyg.config import TrainingConfig
from dream_pyg.graph.processor import deterministic
from dream_pyg.models import Recommender

_NUMBERS_AT_ONCE = 1 << 17
"""What a cache keeps of a table, its moments and gradient between reading and writing: half the time on a CPU."""


class LazyAdam(torch.optim.Optimizer):
    """Adam (arXiv 1412.6980) on the rows that have a gradient; moments and weights of all others stay as they are.

    What :class:`torch.optim.SparseAdam` does, in a third of the time: PyTorch's fused kernel runs on the gathered rows.

    Args:
        tables: Parameters whose gradients are sparse, with a row for each node.
        lr: Step size.
        betas: Decay of the moments.
        eps: Added to the denominator.
    """

    def __init__(
        self, tables: Iterable[Tensor], lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ) -> None:
        super().__init__(tables, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move the rows that have a gradient."""
        assert closure is None
        for group in self.param_groups:
            for table in group["params"]:
                if table.grad is not None:
                    self._step(table, group)

    def _step(self, table: Tensor, group: dict[str, Any]) -> None:
        state = self.state[table]
        if not state:
            state["step"] = torch.zeros((), device=table.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(table), torch.zeros_like(table)
        # A checkpoint is read into the CPU's memory, and only moments follow their table from there.
        state["step"] = state["step"].to(table.device)
        node, gradient = _distinct_rows(table.grad)  # type: ignore[arg-type]
        whole = (table, state["exp_avg"], state["exp_avg_sq"])
        beta1, beta2 = group["betas"]
        at_once = max(1, len(node) if table.is_cuda else _NUMBERS_AT_ONCE // table.size(1))
        with deterministic(False):  # Rows are distinct, so that all threads may write them.
            for nodes, gradients in zip(node.split(at_once), gradient.split(at_once), strict=True):
                # A lookup gathers several times faster than indexing.
                rows = [F.embedding(nodes, one.detach()) for one in whole]
                adam(
                    [rows[0]], [gradients], [rows[1]], [rows[2]], [], [state["step"].clone()],
                    fused=True, lr=group["lr"], beta1=beta1, beta2=beta2, eps=group["eps"],
                    amsgrad=False, maximize=False, weight_decay=0.0,
                )  # fmt: skip
                for one, moved in zip(whole, rows, strict=True):
                    one.index_copy_(0, nodes, moved)
        state["step"] += 1


def _distinct_rows(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of a sparse gradient, each once, and what each gets; sorts and adds up, which is slow, if it must."""
    if not gradient.is_coalesced():
        node = gradient._indices()[0]
        has = torch.zeros(gradient.size(0), dtype=torch.bool, device=node.device).index_fill_(0, node, True)
        if int(has.count_nonzero()) == len(node):
            return node, gradient._values()
        gradient = gradient.coalesce()
    return gradient.indices()[0], gradient.values()


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
        optimizers.append(LazyAdam(tables, lr=config.learning_rate))
    if parameters:
        optimizers.append(torch.optim.Adam(parameters.values(), lr=config.learning_rate, fused=True))
    return optimizers
