"""The printed values agree with what the paper says of them elsewhere."""

from __future__ import annotations

import pytest

from dream_pyg.analysis.published import published_datasets, published_note, published_rows, table_metrics
from dream_pyg.analysis.systems import ABLATIONS, ALIGNED, COMPARED, MODELS_OF_TABLE

DATASETS = ["baby", "sports", "clothing"]


def test_every_table_has_every_dataset_and_row():
    assert published_datasets() == DATASETS
    for dataset in DATASETS:
        assert list(published_rows("table1", dataset)) == [dataset]
        assert tuple(published_rows("table2", dataset)) == COMPARED
        assert list(published_rows("table3", dataset)) == ["dream", *ABLATIONS]
        assert list(published_rows("table4", dataset)) == [
            f"{name}{end}" for name in ALIGNED for end in ("", "_aligned")
        ]
        # BUIR and item-kNN are printed by nobody on these splits.
        unprinted = {"buir", "itemknn"}
        assert list(published_rows("related", dataset)) == [
            model for model in MODELS_OF_TABLE["related"] if model not in unprinted
        ]
        for table in ("table1", "table2", "table3", "table4", "related"):
            for row in published_rows(table, dataset).values():
                assert list(row) == table_metrics(table)


@pytest.mark.parametrize(
    ("metric", "percent"), [("recall@10", [4.47, 6.45, 6.55]), ("ndcg@10", [6.19, 7.05, 5.76])], ids=["recall", "ndcg"]
)
def test_improvements_are_those_that_section_4_5_names(metric: str, percent: list[float]):
    for dataset, expected in zip(DATASETS, percent, strict=True):
        *baselines, dream = (row[metric] for row in published_rows("table2", dataset).values())
        # In percent, with two digits; the text cuts off where it should round.
        assert 100 * (dream / max(baselines) - 1) == pytest.approx(expected, abs=0.011)


@pytest.mark.parametrize("dataset", DATASETS)
def test_sparsity_follows_from_the_counts(dataset: str):
    row = published_rows("table1", dataset)[dataset]
    assert 100 * (1 - row["interactions"] / (row["users"] * row["items"])) == pytest.approx(row["sparsity"], abs=0.01)


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("table", ["table3", "table4"])
def test_tables_print_the_same_for_the_same_system_unless_a_note_says_so(table: str, dataset: str):
    first = published_rows("table2", dataset)
    differing = [
        (row, metric)
        for row, values in published_rows(table, dataset).items()
        for metric, value in values.items()
        if row in first and first[row][metric] != value
    ]
    assert bool(differing) == (published_note(table, dataset) is not None)


def test_recall_and_ndcg_grow_with_the_cut_off():
    for dataset in DATASETS:
        for row in published_rows("table2", dataset).values():
            assert row["ndcg@10"] < row["ndcg@20"] < row["recall@10"] < row["recall@20"]


def test_a_dataset_that_the_paper_does_not_have_has_no_rows():
    assert published_rows("table2", "tiktok") == {}
    assert published_note("table2", "tiktok") is None
