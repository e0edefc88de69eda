"""The engine's entry point: collect Hessians, allocate and solve for a whole CTC model."""

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsewav.errors import UserError
from sparsewav.pruning import distributed
from sparsewav.pruning.allocation.allocate import (
    allocate,
    allocate_levels,
    check_allocation,
    choose_evenly,
    doubtful_traces,
    traces_of,
)
from sparsewav.pruning.allocation.budget import MARGIN, byte_budget
from sparsewav.pruning.allocation.latency import LatencyTable, TimeShape
from sparsewav.pruning.allocation.parts import part_budget
from sparsewav.pruning.allocation.search import LevelAllocation
from sparsewav.pruning.allocation.sensitivity import Trace
from sparsewav.pruning.batches import as_sequence
from sparsewav.pruning.channels import front_tensors, put_front
from sparsewav.pruning.encoder import (
    FRONT,
    PrunableMatrix,
    check_model,
    in_evaluation_mode,
    prunable_matrices,
    whatever_modes,
)
from sparsewav.pruning.encoding import file_bytes
from sparsewav.pruning.families import untried
from sparsewav.pruning.gradient_covariance import collect_gradient_covariances
from sparsewav.pruning.hessian import Hessians, Progress, collect_hessians
from sparsewav.pruning.layerwise import (
    LoadLayer,
    StageProgress,
    prune_layer_by_layer,
    remove_front_channels,
    solve,
)
from sparsewav.pruning.plan import BATCHED_DEVICES, Outcome, Plan
from sparsewav.pruning.report import PruneReport
from sparsewav.pruning.rest import round_rest
from sparsewav.pruning.structure import front_end
from sparsewav.pruning.structured import removed_weights
from sparsewav.settings.presets import read_preset
from sparsewav.settings.pruning import (
    HAWQ,
    OBS,
    TRANSFORMER,
    Calibration,
    ErrorCurves,
    Hutchinson,
    Magnitude,
    Megabytes,
    Pruning,
    Sparsity,
    Structured,
    Symmetric,
    Traced,
    Uniform,
    Unstructured,
    resolve,
)
from sparsewav.settings.quantization import Integers, NoQuantization, Quantization
from sparsewav.settings.recovery import Global, NoRecovery, Reconstruction

logger = logging.getLogger(__name__)


@runtime_checkable
class HasModel(Protocol):
    """What keeps a model together with its processor, such as :class:`~sparsewav.models.load.SpeechModel`."""

    model: PreTrainedModel


def model_within(given: Any) -> Any:
    """Give the model that a caller means: what was given itself, or, as :class:`HasModel` does, what it holds."""
    return given if isinstance(given, nn.Module) else getattr(given, "model", given)


def options_of(sparsity: float | Sparsity, preset: str, given: Mapping[str, Any]) -> Pruning:
    """Give the settings that the options of :func:`sparsewav.prune` stand for; ``given`` has the others by their names.

    Raises:
        UserError: One of them is wrong.
    """
    calibration = given["calibration"]
    if not isinstance(calibration, Calibration | None):
        raise UserError(f"calibration={calibration} is no Calibration; give e.g. Calibration(propagation='sequential')")
    settings = read_preset(preset)
    for group in ("saliency", "solver", "objective", "recovery", "quantization", "allocation"):
        if given[group] is not None:
            setattr(settings, group, resolve(group, given[group]))
    settings.sparsity, settings.seed = resolve("sparsity", sparsity), given["seed"]
    by_size = isinstance(settings.sparsity, Megabytes | Structured)
    if by_size and given["allocation"] is None and isinstance(settings.allocation, Traced):
        settings.allocation = ErrorCurves()  # as sparsity=megabytes or structured of the command brings it
    settings.calibration = calibration or settings.calibration
    settings.scope = given["scope"] or settings.scope
    settings.check()
    return settings


