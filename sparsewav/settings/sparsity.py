"""The options of how much is removed."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Self

from sparsewav.settings.options import MISSING, Option, option


@dataclass(kw_only=True)
class Sparsity(Option):
    """How many weights are removed."""

    @property
    def fraction(self) -> float | None:
        """The share to remove of what the option counts; None where the allocation finds it."""
        raise NotImplementedError

    @property
    def pattern(self) -> tuple[int, int] | None:
        """(n, m) where n of every m consecutive weights of a row are kept; None otherwise."""
        return None


@dataclass
class Unstructured(Sparsity):
    """Any weight may be removed; the count is exact."""

    name: str = field(default="unstructured", init=False)
    target: float = option(0.75, "share of the prunable weights to remove, 0 to 1", least=0, most=1)

    @property
    def fraction(self) -> float:
        return self.target

    def __str__(self) -> str:
        return f"{self.target:g}"


@dataclass
class NM(Sparsity):
    """n of every m consecutive weights of a row are kept; GPUs have products for 2:4."""

    name: str = field(default="n_m", init=False)
    n: int = option(2, "weights that are kept")
    m: int = option(4, "consecutive weights of a row")

    @property
    def fraction(self) -> float:
        return 1 - self.n / self.m

    @property
    def pattern(self) -> tuple[int, int] | None:
        return self.n, self.m

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    def faults(self) -> Iterator[str]:
        wrong = list(super().faults())
        yield from wrong
        if not wrong and not 0 < self.n < self.m:
            yield f"n={self.n} and sparsity.m={self.m} make no pattern; choose 0 < n < m, e.g. 2 and 4"


@dataclass
class Megabytes(Sparsity):
    """As few weights are removed as the size of the weights file allows, the best model that fits."""

    name: str = field(default="megabytes", init=False)
    megabytes: float = option(
        MISSING, "size of the whole weights file in bitmask format at most, in 10^6 bytes", above=0
    )

    @property
    def fraction(self) -> None:
        return None

    @property
    def bytes(self) -> int:
        """The size of the weights file at most."""
        return int(round(self.megabytes * 1e6, 3))

    def __str__(self) -> str:
        return f"{self.megabytes:g} MB"


PARTS = ("heads", "units", "channels")
"""What ``sparsity=structured`` removes, whole."""


COUNTED = {"parameters": "parameters", "macs": "multiply-accumulates"}
"""What a share of the encoder can be of, by its key, and its name in sentences."""

SIZES = (*COUNTED, "speedup")
"""The keys that say how small or how fast the model is to be, of which one is given."""

RUNTIMES = ("pytorch", "bfloat16", "onnx_int8", "openvino_int8")
"""What a model that is to be faster runs in."""

SHORTEST, LONGEST = 0.1, 60.0
"""Seconds of the utterances that a model can be timed on."""


@dataclass
class Structured(Sparsity):
    """Whole attention heads and units of the feed-forward networks are removed, and the model becomes smaller.

    Channels of the front end's convolutions go as well where ``parts`` has them; all convolutions keep the same share.
    """

    name: str = field(default="structured", init=False)
    parameters: float | None = option(
        None,
        "share of the encoder's parameters (all but the CTC head's) that stay; or give another size",
        above=0,
        most=1,
    )
    macs: float | None = option(
        None,
        "share of the encoder's multiply-accumulates that stay, for ten seconds of audio; or give another size",
        above=0,
        most=1,
    )
    speedup: float | None = option(
        None,
        "how many times as fast as the dense model, measured on this machine's CPU; or give another size",
        above=1,
    )
    runtime: str = option(
        "pytorch",
        "what runs both where speedup is given: pytorch (float32), bfloat16, onnx_int8, openvino_int8",
        choices=RUNTIMES,
    )
    audio_seconds: list[float] = option(
        [5.0, 20.0], "lengths of the utterances that both are timed on; the speed-up is that of the sum"
    )
    uniform: bool = option(False, "every layer keeps equally many heads, and equally many units")
    parts: list[str] = option(
        ["heads", "units"],
        "what is removed: some of heads, units, and channels (of the convolutions in front of the layers)",
    )

    @property
    def counts(self) -> str:
        """What the share is of: ``parameters``, ``macs``, or the seconds of ``speedup``."""
        return next((key for key in reversed(SIZES) if getattr(self, key) is not None), SIZES[0])

    @property
    def share(self) -> float | None:
        """The share of it that stays; None where none is given."""
        return getattr(self, self.counts) if self.speedup is None else 1 / self.speedup

    @property
    def fraction(self) -> float | None:
        return None if self.share is None else round(1 - self.share, 12)

    @property
    def asked(self) -> str:
        """The key and its value, for sentences."""
        return f"sparsity.{self.counts}={getattr(self, self.counts):g}"

    def keeping(self, share: float) -> Self:
        """Give the same for another share that stays."""
        return self.changed(**{self.counts: share if self.speedup is None else round(1 / share, 9)})

    def __str__(self) -> str:
        if self.speedup is not None:
            return f"{self.speedup:g} times the speed"
        return f"{self.share:g} of the {COUNTED[self.counts]}"

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        given = [key for key in SIZES if getattr(self, key) is not None]
        if not given:
            yield (
                "parameters=null does not say how small the model is to be; give sparsity.parameters, sparsity.macs or "
                "sparsity.speedup"
            )
        if len(given) > 1:
            first, *others = (f"{key}={getattr(self, key)}" for key in given)
            count = "two sizes" if len(given) == 2 else "three sizes"
            yield f"{first} and {' and '.join(f'sparsity.{other}' for other in others)} are {count}; give one of them"
        if self.speedup is None and self.runtime in RUNTIMES[1:]:
            yield f"runtime={self.runtime} is that of a speed; give sparsity.speedup, or leave it out"
        if not self.audio_seconds or not all(_is_length(seconds) for seconds in self.audio_seconds):
            yield (
                f"audio_seconds=[{','.join(map(str, self.audio_seconds))}] must be some lengths from {SHORTEST:g} to "
                f"{LONGEST:g} seconds"
            )
        if not self.parts or len(set(self.parts)) < len(self.parts) or not set(self.parts) <= set(PARTS):
            yield f"parts=[{','.join(map(str, self.parts))}] must be some of {', '.join(PARTS)}, each once"


def _is_length(seconds: object) -> bool:
    return isinstance(seconds, int | float) and not isinstance(seconds, bool) and SHORTEST <= seconds <= LONGEST
