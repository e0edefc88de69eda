"""CTC speech models: loading them with their processors, from the hub, a folder or this package."""

import hashlib
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCTC,
    PreTrainedModel,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Processor,
)

import sparsewav.models.fithubert
import sparsewav.models.structured  # noqa: F401  (the same)
from sparsewav.errors import UserError
from sparsewav.files import cache_folder, conf_folder, locked
from sparsewav.models.bitmask import BITMASK_WEIGHTS, load
from sparsewav.models.fairseq import converted_folder
from sparsewav.pruning.encoder import check_family
from sparsewav.settings.run import ModelConfig

DEMO_MODEL = "demo"
"""Name of the model that ships with the package."""


@dataclass
class SpeechModel:
    """A CTC model with its processor, and the name under which results speak of it."""

    name: str
    model: PreTrainedModel
    processor: Wav2Vec2Processor


def choose_device(name: str) -> torch.device:
    """Turn ``auto`` into a CUDA GPU if there is one; never another device than the one asked for by name.

    Apple's MPS is left out: it has no float64, in which sensitivities and layer errors are summed.

    Raises:
        UserError: the device is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device={name} is not there; choose device=cpu or device=auto")
    return device


def locate_model(name_or_path: str, key: str = "model.name_or_path") -> str:
    """Give the folder of a model, or its name on the hub; a model of the demo's cast is trained first if need be.

    Args:
        name_or_path: ``demo``, the name of a recipe in ``conf/recipe``, a local folder of a model or of a run, or
            a name on the hub.
        key: the setting that names the model, for messages.

    Raises:
        UserError: the folder is not there, or the training failed.
    """
    if name_or_path == DEMO_MODEL:
        return str(files("sparsewav") / "models" / "demo")
    if name_or_path in _recipes():
        return str(_trained_model(name_or_path))
    folder = Path(name_or_path).expanduser()
    if not folder.is_dir():
        if name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1:
            raise UserError(f"{key}={name_or_path} is not a folder; check the path")
        return name_or_path  # on the hub
    if not (folder / "config.json").is_file() and (folder / "model" / "config.json").is_file():
        return str(folder / "model")  # of a run
    return str(folder)


@cache
def _recipes() -> list[str]:
    return sorted(path.stem for path in (conf_folder() / "recipe").glob("*.yaml"))


def trained_model_folder(recipe: str) -> Path:
    """Where the model of a recipe lies in the cache, trained or not yet.

    A changed recipe gives another folder, and so does that of a model that it starts from.
    """
    conf = conf_folder()
    digest = hashlib.blake2b(digest_size=4)
    patterns = ["train.yaml", "architecture/*.yaml", "training/dense.yaml", "data/demo.yaml"]
    for pattern in [*patterns, *(f"recipe/{name}.yaml" for name in lineage(recipe))]:
        for path in sorted(conf.glob(pattern)):
            digest.update(path.read_bytes())
    return cache_folder() / "models" / f"{recipe}-{digest.hexdigest()}"


def lineage(recipe: str) -> list[str]:
    """Recipes that have to be trained for a recipe's model: itself, and those of the models that it starts from."""
    names = [recipe]
    while (initial := _recipe(names[-1])["initial_model"]) in _recipes():
        names.append(initial)
    return names


def _recipe(name: str) -> dict[str, Any]:
    return yaml.safe_load((conf_folder() / "recipe" / f"{name}.yaml").read_text(encoding="utf-8"))


def _trained_model(recipe: str) -> Path:
    folder = trained_model_folder(recipe)
    if (folder / "training.json").is_file():
        return folder
    with locked(folder.with_suffix(".lock")):  # parallel jobs wait for the first one to train
        # A process of its own: training leaves its marks on PyTorch's state, and a run must not depend on them.
        command = [sys.executable, "-m", "sparsewav.training", f"recipe={recipe}", f"output={folder}"]
        if subprocess.run(command, check=False).returncode:
            raise UserError(
                f"the training of {recipe} failed (its messages are above); the same command goes on where it stopped"
            )
    return folder


