"""What is drawn says what it shows: labels, legends, curves."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import polars as pl
import pytest
from matplotlib.figure import Figure

from dream_pyg.analysis.plots import (
    draw_gradient_conflict,
    draw_line_distance,
    draw_line_map,
    draw_line_scores,
    draw_modal_forgetting,
    draw_sensitivity,
    write_picture,
)

RUNS = ["with", "without"]


def legend(figure: Figure) -> list[str]:
    """The texts of the figure's one legend."""
    (only,) = figure.legends
    return [text.get_text() for text in only.get_texts()]


def curves(axis) -> dict[str, tuple[list[float], list[float]]]:
    """The curves of a panel by label."""
    return {
        line.get_label(): (list(line.get_xdata()), list(line.get_ydata()))
        for line in axis.lines
        if not line.get_label().startswith("_")
    }


def by_epoch(column: str, values: list[str]) -> pl.DataFrame:
    """Distances that are all different."""
    rows = [(run, epoch, value) for run in RUNS for epoch in range(3) for value in values]
    table = pl.DataFrame(rows, schema=["run", "epoch", column], orient="row")
    return table.with_columns(distance=pl.int_range(pl.len()) / 16)


@pytest.mark.parametrize(
    ("draw", "column", "values", "titles"),
    [
        (draw_line_distance, "nodes", ["user", "item"], ["Users", "Items"]),
        (draw_modal_forgetting, "modality", ["audio"], ["Audio features"]),
        (
            draw_modal_forgetting,
            "modality",
            ["image", "text", "audio"],
            ["Image features", "Text features", "Audio features"],
        ),
    ],
)
def test_a_curve_over_epochs_for_each_run_in_each_panel(draw, column: str, values: list[str], titles: list[str]):
    table = by_epoch(column, values)
    figure = draw(table)
    assert [axis.get_title() for axis in figure.axes] == titles
    assert [axis.get_xlabel() for axis in figure.axes] == ["Epoch"] * len(values)
    assert "distance" in figure.axes[0].get_ylabel()
    assert legend(figure) == RUNS
    for value, axis in zip(values, figure.axes, strict=True):
        for run in RUNS:
            expected = table.filter((pl.col(column) == value) & (pl.col("run") == run))["distance"].to_list()
            assert curves(axis)[run] == ([0, 1, 2], expected)


def test_names_of_runs_are_shown_as_they_are(tmp_path: Path):
    names = ["_kept", r"k$\frac$"]
    figure = draw_line_distance(by_epoch("nodes", ["user", "item"]).with_columns(pl.col("run").replace(RUNS, names)))
    assert [label.strip("\u200b") for label in legend(figure)] == names
    write_picture(figure, tmp_path / "figure.svg")
    assert r"k$\frac$" in (tmp_path / "figure.svg").read_text()


def test_conflict_has_cosines_above_shares():
    rows = [(run, epoch, node, 0.5 - index, -0.25, 0.25, 0.125 * epoch)
            for index, run in enumerate(RUNS) for epoch in range(3) for node in ("user", "item")]  # fmt: skip
    schema = ["run", "epoch", "nodes", "cosine", "cosine_q25", "cosine_q75", "conflict_share"]
    figure = draw_gradient_conflict(pl.DataFrame(rows, schema=schema, orient="row"))
    top, _, bottom, _ = figure.axes
    assert curves(top) == {"with": ([0, 1, 2], [0.5] * 3), "without": ([0, 1, 2], [-0.5] * 3)}
    assert curves(bottom)["with"] == ([0, 1, 2], [0.0, 12.5, 25.0])
    assert "%" in bottom.get_ylabel()
    assert legend(figure) == RUNS


def conflict(rows: list[tuple[str, str]]) -> pl.DataFrame:
    """Figure 1a's table for runs and the nodes that both lines of each share."""
    table = pl.DataFrame(rows, schema=["run", "nodes"], orient="row").join(
        pl.DataFrame({"epoch": range(2)}), how="cross"
    )
    names = ("cosine", "cosine_q25", "cosine_q75", "conflict_share")
    return table.with_columns(**{name: pl.int_range(pl.len()) / 16 for name in names})


def looks(figure: Figure) -> list[dict[str, str]]:
    """The colour of each labelled curve, for each panel."""
    return [{line.get_label(): line.get_color() for line in axis.lines if line.get_label() in RUNS}
            for axis in figure.axes]  # fmt: skip


def legend_looks(figure: Figure) -> dict[str, str]:
    """The colour that the legend gives each label."""
    (only,) = figure.legends
    return {text.get_text(): line.get_color() for text, line in zip(only.get_texts(), only.get_lines(), strict=True)}


def test_a_run_looks_the_same_in_each_panel_and_in_the_legend():
    figure = draw_gradient_conflict(conflict([("with", "item"), ("without", "user"), ("without", "item")]))
    told = legend_looks(figure)
    assert set(told) == set(RUNS)
    assert len(set(told.values())) == 2
    user, item, *_ = looks(figure)
    assert (user, item) == ({"without": told["without"]}, told)
    table = by_epoch("modality", ["image", "text"])
    some = draw_modal_forgetting(table.filter((pl.col("run") == "without") | (pl.col("modality") == "text")))
    told = legend_looks(some)
    assert set(told) == set(RUNS)
    panels = dict(zip([axis.get_title() for axis in some.axes], looks(some), strict=True))
    assert panels == {"Text features": told, "Image features": {"without": told["without"]}}


def test_a_panel_without_a_curve_says_why():
    figure = draw_gradient_conflict(conflict([("with", "item"), ("without", "item")]))
    assert legend(figure) == RUNS
    assert [[text.get_text() for text in axis.texts] for axis in figure.axes] == [
        ["No user embeddings\nare shared by both lines"], [], ["No user embeddings\nare shared by both lines"], []
    ]  # fmt: skip


