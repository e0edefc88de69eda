"""The engine: calibrate, allocate and solve for a whole CTC model."""

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsewav.errors import UserError
from sparsewav.pruning import distributed
from sparsewav.pruning.allocation.rank import allocate_by_rank, allocate_uniformly
from sparsewav.pruning.allocation.search import Allocation, LevelSettings, allocate_by_levels, check_settings
from sparsewav.pruning.allocation.sensitivity import Probe, Trace, estimate_traces, unseparated_neighbors
from sparsewav.pruning.encoder import encoder_layers, prunable_matrices
from sparsewav.pruning.hessian import Calibration, calibrate, calibrate_sequentially
from sparsewav.pruning.hidden_states import LayerInputs
from sparsewav.pruning.layerwise import MatrixReport, Pruner
from sparsewav.pruning.recovery import RECOVERIES, LayerRecovery, correct_layer, recover_layer
from sparsewav.pruning.solvers.saliency import SALIENCIES
from sparsewav.pruning.solvers.solve import check_solver

logger = logging.getLogger(__name__)

StageProgress = Callable[[str, int, int], None]
"""Called with (stage, steps done, steps in all); stages are ``calibrate``, ``allocate``, ``solve`` and ``recover``."""

BringLayer = Callable[[int, dict[str, MatrixReport]], AbstractContextManager[bool]]
"""Called with a layer's index and the reports of the matrices pruned so far; within its block the layer has its
weights. The block is given True for a layer that is pruned already, whose reports are then among the others."""

ALLOCATIONS = ("uniform", "hutchinson", "levels")
PROPAGATIONS = ("parallel", "sequential", "true_sequential")
OBJECTIVES = ("symmetric", "asymmetric")


@dataclass
class PruneReport:
    """What :func:`prune` did.

    Attributes:
        matrices: a report for every matrix, in the model's order.
        masks: for every matrix a boolean mask (rows, cols), True where a weight stays; empty where they were not to be
            kept.
        sparsity: pruned weights over prunable weights.
        target_sparsity: what was asked for.
        seconds: of the stages ``calibrate``, ``allocate`` and ``solve``, and ``recover`` where there is a recovery;
            what was given ready-made took none.
        warnings: sentences the user should read.
        recoveries: of every transformer layer, where there is one.
        allocated: what the allocation over levels found; None for the other allocations.
    """

    matrices: list[MatrixReport]
    masks: dict[str, Tensor]
    sparsity: float
    target_sparsity: float
    seconds: dict[str, float]
    warnings: list[str] = field(default_factory=list)
    recoveries: list[LayerRecovery] = field(default_factory=list)
    allocated: Allocation | None = None


