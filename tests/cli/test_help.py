"""Help, versions and usage errors of the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version

import pytest
from click.testing import Result

from dream_pyg.cli import main
from dream_pyg.models import MODELS
from dream_pyg.presets import load_presets, preset_names

COMMANDS = [
    "bench",
    "build-graph",
    "demo",
    "evaluate",
    "export",
    "figure",
    "inspect",
    "models",
    "recommend",
    "reproduce",
    "train",
    "tune",
    "update-graph",
]


def test_every_command_is_listed(command: Callable[..., Result]):
    assert sorted(main.commands) == COMMANDS
    help_text = command("--help").stdout
    assert [name for name in COMMANDS if f"\n  {name} " not in help_text] == []


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_ends_with_an_example(command: Callable[..., Result], name: str, flag: str):
    result = command(*[name] if name else [], flag)
    assert result.exit_code == 0
    last_paragraph = result.stdout.rstrip().split("\n\n")[-1].splitlines()
    assert last_paragraph[0].strip() in ("Example:", "Examples:")
    assert last_paragraph[1].split()[:2] == ["dream-pyg", name or "demo"]


def test_every_option_says_what_it_does():
    unexplained = [
        f"{name} {parameter.name}"
        for name, one in main.commands.items()
        for parameter in one.params
        if parameter.param_type_name == "option" and not getattr(parameter, "help", None)
    ]
    assert unexplained == []


@pytest.mark.parametrize("name", ["build-graph", "update-graph"])
def test_the_default_split_is_said(command: Callable[..., Result], name: str):
    text = " ".join(command(name, "--help").stdout.split())
    assert "[default: given if there is a split column, else random by user, 8:1:1 with seed 0, unless" in text


def test_version_of_the_module_is_that_of_the_package():
    done = subprocess.run([sys.executable, "-m", "dream_pyg", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == version("dream-pyg")
    assert done.stderr == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["trian"],
        ["train", "--no-such-option"],
        ["build-graph", "somewhere"],
        ["evaluate"],
        ["models", "--format", "yaml"],
        ["demo", "--seeds", "0"],
        ["tune", "dream"],
        ["tune", "dream", "graph", "--trials", "0"],
        ["reproduce", "table2", "--graph", "graph", "--jobs", "0"],
        ["export", "run", "--out", "x", "--as", "pickle"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2_and_one_error_line(command: Callable[..., Result], arguments: list[str]):
    result = command(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert [line.startswith("Error: ") for line in result.stderr.splitlines()].count(True) == 1


def test_models_lists_the_registry_with_defaults(command: Callable[..., Result]):
    listed = json.loads(command("models", "--format", "json").stdout)
    assert [entry["model"] for entry in listed] == list(MODELS)
    defaults = listed[0]["hyper-parameters"]
    assert defaults == {name: getattr(MODELS["dream"].Config(), name) for name in defaults}
    table = command("models").stdout
    for entry in listed:
        assert f"{entry['model']:<12}{entry['what']}" in table
        assert all(f"{name} = {default}" in table for name, default in entry["hyper-parameters"].items())


def test_models_lists_what_presets_say(command: Callable[..., Result]):
    listed = {entry["model"]: entry["presets"] for entry in json.loads(command("models", "--format", "json").stdout)}
    assert listed == {
        model: {
            name: presets[model]._asdict()
            for name, presets in ((name, load_presets(name)) for name in preset_names())
            if model in presets
        }
        for model in MODELS
    }
    assert "  preset baby: training.learning_rate = " in command("models").stdout