@contextmanager
def checked(model: Any, settings: Pruning) -> Iterator[None]:
    """Check a model against the settings, and give it back as it was if the block ends with an error.

    Raises:
        UserError: They do not fit, or it is no model.
    """
    by_output = isinstance(settings.recovery, Global) or not isinstance(settings.allocation, Uniform)
    check_model(model, by_output=by_output, scope=settings.reach)
    check_allocation(model, settings.allocation)
    check_quantization(model, settings.quantization)
    if isinstance(settings.sparsity, Structured) and settings.quantization.name != "none":
        raise UserError(
            f"quantization={settings.quantization.name} rounds the model that is cut; prune without it, cut the model, "
            f"and prune that to 0 with quantization={settings.quantization.name} and allocation=uniform"
        )
    with _undone_by_errors(model, channels=settings.reach != settings.scope), whatever_modes(model.device):
        yield


def prune_model(
    model: PreTrainedModel,
    calibration_batches: Any,
    settings: Pruning,
    *,
    masks: Mapping[str, Bool[Tensor, "_rows _cols"]] | None = None,
    hessians: Hessians | None = None,
    traces: Mapping[str, Trace] | None = None,
    levels: Mapping[str, tuple[float, float | None]] | None = None,
    rounds: bool = True,
    load_layer: LoadLayer | None = None,
    keep_masks: bool = True,
    batched_devices: tuple[str, ...] = BATCHED_DEVICES,
    latency: LatencyTable | None = None,
    time_shape: TimeShape | None = None,
    progress: StageProgress | None = None,
) -> PruneReport:
    """Prune a CTC model in place, as :func:`sparsewav.prune` does, with statistics that may have been computed earlier.

    Args:
        model: As there; an error that occurs while its layers are pruned leaves them as they are then.
        calibration_batches: As there.
        settings: All options.
        masks: As there.
        hessians: Hessians of the dense model, for propagation ``parallel`` and for allocations by levels.
        traces: Traces of the dense model, for the allocations that use them.
        levels: Sparsity and bits of every matrix, where they are decided already; None for the allocation to decide.
        rounds: Whether to round now; otherwise the report has the bits, and another call rounds.
        load_layer: As in :func:`~sparsewav.pruning.layerwise.prune_layer_by_layer`.
        keep_masks: Whether the report holds the masks, a byte for every weight.
        batched_devices: Types of device on which matrices whose inputs are equally wide are solved in one batch.
        latency: How long the model and its parts take, for ``Structured(speedup=2)``; of a model that was cut before,
            those of the dense one.
        time_shape: Times a model with so many heads and units, for the same; called in the first process alone. Without
            it what is chosen by ``latency`` is not checked.
        progress: As there.
    """
    settings.check()
    check_quantization(model, settings.quantization)
    matrices, parts = prunable_matrices(model, settings.reach), None
    check_scope(model, matrices, settings.scope)
    budget = byte_budget(model, settings) if levels is None else None
    prunable = sum(matrix.size for matrix in matrices)
    if isinstance(settings.sparsity, Structured):
        if masks:
            raise UserError("masks remove single weights, and sparsity=structured whole parts; give no masks")
        parts = part_budget(model, settings.sparsity, latency)
        matrices = [matrix for matrix in matrices if matrix.name in parts.in_layers]
    sizes = {matrix.name: matrix.size for matrix in matrices}
    unknown = sorted(set(masks or {}) - set(sizes))
    if unknown:
        raise UserError(f"masks name {unknown[0]}, which is not a prunable matrix of this model")
    in_memory = [matrix for matrix in matrices if not matrix.weight.is_meta]
    if settings.sparsity.fraction == 0 and not masks:  # only rounded: what was pruned before stays so
        masks = {matrix.name: matrix.weight.detach() != 0 for matrix in in_memory}
    zeros = sum(matrix.size - int(matrix.weight.count_nonzero()) for matrix in in_memory)
    batches: Any = as_sequence(calibration_batches)
    parallel = settings.calibration.propagation == "parallel"
    seconds = {"calibrate": 0.0, "allocate": 0.0}
    with in_evaluation_mode(model):
        if traces is None and levels is None and isinstance(settings.allocation, Traced):
            with _timed(seconds, "allocate"):
                traces = traces_of(model, batches, settings, stage_progress(progress, "allocate"))
        if traces is not None:  # GPU sums are not deterministic, and all processes must rank alike
            traces = distributed.broadcast(traces)
        by_levels = levels is None and (budget is not None or isinstance(settings.allocation, HAWQ | ErrorCurves))
        if levels is not None:
            targets = {name: levels[name][0] for name in sizes}
        elif parts is not None:
            if not by_levels:
                parts = choose_evenly(parts, time_shape)
            targets = parts.targets(parts.kept_evenly())
        else:
            targets = {} if by_levels else allocate(sizes, settings, traces)
        bits = _bits(sizes, settings, levels)
        plan = Plan(settings, targets, traces, dict(masks or {}), bits, rounds, keep_masks, batched_devices)
        if parts is not None:
            plan.structures, plan.front = parts.in_layers, parts.front
        if settings.solver.weights_outputs or settings.weights_layers:
            with _timed(seconds, "calibrate"):
                plan.covariances = collect_gradient_covariances(
                    model,
                    batches,
                    scope=settings.scope,
                    of_matrices=settings.solver.weights_outputs,
                    of_layers=settings.weights_layers,
                    seed=settings.seed,
                    progress=stage_progress(progress, "calibrate"),
                )
        observed = parts.readers if parts else list(sizes)
        hessians = hessians.restricted(observed) if hessians else None
        if hessians is None and (parallel or by_levels):
            with _timed(seconds, "calibrate"):
                hessians = collect_hessians(
                    model,
                    batches,
                    scope=settings.reach,
                    frames_per_column=settings.calibration.frames_per_column,
                    seed=settings.seed,
                    progress=stage_progress(progress, "calibrate"),
                ).restricted(observed)
        allocated = None
        if by_levels:
            assert hessians is not None
            with _timed(seconds, "allocate"):
                allocated = allocate_levels(
                    model,
                    batches,
                    plan,
                    hessians,
                    parts or budget,
                    stage_progress(progress, "allocate"),
                    time_shape=time_shape,
                )

        def prune_to_plan() -> Outcome:
            outcome = Outcome()
            if parallel:
                assert hessians is not None
                if plan.front is not None:
                    remove_front_channels(model, batches, plan, outcome, hessians)
                solve(matrices, hessians.restricted(sizes), plan, outcome, stage_progress(progress, "solve"))
            else:
                with _timed(seconds, "calibrate"):
                    prune_layer_by_layer(model, batches, plan, outcome, load_layer=load_layer, progress=progress)
                seconds["calibrate"] -= sum(outcome.seconds.values())
            if rounds:
                with outcome.timing("quantize"):
                    round_rest(model, settings.quantization, settings.scope)
            return outcome

        if allocated is None:
            outcome = prune_to_plan()
        elif isinstance(settings.sparsity, Megabytes):
            outcome, allocated = prune_to_size(model, settings.sparsity, plan, allocated, prune_to_plan)
        else:
            if parts is not None:
                parts = replace(parts, correction=allocated.correction)
            plan.targets = parts.filled_targets(allocated.sparsities) if parts else allocated.sparsities
            outcome = prune_to_plan()
    quantizes = rounds and not isinstance(settings.quantization, NoQuantization)
    stages = {"solve": True, "recover": settings.layer_recovery is not None, "quantize": quantizes}
    share = speedup = None
    if parts is not None:
        left = sum(matrix.size for matrix in prunable_matrices(model, settings.reach))  # without the channels
        removed = prunable - left + removed_weights(model, outcome.structures)
        kept = {name: outcome.structures[name].kept for name in parts.in_layers}
        kept |= {plan.front.name: plan.channels_kept} if plan.front else {}
        share = parts.share(kept)
        if time_shape is not None and distributed.rank() == 0:
            speedup = 1 / time_shape(parts.by_structure(kept))
    else:
        removed = sum(round(outcome.reports[name].sparsity * size) for name, size in sizes.items())
    return PruneReport(
        matrices=[outcome.reports[name] for name in sizes if name in outcome.reports],
        masks={name: outcome.masks[name] for name in sizes if name in outcome.masks},
        sparsity=removed / prunable,
        target_sparsity=None if parts else settings.sparsity.fraction,
        seconds=seconds | {stage: outcome.seconds[stage] for stage, happens in stages.items() if happens},
        warnings=_warnings(model, plan, outcome, zeros / prunable, removed / prunable, allocated),
        recoveries=outcome.recoveries,
        allocated=allocated,
        bytes=file_bytes(model.state_dict()) if isinstance(settings.sparsity, Megabytes) else None,
        scope=settings.reach,
        structures=[outcome.structures[name] for name in observed if name in outcome.structures],
        kept=outcome.kept,
        share=share,
        speedup=speedup,
    )


