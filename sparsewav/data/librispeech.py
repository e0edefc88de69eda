"""Utterances of LibriSpeech from the hub, or from a folder in its layout."""

from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from sparsewav.data.utterances import Utterance
from sparsewav.errors import UserError
from sparsewav.progress import stage

AUDIO_SUFFIXES = (".flac", ".wav")


def read_librispeech_folder(root: Path, subset: str) -> list[Utterance]:
    """List the utterances of ``root/subset/<speaker>/<chapter>/``, ordered by id; a subset is e.g. ``test-clean``.

    Raises:
        UserError: A folder, a transcript or an audio file is missing, or a transcript is empty.
    """
    if not root.is_dir():
        raise UserError(f"data.root={root} is not a folder; point it at the folder that holds {subset}/")
    folder = root / subset
    if not folder.is_dir():
        present = ", ".join(sorted(path.name for path in root.iterdir() if path.is_dir())) or "no folders at all"
        raise UserError(f"data.root={root} has no subset {subset!r}; it holds {present}")
    utterances = [
        utterance for transcript in sorted(folder.glob("*/*/*.trans.txt")) for utterance in _read_transcript(transcript)
    ]
    if not utterances:
        raise UserError(
            f"{folder} has no transcripts (<speaker>/<chapter>/<speaker>-<chapter>.trans.txt); "
            "data.root must have LibriSpeech's layout"
        )
    return sorted(utterances, key=lambda utterance: utterance.id)


def _read_transcript(transcript: Path) -> Iterator[Utterance]:
    for number, line in enumerate(transcript.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        identifier, _, text = line.strip().partition(" ")
        if not text.strip():
            raise UserError(
                f"{transcript}, line {number}: utterance {identifier} has an empty transcript; "
                "write it or remove the line"
            )
        candidates = [transcript.parent / f"{identifier}{suffix}" for suffix in AUDIO_SUFFIXES]
        audio = next((path for path in candidates if path.is_file()), None)
        if audio is None:
            raise UserError(f"{transcript}, line {number}: there is no audio file {candidates[0]}")
        yield Utterance(identifier, text.strip().upper(), audio)


def stream_librispeech(configuration: str, split: str, count: int | None, seed: int) -> list[Utterance]:
    """Fetch a split of ``openslr/librispeech_asr`` from the hub, or a sample without fetching the whole split.

    A sample is the head of the stream after the order of shards and a buffer are shuffled, so that 2048 utterances of
    train-clean-100 need a part of its 100 hours only. The audio is left undecoded.

    Args:
        configuration: ``clean`` or ``other``.
        split: A split of it, e.g. ``train.100`` or ``test``.
        count: Size of the sample; ``None`` for the whole split in its own order.
        seed: Seed of the shuffle.

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
            return [Utterance(row["id"], row["text"].strip().upper(), row["audio"]["bytes"]) for row in stream]
    except (OSError, ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(
            f"data=librispeech: cannot stream {name} ({configuration}, {split}) from the hub: {error}; "
            "check the network, or use data=librispeech_dir data.root=/path/to/LibriSpeech"
        ) from error
