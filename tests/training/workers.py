"""What each of several processes does in ``test_processes``: ``torchrun -m tests.training.workers TASK ...``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dream_pyg import ranks
from dream_pyg.config import RunConfig
from dream_pyg.models import MODELS, Recommender
from dream_pyg.training import trainer
from tests.graphs import in_double

TRAINED = [name for name in MODELS if name not in ("addease", "ease", "itemknn", "popularity")]
ALIGNED = {"intra_weight": 0.1, "inter_weight": 0.2}
SHARDED = {"shard_tables": True}


class Case(NamedTuple):
    """A model with options of its own and of the training."""

    model: str
    options: Mapping[str, Any] = MappingProxyType({})
    training: Mapping[str, Any] = MappingProxyType({})


CASES = {
    **{name: Case(name) for name in MODELS},
    **{f"{name}-aligned": Case(name, ALIGNED) for name in ("vbpr", "bm3", "mgcn")},
    "dream-norm": Case("dream", {"squared_signal": False, "normalize_alignment": False}),
    "dream-cold": Case("dream", {"temperature": 0.02, "signal_weight": 1.0}),
    "buir-id": Case("buir", {"num_layers": 0}),
    **{f"{name}-sharded": Case(name, {}, SHARDED) for name in ("dream", "vbpr", "lightgcn", "bpr")},
}


def train_cases(graph: str, out: str) -> None:
    """Train every case in float64, where processes can differ by the order of sums alone, into ``out / case``."""
    make_model, prepare_graph = trainer.make_model, trainer.prepare_graph
    trainer.make_model = lambda *given: _double(make_model(*given))
    trainer.prepare_graph = lambda *given: in_double(prepare_graph(*given))
    with ranks.joined():
        for name, case in CASES.items():
            steps: list[Tensor] = []
            add = trainer._LossMonitor.add

            def note(self: Any, terms: dict[str, Tensor], steps: list[Tensor] = steps, add: Any = add) -> None:
                steps.append(ranks.average(torch.stack([term.detach() for term in terms.values()])))
                add(self, terms)

            trainer._LossMonitor.add = note
            # 144 pairs: the last batch has one, so that a process has none of it.
            training = {"epochs": 2, "batch_size": 13, "learning_rate": 0.01, "device": "cpu", **case.training}
            config = RunConfig(graph=graph, model={"name": case.model, **case.options}, training=training)
            trainer.train(config, Path(out) / name)
            trainer._LossMonitor.add = add
            if not ranks.rank():
                torch.save(steps, Path(out) / name / "steps.pt")


def _double(model: Recommender) -> Recommender:
    return model.double()


def main(task: str, *arguments: str) -> None:
    """Run a function of this module."""
    globals()[task](*arguments)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
