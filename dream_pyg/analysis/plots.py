"""Drawing the paper's figures from their tables: one function a figure, readable in print and without colour vision."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from dream_pyg.data.files import atomic_path
from dream_pyg.errors import MissingExtraError

# Okabe and Ito's palette, distinct for every kind of colour vision; markers and dashes tell series apart without
# colour, and let one curve show through another.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", ":", "-.")
_LINE_COLORS = {"behavior": COLORS[0], "modal": COLORS[1], "general": COLORS[2]}
_HATCHES = {"behavior": "", "modal": "//", "general": ".."}
_NODE_NAMES = {"user": "Users", "item": "Items"}
_KEY_NAMES = {
    "signal_weight": "Signal weight \u03b3",
    "intra_weight": "Intra-alignment weight \u03b1",
    "inter_weight": "Inter-alignment weight \u03b2",
}
_PANEL = (5.6, 4.2)  # inches
_GROUP = 1.9  # inches of a group of bars
_LETTERS_PER_INCH = 9
_HANDLE = 6  # letters that a handle in a legend takes
_SLANTED = 0.27  # inches between labels at 45 degrees
_NO_SPACE = "\u200b"
_NO_BREAK = "\u00a0"
_STYLE = {
    "font.size": 13,
    "axes.titlesize": 14,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "lines.linewidth": 2.0,
    "lines.markersize": 7,
    "text.parse_math": False,  # names of runs are the user's
    "svg.hashsalt": "dream_pyg",  # without, the ids in an SVG are random
}


def require_plots() -> None:
    """Check that what the extra ``plots`` installs is there.

    Raises:
        MissingExtraError: If not.
    """
    try:
        import matplotlib  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            f'Figures need matplotlib and scikit-learn ({error}). Install them with pip install "dream-pyg[plots]".'
        ) from error


def write_picture(figure: Any, path: Path) -> None:
    """Write a figure atomically, in the format of the path's suffix; the same figure gives the same bytes."""
    with _style(), atomic_path(path) as temporary:
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(temporary, format=path.suffix[1:], dpi=150, metadata=metadata)


def draw_gradient_conflict(table: pl.DataFrame) -> Any:
    """Figure 1a: the cosine of both gradients over epochs, and below it the share of nodes in conflict."""
    with _panels(["user", "item"], rows=2, sharey="row") as (figure, axes):
        for node, (top, bottom) in zip(_NODE_NAMES, axes.T, strict=True):
            for index, label, run in _runs(table, pl.col("nodes") == node):
                epoch = run["epoch"]
                top.fill_between(
                    epoch, run["cosine_q25"], run["cosine_q75"], color=_look(index)["color"], alpha=0.15, lw=0
                )
                _curve(top, index, epoch, run["cosine"], label)
                _curve(bottom, index, epoch, 100 * run["conflict_share"], label)
            for axis in (top, bottom):
                if not axis.lines:
                    _say(axis, f"No {node} embeddings\nare shared by both lines")
                _epochs(axis)
            top.axhline(0, color="black", linewidth=1)
            top.set(title=_NODE_NAMES[node], ylim=(-1.05, 1.05))
        bottom.set_ylim(bottom=0)
        axes[0, 0].set_ylabel("Cosine of gradients\n(mean and quartiles)")
        axes[1, 0].set_ylabel("Nodes in conflict\n(cosine < 0), %")
        _legend(figure, axes)
    return figure


def draw_modal_forgetting(table: pl.DataFrame) -> Any:
    """Figure 1b: distance from the raw features over epochs, a panel for each modality."""
    modalities = table["modality"].unique(maintain_order=True).to_list()
    return _curves(table, "modality", {name: f"{name.capitalize()} features" for name in modalities},
                   "Cosine distance to\nraw similarity structure")  # fmt: skip


