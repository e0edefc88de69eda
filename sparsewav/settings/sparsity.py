"""The options of how much is removed."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from sparsewav.settings.options import MISSING, Option, option


@dataclass(kw_only=True)
class Sparsity(Option):
    """How many weights are removed."""

    @property
    def fraction(self) -> float | None:
        """The share of the prunable weights to remove; None where the allocation finds it."""
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
