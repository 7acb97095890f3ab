"""Studies: the default first, chosen on validation, pruned, continued after any end, the test split read once."""

from __future__ import annotations

import csv
import fcntl
import json
import os
import shutil
import sqlite3
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy.engine

from dream_pyg.analysis import tune as study
from dream_pyg.analysis.search_spaces import default_point, search_space
from dream_pyg.analysis.tune import StudyResult, search_run, tune
from dream_pyg.config import RunConfig
from dream_pyg.data.files import write_json
from dream_pyg.errors import ConfigError, Interrupted, MissingExtraError, ResumeError, StoreError, TrainingError
from dream_pyg.models.bpr import BPR
from dream_pyg.models.space import ImageShare
from dream_pyg.training import trainer
from tests.analysis.conftest import Killed

EPOCHS = 3
STEPS = 4  # of an epoch: at most 240 pairs by 64
SET = [f"training.epochs={EPOCHS}", "training.batch_size=64", "training.num_threads=1", "training.device=cpu"]


def search(graph: Path, out: Path, num_trials: int = 4, **options: object) -> StudyResult:
    """A study of BPR."""
    overrides = [*SET, *options.pop("overrides", ())]  # type: ignore[misc]
    return tune("bpr", graph, out, num_trials=num_trials, overrides=overrides, **options)  # type: ignore[arg-type]


def untimed(result: StudyResult) -> list[object]:
    """The trials without their durations."""
    return [trial._replace(seconds=0.0) for trial in result.trials]


@pytest.fixture(scope="module")
def finished(shop_graph: Path, tmp_path_factory: pytest.TempPathFactory) -> StudyResult:
    """A study of four trials that nothing disturbed."""
    return search(shop_graph, tmp_path_factory.mktemp("studies") / "finished")


def test_the_first_trial_is_the_default_configuration(finished: StudyResult, shop_graph: Path):
    default = RunConfig.create(graph=shop_graph, model="bpr", overrides=SET)
    assert RunConfig.load(finished.path / "trials" / "000" / "config.toml") == default
    assert len({str(trial.values) for trial in finished.trials}) == 4


def test_the_best_trial_is_best_on_validation_and_alone_is_tested(finished: StudyResult):
    values = []
    for trial in finished.trials:
        lines = (finished.path / "trials" / f"{trial.number:03d}" / "metrics.jsonl").read_text().splitlines()
        recorded = [json.loads(line)["valid"]["recall@20"] for line in lines]
        assert (trial.value, trial.epochs, trial.state) == (max(recorded), len(recorded), "complete")
        assert recorded[trial.best_epoch - 1] == trial.value
        values.append(trial.value)
    assert finished.best.value == max(values)
    (tested,) = finished.path.glob("trials/*/test_metrics.json")
    assert tested.parent.name == f"{finished.best.number:03d}"
    assert json.loads(tested.read_text())["lines"]["general"] == finished.test_metrics
    assert {path.parent for path in finished.path.glob("trials/*/checkpoints")} == {tested.parent}


def test_the_value_of_a_trial_is_that_of_its_finished_run_with_the_vote_it_chose(shop_graph: Path, tmp_path: Path):
    teacher = "training.teacher={share=0.0, vote=0.001, votes=[0.5, 2.0], model={l2_weight=20.0}}"
    result = search(shop_graph, tmp_path / "study", 2, overrides=[teacher])
    runs = [result.path / "trials" / f"{trial.number:03d}" for trial in result.trials]
    infos = [json.loads((run / "run.json").read_text()) for run in runs]
    assert [trial.value for trial in result.trials] == [info["valid"]["recall@20"] for info in infos]
    assert [trial.best_epoch for trial in result.trials] == [info["best_epoch"] for info in infos]
    assert any(info["vote"] > 0.001 for info in infos)  # else the vote of the study would do
    assert f"validation recall@20 {result.best.value:.4f}" in (result.path / "best.toml").read_text()


def test_the_files_of_a_study_say_what_its_result_says(finished: StudyResult):
    rows = list(csv.DictReader((finished.path / "trials.csv").open()))
    assert [float(row["value"]) for row in rows] == [trial.value for trial in finished.trials]
    assert [float(row["model.l2_weight"]) for row in rows] == [
        trial.values["model.l2_weight"] for trial in finished.trials
    ]
    told = json.loads((finished.path / "study.json").read_text())
    assert told["best"]["number"] == finished.best.number
    assert told["test_metrics"] == finished.test_metrics


def test_the_best_trial_is_a_preset(finished: StudyResult, shop_graph: Path):
    preset = finished.path / "best.toml"
    config = RunConfig.create(graph=shop_graph, model="bpr", preset=preset, overrides=SET)
    best = RunConfig.load(finished.path / "trials" / f"{finished.best.number:03d}" / "config.toml")
    assert config == best
    table = tomllib.loads(preset.read_text())["bpr"]
    assert table["training"].keys() == {"learning_rate", "batch_size"}
    assert f"trial {finished.best.number} of 4" in table["source"]