def prune(
    model: PreTrainedModel,
    calibration_batches: Iterable[Mapping[str, Tensor]],
    sparsity: float = 0.75,
    *,
    saliency: str = "obs_first_order",
    allocation: str = "hutchinson",
    alpha: float = 0.1,
    exact_budget: bool = False,
    probes: int = 1,
    probe_distribution: Probe = "gaussian",
    rank_tolerance: float = 0.0,
    levels: LevelSettings | None = None,
    judge_batches: Iterable[Mapping[str, Tensor]] | None = None,
    n_m: tuple[int, int] | None = None,
    propagation: str = "parallel",
    frames_per_column: float | None = None,
    block_size: int = 128,
    percdamp: float = 0.01,
    comparison_group: str | None = None,
    solver: str = "obs",
    solver_tolerance: float = 1e-4,
    solver_steps: int = 300,
    objective: str = "symmetric",
    drift_strength: float = 1.0,
    recovery: str = "none",
    recovery_steps: int = 100,
    recovery_rate: float = 3e-3,
    seed: int = 0,
    masks: Mapping[str, Tensor] | None = None,
    calibration: Calibration | None = None,
    traces: Mapping[str, Trace] | None = None,
    bring_layer: BringLayer | None = None,
    keep_masks: bool = True,
    progress: StageProgress | None = None,
) -> PruneReport:
    """Prune a CTC model in place, in one shot.

    In a process group (:mod:`torch.distributed`) all processes call it with the same arguments, share the calibration
    and the matrices, and end with the same model.

    Args:
        model: a CTC model of transformers; its prunable matrices are those of :mod:`~sparsewav.pruning.encoder`.
        calibration_batches: dictionaries with ``input_values`` (batch, samples), ``attention_mask`` (batch, samples)
            and, for allocation ``hutchinson``, ``labels`` (batch, characters; −100 where there is none).
        sparsity: share of the prunable weights to remove.
        saliency: ``magnitude``, ``wanda`` (both without weight updates), ``obs`` or ``obs_first_order``.
        allocation: ``uniform``, ``hutchinson`` (by the sensitivity of the CTC loss, eq. 4 to 7) or ``levels`` (by what
            every level of every matrix costs, :mod:`~sparsewav.pruning.allocation.search`).
        alpha: half the range of sparsities that ``hutchinson`` gives.
        exact_budget: let ``hutchinson`` meet ``sparsity`` to one weight; the paper's own progression misses it.
        probes: Hutchinson probes for each calibration batch.
        probe_distribution: ``gaussian`` (the paper's) or ``rademacher``.
        rank_tolerance: stop probing once ranks are expected to be displaced by no more than this share of all ranks.
        levels: how ``levels`` finds its allocation; None for its defaults.
        judge_batches: what ``levels`` judges the model's output on; None for all calibration batches.
        n_m: keep n of every m consecutive weights of a row; ``sparsity`` must be 1 − n/m, ``allocation`` uniform.
        propagation: calibrate every matrix on the dense model's activations (``parallel``), layer by layer on those of
            the layers already pruned (``sequential``), or matrix by matrix within a layer, too (``true_sequential``).
        frames_per_column: sum each Hessian over a random sample of so many frames for each of its columns; None for
            all frames.
        block_size: columns that the solver masks together.
        percdamp: damping as a share of the Hessian's mean diagonal.
        comparison_group: as in :func:`~sparsewav.pruning.solvers.solve.prune_matrix`.
        solver: ``obs`` (the paper's), ``obs_refit`` (its mask, the kept weights solved exactly) or ``alps`` (a
            mask of its own by ADMM; the saliency is not used).
        solver_tolerance: relative, of the last two's conjugate gradients.
        solver_steps: of ``alps`` at most.
        objective: ``symmetric``, min ||(W − Ŵ)X̂||², or ``asymmetric``, min ||WX − ŴX̂||², X the inputs in the dense and
            X̂ in the pruned model, so that a matrix makes up for those before it; not with propagation ``parallel``.
        drift_strength: 0 to 1, how much of X − X̂ the asymmetric objective takes into account.
        recovery: ``none``, or, when a transformer layer is pruned, ``block``: let its kept weights, biases and layer
            norms learn the dense model's output of that layer, or ``affine``: solve its last bias or layer norm
            for it; not with propagation ``parallel``.
        recovery_steps: of one layer, with ``block``.
        recovery_rate: Adam's first learning rate; it falls to zero.
        seed: of the Hutchinson probes, the sample of frames, the judge's search and the recovery's order of batches.
        masks: masks already in force, by matrix name: what they removed stays removed and counts.
        calibration: Hessians computed earlier for this model (for ``parallel``, and for allocation ``levels``).
        traces: Hessian traces computed earlier for this model.
        bring_layer: brings a layer's weights and takes them away (``sequential`` alone), for models that memory does
            not hold whole.
        keep_masks: let the report hold the masks, a byte for every weight.
        progress: called as the stages advance.

    Raises:
        UserError: an argument, the model's family or the calibration data is wrong; the model is then as it was,
            unless the solver had begun.
    """
    _check_choice("saliency", saliency, SALIENCIES)
    _check_choice("allocation", allocation, ALLOCATIONS)
    _check_choice("propagation", propagation, PROPAGATIONS)
    check_solver(solver, saliency)
    _check_choice("objective", objective, OBJECTIVES)
    _check_choice("recovery", recovery, RECOVERIES)
    _check_two_models(objective, drift_strength, recovery, propagation, saliency)
    levels = levels or LevelSettings()
    if allocation == "levels":
        check_settings(levels)
    if n_m:
        _check_pattern(n_m, sparsity, allocation)
    matrices = prunable_matrices(model)
    batches: Any = (
        calibration_batches if hasattr(calibration_batches, "__len__") else list(calibration_batches)
    )  # read more than once
    sizes = {matrix.name: matrix.size for matrix in matrices}
    strangers = sorted(set(masks or {}) - set(sizes))
    if strangers:
        raise UserError(f"masks name {strangers[0]}, which is not a prunable matrix of this model")
    seconds = {"calibrate": 0.0, "allocate": 0.0, "solve": 0.0}
    was_training = model.training
    model.eval()
    allocated: Allocation | None = None
    try:
        # The uniform call also checks the sparsity before any work is done.
        targets = allocate_uniformly(sizes, sparsity)
        if allocation == "hutchinson":
            allocate_by_rank(sizes, dict.fromkeys(sizes, 0.0), sparsity, alpha)  # refuses a wrong α at once
        if traces is None and (allocation == "hutchinson" or (allocation == "levels" and levels.effect == "trace")):
            started = time.perf_counter()
            traces = estimate_traces(
                model,
                batches,
                probes=probes,
                distribution=probe_distribution,
                rank_tolerance=rank_tolerance,
                seed=seed,
                progress=_stage(progress, "allocate"),
            )
            seconds["allocate"] = time.perf_counter() - started
        if allocation == "hutchinson":
            assert traces is not None
            traces = distributed.broadcast(traces)  # GPUs do not sum in the same order twice, and all must rank alike
            sensitivities = {name: traces[name].sensitivity for name in sizes}
            targets = allocate_by_rank(sizes, sensitivities, sparsity, alpha, exact_budget=exact_budget)
        solving: dict[str, Any] = {
            "saliency": saliency,
            "n_m": n_m,
            "block_size": block_size,
            "percdamp": percdamp,
            "comparison_group": comparison_group,
            "solver": solver,
            "tolerance": solver_tolerance,
            "max_steps": solver_steps,
        }
        strength = drift_strength if objective == "asymmetric" else None
        pruner = Pruner(targets, traces, solving, strength, dict(masks or {}), keep_masks, recovery != "none")
        if calibration is None and (propagation == "parallel" or allocation == "levels"):
            started = time.perf_counter()
            calibration = calibrate(
                model,
                batches,
                _stage(progress, "calibrate"),
                frames_per_column=frames_per_column,
                seed=seed,
            )
            seconds["calibrate"] = time.perf_counter() - started
        if allocation == "levels":  # on the dense model's inputs, whatever the matrices are pruned on afterwards
            assert calibration is not None
            started = time.perf_counter()
            heard: Any = batches if judge_batches is None else judge_batches
            with distributed.together():
                if distributed.rank() == 0:  # the others wait: judgements follow on one another
                    allocated = allocate_by_levels(
                        model,
                        matrices,
                        calibration,
                        heard,
                        sparsity,
                        pruner.prune_group,
                        levels,
                        traces=traces,
                        masks=masks,
                        seed=seed,
                        progress=_stage(progress, "allocate"),
                    )
            allocated = distributed.broadcast(allocated)
            assert allocated is not None
            targets = pruner.targets = allocated.sparsities
            seconds["allocate"] += time.perf_counter() - started
        if propagation == "parallel":
            assert calibration is not None
            pruner.solve(matrices, calibration, _stage(progress, "solve"))
        else:
            started = time.perf_counter()
            number_of_layers = len(encoder_layers(model))

            def recover(layer: nn.Module, run: Callable[[LayerInputs], Tensor], inputs: list[LayerInputs]) -> None:
                if recovery == "affine":
                    pruner.recover(partial(correct_layer, layer, run, inputs))
                    return
                done = len(pruner.recoveries) * recovery_steps
                total = number_of_layers * recovery_steps
                options: dict[str, Any] = {"steps": recovery_steps, "learning_rate": recovery_rate, "seed": seed}
                shown = (lambda step, _: progress("recover", done + step, total)) if progress else None
                pruner.recover(partial(recover_layer, layer, run, inputs, **options, progress=shown))

            calibrate_sequentially(
                model,
                batches,
                pruner.solve,
                _stage(progress, "calibrate"),
                frames_per_column=frames_per_column,
                seed=seed,
                around_layer=lambda index: bring_layer(index, pruner.reports) if bring_layer else nullcontext(False),
                true_sequential=propagation == "true_sequential",
                against_dense=objective == "asymmetric",
                after_layer=recover if recovery != "none" else None,
            )
            seconds["calibrate"] += time.perf_counter() - started - pruner.seconds - pruner.recovery_seconds
        seconds["solve"] = pruner.seconds
        if recovery != "none":
            seconds["recover"] = pruner.recovery_seconds
    finally:
        model.train(was_training)
    removed = sum(round(pruner.reports[name].sparsity * size) for name, size in sizes.items())
    return PruneReport(
        matrices=[pruner.reports[name] for name in sizes],
        masks={name: pruner.masks[name] for name in sizes if name in pruner.masks},
        sparsity=removed / sum(sizes.values()),
        target_sparsity=sparsity,
        seconds=seconds,
        warnings=_warnings(targets, traces if allocation == "hutchinson" else None),
        recoveries=pruner.recoveries,
        allocated=allocated,
    )


