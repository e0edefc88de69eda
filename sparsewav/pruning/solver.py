"""Solver: prune one weight matrix (or several that read the same input) given its Hessian.

The OBS sweep goes over the columns from left to right (the order of SparseGPT, Frantar and Alistarh 2023). With
H⁻¹ = UᵀU, U upper triangular, [H⁻¹]_pp of the problem that remains at column p is U_pp², and the update of eq. 1
that makes up for a removed weight is −(w_p / U_pp) U_p,p: on the columns at its right. Within a block of columns it is
done so; how a block answers to all columns before it takes R = U⁻¹ alone (:mod:`~sparsewav.pruning.factorization`).

Two more solvers give the same counts with smaller errors and more work: ``obs_refit`` keeps the sweep's mask and solves
the kept weights exactly (:mod:`~sparsewav.pruning.refit`), ``alps`` finds a better mask, too
(:mod:`~sparsewav.pruning.alps`).

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
from sparsewav.pruning import alps
from sparsewav.pruning.factorization import damp, factorize, invert_upper
from sparsewav.pruning.refit import solve_on_support
from sparsewav.pruning.saliency import SALIENCIES, Block, Saliency
from sparsewav.pruning.selection import group_quotas, lowest, lowest_of_rows, n_of_m
from sparsewav.pruning.workspace import workspace

SOLVERS = ("obs_sweep", "obs_refit", "alps")

COMPARED_WITHIN = ("block", "block_quotas", "matrix")

COLUMNS = 32
"""So many columns pass their removals on to each other one by one; to the rest of the block one product does."""


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
    compared_within: str | None = None,
    solver: str = "obs_sweep",
    tolerance: float = 1e-4,
    most_steps: int = 300,
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
        saliency: a key of :data:`~sparsewav.pruning.saliency.SALIENCIES`.
        keep: boolean mask already in force, shape (rows, cols): what it removed stays removed.
        n_m: keep n of every m consecutive weights of a row instead of an exact count; ``sparsity`` is 1 − n/m then.
        block_size: columns that are masked together and updated lazily.
        percdamp: λ as a share of the Hessian's mean diagonal.
        solver: a key of :data:`SOLVERS`; those after the first need a saliency with weight updates, and ``alps`` takes
            the mask from the weights themselves, whatever the saliency.
        tolerance: of the conjugate gradients of ``obs_refit`` and ``alps``, relative.
        most_steps: of ``alps``.
        drift: (X − X̂)X̂ᵀ of the dense model's inputs X and those that ``hessian`` is of, X̂, shape (cols, cols); None
            where they are the same.
        compared_within: with weight updates, which weights compete: ``block``, every block of columns loses the same
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
        most_steps=most_steps,
        drift=drift,
        compared_within=compared_within,
        names=[name],
    )[0]


def prune_matrices(
    weights: Sequence[Tensor],
    hessian: Tensor,
    sparsities: Sequence[float],
    *,
    saliency: str = "obs",
    keeps: Sequence[Tensor | None] | None = None,
    n_m: tuple[int, int] | None = None,
    block_size: int = 128,
    percdamp: float = 0.01,
    compared_within: str | None = None,
    solver: str = "obs_sweep",
    tolerance: float = 1e-4,
    most_steps: int = 300,
    drift: Tensor | None = None,
    names: Sequence[str] | None = None,
) -> list[PrunedMatrix]:
    """Prune matrices that read the same input: one factorisation, one stacked sweep, a quota for each.

    Arguments are those of :func:`prune_matrix`, one of each kind for every matrix.
    """
    names = names or [f"matrix {index}" for index in range(len(weights))]
    method = SALIENCIES.get(saliency)
    if method is None:
        raise UserError(f"saliency {saliency!r} does not exist; choose one of {', '.join(SALIENCIES)}")
    check_solver(solver, saliency)
    if drift is not None and drift.shape != hessian.shape:
        raise UserError(f"the drift has shape {tuple(drift.shape)}, the Hessian {tuple(hessian.shape)}")
    if drift is not None and not method.updates:
        raise UserError(f"saliency {saliency!r} updates no weights, and a drift of the inputs asks for it; choose obs")
    within = compared_within or method.compared_within
    if method.updates and within not in COMPARED_WITHIN:
        raise UserError(f"compared_within {within!r} does not exist; choose one of {', '.join(COMPARED_WITHIN)}")
    if method.updates and within != "block" and n_m:
        raise UserError(f"compared_within {within!r} does not go with the pattern {n_m[0]}:{n_m[1]}; choose block")
    keeps = keeps or [None] * len(weights)
    _check(weights, hessian, sparsities, keeps, n_m, names)
    dtype = torch.promote_types(torch.promote_types(weights[0].dtype, hessian.dtype), torch.float32)
    rows = _row_spans(weights)
    stacked = workspace("weight", (len(hessian), rows[-1].stop), weights[0].new_empty(0, dtype=dtype))
    for span, weight in zip(rows, weights, strict=True):
        _transpose(weight.detach(), stacked[:, span])
    removed = torch.zeros_like(stacked, dtype=torch.bool)
    for span, keep in zip(rows, keeps, strict=True):
        if keep is not None:
            removed[:, span] = ~keep.T.to(stacked.device, torch.bool)
    problem = _Problem(
        stacked,
        hessian.to(dtype),
        removed,
        all(keep is None for keep in keeps),
        rows,
        sparsities,
        method,
        n_m,
        block_size,
        percdamp,
        within,
        ", ".join(names),
    )
    increments, damping = None, 0.0
    if not method.updates:
        pruned, removed = _mask_only(problem)
    else:
        live = problem.hessian.diagonal() > 0
        factor, damping = factorize(problem.hessian, live, percdamp, problem.name)
        shift = None if drift is None else _shift_of_target(problem, factor, drift.to(dtype))
        if solver == "alps":
            pruned, removed = _admm(problem, live, damping, shift, tolerance, most_steps)
        else:
            pruned, removed, increments = _sweep(problem, live, factor, damping, shift)
        if solver == "obs_refit":
            target = problem.weight if shift is None else problem.weight.add_(shift)
            pruned = solve_on_support(target, damp(problem.hessian.clone(), live, damping), ~removed, pruned, tolerance)
            increments = None
    return [
        PrunedMatrix(
            weight=_transpose(pruned[:, span], torch.empty_like(weight, memory_format=torch.contiguous_format)),
            keep=_transpose(
                removed[:, span], torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
            ).logical_not_(),
            increments=None if increments is None else increments[span],
            damping=damping,
        )
        for weight, span in zip(weights, rows, strict=True)
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


def _check(
    weights: Sequence[Tensor],
    hessian: Tensor,
    sparsities: Sequence[float],
    keeps: Sequence[Tensor | None],
    n_m: tuple[int, int] | None,
    names: Sequence[str],
) -> None:
    for weight, sparsity, keep, name in zip(weights, sparsities, keeps, names, strict=True):
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


def _transpose(matrix: Tensor, out: Tensor) -> Tensor:
    """Put a matrix, turned around, into another."""
    if out.is_contiguous() and matrix.is_contiguous():  # PyTorch does it in small squares then
        return out.copy_(matrix.T)
    for start in range(0, len(matrix), 256):  # strip by strip, so that it stays in the processor's cache
        strip = slice(start, start + 256)
        out[:, strip] = matrix[strip].T
    return out


def _row_spans(weights: Sequence[Tensor]) -> list[slice]:
    spans, start = [], 0
    for weight in weights:
        spans.append(slice(start, start + weight.shape[0]))
        start += weight.shape[0]
    return spans


@dataclass(frozen=True)
class _Problem:
    """Matrices that read the same input, side by side, and transposed: a column is one stretch of memory.

    Attributes:
        weight: shape (cols, rows of all matrices); the solver's own copy.
        hessian: shape (cols, cols).
        removed: True where a mask in force removed a weight, shape (cols, rows).
        untouched: no mask in force has removed anything.
        rows: of every matrix.
    """

    weight: Tensor
    hessian: Tensor
    removed: Tensor
    untouched: bool
    rows: list[slice]
    sparsities: Sequence[float]
    method: Saliency
    n_m: tuple[int, int] | None
    block_size: int
    percdamp: float
    compared_within: str
    name: str


def _shift_of_target(problem: _Problem, factor: Tensor, drift: Tensor) -> Tensor:
    """Tᵀ − Wᵀ = (H + λI)⁻¹ Dᵀ Wᵀ, shape (cols, rows)."""
    shift = torch.linalg.solve_triangular(factor, drift.T @ problem.weight, upper=True)
    return torch.linalg.solve_triangular(factor.T, shift, upper=False)


def _mask_only(problem: _Problem) -> tuple[Tensor, Tensor]:
    """Remove the lowest scores of each matrix, or of each row, and leave the rest as it is."""

    def no_gradient() -> Tensor:
        raise NotImplementedError(f"{method.score.__name__} prunes without weight updates and has no gradient")

    weight, keep, method = problem.weight.T, ~problem.removed.T, problem.method
    diagonal = problem.hessian.diagonal()
    scores = method.score(Block(weight, torch.ones_like(diagonal), diagonal, no_gradient))
    kept = keep.clone()
    for span, sparsity in zip(problem.rows, problem.sparsities, strict=True):
        if problem.n_m:
            kept[span] = n_of_m(scores[span], keep[span], *problem.n_m)
            continue
        shape = (1, -1) if method.compared_within == "matrix" else scores[span].shape
        candidates, candidates_kept = scores[span].reshape(shape), keep[span].reshape(shape)
        sizes = torch.full((len(candidates),), candidates.shape[1])
        quotas = group_quotas(round(sparsity * candidates.numel()), sizes, (~candidates_kept).sum(1))
        kept[span] = ~lowest_of_rows(candidates, candidates_kept, quotas).reshape(scores[span].shape)
    kept &= keep
    return weight.masked_fill(~kept, 0.0).T, ~kept.T


def _admm(
    problem: _Problem, live: Tensor, damping: float, shift: Tensor | None, tolerance: float, most_steps: int
) -> tuple[Tensor, Tensor]:
    """ALPS: the mask of ADMM, all weights of a matrix competing, and the kept weights solved exactly."""
    in_force = problem.removed
    quotas = [
        int(_block_quotas(in_force[:, rows], problem.untouched, live, sparsity, len(live)))
        for rows, sparsity in zip(problem.rows, problem.sparsities, strict=True)
    ]
    target = problem.weight if shift is None else problem.weight + shift
    if not live.all():
        target[~live], in_force[~live] = 0, True

    def project(scores: Tensor) -> Tensor:
        if problem.n_m:
            return ~n_of_m(scores.T, ~in_force.T, *problem.n_m).T
        removed = in_force.clone()
        for rows, quota in zip(problem.rows, quotas, strict=True):
            _mark_lowest(removed[:, rows], scores[:, rows], live, quota)
        return removed

    damped = damp(problem.hessian.clone(), live, damping)
    removed, start = alps.find_mask(target, damped, project, most_steps)
    if not removed.any():
        return target, removed
    return solve_on_support(target, damped, ~removed, start, tolerance), removed


def _sweep(
    problem: _Problem, live: Tensor, factor: Tensor, damping: float, shift: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The OBS sweep: mask a block of columns, then remove its weights column by column, updating the rest."""
    hessian, removed = problem.hessian, problem.removed
    dense = problem.weight if shift is None else problem.weight + shift
    block_size = problem.block_size
    if problem.n_m:  # no group of m may lie in two blocks
        block_size = max(block_size // problem.n_m[1], 1) * problem.n_m[1]
    quotas = [
        _block_quotas(removed[:, rows], problem.untouched, live, sparsity, block_size)
        for rows, sparsity in zip(problem.rows, problem.sparsities, strict=True)
    ]
    all_live = bool(live.all())
    if not all_live:
        dense[~live], removed[~live] = 0, True
    fresh = problem.untouched and all_live
    chosen = None if problem.compared_within == "block" else _lowest_before(problem, dense, live, factor, quotas)
    if chosen is not None:
        quotas = [_counts_of_blocks(marked & live[:, None], block_size) for marked in chosen]
    # Of the columns still to come: (ΔR)ᵀ, Δ the change of those settled. Of the settled ones: what is left of them.
    result = workspace("result", dense.shape, dense).zero_()
    increments = torch.zeros(dense.shape[1], dtype=dense.dtype, device=dense.device)
    for index, start in enumerate(range(0, len(dense), block_size)):
        span = slice(start, min(start + block_size, len(dense)))
        upper = invert_upper(factor[span, span])  # U's own block
        block = result[span]  # (block, rows); a view, and from here on the block's weights
        change = torch.mm(-upper.T, block)  # the best for this block after what became of those before it
        torch.add(dense[span], change, out=block)

        def gradient(change: Tensor = change, span: slice = span) -> Tensor:
            # Eq. 3's 2(Ŵ − W)XXᵀ, or 2(ŴX̂ − WX)X̂ᵀ. What is not settled yet minimises the damped objective, so that
            # λ's part is left, which draws to the dense weights.
            return -2 * damping * (change if shift is None else change + shift[span]).T

        pivots = upper.diagonal()
        scores = problem.method.score(Block(block.T, pivots.square(), hessian.diagonal()[span], gradient)).T
        if problem.n_m:
            removed[span] = ~n_of_m(scores.T, ~removed[span].T, *problem.n_m).T
        elif chosen is not None and problem.compared_within == "matrix":
            for rows, marked in zip(problem.rows, chosen, strict=True):
                removed[span, rows] = marked[span]
        else:
            for rows, quota in zip(problem.rows, quotas, strict=True):
                marked = removed[span, rows]
                if fresh:
                    marked.copy_(lowest(scores[:, rows], int(quota[index])))
                else:
                    _mark_lowest(marked, scores[:, rows], live[span], int(quota[index]))
        errors = _remove(block, upper, removed[span])
        increments += errors.square().sum(0)
        if span.stop < len(dense):
            result[span.stop :].addmm_(factor[span, span.stop :].T, block - dense[span])
    return result, removed, increments


def _lowest_before(
    problem: _Problem, dense: Tensor, live: Tensor, factor: Tensor, quotas: list[Tensor]
) -> list[Tensor]:
    """For every matrix, its lowest scores before anything is removed, as many as its quotas add up to; (cols, rows).

    At the dense weights eq. 3's gradient is zero, so that both saliencies are w² / [H⁻¹]_pp.
    """
    inverse_diagonal = invert_upper(factor).square().sum(0)  # H⁻¹ = UᵀU
    chosen = []
    for rows, quota in zip(problem.rows, quotas, strict=True):
        marked = problem.removed[:, rows].clone()
        scores = dense[:, rows].square() / inverse_diagonal[:, None]
        _mark_lowest(marked, scores, live, int(quota.sum()))
        chosen.append(marked)
    return chosen


def _remove(block: Tensor, upper: Tensor, removed: Tensor) -> Tensor:
    """Remove the weights of a block column by column, each time updating the columns to come.

    Args:
        block: current weights, shape (block, rows); holds what is left of them afterwards.
        upper: U of the block's columns, shape (block, block).
        removed: shape (block, rows).

    Returns:
        w_p / U_pp of every removed weight, zero elsewhere; shape (block, rows).
    """
    lower = upper.T.contiguous()
    scale = removed / upper.diagonal()[:, None]
    errors = torch.empty_like(block)
    # The same memory as arrays of numpy, where that is possible: its calls cost half, and there are thousands.
    arrays: Any = [
        tensor.numpy() if tensor.device.type == "cpu" else tensor for tensor in (block, lower, scale, errors)
    ]
    weights, coefficients, scales, passed_on = arrays
    for start in range(0, len(block), COLUMNS):
        stop = min(start + COLUMNS, len(block))
        if start:
            block[start:stop].addmm_(lower[start:stop, :start], errors[:start], alpha=-1)
        for column in range(start, stop):
            if column > start:
                weights[column] -= coefficients[column, start:column] @ passed_on[start:column]
            passed_on[column] = weights[column] * scales[column]
    block.mul_(~removed).add_(0.0)  # faster than masked_fill_; the sum makes 0.0 of -0.0
    return errors


def _block_quotas(removed: Tensor, untouched: bool, live: Tensor, sparsity: float, block_size: int) -> Tensor:
    """How many weights of one matrix (cols, rows) every block of columns loses, dead columns left out of the count."""
    sizes = torch.stack([part.sum() for part in live.split(block_size)]) * removed.shape[1]
    counts = torch.zeros_like(live, dtype=torch.int64) if untouched else removed.sum(1) * live
    already = torch.stack([part.sum() for part in counts.split(block_size)])
    return group_quotas(round(sparsity * int(sizes.sum())), sizes, already)


def _counts_of_blocks(marked: Tensor, block_size: int) -> Tensor:
    """How many weights of every block of columns are marked (cols, rows)."""
    return torch.stack([part.sum() for part in marked.split(block_size)])


def _mark_lowest(removed: Tensor, scores: Tensor, live: Tensor, quota: int) -> None:
    """Let ``removed`` have exactly ``quota`` of the live columns' weights, its own first; all (block, rows)."""
    scores = scores.masked_fill(removed, float("-inf")).masked_fill(~live[:, None], float("inf"))
    removed |= lowest(scores, quota)
