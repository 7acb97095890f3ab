r"""Exact all-kNN by a symmetric product of low precision with a proved bound, then an exact ranking of what is left.

Every pair of rows is multiplied once, in bfloat16 where the processor has units for it. For unit rows
:math:`\mathbf{x}_i = a_i \mathbf{u} + \mathbf{z}_i`, with :math:`\mathbf{u}` the direction they have in common,
and :math:`\mathbf{q}_i` what rounding leaves of :math:`\mathbf{z}_i`,

.. math::
    |\mathbf{x}_i \cdot \mathbf{x}_j - a_i a_j - \mathbf{q}_i \cdot \mathbf{q}_j|
    \le \|\mathbf{z}_i - \mathbf{q}_i\| \|\mathbf{z}_j\| + \|\mathbf{q}_i\| \|\mathbf{z}_j - \mathbf{q}_j\|,

whose norms are known exactly. Whatever is further than twice that below a row's K-th best score cannot be one of its K
neighbours; the rest, a few rows, is ranked in full precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from dream_pyg.graph.knn.candidates import CandidateLists, Candidates
from dream_pyg.graph.knn.rows import Rows

_PANEL_BYTES = 96 << 20
_TILE_ROWS = 512
_TILE_COLUMNS = 8192
_FIRST_COLUMNS = 8192
_PREPARED_BYTES = 8 << 20
_SAMPLED_ROWS = 256
_BFLOAT16_ROUNDING = 2.0**-9
_FLOAT32_ROUNDING = 2.0**-24
_SLACK = 2.0**-15
"""Many times what the float32 steps around the product can be wrong by."""


_TILE_SIZE = _TILE_ROWS * (_TILE_COLUMNS + _TILE_ROWS)


class Strip(NamedTuple):
    """Some rows against a panel of columns: what is done between two looks at the clock."""

    panel: int
    other: int
    row: int


class Tile(NamedTuple):
    """Scores of some rows against some columns of the (N, N) matrix; never of a pair that another tile has."""

    row: int
    column: int
    score: Tensor  # (R, C) float32
    diagonal: bool
    """Whether the last R columns are the rows themselves."""


class Product(Protocol):
    """All scores of N rows with each other, approximately, a tile at a time."""

    num_rows: int
    device: torch.device
    absent: Tensor  # (Z,) rows of zeros, which have no direction

    @property
    def strips(self) -> Sequence[Strip]:
        """All strips, which hold every pair once, and a row's pair with itself."""

    def tiles(self, strips: Iterable[Strip]) -> Iterator[Tile]:
        """The tiles of some strips; the next strip is asked for when the tiles of the last have been taken."""

    def error(self, row: Tensor | slice, score: Tensor) -> Tensor:
        """The most by which a score near ``score`` (P,) of some rows can be wrong (P,)."""


Steps = Callable[[Sequence[Strip], CandidateLists], Iterable[Strip]]
"""Gives the strips that are to be done, one after the other; in between the lists hold what was found so far."""


def select_candidates(product: Product, count: int, steps: Steps) -> CandidateLists:
    """Collect from all scores those that may belong to the ``count`` highest cosines of a row.

    Both rows of a pair profit from its one score. Nothing is sorted: scores are compared with each row's cut, which
    rises as better ones are found.
    """
    lists = CandidateLists(product.num_rows, count, product.error, product.device)
    absent = torch.zeros(product.num_rows, dtype=torch.bool, device=product.device)
    absent[product.absent] = True
    lists.cut[absent] = torch.inf
    masks = torch.empty(2, _TILE_SIZE, dtype=torch.bool, device=product.device)
    for tile in product.tiles(steps(product.strips, lists)):
        _select_from_tile(lists, tile, absent, masks)
    return lists


