"""Pruning matrices in place as their Hessians come in, and what is reported of each."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparsewav.pruning import distributed
from sparsewav.pruning.allocation.rank import rank_by_sensitivity
from sparsewav.pruning.allocation.sensitivity import Trace
from sparsewav.pruning.encoder import PrunableMatrix
from sparsewav.pruning.hessian import Calibration
from sparsewav.pruning.recovery import LayerRecovery
from sparsewav.pruning.solvers.solve import MatrixGroup, PrunedMatrix, prune_groups

IN_STEP_ON: tuple[str, ...] = ("cuda",)
"""Types of device on which matrices of equally wide inputs are pruned together."""

IN_STEP_BYTES = 2 * 2**30
"""What they may take, all in all."""


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
        relative_error: ||WX − ŴX||² / ||WX||² on the calibration set; with the asymmetric objective
            ||WX − ŴX̂||² / ||WX||², X the dense model's inputs, X̂ those that the matrix was pruned on.
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


@dataclass(frozen=True)
class _Inputs:
    """What is known of the inputs of a matrix.

    Attributes:
        hessian: X̂X̂ᵀ, shape (cols, cols).
        drift: (X − X̂)X̂ᵀ; None where the objective is symmetric.
        drift_sum: (X − X̂)(X − X̂)ᵀ.
    """

    hessian: Tensor
    drift: Tensor | None
    drift_sum: Tensor | None

    def error(self, dense: Tensor, pruned: Tensor) -> float:
        """||WX − ŴX̂||²; with nothing in place of Ŵ it is ||WX||²."""
        change = dense - pruned
        error = _energy(change, self.hessian)
        if self.drift is not None and self.drift_sum is not None:
            mixed = ((dense @ self.drift) * change).sum(dtype=torch.float64)
            error += 2 * float(mixed) + _energy(dense, self.drift_sum)
        return error


class Pruner:
    """Prunes matrices as their Hessians come in, and keeps the books."""

    def __init__(
        self,
        targets: dict[str, float],
        traces: Mapping[str, Trace] | None,
        solving: dict[str, Any],
        drift_strength: float | None,
        masks_in_force: dict[str, Tensor],
        keep_masks: bool,
        recovers: bool,
    ) -> None:
        self.targets = targets
        self.traces = traces
        self.ranks = rank_by_sensitivity({name: t.sensitivity for name, t in traces.items()}) if traces else {}
        self.solving = solving
        self.drift_strength = drift_strength
        self.masks_in_force = masks_in_force
        self.keep_masks = keep_masks
        self.recovers = recovers
        self.masks: dict[str, Tensor] = {}
        self.reports: dict[str, MatrixReport] = {}
        self.recoveries: list[LayerRecovery] = []
        self.seconds = 0.0
        self.recovery_seconds = 0.0
        self._to_recover: list[tuple[PrunableMatrix, Tensor, _Inputs]] = []  # with the dense weights

    def prune_group(
        self, matrices: list[PrunableMatrix], hessian: Tensor, sparsities: list[float]
    ) -> list[PrunedMatrix]:
        """Prune matrices that read the same input, each to its own sparsity; the model is left as it is."""
        return prune_groups([self._group(matrices, hessian, sparsities, None)], **self.solving)[0]

    def _group(
        self, matrices: list[PrunableMatrix], hessian: Tensor, sparsities: list[float], drift: Tensor | None
    ) -> MatrixGroup:
        return MatrixGroup(
            weights=[matrix.weight for matrix in matrices],
            hessian=hessian,
            sparsities=sparsities,
            keeps=[self.masks_in_force.get(matrix.name) for matrix in matrices],
            drift=None if drift is None or self.drift_strength is None else self.drift_strength * drift,
            names=[matrix.name for matrix in matrices],
        )

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
        owners = dict(zip(groups, distributed.deal(costs), strict=True))
        if self.recovers:  # the errors are measured again after it, in all processes
            for matrix in matrices:
                found = _inputs_of(calibration, calibration.reads[matrix.name])
                self._to_recover.append((matrix, matrix.weight.detach().clone(), found))
        with distributed.together():
            own = {
                key: [by_name[name] for name in names]
                for key, names in groups.items()
                if owners[key] == distributed.rank()
            }
            for batch in _in_step(own):
                inputs = [_inputs_of(calibration, key) for key in batch]
                asked = [
                    self._group(own[key], given.hessian, [self.targets[item.name] for item in own[key]], given.drift)
                    for key, given in zip(batch, inputs, strict=True)
                ]
                pruned_groups = prune_groups(asked, **self.solving)
                for key, given, results in zip(batch, inputs, pruned_groups, strict=True):
                    for matrix, result in zip(own[key], results, strict=True):
                        reports[matrix.name] = self._report(matrix, result, given)
                        matrix.weight.data.copy_(result.weight)
                        self.masks[matrix.name] = result.keep
                if progress:
                    progress(len(reports), len(matrices))
        if distributed.world() > 1:
            for key, names in groups.items():
                for name in names:
                    weight = by_name[name].weight.data
                    pruned: Any = (weight, self.masks.get(name), reports.get(name))
                    received, self.masks[name], reports[name] = distributed.broadcast(pruned, owners[key])
                    weight.copy_(received)
        if not self.keep_masks:
            self.masks.clear()
        self.reports |= reports
        self.seconds += time.perf_counter() - started

    @torch.no_grad()
    def recover(self, how: Callable[[], LayerRecovery]) -> None:
        """Recover a pruned layer, and put the errors of what it has become into the reports."""
        started = time.perf_counter()
        self.recoveries.append(how())
        for matrix, dense, found in self._to_recover:
            error = found.error(dense, matrix.weight) / max(found.error(dense, torch.zeros_like(dense)), 1e-30)
            self.reports[matrix.name] = replace(self.reports[matrix.name], relative_error=error)
        self._to_recover.clear()
        self.recovery_seconds += time.perf_counter() - started

    def _report(self, matrix: PrunableMatrix, pruned: PrunedMatrix, inputs: _Inputs) -> MatrixReport:
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
            relative_error=_error(dense, pruned, inputs) / max(inputs.error(dense, torch.zeros_like(dense)), 1e-30),
        )


def _in_step(groups: Mapping[str, list[PrunableMatrix]]) -> list[list[str]]:
    """Which groups of matrices with the same input are solved together: those of one width, as memory allows.

    The sweep of one group has hundreds of small steps that follow on one another, which is how a GPU is kept waiting.
    """
    batches: list[list[str]] = []
    open_batches: dict[int, tuple[list[str], float]] = {}  # by width, with the bytes taken
    for key, matrices in groups.items():
        weight = matrices[0].weight
        cols, size = weight.shape[1], sum(matrix.size for matrix in matrices)
        needed = 4 * (2 * cols**2 + 6 * size)  # the factor and its blocks; weights, scores, what is left, and masks
        batch, taken = open_batches.get(cols, ([], float("inf")))
        if weight.device.type not in IN_STEP_ON or taken + needed > IN_STEP_BYTES:
            batch, taken = [], 0.0
            batches.append(batch)
        batch.append(key)
        open_batches[cols] = (batch, taken + needed)
    return batches


def _inputs_of(calibration: Calibration, key: str) -> _Inputs:
    return _Inputs(calibration.hessians[key], calibration.drifts.get(key), calibration.drift_sums.get(key))


def _error(dense: Tensor, pruned: PrunedMatrix, inputs: _Inputs) -> float:
    """||WX − ŴX̂||² on the calibration set."""
    if pruned.increments is not None and inputs.drift is None:
        # The sweep has it summed up already, with λ||W − Ŵ||² on top (dead inputs aside).
        change = dense - pruned.weight
        damped = float(pruned.increments.sum(dtype=torch.float64))
        live = inputs.hessian.diagonal() > 0
        from_damping = pruned.damping * float((change.square().sum(0, dtype=torch.float64) * live).sum())
        if from_damping < 0.9 * damped:  # or the difference would be left with the rounding of its terms
            return damped - from_damping
    return inputs.error(dense, pruned.weight)


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
