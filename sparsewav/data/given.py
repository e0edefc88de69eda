"""Speech from what a caller of Python has: files, arrays, a data set of Hugging Face's, or the settings of a source."""

import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from torch import Tensor

from sparsewav.data.batches import SpeechBatches, check_labels, check_lengths
from sparsewav.data.huggingface import TEXT_COLUMNS
from sparsewav.data.manifest import SUFFIXES as MANIFESTS
from sparsewav.data.sets import Sets, refuse_unreadable
from sparsewav.data.text import Normalization, choose_normalization, normalized
from sparsewav.data.utterances import Utterance, sample_utterances
from sparsewav.errors import UserError
from sparsewav.models.load import SpeechModel
from sparsewav.models.processor import Parts, Processor
from sparsewav.progress import print_warning
from sparsewav.pruning.encoder import takes_padding
from sparsewav.settings.data import Data, DemoData, LibriSpeechFolder, Manifest

SUFFIXES = (".flac", ".wav", ".ogg", ".opus", ".mp3", ".aiff", ".au")
"""What is taken for audio in a folder without transcripts; a file that is named may have any suffix."""

DEMO = "demo"
"""Stands for the demo's speech, as in ``data=demo``."""


def calibration_batches(
    data: Any,
    processor: Processor | SpeechModel,
    *,
    utterances: int | None = None,
    seed: int = 0,
    seconds_per_batch: float = 60.0,
    case: str | None = None,
    remove_characters: str | None = None,
    sampling_rate: int | None = None,
    audio_column: str | None = None,
    text_column: str | None = None,
) -> SpeechBatches:
    """Make the batches that :func:`sparsewav.prune` calibrates on.

    >>> speech = sparsewav.load_model("facebook/wav2vec2-base-100h")  # doctest: +SKIP
    >>> batches = sparsewav.calibration_batches(["one.wav", "two.flac"], speech)  # doctest: +SKIP
    >>> batches = sparsewav.calibration_batches(load_dataset(...), speech, utterances=128)  # doctest: +SKIP

    Without transcripts the batches have no labels, and the allocations ``hutchinson`` and ``hawq`` refuse them unless
    their ``trace`` is ``fisher``.

    Args:
        data: An audio file; a folder of them, in LibriSpeech's layout or without transcripts; a manifest (CSV, TSV,
            JSON lines); a list of audio or of pairs (audio, text); a ``datasets.Dataset`` or a ``pandas.DataFrame``;
            ``demo`` or an object of settings such as ``HuggingFace(path=...)``. Audio is a file, the bytes of one, an
            array of shape (samples,), or a dictionary with ``array`` and ``sampling_rate``.
        processor: The processor of the model, or better what :func:`sparsewav.load_model` gave: without the model
            nothing is padded, and utterances of different lengths share no batch.
        utterances: The size of a random sample, as ``calibration.utterances`` of the command; None for all.
        seed: Draws the sample, as the command's does.
        seconds_per_batch: Most audio in one batch in seconds, padding included; lower it when memory is short.
        case: Of the labels: ``keep``, ``lower``, ``upper``, or ``auto`` for what the model can write most of; None for
            that of the settings, where they are given, or ``auto``.
        remove_characters: Characters that the labels are without; None for those of the settings, or none.
        sampling_rate: Samples a second of arrays that do not say it.
        audio_column: The column of a data set or manifest, or the key of a dictionary, that has the audio; None for the
            only one of a data set, or ``audio``.
        text_column: That of the transcripts; None for ``text``, ``sentence`` or the like, if there is one.

    Raises:
        UserError: The speech cannot be read, there is too little of it, or its transcripts cannot be labels.
    """
    model = None
    if isinstance(processor, SpeechModel):
        model, processor = processor.model, processor.processor
    if utterances is not None and utterances < 1:
        raise UserError(f"utterances={utterances} must be at least 1")
    settings = settings_of(data, audio_column, text_column)
    if settings is not None and utterances is not None:  # a stream is not read whole for a sample
        chosen = _from_settings(settings, lambda sets: sets.calibration(utterances, seed))
    else:
        columns: Any = {"audio_column": audio_column, "text_column": text_column}
        chosen = as_utterances(data, "calibration", sampling_rate=sampling_rate, **columns)
        if utterances is not None:
            chosen = sample_utterances(chosen, utterances, seed, key="utterances")
    lacking = [utterance for utterance in chosen if not utterance.text]
    if 0 < len(lacking) < len(chosen):
        raise UserError(
            f"{lacking[0].source} has no transcript, and others have; give every utterance one, or none of them"
        )
    if lacking:
        processor = Parts(processor.feature_extractor)
    chosen, _ = prepared(chosen, processor, settings, case, remove_characters)
    if model is not None:
        check_lengths(chosen, model, processor, labels=False)
    return SpeechBatches(chosen, processor, seconds_per_batch, padding=model is not None and takes_padding(model))


