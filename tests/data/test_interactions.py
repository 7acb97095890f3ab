"""Reading, cleaning and holding interactions."""

from __future__ import annotations

import dataclasses
from collections import Counter
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dream_pyg.data.interactions import TEST, TRAIN, VALID, Interactions, drop_duplicates, k_core, read_interactions
from dream_pyg.errors import ConfigError, DataError

FRAME = pl.DataFrame(
    {"user_id": [7, 7, 3], "item_id": ["b", "a", "a"], "timestamp": [30, 10, 20], "split": [0, 1, 2]},
    schema_overrides={"split": pl.UInt8},
)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def pairs_frame(pairs: list[tuple[int, int]]) -> pl.DataFrame:
    return pl.DataFrame(pairs, schema={"user_id": pl.Int64, "item_id": pl.Int64}, orient="row")


@pytest.mark.parametrize("form", ["%Y-%m-%d", "%Y-%m-%d %H:%M:%S", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%dT%H:%M:%SZ"])
def test_dates_in_text_are_times(tmp_path: Path, form: str):
    days = pl.Series([datetime(2021, 12, day) for day in (20, 21, 22)])
    pl.DataFrame({"user_id": [1, 2, 3], "item_id": [1, 2, 3], "timestamp": days.dt.strftime(form)}).write_csv(
        tmp_path / "clicks.csv"
    )
    read = read_interactions(tmp_path / "clicks.csv")["timestamp"]
    assert read.to_list() == days.dt.timestamp("us").to_list()


def test_read_mmrec(tmp_path: Path) -> None:
    text = "userID\titemID\trating\ttimestamp\tx_label\n7\tb\t1.0\t30\t0\n7\ta\t1.0\t10\t1\n3\ta\t1.0\t20\t2\n"
    assert read_interactions(write(tmp_path / "a.inter", text)).equals(FRAME)


def test_read_recbole_types_follow_a_colon(tmp_path: Path) -> None:
    text = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n7\tb\t1\t30.5\n3\ta\t1\t20\n"
    frame = read_interactions(write(tmp_path / "a.inter", text))
    assert frame.to_dict(as_series=False) == {"user_id": [7, 3], "item_id": ["b", "a"], "timestamp": [30.5, 20.0]}


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_read_round_trip(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"interactions{suffix}"
    if suffix == ".parquet":
        FRAME.write_parquet(path)
    else:
        FRAME.write_csv(path, separator="\t" if suffix == ".tsv" else ",")
    assert read_interactions(path).equals(FRAME)


def test_read_a_csv_may_be_separated_by_tabs(tmp_path: Path) -> None:
    FRAME.write_csv(tmp_path / "a.csv", separator="\t")
    assert read_interactions(tmp_path / "a.csv").equals(FRAME)


def test_read_any_names_and_separator(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "time;who;what;part\n5;x;1;Validation\n6;y;2;TEST\n7;y;3; train \n")
    frame = read_interactions(path, user="who", item="what", timestamp="time", split="part", separator=";")
    assert frame["user_id"].to_list() == ["x", "y", "y"]
    assert frame["split"].to_list() == [VALID, TEST, TRAIN]
    assert frame["timestamp"].to_list() == [5, 6, 7]


@pytest.mark.parametrize("name", ["user", "userID", "user_id"])
def test_read_well_known_names(tmp_path: Path, name: str) -> None:
    assert read_interactions(write(tmp_path / "a.csv", f"{name},asin\n1,B0\n")).rows() == [(1, "B0")]


@pytest.mark.parametrize(
    ("words", "dtype"),
    [
        (["1", "-2", "30"], pl.Int64),
        (["1", "02", "3"], pl.String),
        (["1", "2.0", "3"], pl.String),
        (["1", "-0", "3"], pl.String),
        (["1", "+2", "3"], pl.String),
        (["1", "99999999999999999999", "3"], pl.String),
        (["1", "é", "用户"], pl.String),
    ],
)
def test_read_text_ids_are_integers_only_if_all_are_written_so(
    tmp_path: Path, words: list[str], dtype: type[pl.DataType]
) -> None:
    lines = "".join(f"{word},x\n" for word in words)
    user = read_interactions(write(tmp_path / "a.csv", "user,item\n" + lines))["user_id"]
    assert user.dtype == dtype
    assert user.cast(pl.String).to_list() == words


def test_read_quotes(tmp_path: Path) -> None:
    assert read_interactions(write(tmp_path / "a.csv", 'user,item\n"a,b",x\n')).rows() == [("a,b", "x")]
    assert read_interactions(write(tmp_path / "a.tsv", 'user\titem\n"a\tx"\n')).rows() == [('"a', 'x"')]


def test_read_ratings_only_if_they_are_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "user,item,rating,rating,note,note\n1,2,3,4,x,y\n")
    assert read_interactions(path).rows() == [(1, 2)]
    with pytest.raises(DataError, match="several columns for the rating"):
        read_interactions(path, with_ratings=True)
    with pytest.raises(DataError, match="no column for the rating: expected 'stars'"):
        read_interactions(path, rating="stars")
    frame = pl.DataFrame({"user": [1, 2], "item": [3, 4], "rating": ["5", "2"]})
    frame.with_columns(pl.col("rating").cast(pl.Categorical)).write_parquet(tmp_path / "a.parquet")
    assert read_interactions(tmp_path / "a.parquet", with_ratings=True)["rating"].to_list() == [5.0, 2.0]
    frame.with_columns(pl.col("item").cast(str).str.split(",").alias("rating")).write_parquet(tmp_path / "b.parquet")
    with pytest.raises(DataError, match="expected numbers, got List"):
        read_interactions(tmp_path / "b.parquet", with_ratings=True)


@pytest.mark.parametrize("end", ["\n", "\n\n\n", "\r\n\r\n", ""])
@pytest.mark.parametrize("name", ["a.csv", "a.inter"])
def test_read_blank_lines_at_the_end(tmp_path: Path, name: str, end: str) -> None:
    path = tmp_path / name
    text = "user,item,note\n1,2,\n3,4," if name == "a.csv" else "user\titem\tnote\n1\t2\tx\n3\t4\tx"
    path.write_bytes((text + end).encode())
    assert read_interactions(path).rows() == [(1, 2), (3, 4)]


def test_read_byte_order_mark_and_crlf(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes("\ufeffuser,item\r\nu,7\r\n".encode())
    assert read_interactions(path).rows() == [("u", 7)]


def test_read_parquet_keeps_its_id_types(tmp_path: Path) -> None:
    pl.DataFrame(
        {"user_id": pl.Series(["1", "2"]).cast(pl.Categorical), "item_id": pl.Series([1, 2], dtype=pl.UInt16)}
    ).write_parquet(tmp_path / "a.parquet")
    frame = read_interactions(tmp_path / "a.parquet")
    assert frame.schema == {"user_id": pl.String, "item_id": pl.Int64}


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ([date(1970, 1, 2)], [86_400_000_000]),
        ([datetime(1970, 1, 1, 0, 0, 1)], [1_000_000]),
        ([1.5], [1.5]),
        ([Decimal("1.75")], [1.75]),
    ],
)
def test_read_parquet_times(tmp_path: Path, times: list[object], expected: list[float]) -> None:
    pl.DataFrame({"user": [1], "item": [1], "timestamp": times}).write_parquet(tmp_path / "a.parquet")
    assert read_interactions(tmp_path / "a.parquet")["timestamp"].to_list() == expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "", "is empty"),
        ("a.csv", "user,item\n", "has a header but no rows"),
        ("a.csv", "user,rating\n1,2\n", "no column for the item.*found 'user', 'rating'.*`item` in a .*--item-column"),
        ("a.csv", "user,user_id,item\n1,2,3\n", "several columns for the user: user, user_id"),
        ("a.csv", "user,item,item\n1,2,3\n", "several columns for the item: item, item. Keep one.$"),
        ("a.csv", "user\titem\titem\n1\t2\t3\n", "several columns for the item: item, item. Keep one.$"),
        ("a.inter", "user:token\titem:token\titem:token\n1\t2\t3\n", "several columns for the item: item, item"),
        ("a.csv", "user,item\n1,2\n\n3,4\n", "'user': the id in row 2 is missing"),
        ("a.csv", "user,item\n1,2\n,\n", "'user': the id in row 2 is missing"),
        ("a.csv", "user,item\n\n\n", "a.csv has a header but no rows"),
        ("a.csv", "user,item\n1,2\n,3\n,4\n", "'user': the id in row 2 is missing .2 in all"),
        ("a.csv", "user,item\n1,2\n1\n", "'item': the id in row 2 is missing"),
        ("a.csv", "user,item\n1,2,3\n", "is damaged"),
        ("a.csv", "user,item,price\n1,2,3\nSmith, John,2,3\n", "is damaged.*more fields than defined"),
        ("a.csv", 'user,item\nann,2\n"",3\n" ",3\n', "'user': the id in row 2 is missing .1 in all"),
        ("a.csv", "user,item,x_label\n1,2,0\n1,3,7\n", "'x_label': expected 0, 1 or 2.*got '7' in row 2"),
        ("a.csv", "user,item,x_label\n1,2,0\n1,3,\n", "got None in row 2"),
        ("a.csv", "user,item,timestamp\n1,2,3\n1,3,noon\n", "'timestamp': expected a number.*got 'noon' in row 2"),
        ("a.csv", "user,item,timestamp\n1,2,nan\n", "got 'nan' in row 1"),
        ("a.csv", "user,item,timestamp\n1,2,01/12/2023\n", "such as 2023-12-31 in each row, got '01/12/2023' in row 1"),
        ("a.dat", "user,item\n1,2\n", "expected a file ending in .inter, .item, .tsv, .csv, .parquet"),
        ("a.parquet", "user,item\n1,2\n", "is damaged or not what its suffix says"),
    ],
)
def test_read_refuses_files(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = write(tmp_path / name, text)
    with pytest.raises(DataError, match=message) as caught:
        read_interactions(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_read_refuses_one_column_for_two_roles(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "user,item\n1,2\n")
    with pytest.raises(DataError, match=r"has one column, 'item', for both user_id and item_id. Name another"):
        read_interactions(path, user="item")


def test_read_refuses_missing_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.csv, but it is missing"):
        read_interactions(tmp_path / "a.csv")
    with pytest.raises(DataError, match="but it is a directory"):
        read_interactions(tmp_path)


def test_read_refuses_text_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"user,item\n\xe9,1\n")
    with pytest.raises(DataError, match=r"is damaged.*UTF-8"):
        read_interactions(tmp_path / "a.csv")


def test_read_refuses_truncated_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    FRAME.write_parquet(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="is damaged"):
        read_interactions(path)


@pytest.mark.parametrize("role", ["user", "item", "timestamp", "split"])
def test_read_refuses_a_named_column_must_be_there(tmp_path: Path, role: str) -> None:
    FRAME.write_csv(tmp_path / "a.csv")
    with pytest.raises(DataError, match=f"no column for the {role}: expected 'nope', found 'user_id'"):
        read_interactions(tmp_path / "a.csv", **{role: "nope"})


@pytest.mark.parametrize("separator", ["", "::", "é"])
def test_read_refuses_separator(tmp_path: Path, separator: str) -> None:
    with pytest.raises(ConfigError, match="one ASCII character"):
        read_interactions(write(tmp_path / "a.csv", "user,item\n1,2\n"), separator=separator)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1.0], "got Float64"),
        ([True], "got Boolean"),
        (pl.Series([2**63], dtype=pl.UInt64), "exceeds 64-bit"),
    ],
)
def test_read_refuses_parquet_ids(tmp_path: Path, ids: object, message: str) -> None:
    pl.DataFrame({"user": ids, "item": [1]}).write_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=f"'user'.*{message}"):
        read_interactions(tmp_path / "a.parquet")


