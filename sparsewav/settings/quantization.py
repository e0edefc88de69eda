"""The options of how few bits the kept weights have."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from sparsewav.settings.options import Option, option


@dataclass(kw_only=True)
class Quantization(Option):
    """To how few values the weights that are kept are rounded, after the solver and the recovery.

    Attributes:
        widths: Bits that a weight of a prunable matrix may have; empty where they stay floating-point numbers.
    """

    widths: ClassVar[tuple[float, ...]] = ()


@dataclass(kw_only=True)
class NoQuantization(Quantization):
    """The paper's: no weight is rounded."""

    name: str = field(default="none", init=False)


@dataclass(kw_only=True)
class Rounded(Quantization):
    """All weights are rounded."""

    rest: str = option(
        "int8",
        "of the weights that are not prunable: int8 or int6 (convolutions and matrices; biases and norms in float16), "
        "float16 or model (as they are)",
        choices=("int8", "int6", "float16", "model"),
    )


@dataclass(kw_only=True)
class Float16(Rounded):
    """Every number of the model is rounded to half precision."""

    name: str = field(default="float16", init=False)
    rest: str = option("float16")


@dataclass(kw_only=True)
class Integers(Rounded):
    """Weights become whole multiples of the scale of their group."""

    group_size: int | None = option(
        128, "consecutive weights of a row that share a scale; null: the whole row", least=1
    )
    symmetric: bool = option(True, "as many values below zero as above; false: every group has a zero point")
    range: str = option(
        "clipped",
        "clipped (2 to the power of bits values; larger weights are cut off) or coded (one scale a matrix, so coarse "
        "that a weight takes about so many bits on disk; nothing is cut off, and group_size plays no part)",
        choices=("clipped", "coded"),
    )
    rounding: str = option(
        "obs", "obs (the weights that are kept make up for what is rounded) or nearest", choices=("obs", "nearest")
    )

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if self.range == "coded" and not self.symmetric:
            yield "symmetric=false does not go with quantization.range=coded, which cuts nothing off; choose true"


@dataclass(kw_only=True)
class Int8(Integers):
    """8 bits a weight."""

    name: str = field(default="int8", init=False)
    widths: ClassVar[tuple[float, ...]] = (8,)


@dataclass(kw_only=True)
class Int4(Integers):
    """4 bits a weight."""

    name: str = field(default="int4", init=False)
    widths: ClassVar[tuple[float, ...]] = (4,)


@dataclass(kw_only=True)
class Int3(Integers):
    """3 bits a weight: seven values."""

    name: str = field(default="int3", init=False)
    widths: ClassVar[tuple[float, ...]] = (3,)


@dataclass(kw_only=True)
class Int2(Integers):
    """2 bits a weight: minus the scale, zero, the scale."""

    name: str = field(default="int2", init=False)
    widths: ClassVar[tuple[float, ...]] = (2,)


@dataclass(kw_only=True)
class Mixed(Integers):
    """Every matrix has the bits that ``sparsity=megabytes`` gives it, nominally 0.75 to 6 a weight."""

    name: str = field(default="mixed", init=False)
    widths: ClassVar[tuple[float, ...]] = (0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 4, 6)
    range: str = option("coded")
    rest: str = option("int6")

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if self.range == "clipped":
            yield "range=clipped does not go with quantization=mixed, whose bits are no whole numbers; choose coded"
