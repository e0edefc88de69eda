"""Errors of Hydra and OmegaConf in one sentence that names the key and what to do."""

import difflib
import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, QuotedString, RangeSweep
from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, MissingMandatoryValue

from sparsewav.errors import UserError
from sparsewav.files import conf_folder
from sparsewav.settings.options import MISSING, no_value
from sparsewav.settings.pruning import OPTIONS
from sparsewav.settings.run import SCHEMAS, Config, TrainConfig

COMMANDS: dict[str, tuple[str, type]] = {"config": ("sparsewav", Config), "train": ("sparsewav-train", TrainConfig)}
"""The command and the schema of every configuration."""

EXTRAS = {"joblib": "joblib", "submitit_local": "slurm", "submitit_slurm": "slurm", "ray": "ray"}
"""Hydra's launchers that come with an extra of this package, which has to be installed."""

NUMBERS = {
    "sparsity": "sparsity.target",
    "calibration": "calibration.utterances",
    "allocation": "allocation.alpha",
    "solver": "solver.damping",
    "recovery": "recovery.steps",
    "finetune_strategy": "training.epochs",
    "training": "training.epochs",
    "data": "data.seed",
}
"""The key that a number in the place of an option was meant for, by group."""

MANIFESTS = (".csv", ".tsv", ".json", ".jsonl")
"""The suffixes of files that can be meant for a manifest."""

WITHOUT_SCHEMA = {"config": ("experiment", "scale"), "train": ("recipe", "architecture")}
"""Groups whose options are made of other keys."""


def explain(error: Exception, config_name: str) -> str:
    """Turn an error of Hydra into one sentence that names the key and the nearest valid choice."""
    text = "\n".join(str(item) for item in (error, error.__cause__) if item)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.partition("/")
        if not option:
            return f"--config-name={group} does not exist; leave it out, and choose options with group=option"
        if group != "hydra":
            return _no_such_option(group, option, _options(group))
        return _no_such_plugin(*error.missing_cfg_file.rpartition("/")[::2], error.options or ())
    if isinstance(error, MissingMandatoryValue):
        return no_value(str(error.full_key))
    if isinstance(error, InterpolationKeyError) and (match := re.search(r"key '([\w.]+)' not found", text)):
        return _cannot_follow(error.full_key or "a value", match[1], config_name)
    if match := re.search(r"Could not override '([\w./@-]+)'", text):
        return _no_such_key(match[1], config_name)
    if match := re.search(r"Ambiguous value for argument '(.+?)'", text):
        key, _, value = match[1].partition("=")
        takes_list = key == "experiment" or key.startswith("architecture.") or _takes_list(key, config_name)
        listed = f", or write a list: {key}=[{value}]" if takes_list else ""
        return f"{match[1]} has several values; add -m to run each of them{listed}"
    if match := re.search(r"Error parsing override '(.+?)'\s+missing EQUAL", text):
        return f"{match[1]} has no value; write it as {match[1]}=..."
    if match := re.search(r"Error merging override (\S+)", text):
        key = match[1].lstrip("+~").partition("=")[0]
        reason = str(error.__cause__ or "").partition("\n")[0]
        if reason.startswith("Key "):
            return _no_such_key(key, config_name)
        if reason.endswith("not Optional"):
            return f"{match[1]} has no meaning; give a value{_default(key, config_name)}"
        if match[1].endswith("="):
            return f"{match[1]} is empty; give a value{_default(key, config_name)}"
        own = [other for other in _all_keys(config_name) if other.startswith(f"{key}.")]
        if own and "is not a subclass of" in reason:
            return f"{match[1]} gives one value to a group of keys; give it to one of them: {', '.join(own)}"
        reason = f"has the wrong type: {reason[:1].lower()}{reason[1:].rstrip('.')}" if reason else "is not valid"
        return f"{match[1]} {reason}; give another value{_default(key, config_name)}"
    if match := re.search(r"In 'experiment/([\w/]+)': .*Key '(\w+)' not in '\w+'\s+full_key: (\w+)\.", text, re.DOTALL):
        return _without_its_group(match[1], match[3], match[2], config_name)
    return " ".join(str(error).split())


