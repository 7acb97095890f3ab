"""The similarity-supervised signal over the users and items of a batch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch_geometric.data import HeteroData

from dream_pyg.graph.schema import ITEM, USER, count_name, feature_name, mask_name
from dream_pyg.nn.batch_shapes import distinct_nodes
from dream_pyg.nn.item_features import feature_rows
from dream_pyg.nn.losses import similarity_signal, similarity_signal_norm
from dream_pyg.nn.user_features import summed_features


class SimilaritySignal(nn.Module):
    r"""Keeps modal representations as similar to each other as raw features are (DREAM, arXiv 2404.11119, Eq. 12).

    The sum over users and items of :func:`~dream_pyg.nn.losses.similarity_signal`. Features of a user are the mean of
    those of the user's train items. It has no parameters, so any model with a modal representation can add it.

    Args:
        graph: A graph with the features of every modality.
        modality_weights: The weight of each modality in the target.
        weight: :math:`\gamma`; 0 leaves it out.
        normalize: Whether representations are compared by cosine instead of dot product.
        center: Whether features are compared after subtracting their mean over all items that have them.
        squared: Mean squared error (second version of the paper) instead of the norm (first version).
    """

    def __init__(
        self,
        graph: HeteroData,
        modality_weights: Mapping[str, float],
        weight: float,
        *,
        normalize: bool = True,
        center: bool = True,
        squared: bool = True,
    ) -> None:
        super().__init__()
        self.modality_weights = dict(modality_weights)
        self.weight = weight
        self.normalize = normalize
        self.squared = squared
        for modality in self.modality_weights if weight else ():
            features, has = graph[ITEM][feature_name(modality)], graph[ITEM][mask_name(modality)]
            mean = features.sum(dim=0, dtype=torch.float32) / has.sum().clamp(min=1) * center
            self.register_buffer(f"mean_{modality}", mean, persistent=False)

    def forward(
        self,
        graph: HeteroData,
        user: Tensor,
        item: Tensor,
        modal_user: Tensor,
        modal_item: Tensor,
        *,
        user_row: Tensor | None = None,
        item_row: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The signal for the users and positive items of a batch.

        Args:
            graph: The graph.
            user: Ids of the users (B,); or with ``user_row`` of those that the batch has, each once (U,).
            item: Ids of the positive items (B,), or (I,).
            modal_user: Modal representation of these users (B, D), or (U, D).
            modal_item: Modal representation of these items (B, D), or (I, D).
            user_row: Which of the users each example has (B,).
            item_row: Which of the items each example has (B,).

        Returns:
            The weighted scalar ``signal``, nothing where the weight is 0.
        """
        if not self.weight:
            return {}
        if user_row is None or item_row is None:
            (user, user_row), (item, item_row) = distinct_nodes(graph, USER, user), distinct_nodes(graph, ITEM, item)
        else:
            modal_user, modal_item = modal_user.index_select(0, user_row), modal_item.index_select(0, item_row)
        of_users = self.of_nodes(graph, USER, user, modal_user, user_row)
        return {"signal": self.weight * (of_users + self.of_nodes(graph, ITEM, item, modal_item, item_row))}

    def of_nodes(self, graph: HeteroData, node: str, ids: Tensor, modal: Tensor, row: Tensor) -> Tensor:
        """Eq. 12 for the modal representation (B, D) of users or items, given by their ids and positions in these."""
        features = []
        for modality in self.modality_weights:
            # A sum of n features has the direction of their mean, and n times the mean to lose.
            if node == USER:
                count, rows = graph[USER][count_name(modality)][ids], summed_features(graph, modality, ids)
            else:
                count, rows = graph[ITEM][mask_name(modality)][ids], feature_rows(graph, modality, ids)
            features.append(self._centred(modality, rows, count))
        signal = similarity_signal if self.squared else similarity_signal_norm
        return signal(modal, features, list(self.modality_weights.values()), node=row, normalize=self.normalize)

    def _centred(self, modality: str, rows: Tensor, count: Tensor) -> Tensor:
        """Sums of features (N, F) less the mean of each of the (N,) features in a sum; the rows are overwritten."""
        mean = self.get_buffer(f"mean_{modality}").to(rows.dtype)
        return rows.addcmul_(count.to(rows.dtype).unsqueeze(1), mean, value=-1)
