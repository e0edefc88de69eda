"""Recipes: models that are trained as a file in ``conf/recipe`` says on first use, and kept in the cache."""

import hashlib
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml

from sparsewav.errors import UserError
from sparsewav.files import CHECKSUMS, cache_folder, conf_folder, damage, locked, write_checksums
from sparsewav.models import hub
from sparsewav.models.fairseq import KEY
from sparsewav.models.load import SpeechModel, choose_device, load_fairseq_model, load_speech_model, locate_model
from sparsewav.progress import print_warning
from sparsewav.settings.run import Model, device_faults

TRAINING = "training.json"
"""What a training writes last, beside its model: settings, seconds, word error rates."""


def load_model(name_or_path: str | Path, *, revision: str | None = None, device: str = "auto") -> SpeechModel:
    """Load a model with its processor, from whatever the command takes.

    >>> speech = sparsewav.load_model("outputs/RUN")  # doctest: +SKIP

    Args:
        name_or_path: ``demo`` or another option of ``model=``, such as ``wav2vec2-base-100h`` (the demo's relatives are
            trained on first use); the folder of a model, in dense or bitmask format, or of a run; a name on the Hugging
            Face hub; or a file that fairseq saved.
        revision: A branch, a tag or a commit of a name on the hub; None for its main branch.
        device: ``auto`` (the GPU if there is one), ``cpu``, ``cuda``, ``cuda:1``.

    Returns:
        The model, in float32 and evaluation mode, and its processor. What was assumed is printed, and kept in
        ``warnings``.

    Raises:
        UserError: There is no such model, it is broken, or its training failed.
    """
    if not isinstance(name_or_path, str | Path):
        raise UserError(f"name_or_path is of type {type(name_or_path).__name__}; give a name or a folder")
    named, path = str(name_or_path), Path(name_or_path).expanduser()
    option = conf_folder() / "model" / f"{named}.yaml"
    settings = Model(name_or_path=named, revision=revision)
    if path.is_file():
        settings = Model(fairseq_checkpoint=str(path), revision=revision)
    elif option.is_file() and not path.exists():
        values = yaml.safe_load(option.read_text(encoding="utf-8"))
        settings = Model(**{key: value for key, value in values.items() if key not in ("defaults", "revision")})
        settings.revision = revision
    for fault in (*settings.faults(), *device_faults(device)):
        raise UserError(fault)
    speech = load_or_train(settings, choose_device(device), key="")
    for warning in speech.warnings:
        print_warning(warning, log=False)
    return speech


def load_or_train(settings: Model, device: torch.device | str = "cpu", key: str = "model.name_or_path") -> SpeechModel:
    """Load the model that the settings name; the model of a recipe is trained first if it is not in the cache.

    Args:
        settings: The model.
        device: Where it is put.
        key: As in :func:`~sparsewav.models.load.locate_model`; a file of fairseq has its own key, or none.

    Raises:
        UserError: There is no such model, it is broken, or its training failed.
    """
    if settings.fairseq_checkpoint:
        return load_fairseq_model(settings.fairseq_checkpoint, device=device, key=key and KEY)
    source = train_if_recipe(settings.name_or_path)
    speech = load_speech_model(source, device=device, revision=settings.revision, key=key)
    speech.name = Path(settings.name_or_path).name
    return speech


def train_if_recipe(name_or_path: str) -> str:
    """Give the folder of a recipe's model, which is trained on first use; give any other name or path back.

    Raises:
        UserError: The training failed.
    """
    if name_or_path not in _recipes():
        return name_or_path
    folder = trained_model_folder(name_or_path)
    with locked(folder.with_suffix(".lock")):  # parallel jobs wait for the first one to train
        if (folder / TRAINING).is_file():
            if not (folder / CHECKSUMS).is_file():  # its training was the last thing before a kill
                write_checksums(folder)
            damaged = damage(folder)
            if damaged is None:
                return str(folder)
            print_warning(f"{folder / damaged} is damaged; {name_or_path} is trained again")
            shutil.rmtree(folder)
        # In a subprocess, because training changes the state of PyTorch, which a run must not depend on.
        command = [sys.executable, "-m", "sparsewav.training", f"recipe={name_or_path}", f"output={folder}"]
        if subprocess.run(command, check=False).returncode:
            raise UserError(
                f"the training of {name_or_path} failed (its messages are above); the same command goes on where it "
                "stopped"
            )
        write_checksums(folder)
    return str(folder)


def present_folder(name_or_path: str, revision: str | None = None) -> Path | None:
    """Give the folder on this machine that a model would be loaded from, without training or fetching anything.

    ``revision`` is the branch, tag or commit of a model on the hub.

    Raises:
        UserError: The folder that is named does not exist.
    """
    if name_or_path in _recipes():
        folder = trained_model_folder(name_or_path)
        return folder if (folder / TRAINING).is_file() else None
    return hub.present(name_or_path, revision) if is_on_hub(name_or_path) else Path(locate_model(name_or_path))


def is_on_hub(name_or_path: str, key: str = "model.name_or_path") -> bool:
    """Tell whether a model that is named is neither a recipe's nor in a folder.

    Raises:
        UserError: The folder that is named does not exist.
    """
    return name_or_path not in _recipes() and not Path(locate_model(name_or_path, key)).is_dir()


def trained_model_folder(recipe: str) -> Path:
    """Give the folder in the cache that holds the model of a recipe once it is trained.

    The folder's name changes with the recipe, and with the recipe of a model that it starts from.
    """
    conf = conf_folder()
    digest = hashlib.blake2b(digest_size=4)
    patterns = ["train.yaml", "architecture/*.yaml", "training/dense.yaml", "data/demo.yaml"]
    for pattern in [*patterns, *(f"recipe/{name}.yaml" for name in lineage(recipe))]:
        for path in sorted(conf.glob(pattern)):
            digest.update(path.read_bytes())
    return cache_folder() / "models" / f"{recipe}-{digest.hexdigest()}"


def lineage(recipe: str) -> list[str]:
    """Give a recipe and the recipes of the models that its training starts from, each after its successor."""
    names = [recipe]
    while (initial := _recipe(names[-1])["initial_model"]) in _recipes():
        names.append(initial)
    return names


@cache
def _recipes() -> list[str]:
    return sorted(path.stem for path in (conf_folder() / "recipe").glob("*.yaml"))


def _recipe(name: str) -> dict[str, Any]:
    return yaml.safe_load((conf_folder() / "recipe" / f"{name}.yaml").read_text(encoding="utf-8"))
