"""Drawing the neighbourhood of a batch: the sampler of this package against PyG's loader over torch-sparse.

    python benchmarks/sampling.py --items 100000 --out benchmarks/results/sampling.json

For I items, 2 I users and 20 I interactions with power laws on both sides. Both draw for 2,048 triplets of a user, an
item that it took and a random one, over two hops with the same fan-outs, and make a graph of what they drew, without
features. Ours draws the fan-out for each mention of a node, PyG for each node, and ours brings the weights of the whole
graph over the chance of each edge; so nodes and edges are counted as well. Both take turns, batch by batch, in one
process. PyG's needs torch-sparse (see the Makefile for how to install it), or pyg-lib, which it prefers.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch_geometric.data import HeteroData
from torch_geometric.loader import LinkNeighborLoader

from dream_pyg.bench.machine import describe_process
from dream_pyg.bench.workloads import power_law_pairs
from dream_pyg.data.files import write_json
from dream_pyg.graph.edges import add_interaction_edges
from dream_pyg.graph.sampling import FanOuts, NeighborSampler, ReceptiveField, sampled_graph
from dream_pyg.graph.schema import INTERACTS, ITEM, REV_INTERACTS, USER, label_name

BATCH_SIZE = 2048


def ours(graph: HeteroData, pairs: torch.Tensor, fan_outs: tuple[int, ...]) -> Iterator[HeteroData]:
    """The neighbourhoods of random batches, by this package."""
    sampler = NeighborSampler(graph, ReceptiveField(len(fan_outs)), FanOuts(fan_outs, 1, 1))
    generator, random = torch.Generator().manual_seed(0), np.random.default_rng(0)
    while True:
        user, item = pairs[:, torch.randint(pairs.size(1), (BATCH_SIZE,), generator=generator)]
        negative = torch.randint(int(graph[ITEM].num_nodes), (BATCH_SIZE,), generator=generator)
        yield sampled_graph(graph, sampler.draw(user, torch.cat([item, negative]), random))


def pyg(graph: HeteroData, pairs: torch.Tensor, fan_outs: tuple[int, ...]) -> Iterator[HeteroData]:
    """The neighbourhoods of random batches, by PyG."""
    plain = HeteroData()
    for node in (USER, ITEM):
        plain[node].num_nodes = graph[node].num_nodes
    for edge_type in (INTERACTS, REV_INTERACTS):
        plain[edge_type].edge_index = graph[edge_type].edge_index.as_tensor()
    loader = LinkNeighborLoader(
        plain,
        num_neighbors={edge_type: list(fan_outs) for edge_type in plain.edge_types},
        edge_label_index=(INTERACTS, pairs),
        neg_sampling="triplet",
        batch_size=BATCH_SIZE,
        shuffle=True,
    )
    while True:
        yield from loader


def take_turns(contestants: dict[str, Iterator[HeteroData]], rounds: int) -> dict[str, dict[str, Any]]:
    """Milliseconds of each batch, and how many nodes and edges a batch has on average."""
    results: dict[str, dict[str, Any]] = {name: {"milliseconds": [], "nodes": 0, "edges": 0} for name in contestants}
    for turn in range(rounds + 1):
        for name, batches in contestants.items():
            started = time.perf_counter()
            drawn = next(batches)
            seconds = time.perf_counter() - started
            if turn:  # The first batch makes what all others use.
                result = results[name]
                result["milliseconds"].append(1e3 * seconds)
                result["nodes"] += int(drawn.num_nodes) / rounds
                result["edges"] += num_edges(drawn) / rounds
    return results


def num_edges(drawn: HeteroData) -> int:
    """Edges of a drawn graph, which in ours are those of its widest hop."""
    return sum(store.hops[0][0].size(1) if "hops" in store else store.edge_index.size(1) for store in drawn.edge_stores)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--fan-outs", type=int, nargs="+", default=[4, 2])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    user, item = power_law_pairs(2 * options.items, options.items, 20 * options.items, seed=0)
    pairs = torch.from_numpy(np.stack([user, item]))
    graph = HeteroData()
    graph[USER].num_nodes, graph[ITEM].num_nodes = 2 * options.items, options.items
    graph[INTERACTS][label_name("train")] = pairs
    add_interaction_edges(graph)
    makers: dict[str, Callable[..., Iterator[HeteroData]]] = {"ours": ours}
    if any(importlib.util.find_spec(name) for name in ("torch_sparse", "pyg_lib")):
        makers["PyG"] = pyg
    else:
        print("PyG's loader is left out: it needs torch-sparse or pyg-lib.")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using 'NeighborSampler' without a 'pyg-lib'")
        contestants = {name: make(graph, pairs, tuple(options.fan_outs)) for name, make in makers.items()}
        results = take_turns(contestants, options.rounds)
    for name, result in results.items():
        times = result["milliseconds"]
        print(
            f"{name:<5} {min(times):8.1f} min {statistics.median(times):8.1f} median {max(times):8.1f} max ms a batch, "
            f"{result['nodes']:,.0f} nodes, {result['edges']:,.0f} edges"
        )
    if options.out is not None:
        what = {"items": options.items, "fan_outs": options.fan_outs, "batch_size": BATCH_SIZE}
        write_json(options.out, {**describe_process(), **what, "results": results})


if __name__ == "__main__":
    main()