def prepared(
    utterances: list[Utterance], processor: Processor, data: Data | None, case: str | None, remove: str | None
) -> tuple[list[Utterance], Normalization]:
    """Check utterances, normalize their transcripts, and print what was assumed.

    Args:
        utterances: Their transcripts are as in their source.
        processor: Makes labels of them.
        data: The settings that they were read by, if any.
        case: As in :func:`calibration_batches`.
        remove: Characters that the transcripts are to be without.

    Returns:
        The utterances, and how they were normalized.

    Raises:
        UserError: The audio cannot be read, or a transcript is missing or has characters that the model cannot write.
    """
    refuse_unreadable(utterances)
    if case not in (None, "auto", "keep", "lower", "upper"):
        raise UserError(f"case={case} is not known; choose auto, keep, lower or upper")
    case = case or (data.case if data else "auto")
    remove = remove if remove is not None or data is None else data.remove_characters
    texts = (utterance.text for utterance in utterances)
    how, assumed = choose_normalization(texts, processor.tokenizer, case, remove)
    for sentence in assumed:
        print_warning(sentence, log=False)  # logged, it would be on the screen twice
    utterances = normalized(utterances, how)
    check_labels(utterances, processor, how)
    return utterances, how


def as_utterances(
    source: Any,
    role: str = "evaluation",
    *,
    sampling_rate: int | None = None,
    audio_column: str | None = None,
    text_column: str | None = None,
) -> list[Utterance]:
    """Give utterances; where there is no transcript, the text is empty.

    Args:
        source: What :func:`calibration_batches` takes, or a list of utterances.
        role: ``calibration`` or ``evaluation``, which settings have one of each.
        sampling_rate: As in :func:`calibration_batches`.
        audio_column: As there.
        text_column: As there.

    Raises:
        UserError: Something is none of these, a file or a column is missing, or there are no utterances.
    """
    if data := settings_of(source, audio_column, text_column):
        return _from_settings(data, lambda sets: _one_set(sets, role))
    if isinstance(source, str | Path) and Path(source).expanduser().is_dir():
        return _audio_of_folder(Path(source).expanduser())
    audio_column = audio_column or _only_audio_column(source) or "audio"
    if isinstance(source, str | bytes | Path | np.ndarray | Tensor | Utterance):
        source = [source]
    elif isinstance(source, Mapping):
        if not {"array", "bytes", "path", audio_column} & source.keys():  # a DatasetDict
            raise UserError(f"there are several data sets: {', '.join(map(str, source))}; give one of them")
        source = [source]
    elif hasattr(source, "cast_column"):
        source = _undecoded(source, audio_column, text_column)
    elif hasattr(source, "iterrows"):  # going through a DataFrame gives the names of its columns
        source = source.to_dict("records")
    elif not isinstance(source, Iterable):
        raise UserError(
            f"something of type {type(source).__name__} holds no speech; give audio files, arrays or a data set"
        )
    utterances = [
        _utterance(item, number, sampling_rate, audio_column, text_column) for number, item in enumerate(source)
    ]
    if not utterances:
        raise UserError("there are no utterances; give at least one")
    return utterances


def settings_of(source: Any, audio_column: str | None = None, text_column: str | None = None) -> Data | None:
    """Give the settings by which the command would read a source; None where it has none for it."""
    if isinstance(source, Data):
        if faults := list(source.faults()):
            raise UserError("\n".join(f"data.{fault}" for fault in faults))
        return source
    if not isinstance(source, str | Path):
        return None
    if source == DEMO:
        return DemoData()
    path = Path(source).expanduser()
    if path.is_dir() and any(path.glob("*/*/*.trans.txt")):
        path = path.absolute()
        return LibriSpeechFolder(root=str(path.parent), calibration_subset=path.name, evaluation_subset=path.name)
    if (path.is_file() and path.suffix.lower() in MANIFESTS) or (path / "wav.scp").is_file():
        return Manifest(train=str(path), test=str(path), audio_column=audio_column, text_column=text_column)
    return None


def _from_settings(data: Data, read: Callable[[Sets], list[Utterance]]) -> list[Utterance]:
    """Read a set, and print what the reader should know about it."""
    sets = Sets(data)
    utterances = read(sets)
    for sentence in (*sets.recognised(), *sets.left_out()):
        print_warning(sentence, log=False)  # logged, it would be on the screen twice
    return utterances


def _one_set(sets: Sets, role: str) -> list[Utterance]:
    found = sets.evaluation() if role == "evaluation" else sets.read(role)
    if len(found) > 1:
        raise UserError(f"{sets.data.subset(role)[0]} names {len(found)} sets; give one of them: {', '.join(found)}")
    (utterances,) = found.values()
    return utterances


