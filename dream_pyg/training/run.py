"""The run directory: what a training leaves behind and how it is opened again.

Layout::

    config.toml              the configuration, fully resolved
    run.json                 versions, graph fingerprint, seed, device, how it ended
    metrics.jsonl            one line an epoch
    checkpoints/last.pt      everything needed to resume
    checkpoints/best.safetensors   the weights of the best epoch
    checkpoints/epoch-00004.safetensors   the weights after epoch 4, if ``training.keep_every`` asks for them
    taught.safetensors       what a teacher gave, if there is one
    test_metrics.json        full-ranking metrics of the best epoch, read once
"""

from __future__ import annotations

import json
import logging
import platform
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import HeteroData

from dream_pyg import ranks
from dream_pyg.config import RunConfig
from dream_pyg.data.files import is_free, load_tensors, read_json, save_tensors, write_json
from dream_pyg.errors import ConfigError, ResumeError, StoreError
from dream_pyg.evaluation import evaluate
from dream_pyg.graph.processor import installed_version, processor_name, resolve_device
from dream_pyg.graph.store import StoredGraph, load_graph
from dream_pyg.models import Embeddings, Recommender, Scorer
from dream_pyg.training.model import load_weights, make_model, prepare_graph, scorer_of, teacher_of
from dream_pyg.training.vote import Vote, VotedScores

logger = logging.getLogger("dream_pyg")

_RECORDED = {
    "config": dict,
    "graph_fingerprint": str,
    "seed": int,
    "device": str,
    "num_threads": int,
    "versions": dict,
}
"""What ``run.json`` holds from the start."""
_RECORDED_AT_THE_END = {"epochs": int, "best_epoch": int}
"""And once the run is finished."""


@dataclass(frozen=True)
class RunPaths:
    """Where each file of a run lies."""

    root: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.root / "config.toml"

    @property
    def info(self) -> Path:
        """What the run was made with and how it ended."""
        return self.root / "run.json"

    @property
    def metrics(self) -> Path:
        """One line an epoch."""
        return self.root / "metrics.jsonl"

    @property
    def last(self) -> Path:
        """The resumable checkpoint."""
        return self.root / "checkpoints" / "last.pt"

    @property
    def best(self) -> Path:
        """The best epoch's weights."""
        return self.root / "checkpoints" / "best.safetensors"

    def epoch(self, epoch: int) -> Path:
        """The weights after an epoch, if they were kept."""
        return self.root / "checkpoints" / f"epoch-{epoch:05d}.safetensors"

    def kept_epochs(self) -> list[int]:
        """The epochs whose weights were kept, in order."""
        numbers = (path.stem.removeprefix("epoch-") for path in self.root.glob("checkpoints/epoch-*.safetensors"))
        return sorted(int(number) for number in numbers if number.isdecimal())

    @property
    def taught(self) -> Path:
        """What a teacher gave, if there is one: items, and the weights of its vote."""
        return self.root / "taught.safetensors"

    @property
    def test_metrics(self) -> Path:
        """Test metrics of the best epoch."""
        return self.root / "test_metrics.json"

    def lost(self, *, to_resume: bool) -> list[str]:
        """The files that a run which is there must have and does not.

        Args:
            to_resume: Whether it is to be trained on.
        """
        finished = self.info.is_file() and read_json(self.info).get("status") == "finished"
        evaluated = finished or any("valid" in epoch for epoch in read_epochs(self))
        teacher = None
        with suppress(ConfigError):  # What is wrong with a configuration is said where the run is opened.
            teacher = RunConfig.load(self.config).training.teacher
        needed = {
            self.config: True,
            self.info: True,
            self.metrics: finished,
            self.best: evaluated,
            self.last: to_resume,
            self.taught: teacher is not None and teacher.is_used,
        }
        return [str(path.relative_to(self.root)) for path in needed if needed[path] and not path.is_file()]

    def check_whole(self, *, to_resume: bool) -> None:
        """Refuse a run that lost files.

        Raises:
            StoreError: If one is gone.
        """
        if lost := self.lost(to_resume=to_resume):
            raise StoreError(
                f"{self.root} is not whole: it has no {', '.join(lost)}. Restore what is missing from a copy, or "
                f"remove {self.root}; then give the same command. What was removed is begun without --resume."
            )

    def check_resumable(self) -> None:
        """Refuse to continue what is not there, or not whole.

        Raises:
            ResumeError: If nothing is there.
            StoreError: If a file is gone.
        """
        if is_free(self.root):
            raise ResumeError(f"There is no run at {self.root} to resume. Train without --resume.")
        self.check_whole(to_resume=True)

    def check_absent(self) -> None:
        """Refuse to begin a run where something is.

        Raises:
            StoreError: If there is more than an empty directory.
        """
        if not is_free(self.root):
            raise StoreError(f"{self.root} exists already. Continue it with --resume, or choose another directory.")


