"""The numbers of the paper's figures against oracles and properties."""

from __future__ import annotations

import copy
import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor

from dream_pyg.analysis.measures import (
    gradient_conflict,
    kept_models,
    line_distance,
    line_map,
    line_scores,
    modal_forgetting,
    sensitivity,
)
from dream_pyg.data.files import load_tensors, read_json, write_json
from dream_pyg.errors import ConfigError, StoreError
from dream_pyg.graph.schema import ITEM, feature_modalities, feature_name
from dream_pyg.models import DualRepresentations, Embeddings, Recommender
from dream_pyg.models.base import xavier_embedding
from dream_pyg.training.run import Run, RunPaths, keep_epoch, load_run
from dream_pyg.training.triplets import TripletSampler
from tests.oracles import figures as oracle

DIM = 4


@pytest.fixture(scope="module")
def run(kept_run: Path) -> Run:
    return load_run(kept_run, device="cpu")


class Turned(Recommender):
    """A modal line that is the behavior line with its users mapped linearly; the item line may be given."""

    def __init__(self, run: Run, users_by: Tensor | None = None, item: Tensor | None = None) -> None:
        super().__init__(run.graph)
        self.user_embedding, self.item_embedding = xavier_embedding(60, DIM), xavier_embedding(40, DIM)
        self.users_by, self.item = torch.eye(DIM) if users_by is None else users_by, item

    def dual_representations(self, graph):
        """The behavior line, and the modal line made from it."""
        behavior = Embeddings(self.user_embedding, self.item_embedding)
        item = self.item_embedding if self.item is None else self.item
        return DualRepresentations(behavior, Embeddings(self.user_embedding @ self.users_by, item))


def kept(run: Run, model: Recommender, path: Path, epochs: int = 1) -> Run:
    """A run of another model that kept epochs, each with weights of its own."""
    paths = RunPaths(path)
    for epoch in range(epochs):
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(epoch))
        keep_epoch(paths, model.state_dict(), epoch)
    return dataclasses.replace(run, model=model, paths=paths)


def lines_by_epoch(run: Run) -> list[tuple[int, DualRepresentations]]:
    """Both lines of every kept epoch, by another way than the measures take."""
    found = []
    for epoch in (0, 1, 2):
        weights, _ = load_tensors(run.paths.epoch(epoch))
        with torch.no_grad():
            dual = torch.func.functional_call(_Lines(run), {f"model.{name}": value for name, value in weights.items()})
        found.append((epoch, dual))
    return found


class _Lines(torch.nn.Module):
    def __init__(self, run: Run) -> None:
        super().__init__()
        self.model, self.graph = run.model, run.graph

    def forward(self) -> DualRepresentations:
        return self.model.dual_representations(self.graph)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_forgetting_reads_features_of_half_precision(run: Run, dtype: torch.dtype):
    exact = modal_forgetting(run)
    half = dataclasses.replace(run, graph=copy.copy(run.graph))
    for modality in feature_modalities(run.graph):
        half.graph[ITEM][feature_name(modality)] = run.graph[ITEM][feature_name(modality)].to(dtype)
    np.testing.assert_allclose(modal_forgetting(half)["distance"], exact["distance"], atol=0.02)


def test_kept_epochs_begin_untrained_and_differ(run: Run):
    weights = [(epoch, model.user_embedding.detach().clone()) for epoch, model in kept_models(run)]
    assert [epoch for epoch, _ in weights] == [0, 1, 2]
    assert not torch.equal(weights[0][1], weights[1][1])
    assert not torch.equal(weights[1][1], weights[2][1])


def test_line_distance_is_the_mean_cosine_distance(run: Run):
    expected = [
        (epoch, nodes, oracle.cosine_distance(behavior, modal))
        for epoch, dual in lines_by_epoch(run)
        for nodes, behavior, modal in zip(("user", "item"), *dual, strict=True)
    ]
    table = line_distance(run)
    assert [row[:2] for row in table.iter_rows()] == [row[:2] for row in expected]
    np.testing.assert_allclose(table["distance"], [row[2] for row in expected], rtol=1e-5)


@pytest.mark.parametrize(("factor", "distance"), [(3.0, 0.0), (-1.0, 2.0)])
def test_line_distance_of_multiples(run: Run, tmp_path: Path, factor: float, distance: float):
    table = line_distance(kept(run, Turned(run, factor * torch.eye(DIM)), tmp_path))
    np.testing.assert_allclose(table["distance"], [distance, 0.0], atol=1e-6)


