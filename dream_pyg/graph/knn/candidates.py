"""Lists of candidates: what a search of low precision or low effort hands to the exact ranking."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dream_pyg.graph.knn.scratch import ScratchTables

ScoreError = Callable[[Tensor | slice, Tensor], Tensor]
"""The most by which scores of about the given size (P,) of the given rows can be wrong (P,)."""

_SLOTS_AT_ONCE = 16
_WAITING_PER_ROW, _MOST_WAITING = 4, 1 << 19
"""Many candidates are put into lists at once, for each time has its costs; too many would cost memory."""
_FOUND = ("score", "index", "size", "cut", "dropped")


@dataclass(frozen=True, eq=False)
class Candidates:
    """Rows that may be neighbours of each row, and how similar others can be at most."""

    index: NDArray[np.int64]  # (N, M), -1 for none
    left_out: NDArray[np.float32]  # (N,): no row outside the list has a greater cosine; -inf where nothing is left out
    order: NDArray[np.int64] | None = None  # (N,): all rows, those that have many candidates in common side by side

    @property
    def width(self) -> int:
        """M."""
        return self.index.shape[1]

    def block(self, rows: slice | NDArray[np.int64]) -> Candidates:
        """Those of some rows."""
        return Candidates(self.index[rows], self.left_out[rows])


class CandidateBlocks(Protocol):
    """Candidates of N rows that are unpacked for a block of them at a time, so that memory does not grow with N."""

    @property
    def width(self) -> int:
        """M, how many a row has at most."""

    @property
    def order(self) -> NDArray[np.int64] | None:
        """The rows (N,) in the order in which to ask for them; None if any will do."""

    def block(self, rows: slice | NDArray[np.int64]) -> Candidates:
        """Those of some rows, a slice if there is no order."""


def list_room(count: int) -> int:
    """How many candidates a list of :class:`CandidateLists` has room for."""
    return 4 * count + 24


class CandidateLists:
    """The best scores so far of each row, with what may still beat them within the error of a score.

    A score is kept while it could belong to one of the ``count`` highest cosines: while it is not below ``cut``, which
    is the ``count``-th best score so far less what the errors of both can amount to.

    Args:
        num_rows: N.
        count: How many neighbours are wanted.
        error: How wrong a score can be.
        device: Where scores are compared.
    """

    def __init__(self, num_rows: int, count: int, error: ScoreError, device: torch.device) -> None:
        room = min(list_room(count), max(count, num_rows))
        self.count = count
        self._tables = ScratchTables(device)
        self.score = self._tables.full(num_rows, room, -torch.inf, torch.float32)
        self.index = self._tables.full(num_rows, room, -1, torch.int32)
        self.size = torch.zeros(num_rows, dtype=torch.int32, device=device)
        self.cut = torch.full((num_rows,), -torch.inf, device=device)
        self.dropped = torch.full((num_rows,), -torch.inf, device=device)  # the best that there was no room for
        self._error = error
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []
        self._num_waiting = 0

    def raise_cut(self, row: Tensor | slice, score: Tensor) -> None:
        """Raise the cut of some rows, of which ``count`` scores are known to be ``score`` (P,) at least."""
        self.cut[row] = torch.maximum(self.cut[row], score - 2 * self._error(row, score))

    def add(self, row: Tensor, index: Tensor, score: Tensor) -> None:
        """Add candidates: the row each belongs to, its id and its score, each (C,)."""
        self._waiting.append((row, index.to(torch.int32), score))
        self._num_waiting += len(row)
        if self._num_waiting > min(_WAITING_PER_ROW * len(self.cut), _MOST_WAITING):
            self.flush()

    def flush(self) -> None:
        """Put what was added into the lists, and make room in those that are full."""
        if not self._num_waiting:
            return
        self._tables.let_go()
        row, index, score = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting, self._num_waiting = [], 0
        kept = (score >= self.cut[row]).nonzero().view(-1)
        row, order = torch.sort(row[kept].int(), stable=True)  # faster than 64 bits
        kept = kept[order]
        index, score = index[kept], score[kept]
        changed, own, added = torch.unique_consecutive(row.long(), return_inverse=True, return_counts=True)
        first = added.cumsum(0) - added
        room = self.score.size(1)
        before = self.size[changed]
        size = before + added
        self.size[changed] = size.int()  # of rows that are full as well, which are counted anew below
        place = (changed * room + before - first)[own] + torch.arange(len(own), device=own.device)
        fits = (size <= room)[own]
        now = fits.nonzero().view(-1)
        self.score.view(-1)[place[now]] = score[now]
        self.index.view(-1)[place[now]] = index[now]
        late = (~fits).nonzero().view(-1)
        slot = late - first[own[late]]
        for start in range(0, int(slot.max()) + 1 if len(slot) else 0, _SLOTS_AT_ONCE):
            chosen = ((slot >= start) & (slot < start + _SLOTS_AT_ONCE)).nonzero().view(-1)
            now = late[chosen]
            self._merge(row[now], slot[chosen] - start, index[now], score[now])

    def _merge(self, row: Tensor, slot: Tensor, index: Tensor, score: Tensor) -> None:
        """Add to rows that are full, and keep the best."""
        room = self.score.size(1)
        changed, position = torch.unique_consecutive(row, return_inverse=True)
        width = room + int(slot.max()) + 1
        joined_score = self.score.new_full((len(changed), width), -torch.inf)
        joined_index = self.index.new_full((len(changed), width), -1)
        joined_score[:, :room] = self.score[changed]
        joined_index[:, :room] = self.index[changed]
        joined_score[position, room + slot] = score
        joined_index[position, room + slot] = index
        best = joined_score.topk(room + 1, dim=1)
        self.raise_cut(changed, best.values[:, self.count - 1])
        self.dropped[changed] = torch.maximum(self.dropped[changed], best.values[:, room])
        kept = best.values[:, :room] >= self.cut[changed, None]
        self.score[changed] = best.values[:, :room].masked_fill(~kept, -torch.inf)
        self.index[changed] = joined_index.gather(1, best.indices[:, :room]).masked_fill(~kept, -1)
        self.size[changed] = kept.sum(dim=1, dtype=self.size.dtype)

    def state(self) -> dict[str, Tensor]:
        """All that was found so far, and how wrong it can be."""
        self.flush()
        found = {name: getattr(self, name) for name in _FOUND}
        return found | {"error": self._error(slice(None), torch.zeros_like(self.cut))}

    def restore(self, state: Mapping[str, Tensor]) -> bool:
        """Take over the :meth:`state` of an earlier search, if it was of the same rows and of the same precision."""
        own = self.state()
        same = state.keys() == own.keys() and all(state[name].shape == own[name].shape for name in own)
        if not same or not torch.equal(state["error"], own["error"].cpu()):
            return False
        for name in _FOUND:
            getattr(self, name).copy_(state[name])
        return True

    @property
    def width(self) -> int:
        """How many candidates a row has at most."""
        return self.score.size(1)

    @property
    def order(self) -> None:
        """None, for any will do."""

    def block(self, rows: slice | NDArray[np.int64]) -> Candidates:
        """What some rows have now, without what has fallen below the cut since it was added."""
        self.flush()
        self._tables.let_go()
        chosen: slice | Tensor = rows if isinstance(rows, slice) else torch.from_numpy(rows)
        score, order = self.score[chosen].sort(dim=1, descending=True)
        last = score[:, self.count - 1]
        self.raise_cut(chosen, last)
        cut, error = self.cut[chosen], self._error(chosen, last.clamp_min(-1))
        kept = score >= cut[:, None]
        width = max(1, int(kept.sum(dim=1).max()))
        index = torch.where(kept, self.index[chosen].gather(1, order), -1)[:, :width]
        left_out = torch.maximum(cut, self.dropped[chosen]) + error
        return Candidates(*(part.cpu().numpy() for part in (index.long(), left_out)))
