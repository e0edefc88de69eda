"""The names of runs' folders: readable, and unique by all that the results depend on."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sparsewav.settings.baselines import OURS
from sparsewav.settings.options import metadata_of
from sparsewav.settings.pruning import OPTIONS, TRANSFORMER
from sparsewav.settings.run import Config
from sparsewav.settings.sparsity import COUNTED, RUNTIMES, Structured

SETTINGS = ".hydra"
"""Folder of a run's composed configuration; Hydra's name for it."""

LATER_CHOICES = ("solver", "objective", "recovery", "quantization")
"""Groups that a folder's name mentions only where the choice is not the paper's."""

WITHOUT_SALIENCY = [solver().name for solver in OPTIONS["solver"] if not getattr(solver, "uses_saliency", True)]
"""Solvers that choose the mask by themselves, so that the saliency changes nothing, as in structured pruning."""

REFUSED_BESIDE = [saliency().name for saliency in OPTIONS["saliency"] if not getattr(saliency, "updates", True)]
"""Saliencies that are refused then: the failure is recorded in another folder than that of a run it accepts."""


def identifying_settings(root: DictConfig) -> dict[str, Any]:
    """Give the settings that a run's results depend on, resolved."""
    keys = [item.name for item in fields(Config) if item.metadata["identifies"]]
    if root.finetune_strategy.name == "none" and root.method.name == OURS:  # a baseline draws its sample by it
        keys.remove("training")
    unused = ("update_divisor", "lr_multiplier") if root.method.name == OURS else (*OPTIONS, "calibration")
    keys = [key for key in keys if key not in unused or key == "sparsity"]
    without = root.solver.name in WITHOUT_SALIENCY or root.sparsity.name == Structured().name
    without = without and root.saliency.name not in REFUSED_BESIDE
    if root.method.name == OURS and without:
        keys.remove("saliency")
    settings: Any = OmegaConf.to_container(OmegaConf.masked_copy(root, keys), resolve=True)
    for group, values in settings.items():
        schema = OmegaConf.get_type(root, group)
        if isinstance(values, dict) and is_dataclass(schema):
            for key in [key for key in values if not metadata_of(schema, key).get("identifies", True)]:
                del values[key]
    if settings["sparsity"].get("speedup", "") is None:  # nothing is timed
        for key in ("speedup", "runtime", "audio_seconds"):
            del settings["sparsity"][key]
    # Of the two that can name the model one counts.
    unnamed = ("name_or_path", "revision") if settings["model"]["fairseq_checkpoint"] else ("fairseq_checkpoint",)
    for key in unnamed:
        del settings["model"][key]
    return settings


def run_name(*, _root_: DictConfig) -> str:
    """Give the readable part and a hash of all that the run's results depend on."""
    settings = identifying_settings(_root_)
    model, sparsity = settings["model"], settings["sparsity"]
    first = "saliency" if "saliency" in settings else "solver"
    pruning = (first, "allocation") if _root_.method.name == OURS else ("method",)
    choices = [settings[group]["name"] for group in pruning]
    later = [(group, settings[group]["name"]) for group in LATER_CHOICES if group in settings and group != first]
    parts = (
        Path(model["name_or_path"]).name if "name_or_path" in model else Path(model["fairseq_checkpoint"]).stem,
        *choices,
        _sparsity_part(sparsity),
        *(name for group, name in later if name != papers_choice(group)),
        *([] if settings["scope"] == TRANSFORMER else [settings["scope"]]),
        *([] if settings["finetune_strategy"]["name"] == "none" else [settings["finetune_strategy"]["name"]]),
        short_hash(settings),
    )
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", "-".join(parts))


def _sparsity_part(sparsity: dict[str, Any]) -> str:
    if "megabytes" in sparsity:  # a value that is missing is a string, of which the check tells
        return f"{sparsity['megabytes']}MB".replace(".0MB", "MB")
    if "parameters" in sparsity:
        fast = [] if sparsity.get("speedup") is None else [f"{sparsity['speedup']}x".replace(".0x", "x")]
        fast += [sparsity["runtime"]] if fast and sparsity["runtime"] != RUNTIMES[0] else []
        return "-".join([*(f"{sparsity[key]}{key}" for key in COUNTED if sparsity[key] is not None), *fast])
    return f"{sparsity['target']:g}" if "target" in sparsity else f"{sparsity['n']}of{sparsity['m']}"


def changes_results(override: str) -> bool:
    """Tell whether ``key=value`` can change a run's results, as the folder of the output or the tracker cannot."""
    others = [item.name for item in fields(Config) if not item.metadata["identifies"]]
    return re.split(r"[./@=]", override.lstrip("+~"))[0] not in (*others, "hydra")


def papers_choice(group: str) -> str:
    """Give the name of the paper's choice in a group."""
    return OPTIONS[group][0]().name


def short_hash(value: Any) -> str:
    """Hash a value that JSON can hold into eight characters."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def rounded_to(metrics: Mapping[str, Any]) -> str | None:
    """Give the quantization of a run by name; None where its weights are not rounded, as those of a baseline."""
    name = metrics["quantization"]
    return None if name == papers_choice("quantization") else name


def last_change(metrics: Mapping[str, Any]) -> str | None:
    """Say what a run did to its model after it was pruned and evaluated; None for nothing."""
    rounds = rounded_to(metrics)
    if metrics["updates"]:
        return "tuned and rounded" if rounds else "tuned"
    return "rounded" if rounds and metrics["achieved_share"] is not None else None
