"""How the cost of all-kNN construction grows up to a million rows of 384 features.

    python benchmarks/knn_growth.py

A million rows, halved six times; what would take longer than the limit is extrapolated and marked so. Writes below
``benchmarks/results/knn-growth``.
"""

from __future__ import annotations

from knn_items import measure

from dream_pyg.bench.engines import ENGINES

if __name__ == "__main__":
    measure(__doc__, "knn-growth", ("million",), list(ENGINES), steps=6)
