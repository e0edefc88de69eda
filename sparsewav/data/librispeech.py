"""Utterances of a folder in LibriSpeech's layout."""

import codecs
from collections.abc import Iterator, Sequence
from pathlib import Path

from sparsewav.data.utterances import Broken, Utterance
from sparsewav.errors import UserError

AUDIO_SUFFIXES = (".flac", ".wav")
"""In lower or upper case."""


def read_librispeech_folder(
    root: Path, subset: str, key: str = "subset", broken: list[Broken] | None = None
) -> list[Utterance]:
    """List the utterances of ``root/subset/<speaker>/<chapter>/``, ordered by id; a subset is e.g. ``test-clean``.

    The id is the name of the audio file. If a name occurs in two folders, every id of the subset is the path below it:
    ``speaker/chapter/name``.

    Args:
        root: Folder of the subsets.
        subset: Name of a folder in it.
        key: The setting that names the subset, for messages.
        broken: Gets the utterances without audio or text, which are refused otherwise.

    Raises:
        UserError: A folder, a transcript or an audio file is missing, a transcript is not UTF-8, or an audio file has
            two transcripts.
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
        for place, audio, text in _read_transcript(transcript, broken):
            if audio in texts:
                raise UserError(f"{place}: {audio} has a transcript already, in {places[audio]}; remove one of them")
            texts[audio], places[audio] = text, place
    if not texts and not broken:
        raise UserError(
            f"{folder} has no transcripts (<speaker>/<chapter>/<speaker>-<chapter>.trans.txt); "
            "data.root must have LibriSpeech's layout; data=manifest reads any list of files"
        )
    ids = {audio: audio.stem for audio in texts}
    if len(set(ids.values())) < len(ids):
        ids = {audio: audio.relative_to(folder).with_suffix("").as_posix() for audio in texts}
    utterances = (
        # Without a text, which encoders do not need, the place is where to write it.
        Utterance(ids[audio], text, audio, audio.relative_to(folder).parts[0], None if text else places[audio])
        for audio, text in texts.items()
    )
    return sorted(utterances, key=lambda utterance: utterance.id)


def audio_without_transcript(folder: Path, utterances: Sequence[Utterance]) -> list[Path]:
    """List the audio files of a subset's folder that are not among all of its utterances."""
    used = {utterance.audio for utterance in utterances}
    found = (path for path in folder.rglob("*") if path.suffix.lower() in AUDIO_SUFFIXES)
    return sorted(path for path in found if path not in used and path.is_file())


def _read_transcript(transcript: Path, broken: list[Broken] | None) -> Iterator[tuple[str, Path, str]]:
    """Give file and line, the audio file and the text of every utterance that has both."""
    audio_files: dict[str, list[Path]] = {}
    for path in sorted(transcript.parent.iterdir()):
        if path.suffix.lower() in AUDIO_SUFFIXES and path.is_file():
            audio_files.setdefault(path.stem, []).append(path)
    for number, line in enumerate(text_lines(transcript), start=1):
        place = f"{transcript}, line {number}"
        if not line.strip():
            continue
        identifier, *words = line.split()  # at any white space: spaces, tabs, no-break spaces
        found, fault = audio_files.get(identifier, []), ""
        if not found:
            expected = transcript.parent / f"{identifier}{AUDIO_SUFFIXES[0]}"
            fault = f"{place}: there is no audio file {expected} (or {', '.join(AUDIO_SUFFIXES[1:])})"
        if fault and broken is None:
            raise UserError(fault)
        if fault and broken is not None:
            broken.append(Broken(identifier, place, fault))
            continue
        if len(found) > 1:
            raise UserError(f"{place}: there are {' and '.join(map(str, found))}; keep one of them")
        yield place, found[0], " ".join(words)


def text_lines(transcript: Path) -> Iterator[str]:
    """Give the lines of a text file in UTF-8, with or without a byte-order mark.

    They end with a line feed, or carriage return and line feed. :meth:`str.splitlines` would also cut at characters
    that may stand within a transcript, such as U+2028.
    """
    try:
        content = transcript.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise UserError(f"{transcript} cannot be read ({error.strerror}); look at its permissions") from error
    if content.startswith(b"\x1f\x8b"):
        raise UserError(f"{transcript} is compressed; unpack it with gunzip")
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
