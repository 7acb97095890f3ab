"""The configuration of a run: typed, frozen, saved as TOML, unknown keys refused."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import logging
import tomllib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from dream_pyg.data.files import read_toml, write_text
from dream_pyg.data.validation import differences, explain
from dream_pyg.errors import ConfigError, did_you_mean
from dream_pyg.evaluation import parse_metric
from dream_pyg.models import MODELS, find_model
from dream_pyg.models.base import ClosedForm
from dream_pyg.presets import find_preset

logger = logging.getLogger("dream_pyg")

FeaturePrecision = Literal["auto", "float32", "bfloat16", "stored"]


def _not_zero(fan_out: int) -> int:
    if not fan_out:
        raise ValueError("draws no neighbour; give how many, or -1 for all of them")
    return fan_out


FanOut = Annotated[int, Field(ge=-1, lt=2**31), AfterValidator(_not_zero)]
Count = Annotated[int, Field(gt=0, lt=2**31)]
"""How many of something at a time, where sizes of tensors are made of it."""
SEED = "training.seed"
"""The key of the seed, which studies and tables choose themselves."""
INDIFFERENT = (
    "graph",
    "training.device",
    "training.cuda_graphs",
    "training.num_threads",
    "training.shard_tables",
    "training.keep_every",
    "training.checkpoint_every",
)
"""Keys that say where a run and its graph are and what a run keeps, and move no number but by rounding."""


class _Section(BaseModel):
    """Values that cannot be changed, and no others."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class SamplingConfig(_Section):
    """How many neighbours are drawn for each mention of a node (:class:`~dream_pyg.graph.sampling.FanOuts`)."""

    interactions: tuple[FanOut, ...] = (4, 1)
    """Over the interactions, hop by hop from the batch outwards; a model of fewer hops takes the first."""
    relations: FanOut = 4
    """In each relation graph, beside those that are of the batch."""
    features: FanOut = 1
    """Items whose features stand for those of a user."""
    negatives: Annotated[float, Field(gt=0, le=1)] = 0.5
    """How much of a mention a negative item is, which one term of the loss compares with one user; nothing if it is a
    positive one of the batch as well and ``in_batch_negatives`` is set."""
    in_batch_negatives: bool = True
    """Whether negative items are drawn among their batch's positive ones, each item about as often as any other. In one
    process a step then has half as many items to draw neighbours for and to read features of."""


class TeacherConfig(_Section):
    """A closed-form model whose recommendations are further positives, and which may have a vote.

    See :mod:`dream_pyg.training.teacher` and :mod:`dream_pyg.training.vote`.
    """

    share: Annotated[float, Field(ge=0, le=1e6)] = 0.3
    """Taught triplets for each of train; 0 is none."""
    num_items: PositiveInt = 20
    """How many of its best items the teacher gives each user."""
    rank_decay: PositiveFloat = 10.0
    """Ranks after which the chance of an item to be drawn is lower by a factor of e."""
    vote: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    """What its scores weigh beside those of the trained model, both in units of their standard deviation; 0 is no
    vote."""
    votes: tuple[Annotated[float, Field(gt=0, le=1e6)], ...] = ()
    """Further values of ``vote``: with which of all the best epoch scores best on validation is found when training
    ends. Without a vote there is nothing to choose."""
    vote_weights: Count = 50
    """How many of its weights the vote keeps for each item, the largest ones."""
    model: dict[str, Any] = Field(default={}, validate_default=True)
    """``name`` of the teacher, addease unless said otherwise (or ease, itemknn), and its hyper-parameters."""
    l2_weights: tuple[PositiveFloat, ...] = ()
    """Values of the teacher's ``l2_weight``, of which the best by recall@20 on validation is taken; by default the
    teacher's own."""
    user_exponents: tuple[NonNegativeFloat, ...] = ()
    """Values of the teacher's ``user_exponent``, likewise: each with each of ``l2_weights``."""

    @field_validator("model")
    @classmethod
    def _resolved(cls, model: dict[str, Any]) -> dict[str, Any]:
        name, hyperparameters = _split_name({"name": "addease", **model}, "training.teacher.model", "addease")
        able = [known for known, kind in MODELS.items() if issubclass(kind, ClosedForm)]
        if name not in MODELS:
            raise ConfigError(f"Unknown teacher {name!r}; expected one of {', '.join(able)}.{did_you_mean(name, able)}")
        if name not in able:
            raise ConfigError(
                f"Model {name!r} cannot be a teacher, as it has no closed form; choose one of {', '.join(able)}."
            )
        return {"name": name, **_as_dict(_model_config(name, hyperparameters))}

    @model_validator(mode="after")
    def _can_be_made(self) -> Self:
        _ = self.candidates  # an itemknn has neither, and says so
        return self

    @property
    def is_used(self) -> bool:
        """Whether there is anything for it to do."""
        return self.share > 0 or self.vote > 0

    @property
    def choices(self) -> dict[str, tuple[float, ...]]:
        """The teacher's hyper-parameters that validation chooses, and among which values."""
        listed = {"l2_weight": self.l2_weights, "user_exponent": self.user_exponents}
        return {key: values for key, values in listed.items() if values}

    @property
    def candidates(self) -> list[Any]:
        """The teacher's ``Config`` with each combination of what validation chooses among."""
        name, hyperparameters = _split_name(self.model)
        points = itertools.product(*self.choices.values())
        return [
            _model_config(name, {**hyperparameters, **dict(zip(self.choices, point, strict=True))}) for point in points
        ]


