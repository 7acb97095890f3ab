"""One training step at the shape of Baby: DREAM, LightGCN and BPR against plain PyTorch Geometric.

    python benchmarks/train_step.py --out benchmarks/results/train-step-baby.json

19,445 users, 7,050 items, 118,551 train interactions of power-law activity and popularity, 4,096 and 384 raw features,
10 neighbours, 64 dimensions, 2,048 triplets, all losses and Adam. ``plain DREAM`` is the same mathematics as PyG and
PyTorch suggest it; its losses and gradients are compared with ours first. Contestants take turns, a batch each round,
in one process, so that whatever the machine does meets all of them. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch_geometric.data import HeteroData
from torch_geometric.nn import LGConv
from torch_geometric.nn.models import LightGCN as PyGLightGCN

from dream_pyg import BPR, DREAM, Batch, Embeddings, LightGCN, Recommender, build_graph, evaluate, load_graph
from dream_pyg.bench.machine import describe_process
from dream_pyg.bench.workloads import find_workload, power_law_pairs
from dream_pyg.data.dataset import Dataset, Modality
from dream_pyg.data.features import FeatureMatrix
from dream_pyg.data.files import write_json
from dream_pyg.data.interactions import TEST, TRAIN, VALID, Interactions
from dream_pyg.graph.processor import deterministic, has_bfloat16_units
from dream_pyg.graph.schema import INTERACTS, ITEM, REV_INTERACTS, USER, feature_name, knn_edge
from dream_pyg.models.lightgcn import propagate_interactions
from dream_pyg.nn.losses import bpr_loss, l2_loss
from dream_pyg.nn.user_features import mean_over_items
from dream_pyg.training.model import prepare_graph
from dream_pyg.training.triplets import TripletSampler

NUM_USERS, NUM_ITEMS, NUM_TRAIN, NUM_VALID, NUM_TEST = 19_445, 7_050, 118_551, 20_559, 21_682
FEATURES = {"image": "baby", "text": "baby-text"}
BATCH_SIZE = 2048
LEARNING_RATE = 1e-3
CPU = torch.device("cpu")
ROUNDED = "DREAM, bfloat16 features"
"""Takes part only where the processor has units for bfloat16; elsewhere it is ten times slower."""


def held_out_pairs(user: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Some pairs, in random order, of those of ascending users; a first train item of each user stays."""
    later = np.flatnonzero(np.diff(user, prepend=-1) == 0)
    return np.random.default_rng(0).permutation(later)[:count]


def batches_of(graph: HeteroData, epoch: int = 0) -> list[Batch]:
    """The batches of an epoch."""
    triplets = TripletSampler(graph).epoch(torch.Generator().manual_seed(epoch))
    return [Batch(*parts) for parts in zip(*(part.split(BATCH_SIZE) for part in triplets), strict=True)]


def make_graph() -> HeteroData:
    """The generated data as a graph, neighbours searched in it."""
    num_pairs = NUM_TRAIN + NUM_VALID + NUM_TEST
    # Of this exponent are the popularities of Baby: a median of 8 and a maximum of 554 there, 12 and 700 here.
    user, item = power_law_pairs(NUM_USERS, NUM_ITEMS, num_pairs, seed=0, item_exponent=0.5)
    chosen = held_out_pairs(user, NUM_VALID + NUM_TEST)
    split = np.full(num_pairs, TRAIN, dtype=np.uint8)
    split[chosen[:NUM_VALID]], split[chosen[NUM_VALID:]] = VALID, TEST
    ids = (pl.Series([str(number) for number in range(count)]) for count in (NUM_USERS, NUM_ITEMS))
    modalities = {}
    with tempfile.TemporaryDirectory() as directory:
        for seed, (name, preset) in enumerate(FEATURES.items()):
            rows = np.load(find_workload(preset, seed=seed).write(Path(directory)).features)
            modalities[name] = Modality(FeatureMatrix(rows, np.arange(NUM_ITEMS)))
    dataset = Dataset("baby-shape", Interactions(user, item, split, None, *ids), modalities, {})
    return build_graph(dataset, num_neighbors=10)


