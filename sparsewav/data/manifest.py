"""Utterances that a file lists, a line for each: CSV, TSV or JSON lines, such as those of Common Voice and NeMo."""

import csv
import json
import math
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from sparsewav.data.kaldi import read_kaldi_folder
from sparsewav.data.librispeech import text_lines
from sparsewav.data.utterances import Broken, Listing, Utterance
from sparsewav.errors import UserError
from sparsewav.settings.data import Manifest

KNOWN_COLUMNS = (
    ("columns", "audio", "text"),
    ("Common Voice", "path", "sentence"),
    ("NeMo", "audio_filepath", "text"),
    ("metadata of an audiofolder", "file_name", "transcription"),
    ("metadata of an audiofolder", "file_name", "text"),
)
"""Layouts with their columns of audio and transcripts; the first that a manifest has is taken."""

ID_COLUMNS = ("id", "utt_id", "utterance_id")
SPEAKER_COLUMNS = ("speaker", "speaker_id", "client_id")
"""Columns of what a manifest, or a data set, may say besides; of each the first that has a value is taken."""

SUFFIXES = {".csv": "CSV", ".tsv": "TSV", ".json": "JSON", ".jsonl": "JSON", ".ndjson": "JSON"}


def read_manifest(data: Manifest, name: str, key: str, *, needs_text: bool = True) -> Listing:
    """List the utterances of a manifest, ordered by id.

    CSV is separated by the first of comma, semicolon, tab and bar that its header has, and may have quotes. In TSV
    quotes are characters as any other, as in the files of Common Voice. JSON has one object a line, where null and NaN
    stand for no value. A row may be a part of its recording, from ``offset`` on, for ``duration`` seconds; without
    ``offset`` the duration counts in NeMo's manifests alone, where a row is that much of its recording.

    Without a column of ids the id is the name of the audio file without its suffix, or its path where names repeat, and
    the times in milliseconds where a recording is on several lines.

    Args:
        data: Says which columns to take, and where relative paths start from.
        name: The file, or a folder of Kaldi.
        key: The setting that names it, for messages.
        needs_text: Whether there has to be a column of transcripts.

    Raises:
        UserError: The manifest is missing, empty or no text, has no such columns, or an id twice.
    """
    path = Path(name).expanduser()
    if path.name == "wav.scp" or path.is_dir():
        return read_kaldi_folder(path if path.is_dir() else path.parent, key, data.audio_root)
    if not path.is_file():
        raise UserError(f"{key}={name} does not exist; name a manifest (CSV, TSV, JSON lines) or a folder of Kaldi")
    rows = _rows(path)
    head = []
    for number, row in rows:
        head.append((number, row))
        if isinstance(row, dict):
            break
    if not head:
        raise UserError(f"{key}={name} has no utterances")
    if isinstance(row, str):
        raise UserError(f"{key}={name} has no line that can be read, e.g. line {head[0][0]} {head[0][1]}")
    layout = _layout(data, path, row, needs_text)
    listing = Listing([])
    if layout.said:
        listing.recognised = f"{path} is read as {layout.said}"
    found: dict[Path, bool] = {}
    for number, row in chain(head, rows):
        place = f"{path} line {number}"
        if isinstance(row, dict):
            odd = [key for key in (layout.audio, layout.text) if isinstance(row.get(key), list | dict | bool)]
            row = f"has no text in {odd[0]}, but {row[odd[0]]!r}; correct the line" if odd else row
        if isinstance(row, str):
            listing.broken.append(Broken(place, place, f"{place} {row}"))
            continue
        item = _utterance(row, place, layout)
        audio = item.audio
        assert isinstance(audio, Path)
        if audio not in found:
            found[audio] = os.path.isfile(audio)  # also of a name that no file can have
        if audio == layout.root:
            reason = f"{place} names no audio file in {layout.audio}; name it or remove the line"
        elif not found[audio]:
            remedy = "correct the path, or the folder that paths start from (data.audio_root)"
            reason = f"{place}: there is no audio file {audio}; {remedy}"
        else:
            listing.utterances.append(item)
            continue
        listing.broken.append(Broken(item.id or audio.stem, item.source, reason))
    listing.utterances = _with_ids(listing.utterances, layout.root)
    return listing


@dataclass(frozen=True)
class _Layout:
    """How the rows of one manifest are read.

    Attributes:
        audio: Column of the audio files.
        text: Column of the transcripts.
        root: Where relative paths start from.
        said: What was recognised without being told; empty if nothing was.
    """

    audio: str
    text: str
    root: Path
    said: str


def _layout(data: Manifest, path: Path, columns: Collection[str], needs_text: bool) -> _Layout:
    candidates = [(kind, data.audio_column or audio, data.text_column or text) for kind, audio, text in KNOWN_COLUMNS]
    found = [(kind, audio, text) for kind, audio, text in candidates if audio in columns and text in columns]
    if not needs_text and not data.text_column:
        found += [(kind, audio, "") for kind, audio, _ in candidates if audio in columns]
    if not found:
        wanted = [(data.audio_column, "audio_column", "audio"), (data.text_column, "text_column", "text")]
        lacking = [given or default for given, _, default in wanted if (given or default) not in columns]
        raise UserError(
            f"{path} has no column {' and no column '.join(lacking)}; it has {', '.join(columns) or 'none'}; "
            f"name the right ones with {' and '.join(f'data.{option}=' for _, option, _ in wanted)}"
        )
    kind, audio, text = found[0]
    root, clips = path.parent, path.parent / "clips"
    if data.audio_root:
        root = Path(data.audio_root).expanduser()
    elif (audio, text) == ("path", "sentence") and clips.is_dir():
        root = clips
    told = (audio, text) in ((data.audio_column, data.text_column), ("audio", "text"))
    others = [name for name in (*SPEAKER_COLUMNS, "offset") if name in columns]
    words = f"text in {text}" if text else "no transcripts"
    said = f"{kind}: audio in {audio}, {words}{', with '.join(['', *others])}, paths from {root}"
    return _Layout(audio, text, root, "" if told else said)


