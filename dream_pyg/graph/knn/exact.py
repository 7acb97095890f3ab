r"""Exact all-kNN by a symmetric product of low precision with a proved bound, then an exact ranking of what is left.

Every pair of rows is multiplied once, in 8-bit integers or bfloat16 where the processor has units for them. For unit
rows :math:`\mathbf{x}_i = \mathbf{U} \mathbf{a}_i + \mathbf{z}_i`, with :math:`\mathbf{U}` orthonormal directions that
they have in common, and :math:`\mathbf{q}_i` what rounding makes of :math:`\mathbf{z}_i`,

.. math::
    |\mathbf{x}_i \cdot \mathbf{x}_j - \mathbf{a}_i \cdot \mathbf{a}_j - \mathbf{q}_i \cdot \mathbf{q}_j|
    \le \|\mathbf{z}_i - \mathbf{q}_i\| \|\mathbf{z}_j\| + \|\mathbf{q}_i\| \|\mathbf{z}_j - \mathbf{q}_j\|,

whose norms are known exactly. Whatever is further than twice that below a row's K-th best score cannot be one of its K
neighbours; the rest, a few rows, is ranked in full precision. Integers round coarsely: they serve where the directions
hold much of the rows, or where rows differ enough in similarity, which is tried on a part of the rows first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dream_pyg import ranks
from dream_pyg.graph.knn.candidates import CandidateBlocks, CandidateLists, list_room
from dream_pyg.graph.knn.rows import Rows, unit
from dream_pyg.graph.processor import exact_products, give_back_memory, has_onednn_product, onednn_product

_PANEL_BYTES = 64 << 20
_INTEGER_PANEL_BYTES = 80 << 20
"""The fewer panels, the less often rows are made again, which takes as long whatever the type."""
_MOST_PANEL_ROWS = 1 << 15
"""The lists of the rows of two panels are in use at a time; beside a GPU they are there, and all in memory."""
_TILE_ROWS = 512
_TILE_SCORES = 1 << 22
_STRIPS_BETWEEN_CLEANINGS = 8
_GPU_PANEL_BYTES, _GPU_PREPARED_BYTES = 1 << 30, 128 << 20
_GPU_TILE_ROWS, _GPU_TILE_SCORES = 4096, 1 << 26
"""A GPU has no small cache to stay in, but wants to be given much at once."""
_FEW_FEATURES = 1024
"""With fewer, tiles have twice the rows, since the products of a tile with itself, half of them twice, cost little."""
_MANY_ROWS = 1 << 14
"""With more, tiles have twice the rows and half the columns, for the same reason."""
GROUP = 16
"""Scores are looked at in groups, by their maximum; rows are padded to whole groups."""
_PREPARED_BYTES = 4 << 20
_SAMPLED_ROWS, _SAMPLED_ROWS_FOR_ONE = 512, 128
"""The fewer are enough for one direction, and decomposed at once where the others delay small searches."""
_DIRECTIONS = 32
"""Integers cost a pass over the scores anyway; many directions then cost little more than one."""
_WORTHWHILE_SHARE = 0.25
"""Other types save that pass where the first direction has less of the rows than this."""
_INTEGER_WIDTH = 64
"""Rows of integers are padded to multiples of it: products over one feature once came out as zeros (on AVX-512)."""
_MOST_INTEGER_FEATURES = 1 << 17
"""Sums of so many products of 8-bit integers fit into 32 bits."""
_PROBED_ROWS = 128
_MOST_UNSETTLED = 0.02
"""Of the rows that are tried, how many may have more candidates than their lists have room for."""
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


Steps = Callable[[Sequence[Strip], CandidateLists], Iterable[Strip]]
"""Gives the strips that are to be done, one after the other; in between the lists hold what was found so far."""


@exact_products()
def exact_candidates(
    rows: Rows, count: int, *, dtypes: Sequence[torch.dtype], device: torch.device, steps: Steps | None = None
) -> CandidateBlocks:
    """Candidates that hold the ``count`` most similar rows of each, or say in ``left_out`` what they may lack.

    Args:
        rows: The rows (N, F), of any norm.
        count: How many neighbours are wanted.
        dtypes: What may be multiplied, the fastest first; taken is the first that tells these rows apart, or the last.
            Of several processes the first decides.
        device: Where to multiply.
        steps: How strips are gone through; by default all of them.
    """
    dtypes = ranks.first_says(list(dtypes))
    if rows.shape[1] > _MOST_INTEGER_FEATURES:
        dtypes = [dtype for dtype in dtypes if dtype != torch.int8] or [torch.float32]
    product = RowProduct(rows, dtypes[0], device)
    for dtype in dtypes[1:]:
        if ranks.first_says(_settles(product, count)):
            break
        del product  # before the next takes as much memory
        product = RowProduct(rows, dtype, device)
    return select_candidates(product, count, steps)


def _settles(product: RowProduct, count: int) -> bool:
    """Whether the errors of a product leave few enough candidates for the lists, by some of its rows."""
    tile = next(product.tiles([max(strip for strip in product.strips if strip.panel == strip.other == 0)]))
    score = tile.score[:_PROBED_ROWS, : -len(tile.score) if tile.diagonal else None].float()
    score = score.masked_fill(product.absent[: score.size(1)], -torch.inf)
    room = list_room(count)
    if score.size(1) <= room:
        return True
    best = score.topk(room + 1, dim=1).values
    highest = best[:, count - 1]
    cut = highest - 2 * product.error(slice(tile.row, tile.row + len(score)), highest)
    return bool((best[:, room] >= cut).float().mean() <= _MOST_UNSETTLED)


def select_candidates(product: RowProduct, count: int, steps: Steps | None = None) -> CandidateBlocks:
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


def _select_from_tile(lists: CandidateLists, product: RowProduct, tile: Tile) -> None:
    score = tile.score
    num_rows, num_columns = score.shape
    rows, columns = slice(tile.row, tile.row + num_rows), slice(tile.column, tile.column + num_columns)
    if product.absent[columns].any():
        score.masked_fill_(product.absent[columns], -torch.inf)
    if product.absent[rows].any():
        score.masked_fill_(product.absent[rows, None], -torch.inf)
    if tile.diagonal:
        score[:, -num_rows:].fill_diagonal_(-torch.inf)

    largest = _largest(score, dim=1).float()
    if tile.column == 0 and largest.size(1) >= lists.count:
        # Each group has a score that high: together they are the first cut of rows that know nobody yet.
        lists.raise_cut(rows, _highest(largest, lists.count))
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
    return values.unflatten(dim, (GROUP, -1)).amax(dim)


def _highest(values: Tensor, count: int) -> Tensor:
    """The ``count``-th highest value of each row."""
    if values.is_cuda:
        return values.topk(count, dim=1).values[:, -1]
    place = values.size(1) - count
    return torch.from_numpy(np.partition(values.numpy(), place, axis=1)[:, place])  # Three times as fast as PyTorch.


def _positions(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The rows and columns where a mask is true."""
    if mask.is_cuda:
        row, column = mask.nonzero(as_tuple=True)
        return row, column
    position = torch.from_numpy(np.flatnonzero(mask.numpy()))  # Four times as fast as PyTorch.
    width = max(1, mask.size(1))
    row = position // width
    return row, position - row * width