class PlainDREAM(nn.Module):
    """DREAM with nothing but PyTorch and PyG: LGConv, user features and similarity targets as matrices."""

    def __init__(self, graph: HeteroData, model: DREAM) -> None:
        super().__init__()
        self.config = model.config
        self.weights = model.modality_weights
        self.num_users = model.num_users
        self.embedding = nn.Parameter(torch.cat([model.user_embedding, model.item_embedding]).detach().clone())
        self.linears = nn.ModuleDict()
        user, item = graph[INTERACTS].edge_index.as_tensor()
        self.edge_index = torch.cat(
            [torch.stack([user, item + self.num_users]), torch.stack([item + self.num_users, user])], 1
        )
        self.convs = nn.ModuleList(LGConv() for _ in range(model.config.num_layers))
        self.knn_conv = LGConv(normalize=False)
        self.knn: dict[str, tuple[Tensor, Tensor]] = {}
        self.gate_features: dict[str, Tensor] = {}
        self.target_features: dict[str, Tensor] = {}
        mean_matrix = torch.sparse_coo_tensor(
            torch.stack([user, item]),
            torch.bincount(user).clamp(min=1).reciprocal()[user],
            (self.num_users, model.num_items),
        ).coalesce()
        for modality in self.weights:
            gate = model.gates[modality]
            self.linears[modality] = nn.Linear(*gate.weight.shape)
            self.linears[modality].weight.data = gate.weight.detach().T.clone()
            self.linears[modality].bias.data = gate.bias.detach().clone()
            features = graph[ITEM][feature_name(modality)]
            for rows, stored in (
                (F.normalize(features), self.gate_features),
                (features - model.signal.get_buffer(f"mean_{modality}"), self.target_features),
            ):
                stored[modality] = torch.cat([mean_matrix @ rows, rows])
            edges = [graph[knn_edge(node, modality)] for node in (USER, ITEM)]
            self.knn[modality] = (
                torch.cat([edges[0].edge_index.as_tensor(), edges[1].edge_index.as_tensor() + self.num_users], dim=1),
                torch.cat([edge.edge_weight for edge in edges]),
            )

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """The terms of Eq. 15, as DREAM names them; the signal with the norm of its target, which is constant."""
        config = self.config
        layers = [self.embedding]
        for conv in self.convs:
            layers.append(conv(layers[-1], self.edge_index))
        behavior = torch.stack(layers).mean(dim=0)
        modal = sum(
            weight
            * self.knn_conv(
                torch.sigmoid(self.linears[modality](self.gate_features[modality])) * self.embedding,
                *self.knn[modality],
            )
            for modality, weight in self.weights.items()
        )
        general = behavior + modal
        user, pos_item, neg_item = batch.user, batch.pos_item + self.num_users, batch.neg_item + self.num_users
        margin = (general[user] * (general[pos_item] - general[neg_item])).sum(dim=1)
        initial = (self.embedding[node] for node in (user, pos_item, neg_item))
        intra = self.info_nce(behavior[user], behavior[pos_item]) + self.info_nce(modal[user], modal[pos_item])
        inter = self.info_nce(behavior[user], modal[user]) + self.info_nce(behavior[pos_item], modal[pos_item])
        return {
            "bpr": -F.logsigmoid(margin).mean(),
            "intra": config.intra_weight * intra,
            "inter": config.inter_weight * inter,
            "signal": config.signal_weight * (self.signal(modal, user) + self.signal(modal, pos_item)),
            "l2": config.l2_weight * 0.5 * sum(rows.square().sum() for rows in initial) / len(user),
        }

    def info_nce(self, query: Tensor, key: Tensor) -> Tensor:
        """Cross entropy of the cosines."""
        logits = F.normalize(query) @ F.normalize(key).T / self.config.temperature
        return F.cross_entropy(logits, torch.arange(len(query)))

    def target(self, node: Tensor) -> Tensor:
        """The cosines of raw features in a batch (B, B)."""
        target = 0.0
        for modality, weight in self.weights.items():
            unit = F.normalize(self.target_features[modality][node])
            target = target + weight * unit @ unit.T
        return target

    def signal(self, modal: Tensor, node: Tensor) -> Tensor:
        """The mean squared error of Eq. 12."""
        z = F.normalize(modal[node])
        return F.mse_loss(z @ z.T, self.target(node))

    def gradients(self) -> dict[str, Tensor]:
        """Gradients by the names that DREAM gives its parameters."""
        user, item = self.embedding.grad.split([self.num_users, len(self.embedding) - self.num_users])
        named = {"user_embedding": user, "item_embedding": item}
        for modality, linear in self.linears.items():
            named |= {f"gates.{modality}.weight": linear.weight.grad.T, f"gates.{modality}.bias": linear.bias.grad}
        return named


