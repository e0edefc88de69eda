"""Batches of speech, bucketed by length, and padded only for models that take padding."""

import unicodedata
from collections.abc import Iterator, Sequence, Set
from functools import cache
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

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

    There are no labels without a tokenizer.
    """
    sample_rate = processor.feature_extractor.sampling_rate
    audio: list[np.ndarray] = [read_audio(utterance, sample_rate) for utterance in utterances]
    inputs = processor.feature_extractor(
        audio, sampling_rate=sample_rate, padding=True, return_attention_mask=True, return_tensors="pt"
    )
    key = processor.feature_extractor.model_input_names[0]
    batch = {key: inputs[key], "attention_mask": inputs["attention_mask"].long()}
    if processor.tokenizer is None:
        return batch
    labels = [
        torch.tensor(row, dtype=torch.long) for row in labels_of(_texts(utterances, processor), processor.tokenizer)
    ]
    return batch | {"labels": pad_sequence(labels, batch_first=True, padding_value=-100)}


def _texts(utterances: Sequence[Utterance], processor: Processor) -> list[str]:
    """Give the texts that become labels, with one space between words."""
    vocabulary = processor.tokenizer.get_vocab().keys() | {" "}
    return [" ".join(spell(utterance.text, vocabulary).split()) for utterance in utterances]


def spell(text: str, vocabulary: Set[str]) -> str:
    """Convert a transcript to the letter case of the model's vocabulary, and compose its characters as that does.

    A letter with its accent is one character (NFC), unless the vocabulary has its parts alone (NFD).
    """
    texts = [unicodedata.normalize("NFC", case) for case in (text, text.upper(), text.lower())]
    composed = max(texts, key=lambda case: sum(letter in vocabulary for letter in case) / max(len(case), 1))
    parts = unicodedata.normalize("NFD", composed)
    return parts if not {*composed} <= vocabulary and {*parts} <= vocabulary else composed


def check_labels(utterances: Sequence[Utterance], processor: Processor) -> None:
    """Check that the labels which a model learns spell the transcripts; without a tokenizer there are none.

    Raises:
        UserError: A transcript is empty or has characters that the model cannot write, or the tokenizer changes it.
    """
    if processor.tokenizer is None:
        return
    words: dict[str, Utterance] = {}  # every word once, with the first utterance that has it
    for utterance, text in zip(utterances, _texts(utterances, processor), strict=True):
        if not text:
            raise UserError(
                f"utterance {utterance.id} ({utterance.source}) has an empty transcript; write it or remove the "
                "utterance"
            )
        for word in text.split():
            words.setdefault(word, utterance)
    for word, utterance in words.items():
        _check_word(word, f"the transcript of utterance {utterance.id} ({utterance.source})", processor.tokenizer)


def _check_word(word: str, transcript: str, tokenizer: Any) -> None:
    pair = f"{word} {word}"  # so that the space between words is checked, too
    labels, written = _spelling(pair, tokenizer)
    if written == unicodedata.normalize("NFC", pair).upper():
        return
    letters = sorted({*word} - tokenizer.get_vocab().keys())
    # Bytes or pieces may spell a letter that is no token.
    unknown = [letter for letter in letters if _spelling(letter, tokenizer)[1] != letter.upper()]
    if unknown:
        raise UserError(
            f"{transcript} has characters outside the model's vocabulary: {' '.join(map(_visible, unknown))}; spell "
            "them out in letters or choose a model that knows them"
        )
    if getattr(tokenizer, "do_lower_case", False) and tokenizer.unk_token_id in labels:
        raise UserError(
            f"the tokenizer turns {word!r} in {transcript} into its unknown token: do_lower_case in "
            "tokenizer_config.json makes capitals, which its vocabulary lacks; set it to false"
        )
    raise UserError(
        f"the labels of {word!r} in {transcript} read {written.partition(' ')[0]!r}; correct the transcript, or take "
        "the tokenizer that the model was trained with"
    )


def _spelling(text: str, tokenizer: Any) -> tuple[list[int], str]:
    """Give the labels of a text, and what they write, in capitals; pieces may spell it as well as characters."""
    labels = labels_of([text], tokenizer)[0]
    return labels, unicodedata.normalize("NFC", write_text(labels, tokenizer)).upper()


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
    counts = output_counts(model, lengths).clamp(min=0).tolist()
    texts = _texts(utterances, processor) if labels else [""] * len(utterances)
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


def _visible(character: str) -> str:
    """Give a character, or its code point if nobody sees it."""
    return character if character.isprintable() and not character.isspace() else f"U+{ord(character):04X}"
