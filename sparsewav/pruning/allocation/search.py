"""Allocation by levels: the cost of every level of every matrix, the cheapest choice, and a search from there.

The costs are one of

- ``output``: the output divergence (:mod:`~sparsewav.pruning.allocation.divergence`), measured with one matrix at one
  level and all others dense, or at the target's level (``others``);
- ``fisher``: ½ Σ_r F_r ||(w_r − ŵ_r)X||² / columns of X with the Fisher information F of the matrix's output, from a
  single backward pass: the output divergence to second order;
- ``trace``: the mean Hessian trace times ||W − Ŵ||² (HAWQ-V2, Dong et al. 2020, section 3.1).

The sum of the costs neglects how the errors of different matrices interact; the search therefore evaluates whole
models. It swaps levels so that the budget is kept (the idea of EvoPress, Sieberling et al. 2024), and the costs predict
which swaps to evaluate first.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from sparsewav.errors import UserError
from sparsewav.pruning.allocation.budget import ByteBudget, Fit, UniformFit
from sparsewav.pruning.allocation.divergence import OutputDivergence
from sparsewav.pruning.allocation.latency import TimeShape
from sparsewav.pruning.allocation.levels import (
    Grid,
    Level,
    LevelStore,
    SolveLevels,
    build_level_store,
    choose_levels,
    exact_sparsities,
    level_grid,
)
from sparsewav.pruning.allocation.parts import PartBudget
from sparsewav.pruning.allocation.sensitivity import Trace
from sparsewav.pruning.channels import FrontLevels
from sparsewav.pruning.encoder import PrunableMatrix
from sparsewav.pruning.hessian import Hessians, Progress
from sparsewav.settings.pruning import HAWQ, ErrorCurves, Search

DRAWS = 16
"""Swaps that are drawn for each evaluation, which is of the one with the lowest predicted cost."""
LARGEST_SWAP = 8
"""The largest number of matrices that change their level in one swap."""


@dataclass(frozen=True)
class LevelAllocation:
    """The result of an allocation by levels.

    Attributes:
        sparsities: The sparsity of every matrix, meeting a budget of weights to one weight.
        costs: The cost of every matrix's level, in the unit of the costs.
        divergence: The output divergence of the model at these levels; None if it was not measured (HAWQ).
        evaluations: The number of evaluations of the output divergence.
        bits: The bits of every matrix that is rounded to integers, where a budget of bytes chose them.
        fit: What a smaller choice can be made from, for a budget of bytes.
        note: A sentence for the user; None where there is nothing to say.
        correction: That of the budget of seconds within which the levels were chosen.
    """

    sparsities: dict[str, float]
    costs: dict[str, float] = field(default_factory=dict)
    divergence: float | None = None
    evaluations: int = 0
    bits: dict[str, float] = field(default_factory=dict)
    fit: Fit | UniformFit | None = None
    note: str | None = None
    correction: int = 0

    @classmethod
    def of_fit(cls, fit: Fit | UniformFit, **known: Any) -> "LevelAllocation":
        """Make one of a choice of levels that fits."""
        return cls(sparsities=fit.sparsities, bits=fit.bits, fit=fit, costs=fit.chosen_costs, **known)

    def smaller(self, excess: int) -> "LevelAllocation | None":
        """Give one whose levels take fewer bytes, by at least ``excess``; None if there is none."""
        fit = self.fit.smaller(excess) if self.fit else None
        if fit is None:
            return None
        return replace(self, sparsities=fit.sparsities, bits=fit.bits, fit=fit, costs=fit.chosen_costs)


@torch.no_grad()
def allocate_by_levels(
    model: PreTrainedModel,
    matrices: Sequence[PrunableMatrix],
    hessians: Hessians,
    batches: Iterable[dict[str, Tensor]],
    sparsity: float | ByteBudget | PartBudget,
    solve: SolveLevels,
    settings: HAWQ | ErrorCurves,
    *,
    traces: Mapping[str, Trace] | None = None,
    masks: Mapping[str, Bool[Tensor, "_rows _cols"]] | None = None,
    front: FrontLevels | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    time_shape: TimeShape | None = None,
) -> LevelAllocation:
    """Find every matrix's sparsity, and within bytes its bits, too; the model is bit for bit the same afterwards.

    Args:
        model: A CTC model in evaluation mode.
        matrices: All of its prunable matrices, or those that read what may be removed whole.
        hessians: Their Hessians, and those of the matrices that read channels where these may be removed.
        batches: The evaluation batches of the output divergence; labels are not read.
        sparsity: The sparsity of the whole model, the bytes of its file, or what its parts may take.
        solve: Prunes matrices with the solver that the model is going to be pruned with.
        settings: The allocation; ``Search`` searches after ``ErrorCurves``.
        traces: The Hessian traces, for ``HAWQ``.
        masks: Masks already in force: no matrix gets a level below its present sparsity.
        front: The front end with fewer and fewer channels, where these may be removed.
        seed: The seed of the Fisher information and of the search.
        progress: Called as the allocation advances.
        time_shape: Times what is chosen within a budget of seconds, before a search begins.

    Raises:
        UserError: A setting is wrong, or no choice of levels meets the budget.
    """
    sizes = {matrix.name: matrix.size for matrix in matrices}
    goal = level_grid(sparsity, settings.step, settings.spread) if isinstance(sparsity, float) else sparsity
    effect = "trace" if isinstance(settings, HAWQ) else settings.effect
    evaluations = settings.evaluations if isinstance(settings, Search) else 0
    pieces: list[PrunableMatrix | FrontLevels] = [*([front] if front else []), *matrices]
    own_hessians = hessians.restricted(sizes)
    steps = len(own_hessians.by_input) + (len(pieces) if effect == "output" else front is not None) + evaluations
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, steps)

    dense = [matrix.weight.detach().clone() for matrix in matrices]
    divergence = None if isinstance(settings, HAWQ) else OutputDivergence(model, batches, pieces)
    store = build_level_store(
        matrices,
        own_hessians,
        [goal.sparsity(offset) for offset in goal.offsets]
        if isinstance(goal, Grid)
        else goal.sparsities(settings.step),
        solve,
        memory=settings.level_cache_gib * 2**30,
        rounding=None if isinstance(goal, Grid) else goal.levels,
        progress=lambda _, __: advance(),
    )
    try:
        with store:
            if front is not None:
                assert isinstance(goal, PartBudget)
                store.levels[front.name] = [Level(1 - number / front.front.count) for number in front.numbers]
                store.sizes[front.name] = goal.amounts[front.name][front.numbers]
            if not isinstance(goal, Grid):
                goal.check(sum(int(own[0]) for own in store.sizes.values()))
                if note := goal.more_than_needed(sum(int(own[-1]) for own in store.sizes.values())):
                    return LevelAllocation.of_fit(Fit.at_best(store), note=note)
                store.reference = goal.reference(store, sizes)
            else:
                store.reference = dict.fromkeys(sizes, goal.index(0))
            if isinstance(settings, HAWQ):
                costs = _trace_costs(store, traces)
            else:
                assert divergence is not None
                if effect == "fisher":
                    # Of the channels alone there is no matrix that could have a gradient.
                    costs = _fisher_costs(store, divergence.output_fisher(seed), hessians) if matrices else {}
                    if front is not None:  # measured, in the same unit
                        costs = measure_costs(divergence, [front], store, advance=advance) | costs
                else:
                    costs = measure_costs(divergence, pieces, store, settings.others, advance)
            removed = {name: int((~mask).sum()) for name, mask in (masks or {}).items()}
            for name, count in removed.items():
                for index, level in enumerate(store.levels[name]):
                    if sizes[name] * level.sparsity < count - 1:  # counts are rounded
                        costs[name][index] = np.inf
            if isinstance(goal, PartBudget) and time_shape is not None:

                def chosen_within(budget: PartBudget) -> dict[str, int]:
                    chosen = budget.choose(costs, store.sizes)
                    sparsities = {name: store.levels[name][index].sparsity for name, index in chosen.items()}
                    return budget.filled(budget.parts_left(sparsities))

                goal = goal.measured_with(chosen_within, time_shape)
            if not isinstance(goal, Grid):
                chosen, room = goal.choose(costs, store.sizes), goal.room
            else:
                offsets, room = choose_levels(sizes, costs, goal), None
                chosen = {name: goal.index(offset) for name, offset in offsets.items()}
            least = None
            if divergence is not None:
                chosen, least = search_swaps(
                    divergence, pieces, store, costs, chosen, evaluations, seed, advance, room=room
                )
    finally:
        for matrix, weight in zip(matrices, dense, strict=True):
            matrix.weight.data.copy_(weight)
        if front is not None:
            front.put(None)
    measured = divergence.evaluations if divergence else 0
    if not isinstance(goal, Grid):
        return LevelAllocation.of_fit(
            Fit(store.levels, store.sizes, costs, chosen),
            divergence=least,
            evaluations=measured,
            correction=goal.correction if isinstance(goal, PartBudget) else 0,
        )
    offsets = {name: goal.lowest + index for name, index in chosen.items()}
    return LevelAllocation(
        sparsities=exact_sparsities(sizes, offsets, goal, removed),
        costs={name: float(costs[name][index]) for name, index in chosen.items()},
        divergence=least,
        evaluations=measured,
    )


def _trace_costs(store: LevelStore, traces: Mapping[str, Trace] | None) -> dict[str, np.ndarray]:
    if traces is None:
        raise UserError("effect 'trace' needs the Hessian traces of the matrices")
    return {  # a negative trace means a low sensitivity, not that errors reduce the loss
        name: max(traces[name].sensitivity, 0.0) * change.cpu().numpy() for name, change in store.changes.items()
    }


def _fisher_costs(
    store: LevelStore,
    fisher: Mapping[str, Float[Tensor, " _rows"]],
    hessians: Hessians,
) -> dict[str, np.ndarray]:
    return {
        name: 0.5 * (errors.cpu() @ fisher[name]).numpy() / hessians.rows[hessians.reads[name]]
        for name, errors in store.row_errors.items()
    }


def measure_costs(
    divergence: OutputDivergence,
    pieces: Sequence[PrunableMatrix | FrontLevels],
    store: LevelStore,
    others: str = "dense",
    advance: Callable[[], None] = lambda: None,
) -> dict[str, np.ndarray]:
    """Measure the output divergence with one piece at each level and the others dense or at the store's reference.

    A piece is a matrix, or the front end with fewer channels.

    Afterwards the model has the weights that ``others`` names. The result is, by matrix, an array of shape (levels,).
    """
    dense = {piece.name: piece.weight.detach().clone() for piece in pieces if isinstance(piece, PrunableMatrix)}

    def rest(piece: PrunableMatrix | FrontLevels) -> None:
        if others == "pruned":
            store.put(piece, store.reference[piece.name])
        elif isinstance(piece, FrontLevels):
            piece.put(None)
        else:
            piece.weight.data.copy_(dense[piece.name])

    for piece in pieces:
        rest(piece)
    at_rest = divergence.measure() if others == "pruned" else None
    costs: dict[str, np.ndarray] = {}
    for layer, group in groupby(sorted(pieces, key=lambda piece: piece.layer), key=lambda piece: piece.layer):
        with divergence.resuming_at(layer):
            for piece in group:
                values = []
                for index in range(len(store.levels[piece.name])):
                    store.put(piece, index)
                    is_rest = at_rest is not None and index == store.reference[piece.name]
                    values.append(at_rest if is_rest else divergence.measure())
                rest(piece)
                costs[piece.name] = np.array(values)
                advance()
    return costs


def search_swaps(
    divergence: OutputDivergence,
    pieces: Sequence[PrunableMatrix | FrontLevels],
    store: LevelStore,
    costs: Mapping[str, np.ndarray],
    start: Mapping[str, int],
    evaluations: int,
    seed: int = 0,
    advance: Callable[[], None] = lambda: None,
    *,
    room: int | None = None,
) -> tuple[dict[str, int], float]:
    """Improve a choice of levels by swaps that keep the budget, each evaluated by the whole model's divergence.

    Args:
        divergence: Measures the output divergence from the dense model.
        pieces: The matrices of the model that may change, and the front end where it may lose channels.
        store: Their levels.
        costs: The estimated cost of each level; infinite for a level that the matrix cannot have.
        start: The index of every matrix's initial level.
        evaluations: The number of swaps to evaluate.
        seed: The seed of the swaps.
        advance: Called after each evaluation.
        room: What all matrices may take of the budget; None: as many weights are removed as at the start.

    Returns:
        The choice with the least divergence found, and its divergence.
    """
    by_name = {piece.name: piece for piece in pieces}
    amounts = store.sizes
    if room is None:  # of weights; levels follow one another at the same distance
        matrices = [piece for piece in pieces if isinstance(piece, PrunableMatrix)]
        amounts = {matrix.name: matrix.size * np.arange(len(store.levels[matrix.name])) for matrix in matrices}
    generator = np.random.default_rng(seed)

    def put(choice: Mapping[str, int], names: Iterable[str]) -> None:
        for name in names:
            store.put(by_name[name], choice[name])

    best = dict(start)
    put(best, best)
    least = divergence.measure()
    measured = {tuple(best.values())}
    for _ in range(evaluations):
        drawn = [_draw_swap(best, amounts, costs, room, generator) for _ in range(DRAWS)]
        fresh = [swap for swap in drawn if swap and tuple((best | swap).values()) not in measured]
        if fresh:
            swap = min(fresh, key=lambda swap: _predicted(best, swap, costs))
            measured.add(tuple((best | swap).values()))
            put(swap, swap)
            found = divergence.measure()
            if found < least:
                best, least = best | swap, found
            else:
                put(best, swap)
        advance()
    return best, least


def _predicted(choice: Mapping[str, int], swap: Mapping[str, int], costs: Mapping[str, np.ndarray]) -> float:
    return sum(float(costs[name][index] - costs[name][choice[name]]) for name, index in swap.items())


def _draw_swap(
    choice: Mapping[str, int],
    amounts: Mapping[str, np.ndarray],
    costs: Mapping[str, np.ndarray],
    room: int | None,
    generator: np.random.Generator,
) -> dict[str, int] | None:
    """Move random matrices up and others down by a level each until the budget is met; give None if it is not.

    It is met when the sum of the amounts is that of ``choice``, or, where there is a ``room``, when it is no larger
    than that and a matrix has moved up, because moving down alone makes no model better.
    """
    swap: dict[str, int] = {}
    names = list(choice)
    now = sum(int(amounts[name][choice[name]]) for name in names)
    balance, up = now - (now if room is None else room), False
    for place in generator.permutation(len(names)):
        name = names[place]
        wanted = int(np.sign(-balance)) if room is None else 1 if balance <= 0 else -1
        step = wanted if swap else int(generator.choice((-1, 1)))
        index = choice[name] + step
        if not 0 <= index < len(costs[name]) or not np.isfinite(costs[name][index]):
            continue
        swap[name] = index
        balance += int(amounts[name][index] - amounts[name][choice[name]])
        up = up or step > 0
        if balance == 0 if room is None else balance <= 0 and up:
            return swap
        if len(swap) == LARGEST_SWAP:
            return None
    return None