def test_modal_forgetting_is_the_distance_of_similarity_structures(run: Run):
    expected = []
    for epoch, dual in lines_by_epoch(run):
        for modality in ("image", "text"):
            has = run.graph["item"][f"has_{modality}"]
            assert not has.all()
            raw = run.graph["item"][f"x_{modality}"][has]
            expected.append((epoch, modality, oracle.structure_distance(dual.modal.item[has], raw)))
    table = modal_forgetting(run)
    assert [row[:2] for row in table.iter_rows()] == [row[:2] for row in expected]
    np.testing.assert_allclose(table["distance"], [row[2] for row in expected], rtol=1e-4)


def test_nothing_is_forgotten_by_features_that_are_only_turned_and_scaled(run: Run, tmp_path: Path):
    features = run.graph["item"].x_image
    turn, _ = torch.linalg.qr(
        torch.randn(features.size(1), features.size(1), generator=torch.Generator().manual_seed(0))
    )
    turned = kept(run, Turned(run, item=5 * features @ turn), tmp_path)
    distance = dict(modal_forgetting(turned).select("modality", "distance").iter_rows())
    assert abs(distance["image"]) < 1e-5
    assert distance["text"] > 0.1


def test_items_that_are_all_alike_have_forgotten_everything(run: Run, tmp_path: Path):
    table = modal_forgetting(kept(run, Turned(run, item=torch.zeros(40, DIM)), tmp_path))
    assert table["distance"].to_list() == [1.0, 1.0]


@pytest.mark.parametrize("scale", [1.0, 1e-9])
def test_gradient_conflict_is_the_cosine_of_both_gradients_at_each_node(run: Run, tmp_path: Path, scale: float):
    by = scale * torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(1))
    toy = kept(run, Turned(run, by), tmp_path, epochs=2)
    triplets = list(
        zip(*(x.tolist() for x in TripletSampler(run.graph).epoch(torch.Generator().manual_seed(7))), strict=True)
    )
    expected = []
    for epoch in (0, 1):
        weights, _ = load_tensors(toy.paths.epoch(epoch))
        user, item = (weights[f"{node}_embedding"].double().numpy() for node in ("user", "item"))
        matrix = by.double().numpy()
        behavior = oracle.bpr_gradients(user, item, triplets)
        modal_user, modal_item = oracle.bpr_gradients(user @ matrix, item, triplets)
        for nodes, first, second in zip(("user", "item"), behavior, (modal_user @ matrix.T, modal_item), strict=True):
            present = first.any(axis=1) & second.any(axis=1)
            cosines = (oracle.unit_rows(first) * oracle.unit_rows(second)).sum(axis=1)[present]
            q25, q75 = np.quantile(cosines, [0.25, 0.75])
            expected.append((epoch, nodes, cosines.mean(), q25, q75, (cosines < 0).mean()))
    table = gradient_conflict(toy, seed=7)
    assert [row[:2] for row in table.iter_rows()] == [row[:2] for row in expected]
    np.testing.assert_allclose(table.drop("nodes").to_numpy()[:, 1:], [row[2:] for row in expected], atol=1e-4)
    assert table["conflict_share"].min() > 0.01


def test_equal_lines_are_never_in_conflict(run: Run, tmp_path: Path):
    table = gradient_conflict(kept(run, Turned(run), tmp_path))
    np.testing.assert_allclose(table["cosine"], 1.0, atol=1e-5)
    assert table["conflict_share"].to_list() == [0.0, 0.0]


def test_only_embeddings_that_both_lines_share_are_compared(run: Run, tmp_path: Path):
    model = Turned(run, item=torch.randn(40, DIM, generator=torch.Generator().manual_seed(0)))
    assert gradient_conflict(kept(run, model, tmp_path))["nodes"].to_list() == ["user"]


def test_measuring_leaves_the_run_and_every_generator_alone(run: Run):
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    state = torch.get_rng_state()
    for measure in (gradient_conflict, modal_forgetting, line_distance, line_scores, line_map):
        first, second = measure(run), measure(run)
        assert first.equals(second), measure
    assert torch.equal(torch.get_rng_state(), state)
    assert [name for name, value in run.model.state_dict().items() if not torch.equal(value, before[name])] == []


def test_line_scores_are_the_test_metrics_of_each_line(run: Run):
    lines = read_json(run.paths.test_metrics)["lines"]
    assert line_scores(run).rows() == [
        ("synthetic", line, lines[line]["recall@20"], lines[line]["ndcg@20"])
        for line in ("behavior", "modal", "general")
    ]


def test_line_scores_of_an_earlier_best_epoch_are_refused(run: Run, tmp_path: Path):
    paths = RunPaths(Path(shutil.copytree(run.paths.root, tmp_path / "run")))
    write_json(paths.test_metrics, {**read_json(paths.test_metrics), "epoch": 99})
    with pytest.raises(StoreError, match=r"has no test_metrics.json of its best epoch. Continue it with"):
        line_scores(dataclasses.replace(run, paths=paths))