def test_a_finished_study_trains_nothing_more(finished: StudyResult, shop_graph: Path, monkeypatch):
    monkeypatch.setattr(BPR, "loss", None)
    assert search(shop_graph, finished.path) == finished


def test_more_trials_continue_a_study(finished: StudyResult, shop_graph: Path, tmp_path: Path, caplog):
    first = search(shop_graph, tmp_path / "study", 2)
    assert untimed(first) == untimed(finished)[:2]
    caplog.clear()
    assert untimed(search(shop_graph, tmp_path / "study", 4)) == untimed(finished)
    assert ("The test split was read before" in caplog.text) == (first.best.number != finished.best.number)


def test_a_test_split_that_was_read_for_another_trial_is_told(shop_graph: Path, tmp_path: Path, caplog):
    first = search(shop_graph, tmp_path / "study", 2)
    assert "was read before" not in caplog.text
    other = 1 - first.best.number
    write_json(tmp_path / "study" / "trials" / f"{other:03d}" / "test_metrics.json", {})
    assert search(shop_graph, tmp_path / "study", 2).test_metrics == first.test_metrics
    assert f"The test split was read before, for the best of fewer trials ({other})" in caplog.text


@pytest.mark.parametrize("step", [1, EPOCHS * STEPS + 2, 2 * EPOCHS * STEPS + STEPS + 1])
def test_a_study_that_was_stopped_anywhere_makes_the_same_trials(
    finished: StudyResult, shop_graph: Path, tmp_path: Path, stop_at: Callable[[int], None], step: int
):
    stop_at(step)
    with pytest.raises((Interrupted, Killed)):
        search(shop_graph, tmp_path / "study")
    stop_at(0)
    result = search(shop_graph, tmp_path / "study")
    assert untimed(result) == untimed(finished)
    assert result.test_metrics == finished.test_metrics


