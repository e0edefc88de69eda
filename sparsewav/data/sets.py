"""The sets of utterances that a configuration names.

Every function raises :class:`UserError` where the subset is missing, broken or too small.
"""

from pathlib import Path

from sparsewav.data.demo import SUBSETS, demo_root
from sparsewav.data.librispeech import read_librispeech_folder, stream_librispeech
from sparsewav.data.utterances import Utterance, sample_utterances
from sparsewav.errors import UserError
from sparsewav.settings.run import Data, DemoData, LibriSpeechFolder


def calibration_set(data: Data, count: int, seed: int) -> list[Utterance]:
    """Give a random sample of the calibration subset."""
    if isinstance(data, (DemoData, LibriSpeechFolder)):
        return sample_utterances(_read(data, data.calibration_subset), count, seed)
    return _stream(data.calibration_subset, count, seed)


def evaluation_set(data: Data) -> list[Utterance]:
    """Give the evaluation subset, or its first ``evaluation_utterances``."""
    return whole_subset(data, data.evaluation_subset)[: data.evaluation_utterances]


def training_set(data: Data, seed: int) -> list[Utterance]:
    """Give the training subset, or a random sample of ``training_utterances`` of it."""
    utterances = whole_subset(data, data.training_subset)
    if data.training_utterances is None:
        return utterances
    return sample_utterances(utterances, data.training_utterances, seed, key="data.training_utterances")


def whole_subset(data: Data, subset: str) -> list[Utterance]:
    """Give every utterance of a subset."""
    if isinstance(data, (DemoData, LibriSpeechFolder)):
        return _read(data, subset)
    return _stream(subset, None, 0)


def _read(data: DemoData | LibriSpeechFolder, subset: str) -> list[Utterance]:
    if isinstance(data, LibriSpeechFolder):
        return read_librispeech_folder(Path(data.root).expanduser(), subset)
    if subset not in SUBSETS:
        raise UserError(f"the demo corpus has no subset {subset!r}; it has {', '.join(SUBSETS)}")
    return read_librispeech_folder(demo_root((subset,), data.seed), subset)


def _stream(subset: str, count: int | None, seed: int) -> list[Utterance]:
    configuration, slash, split = subset.partition("/")
    if not slash:
        raise UserError(f"subset {subset!r} of data=librispeech must be <configuration>/<split>, e.g. clean/train.100")
    return stream_librispeech(configuration, split, count, seed)
