"""Which allocation is asked for, whether a model can have it, and what it gives."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from sparsewav.errors import UserError
from sparsewav.pruning import distributed
from sparsewav.pruning.allocation.budget import ByteBudget, fit_uniformly
from sparsewav.pruning.allocation.latency import TimeShape
from sparsewav.pruning.allocation.parts import PartBudget
from sparsewav.pruning.allocation.rank import allocate_by_rank, allocate_uniformly
from sparsewav.pruning.allocation.search import LevelAllocation, allocate_by_levels
from sparsewav.pruning.allocation.sensitivity import (
    Trace,
    estimate_traces,
    rank_displacement,
    unseparated_neighbors,
)
from sparsewav.pruning.batches import first_utterances
from sparsewav.pruning.channels import front_levels
from sparsewav.pruning.encoder import has_head, prunable_matrices
from sparsewav.pruning.hessian import Hessians, Progress
from sparsewav.pruning.plan import Plan
from sparsewav.settings.pruning import (
    HAWQ,
    OBS,
    Allocation,
    Asymmetric,
    ErrorCurves,
    Hutchinson,
    Pruning,
    Traced,
)


def traces_of(
    model: PreTrainedModel, batches: Any, settings: Pruning, progress: Progress | None = None
) -> dict[str, Trace]:
    """Estimate the traces for an allocation, on the part of the calibration set that it asks for (eq. 4, 5)."""
    allocation = settings.allocation
    assert isinstance(allocation, Traced)
    return estimate_traces(
        model,
        first_utterances(batches, allocation.utterances),
        scope=settings.scope,
        trace=allocation.trace,
        probes=allocation.probes,
        distribution=allocation.distribution,
        rank_tolerance=allocation.rank_tolerance,
        seed=settings.seed,
        progress=progress,
    )


def check_allocation(model: PreTrainedModel, allocation: Allocation) -> None:
    """Refuse an allocation that takes transcripts or the posteriors of characters from a model that has none such.

    Raises:
        UserError: The model is an encoder without a head, or its configuration does not name the blank of CTC.
    """
    if has_head(model):
        if isinstance(allocation, Traced) and model.config.pad_token_id is None:
            raise UserError(
                f"allocation={allocation.name} takes the CTC loss, and the model's config has no pad_token_id, which "
                "is the blank of CTC; set it (model.config.pad_token_id = 0), or choose allocation=uniform"
            )
        return
    kind = type(model).__name__
    if isinstance(allocation, Traced):
        raise UserError(
            f"{kind} has no CTC head, and allocation={allocation.name} takes the CTC loss; choose allocation=uniform, "
            "error_curves or search, or load the model with AutoModelForCTC.from_pretrained"
        )
    if isinstance(allocation, ErrorCurves) and allocation.effect == "fisher":
        raise UserError(
            f"{kind} has no CTC head, and allocation.effect=fisher is that of its posteriors; choose "
            "allocation.effect=output"
        )


def allocate(sizes: Mapping[str, int], settings: Pruning, traces: Mapping[str, Trace] | None) -> dict[str, float]:
    """Give the sparsity of every matrix by name, uniformly or by its rank (eq. 6 and 7)."""
    allocation, target = settings.allocation, settings.sparsity.fraction
    assert target is not None
    if not isinstance(allocation, Hutchinson):
        return allocate_uniformly(sizes, target)
    assert traces is not None
    for name in sizes:
        if not math.isfinite(traces[name].value):
            raise UserError(f"the sensitivity of {name} is {traces[name].value}; check the model's weights")
    sensitivities = {name: traces[name].sensitivity for name in sizes}
    return allocate_by_rank(sizes, sensitivities, target, allocation.alpha, exact_budget=allocation.exact_budget)


def doubtful_traces(allocation: Allocation, traces: Mapping[str, Trace] | None) -> str | None:
    """Give a sentence on traces that do not settle what the allocation reads of them, and what to do; None if they do.

    ``Hutchinson`` reads the ranks, and ``HAWQ`` the values, of which it takes a negative one as 0.
    """
    if traces is None or not isinstance(allocation, Traced):
        return None
    found = []
    if isinstance(allocation, Hutchinson) and not rank_displacement(dict(traces)) <= allocation.rank_tolerance:
        close = unseparated_neighbors(dict(traces))
        if close:
            found.append(
                f"{close} of {len(traces) - 1} neighbours in the sensitivity ranking differ by less than their "
                "standard error"
            )
    negative = sum(trace.value < 0 for trace in traces.values())
    if negative:
        found.append(f"{negative} of {len(traces)} sensitivities are below 0, because the CTC loss is not convex")
    if not found:
        return None
    fisher = "choose allocation.trace=fisher, " if allocation.trace == "hutchinson" else ""
    return (
        f"{' and '.join(found)}; {fisher}raise allocation.probes, or choose allocation=error_curves, which reads no "
        "traces"
    )


def choose_evenly(parts: PartBudget, time_shape: TimeShape | None) -> PartBudget:
    """Give the budget within which all structures keep the same share of their parts, timed as in ``allocate_levels``.

    It is the same in all processes.
    """
    if time_shape is None and distributed.world() == 1:
        return parts
    correction = parts.correction
    with distributed.together():
        if distributed.rank() == 0 and time_shape is not None:
            correction = parts.measured_with(PartBudget.kept_evenly, time_shape).correction
    return replace(parts, correction=distributed.broadcast(correction))


def allocate_levels(
    model: PreTrainedModel,
    batches: Any,
    plan: Plan,
    hessians: Hessians,
    budget: ByteBudget | PartBudget | None,
    progress: Progress | None = None,
    *,
    time_shape: TimeShape | None = None,
) -> LevelAllocation:
    """Find the sparsity of every matrix by what its levels cost; the same in all processes.

    With ``time_shape`` what a budget of seconds chooses is timed, in the first process, and chosen again where it
    misses.
    """
    settings, matrices = plan.settings, plan.pruned(prunable_matrices(model, plan.settings.scope))
    allocation, sparsity = settings.allocation, settings.sparsity.fraction
    found: LevelAllocation | None = None
    front = None
    if plan.front is not None and isinstance(allocation, ErrorCurves) and isinstance(budget, PartBudget):
        front = front_levels(  # in all processes
            model,
            plan.front,
            budget.front_numbers(allocation.step),
            first_utterances(batches, allocation.utterances),
            settings.solver.damping,
            settings.calibration,
            settings.seed,
            hessians,
            asymmetric=isinstance(settings.objective, Asymmetric),
        )
    with distributed.together():
        if distributed.rank() == 0:  # the others wait, because every step of the search depends on the one before
            if isinstance(allocation, HAWQ | ErrorCurves):
                goal: float | ByteBudget | PartBudget | None = sparsity if budget is None else budget
                assert goal is not None
                found = allocate_by_levels(
                    model,
                    matrices,
                    hessians,
                    first_utterances(batches, allocation.utterances),
                    goal,
                    plan.solve_levels,
                    allocation,
                    traces=plan.traces,
                    masks=plan.masks,
                    front=front,
                    seed=settings.seed,
                    progress=progress,
                    time_shape=time_shape,
                )
            else:
                assert isinstance(budget, ByteBudget)
                # How many bytes weights take hardly depends on the solver: a quick one finds the sparsity.
                solver = OBS(damping=plan.settings.solver.damping)
                quick = replace(plan, settings=replace(plan.settings, solver=solver))
                fit = fit_uniformly(budget, matrices, hessians, quick.solve_levels, progress)
                found = LevelAllocation.of_fit(fit, note=budget.more_than_needed(fit.measured[0][1]))
    found = distributed.broadcast(found)
    assert found is not None
    return found
