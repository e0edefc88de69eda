"""Where speech comes from, and which of it is read."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from sparsewav.settings.options import MISSING, Settings, option

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


def subset_faults(data: Data, roles: Iterable[str]) -> Iterator[str]:
    """Give a sentence for every role that has no subset, beginning with the key that names one."""
    keys = dict.fromkeys(data.subset(role)[0] for role in roles if not data.names(role))
    yield from (f"{key} has no value; give it: {key}=..." for key in keys)


@dataclass
class Subsets(Data):
    """A corpus whose subsets have names."""

    calibration_subset: Any = option(MISSING, "where the calibration sample is drawn from")
    evaluation_subset: Any = option(MISSING, "what the word error rate is measured on; every subset can be a list, too")
    training_subset: Any = option(MISSING, "what fine-tuning and sparsewav-train learn from")
    development_subset: Any = option(MISSING, "what sparsewav-train logs its word error rate on", identifies=False)

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