def test_scores_are_bars_in_groups_of_runs():
    lines = ["behavior", "modal", "general"]
    rows = [
        (run, "baby", line, 0.1 * (3 * i + j), 0.01 * j) for i, run in enumerate(RUNS) for j, line in enumerate(lines)
    ]
    table = pl.DataFrame(rows, schema=["run", "dataset", "line", "recall@20", "ndcg@20"], orient="row")
    figure = draw_line_scores(table)
    assert [axis.get_ylabel() for axis in figure.axes] == ["Test Recall@20", "Test NDCG@20"]
    assert legend(figure) == ["Behavior", "Modal", "General"]
    heights = [[bar.get_height() for bar in bars] for bars in figure.axes[0].containers]
    assert heights == [pytest.approx([0.1 * j, 0.1 * (3 + j)]) for j in range(3)]
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == RUNS
    several = draw_line_scores(table.with_columns(dataset=pl.col("run").replace({"with": "sports", "without": "baby"})))
    assert [tick.get_text() for tick in several.axes[0].get_xticklabels()] == ["with\n(sports)", "without\n(baby)"]


def scores(runs: list[str]) -> pl.DataFrame:
    """Figure 5's table for some runs."""
    rows = [(run, "baby", line, 0.25, 0.125) for run in runs for line in ("behavior", "modal", "general")]
    return pl.DataFrame(rows, schema=["run", "dataset", "line", "recall@20", "ndcg@20"], orient="row")


def map_of(runs: list[str]) -> pl.DataFrame:
    """Figure 7's table for some runs of four nodes."""
    rows = [(run, "user", str(node), node, 0.0, node, 1.0) for run in runs for node in range(4)]
    schema = ["run", "nodes", "id", "behavior_x", "behavior_y", "modal_x", "modal_y"]
    return pl.DataFrame(rows, schema=schema, orient="row")


LONG = ["a-very-long-name-of-a-run-that-nobody-would-use-1", "another_long_name_" + 4 * "that_has_no_hyphens_", "short"]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_long_names_of_runs_are_whole_and_apart(count: int):
    runs = LONG[:count]
    bars, places = draw_line_scores(scores(runs)), draw_line_map(map_of(runs))
    by_run = draw_line_distance(by_epoch("nodes", ["item"]).with_columns(pl.col("run").replace(RUNS, LONG[:2])))
    shown = [axis.get_xticklabels() for axis in bars.axes]
    shown += [[axis.title for axis in places.axes], list(by_run.legends[0].get_texts())]
    for figure in (bars, places, by_run):
        figure.draw_without_rendering()
    for texts in shown:
        boxes = [text.get_window_extent() for text in texts]
        assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
        page = texts[0].get_figure().bbox
        assert [box for box in boxes if not (box.x0 >= 0 and box.x1 <= page.x1 and box.y0 >= 0)] == []
    read = ["".join(tick.get_text().split()) for tick in bars.axes[0].get_xticklabels()]
    assert read == runs


def test_a_map_joins_both_places_of_each_node():
    figure = draw_line_map(map_of(RUNS))
    assert legend(figure) == ["Same user or item", "Behavior representation", "Modal representation"]
    for axis, run in zip(figure.axes, RUNS, strict=True):
        assert axis.get_title().startswith(run)
        assert [(list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines] == [
            ([node, node], [0.0, 1.0]) for node in range(4)
        ]
        assert {line.get_linestyle() for line in axis.lines} == {"--"}


def sensitivity(values: list[float]) -> Figure:
    """A figure with a panel for the values of one weight."""
    rows = [("signal_weight", "image_weight 0.3", value, "ndcg@20", value / 2, 0.1, 2) for value in values]
    schema = ["key", "series", "value", "metric", "mean", "std", "num_runs"]
    return draw_sensitivity(pl.DataFrame(rows, schema=schema, orient="row"))


@pytest.mark.parametrize(("values", "scale"), [([0.0, 0.001, 0.1], "symlog"), ([0.1, 0.3, 0.9], "linear")])
def test_sensitivity_marks_the_values_that_were_tried(values: list[float], scale: str):
    (axis,) = sensitivity(values).axes
    assert axis.get_xscale() == scale
    assert [tick.get_text() for tick in axis.get_xticklabels()] == [f"{value:g}" for value in values]
    assert axis.get_ylabel() == "Test NDCG@20\n(mean ± std over seeds)"
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["image weight 0.3"]


@pytest.mark.parametrize(
    ("values", "left_out"),
    [
        ([0.1, 0.3, 0.9], []),
        ([0.0, 0.001, 0.003, 0.01, 0.1, 1.0], []),
        ([0.001, 0.0025, 0.005, 0.0055, 0.0075], []),
        ([0.1, 0.1001, 0.3, 0.3001, 0.3002, 0.9], [0.1001, 0.3001, 0.3002]),
    ],
)
def test_labels_of_close_values_are_apart(values: list[float], left_out: list[float]):
    figure = sensitivity(values)
    figure.draw_without_rendering()
    (axis,) = figure.axes
    assert axis.get_xticks() == pytest.approx(values)
    ticks = [tick for tick in axis.get_xticklabels() if tick.get_text()]
    assert [float(tick.get_text()) for tick in ticks] == [value for value in values if value not in left_out]
    boxes = [tick.get_window_extent() for tick in ticks]
    for tick, (left, right) in zip(ticks, itertools.pairwise(boxes), strict=False):
        height = tick.get_fontsize() / 72 * figure.dpi
        if tick.get_rotation() == 0:
            assert left.x1 < right.x0
        else:
            assert (right.x1 - left.x1) * math.sin(math.radians(tick.get_rotation())) > 0.9 * height