def check_overrides(words: Sequence[str], config_name: str) -> None:
    """Refuse what Hydra refuses without a word about the key, before it composes the configuration.

    Args:
        words: The command line, of which what is written as ``key=value`` or ``~key`` is read.
        config_name: The configuration of the command.

    Raises:
        UserError: A group is given something else than the name of an option, a key is deleted, or a value cannot be
            read.
    """
    for word in words:
        if not re.match(r"~|\+{0,2}[A-Za-z_][\w./@:-]*=", word):
            continue
        try:
            (override,) = OverridesParser.create().parse_overrides([word])
        except OverrideParseException:
            if word.endswith(","):  # a shell cuts "0.5, 0.8" in two
                raise UserError(f"{word} ends with a comma; write several values without spaces between them") from None
            raise UserError(
                f"{word} cannot be read; quote what is special to Hydra, e.g. 'key=\"a,b\"' (brackets, commas, $)"
            ) from None
        key = override.key_or_group
        if override.is_delete() and not key.startswith("hydra"):
            raise UserError(f"~{key} would leave a key without a value; give it another one, {key}=...")
        groups = {*SCHEMAS, *(group for groups in WITHOUT_SCHEMA.values() for group in groups)}
        if key not in groups or override.is_delete():
            continue
        if _keys_of(key) and key not in _all_keys(config_name):
            raise UserError(_no_such_key(key, config_name))
        given = override.value()
        if override.is_sweep_override() and not isinstance(given, ChoiceSweep | RangeSweep):
            continue
        values = override.sweep_iterator() if isinstance(given, RangeSweep) else getattr(given, "list", [given])
        # Of a dictionary or a list Hydra would take the defaults of the group, or nothing.
        named = str | QuotedString if key in SCHEMAS else str | list | dict | QuotedString
        for value in values:
            if isinstance(value, named) and value != "":
                continue
            shown = "null" if value is None else value
            raise UserError(_no_such_option(key, str(shown), _options(key)))


def choices_of_keys(words: Sequence[str]) -> list[str]:
    """Give the choice of sparsity that a key on a command line is of, where the command line chooses none.

    ``sparsity.megabytes=20`` is as good as ``sparsity=megabytes sparsity.megabytes=20``.
    """
    others = OPTIONS["sparsity"][1:]  # the first is the default
    if any(word.startswith("sparsity=") for word in words):
        return []
    names = {item.name: other().name for other in others for item in fields(other) if item.init}
    keys = [match[1] for word in words if (match := re.match(r"sparsity\.(\w+)=", word))]
    return [f"sparsity={name}" for name in sorted({names[key] for key in keys if key in names})]


def with_swept_groups(words: Sequence[str]) -> list[str]:
    """Give a command line that forces a key which every option has that its group is swept over.

    Before any job Hydra composes a configuration of what is not swept, and refuses a key that the default option lacks:
    ``-m quantization=int3,int4 quantization.group_size=64``.
    """
    swept = {}
    for word in words:
        group = word.partition("=")[0]
        if group in SCHEMAS and isinstance(
            given := OverridesParser.create().parse_overrides([word])[0].value(), ChoiceSweep
        ):
            swept[group] = {str(option) for option in given.list}

    def forced(word: str) -> bool:
        group, _, name = word.partition("=")[0].rpartition(".")
        return group in swept and swept[group] <= set(_keys_of(group).get(name, []))

    return [f"++{word}" if forced(word) else word for word in words]


def refuse_added_keys(settings: DictConfig, config_name: str, prefix: str = "") -> None:
    """Refuse keys that ``+key=value`` put where the schema has none; Hydra lets them through."""
    schema = OmegaConf.get_type(settings)
    known = {item.name for item in fields(schema)} if is_dataclass(schema) else set(settings)
    for key in map(str, settings):
        if key not in known:
            raise UserError(_no_such_key(f"{prefix}{key}", config_name))
        if not OmegaConf.is_missing(settings, key) and isinstance(settings[key], DictConfig):
            refuse_added_keys(settings[key], config_name, f"{prefix}{key}.")