def _stage(progress: StageProgress | None, stage: str) -> Callable[[int, int], None] | None:
    if progress is None:
        return None
    return lambda done, total: progress(stage, done, total)


def _check_choice(key: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise UserError(f"{key} {value!r} does not exist; choose one of {', '.join(choices)}")


def _check_two_models(objective: str, drift_strength: float, recovery: str, propagation: str, saliency: str) -> None:
    for key, value, plain in (("objective", objective, "symmetric"), ("recovery", recovery, "none")):
        if value != plain and propagation == "parallel":
            raise UserError(
                f"{key} {value!r} needs what the pruned layers give; choose propagation sequential or true_sequential "
                "with it"
            )
    if objective == "asymmetric" and not SALIENCIES[saliency].updates:
        raise UserError(
            f"objective {objective!r} updates the kept weights, and saliency {saliency!r} does not; choose obs or "
            "obs_first_order with it"
        )
    if not 0 <= drift_strength <= 1:
        raise UserError(f"drift_strength {drift_strength:g} is not between 0 and 1")


def _check_pattern(n_m: tuple[int, int], sparsity: float, allocation: str) -> None:
    n, m = n_m
    if allocation != "uniform":
        raise UserError(f"the pattern {n}:{m} gives every matrix the same sparsity; choose allocation=uniform with it")
    if abs(sparsity - (1 - n / m)) > 1e-9:
        raise UserError(f"the pattern {n}:{m} has sparsity {1 - n / m:g}, not {sparsity:g}; leave the target to it")


def _warnings(targets: Mapping[str, float], traces: Mapping[str, Trace] | None) -> list[str]:
    warnings = []
    emptied = [name for name, target in targets.items() if target >= 1 - 1e-9]
    if emptied and traces is not None:
        warnings.append(f"sparsity + alpha is 1: {', '.join(emptied)} lost all of its weights")
    if traces is not None:
        unseparated = unseparated_neighbors(dict(traces))
        if unseparated:
            warnings.append(
                f"{unseparated} of {len(traces) - 1} neighbours in the sensitivity ranking differ by less than their "
                "standard error; raise allocation.probes or the calibration set to separate them"
            )
        negative = sum(trace.value < 0 for trace in traces.values())
        if negative:
            warnings.append(f"{negative} sensitivities are negative (the CTC loss is not convex); ranked by value")
    if distributed.rank() == 0:  # once is enough
        for warning in warnings:
            logger.warning(warning)
    return warnings
