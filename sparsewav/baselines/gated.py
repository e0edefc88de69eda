"""A model trained with gates: the Lagrangian that meets the target sparsity, and what the student learns from."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.modeling_outputs import ModelOutput

from sparsewav.baselines.distillation import Frozen, hidden_states, l1_and_cosine, mean_over_frames, valid_frames
from sparsewav.baselines.gates import Gates, encoder_parameters, expected_parameters
from sparsewav.data.batches import Batch

Objective = Callable[[PreTrainedModel, Batch], Tensor]
"""Gives the loss of a student on a batch, a scalar."""

MISSED = 0.02
"""A warning is given where the sparsity that gates have learned misses the target by more than this."""


class Lagrangian(nn.Module):
    """λ1 (s − t) + λ2 (s − t)² for the expected sparsity s and the target t.

    The multipliers ascend while everything else descends, so that they grow for as long as s misses t (Wang et al.,
    "Structured pruning of large language models", 2020).
    """

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Parameter(torch.zeros(()))
        self.quadratic = nn.Parameter(torch.zeros(()))

    def forward(self, sparsity: Tensor, target: float) -> Tensor:
        """Give the penalty, a scalar."""
        gap = sparsity - target
        return self.linear * gap + self.quadratic * gap.square()


class SparseStudent(nn.Module):
    """A model whose gates are asked for a sparsity that rises linearly over the first ``ramp_updates``.

    Attributes:
        update: Number of updates done.
    """

    def __init__(self, student: PreTrainedModel, target: float, ramp_updates: int) -> None:
        super().__init__()
        self.student, self.target, self.ramp_updates = student, target, ramp_updates
        self.update = 0

    def expected_sparsity(self) -> Tensor:
        """Give the sparsity that the gates have now, or are expected to have, a scalar."""
        raise NotImplementedError

    def current_target(self) -> float:
        """Give the sparsity that the penalty asks for at the current update."""
        return self.target * min(1.0, self.update / max(1, self.ramp_updates))


class GatedStudent(SparseStudent):
    """A model with gates, its objective, and the penalty for missing the target sparsity."""

    def __init__(
        self, student: PreTrainedModel, gates: Gates, objective: Objective, target: float, ramp_updates: int
    ) -> None:
        super().__init__(student, target, ramp_updates)
        self.gates, self.objective = gates, objective
        self.lagrangian = Lagrangian()
        self.dense_parameters = encoder_parameters(student)

    def expected_sparsity(self) -> Tensor:
        """Give the share of the encoder's parameters that the gates are expected to remove, a scalar."""
        return 1 - expected_parameters(self.student, self.gates) / self.dense_parameters

    def forward(self, **batch: Tensor) -> ModelOutput:
        """Give the loss of a batch."""
        penalty = self.lagrangian(self.expected_sparsity(), self.current_target())
        return ModelOutput(loss=self.objective(self.student, batch) + penalty)


class FollowTarget(TrainerCallback):
    """Tells a gated student the number of the update, and logs its expected sparsity."""

    def __init__(self, student: SparseStudent) -> None:
        self.student = student

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.student.update = state.global_step

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        state.log_history[-1]["expected_sparsity"] = float(self.student.expected_sparsity().detach())


def ctc_loss(student: PreTrainedModel, batch: Batch) -> Tensor:
    """Give the CTC loss of a batch, the objective without a teacher."""
    return student(**batch).loss


class Distillation(nn.Module):
    """Layer-to-layer distillation of DPHuBERT: L1 distance minus cosine similarity of hidden states at a few layers.

    The first of the layers has a projection of its own, and the others share one. Both start as the identity.

    Args:
        teacher: Dense CTC model. Its parameters take no gradient afterwards.
        layers: 0 for the input of the first transformer layer, i for the output of the i-th.
    """

    def __init__(self, teacher: PreTrainedModel, layers: Sequence[int]) -> None:
        super().__init__()
        self.teacher, self.layers = Frozen(teacher), list(layers)
        width = teacher.config.hidden_size
        self.first, self.others = nn.Linear(width, width), nn.Linear(width, width)
        for projection in (self.first, self.others):
            nn.init.eye_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(self, student: PreTrainedModel, batch: Batch) -> Tensor:
        """Give the loss of a batch over the frames with audio."""
        wanted, found = self.teacher.hidden_states(batch), hidden_states(student, batch)
        valid = valid_frames(student, batch["attention_mask"], found[0].shape[1])
        losses = []
        for place, layer in enumerate(self.layers):
            projected = (self.others if place else self.first)(found[layer])
            distance, cosines = l1_and_cosine(projected, wanted[layer], valid)
            losses.append(distance - mean_over_frames(cosines, valid))
        return torch.stack(losses).mean()


class DistilledStudent(nn.Module):
    """A model without gates, and its objective."""

    def __init__(self, student: PreTrainedModel, objective: Objective) -> None:
        super().__init__()
        self.student, self.objective = student, objective

    def forward(self, **batch: Tensor) -> ModelOutput:
        """Give the loss of a batch."""
        return ModelOutput(loss=self.objective(self.student, batch))


def distilled_layers(depth: int) -> list[int]:
    """Give the layers that are compared: 0, 4, 8 and 12 of 12, and in proportion at other depths."""
    return sorted({round(depth * third / 3) for third in range(4)})