def _select_from_tile(lists: CandidateLists, tile: Tile, absent: Tensor, masks: Tensor) -> None:
    score = tile.score
    num_rows, num_columns = score.shape
    rows = slice(tile.row, tile.row + num_rows)
    columns = slice(tile.column, tile.column + num_columns)
    if absent[columns].any():
        score.masked_fill_(absent[columns], -torch.inf)
    if tile.diagonal:
        score[:, -num_rows:].fill_diagonal_(-torch.inf)
    if tile.column == 0 and num_columns >= lists.count:
        # A first cut for rows that know nobody yet, from as many scores as it takes to keep most others out.
        lists.raise_cut(rows, score[:, -_FIRST_COLUMNS:].topk(lists.count, dim=1).values[:, -1])
    row_cut, column_cut = lists.cut[rows], lists.cut[columns]
    if tile.diagonal:
        column_cut = column_cut.clone()
        column_cut[-num_rows:] = torch.inf  # These pairs are in the tile twice.
    by_row, by_column = (mask[: score.numel()].view(score.shape) for mask in masks)
    torch.ge(score, row_cut[:, None], out=by_row)
    torch.ge(score, column_cut, out=by_column)
    position = _true_positions(by_row.logical_or_(by_column))
    row, column = position // num_columns, position % num_columns
    found = score.view(-1)[position]
    present = found > -torch.inf  # A row that knows too few others has a cut of -inf.
    for target, other, cut, first, first_other in (
        (row, column, row_cut, tile.row, tile.column),
        (column, row, column_cut, tile.column, tile.row),
    ):
        kept = (present & (found >= cut[target])).nonzero().view(-1)
        lists.add(target[kept] + first, other[kept] + first_other, found[kept])


def _true_positions(mask: Tensor) -> Tensor:
    """Where a mask is true, in its flattened form."""
    if mask.is_cuda:
        return mask.view(-1).nonzero().view(-1)
    return torch.from_numpy(np.flatnonzero(mask.numpy()))  # four times as fast


