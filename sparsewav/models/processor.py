"""Processors: the feature extractor and the tokenizer of a model, of any kind, compared with the model."""

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from transformers import (
    AutoFeatureExtractor,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Processor,
)

from sparsewav.errors import UserError
from sparsewav.models.checkpoint import first_line

SAMPLING_RATE = 16_000
"""Samples a second that all published models of the supported families hear."""

BLANKS = ("<pad>", "[PAD]", "<blank>", "[BLANK]", "<blk>", "<s>", "<eps>")
"""Names of the CTC blank in published vocabularies; a tokenizer that names none may have one of these."""


class Processor(Protocol):
    """The feature extractor of a model, and its tokenizer, which is None for an encoder without a head.

    Any processor of transformers with these two is one.
    """

    feature_extractor: Any
    tokenizer: Any

    def save_pretrained(self, save_directory: Any, /) -> Any:
        """Write both into a folder, where :func:`load_processor` finds them."""


@dataclass
class Parts:
    """A processor where transformers has no class of one, and that of an encoder without a head."""

    feature_extractor: Any
    tokenizer: Any = None

    def save_pretrained(self, save_directory: Any, /) -> None:
        """Write what is there, each with its own settings."""
        for part in (self.feature_extractor, self.tokenizer):
            if part is not None:
                part.save_pretrained(save_directory)


def load_processor(source: str, *, has_head: bool = True) -> Processor:
    """Load the feature extractor and the tokenizer from a folder or the hub; code that they name is never run.

    Args:
        source: The folder, or the name on the hub.
        has_head: Whether the model writes text; without, the processor has no tokenizer.

    Raises:
        UserError: One of the two is missing or broken.
    """
    extractor = _load_feature_extractor(source)
    if not has_head:
        return Parts(extractor)
    tokenizer = _load_tokenizer(source)
    tokenizer.clean_up_tokenization_spaces = False  # of English text: it would join words such as 's to the one before
    if isinstance(extractor, Wav2Vec2FeatureExtractor):
        return Wav2Vec2Processor(extractor, tokenizer)
    with suppress(Exception):  # a class of another library, or none: its parts are all that is read
        whole: Any = AutoProcessor.from_pretrained(source, trust_remote_code=False)
        if {"feature_extractor", "tokenizer"} <= vars(whole).keys():
            whole.feature_extractor, whole.tokenizer = extractor, tokenizer
            return whole
    return Parts(extractor, tokenizer)


def _load_feature_extractor(source: str) -> Any:
    try:
        return AutoFeatureExtractor.from_pretrained(source, trust_remote_code=False)
    except ImportError as error:
        raise UserError(f"the feature extractor of {source} needs a package: {first_line(error)}") from error
    except Exception as error:  # a broken file raises almost any error
        settings = Path(source) / "preprocessor_config.json"
        if not settings.is_file():
            raise UserError(f"{source} has no preprocessor_config.json; copy it from the model's origin") from error
        named = None
        with suppress(Exception):  # of a family that transformers has no entry for, and settings that name no class
            named = json.loads(settings.read_bytes()).get("feature_extractor_type")
            if named is None:
                return Wav2Vec2FeatureExtractor.from_pretrained(source)
        wrong = f"names the feature extractor {named}, which cannot be loaded" if named else "is damaged"
        raise UserError(f"{settings} {wrong}; copy it again from the model's origin") from error


