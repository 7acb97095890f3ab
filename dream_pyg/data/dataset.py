"""A dataset: what its ``dataset.toml`` says, and what its files hold once they are read, checked and aligned."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import (
    BaseModel,
    ConfigDict,
    FiniteFloat,
    NonNegativeInt,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)

from dream_pyg.data.features import (
    FEATURE_SUFFIXES,
    NEIGHBOR_SUFFIXES,
    FeatureMatrix,
    Neighbors,
    read_feature_ids,
    read_features,
    read_neighbors,
)
from dream_pyg.data.files import existing_file, read_toml, sha256_file
from dream_pyg.data.interactions import (
    SPLITS,
    TEST,
    Interactions,
    at_least,
    drop_duplicates,
    k_core,
    read_interactions,
)
from dream_pyg.data.splits import (
    DEFAULT_RATIOS,
    EXPECTED_RATIOS,
    Labels,
    check_nonempty,
    check_ratios,
    has_train_interaction,
    split_by_time,
    split_given,
    split_leave_last_out,
    split_random,
)
from dream_pyg.data.tables import PARQUET, positions, read_item_ids, same_kind
from dream_pyg.data.validation import explain
from dream_pyg.errors import ConfigError, DataError, did_you_mean

logger = logging.getLogger("dream_pyg")

CONFIG_FILE = "dataset.toml"
SplitMethod = Literal["given", "random", "leave_last_out", "time"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class InteractionsConfig(_Section):
    """The interactions file; see :func:`~dream_pyg.data.interactions.read_interactions`."""

    path: str
    user: str | None = None
    """Column of the user ids; by default a well-known name, as for the other columns."""
    item: str | None = None
    """Column of the item ids."""
    timestamp: str | None = None
    """Column of the time."""
    rating: str | None = None
    """Column of the rating."""
    split: str | None = None
    """Column of the split."""
    separator: str | None = None
    """Between the columns of a text file; by default by suffix."""

    @model_validator(mode="after")
    def _columns_differ(self) -> Self:
        roles: dict[str, str] = {}
        for role in ("user", "item", "timestamp", "rating", "split"):
            if (column := getattr(self, role)) is not None and roles.setdefault(column, role) != role:
                raise ValueError(f"{role} and {roles[column]} are both the column {column!r}; give each its own")
        return self


class ItemsConfig(_Section):
    """A file that lists the whole catalogue, in the order of the rows of feature matrices."""

    path: str
    column: str | None = None
    """Column of the item ids; by default the name that it has in the interactions, or a well-known one."""
    separator: str | None = None
    """Between the columns of a text file; by default by suffix."""


class FilterConfig(_Section):
    """What is left out before splitting."""

    min_rating: FiniteFloat | None = None
    """Lowest rating that counts as an interaction; by default every row does."""
    k_core: NonNegativeInt = 0
    """Fewest interactions of each user and item, to a fixed point; 0 keeps all, also items without interactions."""


class SplitConfig(_Section):
    """How interactions become train, valid and test."""

    method: SplitMethod | None = None
    """By default ``given`` if the interactions file has a split column, else ``random``."""
    ratios: tuple[float, float, float] = DEFAULT_RATIOS
    """Shares of train, valid and test, for ``random`` and ``time``; that of test may be 0."""
    seed: NonNegativeInt = 0
    """Seed of ``random``."""

    @field_validator("ratios")
    @classmethod
    def _shares(cls, ratios: tuple[float, float, float]) -> tuple[float, float, float]:
        try:
            check_ratios(ratios)
        except ConfigError as error:
            raise ValueError(EXPECTED_RATIOS) from error
        return ratios


class ModalityConfig(_Section):
    """The files of one modality: features, a ready kNN graph, or both."""

    features: str | None = None
    """See :func:`~dream_pyg.data.features.read_features`."""
    neighbors: str | None = None
    """See :func:`~dream_pyg.data.features.read_neighbors`."""

    @model_validator(mode="after")
    def _has_a_file(self) -> Self:
        if self.features is None and self.neighbors is None:
            raise ValueError("a modality needs features, neighbors or both")
        return self


class ExpectedConfig(_Section):
    """Counts the dataset is known to have, without duplicates, after the k-core and before cold-start rows go."""

    num_users: NonNegativeInt | None = None
    num_items: NonNegativeInt | None = None
    num_interactions: NonNegativeInt | None = None
    train: NonNegativeInt | None = None
    valid: NonNegativeInt | None = None
    test: NonNegativeInt | None = None


class DatasetConfig(_Section):
    """What a ``dataset.toml`` says; also made in Python with :meth:`create`.

    As TOML::

        name = "baby"

        [interactions]
        path = "baby.inter"

        [modalities.image]
        features = "image_feat.npy"
    """

    name: str
    interactions: InteractionsConfig
    items: ItemsConfig | None = None
    filter: FilterConfig = FilterConfig()
    split: SplitConfig = SplitConfig()
    modalities: dict[str, ModalityConfig] = {}
    expected: ExpectedConfig = ExpectedConfig()

    _directory: Path = PrivateAttr(default=Path())
    _overrides: dict[str, dict[str, Any]] = PrivateAttr(default_factory=dict)

    @property
    def overrides(self) -> Mapping[str, Mapping[str, Any]]:
        """What :meth:`with_section` was given, by section: what the ``dataset.toml`` does not say."""
        return self._overrides

    @model_validator(mode="before")
    @classmethod
    def _expand_paths(cls, values: Any) -> Any:
        """Let a path alone stand for the interactions or the items, and the interactions' name for the dataset's."""
        if not isinstance(values, dict):
            return values
        expanded = dict(values)
        for key in ("interactions", "items"):
            if isinstance(expanded.get(key), str | Path):
                expanded[key] = {"path": str(expanded[key])}
        interactions = expanded.get("interactions")
        if isinstance(interactions, dict) and isinstance(interactions.get("path"), str):
            expanded.setdefault("name", Path(interactions["path"]).stem)
        return expanded

    @field_validator("name")
    @classmethod
    def _readable(cls, name: str) -> str:
        if not name.strip():
            raise ValueError("must not be blank")
        return name

    @field_validator("modalities")
    @classmethod
    def _identifiers(cls, modalities: dict[str, ModalityConfig]) -> dict[str, ModalityConfig]:
        for name in modalities:
            if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
                raise ValueError(f"the modality {name!r} must be named with a-z, 0-9 and _, beginning with a letter")
        return modalities

    @classmethod
    def create(cls, *, directory: str | Path = ".", **values: Any) -> Self:
        """Make a configuration from keyword arguments.

        Args:
            directory: What relative paths are relative to.
            values: The sections of a ``dataset.toml``; a path alone may stand for ``interactions`` and ``items``.

        Raises:
            ConfigError: If a key is unknown or a value is out of range.

        Example:
            >>> config = DatasetConfig.create(interactions="shop/ratings.csv", filter={"k_core": 5})
            >>> config.name, config.interactions.path, config.filter.k_core
            ('ratings', 'shop/ratings.csv', 5)
        """
        return cls._validated(values, "dataset", Path(directory))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a ``dataset.toml``; relative paths in it are relative to its directory.

        Args:
            path: The file, or the directory it lies in.

        Raises:
            ConfigError: If the file is missing, is not TOML, or says something unknown.
        """
        path = Path(path)
        path = path / CONFIG_FILE if path.is_dir() else path
        values = read_toml(path, "dataset description", f"Give a {CONFIG_FILE} or its directory.")
        return cls._validated(values, str(path), path.parent)

    def with_section(self, section: str, **values: Any) -> Self:
        """Replace some values of a section, such as ``with_section("split", method="random", seed=1)``.

        What was expected of the counts is forgotten, since it held for the section as it was.

        Raises:
            ConfigError: If there is no such section or key, or a value is out of range.
        """
        previous = self.model_dump(include={section}).get(section) or {}
        config = self._replaced({"expected": ExpectedConfig(), section: {**previous, **values}})
        config._overrides[section] = {**self._overrides.get(section, {}), **values}
        return config

    def with_modality(
        self, name: str, *, features: str | Path | None = None, neighbors: str | Path | None = None
    ) -> Self:
        """Add a modality, or replace files of one.

        Args:
            name: Of the modality.
            features: Its features file, relative to the current directory; None leaves what there is.
            neighbors: Its ready kNN graph, likewise.

        Raises:
            ConfigError: If the name is no identifier, or the modality would have no file.
        """
        given = {"features": features, "neighbors": neighbors}
        previous = self.modalities[name].model_dump() if name in self.modalities else {}
        replaced = {key: str(Path(path).absolute()) for key, path in given.items() if path is not None}
        return self._replaced({"modalities": {**self.modalities, name: {**previous, **replaced}}})

    def without_modality(self, name: str) -> Self:
        """Leave a modality out.

        Raises:
            ConfigError: If there is none of that name.
        """
        if name not in self.modalities:
            known = ", ".join(self.modalities) or "none"
            raise ConfigError(
                f"The dataset {self.name!r} has no modality {name!r} (it has: {known})."
                f"{did_you_mean(name, self.modalities)}"
            )
        return self._replaced({"modalities": {key: kept for key, kept in self.modalities.items() if key != name}})

    def files(self, data_dir: str | Path | None = None) -> dict[str, Path]:
        """The path of each input file by its role, such as ``interactions`` or ``image.features``.

        Args:
            data_dir: What relative paths are relative to; by default the directory of the ``dataset.toml``.
        """
        base = Path(data_dir) if data_dir is not None else self._directory
        files = {"interactions": base / self.interactions.path}
        if self.items is not None:
            files["items"] = base / self.items.path
        for name, modality in self.modalities.items():
            for role, path in modality.model_dump(exclude_none=True).items():
                files[f"{name}.{role}"] = base / path
        return files

    def _replaced(self, sections: Mapping[str, Any]) -> Self:
        config = self._validated({**dict(self), **sections}, f"dataset {self.name!r}", self._directory)
        config._overrides = dict(self._overrides)
        return config

    @classmethod
    def _validated(cls, values: Mapping[str, Any], where: str, directory: Path) -> Self:
        try:
            config = cls.model_validate(dict(values))
        except ValidationError as error:
            raise ConfigError(explain(error, where, cls)) from error
        config._directory = directory
        return config


