"""Utterances of a folder of Kaldi: ``wav.scp`` and ``text``, with ``segments`` and ``utt2spk`` if it has them."""

import os
from collections.abc import Iterator
from pathlib import Path

from sparsewav.data.librispeech import text_lines
from sparsewav.data.utterances import Broken, Listing, Utterance
from sparsewav.errors import UserError


def read_kaldi_folder(folder: Path, key: str, audio_root: str | None = None) -> Listing:
    """List the utterances of a folder, ordered by id.

    Args:
        folder: It has ``wav.scp`` (recording and audio file) and ``text`` (utterance and transcript); ``segments``
            (utterance, recording, start and end in seconds, -1 for its end) and ``utt2spk`` are read if it has them.
        key: The setting that names the folder, for messages.
        audio_root: Folder that relative paths start from; by default the folder itself.

    Raises:
        UserError: A file is missing or damaged, names something twice, or has a pipe in the place of an audio file.
    """
    if lacking := [name for name in ("wav.scp", "text") if not (folder / name).is_file()]:
        raise UserError(
            f"{key}={folder} is a folder without {' and '.join(lacking)}; name a manifest in it, or take data=hf or "
            "data=librispeech_dir"
        )
    root = folder if audio_root is None else Path(audio_root).expanduser()
    recordings = {}
    for number, name, command in _entries(folder / "wav.scp"):
        if command.endswith("|"):
            raise UserError(
                f"{folder / 'wav.scp'} line {number} is a pipe ({command}), and no command is run; write its output to "
                "a file and name that"
            )
        recordings[name] = root / os.path.expanduser(command)
    segments: dict[str, tuple[str, float, float | None]] = {name: (name, 0.0, None) for name in recordings}
    if (folder / "segments").is_file():
        segments = {}
        for number, name, rest in _entries(folder / "segments"):
            segments[name] = _segment(rest, f"{folder / 'segments'} line {number}")
    speakers = {}
    if (folder / "utt2spk").is_file():
        speakers = {name: speaker for _, name, speaker in _entries(folder / "utt2spk")}
    listing = Listing([])
    texts = set()
    present = {name: os.path.isfile(path) for name, path in recordings.items()}
    for number, name, text in _entries(folder / "text"):
        texts.add(name)
        place = f"{folder / 'text'} line {number}"
        recording, start, end = segments.get(name, (name, 0.0, None))
        audio = recordings.get(recording)
        if name not in segments or audio is None:
            reason = f"{place}: utterance {name} has no audio in wav.scp{'' if name in segments else ' or segments'}"
            listing.broken.append(Broken(name, place, f"{reason}; add it or remove the line"))
        elif not present[recording]:
            reason = f"{place}: there is no audio file {audio}; correct wav.scp, or where its paths start from"
            listing.broken.append(Broken(name, f"{place} ({audio})", f"{reason} (data.audio_root)"))
        else:
            item = Utterance(name, " ".join(text.split()), audio, speakers.get(name), place, start, end)
            listing.utterances.append(item)
    if not texts:
        raise UserError(f"{key}={folder} has no utterances")
    listing.utterances.sort(key=lambda item: item.id)
    files = [name for name in ("wav.scp", "text", "segments", "utt2spk") if (folder / name).is_file()]
    listing.recognised = f"{folder} is read as a folder of Kaldi ({', '.join(files)}), paths from {root}"
    if unused := sorted(segments.keys() - texts):
        listing.unused = f"audio without a line in {folder / 'text'} is left out: {len(unused)}, e.g. {unused[0]}"
    return listing


def _entries(path: Path) -> Iterator[tuple[int, str, str]]:
    """Give the line, the first word and the rest of every line of a file.

    Raises:
        UserError: Two lines begin with the same word.
    """
    lines: dict[str, int] = {}
    for number, line in enumerate(text_lines(path), start=1):
        if not line.strip():
            continue
        name, *rest = line.split(maxsplit=1)
        if name in lines:
            raise UserError(f"{path} line {number}: {name} is there already, on line {lines[name]}; remove one of them")
        lines[name] = number
        yield number, name, rest[0].strip() if rest else ""


def _segment(rest: str, place: str) -> tuple[str, float, float | None]:
    """Read recording, start and end; the end is None for that of the recording."""
    try:
        recording, begin, finish, *_ = rest.split()  # a channel may follow
        start, end = float(begin), float(finish)
    except ValueError as error:
        raise UserError(f"{place} does not name a recording, its start and its end in seconds; correct it") from error
    if not 0 <= start < (end if end != -1 else start + 1) < 1e9:
        raise UserError(f"{place} goes from {start:g} to {end:g} s; correct it")
    return recording, start, None if end == -1 else end
