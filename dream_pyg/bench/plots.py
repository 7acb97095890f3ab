"""Time against the number of rows, and recall against time, as PNG and SVG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dream_pyg.bench.engines import ENGINES
from dream_pyg.bench.graph import Conditions
from dream_pyg.bench.results import Result, points
from dream_pyg.bench.runs import RunLog
from dream_pyg.bench.workloads import Workload
from dream_pyg.data.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS = "osD^vP*Xh<>p"
_FORMATS = ("png", "svg")
_LEAST_RECALL_SHOWN = 0.5


def plot_workload(
    log: RunLog, results: Sequence[Result], workload: Workload, conditions: Conditions, out: Path
) -> list[Path]:
    """Draw both figures of a workload, each where there is something to see.

    Returns:
        The files that were written.
    """
    mine = [result for result in results if result.workload == workload.name]
    engines = list(dict.fromkeys(result.engine for result in mine))
    written = []
    for name, draw in (("time", _draw_time), ("recall", _draw_recall)):
        figure, axes = _figure()
        if draw(axes, log, mine, workload, engines, conditions):
            axes.set_title(f"{workload.name}: {workload.num_features:,} features, K = {conditions.num_neighbors}, "
                           f"{conditions.threads} thread{'s' * (conditions.threads > 1)}", fontsize=10)  # fmt: skip
            axes.grid(True, which="major", alpha=0.3)
            axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)
            for suffix in _FORMATS:
                path = out / f"{name}-{workload.name}.{suffix}"
                with atomic_path(path) as temporary:
                    figure.savefig(temporary, format=suffix, dpi=150, bbox_inches="tight")
                written.append(path)
    return written


def _figure() -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5))  # without pyplot, whose state and backend belong to the caller
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _style(engine: str) -> dict[str, Any]:
    """The same colour and marker for an engine in every figure; exact engines are solid, others dashed."""
    from matplotlib import colormaps

    place = list(ENGINES).index(engine)
    return {
        "color": colormaps["tab20"](place % 20),
        "marker": _MARKERS[place % len(_MARKERS)],
        "linestyle": "--" if ENGINES[engine].kind == "approximate" else "-",
        "markersize": 5,
    }


def _draw_time(
    axes: Axes,
    log: RunLog,
    results: Sequence[Result],
    workload: Workload,
    engines: Sequence[str],
    conditions: Conditions,
) -> bool:
    drawn = False
    for engine in engines:
        timed = [result for result in results if result.engine == engine and result.seconds]
        if not timed:
            continue
        drawn = True
        style = _style(engine)
        exponent = timed[-1].exponent
        label = engine if exponent is None else f"{engine}  n^{exponent:.2f}"
        rows = [result.num_rows for result in timed]
        median = [result.seconds[len(result.seconds) // 2] for result in timed]
        measured = [place for place, result in enumerate(timed) if result.status != "extrapolated"]
        guessed = [place for place, result in enumerate(timed) if result.status == "extrapolated"]
        axes.plot(rows, median, **style, markevery=measured, label=label)
        axes.plot(rows, median, **{**style, "linestyle": ""}, markevery=guessed, markerfacecolor="white")
    axes.set(xscale="log", yscale="log", xlabel="rows (hollow: extrapolated)", ylabel="seconds (median)")
    rows = sorted({result.num_rows for result in results})
    axes.set_xticks(rows, [f"{count:,}" for count in rows], rotation=30)
    axes.set_xticks([], minor=True)
    return drawn


def _draw_recall(
    axes: Axes,
    log: RunLog,
    results: Sequence[Result],
    workload: Workload,
    engines: Sequence[str],
    conditions: Conditions,
) -> bool:
    measured = [result.num_rows for result in results if result.recall is not None]
    if not measured:
        return False
    num_rows = max(measured)
    for engine in engines:
        tried = sorted(points(log, workload, num_rows, engine, conditions), key=lambda point: point["recall"])
        shown = [point for point in tried if point["recall"] >= _LEAST_RECALL_SHOWN]
        if shown:
            style = {**_style(engine), "linestyle": ""}
            axes.plot([p["recall"] for p in shown], [p["seconds"] for p in shown], **style, label=engine)
    axes.axvline(conditions.min_recall, color="grey", linewidth=0.8, linestyle=":")
    axes.set(yscale="log", xlabel=f"recall@{conditions.num_neighbors}, {num_rows:,} rows", ylabel="seconds")
    return True
