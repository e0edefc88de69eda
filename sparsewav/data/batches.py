"""Batches of speech, bucketed by length, and padded only for models that take padding."""

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from sparsewav.data.text import Normalization, check_characters
from sparsewav.data.tokens import labels_of, write_text
from sparsewav.data.utterances import Utterance, audio_seconds, read_audio
from sparsewav.errors import UserError
from sparsewav.models.processor import Processor
from sparsewav.pruning.encoder import output_counts

Batch = dict[str, torch.Tensor]
"""What the model takes: ``input_values`` (batch, samples) or ``input_features`` (batch, frames, bins),
``attention_mask`` over their second axis, and, where there is a tokenizer, ``labels`` (batch, tokens)."""


class SpeechBatches(Sequence[Batch]):
    """Batches of utterances, which are read from disk on access.

    Args:
        utterances: The utterances to read.
        processor: Normalizes audio and turns transcripts into labels.
        seconds_per_batch: Limit of the audio in a batch, padding included; a longer utterance is a batch by itself.
        padding: Pad utterances of similar lengths with zeros. Otherwise only utterances of equal length share a batch,
            for models whose group norm would include the zeros in its statistics.
    """

    def __init__(
        self, utterances: Sequence[Utterance], processor: Processor, seconds_per_batch: float, *, padding: bool
    ) -> None:
        self.processor = processor
        self.utterances = utterances
        self.seconds_per_batch, self.padding = seconds_per_batch, padding
        self.groups = plan_batches(utterances, seconds_per_batch, padding=padding)

    def first(self, count: int) -> "SpeechBatches":
        """Give batches of the first utterances alone, planned anew."""
        return SpeechBatches(self.utterances[:count], self.processor, self.seconds_per_batch, padding=self.padding)

    def __len__(self) -> int:
        return len(self.groups)

    def __repr__(self) -> str:
        seconds = sum(map(audio_seconds, self.utterances))
        return f"<{type(self).__name__}: {len(self.utterances)} utterances, {seconds:.1f} s, in {len(self)} batches>"

    def __getitem__(self, index: int) -> Batch:  # type: ignore[override]
        return collate([self.utterances[position] for position in self.groups[index]], self.processor)


def plan_batches(utterances: Sequence[Utterance], seconds_per_batch: float, *, padding: bool) -> list[list[int]]:
    """Group the positions of utterances into batches, longest first, by the lengths in their headers.

    :class:`SpeechBatches` describes the batches.
    """
    lengths = [audio_seconds(utterance) for utterance in utterances]
    ordered = sorted(range(len(utterances)), key=lambda position: (-lengths[position], utterances[position].id))
    buckets: Iterator[list[int]] = (
        iter([ordered]) if padding else (list(group) for _, group in groupby(ordered, key=lengths.__getitem__))
    )
    groups: list[list[int]] = []
    for bucket in buckets:
        while bucket:
            fitting = max(1, int(seconds_per_batch / lengths[bucket[0]]))
            groups.append(bucket[:fitting])
            bucket = bucket[fitting:]
    return groups


def collate(utterances: Sequence[Utterance], processor: Processor) -> Batch:
    """Read utterances, make features of them and pad, with their transcripts as labels padded with -100.

    There are no labels without a tokenizer, nor where none of the utterances has a transcript.
    """
    sample_rate = processor.feature_extractor.sampling_rate
    audio: list[np.ndarray] = [read_audio(utterance, sample_rate) for utterance in utterances]
    inputs = processor.feature_extractor(
        audio, sampling_rate=sample_rate, padding=True, return_attention_mask=True, return_tensors="pt"
    )
    key = processor.feature_extractor.model_input_names[0]
    batch = {key: inputs[key], "attention_mask": inputs["attention_mask"].long()}
    if processor.tokenizer is None or not any(item.text for item in utterances):
        return batch
    labels = [torch.tensor(row, dtype=torch.long) for row in labels_of(_texts(utterances), processor.tokenizer)]
    return batch | {"labels": pad_sequence(labels, batch_first=True, padding_value=-100)}


def _texts(utterances: Sequence[Utterance]) -> list[str]:
    """Give the texts that become labels, with one space between words."""
    return [" ".join(utterance.text.split()) for utterance in utterances]