def test_a_map_has_each_drawn_node_once_with_its_own_id(run: Run):
    table = line_map(run, num_nodes=30, seed=3)
    assert len(table) == table["id"].n_unique() == 30
    assert set(table["nodes"]) == {"user", "item"}
    ids = {"user": set(run.stored.user_ids), "item": set(run.stored.item_ids)}
    assert all(row["id"] in ids[row["nodes"]] for row in table.iter_rows(named=True))
    assert not line_map(run, num_nodes=30, seed=4)["id"].equals(table["id"])
    assert len(line_map(run, num_nodes=10**6)) <= 100


def test_a_map_puts_equal_representations_together(run: Run, tmp_path: Path):
    model = kept(run, Turned(run, 2 * torch.eye(DIM)), tmp_path)
    table = line_map(model)
    behavior, modal = (table[f"{line}_x", f"{line}_y"].to_numpy() for line in ("behavior", "modal"))
    between = np.linalg.norm(behavior - modal, axis=1)
    across = np.linalg.norm(behavior - np.roll(modal, 1, axis=0), axis=1)
    assert len(table) == 100
    assert np.median(between) < 0.1 * np.median(across)


def opened(*runs: Path) -> list[tuple[str, Run]]:
    return [(run.name, load_run(run, device="cpu")) for run in runs]


def test_sensitivity_varies_one_weight_at_a_time_and_averages_over_seeds(variant: Callable[..., Path]):
    runs = [
        variant("base-0", "model.signal_weight=0.01", "training.seed=0", score=0.3),
        variant("base-1", "model.signal_weight=0.01", "training.seed=1", score=0.5),
        variant("off", "model.signal_weight=0", score=0.2),
        variant("high", "model.signal_weight=1", "training.keep_every=0", score=0.1),
        variant("image", "model.modality_weights={image=1, text=1}", score=0.6),
    ]
    table = sensitivity(opened(*runs), ("signal_weight", "image_weight"))
    root = 0.1 * 2**0.5
    expected = [
        ("signal_weight", "image_weight 0.3", 0.0, "recall@20", 0.2, 0.0, 1),
        ("signal_weight", "image_weight 0.3", 0.01, "recall@20", 0.4, root, 2),
        ("signal_weight", "image_weight 0.3", 1.0, "recall@20", 0.1, 0.0, 1),
        ("image_weight", "signal_weight 0.01", 0.3, "recall@20", 0.4, root, 2),
        ("image_weight", "signal_weight 0.01", 0.5, "recall@20", 0.6, 0.0, 1),
    ]
    assert table.columns == ["key", "series", "value", "metric", "mean", "std", "num_runs"]
    assert [(*row[:4], row[6]) for row in table.iter_rows()] == [(*row[:4], row[6]) for row in expected]
    np.testing.assert_allclose(table["mean", "std"].to_numpy(), [row[4:6] for row in expected], atol=1e-12)


def test_sensitivity_has_a_series_for_each_value_of_the_other_weight(variant: Callable[..., Path]):
    grid = [(intra, inter) for intra in (0.1, 0.0) for inter in (0.2, 0.1, 1e-5)]
    runs = [
        variant(f"{intra}-{inter}", f"model.intra_weight={intra}", f"model.inter_weight={inter}", score=intra + inter)
        for intra, inter in grid
    ]
    table = sensitivity(opened(*runs), ("intra_weight", "inter_weight"))
    inter = table.filter(pl.col("key") == "inter_weight")
    assert inter["series"].unique(maintain_order=True).to_list() == ["intra_weight 0.0", "intra_weight 0.1"]
    assert inter["value"].to_list() == [1e-5, 0.1, 0.2] * 2
    np.testing.assert_allclose(inter["mean"], [1e-5, 0.1, 0.2, 0.10001, 0.2, 0.3])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.temperature=0.5"], r"here = b, there = a\): model\.temperature: 0\.5 here, 0\.2 there"),
        (["training.learning_rate=0.5"], r"training\.learning_rate: 0\.5 here, 0\.02 there"),
        (["model.modality_weights={image=1, text=1}"], r"model\.modality_weights\.image: 1\.0 here, not set there"),
        ([], "No two runs differ in one of intra_weight, inter_weight"),
        (["model.intra_weight=0.5", "model.inter_weight=0.5"], "No two runs differ in one of"),
    ],
)
def test_sensitivity_refuses_runs_that_cannot_be_compared(
    variant: Callable[..., Path], overrides: list[str], message: str
):
    with pytest.raises(ConfigError, match=message):
        sensitivity(opened(variant("a"), variant("b", *overrides)), ("intra_weight", "inter_weight"))


def test_a_kept_epoch_of_another_model_is_refused(run: Run, tmp_path: Path):
    other = kept(run, Turned(run), tmp_path)
    with pytest.raises(StoreError, match=r"epoch-00000\.safetensors does not fit"):
        line_distance(dataclasses.replace(other, model=run.model))
