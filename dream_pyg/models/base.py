"""The contract that every model keeps, and nothing about training, files or devices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, Self, TypeVar

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as validated_dataclass
from torch import Tensor, nn
from torch_geometric.data import HeteroData

from dream_pyg.errors import ConfigError, TrainingError, did_you_mean
from dream_pyg.graph.csr import UserItems, csr_product, row_entries, row_pointer, take_rows
from dream_pyg.graph.sampling import ReceptiveField
from dream_pyg.graph.schema import INTERACTS, ITEM, USER
from dream_pyg.models.space import Space
from dream_pyg.nn.embeddings import embedding_rows
from dream_pyg.nn.embeddings import xavier_embedding as xavier_embedding

ConfigT = TypeVar("ConfigT")

_NUMBERS_AT_ONCE = 1 << 22
"""Item weights, or products of embeddings, added up at a time."""


def model_config(cls: type[ConfigT]) -> type[ConfigT]:
    """Make a class a frozen, keyword-only, validated dataclass that refuses unknown fields."""
    decorate: Callable[[type[ConfigT]], Any] = validated_dataclass(
        frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False)
    )
    return decorate(cls)


class Scorer(Protocol):
    """What a model makes of a graph: a score of every user for every item, never all of them at a time."""

    @property
    def num_users(self) -> int:
        """U."""

    @property
    def num_items(self) -> int:
        """I."""

    def scores(self, user: Tensor, out: Tensor | None = None) -> Tensor:
        """Score all items for some users, without a gradient.

        Args:
            user: User ids (B,).
            out: Memory that the result may use (B, I), contiguous.

        Returns:
            Scores (B, I), for the caller to keep and change.
        """

    def pair_scores(self, user: Tensor, item: Tensor) -> Tensor:
        """The scores of single pairs of a user (N,) and an item (N,), summed in any order (N,).

        Memory for what is summed is bounded whatever N is.
        """

    def pair_reads(self, user: Tensor) -> Tensor:
        """How many rows or weights are read to score one pair of each of these users (B,)."""

    def only(self, item: Tensor) -> Self:
        """What scores the same users for these few items alone (N,), none of them twice, in this order."""

    def rounding(self, user: Tensor) -> Tensor:
        """How far a score of each of these users (B,) may be from what it is without rounding (B,).

        Not finite where a score may be too large for its type, or is no number.
        """

    def detach(self) -> Self:
        """The same without gradients."""


def _at_once(count: Tensor) -> list[int]:
    """Sizes of consecutive groups of things that have so many numbers each (N,), ``_NUMBERS_AT_ONCE`` or so in all."""
    return torch.bincount(count.cumsum(0) // _NUMBERS_AT_ONCE).tolist()


def _half_eps(values: Tensor) -> float:
    """By how much of itself a number of their type is off once it is rounded, at most."""
    return torch.finfo(values.dtype).eps / 2


class Embeddings(NamedTuple):
    """Final representations; the score of user u for item i is the inner product of their rows."""

    user: Tensor  # (U, D)
    item: Tensor  # (I, D)

    @property
    def num_users(self) -> int:
        """U."""
        return len(self.user)

    @property
    def num_items(self) -> int:
        """I."""
        return len(self.item)

    def scores(self, user: Tensor, out: Tensor | None = None) -> Tensor:
        """Inner products of these users' rows with all items' (B, I); see :class:`Scorer`."""
        return torch.mm(self.user.detach()[user], self.item.detach().T, out=out)

    def pair_scores(self, user: Tensor, item: Tensor) -> Tensor:
        """Inner products of single pairs; see :class:`Scorer`."""
        pairs = max(1, _NUMBERS_AT_ONCE // self.item.size(1))
        scores = self.item.new_empty(len(user))
        for users, items, score in zip(user.split(pairs), item.split(pairs), scores.split(pairs), strict=True):
            torch.sum(self.user.detach()[users] * self.item.detach()[items], dim=1, out=score)
        return scores

    def pair_reads(self, user: Tensor) -> Tensor:
        """One row of an item for each user; see :class:`Scorer`."""
        return torch.ones_like(user)

    def only(self, item: Tensor) -> Embeddings:
        """All users and these items."""
        return Embeddings(self.user, self.item[item])

    def rounding(self, user: Tensor) -> Tensor:
        """In any order, the inner product of x and y is off by D eps / 2 |x| |y| at most (Higham 2002, Eq. 3.5)."""
        longest = torch.linalg.vector_norm(self.item.detach(), dim=1).max()
        norm = torch.linalg.vector_norm(self.user.detach(), dim=1)[user]  # of rows where they are, uncopied
        return longest * norm * (self.item.size(1) * _half_eps(norm))

    def detach(self) -> Embeddings:
        """The same without gradients."""
        return Embeddings(self.user.detach(), self.item.detach())


class ItemWeights(NamedTuple):
    """What users took, and what each item says for each other: user u scores item i by the sum of W_ji over u's j."""

    history: UserItems
    weight: Tensor  # W (I, I), dense or in CSR, columns ascending within a row

    @property
    def num_users(self) -> int:
        """U."""
        return len(self.history.pointer) - 1

    @property
    def num_items(self) -> int:
        """I."""
        return self.weight.size(1)

    def scores(self, user: Tensor, out: Tensor | None = None) -> Tensor:
        """Sums of the weights of these users' items (B, I); see :class:`Scorer`."""
        if self.weight.layout == torch.strided:
            pointer, item = take_rows(*self.history, user)
            return csr_product(pointer, item, None, (len(user), len(self.weight)), self.weight)
        row, item = self.history.coordinates(user)
        # Few weights of few items each: adding them one by one is far less than a product with dense rows.
        pointer, index, weights = self.weight.crow_indices(), self.weight.col_indices(), self.weight.values()
        scores = weights.new_zeros(len(user), self.num_items) if out is None else out.zero_()
        sizes = _at_once(pointer.diff()[item])
        for rows, items in zip(row.split(sizes), item.split(sizes), strict=True):
            position, entry = row_entries(pointer, items)
            if scores.device.type == "cpu":  # where this takes a twentieth of the time
                scores.view(-1).scatter_add_(0, rows[position] * self.num_items + index[entry], weights[entry])
            else:  # where only this adds in a fixed order
                scores.index_put_((rows[position], index[entry]), weights[entry], accumulate=True)
        return scores

    def pair_scores(self, user: Tensor, item: Tensor) -> Tensor:
        """Sums over the user's items in single pairs; see :class:`Scorer`."""
        scores = torch.zeros(len(user), dtype=self.weight.dtype, device=self.weight.device)
        known = None if self.weight.layout == torch.strided else self._known()
        sizes = _at_once(self.pair_reads(user))
        for users, items, score in zip(user.split(sizes), item.split(sizes), scores.split(sizes), strict=True):
            row, taken = self.history.coordinates(users)
            score.index_add_(0, row, self._weights(taken, items[row], known))
        return scores

    def pair_reads(self, user: Tensor) -> Tensor:
        """One weight for each of a user's items; see :class:`Scorer`."""
        return self.history.pointer[user + 1] - self.history.pointer[user]

    def only(self, item: Tensor) -> ItemWeights:
        """What all items say for these ones."""
        if self.weight.layout == torch.strided:
            return ItemWeights(self.history, self.weight.index_select(1, item))
        pointer, index = self.weight.crow_indices(), self.weight.col_indices()
        place = index.new_full((self.num_items,), -1)
        place[item] = torch.arange(len(item), device=item.device)
        column = place[index]
        kept = column >= 0
        pointer, size = row_pointer(kept)[pointer], (len(self.weight), len(item))
        row = torch.arange(len(self.weight), device=item.device).repeat_interleave(pointer.diff())
        key, order = torch.sort(row * len(item) + column[kept])
        column, value = key % len(item), self.weight.values()[kept][order]
        return ItemWeights(self.history, torch.sparse_csr_tensor(pointer, column, value, size, check_invariants=False))

    def rounding(self, user: Tensor) -> Tensor:
        """A sum of n terms is off by n eps / 2 times the sum of their sizes at most (Higham 2002, Eq. 4.4)."""
        largest, count = self._largest(), self.pair_reads(user)
        total, sizes = largest.new_zeros(len(user)), _at_once(count)
        for users, some in zip(user.split(sizes), total.split(sizes), strict=True):
            row, item = self.history.coordinates(users)
            some.index_add_(0, row, largest[item])
        return count * _half_eps(total) * total

    def _known(self) -> tuple[Tensor, Tensor]:
        """Row and column of each weight in CSR as one number, ascending, and the weight; each (N + 1,).

        Behind the last one stands what is found in place of a weight that is not there.
        """
        pointer, index, weights = self.weight.crow_indices(), self.weight.col_indices(), self.weight.values()
        row = torch.arange(len(self.weight), device=index.device).repeat_interleave(pointer.diff())
        last = index.new_tensor([self.weight.numel()])
        return torch.cat([row * self.num_items + index, last]), torch.cat([weights, weights.new_zeros(1)])

    def _weights(self, row: Tensor, column: Tensor, known: tuple[Tensor, Tensor] | None) -> Tensor:
        """Single weights (N,), those in CSR by what is known of them."""
        if known is None:
            return self.weight[row, column]
        key, weights = known
        wanted = row * self.num_items + column
        place = torch.searchsorted(key, wanted)
        return weights[place.where(key[place] == wanted, len(key) - 1)]

    def _largest(self) -> Tensor:
        """The largest size of a weight in each row (I,)."""
        if self.weight.layout == torch.strided:
            return torch.maximum(self.weight.amax(dim=1), -self.weight.amin(dim=1))  # in a tenth of a norm's time
        return torch.segment_reduce(self.weight.values().abs(), "max", offsets=self.weight.crow_indices(), initial=0)

    def detach(self) -> ItemWeights:
        """The same without gradients."""
        return ItemWeights(self.history, self.weight.detach())


