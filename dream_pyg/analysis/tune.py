"""Hyper-parameter studies with Optuna: chosen on validation, stopped early, resumable, the test split read once.

Layout of a study::

    study.json     what is searched on what; the best trial so far, and its test metrics once all trials are done
    study.db       Optuna's storage (SQLite)
    trials.csv     one row a trial
    trials/003/    the run of trial 3; only the best one keeps its checkpoints
    best.toml      the best trial as a preset
"""

from __future__ import annotations

import json
import logging
import shutil
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import polars as pl
import tomli_w

from dream_pyg.analysis.continuable import continuable
from dream_pyg.analysis.search_spaces import configure, default_point, describe_space, search_space
from dream_pyg.config import INDIFFERENT, SEED, RunConfig, override_key
from dream_pyg.data.files import atomic_directory, is_free, read_json, write_json, write_text
from dream_pyg.data.validation import flatten, without
from dream_pyg.errors import ConfigError, MissingExtraError, ResumeError, StoreError, TrainingError
from dream_pyg.graph.schema import ITEM, feature_modalities, knn_modalities
from dream_pyg.graph.store import StoredGraph, load_graph
from dream_pyg.models.space import Choice, LogRange, Space
from dream_pyg.presets import find_preset, load_presets
from dream_pyg.training.preparation import check_splits
from dream_pyg.training.run import RunPaths, read_epochs, seconds_of
from dream_pyg.training.trainer import TrainResult, train

if TYPE_CHECKING:
    import optuna

logger = logging.getLogger("dream_pyg")

FORMAT_VERSION = 1
STUDY, STORAGE, TABLE, TRIALS, BEST = "study.json", "study.db", "trials.csv", "trials", "best.toml"
_RANDOM_TRIALS = 8
"""Trials before the sampler begins to learn from them."""
_UNLIMITED = 10_000
_COMPARED_TRIALS = 4
"""Trials that are never pruned, since a median needs some."""
_NOT_IN_PRESET = ("epochs", "patience", "metric", "evaluate_every", "eval_users", "seed")


class Trial(NamedTuple):
    """A trial that has ended."""

    number: int
    state: str
    """``complete``, or ``pruned`` where validation fell behind or the loss became infinite."""
    value: float | None
    """The validation metric of the finished run, with the vote that validation chose; of a pruned trial its best."""
    best_epoch: int
    epochs: int
    seconds: float
    values: dict[str, Any]
    """What was searched, as in a configuration."""


class StudyResult(NamedTuple):
    """A study so far."""

    path: Path
    metric: str
    trials: list[Trial]
    best: Trial
    test_metrics: dict[str, float]
    """Of the best trial; empty until the study has all its trials."""


