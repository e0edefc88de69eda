"""Pruning as everyone implements it, for comparison: SparseGPT's loop and a full XXᵀ for every matrix.

Written from the paper's equations 1 and 2 in the order that Frantar and Alistarh (2023) give for them; the mask of a
block has the exact count, where their published loop takes one weight more.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsewav.pruning import estimate_traces, prunable_matrices
from sparsewav.pruning.allocation.rank import allocate_by_rank
from sparsewav.pruning.batches import model_batches
from sparsewav.pruning.encoder import base_of, projections_as_modules

Batch = dict[str, Tensor]


def plain_prune_matrix(
    weight: Tensor, hessian: Tensor, sparsity: float, block_size: int = 128, damping: float = 0.01
) -> Tensor:
    """Prune one matrix by the plain loop.

    Args:
        weight: The dense weight, shape (rows, cols); not changed.
        hessian: XXᵀ, shape (cols, cols); not changed.
        sparsity: Share of every block's weights to prune.
        block_size: Number of columns that are masked together.
        damping: Damping as a share of the mean diagonal.

    Returns:
        The pruned weight, shape (rows, cols).
    """
    cols = weight.shape[1]
    damped = hessian + damping * hessian.diagonal().mean() * torch.eye(cols, dtype=hessian.dtype, device=hessian.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper = torch.linalg.cholesky(inverse, upper=True)  # (cols, cols)
    result = weight.clone()
    for start in range(0, cols, block_size):
        stop = min(start + block_size, cols)
        block, own = result[:, start:stop].clone(), upper[start:stop, start:stop]
        saliency = block.square() / own.diagonal().square()  # (rows, block)
        ordered = saliency.flatten().sort().values
        pruned = saliency <= ordered[round(sparsity * block.numel()) - 1]
        errors = torch.zeros_like(block)
        for column in range(stop - start):
            kept = block[:, column].masked_fill(pruned[:, column], 0.0)
            errors[:, column] = (block[:, column] - kept) / own[column, column]
            block[:, column:] -= errors[:, column, None] @ own[None, column, column:]
            block[:, column] = kept
        result[:, start:stop] = block
        result[:, stop:] -= errors @ upper[start:stop, stop:]
    return result


@torch.no_grad()
def plain_hessians(model: PreTrainedModel, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """XXᵀ of the whole input of every matrix, by name, shape (cols, cols), in one pass and without sharing."""
    hessians: dict[str, Tensor] = {}

    def adder(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            frames = inputs[0].flatten(0, 1)  # (frames, cols)
            if name not in hessians:
                hessians[name] = frames.new_zeros(frames.shape[1], frames.shape[1])
            hessians[name] += frames.T @ frames

        return add

    hooks = [matrix.module.register_forward_pre_hook(adder(matrix.name)) for matrix in prunable_matrices(model)]
    try:
        with projections_as_modules(model):
            forward(model, batches)
    finally:
        for hook in hooks:
            hook.remove()
    return hessians


@torch.no_grad()
def forward(model: PreTrainedModel, batches: Iterable[Batch]) -> None:
    """Run the encoder over batches, the least that any calibration costs."""
    for number, batch in enumerate(batches):
        for part in model_batches(model, batch, number):
            base_of(model)(part["input_values"], attention_mask=part["attention_mask"])


@torch.no_grad()
def plain_solve(model: PreTrainedModel, hessians: dict[str, Tensor], targets: dict[str, float]) -> None:
    """Prune every matrix of a model in place."""
    for matrix in prunable_matrices(model):
        pruned = plain_prune_matrix(matrix.weight.detach(), hessians[matrix.name], targets[matrix.name])
        matrix.weight.data.copy_(pruned)


def plain_prune(model: PreTrainedModel, batches: list[Batch], probed: list[Batch], sparsity: float) -> None:
    """The whole method in place: Hutchinson on all batches of ``probed``, Hessians, ranks, loop."""
    sizes = {matrix.name: matrix.size for matrix in prunable_matrices(model)}
    traces = estimate_traces(model, probed)
    targets = allocate_by_rank(sizes, {name: trace.sensitivity for name, trace in traces.items()}, sparsity)
    plain_solve(model, plain_hessians(model, batches), targets)
