"""CTC speech models: loading them with their processors, from the hub, a folder or this package."""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

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

from sparsewav.errors import UserError
from sparsewav.pruning.encoder import check_family

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


def demo_model_folder() -> Path:
    """Where the shipped demo model lies."""
    return Path(str(files("sparsewav"))) / "demo_model"


def load_speech_model(
    name_or_path: str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> SpeechModel:
    """Load a CTC model and its processor.

    Args:
        name_or_path: ``demo``, a local folder, or a name on the hub.
        dtype: of the weights in memory.
        device: where to put the model.

    Raises:
        UserError: there is no such model, its family is unknown, or its folder lacks a piece.
    """
    source = str(demo_model_folder()) if name_or_path == DEMO_MODEL else name_or_path
    looks_local = source.startswith((".", "/", "~")) or source.count("/") > 1
    if looks_local:
        source = str(Path(source).expanduser())
        if not Path(source).is_dir():
            raise UserError(f"model.name_or_path={name_or_path} is not a folder; check the path")
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise UserError(
            f"model.name_or_path={name_or_path} cannot be loaded: {_first_line(error)} "
            "(give a folder with config.json, or a name on the hub and a network to fetch it)"
        ) from error
    check_family(config.model_type, name_or_path)
    processor = load_processor(source)
    try:
        model = AutoModelForCTC.from_pretrained(source, dtype=dtype)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"the weights of model.name_or_path={name_or_path} cannot be loaded: {_first_line(error)}"
        ) from error
    if len(processor.tokenizer) < model.config.vocab_size:
        raise UserError(
            f"model.name_or_path={name_or_path}: the tokenizer has {len(processor.tokenizer)} tokens and the model "
            f"writes {model.config.vocab_size}; take the tokenizer that the model was trained with"
        )
    model.eval().to(device)
    name = name_or_path if name_or_path == DEMO_MODEL else Path(name_or_path).name
    return SpeechModel(name, model, processor)


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
