"""The training loop: epochs of triplets, validation, early stopping, checkpoints, and an exact way back in."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch_geometric.data import HeteroData
from tqdm import tqdm

from dream_pyg import ranks
from dream_pyg.config import INDIFFERENT, RunConfig, TrainingConfig
from dream_pyg.data.files import atomic_directory, check_writable, held, write_json, write_text
from dream_pyg.data.signals import interruptible, termination_as_interrupt
from dream_pyg.data.validation import differences
from dream_pyg.errors import ConfigError, Interrupted, ResumeError, TrainingError
from dream_pyg.evaluation import KS, evaluate, parse_metric
from dream_pyg.graph.processor import deterministic, resolve_device
from dream_pyg.graph.schema import INTERACTS
from dream_pyg.graph.store import StoredGraph, load_graph
from dream_pyg.models import Batch, Recommender, Scorer
from dream_pyg.nn.batch_shapes import fix_shapes
from dream_pyg.training.checkpoint import load_checkpoint, save_checkpoint
from dream_pyg.training.gradients import Gradients, RecordedGradients, can_record
from dream_pyg.training.model import load_weights, make_model, scorer_of, teacher_of, whole_weights
from dream_pyg.training.optimizers import make_optimizers
from dream_pyg.training.preparation import prepare
from dream_pyg.training.run import (
    Run,
    RunPaths,
    describe_run,
    evaluate_lines,
    keep_epoch,
    load_best,
    read_best,
    read_run_info,
    read_test_metrics,
    save_best,
    update_info,
)
from dream_pyg.training.steps import SampledSteps, WholeGraphSteps
from dream_pyg.training.teacher import Teaching, teach
from dream_pyg.training.triplets import TripletSampler
from dream_pyg.training.vote import Vote, VotedScores

logger = logging.getLogger("dream_pyg")

_PROGRESS = (
    "epoch",
    "step",
    "loss_sums",
    "epoch_seconds",
    "epoch_weights",
    "best_epoch",
    "best_metrics",
    "bad_evaluations",
    "lines",
)
VALID_METRICS = ("recall", "ndcg")
VALID_KS = (10, 20)
_RESUMABLE_CHANGES = (*INDIFFERENT, "training.epochs")
_OWN_TO_MACHINES = ("graph", "training.num_threads")
_MADE_BY = ("device", "processor", "num_threads", "num_processes", "versions")
"""What ``run.json`` says of where a run was trained."""
_STEPS_BETWEEN_CHECKS = 32
_ANEW = (
    "Train anew in another directory, with a lower learning rate or lower weights of the losses; what earlier epochs "
    "gave stays."
)
"""The cure of a training that diverged: neither can be changed in a run."""


class TrainResult(NamedTuple):
    """How a training ended."""

    run: Path
    best_epoch: int
    valid_metrics: dict[str, float]
    test_metrics: dict[str, float]
    epochs: int


OnEvaluation = Callable[[int, dict[str, float]], bool]
"""Told of each validation, its epoch and metrics; whether training shall stop there."""


def train(
    config: RunConfig,
    run: str | Path,
    *,
    resume: bool = False,
    test: bool = True,
    on_evaluation: OnEvaluation | None = None,
) -> TrainResult:
    """Train a model into a run directory, then evaluate its best epoch on the test split once.

    Everything random comes from ``config.training.seed`` and the epoch's number, so a run that was interrupted and
    resumed ends in the same bits as one that was not, on a CPU with the same number of threads; libraries for GPUs may
    round in another way each time.

    Started by ``torchrun``, several processes train together (:mod:`dream_pyg.ranks`): each takes its slice of every
    batch and ranks its share of the users, and the first writes the run, from which any number can go on.

    Args:
        config: The run's configuration.
        run: Directory for the run.
        resume: Whether to continue the run that is there.
        test: Whether the test split is read; resuming the finished run reads it later.
        on_evaluation: Called with epoch and metrics after each validation; if it returns true, training ends there.

    Returns:
        The best epoch's metrics.

    Raises:
        StoreError: If something is at ``run`` and ``resume`` is off, nothing can be written there, or another process
            trains it.
        ResumeError: If the run was made with another configuration or graph, or its checkpoint is damaged.
        TrainingError: If a loss, weights or scores are no longer finite; checkpoints are then those of before.
        DataError: If the graph has no validation split, or no test split though it is to be read.
        ConfigError: If processes differ in what they were told, or are more than there are GPUs or triplets of a batch,
            or if memory is too small.
        ProcessError: If another process is gone.
        Interrupted: On SIGINT or SIGTERM in the training, after the state was saved; elsewhere, as while a teacher is
            solved or test is ranked, both are a KeyboardInterrupt, and what was written before can be resumed.
    """
    # A run is opened from any directory, as long as its graph is where it was.
    config = config.model_copy(update={"graph": str(Path(config.graph).absolute())})
    with termination_as_interrupt(), ranks.joined():
        paths = RunPaths(Path(run))
        _check_agreement({**config.to_dict(), "resume": resume, "test": test})
        session, stored, info = ranks.together(lambda: _prepare(config, paths, resume, test, on_evaluation))
        _check_agreement({"graph fingerprint": info["graph_fingerprint"]})
        if not resume:
            session.create(config, info)
        with contextlib.ExitStack() as stack:
            ranks.first_does(lambda: stack.enter_context(held(paths.root, "the run")))
            if resume:
                session.load()
                ranks.first_does(lambda: _note_resumption(config, paths, info))
            try:
                _check_that_all_see(paths)
                session.log_modalities()
                with deterministic():
                    session.fit()
                return _finish(config, stored, session, test=test)
            except BaseException as error:
                if not ranks.rank():
                    interrupted = isinstance(error, Interrupted | KeyboardInterrupt)
                    update_info(paths, status="interrupted" if interrupted else "failed")
                raise


def _prepare(
    config: RunConfig, paths: RunPaths, resume: bool, test: bool, on_evaluation: OnEvaluation | None
) -> tuple[_Session, StoredGraph, dict[str, Any]]:
    """A session with its graph and model, and what ``run.json`` says of it."""
    if config.training.num_threads is not None:
        torch.set_num_threads(config.training.num_threads)
    if config.training.batch_size < ranks.num_ranks():
        raise ConfigError(
            f"training.batch_size is {config.training.batch_size}, which {ranks.num_ranks()} processes cannot share: "
            "it is that of all together. Enlarge it, or start fewer processes."
        )
    device = resolve_device(config.training.device)
    if resume and not Path(config.graph).exists():
        raise ResumeError(
            f"The graph of the run at {paths.root} is no longer at {config.graph}. Say where it is: "
            f"`dream-pyg train GRAPH --resume --run {paths.root}`."
        )
    stored = load_graph(config.graph)
    if resume:
        _check_resumable(config, paths, stored.fingerprint)
    else:
        paths.check_absent()
        check_writable(paths.root)  # before a teacher is solved
    prepared = prepare(config, stored.graph, device, test=test)
    return _Session(config, paths, *prepared, test, on_evaluation), stored, describe_run(config, stored, device)


def _check_agreement(told: Mapping[str, Any]) -> None:
    """Refuse processes that would not train the same on the same; paths and threads are each machine's own."""
    first, *others = ranks.everyone_says(told)
    for number, other in enumerate(others, start=1):
        if changed := differences(first, other, besides=_OWN_TO_MACHINES):
            raise ConfigError(
                f"Processes were told different things (here = rank 0, there = rank {number}): {'; '.join(changed)}. "
                "Start all of them by the same command, on the same graph."
            )


