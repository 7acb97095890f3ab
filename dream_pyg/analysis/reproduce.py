"""The paper's tables from runs of one's own, beside the printed values.

Layout of a directory of tables::

    reproduction.json               the data set and its graph's fingerprint
    runs/dream-1f2e3d4c5b/seed-0/   a run for each system and seed, named by all that determines it
    table2.md, table2.json, table2.csv

A run that is there is not trained again, whichever table asks for it, and one that was interrupted is resumed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
from collections.abc import Container, Generator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dream_pyg.analysis.continuable import continuable
from dream_pyg.analysis.groups import measure_users
from dream_pyg.analysis.plots import require_plots
from dream_pyg.analysis.processes import train_in_processes
from dream_pyg.analysis.published import published_by, published_note, published_rows, table_metrics
from dream_pyg.analysis.significance import paired_p_value
from dream_pyg.analysis.systems import MODELS_OF_TABLE, TABLES, System, systems_of_table
from dream_pyg.analysis.table import Cell, Row, Table
from dream_pyg.config import INDIFFERENT, SEED, RunConfig, override_key
from dream_pyg.data.files import is_free, load_tensors, read_json, save_tensors, write_json
from dream_pyg.data.validation import without
from dream_pyg.errors import ConfigError, StoreError
from dream_pyg.graph.processor import processor_name, resolve_device
from dream_pyg.graph.schema import SPLITS
from dream_pyg.graph.store import load_graph, read_info
from dream_pyg.models import find_model
from dream_pyg.training.preparation import prepare
from dream_pyg.training.run import (
    RunPaths,
    load_run,
    read_best,
    read_epochs,
    read_run_info,
    read_test_metrics,
    seconds_of,
)
from dream_pyg.training.trainer import train

logger = logging.getLogger("dream_pyg")

_TESTED = "recall@20"
"""What is tested over users."""
_INFO = "reproduction.json"
_FORMAT_VERSION = 1
_WITHOUT_PRESET = {"table1": "the data", "choices": "the preset paper with single values changed"}


class Task(NamedTuple):
    """A run that a table needs."""

    config: RunConfig
    run: Path
    test: bool
    """Whether the test split is read."""


def reproduce(
    table: str,
    graph: str | Path,
    out: str | Path,
    *,
    num_seeds: int = 5,
    models: Sequence[str] = (),
    preset: str | Path | None = None,
    overrides: Sequence[str] = (),
    jobs: int = 1,
    notes: Sequence[str] = (),
) -> Table:
    """Train what a table of the paper needs and is not there yet, and write the table into ``out``.

    Args:
        table: One of :data:`TABLES`.
        graph: The graph store; the name of its data set finds the printed values.
        out: Directory of the tables of one graph, and of their runs.
        num_seeds: Runs of each system, with the seeds 0, 1, ...
        models: What to train of the table's models, by default all; for Table 2 and the table of accuracy any models.
            The others have their rows if their runs are there, and are named below the table if not.
        preset: A preset for those models that it knows; the others have their defaults.
        overrides: ``section.key=value`` for every run.
        jobs: Trainings at a time, in processes of one thread each if more than one.
        notes: What else is to be said below the table.

    Returns:
        The table.

    Raises:
        ConfigError: If a table, model, preset or value is unknown.
        StoreError: If ``out`` has the runs of another graph, is something else, or is in use.
        TrainingError: If a run fails; what was finished before stays.
        Interrupted: On SIGINT or SIGTERM; the same call continues.
    """
    if table not in TABLES:
        raise ConfigError(f"Unknown table {table!r}; expected one of {', '.join(TABLES)}.")
    if table == "accuracy":
        require_plots()
    if any(override_key(override) == SEED for override in overrides):
        raise ConfigError(f"{SEED} cannot be set: a table has runs of the seeds 0, 1, ...; say how many (--seeds).")
    if preset is not None and table in _WITHOUT_PRESET:
        raise ConfigError(f"{table} uses no preset: it has {_WITHOUT_PRESET[table]}. Leave --preset out.")
    info, out = read_info(graph), Path(out)
    systems_of = systems_of_table(table, str(graph), models, preset, overrides)
    threads = {system.config.training.num_threads for of_model in systems_of.values() for system in of_model}
    if jobs > 1 and threads - {None, 1}:
        raise ConfigError(
            "Trainings beside each other have one thread each: leave out training.num_threads, or --jobs."
        )
    asked = models or MODELS_OF_TABLE[table]
    about = _about(graph, info, preset, overrides)
    _open(out, info)
    with continuable(out, f"the tables of {info['dataset']}"):
        if table == "table1":
            return _written(_make_table(table, info, [_statistics(info)], about, notes, complete=True), out)
        systems, tasks, missing = _plan(table, systems_of, asked, out, info["fingerprint"], num_seeds)
        here = {system.config.model_name for system in systems}
        if left_out := [find_model(model).__name__ for model in systems_of if model not in here]:
            about["left out"] = left_out
        needed = {task.run for of_system in tasks.values() for task in of_system}
        _check_trainable(list(missing.values()), graph)

        def written() -> Table:
            rows = [_row(table, system, tasks[system.key], missing, info["dataset"]) for system in systems]
            if not missing:
                _test_over_users(systems, rows, _split(table))
            return _written(_make_table(table, info, rows, about, notes, complete=not missing), out)

        result = written()
        logger.info("%s: %d of %d runs are there", table, len(needed) - len(missing), len(needed))
        with closing(_train_all(list(missing.values()), jobs)) as finished:
            for run in finished:
                del missing[run]
                result = written()
                logger.info("%s: %d of %d runs are there, now %s", table, len(needed) - len(missing), len(needed), run)
    return result


def _split(table: str) -> str:
    """What a table's figures are of: choices are made on validation."""
    return "valid" if table == "choices" else "test"