def round_pruned(
    model: PreTrainedModel,
    calibration_batches: Any,
    settings: Pruning,
    masks: Mapping[str, Bool[Tensor, "_rows _cols"]],
    bits: Mapping[str, float],
    progress: StageProgress | None = None,
) -> PruneReport:
    """Round the weights of a pruned model in place, whose zeros stay zero, as the others stay.

    Args:
        model: The model.
        calibration_batches: As in :func:`sparsewav.prune`.
        settings: The quantization, to whole numbers, the damping, the calibration and the scope.
        masks: The masks of all matrices of the scope, by name, True where a weight is kept.
        bits: Bits of every matrix by name; empty where the quantization has one width for all.
        progress: As in :func:`sparsewav.prune`.
    """
    width = settings.quantization.widths[0]
    levels = {name: (float((~mask).sum()) / mask.numel(), bits.get(name, width)) for name, mask in masks.items()}
    # Everything that may be removed is removed already, and nothing but the rounding changes the others.
    plain = replace(
        settings,
        sparsity=Unstructured(0.0),  # the levels say it
        saliency=Magnitude(),
        solver=OBS(damping=settings.solver.damping),
        objective=Symmetric(),
        recovery=NoRecovery(),
        allocation=Uniform(),
    )
    return prune_model(model, calibration_batches, plain, masks=masks, levels=levels, progress=progress)


