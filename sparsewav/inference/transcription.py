"""Transcripts of recordings of any length, in overlapping chunks, with the times of the words."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsewav.data.utterances import Utterance, read_audio
from sparsewav.errors import UserError
from sparsewav.models.load import SpeechModel
from sparsewav.pruning.hessian import Progress

AGREEMENT = 3
"""Number of consecutive frames on which two chunks must agree where they are joined."""


@dataclass(frozen=True)
class Word:
    """A word of a transcript as the model writes it, with its start and end in seconds of the recording."""

    text: str
    start: float
    end: float


@dataclass(frozen=True)
class Transcript:
    """A transcript, as a text and word by word, and the length of the recording in seconds."""

    text: str
    words: list[Word]
    seconds: float


@dataclass(frozen=True)
class Chunk:
    """A section of a recording, the frames of the model from ``first`` up to and without ``stop``."""

    first: int
    stop: int


def plan_chunks(frames: int, chunk: int, overlap: int) -> list[Chunk]:
    """Cover the frames of a recording with chunks, of which neighbours share ``overlap`` frames.

    There must be at least one frame, and the overlap must be below half a chunk.
    """
    step = chunk - overlap
    count = 1 if frames <= chunk else -(-(frames - overlap) // step)
    return [Chunk(index * step, min(index * step + chunk, frames)) for index in range(count)]


@torch.inference_mode()
def transcribe_recording(
    speech: SpeechModel,
    recording: Utterance,
    *,
    chunk_seconds: float = 30.0,
    overlap_seconds: float = 4.0,
    progress: Progress | None = None,
) -> Transcript:
    """Transcribe a recording of any length greedily, as the evaluation does.

    Every chunk is transcribed alone. Two chunks are joined within their overlap where both give the same tokens, if
    possible in a pause, so that no letter is repeated or lost.

    Args:
        speech: A CTC model and its processor.
        recording: The recording, whose text is ignored.
        chunk_seconds: Length of a chunk.
        overlap_seconds: Overlap of neighbouring chunks.
        progress: Called with (chunks done, chunks) after every chunk.

    Raises:
        UserError: The recording is not readable or shorter than a frame, or the two lengths do not fit each other.
    """
    check_chunks(chunk_seconds, overlap_seconds)
    extractor, model = speech.processor.feature_extractor, speech.model
    rate = extractor.sampling_rate
    audio = read_audio(recording, rate)
    seconds = len(audio) / rate
    samples: Tensor = extractor(audio, sampling_rate=rate, return_tensors="pt")["input_values"][0]
    hop, window = _frame(model)
    frames = (len(samples) - window) // hop + 1
    if frames < 1:
        raise UserError(
            f"{recording.source} has {len(samples)} samples, too few for the model's {window}; leave it out"
        )
    length, overlap = (int(min(limit, seconds + 1) * rate / hop) for limit in (chunk_seconds, overlap_seconds))
    chunks = plan_chunks(frames, max(length, 2), overlap)
    tokens: list[Tensor] = []
    for index, chunk in enumerate(chunks):
        section = samples[chunk.first * hop : (chunk.stop - 1) * hop + window]
        logits = model(section[None].to(model.device, model.dtype)).logits[0]
        tokens.append(logits.argmax(-1).cpu())  # (frames of the chunk,)
        if progress:
            progress(index + 1, len(chunks))
    quiet = torch.tensor([model.config.pad_token_id, speech.processor.tokenizer.word_delimiter_token_id])
    joined = join_chunks(chunks, tokens, quiet)
    words = list(_words(joined, speech, hop / rate))
    return Transcript(" ".join(word.text for word in words), words, seconds)


def check_chunks(chunk_seconds: float, overlap_seconds: float) -> None:
    """Check the lengths that :func:`transcribe_recording` takes.

    Raises:
        UserError: They are not finite, or do not fit each other.
    """
    if not 0 < chunk_seconds < math.inf:
        raise UserError(f"a chunk of {chunk_seconds:g} seconds has no meaning; it must be a number above 0")
    if not 0 <= overlap_seconds < chunk_seconds / 2:
        raise UserError(
            f"an overlap of {overlap_seconds:g} seconds must be at least 0 and below half a chunk of "
            f"{chunk_seconds:g} seconds"
        )


def _frame(model: Any) -> tuple[int, int]:
    """Give the samples between two frames of the logits, and the samples that a frame depends on.

    Raises:
        UserError: The model changes the number of frames after its convolutions.
    """
    hop, window = 1, 1
    for kernel, stride in zip(model.config.conv_kernel, model.config.conv_stride, strict=True):
        window += (kernel - 1) * hop
        hop *= stride
    counted = int(model._get_feat_extract_output_lengths(torch.tensor(window + 99 * hop)))
    if counted != 100:
        raise UserError(f"a {type(model).__name__} that changes the number of frames cannot transcribe in chunks")
    return hop, window


def join_chunks(chunks: list[Chunk], tokens: list[Tensor], quiet: Tensor) -> Tensor:
    """Join the tokens of overlapping chunks, each of shape (frames of the chunk,), into shape (frames,).

    ``quiet`` lists the tokens that are no letter.
    """
    kept: list[Tensor] = []
    begin = 0
    for index, (chunk, own) in enumerate(zip(chunks, tokens, strict=True)):
        end = chunk.stop
        if index + 1 < len(chunks):
            following = chunks[index + 1]
            shared = chunk.stop - following.first
            end = following.first + _handover(own[len(own) - shared :], tokens[index + 1][:shared], quiet)
        kept.append(own[begin - chunk.first : end - chunk.first])
        begin = end
    return torch.cat(kept)


def _handover(before: Tensor, after: Tensor, quiet: Tensor) -> int:
    """Give the frame of an overlap at which the later chunk takes over: near the middle, where both agree."""
    shared = len(before)
    if shared == 0:
        return 0
    same = (before == after).float()
    pause = same * torch.isin(before, quiet)
    width = min(AGREEMENT, shared)
    around = torch.arange(shared - width + 1) + width // 2
    distance = (around - shared / 2).abs()
    for agreement in (pause, same):
        whole = agreement.unfold(0, width, 1).min(-1).values > 0
        if whole.any():
            return int(around[torch.where(whole, distance, torch.inf).argmin()])
    return shared // 2


def _words(tokens: Tensor, speech: SpeechModel, seconds_per_frame: float) -> Iterator[Word]:
    tokenizer: Any = speech.processor.tokenizer
    decoded = tokenizer.decode(tokens, output_word_offsets=True)
    for word in decoded.word_offsets:
        text = "".join(word["word"].split())
        if text:
            start, end = (round(float(word[key]) * seconds_per_frame, 3) for key in ("start_offset", "end_offset"))
            yield Word(text, start, end)


def captions(words: list[Word], *, max_words: int = 8, max_seconds: float = 5.0, pause: float = 0.8) -> list[Word]:
    """Group words into captions, limited by words, seconds, and pauses in seconds between words."""
    lines: list[list[Word]] = []
    for word in words:
        line = lines[-1] if lines else []
        fits = line and len(line) < max_words and word.end - line[0].start <= max_seconds
        if fits and word.start - line[-1].end < pause:
            line.append(word)
        else:
            lines.append([word])
    return [Word(" ".join(word.text for word in line), line[0].start, line[-1].end) for line in lines]


def as_srt(transcript: Transcript) -> str:
    """Format a transcript as SubRip subtitles."""
    return "\n".join(
        f"{number}\n{_clock(line.start)} --> {_clock(line.end)}\n{line.text}\n"
        for number, line in enumerate(captions(transcript.words), 1)
    )


def _clock(seconds: float) -> str:
    milliseconds = round(seconds * 1000)
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{rest // 1000:02},{rest % 1000:03}"