def _check_that_all_see(paths: RunPaths) -> None:
    """Refuse processes that have another run, or none, where the first one writes."""
    first, *others = ranks.everyone_says(read_run_info(paths).get("started") if paths.info.is_file() else None)
    for number, other in enumerate(others, start=1):
        if other != first:
            raise ConfigError(
                f"Rank {number} does not see the run that rank 0 writes. Remove what rank 0 began, and give all "
                "processes one directory, on a disk that all machines share."
            )


def _note_resumption(config: RunConfig, paths: RunPaths, info: dict[str, Any]) -> None:
    config.save(paths.config)  # It may train for more epochs than it was begun with, or elsewhere.
    begun = read_run_info(paths)
    kept = {key: begun[key] for key in (*_MADE_BY, "started") if key in begun}
    if other := {key: info[key] for key in kept if key in _MADE_BY and info[key] != kept[key]}:
        changes = "; ".join(f"{key} {value} here, {kept[key]} when it began" for key, value in other.items())
        logger.warning("Resuming elsewhere, where results may round in another way: %s", changes)
        kept["resumed"] = [*begun.get("resumed", []), {"started": info["started"], **other}]
    update_info(paths, **{**info, **kept}, status="running")


def _check_resumable(config: RunConfig, paths: RunPaths, fingerprint: str) -> None:
    paths.check_resumable()
    info = read_run_info(paths)
    if changed := config.differences(info["config"], besides=_RESUMABLE_CHANGES):
        raise ResumeError(
            f"The run at {paths.root} was made with another configuration (here = given now, there = the run's own): "
            f"{'; '.join(changed)}. Resume it with its own, or train anew in another directory."
        )
    expected = info["graph_fingerprint"]
    if fingerprint != expected:
        raise ResumeError(
            f"The run at {paths.root} was made with another graph: its fingerprint is {str(expected)[:12]}, the given "
            f"one's {fingerprint[:12]}. Resume with the run's own graph, or train anew in another directory."
        )


