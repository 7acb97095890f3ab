"""What each of several processes does in ``test_processes``: ``torchrun -m tests.training.workers TASK ARGUMENTS``.

One process does the same by calling the functions.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from dream_pyg import ranks
from dream_pyg.cli import main as command_line
from dream_pyg.config import RunConfig
from dream_pyg.errors import ConfigError, StoreError
from dream_pyg.graph.schema import USER
from dream_pyg.models import MODELS, Recommender
from dream_pyg.nn.embeddings import embedding_rows, sharded_tables, xavier_embedding
from dream_pyg.training import preparation, trainer
from dream_pyg.training.model import make_model
from tests.graphs import in_double, interaction_graph

ALIGNED = {"intra_weight": 0.1, "inter_weight": 0.2, "signal_weight": 0.3}
SHARDED = {"shard_tables": True}
ALL_NEIGHBORS = {"sampling": {"interactions": (-1, -1), "relations": -1, "features": -1}}
"""Sampled graphs that leave nothing to chance, which is another in each process."""


class Case(NamedTuple):
    """A model with options of its own and of the training."""

    model: str
    options: Mapping[str, Any] = MappingProxyType({})
    training: Mapping[str, Any] = MappingProxyType({})


CASES = {
    **{name: Case(name) for name in MODELS},
    **{f"{name}-aligned": Case(name, ALIGNED) for name in ("vbpr", "bm3", "mgcn")},
    "dream-norm": Case("dream", {"squared_signal": False, "normalize_alignment": False}),
    "dream-cold": Case("dream", {"temperature": 0.02, "signal_weight": 1.0, "popularity_correction": 0.5}),
    "dream-corrected": Case("dream", {"popularity_correction": 1.0}),
    "dream-corrected-sampled": Case("dream", {"popularity_correction": 1.0}, ALL_NEIGHBORS),
    "dream-best": Case(
        "dream", {"user_modal": "items"}, {"teacher": {"l2_weights": [1.0, 30.0], "vote": 0.3, "votes": [1.0]}}
    ),
    "buir-id": Case("buir", {"num_layers": 0}),
    **{f"{name}-sharded": Case(name, {}, SHARDED) for name in ("dream", "vbpr", "lightgcn", "bpr")},
    **{f"{name}-sampled": Case(name, {}, ALL_NEIGHBORS) for name in ("dream", "bpr")},
    **{f"{name}-sampled-sharded": Case(name, {}, {**ALL_NEIGHBORS, **SHARDED}) for name in ("dream", "vbpr")},
}
RESUMED = ("buir", "freedom", "bm3", "dream-sharded", "dream-sampled-sharded")


def configure(graph: str, case: Case, epochs: int = 1) -> RunConfig:
    """A run on 144 pairs, whose last batch is of one: a process has none of it."""
    training = {"epochs": epochs, "batch_size": 13, "learning_rate": 0.01, "device": "cpu", **case.training}
    return RunConfig(graph=graph, model={"name": case.model, **case.options}, training=training)


def train_cases(graph: str, out: str) -> None:
    """Train every case, into ``out / case``."""
    with ranks.joined():
        for name, case in CASES.items():
            train_in_double(configure(graph, case), Path(out) / name)


def resume_cases(graph: str, out: str) -> None:
    """Let some of them go on for another epoch."""
    with ranks.joined():
        for name in RESUMED:
            train_in_double(configure(graph, CASES[name], epochs=2), Path(out) / name, resume=True)


def train_in_double(config: RunConfig, run: Path, *, resume: bool = False) -> None:
    """Train in float64, where processes differ by the order of sums alone, and keep each step's losses."""
    prepare_graph, add = preparation.prepare_graph, trainer._LossMonitor.add
    steps: list[Tensor] = []

    def note(self: trainer._LossMonitor, terms: dict[str, Tensor]) -> None:
        steps.append(ranks.average(torch.stack([term.detach() for term in terms.values()])))
        add(self, terms)

    def make_double(*given: Any) -> Recommender:
        return make_model(*given).double()

    with (
        patch.object(preparation, "make_model", make_double),
        patch.object(trainer, "make_model", make_double),
        patch.object(preparation, "prepare_graph", lambda *given: in_double(prepare_graph(*given))),
        patch.object(trainer._LossMonitor, "add", note),
    ):
        trainer.train(config, run, resume=resume)
    if not ranks.rank():
        torch.save(steps, run / "steps.pt")


def tables_and_refusals(graph: str, other: str, out: str) -> None:
    """Both, one after the other."""
    with ranks.joined():
        tables()
        refusals(graph, other, out)


