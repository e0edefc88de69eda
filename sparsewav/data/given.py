"""Speech from what a caller of Python has: files, arrays, a data set of Hugging Face's, or the settings of a source."""

import io
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from torch import Tensor

from sparsewav.data.batches import SpeechBatches, check_labels, check_lengths
from sparsewav.data.librispeech import audio_without_transcript, read_librispeech_folder
from sparsewav.data.sets import Sets
from sparsewav.data.text import Normalization, choose_normalization, normalized
from sparsewav.data.utterances import Utterance, sample_utterances
from sparsewav.errors import UserError
from sparsewav.models.load import SpeechModel
from sparsewav.models.processor import Parts, Processor
from sparsewav.progress import print_warning
from sparsewav.pruning.encoder import takes_padding
from sparsewav.settings.data import Data, DemoData

SUFFIXES = (".flac", ".wav", ".ogg", ".opus", ".mp3", ".aiff", ".au")
"""What is taken for audio in a folder without transcripts; a file that is named may have any suffix."""

DEMO = "demo"
"""Stands for the demo's speech, as in ``data=demo``."""


def calibration_batches(
    speech: Any,
    processor: Processor | SpeechModel,
    *,
    utterances: int | None = None,
    seed: int = 0,
    seconds_per_batch: float = 60.0,
    case: str = "auto",
    remove_characters: str | None = None,
    sampling_rate: int | None = None,
    audio_column: str = "audio",
    text_column: str | None = None,
) -> SpeechBatches:
    """Make the batches that :func:`sparsewav.prune` calibrates on.

    >>> model = sparsewav.load_model("facebook/wav2vec2-base-100h")  # doctest: +SKIP
    >>> batches = sparsewav.calibration_batches(["one.wav", "two.flac"], model)  # doctest: +SKIP
    >>> batches = sparsewav.calibration_batches(load_dataset(...), model, utterances=128)  # doctest: +SKIP

    Without transcripts the batches have no labels, and the allocations ``hutchinson`` and ``hawq`` refuse them.

    Args:
        speech: What :func:`as_utterances` takes.
        processor: The processor of the model, or better what :func:`sparsewav.load_model` gave: without the model
            nothing is padded, and utterances of different lengths share no batch.
        utterances: The size of a random sample, as ``calibration.utterances`` of the command; None for all.
        seed: Draws the sample, as the command's does.
        seconds_per_batch: Most audio in one batch in seconds, padding included; lower it when memory is short.
        case: Of the labels: ``keep``, ``lower``, ``upper``, or ``auto`` for what the model can write most of.
        remove_characters: Characters that the labels are without.
        sampling_rate: As in :func:`as_utterances`.
        audio_column: As there.
        text_column: As there.

    Raises:
        UserError: The speech cannot be read, there is too little of it, or its transcripts cannot be labels.
    """
    model = processor.model if isinstance(processor, SpeechModel) else None
    processor = processor.processor if isinstance(processor, SpeechModel) else processor
    if isinstance(speech, str) and speech == DEMO:
        speech = DemoData()
    if isinstance(speech, Data) and utterances is not None:  # a stream is not read whole for a sample
        chosen = Sets(speech).calibration(utterances, seed)
    else:
        columns: Any = {"audio_column": audio_column, "text_column": text_column}
        chosen = as_utterances(speech, "calibration", sampling_rate=sampling_rate, **columns)
        if utterances is not None:
            chosen = sample_utterances(chosen, utterances, seed, key="utterances")
    lacking = [utterance for utterance in chosen if not utterance.text]
    if 0 < len(lacking) < len(chosen):
        raise UserError(
            f"{lacking[0].source} has no transcript, and others have; give every utterance one, or none of them"
        )
    if lacking:
        processor = Parts(processor.feature_extractor)
    chosen, _ = prepared(chosen, processor, case, remove_characters)
    if model is not None:
        check_lengths(chosen, model, processor, labels=False)
    return SpeechBatches(chosen, processor, seconds_per_batch, padding=model is not None and takes_padding(model))


def prepared(
    utterances: list[Utterance], processor: Processor, case: str, remove: str | None
) -> tuple[list[Utterance], Normalization]:
    """Normalize and check the transcripts of utterances, and print what was assumed.

    Returns:
        The utterances, and how they were normalized.

    Raises:
        UserError: A transcript is missing, or has characters that the model cannot write.
    """
    texts = (utterance.text for utterance in utterances)
    how, assumed = choose_normalization(texts, processor.tokenizer, case, remove)
    for sentence in assumed:
        print_warning(sentence)
    utterances = normalized(utterances, how)
    check_labels(utterances, processor, how)
    return utterances, how


