"""A seeded bookshop with a planted answer: what the demo, the tests and the benchmarks run on without a download.

Every book has a genre, told mostly by its text, and a cover style, told mostly by its image. Every reader likes a few
genres and a few styles. A choice needs both to match, so the two modalities together tell more than either, and with
about eight choices per reader they tell far more than the interactions alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import tomli_w
from numpy.typing import NDArray

from dream_pyg.data.files import atomic_directory, atomic_path
from dream_pyg.errors import ConfigError, StoreError

Floats = NDArray[np.floating[Any]]
Integers = NDArray[np.int64]
Mask = NDArray[np.bool_]

GENRES = (
    "adventure", "astronomy", "biography", "chess", "circus", "comedy", "cooking", "crime", "dance", "desert",
    "dragon", "drama", "economics", "fairytale", "fantasy", "gardening", "ghost", "history", "horror", "island",
    "jungle", "legend", "memoir", "mountain", "music", "mystery", "nature", "philosophy", "pirate", "poetry",
    "railway", "robot", "romance", "sailing", "satire", "sports", "spy", "travel", "vampire", "western",
)  # fmt: skip
STYLES = (
    "baroque", "charcoal", "collage", "cubist", "deco", "engraved", "floral", "gothic",
    "graffiti", "linocut", "marbled", "minimalist", "mosaic", "neon", "origami", "pastel",
    "photo", "pixel", "sepia", "silhouette", "surreal", "vintage", "watercolor", "woodcut",
)  # fmt: skip

IMAGE_DIM = 128
TEXT_DIM = 64

# The values below were tuned together, by measurement: a LightGCN reaches two to four times the recall of popularity
# ranking, smoothing it over an item-item graph of the features half as much again, and the planted answer 0.5.
_GENRE_DIM = 24
_STYLE_DIM = 16
_ITEM_SPREAD = 0.5  # distance of an item from its genre or style centre, whose own norm is 1
_USER_SPREAD = 0.35
_GENRE_CONCENTRATION = 0.15  # Dirichlet parameter: the smaller, the fewer genres a user mixes
_STYLE_CONCENTRATION = 0.2
_TEMPERATURE = 0.15
_ZIPF_EXPONENT = 0.3  # of the popularity that is independent of taste; the observed tail is longer
_FEATURE_NOISE = 0.4  # standard deviation, the signal's being 1
_WEAK_SHARE = 0.5  # how loudly an image speaks of the genre, and a text of the style
_FEATURE_GAIN = 1.5  # drives tanh into its bend, so that no linear map recovers the latent exactly

_CLUSTER_SPREAD = 0.5  # standard deviation of a cluster's points, that of the centres being 1
_FULL_NOISE = 0.05

_FEWEST_INTERACTIONS = 5  # of one user, as in the 5-core data sets of the field
_LONGEST_HISTORY = 5  # times the mean
_FIRST_TIMESTAMP = 1_700_000_000  # seconds since 1970: 14 November 2023
_SIGNUP_PERIOD = 365 * 86_400
_MEAN_GAP = 5 * 86_400
_BLOCK_CELLS = 1 << 23  # users x items scored at once: 64 MiB


@dataclass(frozen=True, eq=False)
class SyntheticCatalogue:
    """A sampled bookshop together with the truth behind it.

    Attributes:
        user_ids: External user ids (U), as ``user-00042``.
        item_ids: External item ids (I), as ``watercolor-mystery-0042``: style, genre, row.
        item_genres: Index into :data:`GENRES` (I,).
        item_styles: Index into :data:`STYLES` (I,).
        user_tastes: Planted tastes (U, 40); the genre half and the style half are unit vectors.
        item_latents: Planted item vectors (I, 40), built likewise.
        item_popularity: Log popularity (I,), ``-inf`` for cold items.
        is_cold: Items that nobody could choose (I,). An unpopular item may also have no interaction, by chance.
        users: User of each interaction (E,), sorted by timestamp.
        items: Item of each interaction (E,); no pair occurs twice.
        timestamps: Seconds since 1970 (E,), strictly increasing for each user.
        image: Cover features (I, 128) float16: the style loud, the genre faint. Zero rows where there is none.
        text: Blurb features (I, 64) float32: the genre loud, the style faint. Zero rows where there is none.
        has_image: Items with an image (I,).
        has_text: Items with a text (I,).
    """

    user_ids: tuple[str, ...]
    item_ids: tuple[str, ...]
    item_genres: Integers
    item_styles: Integers
    user_tastes: Floats
    item_latents: Floats
    item_popularity: Floats
    is_cold: Mask
    users: Integers
    items: Integers
    timestamps: Integers
    image: Floats
    text: Floats
    has_image: Mask
    has_text: Mask

    def choice_scores(self, users: Integers | slice = slice(None)) -> Floats:
        """Log of the planted choice probabilities, up to a constant per user: no model can rank better.

        Args:
            users: Rows of :attr:`user_tastes` (B,).

        Returns:
            ``taste . latent / temperature + log popularity`` (B, I).
        """
        return _scores(self.user_tastes[users], self.item_latents, self.item_popularity)


def sample_catalogue(
    *,
    seed: int = 0,
    num_users: int = 3000,
    num_items: int = 2000,
    interactions_per_user: float = 8.0,
    num_genres: int = len(GENRES),
    num_styles: int = len(STYLES),
    cold_share: float = 0.03,
    missing_share: float = 0.05,
) -> SyntheticCatalogue:
    r"""Sample a bookshop; the same arguments give the same bookshop.

    A user chooses, one after another and without repetition, from

    .. math:: p(i \mid u) \propto \exp(t_u^\top z_i / \tau + \log \pi_i), \qquad \pi_i \propto \mathrm{rank}_i^{-s}

    Args:
        seed: Any integer from 0.
        num_users: U.
        num_items: I, including cold items.
        interactions_per_user: Mean length of a history; nobody has fewer than 5, or than the mean if that is less.
        num_genres: How many of :data:`GENRES` occur. Fewer suit small catalogues, where structure needs siblings.
        num_styles: How many of :data:`STYLES` occur.
        cold_share: Share of the items that nobody chooses.
        missing_share: Share of the items without an image, and, independently, without a text.

    Returns:
        The catalogue and its planted truth.

    Raises:
        ConfigError: If a size or share is out of range, or histories would exhaust the catalogue.
    """
    _check_integer("seed", seed, 0)
    _check_integer("num_users", num_users, 1)
    _check_integer("num_items", num_items, 2)
    _check_integer("num_genres", num_genres, 1, len(GENRES))
    _check_integer("num_styles", num_styles, 1, len(STYLES))
    _check_share("cold_share", cold_share)
    _check_share("missing_share", missing_share)
    num_cold = round(cold_share * num_items)
    _check_history(interactions_per_user, num_items - num_cold)

    # One stream per part: changing how one part draws leaves the others as they were.
    streams = [np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(6)]
    item_stream, user_stream, choice_stream, time_stream, image_stream, text_stream = streams

    genre_centres = _unit(item_stream.standard_normal((num_genres, _GENRE_DIM)))
    style_centres = _unit(item_stream.standard_normal((num_styles, _STYLE_DIM)))
    # Every genre and every style gets its fair share of the items, whatever the seed.
    genres = item_stream.permutation(num_items) % num_genres
    styles = item_stream.permutation(num_items) % num_styles
    item_genre_half = _scatter(item_stream, genre_centres[genres], _ITEM_SPREAD)
    item_style_half = _scatter(item_stream, style_centres[styles], _ITEM_SPREAD)
    popularity = -_ZIPF_EXPONENT * np.log1p(item_stream.permutation(num_items))
    is_cold = _choose(item_stream, num_items, num_cold)
    popularity[is_cold] = -np.inf

    genre_mixture = _mixture(user_stream, num_users, num_genres, _GENRE_CONCENTRATION)
    style_mixture = _mixture(user_stream, num_users, num_styles, _STYLE_CONCENTRATION)
    tastes = np.hstack(
        [
            _scatter(user_stream, _unit(genre_mixture @ genre_centres), _USER_SPREAD),
            _scatter(user_stream, _unit(style_mixture @ style_centres), _USER_SPREAD),
        ]
    )
    latents = np.hstack([item_genre_half, item_style_half])

    lengths = _history_lengths(user_stream, num_users, interactions_per_user, num_items - num_cold)
    users, items = _choices(choice_stream, tastes, latents, popularity, lengths)
    timestamps = _timestamps(time_stream, lengths)
    by_time = np.argsort(timestamps, kind="stable")

    num_missing = round(missing_share * num_items)
    has_image = ~_choose(image_stream, num_items, num_missing)
    has_text = ~_choose(text_stream, num_items, num_missing)
    image = _features(image_stream, item_style_half, item_genre_half, IMAGE_DIM).astype(np.float16)
    text = _features(text_stream, item_genre_half, item_style_half, TEXT_DIM).astype(np.float32)
    image[~has_image] = 0
    text[~has_text] = 0

    return SyntheticCatalogue(
        user_ids=tuple(f"user-{row:05d}" for row in range(num_users)),
        item_ids=tuple(
            f"{STYLES[style]}-{GENRES[genre]}-{row:04d}"
            for row, (style, genre) in enumerate(zip(styles, genres, strict=True))
        ),
        item_genres=genres,
        item_styles=styles,
        user_tastes=tastes,
        item_latents=latents,
        item_popularity=popularity,
        is_cold=is_cold,
        users=users[by_time],
        items=items[by_time],
        timestamps=timestamps[by_time],
        image=image,
        text=text,
        has_image=has_image,
        has_text=has_text,
    )


def make_synthetic(
    directory: str | Path,
    *,
    seed: int = 0,
    num_users: int = 3000,
    num_items: int = 2000,
    interactions_per_user: float = 8.0,
    num_genres: int = len(GENRES),
    num_styles: int = len(STYLES),
    cold_share: float = 0.03,
    missing_share: float = 0.05,
) -> Path:
    """Write the bookshop of :func:`sample_catalogue` as a dataset directory, as a whole or not at all.

    Args:
        directory: Where to create it; it must not exist.
        seed: Of the catalogue, and of the split that ``dataset.toml`` asks for.
        num_users: U.
        num_items: I, including cold items.
        interactions_per_user: Mean length of a history.
        num_genres: How many genres occur.
        num_styles: How many styles occur.
        cold_share: Share of the items without any interaction.
        missing_share: Share of the items without an image, and without a text.

    Returns:
        The path of the ``dataset.toml`` written.

    Raises:
        ConfigError: If an argument is out of range.
        StoreError: If ``directory`` exists or cannot be written.
    """
    directory = Path(directory)
    # Checked here as well, since a rename silently takes the place of an empty directory.
    if directory.exists() or directory.is_symlink():
        raise StoreError(f"{directory} already exists and is left as it is. Remove it or choose another path.")
    catalogue = sample_catalogue(
        seed=seed,
        num_users=num_users,
        num_items=num_items,
        interactions_per_user=interactions_per_user,
        num_genres=num_genres,
        num_styles=num_styles,
        cold_share=cold_share,
        missing_share=missing_share,
    )
    with atomic_directory(directory) as temporary:
        _write(catalogue, temporary, seed)
    return directory / "dataset.toml"


def make_clustered_features(
    path: str | Path, num_rows: int, num_features: int, *, num_clusters: int, intrinsic_dim: int = 16, seed: int = 0
) -> Path:
    """Write features like those of a large catalogue: in clusters of unequal size, near a surface of few dimensions.

    A row is a point of a Gaussian mixture in ``intrinsic_dim`` dimensions, mapped by a random two-layer net, with a
    little noise in all features. Memory holds one block of rows.

    Args:
        path: The ``.npy`` file to write, float16 (N, F).
        num_rows: N.
        num_features: F.
        num_clusters: Of the mixture; their sizes fall as the square root of their rank.
        intrinsic_dim: How many dimensions the points have before they are mapped.
        seed: Any integer from 0.

    Returns:
        ``path``.

    Raises:
        ConfigError: If a size is out of range.
        StoreError: If ``path`` cannot be written.
    """
    for name, value in (("num_rows", num_rows), ("num_features", num_features), ("num_clusters", num_clusters)):
        _check_integer(name, value, 1)
    _check_integer("intrinsic_dim", intrinsic_dim, 1)
    _check_integer("seed", seed, 0)
    generator = np.random.default_rng(seed)
    hidden_width = 4 * intrinsic_dim
    centre = generator.standard_normal((num_clusters, intrinsic_dim))
    inner = generator.standard_normal((intrinsic_dim, hidden_width)) / math.sqrt(intrinsic_dim)
    outer = generator.standard_normal((hidden_width, num_features)).astype(np.float32) / math.sqrt(hidden_width)
    share = 1 / np.sqrt(1 + np.arange(num_clusters))
    share /= share.sum()
    block = max(1, _BLOCK_CELLS // num_features)
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        header = {"descr": "<f2", "fortran_order": False, "shape": (num_rows, num_features)}
        np.lib.format.write_array_header_1_0(stream, header)
        for start in range(0, num_rows, block):
            size = min(block, num_rows - start)
            point = centre[generator.choice(num_clusters, size, p=share)]
            point += _CLUSTER_SPREAD * generator.standard_normal((size, intrinsic_dim))
            rows = np.tanh((point @ inner).astype(np.float32)) @ outer
            rows += np.float32(_FULL_NOISE) * generator.standard_normal(rows.shape, dtype=np.float32)
            stream.write(rows.astype("<f2").tobytes())
    return Path(path)


def _write(catalogue: SyntheticCatalogue, directory: Path, seed: int) -> None:
    user_ids, item_ids = np.array(catalogue.user_ids), np.array(catalogue.item_ids)
    pl.DataFrame(
        {
            "user_id": user_ids[catalogue.users],
            "item_id": item_ids[catalogue.items],
            "timestamp": catalogue.timestamps,
        }
    ).write_csv(directory / "interactions.csv")
    pl.DataFrame({"item_id": item_ids}).write_csv(directory / "items.csv")
    np.save(directory / "image.npy", catalogue.image, allow_pickle=False)
    text = pl.DataFrame({"item_id": item_ids[catalogue.has_text], "features": catalogue.text[catalogue.has_text]})
    text.with_columns(pl.col("features").cast(pl.List(pl.Float32))).write_parquet(directory / "text.parquet")
    description = {
        "name": "synthetic",
        "interactions": {"path": "interactions.csv"},
        "items": {"path": "items.csv", "column": "item_id"},
        "split": {"method": "random", "ratios": [0.8, 0.1, 0.1], "seed": seed},
        "modalities": {"image": {"features": "image.npy"}, "text": {"features": "text.parquet"}},
        "expected": {
            "num_users": len(catalogue.user_ids),
            "num_items": len(catalogue.item_ids),
            "num_interactions": len(catalogue.users),
        },
    }
    (directory / "dataset.toml").write_text(tomli_w.dumps(description), encoding="utf-8")


def _scores(tastes: Floats, latents: Floats, popularity: Floats) -> Floats:
    return tastes @ latents.T / _TEMPERATURE + popularity


def _choices(
    generator: np.random.Generator, tastes: Floats, latents: Floats, popularity: Floats, lengths: Integers
) -> tuple[Integers, Integers]:
    """Draw each user's items without repetition, by the Gumbel top-k trick.

    Args:
        generator: The stream to draw from.
        tastes: (U, D).
        latents: (I, D).
        popularity: Log popularity (I,).
        lengths: Items to draw per user (U,).

    Returns:
        Users (E,), ascending, and items (E,), each user's in the order of choice.
    """
    longest = int(lengths.max())
    block = max(1, _BLOCK_CELLS // len(latents))
    chosen = []
    for start in range(0, len(tastes), block):
        keys = _scores(tastes[start : start + block], latents, popularity)
        keys += generator.gumbel(size=keys.shape)
        best = np.argpartition(keys, -longest, axis=1)[:, -longest:]
        order = np.argsort(-np.take_along_axis(keys, best, axis=1), axis=1)
        chosen.append(np.take_along_axis(best, order, axis=1))
    users = np.repeat(np.arange(len(tastes)), lengths)
    return users, np.concatenate(chosen)[_within(lengths)]


def _timestamps(generator: np.random.Generator, lengths: Integers) -> Integers:
    """Give every choice a time (E,): each user signs up within the first year, then pauses between choices."""
    gaps = generator.exponential(_MEAN_GAP, (len(lengths), int(lengths.max())))
    signup = generator.integers(_SIGNUP_PERIOD, size=(len(lengths), 1))
    # At least a second apart, so that a split by time is unambiguous.
    times = _FIRST_TIMESTAMP + signup + np.cumsum(1 + gaps.astype(np.int64), axis=1)
    return times[_within(lengths)]


def _history_lengths(generator: np.random.Generator, num_users: int, mean: float, num_warm: int) -> Integers:
    """Draw a geometric tail (U,) above a floor, so that a few users are far more active than most."""
    fewest = min(_FEWEST_INTERACTIONS, math.floor(mean))
    tail = generator.geometric(1 / (mean - fewest + 1), num_users) - 1
    return np.minimum(fewest + tail, min(math.ceil(_LONGEST_HISTORY * mean), num_warm))


def _features(generator: np.random.Generator, strong: Floats, weak: Floats, width: int) -> Floats:
    """Map an item's latents (I, D1), (I, D2) to noisy, centred features (I, width) through a random two-layer net."""
    latent = np.hstack([strong, _WEAK_SHARE * weak])
    hidden_width = 2 * width
    hidden = np.tanh(_FEATURE_GAIN * latent @ generator.standard_normal((latent.shape[1], hidden_width)))
    signal = hidden @ generator.standard_normal((hidden_width, width))
    signal -= signal.mean(axis=0)
    signal /= signal.std()
    return signal + _FEATURE_NOISE * generator.standard_normal(signal.shape)


