"""The engine: calibrate, allocate and solve for a whole CTC model."""

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsewav.errors import UserError
from sparsewav.pruning import processes
from sparsewav.pruning.allocation import allocate_by_rank, allocate_uniformly, rank_by_sensitivity
from sparsewav.pruning.calibration import AroundLayer, Calibration, calibrate, calibrate_sequentially
from sparsewav.pruning.encoder import PrunableMatrix, prunable_matrices
from sparsewav.pruning.saliency import SALIENCIES
from sparsewav.pruning.sensitivity import Probe, Trace, estimate_traces, unseparated_neighbors
from sparsewav.pruning.solver import PrunedMatrix, prune_matrices

logger = logging.getLogger(__name__)

StageProgress = Callable[[str, int, int], None]
"""Called with (stage, steps done, steps in all); stages are ``calibrate``, ``allocate`` and ``solve``."""

ALLOCATIONS = ("uniform", "hutchinson")
PROPAGATIONS = ("parallel", "sequential")


@dataclass(frozen=True)
class MatrixReport:
    """What became of one matrix.

    Attributes:
        name: of its module.
        rows: output features.
        cols: input features.
        sensitivity: mean Hessian trace (eq. 5); None when the allocation does not ask for it.
        sensitivity_error: its standard error.
        rank: in the order of sensitivity, 0 for the highest.
        target_sparsity: allocated.
        sparsity: reached, zeros over weights.
        relative_error: ||WX − ŴX||² / ||WX||² on the calibration set.
    """

    name: str
    rows: int
    cols: int
    sensitivity: float | None
    sensitivity_error: float | None
    rank: int | None
    target_sparsity: float
    sparsity: float
    relative_error: float


