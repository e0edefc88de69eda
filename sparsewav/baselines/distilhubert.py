"""DistilHuBERT: a few of the teacher's layers, and heads that predict some of its hidden states (Chang et al. 2022)."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCTC, PreTrainedModel, Wav2Vec2Processor, set_seed

from sparsewav.baselines import CompressionReport
from sparsewav.baselines.distillation import (
    BASE_LAYERS,
    Frozen,
    distil,
    hidden_states,
    in_proportion,
    l1_and_cosine,
    layers_in_proportion,
    mean_over_frames,
    plain_config,
    take_over,
    valid_frames,
)
from sparsewav.data.utterances import Utterance
from sparsewav.settings.baselines import DistilHubertConfig


def make_student(teacher: PreTrainedModel, layers: int) -> PreTrainedModel:
    """The teacher's front end and first layers; the output layer is new, as the student's last layer is another."""
    student = AutoModelForCTC.from_config(plain_config(teacher, num_hidden_layers=layers))
    take_over(student, teacher, without=("lm_head",))
    return student.to(teacher.device)


class Distiller(nn.Module):
    """The student, and a head for each predicted layer: its last hidden state to the teacher's.

    The loss is, averaged over the heads, the mean absolute difference minus λ log σ(cosine).
    """

    def __init__(
        self, student: PreTrainedModel, teacher: Frozen, predicted: Sequence[int], cosine_weight: float
    ) -> None:
        super().__init__()
        width, target = student.config.hidden_size, teacher.model.config.hidden_size
        self.student = student
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, target)) for _ in predicted
        )
        self.teacher = teacher
        self.predicted = list(predicted)
        self.cosine_weight = cosine_weight

    def forward(self, input_values: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        batch = {"input_values": input_values, "attention_mask": attention_mask}
        targets = self.teacher.hidden_states(batch)
        last = hidden_states(self.student, batch)[-1]
        valid = valid_frames(self.student, attention_mask, last.shape[1])
        losses = []
        for head, layer in zip(self.heads, self.predicted, strict=True):
            distance, cosine = l1_and_cosine(head(last), targets[layer], valid)
            losses.append(distance - self.cosine_weight * mean_over_frames(F.logsigmoid(cosine), valid))
        return {"loss": sum(losses, start=last.new_zeros(())) / len(losses)}


def compress(
    dense: PreTrainedModel,
    processor: Wav2Vec2Processor,
    training_set: Sequence[Utterance],
    settings: DistilHubertConfig,
    folder: Path,
    *,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[PreTrainedModel, CompressionReport]:
    """Distil a shallow student; its heads are dropped. Arguments as of :class:`~sparsewav.baselines.Method`."""
    set_seed(seed)
    depth = dense.config.num_hidden_layers
    predicted = layers_in_proportion(settings.predicted, depth)
    student = make_student(dense, in_proportion(settings.layers, BASE_LAYERS, depth))
    distiller = Distiller(student, Frozen(dense), predicted, settings.cosine_weight).to(dense.device)
    facts = {"layers": student.config.num_hidden_layers, "predicted_layers": predicted}
    return student, distil(distiller, processor, training_set, settings, folder, facts, seed, progress)