def test_the_message_of_an_interrupt_says_how_to_go_on(shop_graph: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(BPR, "loss", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(Interrupted, match="Continue with the same command"):
        search(shop_graph, tmp_path / "study")


def test_a_trial_that_falls_behind_the_median_is_pruned(shop_graph: Path, tmp_path: Path, monkeypatch):
    made: list[object] = []

    def metrics(session):
        if session not in made:
            made.append(session)
        return {"recall@20": (0.5 if len(made) <= 4 else 0.1) + 0.01 * session.epoch}

    monkeypatch.setattr(trainer._Session, "_validation_metrics", metrics)
    result = search(shop_graph, tmp_path / "study", 6, pruning_warmup=2)
    assert [trial.state for trial in result.trials] == ["complete"] * 4 + ["pruned"] * 2
    assert [trial.epochs for trial in result.trials] == [EPOCHS] * 4 + [2] * 2
    assert result.best.number < 4


def test_a_trial_whose_loss_is_not_finite_is_passed_over(shop_graph: Path, tmp_path: Path, monkeypatch):
    original = BPR.loss
    default = BPR.Config().l2_weight

    def loss(self, graph, batch):
        terms = original(self, graph, batch)
        return (
            terms if self.config.l2_weight == default else {name: term * float("nan") for name, term in terms.items()}
        )

    monkeypatch.setattr(BPR, "loss", loss)
    result = search(shop_graph, tmp_path / "study", 3)
    assert [(trial.state, trial.value) for trial in result.trials[1:]] == [("pruned", None)] * 2
    assert result.best.number == 0


def test_a_default_whose_loss_is_not_finite_is_an_error(shop_graph: Path, tmp_path: Path, monkeypatch):
    original = BPR.loss
    monkeypatch.setattr(BPR, "loss", lambda *given: {"bpr": original(*given)["bpr"] * float("nan")})
    with pytest.raises(TrainingError, match="became nan"):
        search(shop_graph, tmp_path / "study")


def test_a_study_without_an_ended_trial_is_begun_anew_by_another_command(
    finished: StudyResult, shop_graph: Path, tmp_path: Path, monkeypatch, caplog
):
    original = BPR.loss
    monkeypatch.setattr(BPR, "loss", lambda *given: {"bpr": original(*given)["bpr"] * float("nan")})
    with pytest.raises(TrainingError):
        search(shop_graph, tmp_path / "study", overrides=["model.embedding_dim=8"])
    monkeypatch.setattr(BPR, "loss", original)
    assert untimed(search(shop_graph, tmp_path / "study")) == untimed(finished)
    assert "config.model.embedding_dim is 64 here, 8 there" in caplog.text
    with pytest.raises(ResumeError, match="embedding_dim is 8 here, 64 there"):
        search(shop_graph, tmp_path / "study", overrides=["model.embedding_dim=8"])


def test_the_same_values_are_not_trained_twice(shop_graph: Path, tmp_path: Path, monkeypatch):
    trained: list[int] = []
    original = trainer.train

    def train(config, run, **options):
        trained.append(config.model["num_layers"])
        return original(config, run, **options)

    monkeypatch.setattr(study, "train", train)
    fixed = [
        *SET,
        "training.learning_rate=0.01",
        "model.l2_weight=0",
        "training.keep_every=1",
        "training.eval_users=99",
    ]
    result = tune("lightgcn", shop_graph, tmp_path / "study", num_trials=7, overrides=fixed)
    assert len(result.trials) == 7
    *searched, tested = trained
    assert len(searched) == len(set(searched)) <= 4
    assert tested == result.best.values["model.num_layers"]
    table = tomllib.loads((tmp_path / "study" / "best.toml").read_text())["lightgcn"]
    assert table["model"] == {"num_layers": tested, "l2_weight": 0}
    assert not {"keep_every", "eval_users"} & set(table["training"])


@pytest.mark.parametrize("lost", ["", "run.json", "config.toml", "checkpoints/best.safetensors", "checkpoints/last.pt"])
def test_a_best_trial_that_is_no_longer_whole_is_trained_again(
    finished: StudyResult, shop_graph: Path, tmp_path: Path, lost: str
):
    out = tmp_path / "study"
    shutil.copytree(finished.path, out)
    best = out / "trials" / f"{finished.best.number:03d}"
    if lost:
        (best / lost).unlink()
    else:
        shutil.rmtree(best)
    assert search(shop_graph, out) == finished._replace(path=out)
    assert json.loads((best / "test_metrics.json").read_text())["lines"]["general"] == finished.test_metrics


def test_a_search_hands_over_the_training_of_its_best_trial_if_it_is_there(shop_graph: Path, tmp_path: Path):
    found = [search_run("bpr", shop_graph, tmp_path / "study", tmp_path / "run", timeout=0.0, overrides=SET)]
    shutil.rmtree(tmp_path / "study" / "trials" / "000")
    found += [search_run("bpr", shop_graph, tmp_path / "study", tmp_path / "other", timeout=0.0, overrides=SET)]
    assert [there for _, there in found] == [True, False]
    assert found[0][0] == found[1][0] == RunConfig.load(tmp_path / "run" / "config.toml")
    assert not (tmp_path / "other").exists()


def test_no_trial_begins_after_the_timeout(shop_graph: Path, tmp_path: Path):
    result = search(shop_graph, tmp_path / "study", 4, timeout=0.0)
    assert (len(result.trials), result.test_metrics) == (1, {})
    assert not list((tmp_path / "study").glob("trials/*/test_metrics.json"))


def test_a_time_that_is_no_number_is_refused(shop_graph: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="The time for trials is nan seconds"):
        search(shop_graph, tmp_path / "study", 4, timeout=float("nan"))
    assert not (tmp_path / "study").exists()


def test_a_study_begins_at_a_preset_and_keeps_what_it_does_not_search(shop_graph: Path, tmp_path: Path):
    preset = tmp_path / "mine.toml"
    preset.write_text(
        '[bpr]\nsource = "a test"\n[bpr.training]\nlearning_rate = 0.004\npatience = 9\n'
        "[bpr.training.teacher]\nshare = 0.5\n[bpr.model]\nl2_weight = 0.03\n"
    )
    result = search(shop_graph, tmp_path / "study", 2, preset=preset)
    first = RunConfig.create(graph=shop_graph, model="bpr", preset=preset, overrides=SET)
    assert RunConfig.load(result.path / "trials" / "000" / "config.toml") == first
    found = RunConfig.create(graph=shop_graph, model="bpr", preset=result.path / "best.toml", overrides=SET)
    assert (found.training.patience, found.training.teacher.share) == (9, 0.5)
    best = RunConfig.load(result.path / "trials" / f"{result.best.number:03d}" / "config.toml")
    assert found == best


def test_what_a_study_was_told_to_leave_out_of_a_preset_is_not_in_what_it_finds(shop_graph: Path, tmp_path: Path):
    preset = tmp_path / "mine.toml"
    preset.write_text('[bpr]\nsource = "a test"\n[bpr.training.teacher]\nshare = 0.5\n')
    result = search(shop_graph, tmp_path / "study", 1, preset=preset, overrides=["training.teacher=none"])
    assert "teacher" not in (result.path / "best.toml").read_text()
    assert RunConfig.load(result.path / "trials" / "000" / "config.toml").training.teacher is None


def test_the_point_of_a_preset_has_its_weights_of_modalities_and_only_what_can_be_chosen():
    modalities = ["image", "text"]
    config = RunConfig.create(graph="g", model="dream", overrides=["model.modality_weights={image=1.5, text=0.5}"])
    point = default_point(search_space("dream", modalities), config, modalities)
    assert point["model.modality_weights"] == 0.75
    with pytest.raises(ConfigError, match="names 'image', but the graph has features for 'audio', 'text'"):
        default_point({"model.modality_weights": ImageShare(0.0, 1.0, of_paper=0.3)}, config, ["audio", "text"])
    deep = RunConfig.create(graph="g", model="lightgcn", overrides=["model.num_layers=7"])
    with pytest.raises(ConfigError, match=r"model.num_layers is 7, which is none of .*--set model.num_layers=7"):
        default_point(search_space("lightgcn", []), deep, [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 1}, "seed is 1 here, 0 there"),
        ({"overrides": ["training.epochs=5"]}, "config.training.epochs is 5 here, 3 there"),
        ({"overrides": ["model.l2_weight=0.5"]}, "space.model.l2_weight.kind is None here, LogRange there"),
        ({"pruning_warmup": 3}, "pruning_warmup is 3 here, 10 there"),
    ],
)
def test_another_study_is_refused(finished: StudyResult, shop_graph: Path, options: dict, message: str):
    with pytest.raises(ResumeError) as caught:
        search(shop_graph, finished.path, **options)
    assert message in str(caught.value)