def draw_line_distance(table: pl.DataFrame) -> Any:
    """Figure 6: distance between the two lines over epochs, users and items apart."""
    return _curves(table, "nodes", _NODE_NAMES, "Cosine distance of behavior\nand modal representation")


def draw_line_scores(table: pl.DataFrame) -> Any:
    """Figure 5: a group of bars for each run, a panel for each metric."""
    metrics = [column for column in table.columns if "@" in column]
    runs = table["run"].unique(maintain_order=True).to_list()
    datasets = table.group_by("run", maintain_order=True).first()["dataset"].to_list()
    ticks = runs if len(set(datasets)) == 1 else [f"{run}\n({of})" for run, of in zip(runs, datasets, strict=True)]
    width, panel = 0.8 / len(_LINE_COLORS), max(_PANEL[0], _GROUP * len(runs))
    ticks = [_wrapped(tick, 0.75 * panel / len(runs)) for tick in ticks]  # the rest is margins and numbers
    with _panels(metrics, width=panel) as (figure, axes):
        for metric, axis in zip(metrics, axes.flat, strict=True):
            for index, (line, color) in enumerate(_LINE_COLORS.items()):
                place = np.arange(len(runs)) + (index - 1) * width
                bars = axis.bar(place, table.filter(line=line)[metric], 0.92 * width, color=color,
                                hatch=_HATCHES[line], edgecolor="white", label=line.capitalize())  # fmt: skip
                axis.bar_label(bars, fmt="%.4f", fontsize=10, rotation=90, padding=3)
            axis.set_ylabel(f"Test {_metric_name(metric)}")
            axis.set_xticks(range(len(runs)), ticks)
            axis.margins(y=0.22)
            axis.grid(visible=False, axis="x")
        _legend(figure, axes)
    return figure


def draw_line_map(table: pl.DataFrame) -> Any:
    """Figure 7: both representations of each node in one plane, joined by a dashed line; a panel for each run."""
    runs = table["run"].unique(maintain_order=True).to_list()
    side = 7.0
    with _panels(runs, width=side, height=side) as (figure, axes):
        for (label, run), axis in zip(_groups(table, "run"), axes.flat, strict=True):
            ends_x, ends_y = (run[f"behavior_{x}", f"modal_{x}"].to_numpy().T for x in "xy")  # each (2, nodes)
            pairs = axis.plot(ends_x, ends_y, color="grey", linestyle="--", linewidth=0.6, alpha=0.5, zorder=1)
            pairs[0].set_label("Same user or item")
            for line, x, y, marker in zip(("behavior", "modal"), ends_x, ends_y, "so", strict=True):
                look = {"color": _LINE_COLORS[line], "marker": marker, "edgecolor": "white", "linewidth": 0.3}
                axis.scatter(x, y, s=16, zorder=2, label=f"{line.capitalize()} representation", **look)
            nodes = f"({len(run):,} users and items)".replace(" ", _NO_BREAK)
            title = _wrapped(f"{label} {nodes}", 0.9 * side)  # its letters are larger
            axis.set(title=title, xlabel="t-SNE 1", ylabel="t-SNE 2")
            axis.set(xticks=[], yticks=[])
        _legend(figure, axes, markerscale=2)
    return figure


def draw_sensitivity(table: pl.DataFrame) -> Any:
    """Figures 8 and 9: a metric against hyper-parameters, a panel for each, with a series for the others' values."""
    keys = table["key"].unique(maintain_order=True).to_list()
    metric, repeated = table["metric"][0], max(table["num_runs"]) > 1
    with _panels(keys, sharey=True) as (figure, axes):
        for (key, of_key), axis in zip(_groups(table, "key"), axes.flat, strict=True):
            for index, (series, points) in enumerate(_groups(of_key, "series")):
                axis.errorbar(
                    *points["value", "mean", "std"],
                    **_look(index),
                    elinewidth=1.2,
                    capsize=4,
                    label=series.replace("_", " "),
                )
            _scale(axis, of_key["value"].unique().sort().to_numpy())
            axis.set_xlabel(_key_name(key))
            axis.legend(fontsize=11, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)  # covers no curve
        spread = "\n(mean ± std over seeds)" if repeated else ""
        axes[0, 0].set_ylabel(f"Test {_metric_name(metric)}{spread}")
    return figure