def tune(
    model: str,
    graph: str | Path,
    out: str | Path,
    *,
    num_trials: int = 20,
    seed: int = 0,
    overrides: Iterable[str] = (),
    preset: str | Path | None = None,
    timeout: float | None = None,
    pruning_warmup: int = 10,
) -> StudyResult:
    """Search a model's hyper-parameters on a graph, or continue the study that is at ``out``.

    The first trial is the default configuration, or the preset's. Each further one is a function of ``seed`` and of the
    trials before it, so a study that was killed and continued makes the same trials as one that was not. A trial whose
    validation falls behind the median of the others at the same epoch is pruned.

    Args:
        model: The model.
        graph: The graph store.
        out: Directory of the study.
        num_trials: Trials in all, those of earlier calls included.
        seed: Seed of the search and of every training.
        overrides: ``section.key=value`` for all trials; such a key is not searched.
        preset: A preset where the search begins, and whose other values all trials have.
        timeout: Seconds after which no further trial begins; one there is in any case.
        pruning_warmup: Epochs that a trial has before it may be pruned.

    Returns:
        The trials and the best one, with test metrics if there are ``num_trials``.

    Raises:
        MissingExtraError: If Optuna is not installed.
        ConfigError: If the model has nothing to tune, or a value makes no sense.
        ResumeError: If the study at ``out`` is another one, of which a trial has ended.
        StoreError: If ``out`` is something else, damaged, or in use.
        Interrupted: On SIGINT or SIGTERM; the same call continues.
    """
    optuna = _import_optuna()
    if timeout is not None and not timeout >= 0:
        raise ConfigError(f"The time for trials is {timeout} seconds; expected 0 or more.")
    overrides = list(overrides)
    fixed = [override_key(override) for override in overrides]
    if SEED in fixed:
        raise ConfigError(f"A study has one seed, for its search and all trainings: give seed (--seed), not {SEED}.")
    base = RunConfig.create(graph=graph, model=model, preset=preset, overrides=[*overrides, f"{SEED}={seed}"])
    begun_at = {} if preset is None else find_preset(preset, model).values
    stored = load_graph(graph)
    check_splits(stored.graph, test=num_trials != _UNLIMITED)
    modalities = _fusible_modalities(stored)
    space = search_space(model, modalities, fixed=fixed)
    default_point(space, base, modalities)  # refused before anything is written
    out = Path(out)
    if special := sorted(set(str(out)) & set("?%#")):
        raise ConfigError(
            f"A study cannot be kept in {out}, since its database is opened by an address in which {special[0]!r} "
            "means something else. Choose a directory without that."
        )
    description = {
        "format_version": FORMAT_VERSION,
        "model": model,
        "dataset": stored.name,
        "graph_fingerprint": stored.fingerprint,
        "seed": seed,
        "pruning_warmup": pruning_warmup,
        "space": describe_space(space),
        "config": without(base.to_dict(), INDIFFERENT),
    }
    _make(out, description)
    with continuable(out, "the study"), _explained_storage(optuna, out):
        _check_same(out, description)
        search = _Search(optuna, out, base, space, modalities, pruning_warmup)
        begun = time.monotonic()
        while (ended := len(search.trials())) < num_trials:
            if ended and timeout is not None and time.monotonic() - begun >= timeout:
                break
            try:
                search.run_trial()
            except ConfigError:
                if not ended and not any((out / TRIALS).glob("*")):  # Nothing is in the way of another try.
                    shutil.rmtree(out.resolve())
                raise
            _write(search, description, begun_at, fixed, {})
        trials = search.trials()
        best = _best(trials)
        test_metrics: dict[str, float] = {}
        if len(trials) >= num_trials:
            config = search.configured(best)
            read = [one.number for one in trials if RunPaths(search.directory(one.number)).test_metrics.is_file()]
            if others := [number for number in read if number != best.number]:
                logger.warning(
                    "The test split was read before, for the best of fewer trials (%s). Its figures are to be reported "
                    "for one study of a length that was settled beforehand.",
                    ", ".join(map(str, others)),
                )
            run = search.directory(best.number)
            test_metrics = train(config, run, resume=_goes_on(run, config)).test_metrics
        _write(search, description, begun_at, fixed, test_metrics)
    return StudyResult(out, base.training.metric, trials, best, test_metrics)


def search_run(
    model: str,
    graph: str | Path,
    study: str | Path,
    run: str | Path,
    *,
    timeout: float,
    seed: int = 0,
    overrides: Iterable[str] = (),
) -> tuple[RunConfig, bool]:
    """Search a configuration for a graph by a short study: what ``--preset auto`` stands for.

    The study begins at the preset ``best`` if that knows the model, else at the defaults, and may be continued. The
    training of its best trial is not made again: its run is copied to ``run``, where resuming it reads the test split.

    Args:
        model: The model.
        graph: The graph store.
        study: Directory of the study.
        run: Directory of the run, where nothing is yet.
        timeout: Seconds after which no further trial begins.
        seed: Seed of the study and of every training.
        overrides: ``section.key=value`` that hold in the study and after it.

    Returns:
        What was found, and whether ``run`` has the training with it.

    Raises:
        MissingExtraError: If Optuna is not installed.
        ConfigError: If the model has nothing to tune.
        ResumeError: If the study is another one.
    """
    overrides = list(overrides)
    preset = "best" if model in load_presets("best") else None
    result = tune(
        model, graph, study, num_trials=_UNLIMITED, seed=seed, overrides=overrides, preset=preset, timeout=timeout
    )
    overrides.append(f"{SEED}={seed}")
    config = RunConfig.create(graph=graph, model=model, preset=Path(study) / BEST, overrides=overrides)
    trial = result.path / TRIALS / f"{result.best.number:03d}"
    if not _can_go_on(trial, config, besides=["graph"]):
        return config, False
    with atomic_directory(run) as directory:
        shutil.copytree(trial, directory, dirs_exist_ok=True)
    return config, True


