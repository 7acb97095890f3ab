"""What a user ships: recommendations with external ids, and embeddings with an index that answers the same top-k."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from dream_pyg.data.files import (
    atomic_directory,
    atomic_path,
    check_replaceable,
    check_writable,
    is_free,
    save_tensors,
    sha256_file,
    temporary_directory,
    write_json,
)
from dream_pyg.data.tables import positions
from dream_pyg.errors import ConfigError, DataError, StoreError
from dream_pyg.graph.csr import UserItems
from dream_pyg.graph.schema import INTERACTS, label_name, labelled_splits
from dream_pyg.ranking import Ranking, rank_blocks
from dream_pyg.training.run import Run

logger = logging.getLogger("dream_pyg")

TABLE_FORMATS = (".parquet", ".csv", ".json")
EXPORT_FORMATS = ("safetensors", "parquet")
EXPORT_INDICES = ("flat", "ivf")
EXPORT_INFO = "export.json"
_EXPORTED = (EXPORT_INFO, "users.parquet", "items.parquet", "embeddings.safetensors", "items.faiss")
_ROWS_OF_A_PART = 1 << 20
"""Of a table that is written."""
_LISTS = 4
"""Lists of an inverted file, over the root of the number of items."""
_ITEMS_OF_A_LIST = 39
"""The fewest items a list has on average, which is what faiss asks for to train it."""
_MEASURED_USERS = 1000
_MEASURED_K = 20


def recommend_table(run: Run, k: int, users: Sequence[Any] | None = None, **options: Any) -> pl.DataFrame:
    """Top-k recommendations with external ids, as one table; see :func:`recommend_blocks`, with the same options."""
    return pl.concat(recommend_blocks(run, k, users, **options))


def recommend_blocks(
    run: Run,
    k: int,
    users: Sequence[Any] | None = None,
    *,
    items: Sequence[Any] | None = None,
    include_seen: bool = False,
    mask_held_out: bool = True,
    skip_cold: bool = False,
) -> Iterator[pl.DataFrame]:
    """Top-k recommendations with external ids, for a block of users at a time, so that memory is bounded.

    Args:
        run: A finished run.
        k: Items per user.
        users: External ids, or their text; all users by default. One that is named twice gets its rows once.
        items: External ids, or their text, of those that may be recommended, say what is in stock; all by default.
        include_seen: Whether items that the user interacted with may be recommended again.
        mask_held_out: Whether items of the valid and test splits count as seen, as they should outside of evaluation.
        skip_cold: Whether users without an interaction in train, of whom a model knows nothing, are left out.

    Returns:
        Tables of ``user_id``, ``rank`` (from 1), ``item_id``, ``score``. A user with fewer than k unseen items gets
        fewer rows.

    Raises:
        ConfigError: If k is not positive.
        DataError: If a user or an item is unknown, or none is named.
    """
    if k < 1:
        raise ConfigError(f"The number of recommendations must be positive (got {k}).")
    rows = torch.arange(run.model.num_users) if users is None else _rows(run.stored.user_ids, users, "users")
    store = run.graph[INTERACTS]
    device = store.edge_index.device
    if items is not None and not len(items):
        raise DataError("No item may be recommended: the list of items is empty. Name some, or leave the list out.")
    allowed = None if items is None else _rows(run.stored.item_ids, items, "items").sort().values.to(device)
    seen = None
    if not include_seen:
        splits = labelled_splits(run.graph) if mask_held_out else ("train",)
        pairs = torch.cat([store[label_name(split)] for split in splits], dim=1)
        pairs = pairs if allowed is None else _among(pairs, allowed, run.model.num_items)
        seen = UserItems.from_pairs(pairs, run.model.num_users)
    trained = torch.zeros(run.model.num_users, dtype=torch.bool)
    trained[store[label_name("train")][0].cpu()] = True
    if cold := int((~trained[rows]).sum()):
        done = "they are left out" if skip_cold else "the model knows nothing of them (--skip-cold leaves them out)"
        logger.warning("%d of %d users have no interaction in train: %s", cold, len(rows), done)
        rows = rows[trained[rows]] if skip_cold else rows
    scorer = run.scorer() if allowed is None else run.scorer().only(allowed)
    return (_frame(run, block, allowed) for block in rank_blocks(scorer, rows.to(device), k, seen))


def write_table(blocks: Iterable[pl.DataFrame], path: str | Path) -> int:
    """Write a table that comes in blocks, atomically; memory holds a few of them (all of them for JSON).

    Args:
        blocks: Its rows, in order.
        path: A name that ends in ``.parquet``, ``.csv`` or ``.json`` (a list of objects).

    Returns:
        The number of rows.

    Raises:
        ConfigError: If the suffix is none of these.
    """
    path = Path(path)
    check_table_path(path)
    num_rows = 0
    parts: list[Path] = []
    with atomic_path(path) as temporary, temporary_directory(path) as directory:
        for part in _joined(blocks, _ROWS_OF_A_PART):
            parts.append(directory / f"{len(parts)}.parquet")
            part.write_parquet(parts[-1])
            num_rows += len(part)
        table = pl.scan_parquet(parts)
        if path.suffix == ".parquet":
            table.sink_parquet(temporary)
        elif path.suffix == ".csv":
            table.sink_csv(temporary)
        else:
            table.collect().write_json(temporary)
    return num_rows


def _joined(blocks: Iterable[pl.DataFrame], num_rows: int) -> Iterator[pl.DataFrame]:
    """The same rows in blocks of at least so many, but for the last."""
    waiting: list[pl.DataFrame] = []
    num_waiting = 0
    for block in blocks:
        waiting.append(block)
        num_waiting += len(block)
        if num_waiting >= num_rows:
            yield pl.concat(waiting)
            waiting, num_waiting = [], 0
    if waiting:
        yield pl.concat(waiting)


def check_table_path(path: Path) -> None:
    """Refuse a table path of unknown format, or where nothing can be written, before any work is done."""
    if path.suffix not in TABLE_FORMATS:
        raise ConfigError(f"Cannot tell the format of {path}; expected a name ending in {', '.join(TABLE_FORMATS)}.")
    if path.is_dir():
        raise StoreError(f"Cannot write {path}: it is a directory, and a table is a file. Choose another path.")
    check_writable(path)


def export_run(
    run: Run,
    path: str | Path,
    *,
    format: str = "safetensors",
    index: str = "flat",
    min_recall: float = 0.95,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write embeddings, external ids and a faiss index into a new directory.

    The directory holds ``embeddings.safetensors`` (tensors ``user`` (U, D) and ``item`` (I, D)) with ``users.parquet``
    and ``items.parquet`` (external ids in row order), or with ``format="parquet"`` the same two tables with a column
    ``embedding`` instead; ``items.faiss``, an inner-product index over the item rows, so that searching it with a user
    row gives that user's top-k before seen items are left out; and ``export.json``. The index is exact, or for large
    catalogues an inverted file that looks at as few of its lists as ``min_recall`` allows; what it finds is stated.

    A teacher's vote is no inner product and is left out, so that the top-k of a run that has one are not quite those of
    :func:`recommend_table`; ``export.json`` says so as ``vote_left_out``.

    Args:
        run: A finished run.
        path: The directory to create.
        format: ``"safetensors"`` or ``"parquet"``.
        index: ``"flat"`` or ``"ivf"``.
        min_recall: The share of the true top 20 that the latter has to find, measured on random users.
        overwrite: Whether an existing directory may be replaced.

    Returns:
        What ``export.json`` says.

    Raises:
        ConfigError: If the format is unknown, or the model has no embeddings (then write its recommendations).
        StoreError: If ``path`` exists and may not be replaced, or cannot be written.
    """
    if format not in EXPORT_FORMATS:
        raise ConfigError(f"Unknown export format {format!r}; expected one of {', '.join(EXPORT_FORMATS)}.")
    if index not in EXPORT_INDICES:
        raise ConfigError(f"Unknown index {index!r}; expected one of {', '.join(EXPORT_INDICES)}.")
    if not 0 < min_recall <= 1:
        raise ConfigError(f"min_recall is {min_recall}; expected a share above 0, at most 1.")
    if overwrite:
        check_replaceable(Path(path), _EXPORTED)
    elif not is_free(Path(path)):
        raise StoreError(f"{path} exists already. Replace it with --overwrite, or choose another directory.")
    check_writable(Path(path))
    user, item = (part.cpu().float().contiguous() for part in run.embeddings())
    tables = {"users": ("user_id", run.stored.user_ids, user), "items": ("item_id", run.stored.item_ids, item)}
    with atomic_directory(path, replace=_EXPORTED if overwrite else None) as directory:
        for name, (column, ids, rows) in tables.items():
            frame = pl.DataFrame({column: ids})
            if format == "parquet":
                frame = frame.with_columns(
                    pl.Series("embedding", rows.numpy(), dtype=pl.Array(pl.Float32, rows.size(1)))
                )
            frame.write_parquet(directory / f"{name}.parquet")
        if format == "safetensors":
            save_tensors(directory / "embeddings.safetensors", {"user": user, "item": item})
        made, about = _make_index(index, user.numpy(), item.numpy(), min_recall)
        (directory / "items.faiss").write_bytes(faiss.serialize_index(made).data)
        info = {
            "model": run.config.model_name,
            "dataset": run.stored.name,
            "graph_fingerprint": run.stored.fingerprint,
            "users": len(user),
            "items": len(item),
            "embedding_dim": item.size(1),
            "score": "inner product",
            "vote_left_out": run.vote is not None,
            "index": about,
            "files": {file.name: sha256_file(file) for file in sorted(directory.iterdir())},
        }
        write_json(directory / EXPORT_INFO, info)
    return info


