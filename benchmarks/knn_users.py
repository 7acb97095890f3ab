"""The user graph: 39,387 users, each the mean of the features (4096) of its items, of which Clothing has 23,033.

    python benchmarks/knn_users.py

Our searches take the features of users from items as they need them; faiss is given the matrix of all users, and making
it counts. Interactions are synthetic: 197,338 with power laws of activity and popularity. Writes below
``benchmarks/results/knn-users``.
"""

from __future__ import annotations

from knn_items import measure

if __name__ == "__main__":
    measure(__doc__, "knn-users", ("clothing-users",), ("exact", "exact-bf16", "exact-fp32", "faiss-flat"), steps=2)
