"""Solver: prune one weight matrix (or several that read the same input) given its Hessian.

The OBS sweep goes over the columns from left to right (the order of SparseGPT, Frantar and Alistarh 2023). With
H⁻¹ = UᵀU, U upper triangular, [H⁻¹]_pp of the problem that remains at column p is U_pp², and the update of eq. 1
that makes up for a removed weight is −(w_p / U_pp) U_p,p: on the columns at its right.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsewav.errors import UserError
from sparsewav.pruning.saliency import SALIENCIES, Block, Saliency

logger = logging.getLogger(__name__)

DAMPING_ATTEMPTS = 5


@dataclass(frozen=True)
class PrunedMatrix:
    """A pruned weight matrix.

    Attributes:
        weight: shape (rows, cols), zero wherever ``keep`` is False.
        keep: shape (rows, cols), True where a weight stays.
        increments: shape (rows,), what each row's removals added to its damped objective (eq. 1, summed); they are
            ||(W − Ŵ)X||² + λ ||W − Ŵ||². None without weight updates.
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
        name: what to call the matrix in a message.

    Raises:
        UserError: a shape, the sparsity or the saliency is wrong, or the Hessian is not positive definite even with
            λ raised five times.
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
    names: Sequence[str] | None = None,
) -> list[PrunedMatrix]:
    """Prune matrices that read the same input: one factorisation, one stacked sweep, a quota for each.

    Arguments are those of :func:`prune_matrix`, one of each kind for every matrix.
    """
    names = names or [f"matrix {index}" for index in range(len(weights))]
    method = SALIENCIES.get(saliency)
    if method is None:
        raise UserError(f"saliency {saliency!r} does not exist; choose one of {', '.join(SALIENCIES)}")
    keeps = keeps or [None] * len(weights)
    _check(weights, hessian, sparsities, keeps, n_m, names)
    dtype = torch.promote_types(torch.promote_types(weights[0].dtype, hessian.dtype), torch.float32)
    stacked = torch.cat([weight.detach() for weight in weights]).to(dtype)
    keep = torch.cat(
        [
            torch.ones_like(weight, dtype=torch.bool) if mask is None else mask.to(weight.device, torch.bool)
            for weight, mask in zip(weights, keeps, strict=True)
        ]
    )
    rows = _row_spans(weights)
    solve = _sweep if method.updates else _mask_only
    problem = _Problem(
        stacked, hessian.to(dtype), keep, rows, sparsities, method, n_m, block_size, percdamp, ", ".join(names)
    )
    pruned, kept, increments, damping = solve(problem)
    return [
        PrunedMatrix(
            weight=pruned[span].to(weight.dtype),
            keep=kept[span],
            increments=None if increments is None else increments[span],
            damping=damping,
        )
        for weight, span in zip(weights, rows, strict=True)
    ]


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
        if not 0 <= sparsity <= 1:
            raise UserError(f"sparsity {sparsity:g} of {name} is not between 0 and 1")
        if n_m and (not 0 < n_m[0] <= n_m[1] or weight.shape[1] % n_m[1]):
            raise UserError(
                f"the pattern {n_m[0]}:{n_m[1]} does not fit {name}: it needs 0 < n <= m and {weight.shape[1]} columns "
                "to be a multiple of m"
            )


def _row_spans(weights: Sequence[Tensor]) -> list[slice]:
    spans, start = [], 0
    for weight in weights:
        spans.append(slice(start, start + weight.shape[0]))
        start += weight.shape[0]
    return spans


def group_quotas(total: int, sizes: Tensor, removed: Tensor) -> Tensor:
    """Share a number of removals among groups as evenly as what is already removed allows.

    Every group gets the same share of its size, except one that has lost more already: it keeps that, and the others
    get the less.

    Args:
        total: removals over all groups, those already made among them.
        sizes: of the groups, shape (groups,).
        removed: already removed in every group, shape (groups,).

    Returns:
        Removals of every group, shape (groups,), int64: at least ``removed``, summing to ``max(total, sum(removed))``.
    """
    total = max(total, int(removed.sum()))
    sizes, removed = sizes.double().cpu(), removed.double().cpu()
    # The share is where the piecewise linear sum of max(removed, share * size) reaches the total: groups drop out of it
    # one by one, those with the largest share already removed first.
    open_groups = torch.ones_like(sizes, dtype=torch.bool)
    while True:
        size = float(sizes[open_groups].sum())
        share = (total - float(removed[~open_groups].sum())) / size if size else 0.0
        full = open_groups & (removed > share * sizes)
        if not full.any():
            break
        open_groups &= ~full
    wanted = torch.where(open_groups, share * sizes, removed)
    # Rounding the running sum spreads the fractions evenly and keeps the total.
    ends = (wanted.cumsum(0) + 1e-6).floor()
    ends[-1] = total
    quotas = torch.diff(ends, prepend=torch.zeros(1, dtype=torch.float64)).to(torch.int64)
    return _repair(quotas, removed.to(torch.int64), sizes.to(torch.int64))