def _without_its_group(experiment: str, group: str, key: str, config_name: str) -> str:
    """Explain an experiment whose key another option of the group does not have: the rest of it can be written out."""
    owners = _keys_of(group).get(key)
    if not owners:
        return f"experiment={experiment}: {_no_such_key(f'{group}.{key}', config_name)}"
    said = (
        f"experiment={experiment} sets {group}.{key}, which {group}={' or '.join(owners)} alone has; choose that, or "
        f"leave experiment={experiment} out"
    )
    file = Path(conf_folder(), "experiment", f"{experiment}.yaml")
    settings: Any = OmegaConf.to_container(OmegaConf.load(file)) if file.is_file() else {"hydra": {}}
    if "hydra" in settings:  # a sweep, or the user's own
        return said
    choices = [entry for entry in settings.pop("defaults", []) if not isinstance(entry, str)]
    words = [f"{name.rpartition('/')[2]}={option}" for entry in choices for name, option in entry.items()]
    for name, value in settings.items():
        inner = {f"{name}.{own}": item for own, item in value.items()} if isinstance(value, dict) else {name: value}
        words += [f"{own}={_written(item)}" for own, item in inner.items()]
    others = [shlex.quote(word) for word in words if not re.match(rf"{group}[.=]", word)]
    return f"{said}, and write what is wanted of it: {' '.join(others)}"


def _no_such_option(group: str, option: str, options: Sequence[str]) -> str:
    meant = f" (did you mean {instead}?)" if (instead := _instead(group, option)) else _nearest(option, options)
    optional = ", or leave it out" if option == "null" and group not in SCHEMAS else ""
    return f"{group}={option} does not exist{meant}; choose one of {', '.join(options)}{optional}"


def _instead(group: str, value: str) -> str:
    """Say what was meant by a number, a path or a name on the hub in the place of an option; empty if it is none."""
    if group in NUMBERS and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", value, re.IGNORECASE):
        return f"{NUMBERS[group]}={value}"
    if group not in ("model", "data") or not (re.search(r"[/\\]", value) or Path(value).exists()):
        return ""
    if group == "model":
        return f"model.{'fairseq_checkpoint' if value.endswith('.pt') else 'name_or_path'}={value}"
    path = Path(value)
    if path.is_file() or path.suffix in MANIFESTS:
        return f"data=manifest data.test={value}"
    saved = any((path / name).is_file() for name in ("dataset_dict.json", "dataset_info.json"))
    on_hub = re.fullmatch(r"\w[\w.-]*/[\w.-]+", value) and not path.exists()
    if saved or on_hub:
        return f"data=hf data.path={value}"
    return f"data=librispeech_dir data.root={value}"


def _no_such_plugin(group: str, option: str, options: Sequence[str]) -> str:
    """Say of a launcher or sweeper of Hydra's how it is installed, or what takes its place."""
    if group == "hydra/launcher" and option in EXTRAS:
        return f"hydra/launcher={option} is not installed; install it: pip install 'sparsewav[{EXTRAS[option]}]'"
    if group == "hydra/sweeper":
        return (
            f"{group}={option} is not offered; allocation=search takes its place: it searches the sparsities of the "
            "matrices within a run, and -m with commas runs every combination of other values"
        )
    return _no_such_option(group, option, sorted(options or _options(group)))


def _no_such_key(key: str, config_name: str) -> str:
    keys = _all_keys(config_name)
    if owners := keys.get(key):
        group, _, name = key.rpartition(".")
        return f"{group} has the key {name} with {group}={' or '.join(owners)} alone; choose that, or drop {key}"
    if key in keys:
        group, _, name = key.rpartition(".")
        return f"the chosen {group} does not have the key {name}; choose another {group}, or drop {key}"
    for other, (command, _) in COMMANDS.items():
        if other != config_name and key in _all_keys(other):
            return (
                f"{key} is a key of {command}, and {COMMANDS[config_name][0]} has none; conf/README.md lists them all"
            )
    same = [other for other in keys if other.endswith(f".{key}")]  # given without its group
    if key == "preset":  # what Python calls it
        same = ["experiment"]
    hint = f" (did you mean {' or '.join(same)}?)" if same else _nearest(key, list(keys))
    return f"there is no key {key}{hint}; conf/README.md lists them all"