def _plan(
    table: str,
    systems_of: dict[str, list[System]],
    asked: Container[str],
    out: Path,
    fingerprint: str,
    num_seeds: int,
) -> tuple[list[System], dict[str, list[Task]], dict[Path, Task]]:
    """The rows of a table, the runs of each, and those that are yet to be trained: of a model that was asked for."""
    systems: list[System] = []
    tasks: dict[str, list[Task]] = {}
    missing: dict[Path, Task] = {}
    known, test = _known_runs(out), _split(table) == "test"
    for model, rows in systems_of.items():
        of_row = {row.key: _tasks(row, out, fingerprint, num_seeds, known, test=test) for row in rows}
        unfinished = {
            task.run: task for some in of_row.values() for task in some if not _is_finished(task, fingerprint)
        }
        if model in asked or not unfinished:
            systems += rows
            tasks |= of_row
            missing |= unfinished
    return systems, tasks, missing


def _check_trainable(tasks: list[Task], graph: str | Path) -> None:
    """Refuse what cannot be trained on the graph, before the first run has trained for hours."""
    if not tasks:
        return
    loaded, one_of_each = load_graph(graph).graph, {task.run.parent: task for task in tasks}
    for task in one_of_each.values():
        prepare(task.config, loaded, resolve_device(task.config.training.device), test=task.test)


def _tasks(
    system: System, out: Path, fingerprint: str, num_seeds: int, known: dict[tuple[str, int], Path], *, test: bool
) -> list[Task]:
    name = _directory_name(system.config.to_dict(), fingerprint)
    runs = [known.get((name, seed), out / "runs" / name / f"seed-{seed}") for seed in range(num_seeds)]
    return [Task(system.with_seed(seed), run, test) for seed, run in enumerate(runs)]


def _directory_name(values: dict[str, Any], fingerprint: str) -> str:
    """What the runs of a configuration on a graph are kept under."""
    decisive = without(values, (SEED, *INDIFFERENT))
    text = json.dumps({"config": decisive, "graph_fingerprint": fingerprint}, sort_keys=True)
    return f"{values['model']['name']}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


def _known_runs(out: Path) -> dict[tuple[str, int], Path]:
    """The runs that are there, by the names that their directories would have now, which each new option changes."""
    known = {}
    for path in sorted((out / "runs").glob("*/seed-*")):
        try:
            info = read_run_info(RunPaths(path))
        except StoreError:
            continue  # Damaged, or of options that are no more: no row can ask for it, or it will be named then.
        known[_directory_name(info["config"], info["graph_fingerprint"]), info["config"]["training"]["seed"]] = path
    return known