class Difference(NamedTuple):
    """How far ours is from plain DREAM, relative to the latter."""

    losses: dict[str, float]
    gradients: dict[str, float]


def compare(model: DREAM, graph: HeteroData, plain: PlainDREAM, batch: Batch) -> Difference:
    """Losses and gradients of one batch, ours against the plain ones, for equal parameters."""
    ours, theirs = model.loss(graph, batch), plain.loss(batch)
    with torch.no_grad():  # what our signal leaves out
        constant = sum(plain.target(node).square().mean() for node in (batch.user, batch.pos_item + plain.num_users))
        comparable = theirs | {"signal": theirs["signal"] - plain.config.signal_weight * constant}
    losses = {name: abs(float(term - comparable[name]) / float(theirs[name])) for name, term in ours.items()}
    for terms, module in (ours, model), (theirs, plain):
        module.zero_grad()
        sum(terms.values()).backward()
    gradients = {
        name: float((model.get_parameter(name).grad - expected).norm() / expected.norm())
        for name, expected in plain.gradients().items()
    }
    return Difference(losses, gradients)


Step = Callable[[Batch], None]


def our_step(model: Recommender, graph: HeteroData) -> Step:
    """What the trainer does with a batch, deterministic as there; others need not be."""
    step = _step(
        model.parameters(), lambda batch: torch.stack(list(model.loss(graph, batch).values())).sum(), fused=True
    )

    def as_in_a_training(batch: Batch) -> None:
        with deterministic():
            step(batch)

    return as_in_a_training


def plain_step(plain: PlainDREAM) -> Step:
    """The same with plain DREAM."""
    return _step(plain.parameters(), lambda batch: sum(plain.loss(batch).values()))


def pyg_step(graph: HeteroData, num_layers: int) -> Step:
    """The body of the loop in PyG's own example for LightGCN, for our triplets; without layers it is BPR-MF."""
    num_users = graph[USER].num_nodes
    user, item = graph[INTERACTS].edge_index.as_tensor()
    item = item + num_users
    edge_index = torch.cat([torch.stack([user, item]), torch.stack([item, user])], dim=1)
    model = PyGLightGCN(num_users + graph[ITEM].num_nodes, 64, num_layers)

    def loss(batch: Batch) -> Tensor:
        items = torch.cat([batch.pos_item, batch.neg_item]) + num_users
        pairs = torch.stack([batch.user.repeat(2), items])
        pos_rank, neg_rank = model(edge_index, pairs).chunk(2)
        return model.recommendation_loss(pos_rank, neg_rank, node_id=pairs.unique())

    return _step(model.parameters(), loss)


def _step(parameters: Iterable[nn.Parameter], loss: Callable[[Batch], Tensor], **options: Any) -> Step:
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE, **options)

    def step(batch: Batch) -> None:
        total = loss(batch)
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        optimizer.step()

    return step


class Rates(NamedTuple):
    """What this machine gives at best, in operations or bytes a second."""

    float32: float
    bfloat16: float
    memory: float
    cache: float

    @classmethod
    def measure(cls) -> Rates:
        """Products of 4096 x 4096 matrices; copies of 256 MiB and of 4 MiB, read and written bytes together.

        Without units for bfloat16 its rate is that of float32, in which such products are then best made.
        """
        size = 4096
        matrix = torch.randn(size, size)
        rounded = matrix.bfloat16() if has_bfloat16_units(CPU) else matrix
        (large, large_copy), (small, small_copy) = (torch.ones(2, size).unbind() for size in (1 << 26, 1 << 20))
        return cls(
            2 * size**3 / fastest(lambda: matrix @ matrix, 3),
            2 * size**3 / fastest(lambda: rounded @ rounded, 3),
            8 * large.numel() / fastest(lambda: large_copy.copy_(large), 5),
            8 * small.numel() / fastest(lambda: small_copy.copy_(small), 50),
        )


