"""Recipes: models that are trained as a file in ``conf/recipe`` says on first use, and kept in the cache."""

import hashlib
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml

from sparsewav.errors import UserError
from sparsewav.files import cache_folder, conf_folder, locked
from sparsewav.models.load import SpeechModel, load_fairseq_model, load_speech_model
from sparsewav.settings.run import Model


def load_or_train(settings: Model, device: torch.device | str = "cpu") -> SpeechModel:
    """Load the model that the settings name; the model of a recipe is trained first if it is not in the cache.

    Raises:
        UserError: There is no such model, it is broken, or its training failed.
    """
    if settings.fairseq_checkpoint:
        return load_fairseq_model(settings.fairseq_checkpoint, device=device)
    speech = load_speech_model(train_if_recipe(settings.name_or_path), device=device)
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
    if (folder / "training.json").is_file():
        return str(folder)
    with locked(folder.with_suffix(".lock")):  # parallel jobs wait for the first one to train
        # In a subprocess, because training changes the state of PyTorch, which a run must not depend on.
        command = [sys.executable, "-m", "sparsewav.training", f"recipe={name_or_path}", f"output={folder}"]
        if subprocess.run(command, check=False).returncode:
            raise UserError(
                f"the training of {name_or_path} failed (its messages are above); the same command goes on where it "
                "stopped"
            )
    return str(folder)


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
