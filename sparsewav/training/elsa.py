"""A mask that moves: ADMM on the whole model's loss with an exact number of kept weights (ELSA).

Lee et al. 2026 (arXiv 2510.01650) minimise a loss f(x) over all weights x of which at most k are not zero. A copy z has
that many, and the augmented Lagrangian f(x) + λ/2 ||x - z + u||² - λ/2 ||u||² brings the two together:

- x: updates of Adam on f(x) + λ/2 ||x - z + u||², where λ rises from zero along a cosine;
- z: of x + u the k weights whose removal costs most, v (x + u)², over all matrices together, the others zero: the
  nearest such weights in the metric of the diagonal Fisher matrix, of which Adam's second moment v is an estimate;
- u: plus x - z. It is scaled by λ: where λ changes, u goes the other way (Boyd et al. 2011, section 3.4.1).

In the end x becomes its own projection, and the mask stays.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparsewav.pruning.encoder import PrunableMatrix
from sparsewav.pruning.solvers.selection import lowest_together
from sparsewav.settings.recovery import Elsa


def project(
    weights: Sequence[Float[Tensor, "_rows _cols"]], fisher: Sequence[Float[Tensor, "_rows _cols"]], kept: int
) -> list[Bool[Tensor, "_rows _cols"]]:
    """Give the masks of the nearest weights of which so many are kept, over all matrices together.

    The distance is that of a diagonal metric: the sum of ``fisher * (weights - masked)²`` is the least that there is.

    Args:
        weights: The matrices.
        fisher: What a squared change of every weight costs, not negative.
        kept: How many weights are kept; where they tie, the last ones are.

    Returns:
        A boolean mask for every matrix, True where a weight is kept.
    """
    # The root has the same order, and does not underflow.
    scores = [cost.sqrt() * weight.abs() for weight, cost in zip(weights, fisher, strict=True)]
    return [~removed for removed in lowest_together(scores, sum(map(torch.numel, scores)) - kept)]


class SplitWeights(nn.Module):
    """The sparse copies z, the scaled duals u and the masks of a model's matrices, which a checkpoint holds, too.

    Args:
        matrices: Those that were pruned, whose weights x are trained.
        masks: Boolean masks (rows, cols) by their names, True where a weight is kept; they say how many are.
        settings: Penalty, interval and share of the updates in which the masks move.
        updates: All updates.

    Attributes:
        moving: The number of updates in which the masks move.
        kept: The number of weights that are kept, of all matrices.
    """

    def __init__(
        self, matrices: Sequence[PrunableMatrix], masks: Mapping[str, Tensor], settings: Elsa, updates: int
    ) -> None:
        super().__init__()
        self.matrices, self.settings = list(matrices), settings
        self.moving = settings.moving_updates(updates)
        self.kept = sum(int(mask.sum()) for mask in masks.values())
        for index, matrix in enumerate(self.matrices):
            mask = masks[matrix.name].to(matrix.weight.device)
            self.register_buffer(f"mask_{index}", mask.clone())
            self.register_buffer(f"split_{index}", matrix.weight.detach().masked_fill(~mask, 0.0))
            self.register_buffer(f"dual_{index}", torch.zeros_like(matrix.weight.detach()))

    def _all(self, kind: str) -> list[Tensor]:
        return [self.get_buffer(f"{kind}_{index}") for index in range(len(self.matrices))]

    @property
    def masks(self) -> dict[str, Bool[Tensor, "_rows _cols"]]:
        """The masks by matrix, as the last projection left them."""
        return {matrix.name: mask for matrix, mask in zip(self.matrices, self._all("mask"), strict=True)}

    def penalty(self, update: int) -> float:
        """Give λ at an update, of which the first is 1."""
        return self.settings.penalty * (1 - math.cos(math.pi * update / self.moving)) / 2

    @torch.no_grad()
    def penalize(self, update: int) -> None:
        """Add λ (x - z + u), which draws x to z, to the gradients of the loss."""
        before, now = self.penalty(update - 1), self.penalty(update)
        for matrix, split, dual in zip(self.matrices, self._all("split"), self._all("dual"), strict=True):
            gradient = matrix.parameter.grad
            if gradient is not None:
                dual.mul_(before / now)
                gradient.add_((matrix.weight - split + dual).view_as(gradient), alpha=now)

    @torch.no_grad()
    def project(self, moments: Sequence[Tensor]) -> None:
        """Let z be the projection of x + u, and add x - z to u.

        Args:
            moments: Adam's second moment of every matrix.
        """
        duals = self._all("dual")
        sums = [matrix.weight + dual for matrix, dual in zip(self.matrices, duals, strict=True)]
        found = project(sums, [moment.view_as(dual) for moment, dual in zip(moments, duals, strict=True)], self.kept)
        for own, new, weights, split, dual in zip(
            self._all("mask"), found, sums, self._all("split"), duals, strict=True
        ):
            own.copy_(new)
            split.copy_(weights.masked_fill(~new, 0.0))
            dual.copy_(weights - split)

    @torch.no_grad()
    def hold(self) -> None:
        """Set the masked weights of x to zero."""
        for matrix, mask in zip(self.matrices, self._all("mask"), strict=True):
            matrix.weight.masked_fill_(~mask, 0.0)


class MoveMasks(TrainerCallback):
    """Lets the masks move in the first part of a training, and holds them in the rest.

    Within ``with`` masked weights take no gradient in that rest, as with
    :func:`~sparsewav.training.masks.masked_gradients`.
    """

    def __init__(self, weights: SplitWeights) -> None:
        self.weights, self.update = weights, 0

    def __enter__(self) -> Self:
        self.handles = [
            matrix.parameter.register_hook(partial(self._mask, index))
            for index, matrix in enumerate(self.weights.matrices)
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _mask(self, index: int, gradient: Tensor) -> Tensor:
        if self.update <= self.weights.moving:
            return gradient
        return gradient.masked_fill(~self.weights.get_buffer(f"mask_{index}").view_as(gradient), 0.0)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.update = state.global_step + 1

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.update <= self.weights.moving:
            self.weights.penalize(self.update)  # behind the clipping, which is of the loss's gradients alone

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        moving = self.weights.moving
        if self.update < moving and self.update % self.weights.settings.interval:
            return
        if self.update <= moving:
            adam = [kwargs["optimizer"].state[matrix.parameter] for matrix in self.weights.matrices]
            if all(adam):  # float16 may have skipped every update so far, and x is still z
                self.weights.project([state_of["exp_avg_sq"] for state_of in adam])
        if self.update >= moving:
            self.weights.hold()
