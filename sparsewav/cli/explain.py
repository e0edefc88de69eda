"""Errors of Hydra and OmegaConf in one sentence that names the key and what to do."""

import difflib
import re
from dataclasses import fields, is_dataclass
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from sparsewav.errors import UserError
from sparsewav.files import conf_folder


def explain(error: Exception, config_name: str) -> str:
    """Turn an error of Hydra into one sentence that names the key and the nearest valid choice."""
    text = "\n".join(str(item) for item in (error, error.__cause__) if item)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.partition("/")
        folder = conf_folder() / group
        options = sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))
        return f"{group}={option} does not exist{_nearest(option, options)}; choose one of {', '.join(options)}"
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} has no value; give it: {error.full_key}=..."
    if match := re.search(r"Could not override '([\w./@-]+)'", text):
        return _no_such_key(match[1], config_name)
    if match := re.search(r"Error merging override (\S+)", text):
        reason = next(
            (line for line in text.splitlines() if line.startswith(("Value", "Key", "Cannot", "Invalid"))), ""
        )
        if reason.startswith("Key "):
            return _no_such_key(match[1].lstrip("+~").partition("=")[0], config_name)
        return (
            f"{match[1]} has the wrong type: {reason[:1].lower()}{reason[1:]}" if reason else f"{match[1]} is not valid"
        )
    return " ".join(str(error).split())


def refuse_added_keys(settings: DictConfig, config_name: str, prefix: str = "") -> None:
    """Refuse keys that ``+key=value`` put where the schema has none; Hydra lets them through."""
    schema = OmegaConf.get_type(settings)
    known = {item.name for item in fields(schema)} if is_dataclass(schema) else set(settings)
    for key in map(str, settings):
        if key not in known:
            raise UserError(_no_such_key(f"{prefix}{key}", config_name))
        if not OmegaConf.is_missing(settings, key) and isinstance(settings[key], DictConfig):
            refuse_added_keys(settings[key], config_name, f"{prefix}{key}.")


def _no_such_key(key: str, config_name: str) -> str:
    keys = _all_keys(config_name)
    if key in keys and "." in key:
        group, _, name = key.rpartition(".")
        return f"the option chosen for {group} has no key {name}; drop it or choose another option"
    return f"there is no key {key}{_nearest(key, keys)}; conf/README.md lists them all"


def _nearest(word: str, choices: list[str]) -> str:
    matches = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f" (did you mean {matches[0]}?)" if matches else ""


def _all_keys(config_name: str) -> list[str]:
    """Every key and group of the command's default configuration, dotted."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        settings = compose(config_name)

    def walk(node: Any, prefix: str) -> list[str]:
        keys = []
        for key in node:
            keys.append(f"{prefix}{key}")
            if not OmegaConf.is_missing(node, key) and isinstance(node[key], DictConfig):
                keys += walk(node[key], f"{prefix}{key}.")
        return keys

    return [*walk(settings, ""), "experiment", "scale", "recipe"]