class _Search:
    """Optuna's study, and the runs of its trials."""

    def __init__(
        self, optuna: Any, out: Path, base: RunConfig, space: Space, modalities: list[str], pruning_warmup: int
    ) -> None:
        self.out = out
        self.base = base
        self.space = space
        self.modalities = modalities
        self._optuna = optuna
        self._distributions = {key: _distribution(optuna, dimension) for key, dimension in space.items()}
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        try:
            self._study: optuna.Study = optuna.create_study(
                study_name="study",
                direction="maximize",
                storage=f"sqlite:///{out / STORAGE}",
                load_if_exists=True,
                pruner=optuna.pruners.MedianPruner(n_startup_trials=_COMPARED_TRIALS, n_warmup_steps=pruning_warmup),
            )
            for trial in self._study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.RUNNING]):
                self._study.tell(trial.number, state=optuna.trial.TrialState.FAIL)  # It was killed, and begins again.
        except Exception as error:  # A damaged database fails in as many ways as it has pages.
            raise _storage_error(out, error) from error

    def trials(self) -> list[Trial]:
        """Those that have ended, in order."""
        states = self._optuna.trial.TrialState
        ended = self._study.get_trials(deepcopy=False, states=[states.COMPLETE, states.PRUNED])
        return [
            Trial(
                number, trial.state.name.lower(), values=self._searched(self._configure(trial.params)), **_told(trial)
            )
            for number, trial in enumerate(ended)
        ]

    def directory(self, number: int) -> Path:
        """The run of a trial."""
        return self.out / TRIALS / f"{number:03d}"

    def configured(self, trial: Trial) -> RunConfig:
        """The whole configuration of a trial."""
        values = self.base.to_dict()
        for key, value in trial.values.items():
            section, name = key.split(".")
            values[section] = {**values[section], name: value}
        return RunConfig.from_dict(values, f"trial {trial.number}")

    def run_trial(self) -> None:
        """Run the next trial, or what is left of it."""
        optuna, ended = self._optuna, self.trials()
        number = len(ended)
        # The sampler is made anew for each trial, so that what it draws does not depend on when the process began.
        self._study.sampler = optuna.samplers.TPESampler(
            n_startup_trials=_RANDOM_TRIALS, seed=(self.base.training.seed + 7919 * number) % 2**32
        )
        if number == 0:
            self._study.enqueue_trial(default_point(self.space, self.base, self.modalities))
        trial = self._study.ask(self._distributions)
        config = self._configure(trial.params)
        values = self._searched(config)
        same = next((other for other in ended if other.values == values), None)
        if same is not None:  # Choices and rounding let a point come twice; its training would be the same.
            self._tell(trial, same.state, same.value, same.best_epoch, same.epochs, 0.0)
        else:
            self._train(trial, config, number)
        best = _best(trials := self.trials())
        for other in trials:
            if other.number != best.number:
                shutil.rmtree(self.directory(other.number) / "checkpoints", ignore_errors=True)
        _log(trials[-1], best, self.base.training.metric)

    def _train(self, trial: optuna.Trial, config: RunConfig, number: int) -> None:
        run = self.directory(number)
        paths = RunPaths(run)
        metric = config.training.metric
        begun = _goes_on(run, config)
        told: dict[int, float] = {}

        def observe(epoch: int, metrics: Mapping[str, float]) -> bool:
            if epoch not in told:
                told[epoch] = metrics[metric]
                trial.report(metrics[metric], epoch)
            return trial.should_prune()

        before = read_epochs(paths) if begun else []
        pruned = any(observe(line["epoch"], line["valid"]) for line in before if "valid" in line)
        finished: TrainResult | None = None
        try:
            if not pruned:
                result = train(config, run, resume=begun, test=False, on_evaluation=observe)
                finished = None if trial.should_prune() else result
        except TrainingError as error:
            if number == 0:  # The defaults must train, or nothing can be learned from the others.
                raise
            logger.info("trial %d: %s", number, error)
        epochs = read_epochs(paths)
        length = len(epochs), seconds_of(epochs)
        if finished is not None:
            self._tell(trial, "complete", finished.valid_metrics[metric], finished.best_epoch, *length)
        else:
            best_epoch = max(told, key=lambda epoch: told[epoch], default=0)
            self._tell(trial, "pruned", told.get(best_epoch), best_epoch, *length)

    def _tell(
        self, trial: optuna.Trial, state: str, value: float | None, best_epoch: int, epochs: int, seconds: float
    ) -> None:
        told = {"value": value, "best_epoch": best_epoch, "epochs": epochs, "seconds": seconds}
        for name, attribute in told.items():
            trial.set_user_attr(name, attribute)
        complete = state == "complete"
        states = self._optuna.trial.TrialState
        self._study.tell(trial, value if complete else None, state=states.COMPLETE if complete else states.PRUNED)

    def _configure(self, point: Mapping[str, Any]) -> RunConfig:
        return configure(self.base, self.space, point, self.modalities)

    def _searched(self, config: RunConfig) -> dict[str, Any]:
        values = config.to_dict()
        return {key: values[key.split(".")[0]][key.split(".")[1]] for key in self.space}


