"""The sets of utterances that a configuration names."""

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

from sparsewav.data.demo import SUBSETS, demo_root
from sparsewav.data.fetched import fetched_once
from sparsewav.data.librispeech import audio_without_transcript, read_librispeech_folder, stream_librispeech
from sparsewav.data.utterances import Utterance, sample_utterances, with_shared_audio
from sparsewav.errors import UserError
from sparsewav.settings.data import Data, DemoData, LibriSpeechFolder

EVALUATION_SEED = 0
"""Draws ``data.evaluation_utterances``: not the run's seed, so that runs of several seeds are measured on the same."""


class Sets:
    """The sets of utterances that a configuration names; every subset is read once, when it is first asked for.

    Every method raises :class:`UserError` where a subset is missing, broken or too small.
    """

    def __init__(self, data: Data) -> None:
        self.data = data
        self._subsets: dict[str, list[Utterance]] = {}

    def read(self, role: str) -> dict[str, list[Utterance]]:
        """Give every utterance of a role's subsets, by the subsets' names."""
        key, _ = self.data.subset(role)
        names = self.data.names(role)
        if not names:
            raise UserError(f"{key} has no value; give it: {key}=...")
        for name in names:
            if name not in self._subsets:
                self._subsets[name] = _read(self.data, key, name)
        return {name: self._subsets[name] for name in names}

    def calibration(self, count: int, seed: int) -> list[Utterance]:
        """Give a random sample of the calibration subset."""
        if isinstance(self.data, DemoData | LibriSpeechFolder):
            return sample_utterances(self._all("calibration"), count, seed)
        key, _ = self.data.subset("calibration")
        (name,) = self.data.names("calibration")
        return _stream(key, name, count, seed)

    def evaluation(self) -> dict[str, list[Utterance]]:
        """Give the evaluation subsets by their names, or ``evaluation_utterances`` of each.

        These are the same ones always, in the subset's order.
        """
        count = self.data.evaluation_utterances
        sets = self.read("evaluation")
        if count is None:
            return sets
        drawn = {
            name: set(sample_utterances(utterances, count, EVALUATION_SEED, key="data.evaluation_utterances"))
            for name, utterances in sets.items()
        }
        return {
            name: [utterance for utterance in utterances if utterance in drawn[name]]
            for name, utterances in sets.items()
        }

    def training(self, seed: int) -> list[Utterance]:
        """Give the training subset, or a random sample of ``training_utterances`` of it."""
        utterances = self._all("training")
        if self.data.training_utterances is None:
            return utterances
        return sample_utterances(utterances, self.data.training_utterances, seed, key="data.training_utterances")

    def development(self) -> list[Utterance]:
        """Give the development subset."""
        return self._all("development")

    def _all(self, role: str) -> list[Utterance]:
        return list(chain.from_iterable(self.read(role).values()))

    def left_out(self, roles: Sequence[str]) -> list[str]:
        """Give a sentence for every subset of the roles in whose folder audio files have no transcript."""
        if not isinstance(self.data, LibriSpeechFolder):
            return []
        sentences = []
        for name, utterances in {name: items for role in roles for name, items in self.read(role).items()}.items():
            files = audio_without_transcript(Path(self.data.root).expanduser() / name, utterances)
            if files:
                sentences.append(
                    f"audio without a transcript in {name} is left out: {len(files)} files, e.g. {files[0]}"
                )
        return sentences


def _read(data: Data, key: str, name: str) -> list[Utterance]:
    if isinstance(data, LibriSpeechFolder):
        return read_librispeech_folder(Path(data.root).expanduser(), name, key)
    if not isinstance(data, DemoData):
        return _stream(key, name, None, 0)
    if name not in SUBSETS:
        raise UserError(f"{key}={name} is not in the demo corpus; it has {', '.join(SUBSETS)}")
    return read_librispeech_folder(demo_root((name,), data.seed), name)


def _stream(key: str, name: str, count: int | None, seed: int) -> list[Utterance]:
    configuration, slash, split = name.partition("/")
    if not slash:
        raise UserError(f"{key}={name} of data=librispeech must be <configuration>/<split>, e.g. clean/train.100")
    sample = {} if count is None else {"count": count, "seed": seed}
    identity = {"data": "openslr/librispeech_asr", "configuration": configuration, "split": split} | sample
    return fetched_once(identity, lambda: stream_librispeech(configuration, split, count, seed, key))


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
            key, value = data.subset(other)
            raise UserError(
                f"{fact}: their word error rate is not that of unseen speech; choose another subset than "
                f"{key}={value}, or allow it with data.allow_overlap=true"
            )
        sentences.append(f"{fact} (data.allow_overlap=true)")
        overlap |= set(shared)
    return len(overlap), sentences
