"""Presets: hyper-parameters that a study or a paper found good on a data set, each with its source.

A preset is a TOML file with one table for each model::

    [dream]
    source = "study: baby, 40 trials, seed 0"

    [dream.training]
    learning_rate = 0.003

    [dream.model]
    intra_weight = 0.02

A model that DREAM's alignment can be added to may have a table ``alignment`` with the weights that it then takes::

    [bm3.alignment]
    intra_weight = 0.3
    inter_weight = 0.07

Those of this package lie beside this file; ``dream-pyg tune`` writes others.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from dream_pyg.data.files import read_toml
from dream_pyg.errors import ConfigError, did_you_mean

ALIGNMENT = ("intra_weight", "inter_weight", "signal_weight", "popularity_correction")
"""What a preset may say of the alignment that is added to a model."""
_DIRECTORY = Path(__file__).parent


class Preset(NamedTuple):
    """What a preset says of one model."""

    source: str
    """Where the values come from."""
    values: dict[str, dict[str, Any]]
    """``model`` and ``training`` as in a run's configuration, those that differ from the defaults."""
    alignment: dict[str, float]
    """Of :data:`ALIGNMENT`, where the alignment is added to the model (Table 4), empty if nothing is said."""


def preset_names() -> list[str]:
    """The presets of this package."""
    return sorted(path.stem for path in _DIRECTORY.glob("*.toml"))


def load_presets(preset: str | Path) -> dict[str, Preset]:
    """Read a preset file.

    Args:
        preset: The name of one of the package's, or the path of a ``.toml`` file.

    Returns:
        What it says of each model, by the model's name.

    Raises:
        ConfigError: If there is no such preset, or the file is not one.
    """
    path = Path(preset) if Path(preset).suffix == ".toml" else _DIRECTORY / f"{preset}.toml"
    if not path.is_file():
        known = preset_names()
        raise ConfigError(
            f"Unknown preset {str(preset)!r}; expected one of {', '.join(known)}, or the path of a .toml file."
            f"{did_you_mean(str(preset), known)}"
        )
    return {model: _preset(table, f"{path}: [{model}]") for model, table in read_toml(path, "preset").items()}


def find_preset(preset: str | Path, model: str) -> Preset:
    """What a preset says of ``model``.

    Raises:
        ConfigError: If it says nothing; the message lists the models that it knows.
    """
    presets = load_presets(preset)
    if model not in presets:
        raise ConfigError(
            f"The preset {str(preset)!r} has nothing for model {model!r}; it has {', '.join(presets) or 'no models'}."
            f"{did_you_mean(model, presets)} Train without --preset, or find values with `dream-pyg tune`."
        )
    return presets[model]


def _preset(table: Any, where: str) -> Preset:
    if not isinstance(table, dict) or not isinstance(table.get("source"), str):
        raise ConfigError(f'{where} has no source. Say where its values come from, for example source = "published".')
    values = {section: content for section, content in table.items() if section != "source"}
    for section, content in values.items():
        if section not in ("model", "training", "alignment") or not isinstance(content, dict):
            raise ConfigError(
                f"{where} has an unknown entry {section!r}; expected source, model.*, training.* and alignment.*."
            )
        if "name" in content:
            raise ConfigError(f"{where}: a preset cannot set {section}.name; its table is named after the model.")
    alignment = values.pop("alignment", {})
    if unknown := set(alignment) - set(ALIGNMENT):
        raise ConfigError(f"{where}.alignment has {min(unknown)!r}; expected {', '.join(ALIGNMENT)}.")
    return Preset(table["source"], values, alignment)
