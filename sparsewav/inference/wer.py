"""Error rates of words and characters: greedy CTC, no language model, corpus level."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jiwer
import numpy as np
import torch
from jaxtyping import Integer
from torch import Tensor
from transformers import PreTrainedModel

from sparsewav.data.batches import SpeechBatches, check_lengths
from sparsewav.data.given import as_utterances, prepared, settings_of
from sparsewav.data.text import Normalization, normalize
from sparsewav.data.tokens import collapse, write_text
from sparsewav.data.utterances import Utterance
from sparsewav.errors import UserError
from sparsewav.models.load import SpeechModel, require_speech_model
from sparsewav.models.processor import Processor
from sparsewav.pruning.encoder import input_key, output_counts, takes_padding
from sparsewav.pruning.hessian import Progress


@torch.inference_mode()
def transcribe(
    model: PreTrainedModel,
    processor: Processor,
    utterances: Sequence[Utterance],
    seconds_per_batch: float = 60.0,
    progress: Progress | None = None,
    how: Normalization | None = None,
) -> list[str]:
    """Transcribe utterances greedily.

    Args:
        model: CTC model, which stays on its device.
        processor: Feature extractor and tokenizer of the model.
        utterances: The utterances to transcribe.
        seconds_per_batch: Limit of the audio in a batch, padding included.
        progress: Called with (batches done, batches) after every batch.
        how: What the transcripts are normalized by, and the hypotheses, too; None for the tokenizer's own writing.

    Returns:
        A hypothesis for every utterance, in their order.
    """
    if processor.tokenizer is None:
        raise UserError(f"{type(model).__name__} is an encoder without a CTC head and writes no text")
    was_training = model.training
    model.eval()
    hypotheses: dict[int, str] = {}  # by position: ids may repeat
    batches = SpeechBatches(utterances, processor, seconds_per_batch, padding=takes_padding(model))
    for index, group in enumerate(batches.groups):
        hypotheses |= zip(group, decode(model, processor, batches[index]), strict=True)
        if progress:
            progress(index + 1, len(batches))
    model.train(was_training)
    return [normalize(hypotheses[position], how or Normalization()) for position in range(len(utterances))]


def decode(model: PreTrainedModel, processor: Processor, batch: dict[str, Tensor]) -> list[str]:
    """Decode one batch greedily, without padded frames, as the tokenizer writes it."""
    audio = batch[input_key(model)].to(model.device, model.dtype)
    attention_mask = batch["attention_mask"].to(model.device)
    lengths = attention_mask.sum(-1)
    if takes_padding(model):
        logits = model(audio, attention_mask=attention_mask).logits
    else:  # the lengths are equal; an extractor may have padded all to an even number of frames
        logits = model(audio[:, : int(lengths.max())]).logits
    counts = output_counts(model, lengths).tolist()
    hypotheses = []
    for best, count in zip(logits.argmax(-1).cpu(), counts, strict=True):
        tokens = [emission.token for emission in collapse(best[:count], processor.tokenizer)]
        hypotheses.append(write_text(tokens, processor.tokenizer))
    return hypotheses


@dataclass(frozen=True)
class ErrorRates:
    """Error rates of a corpus as fractions: the edits of all utterances over the length of all their references.

    Attributes:
        wer: Of words, which white space separates.
        cer: Of characters, spaces between words included; the figure for languages that are written without spaces.
    """

    wer: float
    cer: float


def evaluate(
    speech: SpeechModel,
    data: Any,
    *,
    seconds_per_batch: float = 60.0,
    case: str | None = None,
    remove_characters: str | None = None,
    sampling_rate: int | None = None,
    audio_column: str | None = None,
    text_column: str | None = None,
) -> ErrorRates:
    """Transcribe speech and compare the transcripts with what was said, as a run does.

    >>> sparsewav.evaluate(speech, [("one.wav", "what is said in it"), ("two.wav", "and in it")])  # doctest: +SKIP

    Args:
        speech: What :func:`sparsewav.load_model` gave.
        data: What :func:`sparsewav.calibration_batches` takes, with transcripts.
        seconds_per_batch: Most audio in one batch in seconds, padding included.
        case: Of references and hypotheses; :func:`sparsewav.calibration_batches` describes it and what follows.
        remove_characters: Characters that both are without.
        sampling_rate: Samples a second of arrays that do not say it.
        audio_column: The column of the audio.
        text_column: The column of the transcripts.

    Raises:
        UserError: The model writes no text, or the speech or a transcript is missing, broken or too short.
    """
    require_speech_model(speech)
    processor = speech.processor
    if processor.tokenizer is None:
        raise UserError(f"{speech.name} is an encoder without a CTC head and writes no text; choose a CTC model")
    columns: Any = {"audio_column": audio_column, "text_column": text_column}
    utterances = as_utterances(data, sampling_rate=sampling_rate, **columns)
    settings = settings_of(data)
    utterances, how = prepared(utterances, processor, settings, case, remove_characters)
    check_lengths(utterances, speech.model, processor, labels=False)
    return error_rates(utterances, transcribe(speech.model, processor, utterances, seconds_per_batch, how=how))


def error_rates(utterances: Sequence[Utterance], hypotheses: Sequence[str]) -> ErrorRates:
    """Compare hypotheses with the transcripts of utterances, which are normalized alike.

    Raises:
        UserError: There are no utterances, or one has no words.
    """
    if not utterances:
        raise UserError("the evaluation set is empty: a word error rate over no words is not a number")
    for utterance in utterances:
        if not utterance.text.strip():
            raise UserError(
                f"utterance {utterance.id} ({utterance.source}) has an empty transcript; write it or remove the "
                "utterance"
            )
    references = [utterance.text for utterance in utterances]
    return ErrorRates(float(jiwer.wer(references, list(hypotheses))), float(jiwer.cer(references, list(hypotheses))))


def count_edits(
    references: Sequence[str], hypotheses: Sequence[str], *, characters: bool = False
) -> tuple[Integer[np.ndarray, " utterances"], Integer[np.ndarray, " utterances"]]:
    """Give the number of edits in every utterance, and of words or characters in every reference."""
    process = jiwer.process_characters if characters else jiwer.process_words
    outputs = [process(*pair) for pair in zip(references, hypotheses, strict=True)]
    edits = [output.substitutions + output.deletions + output.insertions for output in outputs]
    lengths = [output.hits + output.substitutions + output.deletions for output in outputs]
    return np.array(edits), np.array(lengths)


def unspaced(references: Sequence[str]) -> bool:
    """Tell whether most transcripts have no space, so that the CER is their figure and not the WER."""
    return 2 * sum(" " in text for text in references) < len(references)
