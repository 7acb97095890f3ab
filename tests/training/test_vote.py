"""A teacher's vote: which weights it keeps, what it adds, and that whoever opens the run gets the same scores."""

from __future__ import annotations

import copy

import pytest
import torch

from dream_pyg.config import TeacherConfig
from dream_pyg.data.files import load_tensors, read_json, save_tensors
from dream_pyg.errors import StoreError
from dream_pyg.evaluation import evaluate
from dream_pyg.graph.schema import INTERACTS, ITEM, USER, label_name
from dream_pyg.models import Embeddings, find_model
from dream_pyg.training import vote as vote_module
from dream_pyg.training.run import RunPaths, load_run, update_info
from dream_pyg.training.teacher import Teaching, teach
from dream_pyg.training.trainer import train
from tests.training.runs import assert_same_run, configure

NODES = (USER, ITEM)


def solved(stored, config: TeacherConfig) -> torch.Tensor:
    """The weights of a teacher (I, I), dense."""
    model = find_model(config.model["name"])(stored.graph, config.candidates[0])
    model.fit(stored.graph)
    weight = model(stored.graph).weight
    return weight if weight.layout == torch.strided else weight.to_dense()


def history(stored) -> torch.Tensor:
    """What users took in train (U, I)."""
    user, item = stored.graph[INTERACTS][label_name("train")]
    taken = torch.zeros(stored.graph["user"].num_nodes, stored.graph["item"].num_nodes)
    taken[user, item] = 1
    return taken


@pytest.mark.parametrize("name", ["addease", "ease", "itemknn"])
def test_a_vote_is_the_teachers_strongest_weights_in_units_of_their_spread(stored, name, monkeypatch):
    config = TeacherConfig(model={"name": name}, vote=0.3, vote_weights=4)
    monkeypatch.setattr(vote_module, "_BLOCK_SCORES", 200)  # several blocks of columns and of users
    vote = teach(stored.graph, config).vote
    weight = solved(stored, config)
    kept = vote.weights.weight.to_dense() != 0
    assert torch.equal(kept.sum(dim=0), (weight != 0).sum(dim=0).clamp(max=4))
    size = weight.abs()
    assert (size.masked_fill(kept, 0).amax(dim=0) <= size.masked_fill(~kept, torch.inf).amin(dim=0)).all()
    weight = weight * kept
    scores = history(stored) @ weight
    expected = scores / scores.std(correction=0)
    users = torch.arange(len(scores))
    torch.testing.assert_close(vote.weights.scores(users), expected, rtol=1e-4, atol=1e-5)
    assert vote.share == 0.3


def test_scores_are_the_sum_of_both_whatever_the_scale_of_the_embeddings(stored):
    vote = teach(stored.graph, TeacherConfig(vote=0.5)).vote
    users = torch.arange(stored.graph["user"].num_nodes)
    generator = torch.Generator().manual_seed(0)
    user, item = (torch.randn(len(nodes), 5, generator=generator) + 0.4 for nodes in (users, stored.item_ids))
    product = user @ item.T
    expected = product + 0.5 * product.std(correction=0) * vote.weights.scores(users)
    voted = vote.beside(Embeddings(user, item))
    torch.testing.assert_close(voted.scores(users), expected, rtol=1e-4, atol=1e-4)
    assert (voted.num_users, voted.num_items) == tuple(product.shape)
    torch.testing.assert_close(
        vote.beside(Embeddings(7 * user, item)).scores(users), 7 * expected, rtol=1e-4, atol=1e-3
    )
    memory = torch.full((3, len(item)), torch.nan)
    torch.testing.assert_close(voted.scores(users[4:7], memory), expected[4:7], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [1.0, 0.37])
def test_embeddings_that_tell_nothing_apart_leave_the_vote_without_weight(stored, value):
    vote = teach(stored.graph, TeacherConfig(vote=0.5)).vote
    users, items = stored.graph["user"].num_nodes, stored.graph["item"].num_nodes
    voted = vote.beside(Embeddings(torch.full((users, 3), value), torch.full((items, 3), value)))
    assert voted.factor < 1e-6


def test_a_vote_far_from_zero_is_weighed_by_spread_alone(stored):
    vote = teach(stored.graph, TeacherConfig(vote=1.0)).vote
    generator = torch.Generator().manual_seed(0)
    user, item = (30 + 0.1 * torch.randn(stored.graph[node].num_nodes, 4, generator=generator) for node in NODES)
    expected = (user.double() @ item.double().T).std(correction=0).item()
    assert vote.beside(Embeddings(user, item)).factor == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["addease", "itemknn"])
def test_a_vote_from_its_file_scores_the_same_bits(stored, tmp_path, name):
    config = TeacherConfig(vote=0.5, model={"name": name})
    # Users took items in another order than that of their ids.
    graph = copy.copy(stored.graph)
    label = graph[INTERACTS][label_name("train")]
    graph[INTERACTS][label_name("train")] = label[:, torch.randperm(label.size(1), generator=torch.manual_seed(0))]
    teaching = teach(graph, config)
    teaching.save(tmp_path / "taught.safetensors")
    again = Teaching.load(tmp_path / "taught.safetensors", config, graph)
    users = torch.arange(graph["user"].num_nodes)
    assert torch.equal(again.vote.weights.scores(users), teaching.vote.weights.scores(users))
    assert torch.equal(again.taught.item, teaching.taught.item)