@dataclass
class PruneReport:
    """What :func:`prune` did.

    Attributes:
        matrices: a report for every matrix, in the model's order.
        masks: for every matrix a boolean mask (rows, cols), True where a weight stays; empty where they were not to be
            kept.
        sparsity: pruned weights over prunable weights.
        target_sparsity: what was asked for.
        seconds: of the stages ``calibrate``, ``allocate`` and ``solve``; what was given ready-made took none.
        warnings: sentences the user should read.
    """

    matrices: list[MatrixReport]
    masks: dict[str, Tensor]
    sparsity: float
    target_sparsity: float
    seconds: dict[str, float]
    warnings: list[str] = field(default_factory=list)


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
    n_m: tuple[int, int] | None = None,
    propagation: str = "parallel",
    frames_per_column: float | None = None,
    block_size: int = 128,
    percdamp: float = 0.01,
    seed: int = 0,
    masks: Mapping[str, Tensor] | None = None,
    calibration: Calibration | None = None,
    traces: Mapping[str, Trace] | None = None,
    around_layer: AroundLayer = nullcontext,
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
        allocation: ``uniform`` or ``hutchinson`` (by the sensitivity of the CTC loss, eq. 4 to 7).
        alpha: half the range of sparsities that ``hutchinson`` gives.
        exact_budget: let ``hutchinson`` meet ``sparsity`` to one weight; the paper's own progression misses it.
        probes: Hutchinson probes for each calibration batch.
        probe_distribution: ``gaussian`` (the paper's) or ``rademacher``.
        rank_tolerance: stop probing once ranks are expected to be displaced by no more than this share of all ranks.
        n_m: keep n of every m consecutive weights of a row; ``sparsity`` must be 1 − n/m, ``allocation`` uniform.
        propagation: calibrate every matrix on the dense model's activations (``parallel``) or layer by layer on those
            of the layers already pruned (``sequential``).
        frames_per_column: sum each Hessian over a random sample of so many frames for each of its columns; None for
            all frames.
        block_size: columns that the solver masks together.
        percdamp: damping as a share of the Hessian's mean diagonal.
        seed: of the Hutchinson probes and the sample of frames.
        masks: masks already in force, by matrix name: what they removed stays removed and counts.
        calibration: Hessians computed earlier for this model (``parallel`` alone).
        traces: Hessian traces computed earlier for this model.
        around_layer: brings a layer's weights and takes them away (``sequential`` alone), for models that memory does
            not hold whole; see :func:`~sparsewav.pruning.calibration.calibrate_sequentially`.
        keep_masks: let the report hold the masks, a byte for every weight.
        progress: called as the stages advance.

    Raises:
        UserError: an argument, the model's family or the calibration data is wrong; the model is then as it was,
            unless the solver had begun.
    """
    _check_choice("saliency", saliency, SALIENCIES)
    _check_choice("allocation", allocation, ALLOCATIONS)
    _check_choice("propagation", propagation, PROPAGATIONS)
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
    try:
        # The uniform call also checks the sparsity before any work is done.
        targets = allocate_uniformly(sizes, sparsity)
        if allocation == "hutchinson":
            allocate_by_rank(sizes, dict.fromkeys(sizes, 0.0), sparsity, alpha)  # refuses a wrong α at once
            if traces is None:
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
            traces = processes.broadcast(traces)  # GPUs do not sum in the same order twice, and all must rank alike
            sensitivities = {name: traces[name].sensitivity for name in sizes}
            targets = allocate_by_rank(sizes, sensitivities, sparsity, alpha, exact_budget=exact_budget)
        solver = _Solver(targets, traces, saliency, n_m, block_size, percdamp, dict(masks or {}), keep_masks)
        if propagation == "parallel":
            if calibration is None:
                started = time.perf_counter()
                calibration = calibrate(
                    model,
                    batches,
                    _stage(progress, "calibrate"),
                    frames_per_column=frames_per_column,
                    seed=seed,
                )
                seconds["calibrate"] = time.perf_counter() - started
            solver.solve(matrices, calibration, _stage(progress, "solve"))
        else:
            started = time.perf_counter()
            calibrate_sequentially(
                model,
                batches,
                solver.solve,
                _stage(progress, "calibrate"),
                frames_per_column=frames_per_column,
                seed=seed,
                around_layer=around_layer,
            )
            seconds["calibrate"] = time.perf_counter() - started - solver.seconds
        seconds["solve"] = solver.seconds
    finally:
        model.train(was_training)
    return PruneReport(
        matrices=solver.reports,
        masks=solver.masks,
        sparsity=solver.removed / sum(sizes.values()),
        target_sparsity=sparsity,
        seconds=seconds,
        warnings=_warnings(targets, traces if allocation == "hutchinson" else None),
    )


class _Solver:
    """Prunes matrices as their Hessians come in, and keeps the books."""

    def __init__(
        self,
        targets: dict[str, float],
        traces: Mapping[str, Trace] | None,
        saliency: str,
        n_m: tuple[int, int] | None,
        block_size: int,
        percdamp: float,
        masks_in_force: dict[str, Tensor],
        keep_masks: bool,
    ) -> None:
        self.targets = targets
        self.traces = traces
        self.ranks = rank_by_sensitivity({name: t.sensitivity for name, t in traces.items()}) if traces else {}
        self.saliency = saliency
        self.n_m = n_m
        self.block_size = block_size
        self.percdamp = percdamp
        self.masks_in_force = masks_in_force
        self.keep_masks = keep_masks
        self.masks: dict[str, Tensor] = {}
        self.removed = 0
        self.reports: list[MatrixReport] = []
        self.seconds = 0.0

    @torch.no_grad()
    def solve(
        self,
        matrices: list[PrunableMatrix],
        calibration: Calibration,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Prune matrices in place, those with the same input together; the processes share the Hessians."""
        started = time.perf_counter()
        by_name = {matrix.name: matrix for matrix in matrices}
        reports: dict[str, MatrixReport] = {}
        groups = calibration.groups()
        # To factor a Hessian, and to sweep the matrices that it is for.
        sizes = [sum(by_name[name].size for name in names) for names in groups.values()]
        widths = [len(calibration.hessians[key]) for key in groups]
        costs = [cols**3 / 3 + size * cols for size, cols in zip(sizes, widths, strict=True)]
        owners = dict(zip(groups, processes.deal(costs), strict=True))
        with processes.together():
            for key, names in groups.items():
                if owners[key] != processes.rank():
                    continue
                hessian = calibration.hessians[key]
                results = prune_matrices(
                    [by_name[name].weight for name in names],
                    hessian,
                    [self.targets[name] for name in names],
                    saliency=self.saliency,
                    keeps=[self.masks_in_force.get(name) for name in names],
                    n_m=self.n_m,
                    block_size=self.block_size,
                    percdamp=self.percdamp,
                    names=names,
                )
                for name, result in zip(names, results, strict=True):
                    reports[name] = self._report(by_name[name], result, hessian)
                    by_name[name].weight.data.copy_(result.weight)
                    self.masks[name] = result.keep
                if progress:
                    progress(len(reports), len(matrices))
        if processes.world() > 1:
            for key, names in groups.items():
                for name in names:
                    weight = by_name[name].weight.data
                    pruned: Any = (weight, self.masks.get(name), reports.get(name))
                    received, self.masks[name], reports[name] = processes.broadcast(pruned, owners[key])
                    weight.copy_(received)
        self.removed += sum(round(reports[matrix.name].sparsity * matrix.size) for matrix in matrices)
        if not self.keep_masks:
            self.masks.clear()
        self.reports.extend(reports[matrix.name] for matrix in matrices)
        self.masks = {report.name: self.masks[report.name] for report in self.reports if report.name in self.masks}
        self.seconds += time.perf_counter() - started

    def _report(self, matrix: PrunableMatrix, pruned: PrunedMatrix, hessian: Tensor) -> MatrixReport:
        dense = matrix.weight.detach()
        trace = self.traces[matrix.name] if self.traces else None
        return MatrixReport(
            name=matrix.name,
            rows=dense.shape[0],
            cols=dense.shape[1],
            sensitivity=trace.sensitivity if trace else None,
            sensitivity_error=trace.standard_error / trace.size if trace else None,
            rank=self.ranks.get(matrix.name),
            target_sparsity=self.targets[matrix.name],
            sparsity=int((~pruned.keep).sum()) / pruned.keep.numel(),
            relative_error=_error(dense, pruned, hessian) / max(_energy(dense, hessian), 1e-30),
        )


def _error(dense: Tensor, pruned: PrunedMatrix, hessian: Tensor) -> float:
    """||WX − ŴX||² on the calibration set."""
    change = dense - pruned.weight
    if pruned.increments is not None:
        # The sweep has it summed up already, with λ||W − Ŵ||² on top (dead inputs aside).
        damped = float(pruned.increments.sum(dtype=torch.float64))
        live = hessian.diagonal() > 0
        from_damping = pruned.damping * float((change.square().sum(0, dtype=torch.float64) * live).sum())
        if from_damping < 0.9 * damped:  # or the difference would be left with the rounding of its terms
            return damped - from_damping
    return _energy(change, hessian)


def _energy(weight: Tensor, hessian: Tensor, block_size: int = 512) -> float:
    """||WX||² from W (rows, cols) and H = XXᵀ (cols, cols), of which the upper blocks alone are multiplied."""
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    total = 0.0
    for start in range(0, len(hessian), block_size):
        stop = min(start + block_size, len(hessian))
        block = hessian[start:stop].to(weight.dtype)
        product = torch.addmm(
            weight[:, start:stop] @ block[:, start:stop], weight[:, stop:], block[:, stop:].T, beta=1, alpha=2
        )
        total += float((product * weight[:, start:stop]).sum(dtype=torch.float64))
    return total


def _stage(progress: StageProgress | None, stage: str) -> Callable[[int, int], None] | None:
    if progress is None:
        return None
    return lambda done, total: progress(stage, done, total)


def _check_choice(key: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise UserError(f"{key} {value!r} does not exist; choose one of {', '.join(choices)}")


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
    if processes.rank() == 0:  # once is enough
        for warning in warnings:
            logger.warning(warning)
    return warnings