class TrainingConfig(_Section):
    """How any model is trained: Adam over shuffled triplets, stopped early on a validation metric."""

    epochs: PositiveInt = 1000
    """The most passes over the train interactions."""
    batch_size: Count = 2048
    """Triplets per step, of all processes together."""
    learning_rate: PositiveFloat = 1e-3
    """Step size of Adam."""
    learning_rate_decay: PositiveFloat = 1.0
    """Factor on the learning rate every 50 epochs, applied smoothly (0.96 in several papers; 1 leaves it constant)."""
    metric: str = "recall@20"
    """Validation metric that chooses the epoch."""
    patience: PositiveInt = 20
    """Evaluations without improvement after which training stops."""
    evaluate_every: PositiveInt = 1
    """Epochs from one validation to the next. The last epoch is validated as well, which a run that is extended later
    has then done once more than one that was not."""
    eval_users: PositiveInt | None = None
    """Users to validate and test on, a random sample that stays the same; by default all."""
    epoch_steps: PositiveInt | None = None
    """Steps of an epoch, which then sees a random part of the train interactions; by default it sees all."""
    checkpoint_every: PositiveInt = 1
    """Epochs from one resumable checkpoint to the next; an interrupt always writes one."""
    keep_every: NonNegativeInt = 0
    """Epochs from one kept copy of the weights to the next, from epoch 0 on, for figures that show the training; 0
    keeps none."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of initialisation, shuffling and negative sampling."""
    device: str = "auto"
    """``cpu``, ``cuda``, ``cuda:1``, or ``auto`` for the GPU if there is one."""
    cuda_graphs: bool = True
    """Whether a GPU records what a step launches and replays it, where the model permits it and the graph is whole."""
    sampling: SamplingConfig | None = None
    """Whether each step sees a sampled neighbourhood of its batch, as large catalogues need, and how large a one; by
    default it sees the whole graph."""
    teacher: TeacherConfig | None = None
    """Whether a closed-form model teaches this one, and has a vote; by default train is all there is."""
    num_threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """CPU threads of each process; by default as PyTorch chooses."""
    shard_tables: bool = False
    """Whether each of several processes keeps its part of the rows of embedding tables, with their optimizer state."""

    @field_validator("metric")
    @classmethod
    def _known_metric(cls, metric: str) -> str:
        parse_metric(metric)
        return metric


