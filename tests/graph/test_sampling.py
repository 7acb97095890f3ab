"""Neighbour sampling: what is drawn, with which probability, and that nothing is lost when all is drawn."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch_geometric.data import HeteroData
from torch_geometric.sampler import NeighborSampler as PyGSampler
from torch_geometric.sampler import NodeSamplerInput

from dream_pyg.graph.build import build_graph
from dream_pyg.graph.edges import add_interaction_edges
from dream_pyg.graph.sampling import FanOuts, Neighborhood, NeighborSampler, ReceptiveField, sampled_graph
from dream_pyg.graph.schema import (
    INTERACTS,
    ITEM,
    REV_INTERACTS,
    USER,
    EdgeType,
    count_name,
    describes_edge,
    feature_name,
    knn_edge,
    label_name,
    mask_name,
)
from dream_pyg.models import BPR, DREAM, VBPR, Batch, LightGCN
from dream_pyg.models.lightgcn import propagate_interactions
from dream_pyg.nn.propagation import Propagation
from dream_pyg.nn.user_features import mean_over_items
from tests.graphs import in_double, random_dataset

ALL = FanOuts((-1, -1, -1), -1, -1)
HOPS = ReceptiveField(num_hops=2)
EVERYTHING = ReceptiveField(2, ("image", "text"), ("image", "text"), ("image", "text"), user_features=True)
SAMPLED_MODELS = [
    (BPR, {}),
    (LightGCN, {"num_layers": 3}),
    (LightGCN, {"num_layers": 0}),
    (VBPR, {"intra_weight": 0.1, "inter_weight": 0.1}),
    (VBPR, {"intra_weight": 0.1, "signal_weight": 0.3}),
    (DREAM, {}),
    (DREAM, {"use_user_graph": False, "normalize_alignment": False}),
    (DREAM, {"use_item_graph": False, "squared_signal": False}),
    (DREAM, {"use_gate": False, "num_layers": 1}),
    (DREAM, {"use_gate": False, "signal_weight": 0.0}),
    (DREAM, {"use_gate": False, "signal_weight": 0.0, "use_item_graph": False}),
    (DREAM, {"num_layers": 0}),
    (DREAM, {"gate_input": "propagated"}),
    (DREAM, {"gate_input": "propagated", "use_user_graph": False, "num_layers": 3}),
]


class OneStart(np.random.Generator):
    """Every systematic sample begins at the same point of its first stride."""

    def __init__(self, start: float) -> None:
        super().__init__(np.random.PCG64())
        self._start = start

    def random(self, size: Any = None, *_: Any, **__: Any) -> Any:
        """Always the start."""
        return np.full(size, self._start)


@pytest.fixture(scope="module")
def graph() -> HeteroData:
    return in_double(build_graph(random_dataset(), num_neighbors=3))


@pytest.fixture
def batch(graph: HeteroData) -> Batch:
    user, item = graph[INTERACTS][label_name("train")]
    return Batch(user[:9], item[:9], item[3:12])


def draw(sampler: NeighborSampler, batch: Batch, seed: int = 0) -> Neighborhood:
    items = torch.cat([batch.pos_item, batch.neg_item])
    return sampler.draw(batch.user, items, np.random.default_rng(seed))


def local_batch(neighborhood: Neighborhood, batch: Batch) -> Batch:
    places = [
        {node: place for place, node in enumerate(neighborhood.nodes[kind].tolist())} for kind in (USER, ITEM, ITEM)
    ]
    return Batch(
        *(torch.tensor([place[one] for one in ids.tolist()]) for place, ids in zip(places, batch, strict=True))
    )


def ends(neighborhood: Neighborhood, edge_type: EdgeType) -> list[Any]:
    """The ids of the sources and of the targets of what was drawn."""
    drawn, (source, relation, target) = neighborhood.edges[edge_type], edge_type
    nodes = neighborhood.nodes
    if edge_type in (INTERACTS, REV_INTERACTS):
        return [nodes[source][drawn.source], nodes[target][drawn.target]]
    modality = relation.split("_")[0]
    sending = nodes[target][neighborhood.senders[target, modality]]
    if source == target:
        return [sending[drawn.source], nodes[target][drawn.target]]
    return [neighborhood.described[modality][drawn.source], sending[drawn.target]]


def test_the_batch_comes_first_and_no_node_twice(graph, batch):
    neighborhood = draw(NeighborSampler(graph, EVERYTHING, FanOuts((2, 1), 2, 2)), batch)
    for node, seeds in ((USER, batch.user), (ITEM, torch.cat(batch[1:]))):
        ids = neighborhood.nodes[node]
        assert ids[: neighborhood.num_seeds[node]].tolist() == seeds.unique().tolist()
        assert len(np.unique(ids)) == len(ids)


@pytest.mark.filterwarnings("ignore:Using 'NeighborSampler' without a 'pyg-lib'")
def test_all_neighbours_are_those_that_pyg_draws_over_torch_sparse(graph):
    pytest.importorskip("torch_sparse", reason="the reference needs torch-sparse: make test installs it")
    plain = HeteroData()
    for node in (USER, ITEM):
        plain[node].num_nodes = graph[node].num_nodes
    for edge_type in (INTERACTS, REV_INTERACTS):
        plain[edge_type].edge_index = graph[edge_type].edge_index.as_tensor()
    user = torch.tensor([3, 5, 8])
    reference = PyGSampler(plain, num_neighbors={key: [-1, -1] for key in plain.edge_types}).sample_from_nodes(
        NodeSamplerInput(input_id=None, node=user, input_type=USER)
    )
    nothing = torch.empty(0, dtype=torch.long)
    drawn = NeighborSampler(graph, HOPS, FanOuts((-1, -1), -1, -1)).draw(user, nothing, np.random.default_rng(0))
    for node, ids in reference.node.items():
        assert sorted(ids.tolist()) == sorted(drawn.nodes[node].tolist())
    for edge_type, row in reference.row.items():
        source, _, target = edge_type
        edges = drawn.edges[edge_type]
        ours = zip(drawn.nodes[source][edges.source].tolist(), drawn.nodes[target][edges.target].tolist(), strict=True)
        theirs = reference.node[source][row], reference.node[target][reference.col[edge_type]]
        assert sorted(ours) == sorted(zip(*(ids.tolist() for ids in theirs), strict=True))


def test_edges_are_edges_of_the_graph_and_none_comes_twice(graph, batch):
    fan_out = 2
    neighborhood = draw(NeighborSampler(graph, EVERYTHING, FanOuts((fan_out,) * 2, fan_out, fan_out)), batch)
    for edge_type, drawn in neighborhood.edges.items():
        whole = graph[edge_type if edge_type in graph.edge_types else REV_INTERACTS].edge_index.as_tensor().numpy()
        source, target = ends(neighborhood, edge_type)
        assert np.array_equal(whole[:, drawn.edge], [source, target])
        assert len(np.unique(drawn.edge)) == len(drawn.edge)
        assert (np.diff(drawn.target) >= 0).all()
        counted = whole[1]
        if edge_type not in graph.edge_types:  # Only items that have the modality stand for a user.
            counted = counted[graph[ITEM][mask_name(edge_type[1].split("_")[0])].numpy()[whole[0]]]
        degree = np.bincount(counted, minlength=graph[edge_type[2]].num_nodes)
        assert (np.bincount(target, minlength=len(degree))[target] >= np.minimum(degree, fan_out)[target]).all()
        total = np.bincount(target, drawn.scale, minlength=len(degree))
        np.testing.assert_allclose(total[target], degree[target])


def test_as_many_neighbours_are_drawn_as_a_node_is_mentioned(graph):
    field = ReceptiveField(1, user_knn=("text",), features=("text",), user_features=True)
    sampler = NeighborSampler(graph, field, FanOuts((2,), 1, 1))
    user = int(torch.bincount(graph[INTERACTS][label_name("train")][0]).argmax())
    nothing = torch.empty(0, dtype=torch.long)
    for mentions in (1, 2):
        edges = sampler.draw(torch.full((mentions,), user), nothing, np.random.default_rng(0)).edges
        assert len(edges[REV_INTERACTS].edge) == 2 * mentions
        assert len(edges[knn_edge(USER, "text")].edge) == mentions
        assert (edges[describes_edge("text")].target == 0).sum() == mentions
    # Two users that share an item mention it twice.
    two = ReceptiveField(2)
    item = torch.bincount(graph[INTERACTS][label_name("train")][1])
    drawn = NeighborSampler(graph, two, FanOuts((-1, 1), 1, 1)).draw(
        torch.arange(graph[USER].num_nodes), nothing, np.random.default_rng(0)
    )
    counts = np.bincount(drawn.edges[INTERACTS].target)
    assert np.array_equal(counts, item.numpy()[drawn.nodes[ITEM]])


def test_less_than_a_mention_gets_less_but_one_neighbour_at_least(graph):
    item = torch.bincount(graph[INTERACTS][label_name("train")][1]).topk(3).indices.sort().values
    field, nobody = ReceptiveField(1), torch.empty(0, dtype=torch.long)
    often = torch.cat([item, item[:1], item[2:].expand(9)])
    share = torch.tensor([1.0, 0.5, 0.1, 0.5, *[0.1] * 9])
    for fan_out, expected in ((2, [3, 1, 2]), (-1, graph[INTERACTS].edge_index[1].bincount()[item].tolist())):
        sampler = NeighborSampler(graph, field, FanOuts((fan_out,), 1, 1))
        drawn = sampler.draw(nobody, often, np.random.default_rng(0), share)
        assert np.bincount(drawn.edges[INTERACTS].target).tolist() == expected


def test_neighbours_in_the_batch_are_taken_all_and_the_others_by_chance(graph):
    """Averaged over all starts, each edge counts once; those from the batch always."""
    edge_type = knn_edge(ITEM, "text")
    source, target = graph[edge_type].edge_index.as_tensor().numpy()
    batch = torch.tensor([2, 5, next(node for node in source[target == 5].tolist() if node not in (2, 5))])
    sampler = NeighborSampler(graph, ReceptiveField(item_knn=("text",)), FanOuts((), 1, -1))
    total, nobody = np.zeros(len(source)), torch.empty(0, dtype=torch.long)
    for start in (np.arange(6) + 0.5) / 6:  # 1, 2 and 3 divide 6
        drawn = sampler.draw(nobody, batch, OneStart(start)).edges[edge_type]
        known = np.isin(source[drawn.edge], batch)
        assert (drawn.scale[known] == 1).all()
        others = np.isin(target, batch) & ~np.isin(source, batch)
        assert (~known).sum() == len(np.unique(target[others])) < others.sum()
        np.add.at(total, drawn.edge, drawn.scale / 6)
    np.testing.assert_allclose(total, np.isin(target, batch))


@given(st.integers(1, 12), st.integers(1, 6))
def test_each_edge_is_drawn_with_the_probability_that_its_scale_inverts(degree, fan_out):
    """Averaged over all starts, which differ only by which multiple of 1/d they lie behind."""
    graph = HeteroData()
    graph[USER].num_nodes, graph[ITEM].num_nodes = 1, degree
    graph[INTERACTS][label_name("train")] = torch.stack([torch.zeros(degree, dtype=torch.long), torch.arange(degree)])
    add_interaction_edges(graph)
    sampler = NeighborSampler(graph, ReceptiveField(num_hops=1), FanOuts((fan_out,), -1, -1))
    total = np.zeros(degree)
    for start in (np.arange(degree) + 0.5) / degree:
        drawn = sampler.draw(torch.tensor([0]), torch.tensor([], dtype=torch.long), OneStart(start))
        edges = drawn.edges[REV_INTERACTS]
        assert len(np.unique(edges.edge)) == len(edges.edge) == min(degree, fan_out)
        np.add.at(total, edges.edge, edges.scale / degree)
    np.testing.assert_allclose(total, 1.0)


def test_two_hops_over_drawn_neighbours_are_unbiased(graph):
    """The mean over many draws lies within five standard errors of the propagation over the whole graph."""
    torch.manual_seed(0)
    user = torch.randn(graph[USER].num_nodes, 2, dtype=torch.float64)
    item = torch.randn(graph[ITEM].num_nodes, 2, dtype=torch.float64)
    whole = propagate_interactions(Propagation(), graph, user, item, 2)
    sampler = NeighborSampler(graph, HOPS, FanOuts((2, 2), -1, -1))
    everyone, everything = torch.arange(len(user)), torch.arange(len(item))
    random = np.random.default_rng(0)
    draws = []
    for _ in range(400):
        sampled = sampled_graph(graph, sampler.draw(everyone, everything, random))
        drawn = propagate_interactions(Propagation(), sampled, user, item, 2)
        draws.append(torch.cat([drawn.user, drawn.item]))
    draws_of = torch.stack(draws)
    error = (draws_of.mean(dim=0) - torch.cat([*whole])).abs()
    assert (error <= 5 * draws_of.std(dim=0) / math.sqrt(len(draws)) + 1e-12).all()
    assert (draws_of.std(dim=0) > 0.01).any()


def test_a_user_is_the_mean_of_drawn_items_that_have_the_modality(graph):
    """Whatever the number drawn: the mean over draws is that over the user's items, of which some lack the image."""
    item = graph[ITEM].x_image
    has_user = graph[USER].count_image > 0
    lacking = graph[INTERACTS][label_name("train")][0][~graph[ITEM].has_image[graph[INTERACTS].edge_index[1]]]
    assert has_user[lacking].any()
    whole = mean_over_items(Propagation(), graph, "image", item)
    field = ReceptiveField(features=("image",), user_features=True)
    everyone, random = torch.arange(graph[USER].num_nodes), np.random.default_rng(0)
    for fan_out in (1, 2):
        sampler = NeighborSampler(graph, field, FanOuts((), -1, fan_out))
        draws = []
        for _ in range(400):
            sampled = sampled_graph(graph, sampler.draw(everyone, torch.arange(0), random))
            assert torch.equal(sampled[USER].count_image > 0, has_user)
            draws.append(mean_over_items(Propagation(), sampled, "image", sampled[ITEM].x_image))
        draws_of = torch.stack(draws)
        error = (draws_of.mean(dim=0) - whole).abs()
        assert (error <= 5 * draws_of.std(dim=0) / math.sqrt(len(draws)) + 1e-12).all()
        assert (draws_of.std(dim=0) > 0.01).any()


