"""Masks that hold: pruned weights stay zero while the others are trained."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparsewav.pruning.encoder import PrunableMatrix, prunable_matrices
from sparsewav.settings.pruning import ENCODER, TRANSFORMER


def masks_of(model: PreTrainedModel, scope: str = TRANSFORMER) -> dict[str, Tensor]:
    """Give for every prunable matrix a boolean mask (rows, cols), True where a weight is not zero."""
    return {matrix.name: matrix.weight.detach() != 0 for matrix in prunable_matrices(model, scope)}


def sparsities_of(masks: Mapping[str, Tensor]) -> dict[str, float]:
    """Give for every mask the share of the weights that it removes."""
    return {name: float((~mask).sum()) / mask.numel() for name, mask in masks.items()}


def masked_matrices(model: PreTrainedModel, masks: Mapping[str, Tensor]) -> list[PrunableMatrix]:
    """Give the matrices that have a mask, of whatever scope the masks are."""
    return [matrix for matrix in prunable_matrices(model, ENCODER) if matrix.name in masks]


@contextmanager
def masked_gradients(model: PreTrainedModel, masks: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the block, give masked weights no gradient, and thus no moments of Adam.

    The gradient is masked before it is accumulated or shared between processes. It is filled with zeros and not
    multiplied, so that an overflow of float16 does not become NaN.

    Args:
        model: The model with the masked weights.
        masks: Boolean masks (rows, cols) by matrix, True where a weight is kept.
    """
    handles = [
        matrix.parameter.register_hook(_zero_where(~masks[matrix.name]))
        for matrix in masked_matrices(model, masks)
        if matrix.parameter.requires_grad  # what is frozen gets no gradient
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _zero_where(pruned: Tensor) -> Any:
    return lambda gradient: gradient.masked_fill(pruned.view_as(gradient).to(gradient.device), 0.0)


class HoldMasks(TrainerCallback):
    """Sets masked weights to zero after every update."""

    def __init__(self, model: PreTrainedModel, masks: Mapping[str, Tensor]) -> None:
        self.pruned = [(matrix, ~masks[matrix.name]) for matrix in masked_matrices(model, masks)]

    @torch.no_grad()
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for matrix, pruned in self.pruned:
            matrix.weight.masked_fill_(pruned.to(matrix.weight.device), 0.0)  # the Trainer may have moved the model
