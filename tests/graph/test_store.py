"""The graph store: what goes in comes out, memory-mapped, under a fingerprint of content and not of names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import psutil
import pytest
import torch

from dream_pyg import DatasetConfig, StoreError, build_graph, build_store, load_dataset, load_graph
from dream_pyg.graph.store import read_info


def tensors_of(store: Any) -> dict[str, torch.Tensor]:
    """The tensors of one node or edge type."""
    return {name: value for name, value in store.items() if isinstance(value, torch.Tensor)}


def assert_equal_graphs(first: Any, second: Any) -> None:
    """The same types, the same attributes and the same bits."""
    assert first.node_types == second.node_types
    assert set(first.edge_types) == set(second.edge_types)
    for kind in (*first.node_types, *first.edge_types):
        mine, theirs = tensors_of(first[kind]), tensors_of(second[kind])
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            other = theirs[name]
            assert (value.dtype, value.shape) == (other.dtype, other.shape), (kind, name)
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other)), (kind, name)
    for kind in first.node_types:
        assert first[kind].num_nodes == second[kind].num_nodes


def test_what_goes_in_comes_out(shop: Path, shop_graph: Path):
    dataset = load_dataset(DatasetConfig.load(shop))
    stored = load_graph(shop_graph)
    assert_equal_graphs(stored.graph, build_graph(dataset, num_neighbors=5))
    assert stored.user_ids.to_list() == dataset.interactions.user_ids.to_list()
    assert stored.item_ids.to_list() == dataset.interactions.item_ids.to_list()
    for edge_type in stored.graph.edge_types:
        assert stored.graph[edge_type].edge_index.sort_order == "col"


def test_a_store_moves_as_a_whole(shop_graph: Path, tmp_path: Path):
    shutil.copytree(shop_graph, tmp_path / "elsewhere")
    moved = load_graph(tmp_path / "elsewhere")
    original = load_graph(shop_graph)
    assert moved.fingerprint == original.fingerprint
    assert_equal_graphs(moved.graph, original.graph)


def test_building_gives_what_loading_gives(shop: Path, tmp_path: Path):
    built, reused = build_store(DatasetConfig.load(shop), tmp_path / "graph")
    assert not reused
    assert_equal_graphs(built.graph, load_graph(tmp_path / "graph").graph)
    again, reused = build_store(DatasetConfig.load(shop), tmp_path / "graph")
    assert reused
    assert again.info == built.info


def test_features_stay_on_disk(tmp_path: Path):
    num_items, num_features = 2000, 4096
    size = num_items * num_features * 4
    generator = np.random.default_rng(0)
    pairs = {(int(user), int(item)) for user, item in zip(range(2000), generator.permutation(num_items), strict=True)}
    pairs |= {(user % 50, item) for user, item in pairs}
    rows = pl.DataFrame({"user_id": [u for u, _ in pairs], "item_id": [i for _, i in pairs]}).sort("user_id", "item_id")
    rows.write_csv(tmp_path / "clicks.csv")
    np.save(tmp_path / "image.npy", generator.standard_normal((num_items, num_features), dtype=np.float32))
    config = DatasetConfig.create(interactions=str(tmp_path / "clicks.csv"))
    config = config.with_modality("image", features=tmp_path / "image.npy")
    path = build_store(config, tmp_path / "graph", num_neighbors=1, user_graphs=False)[0].path
    process = psutil.Process()

    def private_bytes() -> int:
        memory = process.memory_full_info()
        return int(memory.uss)

    before = private_bytes()
    stored = load_graph(path, verify=False)
    assert stored.graph["item"].x_image.untyped_storage().nbytes() >= size
    assert private_bytes() - before < size / 4
    maps = [mapped.path for mapped in process.memory_maps()]
    assert str(path / "features.safetensors") in maps


# Fingerprints


def fingerprint(directory: Path, **parameters: Any) -> str:
    """Of the store that a dataset directory would make."""
    out = directory.parent / f"store-{len(list(directory.parent.iterdir()))}"
    return build_store(DatasetConfig.load(directory), out, **{"num_neighbors": 3, **parameters})[0].fingerprint


@pytest.fixture
def data(shop: Path, tmp_path: Path) -> Path:
    """A copy of the bookshop's data, to be changed; its counts are not checked."""
    shutil.copytree(shop, tmp_path / "data")
    toml = tmp_path / "data" / "dataset.toml"
    toml.write_text(toml.read_text().split("[expected]")[0])
    return tmp_path / "data"


def rewrite(file: str, old: str, new: str) -> Callable[[Path], None]:
    """Replace text in a file."""

    def apply(directory: Path) -> None:
        text = (directory / file).read_text()
        assert old in text
        (directory / file).write_text(text.replace(old, new))

    return apply


def nudge_a_feature(directory: Path) -> None:
    image = np.load(directory / "image.npy")
    image[5, 5] += 1
    np.save(directory / "image.npy", image)


def drop_an_interaction(directory: Path) -> None:
    pl.read_csv(directory / "interactions.csv")[:-1].write_csv(directory / "interactions.csv")


