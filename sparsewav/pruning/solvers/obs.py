"""The OBS sweep: mask a block of columns, remove its weights one column after the other, and update the rest.

The columns are visited from left to right (the order of SparseGPT, Frantar and Alistarh 2023). With H⁻¹ = UᵀU, U upper
triangular, [H⁻¹]_pp of the problem that remains at column p is U_pp², and the update of eq. 1 that compensates for a
removed weight is −(w_p / U_pp) U_p,p: on the columns to its right. This is done within a block of columns; how a block
compensates for all columns before it follows from R = U⁻¹ alone (:mod:`~sparsewav.pruning.solvers.factorization`).

One column of one matrix leaves a GPU idle. There, matrices whose inputs are equally wide are swept as one batch, which
removes a column of all of them at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparsewav.pruning.solvers.factorization import invert_upper
from sparsewav.pruning.solvers.saliency import Block, Score
from sparsewav.pruning.solvers.selection import block_quotas, counts_of_blocks, lowest, mark_lowest, n_of_m
from sparsewav.pruning.solvers.workspace import workspace
from sparsewav.settings.pruning import OBS

COLUMNS = 32
"""Columns that are updated one by one; the rest of the block is updated by one product for all of them."""


@dataclass(frozen=True)
class Problem:
    """Matrices that read the same input, side by side. They lie transposed, so that a column is contiguous in memory.

    Attributes:
        target: T, the weights that minimise the error without any sparsity: the dense weights W, or W plus ``shift``.
        hessian: The Hessian, not damped.
        live: True for inputs that are not always zero.
        factor: R of the damped Hessian.
        damping: λ.
        shift: T − W with the asymmetric objective; None otherwise.
        removed: True where a weight is removed already: by a mask in force, or because its input is dead.
        untouched: Whether no mask in force has removed anything.
        rows: Where each matrix lies.
        sparsities: The sparsity of each matrix.
        covariances: The damped G of each matrix, by which the errors of its outputs are weighted; None where they all
            count alike.
    """

    target: Float[Tensor, "cols rows"]
    hessian: Float[Tensor, "cols cols"]
    live: Bool[Tensor, " cols"]
    factor: Float[Tensor, "cols cols"]
    damping: float
    shift: Float[Tensor, "cols rows"] | None
    removed: Bool[Tensor, "cols rows"]
    untouched: bool
    rows: list[slice]
    sparsities: Sequence[float]
    covariances: Sequence[Float[Tensor, "_rows _rows"]] | None = None


@dataclass(frozen=True)
class _Sweep:
    """The state of a sweep.

    Attributes:
        quotas: The removals in each block of columns, for every matrix.
        chosen: The weights to remove, for every matrix, where they were chosen before the sweep.
        fresh: Whether every weight of a block may still be removed.
        result: The pruned weights in the settled columns; (ΔR)ᵀ in the others, Δ the change of the settled ones.
        increments: What the removals have added to every row's damped objective.
    """

    problem: Problem
    quotas: list[Int[Tensor, " blocks"]]
    chosen: list[Bool[Tensor, "cols _"]] | None
    fresh: bool
    result: Float[Tensor, "cols rows"]
    increments: Float[Tensor, " rows"]


def sweep(
    problems: Sequence[Problem], score: Score, solver: OBS, pattern: tuple[int, int] | None
) -> list[tuple[Float[Tensor, "cols _"], Bool[Tensor, "cols _"], Float[Tensor, " _"]]]:
    """Solve problems that are equally wide in one batched sweep.

    Args:
        problems: They have the same number of columns; their ``removed`` is changed.
        score: The saliency of a block's weights.
        solver: Its block size and comparison group are read.
        pattern: (n, m) to keep n of every m consecutive weights of a row; None for an exact count.

    Returns:
        For each problem the pruned weights, the mask of what was removed, and what each row's removals added to its
        damped objective.
    """
    cols, block_size = len(problems[0].target), solver.block_size
    if pattern:
        block_size = max(block_size // pattern[1], 1) * pattern[1]  # no group of m may lie in two blocks
    sweeps = [_begin(problem, number, block_size, solver.comparison_group) for number, problem in enumerate(problems)]
    for index, start in enumerate(range(0, cols, block_size)):
        span = slice(start, min(start + block_size, cols))
        uppers = [invert_upper(item.problem.factor[span, span]) for item in sweeps]  # U's own block
        for item, upper in zip(sweeps, uppers, strict=True):
            _mask_block(item, upper, span, index, score, solver.comparison_group, pattern)
        blocks = [item.result[span] for item in sweeps]  # views
        masks = [item.problem.removed[span] for item in sweeps]
        if len(blocks) == 1 and blocks[0].device.type == "cpu":
            errors = [_remove(blocks[0], uppers[0], masks[0])]
        else:
            errors = _remove_batched(blocks, uppers, masks)
        for item, block, mask, error in zip(sweeps, blocks, masks, errors, strict=True):
            block.mul_(~mask).add_(0.0)  # faster than masked_fill_; the sum makes 0.0 of -0.0
            item.increments.add_(error.square().sum(0))
            if span.stop < cols:
                item.result[span.stop :].addmm_(
                    item.problem.factor[span, span.stop :].T, block - item.problem.target[span]
                )
    return [(item.result, item.problem.removed, item.increments) for item in sweeps]


def _begin(problem: Problem, number: int, block_size: int, comparison_group: str) -> _Sweep:
    target, live = problem.target, problem.live
    quotas = [
        block_quotas(problem.removed[:, rows], problem.untouched, live, sparsity, block_size)
        for rows, sparsity in zip(problem.rows, problem.sparsities, strict=True)
    ]
    chosen = None if comparison_group == "block" else _lowest_of_matrices(problem, quotas)
    if chosen is not None:
        quotas = [counts_of_blocks(marked & live[:, None], block_size) for marked in chosen]
    return _Sweep(
        problem=problem,
        quotas=quotas,
        chosen=chosen,
        fresh=problem.untouched and bool(live.all()),
        result=workspace(f"result {number}", target.shape, target).zero_(),
        increments=torch.zeros(target.shape[1], dtype=target.dtype, device=target.device),
    )


def _lowest_of_matrices(problem: Problem, quotas: list[Int[Tensor, " blocks"]]) -> list[Bool[Tensor, "cols _"]]:
    """Mark the lowest scores of every matrix before the sweep, as many as its quotas add up to.

    At the dense weights eq. 3's gradient is zero, so that both saliencies are w² / [H⁻¹]_pp.
    """
    inverse_diagonal = invert_upper(problem.factor).square().sum(0)  # H⁻¹ = UᵀU
    chosen = []
    for rows, quota in zip(problem.rows, quotas, strict=True):
        marked = problem.removed[:, rows].clone()
        scores = problem.target[:, rows].square() / inverse_diagonal[:, None]
        mark_lowest(marked, scores, problem.live, int(quota.sum()))
        chosen.append(marked)
    return chosen


def _mask_block(
    item: _Sweep,
    upper: Float[Tensor, "block block"],
    span: slice,
    index: int,
    score: Score,
    comparison_group: str,
    pattern: tuple[int, int] | None,
) -> None:
    """Update the ``index``-th block of columns, ``span``, in place, and mark in ``removed`` which of its weights go.

    ``upper`` is U of the block's columns.
    """
    problem, removed, shift = item.problem, item.problem.removed, item.problem.shift
    block = item.result[span]  # (block, rows), a view; from here on it holds the block's weights
    change = torch.mm(-upper.T, block)  # compensates for the changes of the settled columns
    torch.add(problem.target[span], change, out=block)

    def gradient() -> Tensor:
        # Eq. 3's 2(Ŵ − W)XXᵀ, or 2(ŴX̂ − WX)X̂ᵀ. The columns not settled yet minimise the damped objective, so that the
        # gradient is the negative of the damping term's, −2λ(Ŵ − W).
        return -2 * problem.damping * (change if shift is None else change + shift[span]).T

    pivots, diagonal = upper.diagonal(), problem.hessian.diagonal()[span]
    scores = score(Block(block.T, pivots.square(), diagonal, gradient)).T
    if pattern:
        removed[span] = ~n_of_m(scores.T, ~removed[span].T, *pattern).T
    elif item.chosen is not None and comparison_group == "matrix":
        for rows, marked in zip(problem.rows, item.chosen, strict=True):
            removed[span, rows] = marked[span]
    else:
        for rows, quota in zip(problem.rows, item.quotas, strict=True):
            if item.fresh:
                removed[span, rows] = lowest(scores[:, rows], int(quota[index]))
            else:
                mark_lowest(removed[span, rows], scores[:, rows], problem.live[span], int(quota[index]))


def _remove(
    block: Float[Tensor, "block rows"], upper: Float[Tensor, "block block"], removed: Bool[Tensor, "block rows"]
) -> Float[Tensor, "block rows"]:
    """Remove the weights of a block column by column on the CPU, each time updating the columns to come.

    Args:
        block: The current weights; those that are kept are updated in place.
        upper: U of the block's columns.
        removed: True where a weight is removed.

    Returns:
        w_p / U_pp of every removed weight, zero elsewhere.
    """
    lower = upper.T.contiguous()
    scale = removed / upper.diagonal()[:, None]
    errors = torch.empty_like(block)
    # NumPy's arrays share the tensors' memory; its calls cost half of PyTorch's, and there are thousands.
    arrays: Any = [tensor.numpy() for tensor in (block, lower, scale, errors)]
    weights, coefficients, scales, passed_on = arrays
    for start in range(0, len(block), COLUMNS):
        stop = min(start + COLUMNS, len(block))
        if start:
            block[start:stop].addmm_(lower[start:stop, :start], errors[:start], alpha=-1)
        for column in range(start, stop):
            if column > start:
                weights[column] -= coefficients[column, start:column] @ passed_on[start:column]
            passed_on[column] = weights[column] * scales[column]
    return errors


def _remove_batched(
    blocks: list[Float[Tensor, "block _"]],
    uppers: list[Float[Tensor, "block block"]],
    removed: list[Bool[Tensor, "block _"]],
) -> list[Float[Tensor, "block _"]]:
    """Do what :func:`_remove` does for the blocks of several problems, with two calls for a column of all of them."""
    shape = (len(blocks), len(blocks[0]), max(block.shape[1] for block in blocks))
    weights, scales = blocks[0].new_zeros(shape), blocks[0].new_zeros(shape)
    errors = torch.empty_like(weights)
    for index, (block, upper, mask) in enumerate(zip(blocks, uppers, removed, strict=True)):
        weights[index, :, : block.shape[1]] = block
        scales[index, :, : block.shape[1]] = mask / upper.diagonal()[:, None]
    lower = torch.stack(uppers).transpose(1, 2).contiguous()
    for start in range(0, shape[1], COLUMNS):
        stop = min(start + COLUMNS, shape[1])
        if start:
            weights[:, start:stop].baddbmm_(lower[:, start:stop, :start], errors[:, :start], alpha=-1)
        for column in range(start, stop):
            row = weights[:, column : column + 1]
            if column > start:
                row.baddbmm_(lower[:, column : column + 1, start:column], errors[:, start:column], alpha=-1)
            torch.mul(row, scales[:, column : column + 1], out=errors[:, column : column + 1])
    for index, block in enumerate(blocks):
        block.copy_(weights[index, :, : block.shape[1]])
    return [errors[index, :, : block.shape[1]] for index, block in enumerate(blocks)]
