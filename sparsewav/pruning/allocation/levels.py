"""Levels: every matrix pruned to several sparsities, and the choice of one level for each that costs least.

All levels of the matrices that read one input are solved side by side with one factorisation of the Hessian. The levels
of the OBS sweep equal those of matrices pruned alone; those of ALPS nearly do, because they share its schedule of
penalties. Every level is a whole number of steps above or below the target sparsity, so that the target itself is one
of them; a choice meets the budget when the sum of the steps, weighted by the matrices' sizes, is zero. Given the cost
of every level of every matrix, the choice with the least sum of costs is found by dynamic programming (as in OBC and
SPDY).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparsewav.errors import UserError
from sparsewav.pruning.encoder import PrunableMatrix
from sparsewav.pruning.hessian import Hessians, Progress
from sparsewav.pruning.hidden_states import temporary_folder
from sparsewav.pruning.solvers.solve import PrunedMatrix

SolveLevels = Callable[[list[PrunableMatrix], Float[Tensor, "cols cols"], list[float]], list[PrunedMatrix]]
"""Prunes matrices that read the same input, given its Hessian, each to its own sparsity; the model is not changed."""

GRAINS = 5000
"""For the choice of levels, sizes without a large common divisor are rounded to this fraction of all weights."""


@dataclass(frozen=True)
class Grid:
    """The levels that a matrix may take.

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
    """The pruned weights of every matrix at every level, in memory or on disk.

    Attributes:
        grid: The levels.
        row_errors: By matrix, the error of each row's output at each level, shape (levels, rows): ||(w − ŵ)X||², to
            which the OBS sweep's λ||w − ŵ||² is added.
        changes: By matrix, ||W − Ŵ||² at each level, shape (levels,).
    """

    def __init__(self, grid: Grid, on_disk: bool) -> None:
        self.grid = grid
        self.row_errors: dict[str, Float[Tensor, "levels rows"]] = {}
        self.changes: dict[str, Float[Tensor, " levels"]] = {}
        self._folder = temporary_folder() if on_disk else None
        self._weights: dict[str, list[Tensor]] = {}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._weights.clear()
        if self._folder:
            self._folder.cleanup()

    def add(
        self,
        name: str,
        dense: Float[Tensor, "rows cols"],
        levels: Sequence[PrunedMatrix],
        hessian: Float[Tensor, "cols cols"],
    ) -> None:
        """Store a matrix at all levels."""
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

    def weight(self, name: str, offset: int) -> Float[Tensor, "rows cols"]:
        """Give a matrix at a level, by its offset from the target in steps."""
        index = self.grid.index(offset)
        if self._folder is None:
            return self._weights[name][index]
        with safe_open(Path(self._folder.name) / f"{name}.safetensors", framework="pt") as file:
            return file.get_tensor(str(index))


def _row_errors(change: Float[Tensor, "rows cols"], hessian: Float[Tensor, "cols cols"]) -> Float[Tensor, " rows"]:
    """Give ||δX||² for every row δ of a change."""
    return ((change @ hessian.to(change.dtype)) * change).sum(1, dtype=torch.float64)


@torch.no_grad()
def build_level_store(
    matrices: Sequence[PrunableMatrix],
    hessians: Hessians,
    grid: Grid,
    solve: SolveLevels,
    *,
    memory: float,
    progress: Progress | None = None,
) -> LevelStore:
    """Prune every matrix to every level; the model is not changed.

    Args:
        matrices: The matrices of the model.
        hessians: Their Hessians.
        grid: The levels.
        solve: Prunes matrices with the same input, each to its own sparsity.
        memory: The bytes that the store may take in memory; a larger one is written to disk.
        progress: Called after every input.
    """
    levels = [grid.sparsity(offset) for offset in grid.offsets]
    by_name = {matrix.name: matrix for matrix in matrices}
    size = sum(matrix.size * matrix.weight.element_size() for matrix in matrices) * len(levels)
    store = LevelStore(grid, on_disk=size > memory)
    try:
        for done, (key, names) in enumerate(hessians.groups().items(), start=1):
            group = [by_name[name] for name in names]
            stacked = [matrix for matrix in group for _ in levels]
            pruned = solve(stacked, hessians.by_input[key], levels * len(group))
            for index, matrix in enumerate(group):
                own = pruned[index * len(levels) : (index + 1) * len(levels)]
                store.add(matrix.name, matrix.weight.detach(), own, hessians.by_input[key])
            if progress:
                progress(done, len(hessians.by_input))
    except BaseException:
        store.__exit__(None, None, None)
        raise
    return store


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
    names = list(sizes)
    reach = max(abs(grid.lowest), grid.highest) * sum(units.values())
    best = np.full(2 * reach + 1, np.inf)  # the least cost of every sum of units · offsets, from −reach to reach
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
    balance = reach
    chosen = {}
    for row in range(len(names) - 1, -1, -1):
        chosen[names[row]] = int(choices[row, balance])
        balance -= units[names[row]] * chosen[names[row]]
    return {name: chosen[name] for name in names}


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
