"""Solve: prune one weight matrix, or several that read the same input, given its Hessian.

The OBS sweep is the paper's (:mod:`~sparsewav.pruning.solvers.obs`). Two more solvers reach the same sparsity with
smaller errors and more work: ``obs_refit`` keeps the sweep's mask and solves for the kept weights exactly
(:mod:`~sparsewav.pruning.solvers.refit`), ``alps`` finds a better mask, too (:mod:`~sparsewav.pruning.solvers.alps`).

All of them minimise ||(W − Ŵ)X||² + λ||W − Ŵ||². With the asymmetric objective, where the pruned matrix reads other
inputs X̂ than the dense one, they minimise ||WX − ŴX̂||² + λ||W − Ŵ||² with H = X̂X̂ᵀ. Let D = (X − X̂)X̂ᵀ be the drift of
the inputs and T = W + WD(H + λI)⁻¹; then this is ||(T − Ŵ)X̂||² + λ||T − Ŵ||² plus a constant, the same problem with T
in place of W. Only the damping draws the weights to their dense values.

ALPS can weight the errors of the outputs by a matrix G: tr(G(T − Ŵ)(H + λI)(T − Ŵ)ᵀ), of which the above is the case
G = I. T stays what it is, because without any sparsity the error is zero for every row and so for every G. With G the
covariance of the gradients at the outputs (:mod:`~sparsewav.pruning.gradient_covariance`) half of it is the divergence
of the model's output to second order.

The solvers work on transposed matrices, shape (cols, rows).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from sparsewav.errors import UserError
from sparsewav.pruning.solvers import alps
from sparsewav.pruning.solvers.factorization import damp, damp_covariance, factorize
from sparsewav.pruning.solvers.obs import Problem, sweep
from sparsewav.pruning.solvers.refit import solve_on_support, solve_weighted_on_support
from sparsewav.pruning.solvers.saliency import SCORES, Block
from sparsewav.pruning.solvers.selection import block_quotas, group_quotas, lowest_of_rows, mark_lowest, n_of_m
from sparsewav.pruning.solvers.workspace import workspace
from sparsewav.settings.pruning import ALPS, NM, OBS, OBSRefit, Pruning, Saliency, Solver, Uniform, resolve


@dataclass(frozen=True)
class PrunedMatrix:
    """A pruned weight matrix.

    Attributes:
        weight: The weights, zero wherever ``keep`` is False.
        keep: True where a weight is kept.
        increments: What each row's removals added to its damped objective (eq. 1, summed), which is the row's
            ||(w − ŵ)X||² + λ||w − ŵ||². None without weight updates, and from other solvers than the plain sweep.
        damping: λ that was added to the Hessian's diagonal; 0 without weight updates.
    """

    weight: Float[Tensor, "rows cols"]
    keep: Bool[Tensor, "rows cols"]
    increments: Float[Tensor, " rows"] | None = None
    damping: float = 0.0


def prune_matrix(
    weight: Float[Tensor, "_rows _cols"],
    hessian: Float[Tensor, "_cols _cols"],
    sparsity: float | NM,
    *,
    saliency: Saliency | str = "obs_first_order",
    solver: Solver | str = "obs",
    keep: Bool[Tensor, "_rows _cols"] | None = None,
    drift: Float[Tensor, "_cols _cols"] | None = None,
    covariance: Float[Tensor, "_rows _rows"] | None = None,
    name: str = "the matrix",
) -> PrunedMatrix:
    """Prune one weight matrix; the arguments are not changed.

    Exactly ``round(sparsity * weights)`` weights are pruned, including those that ``keep`` has removed already. With
    weight updates, the columns of dead inputs (zero on the Hessian's diagonal) are zeroed outside of that quota, which
    then counts over the live columns.

    Args:
        weight: The weights.
        hessian: XXᵀ of the matrix's input X, one column a frame.
        sparsity: The share of the weights to prune, or ``NM(n, m)`` to keep n of every m consecutive weights of a row.
        saliency: The score by which weights are removed; :class:`~sparsewav.settings.pruning.Saliency` or its name.
        solver: How mask and kept weights are found; :class:`~sparsewav.settings.pruning.Solver` or its name.
        keep: A mask already in force: what it removed stays removed.
        drift: (X − X̂)X̂ᵀ of the dense model's inputs X and the inputs X̂ that ``hessian`` was computed on; None where
            they are the same.
        covariance: The covariance of the gradients at the matrix's output, for ``ALPS(output_weighting="fisher")``.
        name: The matrix's name, for messages.

    Raises:
        UserError: A shape or a setting is wrong, or the Hessian is not positive definite even after λ was raised.
    """
    return prune_matrices(
        [weight],
        hessian,
        [sparsity],
        saliency=saliency,
        solver=solver,
        keeps=[keep],
        drift=drift,
        covariances=None if covariance is None else [covariance],
        names=[name],
    )[0]


@dataclass(frozen=True)
class MatrixGroup:
    """Matrices that read the same input, with the arguments of :func:`prune_matrix` for each."""

    weights: Sequence[Float[Tensor, "_rows _cols"]]
    hessian: Float[Tensor, "_cols _cols"]
    sparsities: Sequence[float]
    keeps: Sequence[Bool[Tensor, "_rows _cols"] | None]
    drift: Float[Tensor, "_cols _cols"] | None
    names: Sequence[str]
    covariances: Sequence[Float[Tensor, "_rows _rows"]] | None = None


def prune_matrices(
    weights: Sequence[Float[Tensor, "_rows _cols"]],
    hessian: Float[Tensor, "_cols _cols"],
    sparsities: Sequence[float | NM],
    *,
    saliency: Saliency | str = "obs_first_order",
    solver: Solver | str = "obs",
    keeps: Sequence[Bool[Tensor, "_rows _cols"] | None] | None = None,
    drift: Float[Tensor, "_cols _cols"] | None = None,
    covariances: Sequence[Float[Tensor, "_rows _rows"]] | None = None,
    names: Sequence[str] | None = None,
) -> list[PrunedMatrix]:
    """Prune matrices that read the same input, with one factorisation and one sweep, but a quota for each.

    The arguments are those of :func:`prune_matrix`, in sequences with one item for every matrix.
    """
    names = names or [f"matrix {index}" for index in range(len(weights))]
    pattern = next((item for item in sparsities if isinstance(item, NM)), None)
    if pattern is not None and any(item != pattern for item in sparsities):
        raise UserError("matrices of one input have one pattern; give each of them the same NM(n, m)")
    shares = [item.fraction if isinstance(item, NM) else item for item in sparsities]
    settings = Pruning(
        sparsity=pattern or Pruning().sparsity,
        saliency=resolve("saliency", saliency),
        solver=resolve("solver", solver),
        allocation=Uniform(),
    )
    settings.check()
    group = MatrixGroup(weights, hessian, shares, keeps or [None] * len(weights), drift, names, covariances)
    return prune_groups([group], settings)[0]


def prune_groups(groups: Sequence[MatrixGroup], settings: Pruning) -> list[list[PrunedMatrix]]:
    """Prune groups of matrices whose inputs are equally wide, with the sweeps of all of them batched.

    The result equals that of :func:`prune_matrices` for each group up to rounding. Batching pays only on a GPU, which
    one sweep does not keep busy. Of the settings, which are already checked, saliency, solver and pattern are read.
    """
    solver, pattern = settings.solver, settings.sparsity.pattern
    for group in groups:
        _check(group, pattern)
        _check_covariances(group, solver)
        if group.drift is not None and not settings.saliency.updates:
            raise UserError(
                f"saliency={settings.saliency.name} updates no weights, and a drift of the inputs asks for it; choose "
                "obs"
            )
    if not settings.saliency.updates:
        return [_mask_only(group, settings.saliency.name, pattern) for group in groups]
    problems = [_lay_out(group, number, solver) for number, group in enumerate(groups)]
    found: list[tuple[Tensor, Tensor, Tensor | None]] = []  # weights and removals (cols, rows), increments (rows,)
    if isinstance(solver, ALPS):
        found = [(*_admm(problem, solver, pattern), None) for problem in problems]
    else:
        assert isinstance(solver, OBS)
        swept = sweep(problems, SCORES[settings.saliency.name], solver, pattern)
        if isinstance(solver, OBSRefit):
            found = [
                (_refit(problem, pruned, removed, solver.tolerance), removed, None)
                for problem, (pruned, removed, _) in zip(problems, swept, strict=True)
            ]
        else:
            found.extend(swept)
    return [
        [
            _result(
                weight,
                pruned[:, rows],
                removed[:, rows],
                problem.damping,
                None if increments is None else increments[rows],
            )
            for weight, rows in zip(group.weights, problem.rows, strict=True)
        ]
        for group, problem, (pruned, removed, increments) in zip(groups, problems, found, strict=True)
    ]


def _check(group: MatrixGroup, pattern: tuple[int, int] | None) -> None:
    """Refuse what cannot be pruned; the annotations' underscores leave comparing the shapes to this function."""
    hessian = group.hessian
    if not is_finite(hessian) or (group.drift is not None and not is_finite(group.drift)):
        raise UserError(f"the Hessian of {group.names[0]} has NaN or infinite values; calibrate again")
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
        if not is_finite(weight):
            raise UserError(f"the weight of {name} has NaN or infinite values; check the model's file")
        if not 0 <= sparsity <= 1:
            raise UserError(f"sparsity {sparsity:g} of {name} is not between 0 and 1")
        if pattern and weight.shape[1] % pattern[1]:
            raise UserError(
                f"the pattern {pattern[0]}:{pattern[1]} does not fit {name}, whose {weight.shape[1]} columns are no "
                f"multiple of {pattern[1]}"
            )


def _check_covariances(group: MatrixGroup, solver: Solver) -> None:
    """Refuse to weight the outputs by what is not there, or is no such matrix."""
    if solver.weights_outputs == (group.covariances is None):
        raise UserError(
            "the covariance of the gradients at a matrix's output goes with solver=alps and "
            "solver.output_weighting=fisher, which needs it; give both, or none of them"
        )
    if group.covariances is None:
        return
    for weight, covariance, name in zip(group.weights, group.covariances, group.names, strict=True):
        if covariance.shape != (len(weight), len(weight)):
            raise UserError(
                f"the covariance of the gradients of {name} has shape {tuple(covariance.shape)}; its weight "
                f"{tuple(weight.shape)} needs ({len(weight)}, {len(weight)})"
            )
        if not is_finite(covariance):
            raise UserError(
                f"the covariance of the gradients of {name} has NaN or infinite values; load the model in float32"
            )


def check_finite(weight: Float[Tensor, "rows cols"], name: str) -> None:
    """Refuse the pruned weight of a matrix that is beyond the range of its type.

    Raises:
        UserError: It has such values.
    """
    if not is_finite(weight):
        raise UserError(f"the pruned weight of {name} has values beyond {weight.dtype}; load the model in float32")


def is_finite(matrix: Float[Tensor, "rows cols"]) -> bool:
    """Tell whether all values are finite, in one pass: a value that is not stays in the sum."""
    return bool(matrix.sum(dtype=torch.promote_types(matrix.dtype, torch.float32)).isfinite())


def _lay_out(group: MatrixGroup, number: int, solver: Solver) -> Problem:
    """Lay the matrices of a group side by side and factor their Hessian; ``number`` identifies their workspaces."""
    stacked, removed, rows = _stack(group, number)
    hessian = group.hessian.to(stacked.dtype)
    live = hessian.diagonal() > 0
    factor, damping = factorize(hessian, live, solver.damping, ", ".join(group.names), number)
    shift = None if group.drift is None else _shift_of_target(stacked, factor, group.drift.to(stacked.dtype))
    target = stacked if shift is None else stacked.add_(shift)
    if not live.all():
        target[~live], removed[~live] = 0, True
    covariances = None
    if isinstance(solver, ALPS) and solver.weights_outputs:
        assert group.covariances is not None
        covariances = [damp_covariance(item.to(stacked), solver.output_damping) for item in group.covariances]
    return Problem(
        target=target,
        hessian=hessian,
        live=live,
        factor=factor,
        damping=damping,
        shift=shift,
        removed=removed,
        untouched=all(keep is None for keep in group.keeps),
        rows=rows,
        sparsities=group.sparsities,
        covariances=covariances,
    )


def _stack(
    group: MatrixGroup, number: int
) -> tuple[Float[Tensor, "cols rows"], Bool[Tensor, "cols rows"], list[slice]]:
    """Copy the weights and what the masks in force removed, side by side; the slices are the rows of each matrix."""
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


def _result(
    weight: Float[Tensor, "rows cols"],
    pruned: Float[Tensor, "cols rows"],
    removed: Bool[Tensor, "cols rows"],
    damping: float = 0.0,
    increments: Float[Tensor, " rows"] | None = None,
) -> PrunedMatrix:
    """Transpose one matrix back, and give it the dtype of the dense weight."""
    keep = _transpose(removed, torch.empty(weight.shape, dtype=torch.bool, device=weight.device)).logical_not_()
    result = _transpose(pruned, torch.empty_like(weight, memory_format=torch.contiguous_format))
    return PrunedMatrix(result, keep, increments, damping)


def _transpose(matrix: Shaped[Tensor, "height width"], out: Shaped[Tensor, "width height"]) -> Tensor:
    """Write the transpose of a matrix into another."""
    if out.is_contiguous() and matrix.is_contiguous():  # PyTorch transposes in small squares then
        return out.copy_(matrix.T)
    for start in range(0, len(matrix), 256):  # in strips, so that they stay in the processor's cache
        strip = slice(start, start + 256)
        out[:, strip] = matrix[strip].T
    return out


def _shift_of_target(
    weight: Float[Tensor, "cols rows"], factor: Float[Tensor, "cols cols"], drift: Float[Tensor, "cols cols"]
) -> Float[Tensor, "cols rows"]:
    """Give Tᵀ − Wᵀ = (H + λI)⁻¹ Dᵀ Wᵀ."""
    shift = torch.linalg.solve_triangular(factor, drift.T @ weight, upper=True)
    return torch.linalg.solve_triangular(factor.T, shift, upper=False)


def _mask_only(group: MatrixGroup, saliency: str, pattern: tuple[int, int] | None) -> list[PrunedMatrix]:
    """Remove the lowest scores of each matrix, or of each row, without weight updates."""

    def no_gradient() -> Tensor:
        raise NotImplementedError(f"{saliency} prunes without weight updates and has no gradient")

    stacked, removed, rows = _stack(group, 0)
    weight, keep = stacked.T, ~removed.T
    diagonal = group.hessian.to(stacked.dtype).diagonal()
    scores = SCORES[saliency](Block(weight, torch.ones_like(diagonal), diagonal, no_gradient))
    kept = keep.clone()
    for span, sparsity in zip(rows, group.sparsities, strict=True):
        if pattern:
            kept[span] = n_of_m(scores[span], keep[span], *pattern)
            continue
        shape = (1, -1) if saliency == "magnitude" else scores[span].shape  # Wanda compares within each row
        candidates, candidates_kept = scores[span].reshape(shape), keep[span].reshape(shape)
        sizes = torch.full((len(candidates),), candidates.shape[1])
        quotas = group_quotas(round(sparsity * candidates.numel()), sizes, (~candidates_kept).sum(1))
        kept[span] = ~lowest_of_rows(candidates, candidates_kept, quotas).reshape(scores[span].shape)
    kept &= keep
    pruned = weight.masked_fill(~kept, 0.0)
    return [_result(matrix, pruned[span].T, ~kept[span].T) for matrix, span in zip(group.weights, rows, strict=True)]


def _refit(
    problem: Problem, pruned: Float[Tensor, "cols rows"], removed: Bool[Tensor, "cols rows"], tolerance: float
) -> Float[Tensor, "cols rows"]:
    """Solve for the kept weights exactly, starting from the sweep's."""
    damped = damp(problem.hessian.clone(), problem.live, problem.damping)
    return solve_on_support(problem.target, damped, ~removed, pruned, tolerance)


def _admm(
    problem: Problem, solver: ALPS, pattern: tuple[int, int] | None
) -> tuple[Float[Tensor, "cols rows"], Bool[Tensor, "cols rows"]]:
    """Find the mask by ALPS, with all weights of a matrix competing, and solve for the kept weights exactly."""
    in_force, live = problem.removed, problem.live
    quotas = [
        int(block_quotas(in_force[:, rows], problem.untouched, live, sparsity, len(live)))
        for rows, sparsity in zip(problem.rows, problem.sparsities, strict=True)
    ]

    def project_one(number: int, scores: Float[Tensor, "cols _"]) -> Bool[Tensor, "cols _"]:
        already = in_force[:, problem.rows[number]]
        if pattern:
            return ~n_of_m(scores.T, ~already.T, *pattern).T
        removed = already.clone()
        mark_lowest(removed, scores, live, quotas[number])
        return removed

    def project(scores: Float[Tensor, "cols rows"]) -> Bool[Tensor, "cols rows"]:
        return torch.cat([project_one(number, scores[:, rows]) for number, rows in enumerate(problem.rows)], 1)

    damped = damp(problem.hessian.clone(), live, problem.damping)
    if problem.covariances is None:  # the rows are independent, and those of all matrices are solved together
        removed, start = alps.find_mask(problem.target, damped, project, solver.max_steps)
        if not removed.any():
            return problem.target, removed
        return solve_on_support(problem.target, damped, ~removed, start, solver.tolerance), removed
    weights, masks = [], []
    for number, (rows, covariance) in enumerate(zip(problem.rows, problem.covariances, strict=True)):
        target = problem.target[:, rows]
        removed, weight = alps.find_mask(target, damped, partial(project_one, number), solver.max_steps, covariance)
        if removed.any():
            weight = solve_weighted_on_support(target, damped, covariance, ~removed, weight, solver.tolerance)
        weights.append(weight if removed.any() else target)
        masks.append(removed)
    return torch.cat(weights, 1), torch.cat(masks, 1)
