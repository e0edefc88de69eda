"""Training with gates until the expected sparsity is the target's, then cutting, then training what is left."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.modeling_outputs import ModelOutput

from sparsewav.baselines.distillation import (
    Frozen,
    hidden_states,
    l1_and_cosine,
    mean_over_frames,
    valid_frames,
)
from sparsewav.baselines.gates import Gates, encoder_parameters, expected_parameters
from sparsewav.data.batches import Batch

Objective = Callable[[PreTrainedModel, Batch], Tensor]
"""What a student is to make small on a batch; a scalar."""


class Lagrangian(nn.Module):
    """λ1 (s − t) + λ2 (s − t)² for the expected sparsity s and the target t.

    The multipliers climb where everything else descends, so that they grow for as long as s misses t (Wang et al.,
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


class GatedStudent(nn.Module):
    """A model with gates, the objective it trains for, and the penalty for missing the target sparsity.

    Attributes:
        update: how many updates are done; the target rises linearly over the first ``ramp_updates``.
    """

    def __init__(
        self, student: PreTrainedModel, gates: Gates, objective: Objective, target: float, ramp_updates: int
    ) -> None:
        super().__init__()
        self.student, self.gates, self.objective = student, gates, objective
        self.lagrangian = Lagrangian()
        self.target, self.ramp_updates = target, ramp_updates
        self.dense_parameters = encoder_parameters(student)
        self.update = 0

    def expected_sparsity(self) -> Tensor:
        """Share of the encoder's parameters that the gates are expected to remove; a scalar."""
        return 1 - expected_parameters(self.student, self.gates) / self.dense_parameters

    def current_target(self) -> float:
        """Sparsity that the penalty asks for at the present update."""
        return self.target * min(1.0, self.update / max(1, self.ramp_updates))

    def forward(self, **batch: Tensor) -> ModelOutput:
        """Give the loss of a batch."""
        penalty = self.lagrangian(self.expected_sparsity(), self.current_target())
        return ModelOutput(loss=self.objective(self.student, batch) + penalty)


class FollowTarget(TrainerCallback):
    """Tells a gated student the number of the update, and logs its expected sparsity."""

    def __init__(self, student: GatedStudent) -> None:
        self.student = student

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.student.update = state.global_step

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        state.log_history[-1]["expected_sparsity"] = float(self.student.expected_sparsity().detach())


def ctc_loss(student: PreTrainedModel, batch: Batch) -> Tensor:
    """CTC loss of a batch, the objective without a teacher."""
    return student(**batch).loss


class Distillation(nn.Module):
    """Layer-to-layer distillation of DPHuBERT: L1 distance minus cosine of hidden states, at a few layers.

    The first of the layers is projected by a matrix of its own, the others share one; both start as the identity.
    """

    def __init__(self, teacher: PreTrainedModel, layers: Sequence[int]) -> None:
        """Make the objective.

        Args:
            teacher: dense CTC model; its parameters take no gradient any more.
            layers: 0 for what enters the first transformer layer, i for what leaves the i-th.
        """
        super().__init__()
        self.teacher, self.layers = Frozen(teacher), list(layers)
        width = teacher.config.hidden_size
        self.first, self.others = nn.Linear(width, width), nn.Linear(width, width)
        for projection in (self.first, self.others):
            nn.init.eye_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(self, student: PreTrainedModel, batch: Batch) -> Tensor:
        """Give the loss of a batch, over frames with audio."""
        wanted, found = self.teacher.hidden_states(batch), hidden_states(student, batch)
        valid = valid_frames(student, batch["attention_mask"], found[0].shape[1])
        losses = []
        for place, layer in enumerate(self.layers):
            projected = (self.others if place else self.first)(found[layer])
            distance, cosines = l1_and_cosine(projected, wanted[layer], valid)
            losses.append(distance - mean_over_frames(cosines, valid))
        return torch.stack(losses).mean()


class DistilledStudent(nn.Module):
    """A model without gates and the objective it trains for."""

    def __init__(self, student: PreTrainedModel, objective: Objective) -> None:
        super().__init__()
        self.student, self.objective = student, objective

    def forward(self, **batch: Tensor) -> ModelOutput:
        """Give the loss of a batch."""
        return ModelOutput(loss=self.objective(self.student, batch))


def distilled_layers(depth: int) -> list[int]:
    """Layers that are compared: 0, 4, 8, 12 of 12, and in proportion at other depths."""
    return sorted({round(depth * third / 3) for third in range(4)})


@contextmanager
def undisturbed(model: PreTrainedModel) -> Iterator[None]:
    """Within the block, mask no spans and skip no layers in training: the teacher does neither."""
    config: Any = model.config
    before = config.apply_spec_augment, config.layerdrop
    config.apply_spec_augment, config.layerdrop = False, 0.0
    try:
        yield
    finally:
        config.apply_spec_augment, config.layerdrop = before