def _utterance(row: dict[str, Any], place: str, layout: _Layout) -> Utterance:
    """Read a row; its id is empty where the manifest has none."""

    start, duration = _seconds(first_value(row, "offset"), "offset", place), None
    if start is not None or layout.audio == "audio_filepath":
        duration = _seconds(first_value(row, "duration"), "duration", place)
    return Utterance(
        first_value(row, *ID_COLUMNS),
        " ".join(first_value(row, layout.text).split()),
        layout.root / os.path.expanduser(first_value(row, layout.audio)),
        first_value(row, *SPEAKER_COLUMNS) or None,
        place,
        start or 0.0,
        None if duration is None else (start or 0.0) + duration,
    )


def first_value(row: Mapping[str, Any], *columns: str) -> str:
    """Give the first value that a row has in the columns, as text without white space around; empty if it has none."""
    return next((str(row[name]).strip() for name in columns if not _is_missing(row.get(name))), "")


def _is_missing(value: Any) -> bool:
    return value in (None, "") or value != value  # NaN, which pandas has for none


def _seconds(value: str, column: str, place: str) -> float | None:
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < 1e9:
        raise UserError(f"{place}: {column} is {value!r}, which is no number of seconds")
    return seconds


def _with_ids(utterances: list[Utterance], root: Path) -> list[Utterance]:
    """Give utterances with an id that no other has, ordered by it.

    Raises:
        UserError: Two rows have one id, or are of the same recording.
    """
    given = any(item.id for item in utterances)
    if not given:
        lines = Counter(item.audio for item in utterances)
        names = {path: path.stem for path in lines if isinstance(path, Path)}
        if len(set(names.values())) < len(names):
            names = {path: _below(path, root) for path in names}
        utterances = [replace(item, id=_id(item, names, lines)) for item in utterances]
    first: dict[str, Utterance] = {}
    for item in utterances:
        if not item.id:
            raise UserError(f"{item.source} has no id, which other lines have; give it one")
        if item.id in first:
            what = f"has the id {item.id}" if given else "is there"
            raise UserError(
                f"{item.source} {what} a second time, after {first[item.id].source}; remove or correct one of them"
            )
        first[item.id] = item
    return [first[identifier] for identifier in sorted(first)]


def _below(path: Path, root: Path) -> str:
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()


def _id(item: Utterance, names: Mapping[Any, str], lines: Mapping[Any, int]) -> str:
    name = names[item.audio]
    if lines[item.audio] > 1 and (item.start or item.end):
        end = "" if item.end is None else f"-{round(1000 * item.end):07}"
        name = f"{name}-{round(1000 * item.start):07}{end}"
    return name


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Give the line and the row of every utterance, or what is wrong with it (``... has 3 fields``)."""
    lines: Iterator[tuple[int, str]] = enumerate(text_lines(path), start=1)
    start = next(((number, line) for number, line in lines if line.strip()), None)
    if start is None:
        return
    number, head = start
    kind = SUFFIXES.get(path.suffix.lower())
    if kind is None:
        kind = "JSON" if head.lstrip().startswith("{") else "TSV" if "\t" in head else "CSV"
    lines = chain([start], lines)
    if kind == "JSON":
        if head.lstrip().startswith("["):
            raise UserError(f"{path} is a list in JSON; write one object a line, e.g. with jq -c '.[]'")
        yield from ((number, _json_row(line)) for number, line in lines if line.strip())
        return
    table: Iterator[tuple[int, list[str]]]
    if kind == "TSV":
        table = ((number, line.split("\t")) for number, line in lines)
    else:
        separator = next((character for character in ",;\t|" if character in head), ",")
        table = _csv_rows(path, (f"{line}\n" for _, line in lines), number, separator)
    _, names = next(table)
    header = [name.strip() for name in names]
    if repeated := sorted({name for name in header if header.count(name) > 1}):
        raise UserError(f"{path} line {number} names the column {repeated[0]} twice; rename one of them")
    for number, fields in table:
        if not any(map(str.strip, fields)):
            continue
        if len(fields) != len(header):
            yield number, f"has {len(fields)} fields, and the header has {len(header)}; correct the line"
        else:
            yield number, dict(zip(header, fields, strict=True))


def _json_row(line: str) -> dict[str, Any] | str:
    try:
        row = json.loads(line)
        json.dumps(row, ensure_ascii=False).encode()  # fails at half of a pair of surrogates, which is no text
    except (ValueError, RecursionError) as error:
        return f"is not JSON ({error}); correct the line"
    return row if isinstance(row, dict) else "is no object of JSON; correct the line"


def _csv_rows(path: Path, lines: Iterator[str], start: int, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Give the line where every row begins, and its fields."""
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    number = start
    try:
        for fields in reader:
            yield number, fields
            number = start + reader.line_num
    except csv.Error as error:
        raise UserError(f"{path} line {number}: {error}; correct the quotes of the line") from error