def test_a_study_of_another_graph_is_refused(finished: StudyResult, shop_graph: Path):
    described = json.loads((finished.path / "study.json").read_text())
    (finished.path / "study.json").write_text(json.dumps({**described, "graph_fingerprint": "0" * 64}))
    try:
        with pytest.raises(ResumeError, match=r"graph_fingerprint is .* here, 0000"):
            search(shop_graph, finished.path)
    finally:
        (finished.path / "study.json").write_text(json.dumps(described))


def test_a_directory_that_is_no_study_is_refused(shop_graph: Path, tmp_path: Path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(StoreError, match="is not a study"):
        search(shop_graph, tmp_path)


def test_a_directory_that_an_address_cannot_hold_is_refused(shop_graph: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"address in which '\?' means something else"):
        search(shop_graph, tmp_path / "what?")
    assert not (tmp_path / "what?").exists()


def test_a_study_cannot_begin_at_zero_on_a_logarithmic_scale(shop_graph: Path, tmp_path: Path):
    (tmp_path / "zero.toml").write_text('[bpr]\nsource = "a guess"\n[bpr.model]\nl2_weight = 0.0\n')
    with pytest.raises(ConfigError, match=r"model\.l2_weight is 0.*must be positive.*--set model\.l2_weight=0"):
        search(shop_graph, tmp_path / "study", preset=tmp_path / "zero.toml")
    assert not (tmp_path / "study").exists()


def test_the_metric_that_chooses_is_measured_on_test(shop_graph: Path, tmp_path: Path):
    result = search(shop_graph, tmp_path / "study", 1, overrides=["training.metric=mrr@7"])
    assert 0 <= result.test_metrics["mrr@7"] <= 1


def test_a_damaged_storage_is_named(shop_graph: Path, tmp_path: Path):
    search(shop_graph, tmp_path / "study", 1)
    (tmp_path / "study" / "study.db").write_bytes(b"no database" * 1000)
    with pytest.raises(StoreError, match=r"study\.db is damaged"):
        search(shop_graph, tmp_path / "study", 1)


def test_a_locked_storage_is_not_called_damaged(shop_graph: Path, tmp_path: Path, monkeypatch):
    search(shop_graph, tmp_path / "study", 1)
    engine = sqlalchemy.engine.create_engine
    impatient = {"connect_args": {"timeout": 0.1}}
    monkeypatch.setattr(sqlalchemy.engine, "create_engine", lambda url, **given: engine(url, **given | impatient))
    other = sqlite3.connect(tmp_path / "study" / "study.db")
    with other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StoreError, match=r"study\.db cannot be used: database is locked"):
            search(shop_graph, tmp_path / "study", 2)
    other.close()
    assert len(search(shop_graph, tmp_path / "study", 2).trials) == 2


def test_two_processes_do_not_work_on_one_study(shop_graph: Path, tmp_path: Path):
    search(shop_graph, tmp_path / "study", 1)
    handle = os.open(tmp_path / "study", os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(StoreError, match="Another process works on the study"):
            search(shop_graph, tmp_path / "study", 2)
    finally:
        os.close(handle)


def test_without_optuna_the_cure_is_named(shop_graph: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingExtraError) as caught:
        search(shop_graph, tmp_path / "study")
    assert 'pip install "dream-pyg[tune]"' in str(caught.value)
    assert not (tmp_path / "study").exists()