TRIES = 5
"""How often a model is pruned to a size: what comes out too large is done again with less."""


def prune_to_size(
    model: PreTrainedModel,
    size: Megabytes,
    plan: Plan,
    allocated: LevelAllocation,
    prune_to_plan: Callable[[], Outcome],
) -> tuple[Outcome, LevelAllocation]:
    """Prune a model to the levels that were chosen, and, while its file is too large, again to smaller ones.

    Args:
        model: A model, which is given its weights back before it is pruned again.
        size: The size of the file at most.
        plan: Is given the sparsities and bits that ``prune_to_plan`` reads.
        allocated: The levels.
        prune_to_plan: Prunes and rounds the model.

    Raises:
        UserError: It is too large after :data:`TRIES`, or there are no smaller levels.
    """
    before = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    spent: Counter[str] = Counter()
    for number in range(1, TRIES + 1):
        plan.targets, plan.bits = allocated.sparsities, allocated.bits
        outcome = prune_to_plan()
        spent.update(outcome.seconds)
        outcome.seconds = dict(spent)
        excess = file_bytes(model.state_dict()) - size.bytes
        if excess <= 0:
            return outcome, allocated
        # A margin, as the next may miss by as much as this one.
        smaller = allocated.smaller(excess + int(MARGIN * number * size.bytes))
        if smaller is None or number == TRIES:
            break
        allocated = replace(
            smaller,
            note=f"the file was {excess / size.bytes:.1%} larger than {size} at first: pruned {number + 1} times",
        )
        model.load_state_dict(before)
    raise UserError(
        f"the weights file came out {excess:,} bytes larger than sparsity.megabytes={size.megabytes:g} after {number} "
        f"tries; choose at least {math.ceil((size.bytes + excess) / 1000 + 1) / 1000:.3f}"
    )


