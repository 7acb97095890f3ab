"""Presets: below a configuration file and overrides, above the defaults, and nothing in them is silent."""

from __future__ import annotations

from pathlib import Path

import pytest

from dream_pyg.config import RunConfig, SamplingConfig
from dream_pyg.errors import ConfigError
from dream_pyg.presets import find_preset, load_presets, preset_names

PRESET = """
[dream]
source = "a test"
[dream.training]
learning_rate = 0.25
patience = 7
[dream.model]
intra_weight = 0.5
modality_weights = {image = 0.25, text = 0.75}
"""


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    """A preset of DREAM."""
    path = tmp_path / "mine.toml"
    path.write_text(PRESET)
    return path


@pytest.mark.parametrize("name", preset_names())
def test_the_presets_of_the_package_are_valid_change_something_and_say_why(name: str):
    for model, preset in load_presets(name).items():
        assert preset.source
        default = RunConfig.create(graph="graph", model=model)
        tuned = RunConfig.create(graph="graph", model=model, preset=name)
        changed = {f"{section}.{key}" for section, values in preset.values.items() for key in values}
        differs = {".".join(line.partition(":")[0].split(".")[:2]) for line in default.differences(tuned)}
        assert changed
        assert differs >= changed - {"model.modality_weights"}


def test_each_layer_is_stronger_than_the_one_before(preset: Path, tmp_path: Path):
    file = tmp_path / "config.toml"
    file.write_text("[model]\nname = 'dream'\n[training]\npatience = 8\nepochs = 9\n")
    config = RunConfig.create(
        graph="graph", file=file, preset=preset, overrides=["training.epochs=10", "model.modality_weights.image=1"]
    )
    default = RunConfig.create(graph="graph", model="dream")
    assert config.training.batch_size == default.training.batch_size
    assert config.training.learning_rate == 0.25
    assert config.training.patience == 8
    assert config.training.epochs == 10
    assert config.model["intra_weight"] == 0.5
    assert config.model["inter_weight"] == default.model["inter_weight"]
    assert config.model["modality_weights"] == {"image": 1, "text": 0.75}


def test_a_file_changes_single_values_of_a_presets_tables(tmp_path: Path):
    file = tmp_path / "config.toml"
    file.write_text("[model]\nname = 'dream'\n[training.teacher]\nshare = 0.1\n")
    teacher = RunConfig.create(graph="graph", file=file, preset="best").training.teacher
    best = RunConfig.create(graph="graph", model="dream", preset="best").training.teacher
    assert teacher == best.model_copy(update={"share": 0.1})


def test_the_model_may_come_from_an_override(preset: Path):
    config = RunConfig.create(graph="graph", preset=preset, overrides=["model.name=dream"])
    assert config.model["intra_weight"] == 0.5


def test_an_override_of_none_is_the_default_and_an_empty_table_leaves_one_that_is_there(tmp_path: Path):
    path = tmp_path / "mine.toml"
    path.write_text(
        '[dream]\nsource = "x"\n[dream.training.sampling]\nrelations = 9\n[dream.training.teacher]\nvote = 0.5\n'
    )

    def training(*overrides: str):
        return RunConfig.create(graph="graph", model="dream", preset=path, overrides=overrides).training

    assert training("training.sampling={}").sampling.relations == 9
    assert training("training.sampling=none").sampling is None
    assert training("training.sampling=none", "training.sampling={}").sampling.relations == SamplingConfig().relations
    assert training("training.sampling.relations=none").sampling.relations == SamplingConfig().relations
    assert training("training.teacher=none").teacher is None
    assert training("training.eval_users=none").eval_users is None
    plain = RunConfig.create(graph="graph", model="dream")
    for override in ("training.teacher.vote=none", "training.sampling.relations=none", "model.modality_weights=none"):
        assert RunConfig.create(graph="graph", model="dream", overrides=[override]) == plain, override
    for override, cure in (
        ("training.epochz=none", "'epochs'"),
        ("model.l2_wieght=none", "'l2_weight'"),
        ("traning.epochs=none", "'training'"),
        ("training.seed.first=none", ""),
    ):
        with pytest.raises(ConfigError, match=f"{override[:-5]} is unknown.*{cure}"):
            RunConfig.create(graph="graph", model="dream", overrides=[override])


@pytest.mark.parametrize("override", ["graph=graphs/b", "model.name=bpr", "model={name='bpr'}"])
def test_a_graph_or_model_that_is_named_cannot_be_another_by_an_override(override: str):
    with pytest.raises(ConfigError, match=r"given twice: (graphs/a, and graphs/b|dream, and bpr) as an override"):
        RunConfig.create(graph="graphs/a", model="dream", overrides=[override])
    RunConfig.create(graph="graphs/a", model="dream", overrides=["graph=graphs/a", "model.name=dream"])


def test_overrides_are_applied_once(preset: Path):
    overrides = (override for override in ["training.seed=3", "model.num_layers=1"])
    config = RunConfig.create(graph="graph", model="dream", preset=preset, overrides=overrides)
    assert (config.training.seed, config.model["num_layers"]) == (3, 1)


def test_a_resolved_configuration_hides_the_preset(preset: Path, tmp_path: Path):
    resolved = RunConfig.create(graph="graph", model="dream")
    resolved.save(tmp_path / "config.toml")
    assert RunConfig.create(file=tmp_path / "config.toml", preset=preset).training == resolved.training


@pytest.mark.parametrize(
    ("name", "model", "message"),
    [
        (
            "babi",
            "dream",
            "Unknown preset 'babi'; expected one of baby, best, paper, tiktok, or the path of a .toml file. Did you",
        ),
        (
            "baby",
            "drem",
            "it has dream, bpr, lightgcn, bm3, mgcn, vbpr, dualgnn, dragon, mmgcn. Did you mean 'dream'? "
            "Train without --preset",
        ),
        ("baby", "popularity", "The preset 'baby' has nothing for model 'popularity'"),
        ("elsewhere/nothing.toml", "dream", "Unknown preset 'elsewhere/nothing.toml'"),
    ],
)
def test_what_is_not_there_is_named(name: str, model: str, message: str):
    with pytest.raises(ConfigError) as caught:
        find_preset(name, model)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[dream", "is not valid TOML"),
        ("dream = 1", "[dream] has no source"),
        ("[dream.model]\nintra_weight = 1", "[dream] has no source"),
        ("[dream]\nsource = 'x'\n[dream.modle]\nintra_weight = 1", "[dream] has an unknown entry 'modle'"),
        ("[dream]\nsource = 'x'\nmodel = 1", "[dream] has an unknown entry 'model'"),
        ("[dream]\nsource = 'x'\n[dream.alignment]\nintra = 1", "[dream].alignment has 'intra'; expected intra_weight"),
        ("[dream]\nsource = 'x'\n[dream.model]\nname = 'bpr'", "a preset cannot set model.name"),
        ("[dream]\nsource = 'x'\n[dream.model]\nintra = 1", "unknown key 'intra'"),
        ("[dream]\nsource = 'x'\n[dream.training]\nepochs = 0", "training.epochs"),
    ],
)
def test_a_broken_preset_is_named(tmp_path: Path, text: str, message: str):
    (tmp_path / "broken.toml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        RunConfig.create(graph="graph", model="dream", preset=tmp_path / "broken.toml")
    assert message in str(caught.value)