class RowProduct:
    """The product of unit rows with each other, in ``dtype``.

    Memory holds two panels of rows in ``dtype`` and one tile, whatever N is.

    Args:
        rows: The rows (N, F), of any norm.
        dtype: ``torch.bfloat16`` or ``torch.float32``.
        device: Where to multiply.
    """

    def __init__(self, rows: Rows, dtype: torch.dtype, device: torch.device) -> None:
        self.num_rows, self.num_features = rows.shape
        self.device = device
        self._rows = rows
        self._dtype = dtype
        self._panel = max(_TILE_ROWS, _PANEL_BYTES // (self.num_features * dtype.itemsize))
        self._loaded: dict[int, Tensor] = {}
        self._direction = self._common_direction()
        self._along, self._length, self._rounding = torch.zeros(3, self.num_rows, device=device)
        for start in reversed(range(0, self.num_rows, self._panel)):
            self._load(start, keep=())
        self.absent = ((self._along == 0) & (self._length == 0)).nonzero().view(-1)
        longest, roughest = self._length.max(), self._rounding.max()
        whole = self._length + self._rounding
        self._error = (
            self._rounding * longest
            + whole * roughest
            + 2 * self.num_features * _FLOAT32_ROUNDING * whole * (longest + roughest)
            + _SLACK
        )
        self._reach = self._along.abs() * self._along.abs().max()

    def error(self, row: Tensor | slice, score: Tensor) -> Tensor:
        """The most by which a score near ``score`` (P,) of some rows can be wrong (P,)."""
        error = self._error[row]
        if self._dtype == torch.float32:
            return error
        # The product itself is rounded when it is written; it is the score less what the common direction gives.
        return error + _BFLOAT16_ROUNDING * 1.01 * (score.abs() + self._reach[row] + 4 * error)

    @property
    def strips(self) -> list[Strip]:
        """All strips, which hold every pair once, and a row's pair with itself."""
        starts = range(0, self.num_rows, self._panel)
        return [
            Strip(start, other, row)
            for start in starts
            for other in range(0, start + 1, self._panel)
            for row in range(start, min(start + self._panel, self.num_rows), _TILE_ROWS)
        ]

    def tiles(self, strips: Iterable[Strip]) -> Iterator[Tile]:
        """The tiles of some strips; the next strip is asked for when the tiles of the last have been taken."""
        buffer = torch.empty(_TILE_SIZE, dtype=self._dtype)
        buffer2 = torch.empty(_TILE_SIZE)
        for start, other, row in strips:
            panel, base = self._load(start, keep=(other,)), self._load(other, keep=(start,))
            block = panel[row - start : row - start + _TILE_ROWS]
            stop = row - start + len(block) if start == other else len(base)
            for column in range(0, stop, _TILE_COLUMNS):
                until = min(column + _TILE_COLUMNS, stop)
                if start == other and stop - until < len(block):
                    until = stop  # The square of the rows themselves is not divided.
                size = len(block), until - column
                rounded = buffer[: size[0] * size[1]].view(size)
                score = buffer2[: size[0] * size[1]].view(size)
                torch.mm(block, base[column:until].T, out=rounded)
                score.copy_(rounded)
                second = other + column
                score.addr_(self._along[row : row + len(block)], self._along[second : second + until - column])
                yield Tile(row, second, score, start == other and until == stop)
                if until == stop:
                    break

    def _common_direction(self) -> Tensor:
        """A unit vector near the mean of the unit rows (F,), or zeros where they have none."""
        sample = np.unique(np.linspace(0, self.num_rows - 1, _SAMPLED_ROWS).astype(np.int64))
        unit, _ = _unit(torch.from_numpy(self._rows.take_rows(sample)).to(self.device))
        mean = unit.mean(dim=0)
        norm = mean.norm()
        return mean / norm if norm > _SLACK else torch.zeros_like(mean)

    def _load(self, start: int, keep: tuple[int, ...]) -> Tensor:
        """The panel that begins at ``start``, rounded (P, F); of other panels only those to keep stay in memory."""
        for other in set(self._loaded) - {start, *keep}:
            del self._loaded[other]
        if start not in self._loaded:
            stop = min(start + self._panel, self.num_rows)
            panel = torch.empty(stop - start, self.num_features, dtype=self._dtype, device=self.device)
            step = max(1, _PREPARED_BYTES // (4 * self.num_features))
            for first in range(start, stop, step):
                last = min(first + step, stop)
                unit, along = _unit(torch.from_numpy(self._rows.take(first, last)).to(self.device), self._direction)
                rounded = panel[first - start : last - start].copy_(unit)
                self._along[first:last] = along
                self._length[first:last] = unit.norm(dim=1)
                if self._dtype != torch.float32:
                    self._rounding[first:last] = unit.sub_(rounded).norm(dim=1)
            self._loaded[start] = panel
        return self._loaded[start]


def _unit(rows: Tensor, direction: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rows (P, F) scaled to norm 1, less their part along a direction (F,), and how long that part is (P,)."""
    norm = rows.norm(dim=1, keepdim=True)
    if not torch.isfinite(norm).all() or bool(((norm < 1e-15) & (norm > 0)).any()):
        rows = rows / rows.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        norm = rows.norm(dim=1, keepdim=True)
    unit = rows / norm.masked_fill(norm == 0, 1)
    if direction is None:
        return unit, norm.view(-1)
    along = unit @ direction
    return unit.addr_(along, direction, alpha=-1), along


def _product(left: Tensor, right: Tensor) -> Tensor:
    if left.dtype == torch.float32 and not left.is_cuda:
        # NumPy's product is half as fast again as PyTorch's on some processors, and never slower.
        return torch.from_numpy(left.numpy() @ right.numpy().T)
    return left @ right.T


def exact_candidates(rows: Rows, count: int, *, dtype: torch.dtype, device: torch.device, steps: Steps) -> Candidates:
    """Candidates that hold the ``count`` most similar rows of each, or say in ``left_out`` what they may lack."""
    return select_candidates(RowProduct(rows, dtype, device), count, steps).finish()
