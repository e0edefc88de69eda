"""Removing groups of columns by OBS: the cheapest group goes, all other columns make up for it, and so on.

A group is what goes out of a matrix together: the columns that read one attention head, or one feed-forward unit. With
W the matrix, H the damped Hessian of its input and g the columns of a group, the least error that removing it causes,
and the weights that have it, are (ZipLM, Kurtic et al. 2023; for one weight it is OBS)

    score = tr(W_g ([H⁻¹]_gg)⁻¹ W_gᵀ)        W ← W − W_g ([H⁻¹]_gg)⁻¹ [H⁻¹]_g,:

and the inverse Hessian of the columns that stay is H⁻¹ − [H⁻¹]_:,g ([H⁻¹]_gg)⁻¹ [H⁻¹]_g,:.

Doing these updates for every group would read the whole inverse for each of thousands of units. They are gathered
instead: with LLᵀ = [H⁻¹]_gg, a removal adds the columns P = [H⁻¹]_:,g L⁻ᵀ to a panel, and the inverse is what it was
minus the panel times its transpose. A step computes only what it needs, the group's own columns and what the scores are
made of: [H⁻¹]_gg and W_gᵀW_g of every group.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparsewav.errors import UserError
from sparsewav.pruning.solvers.factorization import damp, factorize

PANEL = 64
"""Columns that are gathered before the inverse and the weights are updated."""
LARGEST_SHARE = 0.25
"""Share of the groups that are removed at most before inverse and weights are computed anew, as rounding adds up."""
DOUBLE = 1024
"""Columns up to which everything is computed in float64."""


@dataclass(frozen=True)
class GroupRemoval:
    """A matrix of which some groups of columns are left.

    Attributes:
        kept: Indices of the groups that stay, ascending.
        weight: The weights; the columns of the other groups are zero.
        error: ||(W − Ŵ)X||², summed over the rows. With the asymmetric objective W is its target T, so that the errors
            of several removals differ as those of the outputs do.
    """

    kept: Int[Tensor, " kept"]
    weight: Float[Tensor, "rows cols"]
    error: float


def remove_groups(
    weight: Float[Tensor, "rows cols"],
    hessian: Float[Tensor, "cols cols"],
    size: int,
    counts: Iterable[int],
    damping: float,
    name: str = "the matrix",
    drift: Float[Tensor, "cols cols"] | None = None,
) -> list[GroupRemoval]:
    """Remove groups of columns one after the other, each time the one with the lowest score.

    The kept weights are the exact least squares solution on the columns that stay: they minimise
    tr((W − Ŵ)(H + λI)(W − Ŵ)ᵀ). A group of zero weights or of dead inputs (zero on the Hessian's diagonal) costs
    nothing and goes first. The arguments are not changed.

    Args:
        weight: W.
        hessian: H = XXᵀ of the matrix's input X, one column a frame.
        size: The columns of a group; groups are consecutive.
        counts: How many groups to keep; a result is made for each of these.
        damping: λ as a share of the mean diagonal of H.
        name: The matrix's name, for messages.
        drift: (X − X̂)X̂ᵀ of the dense model's inputs X and the inputs X̂ that ``hessian`` was computed on, for the
            asymmetric objective (:mod:`~sparsewav.pruning.solvers.solve`); None where they are the same.

    Returns:
        The results in the order of ``counts``, in the dtype of ``weight``.

    Raises:
        UserError: A value is not finite, or the Hessian is not positive definite even after λ was raised.
        ValueError: The columns are no multiple of ``size``, or a count is not between 0 and the number of groups.
    """
    counts, groups = list(counts), weight.shape[1] // size
    if weight.shape[1] % size:
        raise ValueError(f"{weight.shape[1]} columns of {name} are no multiple of {size}")
    if not all(0 <= count <= groups for count in counts):
        raise ValueError(f"of the {groups} groups of {name} there cannot stay {counts}")
    for matrix, called in ((weight, "weight"), (hessian, "Hessian"), (drift, "drift")):
        if matrix is not None and not matrix.isfinite().all():
            raise UserError(f"the {called} of {name} has NaN or infinite values")
    dtype = torch.promote_types(torch.promote_types(weight.dtype, hessian.dtype), torch.float32)
    if len(hessian) <= DOUBLE:
        dtype = torch.float64
    hessian = hessian.to(dtype)
    live = hessian.diagonal() > 0
    _, damping = factorize(hessian, live, damping, name)
    damped = damp(hessian.clone(), live, damping)
    dense = weight.detach().to(dtype) * live
    # Its columns S are what Ŵ_S times the damped Hessian's part SS has to be.
    image = (dense @ (damped if drift is None else damped + drift.to(dtype) * live)).T  # (cols, rows)
    kept, counts_left = torch.arange(groups, device=weight.device), sorted(set(counts), reverse=True)
    target: Float[Tensor, "cols rows"] | None = None  # T, transposed
    error = 0.0  # tr((T − Ŵ)(H + λI)(T − Ŵ)ᵀ), which is the sum of the scores
    results: dict[int, GroupRemoval] = {}
    while counts_left:
        columns = _columns(kept, size)
        inverse = _invert(damped[columns][:, columns], name)
        solved = dense.T.clone() if target is None and drift is None else inverse @ image[columns]
        target = solved.clone() if target is None else target
        lowest = max(counts_left[-1], math.floor((1 - LARGEST_SHARE) * len(kept)))
        stops = sorted({lowest, *(count for count in counts_left if count >= lowest)}, reverse=True)
        for count, (stays, scores) in zip(stops, _remove(solved, inverse, size, stops), strict=True):
            if count == counts_left[0]:
                counts_left.pop(0)
                reduced = torch.zeros_like(image)
                reduced[_columns(kept[stays], size)] = solved[_columns(stays, size)]
                added = damping * float((target - reduced).square().sum())
                pruned = reduced.T.to(weight.dtype).contiguous()
                results[count] = GroupRemoval(kept[stays], pruned, max(error + scores - added, 0.0))
        kept, error = kept[stays], error + scores
    return [results[count] for count in counts]


def _columns(groups: Int[Tensor, " groups"], size: int) -> Int[Tensor, " columns"]:
    """Give the columns of groups."""
    return (groups[:, None] * size + torch.arange(size, device=groups.device)).flatten()


def _invert(matrix: Float[Tensor, "cols cols"], name: str) -> Float[Tensor, "cols cols"]:
    factor, info = torch.linalg.cholesky_ex(matrix)
    if len(matrix) and info:
        raise UserError(
            f"a part of the Hessian of {name} is not positive definite; calibrate on more or other utterances, or "
            "raise solver.damping"
        )
    return torch.cholesky_inverse(factor) if len(matrix) else matrix


def _remove(
    weight: Float[Tensor, "cols rows"], inverse: Float[Tensor, "cols cols"], size: int, counts: list[int]
) -> Iterator[tuple[Int[Tensor, " kept"], float]]:
    """Remove groups one after the other, in place: the rows of ``weight`` that belong to others are the updated ones.

    Args:
        weight: The weights, transposed.
        inverse: The inverse of the damped Hessian of these columns.
        size: The columns of a group.
        counts: How many groups are to be left, in descending order.

    Yields:
        For each of ``counts`` the groups that are left, and the sum of the scores of those that are not.
    """
    cols, rows = weight.shape
    groups, width = cols // size, max(PANEL // size, 1) * size
    panel, front = weight.new_empty(cols, width), weight.new_empty(rows, width)
    removed = torch.zeros(groups, dtype=torch.bool, device=weight.device)
    total = torch.zeros((), dtype=torch.float64, device=weight.device)
    left = groups
    for count in counts:
        while left > count:
            pivots = inverse.view(groups, size, groups, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1).clone()
            parts = weight.view(groups, size, rows)
            grams = parts @ parts.mT if size > 1 else parts.square().sum(-1, keepdim=True)
            filled = 0
            while left > count and filled < width:
                score, group = _scores(pivots, grams, removed).min(0)
                removed[group] = True
                total += score
                left -= 1
                span = _columns(group[None], size)
                before, beside = panel[:, :filled], front[:, :filled]
                own = before[span].T
                lower = torch.linalg.cholesky(pivots[group])
                column = _over(inverse[span].T - before @ own, lower)  # P, (cols, size)
                moved = _over(weight[span].T - beside @ own, lower)  # W_g L⁻ᵀ, (rows, size)
                cross = weight @ moved - before @ (beside.T @ moved)  # Wᵀ W_g L⁻ᵀ, (cols, size)
                panel[:, filled : filled + size], front[:, filled : filled + size] = column, moved
                filled += size
                column, cross = column.view(groups, size, size), cross.view(groups, size, size)
                pivots -= _products(column, column)
                # Every W_h becomes W_h − W_g L⁻ᵀ P_hᵀ.
                change = _products(column, cross)
                grams += _products(column @ (moved.T @ moved), column) - change - change.mT
            inverse.addmm_(panel[:, :filled], panel[:, :filled].T, alpha=-1)
            weight.addmm_(panel[:, :filled], front[:, :filled].T, alpha=-1)
        yield (~removed).nonzero().squeeze(-1), float(total)


def _scores(
    pivots: Float[Tensor, "groups size size"],
    grams: Float[Tensor, "groups size size"],
    removed: Bool[Tensor, " groups"],
) -> Float[Tensor, " groups"]:
    """Give tr(W_g ([H⁻¹]_gg)⁻¹ W_gᵀ) of every group from [H⁻¹]_gg and W_gᵀ W_g; infinity where it is removed."""
    if pivots.shape[1] == 1:
        scores = (grams / pivots).flatten()
    else:
        pivots = torch.where(removed[:, None, None], torch.eye(pivots.shape[1]).to(pivots), pivots)
        solved = torch.cholesky_solve(grams, torch.linalg.cholesky(pivots))
        scores = solved.diagonal(dim1=1, dim2=2).sum(-1)
    return scores.masked_fill(removed, math.inf)


def _over(matrix: Float[Tensor, "height size"], lower: Float[Tensor, "size size"]) -> Float[Tensor, "height size"]:
    """Give the matrix times L⁻ᵀ."""
    if len(lower) == 1:
        return matrix / lower
    return torch.linalg.solve_triangular(lower.T, matrix, upper=True, left=False)


def _products(
    left: Float[Tensor, "groups size size"], right: Float[Tensor, "groups size size"]
) -> Float[Tensor, "groups size size"]:
    """Give left times the transpose of right, for every group."""
    return left @ right.mT if left.shape[1] > 1 else left * right
