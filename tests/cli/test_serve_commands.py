"""``dream-pyg recommend`` and ``dream-pyg export``: external ids, seen items, and an index that answers the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import polars as pl
import pytest
from click.testing import Result

from dream_pyg import DatasetConfig, RunConfig, build_store, load_run, recommend_table, serving, train
from dream_pyg.data.files import load_tensors, sha256_file
from dream_pyg.errors import DataError
from dream_pyg.serving import write_table

Command = Callable[..., Result]
COLUMNS = ["user_id", "rank", "item_id", "score"]


def rows(result: Result) -> list[dict[str, Any]]:
    """What the command printed as JSON."""
    assert result.exit_code == 0, result.stderr
    return list(json.loads(result.stdout))


@pytest.fixture(scope="module")
def bought(shop: Path) -> dict[str, set[str]]:
    """The items that each user of the bookshop interacted with."""
    frame = pl.read_csv(shop / "interactions.csv")
    return {user: set(part["item_id"]) for (user,), part in frame.group_by("user_id")}


@pytest.fixture(scope="module")
def integer_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Most-popular on a shop whose ids are integers; user 7 and items 100 to 109, of which 100 is bought most."""
    directory = tmp_path_factory.mktemp("integers")
    pairs = [(user, 100 + (user * step) % 10) for user in range(1, 11) for step in (1, 2, 3, 5)]
    labels = ["train", "train", "valid", "test"] * 10
    frame = pl.DataFrame({"user_id": [u for u, _ in pairs], "item_id": [i for _, i in pairs], "split": labels})
    popular = pl.DataFrame({"user_id": list(range(1, 7)), "item_id": [100] * 6, "split": ["train"] * 6})
    pl.concat([frame, popular]).write_csv(directory / "clicks.csv")
    build_store(DatasetConfig.create(interactions=str(directory / "clicks.csv")), directory / "graph")
    return train(RunConfig.create(graph=directory / "graph", model="popularity"), directory / "run").run


def test_ids_are_printed_as_they_are(command: Command, tmp_path: Path):
    users, items = np.repeat(np.arange(1000, 1020), 6), np.tile(np.arange(5000, 5012), 10)
    pl.DataFrame({"user_id": users, "item_id": items}).write_csv(tmp_path / "clicks.csv")
    build_store(DatasetConfig.create(interactions=str(tmp_path / "clicks.csv")), tmp_path / "graph")
    run = train(RunConfig.create(graph=tmp_path / "graph", model="popularity"), tmp_path / "run").run
    _, line = command("recommend", run, "--user", "1007", "-k", "1").stdout.splitlines()
    user, _, item, _ = line.split()
    assert user == "1007"
    assert 5000 <= int(item) < 5012


def test_what_users_have_is_not_recommended_even_if_none_of_it_is_in_train(command: Command, tmp_path: Path):
    pairs = [(user, item) for user in range(10) for item in range(user, user + 6)]
    frame = pl.DataFrame(pairs, schema=["user_id", "item_id"], orient="row")
    split = pl.Series("split", ["train", "train", "train", "train", "valid", "test"] * 10)
    new = pl.DataFrame({"user_id": [99] * 5, "item_id": [3, 4, 5, 6, 7], "split": ["test"] * 5})
    pl.concat([frame.with_columns(split), new]).write_csv(tmp_path / "clicks.csv")
    build_store(DatasetConfig.create(interactions=str(tmp_path / "clicks.csv")), tmp_path / "graph")
    run = train(RunConfig.create(graph=tmp_path / "graph", model="popularity"), tmp_path / "run").run
    told = command("recommend", run, "--user", 99, "-k", 15, "--format", "json")
    assert {row["item_id"] for row in rows(told)} == set(range(15)) - {3, 4, 5, 6, 7}
    assert "1 of 1 users have no interaction in train" in told.stderr
    known = command("recommend", run, "--user", 99, "--user", 3, "-k", 2, "--skip-cold", "--format", "json")
    assert {row["user_id"] for row in rows(known)} == {3}
    assert "1 of 2 users have no interaction in train: they are left out" in known.stderr
    shown = command("recommend", run, "--user", 99, "-k", 15, "--include-seen", "--format", "json")
    assert {row["item_id"] for row in rows(shown)} == set(range(15))