@pytest.mark.parametrize(("model_class", "options"), SAMPLED_MODELS)
def test_all_neighbours_give_the_loss_and_the_gradient_of_the_whole_graph(graph, batch, model_class, options):
    torch.manual_seed(0)
    model = model_class(graph, model_class.Config(**options)).double()
    whole = model.loss(graph, batch)
    torch.stack(list(whole.values())).sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()

    field = model.receptive_field()
    neighborhood = draw(NeighborSampler(graph, field, ALL._replace(interactions=(-1,) * field.num_hops)), batch)
    terms = model.loss(sampled_graph(graph, neighborhood), local_batch(neighborhood, batch))
    torch.stack(list(terms.values())).sum().backward()
    assert terms.keys() == whole.keys()
    for name, term in terms.items():
        torch.testing.assert_close(term, whole[name], rtol=1e-6, atol=1e-9)
    for name, parameter in model.named_parameters():
        assert parameter.grad.is_sparse == (name in model.tables)
        torch.testing.assert_close(parameter.grad.to_dense(), expected[name], rtol=1e-5, atol=1e-9)


def test_hops_before_relations_are_drawn_for_neighbours_as_well(graph, batch):
    fan_outs = FanOuts((1, 2), 2, 1)
    field = EVERYTHING._replace(relations_after_hops=True)
    neighborhood = draw(NeighborSampler(graph, field, fan_outs), batch)
    inner = neighborhood.num_within[0]
    for node, number in inner.items():
        sending = [neighborhood.senders[node, modality] for modality in ("image", "text")]
        assert sorted({*np.concatenate(sending)}) == list(range(number))
        assert neighborhood.num_seeds[node] < number
    for edge_type in (INTERACTS, REV_INTERACTS):
        target = edge_type[2]
        degree = graph[edge_type].edge_index.as_tensor()[1].bincount(minlength=graph[target].num_nodes)
        with_edges = set(neighborhood.edges[edge_type].target.tolist())
        for place, node in enumerate(neighborhood.nodes[target][: inner[target]].tolist()):
            assert (place in with_edges) == (degree[node] > 0)


