"""The names in a graph, each defined once: node types, edge types, attributes and splits."""

from __future__ import annotations

from torch_geometric.data import HeteroData

EdgeType = tuple[str, str, str]

USER = "user"
ITEM = "item"
INTERACTS: EdgeType = (USER, "interacts", ITEM)
REV_INTERACTS: EdgeType = (ITEM, "rev_interacts", USER)
SPLITS = ("train", "valid", "test")
COLD = "cold"
"""Label of interactions of users without any in train. They are in no split, but known when it comes to recommending; a
graph without such users has no such label."""


def knn_edge(node: str, modality: str) -> EdgeType:
    """The edge type of a modality's relation graph over ``'user'`` or ``'item'`` nodes."""
    return (node, f"{modality}_knn", node)


def describes_edge(modality: str) -> EdgeType:
    """The edge type, in a sampled graph, from items to the users whose features of a modality they make.

    In a whole graph these are all items that a user interacted with.
    """
    return (ITEM, f"{modality}_describes", USER)


def senders_name(modality: str) -> str:
    """The attribute of a sampled graph's nodes with the places of those that may send over a modality's graph (S,)."""
    return f"senders_{modality}"


def feature_name(modality: str) -> str:
    """The attribute of ``graph['item']`` that holds a modality's features (I, F)."""
    return f"x_{modality}"


def mask_name(modality: str) -> str:
    """The attribute of ``graph['item']`` that says which items have the modality (I,)."""
    return f"has_{modality}"


def norm_name(modality: str) -> str:
    """The attribute of ``graph['item']`` that holds the Euclidean norm of each feature row (I,)."""
    return f"norm_{modality}"


def count_name(modality: str) -> str:
    """The attribute of ``graph['user']`` that counts each user's train items with the modality (U,).

    In a sampled graph these are the users that may send over the modality's graph, and the items drawn for them.
    """
    return f"count_{modality}"


def label_name(split: str) -> str:
    """The attribute of ``graph[INTERACTS]`` that holds a split's user-item pairs (2, E)."""
    return f"{split}_edge_label_index"


def labelled_splits(graph: HeteroData) -> tuple[str, ...]:
    """The splits, and ``COLD`` where the graph has such interactions."""
    return (*SPLITS, COLD) if label_name(COLD) in graph[INTERACTS] else SPLITS


def feature_modalities(graph: HeteroData) -> list[str]:
    """The modalities whose features the graph holds, in stored order."""
    return [name.removeprefix("x_") for name in graph[ITEM].keys() if name.startswith("x_")]  # noqa: SIM118


def knn_modalities(graph: HeteroData, node: str = ITEM) -> list[str]:
    """The modalities whose relation graph over ``node`` the graph holds, in stored order."""
    return [
        relation.removesuffix("_knn")
        for source, relation, target in graph.edge_types
        if source == target == node and relation.endswith("_knn")
    ]