@dataclass(frozen=True, eq=False)
class Modality:
    """What is known of the items in one modality: features (I, F), a ready kNN graph (I, K), or both."""

    features: FeatureMatrix | None = None
    neighbors: Neighbors | None = None

    def __post_init__(self) -> None:
        """Check that there is something."""
        if self.features is None and self.neighbors is None:
            raise DataError("A modality needs features, neighbours or both.")

    @property
    def has(self) -> NDArray[np.bool_]:
        """Which items have the modality (I,): by their features, or else by having a neighbour."""
        if self.features is not None:
            return self.features.has
        assert self.neighbors is not None
        return np.asarray((self.neighbors.index >= 0).any(axis=1))

    def select(self, items: NDArray[np.int64]) -> Modality:
        """The modality over a smaller catalogue: the items (N,) that stay, in the new order."""
        return Modality(
            self.features.select(items) if self.features is not None else None,
            self.neighbors.select(items) if self.neighbors is not None else None,
        )


@dataclass(frozen=True, eq=False)
class Dataset:
    """Interactions and modalities over one catalogue, ready to become a graph.

    Attributes:
        name: Of the dataset.
        interactions: Split, cleaned, by internal id.
        modalities: By name; rows follow ``interactions.item_ids``.
        report: What was counted and dropped on the way.
        split_method: How interactions were split.
    """

    name: str
    interactions: Interactions
    modalities: Mapping[str, Modality]
    report: Mapping[str, int]
    split_method: SplitMethod = "given"

    def __post_init__(self) -> None:
        """Check that every modality covers the catalogue.

        Raises:
            DataError: Naming the modality that does not.
        """
        for name, modality in self.modalities.items():
            if len(modality.has) != self.interactions.num_items:
                raise DataError(
                    f"The modality {name!r} covers {len(modality.has)} items, "
                    f"the interactions have {self.interactions.num_items}."
                )


