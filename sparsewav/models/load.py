"""Speech models, with a CTC head or without: loading them with their processors, from the hub, a folder or here."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoModelForCTC, PreTrainedModel

import sparsewav.models.fithubert
import sparsewav.models.structured  # noqa: F401  (both imports register the package's own classes with transformers)
from sparsewav.errors import UserError
from sparsewav.models import hub
from sparsewav.models.bitmask import BITMASK_WEIGHTS, read_model
from sparsewav.models.checkpoint import INDEX, WEIGHTS, first_line, named, read_pickled_headers, refuse_exported
from sparsewav.models.fairseq import KEY, converted_folder
from sparsewav.models.processor import Processor, agree_on_audio, agree_on_tokens, load_processor
from sparsewav.models.skeleton import MASK_EMBEDDING, check_tensors, is_encoder, load_whole, make_skeleton, read_config
from sparsewav.pruning.encoder import base_of, has_head

DEMO_MODEL = "demo"
"""Name of the model that ships with the package."""


@dataclass(repr=False)
class SpeechModel:
    """A CTC model or an encoder without a head, with its processor.

    Attributes:
        name: The name that it has in results.
        model: The model.
        processor: Its feature extractor and tokenizer; an encoder has no tokenizer.
        warnings: Sentences for the user about what was assumed in loading it.
        folder: Where its files are; of a model of the hub, the folder of a commit in the hub's cache.
    """

    name: str
    model: PreTrainedModel
    processor: Processor
    warnings: list[str] = field(default_factory=list)
    folder: Path | None = None

    @property
    def writes(self) -> bool:
        """Whether the model writes text; an encoder does not."""
        return self.processor.tokenizer is not None

    def __repr__(self) -> str:
        parameters = list(self.model.parameters())
        if any(parameter.is_meta for parameter in parameters):  # an exported model, whose weights are in its file
            return f"<{type(self).__name__} {self.name}: {self.model!r}>"
        total = sum(parameter.numel() for parameter in parameters)
        zero = total - sum(int(parameter.count_nonzero()) for parameter in parameters)
        dtype, device = str(self.model.dtype).removeprefix("torch."), self.model.device
        described = f"{type(self.model).__name__}, {total:,} parameters ({zero / total:.1%} zero), {dtype} on {device}"
        lines = [f"{self.name}: {described}", *(f"! {warning}" for warning in self.warnings)]
        return f"<{type(self).__name__} " + "\n  ".join(lines) + ">"


def require_speech_model(speech: object) -> None:
    """Refuse a name or a bare model where a model with its processor is needed.

    Raises:
        UserError: It is no :class:`SpeechModel`.
    """
    if not isinstance(speech, SpeechModel):
        raise UserError(f"the model is of type {type(speech).__name__}; give what sparsewav.load_model returns")


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
        key: The setting that names the model, for messages; empty for an argument that has no name.

    Raises:
        UserError: The folder does not exist, or is a file.
    """
    if name_or_path == DEMO_MODEL:
        return str(files("sparsewav") / "models" / "demo")
    folder = Path(name_or_path).expanduser()
    if folder.is_file():
        refuse_exported(folder)
        raise UserError(f"{named(key, name_or_path)} is a file; give the folder that has it and the config.json")
    if not folder.is_dir():
        if name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1:
            raise UserError(f"{named(key, name_or_path)} is not a folder; check the path")
        return name_or_path  # on the hub
    if not (folder / "config.json").is_file() and (folder / "model" / "config.json").is_file():
        return str(folder / "model")  # of a run
    return str(folder)


def load(path: str | Path, dtype: torch.dtype | None = None, revision: str | None = None) -> PreTrainedModel:
    """Load a model without its processor; :func:`sparsewav.load_model` loads it with one.

    Args:
        path: What :func:`locate_model` takes, in dense or bitmask format.
        dtype: Type of the weights in memory. None keeps the stored one, bit for bit.
        revision: A branch, a tag or a commit on the hub; None for the main branch.

    Returns:
        The model in evaluation mode, on the CPU.

    Raises:
        UserError: There is no such model, or a broken one.
    """
    return load_pretrained(str(find_model(str(path), "", revision)), dtype, "", str(path))


def find_model(name_or_path: str, key: str = "model.name_or_path", revision: str | None = None) -> Path:
    """Give the folder of a model; the files of one on the hub are fetched first.

    Args:
        name_or_path: As in :func:`locate_model`.
        key: The setting that names the model, for messages.
        revision: A branch, a tag or a commit on the hub; None for the main branch.

    Raises:
        UserError: There is no such model, or a revision is given with a folder.
    """
    source = locate_model(name_or_path, key)
    if not Path(source).is_dir():
        return hub.fetch(source, revision, key)
    if revision is not None:
        raise UserError(
            f"{named(key, name_or_path)} is no name on the hub, and only those have a revision; leave it out"
        )
    return Path(source)


