"""What a run or a training read, by content, and what of it has changed since."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from sparsewav import cache
from sparsewav.data.demo import VERSION
from sparsewav.data.sets import Sets
from sparsewav.data.utterances import Utterance
from sparsewav.errors import UserError
from sparsewav.files import content_hash
from sparsewav.models.checkpoint import WEIGHT_FILES
from sparsewav.models.fairseq import DICTIONARY
from sparsewav.pipeline.naming import identifying_settings
from sparsewav.pipeline.utterances import recovery_set
from sparsewav.settings.data import Data, DemoData, HuggingFace, LibriSpeechHub
from sparsewav.settings.run import Config, TrainConfig
from sparsewav.training.recipes import present_folder

MODEL_FILES = (
    *("config.json", "preprocessor_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("vocab.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt", "merges.txt", "*.model"),
    *WEIGHT_FILES,
)
"""What a model and its processor are loaded from, as patterns of names in its folder."""

Readers = Mapping[str, Callable[[], Iterable[Utterance]]]
"""By the role of a set, what reads it."""


def of_run(config: Config, sets: Sets | None = None, revision: str | None = None) -> dict[str, Any]:
    """Give the record of what a run reads, without loading the model; see :func:`changes`.

    Files are hashed once and known by their times afterwards. Speech of the demo is known by its version, and what is
    streamed from the hub by its settings, where ``data.revision`` can name a commit: reading it would fetch it again.

    Args:
        config: A configuration that was checked.
        sets: Its sets of utterances, where some were read already.
        revision: The commit of a model of the hub, where it is known; else that of the revision in the hub's cache.

    Returns:
        ``settings`` that the results depend on, ``code`` of this package, ``content`` (a hash by what was read; the
        model's files are called ``model/<name>``), and ``unread``: for what cannot be read now, the reason.
    """
    sets = sets or Sets(config.data)
    readers: Readers = {
        "evaluation": lambda: chain.from_iterable(sets.evaluation().values()),
        "calibration": lambda: sets.calibration(config.calibration.utterances, config.seed),
        "recovery": lambda: recovery_set(config, sets),
        "training": lambda: sets.training(config.training.seed),
    }
    roles = [*config.roles, *(["recovery"] if config.recovers_globally else [])]
    readers = {role: readers[role] for role in roles}
    settings = identifying_settings(OmegaConf.structured(config))
    model = config.model
    files = partial(_model_files, model.name_or_path, revision or model.revision, model.fairseq_checkpoint)
    return _record(settings, files, sets, readers)


def of_training(config: TrainConfig, sets: Sets | None = None) -> dict[str, Any]:
    """Give the record of what a dense training reads, as :func:`of_run` does."""
    sets = sets or Sets(config.data)
    settings = asdict(config)
    for key in ("output", "device"):
        del settings[key]
    del settings["training"]["checkpoint_updates"]
    readers: Readers = {
        "training": lambda: sets.training(config.training.seed),
        "development": sets.development,
        "evaluation": lambda: chain.from_iterable(sets.evaluation().values()),
    }
    files = partial(_model_files, config.initial_model, config.initial_revision)
    return _record(settings, files, sets, readers)


def _record(
    settings: dict[str, Any], model_files: Callable[[], list[Path]], sets: Sets, readers: Readers
) -> dict[str, Any]:
    content: dict[str, str] = {}
    unread: dict[str, str] = {}
    try:
        content |= {f"model/{path.name}": content_hash(path) for path in model_files()}
    except (UserError, OSError) as error:
        unread["model"] = str(error)
    for role, read in readers.items():
        if isinstance(sets.data, DemoData):
            content[f"{role} set"] = f"demo {VERSION}"
        elif not known_by_settings(sets.data):
            try:
                content[f"{role} set"] = cache.utterances_fingerprint(read())
            except (UserError, OSError) as error:
                unread[f"{role} set"] = str(error)
    settings = json.loads(json.dumps(settings))  # as it is read again from a file
    return {"settings": settings, "code": cache.code_fingerprint(), "content": content, "unread": unread}


def known_by_settings(data: Data) -> bool:
    """Tell whether speech is streamed from the hub, so that its content is not compared."""
    if isinstance(data, HuggingFace):
        return data.streaming and not Path(data.path).expanduser().is_dir()
    return isinstance(data, LibriSpeechHub)


def _model_files(model: str | None, revision: str | None, fairseq: str | None = None) -> list[Path]:
    """List the files that a model comes from.

    Raises:
        UserError: They are not on this machine.
    """
    if fairseq is not None:
        path = Path(fairseq).expanduser()
        if not path.is_file():
            raise UserError(f"{fairseq} is not there")
        return [item for item in (path, path.with_name(DICTIONARY)) if item.is_file()]
    if model is None:
        return []
    folder = present_folder(model, revision)
    if folder is None:
        raise UserError(f"{model} is not on this machine")
    return sorted({path for pattern in MODEL_FILES for path in folder.glob(pattern) if path.is_file()})


def changes(before: Mapping[str, Any], now: Mapping[str, Any], model: str | None) -> str:
    """Name what has other content now than when it was recorded; empty if nothing has.

    What cannot be read now is passed over. ``model`` is what the user calls the model.
    """
    old, new = before["content"], now["content"]
    names = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
    return ", ".join(
        f"{name.removeprefix('model/')} of {model}" if name.startswith("model/") else f"the {name}"
        for name in names
        if name.partition("/")[0] not in now["unread"]
    )


def refuse_other_settings(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path, remedy: str) -> None:
    """Refuse a folder whose results were made with other settings.

    Raises:
        UserError: It names the keys that differ, with their old and new values.
    """
    differ = [
        f"{key} was {json.dumps(old)} and is {json.dumps(new)}"
        for key, old, new in _differing(before["settings"], now["settings"])
    ]
    if differ:
        raise UserError(f"{folder} was made with other settings ({'; '.join(differ)}); {remedy}")


def _differing(before: Any, now: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differing(old, new, f"{prefix}{key}.")
        elif old != new:
            yield f"{prefix}{key}", old, new
