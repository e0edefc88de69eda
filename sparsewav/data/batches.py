"""Batches of speech: bucketed by length, padded only where the model may see padding."""

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
    """Batches of utterances, read from disk one at a time whenever they are asked for."""

    def __init__(
        self,
        utterances: Sequence[Utterance],
        processor: Wav2Vec2Processor,
        seconds_per_batch: float,
        *,
        padding: bool,
    ) -> None:
        """Plan the batches from the lengths in the files' headers.

        Args:
            utterances: what to read.
            processor: normalises audio and turns transcripts into labels.
            seconds_per_batch: most audio in one batch, padding included; a longer utterance is a batch by itself.
            padding: batch utterances of nearly equal lengths, padded with zeros. Without it only utterances of the
                same length share a batch: for models whose group norm would take the zeros into its statistics.
        """
        self.processor = processor
        self.groups = plan_batches(utterances, seconds_per_batch, padding=padding)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> Batch:  # type: ignore[override]
        return collate(self.groups[index], self.processor)


def plan_batches(utterances: Sequence[Utterance], seconds_per_batch: float, *, padding: bool) -> list[list[Utterance]]:
    """Group utterances into batches, longest first; see :class:`SpeechBatches`."""
    lengths = {utterance.id: audio_seconds(utterance) for utterance in utterances}
    ordered = sorted(utterances, key=lambda utterance: (-lengths[utterance.id], utterance.id))
    buckets: Iterator[list[Utterance]] = (
        iter([ordered]) if padding else (list(g) for _, g in groupby(ordered, key=lambda u: lengths[u.id]))
    )
    groups: list[list[Utterance]] = []
    for bucket in buckets:
        while bucket:
            fitting = max(1, int(seconds_per_batch / lengths[bucket[0].id]))
            groups.append(bucket[:fitting])
            bucket = bucket[fitting:]
    return groups


def collate(utterances: Sequence[Utterance], processor: Wav2Vec2Processor) -> Batch:
    """Read, normalise and pad utterances, with their transcripts as labels (-100 where there is none)."""
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
    """Put a transcript into the letter case of the model's vocabulary."""
    return text.lower() if "e" in processor.tokenizer.get_vocab() else text


def check_transcripts(utterances: Sequence[Utterance], processor: Wav2Vec2Processor) -> None:
    """Refuse transcripts that the model cannot write.

    Raises:
        UserError: a transcript is empty or has characters outside the vocabulary.
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