def rename_a_file(directory: Path) -> None:
    (directory / "image.npy").rename(directory / "covers.npy")
    rewrite("dataset.toml", '"image.npy"', '"covers.npy"')(directory)


def move_files(directory: Path) -> None:
    (directory / "raw").mkdir()
    (directory / "interactions.csv").rename(directory / "raw" / "clicks.csv")
    rewrite("dataset.toml", '"interactions.csv"', '"raw/clicks.csv"')(directory)


def swap_modalities(directory: Path) -> None:
    rewrite("dataset.toml", "modalities.image", "modalities.x")(directory)
    rewrite("dataset.toml", "modalities.text", "modalities.image")(directory)
    rewrite("dataset.toml", "modalities.x", "modalities.text")(directory)


MEANINGFUL = {
    "a feature": nudge_a_feature,
    "an interaction": drop_an_interaction,
    "the seed of the split": rewrite("dataset.toml", "seed = 0", "seed = 1"),
    "the ratios": rewrite("dataset.toml", "0.8,\n    0.1", "0.7,\n    0.2"),
    "a filter": rewrite("dataset.toml", "[split]", "[filter]\nk_core = 2\n\n[split]"),
    "a modality's name": rewrite("dataset.toml", "modalities.image", "modalities.cover"),
    "which file is which modality": swap_modalities,
}
MEANINGLESS = {
    "the dataset's name": rewrite("dataset.toml", 'name = "synthetic"', 'name = "bookshop"'),
    "expected counts": rewrite("dataset.toml", "[split]", "[expected]\nnum_users = 60\n\n[split]"),
    "a comment": rewrite("dataset.toml", "[split]", "# by user\n[split]"),
    "a file's name": rename_a_file,
    "where files lie": move_files,
}


@pytest.mark.parametrize("change", MEANINGFUL.values(), ids=MEANINGFUL.keys())
def test_a_fingerprint_changes_with(data: Path, change: Callable[[Path], None]):
    before = fingerprint(data)
    change(data)
    assert fingerprint(data) != before


@pytest.mark.parametrize("change", MEANINGLESS.values(), ids=MEANINGLESS.keys())
def test_a_fingerprint_does_not_change_with(data: Path, change: Callable[[Path], None]):
    before = fingerprint(data)
    change(data)
    assert fingerprint(data) == before


def test_a_fingerprint_does_not_change_when_the_directory_moves(data: Path):
    before = fingerprint(data)
    assert fingerprint(data.rename(data.parent / "moved")) == before


def test_a_data_dir_is_only_a_place(shop: Path, data: Path, tmp_path: Path):
    (tmp_path / "description").mkdir()
    (data / "dataset.toml").rename(tmp_path / "description" / "dataset.toml")
    config = DatasetConfig.load(tmp_path / "description")
    stored, _ = build_store(config, tmp_path / "first", data_dir=data, num_neighbors=3)
    elsewhere, _ = build_store(config, tmp_path / "second", data_dir=shop, num_neighbors=3)
    assert stored.fingerprint == elsewhere.fingerprint


def test_every_parameter_changes_the_fingerprint(data: Path):
    variants: list[dict[str, Any]] = [{}, {"num_neighbors": 4}, {"include_self": True}, {"user_graphs": False}]
    assert len({fingerprint(data, **variant) for variant in variants}) == len(variants)


# Checksums


def test_verification_can_be_left_out_but_sizes_are_always_checked(shop_graph: Path, tmp_path: Path):
    path = Path(shutil.copytree(shop_graph, tmp_path / "graph"))
    content = bytearray((path / "features.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "features.safetensors").write_bytes(content)
    with pytest.raises(StoreError, match="does not match the checksum"):
        load_graph(path)
    load_graph(path, verify=False)
    (path / "features.safetensors").write_bytes(content[:-1])
    with pytest.raises(StoreError, match=f"expected {len(content)} bytes, got {len(content) - 1}"):
        load_graph(path, verify=False)


def test_graph_json_records_how_it_was_made(shop: Path, shop_graph: Path):
    info = read_info(shop_graph)
    assert info["parameters"] == {
        "num_neighbors": 5,
        "include_self": False,
        "user_graphs": True,
        "engine": "auto",
        "min_recall": 0.98,
    }
    assert info["knn"].keys() == info["counts"]["edges"].keys() - {"user interacts item", "item rev_interacts user"}
    assert {(report["engine"], report["recall"], report["num_measured"]) for report in info["knn"].values()} == {
        ("exact", 1.0, 0)
    }
    assert {role: entry["path"] for role, entry in info["inputs"].items()} == {
        "interactions": "interactions.csv",
        "items": "items.csv",
        "image.features": "image.npy",
        "text.features": "text.parquet",
    }
    assert info["config"]["split"]["method"] == "random"
    assert info["overrides"] == {}
    graph = load_graph(shop_graph).graph
    assert info["counts"]["edges"] == {" ".join(kind): graph[kind].num_edges for kind in graph.edge_types}
    assert str(shop) not in json.dumps(info)  # where files lay on the builder's machine is nobody's business
