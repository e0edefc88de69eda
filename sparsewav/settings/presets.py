"""Presets of pruning by name: the paper's defaults, and the files of ``conf/experiment`` that set nothing else."""

from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from sparsewav.errors import UserError
from sparsewav.files import conf_folder
from sparsewav.settings.pruning import OPTIONS, Pruning, resolve

PAPER = "paper"
"""The preset that is no file: the defaults of every option."""


def read_preset(name: str) -> Pruning:
    """Give the options of a preset, as ``experiment=<name>`` chooses them on the command line.

    Raises:
        UserError: There is no preset of that name.
    """
    if name == PAPER:
        return Pruning()
    if name not in preset_names():
        raise UserError(f"preset={name} does not exist; choose one of {', '.join(preset_names())}")
    chosen, keys = _read(conf_folder() / "experiment" / f"{name}.yaml")
    settings = Pruning(**{group: resolve(group, option) for group, option in chosen.items()})
    for group, value in keys.items():
        setattr(settings, group, getattr(settings, group).changed(**value) if isinstance(value, dict) else value)
    return settings


@cache
def preset_names() -> list[str]:
    """List the presets: ``paper``, and what in ``conf/experiment`` is no sweep and sets nothing but how to prune."""
    known = {item.name for item in fields(Pruning)}
    names = [PAPER]
    for path in sorted((conf_folder() / "experiment").glob("*.yaml")):
        chosen, keys = _read(path)
        if chosen.keys() <= OPTIONS.keys() and keys.keys() <= known:
            names.append(path.stem)
    return names


def _read(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Give the option of every group that a file overrides, and its own keys."""
    keys = yaml.safe_load(path.read_text(encoding="utf-8"))
    overrides = {group: option for item in keys.pop("defaults", []) for group, option in item.items()}
    return {group.removeprefix("override /"): option for group, option in overrides.items()}, keys
