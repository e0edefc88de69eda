"""Masks that hold: what was pruned stays zero while the rest is trained."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparsewav.pruning.encoder import prunable_matrices


def masks_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """Read the masks off a pruned model.

    Returns:
        For every prunable matrix a boolean mask (rows, cols), True where a weight is not zero.
    """
    return {matrix.name: matrix.weight.detach() != 0 for matrix in prunable_matrices(model)}


@contextmanager
def masked_gradients(model: PreTrainedModel, masks: Mapping[str, Tensor]) -> Iterator[None]:
    """Give masked weights no gradient within the block, and so no moment of Adam's either.

    The gradient is masked before it is accumulated or shared between processes. It is filled with zeros, not
    multiplied: an overflow of float16 must not become NaN.

    Args:
        model: whose weights are masked.
        masks: for every matrix a boolean mask (rows, cols), True where a weight stays.
    """
    handles = [
        matrix.weight.register_hook(_zero_where(~masks[matrix.name]))
        for matrix in prunable_matrices(model)
        if matrix.name in masks
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _zero_where(pruned: Tensor) -> Any:
    return lambda gradient: gradient.masked_fill(pruned.to(gradient.device), 0.0)


class HoldMasks(TrainerCallback):
    """Sets masked weights to zero after every update, whatever the optimizer made of them."""

    def __init__(self, model: PreTrainedModel, masks: Mapping[str, Tensor]) -> None:
        self.pruned = [
            (matrix.weight, ~masks[matrix.name]) for matrix in prunable_matrices(model) if matrix.name in masks
        ]

    @torch.no_grad()
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for weight, pruned in self.pruned:
            weight.masked_fill_(pruned.to(weight.device), 0.0)  # the Trainer may have moved the model
