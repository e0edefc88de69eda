"""Utterances of LibriSpeech from the hub, or from a folder in its layout."""

import codecs
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from sparsewav.data.utterances import Utterance
from sparsewav.errors import UserError
from sparsewav.progress import stage

AUDIO_SUFFIXES = (".flac", ".wav")
"""In lower or upper case."""


def read_librispeech_folder(root: Path, subset: str, key: str = "subset") -> list[Utterance]:
    """List the utterances of ``root/subset/<speaker>/<chapter>/``, ordered by id; a subset is e.g. ``test-clean``.

    The id is the name of the audio file. If a name occurs in two folders, every id of the subset is the path below it:
    ``speaker/chapter/name``.

    Args:
        root: Folder of the subsets.
        subset: Name of a folder in it.
        key: The setting that names the subset, for messages.

    Raises:
        UserError: A folder, a transcript or an audio file is missing, a transcript is empty or not UTF-8, or an audio
            file has two transcripts.
    """
    if not root.is_dir():
        raise UserError(f"data.root={root} is not a folder; point it at the folder that holds {subset}/")
    folder = root / subset
    if not folder.is_dir():
        names = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
        present = ", ".join(names) or "no folders at all"
        raise UserError(f"{key}={subset} is not in data.root={root}; it holds {present}")
    texts: dict[Path, str] = {}
    places: dict[Path, str] = {}
    for transcript in sorted(folder.glob("*/*/*.trans.txt")):
        for place, audio, text in _read_transcript(transcript):
            if audio in texts:
                raise UserError(f"{place}: {audio} has a transcript already, in {places[audio]}; remove one of them")
            texts[audio], places[audio] = text, place
    if not texts:
        raise UserError(
            f"{folder} has no transcripts (<speaker>/<chapter>/<speaker>-<chapter>.trans.txt); "
            "data.root must have LibriSpeech's layout"
        )
    ids = {audio: audio.stem for audio in texts}
    if len(set(ids.values())) < len(ids):
        ids = {audio: audio.relative_to(folder).with_suffix("").as_posix() for audio in texts}
    utterances = (
        Utterance(ids[audio], text, audio, speaker=audio.relative_to(folder).parts[0]) for audio, text in texts.items()
    )
    return sorted(utterances, key=lambda utterance: utterance.id)


def audio_without_transcript(folder: Path, utterances: Sequence[Utterance]) -> list[Path]:
    """List the audio files of a subset's folder that are not among all of its utterances."""
    used = {utterance.audio for utterance in utterances}
    found = (path for path in folder.rglob("*") if path.suffix.lower() in AUDIO_SUFFIXES)
    return sorted(path for path in found if path not in used and path.is_file())


def _read_transcript(transcript: Path) -> Iterator[tuple[str, Path, str]]:
    """Give file and line, the audio file and the text of every utterance."""
    audio_files: dict[str, list[Path]] = {}
    for path in sorted(transcript.parent.iterdir()):
        if path.suffix.lower() in AUDIO_SUFFIXES and path.is_file():
            audio_files.setdefault(path.stem, []).append(path)
    for number, line in enumerate(_lines(transcript), start=1):
        place = f"{transcript}, line {number}"
        if not line.strip():
            continue
        identifier, *words = line.split()  # at any white space: spaces, tabs, no-break spaces
        if not words:
            raise UserError(f"{place}: utterance {identifier} has an empty transcript; write it or remove the line")
        found = audio_files.get(identifier, [])
        if not found:
            expected = transcript.parent / f"{identifier}{AUDIO_SUFFIXES[0]}"
            raise UserError(f"{place}: there is no audio file {expected} (or {', '.join(AUDIO_SUFFIXES[1:])})")
        if len(found) > 1:
            raise UserError(f"{place}: there are {' and '.join(map(str, found))}; keep one of them")
        yield place, found[0], " ".join(words)


def _lines(transcript: Path) -> Iterator[str]:
    """Give the lines of a text file in UTF-8, with or without a byte-order mark.

    They end with a line feed, or carriage return and line feed. :meth:`str.splitlines` would also cut at characters
    that may stand within a transcript, such as U+2028.
    """
    content = transcript.read_bytes().removeprefix(codecs.BOM_UTF8)
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in content:
        raise UserError(f"{transcript}, line 1: the file is UTF-16, or no text at all; save it as UTF-8")
    for number, line in enumerate(content.split(b"\n"), start=1):
        try:
            text = line.removesuffix(b"\r").decode()
        except UnicodeDecodeError as error:
            raise UserError(
                f"{transcript}, line {number}: byte 0x{line[error.start]:02x} is not UTF-8; save the file as UTF-8"
            ) from error
        if "\r" in text:
            raise UserError(
                f"{transcript}, line {number}: there is a carriage return within the line; end lines with a line feed"
            )
        yield text


def stream_librispeech(
    configuration: str, split: str, count: int | None, seed: int, key: str = "subset"
) -> list[Utterance]:
    """Fetch a split of ``openslr/librispeech_asr`` from the hub, or a sample without fetching the whole split.

    A sample is the head of the stream after the order of shards and a buffer are shuffled, so that 2048 utterances of
    train-clean-100 need a part of its 100 hours only. The audio is left undecoded.

    Args:
        configuration: ``clean`` or ``other``.
        split: A split of it, e.g. ``train.100`` or ``test``.
        count: Size of the sample; ``None`` for the whole split in its own order.
        seed: Seed of the shuffle.
        key: The setting that names the split, for messages.

    Raises:
        UserError: The hub cannot be reached, or lacks the split.
    """
    import datasets

    name = "openslr/librispeech_asr"
    try:
        stream = datasets.load_dataset(name, configuration, split=split, streaming=True)
        stream = stream.cast_column("audio", datasets.Audio(decode=False))
        if count is not None:
            stream = stream.shuffle(seed=seed, buffer_size=4 * count).take(count)
        with stage(Console(), f"Fetching {configuration} {split} of {name} from the hub"):
            return [
                Utterance(
                    row["id"],
                    " ".join(row["text"].split()),
                    row["audio"]["bytes"],
                    speaker=row["id"].partition("-")[0],
                )
                for row in stream
            ]
    except Exception as error:  # of the library, and of the clients below it
        raise UserError(
            f"{key}={configuration}/{split} cannot be streamed from {name} on the hub: {' '.join(str(error).split())}; "
            "check the network, or use data=librispeech_dir data.root=/path/to/LibriSpeech"
        ) from error