def _mixture(generator: np.random.Generator, num_users: int, num_parts: int, concentration: float) -> Floats:
    return generator.dirichlet(np.full(num_parts, concentration), num_users)


def _scatter(generator: np.random.Generator, centres: Floats, spread: float) -> Floats:
    """Unit vectors (N, D) around unit ``centres``; the noise has an expected norm of ``spread``."""
    return _unit(centres + spread / math.sqrt(centres.shape[1]) * generator.standard_normal(centres.shape))


def _unit(vectors: Floats) -> Floats:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _choose(generator: np.random.Generator, size: int, count: int) -> Mask:
    mask = np.zeros(size, dtype=bool)
    mask[generator.choice(size, count, replace=False)] = True
    return mask


def _within(lengths: Integers) -> Mask:
    """Mask (U, longest) of the first ``lengths`` cells of each row."""
    return np.arange(int(lengths.max())) < lengths[:, None]


def _check_integer(name: str, value: object, least: int, most: int | None = None) -> None:
    limits = f"an integer from {least}" + (f" to {most}" if most is not None else "")
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        raise ConfigError(f"{name} must be {limits}, but it is {value!r}.")


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 0.5:
        raise ConfigError(f"{name} must be a share from 0 to 0.5, but it is {value!r}.")


def _check_history(mean: float, num_warm: int) -> None:
    if not (math.isfinite(mean) and mean >= 1):
        raise ConfigError(f"interactions_per_user must be a number from 1, but it is {mean!r}.")
    if 2 * mean > num_warm:
        raise ConfigError(
            f"interactions_per_user must be at most half of the {num_warm} items that are not cold, "
            f"but it is {mean!r}. Lower it or raise num_items."
        )