def _repair(quotas: Tensor, removed: Tensor, sizes: Tensor) -> Tensor:
    """Move single removals between groups until none has fewer than it already lost, or more than it holds."""
    bounded = quotas.clamp(removed, sizes)
    surplus = int((quotas - bounded).sum())
    while surplus:
        step = 1 if surplus > 0 else -1
        room = bounded < sizes if surplus > 0 else bounded > removed
        for index in room.nonzero().flatten()[: abs(surplus)].tolist():
            bounded[index] += step
            surplus -= step
    return bounded


def _lowest(scores: Tensor, keep: Tensor, quotas: Tensor) -> Tensor:
    """Masks, True where a weight stays, that remove from every row of ``scores`` as many as its quota says.

    What ``keep`` removed already is removed first; quotas (rows,), the rest (rows, candidates).
    """
    scores = scores.masked_fill(~keep, float("-inf"))
    mask = torch.ones_like(keep)
    most = int(quotas.max())
    if most == 0:
        return mask
    if len(scores) == 1:
        return mask.index_fill(1, scores[0].topk(most, largest=False, sorted=False).indices, False)
    order = scores.topk(most, largest=False, sorted=True).indices  # (rows, most)
    wanted = torch.arange(most, device=scores.device) < quotas.to(scores.device)[:, None]
    return mask.scatter(1, order, ~wanted)


def _n_of_m(scores: Tensor, keep: Tensor, n: int, m: int) -> Tensor:
    """Mask that keeps at most n of every m consecutive columns; all (rows, cols)."""
    groups, kept = scores.reshape(-1, m), keep.reshape(-1, m)
    quota = torch.full((len(groups),), m - n)
    return (_lowest(groups, kept, quota) & kept).reshape(scores.shape)


@dataclass(frozen=True)
class _Problem:
    """Matrices stacked on one another: weight and keep are (all rows, cols), ``rows`` says which belong together."""

    weight: Tensor
    hessian: Tensor
    keep: Tensor
    rows: list[slice]
    sparsities: Sequence[float]
    method: Saliency
    n_m: tuple[int, int] | None
    block_size: int
    percdamp: float
    name: str


def _mask_only(problem: _Problem) -> tuple[Tensor, Tensor, None, float]:
    """Remove the lowest scores of each matrix, or of each row, and leave the rest as it is."""

    def no_gradient() -> Tensor:
        raise NotImplementedError(f"{method.score.__name__} prunes without weight updates and has no gradient")

    weight, keep, method = problem.weight, problem.keep, problem.method
    diagonal = problem.hessian.diagonal()
    scores = method.score(Block(weight, torch.ones_like(diagonal), diagonal, no_gradient))
    kept = keep.clone()
    for span, sparsity in zip(problem.rows, problem.sparsities, strict=True):
        if problem.n_m:
            kept[span] = _n_of_m(scores[span], keep[span], *problem.n_m)
            continue
        shape = (1, -1) if method.compared_within == "matrix" else scores[span].shape
        candidates, candidates_kept = scores[span].reshape(shape), keep[span].reshape(shape)
        sizes = torch.full((len(candidates),), candidates.shape[1])
        quotas = group_quotas(round(sparsity * candidates.numel()), sizes, (~candidates_kept).sum(1))
        kept[span] = _lowest(candidates, candidates_kept, quotas).reshape(scores[span].shape)
    kept &= keep
    return weight.masked_fill(~kept, 0.0), kept, None, 0.0


