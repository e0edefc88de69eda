"""Utterances and their audio."""

import copy
import hashlib
import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr

from sparsewav.errors import UserError
from sparsewav.files import cache_folder, content_hash


@dataclass(frozen=True, eq=False)
class StoredAudio:
    """The contents of an audio file in a row of a data set of Hugging Face's, which is read when it is needed.

    Attributes:
        table: The data set.
        row: Number of the row.
        column: The column that has the audio.
        size: Size in bytes.
    """

    table: Any
    row: int
    column: str
    size: int

    def read(self) -> bytes:
        contents: bytes = self.table[self.row][self.column]["bytes"]
        return contents


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
        start: Where the utterance begins in the audio, in seconds.
        end: Where it ends in the audio, in seconds; None for the end of the audio.
    """

    id: str
    text: str
    audio: Path | bytes | StoredAudio
    speaker: str | None = None
    place: str | None = None
    start: float = 0.0
    end: float | None = None

    @property
    def source(self) -> str:
        """Name of the utterance in messages: its place and its audio."""
        audio = str(self.audio) if isinstance(self.audio, Path) else self.id
        return audio if self.place is None else f"{self.place} ({audio})"

    def contents(self) -> bytes:
        """Read the encoded audio, of which the utterance may be a part."""
        if isinstance(self.audio, bytes):
            return self.audio
        return self.audio.read_bytes() if isinstance(self.audio, Path) else self.audio.read()

    def content_hash(self) -> str:
        """Hash the encoded audio; see :func:`~sparsewav.files.content_hash`."""
        return content_hash(self.audio) if isinstance(self.audio, Path) else self._contents_hash

    def with_text(self, text: str) -> "Utterance":
        """Give the utterance with another text; what is known of its audio is not read again."""
        other = copy.copy(self)
        object.__setattr__(other, "text", text)  # of a copy that nobody has seen yet
        return other

    # What is in memory, or in a data set that does not change, is hashed and measured once.

    @cached_property
    def _contents_hash(self) -> str:
        return hashlib.blake2b(self.contents(), digest_size=16).hexdigest()

    @cached_property
    def _seconds(self) -> float:
        with _open(self) as file:
            first, last = _bounds(self, file)
            # Decoding says what is wrong with an empty file, too.
            known = 0 < last < UNKNOWN_LENGTH
            return (last - first if known else sum(map(len, _decode(self, file)))) / file.samplerate


@dataclass(frozen=True)
class Broken:
    """An utterance that cannot be read.

    Attributes:
        id: Its identifier.
        source: Its name in messages.
        reason: A sentence that names the utterance and says what is wrong with it, and what to do.
    """

    id: str
    source: str
    reason: str


@dataclass
class Listing:
    """What a source of speech lists.

    Attributes:
        utterances: Those that can be read, as far as is known without opening their audio.
        broken: Those that cannot.
        recognised: A sentence that says how the source is read where nobody said so; or nothing.
        unused: A sentence on what there is besides and is not used; or nothing.
    """

    utterances: list[Utterance]
    broken: list[Broken] = field(default_factory=list)
    recognised: str = ""
    unused: str = ""


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
        file = _Audio(utterance.audio if isinstance(utterance.audio, Path) else io.BytesIO(utterance.contents()))
        if not file.frames and (contents := _with_unknown_size(utterance)):
            file = _Audio(io.BytesIO(contents))
        if file.format == "MP3" and not _has_count(mp3 := utterance.contents()):
            file = _Audio(_Unmeasured(mp3))
    except (soundfile.LibsndfileError, OSError) as error:
        reason = getattr(error, "error_string", error)  # libsndfile's own words, without the file or the bytes' address
        if isinstance(utterance.audio, Path) and utterance.audio.is_file() and "does not exist" in str(reason):
            reason = "its contents are in no format that is known"  # what it means where its decoder of MP3 gives up
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


ROUNDING = 0.01
"""Seconds by which the end of an utterance may miss that of its recording, which then is its end; manifests round."""

OVERSHOOT = 0.5
"""Seconds that an utterance may end behind its recording, as in Kaldi; it then ends with it."""


def _bounds(utterance: Utterance, file: _Audio) -> tuple[int, int]:
    """Give the first sample of an utterance and the one behind its last, in a file whose length may be unknown.

    Raises:
        UserError: They are not within the file.
    """
    first = round(utterance.start * file.samplerate)
    if utterance.end is None:
        last = file.frames
    else:
        last = round(utterance.end * file.samplerate)
        if (
            abs(last - file.frames) <= ROUNDING * file.samplerate
            or 0 < last - file.frames <= OVERSHOOT * file.samplerate
        ):
            last = file.frames
    if (first and first >= file.frames) or last > file.frames or last <= first < file.frames:
        length = file.frames / file.samplerate
        end = length if utterance.end is None else utterance.end
        raise UserError(
            f"{utterance.source} is said to be at {utterance.start:g} to {end:g} s of a recording of {length:g} s; "
            "correct its times"
        )
    return first, last


def _decode(utterance: Utterance, file: _Audio) -> Iterator[np.ndarray]:
    """Give the utterance block after block, each of shape (samples,) with its channels averaged, and check it."""
    first, last = _bounds(utterance, file)
    position = 0
    if first and file.format not in _NO_SEEKING:
        position = file.seek(first)
    try:
        while len(block := file.read(min(BLOCK, last - position), dtype="float32", always_2d=True)):
            within = block[max(0, first - position) :]
            position += len(block)
            if len(within):
                yield within.mean(axis=1)
    except soundfile.LibsndfileError as error:
        raise UserError(f"{utterance.source} is damaged ({error}); fetch or record it again") from error
    if not position and last in (0, UNKNOWN_LENGTH):
        raise UserError(f"{utterance.source} holds no samples; fetch or record it again")
    if last not in (position, UNKNOWN_LENGTH):
        raise UserError(
            f"{utterance.source} is truncated: {position} of {last} samples could be decoded; fetch or record it again"
        )


_NO_SEEKING = ("MP3", "OGG")
"""Formats that are decoded from their start: where libsndfile lands in them is not sure to a sample."""


def audio_seconds(utterance: Utterance) -> float:
    """Read the length in seconds from the header of the file, or by decoding it where the header has none.

    It is read once for every object: utterances are listed anew for every launch.

    Raises:
        UserError: The file is not audio, or empty, or the utterance is not within it.
    """
    return utterance._seconds


def read_audio(utterance: Utterance, sample_rate: int = 16_000) -> np.ndarray:
    """Decode the audio, average its channels, and resample it to a rate in Hz with soxr's high quality.

    Returns:
        Samples, shape (samples,), float32.

    Raises:
        UserError: The file is truncated, empty, not audio, several recordings, or holds NaN or infinite samples.
    """
    with _open(utterance) as file:
        whole = utterance.end is None and not utterance.start
        parts = len(_STARTS[file.format].findall(utterance.contents())) if whole and file.format in _STARTS else 1
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


def decoding_fault(utterance: Utterance) -> str:
    """Decode an utterance, and say what is wrong with it; empty if nothing is.

    What was decoded once is known by its content afterwards, in the cache folder.
    """
    known = _known_sound(cache_folder())
    key = f"{utterance.content_hash()} {utterance.start:g} {utterance.end}"
    if key in known:
        return ""
    try:
        read_audio(utterance)
    except UserError as error:
        return str(error)
    known.add(key)
    with suppress(OSError):  # without the record it is decoded again
        cache_folder().mkdir(parents=True, exist_ok=True)
        with (cache_folder() / _DECODED).open("a", encoding="utf-8") as records:
            records.write(f"{key}\n")
    return ""


_DECODED = "decoded.txt"


@cache
def _known_sound(folder: Path) -> set[str]:
    with suppress(OSError):
        return set((folder / _DECODED).read_text(encoding="utf-8", errors="replace").splitlines())
    return set()


def with_shared_audio(utterances: Sequence[Utterance], others: Sequence[Utterance]) -> list[Utterance]:
    """Give those utterances whose encoded audio is among the others', whatever its name; of a part, at the same time.

    Times are those of the audio file: a part that was cut out to a file of its own is other audio.
    """
    sizes = {_size(item) for item in utterances} & {_size(item) for item in others}  # files of one content have one
    spans: dict[str, list[tuple[float, float]]] = {}
    for item in others:
        if _size(item) in sizes:
            spans.setdefault(item.content_hash(), []).append(_span(item))
    return [item for item in utterances if _size(item) in sizes and _meets(_span(item), spans.get(item.content_hash()))]


def _span(utterance: Utterance) -> tuple[float, float]:
    return utterance.start, math.inf if utterance.end is None else utterance.end


def _meets(span: tuple[float, float], others: Sequence[tuple[float, float]] | None) -> bool:
    return any(span[0] < end and start < span[1] for start, end in others or ())


def _size(utterance: Utterance) -> int:
    audio = utterance.audio
    if isinstance(audio, StoredAudio):
        return audio.size
    return len(audio) if isinstance(audio, bytes) else audio.stat().st_size


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