def test_a_run_is_chosen_tested_and_opened_with_the_vote(stored, tmp_path):
    plain = train(configure(stored, "bpr", epochs=2), tmp_path / "plain")
    config = configure(stored, "bpr", epochs=2, teacher={"share": 0.0, "vote": 1.0, "model": {"l2_weight": 20.0}})
    voted = train(config, tmp_path / "voted")
    assert voted.valid_metrics != plain.valid_metrics
    run = load_run(tmp_path / "voted")
    for split, expected in (("valid", voted.valid_metrics), ("test", voted.test_metrics)):
        measured = evaluate(run.scorer(), run.graph, split, ks=(10, 20), metrics=("recall", "ndcg"))
        assert {name: expected[name] for name in measured} == pytest.approx(measured, rel=1e-6)
    # With a vote and nothing taught, the model itself learns what it learns alone.
    assert voted.best_epoch == plain.best_epoch
    for voted_rows, plain_rows in zip(run.embeddings(), load_run(tmp_path / "plain").embeddings(), strict=True):
        assert torch.equal(voted_rows, plain_rows)
    lines = read_json(RunPaths(tmp_path / "voted").test_metrics)["lines"]
    assert lines["without_vote"] == read_json(RunPaths(tmp_path / "plain").test_metrics)["lines"]["general"]
    assert lines["general"] == voted.test_metrics


def test_a_run_with_a_vote_resumes_to_the_same_bits(stored, tmp_path):
    teacher = {"vote": 0.5, "model": {"name": "itemknn"}}
    train(configure(stored, "bpr", epochs=2, teacher=teacher), tmp_path / "whole")
    train(configure(stored, "bpr", epochs=1, teacher=teacher), tmp_path / "parts")
    train(configure(stored, "bpr", epochs=2, teacher=teacher), tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_run_without_its_vote_is_refused(stored, tmp_path):
    train(configure(stored, "bpr", epochs=1, teacher={"vote": 0.5}), tmp_path / "run")
    paths = RunPaths(tmp_path / "run")
    written = paths.config.read_text()
    paths.config.write_text(written.replace("vote = 0.5", "vote = 0.6"))
    with pytest.raises(StoreError, match=r"differs from .*training\.teacher\.vote"):
        load_run(tmp_path / "run")
    paths.config.write_text(written)
    vote = load_run(tmp_path / "run").vote.tensors()
    fewer = {"pointer": vote["pointer"][:-1], "index": vote["index"], "weight": vote["weight"]}
    elsewhere = {**vote, "index": vote["index"] + 1000}
    for tensors in ({"item": torch.zeros(2, 2)}, fewer, elsewhere, {**vote, "weight": vote["weight"][1:]}):
        save_tensors(paths.taught, tensors)
        with pytest.raises(StoreError, match=r"taught\.safetensors holds no vote of a teacher on \d+ items"):
            load_run(tmp_path / "run")
    paths.taught.unlink()
    with pytest.raises(StoreError, match=r"taught\.safetensors does not exist"):
        load_run(tmp_path / "run")


def test_an_export_leaves_the_vote_out_and_says_so(command, stored, tmp_path):
    train(configure(stored, "bpr", epochs=1, teacher={"vote": 0.5}), tmp_path / "voted")
    result = command("export", tmp_path / "voted", "--out", tmp_path / "shipped")
    assert "the vote of its teacher is left out" in result.stdout
    info = read_json(tmp_path / "shipped" / "export.json")
    assert info["vote_left_out"] is True
    user, _ = load_run(tmp_path / "voted").embeddings()
    assert torch.equal(load_tensors(tmp_path / "shipped" / "embeddings.safetensors")[0]["user"], user)


def test_when_training_ends_validation_chooses_among_votes(stored, tmp_path):
    def settings(vote, votes=(), epochs=2):
        teacher = {"share": 0.0, "vote": vote, "votes": list(votes), "model": {"l2_weight": 20.0}}
        return configure(stored, "bpr", epochs=epochs, teacher=teacher)

    several = train(settings(0.01, (1.0, 5.0)), tmp_path / "several")
    alone = {vote: train(settings(vote), tmp_path / f"{vote}") for vote in (0.01, 1.0, 5.0)}
    begun = load_run(tmp_path / "0.01")
    recalls = {}
    for vote in alone:
        scorer = begun.vote._replace(share=vote).beside(begun.embeddings())
        recalls[vote] = evaluate(scorer, begun.graph, "valid", ks=(20,), metrics=("recall",))["recall@20"]
    best = max(recalls, key=recalls.get)
    assert best != 0.01, "the test must not pass without a choice"
    assert several.best_epoch == alone[0.01].best_epoch, "which epoch is best is a matter of the first vote"
    assert several.valid_metrics["recall@20"] == pytest.approx(recalls[best], rel=1e-6)
    run = load_run(tmp_path / "several")
    assert run.vote.share == best
    measured = evaluate(run.scorer(), run.graph, "test", ks=(20,), metrics=("recall",))["recall@20"]
    assert several.test_metrics["recall@20"] == pytest.approx(measured, rel=1e-6)
    assert begun.vote.share == 0.01

    train(settings(0.01, (1.0, 5.0), epochs=1), tmp_path / "parts")
    longer = train(settings(0.01, (1.0, 5.0)), tmp_path / "parts", resume=True)
    assert longer == several._replace(run=longer.run)
    assert_same_run(tmp_path / "several", tmp_path / "parts")
    # A vote that was chosen for an earlier best epoch is not that of this one.
    update_info(run.paths, best_epoch=several.best_epoch - 1)
    assert load_run(run.paths.root).vote.share == 0.01
    assert train(settings(0.0, (1.0, 5.0)), tmp_path / "none").valid_metrics == pytest.approx(
        evaluate(begun.embeddings(), begun.graph, "valid", ks=(10, 20), metrics=("recall", "ndcg")), rel=1e-6
    )
