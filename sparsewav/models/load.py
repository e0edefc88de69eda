"""CTC speech models: loading them with their processors, from the hub, a folder or this package."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCTC,
    PreTrainedModel,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Processor,
)

import sparsewav.models.fithubert
import sparsewav.models.structured  # noqa: F401  (both imports register the package's own classes with transformers)
from sparsewav.errors import UserError
from sparsewav.models import hub
from sparsewav.models.bitmask import (
    BITMASK_WEIGHTS,
    load,  # noqa: F401  (imported from here, it knows the package's own classes)
    read_model,
)
from sparsewav.models.checkpoint import (
    INDEX,
    OPTIONAL,
    WEIGHTS,
    check_tensors,
    first_line,
    load_whole,
    make_skeleton,
    read_config,
    read_pickled_headers,
)
from sparsewav.models.fairseq import converted_folder

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
        folder: Where its files are; of a model of the hub, the folder of a commit in the hub's cache.
    """

    name: str
    model: PreTrainedModel
    processor: Wav2Vec2Processor
    warnings: list[str] = field(default_factory=list)
    folder: Path | None = None


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
        raise UserError(f"{key}={name_or_path} is no name on the hub, and only those have a revision; leave it out")
    return Path(source)


def load_speech_model(
    name_or_path: str,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    revision: str | None = None,
) -> SpeechModel:
    """Load a CTC model and its processor; :func:`find_model` says what they may be named.

    Raises:
        UserError: There is no such model, its family is unknown, or a file is missing.
    """
    folder = find_model(name_or_path, revision=revision)
    source = str(folder)
    called = f"model.name_or_path={name_or_path}"
    model = load_pretrained(source, dtype, "model.name_or_path", name_or_path)
    processor = load_processor(source)
    warnings = [*_agree_on_tokens(model, processor, called), *_agree_on_audio(model, processor, called)]
    masks = getattr(model.config, "apply_spec_augment", True)  # as in transformers: data2vec-audio need not say it
    for parameter, tensor in model.named_parameters():
        if parameter.endswith(OPTIONAL) and masks and not tensor.any():
            warnings.append(f"{parameter}, to which tuning sets masked frames, is zero, as where a checkpoint lacks it")
    placed: Any = model
    placed.to(device)
    return SpeechModel(Path(name_or_path).name, model, processor, warnings, folder)


def _agree_on_tokens(model: PreTrainedModel, processor: Wav2Vec2Processor, called: str) -> list[str]:
    """Make the model's loss write the tokens that its tokenizer reads.

    Returns:
        Sentences about what was changed.

    Raises:
        UserError: The tokenizer is of another model, or has no blank.
    """
    tokenizer: Any = processor.tokenizer
    vocabulary, outputs = tokenizer.get_vocab(), model.config.vocab_size
    if len(tokenizer) < outputs:
        raise UserError(
            f"{called}: the tokenizer has {len(tokenizer)} tokens and the model "
            f"writes {outputs}; take the tokenizer that the model was trained with"
        )
    by_output: dict[int, list[str]] = {}
    for token, index in vocabulary.items():
        by_output.setdefault(index, []).append(token)
    for index in range(outputs):
        tokens = by_output.get(index, [])
        if len(tokens) != 1:
            raise UserError(
                f"{called}: vocab.json names {len(tokens)} tokens for output {index} of the model "
                f"({' '.join(tokens) or 'none'}); take the tokenizer that the model was trained with"
            )
    blank = tokenizer.pad_token_id
    if blank is None or tokenizer.pad_token not in vocabulary or not 0 <= blank < outputs:
        raise UserError(
            f"{called}: the tokenizer's pad_token, which is the CTC blank, is {tokenizer.pad_token} and none of the "
            f"model's {outputs} outputs; name the blank in tokenizer_config.json"
        )
    # Labels never have these; tokenizers add them behind the vocabulary of a model that was trained without.
    beyond = {token for token, index in vocabulary.items() if index >= outputs} - set(tokenizer.all_special_tokens)
    if beyond:
        raise UserError(
            f"{called}: the tokenizer writes {' '.join(sorted(beyond)[:5])}, which is none of the model's {outputs} "
            "outputs; take the tokenizer that the model was trained with"
        )
    if model.config.pad_token_id == blank:
        return []
    said, model.config.pad_token_id = model.config.pad_token_id, blank
    return [
        f"config.json says pad_token_id={said}, and the tokenizer's blank is {blank} ({tokenizer.pad_token}); the CTC "
        f"loss takes {blank}, as the decoding does"
    ]