@dataclass(frozen=True)
class Run:
    """A run: its configuration, graph and model with the best epoch's weights."""

    paths: RunPaths
    config: RunConfig
    stored: StoredGraph
    graph: HeteroData
    model: Recommender
    vote: Vote | None = None

    def embeddings(self) -> Embeddings:
        """Final representations of all users and items, without a teacher's vote.

        Raises:
            ConfigError: If the model has none, but weighs items by items.
        """
        scorer = scorer_of(self.model, self.graph)
        if not isinstance(scorer, Embeddings):
            raise ConfigError(
                f"Model {self.config.model_name!r} has no embeddings but weights from item to item, so it cannot be "
                "exported. Write its recommendations instead: "
                f"`dream-pyg recommend {self.paths.root} --out top.parquet`."
            )
        return scorer

    def scorer(self) -> Scorer:
        """What scores every user and item: embeddings, with a teacher's vote if it has one, or item weights."""
        return scorer_of(self.model, self.graph, self.vote)

    @torch.no_grad()
    def lines(self) -> dict[str, Scorer]:
        """``general``, the same ``without_vote`` if a teacher has one, and of a model with two lines either alone."""
        scorer = self.scorer()
        lines = {"general": scorer}
        if isinstance(scorer, VotedScores):
            lines["without_vote"] = scorer.embeddings
        dual = self.model.dual_representations(self.graph)
        if dual is not None:
            lines |= {"behavior": dual.behavior.detach(), "modal": dual.modal.detach()}
        return lines


def load_run(path: str | Path, *, device: str = "auto", graph: str | Path | None = None) -> Run:
    """Open a run with the weights of its best epoch; if it is not finished, of the best so far, with a warning.

    Args:
        path: The run directory.
        device: Where the model goes.
        graph: The graph store, if it has moved since training.

    Raises:
        StoreError: If this is no run, it has no best epoch yet, or a file is damaged.
    """
    paths = RunPaths(Path(path))
    if not paths.config.is_file():
        raise StoreError(f"{path} is not a run: it has no config.toml. Train one with `dream-pyg train`.")
    best_epoch, _ = read_best(paths)
    info = read_run_info(paths)
    config = RunConfig.load(paths.config)
    decisive = ("model.", "num_neighbors:", "feature_precision:", "training.teacher.vote:")
    if changed := [line for line in config.differences(info["config"]) if line.startswith(decisive)]:
        raise StoreError(
            f"{paths.config} differs from what {paths.info.name} records of the training (here = config.toml): "
            f"{'; '.join(changed)}. Undo the change, or train anew in another directory."
        )
    if graph is None and not Path(config.graph).exists():
        raise StoreError(f"The graph of {path} is no longer at {config.graph}. Say where it is with --graph.")
    stored = load_graph(graph or config.graph)
    expected = info["graph_fingerprint"]
    if stored.fingerprint != expected:
        raise StoreError(
            f"The graph at {stored.path} is not the one that {path} was trained on: fingerprint "
            f"{stored.fingerprint[:12]}, expected {str(expected)[:12]}. Give the right one with --graph."
        )
    target = resolve_device(device)
    prepared = prepare_graph(stored.graph, target, config.num_neighbors, config.held_precision)
    model = make_model(config, prepared, target)
    load_best(paths, model)
    teacher = teacher_of(config.training, model)
    vote = None
    if teacher is not None and teacher.vote:
        vote = Vote.load(paths.taught, teacher, prepared)
        if info.get("best_epoch") == best_epoch:  # else the vote was chosen for weights that are gone
            vote = vote._replace(share=info.get("vote", vote.share))
    if (status := info.get("status")) != "finished":
        logger.warning(
            "%s is not finished (%s): this is epoch %d, the best so far. Continue it with "
            "`dream-pyg train --resume --run %s`.",
            path,
            status,
            best_epoch,
            path,
        )
    return Run(paths, config, stored, prepared, model, vote)


def evaluate_lines(run: Run, split: str, **options: Any) -> dict[str, dict[str, float]]:
    """Metrics of the model's representation and, where it has two lines, of each alone (Figure 5 of DREAM).

    Args:
        run: A finished run.
        split: The split.
        **options: For :func:`~dream_pyg.evaluation.evaluate`.
    """
    return {line: evaluate(scorer, run.graph, split, **options) for line, scorer in run.lines().items()}


def read_best(paths: RunPaths) -> tuple[int, dict[str, float]]:
    """The best epoch and its metrics on validation, as they were written with its weights.

    Raises:
        StoreError: If they are not there, or damaged.
    """
    if not paths.best.is_file():
        raise StoreError(
            f"{paths.root} has no best epoch: there is no {paths.best}. If the run is not finished, continue it with "
            f"`dream-pyg train --resume --run {paths.root}`; else restore the file from a copy, or train anew in "
            "another directory."
        )
    _, metadata = load_tensors(paths.best, verify=False)
    try:
        return int(metadata["epoch"]), json.loads(metadata["valid"])
    except (KeyError, ValueError) as error:
        raise _damaged(paths.best) from error