def check_scope(model: PreTrainedModel, matrices: list[PrunableMatrix], scope: str) -> None:
    """Refuse to prune what is in front of the layers where a model has nothing there that could be pruned.

    Raises:
        UserError: It says so.
    """
    if scope != TRANSFORMER and not any(matrix.layer == FRONT for matrix in matrices):
        raise UserError(
            f"scope={scope} prunes what is in front of the layers, too, and {type(model).__name__} has no matrix "
            f"there that is known; choose scope={TRANSFORMER}"
        )


def check_quantization(model: PreTrainedModel, quantization: Quantization) -> None:
    """Refuse a model whose precision does not hold what its weights are rounded to.

    Raises:
        UserError: It says which precision does.
    """
    if isinstance(quantization, Integers) and model.dtype not in (torch.float32, torch.float64):
        raise UserError(
            f"quantization={quantization.name} makes weights multiples of a scale, which "
            f"{str(model.dtype).removeprefix('torch.')} does not hold; load the model in float32 (model.float())"
        )


def _bits(
    sizes: Mapping[str, int], settings: Pruning, levels: Mapping[str, tuple[float, float | None]] | None
) -> dict[str, float]:
    """Give the bits of every matrix by name; empty where the weights stay floating-point numbers."""
    if levels is not None:
        return {name: bits for name, (_, bits) in levels.items() if bits is not None}
    return dict.fromkeys(sizes, widths[0]) if len(widths := settings.quantization.widths) == 1 else {}


def stage_progress(progress: StageProgress | None, stage: str) -> Progress | None:
    """Turn the progress of a whole pruning into that of one stage."""
    return partial(progress, stage) if progress else None


@contextmanager
def _undone_by_errors(model: PreTrainedModel, *, channels: bool) -> Iterator[None]:
    """Give the model its numbers back if the block ends with an error: rounding changes the front end, too.

    Where channels are removed, its front end gets its sizes back.
    """
    before = {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}
    front = front_end(model) if channels else None
    try:
        yield
    except BaseException:
        if front is not None:
            put_front(model, front, {name: before[name].to(model.device) for name in front_tensors(model, front)})
        model.load_state_dict(before)
        raise


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[stage] += time.perf_counter() - started


def _warnings(
    model: PreTrainedModel,
    plan: Plan,
    outcome: Outcome,
    zeros: float,
    removed: float,
    allocated: LevelAllocation | None,
) -> list[str]:
    """Give sentences on what is untried or went wrong; of the prunable weights ``zeros`` were so before, as shares."""
    warnings = [*untried(model), *([allocated.note] if allocated and allocated.note else [])]
    if plan.structures:
        if zeros > 0.001:
            warnings.append(
                f"the model had {zeros:.2%} zeros among its prunable weights, because it was pruned before, and may "
                "have fewer now: all weights that are left make up for the parts that went; start from the dense "
                "model, and prune single weights afterwards"
            )
    elif zeros - removed > 0.001:
        warnings.append(
            f"the model had {zeros - removed:.2%} more zeros among its prunable weights than are removed now, because "
            "it was pruned before; ask for a higher sparsity, or start from the dense model"
        )
    own_rate = isinstance(plan.settings.recovery, Reconstruction)  # that of recovery=global is of the whole model
    remedy = "lower recovery.learning_rate" if own_rate else "load the model in float32, or leave its layers out"
    warnings += [
        f"the recovery of layer {index} came to numbers that are not finite; the layer stays as it was pruned "
        f"({remedy})"
        for index, recovery in enumerate(outcome.recoveries)
        if recovery.diverged
    ]
    emptied = [name for name, target in plan.targets.items() if target >= 1 - 1e-9]
    if emptied and isinstance(plan.settings.allocation, Hutchinson):
        warnings.append(f"sparsity + alpha is 1: {', '.join(emptied)} lost all of its weights")
    doubt = doubtful_traces(plan.settings.allocation, plan.traces)
    warnings += [doubt] if doubt else []
    if distributed.rank() == 0:  # once is enough
        for warning in warnings:
            logger.warning(warning)
    return warnings