def draw_accuracy(table: pl.DataFrame) -> Any:
    """The table of accuracy: a metric over all, and its values for groups of items and of users, a bar a system."""
    systems = table["system"].unique(maintain_order=True).to_list()
    overall = table["metric"][0]
    panels = {f"Test {_metric_name(overall)}": [overall]}
    for kind in ("items", "users"):
        panels[f"... of groups of {kind}"] = table.filter(pl.col("metric").str.ends_with(f" {kind}"))["metric"].unique(
            maintain_order=True
        ).to_list()  # fmt: skip
    place = np.arange(len(systems))
    with _panels(list(panels), width=5.0, height=0.75 * len(systems) + 1, sharey=True) as (figure, axes):
        for (title, metrics), axis in zip(panels.items(), axes.flat, strict=True):
            height = 0.8 / len(metrics)
            for index, metric in enumerate(metrics):
                of_metric = table.filter(metric=metric)
                shift = (index - (len(metrics) - 1) / 2) * height
                name = metric.partition(" of ")[2].partition(" ")[0]
                look = {"color": COLORS[index], "hatch": ("", "//", "..")[index], "edgecolor": "white"}
                spread = {"xerr": of_metric["std"].fill_null(0), "error_kw": {"elinewidth": 1.2, "capsize": 2}}
                bars = axis.barh(place + shift, of_metric["mean"], 0.92 * height, label=name, **look, **spread)
                if len(metrics) == 1:
                    axis.bar_label(bars, fmt="%.4f", fontsize=11, padding=4)
            axis.set(title=title, yticks=place, yticklabels=systems)
            axis.margins(x=0.2 if len(metrics) == 1 else 0.05)
            axis.grid(visible=False, axis="y")
            if len(metrics) > 1:
                axis.legend(fontsize=11, loc="upper center", bbox_to_anchor=(0.5, -0.04), ncols=len(metrics))
        axes[0, 0].invert_yaxis()
    return figure


def _curves(table: pl.DataFrame, panel: str, titles: dict[str, str], ylabel: str) -> Any:
    """A curve over epochs for each run, in a panel for each value of a column."""
    with _panels(list(titles), sharey=True) as (figure, axes):
        for (value, title), axis in zip(titles.items(), axes.flat, strict=True):
            for index, label, run in _runs(table, pl.col(panel) == value):
                _curve(axis, index, run["epoch"], run["distance"], label)
            _epochs(axis)
            axis.set(title=title)
        axes[0, 0].set(ylabel=ylabel, ylim=(min(0.0, axes[0, 0].get_ylim()[0]), None))
        _legend(figure, axes)
    return figure


def _runs(table: pl.DataFrame, shown: pl.Expr) -> Iterator[tuple[int, str, pl.DataFrame]]:
    """The runs with something to show in a panel: the number of each in the whole table, its label and that part."""
    for index, (label, run) in enumerate(_groups(table, "run")):
        part = run.filter(shown)
        if len(part):
            yield index, label, part


def _say(axis: Any, text: str) -> None:
    """Write why a panel is empty."""
    axis.text(0.5, 0.75, text, transform=axis.transAxes, ha="center", va="center")


