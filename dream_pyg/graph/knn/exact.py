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

from dream_pyg import ranks
from dream_pyg.graph.knn.candidates import CandidateBlocks, CandidateLists
from dream_pyg.graph.knn.rows import Rows

_PANEL_BYTES = 64 << 20
_TILE_ROWS = 512
_TILE_COLUMNS = 8192
_FEW_FEATURES = 1024
"""With fewer, tiles are twice as high, since the products of a tile with itself, half of them twice, cost little."""
GROUP = 16
"""Scores are looked at in groups, by their maximum; rows are padded to whole groups."""
_PREPARED_BYTES = 4 << 20
_SAMPLED_ROWS = 256
_MERGED_ROWS = 1 << 16
BFLOAT16_ROUNDING = 2.0**-8
FLOAT32_ROUNDING = 2.0**-24
SLACK = 2.0**-15
"""Many times what the float32 steps around the product can be wrong by."""


class Strip(NamedTuple):
    """Some rows against a panel of columns: what is done between two looks at the clock."""

    panel: int
    other: int
    row: int


class Tile(NamedTuple):
    """Scores of some rows against some columns; never of a pair that another tile has."""

    row: int
    column: int
    score: Tensor  # (R, C), both multiples of 16, of any real type; overwritten by the next tile
    diagonal: bool  # whether the last R columns are the rows themselves


class Product(Protocol):
    """All scores of N rows with each other, approximately, a tile at a time.

    Attributes:
        num_rows: N.
        absent: Which rows cannot be neighbours, being zero or mere padding (P,), P the next multiple of 16.
    """

    num_rows: int
    absent: Tensor

    @property
    def strips(self) -> Sequence[Strip]:
        """All strips, which hold every pair once."""

    def tiles(self, strips: Iterable[Strip] | None = None) -> Iterator[Tile]:
        """The tiles of some strips or of all; the next strip is asked for when the tiles of the last are done with."""

    def error(self, row: Tensor | slice, score: Tensor) -> Tensor:
        """The most by which a score near ``score`` (R,) of some rows can be wrong (R,)."""


Steps = Callable[[Sequence[Strip], CandidateLists], Iterable[Strip]]
"""Gives the strips that are to be done, one after the other; in between the lists hold what was found so far."""


def exact_candidates(
    rows: Rows, count: int, *, dtype: torch.dtype, device: torch.device, steps: Steps | None = None
) -> CandidateBlocks:
    """Candidates that hold the ``count`` most similar rows of each, or say in ``left_out`` what they may lack.

    Args:
        rows: The rows (N, F), of any norm.
        count: How many neighbours are wanted.
        dtype: ``torch.bfloat16`` or ``torch.float32``, what is multiplied.
        device: Where to multiply.
        steps: How strips are gone through; by default all of them.
    """
    return select_candidates(RowProduct(rows, dtype, device), count, steps)


def select_candidates(product: Product, count: int, steps: Steps | None = None) -> CandidateBlocks:
    """Collect from all scores those that may belong to the ``count`` highest cosines of a row.

    Both rows of a pair profit from its one score. Nothing is sorted: a score is compared with its row's cut, which
    rises as better ones are found, and most are not even looked at, since the maximum of their group is below it.
    Of several processes each does its share, and the first has what all of them found.
    """
    lists = CandidateLists(len(product.absent), count, product.error, product.absent.device)
    lists.cut[product.absent] = torch.inf

    def search() -> None:
        strips = ranks.share(product.strips)
        for tile in product.tiles(steps(strips, lists) if steps else strips):
            _select_from_tile(lists, product, tile)

    ranks.together(search)
    _merge(lists)
    return lists


def _merge(lists: CandidateLists) -> None:
    """Add what the other processes found to the lists of the first."""
    if ranks.num_ranks() == 1:
        return
    lists.flush()
    for highest in (lists.cut, lists.dropped):
        ranks.reduce_highest(highest)
    found = [lists.score, lists.index]
    for score, index in ranks.first_gets(found, lambda other: [part.shape for part in found]):
        for start in range(0, len(score), _MERGED_ROWS):
            row, slot = (index[start : start + _MERGED_ROWS] >= 0).nonzero().T
            lists.add(row + start, index[row + start, slot], score[row + start, slot])


