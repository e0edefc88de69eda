"""Where speech comes from, and which of it is read."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from sparsewav.settings.options import MISSING, Settings, no_value, option

ROLES = ("calibration", "evaluation", "training", "development")
"""What a run or a training reads speech for."""


@dataclass
class Data(Settings):
    """Which utterances are read."""

    evaluation_utterances: int | None = option(
        None, "a random sample of the evaluation set, the same for every run and seed; null: all", least=1
    )
    training_utterances: int | None = option(None, "a random sample of the training set; null: all", least=1)
    allow_overlap: bool = option(
        False, "let evaluation utterances be in the calibration or training set; every result then says so"
    )

    min_seconds: float | None = option(None, "leave out shorter utterances; null: none", above=0)
    max_seconds: float | None = option(None, "leave out longer utterances; null: none", above=0)
    text_filter: str | None = option(
        None, "leave out utterances whose transcript, as written, this regular expression does not match as a whole"
    )
    skip_broken: bool = option(
        False, "leave out utterances that cannot be read, and list them in left_out.csv; false: name the first and stop"
    )
    case: str = option(
        "auto",
        "of references, labels and hypotheses: keep (as written), lower, upper, or auto (what the model can write most "
        "of)",
        choices=("auto", "keep", "lower", "upper"),
    )
    remove_characters: str | None = option(
        None, "characters that references, labels and hypotheses are without, e.g. '\".,?!\"'; null: none"
    )

    def subset(self, role: str) -> tuple[str, Any]:
        """Give the key that names the subset of a role, as it is typed, and its value: a name, a list of names or None.

        Args:
            role: One of :data:`ROLES`.
        """
        raise NotImplementedError

    def names(self, role: str) -> list[str]:
        """Give the names of the subsets of a role; none where its key has no value."""
        _, value = self.subset(role)
        return [str(name) for name in (value if isinstance(value, list) else [value]) if name is not None]

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        for key, value in dict(map(self.subset, ROLES)).items():
            listed = value if isinstance(value, list) else [value]
            if not listed or (isinstance(value, list) and not all(isinstance(name, str) for name in value)):
                yield f"{key.removeprefix('data.')}={value} is not a name, nor a list of names"
            elif repeated := sorted({name for name in listed if listed.count(name) > 1}):
                yield f"{key.removeprefix('data.')} names {', '.join(repeated)} twice"
        if self.min_seconds and self.max_seconds and self.min_seconds > self.max_seconds:
            yield f"min_seconds={self.min_seconds:g} is above max_seconds={self.max_seconds:g}, which leaves nothing"
        try:
            re.compile(self.text_filter or "")
        except re.error as error:
            yield f"text_filter={self.text_filter} is not a regular expression ({error})"


def subset_faults(data: Data, roles: Iterable[str]) -> Iterator[str]:
    """Give a sentence for every role that has no subset, beginning with the key that names one."""
    keys = dict.fromkeys(data.subset(role)[0] for role in roles if not data.names(role))
    yield from map(no_value, keys)


@dataclass
class Subsets(Data):
    """A corpus whose subsets have names."""

    calibration_subset: Any = option(MISSING, "where the calibration sample is drawn from")
    evaluation_subset: Any = option(MISSING, "what the word error rate is measured on; every subset can be a list, too")
    training_subset: Any = option(MISSING, "what fine-tuning and sparsewav-train learn from")
    development_subset: Any = option(MISSING, "what sparsewav-train logs its word error rate on", identifies=False)

    min_seconds: float | None = option(None, "leave out shorter utterances; null: none", above=0)
    max_seconds: float | None = option(None, "leave out longer utterances; null: none", above=0)
    text_filter: str | None = option(
        None, "leave out utterances whose transcript, as written, this regular expression does not match as a whole"
    )
    skip_broken: bool = option(
        False, "leave out utterances that cannot be read, and list them in left_out.csv; false: name the first and stop"
    )

    def subset(self, role: str) -> tuple[str, Any]:
        return f"data.{role}_subset", getattr(self, f"{role}_subset")


@dataclass
class DemoData(Subsets):
    """Speech of eSpeak NG, made on first use."""

    calibration_subset: Any = option("calibration")
    evaluation_subset: Any = option("test")
    training_subset: Any = option("train")
    development_subset: Any = option("dev")
    seed: int = option(
        0,
        "of the demo's sentences, voices and noise; another seed is another corpus, made on first use",
        least=0,
        below=2**32,
    )


@dataclass
class LibriSpeechFolder(Subsets):
    """A folder in LibriSpeech's layout."""

    root: str = option(MISSING, "folder that holds the subsets")
    calibration_subset: Any = option("train-clean-100")
    evaluation_subset: Any = option("test-clean")
    training_subset: Any = option("train-clean-100")
    development_subset: Any = option("dev-clean")


