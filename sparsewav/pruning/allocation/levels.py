"""Levels: every matrix pruned to several sparsities, and the choice of one level for each that costs least.

All levels of the matrices that read one input are solved side by side with one factorisation of the Hessian. The levels
of the OBS sweep equal those of matrices pruned alone; those of ALPS nearly do, because they share its schedule of
penalties. Given the cost of every level of every matrix, the choice with the least sum of costs is found by dynamic
programming (as in OBC and SPDY), within a budget:

- of weights: every level is a whole number of steps above or below the target sparsity, so that the target itself is
  one of them; a choice meets the budget when the sum of the steps, weighted by the matrices' sizes, is zero;
- of bytes (:mod:`~sparsewav.pruning.allocation.budget`): a level is a sparsity and, where the weights are rounded, a
  number of bits, and takes the bytes that it would take in the file;
- of parameters or multiply-accumulates (:mod:`~sparsewav.pruning.allocation.parts`): a level is a number of heads or
  units, and takes what they do.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparsewav.errors import UserError
from sparsewav.pruning.channels import FrontLevels
from sparsewav.pruning.encoder import PrunableMatrix
from sparsewav.pruning.hessian import Hessians, Progress
from sparsewav.pruning.hidden_states import scratch_folder
from sparsewav.pruning.solvers.solve import PrunedMatrix

SolveLevels = Callable[[list[PrunableMatrix], Float[Tensor, "cols cols"], list[float]], list[PrunedMatrix]]
"""Prunes matrices that read the same input, given its Hessian, each to its own sparsity; the model is not changed."""

RoundLevels = Callable[
    [PrunableMatrix, Sequence["Level"], Sequence[PrunedMatrix], Float[Tensor, "cols cols"]],
    tuple[list["Level"], list[PrunedMatrix], np.ndarray],
]
"""Makes levels of a matrix, and what they take of the budget, of those that are pruned and not rounded."""

GRAINS_OF_A_MATRIX = 400
"""For the choice of levels, sizes are rounded up to this fraction of a matrix's mean share of the budget."""

GRAINS = 5000
"""For the choice of levels, sizes without a large common divisor are rounded to this fraction of all weights."""


@dataclass(frozen=True)
class Level:
    """What a matrix may become.

    Attributes:
        sparsity: The share of its weights that are removed.
        bits: Bits of a kept weight; None where they are not rounded to integers.
    """

    sparsity: float
    bits: float | None = None


@dataclass(frozen=True)
class Grid:
    """The sparsities that a matrix may take around that of the whole model.

    Attributes:
        target: The sparsity of the whole model.
        step: The difference in sparsity between neighbouring levels.
        lowest: The offset of the lowest level from the target in steps, not above 0.
        highest: The offset of the highest level from the target in steps, not below 0.
    """

    target: float
    step: float
    lowest: int
    highest: int

    @property
    def offsets(self) -> list[int]:
        """The offset of every level from the target in steps, in ascending order."""
        return list(range(self.lowest, self.highest + 1))

    def sparsity(self, offset: int) -> float:
        """Give the sparsity of a level."""
        return min(max(self.target + offset * self.step, 0.0), 1.0)

    def index(self, offset: int) -> int:
        """Give the index of a level."""
        return offset - self.lowest


def level_grid(target: float, step: float, spread: float) -> Grid:
    """Give the levels within ``spread`` of the target, of which only the target itself may be a sparsity of 1."""
    most = math.floor(spread / step + 1e-6)
    below = math.floor(target / step + 1e-6)
    above = max(math.ceil((1 - target) / step - 1e-6) - 1, 0)
    return Grid(target, step, -min(most, below), min(most, above))