def _import_optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise MissingExtraError(
            'Tuning needs Optuna, which is not installed. Install it with `pip install "dream-pyg[tune]"`.'
        ) from error
    return optuna


@contextmanager
def _explained_storage(optuna: Any, out: Path) -> Iterator[None]:
    try:
        yield
    except optuna.exceptions.StorageInternalError as error:
        raise _storage_error(out, error) from error


def _storage_error(out: Path, error: BaseException) -> StoreError:
    """What is wrong with the storage, as its database says: it can be locked or unwritable and not damaged at all."""
    causes = [error]
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)
    said = next((cause for cause in causes if isinstance(cause, sqlite3.OperationalError)), None)
    if said is not None:
        return StoreError(
            f"{out / STORAGE} cannot be used: {said}. Remove what is in the way, and give the same command."
        )
    return StoreError(
        f"{out / STORAGE} is damaged ({error}). Restore it from a copy, or begin a study in another directory."
    )


def _distribution(optuna: Any, dimension: Any) -> Any:
    if isinstance(dimension, Choice):
        return optuna.distributions.CategoricalDistribution(dimension.values)
    return optuna.distributions.FloatDistribution(dimension.low, dimension.high, log=isinstance(dimension, LogRange))


def _fusible_modalities(stored: StoredGraph) -> list[str]:
    """The modalities that have both features and an item-item graph, as what is fused by weights needs."""
    have_graph = knn_modalities(stored.graph, ITEM)
    return [modality for modality in feature_modalities(stored.graph) if modality in have_graph]


def _make(out: Path, description: dict[str, Any]) -> None:
    """Make the study's directory, or check that what is there is a study."""
    if (out / STUDY).is_file():
        return
    if not is_free(out):
        raise StoreError(f"{out} exists and is not a study: it has no {STUDY}. Choose another directory with --out.")
    write_json(out / STUDY, description)


def _check_same(out: Path, description: dict[str, Any]) -> None:
    """Refuse to continue another study, or begin anew where no trial of it has ended."""
    there = read_json(out / STUDY)
    mine, theirs = flatten(description), flatten(without(there, [f"config.{key}" for key in INDIFFERENT]))
    changed = [key for key in mine if mine[key] != theirs.get(key)]
    changed += [key for key in theirs if key.startswith(("space.", "config.")) and key not in mine]
    if not changed:
        return
    changes = "; ".join(f"{key} is {mine.get(key)} here, {theirs.get(key)} there" for key in changed)
    begun = (read_json(run) for run in (out / TRIALS).glob("*/run.json"))
    if "num_trials" in there or any(run.get("status") == "finished" for run in begun):
        raise ResumeError(
            f"The study at {out} is another one: {changes}. "
            "Continue it as it was begun, or begin a study in another directory with --out."
        )
    logger.warning("No trial of the study at %s had ended, so it begins anew: %s", out, changes)
    (out / STORAGE).unlink(missing_ok=True)
    shutil.rmtree(out / TRIALS, ignore_errors=True)
    write_json(out / STUDY, description)