def _cannot_follow(key: str, source: str, config_name: str) -> str:
    """Explain a value that is taken from a key which the chosen options do not have."""
    owners = _all_keys(config_name).get(source)
    choose = f"choose {source.partition('.')[0]}={' or '.join(owners)}" if owners else f"give {source}"
    return f"{key} follows {source}, which is not there; {choose}, or give {key}=... itself"


def _nearest(word: str, choices: Sequence[str]) -> str:
    lower = {choice.lower(): choice for choice in choices}
    matches = difflib.get_close_matches(word.lower(), lower, n=1, cutoff=0.6)
    return f" (did you mean {lower[matches[0]]}?)" if matches else ""


def _options(group: str) -> list[str]:
    """List the names of the options of a group."""
    folder = conf_folder() / group
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def _all_keys(config_name: str) -> dict[str, list[str]]:
    """Give every key and group of a command, dotted, with the options that have it where not all of the group do."""
    keys: dict[str, list[str]] = {}
    for item in fields(COMMANDS[config_name][1]):
        keys[item.name] = []
        if item.name in SCHEMAS:
            keys |= {f"{item.name}.{key}": owners for key, owners in _keys_of(item.name).items()}
        elif is_dataclass(item.type):
            keys |= {f"{item.name}.{inner.name}": [] for inner in fields(item.type)}
        elif item.name == "architecture":  # keys of transformers, of which our options name some
            files = (Path(conf_folder(), item.name, f"{option}.yaml") for option in _options(item.name))
            found = (key for file in files for key in re.findall(r"^(\w+):", file.read_text(encoding="utf-8"), re.M))
            keys |= {f"{item.name}.{key}": [] for key in found}
    return keys | {group: [] for group in (*WITHOUT_SCHEMA[config_name], "hydra/launcher")}


def _keys_of(group: str) -> dict[str, list[str]]:
    """Give the keys of all options of a group, and the options that have it where not all do."""
    schemas = {schema.__name__: schema for schema in SCHEMAS.get(group, ())}
    options = {
        option: schemas[match[1]]
        for option in _options(group)
        if (
            match := re.search(
                r"\bbase_(\w+)", Path(conf_folder(), group, f"{option}.yaml").read_text(encoding="utf-8")
            )
        )
        and match[1] in schemas
    }
    keys: dict[str, list[str]] = {}
    for option, schema in options.items():
        for item in fields(schema):
            keys.setdefault(item.name, []).append(option)
    return {key: [] if len(owners) == len(options) else owners for key, owners in keys.items()}


def _takes_list(key: str, config_name: str) -> bool:
    """Tell whether a key has a list as its default, or may have one, as the subsets of data."""
    group, _, name = key.rpartition(".")
    kinds = [item.type for schema in SCHEMAS.get(group, ()) for item in fields(schema) if item.name == name]
    return Any in kinds or "[" in _default(key, config_name)


def _default(key: str, config_name: str) -> str:
    """Give the default of a key as an example, where it has one."""
    group, _, name = key.rpartition(".")
    schemas = SCHEMAS.get(group, ()) if group else (COMMANDS[config_name][1],)
    for item in (item for schema in schemas for item in fields(schema) if item.name == name):
        factory = item.default_factory
        default = item.default if factory is NO_DEFAULT or isinstance(factory, type) else factory()
        if default not in (NO_DEFAULT, MISSING, None):
            return f", e.g. {key}={_written(default)}"
    return ""


def _written(value: Any) -> str:
    """Give a value as it is written on a command line."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).replace('"', "")
