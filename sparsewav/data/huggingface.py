"""Utterances of a data set that the library ``datasets`` reads: from the hub, or from a folder."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from pyarrow import compute
from rich.console import Console

from sparsewav.data.manifest import ID_COLUMNS, SPEAKER_COLUMNS, first_value
from sparsewav.data.utterances import Broken, Listing, StoredAudio, Utterance
from sparsewav.errors import UserError
from sparsewav.progress import stage
from sparsewav.settings.data import HuggingFace

TEXT_COLUMNS = ("text", "sentence", "transcription", "transcript", "normalized_text")
"""One of them has the transcripts where ``data.text_column`` names none."""

BUFFER = 4
"""The buffer in which a stream is shuffled has so many rows for every utterance that is drawn from it."""

Item = Utterance | Broken


def read_dataset(data: HuggingFace, split: str, given: str, *, needs_text: bool = True) -> Listing:
    """List the utterances of a split, in its order.

    The audio stays encoded. It is read from the data set when it is needed; that of a stream is kept in memory.

    Args:
        data: Says which data set and columns to take.
        split: Name of the split.
        given: The setting that names it, with its value, for messages.
        needs_text: Whether there has to be a column of transcripts.

    Raises:
        UserError: The data set or the split cannot be read, or has no such columns.
    """
    with _explained(data, given):
        table, audio, text = _load(data, split, needs_text)
        if data.streaming:
            with stage(Console(), f"Streaming {split} of {_name(data)}"):
                items = list(_streamed(table, audio, text, split))
        else:
            items = list(_stored(table, audio, text, split))
    if not items:
        raise UserError(f"{given} of {_name(data)} has no rows")
    listing = Listing(with_ids(items, split), [item for item in items if isinstance(item, Broken)])
    if (data.audio_column, data.text_column) != (audio, text):
        listing.recognised = f"{split} of {_name(data)} is read from {_said(audio, text)}"
    return listing


def stream_shuffled(
    data: HuggingFace, split: str, given: str, count: int, seed: int, *, needs_text: bool = True
) -> tuple[Iterator[Item], str]:
    """Shuffle a split while it is streamed, so that a sample needs a part of it.

    Args:
        data: Says which data set and columns to take.
        split: Name of the split.
        given: The setting that names it, with its value, for messages.
        count: Size of the sample, by which that of the buffer goes.
        seed: Seed of the shuffle.
        needs_text: Whether there has to be a column of transcripts.

    Returns:
        The whole split, of which the sample is the beginning, and a sentence that says so.

    Raises:
        UserError: As :func:`read_dataset` does; the iterator does, too.
    """
    with _explained(data, given):
        table, audio, text = _load(data, split, needs_text)
        table = table.shuffle(seed=seed, buffer_size=BUFFER * count)

    def items() -> Iterator[Item]:
        with _explained(data, given):
            yield from _streamed(table, audio, text, f"the shuffled {split}")

    return items(), (
        f"calibration on the first {count} utterances of the stream of {split} of {_name(data)} "
        f"({_said(audio, text)}), whose files and a buffer of {BUFFER * count} rows are shuffled with seed {seed}: no "
        "uniform sample of all its rows"
    )


def with_ids(items: Sequence[Item], split: str) -> list[Utterance]:
    """Give the utterances among the items, by their rows where ids are missing or repeat."""
    names = [item.id for item in items]
    if all(names) and len(set(names)) == len(names):
        return [item for item in items if isinstance(item, Utterance)]
    return [replace(item, id=f"{split}-{row:06}") for row, item in enumerate(items) if isinstance(item, Utterance)]


def _said(audio: str, text: str) -> str:
    return f"its columns {audio} and {text}" if text else f"its column {audio}, without transcripts"


def _name(data: HuggingFace) -> str:
    return data.path + (f" ({data.name})" if data.name else "")


@contextmanager
def _explained(data: HuggingFace, given: str) -> Iterator[None]:
    """Within the block, turn errors of the library into a sentence, and let it list audio without torchcodec."""
    import datasets

    encode: Any = datasets.Audio.encode_example
    datasets.Audio.encode_example = _leave_encoded
    try:
        yield
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, UserError):
            raise
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else None
        raise UserError(
            f"{given} cannot be read from {_name(data)}: {' '.join(str(cause or error).split())}; check the names and "
            "the network, or take data=manifest or data=librispeech_dir with files of this machine"
        ) from error
    finally:
        datasets.Audio.encode_example = encode


def _leave_encoded(self: Any, value: Any) -> dict[str, Any]:
    """Stand in for ``Audio.encode_example``, which wants torchcodec for files that it only names, too."""
    if isinstance(value, str | Path):
        return {"bytes": None, "path": str(value)}
    if isinstance(value, bytes):
        return {"bytes": value, "path": None}
    if not isinstance(value, dict) or "array" in value:
        raise UserError("the data set has decoded audio, which is not read; save it with encoded files")
    return {"bytes": value.get("bytes"), "path": value.get("path")}


def _load(data: HuggingFace, split: str, needs_text: bool) -> tuple[Any, str, str]:
    """Open a split with its audio undecoded, and give its columns of audio and transcripts, too."""
    import datasets
    import huggingface_hub

    for library in (datasets, huggingface_hub):
        library.utils.logging.set_verbosity_error()  # else retries without a network are told line by line
    datasets.disable_progress_bars()
    table = _saved(data, split)
    if table is None:
        options = {"split": split, "streaming": data.streaming, "revision": data.revision}
        local = Path(data.path).expanduser()
        path = str(local) if local.is_dir() else data.path
        table = datasets.load_dataset(path, data.name, **options)
    audio, text = _columns(data, table.features or {}, needs_text)
    return table.cast_column(audio, datasets.Audio(decode=False)), audio, text


def _saved(data: HuggingFace, split: str) -> Any:
    """Open a split that ``save_to_disk`` wrote; None if the path is something else."""
    import datasets

    folder = Path(data.path).expanduser()
    if (folder / "state.json").is_file():
        raise UserError(
            f"data.path={data.path} is a single data set; name the folder that it is in, {folder.absolute().parent}, "
            f"and {folder.name} as the split"
        )
    saved = sorted(path.parent.name for path in folder.glob("*/state.json"))
    if not saved:
        return None
    if split not in saved:
        raise UserError(f"data.path={data.path} has no split {split}; it has {', '.join(saved)}")
    table = datasets.load_from_disk(str(folder / split)).with_format(None)  # it may have been saved with one
    return table.to_iterable_dataset() if data.streaming else table


def _columns(data: HuggingFace, features: Mapping[str, Any], needs_text: bool) -> tuple[str, str]:
    """Give the columns of audio and transcripts: those that are named, or the only ones that may be meant, or ""."""
    from datasets import Audio

    audio = [name for name, feature in features.items() if isinstance(feature, Audio)]
    text = [name for name in TEXT_COLUMNS if name in features]
    chosen = []
    for kind, given, found in (("audio", data.audio_column, audio), ("text", data.text_column, text)):
        if given and features and given not in features:
            raise UserError(f"data.{kind}_column={given} is not in data.path={data.path}; it has {', '.join(features)}")
        if kind == "text" and not given and not found and not needs_text:
            found = [""]
        if not given and len(found) != 1:
            there = f"{' and '.join(found)} may have the {kind}" if found else f"no column is known to have the {kind}"
            raise UserError(
                f"in data.path={data.path} {there}; name it with data.{kind}_column=, of "
                f"{', '.join(features) or 'its columns, which it does not list'}"
            )
        chosen.append(given or found[0])
    kind = getattr(features.get(chosen[1]), "dtype", "string")
    if "string" not in kind:  # as of numbers in metadata.csv, whose zeros in front are gone
        raise UserError(
            f"the column {chosen[1]} of data.path={data.path} has no text, but {kind}; name another with "
            "data.text_column=, or, if they come from a CSV file, read it with data=manifest, which takes it as written"
        )
    return chosen[0], chosen[1]


def _stored(table: Any, audio: str, text: str, split: str) -> Iterator[Item]:
    """Give every row of a data set on the disk, whose audio is not read yet."""
    others = [name for name in dict.fromkeys((text, *ID_COLUMNS, *SPEAKER_COLUMNS)) if name in table.column_names]
    recordings = table.select_columns([audio]).flatten_indices()
    column = recordings.data.column(audio)
    paths, contents = (compute.struct_field(column, name) for name in ("path", "bytes"))
    sizes = compute.binary_length(contents)
    for number, (row, path, size) in enumerate(zip(table.select_columns(others), paths, sizes, strict=True)):
        path, size = path.as_py(), size.as_py()
        stored = None if size is None else StoredAudio(recordings, number, audio, size)
        yield _item(row, text, f"row {number} of {split}", path, stored)


def _streamed(table: Any, audio: str, text: str, where: str) -> Iterator[Item]:
    """Give every row of a stream, with its audio."""
    for number, row in enumerate(table):
        recording = row[audio] or {}
        yield _item(row, text, f"row {number} of {where}", recording.get("path"), recording.get("bytes"))


def _item(
    row: Mapping[str, Any],
    text: str,
    place: str,
    path: str | None,
    audio: bytes | StoredAudio | Path | None,
) -> Item:
    """Give an utterance, or what is wrong with it; its id is empty where the row does not say one."""
    from datasets.utils.file_utils import xopen

    name = first_value(row, *ID_COLUMNS) or Path(path or "").stem
    words, fault = str(row.get(text) or "").split(), ""
    if audio is None and path and "://" in path:
        with xopen(path, "rb") as file:  # a file of a repository on the hub
            audio = file.read()
    elif audio is None and path:
        audio = Path(path)
        if not audio.is_file():
            fault = f"{place}: there is no audio file {path}"
    if audio is None:
        fault = f"{place} ({name}) has no audio"
    if fault or audio is None:
        return Broken(name, place, f"{fault}; leave it out of the data set")
    return Utterance(name, " ".join(words), audio, first_value(row, *SPEAKER_COLUMNS) or None, place)
