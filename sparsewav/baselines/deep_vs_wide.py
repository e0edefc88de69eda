"""12-Layer Half: as deep as the teacher at half its width, distilled layer by layer (Ashihara et al. 2022)."""

from collections.abc import Callable, Sequence
from math import gcd
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCTC, PreTrainedModel, Wav2Vec2Processor, set_seed

from sparsewav.baselines import CompressionReport
from sparsewav.baselines.distillation import (
    BASE_HEADS,
    BASE_UNITS,
    BASE_WIDTH,
    Frozen,
    distil,
    hidden_states,
    in_proportion,
    l1_and_cosine,
    mean_over_frames,
    plain_config,
    take_over,
    valid_frames,
)
from sparsewav.data.utterances import Utterance
from sparsewav.settings.baselines import DeepVersusWideConfig, ThinStudent


def thin_sizes(teacher: PreTrainedModel, settings: ThinStudent) -> dict[str, int]:
    """The student's sizes, in proportion to the teacher's; the width is made a multiple of the heads."""
    config = teacher.config
    heads = in_proportion(settings.heads, BASE_HEADS, config.num_attention_heads)
    width = in_proportion(settings.width, BASE_WIDTH * heads, config.hidden_size) * heads
    return {
        "hidden_size": width,
        "intermediate_size": in_proportion(settings.units, BASE_UNITS, config.intermediate_size),
        "num_attention_heads": heads,
        "num_conv_pos_embedding_groups": gcd(config.num_conv_pos_embedding_groups, width),
    }


def make_student(teacher: PreTrainedModel, settings: DeepVersusWideConfig) -> PreTrainedModel:
    """The teacher's convolutions, and a new transformer of all its layers, narrower."""
    student = AutoModelForCTC.from_config(plain_config(teacher, **thin_sizes(teacher, settings)))
    take_over(student, teacher, without=("encoder", "lm_head"))
    return student.to(teacher.device)


class Distiller(nn.Module):
    """The student, and for each layer a linear projection to the teacher's width, compared with its layer.

    The loss is, averaged over the layers, the mean absolute difference minus λ log σ(cosine).
    """

    def __init__(self, student: PreTrainedModel, teacher: Frozen, cosine_weight: float) -> None:
        super().__init__()
        width, target = student.config.hidden_size, teacher.model.config.hidden_size
        self.student = student
        self.projections = nn.ModuleList(nn.Linear(width, target) for _ in range(student.config.num_hidden_layers))
        self.teacher = teacher
        self.cosine_weight = cosine_weight

    def forward(self, input_values: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        batch = {"input_values": input_values, "attention_mask": attention_mask}
        targets = self.teacher.hidden_states(batch)[1:]
        states = hidden_states(self.student, batch)[1:]
        valid = valid_frames(self.student, attention_mask, states[0].shape[1])
        losses = []
        for projection, state, target in zip(self.projections, states, targets, strict=True):
            distance, cosine = l1_and_cosine(projection(state), target, valid)
            losses.append(distance - self.cosine_weight * mean_over_frames(F.logsigmoid(cosine), valid))
        return {"loss": sum(losses, start=states[0].new_zeros(())) / len(losses)}


def compress(
    dense: PreTrainedModel,
    processor: Wav2Vec2Processor,
    training_set: Sequence[Utterance],
    settings: DeepVersusWideConfig,
    folder: Path,
    *,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[PreTrainedModel, CompressionReport]:
    """Distil a thin student; its projections are dropped. Arguments as of :class:`~sparsewav.baselines.Method`."""
    set_seed(seed)
    student = make_student(dense, settings)
    distiller = Distiller(student, Frozen(dense), settings.cosine_weight).to(dense.device)
    facts = thin_sizes(dense, settings)
    return student, distil(distiller, processor, training_set, settings, folder, facts, seed, progress)