def _can_go_on(run: Path, config: RunConfig, besides: Sequence[str] = INDIFFERENT) -> bool:
    """Whether a run of this configuration is there and whole."""
    paths = RunPaths(run)
    if is_free(run) or paths.lost(to_resume=True):
        return False
    return not config.differences(RunConfig.load(paths.config), besides=besides)


def _goes_on(run: Path, config: RunConfig) -> bool:
    """Whether a trial's run can be resumed; what cannot is removed."""
    if _can_go_on(run, config):
        return True
    if run.exists():
        shutil.rmtree(run)  # left by a trial that was killed and that is drawn differently by now, or no longer whole
    return False


def _told(trial: Any) -> dict[str, Any]:
    return {name: trial.user_attrs[name] for name in ("value", "best_epoch", "epochs", "seconds")}


def _best(trials: list[Trial]) -> Trial:
    return max((trial for trial in trials if trial.state == "complete"), key=lambda trial: trial.value or 0.0)


def _log(trial: Trial, best: Trial, metric: str) -> None:
    value = "no value" if trial.value is None else f"{metric} {trial.value:.4f}"
    logger.info(
        "trial %d %s: %s after %d epochs, %.0f s; best %.4f of trial %d",
        trial.number, trial.state, value, trial.epochs, trial.seconds, best.value, best.number,
    )  # fmt: skip


def _write(
    search: _Search,
    description: dict[str, Any],
    begun_at: Mapping[str, dict[str, Any]],
    fixed: list[str],
    test_metrics: dict[str, float],
) -> None:
    """Write the table of trials, the best one as a preset, and what is known of the study."""
    trials = search.trials()
    best = _best(trials)
    told = [name for name in Trial._fields if name != "values"]
    lines = [
        {
            **{name: getattr(trial, name) for name in told},
            **{key: json.dumps(trial.values[key]) for key in search.space},
        }
        for trial in trials
    ]
    write_text(search.out / TABLE, pl.DataFrame(lines, infer_schema_length=None).write_csv())
    metric = search.base.training.metric
    write_text(search.out / BEST, _as_preset(description, begun_at, fixed, best, len(trials), metric))
    outcome = {"num_trials": len(trials), "best": best._asdict(), "test_metrics": test_metrics}
    write_json(search.out / STUDY, {**description, **outcome})


def _as_preset(
    description: dict[str, Any],
    begun_at: Mapping[str, dict[str, Any]],
    fixed: list[str],
    best: Trial,
    num_trials: int,
    metric: str,
) -> str:
    seed = description["seed"]
    source = (
        f"study on {description['dataset']} (graph {description['graph_fingerprint'][:12]}): trial {best.number} of "
        f"{num_trials}, seed {seed}, validation {metric} {best.value:.4f}"
    )
    elsewhere = [f"{key}={description['config'][key]}" for key in fixed if key in description["config"]]
    if elsewhere:  # A preset holds values of the model and of the training.
        source += f", with {', '.join(elsewhere)}, which is to be given again"
    values = dict(best.values)
    begun = {section: dict(below) for section, below in begun_at.items()}
    for section, name, *_ in (key.split(".") for key in fixed if "." in key):
        if name not in description["config"][section]:  # It was set to none.
            begun.get(section, {}).pop(name, None)
        elif name not in _NOT_IN_PRESET:
            values.setdefault(f"{section}.{name}", description["config"][section][name])
    table: dict[str, Any] = {"source": source}
    for section in ("training", "model"):
        own = {key.split(".")[1]: value for key, value in values.items() if key.startswith(f"{section}.")}
        if own := {**begun.get(section, {}), **own}:
            table[section] = own
    return tomli_w.dumps({description["model"]: table})