def test_a_run_is_opened_from_any_directory(command: Command, shop_graph: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(shop_graph.parent)
    train(RunConfig.create(graph=shop_graph.name, model="popularity"), tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    assert command("evaluate", "run").exit_code == 0
    assert command("train", "--resume", "--run", "run").exit_code == 0


def test_a_list_of_users_may_begin_with_a_byte_order_mark(command: Command, shop_run: Path, tmp_path: Path):
    user = str(load_run(shop_run).stored.user_ids[0])
    (tmp_path / "users.txt").write_text(f"{user}\n", encoding="utf-8-sig")
    told = rows(command("recommend", shop_run, "--users-file", tmp_path / "users.txt", "-k", 1, "--format", "json"))
    assert [row["user_id"] for row in told] == [user]


def test_every_user_gets_k_unseen_items(command: Command, shop_run: Path, bought: dict[str, set[str]]):
    told = rows(command("recommend", shop_run, "-k", 4, "--format", "json"))
    assert len(told) == 60 * 4
    assert [list(row) for row in told[:1]] == [COLUMNS]
    assert [row["rank"] for row in told] == [1, 2, 3, 4] * 60
    assert {row["user_id"] for row in told} == bought.keys()
    assert [row for row in told if row["item_id"] in bought[row["user_id"]]] == []
    for first, second in pairwise(told):
        assert first["user_id"] != second["user_id"] or first["score"] >= second["score"]


def test_a_whole_catalogue_has_every_unseen_item_once(command: Command, shop_run: Path, bought: dict[str, set[str]]):
    user = min(bought)
    told = rows(command("recommend", shop_run, "--user", user, "-k", 1000, "--format", "json"))
    items = [row["item_id"] for row in told]
    assert len(items) == 40 - len(bought[user])
    assert len(set(items)) == len(items)
    with_seen = rows(command("recommend", shop_run, "--user", user, "-k", 1000, "--include-seen", "--format", "json"))
    assert {row["item_id"] for row in with_seen} - set(items) == bought[user]


def test_table_rounds_what_json_says(command: Command, shop_run: Path):
    told = rows(command("recommend", shop_run, "--user", "user-00003", "-k", 3, "--format", "json"))
    header, *lines = [
        line.split() for line in command("recommend", shop_run, "--user", "user-00003", "-k", 3).stdout.splitlines()
    ]
    assert header == COLUMNS
    assert lines == [[row["user_id"], str(row["rank"]), row["item_id"], f"{row['score']:.4f}"] for row in told]


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".json"])
def test_files_hold_what_json_says(command: Command, shop_run: Path, tmp_path: Path, suffix: str):
    told = pl.DataFrame(rows(command("recommend", shop_run, "-k", 3, "--format", "json")))
    out = tmp_path / "new" / f"top{suffix}"
    result = command("recommend", shop_run, "-k", 3, "--out", out)
    assert result.stdout == f"180 recommendations written to {out}\n"
    read = {".parquet": pl.read_parquet, ".csv": pl.read_csv, ".json": pl.read_json}[suffix](out)
    assert read.columns == COLUMNS
    assert read.drop("score").rows() == told.drop("score").rows()
    np.testing.assert_array_equal(
        read["score"].to_numpy().astype(np.float32), told["score"].to_numpy().astype(np.float32)
    )
    assert [path.name for path in out.parent.iterdir()] == [out.name]


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".json"])
def test_a_table_that_comes_in_blocks_is_written_as_one(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(serving, "_ROWS_OF_A_PART", 7)
    whole = pl.DataFrame({"user_id": [f"u{row // 3}" for row in range(40)], "rank": range(40)})
    blocks = (whole[first : first + size] for first, size in ((0, 3), (3, 3), (6, 20), (26, 0), (26, 12), (38, 2)))
    out = tmp_path / f"top{suffix}"
    assert write_table(blocks, out) == 40
    read = {".parquet": pl.read_parquet, ".csv": pl.read_csv, ".json": pl.read_json}[suffix](out)
    assert read.rows() == whole.rows()
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_a_table_whose_blocks_end_early_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(serving, "_ROWS_OF_A_PART", 1)

    def blocks() -> Iterator[pl.DataFrame]:
        yield pl.DataFrame({"rank": [1]})
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_table(blocks(), tmp_path / "top.parquet")
    assert list(tmp_path.iterdir()) == []


def test_users_in_the_order_given_from_options_and_file(command: Command, shop_run: Path, tmp_path: Path):
    (tmp_path / "users.txt").write_text("user-00009\n\n  user-00002  \r\n")
    arguments = ["--user", "user-00005", "--users-file", tmp_path / "users.txt", "-k", 1]
    told = rows(command("recommend", shop_run, *arguments, "--format", "json"))
    assert [row["user_id"] for row in told] == ["user-00005", "user-00009", "user-00002"]
    everybody = {row["user_id"]: row for row in rows(command("recommend", shop_run, "-k", 1, "--format", "json"))}
    assert [row["item_id"] for row in told] == [everybody[row["user_id"]]["item_id"] for row in told]


def test_blanks_may_belong_to_ids(command: Command, tmp_path: Path):
    ids = [" lead", "trail ", "u\u2028v", "plain"]
    pairs = [(user, f"i{item}") for number, user in enumerate(ids) for item in range(number, number + 4)]
    pl.DataFrame(pairs, schema=["user_id", "item_id"], orient="row").write_parquet(tmp_path / "clicks.parquet")
    command("build-graph", tmp_path / "clicks.parquet", "--out", tmp_path / "graph")
    command("train", tmp_path / "graph", "--model", "bpr", "--epochs", 1, "--run", tmp_path / "run")
    (tmp_path / "users.txt").write_text("\n".join([*ids[:3], "  plain "]), encoding="utf-8")
    arguments = ["--users-file", tmp_path / "users.txt", "-k", 1, "--format", "json"]
    assert [row["user_id"] for row in rows(command("recommend", tmp_path / "run", *arguments))] == ids


@pytest.mark.parametrize("include_seen", [False, True])
def test_only_items_that_are_named_are_recommended(
    command: Command, shop_run: Path, tmp_path: Path, include_seen: bool
):
    seen = ["--include-seen"] if include_seen else []
    everything = rows(command("recommend", shop_run, "-k", 40, *seen, "--format", "json"))
    stock = sorted({row["item_id"] for row in everything})[1::3]
    (tmp_path / "stock.txt").write_text("\n".join(reversed(stock)))
    arguments = ["recommend", shop_run, "--items-file", tmp_path / "stock.txt", "-k", 4, *seen]
    told = rows(command(*arguments, "--format", "json"))
    in_stock = groupby((row for row in everything if row["item_id"] in stock), key=lambda row: row["user_id"])
    expected = [(user, rank, row) for user, best in in_stock for rank, row in enumerate(list(best)[:4], start=1)]
    assert [(row["user_id"], row["rank"]) for row in told] == [(user, rank) for user, rank, _ in expected]
    assert [row["item_id"] for row in told] == [row["item_id"] for *_, row in expected]
    np.testing.assert_allclose([row["score"] for row in told], [row["score"] for *_, row in expected], rtol=1e-5)
    assert command(*arguments, "--out", tmp_path / "top.parquet").exit_code == 0
    assert pl.read_parquet(tmp_path / "top.parquet")["item_id"].to_list() == [row["item_id"] for row in told]


@pytest.mark.parametrize(("text", "told"), [("", "the list of items is empty"), ("nothing", "1 of 1 items are not in")])
def test_lists_of_items_that_say_nothing_are_refused(command: Command, shop_run: Path, tmp_path: Path, text, told):
    (tmp_path / "stock.txt").write_text(text)
    result = command("recommend", shop_run, "--items-file", tmp_path / "stock.txt")
    assert result.exit_code == 1
    assert told in result.stderr


def test_a_user_who_is_named_twice_gets_one_list(command: Command, shop_run: Path):
    arguments = ["--user", "user-00001", "--user", "user-00001", "-k", 2]
    assert [row["rank"] for row in rows(command("recommend", shop_run, *arguments, "--format", "json"))] == [1, 2]


def test_a_text_is_no_list_of_users(shop_run: Path):
    with pytest.raises(DataError, match="Expected a list of ids of users, got the text 'user-00001'"):
        recommend_table(load_run(shop_run), 3, users="user-00001")


def test_a_directory_is_no_table(command: Command, shop_run: Path, tmp_path: Path):
    (tmp_path / "top.csv").mkdir()
    result = command("recommend", shop_run, "--out", tmp_path / "top.csv")
    assert result.exit_code == 1
    assert "it is a directory, and a table is a file" in result.stderr


def test_an_empty_users_file_asks_for_nobody(command: Command, shop_run: Path, tmp_path: Path):
    (tmp_path / "users.txt").write_text("\n")
    assert rows(command("recommend", shop_run, "--users-file", tmp_path / "users.txt", "--format", "json")) == []
    out = tmp_path / "top.parquet"
    command("recommend", shop_run, "--users-file", tmp_path / "users.txt", "--out", out)
    empty = pl.read_parquet(out)
    assert (empty.columns, len(empty)) == (COLUMNS, 0)


def test_unknown_users_are_named(command: Command, shop_run: Path):
    result = command("recommend", shop_run, "--user", "user-00001", "--user", "nobody", "--user", "user-1")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "2 of 3 users are not in the graph: nobody, user-1." in result.stderr


def test_integer_ids_stay_integers(command: Command, integer_run: Path):
    told = rows(command("recommend", integer_run, "--user", 7, "-k", 1, "--format", "json"))
    assert [{key: row[key] for key in COLUMNS[:3]} for row in told] == [{"user_id": 7, "rank": 1, "item_id": 100}]
    assert command("recommend", integer_run, "--user", "007").exit_code == 1


def test_integer_ids_reach_files_and_exports_as_integers(command: Command, integer_run: Path, tmp_path: Path):
    command("recommend", integer_run, "--out", tmp_path / "top.parquet")
    command("export", integer_run, "--out", tmp_path / "shipped")
    for file, column in (
        ("top.parquet", "item_id"),
        ("shipped/items.parquet", "item_id"),
        ("shipped/users.parquet", "user_id"),
    ):
        assert pl.read_parquet(tmp_path / file)[column].dtype == pl.Int64


@pytest.mark.parametrize("name", ["top.xlsx", "top", "top.PARQUET.gz"])
def test_unknown_table_formats_are_refused_before_any_work(command: Command, tmp_path: Path, name: str):
    result = command("recommend", tmp_path / "no-run", "--out", tmp_path / name)
    assert result.exit_code == 2
    assert ".parquet, .csv, .json" in result.stderr


def exported(directory: Path, file_format: str) -> tuple[np.ndarray, np.ndarray]:
    """User and item rows of an export, as a program would read them."""
    if file_format == "safetensors":
        tensors, _ = load_tensors(directory / "embeddings.safetensors")
        return tensors["user"].numpy(), tensors["item"].numpy()
    user, item = (pl.read_parquet(directory / f"{name}.parquet")["embedding"].to_numpy() for name in ("users", "items"))
    return user, item


@pytest.mark.parametrize("file_format", ["safetensors", "parquet"])
def test_the_exported_index_answers_like_recommend(command: Command, shop_run: Path, tmp_path: Path, file_format: str):
    out = tmp_path / "shipped"
    result = command("export", shop_run, "--out", out, "--as", file_format)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"60 users and 40 items x 64 written to {out}\n"
    tables = {"users.parquet", "items.parquet", "items.faiss", "export.json"}
    assert {path.name for path in out.iterdir()} == tables | (
        {"embeddings.safetensors"} if file_format == "safetensors" else set()
    )

    embeddings = load_run(shop_run, device="cpu").embeddings()
    user, item = exported(out, file_format)
    np.testing.assert_array_equal(user, embeddings.user.numpy())
    np.testing.assert_array_equal(item, embeddings.item.numpy())

    score, found = faiss.read_index(str(out / "items.faiss")).search(np.ascontiguousarray(user), 10)
    user_ids, item_ids = (pl.read_parquet(out / f"{name}s.parquet")[f"{name}_id"] for name in ("user", "item"))
    told = pl.DataFrame(rows(command("recommend", shop_run, "-k", 10, "--include-seen", "--format", "json")))
    assert told["user_id"].to_list() == np.repeat(user_ids.to_numpy(), 10).tolist()
    assert told["item_id"].to_list() == item_ids.to_numpy()[found.ravel()].tolist()
    np.testing.assert_allclose(told["score"].to_numpy(), score.ravel(), rtol=1e-5)


def test_export_describes_itself(command: Command, shop_run: Path, shop_graph: Path, tmp_path: Path):
    command("export", shop_run, "--out", tmp_path / "shipped")
    info = json.loads((tmp_path / "shipped" / "export.json").read_text())
    assert info["graph_fingerprint"] == json.loads((shop_graph / "graph.json").read_text())["fingerprint"]
    assert info["files"] == {
        path.name: sha256_file(path) for path in (tmp_path / "shipped").iterdir() if path.name != "export.json"
    }


@pytest.mark.parametrize("min_recall", [0.5, 1.0])
def test_an_inverted_file_finds_what_was_asked_for_and_says_so(
    command: Command, shop_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, min_recall: float
):
    monkeypatch.setattr(serving, "_ITEMS_OF_A_LIST", 4)  # else 40 items make a single list
    out = tmp_path / "shipped"
    result = command("export", shop_run, "--out", out, "--index", "ivf", "--min-recall", min_recall)
    assert result.exit_code == 0, result.stderr
    about = json.loads((out / "export.json").read_text())["index"]
    assert about["lists"] == 10
    assert f"{about['lists_searched']} of 10 lists and finds {about['recall']:.1%} of the top 20" in result.stdout
    user, item = exported(out, "safetensors")
    true = np.argsort(-(user @ item.T), axis=1, kind="stable")[:, :20]
    _, found = faiss.read_index(str(out / "items.faiss")).search(np.ascontiguousarray(user), 20)
    recall = np.mean([np.isin(*rows).mean() for rows in zip(true, found, strict=True)])
    assert about["recall"] == pytest.approx(recall)
    assert recall >= min_recall
    assert (about["lists_searched"] == 10) == (min_recall == 1.0)


@pytest.mark.parametrize("min_recall", [0, 1.5])
def test_a_recall_that_cannot_be_is_refused(command: Command, shop_run: Path, tmp_path: Path, min_recall: float):
    refused = command("export", shop_run, "--out", tmp_path / "shipped", "--index", "ivf", "--min-recall", min_recall)
    assert refused.exit_code == 2
    assert "expected a share above 0, at most 1" in refused.stderr
    assert not (tmp_path / "shipped").exists()


def test_an_export_is_replaced_only_on_request_and_only_if_it_is_one(command: Command, shop_run: Path, tmp_path: Path):
    out = tmp_path / "shipped"
    command("export", shop_run, "--out", out)
    refused = command("export", shop_run, "--out", out, "--as", "parquet")
    assert refused.exit_code == 1
    assert "--overwrite" in refused.stderr
    assert (out / "embeddings.safetensors").is_file()
    assert command("export", shop_run, "--out", out, "--as", "parquet", "--overwrite").exit_code == 0
    assert not (out / "embeddings.safetensors").exists()
    (out / "notes.txt").write_text("mine")
    assert "holds notes.txt beside" in command("export", shop_run, "--out", out, "--overwrite").stderr
    (out / "notes.txt").unlink()
    (out / "export.json").unlink()
    assert command("export", shop_run, "--out", out, "--overwrite").exit_code == 1
    assert (out / "items.faiss").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["shipped"]


def test_a_moved_graph_is_given_by_hand_and_checked(
    command: Command, shop: Path, shop_run: Path, shop_graph: Path, tmp_path: Path
):
    (tmp_path / "moved").symlink_to(shop_graph)
    plain = command("recommend", shop_run, "--format", "json").stdout
    assert command("recommend", shop_run, "--graph", tmp_path / "moved", "--format", "json").stdout == plain
    command("build-graph", shop, "--out", tmp_path / "other", "-k", 3)
    for name in ("recommend", "evaluate"):
        refused = command(name, shop_run, "--graph", tmp_path / "other")
        assert refused.exit_code == 1
        assert "is not the one" in refused.stderr
