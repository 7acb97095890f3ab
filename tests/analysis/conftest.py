"""Ways to stop a training in the middle, as a user or a machine would."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest

from dream_pyg.models.bpr import BPR


class Killed(BaseException):
    """Ends a process at once: nothing cleans up after it."""


def _be_killed() -> None:
    raise Killed


@pytest.fixture(params=["SIGINT", "SIGTERM", "kill"])
def stop_at(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Stop BPR at a step, counted from 1 over all trainings from now on; 0 lets it go on."""
    original = BPR.loss
    stop: Callable[[], object] = (
        _be_killed if request.param == "kill" else lambda: signal.raise_signal(getattr(signal, request.param))
    )

    def stop_at_step(step: int) -> None:
        calls = [0]

        def loss(self, graph, batch):
            calls[0] += 1
            if calls[0] == step:
                stop()
            return original(self, graph, batch)

        monkeypatch.setattr(BPR, "loss", loss)

    return stop_at_step