@dataclass
class LibriSpeechHub(Subsets):
    """LibriSpeech from the Hugging Face hub; subsets are ``configuration/split``."""

    calibration_subset: Any = option("clean/train.100")
    evaluation_subset: Any = option("clean/test")
    training_subset: Any = option("clean/train.100")
    development_subset: Any = option("clean/validation")

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        yield from streaming_faults(self)


@dataclass
class Manifest(Data):
    """Files that list recordings and their transcripts: CSV, TSV, JSON lines, Common Voice, NeMo, folders of Kaldi."""

    train: Any = option(None, "a manifest, or a list of them, which fine-tuning and sparsewav-train learn from")
    test: Any = option(MISSING, "a manifest, or a list of them, which the word error rate is measured on")
    calibration: Any = option(None, "where the calibration sample is drawn from; null: train")
    development: Any = option(None, "what sparsewav-train logs its word error rate on", identifies=False)
    audio_column: str | None = option(None, "column of the audio files; null: audio, or that of a known layout")
    text_column: str | None = option(None, "column of the transcripts; null: text, or that of a known layout")
    audio_root: str | None = option(
        None, "folder that paths of audio start from; null: the manifest's, or clips/ beside it for Common Voice"
    )

    def subset(self, role: str) -> tuple[str, Any]:
        key = {"evaluation": "test", "training": "train"}.get(role, role)
        if key == "calibration" and self.calibration is None:
            key = "train"
        return f"data.{key}", getattr(self, key)


@dataclass
class HuggingFace(Data):
    """A data set that the library datasets reads, from the hub or from this machine."""

    path: str = option(
        MISSING, "a name on the hub, a folder that save_to_disk wrote, or any folder that load_dataset takes"
    )
    name: str | None = option(None, "configuration of the data set, such as its language; null: the only one")
    revision: str | None = option(None, "branch, tag or commit on the hub; null: the newest")
    split_train: Any = option("train", "the split, or a list of them, which fine-tuning and sparsewav-train learn from")
    split_test: Any = option("test", "the split, or a list of them, which the word error rate is measured on")
    split_calibration: Any = option(None, "where the calibration sample is drawn from; null: split_train")
    split_development: Any = option("validation", "what sparsewav-train logs its word error rate on", identifies=False)
    audio_column: str | None = option(None, "column of the audio; null: the only one of the type Audio")
    text_column: str | None = option(
        None, "column of the transcripts; null: the one called text, sentence, transcription, transcript or the like"
    )
    streaming: bool = option(
        False, "fetch only what is used; the calibration sample comes from a shuffled buffer of the stream"
    )

    def subset(self, role: str) -> tuple[str, Any]:
        key = {"evaluation": "split_test", "training": "split_train"}.get(role, f"split_{role}")
        if key == "split_calibration" and self.split_calibration is None:
            key = "split_train"
        return f"data.{key}", getattr(self, key)

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if self.streaming:
            yield from streaming_faults(self)


def streaming_faults(data: Data) -> Iterator[str]:
    """Give a sentence if a calibration sample would be drawn from several streams, one behind the other."""
    key, _ = data.subset("calibration")
    if len(data.names("calibration")) > 1:
        yield f"{key.removeprefix('data.')} names several, and a streamed calibration sample is drawn from one; name it"
