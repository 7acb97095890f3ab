"""The benchmark of neighbour searches: what it measures, how it goes on, and what it refuses."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result as CommandResult

from dream_pyg.bench import engines, graph
from dream_pyg.bench.graph import Conditions, bench_graph, growth
from dream_pyg.bench.machine import describe_machine
from dream_pyg.bench.processes import Outcome, run_job
from dream_pyg.bench.recall import Reference
from dream_pyg.bench.report import write_report
from dream_pyg.bench.results import summarize
from dream_pyg.bench.runs import RunLog
from dream_pyg.bench.scaling import fit_power_law, ladder
from dream_pyg.bench.workloads import Source, Workload, find_workload, power_law_pairs
from dream_pyg.data.files import held
from dream_pyg.errors import ConfigError, DataError, Interrupted, StoreError
from dream_pyg.graph.knn import ArrayRows, cosine_knn

ROWS = np.random.default_rng(0).normal(size=(300, 16)).astype(np.float32)
WORKLOAD = Workload("small", 800, 16)
CONDITIONS = Conditions(num_neighbors=5, threads=1, repeats=2, limit=10.0, steps=2)


def true_neighbors(rows: np.ndarray, k: int) -> np.ndarray:
    unit = rows.astype(np.float64) / np.linalg.norm(rows, axis=1, keepdims=True)
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, -np.inf)
    return np.argsort(-cosine, axis=1, kind="stable")[:, :k]


@pytest.mark.parametrize("name", [name for name, one in engines.ENGINES.items() if one.kind != "yardstick"])
@pytest.mark.filterwarnings("ignore")
def test_every_installed_engine_finds_the_neighbours(name: str):
    engine = engines.ENGINES[name]
    if not engine.installed or name == "pynndescent":  # which compiles for a minute; the command is the same
        pytest.skip(f"{engine.package} is not installed, or slow to start")
    found = engine.build(ArrayRows(ROWS), 5, engine.settings[-1], 1)(engine.effort[1][-1])
    assert found is not None
    assert found.shape == (300, 5)
    assert not (found == np.arange(300)[:, None]).any()
    hits = np.mean([len(set(a) & set(b)) for a, b in zip(found, true_neighbors(ROWS, 5), strict=True)]) / 5
    assert hits == 1 if engine.kind == "exact" else hits > 0.95


@pytest.mark.parametrize("dtype", ["float64", "float16", "int32"])
def test_engines_take_any_real_type(dtype: str):
    rows = (ROWS * 100).astype(dtype)
    engine = engines.ENGINES["faiss-flat"]
    found = engine.build(ArrayRows(rows), 5, {}, 1)(None)
    assert found is not None
    assert Reference.compute(ArrayRows(rows), 5).recall(ArrayRows(rows), found) == 1


def test_the_type_of_an_exact_product_can_be_chosen(monkeypatch: pytest.MonkeyPatch):
    import torch

    from dream_pyg.graph import knn

    seen = []
    monkeypatch.setattr(knn, "exact_candidates", lambda *a, dtypes, **_: seen.extend(dtypes) or knn.flat_candidates(*a))
    for dtype in (torch.float32, torch.bfloat16):
        cosine_knn(ArrayRows(ROWS), 5, dtype=dtype)
    assert seen == [torch.float32, torch.bfloat16]


def test_recall_counts_distinct_true_neighbours():
    rows = ArrayRows(ROWS)
    truth = true_neighbors(ROWS, 4)
    reference = Reference.compute(rows, 4)
    assert reference.recall(rows, truth) == 1
    damaged = truth.copy()
    damaged[:, 0] = truth[:, 1]  # twice
    damaged[:, 2] = np.arange(300)  # itself
    assert reference.recall(rows, damaged) == pytest.approx(0.5)
    damaged[:, 3] = -1
    assert reference.recall(rows, damaged) == pytest.approx(0.25)
    far = np.argsort(-(ROWS @ ROWS.T), axis=1)[:, -4:]
    assert reference.recall(rows, far) == 0


def test_recall_takes_ties_and_rows_of_zeros():
    rows = np.tile(np.eye(4, dtype=np.float32), (5, 1))
    rows[4] = 0
    reference = Reference.compute(ArrayRows(rows), 2)
    assert 4 not in reference.row
    same = np.array([[j for j in range(19, -1, -1) if j % 4 == i % 4 and j not in (i, 4)][:2] for i in range(20)])
    assert reference.recall(ArrayRows(rows), same) == 1
    assert reference.recall(ArrayRows(rows), np.full((20, 2), 4)) == 0


@pytest.mark.parametrize(("exponent", "factor"), [(1.0, 2e-3), (1.73, 4e-7), (2.0, 1e-9)])
def test_the_fit_recovers_a_power_law(exponent: float, factor: float):
    sizes = [500, 1000, 4000, 9000]
    law = fit_power_law(sizes, [factor * n**exponent for n in sizes])
    assert law is not None
    assert (law.exponent, law.factor, law.num_sizes) == (pytest.approx(exponent), pytest.approx(factor), 4)
    assert law(63_001) == pytest.approx(factor * 63_001**exponent)


def test_the_fit_minimises_squared_logarithms():
    sizes, seconds = [100, 300, 1000], [0.02, 0.3, 1.7]
    law = fit_power_law(sizes, seconds)
    x, y = np.log(sizes) - np.log(sizes).mean(), np.log(seconds) - np.log(seconds).mean()
    assert law is not None
    assert law.exponent == pytest.approx((x @ y) / (x @ x))
    assert fit_power_law([100, 100], [1, 2]) is None


def test_sizes_halve_down_to_a_bound():
    assert ladder(1000, 3, 200) == [250, 500, 1000]
    assert ladder(1000, 0, 200) == [1000]
    assert ladder(50, 3, 200) == [50]


@pytest.mark.parametrize("distribution", ["clustered", "gaussian"])
def test_generated_rows_are_seeded(tmp_path: Path, distribution: Any):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / name).mkdir()
        find_workload("400x16", distribution=distribution, seed=seed).write(tmp_path / name)
    a, b, c = (np.load(tmp_path / name / "features.npy") for name in "abc")
    np.testing.assert_array_equal(a, b)
    assert not (a == c).any()
    # Rows of one cluster are near each other; independent rows of 16 features are not.
    nearest = cosine_knn(ArrayRows(a), 5).similarity.mean()
    assert nearest > 0.85 if distribution == "clustered" else nearest < 0.75


def test_user_rows_are_means_of_items(tmp_path: Path):
    workload = Workload("users", 30, 4, num_items=20, num_pairs=100)
    source = workload.write(tmp_path)
    pairs, items = np.load(source.pairs), np.load(source.features)
    expected = np.stack([items[pairs[1, pairs[0] == user]].mean(axis=0) for user in range(12)])
    np.testing.assert_allclose(source.open(12).take(0, 12), expected, rtol=1e-5, atol=1e-6)


def test_pairs_follow_power_laws():
    pairs = power_law_pairs(400, 300, 3000, seed=0)
    assert pairs.shape == (2, 3000)
    assert len(np.unique(pairs, axis=1).T) == 3000
    activity, popularity = np.bincount(pairs[0], minlength=400), np.sort(np.bincount(pairs[1], minlength=300))
    assert activity.min() >= 1
    assert popularity[-30:].sum() > 2 * popularity[:150].sum()


class Machinery:
    """Stands in for the processes: seconds by a formula, and what was asked for."""

    def __init__(self, exponents: dict[str, float], scale: float = 1e-6) -> None:
        self.exponents = exponents
        self.scale = scale
        self.jobs: list[tuple[Any, ...]] = []

    def __call__(self, job: dict[str, Any], threads: int, limit: float) -> Outcome:
        """Answer a job as its process would."""
        if job["job"] == "gemm":
            return Outcome(events={"rates": [{"fp32": 100.0, "bf16": 300.0, "int8": 600.0}]})
        if job["job"] == "reference":
            return Outcome()
        self.jobs.append((job["engine"], job["num_rows"], tuple(job["setting"].values()), tuple(job["efforts"])))
        seconds = self.scale * job["num_rows"] ** self.exponents[job["engine"]]
        if seconds > limit:
            return Outcome("stopped", "longer")
        step = {
            "build_seconds": 0.0, "search_seconds": seconds, "seconds": seconds, "peak_bytes": 3e8, "extra_bytes": 1e8
        }  # fmt: skip
        name = engines.ENGINES[job["engine"]].effort[0]
        recalls = [0.9, 0.99] if name else [1.0]
        return Outcome(
            events={
                "point": [
                    {**step, "seconds": seconds * (1 + n), "effort": {name: e} if name else {}, "recall": r}
                    for n, (e, r) in enumerate(zip(job["efforts"], recalls, strict=False))
                ]
            }
        )


@pytest.fixture
def machinery(monkeypatch: pytest.MonkeyPatch) -> Machinery:
    stand_in = Machinery({"exact-fp32": 2.0, "faiss-flat": 2.0, "faiss-hnsw": 1.2})
    monkeypatch.setattr(graph, "run_job", stand_in)
    return stand_in


def test_the_cheapest_setting_that_reaches_the_recall_is_repeated(machinery: Machinery, tmp_path: Path):
    conditions = replace(CONDITIONS, steps=0)
    log = bench_graph([WORKLOAD], ["faiss-hnsw"], tmp_path, conditions)
    first, second = (log.find(conditions.key(WORKLOAD, 800, "faiss-hnsw", n)) for n in range(2))
    assert first is not None
    assert second is not None
    assert len(first["points"]) == 4  # two settings, of each the effort that fails and the one that does not
    assert (first["best"]["effort"], first["best"]["setting"]["M"]) == ({"efSearch": 32}, 16)
    assert machinery.jobs[-1][2:] == (tuple(first["best"]["setting"].values()), (32,))
    (result,) = summarize(log, [WORKLOAD], ["faiss-hnsw"], conditions)
    assert result.recall == pytest.approx((0.99 + 0.9) / 2)  # the stand-in gives a first effort 0.9
    assert result.setting == "M 16, efConstruction 40, efSearch 32"


def test_what_is_done_is_not_done_again(machinery: Machinery, tmp_path: Path):
    bench_graph([WORKLOAD], ["exact-fp32"], tmp_path, CONDITIONS)
    assert [job[:2] for job in machinery.jobs] == [("exact-fp32", n) for n in (200, 400, 800, 800)]
    runs = tmp_path / "runs.jsonl"
    whole = runs.read_bytes()
    runs.write_bytes(whole[:-30])  # as a crash leaves it
    machinery.jobs.clear()
    log = bench_graph([WORKLOAD], ["exact-fp32", "faiss-flat"], tmp_path, CONDITIONS)
    assert machinery.jobs[0][:2] == ("faiss-flat", 200)
    assert [job[1] for job in machinery.jobs if job[0] == "exact-fp32"] == [800]
    assert len(log.runs) == 9
    assert all(json.loads(line) for line in runs.read_text().splitlines())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_only_what_was_measured(
    machinery: Machinery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
):
    (tmp_path / ".rows-of-a-killed-process").mkdir()

    def signalled(job: dict[str, Any], threads: int, limit: float) -> Outcome:
        if len(machinery.jobs) == 2:
            signal.raise_signal(number)
        return machinery(job, threads, limit)

    monkeypatch.setattr(graph, "run_job", signalled)
    with pytest.raises(Interrupted, match=r"what there is of the benchmark at .* is saved\. Continue with"):
        bench_graph([WORKLOAD], ["exact-fp32"], tmp_path, CONDITIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["runs.jsonl"]
    monkeypatch.setattr(graph, "run_job", machinery)
    bench_graph([WORKLOAD], ["exact-fp32"], tmp_path, CONDITIONS)
    assert [job[:2] for job in machinery.jobs] == [("exact-fp32", n) for n in (200, 400, 800, 800)]


def test_two_cannot_measure_into_one_directory(machinery: Machinery, tmp_path: Path):
    runs = tmp_path / "runs.jsonl"
    runs.write_text('{"machine": of the one that has not ended its li')
    before = runs.read_bytes()
    with held(tmp_path, "the benchmark"), pytest.raises(StoreError, match="Another process works on the benchmark"):
        bench_graph([WORKLOAD], ["exact-fp32"], tmp_path, CONDITIONS)
    assert runs.read_bytes() == before
    assert not machinery.jobs


def test_what_would_take_too_long_is_extrapolated(machinery: Machinery, tmp_path: Path):
    short = replace(CONDITIONS, limit=0.3)  # 400 rows take 0.16 s, 800 would take 0.64 s
    log = bench_graph([WORKLOAD], ["exact-fp32"], tmp_path, short)
    assert [job[1] for job in machinery.jobs] == [200, 400]
    result = summarize(log, [WORKLOAD], ["exact-fp32"], short)[-1]
    assert (result.status, result.num_sizes) == ("extrapolated", 2)
    assert result.seconds == pytest.approx((0.64,))
    assert result.exponent == pytest.approx(2)
    bench_graph([WORKLOAD], ["exact-fp32"], tmp_path, CONDITIONS)  # with more time
    assert [job[1] for job in machinery.jobs] == [200, 400, 800, 800]


def test_rates_count_the_whole_product(machinery: Machinery, tmp_path: Path):
    log = bench_graph([WORKLOAD], ["exact-fp32"], tmp_path, CONDITIONS)
    result = summarize(log, [WORKLOAD], ["exact-fp32"], CONDITIONS)[-1]
    assert result.gflops == pytest.approx(2 * 800 * 800 * 16 / 0.64 / 1e9)
    assert result.gemm_share == pytest.approx(result.gflops / 100)


def test_growth_is_that_of_the_largest_sizes(machinery: Machinery, tmp_path: Path):
    large = Workload("large", 3200, 16)
    conditions = replace(CONDITIONS, steps=4, limit=100.0)
    log = bench_graph([large], ["exact-fp32"], tmp_path, conditions)
    for num_rows in (200, 400):  # two sizes that mostly start
        log.add(log.find(conditions.key(large, num_rows, "exact-fp32", 0)) | {"best": {"seconds": 5.0}})  # type: ignore[operator]
    law = growth(log, large, "exact-fp32", conditions, 3201)
    assert law is not None
    assert (law.exponent, law.num_sizes) == (pytest.approx(2), 3)


def test_report_and_plots_are_written(machinery: Machinery, tmp_path: Path):
    pytest.importorskip("matplotlib")
    names = ["exact-fp32", "faiss-hnsw", "faiss-flat"]
    short = replace(CONDITIONS, limit=0.3)
    log = bench_graph([WORKLOAD], names, tmp_path, short)
    _, written = write_report(log, [WORKLOAD], names, short, tmp_path)
    assert {path.name for path in written} == {
        "report.md", "time-small.png", "time-small.svg", "recall-small.png", "recall-small.svg",
    }  # fmt: skip
    report = (tmp_path / "report.md").read_text()
    assert "## small: 800 x 16" in report
    assert "~0.64" in report.split("## small: 800 x 16")[1]
    assert "| ~" not in report.split("## small: 800 x 16")[0]


def test_a_package_that_is_absent_is_said_to_be(machinery: Machinery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    absent = replace(engines.ENGINES["hnswlib"], package="surely_not_installed")
    monkeypatch.setitem(engines.ENGINES, "hnswlib", absent)
    log = bench_graph([WORKLOAD], ["hnswlib"], tmp_path, CONDITIONS)
    results = summarize(log, [WORKLOAD], ["hnswlib"], CONDITIONS)
    assert {result.status for result in results} == {"not installed"}
    assert not log.settled(CONDITIONS.key(WORKLOAD, 800, "hnswlib", 0), 1.0)


@pytest.mark.slow
def test_the_command_measures_in_processes_of_their_own(
    command: Callable[..., CommandResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(graph, "_GEMM_SIZE", 64)
    monkeypatch.setattr(graph, "_GEMM_SECONDS", 0.01)
    np.save(tmp_path / "mine.npy", ROWS.astype(np.float64))
    arguments = ["bench", "graph", "--dataset", tmp_path / "mine.npy", "--engine", "exact-fp32", "--engine",
                 "faiss-hnsw", "--engine", "numpy-product", "-k", 5, "--threads", 1, "--repeats", 1, "--steps", 0,
                 "--out", tmp_path / "out", "--format", "json"]  # fmt: skip
    result = command(*arguments)
    assert result.exit_code == 0, result.stderr
    exact, hnsw, product = json.loads(result.stdout)
    assert (exact["status"], exact["recall"]) == ("done", 1)
    assert exact["gemm_share"] > 0
    assert hnsw["recall"] >= 0.98
    assert product["recall"] is None
    names = {path.name for path in (tmp_path / "out").iterdir() if path.suffix not in (".png", ".svg")}
    assert names == {"report.md", "runs.jsonl"}  # and the rows are gone
    before = (tmp_path / "out" / "runs.jsonl").read_bytes()
    assert command(*arguments).exit_code == 0
    assert (tmp_path / "out" / "runs.jsonl").read_bytes() == before


@pytest.mark.slow
def test_jobs_that_fail_or_last_too_long_say_so(tmp_path: Path):
    np.save(tmp_path / "rows.npy", ROWS)
    Reference.compute(ArrayRows(ROWS), 5).save(tmp_path / "reference.npz")
    job = {
        "job": "engine", "engine": "faiss-nsg", "k": 5, "setting": {"R": 16, "GK": 32}, "efforts": [16],
        "min_recall": 1, "source": vars(Source(str(tmp_path / "rows.npy"), "")), "num_rows": 50,
        "reference": str(tmp_path / "reference.npz"),
    }  # fmt: skip
    failed = run_job(job, 1, 60)
    assert failed.status == "failed"
    assert "smaller than 100" in failed.message
    assert run_job({**job, "num_rows": 300}, 1, 1e-9).status == "stopped"


def test_runs_of_another_machine_and_damaged_runs_are_refused(tmp_path: Path):
    machine = describe_machine()
    RunLog(tmp_path / "runs.jsonl", machine)
    with pytest.raises(StoreError, match="another machine"):
        RunLog(tmp_path / "runs.jsonl", {**machine, "cores": 1000})
    (tmp_path / "runs.jsonl").write_text('{"key": {}, "status"\n')
    with pytest.raises(StoreError, match="line 1 is no run"):
        RunLog(tmp_path / "runs.jsonl", machine)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (np.array([[1.0, np.nan], [1, 2], [2, 1]]), "nan in row 0, column 1"),
        (np.array([[1.0, 2], [1, np.inf], [2, 1]]), "inf in row 1, column 1"),
        (np.array([[1.0, 2], [1, 1e300], [2, 1]]), r"1e\+300 in row 1"),
        (np.ones((1, 4)), "1 rows"),
        (np.ones((4, 1)), "1 features"),
        (np.ones(4), r"must be a matrix .* float64 \(4,\)"),
        (np.ones((4, 2), dtype=complex), "real numbers"),
        (np.array([["a", "b"], ["c", "d"]]), "real numbers"),
        (np.eye(4, 4, k=3), "1 rows that differ from zero"),
    ],
    ids=["nan", "inf", "overflow", "one row", "one feature", "vector", "complex", "text", "zeros"],
)
def test_matrices_that_cannot_be_searched_are_refused(tmp_path: Path, matrix: np.ndarray, message: str):
    np.save(tmp_path / "rows.npy", matrix)
    with pytest.raises(DataError, match=message):
        find_workload(str(tmp_path / "rows.npy"))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--dataset", "bbay"], 2, "Did you mean 'baby'?"),
        (["--dataset", "missing.npy"], 1, "missing"),
        (["--dataset", "1x20"], 2, "at least 2"),
        (["--dataset", "20x1"], 2, "1 features"),
        (["--dataset", "300x8", "--engine", "fais-flat"], 2, "Did you mean 'faiss-flat'?"),
        (["--dataset", "300x8", "-k", "300"], 2, "below the 300 rows"),
        (["-k", "0"], 2, "num_neighbors must be at least 1"),
        (["--threads", "0"], 2, "threads must be"),
        (["--limit", "0"], 2, "limit must be"),
        (["--min-recall", "1.5"], 2, "min_recall must be"),
        (["--steps", "-1"], 2, "steps must not be negative"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_error(
    command: Callable[..., CommandResult], tmp_path: Path, arguments: list[str], code: int, message: str
):
    result = command("bench", "graph", "--out", tmp_path / "out", *arguments)
    assert result.exit_code == code
    assert message in result.stderr
    assert [line.startswith("Error: ") for line in result.stderr.splitlines()] == [True]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("other", ["there/300x8.npy", "300x8"])
def test_data_sets_of_one_name_are_refused(command: Callable[..., CommandResult], tmp_path: Path, other: str):
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        np.save(tmp_path / place / "300x8.npy", ROWS)
    first, second = tmp_path / "here" / "300x8.npy", tmp_path / other if "/" in other else other
    result = command("bench", "graph", "--out", tmp_path / "out", "--dataset", first, "--dataset", second)
    assert result.exit_code == 2
    named = second if "/" in other else "a generated data set"
    assert result.stderr.startswith(f"Error: Two data sets are called '300x8': {first} and {named}. ")
    assert not (tmp_path / "out").exists()


def test_conditions_are_checked_in_python_too():
    with pytest.raises(ConfigError, match="repeats"):
        Conditions(repeats=0)