def _audio_of_folder(folder: Path) -> list[Utterance]:
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        raise UserError(f"{folder} has no audio files ({', '.join(SUFFIXES)}); check the path")
    return [Utterance(str(path.relative_to(folder)), "", path) for path in files]


def _only_audio_column(source: Any) -> str | None:
    """Give the column of a data set that has audio, if it is one."""
    if not hasattr(source, "cast_column"):
        return None
    import datasets

    columns = [
        name for name, kind in (getattr(source, "features", None) or {}).items() if isinstance(kind, datasets.Audio)
    ]
    return columns[0] if len(columns) == 1 else None


def _undecoded(dataset: Any, audio_column: str, text_column: str | None) -> Iterator[Mapping[str, Any]]:
    """Give the rows of a data set with their audio as it is encoded."""
    import datasets

    features = dataset.features or {}
    for kind, column in (("audio", audio_column), ("text", text_column)):
        if features and column is not None and column not in features:
            raise UserError(f"{kind}_column={column} is not in the data set; it has {', '.join(features)}")
    if isinstance(features.get(audio_column), datasets.Audio):
        dataset = dataset.cast_column(audio_column, datasets.Audio(decode=False))
    return iter(dataset)


def _utterance(item: Any, number: int, rate: int | None, audio_column: str, text_column: str | None) -> Utterance:
    if isinstance(item, Utterance):
        return item
    audio, text, identifier = item, "", None
    if isinstance(item, tuple) and len(item) == 2:
        audio, text = item
    elif isinstance(item, Mapping) and audio_column in item:
        columns = (text_column,) if text_column is not None else TEXT_COLUMNS
        audio, identifier = item[audio_column], item.get("id")
        if text_column is not None and text_column not in item:
            raise UserError(f"text_column={text_column} is not in item {number}; it has {', '.join(map(str, item))}")
        text = next((item[column] for column in columns if item.get(column) is not None), "")
    elif isinstance(item, Mapping) and not {"array", "bytes", "path"} & item.keys():
        raise UserError(
            f"item {number} has no {audio_column}, but {', '.join(map(str, item))}; say which is the audio, "
            "audio_column=..."
        )
    if not isinstance(text, str):
        remedy = "give a text"
        if isinstance(audio, np.ndarray | Tensor):  # (samples, rate), as torchaudio gives it
            remedy += ", or write an array and its rate {'array': ..., 'sampling_rate': ...}"
        raise UserError(f"the transcript of item {number} is of type {type(text).__name__}; {remedy}")
    found = _audio(audio, number, rate)
    # Utterances of one length are in a batch in the order of their names.
    name = identifier if identifier is not None else audio if isinstance(audio, str | Path) else f"{number:06}"
    return Utterance(str(name), " ".join(text.split()), found)


def _audio(audio: Any, number: int, rate: int | None) -> Path | bytes:
    """Give an audio file or its contents; samples become a WAV file of the same numbers."""
    if isinstance(audio, Mapping):
        if audio.get("bytes") is not None:  # a row of a data set that is not decoded
            return bytes(audio["bytes"])
        audio, rate = audio.get("array", audio.get("path")), audio.get("sampling_rate", rate)
    if isinstance(audio, bytes):
        return audio
    if isinstance(audio, str | Path):
        path = Path(audio).expanduser()
        if not path.is_file():
            raise UserError(f"{path} is not a file; check the path")
        return path
    if isinstance(audio, Tensor):
        audio = audio.detach().cpu().numpy()
    if not isinstance(audio, np.ndarray | list) or not np.issubdtype(np.asarray(audio).dtype, np.number):
        raise UserError(
            f"the audio of item {number} is of type {type(audio).__name__}; give a file, an array of samples, or "
            "{'array': ..., 'sampling_rate': ...}"
        )
    samples = np.squeeze(np.asarray(audio))
    if samples.ndim != 1:
        raise UserError(f"the samples of item {number} have shape {samples.shape}; give one channel, shape (samples,)")
    if samples.dtype != np.int16 and not np.issubdtype(samples.dtype, np.floating):
        raise UserError(
            f"the samples of item {number} are {samples.dtype}; give floating-point numbers from -1 to 1, or int16"
        )
    if rate is None:
        raise UserError(f"item {number} is an array; say how many samples it has in a second, sampling_rate=16000")
    if rate != int(rate) or rate < 1:
        raise UserError(f"sampling_rate={rate} of item {number} is no whole number of samples a second; give one")
    contents = io.BytesIO()
    if samples.dtype == np.int16:
        soundfile.write(contents, samples, int(rate), format="WAV", subtype="PCM_16")
    else:
        soundfile.write(contents, samples.astype(np.float32), int(rate), format="WAV", subtype="FLOAT")
    return contents.getvalue()
