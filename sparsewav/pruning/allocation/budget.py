"""A budget in bytes: the levels of a matrix in sparsity and bits, what they take in the file, and what fits.

The budget is the size of the whole weights file in bitmask format. What is not prunable is subtracted first, as
``quantization.rest`` has it. A level is a sparsity and, where weights are rounded to integers, a number of bits; every
matrix is really solved and rounded at each of them, and its bytes are those of its code in the file
(:mod:`~sparsewav.pruning.encoding`). Of a matrix's levels those are kept that no other beats in bytes and in the error
of the matrix's output; only for them the cost in the model's output is measured.

The levels are solved on the dense model's inputs. What the pruning makes of them later, layer by layer and with a
recovery, takes a little more or less: the file is measured at the end, and if it does not fit, a bit less is chosen.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from sparsewav.errors import UserError
from sparsewav.pruning.allocation.levels import Level, LevelStore, SolveLevels, choose_within, row_errors
from sparsewav.pruning.encoder import PrunableMatrix, prunable_matrices
from sparsewav.pruning.encoding import coded_bytes, file_bytes
from sparsewav.pruning.hessian import Hessians, Progress
from sparsewav.pruning.rest import round_tensor
from sparsewav.pruning.solvers.quantize import quantize_matrices
from sparsewav.pruning.solvers.solve import PrunedMatrix
from sparsewav.settings.pruning import Megabytes, Pruning
from sparsewav.settings.quantization import Float16, Integers, Quantization

HIGHEST = 0.95
"""The highest sparsity of a level."""

CODED_SPARSITIES = (0.0, 0.5, 0.75, 0.9)
"""The sparsities of the levels of ``quantization=mixed``."""

CLOSEST = 1.03
"""Ratio of the bytes of two levels of a matrix at least: closer ones are not worth measuring."""

MARGIN = 0.001
"""The share of the budget that is left free at first, because a matrix may come out larger than its level."""


@dataclass(frozen=True)
class ByteBudget:
    """The bytes of a weights file, and what turns pruned matrices into levels.

    Attributes:
        total: The bytes of the file at most.
        rest: What the file takes besides the prunable matrices, its header included.
        quantization: To how few values weights are rounded.
        damping: λ as a share of the Hessian's mean diagonal.
    """

    total: int
    rest: int
    quantization: Quantization
    damping: float

    @property
    def room(self) -> int:
        """The bytes for the prunable matrices."""
        return int(self.total * (1 - MARGIN)) - self.rest

    def sparsities(self, step: float) -> list[float]:
        """Give the sparsities of the levels; few suffice where a coarse scale makes zeros by itself."""
        if len(self.quantization.widths) > 1:
            return list(CODED_SPARSITIES)
        return [*(round(index * step, 9) for index in range(math.ceil(HIGHEST / step - 1e-6))), HIGHEST]

    def check_rest(self) -> None:
        """Refuse a budget that leaves nothing for the matrices, before any of them is solved.

        Raises:
            UserError: It says what the rest takes.
        """
        if self.room <= 0:
            raise UserError(
                f"sparsity.megabytes={self.total / 1e6:g} is too small: what is not prunable takes "
                f"{self.rest / 1e6:.3f} MB alone; choose more than that, or fewer bits for it (quantization.rest)"
            )

    def check(self, least: int) -> None:
        """Refuse a budget below what all matrices need at their smallest level (``least``, bytes).

        Raises:
            UserError: It says which budget is possible.
        """
        if least > self.room:
            possible = math.ceil((least + self.rest) / (1 - MARGIN) / 1000 + 1) / 1000
            bits = self._with_bits(min)
            raise UserError(
                f"sparsity.megabytes={self.total / 1e6:g} is too small: what is not prunable takes "
                f"{self.rest / 1e6:.3f} MB, and the matrices{bits} at {HIGHEST:.0%} sparsity {least / 1e6:.3f} MB; "
                f"choose at least {possible:.3f}, or fewer bits (quantization)"
            )

    def more_than_needed(self, most: int) -> str | None:
        """Give a sentence if the matrices fit at the level that loses least, where they take ``most`` bytes."""
        if most > self.room:
            return None
        bits = self._with_bits(max)
        return (
            f"sparsity.megabytes={self.total / 1e6:g} is more than the model needs: nothing is removed, and{bits} it "
            f"takes {(most + self.rest) / 1e6:.3f} MB"
        )

    def _with_bits(self, choose: Callable[[Sequence[float]], float]) -> str:
        """Name the fewest or the most bits of a level, for a sentence; nothing where weights have none."""
        widths = self.quantization.widths
        return f" with {choose(widths):g} nominal bits a weight" if widths else ""

    def levels(
        self,
        matrix: PrunableMatrix,
        plain: Sequence[Level],
        pruned: Sequence[PrunedMatrix],
        hessian: Float[Tensor, "cols cols"],
    ) -> tuple[list[Level], list[PrunedMatrix], np.ndarray]:
        """Round a matrix at every sparsity to every width; give what is worth having, and its bytes in ascending order.

        The last one is the matrix that has lost no weight, at the largest width.
        """
        made: list[tuple[Level, PrunedMatrix]] = []
        for bits in self.quantization.widths or (None,):
            rounded = self.rounded(pruned, hessian, bits, matrix.name)
            made += [(Level(level.sparsity, bits), one) for level, one in zip(plain, rounded, strict=True)]
        sizes = np.array([coded_bytes(one.weight) for _, one in made])
        dense = matrix.weight.detach().float()
        errors = [float(row_errors(dense - one.weight.float(), hessian).sum()) for _, one in made]
        top = max(range(len(made)), key=lambda index: (-made[index][0].sparsity, made[index][0].bits or 0))
        kept = undominated(sizes, errors, top)
        return [made[index][0] for index in kept], [made[index][1] for index in kept], sizes[kept]

    def reference(self, store: LevelStore, weights: Mapping[str, int]) -> dict[str, int]:
        """Give the best level of every matrix (with so many weights) within its share of the bytes; or its smallest."""
        share = self.room / sum(weights.values())
        return {
            name: max(int(np.searchsorted(sizes, share * weights[name], side="right")) - 1, 0)
            for name, sizes in store.sizes.items()
        }

    def choose(self, costs: Mapping[str, np.ndarray], sizes: Mapping[str, np.ndarray]) -> dict[str, int]:
        """Give the index of every matrix's level, so that they fit and cost least together.

        Raises:
            UserError: Those that earlier masks allow do not fit.
        """
        chosen = choose_within(costs, sizes, self.room)
        if chosen is None:
            least = [own[np.isfinite(costs[name])].min(initial=np.inf) for name, own in sizes.items()]
            if np.isfinite(least).all():
                self.check(max(int(sum(least)), self.room + 1))
            raise UserError("earlier masks have removed more than the levels of a budget in bytes do; start from none")
        return chosen

    def rounded(
        self, pruned: Sequence[PrunedMatrix], hessian: Float[Tensor, "cols cols"], bits: float | None, name: str
    ) -> list[PrunedMatrix]:
        """Round a matrix at several sparsities as the pruned model's are rounded."""
        if isinstance(self.quantization, Float16):
            return [PrunedMatrix(one.weight.half().to(one.weight.dtype), one.keep) for one in pruned]
        if bits is None:
            return list(pruned)
        assert isinstance(self.quantization, Integers)
        rounded = quantize_matrices(
            [one.weight.float() for one in pruned],
            hessian,
            self.quantization,
            [bits] * len(pruned),
            keeps=[one.keep for one in pruned],
            damping=self.damping,
            names=[name],
        )
        return [
            PrunedMatrix(found.weight.to(one.weight.dtype), one.keep)
            for found, one in zip(rounded, pruned, strict=True)
        ]