class Work(NamedTuple):
    """What a part has to do at least."""

    flops: float = 0  # of matrix products
    memory: float = 0  # bytes of features and large buffers, read or written
    cache: float = 0  # bytes of rows of embeddings, whose tables fit in the cache

    def seconds(self, rates: Rates, precision: str) -> float:
        """The least time by the machine's rates, everything overlapping."""
        return max(self.flops / getattr(rates, precision), self.memory / rates.memory, self.cache / rates.cache)


class Part(NamedTuple):
    """A part of the step."""

    name: str
    forward: Callable[[], Tensor]
    inputs: list[Tensor]
    forward_work: Work
    backward_work: Work
    precision: str = "float32"

    def measure(self, rates: Rates, repetitions: int) -> dict[str, float]:
        """Milliseconds forward and backward, and the least possible."""
        seconds: list[list[float]] = [[], []]
        for _ in range(repetitions):
            started = time.perf_counter()
            output = self.forward()
            seconds[0].append(time.perf_counter() - started)
            gradient = torch.randn_like(output)
            started = time.perf_counter()
            if self.inputs:
                torch.autograd.grad(output, self.inputs, gradient)
            seconds[1].append(time.perf_counter() - started)
        forward, backward = (1e3 * statistics.median(values) for values in seconds)
        least = sum(work.seconds(rates, self.precision) for work in (self.forward_work, self.backward_work))
        return {"forward": forward, "backward": backward, "least": 1e3 * least}


def parts_of(model: DREAM, graph: HeteroData, batch: Batch) -> list[Part]:
    """The step of DREAM, taken apart."""
    modalities, width, row = list(model.modality_weights), model.config.embedding_dim, 4 * model.config.embedding_dim
    both = [model.user_embedding, model.item_embedding]
    num_nodes, num_pairs, size = model.num_users + model.num_items, graph[INTERACTS].edge_index.size(1), len(batch.user)
    features = [graph[ITEM][feature_name(modality)] for modality in modalities]
    precision, item_size = str(features[0].dtype).removeprefix("torch."), features[0].element_size()
    num_features = sum(rows.size(1) for rows in features)
    gates = [model.gates[modality] for modality in modalities]

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().clone().requires_grad_()

    def project() -> Tensor:
        return torch.cat([gate.project(rows) for gate, rows in zip(gates, features, strict=True)])

    projected = [leaf(rows) for rows in project().chunk(len(modalities))]

    def average() -> Tensor:
        pairs = zip(modalities, projected, strict=True)
        return torch.cat([mean_over_items(model.propagation, graph, modality, rows) for modality, rows in pairs])

    means = [leaf(rows) for rows in average().chunk(len(modalities))]

    def filter_both() -> Tensor:
        parts = zip(gates, means, projected, strict=True)
        return torch.cat([gate(rows, table) for gate, *two in parts for rows, table in zip(two, both, strict=True)])

    filtered = [leaf(rows) for rows in filter_both().split([model.num_users, model.num_items] * len(modalities))]

    def convolve() -> Tensor:
        by_node = (USER, filtered[::2]), (ITEM, filtered[1::2])
        return torch.cat([model._fuse(graph, node, dict(zip(modalities, rows, strict=True))) for node, rows in by_node])

    behavior, modal = (Embeddings(*map(leaf, line)) for line in model.dual_representations(graph))
    users, user_row = torch.unique(batch.user, return_inverse=True)
    items, item_row = torch.unique(batch.pos_item, return_inverse=True)

    def gather() -> Tensor:
        of_users = behavior.user[users], modal.user[users]
        of_items = behavior.item[items], modal.item[items]
        negative = behavior.item[batch.neg_item] + modal.item[batch.neg_item]
        triplets = sum(of_users)[user_row], sum(of_items)[item_row], negative
        return torch.cat([*of_users, *of_items, *triplets, both[0][batch.user], *batch.split_items(both[1])])

    sizes = [len(users)] * 2 + [len(items)] * 2 + [size] * 6
    user_behavior, user_modal, item_behavior, item_modal, *of_batch = map(leaf, gather().split(sizes))

    def align() -> Tensor:
        terms = model.alignment(
            user_behavior, item_behavior, user_modal, item_modal, user_row=user_row, item_row=item_row
        )
        return torch.stack(list(terms.values()))

    def follow_signal() -> Tensor:
        of_users = model.signal.of_nodes(graph, USER, users, user_modal[user_row], user_row)
        return of_users + model.signal.of_nodes(graph, ITEM, items, item_modal[item_row], item_row)

    rounded = torch.bfloat16 if has_bfloat16_units(CPU) else torch.float32
    (pointer, _), _ = graph[REV_INTERACTS].edge_index.get_csc()
    in_batch, summed = len(users) + len(items), int((pointer[users + 1] - pointer[users]).sum()) + len(items)
    parameters = [leaf(parameter) for parameter in model.parameters()]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer = torch.optim.Adam(parameters, fused=True)

    def adam() -> Tensor:
        optimizer.step()
        return parameters[0]

    table = num_nodes * row
    edges = sum(graph[knn_edge(node, modality)].edge_index.size(1) for node in (USER, ITEM) for modality in modalities)
    product = Work(2 * model.num_items * num_features * width, item_size * model.num_items * num_features)
    mean = Work(cache=len(modalities) * (num_pairs + num_nodes) * row)
    line = Work(cache=model.config.num_layers * (2 * num_pairs * row + table))
    relations = Work(cache=edges * row + len(modalities) * table)
    gathered, read_rows = sum(sizes) * row, (2 * in_batch + 7 * size) * row
    entries = (len(users) + len(items)) ** 2  # of all four: users and items with each other twice, and with themselves
    buffer, rounded_name = entries * rounded.itemsize, str(rounded).removeprefix("torch.")
    signal = 2 * in_batch * num_features * width
    read = item_size * (summed + in_batch) * num_features
    return [
        Part("projection of features", project, [gate.weight for gate in gates], product, product, precision),
        Part("users' means", average, projected, mean, mean),
        Part("filter gates", filter_both, [*both, *means, *projected], Work(cache=6 * table), Work(cache=10 * table)),
        Part("behavior line", lambda: torch.cat(
            propagate_interactions(model.propagation, graph, *both, model.config.num_layers)), both, line, line),
        Part("relation graphs", convolve, filtered, relations, relations),
        Part("gathers", gather, [*behavior, *modal, *both],
             Work(cache=read_rows + gathered), Work(cache=3 * table + gathered)),
        Part("InfoNCE, all four", align, [user_behavior, item_behavior, user_modal, item_modal],
             Work(2 * entries * width, cache=4 * buffer), Work(4 * entries * width, cache=2 * buffer), rounded_name),
        Part("signal", follow_signal, [user_modal, item_modal],
             Work(signal, read), Work(signal, item_size * in_batch * num_features), precision),
        Part("BPR, L2", lambda: bpr_loss(*of_batch[:3]) + l2_loss(*of_batch[3:]), of_batch,
             Work(cache=6 * size * row), Work(cache=12 * size * row)),
        Part("Adam", adam, [], Work(memory=28 * sum(parameter.numel() for parameter in parameters)), Work()),
    ]  # fmt: skip


