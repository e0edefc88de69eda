"""CTC speech models: loading them with their processors, from the hub, a folder or this package."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
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
import sparsewav.models.structured  # noqa: F401  (both imports register the package's own classes with transformers)
from sparsewav.errors import UserError
from sparsewav.models.bitmask import BITMASK_WEIGHTS, load
from sparsewav.models.fairseq import converted_folder
from sparsewav.pruning.encoder import check_family

DEMO_MODEL = "demo"
"""Name of the model that ships with the package."""


@dataclass
class SpeechModel:
    """A CTC model with its processor.

    Attributes:
        name: The name that it has in results.
        model: The model.
        processor: Its feature extractor and tokenizer.
        warnings: Sentences for the user about what was assumed in loading it.
    """

    name: str
    model: PreTrainedModel
    processor: Wav2Vec2Processor
    warnings: list[str] = field(default_factory=list)


def choose_device(name: str) -> torch.device:
    """Turn ``auto`` into a CUDA GPU if there is one and the CPU otherwise; a device that is named is never replaced.

    Apple's MPS is never chosen: it has no float64, in which sensitivities and layer errors are summed.

    Raises:
        UserError: The device does not exist.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device={name} is not there; choose device=cpu or device=auto")
    return device


def locate_model(name_or_path: str, key: str = "model.name_or_path") -> str:
    """Give the folder of a model, or its name on the hub.

    Args:
        name_or_path: ``demo``, the folder of a model or of a run, or a name on the hub.
        key: The setting that names the model, for messages.

    Raises:
        UserError: The folder does not exist.
    """
    if name_or_path == DEMO_MODEL:
        return str(files("sparsewav") / "models" / "demo")
    folder = Path(name_or_path).expanduser()
    if not folder.is_dir():
        if name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1:
            raise UserError(f"{key}={name_or_path} is not a folder; check the path")
        return name_or_path  # on the hub
    if not (folder / "config.json").is_file() and (folder / "model" / "config.json").is_file():
        return str(folder / "model")  # of a run
    return str(folder)


def load_speech_model(
    name_or_path: str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> SpeechModel:
    """Load a CTC model and its processor; :func:`locate_model` says what they may be named.

    Raises:
        UserError: There is no such model, its family is unknown, or a file is missing.
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
    return SpeechModel(Path(name_or_path).name, model, processor)


def load_fairseq_model(
    checkpoint: str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> SpeechModel:
    """Load a CTC model from a file of fairseq; its name is that of the file without the suffix.

    Raises:
        UserError: The file does not exist, or :func:`~sparsewav.models.fairseq.converted_folder` refuses it.
    """
    speech = load_speech_model(str(converted_folder(checkpoint)), dtype, device)
    speech.name = Path(checkpoint).stem
    return speech


def load_pretrained(
    source: str, dtype: torch.dtype, key: str, name: str | None = None, **changes: Any
) -> PreTrainedModel:
    """Load a CTC model without its processor.

    Args:
        source: A folder or a name on the hub.
        dtype: Type of the weights in memory.
        key: The setting that names the model, for messages.
        name: The value of that setting, if it is not ``source``.
        changes: Changes to the model's configuration.

    Raises:
        UserError: There is no such model, its family is unknown, or its weights are broken.
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
    """Copy parameters and buffers into a model wherever shape and name (without the family's prefix) agree.

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
    """Load the feature extractor and the character tokenizer from a folder or the hub.

    Raises:
        UserError: One of the two is missing.
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