def load_dataset(config: DatasetConfig, data_dir: str | Path | None = None) -> Dataset:
    """Read, check, clean, split and align everything a configuration names.

    Low ratings are dropped if asked for, then duplicates, then the k-core is taken, then interactions are split; at
    last valid and test lose the interactions of users without one in train. Such users stay in the catalogue, and so
    do items without interactions unless a k-core was asked for. Test may be empty where nothing was to be in it.

    Args:
        config: The dataset.
        data_dir: What relative paths are relative to; by default the directory of the ``dataset.toml``.

    Raises:
        DataError: If an input is unusable or contradicts another.
    """
    files = _existing_files(config, data_dir)
    columns = config.interactions.model_dump(exclude={"path"})
    lowest = config.filter.min_rating
    frame = read_interactions(files["interactions"], **columns, with_ratings=lowest is not None)
    method = _split_method(config, frame, files["interactions"])
    if method != "given":
        frame = frame.drop("split", strict=False)
    rated = frame if lowest is None else at_least(frame, lowest)
    unique = drop_duplicates(rated)
    catalogue, unique = _align_catalogue(config, files, unique)
    core = k_core(unique, config.filter.k_core)

    raw_item = positions(core["item_id"], catalogue)
    items = np.flatnonzero(_counts(raw_item, len(catalogue)) >= min(config.filter.k_core, 1))
    new_item = np.full(len(catalogue), -1, dtype=np.int64)
    new_item[items] = np.arange(len(items))
    user_ids = core["user_id"].unique().sort()
    user = positions(core["user_id"], user_ids)
    item = new_item[raw_item]
    split = _split(core, user, method, config.split)
    counts = {"num_users": len(user_ids), "num_items": len(items), "num_interactions": len(core), **_sizes(split)}
    _check_expected(config, counts)

    warm = has_train_interaction(user, split)
    interactions = Interactions(
        user=user[warm],
        item=item[warm],
        split=split[warm],
        timestamp=core["timestamp"].to_numpy()[warm] if "timestamp" in core.columns else None,
        user_ids=user_ids,
        item_ids=catalogue[items].rename("item_id"),
        cold=np.stack([user[~warm], item[~warm]]),
    )
    has_test = bool((split == TEST).any())
    check_nonempty(interactions.split, given=method == "given", needs_test=has_test)
    if not has_test:
        logger.info("No interaction is in the test split: train on this graph with --no-test")
    column = config.interactions.item
    modalities = {name: _read_modality(name, files, catalogue, column).select(items) for name in config.modalities}
    report = {
        "rows_read": len(frame),
        **({} if lowest is None else {"low_ratings_dropped": len(frame) - len(rated)}),
        "duplicates_dropped": len(rated) - len(unique),
        "k_core_dropped": len(unique) - len(core),
        "cold_start_dropped": int(np.count_nonzero(~warm)),
        "num_users": interactions.num_users,
        "num_items": interactions.num_items,
        "num_interactions": len(interactions.user),
        **_sizes(interactions.split),
        "cold_items": int(np.count_nonzero(_counts(interactions.item, interactions.num_items) == 0)),
        **{f"items_without_{name}": int(np.count_nonzero(~modality.has)) for name, modality in modalities.items()},
    }
    return Dataset(config.name, interactions, modalities, report, method)


