"""Batches of speech, bucketed by length, and padded only for models that take padding."""

from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np
import torch
from transformers import Wav2Vec2Processor

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
    texts = [spell(utterance.text, processor) for utterance in utterances]
    labels = processor.tokenizer(texts, padding=True, return_tensors="pt")
    return {
        "input_values": inputs["input_values"],
        "attention_mask": inputs["attention_mask"],
        "labels": labels["input_ids"].masked_fill(labels["attention_mask"] == 0, -100),
    }


def spell(text: str, processor: Wav2Vec2Processor) -> str:
    """Convert a transcript to the letter case of the model's vocabulary."""
    return text.lower() if "e" in processor.tokenizer.get_vocab() else text


def check_transcripts(utterances: Sequence[Utterance], processor: Wav2Vec2Processor) -> None:
    """Check that the model can write the transcripts.

    Raises:
        UserError: A transcript is empty or has characters outside the vocabulary.
    """
    vocabulary = set(processor.tokenizer.get_vocab())
    for utterance in utterances:
        if not utterance.text.strip():
            raise UserError(f"utterance {utterance.id} has an empty transcript; write it or remove the utterance")
        unknown = sorted(set(spell(utterance.text, processor).replace(" ", "")) - vocabulary)
        if unknown:
            raise UserError(
                f"the transcript of utterance {utterance.id} has characters outside the model's vocabulary: "
                f"{' '.join(unknown)}; spell them out in letters or choose a model that knows them"
            )