def fastest(action: Callable[[], Any], repetitions: int) -> float:
    """Seconds of ``action``, the least of some."""
    seconds = []
    for _ in range(repetitions + 1):
        started = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


def alternate(steps: dict[str, Step], batches: list[Batch]) -> dict[str, list[float]]:
    """Milliseconds of each contestant's steps, in turns of one step that is not counted and one that is.

    In a training, too, a step finds in the caches what its like has left there.
    """
    milliseconds: dict[str, list[float]] = {name: [] for name in steps}
    for first, second in itertools.pairwise(batches):
        for name, step in steps.items():
            step(first)
            started = time.perf_counter()
            step(second)
            milliseconds[name].append(1e3 * (time.perf_counter() - started))
    return milliseconds


def epoch_shares(name: str, model: Recommender, graph: HeteroData, step: float, repetitions: int) -> dict[str, float]:
    """Seconds of an epoch's steps, of drawing its triplets and of one validation, and the share of the latter two."""
    sampler = TripletSampler(graph)

    @torch.no_grad()
    def validate() -> None:
        evaluate(model(graph), graph, "valid", ks=(10, 20), metrics=["recall", "ndcg"])

    sampling = fastest(lambda: sampler.epoch(torch.Generator().manual_seed(1)), repetitions)
    validation = fastest(validate, repetitions)
    steps = 1e-3 * step * -(-len(sampler) // BATCH_SIZE)
    whole = steps + sampling + validation
    return {"steps": steps, "sampling": sampling, "validation": validation, "share": (sampling + validation) / whole}


def print_table(title: str, rows: dict[str, dict[str, float]], digits: int) -> None:
    """Print rows of numbers as Markdown."""
    columns = list(next(iter(rows.values())))
    print(f"\n| {title} | {' | '.join(columns)} |\n|---|{'---:|' * len(columns)}")
    for name, values in rows.items():
        print(f"| {name} | {' | '.join(f'{values[column]:.{digits}f}' for column in columns)} |")


def main() -> None:
    """Parse the command line, compare, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graph", type=Path, help="a graph store to measure on; by default the generated data")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()

    raw = load_graph(arguments.graph).graph if arguments.graph else make_graph()
    graph, rounded = (prepare_graph(raw, CPU, None, kind) for kind in ("float32", "bfloat16"))
    has_units = has_bfloat16_units(CPU)

    def make(model: type[Recommender], graph: HeteroData, **options: Any) -> Any:
        torch.manual_seed(0)
        return model(graph, model.Config(**options))

    batches = batches_of(graph)[: arguments.rounds + 1]
    model = make(DREAM, graph)
    plain = PlainDREAM(graph, model)
    compared = {
        "float32": (make(DREAM, graph, alignment_precision="float32"), graph),
        "as by default": (model, graph),
        "bfloat16 features": (make(DREAM, rounded), rounded),
    }
    differences = {name: compare(*other, plain, batches[0]) for name, other in compared.items()}
    largest = {name: {what: max(v.values()) for what, v in d._asdict().items()} for name, d in differences.items()}
    print_table("largest relative difference from plain DREAM", largest, 7)

    models = {"LightGCN": make(LightGCN, graph), "BPR": make(BPR, graph)}
    steps = {
        "plain DREAM": plain_step(plain),
        "DREAM": our_step(model, graph),
        **({ROUNDED: our_step(*compared["bfloat16 features"])} if has_units else {}),
        "PyG LightGCN": pyg_step(graph, 2),
        "LightGCN": our_step(models["LightGCN"], graph),
        "PyG MF": pyg_step(graph, 0),
        "BPR": our_step(models["BPR"], graph),
    }
    milliseconds = alternate(steps, batches)
    medians = {name: statistics.median(values) for name, values in milliseconds.items()}
    ratios = {
        f"{slow} / {fast}": statistics.median(
            a / b for a, b in zip(milliseconds[slow], milliseconds[fast], strict=True)
        )
        for slow, fast in (
            ("plain DREAM", "DREAM"),
            ("plain DREAM", ROUNDED),
            ("PyG LightGCN", "DREAM"),
            ("PyG LightGCN", ROUNDED),
            ("PyG LightGCN", "LightGCN"),
            ("PyG LightGCN", "BPR"),
            ("PyG MF", "BPR"),
        )
        if fast in milliseconds
    }
    steps_of = {name: {"min": min(v), "median": medians[name], "max": max(v)} for name, v in milliseconds.items()}
    print_table("milliseconds a step", steps_of, 1)
    print_table("times as fast", {name: {"ratio": ratio} for name, ratio in ratios.items()}, 1)
    rates = Rates.measure()
    print_table("GFLOP/s, GB/s", {name: {"rate": rate / 1e9} for name, rate in rates._asdict().items()}, 0)
    breakdowns = {}
    for name, (other, other_graph) in {"DREAM": (model, graph), ROUNDED: compared["bfloat16 features"]}.items():
        if name not in steps:
            continue
        parts = {part.name: part.measure(rates, arguments.rounds) for part in parts_of(other, other_graph, batches[0])}
        rest = medians[name] - sum(part["forward"] + part["backward"] for part in parts.values())
        breakdowns[name] = {**parts, "rest": {"forward": rest, "backward": 0.0, "least": 0.0}}
        print_table(f"{name}: milliseconds", breakdowns[name], 1)
    shares = {
        name: epoch_shares(name, other, graph, medians[name], 3) for name, other in {"DREAM": model, **models}.items()
    }
    print_table("seconds of an epoch", shares, 3)
    if arguments.out:
        write_json(
            arguments.out,
            {
                **describe_process(),
                "rounds": arguments.rounds,
                "differences": {name: difference._asdict() for name, difference in differences.items()},
                "milliseconds": milliseconds,
                "ratios": ratios,
                "rates": rates._asdict(),
                "parts": breakdowns,
                "epochs": shares,
            },
        )


if __name__ == "__main__":
    main()