class LevelStore(AbstractContextManager["LevelStore"]):
    """The weights of every matrix at every level, in memory or on disk.

    Attributes:
        levels: By matrix, its levels.
        row_errors: By matrix, the error of each row's output at each level, shape (levels, rows): ||(w − ŵ)X||², to
            which the OBS sweep's λ||w − ŵ||² is added.
        changes: By matrix, ||W − Ŵ||² at each level, shape (levels,).
        sizes: By matrix, what it takes of the budget at each level, shape (levels,); empty for a budget of weights.
        reference: By matrix, the index of the level of the others while one is measured.
    """

    def __init__(self, on_disk: bool) -> None:
        self.levels: dict[str, list[Level]] = {}
        self.row_errors: dict[str, Float[Tensor, "levels rows"]] = {}
        self.changes: dict[str, Float[Tensor, " levels"]] = {}
        self.sizes: dict[str, np.ndarray] = {}
        self.reference: dict[str, int] = {}
        self._scratch = ExitStack()
        self._folder = self._scratch.enter_context(scratch_folder()) if on_disk else None
        self._weights: dict[str, list[Tensor]] = {}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._weights.clear()
        self._scratch.close()

    def add(
        self,
        name: str,
        dense: Float[Tensor, "rows cols"],
        levels: Sequence[Level],
        solved: Sequence[PrunedMatrix],
        hessian: Float[Tensor, "cols cols"],
    ) -> None:
        """Store a matrix at all levels."""
        changes = [dense.float() - one.weight.float() for one in solved]
        self.levels[name] = list(levels)
        self.row_errors[name] = torch.stack(
            [
                one.increments.double() if one.increments is not None else row_errors(change, hessian)
                for one, change in zip(solved, changes, strict=True)
            ]
        )
        self.changes[name] = torch.stack([change.square().sum(dtype=torch.float64) for change in changes])
        if self._folder is None:
            self._weights[name] = [one.weight for one in solved]
        else:
            save_file(
                {str(index): one.weight.cpu().contiguous() for index, one in enumerate(solved)},
                self._folder / f"{name}.safetensors",
            )

    def weight(self, name: str, index: int) -> Float[Tensor, "rows cols"]:
        """Give a matrix at a level, by the level's index."""
        if self._folder is None:
            return self._weights[name][index]
        with safe_open(self._folder / f"{name}.safetensors", framework="pt") as file:
            return file.get_tensor(str(index))

    def put(self, piece: PrunableMatrix | FrontLevels, index: int) -> None:
        """Give the model a matrix, or the front end with fewer channels, at a level, by the level's index."""
        if isinstance(piece, FrontLevels):
            piece.put(index)
        else:
            piece.weight.data.copy_(self.weight(piece.name, index))


def row_errors(change: Float[Tensor, "rows cols"], hessian: Float[Tensor, "cols cols"]) -> Float[Tensor, " rows"]:
    """Give ||δX||² for every row δ of a change."""
    return ((change @ hessian.to(change.dtype)) * change).sum(1, dtype=torch.float64)


@torch.no_grad()
def build_level_store(
    matrices: Sequence[PrunableMatrix],
    hessians: Hessians,
    sparsities: Sequence[float],
    solve: SolveLevels,
    *,
    memory: float,
    rounding: RoundLevels | None = None,
    progress: Progress | None = None,
) -> LevelStore:
    """Prune every matrix to every level; the model is not changed.

    Args:
        matrices: The matrices of the model.
        hessians: Their Hessians.
        sparsities: Those of the levels.
        solve: Prunes matrices with the same input, each to its own sparsity.
        memory: The bytes that the store may take in memory; a larger one is written to disk.
        rounding: Makes the levels of a matrix that are worth having of its pruned ones, and measures what they take of
            the budget; None takes them as they are.
        progress: Called after every input.
    """
    by_name = {matrix.name: matrix for matrix in matrices}
    plain = [Level(sparsity) for sparsity in sparsities]
    size = sum(matrix.size * matrix.weight.element_size() for matrix in matrices) * len(plain)
    size *= 2 if rounding else 1  # about: of several widths, most levels are not worth having
    store = LevelStore(on_disk=size > memory)
    try:
        for done, (key, names) in enumerate(hessians.groups().items(), start=1):
            group, hessian = [by_name[name] for name in names], hessians.by_input[key]
            stacked = [matrix for matrix in group for _ in plain]
            pruned = solve(stacked, hessian, [*sparsities] * len(group))
            for index, matrix in enumerate(group):
                own, dense = pruned[index * len(plain) : (index + 1) * len(plain)], matrix.weight.detach()
                levels = plain
                if rounding:
                    levels, own, store.sizes[matrix.name] = rounding(matrix, plain, own, hessian)
                store.add(matrix.name, dense, levels, own, hessian)
            if progress:
                progress(done, len(hessians.by_input))
    except BaseException:
        store.__exit__(None, None, None)
        raise
    return store


def cheapest(
    costs: Sequence[np.ndarray], amounts: Sequence[np.ndarray], capacity: int
) -> tuple[np.ndarray, Callable[[int], list[int]]]:
    """Find the least sum of costs for every sum of amounts, by dynamic programming.

    Args:
        costs: Of every matrix the cost of each level, shape (levels,); infinite for a level that it cannot have.
        amounts: Of every matrix what each level takes of the budget, whole numbers of at least 0, shape (levels,).
        capacity: The largest sum of amounts.

    Returns:
        The least sum of costs for the sums of amounts 0 to capacity, infinite where there is none, and a function that
        gives the index of every matrix's level for a sum of amounts.
    """
    best = np.full(capacity + 1, np.inf)
    best[0] = 0.0
    choices = np.zeros((len(costs), capacity + 1), dtype=np.int16)
    for row, (own, taken) in enumerate(zip(costs, amounts, strict=True)):
        following = np.full_like(best, np.inf)
        for index, amount in enumerate(map(int, taken)):
            if amount > capacity:
                continue
            candidate = np.full_like(best, np.inf)
            candidate[amount:] = best[: capacity + 1 - amount] + own[index]
            better = candidate < following
            following[better] = candidate[better]
            choices[row, better] = index
        best = following

    def choice(total: int) -> list[int]:
        chosen = []
        for row in range(len(costs) - 1, -1, -1):
            chosen.append(int(choices[row, total]))
            total -= int(amounts[row][chosen[-1]])
        return chosen[::-1]

    return best, choice


