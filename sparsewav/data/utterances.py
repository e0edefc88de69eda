"""Utterances and their audio."""

import hashlib
import io
import re
from collections.abc import Iterator, Sequence
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
        id: Identifier (``speaker-chapter-number`` in LibriSpeech). The subsets of a corpus have unique ones, because
            results name utterances by it; nothing looks one up by it.
        text: Transcript as it is written in the source, with one space between words.
        audio: An audio file, or its contents.
        speaker: Who speaks, where the source says it.
        place: Where the source has the utterance, e.g. ``train.tsv line 17``.
    """

    id: str
    text: str
    audio: Path | bytes
    speaker: str | None = None
    place: str | None = None

    @property
    def source(self) -> str:
        """Name of the utterance in messages: its place and its audio."""
        audio = str(self.audio) if isinstance(self.audio, Path) else self.id
        return audio if self.place is None else f"{self.place} ({audio})"

    def contents(self) -> bytes:
        """Read the encoded audio."""
        return self.audio if isinstance(self.audio, bytes) else self.audio.read_bytes()

    def content_hash(self) -> str:
        """Hash the encoded audio; see :func:`~sparsewav.files.content_hash`."""
        if isinstance(self.audio, Path):
            return content_hash(self.audio)
        return hashlib.blake2b(self.audio, digest_size=16).hexdigest()


class _Audio(soundfile.SoundFile):
    """Audio that is read from front to back.

    For a file that can seek, soundfile seeks after every block, which fails in a FLAC file without a length.
    """

    def seekable(self) -> bool:
        return False


UNKNOWN_LENGTH = 2**63 - 1
"""What libsndfile takes for no length: the frames that it reports for a FLAC file without one, as a pipe writes it."""


class _Unmeasured(io.BytesIO):
    """A file whose length is not told.

    libsndfile takes the length of an MP3 file without a count of its frames from the size of the file and the bits of
    the first frame, and reads no further: half of a recording at a variable rate. Without the size it counts them.
    """

    _asked_for_end = False

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._asked_for_end = whence == io.SEEK_END
        return super().seek(offset, whence)

    def tell(self) -> int:
        return UNKNOWN_LENGTH if self._asked_for_end else super().tell()


BLOCK = 2**16
"""Samples that are decoded at once, so that the memory does not grow with the number of channels."""

_MISSING_BYTES = re.compile(r"^(?:data|SSND) *: (\d+) \(should be (\d+)\)", re.MULTILINE)
"""What libsndfile logs where a file has fewer bytes of samples than its header says; it reads the others."""

_STREAMED = 0x7F000000
"""Sizes from here on stand for an unknown size in WAV: what a program writes that cannot go back in a pipe."""


_STARTS = {
    "FLAC": re.compile(rb"fLaC[\0\x80]\0\0\x22"),
    "MP3": re.compile(rb"\xff[\xe2-\xff][\s\S]{2}\0{9,32}(?:Xing|Info)"),
    "OGG": re.compile(rb"OggS\0\x02"),
}
"""How a recording starts in the formats whose files can be joined; libsndfile ends with the first recording."""


def _open(utterance: Utterance) -> _Audio:
    try:
        file = _Audio(utterance.audio if isinstance(utterance.audio, Path) else io.BytesIO(utterance.audio))
        if not file.frames and (contents := _with_unknown_size(utterance)):
            file = _Audio(io.BytesIO(contents))
        if file.format == "MP3" and not _has_count(mp3 := utterance.contents()):
            file = _Audio(_Unmeasured(mp3))
    except (soundfile.LibsndfileError, OSError) as error:
        reason = getattr(error, "error_string", error)  # libsndfile's own words, without the file or the bytes' address
        raise UserError(
            f"{utterance.source} is not readable audio ({reason}); replace the file or remove it and its transcript"
        ) from error
    missing = _MISSING_BYTES.search(file.extra_info)
    if missing and int(missing[2]) < int(missing[1]) < _STREAMED:
        raise UserError(
            f"{utterance.source} is truncated: {missing[2]} of {missing[1]} bytes of samples are there; fetch or "
            "record it again"
        )
    if file.format == "OGG" and _ends_within_a_page(utterance.contents()):
        raise UserError(f"{utterance.source} is truncated: its last page is cut; fetch or record it again")
    if not 1000 <= file.samplerate <= 1_000_000:
        raise UserError(
            f"{utterance.source} says that it has {file.samplerate} samples a second, which is no speech; correct its "
            "header or remove it"
        )
    return file


def _has_count(mp3: bytes) -> bool:
    """Tell whether the first frame of an MP3 file, which a tag may precede, counts the others."""
    tag = 10 + sum(byte << shift for byte, shift in zip(mp3[6:10], (21, 14, 7, 0), strict=True))
    return bool(_STARTS["MP3"].match(mp3, tag if mp3.startswith(b"ID3") else 0))


def _ends_within_a_page(ogg: bytes) -> bool:
    """Tell whether the last page of an Ogg file ends behind the file; libsndfile reads the pages before it."""
    page = ogg[ogg.rfind(b"OggS") :]
    return len(page) < 27 or 27 + page[26] + sum(page[27 : 27 + page[26]]) > len(page)


def _with_unknown_size(utterance: Utterance) -> bytes | None:
    """Give a WAV file whose sizes were left at 0, as some pipes do, with sizes that libsndfile takes for unknown."""
    contents = utterance.contents()
    start = contents.find(b"data\0\0\0\0") + 4
    # A WAV file that is really empty has the right size in front, which no chunk after it makes wrong.
    if contents[:4] != b"RIFF" or contents[4:8] not in (bytes(4), b"\xff" * 4) or start < 4:
        return None
    return contents[:start] + b"\xff" * 4 + contents[start + 4 :] if len(contents) > start + 4 else None


def _decode(utterance: Utterance, file: _Audio) -> Iterator[np.ndarray]:
    """Give the audio block after block, each of shape (samples,) with its channels averaged, and check it."""
    count = 0
    try:
        while len(block := file.read(min(BLOCK, file.frames - count), dtype="float32", always_2d=True)):
            count += len(block)
            yield block.mean(axis=1)
    except soundfile.LibsndfileError as error:
        raise UserError(f"{utterance.source} is damaged ({error}); fetch or record it again") from error
    if not count and file.frames in (0, UNKNOWN_LENGTH):
        raise UserError(f"{utterance.source} holds no samples; fetch or record it again")
    if file.frames not in (count, UNKNOWN_LENGTH):
        raise UserError(
            f"{utterance.source} is truncated: {count} of {file.frames} samples could be decoded; fetch or record it "
            "again"
        )


def audio_seconds(utterance: Utterance) -> float:
    """Read the length in seconds from the header of the file, or by decoding it where the header has none.

    Raises:
        UserError: The file is not audio, or empty.
    """
    with _open(utterance) as file:
        # Decoding says what is wrong with an empty file, too.
        known = 0 < file.frames < UNKNOWN_LENGTH
        return (file.frames if known else sum(map(len, _decode(utterance, file)))) / file.samplerate


def read_audio(utterance: Utterance, sample_rate: int = 16_000) -> np.ndarray:
    """Decode the audio, average its channels, and resample it to a rate in Hz with soxr's high quality.

    Returns:
        Samples, shape (samples,), float32.

    Raises:
        UserError: The file is truncated, empty, not audio, several recordings, or holds NaN or infinite samples.
    """
    with _open(utterance) as file:
        parts = len(_STARTS[file.format].findall(utterance.contents())) if file.format in _STARTS else 1
        if parts > 1:
            raise UserError(
                f"{utterance.source} is {parts} recordings one after the other, of which the first alone can be read; "
                "take them apart, or join them with a program for audio"
            )
        samples = np.concatenate(list(_decode(utterance, file)))
        if not np.isfinite(samples).all():
            raise UserError(f"{utterance.source} holds samples that are NaN or infinite; repair or remove it")
        if file.samplerate != sample_rate:
            samples = soxr.resample(samples, file.samplerate, sample_rate)
    return samples


def with_shared_audio(utterances: Sequence[Utterance], others: Sequence[Utterance]) -> list[Utterance]:
    """Give those utterances whose encoded audio is among the others', whatever its name."""
    sizes = {_size(item) for item in utterances} & {_size(item) for item in others}  # files of one content have one
    contents = {item.content_hash() for item in others if _size(item) in sizes}
    return [item for item in utterances if _size(item) in sizes and item.content_hash() in contents]


def _size(utterance: Utterance) -> int:
    return len(utterance.audio) if isinstance(utterance.audio, bytes) else utterance.audio.stat().st_size


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
