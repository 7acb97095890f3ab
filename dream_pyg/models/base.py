"""The contract that every model keeps, and nothing about training, files or devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as validated_dataclass
from torch import Tensor, nn
from torch_geometric.data import HeteroData

from dream_pyg.graph.schema import ITEM, USER

ConfigT = TypeVar("ConfigT")


def model_config(cls: type[ConfigT]) -> type[ConfigT]:
    """Make a class a frozen, keyword-only, validated dataclass that refuses unknown fields."""
    decorate: Callable[[type[ConfigT]], Any] = validated_dataclass(
        frozen=True, kw_only=True, config=ConfigDict(extra="forbid")
    )
    return decorate(cls)


class Embeddings(NamedTuple):
    """Final representations; the score of user u for item i is the inner product of their rows."""

    user: Tensor  # (U, D)
    item: Tensor  # (I, D)


class DualRepresentations(NamedTuple):
    """The two lines of a model that keeps behavior and modality apart."""

    behavior: Embeddings
    modal: Embeddings


class Batch(NamedTuple):
    """Training triplets: ``pos_item`` was interacted with by ``user``, ``neg_item`` was not. Each (B,)."""

    user: Tensor
    pos_item: Tensor
    neg_item: Tensor

    def split_items(self, item: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of ``item`` (I, D) for positive and for negative items, each (B, D), by one gather.

        Backward of a gather fills a gradient of the whole table, so one for both costs half of two.
        """
        pos_item, neg_item = item[torch.cat([self.pos_item, self.neg_item])].chunk(2)
        return pos_item, neg_item


class Recommender(nn.Module):
    """A model that turns a graph into user and item embeddings.

    The graph is an argument of every method and never model state: sizes and feature widths are read from it when
    the model is made, everything else each time.

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

    def __init__(self, graph: HeteroData, config: Any = None) -> None:
        super().__init__()
        self.config: Any = self.Config() if config is None else config
        self.num_users = int(graph[USER].num_nodes)
        self.num_items = int(graph[ITEM].num_nodes)

    def forward(self, graph: HeteroData) -> Embeddings:
        """Embed all users and items."""
        raise NotImplementedError

    def loss(self, graph: HeteroData, batch: Batch) -> dict[str, Tensor]:
        """Named scalar terms, already weighted: training minimises their sum."""
        raise NotImplementedError

    def on_epoch_start(self, graph: HeteroData, generator: torch.Generator) -> None:
        """Resample whatever an epoch keeps fixed, drawing only from ``generator``; by default nothing."""

    def dual_representations(self, graph: HeteroData) -> DualRepresentations | None:
        """The behavior and the modal line apart, for a model that has both."""
        return None


def xavier_embedding(num_rows: int, embedding_dim: int) -> nn.Parameter:
    """An embedding table (N, D), Xavier-uniform as the paper initialises it."""
    return nn.Parameter(nn.init.xavier_uniform_(torch.empty(num_rows, embedding_dim)))