def _is_finished(task: Task, fingerprint: str) -> bool:
    paths = RunPaths(task.run)
    if is_free(task.run):
        return False
    paths.check_whole(to_resume=False)
    info = read_run_info(paths)
    if info["graph_fingerprint"] != fingerprint:
        raise StoreError(
            f"{task.run} is a run on another graph: fingerprint {str(info['graph_fingerprint'])[:12]}, expected "
            f"{fingerprint[:12]}. Remove it, or write the tables to another directory with --out."
        )
    if changed := task.config.differences(info["config"], besides=INDIFFERENT):
        raise StoreError(
            f"{task.run} is a run of another configuration (here = the table's, there = the run's): "
            f"{'; '.join(changed)}. Move it away, or write the tables to another directory with --out."
        )
    if info.get("status") == "finished" and (
        not task.test or read_test_metrics(paths, read_best(paths)[0]) is not None
    ):
        return True
    paths.check_whole(to_resume=True)
    return False


def _train_all(tasks: list[Task], jobs: int) -> Generator[Path]:
    """Train each run, or what is left of it, and say when it is finished."""
    if jobs > 1:
        yield from train_in_processes(tasks, jobs)
        return
    for config, run, test in tasks:
        logger.info("Training %s", run)
        train(config, run, resume=not is_free(run), test=test)
        yield run


def _row(table: str, system: System, tasks: list[Task], missing: Container[Path], dataset: str) -> Row:
    printed = published_rows(table, dataset).get(system.key, {})
    runs = [_run(task) for task in tasks if task.run not in missing]
    if table == "accuracy":
        for run in runs:
            run["test"] |= _users_of(Path(run["run"]), system.config, "test")[0]
    cells = [
        Cell.of(metric, [run[_split(table)][metric] for run in runs], printed.get(metric))
        for metric in table_metrics(table)
    ]
    return Row(system.key, system.name, cells, runs, system.values_from)


def _test_over_users(systems: list[System], rows: list[Row], split: str) -> None:
    """Give each row the p-value of its recall, a user's mean over the runs, against the row it is compared with."""
    row_of = {row.key: row for row in rows}
    recall_of: dict[str, Tensor] = {}
    for position, system in enumerate(systems):
        row, reference = rows[position], row_of.get(system.compared_with or "")
        if reference is None:
            continue
        for one in (row, reference):
            if one.key not in recall_of:
                recalls = [_users_of(Path(run["run"]), system.config, split)[1] for run in one.runs]
                recall_of[one.key] = torch.stack(recalls).mean(dim=0)
        p_value = paired_p_value(recall_of[row.key], recall_of[reference.key])
        cells = [cell._replace(p_value=p_value) if cell.metric == _TESTED else cell for cell in row.cells]
        rows[position] = row._replace(cells=cells, compared_with=reference.name)


def _users_of(run: Path, config: RunConfig, split: str) -> tuple[dict[str, float], Tensor]:
    """The figures by groups and the recall of each user (U,) of a finished run, kept beside it as of its best epoch."""
    path, num_users = run / f"users_{split}.safetensors", config.training.eval_users
    made_of = {"epoch": str(read_best(RunPaths(run))[0]), "eval_users": str(num_users)}
    with suppress(StoreError):  # What is missing or damaged is made again.
        tensors, metadata = load_tensors(path)
        if made_of.items() <= metadata.items():
            return json.loads(metadata["figures"]), tensors[_TESTED]
    loaded = load_run(run, device="cpu", graph=config.graph)
    figures, recall = measure_users(loaded.scorer(), loaded.graph, split=split, num_users=num_users)
    save_tensors(path, {_TESTED: recall}, {**made_of, "figures": json.dumps(figures)})
    return figures, recall


def _run(task: Task) -> dict[str, Any]:
    """What a table says of a finished run."""
    paths = RunPaths(task.run)
    info, epochs = read_run_info(paths), read_epochs(paths)
    best_epoch, valid = read_best(paths)
    tested = read_test_metrics(paths, best_epoch) if task.test else None
    return {
        "run": str(task.run),
        "seed": info["seed"],
        "valid": info.get("valid") or valid,  # which older runs do not say
        **({} if tested is None else {"test": tested["general"]}),
        "best_epoch": best_epoch,
        "epochs": info["epochs"],
        "seconds": seconds_of(epochs),
        "device": info["device"],
        "resumed": info.get("resumed", []),
        "processor": info.get("processor", ""),  # which older runs do not say
        "num_threads": info["num_threads"],
        "versions": info["versions"],
        # Where the graph lies on this machine is nobody's business; the table has its fingerprint.
        "config": without(info["config"], ["graph"]),
    }