def choose_levels(sizes: Mapping[str, int], costs: Mapping[str, np.ndarray], grid: Grid) -> dict[str, int]:
    """Choose a level for every matrix so that the budget is met and the sum of the costs is least.

    Args:
        sizes: The number of weights of every matrix.
        costs: The costs of every matrix, shape (levels,); infinite for a level that the matrix cannot have.
        grid: The levels.

    Returns:
        The offset of every matrix from the target in steps. Σ size · offset is zero: exactly if the sizes have a common
        divisor of at least a five-thousandth of all weights, otherwise up to the rounding of the sizes.

    Raises:
        UserError: No choice of levels meets the budget.
    """
    units = _units(sizes)
    # Counted from the lowest level, so that no amount is negative.
    amounts = [units[name] * np.arange(len(grid.offsets)) for name in sizes]
    target = -grid.lowest * sum(units.values())
    best, choice = cheapest([costs[name] for name in sizes], amounts, target)
    if not np.isfinite(best[target]):
        raise UserError(
            f"no choice of levels gives the whole model sparsity {grid.target:g}: earlier masks have removed too much; "
            "raise allocation.spread or sparsity.target"
        )
    return {name: grid.lowest + index for name, index in zip(sizes, choice(target), strict=True)}


def choose_within(
    costs: Mapping[str, np.ndarray], sizes: Mapping[str, np.ndarray], budget: int
) -> dict[str, int] | None:
    """Choose a level for every matrix so that their sizes fit a budget and the sum of the costs is least.

    Sizes are rounded up to whole grains, of which the budget has :data:`GRAINS_OF_A_MATRIX` for every matrix, so that
    it is never exceeded; where the least costly choice that is found uses it up to some grains, a better one may exist.

    Args:
        costs: The costs of every matrix, shape (levels,); infinite for a level that the matrix cannot have.
        sizes: What every matrix takes at its levels, shape (levels,).
        budget: What they may take together, in the same unit: bytes, parameters or multiply-accumulates.

    Returns:
        The index of every matrix's level; None if nothing fits.
    """
    if budget <= 0:
        return None
    grains = GRAINS_OF_A_MATRIX * len(costs)
    grain = max(budget / grains, 1.0)
    amounts = [np.ceil(sizes[name] / grain).astype(np.int64) for name in costs]
    best, choice = cheapest([costs[name] for name in costs], amounts, int(budget / grain))
    total = int(best.argmin())
    return dict(zip(costs, choice(total), strict=True)) if np.isfinite(best[total]) else None


def _units(sizes: Mapping[str, int]) -> dict[str, int]:
    unit = max(math.gcd(*sizes.values()), sum(sizes.values()) // GRAINS, 1)
    return {name: max(round(size / unit), 1) for name, size in sizes.items()}


def exact_sparsities(
    sizes: Mapping[str, int], steps: Mapping[str, int], grid: Grid, removed: Mapping[str, int] | None = None
) -> dict[str, float]:
    """Give the sparsities of the chosen levels (``steps`` from the target), adjusted to meet the budget to one weight.

    No matrix gets fewer removals than ``removed``, the number of weights that earlier masks removed from it.
    """
    removed = removed or {}
    if sum(removed.values()) > round(grid.target * sum(sizes.values())):
        raise UserError(f"earlier masks have removed more than sparsity {grid.target:g} of the model; raise it")
    wanted = {name: size * grid.sparsity(steps[name]) for name, size in sizes.items()}
    total = sum(sizes.values())
    missing = round(grid.target * total)  # weights
    shift = (missing - sum(wanted.values())) / total  # zero up to rounding if the sizes have a common divisor
    wanted = {name: min(max(wanted[name] + shift * size, 0.0), float(size)) for name, size in sizes.items()}
    counts = {name: max(int(wanted[name] + 1e-6), removed.get(name, 0)) for name in sizes}
    missing -= sum(counts.values())
    ordered = sorted(sizes, key=lambda name: (counts[name] - wanted[name], name))
    while missing:
        for name in ordered:
            change = (missing > 0) - (missing < 0)
            if removed.get(name, 0) <= counts[name] + change <= sizes[name] and missing:
                counts[name] += change
                missing -= change
    return {name: counts[name] / sizes[name] for name in sizes}
