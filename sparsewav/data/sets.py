"""The sets of utterances that a configuration names.

Every function raises :class:`UserError` where the subset is missing, broken or too small.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from sparsewav.data.demo import SUBSETS, demo_root
from sparsewav.data.librispeech import audio_without_transcript, read_librispeech_folder, stream_librispeech
from sparsewav.data.utterances import Utterance, sample_utterances, with_shared_audio
from sparsewav.errors import UserError
from sparsewav.settings.run import Data, DemoData, LibriSpeechFolder

EVALUATION_SEED = 0
"""Draws ``data.evaluation_utterances``: not the run's seed, so that runs of several seeds are measured on the same."""


def calibration_set(data: Data, count: int, seed: int) -> list[Utterance]:
    """Give a random sample of the calibration subset."""
    if isinstance(data, (DemoData, LibriSpeechFolder)):
        return sample_utterances(whole_subset(data, "calibration_subset"), count, seed)
    return _stream(data, "calibration_subset", count, seed)


def evaluation_set(data: Data) -> list[Utterance]:
    """Give the evaluation subset, or ``evaluation_utterances`` of it: the same ones always, in the subset's order."""
    utterances = whole_subset(data, "evaluation_subset")
    if data.evaluation_utterances is None:
        return utterances
    count = data.evaluation_utterances
    drawn = set(sample_utterances(utterances, count, EVALUATION_SEED, key="data.evaluation_utterances"))
    return [utterance for utterance in utterances if utterance in drawn]


def training_set(data: Data, seed: int) -> list[Utterance]:
    """Give the training subset, or a random sample of ``training_utterances`` of it."""
    utterances = whole_subset(data, "training_subset")
    if data.training_utterances is None:
        return utterances
    return sample_utterances(utterances, data.training_utterances, seed, key="data.training_utterances")


def whole_subset(data: Data, key: str) -> list[Utterance]:
    """Give every utterance of the subset that a key of the settings names, e.g. ``evaluation_subset``."""
    subset = getattr(data, key)
    if isinstance(data, LibriSpeechFolder):
        return read_librispeech_folder(Path(data.root).expanduser(), subset, f"data.{key}")
    if not isinstance(data, DemoData):
        return _stream(data, key, None, 0)
    if subset not in SUBSETS:
        raise UserError(f"data.{key}={subset} is not in the demo corpus; it has {', '.join(SUBSETS)}")
    return read_librispeech_folder(demo_root((subset,), data.seed), subset)


def _stream(data: Data, key: str, count: int | None, seed: int) -> list[Utterance]:
    subset = getattr(data, key)
    configuration, slash, split = subset.partition("/")
    if not slash:
        raise UserError(
            f"data.{key}={subset} of data=librispeech must be <configuration>/<split>, e.g. clean/train.100"
        )
    return stream_librispeech(configuration, split, count, seed, f"data.{key}")


def left_out(data: Data, keys: Sequence[str]) -> list[str]:
    """Give a sentence for every subset that the keys name in whose folder audio files have no transcript."""
    if not isinstance(data, LibriSpeechFolder):
        return []
    sentences = {}
    for key in keys:
        subset = getattr(data, key)
        files = audio_without_transcript(Path(data.root).expanduser() / subset, whole_subset(data, key))
        if files:
            sentences[subset] = (
                f"audio without a transcript in {subset} is left out: {len(files)} files, e.g. {files[0]}"
            )
    return list(sentences.values())


def find_overlap(
    data: Data,
    measured: Sequence[Utterance],
    learned: Mapping[str, Sequence[Utterance]],
    name: str = "evaluation",
) -> tuple[int, list[str]]:
    """Count the utterances of a set that word error rates are measured on, from which the model is made, too.

    The content of the audio tells, whatever the names of utterances and subsets are.

    Args:
        data: The settings that name the subsets.
        measured: The utterances that the model is measured on.
        learned: The sets that the model is made from: ``calibration``, ``training``.
        name: Name of the first set.

    Returns:
        Their number, and a sentence for every set that has some of them.

    Raises:
        UserError: There are some, and ``data.allow_overlap`` is false.
    """
    overlap: set[Utterance] = set()
    sentences = []
    for other, utterances in learned.items():
        shared = with_shared_audio(measured, utterances)
        if not shared:
            continue
        fact = f"{len(shared)} of {len(measured)} {name} utterances are in the {other} set, e.g. {shared[0].source}"
        if not data.allow_overlap:
            raise UserError(
                f"{fact}: their word error rate is not that of unseen speech; choose another subset than "
                f"data.{other}_subset={getattr(data, f'{other}_subset')}, or allow it with data.allow_overlap=true"
            )
        sentences.append(f"{fact} (data.allow_overlap=true)")
        overlap |= set(shared)
    return len(overlap), sentences
