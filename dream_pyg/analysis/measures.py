"""The numbers behind the paper's figures (DREAM, arXiv 2404.11119): pure functions of finished runs.

Figures carry the numbers of the paper's first version (DRepMRec), but for 1b, which is that of the second.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import cast

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torch_geometric.data import HeteroData

from dream_pyg.analysis.plots import require_plots
from dream_pyg.config import INDIFFERENT, SEED
from dream_pyg.data.files import load_tensors
from dream_pyg.errors import ConfigError, StoreError
from dream_pyg.evaluation import parse_metric
from dream_pyg.graph.schema import INTERACTS, ITEM, USER, feature_modalities, feature_name, mask_name
from dream_pyg.models import MODELS, Batch, DualRepresentations, Embeddings, Recommender
from dream_pyg.nn.losses import bpr_loss
from dream_pyg.training.run import Run, read_best, read_test_metrics
from dream_pyg.training.triplets import TripletSampler

NODES = (USER, ITEM)
LINES = ("behavior", "modal", "general")
SCORES = ("recall@20", "ndcg@20")
_MOST_TRIPLETS = 1 << 18
_PERPLEXITY = 30.0


def gradient_conflict(run: Run, *, seed: int = 0) -> pl.DataFrame:
    r"""Whether behavior and modal loss want the same of the embeddings they share (Figure 1a), epoch by epoch.

    With :math:`\mathbf E` the ID embeddings of users or of items, and the triplets of one pass over the train
    interactions,

    .. math::
        \mathbf g_B = \nabla_{\mathbf E} \mathcal L_{BPR}(\text{behavior line}), \qquad
        \mathbf g_M = \nabla_{\mathbf E} \mathcal L_{BPR}(\text{modal line}), \qquad
        c_n = \cos(\mathbf g_{B,n}, \mathbf g_{M,n})

    A node is in conflict where :math:`c_n < 0`: a step of its embedding that lowers one loss raises the other.

    Args:
        run: A run that kept epochs, of a model whose two lines share ID embeddings.
        seed: Seed of the triplets, which are the same for all epochs.

    Returns:
        Columns ``epoch``, ``nodes`` (user, item), ``cosine`` with its quartiles ``cosine_q25`` and ``cosine_q75``
        over nodes, and ``conflict_share``.

    Raises:
        StoreError: If no epochs were kept.
        ConfigError: If the model has not two lines, or they share no ID embedding.

    Note:
        EXACT: gradients with respect to user and item embeddings, of a behavior and a modal loss apart. CHOSEN, as the
        paper defines neither: the losses are BPR on either line alone; a node counts if both losses reach it; the
        triplets are at most 262,144 of one pass.
    """
    triplets = TripletSampler(run.graph).epoch(torch.Generator().manual_seed(seed))
    device = run.graph[INTERACTS].edge_index.device
    batch = Batch(*(part[:_MOST_TRIPLETS].to(device) for part in triplets))
    rows = []
    for epoch, model in kept_models(run):
        parameters = dict(model.named_parameters())
        tables = {node: parameters[f"{node}_embedding"] for node in NODES if f"{node}_embedding" in parameters}
        losses = [_line_loss(line, batch) for line in dual_lines(model, run.graph)]
        gradients = [_gradients(loss, list(tables.values())) for loss in losses]
        for node, behavior, modal in zip(tables, *gradients, strict=True):
            if behavior is None or modal is None:
                continue
            cosine = _row_cosines(behavior, modal).numpy()
            if len(cosine):
                q25, q75 = np.quantile(cosine, [0.25, 0.75])
                rows.append((epoch, node, cosine.mean(), q25, q75, (cosine < 0).mean()))
    if not rows:
        raise ConfigError(
            f"The two lines of {run.config.model_name!r} ({run.paths.root}) share no ID embeddings, so their losses "
            "cannot pull these apart. Take a run of a model in which they do, for example mgcn or dream."
        )
    columns = ["epoch", "nodes", "cosine", "cosine_q25", "cosine_q75", "conflict_share"]
    return pl.DataFrame(rows, schema=columns, orient="row")


@torch.no_grad()
def modal_forgetting(run: Run) -> pl.DataFrame:
    r"""How far the modal representation of items has left the raw features (Figure 1b, version 2), epoch by epoch.

    Representation and features differ in width, so their similarity structures are compared: the cosine distance
    between the matrices of cosines among items, both centred. With :math:`\mathbf Z, \mathbf R_m` the unit rows of
    representation and features less their column means,

    .. math::
        1 - \frac{\langle \mathbf Z \mathbf Z^\top, \mathbf R_m \mathbf R_m^\top \rangle_F}
        {\lVert \mathbf Z \mathbf Z^\top \rVert_F \lVert \mathbf R_m \mathbf R_m^\top \rVert_F}
        = 1 - \frac{\lVert \mathbf Z^\top \mathbf R_m \rVert_F^2}
        {\lVert \mathbf Z^\top \mathbf Z \rVert_F \lVert \mathbf R_m^\top \mathbf R_m \rVert_F}

    which is one minus the linear CKA of unit rows (arXiv 1905.00414): 0 for features merely rotated or scaled, 1 if
    either has no structure at all.

    Args:
        run: A run that kept epochs, of a model with two lines.

    Returns:
        Columns ``epoch``, ``modality``, ``distance``; items without the modality are left out.

    Raises:
        StoreError: If no epochs were kept.
        ConfigError: If the model has not two lines, or the graph no features.

    Note:
        EXACT: a cosine distance to the original features at each epoch. CHOSEN: between similarity structures, as
        the signal of Eq. 12 compares them, since modal representations here are not tables as wide as the features;
        and each modality by itself.
    """
    references = {}
    for modality in feature_modalities(run.graph):
        store = run.graph[ITEM]
        has = store[mask_name(modality)]
        rows = _centred_unit_rows(store[feature_name(modality)][has].float())
        references[modality] = has, rows, _gram_norm(rows)
    if not references:
        raise ConfigError(f"The graph of {run.paths.root} has no features to compare with. Take a run on one that has.")
    found = []
    for epoch, model in kept_models(run):
        item = dual_lines(model, run.graph).modal.item
        for modality, (has, rows, norm) in references.items():
            z = _centred_unit_rows(item[has])
            shared = (z.T @ rows).square().sum()
            similarity = shared / (_gram_norm(z) * norm).clamp(min=torch.finfo(z.dtype).tiny)
            found.append((epoch, modality, 1.0 - similarity.item()))
    return pl.DataFrame(found, schema=["epoch", "modality", "distance"], orient="row")


def line_scores(run: Run) -> pl.DataFrame:
    """How well either line recommends alone, and both together without a teacher's vote, on test (Figure 5).

    Args:
        run: A finished run of a model with two lines.

    Returns:
        Columns ``dataset``, ``line`` (behavior, modal, general), ``recall@20``, ``ndcg@20``.

    Raises:
        StoreError: If the run has no test metrics.
        ConfigError: If the model has not two lines.
    """
    scores = _test_metrics(run)
    if not set(LINES) <= scores.keys():
        raise ConfigError(_no_lines(run.config.model_name))
    scores["general"] = scores.get("without_vote", scores["general"])
    rows = [(run.stored.name, line, *(scores[line][metric] for metric in SCORES)) for line in LINES]
    return pl.DataFrame(rows, schema=["dataset", "line", *SCORES], orient="row")


@torch.no_grad()
def line_distance(run: Run) -> pl.DataFrame:
    r"""The cosine distance between a node's two representations (Figure 6), epoch by epoch.

    .. math:: 1 - \frac1{|N|} \sum_{n \in N} \cos(\bar{\mathbf e}_{B,n}, \bar{\mathbf e}_{M,n})

    Args:
        run: A run that kept epochs, of a model with two lines.

    Returns:
        Columns ``epoch``, ``nodes`` (user, item), ``distance``; nodes with a zero representation are left out.

    Raises:
        StoreError: If no epochs were kept.
        ConfigError: If the model has not two lines.

    Note:
        EXACT: the measure, at each epoch. CHOSEN: the mean over nodes, users and items apart.
    """
    rows = []
    for epoch, model in kept_models(run):
        behavior, modal = dual_lines(model, run.graph)
        for node, first, second in zip(NODES, behavior, modal, strict=True):
            rows.append((epoch, node, 1.0 - _row_cosines(first, second).mean().item()))
    return pl.DataFrame(rows, schema=["epoch", "nodes", "distance"], orient="row")


@torch.no_grad()
def line_map(run: Run, *, num_nodes: int = 1000, seed: int = 0) -> pl.DataFrame:
    """Both representations of some users and items in one plane, by t-SNE (Figure 7; Figure 1b-c of version 1).

    Args:
        run: A run of a model with two lines.
        num_nodes: How many users and items to draw; all if there are fewer.
        seed: Seed of the draw and of t-SNE.

    Returns:
        Columns ``nodes`` (user, item), ``id`` (external), ``behavior_x``, ``behavior_y``, ``modal_x``, ``modal_y``.

    Raises:
        ConfigError: If the model has not two lines, a line has one dimension, or fewer than two nodes have both
            representations.
        MissingExtraError: If scikit-learn is not installed.

    Note:
        EXACT: t-SNE of both representations of 1,000 random users and items. CHOSEN: one embedding of all of them, of
        unit rows (both lines are compared by cosine everywhere else), perplexity 30; a node without one of the
        representations is not drawn.
    """
    require_plots()
    from sklearn.manifold import TSNE

    run.model.eval()
    behavior, modal = (torch.cat(line).cpu() for line in dual_lines(run.model, run.graph))
    if behavior.size(1) < 2:
        raise ConfigError(
            f"The representations of {run.paths.root} have {behavior.size(1)} dimension; a map needs at least 2. "
            "Take a run with a larger model.embedding_dim."
        )
    present = torch.nonzero(behavior.any(dim=1) & modal.any(dim=1)).squeeze(1).numpy()
    chosen = np.sort(np.random.default_rng(seed).permutation(present)[:num_nodes])
    if len(chosen) < 2:
        raise ConfigError(
            f"{run.paths.root} has {len(chosen)} nodes with both representations; a map needs at least 2."
        )
    rows = F.normalize(torch.cat([behavior[chosen], modal[chosen]]), dim=1).numpy()
    perplexity = min(_PERPLEXITY, (len(rows) - 1) / 3)
    plane = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(rows).astype(np.float64)
    ids = [*run.stored.user_ids.cast(pl.String), *run.stored.item_ids.cast(pl.String)]
    places = np.hstack([plane[: len(chosen)], plane[len(chosen) :]])
    return pl.DataFrame(
        {"nodes": np.where(chosen < run.model.num_users, USER, ITEM), "id": [ids[node] for node in chosen]}
        | {name: places[:, i] for i, name in enumerate(("behavior_x", "behavior_y", "modal_x", "modal_y"))}
    )


def sensitivity(runs: Iterable[tuple[str, Run]], keys: Sequence[str], *, metric: str = "recall@20") -> pl.DataFrame:
    """A test metric against hyper-parameters, one varied at a time (Figures 8 and 9).

    Runs that differ in the seed alone are repetitions. For each key, runs with the same values of the other keys make
    a series, and a series with a single value is left out.

    Args:
        runs: Runs with their labels, alike but for ``keys`` and the seed.
        keys: Names of hyper-parameters; ``image_weight`` is the share of images in ``modality_weights``.
        metric: Any test metric that the runs hold.

    Returns:
        Columns ``key``, ``series`` (the other keys' values), ``value``, ``metric``, ``mean``, ``std`` (0 for a single
        run), ``num_runs``.

    Raises:
        ConfigError: If runs are of different graphs or differ in anything else, or no key has two values.
        StoreError: If a run has no test metrics.
    """
    parse_metric(metric)
    hyperparameters = ["modality_weights" if key == "image_weight" else key for key in keys]
    rows: list[dict[str, float]] = []
    first: tuple[str, Run] | None = None
    for labelled in runs:
        first = first or labelled
        _check_comparable(first, labelled, [f"model.{name}" for name in hyperparameters], keys)
        _, run = labelled
        _check_has(run, hyperparameters)
        scores = _test_metrics(run)["general"]
        if metric not in scores:
            raise ConfigError(f"{run.paths.root} has no test metric {metric!r}; expected one of {', '.join(scores)}.")
        rows.append({key: _value(run, key) for key in keys} | {"score": scores[metric]})
    table = pl.DataFrame(rows)
    parts = [_series(table, key, [other for other in keys if other != key]) for key in keys]
    parts = [part.insert_column(3, pl.lit(metric).alias("metric")) for part in parts if len(part)]
    if not parts:
        raise ConfigError(
            f"No two runs differ in one of {', '.join(keys)} while they share the others, so there is nothing to "
            f"compare. Train more, for example with --set model.{keys[0]}=0.1 and all else as it is."
        )
    return pl.concat(parts)


def kept_models(run: Run) -> Iterator[tuple[int, Recommender]]:
    """The run's model with the weights of each kept epoch, in order; it is the same object each time.

    Raises:
        StoreError: If no epochs were kept.
        ConfigError: If none were kept and the model has not two lines, of which all figures by epoch are.
    """
    epochs = run.paths.kept_epochs()
    if not epochs:
        dual_lines(run.model, run.graph)  # Without two lines no other training would help.
        raise StoreError(
            f"{run.paths.root} kept no epochs, so there is nothing to show of its training. Train a run that does: "
            f"dream-pyg train {run.config.graph} --model {run.config.model_name} --run NEW --set training.keep_every=1"
        )
    model = copy.deepcopy(run.model).eval()
    for epoch in epochs:
        weights, _ = load_tensors(run.paths.epoch(epoch))
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise StoreError(
                f"{run.paths.epoch(epoch)} does not fit the model of {run.paths.config}: {error}"
            ) from error
        yield epoch, model


def dual_lines(model: Recommender, graph: HeteroData) -> DualRepresentations:
    """The two lines of a model.

    Raises:
        ConfigError: If it has not two; the message lists the models that have.
    """
    lines = model.dual_representations(graph)
    if lines is None:
        raise ConfigError(_no_lines(type(model).__name__))
    return lines


def _no_lines(model: str) -> str:
    able = [name for name, kind in MODELS.items() if kind.dual_representations is not Recommender.dual_representations]
    return f"{model} has no behavior and modal line to compare. Take a run of a model that has: {', '.join(able)}."


def _line_loss(line: Embeddings, batch: Batch) -> Tensor:
    return bpr_loss(*batch.rows(*line))


def _gradients(loss: Tensor, tables: list[Tensor]) -> Sequence[Tensor | None]:
    if not tables or not loss.requires_grad:
        return [None] * len(tables)
    return torch.autograd.grad(loss, tables, retain_graph=True, allow_unused=True)


def _row_cosines(first: Tensor, second: Tensor) -> Tensor:
    """Cosines of the rows that are zero in neither, in float64 on the CPU."""
    both = first.any(dim=1) & second.any(dim=1)
    # The gradient at one node is often shorter than the least norm that is told from 0 by default.
    least = torch.finfo(torch.float64).tiny
    return F.cosine_similarity(first[both].double(), second[both].double(), dim=1, eps=least).cpu()


def _centred_unit_rows(rows: Tensor) -> Tensor:
    unit = F.normalize(rows, dim=1)
    return unit - unit.mean(dim=0)


def _gram_norm(rows: Tensor) -> Tensor:
    # X^T X and X X^T have the same norm: the smaller one is built.
    return torch.linalg.matrix_norm(rows.T @ rows if rows.size(0) > rows.size(1) else rows @ rows.T)


def _test_metrics(run: Run) -> dict[str, dict[str, float]]:
    lines = read_test_metrics(run.paths, read_best(run.paths)[0])
    if lines is None:
        raise StoreError(
            f"{run.paths.root} is not finished or was trained without test: it has no {run.paths.test_metrics.name} of "
            f"its best epoch. Continue it with `dream-pyg train --resume --run {run.paths.root}`."
        )
    return lines


def _check_comparable(
    first: tuple[str, Run], other: tuple[str, Run], studied: Sequence[str], keys: Sequence[str]
) -> None:
    (there, first_run), (here, run) = first, other
    where = f"(here = {here}, there = {there})"
    if run.stored.fingerprint != first_run.stored.fingerprint:
        names = (f"{one.stored.name!r} {one.stored.fingerprint[:12]}" for one in (run, first_run))
        raise ConfigError(
            f"Runs of different graphs cannot be compared {where}: graph: {' here, '.join(names)} there. "
            "Draw those of each graph apart."
        )
    # Chance, too, is what the figure shows.
    if strange := run.config.differences(first_run.config, besides=(*studied, SEED, *INDIFFERENT)):
        raise ConfigError(
            f"Runs may differ only in {', '.join(keys)} and the seed {where}: {'; '.join(strange)}. Leave one out."
        )


def _check_has(run: Run, hyperparameters: Iterable[str]) -> None:
    for name in hyperparameters:
        able = [model for model, kind in MODELS.items() if hasattr(kind.Config(), name)]
        if run.config.model_name not in able:
            raise ConfigError(
                f"Model {run.config.model_name!r} ({run.paths.root}) has no {name}. Take runs of {', '.join(able)}."
            )


def _value(run: Run, key: str) -> float:
    if key == "image_weight":
        # As the model resolved them: scaled, or by default. Rounded, so that 0.3 of 1 and 3 of 10 are one value.
        weights = cast("dict[str, float]", run.model.modality_weights)
        return round(weights.get("image", 0.0), 6)
    return float(run.config.model[key])


def _series(table: pl.DataFrame, key: str, others: list[str]) -> pl.DataFrame:
    """The part of a sensitivity table about one key."""
    series = pl.concat_str([pl.format(f"{other} {{}}", pl.col(other)) for other in others], separator=", ")
    grouped = table.group_by(*others, series.alias("series"), pl.col(key).alias("value"), maintain_order=True).agg(
        pl.col("score").mean().alias("mean"),
        pl.col("score").std().fill_null(0.0).alias("std"),
        pl.len().alias("num_runs"),
    )
    several = grouped.filter(pl.len().over("series") > 1).sort(*others, "value")
    return several.select(pl.lit(key).alias("key"), "series", "value", "mean", "std", "num_runs")