def undominated(sizes: np.ndarray, errors: Sequence[float], top: int) -> list[int]:
    """Give the levels worth having, by ascending bytes: no other is smaller and better, and none nearly as small.

    Args:
        sizes: The bytes of every level.
        errors: The error of each.
        top: The level that is always kept; those that are larger are not.
    """
    kept = [top]
    for index in sorted(range(len(sizes)), key=lambda index: (errors[index], sizes[index])):
        if sizes[index] * CLOSEST <= sizes[kept[-1]]:
            kept.append(index)
    return kept[::-1]


@dataclass(frozen=True)
class Fit:
    """A choice of levels that fits a budget, and what a smaller one can be chosen from.

    Attributes:
        levels: The levels of every matrix, by name.
        sizes: The bytes of each, by name, shape (levels,), ascending.
        costs: What each costs, by name, shape (levels,).
        chosen: The index of every matrix's level.
    """

    levels: dict[str, list[Level]]
    sizes: dict[str, np.ndarray]
    costs: dict[str, np.ndarray]
    chosen: dict[str, int]

    @property
    def sparsities(self) -> dict[str, float]:
        """The sparsity of every matrix."""
        return {name: self.levels[name][index].sparsity for name, index in self.chosen.items()}

    @property
    def bits(self) -> dict[str, float]:
        """The bits of every matrix that is rounded to integers."""
        bits = {name: self.levels[name][index].bits for name, index in self.chosen.items()}
        return {name: width for name, width in bits.items() if width is not None}

    @property
    def chosen_costs(self) -> dict[str, float]:
        """The cost of every matrix's level."""
        return {name: float(self.costs[name][index]) for name, index in self.chosen.items()}

    @classmethod
    def at_best(cls, store: LevelStore) -> "Fit":
        """Choose the largest level of every matrix; no cost is measured."""
        costs = {name: np.zeros(len(levels)) for name, levels in store.levels.items()}
        return cls(store.levels, store.sizes, costs, {name: len(own) - 1 for name, own in store.levels.items()})

    def smaller(self, excess: int) -> "Fit | None":
        """Give a choice with fewer bytes, by at least ``excess``; None if there is none.

        Matrices go to smaller levels one after the other, always the one that costs least for the bytes that it saves.
        """
        chosen = dict(self.chosen)
        while excess > 0:
            moves = [
                ((self.costs[name][index] - self.costs[name][now]) / min(saved, excess), name, index, saved)
                for name, now in chosen.items()
                for index in range(len(self.levels[name]))
                if (saved := int(self.sizes[name][now] - self.sizes[name][index])) > 0
                and np.isfinite(self.costs[name][index])
            ]
            if not moves:
                return None
            _, name, index, saved = min(moves)
            chosen[name], excess = index, excess - saved
        return replace(self, chosen=chosen)