def _make_index(
    kind: str, user: NDArray[np.float32], item: NDArray[np.float32], min_recall: float
) -> tuple[faiss.Index, dict[str, Any]]:
    """An index of the items, and what there is to know about it."""
    exact = faiss.IndexFlatIP(item.shape[1])
    exact.add(item)
    if kind == "flat":
        return exact, {"kind": kind, "recall": 1.0}
    num_lists = max(1, min(int(_LISTS * len(item) ** 0.5), len(item) // _ITEMS_OF_A_LIST))
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(item.shape[1]), item.shape[1], num_lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.min_points_per_centroid = 1  # else faiss prints that there are few; what they find is measured
    index.train(item)
    index.add(item)
    asked = user[np.random.default_rng(0).permutation(len(user))[:_MEASURED_USERS]]
    k = min(_MEASURED_K, len(item))
    _, wanted = exact.search(asked, k)
    recall = 0.0
    index.nprobe = 1
    while True:
        _, found = index.search(asked, k)
        recall = float(np.mean([np.isin(*rows).mean() for rows in zip(wanted, found, strict=True)]))
        if recall >= min_recall or index.nprobe == num_lists:
            break
        index.nprobe = min(2 * index.nprobe, num_lists)
    about = {"kind": kind, "lists": num_lists, "lists_searched": index.nprobe, "measured_at": k, "recall": recall}
    return index, about


def _rows(known: pl.Series, named: Sequence[Any], what: str) -> torch.Tensor:
    """Where ids stand in the graph, each once, in the order named."""
    if isinstance(named, str):
        raise DataError(f"Expected a list of ids of {what}, got the text {named!r}. Put it in a list.")
    # Ids arrive as text from a command line, whatever their type in the data.
    text = pl.Series([str(one) for one in named], dtype=pl.String).unique(maintain_order=True)
    catalogue = known.cast(pl.String)
    row = positions(text, catalogue)
    if (row < 0).any():  # Blanks around an id may belong to it, but seldom do.
        row = np.where(row < 0, positions(text.str.strip_chars(), catalogue), row)
    missing = text.filter(row < 0).unique(maintain_order=True).to_list()
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise DataError(
            f"{len(missing)} of {len(text)} {what} are not in the graph: {', '.join(missing[:5])}{more}. "
            f"Give ids as they stand in {what}.parquet of the graph, or leave these out."
        )
    return torch.from_numpy(row)


def _among(pairs: torch.Tensor, item: torch.Tensor, num_items: int) -> torch.Tensor:
    """The user-item pairs (2, E) of some items (N,), which are places among these then."""
    place = item.new_full((num_items,), -1)
    place[item] = torch.arange(len(item), device=item.device)
    user, own = pairs[0], place[pairs[1]]
    return torch.stack([user, own])[:, own >= 0]


def _frame(run: Run, ranking: Ranking, allowed: torch.Tensor | None) -> pl.DataFrame:
    """A block with external ids; its items are places among the allowed ones, if not all are."""
    if allowed is not None:
        ranking = ranking._replace(item=torch.where(ranking.item < 0, -1, allowed[ranking.item]))
    user, item, score = (part.cpu() for part in ranking)
    kept = (item >= 0).flatten().numpy()
    k = item.size(1)
    rank = np.tile(np.arange(1, k + 1, dtype=np.int32), len(user))
    user_rows = np.repeat(user.numpy(), k)[kept]
    return pl.DataFrame(
        {
            "user_id": run.stored.user_ids[user_rows],
            "rank": rank[kept],
            "item_id": run.stored.item_ids[item.flatten().numpy()[kept]],
            "score": score.flatten().numpy()[kept],
        }
    )
