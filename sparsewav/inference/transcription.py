"""Transcripts of recordings of any length, in overlapping chunks, with the times of the words."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsewav.data.batches import input_lengths
from sparsewav.data.given import as_utterances
from sparsewav.data.tokens import collapse, write_words
from sparsewav.data.utterances import Utterance, read_audio
from sparsewav.errors import UserError
from sparsewav.models.load import SpeechModel, require_speech_model
from sparsewav.pruning.encoder import input_key, output_counts
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
    """A transcript as the tokenizer writes it, whole and word by word, and the length of the recording in seconds."""

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


def transcribe(
    speech: SpeechModel,
    recordings: Any,
    *,
    sampling_rate: int | None = None,
    chunk_seconds: float = 30.0,
    overlap_seconds: float = 4.0,
) -> list[Transcript]:
    """Transcribe recordings of any length greedily, as ``sparsewav-transcribe`` does.

    >>> [transcript.text for transcript in sparsewav.transcribe(speech, ["talk.mp3"])]  # doctest: +SKIP

    Args:
        speech: What :func:`sparsewav.load_model` gave.
        recordings: What :func:`sparsewav.calibration_batches` takes: a file, a folder, arrays, a data set.
        sampling_rate: Samples a second of arrays that do not say it.
        chunk_seconds: Length of the chunks that a long recording is cut into.
        overlap_seconds: Overlap of neighbouring chunks.

    Returns:
        A transcript for every recording, with the times of its words.

    Raises:
        UserError: As :func:`transcribe_recording` does; or there are no recordings.
    """
    require_speech_model(speech)
    return [
        transcribe_recording(speech, recording, chunk_seconds=chunk_seconds, overlap_seconds=overlap_seconds)
        for recording in as_utterances(recordings, sampling_rate=sampling_rate)
    ]


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
        UserError: The recording is not readable or shorter than a frame, the two lengths do not fit each other, or the
            model is an encoder without a head.
    """
    check_chunks(chunk_seconds, overlap_seconds)
    extractor, model, tokenizer = speech.processor.feature_extractor, speech.model, speech.processor.tokenizer
    if tokenizer is None:
        raise UserError(f"{speech.name} is an encoder without a CTC head and writes no text; choose a CTC model")
    rate = extractor.sampling_rate
    audio = read_audio(recording, rate)
    seconds = len(audio) / rate
    features = extractor([audio], sampling_rate=rate, return_attention_mask=True, return_tensors="pt")
    inputs: Tensor = features[input_key(model)][0, : int(features["attention_mask"].sum())]
    hop, window = _frame(model)
    frames = (len(inputs) - window) // hop + 1
    if frames < 1:
        raise UserError(f"{recording.source} has {len(audio)} samples, too few for a frame of the model; leave it out")
    # Inputs for every second, which of features are fewer than samples.
    per_second = input_lengths([2 * rate], extractor)[0] - input_lengths([rate], extractor)[0]
    length, overlap = (int(min(limit, seconds + 1) * per_second / hop) for limit in (chunk_seconds, overlap_seconds))
    chunks = plan_chunks(frames, max(length, 2), overlap)
    tokens: list[Tensor] = []
    # Features of a frame beside the first are padded where they are missing, as at the end of the recording.
    rest = hop - 1 if inputs.dim() > 1 else 0
    for index, chunk in enumerate(chunks):
        section = inputs[chunk.first * hop : (chunk.stop - 1) * hop + window + rest]
        logits = model(section[None].to(model.device, model.dtype)).logits[0]
        tokens.append(logits.argmax(-1).cpu())  # (frames of the chunk,)
        if progress:
            progress(index + 1, len(chunks))
    pauses = [tokenizer.pad_token_id, getattr(tokenizer, "word_delimiter_token_id", None)]  # pieces have no delimiter
    joined = join_chunks(chunks, tokens, torch.tensor([token for token in pauses if token is not None]))
    words = [
        Word(text, round(first * hop / per_second, 3), round(stop * hop / per_second, 3))
        for text, first, stop in write_words(collapse(joined, tokenizer), tokenizer)
    ]
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
    """Give the inputs (samples, or frames of features) from one frame of the logits to the next, and for the first.

    Raises:
        UserError: The model does not make a frame of every so many inputs.
    """
    counts = output_counts(model, torch.arange(2**14)).tolist()
    window = next((length for length, count in enumerate(counts) if count == 1), 0)
    hop = next((length for length, count in enumerate(counts) if count == 2), 0) - window
    if not window or hop < 1 or int(output_counts(model, torch.tensor([window + 99 * hop]))) != 100:
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
