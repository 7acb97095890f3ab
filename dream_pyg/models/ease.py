"""EASE: Embarrassingly Shallow Autoencoders for Sparse Data (arXiv 1905.03375)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor
from torch_geometric.data import HeteroData

from dream_pyg.errors import ConfigError, TrainingError
from dream_pyg.graph.co_occurrence import co_occurrence_blocks
from dream_pyg.graph.processor import available_bytes, gibibytes
from dream_pyg.graph.schema import INTERACTS
from dream_pyg.models.base import ClosedForm, ItemWeights, model_config
from dream_pyg.models.space import LogRange, Space

_MATRICES = 3
"""(I, I) matrices at a time when a run ends: the one solved in place, its file, and what is loaded from it."""


class EASE(ClosedForm):
    r"""The linear autoencoder without self-connections, in closed form (arXiv 1905.03375, Eq. 2, 3 and 8).

    .. math::
        \min_{\mathbf B} \lVert \mathbf X - \mathbf X \mathbf B \rVert_F^2 + \lambda \lVert \mathbf B \rVert_F^2
        \quad \text{where} \quad \mathrm{diag}(\mathbf B) = 0

    .. math::
        \mathbf P = (\mathbf X^\top \mathbf X + \lambda \mathbf I)^{-1}, \qquad
        B_{ij} = -\frac{P_{ij}}{P_{jj}} \; (i \ne j), \qquad \hat y_{ui} = \mathbf x_u \mathbf B_{:i}

    with :math:`\mathbf X` the train interactions (U, I). Not in the paper: users may weigh :math:`w_u \propto n_u^{-e}`
    for their :math:`n_u` items, so that :math:`\mathbf X^\top \mathrm{diag}(\mathbf w) \mathbf X` takes the place of
    :math:`\mathbf X^\top \mathbf X`; with :math:`e = 1` their rows have one length (doi 10.1145/963770.963776). Weights
    are such that the trace stays, and so what :math:`\lambda` means.

    The cost is that of inverting an (I, I) matrix, in time :math:`I^3`, and in memory. One such matrix is solved in
    place; a training, which also writes and reads it, holds three (0.6 GB for the 7,050 items of Amazon Baby). The
    numbers of users and of interactions hardly matter.

    Args:
        graph: The graph.
        config: Hyper-parameters.

    Raises:
        ConfigError: If the matrices would take more than ``max_memory_gb``.

    Note:
        Fidelity: EXACT. The inverse comes from a Cholesky factorisation in float32: on Amazon Baby no weight differs
        from that of float64 by more than a millionth of the largest, and recall@20 not at all.
    """

    @model_config
    class Config:
        """Hyper-parameters of EASE."""

        l2_weight: PositiveFloat = 400.0
        """lambda: weight of the squared norm of B."""
        user_exponent: NonNegativeFloat = 0.0
        """e: how far users with many items are kept from outweighing others; 0 is the paper's."""
        max_memory_gb: PositiveFloat = 16.0
        """Refuse a catalogue whose matrices take more than so many GB (10^9 bytes)."""

    # Grids of arXiv 1905.03375 and doi 10.1145/3383313.3418480, rounded outwards.
    search_space: ClassVar[Space] = {"model.l2_weight": LogRange(1.0, 1e4)}

    weight: Tensor

    def __init__(self, graph: HeteroData, config: Any = None) -> None:
        super().__init__(graph, config)
        memory = _MATRICES * 4 * self.num_items**2 / 1e9
        if memory > self.config.max_memory_gb:
            raise ConfigError(
                f"{type(self).__name__} needs {memory:.1f} GB for {self.num_items:,} items ({_MATRICES} matrices of "
                f"{self.num_items:,} x {self.num_items:,} x 4 bytes), more than max_memory_gb = "
                f"{self.config.max_memory_gb:g} allows. Raise it if the machine has as much, or choose itemknn, which "
                "never builds such a matrix."
            )
        self.register_buffer("weight", torch.empty(0, 0))

    def forward(self, graph: HeteroData) -> ItemWeights:
        """The users' train items and B."""
        return ItemWeights(self.history(graph), self.weight)

    @torch.no_grad()
    def fit(self, graph: HeteroData) -> None:
        """Compute B (I, I), the only matrix that stays."""
        needed, available = _MATRICES * 4 * self.num_items**2, available_bytes(self.weight.device)
        if available is not None and needed > available:
            raise ConfigError(
                f"{type(self).__name__} needs {gibibytes(needed)} for {self.num_items:,} items, and "
                f"{gibibytes(available)} are free. Use a machine with more memory, or choose itemknn, which never "
                "builds such a matrix."
            )
        gram = self.weight.new_zeros(self.num_items, self.num_items)
        user, item = graph[INTERACTS].edge_index.as_tensor()
        size = self.num_items, self.num_users
        for row, column, shared in co_occurrence_blocks(item, user, size, self._user_weight(user)):
            gram[row, column] = shared.to(gram.dtype)
        gram.diagonal().add_(self.config.l2_weight)
        try:
            precision = invert_(gram)
        except torch.linalg.LinAlgError as error:
            raise TrainingError(
                f"{type(self).__name__} cannot be solved with l2_weight = {self.config.l2_weight:g}: the matrix has no "
                "inverse in float32. Raise it."
            ) from error
        precision.div_(-precision.diagonal().clone()).fill_diagonal_(0)
        self.weight = precision

    def _user_weight(self, user: Tensor) -> Tensor:
        """What each user weighs (U,), 1 on average over interactions."""
        count = torch.bincount(user, minlength=self.num_users).to(self.weight.dtype).clamp(min=1)
        weight = count**-self.config.user_exponent
        return weight * (len(user) / weight[user].sum())


def invert_(matrix: Tensor) -> Tensor:
    """The inverse of a symmetric positive definite matrix (N, N), in the memory of that matrix."""
    # LAPACK stores columns: the transpose of a symmetric matrix is the matrix, already in its order.
    columns = matrix.mT
    torch.linalg.cholesky(columns, out=columns)
    torch.cholesky_inverse(columns, out=columns)
    return matrix
