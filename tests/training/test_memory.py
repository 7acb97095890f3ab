"""Too little memory is told before training, with what would fit."""

from __future__ import annotations

import pytest
import torch

from dream_pyg.config import RunConfig
from dream_pyg.errors import ConfigError
from dream_pyg.training import memory
from dream_pyg.training.memory import check_memory, least_bytes
from dream_pyg.training.trainer import train
from tests.training.runs import configure

CPU = torch.device("cpu")


def bytes_of(stored, *overrides: str, model: str = "dream") -> int:
    config = RunConfig.create(graph=stored.path, model=model, overrides=overrides)
    return least_bytes(config, stored.graph).total


def test_what_it_takes_is_no_more_than_what_a_training_allocates(stored):
    num_rows = sum(stored.graph[node].num_nodes for node in ("user", "item"))
    numbers = sum(stored.graph["item"][f"x_{modality}"].numel() for modality in ("image", "text"))
    assert bytes_of(stored, model="lightgcn") == 5 * 4 * 64 * num_rows
    assert bytes_of(stored) == 5 * 4 * 64 * num_rows + 4 * numbers
    assert bytes_of(stored, "feature_precision=bfloat16") == 5 * 4 * 64 * num_rows + 2 * numbers
    assert bytes_of(stored, "training.sampling={}") == 5 * 4 * 64 * num_rows
    assert bytes_of(stored, model="popularity") == bytes_of(stored, model="ease") == 0


def test_a_training_that_cannot_fit_is_refused_with_what_would(stored, tmp_path, monkeypatch):
    config = configure(stored)
    sampled = bytes_of(stored, "training.sampling={}")
    monkeypatch.setattr(memory, "available_bytes", lambda: sampled)
    with pytest.raises(ConfigError) as caught:
        train(config, tmp_path / "run")
    message = str(caught.value)
    assert "Training dream on this graph takes at least" in message
    assert "training.sampling={}" in message
    assert "feature_precision" not in message
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(memory, "available_bytes", lambda: 1)
    with pytest.raises(ConfigError, match="wants a larger machine"):
        check_memory(config, stored.graph, CPU)


@pytest.mark.parametrize("free", [None, 1 << 40])
def test_what_fits_or_cannot_be_known_is_not_refused(stored, monkeypatch, free):
    monkeypatch.setattr(memory, "available_bytes", lambda: free)
    check_memory(configure(stored), stored.graph, CPU)