def _load_tokenizer(source: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        whole = Path(source) / "tokenizer.json"
        if whole.is_file():
            raise UserError(
                f"{whole} cannot be read ({first_line(error)}); copy it again from the model's origin"
            ) from error
        with suppress(Exception):  # of a family that transformers has no entry for, with a vocab.json
            return Wav2Vec2CTCTokenizer.from_pretrained(source)
        raise UserError(
            f"{source} has no tokenizer (vocab.json or tokenizer.json); a CTC model needs one to write letters: copy "
            "it from the model's origin, or fine-tune the model for speech recognition first"
        ) from error


def describe(processor: Processor) -> dict[str, Any]:
    """Give what a processor's features, labels and texts depend on, for the identity of cached results."""
    tokenizer = processor.tokenizer
    features = {"feature_extractor": processor.feature_extractor.to_json_string()}
    if tokenizer is None:
        return features
    backend = getattr(tokenizer, "backend_tokenizer", None)  # of a fast one, with all its steps
    settings = [getattr(tokenizer, key, None) for key in ("word_delimiter_token", "do_lower_case")]
    special = [*tokenizer.all_special_tokens, tokenizer.pad_token]
    return features | {
        "vocabulary": tokenizer.get_vocab(),
        "tokenizer": [type(tokenizer).__name__, *settings, special, backend and backend.to_str()],
    }


def agree_on_tokens(model: PreTrainedModel, processor: Processor, called: str) -> list[str]:
    """Make the model's loss write the tokens that its tokenizer reads.

    The CTC blank is the tokenizer's ``pad_token``. Where the tokenizer has none, it is the model's ``pad_token_id``, if
    that output has the name of a blank, or none and is the last one, as in models that NVIDIA NeMo trained.

    Returns:
        Sentences about what was changed.

    Raises:
        UserError: The tokenizer is of another model, or has no blank.
    """
    tokenizer: Any = processor.tokenizer
    outputs = model.config.vocab_size
    _name_blank(tokenizer, model.config.pad_token_id, outputs)
    vocabulary = tokenizer.get_vocab()
    if len(tokenizer) < outputs:
        raise UserError(
            f"{called}: the tokenizer has {len(tokenizer)} tokens and the model "
            f"writes {outputs}; take the tokenizer that the model was trained with"
        )
    by_output: dict[int, list[str]] = {}
    for token, index in vocabulary.items():
        by_output.setdefault(index, []).append(token)
    file = "the tokenizer" if getattr(tokenizer, "backend_tokenizer", None) else "vocab.json"
    for index in range(outputs):
        tokens = by_output.get(index, [])
        if len(tokens) != 1:
            raise UserError(
                f"{called}: {file} names {len(tokens)} tokens for output {index} of the model "
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


def _name_blank(tokenizer: Any, output: int | None, outputs: int) -> None:
    """Name the blank of a tokenizer that names none, if the model's output for it tells which it is."""
    if tokenizer.pad_token is not None or output is None:
        return
    tokens = [token for token, index in tokenizer.get_vocab().items() if index == output]
    if tokens and tokens[0] in BLANKS:
        tokenizer.pad_token = tokens[0]
    elif not tokens and output == len(tokenizer) == outputs - 1:
        tokenizer.add_special_tokens({"pad_token": "<blank>"})


def agree_on_audio(model: PreTrainedModel, processor: Processor, called: str) -> list[str]:
    """Compare the feature extractor with what the model was trained on.

    Returns:
        Sentences about what was changed, and about what is suspicious.

    Raises:
        UserError: The feature extractor is of another model.
    """
    extractor: Any = processor.feature_extractor
    takes, gives = model.main_input_name, extractor.model_input_names[0]
    if takes != gives:
        raise UserError(
            f"{called}: its {type(extractor).__name__} makes {gives}, and the model takes {takes}; copy "
            "preprocessor_config.json from the model's origin"
        )
    rate = getattr(model.config, "sampling_rate", None) or SAMPLING_RATE
    expected = {"sampling_rate": rate, "padding_side": "right"}
    if takes == "input_values":  # features have more than one number, and what pads them is masked
        expected |= {"feature_size": 1, "padding_value": 0}
    for key, value in expected.items():
        if getattr(extractor, key, value) != value:
            raise UserError(
                f"{called}: the preprocessor's settings say {key}={getattr(extractor, key)}, and the model takes "
                f"{value}; correct preprocessor_config.json"
                + (", or say sampling_rate in config.json if the model was trained so" if "rate" in key else "")
            )
    wanted_bins, given_bins = _bins(model.config, extractor)
    if wanted_bins != given_bins:
        raise UserError(
            f"{called}: its {type(extractor).__name__} makes {given_bins} numbers a frame, and the model takes "
            f"{wanted_bins}; copy preprocessor_config.json from the model's origin"
        )
    warnings = []
    # data2vec-audio has none
    norm = getattr(model.config, "feat_extract_norm", None) if takes == "input_values" else None
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


def _bins(config: Any, extractor: Any) -> tuple[int | None, int | None]:
    """Give how many numbers a frame of features has for the model, and from the extractor; None where it has none."""
    stacked = getattr(config, "feature_projection_input_dim", None)  # wav2vec2-bert stacks two frames
    if stacked is not None:
        return stacked, extractor.feature_size * getattr(extractor, "stride", 1)
    bins = getattr(getattr(config, "encoder_config", config), "num_mel_bins", None)
    return bins, bins and getattr(extractor, "num_mel_bins", extractor.feature_size)