def _select_from_tile(lists: CandidateLists, product: Product, tile: Tile) -> None:
    score = tile.score
    num_rows, num_columns = score.shape
    rows, columns = slice(tile.row, tile.row + num_rows), slice(tile.column, tile.column + num_columns)
    if product.absent[columns].any():
        score.masked_fill_(product.absent[columns], -torch.inf)
    if tile.diagonal:
        score[:, -num_rows:].fill_diagonal_(-torch.inf)

    largest = _largest(score, dim=1).float()
    if tile.column == 0 and largest.size(1) >= lists.count:
        # Each group has a score that high: together they are the first cut of rows that know nobody yet.
        lists.raise_cut(rows, largest.topk(lists.count, dim=1).values[:, -1])
    cut = lists.cut[rows]
    row, start = _positions(largest >= cut[:, None])
    found = score.unflatten(1, (GROUP, -1))[row, :, start].float()
    group, member = _positions((found >= cut[row, None]) & (found > -torch.inf))
    lists.add(row[group] + tile.row, start[group] + member * largest.size(1) + tile.column, found[group, member])

    if tile.diagonal:  # These pairs are in the tile twice.
        score, columns = score[:, :-num_rows], slice(columns.start, columns.stop - num_rows)
    largest = _largest(score, dim=0).float()
    cut = lists.cut[columns]
    start, column = _positions(largest >= cut)
    found = score.unflatten(0, (GROUP, -1))[:, start, column].T.float()
    group, member = _positions((found >= cut[column, None]) & (found > -torch.inf))
    lists.add(column[group] + tile.column, start[group] + member * largest.size(0) + tile.row, found[group, member])


def _largest(values: Tensor, dim: int) -> Tensor:
    """The maximum of each group, whose members lie far apart: those side by side in memory take eight times longer."""
    for _ in range(GROUP.bit_length() - 1):
        values = torch.maximum(*values.chunk(2, dim))
    return values