def load_speech_model(
    name_or_path: str,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    key: str = "model.name_or_path",
) -> SpeechModel:
    """Load a CTC model, or an encoder without a head, and its processor.

    :func:`find_model` says what it may be named, and what the key is.

    Raises:
        UserError: There is no such model, its family is unknown, or a file is missing.
    """
    folder = find_model(name_or_path, key, revision)
    source = str(folder)
    called = named(key, name_or_path)
    warnings: list[str] = []
    model = load_pretrained(source, dtype, key, name_or_path, notes=warnings)
    processor = load_processor(source, has_head=has_head(model))
    if processor.tokenizer is not None:
        warnings += agree_on_tokens(model, processor, called)
    warnings += agree_on_audio(model, processor, called)
    masks = getattr(model.config, "apply_spec_augment", True)  # as in transformers: data2vec-audio need not say it
    for parameter, tensor in model.named_parameters():
        if parameter.endswith(MASK_EMBEDDING) and masks and not tensor.any():
            warnings.append(f"{parameter}, to which tuning sets masked frames, is zero, as where a checkpoint lacks it")
    placed: Any = model
    placed.to(device)
    return SpeechModel(Path(name_or_path).name, model, processor, warnings, folder)


def load_fairseq_model(
    checkpoint: str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", key: str = KEY
) -> SpeechModel:
    """Load a CTC model from a file of fairseq; its name is that of the file without the suffix.

    Raises:
        UserError: The file does not exist, or :func:`~sparsewav.models.fairseq.converted_folder` refuses it.
    """
    speech = load_speech_model(str(converted_folder(checkpoint, key)), dtype, device)
    speech.name = Path(checkpoint).stem
    return speech


def load_pretrained(
    source: str, dtype: torch.dtype | None, key: str, name: str | None = None, *, notes: list[str] | None = None
) -> PreTrainedModel:
    """Load a CTC model, or an encoder without a head, in evaluation mode and without its processor.

    Args:
        source: A folder.
        dtype: Type of the weights in memory; None for the stored one.
        key: The setting that names the model, for messages.
        name: The value of that setting, if it is not ``source``.
        notes: Gets a sentence about what was left out.

    Raises:
        UserError: There is no such model, its family is unknown, or its weights are broken or those of another model.
    """
    called = named(key, name or source)
    config = read_config(source, called)
    folder = Path(source)
    readable = any((folder / file).is_file() for file in (WEIGHTS, INDEX, BITMASK_WEIGHTS))
    if not readable:
        refuse_exported(folder)
    try:
        if readable:
            return read_model(folder, dtype, notes)
        headers = read_pickled_headers(folder)
        if not headers:
            raise UserError(
                f"{source} has no weights ({WEIGHTS} or {BITMASK_WEIGHTS}); give the whole folder of a model"
            )
        check_tensors(make_skeleton(config, headers, source), headers, source)
        kind = AutoModel if is_encoder(config, headers) else AutoModelForCTC
        options: dict[str, Any] = {"config": config, "dtype": dtype or "auto", "trust_remote_code": False}
        return load_whole(kind.from_pretrained, source, source, notes=notes, **options).eval()
    except Exception as error:  # a broken checkpoint raises almost any error
        raise UserError(f"the weights of {called} cannot be loaded: {first_line(error)}") from error


def _base_prefix(model: PreTrainedModel) -> str:
    """Give what the names of a model's tensors below its head start with; nothing for an encoder."""
    base = base_of(model)
    return next(f"{name}." if name else "" for name, module in model.named_modules() if module is base)


@torch.no_grad()
def take_over(model: PreTrainedModel, initial: PreTrainedModel, without: Sequence[str] = ()) -> list[str]:
    """Copy parameters and buffers into a CTC model wherever shape and name (without the family's prefix) agree.

    Args:
        model: Changed in place.
        initial: Where the values come from, with a head or without.
        without: Parts of the names that are not copied.

    Returns:
        The names of the model's parameters and buffers that nothing was copied to.
    """
    state = model.state_dict()
    prefix, initial_prefix = _base_prefix(model), _base_prefix(initial)
    left = dict(state)
    for name, tensor in initial.state_dict().items():
        own_name = prefix + name.removeprefix(initial_prefix) if name.startswith(initial_prefix) else name
        own = state.get(own_name)
        if own is not None and own.shape == tensor.shape and not any(part in name for part in without):
            own.copy_(tensor)
            del left[own_name]
    return list(left)