class _Session:
    """One training in progress; ``state`` and ``load`` are the whole of what can be resumed."""

    def __init__(
        self,
        config: RunConfig,
        paths: RunPaths,
        graph: HeteroData,
        model: Recommender,
        steps: WholeGraphSteps | SampledSteps,
        test: bool,
        on_evaluation: OnEvaluation | None = None,
    ) -> None:
        self.config = config.training
        self.paths = paths
        self.graph = graph
        self.device = graph[INTERACTS].edge_index.device
        self.model = model
        self.steps = steps
        self.test = test
        self.on_evaluation = on_evaluation
        self.stopped = False
        self.optimizers = make_optimizers(model, self.config)
        self.gradients = Gradients(model)
        if can_record(self.config, model, self.device):
            fix_shapes(graph)
            self.gradients = RecordedGradients(model, self.config.batch_size, self.device)
        in_batch = self.config.sampling is not None and self.config.sampling.in_batch_negatives
        self.sampler = TripletSampler(graph, batch_size=self.config.batch_size if in_batch else None)
        self.vote: Vote | None = None
        self.epoch = 0  # epochs completed
        self.step = 0  # steps completed of the current epoch
        self.loss_sums: dict[str, float] = {}
        self.epoch_seconds = 0.0  # that the steps of the current epoch took
        self.epoch_weights: dict[str, Tensor] = {}  # at the start of the current epoch, if the model resamples then
        self.best_epoch = 0
        self.best_metrics: dict[str, float] = {}
        self.bad_evaluations = 0
        self.lines: list[str] = []

    def state(self) -> dict[str, Any]:
        """The resumable state, which is that of all processes once the first has it."""
        weights = whole_weights(self.model)
        if not self.model.learns:  # What was solved is kept as the best epoch, and not a second time.
            weights = {name: value.new_empty(0) for name, value in weights.items()}
        return {
            "model": weights,
            "optimizers": [_turned(optimizer, ranks.whole_state) for optimizer in self.optimizers],
            "rng": {
                "cpu": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            },
            **{name: getattr(self, name) for name in _PROGRESS},
        }

    def create(self, config: RunConfig, info: dict[str, Any]) -> None:
        """Write the run's first files as a whole or not at all, so that whatever is there can be resumed."""
        teaching = None
        if (teacher := teacher_of(self.config, self.model)) is not None:
            with deterministic():
                teaching = teach(self.graph, teacher)
            self._learn_from(teaching)
        state = self.state()

        def write() -> None:
            with atomic_directory(self.paths.root) as directory:
                first = RunPaths(directory)
                config.save(first.config)
                write_json(first.info, {**info, "status": "running"})
                if self._is_kept():
                    keep_epoch(first, state["model"], self.epoch)
                save_checkpoint(first.last, state)
                if teaching is not None:
                    teaching.save(first.taught)

        ranks.first_does(write)

    def _learn_from(self, teaching: Teaching) -> None:
        self.sampler.taught, self.vote = teaching

    def save(self) -> None:
        """Write the resumable checkpoint."""
        state = self.state()
        ranks.first_does(lambda: save_checkpoint(self.paths.last, state))

    def load(self) -> None:
        """Continue from the resumable checkpoint, whatever the number of processes that wrote it."""
        state = ranks.together(lambda: load_checkpoint(self.paths.last))
        try:
            load_weights(self.model, state["model"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(_turned(optimizer, ranks.own_state, saved))
        except (RuntimeError, ValueError) as error:
            raise ResumeError(f"{self.paths.last} does not fit the model: {error}") from error
        torch.set_rng_state(state["rng"]["cpu"])
        if self.device.type == "cuda" and state["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)
        for name in _PROGRESS:
            setattr(self, name, state.get(name, getattr(self, name)))  # an older version's has no seconds
        # A run that was killed after a best epoch may have it without the checkpoint that knows of it.
        best = ranks.together(lambda: read_best(self.paths)[0] if self.paths.best.is_file() else 0)
        if (epochs := max(self.epoch, best)) > self.config.epochs:
            raise ResumeError(
                f"The run at {self.paths.root} has {epochs} epochs already, more than training.epochs = "
                f"{self.config.epochs}. Ask for at least as many, or train anew in another directory."
            )
        if (teacher := teacher_of(self.config, self.model)) is not None:
            self._learn_from(ranks.together(lambda: Teaching.load(self.paths.taught, teacher, self.graph)))
        ranks.first_does(self._forget_later_epochs)
        logger.info("Resuming %s after epoch %d, step %d", self.paths.root, self.epoch, self.step)

    def _forget_later_epochs(self) -> None:
        """Remove what belongs to epochs after the checkpoint, which will be made again."""
        write_text(self.paths.metrics, "".join(self.lines))
        for epoch in self.paths.kept_epochs():
            if epoch > self.epoch:
                self.paths.epoch(epoch).unlink()

    def let_go(self) -> None:
        """Give back the memory of the model and of its optimizers, for good."""
        del self.model, self.optimizers, self.gradients, self.steps

    def fit(self) -> None:
        """Train until the last epoch or until validation no longer improves, or solve what has a closed form."""
        if not self.model.learns:
            if not self.lines:  # else it was solved before
                started = time.perf_counter()
                self.model.fit(self.graph)
                self._validate(time.perf_counter() - started, {})
                self.save()
            return
        with interruptible() as interrupted:
            while not self._is_last():
                self._train_epoch(interrupted)
            if ranks.any_says(interrupted.is_set()):  # while the last epoch was validated
                raise self._interruption(f"after epoch {self.epoch}")

    def log_modalities(self) -> None:
        """Say what each modality weighs in a model that weighs them; by default that depends on the graph."""
        if weights := getattr(self.model, "modality_weights", None):
            logger.info("modalities: %s", ", ".join(f"{name} {weight:.3g}" for name, weight in weights.items()))

    def _is_last(self) -> bool:
        return self.stopped or self.epoch >= self.config.epochs or self.bad_evaluations >= self.config.patience

    def _train_epoch(self, interrupted: threading.Event) -> None:
        started = time.perf_counter() - self.epoch_seconds
        generator = _epoch_generator(self.config.seed, self.epoch)
        steps = self.config.epoch_steps
        triplets = self.sampler.epoch(generator, steps and steps * self.config.batch_size)
        self._start_epoch(generator)
        self._set_learning_rate()
        self.model.train()
        # Every process draws the same epoch and takes its slice of each batch.
        parts = (part.split(self.config.batch_size) for part in triplets)
        batches = [Batch(*columns) for columns in zip(*parts, strict=True)]
        monitor = _LossMonitor(self.epoch, self.step, self.loss_sums)
        with _step_bar(f"epoch {self.epoch + 1}", len(batches), self.step) as bar:
            for graph, batch in self.steps(batches, self.epoch, self.step):
                self._train_step(graph, batch, monitor)
                self.step += 1
                bar.update()
                if ranks.any_says(interrupted.is_set()):
                    ranks.together(self._check_weights)
                    self.loss_sums, self.epoch_seconds = monitor.sums(), time.perf_counter() - started
                    self.save()
                    raise self._interruption(f"in epoch {self.epoch + 1}")
        losses = {name: value / len(batches) for name, value in monitor.sums().items()}
        ranks.together(self._check_weights)
        seconds = time.perf_counter() - started
        self.epoch, self.step, self.loss_sums, self.epoch_weights = self.epoch + 1, 0, {}, {}
        self.epoch_seconds = 0.0
        self._validate(seconds, losses, len(triplets.user))
        if self._is_kept():
            weights = whole_weights(self.model)
            ranks.first_does(lambda: keep_epoch(self.paths, weights, self.epoch))
        if self._is_last() or self.epoch % self.config.checkpoint_every == 0:
            self.save()

    def _interruption(self, when: str) -> Interrupted:
        return Interrupted(
            f"Interrupted {when}; the state is saved in {self.paths.last}. "
            f"Continue with `dream-pyg train --resume{'' if self.test else ' --no-test'} --run {self.paths.root}`."
        )

    def _is_kept(self) -> bool:
        """Whether the configuration asks for this epoch's weights to stay."""
        return self.config.keep_every > 0 and self.epoch % self.config.keep_every == 0

    def _start_epoch(self, generator: torch.Generator) -> None:
        """Let the model resample what the epoch keeps fixed, from the weights that the epoch begins with."""
        if type(self.model).on_epoch_start is Recommender.on_epoch_start:
            return
        self.gradients.forget()
        now = _copy(self.model.state_dict())
        if not self.step:
            self.epoch_weights = now
            self.model.on_epoch_start(self.graph, generator)
            return
        # The epoch was interrupted, and its weights have moved since it began.
        self.model.load_state_dict(self.epoch_weights)
        self.model.on_epoch_start(self.graph, generator)
        self.model.load_state_dict(now)

    def _train_step(self, graph: HeteroData, batch: Batch, monitor: _LossMonitor) -> None:
        terms = self.gradients(graph, batch)
        for optimizer in self.optimizers:
            optimizer.step()
        monitor.add(terms)

    def _check_weights(self) -> None:
        """Refuse weights that are not finite, which no loss was computed with yet, before good ones are overwritten."""
        broken = [name for name, value in self.model.named_parameters() if not _all_finite(value.detach())]
        if broken:
            raise TrainingError(
                f"Weights of {', '.join(broken)} are no longer finite in epoch {self.epoch + 1}, after step "
                f"{self.step}. {_ANEW}"
            )

    def _check_scores(self, scorer: Scorer) -> None:
        """Refuse finite weights whose scores may be too large for their type, before they are ranked."""
        users = torch.arange(scorer.num_users, device=self.device)
        if not _all_finite(scorer.rounding(users)):
            cure = _ANEW if self.model.learns else "Train anew in another directory, with a higher l2_weight."
            raise TrainingError(f"Scores after epoch {self.epoch} are too large, or no numbers at all. {cure}")

    def _set_learning_rate(self) -> None:
        rate = self.config.learning_rate * self.config.learning_rate_decay ** (self.epoch / 50)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate

    @torch.no_grad()
    def _validate(self, train_seconds: float, losses: dict[str, float], num_triplets: int = 0) -> None:
        record: dict[str, Any] = {"epoch": self.epoch, "loss": losses, "train_seconds": round(train_seconds, 3)}
        if num_triplets:
            record["triplets_per_second"] = round(num_triplets / train_seconds)
        if self.epoch % self.config.evaluate_every == 0 or self.epoch == self.config.epochs:
            started = time.perf_counter()
            metrics = ranks.first_says(self._validation_metrics())
            record["valid"] = metrics
            record["evaluate_seconds"] = round(time.perf_counter() - started, 3)
            best = self.best_metrics.get(self.config.metric, -1.0)
            if metrics[self.config.metric] > best:
                self.best_epoch, self.best_metrics, self.bad_evaluations = self.epoch, metrics, 0
                weights = whole_weights(self.model)
                ranks.first_does(lambda: save_best(self.paths, weights, self.epoch, metrics))
            else:
                self.bad_evaluations += 1
            logger.info("%s", _line(record, self.config.metric, improved=self.bad_evaluations == 0))
        self.lines.append(json.dumps(record) + "\n")
        ranks.first_does(lambda: write_text(self.paths.metrics, "".join(self.lines)))
        if "valid" in record and self.on_evaluation is not None:
            self.stopped = ranks.first_says(self.on_evaluation(self.epoch, record["valid"]))

    def _validation_metrics(self) -> dict[str, float]:
        scorer = scorer_of(self.model, self.graph, self.vote)
        ranks.together(lambda: self._check_scores(scorer))
        return _metrics_of(scorer, self.graph, self.config)


def _metrics_of(scorer: Scorer, graph: HeteroData, config: TrainingConfig) -> dict[str, float]:
    name, k = parse_metric(config.metric)
    names = dict.fromkeys((*VALID_METRICS, name))
    ks = sorted({*VALID_KS, k})
    return evaluate(scorer, graph, "valid", ks=ks, metrics=list(names), num_users=config.eval_users)


def _finish(config: RunConfig, stored: StoredGraph, session: _Session, *, test: bool) -> TrainResult:
    paths = session.paths
    # A run that was killed after a better epoch, and resumed to other roundings, may not find that one again.
    session.best_epoch, session.best_metrics = ranks.together(lambda: read_best(paths))
    valid, metrics = session.best_metrics, {}
    ended: dict[str, Any] = {"status": "finished", "epochs": session.epoch, "best_epoch": session.best_epoch}
    tested = ranks.first_says(read_test_metrics(paths, session.best_epoch) is not None)
    teacher = teacher_of(config.training, session.model)
    to_choose = session.vote is not None and teacher is not None and bool(teacher.votes)
    if to_choose or (test and not tested):
        session.let_go()  # of the trained model, so that there is room for the one with the best weights

        def open_best() -> Run:
            model = make_model(config, session.graph, session.device)
            load_best(paths, model)
            return Run(paths, config, stored, session.graph, model, session.vote)

        run = ranks.together(open_best)
        if to_choose:
            run, valid = _with_best_vote(run, valid)
            assert run.vote is not None
            ended["vote"] = run.vote.share
        if test and not tested:
            ks = sorted({*KS, parse_metric(config.training.metric)[1]})
            lines = evaluate_lines(run, "test", ks=ks, num_users=session.config.eval_users)
            ranks.first_does(lambda: write_json(paths.test_metrics, {"epoch": session.best_epoch, "lines": lines}))
    if test:
        of_lines = read_test_metrics(paths, session.best_epoch)
        assert of_lines is not None  # they were there, or have just been written
        metrics = of_lines["general"]
    elif not tested:
        ranks.first_does(lambda: paths.test_metrics.unlink(missing_ok=True))  # of another epoch
    ranks.first_does(lambda: update_info(paths, **ended, valid=valid))
    return TrainResult(paths.root, session.best_epoch, valid, metrics, session.epoch)


def _with_best_vote(run: Run, valid: dict[str, float]) -> tuple[Run, dict[str, float]]:
    """The run with the vote that is best on validation, and the metrics with it; so far they are ``valid``."""
    config, scorer, best = run.config.training, run.scorer(), run.vote
    if best is None or config.teacher is None or not isinstance(scorer, VotedScores):
        return run, valid
    for share in config.teacher.votes:
        vote = best._replace(share=share)
        metrics = ranks.first_says(_metrics_of(vote.beside(scorer.embeddings), run.graph, config))
        if metrics[config.metric] > valid[config.metric]:
            best, valid = vote, metrics
    logger.info("Vote %g: validation %s %.4f", best.share, config.metric, valid[config.metric])
    return dataclasses.replace(run, vote=best), valid


def _turned(
    optimizer: torch.optim.Optimizer, turn: Callable[..., list[dict[str, Any]]], state: Any = None
) -> dict[str, Any]:
    """An optimizer's state, or the given one, with what belongs to each parameter turned whole or into shards."""
    state = optimizer.state_dict() if state is None else state
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = list(state["state"])
    turned = turn([parameters[number] for number in numbers], list(state["state"].values()))
    return {**state, "state": dict(zip(numbers, turned, strict=True))}


class _LossMonitor:
    """Sums loss terms on their device, and names the term and step where one stops being finite."""

    def __init__(self, epoch: int, step: int, sums: dict[str, float]) -> None:
        self._epoch = epoch
        self._step = step
        self._sums = dict(sums)
        self._names: list[str] = []
        self._pending: list[Tensor] = []

    def add(self, terms: dict[str, Tensor]) -> None:
        """Count one step. Values are read in groups, since each reading makes a GPU wait."""
        self._names = list(terms)
        self._pending.append(torch.stack([term.detach() for term in terms.values()]))
        if len(self._pending) == _STEPS_BETWEEN_CHECKS or not self._pending[0].is_cuda:
            self._read()

    def sums(self) -> dict[str, float]:
        """The sum of each term over the epoch so far."""
        self._read()
        return self._sums

    def _read(self) -> None:
        if not self._pending:
            return
        for values in ranks.average(torch.stack(self._pending)).tolist():
            self._step += 1
            for name, value in zip(self._names, values, strict=True):
                if not -float("inf") < value < float("inf"):
                    raise TrainingError(
                        f"The loss term {name!r} became {value} in epoch {self._epoch + 1}, step {self._step}. {_ANEW}"
                    )
                self._sums[name] = self._sums.get(name, 0.0) + value
        self._pending = []


def _all_finite(values: Tensor) -> bool:
    # By the least and the largest, which takes a thirtieth of the time of a look at each, and no memory.
    return values.numel() == 0 or bool(torch.stack(values.aminmax()).isfinite().all())


def _copy(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in weights.items()}


def _epoch_generator(seed: int, epoch: int) -> torch.Generator:
    # A pure function of seed and epoch: an interrupted epoch is drawn again exactly, without storing its triplets.
    # PyTorch's generator on the CPU keeps 32 bits of a seed: an odd factor spreads those of runs over all of them.
    return torch.Generator().manual_seed((seed * 2_654_435_761 + epoch) % 2**32)


def _step_bar(description: str, total: int, initial: int) -> Any:
    hidden = ranks.rank() > 0 or not sys.stderr.isatty()
    return tqdm(desc=description, total=total, initial=initial, leave=False, disable=hidden, unit="step")


def _line(record: dict[str, Any], metric: str, *, improved: bool) -> str:
    losses = " ".join(f"{name} {value:.4f}" for name, value in record["loss"].items())
    return (
        f"epoch {record['epoch']:3d}  {record['train_seconds']:.1f} + {record['evaluate_seconds']:.1f} s  "
        f"{metric} {record['valid'][metric]:.4f}{' *' if improved else '  '}  {losses}"
    )