@dataclass(frozen=True)
class UniformFit:
    """The lowest sparsity of all matrices that fits, and the measurements that it is interpolated from.

    Attributes:
        measured: Pairs of a sparsity, ascending, and the bytes of all matrices at it.
        room: The bytes that they may have.
        names: The matrices.
        width: The bits of a weight; None where they are not rounded to integers.
    """

    measured: list[tuple[float, int]]
    room: float
    names: list[str]
    width: float | None

    @property
    def sparsities(self) -> dict[str, float]:
        """The sparsity of every matrix."""
        sparsity, before = self.measured[0]
        for following, now in self.measured:
            if now <= self.room:
                part = (before - self.room) / (before - now) if before > self.room else 1.0
                sparsity += part * (following - sparsity)
                break
            sparsity, before = following, now
        return dict.fromkeys(self.names, sparsity)

    @property
    def bits(self) -> dict[str, float]:
        """The bits of every matrix that is rounded to integers."""
        return {} if self.width is None else dict.fromkeys(self.names, self.width)

    @property
    def chosen_costs(self) -> dict[str, float]:
        """Nothing: no cost is measured."""
        return {}

    def smaller(self, excess: int) -> "UniformFit | None":
        """Give the sparsity for fewer bytes, by at least ``excess``; None if it is beyond the highest."""
        room = min(self.room, self.measured[0][1]) - excess
        return replace(self, room=room) if room >= self.measured[-1][1] else None


@torch.no_grad()
def fit_uniformly(
    budget: ByteBudget,
    matrices: Sequence[PrunableMatrix],
    hessians: Hessians,
    solve: SolveLevels,
    progress: Progress | None = None,
) -> UniformFit:
    """Find the lowest sparsity of all matrices that fits a budget, from the bytes of their levels.

    Raises:
        UserError: The budget is too small.
    """
    by_name = {matrix.name: matrix for matrix in matrices}
    width = next(iter(budget.quantization.widths), None)
    sparsities = budget.sparsities(0.1)
    sizes = np.zeros(len(sparsities), dtype=np.int64)
    for done, (key, names) in enumerate(hessians.groups().items(), start=1):
        hessian = hessians.by_input[key]
        for matrix in (by_name[name] for name in names):
            pruned = solve([matrix] * len(sparsities), hessian, sparsities)
            rounded = budget.rounded(pruned, hessian, width, matrix.name)
            sizes += np.array([coded_bytes(one.weight) for one in rounded])
        if progress:
            progress(done, len(hessians.by_input))
    budget.check(int(sizes[-1]))
    measured = [(sparsity, int(size)) for sparsity, size in zip(sparsities, sizes, strict=True)]
    return UniformFit(measured, float(budget.room), list(by_name), width)


def byte_budget(model: PreTrainedModel, settings: Pruning) -> ByteBudget | None:
    """Give the bytes that a model's weights file may have; None where the settings ask for no size.

    Raises:
        UserError: What is not prunable takes all of them.
    """
    if not isinstance(settings.sparsity, Megabytes):
        return None
    rest = bytes_of_rest(model, prunable_matrices(model, settings.scope), settings.quantization)
    budget = ByteBudget(settings.sparsity.bytes, rest, settings.quantization, settings.solver.damping)
    budget.check_rest()
    return budget


def bytes_of_rest(model: PreTrainedModel, matrices: list[PrunableMatrix], quantization: Quantization) -> int:
    """Give what a model takes in its file besides the prunable matrices, rounded as it will be, with the header."""
    empty = {f"{matrix.name}.weight": torch.zeros_like(matrix.parameter) for matrix in matrices}
    tensors = {
        name: empty[name] if name in empty else round_tensor(name, tensor, quantization, False)
        for name, tensor in model.state_dict().items()
    }
    return file_bytes(tensors) - sum(coded_bytes(weight.flatten(1)) for weight in empty.values())