def check_labels(utterances: Sequence[Utterance], processor: Processor, how: Normalization | None = None) -> None:
    """Check that the labels which a model learns spell the transcripts, of all sets at once.

    Without a tokenizer there are no labels, and the transcripts may be empty.

    Args:
        utterances: Their transcripts are normalized.
        processor: Makes labels of them.
        how: What they were normalized by, for the message.

    Raises:
        UserError: A transcript is empty or has characters that the model cannot write, or the tokenizer changes it.
    """
    if processor.tokenizer is None:
        return
    words: dict[str, Utterance] = {}  # every word once, with the first utterance that has it
    for utterance, text in zip(utterances, _texts(utterances), strict=True):
        if not text:
            left = f" without {how.removed}" if how and how.removed else ""
            raise UserError(
                f"utterance {utterance.id} ({utterance.source}) has an empty transcript{left}; write it or remove the "
                "utterance"
            )
        for word in text.split():
            words.setdefault(word, utterance)
    check_characters(utterances, processor.tokenizer, how or Normalization())
    for word, utterance in words.items():
        _check_word(word, f"the transcript of utterance {utterance.id} ({utterance.source})", processor.tokenizer)


def _check_word(word: str, transcript: str, tokenizer: Any) -> None:
    pair = f"{word} {word}"  # so that the space between words is checked, too
    labels = labels_of([pair], tokenizer)[0]
    written = write_text(labels, tokenizer)
    if written == pair:
        return
    if getattr(tokenizer, "do_lower_case", False) and tokenizer.unk_token_id in labels:
        raise UserError(
            f"the tokenizer turns {word!r} in {transcript} into its unknown token: do_lower_case in "
            "tokenizer_config.json makes capitals, which its vocabulary lacks; set it to false"
        )
    raise UserError(
        f"the labels of {word!r} in {transcript} read {written.partition(' ')[0]!r}; correct the transcript, or take "
        "the tokenizer that the model was trained with"
    )


def check_lengths(
    utterances: Sequence[Utterance], model: PreTrainedModel, processor: Processor, *, labels: bool
) -> None:
    """Check that every utterance has a frame of the model's output, or as many as the CTC loss needs.

    Args:
        utterances: Their lengths are read from the headers of their files.
        model: Says how many frames it makes of so many samples.
        processor: Has the sampling rate, and makes the labels.
        labels: Whether the utterances are for the CTC loss. It needs a frame for every label, and one more between two
            equal ones; without it becomes infinite, or, with ``ctc_zero_infinity``, the utterance counts for nothing.

    Raises:
        UserError: An utterance is too short.
    """
    if not utterances:
        return
    rate = processor.feature_extractor.sampling_rate
    samples = [round(audio_seconds(utterance) * rate) for utterance in utterances]
    lengths = torch.tensor(input_lengths(samples, processor.feature_extractor))
    counts, texts = output_counts(model, lengths).clamp(min=0).tolist(), _texts(utterances)
    short = []
    for utterance, frames, text in zip(utterances, counts, texts, strict=True):
        needed = 1
        # More frames than twice the bytes are enough; only the others are worth the slow tokenizer.
        if labels and frames < 2 * len(text.encode()):
            tokens = labels_of([text], processor.tokenizer)[0]
            needed = len(tokens) + sum(first == second for first, second in pairwise(tokens))
        if frames < needed:
            short.append((utterance, frames, needed))
    if short:
        utterance, frames, needed = short[0]
        remedy = "remove it or correct its transcript" if labels else "remove it"
        others = f" ({len(short) - 1} more are too short)" if len(short) > 1 else ""
        raise UserError(
            f"utterance {utterance.id} ({utterance.source}) is too short: its audio has {frames} frames, and "
            f"{'its transcript' if labels else 'the model'} needs {needed}; {remedy}{others}"
        )


def input_lengths(samples: Sequence[int], extractor: Any) -> list[int]:
    """Give the lengths of the model's input for numbers of samples: the same, or the frames of features.

    How many frames an extractor makes is measured on silence. A further second makes as many frames every time.
    """
    if extractor.model_input_names[0] == "input_values":
        return list(samples)
    rate = extractor.sampling_rate

    @cache
    def measure(count: int) -> int:
        silence = np.zeros(count, dtype=np.float32)
        features = extractor([silence], sampling_rate=rate, return_attention_mask=True, return_tensors="pt")
        return int(features["attention_mask"].sum())

    of_a_second = measure(2 * rate) - measure(rate)
    return [measure(rate + count % rate) + (count // rate - 1) * of_a_second for count in samples]