def _statistics(info: dict[str, Any]) -> Row:
    """Table 1: the numbers of a graph."""
    counts, name = info["counts"], info["dataset"]
    interactions = sum(counts[split] for split in SPLITS)
    measured = {
        "users": counts["users"],
        "items": counts["items"],
        "interactions": interactions,
        "sparsity": 100 * (1 - interactions / (counts["users"] * counts["items"])),
    }
    printed = published_rows("table1", name).get(name, {})
    cells = [Cell.of(metric, [measured[metric]], printed.get(metric)) for metric in table_metrics("table1")]
    return Row(name, name, cells)


def _make_table(
    table: str,
    info: dict[str, Any],
    rows: list[Row],
    about: dict[str, Any],
    further_notes: Sequence[str],
    *,
    complete: bool,
) -> Table:
    runs = [run for row in rows for run in row.runs]
    if runs:
        about = {
            **about,
            "seeds": sorted({run["seed"] for run in runs}),
            "devices": _ever(runs, "device"),
            "processors": _ever(runs, "processor"),
            "threads": _ever(runs, "num_threads"),
            "versions": runs[-1]["versions"],
        }
    notes = []
    if any(cell.published is not None for row in rows for cell in row.cells):
        notes.append(f"A ratio is what was measured over what {published_by(table)}.")
        notes += [note for note in (published_note(table, info["dataset"]),) if note]
    if any(cell.std is not None for row in rows for cell in row.cells):
        notes.append("Mean ± standard deviation of the sample over the seeds.")
    compared = {row.compared_with for row in rows if row.compared_with}
    if compared:
        notes.append(
            f"p: of a two-sided paired test over users, a user's {_TESTED} being the mean over the seeds, against "
            + (compared.pop() if len(compared) == 1 else "the model without BMA")
            + "."
        )
    return Table(table, TABLES[table], info["dataset"], rows, complete, about, [*notes, *further_notes])


def _ever(runs: list[dict[str, Any]], key: str) -> list[Any]:
    """All that runs were made with, before and after they were resumed."""
    values = {part[key] for run in runs for part in (run, *run["resumed"]) if key in part}
    return sorted({"not noted" if value == "" else value for value in values})


def _about(
    graph: str | Path, info: dict[str, Any], preset: str | Path | None, overrides: Sequence[str]
) -> dict[str, Any]:
    about = {
        "graph": Path(graph).resolve().name,
        "built with": info["parameters"],
        "built from": [part["path"] for part in info["inputs"].values()],
        "fingerprint": info["fingerprint"],
        "machine": _machine(),
    }
    if preset is not None:
        about["preset"] = str(preset)
    if overrides:
        about["set for every run"] = list(overrides)
    return about


def _machine() -> str:
    return f"{platform.system()} {platform.machine()}, {processor_name()}, {os.cpu_count()} CPUs"


def _open(out: Path, info: dict[str, Any]) -> None:
    """Make the directory of a graph's tables, or check that what is there is one."""
    description = {
        "format_version": _FORMAT_VERSION,
        "dataset": info["dataset"],
        "graph_fingerprint": info["fingerprint"],
    }
    if (out / _INFO).is_file():
        there = read_json(out / _INFO)
        if there != description:
            raise StoreError(
                f"{out} holds the tables of another graph: {there.get('dataset')} with fingerprint "
                f"{str(there.get('graph_fingerprint'))[:12]}, not {info['dataset']} with {info['fingerprint'][:12]}. "
                "Choose another directory with --out."
            )
    elif not is_free(out):
        raise StoreError(f"{out} exists and holds no tables: it has no {_INFO}. Choose another directory with --out.")
    else:
        write_json(out / _INFO, description)


def _written(table: Table, out: Path) -> Table:
    table.write(out)
    return table