def tables() -> None:
    """Shards are the table: as drawn, as a whole, by rows that differ from process to process, and in gradients."""
    rank, number = ranks.rank(), ranks.num_ranks()
    for num_rows in (7, 8, 1):  # uneven, even, and none for the second
        torch.manual_seed(0)
        table = xavier_embedding(num_rows, 3).detach()
        after = torch.get_rng_state()
        torch.manual_seed(0)
        with sharded_tables(torch.device("cpu")):
            shard = xavier_embedding(num_rows, 3)
        assert torch.equal(torch.get_rng_state(), after)
        assert isinstance(shard, ranks.RowShard)
        assert len(shard) < num_rows or (num_rows == 1 and rank == 0)
        nodes = interaction_graph(torch.ones(num_rows, 2).numpy())[USER]
        assert torch.equal(embedding_rows(shard, nodes), table)
        last = num_rows - 1
        asked = [torch.tensor([0, last, 0, num_rows // 2]), torch.tensor([last])[: num_rows % 2]]
        nodes.n_id = asked[rank]
        rows = embedding_rows(shard, nodes)
        assert torch.equal(rows, table[asked[rank]])
        rows.mul(torch.arange(1.0, 1 + rows.numel()).view_as(rows)).sum().backward()
        assert shard.grad is not None
        assert shard.grad.is_sparse
        expected = torch.zeros_like(table)
        for ids in asked:
            expected.index_add_(0, ids, torch.arange(1.0, 1 + 3 * len(ids)).view(-1, 3))
        own = ranks.RowShard.range(num_rows)
        assert torch.equal(shard.grad.to_dense(), expected[own.start : own.stop])
        ranks.average_gradients([shard])
        assert torch.equal(shard.grad.to_dense(), expected[own.start : own.stop] / number)
        # Each process counts the whole once more than the one before it.
        shard.grad = None
        (shard.whole() * (rank + 1)).sum().backward()
        assert torch.equal(shard.grad, torch.full_like(shard, number * (number + 1) / 2))
        weights = ranks.whole_state([shard], [{"rows": shard.detach(), "step": torch.tensor(1.0)}])
        if rank == 0:
            assert torch.equal(weights[0]["rows"], table)
        assert torch.equal(ranks.own_state([shard], [{"rows": table}])[0]["rows"], shard)
    _gradients_of_rows(rank)


def _gradients_of_rows(rank: int) -> None:
    """Dense and sparse gradients of a table that all processes have come to the same mean."""
    for sparse in (False, True):
        table = torch.nn.Parameter(torch.zeros(5, 2))
        row = torch.tensor([[0, 3, 3], [3, 4, 0]][rank][: 3 - rank])
        torch.nn.functional.embedding(row, table, sparse=sparse).sum().backward()
        ranks.average_gradients([table])
        grad = table.grad.to_dense() if table.grad is not None else None
        assert torch.equal(grad, torch.tensor([0.5, 0.0, 0.0, 1.5, 0.5]).unsqueeze(1).expand(5, 2))


def refusals(graph: str, other: str, out: str) -> None:
    """What processes that cannot train together are told, the same in each; one line each."""
    case, run, told = Case("lightgcn"), Path(out) / "run", []
    for config, resume, expected in (
        (configure(graph, Case("lightgcn", {"num_layers": 1 + ranks.rank()})), False, ConfigError),
        (configure(graph, case), ranks.rank() == 1, ConfigError),
        (configure(graph, Case("lightgcn", {}, {"batch_size": 1})), False, ConfigError),
        (configure(graph, Case("buir", {}, SHARDED)), False, ConfigError),
        (configure(graph if ranks.rank() else f"{graph}-elsewhere", case), False, StoreError),
        (configure(other if ranks.rank() else graph, case), False, ConfigError),
    ):
        with pytest.raises(expected) as refusal:
            trainer.train(config, run, resume=resume)
        told.append(str(refusal.value))
    with pytest.raises(ConfigError) as refusal:
        trainer.train(configure(graph, case), run, test=ranks.rank() == 0)
    told.append(str(refusal.value))
    with pytest.raises(ConfigError) as refusal:
        trainer.train(configure(graph, case), Path(out) / f"run-{ranks.rank()}")
    told.append(str(refusal.value))
    assert ranks.everyone_says(told) == [told] * ranks.num_ranks()
    assert not run.exists()
    if not ranks.rank():
        (Path(out) / "told").write_text("\n".join(told))


def die(step: str, *arguments: str) -> None:
    """A command line in which the first process is killed at a step."""
    calls: list[None] = []

    def train_step(self: Any, *given: Any, train_step: Any = trainer._Session._train_step) -> None:
        calls.append(None)
        if len(calls) == int(step) and ranks.rank() == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        train_step(self, *given)

    with patch.object(trainer._Session, "_train_step", train_step):
        command_line(list(arguments))


if __name__ == "__main__":
    torch.set_num_threads(1)
    ranks.run_and_leave(lambda: globals()[sys.argv[1]](*sys.argv[2:]))