def load_speech_model(
    name_or_path: str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> SpeechModel:
    """Load a CTC model and its processor.

    Args:
        name_or_path: as :func:`locate_model` takes it.
        dtype: of the weights in memory.
        device: where to put the model.

    Raises:
        UserError: there is no such model, its family is unknown, or its folder lacks a piece.
    """
    source = locate_model(name_or_path)
    model = load_pretrained(source, dtype, "model.name_or_path", name_or_path)
    processor = load_processor(source)
    if len(processor.tokenizer) < model.config.vocab_size:
        raise UserError(
            f"model.name_or_path={name_or_path}: the tokenizer has {len(processor.tokenizer)} tokens and the model "
            f"writes {model.config.vocab_size}; take the tokenizer that the model was trained with"
        )
    model.eval().to(device)
    name = Path(name_or_path).name
    return SpeechModel(name, model, processor)


def load_fairseq_model(
    checkpoint: str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> SpeechModel:
    """Load a CTC model from a file that fairseq saved; its name is the file's, without the suffix.

    Args:
        checkpoint: as :func:`sparsewav.models.fairseq.converted_folder` takes it.
        dtype: of the weights in memory.
        device: where to put the model.

    Raises:
        UserError: the file is not there, or is not such a model.
    """
    speech = load_speech_model(str(converted_folder(checkpoint)), dtype, device)
    speech.name = Path(checkpoint).stem
    return speech


def load_chosen_model(settings: ModelConfig, device: torch.device | str = "cpu") -> SpeechModel:
    """Load what the settings name: fairseq's file, if there is one, and else the folder or name.

    Raises:
        UserError: as :func:`load_fairseq_model` or :func:`load_speech_model`.
    """
    if settings.fairseq_checkpoint:
        return load_fairseq_model(settings.fairseq_checkpoint, device=device)
    return load_speech_model(settings.name_or_path, device=device)


def load_pretrained(
    source: str, dtype: torch.dtype, key: str, name: str | None = None, **changes: Any
) -> PreTrainedModel:
    """Load a CTC model without its processor.

    Args:
        source: a folder or a name on the hub.
        dtype: of the weights in memory.
        key: the setting that names the model, for messages.
        name: what the setting says, if it is not ``source``.
        changes: to the model's configuration.

    Raises:
        UserError: there is no such model, its family is unknown, or its weights are broken.
    """
    called = f"{key}={name or source}"
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise UserError(
            f"{called} cannot be loaded: {_first_line(error)} "
            "(give a folder with config.json, or a name on the hub and a network to fetch it)"
        ) from error
    check_family(config.model_type, name or source)
    if (Path(source) / BITMASK_WEIGHTS).is_file():
        return load(source, dtype)
    try:
        return AutoModelForCTC.from_pretrained(source, dtype=dtype, **changes)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"the weights of {called} cannot be loaded: {_first_line(error)}") from error


@torch.no_grad()
def take_over(model: PreTrainedModel, initial: PreTrainedModel, without: Sequence[str] = ()) -> int:
    """Copy parameters and buffers into a model wherever name, below the family's prefix, and shape agree.

    Args:
        model: Changed in place.
        initial: Where the values come from.
        without: Parts of the names that are not copied.

    Returns:
        How many values were copied.
    """
    state = model.state_dict()
    prefix, initial_prefix = f"{model.base_model_prefix}.", f"{initial.base_model_prefix}."
    taken = 0
    for name, tensor in initial.state_dict().items():
        own = state.get(prefix + name.removeprefix(initial_prefix) if name.startswith(initial_prefix) else name)
        if own is not None and own.shape == tensor.shape and not any(part in name for part in without):
            own.copy_(tensor)
            taken += tensor.numel()
    return taken


def load_processor(source: str) -> Wav2Vec2Processor:
    """Load feature extractor and character tokenizer from a folder or the hub.

    Raises:
        UserError: one of the two is missing.
    """
    try:
        feature_extractor = Wav2Vec2FeatureExtractor.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UserError(f"{source} has no preprocessor_config.json; copy it from the model's origin") from error
    try:
        tokenizer = Wav2Vec2CTCTokenizer.from_pretrained(source)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{source} has no tokenizer (vocab.json); a CTC model needs one to write letters: copy it from the "
            "model's origin, or fine-tune the model for speech recognition first"
        ) from error
    return Wav2Vec2Processor(feature_extractor, tokenizer)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