def _sweep(problem: _Problem) -> tuple[Tensor, Tensor, Tensor, float]:
    """The OBS sweep: mask a block of columns, then remove its weights column by column, updating the rest."""
    dense, hessian, rows = problem.weight, problem.hessian, problem.rows
    weight = dense.clone()
    cols = weight.shape[1]
    live = hessian.diagonal() > 0
    weight[:, ~live] = 0
    keep = problem.keep & live
    upper, damping = _factor(hessian, live, problem.percdamp, problem.name)
    block_size = problem.block_size
    if problem.n_m:  # no group of m may lie in two blocks
        block_size = max(block_size // problem.n_m[1], 1) * problem.n_m[1]
    starts = range(0, cols, block_size)
    quotas = [
        _block_quotas(keep[span], live, sparsity, block_size)
        for span, sparsity in zip(rows, problem.sparsities, strict=True)
    ]
    kept = keep.clone()
    increments = torch.zeros(len(weight), dtype=weight.dtype, device=weight.device)
    for index, start in enumerate(starts):
        span = slice(start, min(start + block_size, cols))
        block = weight[:, span].clone()  # (rows, block)
        pivots = upper.diagonal()[span]

        def gradient(span: slice = span) -> Tensor:
            return 2 * (weight - dense) @ hessian[:, span]  # eq. 3, (rows, block)

        scores = problem.method.score(Block(block, pivots.square(), hessian.diagonal()[span], gradient))
        if problem.n_m:
            kept[:, span] = _n_of_m(scores, keep[:, span], *problem.n_m)
        else:
            for matrix, quota in zip(rows, quotas, strict=True):
                kept[matrix, span] &= _remove_in_block(scores[matrix], kept[matrix, span], live[span], quota[index])
        errors = torch.zeros_like(block)
        for column in range(block.shape[1]):
            removed = block[:, column].masked_fill(kept[:, start + column], 0.0)
            errors[:, column] = removed / pivots[column]
            block[:, column:] -= errors[:, column, None] * upper[start + column, start + column : span.stop]
        increments += errors.square().sum(1)
        weight[:, span] = block.masked_fill(~kept[:, span], 0.0)
        weight[:, span.stop :] -= errors @ upper[span, span.stop :]
    return weight, kept, increments, damping


def _block_quotas(keep: Tensor, live: Tensor, sparsity: float, block_size: int) -> Tensor:
    """How many weights of one matrix every block of columns loses, dead columns left out of the count."""
    rows = len(keep)
    sizes = torch.stack([part.sum() * rows for part in live.split(block_size)])
    removed = torch.stack([(~part).sum() for part in (keep | ~live).split(block_size, dim=1)])
    return group_quotas(round(sparsity * int(sizes.sum())), sizes, removed)


def _remove_in_block(scores: Tensor, keep: Tensor, live: Tensor, quota: Tensor) -> Tensor:
    """Mask of one matrix's block that removes exactly the quota among its live columns."""
    mask = torch.ones_like(keep)
    candidates = scores[:, live]
    lowest = _lowest(candidates.reshape(1, -1), keep[:, live].reshape(1, -1), quota.reshape(1))
    mask[:, live] = lowest.reshape(candidates.shape)
    return mask


def _factor(hessian: Tensor, live: Tensor, percdamp: float, name: str) -> tuple[Tensor, float]:
    """Give U, upper triangular with (H + λI)⁻¹ = UᵀU, and the λ that it took.

    Dead inputs get a one on the diagonal: nothing couples to them.
    """
    mean = float(hessian.diagonal()[live].mean()) if live.any() else 1.0
    damping = percdamp * mean
    for attempt in range(DAMPING_ATTEMPTS + 1):
        damped = hessian.clone()
        damped.diagonal().add_(damping)
        damped.diagonal()[~live] = 1.0
        # H = RRᵀ with R upper triangular is the Cholesky factorisation of H turned upside down, and U = R⁻¹.
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not int(failed) and lower.isfinite().all():
            identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
            return torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True), damping
        if attempt < DAMPING_ATTEMPTS:
            damping = max(10 * damping, 1e-6 * mean)
            logger.warning("The Hessian of %s is not positive definite; raising its damping to %.3g", name, damping)
    raise UserError(
        f"the Hessian of {name} is not positive definite even with damping {damping:.3g}; "
        "calibrate on more or other utterances, or raise calibration.percdamp"
    )
