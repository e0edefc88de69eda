"""Batches of speech, bucketed by length, and padded only for models that take padding."""

from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, Wav2Vec2Processor

from sparsewav.data.utterances import Utterance, audio_seconds, read_audio
from sparsewav.errors import UserError

Batch = dict[str, torch.Tensor]
"""``input_values`` (batch, samples), ``attention_mask`` (batch, samples) and ``labels`` (batch, characters)."""


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
        self, utterances: Sequence[Utterance], processor: Wav2Vec2Processor, seconds_per_batch: float, *, padding: bool
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


def collate(utterances: Sequence[Utterance], processor: Wav2Vec2Processor) -> Batch:
    """Read, normalize and pad utterances, with their transcripts as labels padded with -100."""
    sample_rate = processor.feature_extractor.sampling_rate
    audio: list[np.ndarray] = [read_audio(utterance, sample_rate) for utterance in utterances]
    inputs = processor.feature_extractor(
        audio, sampling_rate=sample_rate, padding=True, return_attention_mask=True, return_tensors="pt"
    )
    labels = processor.tokenizer(_texts(utterances, processor), padding=True, return_tensors="pt")
    return {
        "input_values": inputs["input_values"],
        "attention_mask": inputs["attention_mask"],
        "labels": labels["input_ids"].masked_fill(labels["attention_mask"] == 0, -100),
    }


def _texts(utterances: Sequence[Utterance], processor: Wav2Vec2Processor) -> list[str]:
    """Give the texts that become labels, with one space between words."""
    return [" ".join(spell(utterance.text, processor).split()) for utterance in utterances]


def spell(text: str, processor: Wav2Vec2Processor) -> str:
    """Convert a transcript to the letter case of the model's vocabulary."""
    return text.lower() if "e" in processor.tokenizer.get_vocab() else text.upper()


def check_labels(utterances: Sequence[Utterance], processor: Wav2Vec2Processor) -> None:
    """Check that the labels which a model learns spell the transcripts.

    Raises:
        UserError: A transcript is empty or has characters that the model cannot write, or the tokenizer changes it.
    """
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
    labels = tokenizer(pair)["input_ids"]
    written = tokenizer.decode(labels, group_tokens=False).upper()
    if tokenizer.unk_token_id not in labels and written == pair.upper():
        return
    vocabulary = tokenizer.get_vocab()
    unknown = sorted(set(pair.replace(" ", tokenizer.word_delimiter_token)) - set(vocabulary))
    if unknown:
        raise UserError(
            f"{transcript} has characters outside the model's vocabulary: {' '.join(map(_visible, unknown))}; spell "
            "them out in letters or choose a model that knows them"
        )
    if tokenizer.do_lower_case and tokenizer.unk_token_id in labels:
        raise UserError(
            f"the tokenizer turns {word!r} in {transcript} into its unknown token: do_lower_case in "
            "tokenizer_config.json makes capitals, which its vocabulary lacks; set it to false"
        )
    raise UserError(
        f"the labels of {word!r} in {transcript} read {written.partition(' ')[0]!r}; correct the transcript, or take "
        "the tokenizer that the model was trained with"
    )


def check_lengths(
    utterances: Sequence[Utterance], model: PreTrainedModel, processor: Wav2Vec2Processor, *, labels: bool
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
    rate = processor.feature_extractor.sampling_rate
    samples = torch.tensor([round(audio_seconds(utterance) * rate) for utterance in utterances], dtype=torch.long)
    frames_of: Any = model._get_feat_extract_output_lengths
    counts, texts = frames_of(samples).clamp(min=0).tolist(), _texts(utterances, processor)
    short = []
    for utterance, frames, text in zip(utterances, counts, texts, strict=True):
        needed = 1
        # More frames than twice the letters are enough; only the others are worth the slow tokenizer.
        if labels and frames < 2 * len(text):
            tokens = processor.tokenizer(text)["input_ids"]
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


def _visible(character: str) -> str:
    """Give a character, or its code point if nobody sees it."""
    return character if character.isprintable() and not character.isspace() else f"U+{ord(character):04X}"