def _curve(axis: Any, index: int, x: pl.Series, y: pl.Series, label: str) -> None:
    every = max(1, len(x) // 10)
    axis.plot(x, y, **_look(index), markevery=(index % every, every), label=label, clip_on=False)


def _epochs(axis: Any) -> None:
    axis.set_xlabel("Epoch")
    axis.xaxis.get_major_locator().set_params(integer=True)


def _scale(axis: Any, values: Any) -> None:
    """Weights that span orders of magnitude stand on a logarithmic axis, with 0 at its left end."""
    positive = values[values > 0]
    if len(positive) > 1 and positive[-1] / positive[0] >= 10:
        axis.set_xscale("symlog", linthresh=positive[0])
    _label_ticks(axis, values)
    axis.minorticks_off()


def _label_ticks(axis: Any, values: Any) -> None:
    """A tick at each value, and a label where there is room: slanted if they do not fit upright."""
    labels = [f"{value:g}" for value in values]
    axis.get_xlim()  # makes the axis fit its curves
    places = (axis.transScale + axis.transLimits).transform([(value, 0.0) for value in values])[:, 0]
    places *= 0.8 * _PANEL[0]  # inches
    longest = (max(map(len, labels)) + 1) / _LETTERS_PER_INCH
    if np.all(np.diff(places) >= longest):
        axis.set_xticks(values, labels)
        return
    last = -np.inf
    for index, place in enumerate(places):
        if place - last < _SLANTED:
            labels[index] = ""
        else:
            last = place
    axis.set_xticks(values, labels, rotation=45, ha="right", rotation_mode="anchor")


def _wrapped(text: str, inches: float) -> str:
    """Text broken into lines of a width; lines that it has stay."""
    letters = max(1, int(_LETTERS_PER_INCH * inches))
    return "\n".join(textwrap.fill(line, letters) for line in text.split("\n"))


@contextmanager
def _panels(
    names: Sequence[str],
    *,
    rows: int = 1,
    width: float = _PANEL[0],
    height: float = _PANEL[1],
    sharey: bool | Literal["row"] = False,
) -> Iterator[tuple[Any, Any]]:
    """A figure with a column of panels for each name, in our style; axes (rows, columns)."""
    from matplotlib.figure import Figure  # no pyplot: nothing global, no window

    with _style():
        figure = Figure(figsize=(width * len(names), height * rows), layout="constrained")
        yield figure, figure.subplots(rows, len(names), sharey=sharey, squeeze=False)


@contextmanager
def _style() -> Iterator[None]:
    import matplotlib.style

    with matplotlib.style.context(["default", _STYLE]):  # whatever the user's own settings are
        yield


def _legend(figure: Any, axes: Any, **options: Any) -> None:
    """One legend above all panels, of whatever is in one of them."""
    handles: dict[str, Any] = {}
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    letters = int(_LETTERS_PER_INCH * figure.get_figwidth())
    labels = [textwrap.fill(label, letters - _HANDLE) for label in handles]
    longest = max(len(line) for label in labels for line in label.split("\n")) + _HANDLE
    rows = -(-len(labels) * longest // letters)
    figure.legend(handles.values(), labels, loc="outside upper center", ncols=-(-len(labels) // rows), **options)


def _groups(table: pl.DataFrame, column: str) -> list[tuple[str, pl.DataFrame]]:
    """The parts of a table with their labels; Matplotlib keeps those that begin with an underscore out of legends."""
    groups = ((str(name), part) for (name,), part in table.group_by(column, maintain_order=True))
    return [(_NO_SPACE + name if name.startswith("_") else name, part) for name, part in groups]


def _look(index: int) -> dict[str, str]:
    """How the curve of an index looks."""
    cycle = index // len(COLORS)
    return {
        "color": COLORS[index % len(COLORS)],
        "marker": MARKERS[(index + cycle) % len(MARKERS)],
        "linestyle": DASHES[(index + cycle // len(MARKERS)) % len(DASHES)],
    }


def _metric_name(metric: str) -> str:
    name, _, k = metric.partition("@")
    return f"{name.upper() if name in ('ndcg', 'map', 'mrr') else name.capitalize()}@{k}"


def _key_name(key: str) -> str:
    return _KEY_NAMES.get(key, key.replace("_", " ").capitalize())