def _positions(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The rows and columns where a mask is true."""
    # On a CPU NumPy is four times as fast.
    position = mask.view(-1).nonzero().view(-1) if mask.is_cuda else torch.from_numpy(np.flatnonzero(mask.numpy()))
    width = max(1, mask.size(1))
    row = position // width
    return row, position - row * width


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
        padded = -(-self.num_rows // GROUP) * GROUP
        self._rows = rows
        self._dtype = dtype
        self._device = device
        self._tile_rows = _TILE_ROWS * (2 if self.num_features < _FEW_FEATURES else 1)
        panel = _PANEL_BYTES // (self.num_features * dtype.itemsize)
        panel = panel // self._tile_rows * self._tile_rows
        self._starts = range(0, padded, max(self._tile_rows, panel))
        self._loaded: dict[int, Tensor] = {}
        self._direction = self._common_direction()
        self._centred = bool(self._direction.any())
        self._along, length, rounding = torch.zeros(3, padded, device=device)
        for start in reversed(self._starts):
            self._load(start, keep=start, measured=(length, rounding))
        self.absent = (self._along == 0) & (length == 0)
        whole = length + rounding
        self._error = (
            rounding * length.max()
            + whole * rounding.max()
            + 2 * self.num_features * FLOAT32_ROUNDING * whole * whole.max()
            + SLACK
        )
        present = self._along[~self.absent]
        self._ends = torch.stack([present.min(), present.max()]) if len(present) else self._along[:2]

    def error(self, row: Tensor | slice, score: Tensor) -> Tensor:
        """The most by which a score near ``score`` (R,) of some rows can be wrong (R,)."""
        error = self._error[row]
        if self._dtype == torch.float32:
            return error
        # The product itself is rounded when it is written; it is the score less what the common direction gives.
        ends = (score[:, None] - self._along[row, None] * self._ends).abs().amax(dim=1)
        return error + BFLOAT16_ROUNDING * 1.01 * (ends + 4 * error)

    @property
    def strips(self) -> list[Strip]:
        """All strips, which hold every pair once."""
        return [
            Strip(start, other, row)
            for number, start in enumerate(self._starts)
            for other in self._starts[: number + 1]
            for row in range(start, min(start + self._starts.step, len(self._along)), self._tile_rows)
        ]

    def tiles(self, strips: Iterable[Strip] | None = None) -> Iterator[Tile]:
        """The tiles of some strips or of all; the next strip is asked for when the tiles of the last are done with."""
        size = self._tile_rows * (_TILE_COLUMNS + self._tile_rows)
        product = torch.empty(size, dtype=self._dtype, device=self._device)
        # Without a common direction a score is its product, and need not be written again.
        score = torch.empty(size, device=self._device) if self._centred else product
        for strip in self.strips if strips is None else strips:
            yield from self._tiles_of(strip, product, score)
        self._loaded.clear()

    def _tiles_of(self, strip: Strip, product: Tensor, score: Tensor) -> Iterator[Tile]:
        """The tiles of a strip, computed in the given memory; between strips nothing but the cache holds a panel."""
        start, other, row = strip
        panel, base = self._load(start, keep=other), self._load(other, keep=start)
        block = panel[row - start : row - start + self._tile_rows]
        stop = row - start + len(block) if start == other else len(base)
        for column in range(0, stop, _TILE_COLUMNS):
            until = min(column + _TILE_COLUMNS, stop)
            if start == other and stop - until < len(block):
                until = stop  # The square of the rows themselves is not divided.
            shape = len(block), until - column
            into, scored = (part[: shape[0] * shape[1]].view(shape) for part in (product, score))
            _multiply(block, base[column:until], into)
            second = other + column
            if score is not product:
                along = self._along[row : row + shape[0]], self._along[second : second + shape[1]]
                torch.addr(scored.copy_(into), *along, out=scored)
            yield Tile(row, second, scored, start == other and until == stop)
            if until == stop:
                break

    def _common_direction(self) -> Tensor:
        """A unit vector near the mean of the unit rows (F,), or zeros where they have none."""
        sample = np.unique(np.linspace(0, self.num_rows - 1, _SAMPLED_ROWS).astype(np.int64))
        mean = _unit(torch.from_numpy(self._rows.take_rows(sample)).to(self._device)).mean(dim=0)
        norm = mean.norm()
        # The mean of rows without a common direction is not zero but short.
        return mean / norm if norm > 2 / len(sample) ** 0.5 else torch.zeros_like(mean)

    def _load(self, start: int, keep: int, measured: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """The panel that begins at ``start``, rounded (R, F), in memory with at most one other.

        The first time, ``measured`` takes the norm of each row and that of what rounding leaves of it (P,).
        """
        for other in set(self._loaded) - {start, keep}:
            del self._loaded[other]
        if start not in self._loaded:
            stop = min(start + self._starts.step, len(self._along))
            panel = torch.zeros(stop - start, self.num_features, dtype=self._dtype, device=self._device)
            step = max(1, _PREPARED_BYTES // (4 * self.num_features))
            for first in range(start, min(stop, self.num_rows), step):
                last = min(first + step, stop, self.num_rows)
                part = _unit(torch.from_numpy(self._rows.take(first, last)).to(self._device))
                if self._centred:
                    along = self._along[first:last]
                    if measured:
                        torch.mv(part, self._direction, out=along)
                    part.addr_(along, self._direction, alpha=-1)
                rounded = panel[first - start : last - start].copy_(part)
                if measured:
                    length, rounding = measured
                    length[first:last] = part.norm(dim=1)
                    if self._dtype != torch.float32:
                        rounding[first:last] = part.sub_(rounded).norm(dim=1)
            self._loaded[start] = panel
        return self._loaded[start]


def _unit(rows: Tensor) -> Tensor:
    """Rows (R, F) scaled to norm 1; rows of zeros stay."""
    norm = rows.norm(dim=1, keepdim=True)
    if not torch.isfinite(norm).all() or bool(((norm < 1e-15) & (norm > 0)).any()):  # Their squares do not fit.
        rows = rows / rows.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        norm = rows.norm(dim=1, keepdim=True)
    return rows / norm.masked_fill(norm == 0, 1)


def _multiply(left: Tensor, right: Tensor, product: Tensor) -> None:
    if left.dtype == torch.float32 and not left.is_cuda and left.size(1) >= _FEW_FEATURES:
        # NumPy's product is half as fast again as PyTorch's on some processors, but starts threads of its own.
        np.matmul(left.numpy(), right.numpy().T, out=product.numpy())
    else:
        torch.mm(left, right.T, out=product)
