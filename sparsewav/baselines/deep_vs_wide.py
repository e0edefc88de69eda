"""12-Layer Half: as deep as the teacher at half its width, distilled layer by layer (Ashihara et al. 2022)."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import AutoModelForCTC, PreTrainedModel

from sparsewav.baselines.distillation import (
    Distiller,
    Frozen,
    changed_config,
    check_teacher,
    l1_and_log_cosine,
    thin_sizes,
    valid_frames,
)
from sparsewav.models.load import take_over
from sparsewav.settings.baselines import DeepVersusWide, ThinStudent


def make_student(teacher: PreTrainedModel, settings: ThinStudent) -> PreTrainedModel:
    """Make a model of the teacher's convolutions and a new transformer, as deep as the teacher's and narrower."""
    student = AutoModelForCTC.from_config(changed_config(teacher, **thin_sizes(teacher, settings)))
    take_over(student, teacher, without=("encoder", "lm_head"))
    return student.to(teacher.device)


class LayerwiseDistiller(Distiller):
    """The student with a linear projection to the teacher's width for each layer, compared with the same layer.

    The loss is the mean absolute difference minus λ log σ(cosine), averaged over the layers.
    """

    def __init__(self, student: PreTrainedModel, teacher: Frozen, cosine_weight: float) -> None:
        super().__init__(student, teacher)
        width, target = student.config.hidden_size, teacher.model.config.hidden_size
        self.projections = nn.ModuleList(nn.Linear(width, target) for _ in range(student.config.num_hidden_layers))
        self.cosine_weight = cosine_weight

    def loss(self, states: Sequence[Tensor], targets: Sequence[Tensor], attention_mask: Tensor) -> Tensor:
        valid = valid_frames(self.student, attention_mask, states[1].shape[1])
        predictions = (projection(state) for projection, state in zip(self.projections, states[1:], strict=True))
        return l1_and_log_cosine(predictions, targets[1:], valid, self.cosine_weight)


def build(teacher: PreTrainedModel, settings: DeepVersusWide) -> tuple[LayerwiseDistiller, dict[str, Any]]:
    """Make the student and its loss; see :func:`~sparsewav.baselines.distillation.distilling`."""
    check_teacher(teacher, (), settings.name)
    distiller = LayerwiseDistiller(make_student(teacher, settings), Frozen(teacher), settings.cosine_weight)
    return distiller, thin_sizes(teacher, settings)