@pytest.mark.parametrize(("column", "value"), [("split", 0.5), ("split", True), ("timestamp", [1])])
def test_read_refuses_parquet_values(tmp_path: Path, column: str, value: object) -> None:
    pl.DataFrame({"user": [1], "item": [1], column: [value]}).write_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=f"'{column}': expected"):
        read_interactions(tmp_path / "a.parquet")


def test_duplicates_the_first_row_stays_in_place() -> None:
    frame = pairs_frame([(1, 1), (2, 2), (1, 1), (1, 2), (2, 2)])
    assert drop_duplicates(frame).rows() == [(1, 1), (2, 2), (1, 2)]


def test_duplicates_the_earliest_wins() -> None:
    frame = pairs_frame([(1, 1), (2, 2), (1, 1)]).with_columns(timestamp=pl.Series([9, 5, 3]))
    assert drop_duplicates(frame).rows() == [(2, 2, 5), (1, 1, 3)]


def test_duplicates_train_wins_over_valid_over_test_and_over_time() -> None:
    frame = pairs_frame([(1, 1), (1, 1), (2, 2), (2, 2)]).with_columns(
        timestamp=pl.Series([1, 2, 1, 2]), split=pl.Series([VALID, TRAIN, TEST, VALID])
    )
    assert drop_duplicates(frame).rows() == [(1, 1, 2, TRAIN), (2, 2, 2, VALID)]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1))