def as_utterances(
    source: Any,
    role: str = "evaluation",
    *,
    sampling_rate: int | None = None,
    audio_column: str = "audio",
    text_column: str | None = None,
) -> list[Utterance]:
    """Give utterances; where there is no transcript, the text is empty.

    Args:
        source: An audio file; a folder of them, in LibriSpeech's layout or without transcripts; a list of audio, of
            pairs (audio, text) or of utterances; a ``datasets.Dataset``; ``demo`` or an object of settings such as
            ``LibriSpeechFolder(root=...)``, of which the subset of the role is read. Audio is a file, the bytes of one,
            an array of shape (samples,), or a dictionary with ``array`` and ``sampling_rate``.
        role: ``calibration`` or ``evaluation``, which settings have one of each.
        sampling_rate: Samples a second of arrays that do not say it.
        audio_column: The column of a data set, or the key of a dictionary, that has the audio.
        text_column: That of the transcripts; None for ``text`` or ``sentence``, if there is one.

    Raises:
        UserError: Something is none of these, a file or a column is missing, or there are no utterances.
    """
    if isinstance(source, str) and source == DEMO:
        source = DemoData()
    if isinstance(source, Data):
        return _read_set(source, role)
    if isinstance(source, str | Path) and Path(source).expanduser().is_dir():
        return _read_folder(Path(source).expanduser())
    if isinstance(source, str | bytes | Path | np.ndarray | Tensor | Utterance):
        source = [source]
    elif isinstance(source, Mapping):
        if not {"array", "bytes", "path", audio_column} & source.keys():  # a DatasetDict
            raise UserError(f"there are several data sets: {', '.join(map(str, source))}; give one of them")
        source = [source]
    elif hasattr(source, "cast_column"):
        source = _undecoded(source, audio_column, text_column)
    elif not isinstance(source, Iterable):
        raise UserError(f"a {type(source).__name__} holds no speech; give audio files, arrays or a data set")
    utterances = [
        _utterance(item, number, sampling_rate, audio_column, text_column) for number, item in enumerate(source)
    ]
    if not utterances:
        raise UserError("there are no utterances; give at least one")
    return utterances


def _read_set(data: Data, role: str) -> list[Utterance]:
    sets = Sets(data)
    found = sets.evaluation() if role == "evaluation" else sets.read(role)
    if len(found) > 1:
        raise UserError(f"{data.subset(role)[0]} names {len(found)} sets; give one of them: {', '.join(found)}")
    for sentence in sets.left_out([role]):
        print_warning(sentence)
    (utterances,) = found.values()
    return utterances


def _read_folder(folder: Path) -> list[Utterance]:
    if any(folder.glob("*/*/*.trans.txt")):
        utterances = read_librispeech_folder(folder.parent, folder.name)
        if files := audio_without_transcript(folder, utterances):
            print_warning(f"audio without a transcript in {folder} is left out: {len(files)} files, e.g. {files[0]}")
        return utterances
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        raise UserError(f"{folder} has no audio files ({', '.join(SUFFIXES)}); check the path")
    return [Utterance(str(path.relative_to(folder)), "", path) for path in files]


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
        columns = (text_column,) if text_column is not None else ("text", "sentence")
        audio, identifier = item[audio_column], item.get("id")
        text = next((item[column] for column in columns if item.get(column) is not None), "")
    if not isinstance(text, str):
        raise UserError(f"the transcript of item {number} is a {type(text).__name__}; give a text")
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
        raise UserError(f"item {number} is a {type(audio).__name__}; give an audio file, or an array of samples")
    samples = np.squeeze(np.asarray(audio))
    if samples.ndim != 1:
        raise UserError(f"the samples of item {number} have shape {samples.shape}; give one channel, shape (samples,)")
    if samples.dtype != np.int16 and not np.issubdtype(samples.dtype, np.floating):
        raise UserError(
            f"the samples of item {number} are {samples.dtype}; give floating-point numbers from -1 to 1, or int16"
        )
    if rate is None:
        raise UserError(f"item {number} is an array; say how many samples it has in a second, sampling_rate=16000")
    contents = io.BytesIO()
    if samples.dtype == np.int16:
        soundfile.write(contents, samples, int(rate), format="WAV", subtype="PCM_16")
    else:
        soundfile.write(contents, samples.astype(np.float32), int(rate), format="WAV", subtype="FLOAT")
    return contents.getvalue()
