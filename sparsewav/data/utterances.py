"""Utterances and their audio."""

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr

from sparsewav.errors import UserError
from sparsewav.files import content_hash


@dataclass(frozen=True)
class Utterance:
    """A recorded sentence.

    Attributes:
        id: Identifier, unique within its set (``speaker-chapter-number`` in LibriSpeech).
        text: Transcript in upper case.
        audio: An audio file, or its contents.
    """

    id: str
    text: str
    audio: Path | bytes

    @property
    def source(self) -> str:
        """Name of the audio in messages."""
        return str(self.audio) if isinstance(self.audio, Path) else self.id

    def content_hash(self) -> str:
        """Hash the encoded audio; see :func:`~sparsewav.files.content_hash`."""
        if isinstance(self.audio, Path):
            return content_hash(self.audio)
        return hashlib.blake2b(self.audio, digest_size=16).hexdigest()


def _open(utterance: Utterance) -> soundfile.SoundFile:
    try:
        return soundfile.SoundFile(
            utterance.audio if isinstance(utterance.audio, Path) else io.BytesIO(utterance.audio)
        )
    except (soundfile.LibsndfileError, OSError) as error:
        raise UserError(
            f"{utterance.source} is not readable audio ({error}); replace the file or remove it and its transcript"
        ) from error


def audio_seconds(utterance: Utterance) -> float:
    """Read the length in seconds from the header of the file.

    Raises:
        UserError: The file is not audio.
    """
    with _open(utterance) as file:
        return file.frames / file.samplerate


def read_audio(utterance: Utterance, sample_rate: int = 16_000) -> np.ndarray:
    """Decode the audio, average its channels, and resample it to a rate in Hz with soxr's high quality.

    Returns:
        Samples, shape (samples,), float32.

    Raises:
        UserError: The file is truncated, empty, not audio, or holds NaN or infinite samples.
    """
    with _open(utterance) as file:
        try:
            samples = file.read(dtype="float32", always_2d=True).mean(axis=1)
        except soundfile.LibsndfileError as error:
            raise UserError(f"{utterance.source} is damaged ({error}); fetch or record it again") from error
        if len(samples) < file.frames or not len(samples):
            raise UserError(
                f"{utterance.source} is truncated: {len(samples)} of {file.frames} samples could be decoded; "
                "fetch or record it again"
            )
        if not np.isfinite(samples).all():
            raise UserError(f"{utterance.source} holds samples that are NaN or infinite; repair or remove it")
        if file.samplerate != sample_rate:
            samples = soxr.resample(samples, file.samplerate, sample_rate)
    return samples


def sample_utterances(
    utterances: list[Utterance], count: int, seed: int, key: str = "calibration.utterances"
) -> list[Utterance]:
    """Draw a random sample without replacement, as for the paper's calibration set (its section 3.1).

    Raises:
        UserError: There are fewer utterances than asked for by the setting ``key``.
    """
    if count > len(utterances):
        raise UserError(
            f"{key}={count} asks for more than the {len(utterances)} utterances of its subset; lower it or choose a "
            "larger subset"
        )
    drawn = np.random.default_rng(seed).choice(len(utterances), size=count, replace=False)
    return [utterances[index] for index in drawn]
