"""MICRO: Latent Structure Mining with Contrastive Modality Fusion for Multimedia Recommendation (arXiv 2111.00678)."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor
from torch_geometric import EdgeIndex
from torch_geometric.data import HeteroData

from dream_pyg import ranks
from dream_pyg.graph.schema import ITEM, mask_name
from dream_pyg.models.base import Batch, model_config
from dream_pyg.models.lattice import LATTICE
from dream_pyg.models.space import RATE, Choice, LogRange, Space
from dream_pyg.nn.fusion import AttentionFusion, view_contrast
from dream_pyg.nn.losses import bpr_loss, l2_loss


class MICRO(LATTICE):
    r"""LATTICE with a latent structure and a view for each modality, fused by attention (arXiv 2111.00678, Section 3).

    :math:`\mathbf A_m` joins a modality's frozen and mined item-item graph as in
    :class:`~dream_pyg.models.lattice.LATTICE`. Items pass their ID embeddings over each, views are fused item by item,
    and the result joins LightGCN's mean over layers:

    .. math::
        \mathbf H_m = \mathbf A_m^{L_i} \mathbf E^{(0)}, \qquad
        a_m = \mathrm{softmax}_m\left(\mathbf q \cdot \tanh(\mathbf h_{m,i} \mathbf W + \mathbf b)\right), \qquad
        \mathbf h_i = \sum_m a_m \mathbf h_{m,i}

    .. math::
        \hat{\mathbf e}_u = \bar{\mathbf e}_u, \qquad
        \hat{\mathbf e}_i = \bar{\mathbf e}_i + \frac{\mathbf h_i}{\lVert \mathbf h_i \rVert}

    Contrastive fusion tells each item's view from those of other items by the item's fused row, with
    :math:`\theta` the cosine over :math:`\tau`:

    .. math::
        \mathcal L_C = -\sum_m \frac{1}{|\mathcal I_m|} \sum_{i \in \mathcal I_m}
        \log \frac{\exp \theta(\mathbf h_{m,i}, \mathbf h_i)}
        {\sum_j \exp \theta(\mathbf h_{m,i}, \mathbf h_j)
        + \sum_{j \ne i} \exp \theta(\mathbf h_{m,i}, \mathbf h_{m,j})}, \qquad
        \mathcal L = \mathcal L_{BPR} + \beta \mathcal L_C + \mu \mathcal L_2

    An epoch trains on the neighbours mined when it began; whoever asks for representations gets those mined from the
    weights of that moment.

    Note:
        Fidelity: structures, views, attention, normalised addition and the shape of all losses are EXACT;
        :math:`\lambda = 0.9`, K = 10, :math:`\beta = 0.03`, :math:`\tau = 0.5` and the weight of L2 are the defaults of
        the authors' code; the raw graph counts an item among its own neighbours, as theirs does, if the graph was built
        so (``include_self``). The authors train with a learning rate of 0.0005 that decays by 0.96 every 50 epochs,
        which are options of the training, not of the model. CHOSEN: :math:`\mathcal I_m` are the batch's different
        positive items that have the modality, while the authors contrast all items in every batch; the similarity of
        mined neighbours gets a gradient in every batch, theirs in the first of an epoch; negative cosines, whose root
        has no meaning, count as 0; LightGCN is that of its own paper; features are inputs in rows of norm 1, while the
        authors' code trains them on as parameters, unscaled. One modality alone has nothing to fuse, by attention or by
        contrast.
    """

    recordable = False  # A batch has more or fewer different items with a modality.

    @model_config
    class Config(LATTICE.Config):
        """Hyper-parameters of MICRO."""

        contrastive_weight: NonNegativeFloat = 0.03
        """beta: weight of the contrastive fusion."""
        temperature: PositiveFloat = 0.5
        """tau of the contrastive fusion."""
        l2_weight: NonNegativeFloat = 1e-5
        """mu: weight of the L2 term on the batch's representations."""

    # arXiv 2111.00678, Section 4.1.4.
    search_space: ClassVar[Space] = {
        **RATE,
        "model.contrastive_weight": LogRange(1e-3, 1e-1),
        "model.skip_weight": Choice((0.5, 0.7, 0.9)),
        "model.l2_weight": LogRange(1e-6, 1e-1),
    }

    def _add_fusion(self, num_modalities: int) -> None:
        self.fusion = AttentionFusion(self.config.embedding_dim) if num_modalities > 1 else None

    def latent(self, graph: HeteroData, mined: dict[str, EdgeIndex]) -> Tensor:
        """Items over the latent structures, fused (I, D)."""
        return self.views(graph, mined)[1]

    def views(self, graph: HeteroData, mined: dict[str, EdgeIndex]) -> tuple[dict[str, Tensor], Tensor]:
        """Items over each modality's latent structure (I, D), and fused (I, D)."""
        views = self.structure(graph, mined, self.item_embedding, self.config.num_item_layers)
        rows = list(views.values())
        return views, rows[0] if self.fusion is None else self.fusion(rows)

    def loss(self, graph: HeteroData, batch: Batch) -> dict[str, Tensor]:
        """BPR, contrastive fusion and L2 over the batch, from the neighbours that the epoch mined."""
        config = self.config
        views, fused = self.views(graph, self._mined or self.structure.mine(graph))
        rows = batch.rows(*self.join(graph, fused))
        terms = {"bpr": bpr_loss(*rows)}
        if config.contrastive_weight and self.fusion is not None:
            different = _different(batch.pos_item)
            contrast = fused.new_zeros(())
            for modality, view in views.items():
                present = different[graph[ITEM][mask_name(modality)][different]]
                contrast = contrast + view_contrast(view[present], fused[present], config.temperature)
            terms["contrastive"] = config.contrastive_weight * contrast
        terms["l2"] = config.l2_weight * l2_loss(*rows)
        return terms


def _different(item: Tensor) -> Tensor:
    """The different items of a batch; of several processes, each has those that none before it has."""
    items, first = ranks.gather_rows(item)
    own = item.unique()
    return own[~torch.isin(own, items[:first])]
