"""The OBS sweep: mask a block of columns, remove its weights one column after the other, and update the rest.

It goes from left to right (the order of SparseGPT, Frantar and Alistarh 2023). With H⁻¹ = UᵀU, U upper triangular,
[H⁻¹]_pp of the problem that remains at column p is U_pp², and the update of eq. 1 that makes up for a removed weight is
−(w_p / U_pp) U_p,p: on the columns at its right. Within a block of columns it is done so; how a block answers to all
columns before it takes R = U⁻¹ alone (:mod:`~sparsewav.pruning.solvers.factorization`).

A GPU is not kept busy by one column of one matrix: there, inputs of the same width are swept in step, and a column of
all of them is removed at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsewav.pruning.solvers.factorization import invert_upper
from sparsewav.pruning.solvers.saliency import Block, Saliency
from sparsewav.pruning.solvers.selection import block_quotas, counts_of_blocks, lowest, mark_lowest, n_of_m
from sparsewav.pruning.solvers.workspace import workspace

COLUMNS = 32
"""So many columns pass their removals on to each other one by one; to the rest of the block one product does."""


@dataclass(frozen=True)
class Problem:
    """Matrices that read the same input, side by side, and transposed: a column is one stretch of memory.

    Attributes:
        weight: shape (cols, rows of all matrices); the solver's own copy.
        hessian: shape (cols, cols), not damped.
        live: inputs that are ever other than zero, shape (cols,).
        factor: R of the damped Hessian, shape (cols, cols).
        damping: λ.
        shift: Tᵀ − Wᵀ where the target T is not the weight itself, shape (cols, rows); None where it is.
        removed: True where a mask in force removed a weight, shape (cols, rows).
        untouched: no mask in force has removed anything.
        rows: of every matrix.
        sparsities: of every matrix.
        method: the saliency.
        n_m: as in :func:`~sparsewav.pruning.solvers.solve.prune_matrix`, and so the rest.
    """

    weight: Tensor
    hessian: Tensor
    live: Tensor
    factor: Tensor
    damping: float
    shift: Tensor | None
    removed: Tensor
    untouched: bool
    rows: list[slice]
    sparsities: Sequence[float]
    method: Saliency
    n_m: tuple[int, int] | None
    block_size: int
    comparison_group: str


@dataclass(frozen=True)
class _Sweep:
    """A sweep under way.

    Attributes:
        dense: what the weights would be if none went, shape (cols, rows).
        quotas: for every matrix the removals of each block of columns, shape (blocks,).
        chosen: for every matrix a mask (cols, rows) of what goes, where that was settled before the sweep.
        fresh: every weight of a block may go.
        result: of the columns settled, what is left of them; of those to come (ΔR)ᵀ, Δ the change of those settled;
            shape (cols, rows).
        increments: of every row's damped objective, shape (rows,).
    """

    problem: Problem
    dense: Tensor
    quotas: list[Tensor]
    chosen: list[Tensor] | None
    fresh: bool
    result: Tensor
    increments: Tensor


def sweep(problems: Sequence[Problem]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Sweep over problems that are equally wide, in step.

    Args:
        problems: with the same number of columns, ``n_m`` and ``block_size``; their ``removed`` is changed.

    Returns:
        For each the weights and the mask of what was removed, both (cols, rows), and what each row's removals added to
        its damped objective, shape (rows,).
    """
    cols, block_size = len(problems[0].weight), _block_size(problems[0])
    sweeps = [_begin(problem, number) for number, problem in enumerate(problems)]
    for index, start in enumerate(range(0, cols, block_size)):
        span = slice(start, min(start + block_size, cols))
        uppers = [invert_upper(item.problem.factor[span, span]) for item in sweeps]  # U's own block
        for item, upper in zip(sweeps, uppers, strict=True):
            _mask_block(item, upper, span, index)
        blocks = [item.result[span] for item in sweeps]  # views
        masks = [item.problem.removed[span] for item in sweeps]
        if len(blocks) == 1 and blocks[0].device.type == "cpu":
            errors = [_remove(blocks[0], uppers[0], masks[0])]
        else:
            errors = _remove_together(blocks, uppers, masks)
        for item, block, mask, error in zip(sweeps, blocks, masks, errors, strict=True):
            block.mul_(~mask).add_(0.0)  # faster than masked_fill_; the sum makes 0.0 of -0.0
            item.increments.add_(error.square().sum(0))
            if span.stop < cols:
                item.result[span.stop :].addmm_(item.problem.factor[span, span.stop :].T, block - item.dense[span])
    return [(item.result, item.problem.removed, item.increments) for item in sweeps]


