"""Allocation by measured errors: what every level of every matrix costs, the cheapest choice, and a search from there.

The costs are one of

- ``output``: the divergence of the model's output, measured by the
  :class:`~sparsewav.pruning.allocation.divergence.Judge` with one matrix at one level and all the others dense, or at
  the target's level (``others``);
- ``fisher``: ½ Σ_r F_r ||(w_r − ŵ_r)X||² / frames with the Fisher information F of the matrix's output, from a single
  backward pass: the divergence to second order;
- ``trace``: mean Hessian trace times ||W − Ŵ||² (HAWQ-V2, Dong et al. 2020, section 3.1).

Costs add up only as far as the matrices' errors do not meet; the search therefore judges whole models. It goes by swaps
of levels that keep the budget (the idea of EvoPress, Sieberling et al. 2024), the costs telling which to try first.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsewav.errors import UserError
from sparsewav.pruning.allocation.divergence import Judge
from sparsewav.pruning.allocation.levels import (
    Grid,
    LevelLibrary,
    SolveLevels,
    build_library,
    choose_levels,
    exact_sparsities,
    level_grid,
)
from sparsewav.pruning.allocation.sensitivity import Trace
from sparsewav.pruning.encoder import PrunableMatrix
from sparsewav.pruning.hessian import Calibration, Progress

EFFECTS = ("output", "fisher", "trace")
OTHERS = ("dense", "pruned")
DRAWS = 16
"""Swaps that are drawn for each one that is judged: the one that the costs like best."""
LARGEST_SWAP = 8
"""Matrices that change their level in one swap, at most."""


@dataclass(frozen=True)
class LevelSettings:
    """How an allocation over levels is found.

    Attributes:
        effect: a key of :data:`EFFECTS`.
        others: ``dense`` or ``pruned`` to the target, while one matrix's effect on the output is measured.
        step: between two levels.
        spread: how far from the target a matrix's sparsity may be.
        evaluations: swaps that the search judges; 0 for no search.
        memory: bytes that the pruned matrices of all levels may take before they go to disk.
    """

    effect: str = "output"
    others: str = "dense"
    step: float = 0.05
    spread: float = 0.25
    evaluations: int = 0
    memory: float = 2.0**30


@dataclass(frozen=True)
class Allocation:
    """What was found.

    Attributes:
        sparsities: by matrix, meeting the budget to one weight.
        costs: of each matrix's level, in the costs' own unit.
        divergence: of the model at these levels on the judge's utterances; None where there was no judge.
        evaluations: judgements made.
    """

    sparsities: dict[str, float]
    costs: dict[str, float]
    divergence: float | None
    evaluations: int


def check_settings(settings: LevelSettings) -> None:
    """Refuse settings out of range.

    Raises:
        UserError: naming the setting.
    """
    if settings.effect not in EFFECTS:
        raise UserError(f"effect {settings.effect!r} does not exist; choose one of {', '.join(EFFECTS)}")
    if settings.others not in OTHERS:
        raise UserError(f"others {settings.others!r} does not exist; choose one of {', '.join(OTHERS)}")
    if not 0 < settings.step <= settings.spread <= 1:
        raise UserError(f"step {settings.step:g} and spread {settings.spread:g} must be 0 < step <= spread <= 1")
    if settings.effect == "trace" and settings.evaluations:
        raise UserError("effect 'trace' has no judge to search with; choose output or fisher")


@torch.no_grad()
def allocate_by_levels(
    model: PreTrainedModel,
    matrices: Sequence[PrunableMatrix],
    calibration: Calibration,
    batches: Iterable[dict[str, Tensor]],
    sparsity: float,
    solve: SolveLevels,
    settings: LevelSettings,
    *,
    traces: Mapping[str, Trace] | None = None,
    masks: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Allocation:
    """Find every matrix's sparsity; the model is the same bytes afterwards.

    Args:
        model: CTC model in evaluation mode.
        matrices: all of its prunable matrices.
        calibration: their Hessians.
        batches: what the judge listens to; labels are not read.
        sparsity: of the whole model.
        solve: the solver that the model is going to be pruned with.
        settings: see there.
        traces: by matrix, for effect ``trace``.
        masks: already in force: no matrix gets a level below what it has lost.
        seed: of the Fisher information and the search.
        progress: called with (steps done, steps in all).

    Raises:
        UserError: a setting is wrong, or no choice of levels meets the budget.
    """
    check_settings(settings)
    sizes = {matrix.name: matrix.size for matrix in matrices}
    grid = level_grid(sparsity, settings.step, settings.spread)
    inputs = len(calibration.hessians)
    measured = settings.effect == "output"
    steps = inputs + (len(matrices) if measured else 0) + settings.evaluations
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, steps)

    dense = [matrix.weight.detach().clone() for matrix in matrices]
    judge = None if settings.effect == "trace" else Judge(model, batches)
    library = build_library(
        matrices, calibration, grid, solve, memory=settings.memory, progress=lambda _, __: advance()
    )
    try:
        with library:
            if settings.effect == "trace":
                costs = _trace_costs(library, traces)
            elif settings.effect == "fisher":
                assert judge is not None
                costs = _fisher_costs(library, judge.output_fisher(seed), calibration.frames)
            else:
                assert judge is not None
                costs = measure_costs(judge, matrices, library, settings.others, advance)
            removed = {name: int((~mask).sum()) for name, mask in (masks or {}).items()}
            for name, count in removed.items():
                for index, offset in enumerate(grid.offsets):
                    if sizes[name] * grid.sparsity(offset) < count - 1:  # the last weight is a matter of rounding
                        costs[name][index] = np.inf
            chosen = choose_levels(sizes, costs, grid)
            divergence = None
            if judge is not None:
                chosen, divergence = search_swaps(
                    judge, matrices, library, costs, chosen, settings.evaluations, seed, advance
                )
    finally:
        for matrix, weight in zip(matrices, dense, strict=True):
            matrix.weight.data.copy_(weight)
    return Allocation(
        sparsities=exact_sparsities(sizes, chosen, grid, removed),
        costs={name: float(costs[name][grid.index(offset)]) for name, offset in chosen.items()},
        divergence=divergence,
        evaluations=judge.evaluations if judge else 0,
    )


def _trace_costs(library: LevelLibrary, traces: Mapping[str, Trace] | None) -> dict[str, np.ndarray]:
    if traces is None:
        raise UserError("effect 'trace' needs the Hessian traces of the matrices")
    return {  # a negative trace says that the matrix hardly matters, not that errors help
        name: max(traces[name].sensitivity, 0.0) * change.cpu().numpy() for name, change in library.changes.items()
    }


def _fisher_costs(library: LevelLibrary, fisher: Mapping[str, Tensor], frames: int) -> dict[str, np.ndarray]:
    return {name: 0.5 * (errors.cpu() @ fisher[name]).numpy() / frames for name, errors in library.row_errors.items()}


def measure_costs(
    judge: Judge,
    matrices: Sequence[PrunableMatrix],
    library: LevelLibrary,
    others: str = "dense",
    advance: Callable[[], None] = lambda: None,
) -> dict[str, np.ndarray]:
    """Divergence with one matrix at each level and the others dense or at the target's; by matrix, shape (levels,).

    Whatever the weights were, they are afterwards the dense ones or those of the target's level.
    """
    offsets = library.grid.offsets
    rest = {
        matrix.name: library.weight(matrix.name, 0) if others == "pruned" else matrix.weight.detach().clone()
        for matrix in matrices
    }
    for matrix in matrices:
        matrix.weight.data.copy_(rest[matrix.name])
    at_rest = judge.divergence() if others == "pruned" else None
    costs: dict[str, np.ndarray] = {}
    for layer, group in groupby(sorted(matrices, key=lambda matrix: matrix.layer), key=lambda matrix: matrix.layer):
        with judge.resuming_at(layer):
            for matrix in group:
                values = []
                for offset in offsets:
                    matrix.weight.data.copy_(library.weight(matrix.name, offset))
                    values.append(judge.divergence() if offset or at_rest is None else at_rest)
                matrix.weight.data.copy_(rest[matrix.name])
                costs[matrix.name] = np.array(values)
                advance()
    return costs


def search_swaps(
    judge: Judge,
    matrices: Sequence[PrunableMatrix],
    library: LevelLibrary,
    costs: Mapping[str, np.ndarray],
    start: Mapping[str, int],
    evaluations: int,
    seed: int = 0,
    advance: Callable[[], None] = lambda: None,
) -> tuple[dict[str, int], float]:
    """Go from one choice of levels to better ones by swaps that keep the budget, judging the whole model each time.

    Args:
        judge: of the dense model.
        matrices: of the model.
        library: their levels.
        costs: an estimate of what each level costs; infinite where a matrix cannot have it.
        start: steps from the target, by matrix.
        evaluations: swaps to judge.
        seed: of the swaps.
        advance: called after each judgement.

    Returns:
        The best choice, never one that the judge found worse than the start; and its divergence.
    """
    sizes = {matrix.name: matrix.size for matrix in matrices}
    by_name = {matrix.name: matrix for matrix in matrices}
    generator = np.random.default_rng(seed)

    def put(choice: Mapping[str, int], names: Iterable[str]) -> None:
        for name in names:
            by_name[name].weight.data.copy_(library.weight(name, choice[name]))

    best = dict(start)
    put(best, best)
    least = judge.divergence()
    judged = {tuple(best.values())}
    for _ in range(evaluations):
        drawn = [_draw_swap(best, sizes, costs, library.grid, generator) for _ in range(DRAWS)]
        fresh = [swap for swap in drawn if swap and tuple((best | swap).values()) not in judged]
        if fresh:
            swap = min(fresh, key=lambda swap: _predicted(best, swap, costs, library.grid))
            judged.add(tuple((best | swap).values()))
            put(swap, swap)
            divergence = judge.divergence()
            if divergence < least:
                best, least = best | swap, divergence
            else:
                put(best, swap)
        advance()
    return best, least


def _predicted(
    choice: Mapping[str, int], swap: Mapping[str, int], costs: Mapping[str, np.ndarray], grid: Grid
) -> float:
    return sum(
        float(costs[name][grid.index(offset)] - costs[name][grid.index(choice[name])]) for name, offset in swap.items()
    )


def _draw_swap(
    choice: Mapping[str, int],
    sizes: Mapping[str, int],
    costs: Mapping[str, np.ndarray],
    grid: Grid,
    generator: np.random.Generator,
) -> dict[str, int] | None:
    """Move random matrices up and others down by a step each until the budget is met; None if it does not come out."""
    swap: dict[str, int] = {}
    names = list(sizes)
    balance = 0
    for place in generator.permutation(len(names)):
        name = names[place]
        step = int(np.sign(-balance)) if swap else int(generator.choice((-1, 1)))
        offset = choice[name] + step
        if not grid.lowest <= offset <= grid.highest or not np.isfinite(costs[name][grid.index(offset)]):
            continue
        swap[name] = offset
        balance += step * sizes[name]
        if balance == 0:
            return swap
        if len(swap) == LARGEST_SWAP:
            return None
    return None