def test_gradients_of_tables_touch_the_neighbourhood_alone(graph, batch):
    torch.manual_seed(0)
    model = DREAM(graph).double()
    field = model.receptive_field()
    batch = Batch(*(ids[:1] for ids in batch))
    neighborhood = draw(NeighborSampler(graph, field, FanOuts((1, 1), 1, 1)), batch)
    terms = model.loss(sampled_graph(graph, neighborhood), local_batch(neighborhood, batch))
    torch.stack(list(terms.values())).sum().backward()
    for name, node in (("user_embedding", USER), ("item_embedding", ITEM)):
        touched = model.get_parameter(name).grad.coalesce().indices()[0]
        assert set(touched.tolist()) == set(neighborhood.nodes[node].tolist())
        assert len(touched) < graph[node].num_nodes


def test_features_are_read_as_they_are_stored_for_described_items_only(graph, batch):
    stored = graph.clone()
    for modality in ("image", "text"):
        stored[ITEM][feature_name(modality)] = graph[ITEM][feature_name(modality)].half()
    neighborhood = draw(NeighborSampler(stored, EVERYTHING, FanOuts((1, 1), 1, 1)), batch)
    sampled = sampled_graph(stored, neighborhood)
    for modality, described in neighborhood.described.items():
        assert torch.equal(sampled[ITEM][feature_name(modality)], stored[ITEM][feature_name(modality)][described])
        assert len(np.unique(described)) == len(described)
        assert len(sampled[USER][count_name(modality)]) == len(neighborhood.senders[USER, modality])
    one = draw(NeighborSampler(stored, EVERYTHING._replace(features=("text",)), FanOuts((1, 1), 1, 1)), batch)
    assert feature_name("image") not in sampled_graph(stored, one)[ITEM]


def test_a_modality_reads_no_features_of_the_neighbours_by_another(graph, batch):
    field = ReceptiveField(item_knn=("image", "text"), features=("image", "text"))
    neighborhood = draw(NeighborSampler(graph, field, FanOuts((), 1, 1)), batch)
    seeds = neighborhood.nodes[ITEM][: neighborhood.num_seeds[ITEM]]
    for modality, described in neighborhood.described.items():
        neighbours, _ = ends(neighborhood, knn_edge(ITEM, modality))
        assert set(described) == {*seeds, *neighbours}


def test_draws_depend_on_the_generator_alone(graph, batch):
    sampler = NeighborSampler(graph, EVERYTHING, FanOuts((2, 1), 2, 2))
    one, other, different = (draw(sampler, batch, seed) for seed in (1, 1, 2))
    for edge_type, drawn in one.edges.items():
        assert all(np.array_equal(*parts) for parts in zip(drawn, other.edges[edge_type], strict=True))
    assert any(
        not np.array_equal(one.edges[edge_type].edge, different.edges[edge_type].edge)
        for edge_type in (knn_edge(USER, "text"), INTERACTS, describes_edge("text"))
    )
