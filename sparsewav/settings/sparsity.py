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


@dataclass
class Structured(Sparsity):
    """Whole attention heads and units of the feed-forward networks are removed, and the model becomes smaller.

    Channels of the front end's convolutions go as well where ``parts`` has them; all convolutions keep the same share.
    """

    name: str = field(default="structured", init=False)
    parameters: float | None = option(
        None, "share of the encoder's parameters (all but the CTC head's) that stay; or give macs", above=0, most=1
    )
    macs: float | None = option(
        None,
        "share of the encoder's multiply-accumulates that stay, for ten seconds of audio; or give parameters",
        above=0,
        most=1,
    )
    uniform: bool = option(False, "every layer keeps equally many heads, and equally many units")
    parts: list[str] = option(
        ["heads", "units"],
        "what is removed: some of heads, units, and channels (of the convolutions in front of the layers)",
    )

    @property
    def counts(self) -> str:
        """What the share is of: ``parameters`` or ``macs``."""
        return "parameters" if self.macs is None else "macs"

    @property
    def share(self) -> float | None:
        """The share of it that stays; None where none is given."""
        return self.parameters if self.macs is None else self.macs

    @property
    def fraction(self) -> float | None:
        return None if self.share is None else round(1 - self.share, 12)

    def keeping(self, share: float) -> Self:
        """Give the same for another share that stays."""
        return self.changed(**{self.counts: share})

    def __str__(self) -> str:
        return f"{self.share:g} of the {COUNTED[self.counts]}"

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if self.parameters is None and self.macs is None:
            yield "parameters=null does not say how small the model is to be; give sparsity.parameters or sparsity.macs"
        if self.parameters is not None and self.macs is not None:
            yield f"parameters={self.parameters} and sparsity.macs={self.macs} are two sizes; give one of them"
        if not self.parts or len(set(self.parts)) < len(self.parts) or not set(self.parts) <= set(PARTS):
            yield f"parts=[{','.join(map(str, self.parts))}] must be some of {', '.join(PARTS)}, each once"
