"""Item-kNN: Item-Based Collaborative Filtering Recommendation Algorithms (doi 10.1145/371920.372071)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor
from torch_geometric.data import HeteroData

from dream_pyg.graph.co_occurrence import item_co_occurrence
from dream_pyg.graph.csr import row_pointer
from dream_pyg.models.base import ClosedForm, ItemWeights, model_config
from dream_pyg.models.space import Choice, LogRange, Space


class ItemKNN(ClosedForm):
    r"""Items score by their cosine with what the user took of their K nearest (doi 10.1145/371920.372071).

    With :math:`n_i` the number of users who took item i in train and :math:`n_{ij}` of those who took both,

    .. math::
        s_{ij} = \frac{n_{ij}}{\sqrt{n_i n_j} + h}, \qquad
        \hat y_{ui} = \sum_{j \in \mathcal N_u \cap \mathcal N_K(i)} s_{ij}

    Similarities are computed sparsely, some millions of item-user-item paths at a time; each item keeps its K largest.

    Note:
        Fidelity: cosine between the columns of the interactions and K neighbours of the item to score are EXACT
        (Sections 3.1.1 and 3.2.1). CHOSEN: sums in place of weighted means, which with interactions in place of ratings
        would all be 1, and the shrinkage h, both as in the comparisons of arXiv 1907.06902.
    """

    @model_config
    class Config:
        """Hyper-parameters of item-kNN."""

        num_item_neighbors: PositiveInt = 500
        """K: how many items at most an item listens to; of equally similar ones those with lower ids."""
        shrinkage: NonNegativeFloat = 100.0
        """h: added to every norm, so that few users in common count less; the larger, the more popularity tells."""

    search_space: ClassVar[Space] = {
        "model.num_item_neighbors": Choice((20, 50, 100, 200, 500, 1000)),
        "model.shrinkage": LogRange(1.0, 1e3),
    }

    pointer: Tensor
    index: Tensor
    value: Tensor

    def __init__(self, graph: HeteroData, config: Any = None) -> None:
        super().__init__(graph, config)
        self.register_buffer("pointer", torch.empty(0, dtype=torch.long))
        self.register_buffer("index", torch.empty(0, dtype=torch.long))
        self.register_buffer("value", torch.empty(0))

    def forward(self, graph: HeteroData) -> ItemWeights:
        """The users' train items, and the similarities in CSR: a row for each item taken, a column for each scored."""
        size = (self.num_items, self.num_items)
        history = self.history(graph)
        return ItemWeights(
            history, torch.sparse_csr_tensor(self.pointer, self.index, self.value, size, check_invariants=False)
        )

    @torch.no_grad()
    def fit(self, graph: HeteroData) -> None:
        """Compute the K highest similarities of each item."""
        edge_index, similarity = item_co_occurrence(
            graph, self.config.num_item_neighbors, shrinkage=self.config.shrinkage
        )
        taken, scored = edge_index.as_tensor()
        order = torch.argsort(taken, stable=True)
        self.pointer = row_pointer(torch.bincount(taken, minlength=self.num_items))
        self.index, self.value = scored[order], similarity[order].to(self.value.dtype)
