"""Solver: prune one weight matrix (or several that read the same input) given its Hessian.

The OBS sweep is the paper's (:mod:`~sparsewav.pruning.solvers.obs`). Two more solvers give the same counts with smaller
errors and more work: ``obs_refit`` keeps the sweep's mask and solves the kept weights exactly
(:mod:`~sparsewav.pruning.solvers.refit`), ``alps`` finds a better mask, too (:mod:`~sparsewav.pruning.solvers.alps`).

All of them minimise ||(W − Ŵ)X||² + λ||W − Ŵ||². Where the pruned matrix reads other inputs X̂ than the dense one did
(``asymmetric``), it is ||WX − ŴX̂||² + λ||W − Ŵ||² with H = X̂X̂ᵀ. With D = (X − X̂)X̂ᵀ, the drift of the inputs, that is
||(T − Ŵ)X̂||² + λ||T − Ŵ||² plus a constant, where T = W + WD(H + λI)⁻¹: the same problem with T in place of W. What
draws the weights to their dense values is the damping alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsewav.errors import UserError
from sparsewav.pruning.solvers import alps
from sparsewav.pruning.solvers.factorization import damp, factorize
from sparsewav.pruning.solvers.obs import Problem, sweep
from sparsewav.pruning.solvers.refit import solve_on_support
from sparsewav.pruning.solvers.saliency import SALIENCIES, Block, Saliency
from sparsewav.pruning.solvers.selection import block_quotas, group_quotas, lowest_of_rows, mark_lowest, n_of_m
from sparsewav.pruning.solvers.workspace import workspace

SOLVERS = ("obs", "obs_refit", "alps")

COMPARISON_GROUPS = ("block", "block_quotas", "matrix")


@dataclass(frozen=True)
class PrunedMatrix:
    """A pruned weight matrix.

    Attributes:
        weight: shape (rows, cols), zero wherever ``keep`` is False.
        keep: shape (rows, cols), True where a weight stays.
        increments: shape (rows,), what each row's removals added to its damped objective (eq. 1, summed); they are
            ||(W − Ŵ)X||² + λ ||W − Ŵ||². None without weight updates, and from other solvers than the plain sweep.
        damping: λ that was added to the Hessian's diagonal; 0 without weight updates.
    """

    weight: Tensor
    keep: Tensor
    increments: Tensor | None = None
    damping: float = 0.0


def prune_matrix(
    weight: Tensor,
    hessian: Tensor,
    sparsity: float,
    *,
    saliency: str = "obs",
    keep: Tensor | None = None,
    n_m: tuple[int, int] | None = None,
    block_size: int = 128,
    percdamp: float = 0.01,
    comparison_group: str | None = None,
    solver: str = "obs",
    tolerance: float = 1e-4,
    max_steps: int = 300,
    drift: Tensor | None = None,
    name: str = "the matrix",
) -> PrunedMatrix:
    """Prune one weight matrix; neither argument is changed.

    Exactly ``round(sparsity * weights)`` weights are pruned, those already out of ``keep`` among them. With weight
    updates the columns of dead inputs (zero on the Hessian's diagonal) are emptied outside of that quota, which then
    counts over the live columns.

    Args:
        weight: shape (rows, cols).
        hessian: XXᵀ of the matrix's input, shape (cols, cols).
        sparsity: share of the weights to prune.
        saliency: a key of :data:`~sparsewav.pruning.solvers.saliency.SALIENCIES`.
        keep: boolean mask already in force, shape (rows, cols): what it removed stays removed.
        n_m: keep n of every m consecutive weights of a row instead of an exact count; ``sparsity`` is 1 − n/m then.
        block_size: columns that are masked together and updated lazily.
        percdamp: λ as a share of the Hessian's mean diagonal.
        solver: a key of :data:`SOLVERS`; those after the first need a saliency with weight updates, and ``alps`` takes
            the mask from the weights themselves, whatever the saliency.
        tolerance: of the conjugate gradients of ``obs_refit`` and ``alps``, relative.
        max_steps: of ``alps``.
        drift: (X − X̂)X̂ᵀ of the dense model's inputs X and those that ``hessian`` is of, X̂, shape (cols, cols); None
            where they are the same.
        comparison_group: with weight updates, which weights compete: ``block``, every block of columns loses the same
            share; ``block_quotas``, a block loses as many as it has of the matrix's lowest scores before any removal;
            ``matrix``, those very weights go. None for the saliency's own; ``alps`` has no blocks.
        name: what to call the matrix in a message.

    Raises:
        UserError: a shape, the sparsity, the saliency or the solver is wrong, or the Hessian is not positive definite
            even with λ raised five times.
    """
    return prune_matrices(
        [weight],
        hessian,
        [sparsity],
        saliency=saliency,
        keeps=[keep],
        n_m=n_m,
        block_size=block_size,
        percdamp=percdamp,
        solver=solver,
        tolerance=tolerance,
        max_steps=max_steps,
        drift=drift,
        comparison_group=comparison_group,
        names=[name],
    )[0]


@dataclass(frozen=True)
class MatrixGroup:
    """Matrices that read the same input, and what is to become of each.

    Attributes:
        weights: shapes (rows, cols); rows may differ.
        hessian: XXᵀ of their input, shape (cols, cols).
        sparsities: of every matrix.
        keeps: of every matrix, the mask in force, or None.
        drift: as in :func:`prune_matrix`.
        names: of the matrices, for messages.
    """

    weights: Sequence[Tensor]
    hessian: Tensor
    sparsities: Sequence[float]
    keeps: Sequence[Tensor | None]
    drift: Tensor | None
    names: Sequence[str]


def prune_matrices(
    weights: Sequence[Tensor],
    hessian: Tensor,
    sparsities: Sequence[float],
    *,
    keeps: Sequence[Tensor | None] | None = None,
    drift: Tensor | None = None,
    names: Sequence[str] | None = None,
    **options: Any,
) -> list[PrunedMatrix]:
    """Prune matrices that read the same input: one factorisation, one stacked sweep, a quota for each.

    Arguments are those of :func:`prune_matrix`, one of each kind for every matrix; ``options`` are the rest of them.
    """
    names = names or [f"matrix {index}" for index in range(len(weights))]
    group = MatrixGroup(weights, hessian, sparsities, keeps or [None] * len(weights), drift, names)
    return prune_groups([group], **options)[0]


def prune_groups(
    groups: Sequence[MatrixGroup],
    *,
    saliency: str = "obs",
    n_m: tuple[int, int] | None = None,
    block_size: int = 128,
    percdamp: float = 0.01,
    comparison_group: str | None = None,
    solver: str = "obs",
    tolerance: float = 1e-4,
    max_steps: int = 300,
) -> list[list[PrunedMatrix]]:
    """Prune groups of matrices whose inputs are equally wide, the sweeps of all of them in step.

    Equal to :func:`prune_matrices` of each up to rounding. Worth it on a GPU alone, which one sweep does not keep busy.
    Arguments are those of :func:`prune_matrix`.
    """
    method = SALIENCIES.get(saliency)
    if method is None:
        raise UserError(f"saliency {saliency!r} does not exist; choose one of {', '.join(SALIENCIES)}")
    check_solver(solver, saliency)
    within = comparison_group or method.comparison_group
    if method.updates and within not in COMPARISON_GROUPS:
        raise UserError(f"comparison_group {within!r} does not exist; choose one of {', '.join(COMPARISON_GROUPS)}")
    if method.updates and within != "block" and n_m:
        raise UserError(f"comparison_group {within!r} does not go with the pattern {n_m[0]}:{n_m[1]}; choose block")
    for group in groups:
        _check(group, n_m)
        if group.drift is not None and not method.updates:
            raise UserError(
                f"saliency {saliency!r} updates no weights, and a drift of the inputs asks for it; choose obs"
            )
    if not method.updates:
        return [_mask_only(group, method, n_m) for group in groups]
    problems = [
        _problem(group, number, method, n_m, block_size, percdamp, within) for number, group in enumerate(groups)
    ]
    found: list[tuple[Tensor, Tensor, Tensor | None]] = []
    if solver == "alps":
        found = [(*_admm(problem, tolerance, max_steps), None) for problem in problems]
    elif solver == "obs_refit":
        found = [
            (_refit(problem, pruned, removed, tolerance), removed, None)
            for problem, (pruned, removed, _) in zip(problems, sweep(problems), strict=True)
        ]
    else:
        found.extend(sweep(problems))
    return [
        [
            _result(weight, pruned[:, rows], removed[:, rows], problem.damping, gained)
            for weight, rows, gained in zip(group.weights, problem.rows, _parts(increments, problem.rows), strict=True)
        ]
        for group, problem, (pruned, removed, increments) in zip(groups, problems, found, strict=True)
    ]


def check_solver(solver: str, saliency: str) -> None:
    """Refuse a solver that does not exist, or that needs a saliency with weight updates and has another one.

    Raises:
        UserError: so.
    """
    if solver not in SOLVERS:
        raise UserError(f"solver {solver!r} does not exist; choose one of {', '.join(SOLVERS)}")
    if solver != SOLVERS[0] and not SALIENCIES[saliency].updates:
        raise UserError(
            f"solver {solver!r} updates the kept weights, and saliency {saliency!r} does not; choose obs or "
            "obs_first_order with it"
        )


def _check(group: MatrixGroup, n_m: tuple[int, int] | None) -> None:
    hessian = group.hessian
    if group.drift is not None and group.drift.shape != hessian.shape:
        raise UserError(f"the drift has shape {tuple(group.drift.shape)}, the Hessian {tuple(hessian.shape)}")
    for weight, sparsity, keep, name in zip(group.weights, group.sparsities, group.keeps, group.names, strict=True):
        if keep is not None and keep.shape != weight.shape:
            raise UserError(f"the mask of {name} has shape {tuple(keep.shape)}, its weight {tuple(weight.shape)}")
        if hessian.shape != (weight.shape[1], weight.shape[1]):
            raise UserError(
                f"the Hessian of {name} has shape {tuple(hessian.shape)}; its weight {tuple(weight.shape)} needs "
                f"({weight.shape[1]}, {weight.shape[1]})"
            )
        if not weight.sum().isfinite():  # one pass, and a value that is not finite stays in the sum
            raise UserError(f"the weight of {name} has NaN or infinite values; check the model's file")
        if not 0 <= sparsity <= 1:
            raise UserError(f"sparsity {sparsity:g} of {name} is not between 0 and 1")
        if n_m and (not 0 < n_m[0] <= n_m[1] or weight.shape[1] % n_m[1]):
            raise UserError(
                f"the pattern {n_m[0]}:{n_m[1]} does not fit {name}: it needs 0 < n <= m and {weight.shape[1]} columns "
                "to be a multiple of m"
            )


def _problem(
    group: MatrixGroup,
    number: int,
    method: Saliency,
    n_m: tuple[int, int] | None,
    block_size: int,
    percdamp: float,
    comparison_group: str,
) -> Problem:
    """Lay the matrices of a group side by side, and factor their Hessian; ``number`` is that of their memory."""
    stacked, removed, rows = _stack(group, number)
    hessian = group.hessian.to(stacked.dtype)
    live = hessian.diagonal() > 0
    factor, damping = factorize(hessian, live, percdamp, ", ".join(group.names), number)
    return Problem(
        weight=stacked,
        hessian=hessian,
        live=live,
        factor=factor,
        damping=damping,
        shift=None if group.drift is None else _shift_of_target(stacked, factor, group.drift.to(stacked.dtype)),
        removed=removed,
        untouched=all(keep is None for keep in group.keeps),
        rows=rows,
        sparsities=group.sparsities,
        method=method,
        n_m=n_m,
        block_size=block_size,
        comparison_group=comparison_group,
    )


def _stack(group: MatrixGroup, number: int) -> tuple[Tensor, Tensor, list[slice]]:
    """Copies of the weights and of what the masks in force removed, both (cols, rows), and the rows of each matrix."""
    dtype = torch.promote_types(torch.promote_types(group.weights[0].dtype, group.hessian.dtype), torch.float32)
    rows, start = [], 0
    for weight in group.weights:
        rows.append(slice(start, start + len(weight)))
        start += len(weight)
    stacked = workspace(f"weight {number}", (len(group.hessian), start), group.weights[0].new_empty(0, dtype=dtype))
    removed = torch.zeros_like(stacked, dtype=torch.bool)
    for span, weight, keep in zip(rows, group.weights, group.keeps, strict=True):
        _transpose(weight.detach(), stacked[:, span])
        if keep is not None:
            removed[:, span] = ~keep.T.to(stacked.device, torch.bool)
    return stacked, removed, rows


def _parts(increments: Tensor | None, rows: list[slice]) -> list[Tensor | None]:
    return [None if increments is None else increments[span] for span in rows]


def _result(
    weight: Tensor, pruned: Tensor, removed: Tensor, damping: float = 0.0, increments: Tensor | None = None
) -> PrunedMatrix:
    """Turn one matrix around again, and give it its dtype."""
    keep = _transpose(removed, torch.empty(weight.shape, dtype=torch.bool, device=weight.device)).logical_not_()
    result = _transpose(pruned, torch.empty_like(weight, memory_format=torch.contiguous_format))
    return PrunedMatrix(result, keep, increments, damping)


def _transpose(matrix: Tensor, out: Tensor) -> Tensor:
    """Put a matrix, turned around, into another."""
    if out.is_contiguous() and matrix.is_contiguous():  # PyTorch does it in small squares then
        return out.copy_(matrix.T)
    for start in range(0, len(matrix), 256):  # strip by strip, so that it stays in the processor's cache
        strip = slice(start, start + 256)
        out[:, strip] = matrix[strip].T
    return out


def _shift_of_target(weight: Tensor, factor: Tensor, drift: Tensor) -> Tensor:
    """Tᵀ − Wᵀ = (H + λI)⁻¹ Dᵀ Wᵀ, shape (cols, rows)."""
    shift = torch.linalg.solve_triangular(factor, drift.T @ weight, upper=True)
    return torch.linalg.solve_triangular(factor.T, shift, upper=False)


def _mask_only(group: MatrixGroup, method: Saliency, n_m: tuple[int, int] | None) -> list[PrunedMatrix]:
    """Remove the lowest scores of each matrix, or of each row, and leave the rest as it is."""

    def no_gradient() -> Tensor:
        raise NotImplementedError(f"{method.score.__name__} prunes without weight updates and has no gradient")

    stacked, removed, rows = _stack(group, 0)
    weight, keep = stacked.T, ~removed.T
    diagonal = group.hessian.to(stacked.dtype).diagonal()
    scores = method.score(Block(weight, torch.ones_like(diagonal), diagonal, no_gradient))
    kept = keep.clone()
    for span, sparsity in zip(rows, group.sparsities, strict=True):
        if n_m:
            kept[span] = n_of_m(scores[span], keep[span], *n_m)
            continue
        shape = (1, -1) if method.comparison_group == "matrix" else scores[span].shape
        candidates, candidates_kept = scores[span].reshape(shape), keep[span].reshape(shape)
        sizes = torch.full((len(candidates),), candidates.shape[1])
        quotas = group_quotas(round(sparsity * candidates.numel()), sizes, (~candidates_kept).sum(1))
        kept[span] = ~lowest_of_rows(candidates, candidates_kept, quotas).reshape(scores[span].shape)
    kept &= keep
    pruned = weight.masked_fill(~kept, 0.0)
    return [_result(matrix, pruned[span].T, ~kept[span].T) for matrix, span in zip(group.weights, rows, strict=True)]


def _refit(problem: Problem, pruned: Tensor, removed: Tensor, tolerance: float) -> Tensor:
    """The kept weights of a sweep solved exactly; shape (cols, rows)."""
    target = problem.weight if problem.shift is None else problem.weight.add_(problem.shift)
    damped = damp(problem.hessian.clone(), problem.live, problem.damping)
    return solve_on_support(target, damped, ~removed, pruned, tolerance)


def _admm(problem: Problem, tolerance: float, max_steps: int) -> tuple[Tensor, Tensor]:
    """ALPS: the mask of ADMM, all weights of a matrix competing, and the kept weights solved exactly."""
    in_force, live = problem.removed, problem.live
    quotas = [
        int(block_quotas(in_force[:, rows], problem.untouched, live, sparsity, len(live)))
        for rows, sparsity in zip(problem.rows, problem.sparsities, strict=True)
    ]
    target = problem.weight if problem.shift is None else problem.weight + problem.shift
    if not live.all():
        target[~live], in_force[~live] = 0, True

    def project(scores: Tensor) -> Tensor:
        if problem.n_m:
            return ~n_of_m(scores.T, ~in_force.T, *problem.n_m).T
        removed = in_force.clone()
        for rows, quota in zip(problem.rows, quotas, strict=True):
            mark_lowest(removed[:, rows], scores[:, rows], live, quota)
        return removed

    damped = damp(problem.hessian.clone(), live, problem.damping)
    removed, start = alps.find_mask(target, damped, project, max_steps)
    if not removed.any():
        return target, removed
    return solve_on_support(target, damped, ~removed, start, tolerance), removed