def read_test_metrics(paths: RunPaths, epoch: int) -> dict[str, dict[str, float]] | None:
    """Test metrics of each line, if they are of this epoch: a run on its way to more has those of an earlier one.

    Raises:
        StoreError: If they are damaged.
    """
    if not paths.test_metrics.is_file():
        return None
    tested = read_json(paths.test_metrics)
    if not _holds(tested, {"epoch": int, "lines": dict}) or not _holds(tested["lines"], {"general": dict}):
        raise StoreError(
            f"{paths.test_metrics} is damaged: it lacks what a test records. Remove it; "
            f"`dream-pyg train --resume --run {paths.root}` writes it again."
        )
    return tested["lines"] if tested["epoch"] == epoch else None


def load_best(paths: RunPaths, model: Recommender) -> None:
    """Give a model the weights of the best epoch.

    Raises:
        StoreError: If they are damaged or those of another model.
    """
    weights, _ = load_tensors(paths.best)
    try:
        load_weights(model, weights)
    except RuntimeError as error:
        raise StoreError(f"{paths.best} does not fit the model of {paths.config}: {error}") from error


def describe_run(config: RunConfig, stored: StoredGraph, device: torch.device) -> dict[str, Any]:
    """What ``run.json`` says when a run begins."""
    return {
        "model": config.model_name,
        "graph": str(stored.path),
        "dataset": stored.name,
        "graph_fingerprint": stored.fingerprint,
        "config": config.to_dict(),
        "seed": config.training.seed,
        "device": str(device),
        "processor": processor_name(device),
        "num_threads": torch.get_num_threads(),
        "num_processes": ranks.num_ranks(),
        "versions": {
            "dream-pyg": installed_version("dream-pyg"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def read_epochs(paths: RunPaths) -> list[dict[str, Any]]:
    """What is noted of each epoch so far.

    Raises:
        StoreError: If a line is damaged.
    """
    if not paths.metrics.is_file():
        return []
    try:
        epochs = [json.loads(line) for line in paths.metrics.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise StoreError(f"{paths.metrics} is damaged ({error}). Restore it from a copy, or train anew.") from error
    if not all(_holds(epoch, {"epoch": int, "train_seconds": int | float}) for epoch in epochs):
        raise _damaged(paths.metrics)
    return epochs


def seconds_of(epochs: list[dict[str, Any]]) -> float:
    """How long epochs took, with their validations."""
    return round(sum(epoch["train_seconds"] + epoch.get("evaluate_seconds", 0.0) for epoch in epochs), 1)


def save_best(paths: RunPaths, weights: Mapping[str, Tensor], epoch: int, metrics: dict[str, float]) -> None:
    """Write the weights of the best epoch so far, with its metrics on validation."""
    save_tensors(paths.best, weights, {"epoch": str(epoch), "valid": json.dumps(metrics)})


def keep_epoch(paths: RunPaths, weights: Mapping[str, Tensor], epoch: int) -> None:
    """Write the weights after an epoch, to stay."""
    save_tensors(paths.epoch(epoch), weights, {"epoch": str(epoch)})


def read_run_info(paths: RunPaths) -> dict[str, Any]:
    """What ``run.json`` says, options that are newer than the run at their defaults.

    Raises:
        StoreError: If it is missing or damaged, or tells of options that are not known here.
    """
    info = read_json(paths.info)
    recorded = _RECORDED | (_RECORDED_AT_THE_END if info.get("status") == "finished" else {})
    if not _holds(info, recorded):
        raise _damaged(paths.info)
    try:
        config = RunConfig.from_dict(info["config"], str(paths.info))
    except ConfigError as error:
        raise StoreError(
            f"{error} The run was made by another version of dream-pyg (here is {installed_version('dream-pyg')}), or "
            "the file was changed. Open it with the version that it names, or train anew."
        ) from error
    return {**info, "config": config.to_dict()}


def _holds(table: Any, kinds: Mapping[str, Any]) -> bool:
    """Whether something that was read is a table with values of some types under these keys, whatever else it has."""
    return isinstance(table, dict) and all(isinstance(table.get(key), kind) for key, kind in kinds.items())


def _damaged(path: Path) -> StoreError:
    return StoreError(f"{path} is damaged: it lacks what a run records. Restore it from a copy, or train anew.")


def update_info(paths: RunPaths, **values: Any) -> None:
    """Add values to ``run.json``."""
    write_json(paths.info, {**read_json(paths.info), **values})
