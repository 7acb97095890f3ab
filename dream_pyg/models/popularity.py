"""Most-popular: the yardstick below which nothing is personal."""

from __future__ import annotations

import torch
from torch import Tensor
from torch_geometric.data import HeteroData

from dream_pyg.graph.schema import INTERACTS, ITEM, USER, label_name
from dream_pyg.models.base import Batch, Embeddings, Recommender


class MostPopular(Recommender):
    """Ranks items by their number of train interactions, the same for every user; nothing is trained."""

    def forward(self, graph: HeteroData) -> Embeddings:
        """Users are ones (U, 1), items their train counts (I, 1)."""
        item = graph[INTERACTS][label_name("train")][1]
        count = torch.bincount(item, minlength=graph[ITEM].num_nodes).float()
        return Embeddings(torch.ones(graph[USER].num_nodes, 1, device=item.device), count.unsqueeze(1))

    def loss(self, graph: HeteroData, batch: Batch) -> dict[str, Tensor]:
        """No terms."""
        return {}