class DualRepresentations(NamedTuple):
    """The two lines of a model that keeps behavior and modality apart."""

    behavior: Embeddings
    modal: Embeddings


class Batch(NamedTuple):
    """Training triplets: ``pos_item`` was interacted with by ``user``, ``neg_item`` was not. Each (B,)."""

    user: Tensor
    pos_item: Tensor
    neg_item: Tensor

    def rows(self, user: Tensor, item: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The rows of ``user`` (U, D) and of ``item`` (I, D) that the triplets name, each (B, D)."""
        return user.index_select(0, self.user), *self.split_items(item)

    def split_items(self, item: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of ``item`` (I, D) for positive and for negative items, each (B, D), by one gather.

        Backward of a gather fills a gradient of the whole table, so one for both costs half of two; ``index_select``
        is faster than indexing, backward above all.
        """
        pos_item, neg_item = item.index_select(0, torch.cat([self.pos_item, self.neg_item])).chunk(2)
        return pos_item, neg_item


class Requirements(NamedTuple):
    """What a model needs of a graph beside interactions."""

    features: bool = False
    item_knn: bool = False
    user_knn: bool = False


class Recommender(nn.Module):
    """A model that turns a graph into user and item embeddings, or into something else that scores.

    The graph is an argument of every method and never model state: sizes, feature widths, and what some models compute
    once and for all (means, degrees, a graph of users) come from the one that the model is made for, everything else is
    read each time.

    Args:
        graph: The graph whose nodes the model will embed.
        config: Hyper-parameters; the class's defaults when left out.
    """

    @model_config
    class Config:
        """A model without hyper-parameters."""

    needs_features: ClassVar[bool] = False
    needs_item_knn: ClassVar[bool] = False
    needs_user_knn: ClassVar[bool] = False
    """What the model needs whatever its configuration; see :meth:`requirements`."""

    tables: ClassVar[tuple[str, ...]] = ("user_embedding", "item_embedding")
    """Parameters with a row for each user or item, in a model that has a :meth:`receptive_field`."""

    recordable: ClassVar[bool] = True
    """Whether the loss launches the same operations on the same tensors for every batch of a size, between one
    :meth:`on_epoch_start` and the next, so that a GPU may record and replay them (:mod:`dream_pyg.training.gradients`).
    It does not where Python draws or reads numbers, where a shape depends on what a batch has
    (:mod:`dream_pyg.nn.batch_shapes` helps), or where a step replaces a tensor instead of writing into it."""

    search_space: ClassVar[Space] = {}
    """What ``dream-pyg tune`` searches, with a word on where the bounds come from."""

    user_embedding: Tensor
    item_embedding: Tensor

    def __init__(self, graph: HeteroData, config: Any = None) -> None:
        super().__init__()
        self.config: Any = self.Config() if config is None else config
        self.num_users = int(graph[USER].num_nodes)
        self.num_items = int(graph[ITEM].num_nodes)

    @property
    def learns(self) -> bool:
        """Whether there are parameters to train."""
        return any(True for _ in self.parameters())

    @classmethod
    def reads_features(cls, config: Any) -> bool:
        """Whether features, if the graph has them, say anything to a model of a configuration."""
        return cls.requirements(config).features

    @classmethod
    def requirements(cls, config: Any) -> Requirements:
        """What a graph must hold for this configuration; by default what the class says it needs."""
        return Requirements(cls.needs_features, cls.needs_item_knn, cls.needs_user_knn)

    def forward(self, graph: HeteroData) -> Scorer:
        """Embed all users and items, or say otherwise how to score them."""
        raise NotImplementedError

    def loss(self, graph: HeteroData, batch: Batch) -> dict[str, Tensor]:
        """Named scalar terms, already weighted: training minimises their sum."""
        raise NotImplementedError

    @classmethod
    def needs_whole_graph(cls, config: Any) -> str | None:
        """Why a model of this configuration cannot be trained on sampled graphs; None if it can."""
        return None if cls.receptive_field is not Recommender.receptive_field else "it reads the graph as a whole"

    def receptive_field(self) -> ReceptiveField | None:
        """What the loss of a batch depends on, for a model that can be trained on sampled graphs.

        Such a model takes the rows of its tables from :meth:`initial_embeddings` or
        :func:`~dream_pyg.nn.embeddings.embedding_rows`, and reads from a graph nothing but what it says here.
        """
        return None

    def initial_embeddings(self, graph: HeteroData) -> Embeddings:
        """The ID embeddings of the graph's nodes before any propagation."""
        return Embeddings(
            embedding_rows(self.user_embedding, graph[USER]), embedding_rows(self.item_embedding, graph[ITEM])
        )

    def fit(self, graph: HeteroData) -> None:
        """Solve what a closed form gives, once and before anything is scored; by default nothing."""

    def on_epoch_start(self, graph: HeteroData, generator: torch.Generator) -> None:
        """Resample whatever an epoch keeps fixed, drawing only from ``generator``; by default nothing."""

    def dual_representations(self, graph: HeteroData) -> DualRepresentations | None:
        """The behavior and the modal line apart, for a model that has both."""
        return None


class ClosedForm(Recommender):
    """A model without gradients, whose :meth:`fit` computes item-to-item weights from the graph.

    The solution is kept in buffers, which are empty before, and take the size of what is loaded into them.
    """

    def loss(self, graph: HeteroData, batch: Batch) -> dict[str, Tensor]:
        """No terms."""
        return {}

    def history(self, graph: HeteroData) -> UserItems:
        """The train items of each user.

        Raises:
            TrainingError: If there is no solution yet.
        """
        if not any(buffer.numel() for buffer in self.buffers()):
            raise TrainingError(f"{type(self).__name__} has not been solved yet. Call fit(graph), or load its weights.")
        return UserItems.from_pairs(graph[INTERACTS].edge_index.as_tensor(), self.num_users)

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *args: Any) -> None:
        for name, buffer in self.named_buffers(recurse=False):
            if (given := state_dict.get(prefix + name)) is not None:
                setattr(self, name, buffer.new_empty(given.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)


def require_modalities(available: Sequence[str], model: str, what: str = "features") -> list[str]:
    """The modalities that a graph has ``what`` for, for a model that needs one at least.

    Raises:
        ConfigError: If there is none.
    """
    if not available:
        raise ConfigError(f"{model} needs at least one modality with {what}; the graph has none. Build one with them.")
    return list(available)


def fusion_weights(
    available: Sequence[str],
    weights: Mapping[str, float] | None,
    *,
    published: Mapping[str, float] | None = None,
    what: str = "features",
) -> dict[str, float]:
    """The weight of each modality in a sum over modalities, in the order given, together 1.

    Args:
        available: The modalities to choose from.
        weights: Their relative weights, those left out or 0 being unused; by default the published ones if these are
            for just the available modalities, else all are equal.
        published: Those that the model's authors, or we, found best.
        what: What the graph has for the available ones, for errors.

    Raises:
        ConfigError: If a weight is for another modality, or none is positive.
    """
    if weights is None:
        weights = published if published and set(published) == set(available) else dict.fromkeys(available, 1.0)
    used = {modality: weight for modality, weight in weights.items() if weight > 0}
    if unknown := sorted(set(used) - set(available)):
        raise ConfigError(
            f"modality_weights names {', '.join(map(repr, unknown))}, but the graph has {what} for "
            f"{', '.join(map(repr, available))}. Use one of these, or build the graph with that modality."
            f"{did_you_mean(unknown[0], available)}"
        )
    if not used:
        raise ConfigError("modality_weights must give at least one modality a positive weight.")
    return {modality: weight / sum(used.values()) for modality, weight in used.items()}