class RunConfig(_Section):
    """Everything that determines a run: the graph, the model with its hyper-parameters, and the training.

    As TOML::

        graph = "graphs/baby"
        num_neighbors = 10

        [model]
        name = "dream"
        intra_weight = 0.01

        [training]
        seed = 0
    """

    graph: str
    """Directory of the graph store."""
    num_neighbors: PositiveInt | None = None
    """Neighbours of each node in the relation graphs, at most as many as the store keeps; by default all of them."""
    feature_precision: FeaturePrecision = "auto"
    """Type in which features are held and multiplied. ``auto`` is float32 or, where graphs are sampled or nothing reads
    features, ``stored``: they stay in their file as they are, and only rows in use are read. bfloat16 takes half the
    memory of float32 and, where the processor has units for it, half the time of projections and of the
    similarity-supervised signal."""
    model: dict[str, Any]
    """``name`` and the hyper-parameters of that model's ``Config``, fully resolved."""
    training: TrainingConfig = TrainingConfig()

    @field_validator("model")
    @classmethod
    def _resolved(cls, model: dict[str, Any]) -> dict[str, Any]:
        name, hyperparameters = _split_name(model)
        return {"name": name, **_as_dict(_model_config(name, hyperparameters))}

    @property
    def model_name(self) -> str:
        """The model's registered name."""
        return str(self.model["name"])

    @property
    def hyperparameters(self) -> Any:
        """The model's own ``Config`` instance."""
        return _model_config(*_split_name(self.model))

    @property
    def held_precision(self) -> FeaturePrecision | None:
        """What ``feature_precision`` comes to; None where nothing reads features, which then stay in their file."""
        if self.feature_precision != "auto":
            return self.feature_precision
        if not self._reads_features():
            return None
        return "float32" if self.training.sampling is None else "stored"

    def _reads_features(self) -> bool:
        """Whether the model or its teacher does."""
        teacher = self.training.teacher
        kinds = [(self.model_name, self.hyperparameters)]
        kinds += [(teacher.model["name"], teacher.candidates[0])] if teacher is not None and teacher.is_used else []
        return any(find_model(name).reads_features(hyperparameters) for name, hyperparameters in kinds)

    @classmethod
    def create(
        cls,
        *,
        file: str | Path | None = None,
        graph: str | Path | None = None,
        model: str | None = None,
        num_neighbors: int | None = None,
        preset: str | Path | None = None,
        overrides: Iterable[str] = (),
    ) -> Self:
        """Merge a preset, a TOML file, named arguments and ``section.key=value`` overrides, the later the stronger.

        Args:
            file: A TOML file as :meth:`save` writes it; keys may be left out. What it has for another model than
                ``model`` is left out, with a warning.
            graph: The graph store.
            model: The model.
            num_neighbors: Neighbours of each node in the relation graphs.
            preset: Name or path of a preset (:mod:`dream_pyg.presets`).
            overrides: Single values; ``none`` takes one back to its default.

        Raises:
            ConfigError: If a key or preset is unknown, a value is out of range, or graph or model is missing or named
                twice.
        """
        values: dict[str, Any] = read_toml(file, "config file") if file is not None else {}
        if graph is not None:
            values["graph"] = str(graph)
        if num_neighbors is not None:
            values["num_neighbors"] = num_neighbors
        if model is not None:
            previous = values.get("model")
            # Hyper-parameters of another model mean nothing to this one.
            keep = isinstance(previous, dict) and previous.get("name") == model
            values["model"] = previous if keep else {"name": model}
            if not keep and isinstance(previous, dict) and (lost := sorted(previous.keys() - {"name"})):
                logger.warning("%s is for another model than %s; left out: %s", file, model, ", ".join(lost))
        overrides = list(overrides)
        if preset is not None:
            values = _on_preset(preset, values, overrides)
        for override in overrides:
            _apply(values, override)
        for key, cure in (("graph", "the graph store's path"), ("model", "a model with --model NAME")):
            if key not in values:
                raise ConfigError(f"The run has no {key!r}. Give {cure}, or set it in the config file.")
        config = cls.from_dict(values, str(file or "config"))
        given_and_set = {
            "graph": (graph, config.graph),
            "model": (model, config.model_name),
            "num_neighbors": (num_neighbors, config.num_neighbors),
        }
        for key, (given, set_to) in given_and_set.items():
            if given is not None and str(given) != str(set_to):
                raise ConfigError(f"The {key} is given twice: {given}, and {set_to} as an override. Leave one out.")
        return config

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str) -> Self:
        """Check plain values; those that are left out are at their defaults.

        Args:
            values: As :meth:`to_dict` gives them.
            where: Where they come from, for the message.

        Raises:
            ConfigError: If a key is unknown or missing, or a value is out of range.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError(explain(error, where, cls)) from error

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what :meth:`save` wrote."""
        return cls.create(file=path)

    def save(self, path: str | Path) -> None:
        """Write as TOML, atomically, with every value spelled out."""
        write_text(path, tomli_w.dumps(self.to_dict()))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without those that are None."""
        return self.model_dump(mode="json", exclude_none=True)

    def differences(self, other: RunConfig | Mapping[str, Any], besides: Collection[str] = ()) -> list[str]:
        """One line for each key in which two configurations, or what :meth:`to_dict` makes of them, differ.

        Args:
            other: The other one.
            besides: Keys, such as ``training.seed``, and tables, in which they may.
        """
        return differences(self.to_dict(), other.to_dict() if isinstance(other, RunConfig) else other, besides)


def _model_config(name: str, hyperparameters: Mapping[str, Any]) -> Any:
    config_class = find_model(name).Config
    try:
        return TypeAdapter(config_class).validate_python(dict(hyperparameters))
    except ValidationError as error:
        raise ConfigError(explain(error, f"model {name!r}", config_class)) from error


def _split_name(model: Mapping[str, Any], table: str = "model", example: str = "dream") -> tuple[str, dict[str, Any]]:
    if "name" not in model:
        raise ConfigError(f'The [{table}] table has no name. Set it, for example name = "{example}".')
    if not isinstance(model["name"], str):
        raise ConfigError(
            f'The name in the [{table}] table is {model["name"]!r}; expected a string, for example name = "{example}".'
        )
    return model["name"], {key: value for key, value in model.items() if key != "name"}


def _as_dict(config: Any) -> dict[str, Any]:
    return {key: value for key, value in dataclasses.asdict(config).items() if value is not None}


def _on_preset(preset: str | Path, values: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """What a preset says of the model that ``values`` and ``overrides`` name, with ``values`` laid over it."""
    named = copy.deepcopy(values)
    for override in overrides:
        _apply(named, override)
    if not isinstance(model := named.get("model"), dict):
        return values  # a mistake that is explained when the whole is validated
    merged = dict(values)
    for section, below in find_preset(preset, _split_name(model)[0]).values.items():
        merged[section] = _laid_over(below, values.get(section, {}))
    return merged


def _laid_over(below: Mapping[str, Any], above: Any) -> Any:
    """Two nested tables as one, values of the upper being the stronger; weights by modality belong together."""
    if not isinstance(above, Mapping):
        return above
    merged = {**below, **above}
    for key in below.keys() & above.keys() - {"modality_weights"}:
        if isinstance(below[key], Mapping):
            merged[key] = _laid_over(below[key], above[key])
    return merged


def override_key(override: str) -> str:
    """What an override sets, such as ``training.seed``."""
    return override.partition("=")[0].strip()


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    *sections, name = key.strip().split(".")
    if not equals or not name or not (sections or name in RunConfig.model_fields):
        raise ConfigError(
            f"Cannot understand the override {override!r}; expected SECTION.KEY=VALUE, for example training.seed=1."
        )
    value, table = _parse_value(text.strip()), values
    if value == "none":
        _check_known(values, sections, name)
    for section in sections:
        if value == "none" and section not in table:
            return  # It is at its default, and so is all in it.
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise ConfigError(f"Cannot set {key!r}: {section!r} is a value, not a table.")
    if value == "none":
        table.pop(name, None)
    elif value != {} or not isinstance(table.get(name), dict):  # An empty table asks for one, and leaves what is there.
        table[name] = value


def _check_known(values: Mapping[str, Any], sections: list[str], name: str) -> None:
    """Refuse an unknown key that is taken back to its default, since nothing is left of it to be checked later."""
    kinds: dict[str, type[BaseModel]] = {"": RunConfig, "training": TrainingConfig}
    kinds |= {"training.sampling": SamplingConfig, "training.teacher": TeacherConfig}
    section, asked = ".".join(sections), name
    if section in kinds:
        known = list(kinds[section].model_fields)
    elif section == "model" and isinstance(values.get("model"), dict):
        known = list(dataclasses.asdict(_model_config(_split_name(values["model"])[0], {})))
    elif sections[0] == "model" or sections[:3] == ["training", "teacher", "model"]:
        return  # A weight of one modality, or a hyper-parameter of a teacher.
    else:
        asked, known = section, [*kinds, "model"]
    if asked not in known:
        key = ".".join([*sections, name])
        raise ConfigError(f"{key} is unknown, so it has no default.{did_you_mean(asked, known)}")


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text  # A bare word is a string, so that nobody has to quote twice in a shell.
