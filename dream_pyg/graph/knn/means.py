"""Rows that are means of other rows, such as users of their items, searched without ever being materialised."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dream_pyg.data.features import FeatureMatrix
from dream_pyg.data.files import whole_file
from dream_pyg.graph.csr import csr_product

_BLOCK_ELEMENTS = 1 << 26


class MeanRows:
    """The mean of the rows that each of N rows names, a block of rows at a time (user features, Section 3.1 of DREAM).

    Args:
        pairs: Rows here and the rows there of which they are the mean (2, E).
        num_rows: N.
        features: The rows there (I, F); one without features counts for nothing.
    """

    def __init__(self, pairs: NDArray[np.int64], num_rows: int, features: FeatureMatrix) -> None:
        has = features.has[pairs[1]]
        pairs = pairs[:, has]
        order = np.lexsort((pairs[1], pairs[0]))
        self.item = pairs[1][order]
        self.count = np.bincount(pairs[0], minlength=num_rows)
        self.pointer = np.concatenate([[0], self.count.cumsum()])
        self.features = features
        with warnings.catch_warnings():
            # A memory-mapped file is read-only, and only read here. Said once, before threads ask for rows.
            warnings.simplefilter("ignore", UserWarning)
            in_place = features.dtype == np.float32
            self._matrix = torch.from_numpy(np.ascontiguousarray(features.matrix)) if in_place else None
        self.shape = (num_rows, features.shape[1])

    def take(self, start: int, stop: int) -> NDArray[np.float32]:
        """The means of rows ``start`` to ``stop`` as float32 (R, F); zeros for a row without any."""
        return self.take_rows(np.arange(start, min(stop, self.shape[0])))

    def take_rows(self, index: NDArray[np.int64]) -> NDArray[np.float32]:
        """The means of some rows as float32 (R, F), in any order."""
        count = self.count[index]
        pointer = np.concatenate([[0], count.cumsum()])
        entry = np.arange(pointer[-1]) + np.repeat(self.pointer[index] - pointer[:-1], count)
        item = self.item[entry]
        weight = np.repeat(1 / np.maximum(count, 1), count).astype(np.float32)
        if self._matrix is not None:
            # In place, without a copy of the rows.
            with whole_file(self.features.matrix):
                return _weighted_sums(self._matrix, self.features.row_of_item[item], pointer, weight)
        unique, position = np.unique(item, return_inverse=True)
        total = np.zeros((len(index), self.shape[1]), dtype=np.float32)
        # Rows arrive in chunks, so memory stays bounded however many there are.
        chunk = max(1, _BLOCK_ELEMENTS // self.shape[1])
        for first in range(0, len(unique), chunk):
            within = (position >= first) & (position < first + chunk)
            kept_before = np.concatenate([[0], np.cumsum(within)])
            rows = torch.from_numpy(self.features.take_rows(unique[first : first + chunk]))
            total += _weighted_sums(rows, position[within] - first, kept_before[pointer], weight[within])
        return total


def _weighted_sums(
    rows: Tensor, index: NDArray[np.int64], pointer: NDArray[np.int64], weight: NDArray[np.float32]
) -> NDArray[np.float32]:
    """The weighted sum of some rows for each stretch of ``index`` (R, F)."""
    parts = torch.from_numpy(pointer), torch.from_numpy(index), torch.from_numpy(weight)
    return csr_product(*parts, (len(pointer) - 1, len(rows)), rows).numpy()
