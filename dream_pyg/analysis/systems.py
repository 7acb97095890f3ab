"""The rows of each table: which systems it has, and with what values each of them is trained."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from dream_pyg.config import RunConfig
from dream_pyg.errors import ConfigError
from dream_pyg.graph.store import read_info
from dream_pyg.models import find_model
from dream_pyg.presets import Preset, load_presets

TABLES = {
    "table1": "statistics of the data set",
    "table2": "performance of all systems",
    "table3": "ablations of DREAM",
    "table4": "Behavior-Modal Alignment (BMA) in other models",
    "related": "systems that the paper names but does not compare, and closed forms",
    "accuracy": "DREAM as published and at its best, for whom, and what each addition is worth",
    "choices": "the preset paper with one value changed that the paper leaves open or prints otherwise, on validation",
}
COMPARED = ("bpr", "lightgcn", "vbpr", "mmgcn", "dualgnn", "bm3", "freedom", "mgcn", "dream")
"""The systems of Table 2, in its order."""
RELATED = ("itemknn", "ease", "addease", "buir", "grcn", "slmrec", "lattice", "micro", "dragon")
"""The systems of the table of related ones: closed forms, and those of the paper's Section 2."""
ABLATIONS = {
    "without_intra": ("DREAM w/o intra-alignment", ("intra_weight",)),
    "without_inter": ("DREAM w/o inter-alignment", ("inter_weight",)),
    "without_alignment": ("DREAM w/o alignment", ("intra_weight", "inter_weight")),
    "without_signal": ("DREAM w/o SSS", ("signal_weight",)),
}
"""The rows of Table 3 below the first: their names, and the weights that are 0."""
ALIGNED = {"vbpr": ("intra_weight", "inter_weight"), "bm3": ("intra_weight", "inter_weight"), "mgcn": ("intra_weight",)}
"""The models of Table 4, and the alignments that are added (MGCN has the like of the other, says footnote 2)."""
BEST_WITHOUT = {
    "best_without_vote": ("DREAM (best) w/o vote", ("training.teacher.vote=0",)),
    "best_untaught": ("DREAM (best) w/o taught triplets", ("training.teacher.share=0",)),
    "best_without_teacher": ("DREAM (best) w/o teacher", ("training.teacher.share=0", "training.teacher.vote=0")),
    "best_with_user_graphs": ("DREAM (best), users over user-user graphs", ("model.user_modal=user_graph",)),
}
"""The rows of the table of accuracy that take an addition away again: their names, and the values that do it."""
_WEIGHTS = {"intra_weight": "alpha", "inter_weight": "beta", "signal_weight": "gamma"}
_FACTORS = {"third": ("a third of", 1 / 3), "triple": ("three times", 3.0)}
_WAYS = {
    "printed_l2": ("lambda 1e-4, as printed", "model.l2_weight=1e-4"),
    "printed_rate": ("learning rate 0.001, as printed", "training.learning_rate=0.001"),
    "gate_id": ("the gate filters ID embeddings", "model.gate_input=id"),
    "features_raw": ("the gate reads features as they are", "model.feature_scaling=raw"),
    "features_rms": ("the gate reads features in rows of norm sqrt(F)", "model.feature_scaling=rms"),
    "alignment_dot": ("alignment by inner product", "model.normalize_alignment=false"),
    "signal_dot": ("signal by inner product", "model.normalize_signal=false"),
    "signal_uncentered": ("signal of uncentred features", "model.center_signal=false"),
    "signal_norm": ("signal as a norm, not its square", "model.squared_signal=false"),
}
"""What the table of choices changes: each weight by each factor, and these values."""
MODELS_OF_TABLE = {
    "table1": (),
    "table2": COMPARED,
    "table3": ("dream",),
    "table4": tuple(ALIGNED),
    "related": (*RELATED, "dream"),
    "accuracy": ("popularity", "ease", "addease", "lightgcn", "dream"),
    "choices": ("dream",),
}


class System(NamedTuple):
    """A row of a table: a model with all its hyper-parameters."""

    key: str
    """The row's name among the published ones."""
    name: str
    config: RunConfig
    values_from: str
    """``defaults``, or the preset."""
    compared_with: str | None
    """Key of the row that it is tested against, if the table has it."""

    def with_seed(self, seed: int) -> RunConfig:
        """The configuration of one run."""
        return self.config.model_copy(update={"training": self.config.training.model_copy(update={"seed": seed})})