def test_duplicates_each_pair_stays_once(pairs: list[tuple[int, int]]) -> None:
    assert drop_duplicates(pairs_frame(pairs)).rows() == list(dict.fromkeys(pairs))


@given(st.sets(st.tuples(st.integers(0, 7), st.integers(0, 7)), min_size=1), st.integers(0, 4))
def test_k_core_equals_dropping_one_at_a_time(pairs: set[tuple[int, int]], k: int) -> None:
    remaining = sorted(pairs)
    while True:
        users, items = Counter(u for u, _ in remaining), Counter(i for _, i in remaining)
        weak = next(((u, i) for u, i in remaining if users[u] < k or items[i] < k), None)
        if weak is None:
            break
        remaining.remove(weak)
    frame = pairs_frame(sorted(pairs))
    if remaining:
        assert k_core(frame, k).rows() == remaining
    else:
        with pytest.raises(DataError, match=f"{k}-core .* is empty.*k_core"):
            k_core(frame, k)


def test_k_core_a_chain_falls_link_by_link() -> None:
    chain = [(row + step, row) for row in range(50) for step in (0, 1)]
    square = [(user, item) for user in (100, 101) for item in (100, 101)]
    assert k_core(pairs_frame(chain + square), 2).rows() == square


def test_k_core_string_ids_and_other_columns_survive() -> None:
    frame = pl.DataFrame({"user_id": list("aabb"), "item_id": list("xyxz"), "timestamp": [1, 2, 3, 4]})
    core = k_core(pl.concat([frame, pl.DataFrame({"user_id": ["b"], "item_id": ["y"], "timestamp": [5]})]), 2)
    assert core.rows() == [("a", "x", 1), ("a", "y", 2), ("b", "x", 3), ("b", "y", 5)]