def describe_inputs(config: DatasetConfig, data_dir: str | Path | None = None) -> dict[str, dict[str, str]]:
    """The name and the SHA-256 digest of each input file, by its role.

    Args:
        config: The dataset.
        data_dir: As for :func:`load_dataset`.

    Returns:
        For example ``{"interactions": {"path": "baby.inter", "sha256": "..."}}``.

    Raises:
        DataError: If a file is missing.
    """
    files = _existing_files(config, data_dir)
    return {role: {"path": path.name, "sha256": sha256_file(path)} for role, path in files.items()}


def _existing_files(config: DatasetConfig, data_dir: str | Path | None) -> dict[str, Path]:
    files = config.files(data_dir)
    for role, path in files.items():
        try:
            existing_file(path, f"Dataset {config.name!r}, {role}")
        except DataError as error:
            raise DataError(
                f"{error} If the files that a dataset.toml names lie elsewhere, say where with data_dir (--data-dir)."
            ) from error
    return files


def _split_method(config: DatasetConfig, frame: pl.DataFrame, path: Path) -> SplitMethod:
    method = config.split.method or ("given" if "split" in frame.columns else "random")
    if method == "given" and "split" not in frame.columns:
        raise DataError(
            f"split.method is 'given', but {path} has no split column. Name it with interactions.split "
            "(--split-column), or choose 'random', 'leave_last_out' or 'time' (--split)."
        )
    if method in ("leave_last_out", "time") and "timestamp" not in frame.columns:
        raise DataError(
            f"split.method is {method!r}, but {path} has no timestamp column. Name it with interactions.timestamp "
            "(--timestamp-column), or choose 'random' or 'given' (--split)."
        )
    unused = {
        "seed": config.split.seed != 0 and method != "random",
        "ratios": config.split.ratios != DEFAULT_RATIOS and method not in ("random", "time"),
    }
    for key, is_unused in unused.items():
        if is_unused:
            raise ConfigError(f"split.{key} is given, but the split is {method!r}, which has none. Leave it out.")
    return method