def choices(num_neighbors: int) -> dict[str, tuple[str, str]]:
    """The rows of the table of choices below the first: their names, and the value that is another one.

    Args:
        num_neighbors: K of the graph.
    """
    half = max(1, num_neighbors // 2)
    paper = load_presets("paper")["dream"].values["model"]
    weights = {
        f"{weight}_{key}": (f"{times} {symbol}", f"model.{weight}={factor * paper[weight]:.3g}")
        for weight, symbol in _WEIGHTS.items()
        for key, (times, factor) in _FACTORS.items()
    }
    return {"neighbors_half": (f"{half} neighbours of {num_neighbors}", f"num_neighbors={half}")} | weights | _WAYS


def systems_of_table(
    table: str, graph: str, models: Sequence[str], preset: str | Path | None, overrides: Sequence[str]
) -> dict[str, list[System]]:
    """The rows that each model of a table has, with every value resolved, whether it is asked for or not.

    Args:
        table: One of :data:`TABLES`.
        graph: The graph store.
        models: The models asked for, by default all of the table; they are placed after the one that precedes them.
        preset: A preset for those models that it knows.
        overrides: ``section.key=value`` for every run.

    Raises:
        ConfigError: If a model is none of the table's, or a value means nothing to a model asked for.
    """
    allowed = MODELS_OF_TABLE[table]
    for model in models:
        if table in ("table2", "accuracy"):
            find_model(model)
        elif model not in allowed:
            raise ConfigError(f"{table} has no model {model!r}; it has {', '.join(allowed) or 'none'}.")
    rows = _Rows(table, graph, preset, overrides)
    order = list(allowed)
    for before, model in pairwise(["", *models]):
        if model not in order:
            order.insert(order.index(before) + 1 if before else 0, model)
    systems_of = {}
    for model in order:
        try:
            systems_of[model] = rows.of(model)
        except ConfigError:
            if model in (models or allowed):
                raise  # What is set for the models asked for may mean nothing to another.
    return systems_of


class _Rows:
    """Makes the rows of a table, one model after the other."""

    def __init__(self, table: str, graph: str, preset: str | Path | None, overrides: Sequence[str]) -> None:
        self.graph = graph
        self.preset = preset
        self.overrides = overrides
        self._presets: dict[str, Preset] = {} if preset is None else load_presets(preset)
        self._of = {
            "table3": self._ablated,
            "table4": self._aligned,
            "accuracy": self._for_accuracy,
            "choices": self._chosen,
        }.get(table, self._plain)

    def of(self, model: str) -> list[System]:
        """The rows of a model."""
        return self._of(model)

    def _plain(self, model: str) -> list[System]:
        return [self._system(model, model, compared_with="dream")]

    def _ablated(self, model: str) -> list[System]:
        without = {
            key: (name, [f"model.{weight}=0" for weight in weights]) for key, (name, weights) in ABLATIONS.items()
        }
        first = self._system(model, model, compared_with=model)
        return [first] + [
            self._system(key, model, name, values, compared_with=model) for key, (name, values) in without.items()
        ]

    def _aligned(self, model: str) -> list[System]:
        # The paper does not say how the alignment is weighed; by default it is as in DREAM on the same data.
        dream = RunConfig.create(
            graph=self.graph, model="dream", preset=self.preset if "dream" in self._presets else None
        )
        alignment = dream.model | (self._presets[model].alignment if model in self._presets else {})
        added = [f"model.{key}={alignment[key]}" for key in (*ALIGNED[model], "popularity_correction")]
        name = f"{find_model(model).__name__} + BMA"
        return [
            self._system(model, model, compared_with=model),
            self._system(f"{model}_aligned", model, name, added, compared_with=model),
        ]

    def _for_accuracy(self, model: str) -> list[System]:
        if model == "dream":
            best = {"best": ("DREAM (best)", ()), **BEST_WITHOUT}
            return [self._system("paper", model, "DREAM (paper)", preset="paper", compared_with="best")] + [
                self._system(key, model, name, values, preset="best", compared_with="best")
                for key, (name, values) in best.items()
            ]
        rows = [self._system(model, model, compared_with="best")]
        if model == "lightgcn":
            # So that nobody takes for DREAM's what is the teacher's.
            teacher = load_presets("best")["dream"].values["training"]["teacher"]
            taught = [f"training.teacher.{key}={value}" for key, value in teacher.items()]
            name = f"{find_model(model).__name__} with DREAM's teacher"
            rows.append(self._system(f"{model}_taught", model, name, taught, compared_with="best"))
        return rows

    def _chosen(self, model: str) -> list[System]:
        changed = choices(read_info(self.graph)["parameters"]["num_neighbors"])
        first = self._system("paper", model, "DREAM (paper)", preset="paper", compared_with="paper")
        return [first] + [
            self._system(key, model, name, [value], preset="paper", compared_with="paper")
            for key, (name, value) in changed.items()
        ]

    def _system(
        self,
        key: str,
        model: str,
        name: str | None = None,
        values: Sequence[str] = (),
        *,
        compared_with: str,
        preset: str | Path | None = None,
    ) -> System:
        preset = preset or (self.preset if model in self._presets else None)
        config = RunConfig.create(graph=self.graph, model=model, preset=preset, overrides=[*self.overrides, *values])
        return System(
            key,
            name or find_model(model).__name__,
            config,
            "defaults" if preset is None else str(preset),
            compared_with if key != compared_with else None,
        )