@pytest.fixture
def interactions() -> Interactions:
    return Interactions(
        user=np.array([0, 1, 1, 0]),
        item=np.array([2, 0, 2, 1]),
        split=np.array([TRAIN, TRAIN, VALID, TEST], dtype=np.uint8),
        timestamp=None,
        user_ids=pl.Series(["ann", "bob"]),
        item_ids=pl.Series([10, 20, 30, 40]),
    )


def test_interactions_sizes_and_pairs(interactions: Interactions) -> None:
    assert (interactions.num_users, interactions.num_items) == (2, 4)
    assert interactions.pairs("train").tolist() == [[0, 1], [2, 0]]
    assert interactions.pairs("valid").tolist() == [[1], [2]]
    assert interactions.pairs("test").tolist() == [[0], [1]]
    assert interactions.pairs("test").dtype == np.int64
    with pytest.raises(ConfigError, match=r"train, valid, test \(got 'dev'\)"):
        interactions.pairs("dev")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("user", np.array([0, 1, 1]), r"item must be as long as user"),
        ("user", np.array([0, 1, 2, 0]), r"user must be from 0 to 1 \(got 0 to 2\)"),
        ("item", np.array([0, -1, 2, 0]), r"item must be from 0 to 3 \(got -1 to 2\)"),
        ("item", np.zeros(4), "item must be a vector of int64"),
        ("user", np.zeros((4, 1), dtype=np.int64), "user must be a vector"),
        ("split", np.full(4, 3, dtype=np.uint8), "split must be from 0 to 2"),
        ("timestamp", np.zeros(3), "timestamp must be as long as user"),
        ("user_ids", pl.Series(["ann", "ann"]), "user_ids must be unique"),
        ("item_ids", pl.Series([1, 2, 3, None]), "item_ids must be unique and without nulls"),
    ],
)
def test_interactions_refuses(interactions: Interactions, name: str, value: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        dataclasses.replace(interactions, **{name: value})