def _split(frame: pl.DataFrame, user: NDArray[np.int64], method: SplitMethod, config: SplitConfig) -> Labels:
    match method:
        case "given":
            return split_given(frame["split"].to_numpy())
        case "random":
            return split_random(user, config.ratios, config.seed)
        case "leave_last_out":
            return split_leave_last_out(user, frame["timestamp"].to_numpy())
        case "time":
            return split_by_time(frame["timestamp"].to_numpy(), config.ratios)


def _align_catalogue(
    config: DatasetConfig, files: Mapping[str, Path], frame: pl.DataFrame
) -> tuple[pl.Series, pl.DataFrame]:
    """The external ids of all items in the order of feature rows, and the interactions with ids of the same type."""
    interacted = frame["item_id"].unique()
    if config.items is None:
        _warn_of_order(files, interacted)
        known = [
            ids
            for name, modality in config.modalities.items()
            if modality.features is not None
            and (ids := read_feature_ids(files[f"{name}.features"], name, config.interactions.item)) is not None
            and ids.dtype == interacted.dtype  # another type is refused when the features are read
        ]
        for ids in known:
            if not ids.is_in(interacted.implode()).any():
                raise DataError(
                    f"Features are given for none of the {len(interacted)} items with interactions: {ids.min()!r} is "
                    f"one of theirs, {interacted.min()!r} one of the interactions. Use the same item ids in both."
                )
        return pl.concat([interacted, *(ids.alias("item_id") for ids in known)]).unique().sort(), frame
    catalogue = read_item_ids(files["items"], config.items.column, config.items.separator, config.interactions.item)
    catalogue, interacted = same_kind(catalogue, interacted)
    unknown = interacted.filter(pl.Series(positions(interacted, catalogue) < 0))
    if len(unknown):
        raise DataError(
            f"The item catalogue {files['items']} lacks {len(unknown)} of the {len(interacted)} items with "
            f"interactions, for example {unknown.min()!r}. List every item, or leave out [items] (--items)."
        )
    return catalogue, frame.with_columns(frame["item_id"].cast(catalogue.dtype))


def _warn_of_order(files: Mapping[str, Path], item_ids: pl.Series) -> None:
    """Say which item a row of a matrix is taken for, where that is not plain from the ids."""
    numbered = item_ids.dtype.is_integer() and item_ids.min() == 0 and item_ids.max() == len(item_ids) - 1
    rows = {*FEATURE_SUFFIXES, *NEIGHBOR_SUFFIXES} - {PARQUET}
    ordered = [path.name for role, path in files.items() if "." in role and path.suffix.lower() in rows]
    if ordered and not numbered:
        first = ", ".join(repr(one) for one in item_ids.sort().head(3))
        logger.warning(
            "The rows of %s are taken for the items in the order of their ids: %s, ... If they are not, give "
            "the list of items ([items] path, --items), or features in Parquet with a column of ids",
            ", ".join(ordered),
            first,
        )


def _read_modality(name: str, files: Mapping[str, Path], catalogue: pl.Series, column: str | None) -> Modality:
    features, neighbors = files.get(f"{name}.features"), files.get(f"{name}.neighbors")
    return Modality(
        read_features(features, catalogue, name, column) if features is not None else None,
        read_neighbors(neighbors, catalogue, name) if neighbors is not None else None,
    )


def _sizes(split: Labels) -> dict[str, int]:
    return dict(zip(SPLITS, _counts(split, len(SPLITS)).tolist(), strict=True))


def _counts(ids: NDArray[Any], size: int) -> NDArray[np.int64]:
    return np.bincount(ids, minlength=size)


def _check_expected(config: DatasetConfig, counts: Mapping[str, int]) -> None:
    expected = config.expected.model_dump(exclude_none=True)
    wrong = [f"{key} {expected[key]} expected, {counts[key]} found" for key in expected if expected[key] != counts[key]]
    if wrong:
        raise DataError(
            f"The files are not those that the dataset {config.name!r} describes: {'; '.join(wrong)}. "
            "Get the version named in its README, or remove [expected]."
        )
