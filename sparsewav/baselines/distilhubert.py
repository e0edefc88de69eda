"""DistilHuBERT: a few of the teacher's layers, and heads that predict some of its hidden states (Chang et al. 2022)."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import AutoModelForCTC, PreTrainedModel

from sparsewav.baselines.distillation import (
    BASE_LAYERS,
    Distiller,
    Frozen,
    changed_config,
    check_teacher,
    in_proportion,
    l1_and_log_cosine,
    valid_frames,
)
from sparsewav.models.load import take_over
from sparsewav.settings.baselines import DistilHuBERT


def make_student(teacher: PreTrainedModel, layers: int) -> PreTrainedModel:
    """Make a model of the teacher's front end and first layers, with a new CTC head."""
    student = AutoModelForCTC.from_config(changed_config(teacher, num_hidden_layers=layers))
    take_over(student, teacher, without=("lm_head",))
    return student.to(teacher.device)


class DistilHubert(Distiller):
    """The student with a head for each predicted layer, which maps its last hidden state to the teacher's.

    The loss is the mean absolute difference minus λ log σ(cosine), averaged over the heads.
    """

    def __init__(
        self, student: PreTrainedModel, teacher: Frozen, predicted: Sequence[int], cosine_weight: float
    ) -> None:
        super().__init__(student, teacher)
        width, target = student.config.hidden_size, teacher.model.config.hidden_size
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, target)) for _ in predicted
        )
        self.predicted = list(predicted)
        self.cosine_weight = cosine_weight

    def loss(self, states: Sequence[Tensor], targets: Sequence[Tensor], attention_mask: Tensor) -> Tensor:
        valid = valid_frames(self.student, attention_mask, states[-1].shape[1])
        predictions = (head(states[-1]) for head in self.heads)
        return l1_and_log_cosine(predictions, (targets[layer] for layer in self.predicted), valid, self.cosine_weight)


def build(teacher: PreTrainedModel, settings: DistilHuBERT) -> tuple[DistilHubert, dict[str, Any]]:
    """Make the student and its loss; see :func:`~sparsewav.baselines.distillation.distilling`."""
    check_teacher(teacher, (), settings.name)
    depth = teacher.config.num_hidden_layers
    predicted = sorted({in_proportion(layer, BASE_LAYERS, depth) for layer in settings.predicted})
    layers = in_proportion(settings.layers, BASE_LAYERS, depth)
    distiller = DistilHubert(make_student(teacher, layers), Frozen(teacher), predicted, settings.cosine_weight)
    return distiller, {"layers": layers, "predicted_layers": predicted}