def _block_size(problem: Problem) -> int:
    if not problem.n_m:
        return problem.block_size
    return max(problem.block_size // problem.n_m[1], 1) * problem.n_m[1]  # no group of m may lie in two blocks


def _begin(problem: Problem, number: int) -> _Sweep:
    removed, live, block_size = problem.removed, problem.live, _block_size(problem)
    dense = problem.weight if problem.shift is None else problem.weight + problem.shift
    quotas = [
        block_quotas(removed[:, rows], problem.untouched, live, sparsity, block_size)
        for rows, sparsity in zip(problem.rows, problem.sparsities, strict=True)
    ]
    all_live = bool(live.all())
    if not all_live:
        dense[~live], removed[~live] = 0, True
    chosen = None if problem.comparison_group == "block" else _lowest_before(problem, dense, quotas)
    if chosen is not None:
        quotas = [counts_of_blocks(marked & live[:, None], block_size) for marked in chosen]
    return _Sweep(
        problem,
        dense,
        quotas,
        chosen,
        problem.untouched and all_live,
        workspace(f"result {number}", dense.shape, dense).zero_(),
        torch.zeros(dense.shape[1], dtype=dense.dtype, device=dense.device),
    )


def _lowest_before(problem: Problem, dense: Tensor, quotas: list[Tensor]) -> list[Tensor]:
    """For every matrix, its lowest scores before anything is removed, as many as its quotas add up to; (cols, rows).

    At the dense weights eq. 3's gradient is zero, so that both saliencies are w² / [H⁻¹]_pp.
    """
    inverse_diagonal = invert_upper(problem.factor).square().sum(0)  # H⁻¹ = UᵀU
    chosen = []
    for rows, quota in zip(problem.rows, quotas, strict=True):
        marked = problem.removed[:, rows].clone()
        scores = dense[:, rows].square() / inverse_diagonal[:, None]
        mark_lowest(marked, scores, problem.live, int(quota.sum()))
        chosen.append(marked)
    return chosen


def _mask_block(item: _Sweep, upper: Tensor, span: slice, index: int) -> None:
    """Bring a block of columns up to date, in place, and mark in ``removed`` which of its weights go.

    Args:
        item: the sweep.
        upper: U of the block's columns, shape (block, block).
        span: the block.
        index: its number.
    """
    problem, removed, shift = item.problem, item.problem.removed, item.problem.shift
    block = item.result[span]  # (block, rows); a view, and from here on the block's weights
    change = torch.mm(-upper.T, block)  # the best for this block after what became of those before it
    torch.add(item.dense[span], change, out=block)

    def gradient() -> Tensor:
        # Eq. 3's 2(Ŵ − W)XXᵀ, or 2(ŴX̂ − WX)X̂ᵀ. What is not settled yet minimises the damped objective, so that
        # λ's part is left, which draws to the dense weights.
        return -2 * problem.damping * (change if shift is None else change + shift[span]).T

    pivots, diagonal = upper.diagonal(), problem.hessian.diagonal()[span]
    scores = problem.method.score(Block(block.T, pivots.square(), diagonal, gradient)).T
    if problem.n_m:
        removed[span] = ~n_of_m(scores.T, ~removed[span].T, *problem.n_m).T
    elif item.chosen is not None and problem.comparison_group == "matrix":
        for rows, marked in zip(problem.rows, item.chosen, strict=True):
            removed[span, rows] = marked[span]
    else:
        for rows, quota in zip(problem.rows, item.quotas, strict=True):
            if item.fresh:
                removed[span, rows] = lowest(scores[:, rows], int(quota[index]))
            else:
                mark_lowest(removed[span, rows], scores[:, rows], problem.live[span], int(quota[index]))


def _remove(block: Tensor, upper: Tensor, removed: Tensor) -> Tensor:
    """Remove the weights of a block column by column, each time updating the columns to come; on the CPU.

    Args:
        block: current weights, shape (block, rows); those that stay hold what is left of them afterwards.
        upper: U of the block's columns, shape (block, block).
        removed: shape (block, rows).

    Returns:
        w_p / U_pp of every removed weight, zero elsewhere; shape (block, rows).
    """
    lower = upper.T.contiguous()
    scale = removed / upper.diagonal()[:, None]
    errors = torch.empty_like(block)
    # The same memory as arrays of numpy: its calls cost half, and there are thousands.
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


def _remove_together(blocks: list[Tensor], uppers: list[Tensor], removed: list[Tensor]) -> list[Tensor]:
    """Do :func:`_remove` for the blocks of several problems, a column of all of them with two calls."""
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
