"""The result of pruning a model, in figures: of every matrix, and of the whole."""

from dataclasses import asdict, dataclass, field
from typing import Any

import pandas
from jaxtyping import Bool, Int
from torch import Tensor

from sparsewav.pruning.allocation.search import LevelAllocation
from sparsewav.pruning.recovery import LayerRecovery, ModelRecovery
from sparsewav.pruning.structured import StructureReport
from sparsewav.settings.pruning import (
    TRANSFORMER,
)


@dataclass(frozen=True)
class MatrixReport:
    """The result of pruning one matrix, in figures.

    Attributes:
        name: The name of its module.
        rows: Output features.
        cols: Input features.
        sensitivity: The mean trace (eq. 5), of the Hessian or of the Fisher information; None for an allocation that
            uses neither.
        sensitivity_error: The standard error of the sensitivity.
        rank: The rank by sensitivity, 0 for the highest.
        target_sparsity: The allocated sparsity.
        sparsity: The achieved sparsity, pruned weights over weights; a kept weight that is rounded to zero is not
            pruned.
        bits: Bits of a weight; None where the weights are not rounded to whole numbers.
        relative_error: ||WX − ŴX||² / ||WX||² on the calibration set; with the asymmetric objective
            ||WX − ŴX̂||² / ||WX||², where X are the dense model's inputs and X̂ those that the matrix was pruned on.
    """

    name: str
    rows: int
    cols: int
    sensitivity: float | None
    sensitivity_error: float | None
    rank: int | None
    target_sparsity: float
    sparsity: float
    bits: float | None
    relative_error: float


@dataclass(repr=False)
class PruneReport:
    """The result of :func:`sparsewav.prune`; :meth:`to_frame` makes a table of it.

    Attributes:
        matrices: A report for every matrix, in the model's order; empty where parts were removed whole.
        masks: The mask of every matrix by name, True where a weight is kept; empty without ``keep_masks``.
        sparsity: Pruned weights over prunable weights; of heads and units those that :func:`sparsewav.cut` cuts. Where
            channels were removed, the matrices in front of the layers that read them are counted, too.
        target_sparsity: The sparsity that was asked for; None where a size was.
        seconds: Seconds of the stages ``calibrate``, ``allocate`` and ``solve``, of ``recover`` where there is a
            recovery and of ``quantize`` where weights are rounded; a stage whose result was passed in takes none.
        warnings: Sentences that the user should read.
        recoveries: What the recovery of every transformer layer achieved, where there is one.
        recovery: What the recovery of the whole model achieved, where there is one.
        allocated: What the allocation over levels found; None for the other allocations.
        bytes: The size of the weights file in bitmask format, where one was asked for.
        scope: What was prunable: ``transformer`` or ``encoder``.
        structures: A report for every convolution, attention and feed-forward network that may have lost parts.
        kept: The indices of the channels, heads or units of each that stay, by its name, as :func:`sparsewav.cut` takes
            them.
        share: The share of the encoder's parameters, or multiply-accumulates, that stays after the cut; with a budget
            of seconds that of the dense model's seconds, by the sum of what was measured of its parts.
        speedup: How many times as fast as the dense model one with these parts was when the whole was timed; None where
            that was not asked for.
    """

    matrices: list[MatrixReport]
    masks: dict[str, Bool[Tensor, "_rows _cols"]]
    sparsity: float
    target_sparsity: float | None
    seconds: dict[str, float]
    warnings: list[str] = field(default_factory=list)
    recoveries: list[LayerRecovery] = field(default_factory=list)
    recovery: ModelRecovery | None = None
    allocated: LevelAllocation | None = None
    bytes: int | None = None
    scope: str = TRANSFORMER
    structures: list[StructureReport] = field(default_factory=list)
    kept: dict[str, Int[Tensor, " _kept"]] = field(default_factory=dict)
    share: float | None = None
    speedup: float | None = None

    @property
    def bits(self) -> float | None:
        """Mean nominal bits of a prunable weight; None where they are not rounded to whole numbers."""
        counted = [(matrix.bits, matrix.rows * matrix.cols) for matrix in self.matrices if matrix.bits is not None]
        return sum(bits * size for bits, size in counted) / sum(size for _, size in counted) if counted else None

    def to_frame(self) -> pandas.DataFrame:
        """Give a table with a row for every matrix or structure, whose name is the index, as in ``layers.csv``."""
        return pandas.DataFrame([asdict(row) for row in self.structures or self.matrices]).set_index("name")

    def __repr__(self) -> str:
        rows: list[Any] = [*self.structures, *self.matrices]
        worst = max(rows, key=lambda row: row.relative_error)
        seconds = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in self.seconds.items())
        asked = "" if self.target_sparsity is None else f" (asked for: {self.target_sparsity:.2%})"
        file = "" if self.bytes is None else f"; the weights file has {self.bytes / 1e6:.4f} MB"
        done = f"{self.sparsity:.2%} of the weights of the {self.scope}'s {len(self.matrices)} matrices are zero{asked}"
        if self.share is not None:
            left = ", ".join(
                f"{sum(row.kept for row in rows if row.kind == kind):,} of "
                f"{sum(row.parts for row in rows if row.kind == kind):,} {kind}"
                for kind in dict.fromkeys(row.kind for row in rows)
            )
            size = f"{self.share:.2%} of what the encoder had"
            if self.speedup is not None:
                size = f"{self.speedup:.2f} times as fast as the dense model when it was timed"
            done = f"{left} stay, {size}; sparsewav.cut makes the smaller model"
        lines = [
            done + (f", the others have {self.bits:.3g} nominal bits" if self.bits else "") + f"{file}; {seconds}",
            f"largest relative error of an output: {worst.relative_error:.3g}, of {worst.name}",
            *(f"! {warning}" for warning in self.warnings),
        ]
        return f"<{type(self).__name__}: " + "\n  ".join(lines) + ">"
