"""Item-item structure weighted by cosine: frozen from raw features, or mined anew from learned ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric import EdgeIndex
from torch_geometric.data import HeteroData

from dream_pyg.graph.schema import ITEM, knn_edge, mask_name
from dream_pyg.nn.attention import edge_products
from dream_pyg.nn.item_features import FeatureScaling, feature_projections
from dream_pyg.nn.propagation import Propagation

_BLOCK_ELEMENTS = 1 << 24


def nearest_rows(rows: Tensor, present: Tensor, num_neighbors: int, *, include_self: bool) -> EdgeIndex:
    """The most similar rows of each row by cosine, exactly, in blocks on whatever device the rows are.

    Nothing of size (N, N) is ever built, and no gradient flows.

    Args:
        rows: Rows (N, D).
        present: Which rows are anybody's neighbour and have neighbours (N,).
        num_neighbors: K, or as many as there are.
        include_self: Whether a row is one of its own K neighbours.

    Returns:
        Edges from neighbour to row, sorted by row, then by neighbour.
    """
    node = present.nonzero().squeeze(1)
    unit = F.normalize(rows.detach()[node], dim=1)
    count = min(num_neighbors, len(node) - (not include_self))
    if count < 1:
        return EdgeIndex(node.new_empty(2, 0), sparse_size=(len(rows), len(rows)), sort_order="col")
    found = []
    block = max(1, _BLOCK_ELEMENTS // len(node))
    for start in range(0, len(node), block):
        cosine = unit[start : start + block] @ unit.T
        own = torch.arange(len(cosine), device=rows.device)
        # By id and not by cosine, which duplicates share.
        cosine[own, own + start] = torch.inf if include_self else -torch.inf
        found.append(cosine.topk(count, dim=1).indices.sort(dim=1).values)
    edges = torch.stack([node[torch.cat(found)].flatten(), node.repeat_interleave(count)])
    return EdgeIndex(edges, sparse_size=(len(rows), len(rows)), sort_order="col")


def edge_cosine(rows: Tensor, edge_index: EdgeIndex) -> Tensor:
    """The cosine of the two ends of each edge (E,), with a gradient."""
    unit = F.normalize(rows, dim=1)
    return edge_products(unit, unit, edge_index)


def normalized_weight(similarity: Tensor, edge_index: EdgeIndex) -> Tensor:
    r"""Similarities as weights, :math:`\mathbf D^{-1/2} \mathbf S \mathbf D^{-1/2}` with D the sums of what rows chose.

    Negative similarities, whose root has no meaning, weigh nothing; a row that chose nothing else has weights 0.

    Args:
        similarity: Of each edge (E,).
        edge_index: Edges from neighbour to the row that chose it.

    Returns:
        Weights (E,), with a gradient to the similarities.
    """
    similarity = similarity.clamp(min=0)
    source, target = edge_index.as_tensor()
    degree = similarity.new_zeros(edge_index.get_sparse_size(1)).index_add(0, target, similarity)
    # An isolated row gets a finite root first, as a masked infinity would leave NaN in the gradient.
    inverse_root = torch.where(degree > 0, degree, 1.0).rsqrt()
    return similarity * inverse_root[source] * inverse_root[target]


def unit_or_zero(rows: Tensor) -> Tensor:
    """Rows of norm 1, zero rows staying zero with a bounded gradient."""
    norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / torch.where(norm > 0, norm, 1.0)


class LatentStructure(nn.Module):
    r"""Modality-aware latent item structure (LATTICE, arXiv 2104.09036, Eq. 1-6).

    The cosine top-K graph of raw features, :math:`\tilde{\mathbf S}_m`, and that of projected features,
    :math:`\tilde{\mathbf A}_m`, both symmetrically normalised, are joined by a skip connection:

    .. math::
        \mathbf h_m = \mathbf x_m \mathbf W_m + \mathbf b_m, \qquad
        \mathbf A_m = \lambda \tilde{\mathbf S}_m + (1 - \lambda) \tilde{\mathbf A}_m

    Which items are neighbours in :math:`\tilde{\mathbf A}_m` has no gradient and is mined apart, by :meth:`mine`;
    how similar they are is computed from the projection in each call and does have one.

    Args:
        graph: The graph, for the width of the features.
        modalities: Modalities with features and an item-item graph.
        dim: Width of the projected features.
        skip_weight: :math:`\lambda`.
        num_neighbors: K of the mined graphs.
        include_self: Whether an item is one of its own K neighbours in the mined graphs.
        scaling: How rows of features are scaled first.
    """

    def __init__(
        self,
        graph: HeteroData,
        modalities: list[str],
        dim: int,
        *,
        skip_weight: float,
        num_neighbors: int,
        include_self: bool,
        scaling: FeatureScaling,
    ) -> None:
        super().__init__()
        self.skip_weight = skip_weight
        self.num_neighbors = num_neighbors
        self.include_self = include_self
        self.projections = feature_projections(graph, modalities, dim, scaling=scaling, bias=True)
        self.propagation = Propagation()

    @torch.no_grad()
    def mine(self, graph: HeteroData) -> dict[str, EdgeIndex]:
        """The neighbours of each item in each modality's projected features, as these are now."""
        return {
            modality: nearest_rows(
                projection(graph),
                graph[ITEM][mask_name(modality)],
                self.num_neighbors,
                include_self=self.include_self,
            )
            for modality, projection in self.projections.items()
        }

    def forward(self, graph: HeteroData, mined: dict[str, EdgeIndex], item: Tensor, num_hops: int) -> dict[str, Tensor]:
        r"""Propagate over each modality's structure, :math:`\mathbf A_m^L \mathbf E`, modality by modality.

        Args:
            graph: The graph.
            mined: What :meth:`mine` returned.
            item: Items before the first hop (I, D).
            num_hops: L.

        Returns:
            Items after the last hop (I, D), by modality.
        """
        after = {}
        for modality, weights in self.weights(graph, mined).items():
            rows = item
            for _ in range(num_hops):
                rows = self.hop(graph, mined, modality, weights, rows)
            after[modality] = rows
        return after

    def weights(self, graph: HeteroData, mined: dict[str, EdgeIndex]) -> dict[str, tuple[Tensor, Tensor]]:
        """The weights of the frozen and of the mined edges, by modality; they serve every hop."""
        weights = {}
        for modality, projection in self.projections.items():
            store = graph[knn_edge(ITEM, modality)]
            frozen = normalized_weight(store.similarity, store.edge_index)
            learned = normalized_weight(edge_cosine(projection(graph), mined[modality]), mined[modality])
            weights[modality] = (self.skip_weight * frozen, (1 - self.skip_weight) * learned)
        return weights

    def hop(
        self,
        graph: HeteroData,
        mined: dict[str, EdgeIndex],
        modality: str,
        weights: tuple[Tensor, Tensor],
        item: Tensor,
    ) -> Tensor:
        """One hop over both graphs of a modality, with weights from :meth:`weights`."""
        frozen, learned = weights
        edge_index = graph[knn_edge(ITEM, modality)].edge_index
        return self.propagation(item, edge_index, frozen) + self.propagation(item, mined[modality], learned)
