"""Levels: every matrix pruned at several sparsities, and the cheapest choice of one for each within the budget.

All levels of the matrices that read one input are solved side by side, and so with one factorisation of the Hessian.
The sweep's levels are those of matrices pruned alone; ALPS's are nearly so, they share its schedule of penalties. The
levels lie a whole number of steps above or below the target, so that the target itself is always among them; a choice
meets the budget when the steps up and down, each times its matrix's size, cancel out. Given what every level of every
matrix costs, the choice whose costs add up to the least is found by dynamic programming (as OBC and SPDY do).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparsewav.errors import UserError
from sparsewav.pruning.encoder import PrunableMatrix
from sparsewav.pruning.hessian import Calibration, Progress
from sparsewav.pruning.solvers.solve import PrunedMatrix

SolveLevels = Callable[[list[PrunableMatrix], Tensor, list[float]], list[PrunedMatrix]]
"""Prunes matrices that read the same input, the first argument, given its Hessian, to a sparsity each."""

GRAINS = 5000
"""Sizes of matrices that have no common divisor are rounded to this part of all weights, for the choice alone."""


@dataclass(frozen=True)
class Grid:
    """The levels that a matrix may take.

    Attributes:
        target: sparsity of the whole model.
        step: between two levels.
        lowest: steps of the lowest level, not above 0.
        highest: steps of the highest level, not below 0.
    """

    target: float
    step: float
    lowest: int
    highest: int

    @property
    def offsets(self) -> list[int]:
        """Steps away from the target of every level, rising."""
        return list(range(self.lowest, self.highest + 1))

    def sparsity(self, offset: int) -> float:
        return min(max(self.target + offset * self.step, 0.0), 1.0)

    def index(self, offset: int) -> int:
        """Place of a level among all."""
        return offset - self.lowest


def level_grid(target: float, step: float, spread: float) -> Grid:
    """Levels within ``spread`` of the target, none of which empties a matrix that the target does not."""
    most = math.floor(spread / step + 1e-6)
    below = math.floor(target / step + 1e-6)
    above = max(math.ceil((1 - target) / step - 1e-6) - 1, 0)
    return Grid(target, step, -min(most, below), min(most, above))


class LevelLibrary(AbstractContextManager["LevelLibrary"]):
    """Pruned weights of every matrix at every level; on disk, memory-mapped, where they would fill the memory.

    Attributes:
        grid: the levels.
        row_errors: by matrix, what each row's output lost at each level, shape (levels, rows): ||(w − ŵ)X||², damped
            where the solver gives it so.
        changes: by matrix, ||W − Ŵ||² at each level, shape (levels,).
    """

    def __init__(self, grid: Grid, on_disk: bool) -> None:
        self.grid = grid
        self.row_errors: dict[str, Tensor] = {}
        self.changes: dict[str, Tensor] = {}
        self._folder = TemporaryDirectory(prefix="sparsewav-") if on_disk else None
        self._weights: dict[str, list[Tensor]] = {}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._weights.clear()
        if self._folder:
            self._folder.cleanup()

    def add(self, name: str, dense: Tensor, levels: Sequence[PrunedMatrix], hessian: Tensor) -> None:
        """Take a matrix at all levels."""
        changes = [dense.float() - level.weight.float() for level in levels]
        self.row_errors[name] = torch.stack(
            [
                level.increments.double() if level.increments is not None else _row_errors(change, hessian)
                for level, change in zip(levels, changes, strict=True)
            ]
        )
        self.changes[name] = torch.stack([change.square().sum(dtype=torch.float64) for change in changes])
        if self._folder is None:
            self._weights[name] = [level.weight for level in levels]
        else:
            save_file(
                {str(index): level.weight.cpu().contiguous() for index, level in enumerate(levels)},
                Path(self._folder.name) / f"{name}.safetensors",
            )

    def weight(self, name: str, offset: int) -> Tensor:
        """A matrix at a level so many steps from the target; shape (rows, cols)."""
        index = self.grid.index(offset)
        if self._folder is None:
            return self._weights[name][index]
        with safe_open(Path(self._folder.name) / f"{name}.safetensors", framework="pt") as file:
            return file.get_tensor(str(index))


def _row_errors(change: Tensor, hessian: Tensor) -> Tensor:
    """||δX||² for every row δ of a change (rows, cols); shape (rows,)."""
    return ((change @ hessian.to(change.dtype)) * change).sum(1, dtype=torch.float64)


@torch.no_grad()
def build_library(
    matrices: Sequence[PrunableMatrix],
    calibration: Calibration,
    grid: Grid,
    solve: SolveLevels,
    *,
    memory: float,
    progress: Progress | None = None,
) -> LevelLibrary:
    """Prune every matrix to every level; the model is left as it is.

    Args:
        matrices: of the model.
        calibration: their Hessians.
        grid: the levels.
        solve: prunes matrices with the same input, each to its own sparsity.
        memory: bytes that the library may take before it goes to disk.
        progress: called after every input.
    """
    levels = [grid.sparsity(offset) for offset in grid.offsets]
    by_name = {matrix.name: matrix for matrix in matrices}
    size = sum(matrix.size * matrix.weight.element_size() for matrix in matrices) * len(levels)
    library = LevelLibrary(grid, on_disk=size > memory)
    try:
        for done, (key, names) in enumerate(calibration.groups().items(), start=1):
            group = [by_name[name] for name in names]
            stacked = [matrix for matrix in group for _ in levels]
            pruned = solve(stacked, calibration.hessians[key], levels * len(group))
            for index, matrix in enumerate(group):
                own = pruned[index * len(levels) : (index + 1) * len(levels)]
                library.add(matrix.name, matrix.weight.detach(), own, calibration.hessians[key])
            if progress:
                progress(done, len(calibration.hessians))
    except BaseException:
        library.__exit__(None, None, None)
        raise
    return library


def choose_levels(sizes: Mapping[str, int], costs: Mapping[str, np.ndarray], grid: Grid) -> dict[str, int]:
    """Choose a level for every matrix so that the budget is met and the costs add up to the least.

    Args:
        sizes: weights of every matrix.
        costs: of every level of every matrix, shape (levels,); infinite where a matrix cannot have a level.
        grid: the levels.

    Returns:
        Steps from the target, by matrix: Σ size · steps is zero (exactly so where the sizes have a common divisor of
        at least a five-thousandth of all weights; else to the rounding of the sizes).

    Raises:
        UserError: no choice of the levels meets the budget.
    """
    units = _units(sizes)
    names = list(sizes)
    reach = max(abs(grid.lowest), grid.highest) * sum(units.values())
    best = np.full(2 * reach + 1, np.inf)  # the least cost of every sum of units · steps, from −reach to reach
    best[reach] = 0.0
    choices = np.zeros((len(names), len(best)), dtype=np.int16)
    for row, name in enumerate(names):
        following = np.full_like(best, np.inf)
        for index, offset in enumerate(grid.offsets):
            shift = units[name] * offset
            candidate = np.full_like(best, np.inf)
            source = best[max(-shift, 0) : len(best) - max(shift, 0)] + costs[name][index]
            candidate[max(shift, 0) : len(best) - max(-shift, 0)] = source
            better = candidate < following
            following[better] = candidate[better]
            choices[row, better] = offset
        best = following
    if not np.isfinite(best[reach]):
        raise UserError(
            f"no choice of levels gives the whole model sparsity {grid.target:g}: earlier masks have removed too much; "
            "raise allocation.spread or sparsity.target"
        )
    place = reach
    chosen = {}
    for row in range(len(names) - 1, -1, -1):
        chosen[names[row]] = int(choices[row, place])
        place -= units[names[row]] * chosen[names[row]]
    return {name: chosen[name] for name in names}


def _units(sizes: Mapping[str, int]) -> dict[str, int]:
    unit = max(math.gcd(*sizes.values()), sum(sizes.values()) // GRAINS, 1)
    return {name: max(round(size / unit), 1) for name, size in sizes.items()}


def exact_sparsities(
    sizes: Mapping[str, int], steps: Mapping[str, int], grid: Grid, removed: Mapping[str, int] | None = None
) -> dict[str, float]:
    """Sparsities of chosen levels, with what is missing of the budget spread so that it is met to one weight.

    No matrix gets fewer weights to remove than ``removed`` says that an earlier mask already has.
    """
    removed = removed or {}
    if sum(removed.values()) > round(grid.target * sum(sizes.values())):
        raise UserError(f"earlier masks have removed more than sparsity {grid.target:g} of the model; raise it")
    wanted = {name: size * grid.sparsity(steps[name]) for name, size in sizes.items()}
    total = sum(sizes.values())
    missing = round(grid.target * total)  # weights
    shift = (missing - sum(wanted.values())) / total  # zero up to rounding, where the sizes have a common divisor
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