SAMPLING_RATE = 16_000
"""Samples a second that all published models of the supported families hear."""


def _agree_on_audio(model: PreTrainedModel, processor: Wav2Vec2Processor, called: str) -> list[str]:
    """Compare the feature extractor with what the model was trained on.

    Returns:
        Sentences about what was changed, and about what is suspicious.

    Raises:
        UserError: The feature extractor is of another model.
    """
    extractor: Any = processor.feature_extractor
    rate = getattr(model.config, "sampling_rate", None) or SAMPLING_RATE
    for key, value in (("sampling_rate", rate), ("feature_size", 1), ("padding_side", "right"), ("padding_value", 0)):
        if getattr(extractor, key, value) != value:
            raise UserError(
                f"{called}: the preprocessor's settings say {key}={getattr(extractor, key)}, and the model takes "
                f"{value}; correct preprocessor_config.json"
                + (", or say sampling_rate in config.json if the model was trained so" if "rate" in key else "")
            )
    warnings = []
    norm = getattr(model.config, "feat_extract_norm", None)  # data2vec-audio has none
    if norm == "layer" and not extractor.do_normalize:
        warnings.append(
            "the preprocessor's settings say do_normalize=false, and models with feat_extract_norm=layer are commonly "
            "trained on normalized audio; if the word error rate is high, set it to true"
        )
    wanted = norm == "layer"
    if norm and extractor.return_attention_mask != wanted:
        extractor.return_attention_mask = wanted
        warnings.append(
            f"the preprocessor's settings say return_attention_mask={str(not wanted).lower()}, and a model with "
            f"feat_extract_norm={norm} takes {'a' if wanted else 'no'} mask; no result here depends on it, and what is "
            "saved is corrected"
        )
    return warnings


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
    source: str, dtype: torch.dtype, key: str, name: str | None = None, *, head_optional: bool = False
) -> PreTrainedModel:
    """Load a CTC model without its processor, in evaluation mode.

    Args:
        source: A folder.
        dtype: Type of the weights in memory.
        key: The setting that names the model, for messages.
        name: The value of that setting, if it is not ``source``.
        head_optional: Take a pretrained encoder, too; the model then has no ``lm_head``.

    Raises:
        UserError: There is no such model, its family is unknown, or its weights are broken or those of another model.
    """
    called = f"{key}={name or source}"
    config = read_config(source, called)
    folder = Path(source)
    try:
        if any((folder / file).is_file() for file in (WEIGHTS, INDEX, BITMASK_WEIGHTS)):
            return read_model(folder, dtype, head_optional=head_optional)
        if headers := read_pickled_headers(folder):
            skeleton = make_skeleton(config, headers, source)
            check_tensors(skeleton, headers, source, head_optional=head_optional)
        options: dict[str, Any] = {"config": config, "dtype": dtype, "trust_remote_code": False}
        return load_whole(
            AutoModelForCTC.from_pretrained, source, source, head_optional=head_optional, **options
        ).eval()
    except Exception as error:  # a broken checkpoint raises almost any error
        raise UserError(f"the weights of {called} cannot be loaded: {first_line(error)}") from error


@torch.no_grad()
def take_over(model: PreTrainedModel, initial: PreTrainedModel, without: Sequence[str] = ()) -> list[str]:
    """Copy parameters and buffers into a model wherever shape and name (without the family's prefix) agree.

    Args:
        model: Changed in place.
        initial: Where the values come from.
        without: Parts of the names that are not copied.

    Returns:
        The names of the model's parameters and buffers that nothing was copied to.
    """
    state = model.state_dict()
    prefix, initial_prefix = f"{model.base_model_prefix}.", f"{initial.base_model_prefix}."
    left = dict(state)
    for name, tensor in initial.state_dict().items():
        own_name = prefix + name.removeprefix(initial_prefix) if name.startswith(initial_prefix) else name
        own = state.get(own_name)
        if own is not None and own.shape == tensor.shape and not any(part in name for part in without):
            own.copy_(tensor)
            del left[own_name]
    return list(left)


def load_processor(source: str) -> Wav2Vec2Processor:
    """Load the feature extractor and the character tokenizer from a folder.

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
    tokenizer.clean_up_tokenization_spaces = False  # of English text: it would join words such as 's to the one before
    return Wav2Vec2Processor(feature_extractor, tokenizer)