class _Panel(NamedTuple):
    """Some rows, less what they have of the common directions."""

    rounded: Tensor  # (R, F), in the type that is multiplied
    along: Tensor  # (R, D), their coordinates in the directions


class RowProduct:
    """All scores of unit rows with each other, approximately, a tile at a time: the product in ``dtype``.

    Memory holds two panels of rows in ``dtype`` and one tile, whatever N is.

    Attributes:
        num_rows: N.
        absent: Which rows cannot be neighbours, being zero or mere padding (P,), P the next multiple of 16.

    Args:
        rows: The rows (N, F), of any norm.
        dtype: ``torch.int8``, ``torch.bfloat16`` or ``torch.float32``.
        device: Where to multiply.
    """

    def __init__(self, rows: Rows, dtype: torch.dtype, device: torch.device) -> None:
        self.num_rows, self.num_features = rows.shape
        padded = -(-self.num_rows // GROUP) * GROUP
        self._rows = rows
        self._dtype = dtype
        self._device = device
        few, many = self.num_features < _FEW_FEATURES, self.num_rows >= _MANY_ROWS
        if dtype == torch.float32:  # Its scores and products take more of the cache.
            few = many = False
        self._tile_rows = _TILE_ROWS * (2 if few or many else 1)
        self._tile_columns = _TILE_SCORES * (2 if few else 1) // self._tile_rows
        panel, self._prepared_bytes = _INTEGER_PANEL_BYTES if dtype == torch.int8 else _PANEL_BYTES, _PREPARED_BYTES
        most = _MOST_PANEL_ROWS
        if device.type == "cuda":
            panel, self._prepared_bytes, most = _GPU_PANEL_BYTES, _GPU_PREPARED_BYTES, padded
            self._tile_rows, self._tile_columns = _GPU_TILE_ROWS, _GPU_TILE_SCORES // _GPU_TILE_ROWS
        self._width = self.num_features
        if dtype == torch.int8:
            self._width = -(-self._width // _INTEGER_WIDTH) * _INTEGER_WIDTH
        panel = min(panel // (self._width * dtype.itemsize), most)
        panel = panel // self._tile_rows * self._tile_rows
        self._starts = range(0, padded, max(self._tile_rows, panel))
        self._loaded: dict[int, _Panel] = {}
        self._directions = self._common_directions(_DIRECTIONS if dtype == torch.int8 else 1)
        self._centred = bool(self._directions.any())
        self.absent = torch.ones(padded, dtype=torch.bool, device=device)
        self._along, self._step, length, rounding = torch.zeros(4, padded, device=device)
        for start in reversed(self._starts):
            self._load(start, keep=start + self._starts.step, measured=(length, rounding))
        if dtype == torch.int8:
            rounding *= self._step
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
        if self._dtype != torch.bfloat16:
            return error
        # The product itself is rounded when it is written; it is the score less what the common direction gives.
        ends = (score[:, None] - self._along[row][:, None] * self._ends).abs().amax(dim=1)
        return error + BFLOAT16_ROUNDING * 1.01 * (ends + 4 * error)

    @property
    def strips(self) -> list[Strip]:
        """All strips, which hold every pair once."""
        return [
            Strip(start, other, row)
            for number, start in enumerate(self._starts)
            for other in self._starts[: number + 1]
            for row in range(start, min(start + self._starts.step, len(self.absent)), self._tile_rows)
        ]

    def tiles(self, strips: Iterable[Strip] | None = None) -> Iterator[Tile]:
        """The tiles of some strips or of all; the next strip is asked for when the tiles of the last are done with."""
        size = self._tile_rows * (self._tile_columns + self._tile_rows)
        integers = self._dtype == torch.int8
        product = torch.empty(size, dtype=torch.int32 if integers else self._dtype, device=self._device)
        # Without a common direction a score is its product, and need not be written again.
        score = torch.empty(size, device=self._device) if integers or self._centred else product
        for number, strip in enumerate(self.strips if strips is None else strips):
            if self._dtype == torch.float32 and number % _STRIPS_BETWEEN_CLEANINGS == 0:
                give_back_memory()  # Each product was in memory of its own.
            yield from self._tiles_of(strip, product, score)
        self._loaded.clear()

    def _tiles_of(self, strip: Strip, product: Tensor, score: Tensor) -> Iterator[Tile]:
        """The tiles of a strip, computed in the given memory; between strips nothing but the cache holds a panel."""
        start, other, row = strip
        panel, base = self._load(start, keep=other), self._load(other, keep=start)
        mine = slice(row - start, row - start + self._tile_rows)
        block = panel.rounded[mine]
        stop = row - start + len(block) if start == other else len(base.rounded)
        for column in range(0, stop, self._tile_columns):
            until = min(column + self._tile_columns, stop)
            if start == other and stop - until < len(block):
                until = stop  # The square of the rows themselves is not divided.
            shape = len(block), until - column
            into, scored = (part[: shape[0] * shape[1]].view(shape) for part in (product, score))
            into = _multiply(block, base.rounded[column:until], into)
            second = other + column
            if score is product:
                scored = into
            else:
                rows, columns = slice(row, row + shape[0]), slice(second, second + shape[1])
                if self._dtype == torch.int8:
                    torch.mul(into, self._step[columns], out=scored).mul_(self._step[rows, None])
                else:
                    scored.copy_(into)
                torch.addmm(scored, panel.along[mine], base.along[column:until].T, out=scored)
            yield Tile(row, second, scored, start == other and until == stop)
            if until == stop:
                break

    def _common_directions(self, count: int) -> Tensor:
        """The orthonormal directions that unit rows have most of (F, D), or zeros where one alone has little."""
        size = _SAMPLED_ROWS if count > 1 else _SAMPLED_ROWS_FOR_ONE
        sample = np.unique(np.linspace(0, self.num_rows - 1, size).astype(np.int64))
        rows = unit(torch.from_numpy(self._rows.take_rows(sample)).to(self._device)).double()
        count = min(count, self.num_features, len(sample))
        share, mixture = (part[..., -count:] for part in torch.linalg.eigh(rows @ rows.T / len(sample)))
        if count == 1 and share < _WORTHWHILE_SHARE:
            return torch.zeros(self.num_features, 1, device=self._device)
        return torch.linalg.qr(rows.T @ mixture).Q.float()

    def _load(self, start: int, keep: int, measured: tuple[Tensor, Tensor] | None = None) -> _Panel:
        """The panel that begins at ``start``, in memory with at most one other.

        The first time, ``measured`` takes the norm of each row and that of what rounding leaves of it (P,), for
        integers in units of the row's step.
        """
        for other in set(self._loaded) - {start, keep}:
            del self._loaded[other]
        if start not in self._loaded:
            stop = min(start + self._starts.step, len(self.absent))
            panel = torch.zeros(stop - start, self._width, dtype=self._dtype, device=self._device)
            along = torch.zeros(stop - start, self._directions.size(1), device=self._device)
            step = max(1, self._prepared_bytes // (4 * self.num_features))
            for first in range(start, min(stop, self.num_rows), step):
                last = min(first + step, stop, self.num_rows)
                part = unit(torch.from_numpy(self._rows.take(first, last)).to(self._device))
                here, there = slice(first, last), slice(first - start, last - start)
                if self._centred:
                    torch.mm(part, self._directions, out=along[there])
                    part.addmm_(along[there], self._directions.T, alpha=-1)
                if measured:
                    length, rounding = measured
                    length[here] = part.norm(dim=1)
                    self.absent[here] = ~along[there].any(dim=1) & (length[here] == 0)
                    self._along[here] = along[there, 0]
                integers = self._dtype == torch.int8
                if integers:
                    self._step[here] = part.abs().amax(dim=1) / 127
                    part /= self._step[here, None].clamp_min(torch.finfo(torch.float32).tiny)
                rounded = panel[there, : self.num_features]
                rounded.copy_(part.round() if integers else part)
                if measured and self._dtype != torch.float32:
                    rounding[here] = part.sub_(rounded).norm(dim=1)
            self._loaded[start] = _Panel(panel, along)
        return self._loaded[start]


def _multiply(left: Tensor, right: Tensor, product: Tensor) -> Tensor:
    """The product of rows with rows, in the given memory or in its own."""
    if left.dtype == torch.int8:
        return torch._int_mm(left, right.T, out=product)
    if left.dtype == torch.float32 and has_onednn_product(left.device):
        return onednn_product(left, right)  # NumPy's product is no slower, but leaves threads of its own in the way.
    return torch.mm(left, right.T, out=product)
