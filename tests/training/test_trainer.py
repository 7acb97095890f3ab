"""The training loop: what it computes, when it stops, and that every way back in ends in the same bits."""

from __future__ import annotations

import json
import logging
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dream_pyg.data.files import load_tensors, read_json, write_json
from dream_pyg.errors import Interrupted, ResumeError, StoreError, TrainingError
from dream_pyg.models import DREAM, Batch, find_model
from dream_pyg.training import trainer
from dream_pyg.training.model import make_model, prepare_graph
from dream_pyg.training.run import RunPaths, load_run, read_epochs, read_run_info, save_best, update_info
from dream_pyg.training.trainer import train
from dream_pyg.training.triplets import TripletSampler
from tests.graphs import PlantedBlocks
from tests.training.runs import assert_same, assert_same_run, configure, read_checkpoint, read_metrics

STEPS = 5  # of an epoch: 144 pairs by 32


@pytest.fixture(scope="module")
def finished(stored, tmp_path_factory) -> Path:
    """An uninterrupted run of 4 epochs."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    train(configure(stored), run)
    return run


def on_step(monkeypatch, step: int, act) -> None:
    """Let ``act`` see and replace the loss terms of one step, counted from 1 over the whole run."""
    original, calls = DREAM.loss, []

    def loss(self, graph, batch):
        calls.append(None)
        terms = original(self, graph, batch)
        return act(terms) if len(calls) == step else terms

    monkeypatch.setattr(DREAM, "loss", loss)


def test_training_is_adam_on_the_sum_of_terms_over_every_triplet(stored, finished):
    graph = prepare_graph(stored.graph, torch.device("cpu"))
    torch.manual_seed(0)
    model = make_model(configure(stored), graph)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    sampler, epochs = TripletSampler(graph), []
    for epoch in range(4):
        triplets = sampler.epoch(torch.Generator().manual_seed(epoch))
        sums: dict[str, float] = {}
        for start in range(0, len(sampler), 32):
            terms = model.loss(graph, Batch(*(part[start : start + 32] for part in triplets)))
            optimizer.zero_grad()
            sum(terms.values()).backward()
            optimizer.step()
            for name, term in terms.items():
                sums[name] = sums.get(name, 0.0) + term.item() / STEPS
        epochs.append(sums)
    state = read_checkpoint(finished)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(state["model"][name], value, rtol=1e-4, atol=1e-6)
    for record, expected in zip(read_metrics(finished), epochs, strict=True):
        assert record["loss"] == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_every_seed_and_epoch_has_triplets_of_its_own(stored):
    sampler = TripletSampler(stored.graph)
    drawn = [sampler.epoch(trainer._epoch_generator(seed, epoch)) for seed in (0, 1, 2**31 - 1) for epoch in (1, 2, 3)]
    for part in ("user", "pos_item", "neg_item"):
        assert len({tuple(getattr(batch, part).tolist()) for batch in drawn}) == len(drawn)


def test_learning_rate_decays_smoothly_over_epochs(stored, tmp_path):
    train(configure(stored, learning_rate=0.02, learning_rate_decay=0.5, epochs=3), tmp_path / "run")
    (group,) = read_checkpoint(tmp_path / "run")["optimizers"][0]["param_groups"]
    assert group["lr"] == 0.02 * 0.5 ** (2 / 50)


def test_a_run_leaves_what_its_result_says(stored, tmp_path):
    result = train(configure(stored), tmp_path / "run")
    paths, lines = RunPaths(tmp_path / "run"), read_metrics(tmp_path / "run")
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    best = max(lines, key=lambda line: line["valid"]["recall@20"])
    assert (result.best_epoch, result.valid_metrics) == (best["epoch"], best["valid"])
    assert result.epochs == 4
    assert read_json(paths.test_metrics)["epoch"] == result.best_epoch
    assert read_json(paths.test_metrics)["lines"]["general"] == result.test_metrics
    assert read_json(paths.info)["status"] == "finished"


@pytest.mark.parametrize(
    "options",
    [{}, {"checkpoint_every": 3}, {"evaluate_every": 2}, {"learning_rate_decay": 0.1}, {"seed": 2**31 - 1}],
    ids=lambda options: next(iter(options), "default"),
)
def test_four_epochs_are_two_and_two_more(stored, tmp_path, options):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(configure(stored, **options), whole)
    assert train(configure(stored, epochs=2, **options), parts).epochs == 2
    assert train(configure(stored, **options), parts, resume=True).epochs == 4
    assert_same_run(whole, parts)


def test_a_run_keeps_where_it_was_begun_and_says_where_it_went_on(stored, tmp_path, caplog):
    paths = RunPaths(tmp_path / "run")
    train(configure(stored, epochs=2), paths.root)
    elsewhere = {"processor": "another", "versions": {"torch": "2.0"}}
    update_info(paths, **elsewhere)
    begun = read_json(paths.info)
    train(configure(stored, epochs=3), paths.root, resume=True)
    assert "Resuming elsewhere, where results may round in another way: processor " in caplog.text
    now = read_json(paths.info)
    assert {key: now[key] for key in elsewhere} == elsewhere
    (resumed,) = now["resumed"]
    assert set(resumed) == {"started", *elsewhere}
    assert resumed["processor"] != "another"
    assert now["started"] == begun["started"]
    caplog.clear()
    del now["resumed"], now["started"]
    write_json(paths.info, {**now, "processor": resumed["processor"], "versions": resumed["versions"]})
    train(configure(stored), paths.root, resume=True)
    assert "elsewhere" not in caplog.text
    assert "resumed" not in read_json(paths.info)


def test_resuming_a_finished_run_changes_nothing(stored, finished):
    paths = RunPaths(finished)
    files = (paths.config, paths.metrics, paths.last, paths.best, paths.test_metrics)
    before = [path.read_bytes() for path in files]
    train(configure(stored), finished, resume=True)
    assert [path.read_bytes() for path in files] == before


@pytest.mark.parametrize("model", ["addease", "itemknn", "popularity"])
def test_resuming_what_was_solved_solves_it_no_more(stored, tmp_path, monkeypatch, model):
    result = train(configure(stored, model), tmp_path / "run")
    before = contents(tmp_path / "run")
    solved = []
    monkeypatch.setattr(find_model(model), "fit", lambda *given: solved.append(given))
    assert train(configure(stored, model), tmp_path / "run", resume=True) == result
    assert (solved, read_metrics(tmp_path / "run")[0]["valid"]) == ([], result.valid_metrics)
    after = contents(tmp_path / "run")
    info = RunPaths(tmp_path / "run").info
    assert {path for path in before if before[path] != after[path]} <= {info}  # when it was last opened
    assert before.keys() == after.keys()


def test_solving_that_was_cut_off_is_done_again(stored, tmp_path, monkeypatch):
    run, whole = tmp_path / "run", tmp_path / "whole"
    with monkeypatch.context() as patched:
        patched.setattr(trainer._Session, "save", lambda self: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            train(configure(stored, "ease"), run)
    train(configure(stored, "ease"), run, resume=True)
    train(configure(stored, "ease"), whole)
    assert_same_run(whole, run)


def interrupt(number: int, times: int = 1):
    def act(terms):
        for _ in range(times):
            signal.raise_signal(number)
        return terms

    return act


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [1, 3, STEPS, STEPS + 1, 4 * STEPS])
def test_interrupted_at_any_step_and_resumed_is_uninterrupted(stored, finished, tmp_path, monkeypatch, number, step):
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        on_step(patched, step, interrupt(number))
        with pytest.raises(Interrupted, match=rf"epoch {(step - 1) // STEPS + 1}; .*train --resume --run {run}"):
            train(configure(stored), run)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    state = read_checkpoint(run)
    assert (state["epoch"], state["step"]) == ((step - 1) // STEPS, (step - 1) % STEPS + 1)
    train(configure(stored), run, resume=True)
    assert_same_run(finished, run)


def test_an_epoch_that_was_interrupted_has_the_seconds_of_all_its_steps(stored, tmp_path, monkeypatch):
    original, run, now = DREAM.loss, tmp_path / "run", [0.0]

    def loss(self, graph, batch):
        now[0] += 2
        return original(self, graph, batch)

    monkeypatch.setattr(DREAM, "loss", loss)
    monkeypatch.setattr(trainer, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    with monkeypatch.context() as patched:
        on_step(patched, 3, interrupt(signal.SIGINT))
        with pytest.raises(Interrupted):
            train(configure(stored, epochs=1), run)
    now[0] += 1000  # between both parts
    train(configure(stored, epochs=1), run, resume=True)
    (epoch,) = read_epochs(RunPaths(run))
    assert epoch["train_seconds"] == 2 * STEPS


def test_interrupted_twice_in_two_places(stored, finished, tmp_path, monkeypatch):
    run = tmp_path / "run"
    for resume in (False, True):
        with monkeypatch.context() as patched:
            on_step(patched, 3, interrupt(signal.SIGINT))
            with pytest.raises(Interrupted):
                train(configure(stored), run, resume=resume)
    assert (read_checkpoint(run)["epoch"], read_checkpoint(run)["step"]) == (1, 1)
    train(configure(stored), run, resume=True)
    assert_same_run(finished, run)


def test_interrupted_in_validation_stops_after_the_next_step(stored, finished, tmp_path, monkeypatch):
    original, run = trainer.evaluate, tmp_path / "run"

    def evaluate(*args, **options):
        signal.raise_signal(signal.SIGINT)
        return original(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(trainer, "evaluate", evaluate)
        with pytest.raises(Interrupted):
            train(configure(stored), run)
    assert (read_checkpoint(run)["epoch"], read_checkpoint(run)["step"]) == (1, 1)
    train(configure(stored), run, resume=True)
    assert_same_run(finished, run)


def test_interrupted_in_the_last_validation_stops_before_the_test(stored, finished, tmp_path, monkeypatch):
    original, run = trainer.evaluate, tmp_path / "run"
    validations = iter(range(1, 5))

    def evaluate(*args, **options):
        if next(validations) == 4:
            signal.raise_signal(signal.SIGINT)
        return original(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(trainer, "evaluate", evaluate)
        with pytest.raises(Interrupted, match="after epoch 4; "):
            train(configure(stored), run)
    assert read_run_info(RunPaths(run))["status"] == "interrupted"
    assert not RunPaths(run).test_metrics.exists()
    train(configure(stored), run, resume=True)
    assert_same_run(finished, run)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_in_the_test_is_noted_and_tested_later(stored, finished, tmp_path, monkeypatch, number):
    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(trainer, "evaluate_lines", lambda *args, **options: signal.raise_signal(number))
        with pytest.raises(KeyboardInterrupt):
            train(configure(stored), run)
    assert read_run_info(RunPaths(run))["status"] == "interrupted"
    train(configure(stored), run, resume=True)
    assert_same_run(finished, run)


def test_a_second_signal_acts_at_once_and_the_last_checkpoint_still_resumes(stored, finished, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        on_step(patched, STEPS + 2, interrupt(signal.SIGINT, times=2))
        with pytest.raises(KeyboardInterrupt):
            train(configure(stored), run)
    assert (read_checkpoint(run)["epoch"], read_checkpoint(run)["step"]) == (1, 0)
    train(configure(stored), run, resume=True)
    assert_same_run(finished, run)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_a_process_that_was_stopped_resumes_to_the_same_bits(stored, tmp_path, number):
    run, log = tmp_path / "run", tmp_path / "stderr"
    # It would train for hours: how far it came when the signal arrived does not matter.
    endless = configure(stored, epochs=10**6, patience=10**6, batch_size=4)
    endless.save(tmp_path / "config.toml")
    command = [sys.executable, "-m", "dream_pyg", "train", "--config", tmp_path / "config.toml", "--run", run]
    with log.open("w") as stderr, subprocess.Popen(command, stderr=stderr, stdout=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 120
            while not (RunPaths(run).metrics.is_file() and len(RunPaths(run).metrics.read_text().splitlines()) >= 2):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.01)
            process.send_signal(number)
            code = process.wait(timeout=60)
        finally:
            process.kill()
    state = read_checkpoint(run)
    if number == signal.SIGKILL:
        assert code == -signal.SIGKILL
    else:
        assert code == 130
        assert f"Error: Interrupted in epoch {state['epoch'] + 1};" in log.read_text()
        assert state["step"] > 0
    ending = configure(stored, epochs=state["epoch"] + 2, patience=10**6, batch_size=4)
    train(ending, run, resume=True)
    train(ending, tmp_path / "whole")
    assert_same_run(tmp_path / "whole", run)


def contents(run: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_an_existing_run_is_refused_and_left_alone(stored, finished):
    before = contents(finished)
    with pytest.raises(StoreError, match=r"exists already\. Continue it with --resume"):
        train(configure(stored), finished)
    assert contents(finished) == before


def test_nothing_to_resume(stored, tmp_path):
    with pytest.raises(ResumeError, match=r"no run at .*nowhere to resume"):
        train(configure(stored), tmp_path / "nowhere", resume=True)
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.5}, r"training\.learning_rate: 0\.5 here, 0\.01 there"),
        ({"seed": 1, "batch_size": 7}, r"training\.batch_size: 7 here, 32 there; training\.seed: 1 here, 0 there"),
        ({"model": "lightgcn"}, r"model\.name: lightgcn here, dream there"),
    ],
)
def test_resuming_with_another_configuration_names_the_keys_and_both_values(stored, finished, changes, message):
    before = contents(finished)
    with pytest.raises(ResumeError, match=message):
        train(configure(stored, **changes), finished, resume=True)
    assert contents(finished) == before


def test_resuming_with_another_graph_is_refused(stored, finished, tmp_path):
    other, before = PlantedBlocks(seed=1).store(tmp_path), contents(finished)
    with pytest.raises(ResumeError) as refusal:
        train(configure(other), finished, resume=True)
    for fingerprint in (stored.fingerprint, other.fingerprint):
        assert fingerprint[:12] in str(refusal.value)
    assert contents(finished) == before


def test_a_graph_that_moved_may_be_resumed_with(stored, finished, tmp_path):
    moved, run = PlantedBlocks().store(tmp_path / "moved"), tmp_path / "run"
    train(configure(stored, epochs=2), run)
    train(configure(moved), run, resume=True)
    assert_same(read_checkpoint(run), read_checkpoint(finished))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite_names_its_term_and_step(stored, finished, tmp_path, monkeypatch, number):
    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        on_step(patched, STEPS + 3, lambda terms: {**terms, "inter": terms["inter"] * number})
        with pytest.raises(TrainingError, match=rf"'inter' became {number} in epoch 2, step 3\. Train anew"):
            train(configure(stored), run)
    assert read_checkpoint(run)["epoch"] == 1
    # What came before is good to go on from.
    train(configure(stored), run, resume=True)
    assert_same_run(finished, run)


def nan_gradient(terms):
    """The same loss, whose gradient is no number."""
    return {**terms, "inter": terms["inter"] + (0 * terms["inter"]).sqrt()}


@pytest.mark.parametrize("interrupted", [False, True])
def test_weights_that_the_last_step_spoilt_are_not_kept(stored, finished, tmp_path, monkeypatch, interrupted):
    step, run = STEPS + 3 if interrupted else 2 * STEPS, tmp_path / "run"

    def act(terms):
        return nan_gradient(interrupt(signal.SIGINT)(terms) if interrupted else terms)

    with monkeypatch.context() as patched:
        on_step(patched, step, act)
        with pytest.raises(TrainingError, match=rf"Weights of .*epoch 2, after step {step - STEPS}\. Train anew in an"):
            train(configure(stored), run)
    assert [line["epoch"] for line in read_metrics(run)] == [read_checkpoint(run)["epoch"]] == [1]
    train(configure(stored), run, resume=True)
    assert_same_run(finished, run)


def test_weights_whose_scores_would_be_too_large_are_not_kept(stored, tmp_path):
    paths = RunPaths(tmp_path / "run")
    config = configure(stored, "bpr", epochs=1, batch_size=1000, learning_rate=1e30)
    with pytest.raises(TrainingError, match=r"Scores after epoch 1 are too large.*with a lower learning rate"):
        train(config, paths.root)
    assert (read_checkpoint(paths.root)["epoch"], paths.best.exists(), paths.metrics.exists()) == (0, False, False)
    assert read_run_info(paths)["status"] == "failed"


def pretend_metrics(monkeypatch, values: list[float]) -> list[float]:
    """Let validation give these values of recall@20, one an evaluation; returns those not asked for yet."""
    left = list(values)
    monkeypatch.setattr(trainer._Session, "_validation_metrics", lambda self: {"recall@20": left.pop(0)})
    return left


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_stops_after_exactly_patience_evaluations_that_are_no_better(stored, tmp_path, monkeypatch, patience):
    # The same value again is no improvement.
    values = {1: [0.1, 0.3, 0.3, 9], 2: [0.1, 0.3, 0.2, 0.3, 9], 3: [0.2, 0.1, 0.3, 0.3, 0.1, 0.2, 9]}[patience]
    left = pretend_metrics(monkeypatch, values)
    result = train(configure(stored, epochs=50, patience=patience), tmp_path / "run")
    assert left == [9]
    assert result.epochs == len(values) - 1
    assert result.best_epoch == values.index(0.3) + 1
    assert result.valid_metrics == {"recall@20": 0.3}


def test_keeps_the_weights_of_the_best_epoch(stored, finished, tmp_path, monkeypatch):
    pretend_metrics(monkeypatch, [0.1, 0.3, 0.2, 0.2])
    train(configure(stored), tmp_path / "run")
    weights, metadata = load_tensors(RunPaths(tmp_path / "run").best)
    assert metadata["epoch"] == "2"
    pretend_metrics(monkeypatch, [0.1, 0.3])
    train(configure(stored, epochs=2), tmp_path / "two")
    assert_same(weights, dict(read_checkpoint(tmp_path / "two")["model"]))
    assert_same(read_checkpoint(tmp_path / "run")["model"], read_checkpoint(finished)["model"])


def test_weights_of_a_later_best_epoch_than_the_state_knows_are_tested_as_what_they_are(stored, tmp_path, monkeypatch):
    # As if the run was killed after epoch 3 was saved as the best, before the checkpoint that knows of it.
    pretend_metrics(monkeypatch, [0.1, 0.2, 0.3, 0.0])
    train(configure(stored, epochs=3), tmp_path / "run", test=False)
    best = load_tensors(RunPaths(tmp_path / "run").best)
    pretend_metrics(monkeypatch, [0.1, 0.2, 0.15, 0.0])
    train(configure(stored, epochs=3), tmp_path / "other", test=False)
    shutil.copy(RunPaths(tmp_path / "run").best, RunPaths(tmp_path / "other").best)
    result = train(configure(stored, epochs=3), tmp_path / "other", resume=True)
    assert (result.best_epoch, result.valid_metrics) == (3, json.loads(best[1]["valid"]))
    assert read_run_info(RunPaths(tmp_path / "other"))["best_epoch"] == 3


def test_fewer_epochs_than_the_best_has_are_refused_even_if_the_checkpoint_has_fewer(stored, finished, tmp_path):
    # As if the run was killed after epoch 4 was saved as the best, when the checkpoint was that of epoch 2.
    run = RunPaths(tmp_path / "run")
    train(configure(stored, epochs=2), run.root)
    save_best(run, load_tensors(RunPaths(finished).best)[0], 4, {"recall@20": 1.0})
    before = contents(run.root)
    with pytest.raises(ResumeError, match=r"has 4 epochs already, more than training\.epochs = 3\. Ask for at least"):
        train(configure(stored, epochs=3), run.root, resume=True)
    assert contents(run.root) == before
    assert train(configure(stored), run.root, resume=True).best_epoch == 4


def test_patience_counts_evaluations_not_epochs(stored, tmp_path, monkeypatch):
    pretend_metrics(monkeypatch, [0.3, 0.2, 0.1, 9])
    result = train(configure(stored, epochs=50, patience=2, evaluate_every=3), tmp_path / "run")
    assert (result.epochs, result.best_epoch) == (9, 3)
    assert ["valid" in line for line in read_metrics(tmp_path / "run")] == [False, False, True] * 3


def test_patience_goes_on_counting_after_a_resume(stored, tmp_path, monkeypatch):
    run = tmp_path / "run"
    pretend_metrics(monkeypatch, [0.3, 0.2])
    train(configure(stored, epochs=2, patience=3), run)
    left = pretend_metrics(monkeypatch, [0.2, 0.1, 9])
    assert train(configure(stored, epochs=50, patience=3), run, resume=True).epochs == 4
    assert left == [9]
    # Stopped for good: more epochs alone do not start it again.
    assert train(configure(stored, epochs=60, patience=3), run, resume=True).epochs == 4


def test_the_metric_chooses_the_epoch(stored, tmp_path):
    result = train(configure(stored, metric="mrr@3"), tmp_path / "run")
    values = [line["valid"]["mrr@3"] for line in read_metrics(tmp_path / "run")]
    assert result.best_epoch == values.index(max(values)) + 1


def test_kept_epochs_are_the_weights_of_these_epochs_and_change_nothing(stored, finished, tmp_path):
    train(configure(stored, keep_every=2), tmp_path / "run")
    paths = RunPaths(tmp_path / "run")
    assert paths.kept_epochs() == [0, 2, 4]
    assert RunPaths(finished).kept_epochs() == []
    last = {**read_checkpoint(finished)["model"]}
    assert_same(load_tensors(paths.epoch(4))[0], {name: last[name] for name in sorted(last)})
    torch.manual_seed(0)
    first = make_model(configure(stored), prepare_graph(stored.graph, torch.device("cpu"))).state_dict()
    kept = load_tensors(paths.epoch(0))[0]
    assert [name for name in first if not torch.equal(first[name], kept[name])] == []
    assert_same(read_checkpoint(tmp_path / "run"), read_checkpoint(finished))


def test_epochs_may_be_kept_from_a_resume_on_and_those_to_be_made_again_vanish(stored, finished, tmp_path):
    run = tmp_path / "run"
    train(configure(stored, epochs=2), run)
    paths = RunPaths(run)
    for stale in (3, 9):
        paths.epoch(stale).write_text("of a training that went on further than its last checkpoint")
    train(configure(stored, keep_every=1), run, resume=True)
    assert paths.kept_epochs() == [3, 4]
    assert_same(read_checkpoint(run), read_checkpoint(finished))


def test_training_may_leave_the_test_split_unread_until_the_run_is_resumed(stored, finished, tmp_path, monkeypatch):
    splits = []
    original = trainer.evaluate

    def evaluate(embeddings, graph, split, **options):
        splits.append(split)
        return original(embeddings, graph, split, **options)

    monkeypatch.setattr(trainer, "evaluate", evaluate)
    result = train(configure(stored), tmp_path / "run", test=False)
    assert (result.test_metrics, set(splits)) == ({}, {"valid"})
    assert not RunPaths(tmp_path / "run").test_metrics.exists()
    train(configure(stored), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", finished)


def test_each_evaluation_is_told_and_may_end_the_training(stored, finished, tmp_path):
    told = []

    def stop_at_the_second(epoch, metrics):
        told.append({"epoch": epoch, "valid": metrics})
        return epoch == 2

    result = train(configure(stored), tmp_path / "run", on_evaluation=stop_at_the_second)
    lines = [{"epoch": line["epoch"], "valid": line["valid"]} for line in read_metrics(finished)]
    assert (told, result.epochs) == (lines[:2], 2)
    assert read_json(RunPaths(tmp_path / "run").info)["status"] == "finished"
    train(configure(stored), tmp_path / "run", resume=True, on_evaluation=lambda *given: bool(told.append(given)))
    assert told[2:] == [(line["epoch"], line["valid"]) for line in lines[2:]]
    assert_same_run(tmp_path / "run", finished)


def test_only_epochs_that_are_evaluated_are_told(stored, tmp_path):
    told = []
    config = configure(stored, evaluate_every=3)
    train(config, tmp_path / "run", on_evaluation=lambda epoch, metrics: bool(told.append(epoch)))
    assert told == [3, 4]


def test_features_may_be_held_in_bfloat16_by_the_run_and_whoever_opens_it(stored, finished, tmp_path):
    config = configure(stored).model_copy(update={"feature_precision": "bfloat16"})
    result = train(config, tmp_path / "run")
    for path, dtype in (result.run, torch.bfloat16), (finished, torch.float32):
        graph = load_run(path).graph
        assert {graph["item"][name].dtype for name in ("x_image", "x_text")} == {dtype}
    # Features are rounded to 2^-9 of themselves: the first epoch's losses hardly differ.
    for name, value in read_metrics(finished)[0]["loss"].items():
        assert read_metrics(result.run)[0]["loss"][name] == pytest.approx(value, rel=2.0**-6, abs=1e-4)
    with pytest.raises(ResumeError, match="feature_precision: auto here, bfloat16 there"):
        train(configure(stored), result.run, resume=True)


def test_a_run_that_another_process_trains_is_not_resumed(stored, tmp_path):
    refused = []

    def another(epoch, metrics):
        with pytest.raises(StoreError, match=r"Another process works on the run at .*run\. Wait for it, or end it"):
            train(configure(stored), tmp_path / "run", resume=True)
        refused.append(epoch)
        return False

    train(configure(stored), tmp_path / "run", on_evaluation=another)
    assert refused == [1, 2, 3, 4]
    assert read_json(RunPaths(tmp_path / "run").info)["status"] == "finished"


@pytest.mark.parametrize(
    ("error", "status"), [(MemoryError, "failed"), (KeyboardInterrupt, "interrupted"), (StoreError, "failed")]
)
def test_whatever_ends_a_training_or_its_test_is_noted(stored, finished, tmp_path, monkeypatch, error, status):
    def fail(*given, **options):
        raise error

    with pytest.raises(error):
        train(configure(stored), tmp_path / "run", on_evaluation=fail)
    assert read_json(RunPaths(tmp_path / "run").info)["status"] == status
    with monkeypatch.context() as patched:
        patched.setattr(trainer, "evaluate_lines", fail)
        with pytest.raises(error):
            train(configure(stored), tmp_path / "run", resume=True)
    assert read_json(RunPaths(tmp_path / "run").info)["status"] == status
    train(configure(stored), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", finished)


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ({"name": "dream", "modality_weights": {"image": 1, "text": 2}}, "modalities: image 0.333, text 0.667"),
        ({"name": "addease", "modality_weights": {"text": 2}}, "modalities: text 1"),
        ({"name": "bpr"}, None),
    ],
)
def test_a_training_says_what_each_modality_weighs(stored, tmp_path, caplog, model, told):
    caplog.set_level(logging.INFO, "dream_pyg")
    train(configure(stored, epochs=1).model_copy(update={"model": model}), tmp_path / "run")
    assert [line for line in caplog.messages if line.startswith("modalities")] == ([told] if told else [])
