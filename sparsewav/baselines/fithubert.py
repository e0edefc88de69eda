"""FitHuBERT: as deep as the teacher and thin, with half the frames and hints at every layer (Lee et al. 2022)."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Wav2Vec2Processor, set_seed

from sparsewav.baselines import CompressionReport
from sparsewav.baselines.deep_vs_wide import thin_sizes
from sparsewav.baselines.distillation import (
    Frozen,
    distil,
    hidden_states,
    mean_over_frames,
    valid_frames,
)
from sparsewav.data.utterances import Utterance
from sparsewav.models.fithubert import FitHubertConfig, FitHubertForCTC, Restoration
from sparsewav.settings.baselines import FitHubertMethod

TIME_REDUCTION = 2

KEPT = (
    *("num_hidden_layers", "feat_extract_norm", "feat_extract_activation", "conv_bias", "num_conv_pos_embeddings"),
    *("do_stable_layer_norm", "layer_norm_eps", "hidden_act", "hidden_dropout", "attention_dropout"),
    *("activation_dropout", "feat_proj_dropout", "final_dropout", "layerdrop", "vocab_size", "pad_token_id"),
    *("bos_token_id", "eos_token_id", "ctc_loss_reduction", "ctc_zero_infinity", "apply_spec_augment"),
    *("mask_time_prob", "mask_time_length", "mask_feature_prob", "mask_feature_length"),
)
"""What the student's configuration has of the teacher's."""


def thin_front_end(widths: Sequence[int], kernels: Sequence[int], strides: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Make the teacher's convolutions narrower, and let them end with the time reduction.

    Published for seven of width 512: the first has a quarter of it, the next four half, the last two all, and where
    that changes a 1 x 1 convolution stands between.

    Args:
        widths: of the teacher's convolutions, and so on.
        kernels: in samples of what each reads.
        strides: likewise.

    Returns:
        ``conv_dim``, ``conv_kernel`` and ``conv_stride`` of the student.
    """
    wide = max(1, round(len(widths) * 2 / 7))
    shares = [4] + [2] * (len(widths) - wide - 1) + [1] * wide
    layers: list[tuple[int, int, int]] = []
    for index, (width, kernel, stride) in enumerate(zip(widths, kernels, strides, strict=True)):
        if index and shares[index] != shares[index - 1]:
            layers.append((width // shares[index], 1, 1))
        layers.append((width // shares[index], kernel, stride))
    layers.append((layers[-1][0], TIME_REDUCTION, TIME_REDUCTION))
    dims, kernel_sizes, steps = zip(*layers, strict=True)
    return {"conv_dim": dims, "conv_kernel": kernel_sizes, "conv_stride": steps}


def make_student(teacher: PreTrainedModel, settings: FitHubertMethod) -> FitHubertForCTC:
    """A new thin model; the output layer is the teacher's, as what it reads is to become the teacher's last layer."""
    config = teacher.config
    options: dict[str, Any] = {
        **{key: getattr(config, key) for key in KEPT},
        **thin_front_end(config.conv_dim, config.conv_kernel, config.conv_stride),
        **thin_sizes(teacher, settings),
        "time_reduction": TIME_REDUCTION,
        "restored_size": config.hidden_size,
    }
    student: Any = FitHubertForCTC(FitHubertConfig(**options))
    student.lm_head.load_state_dict(teacher.lm_head.state_dict())
    return student.to(teacher.device)


class Distiller(nn.Module):
    """The student, and for each of its layers but the last a restoration to the teacher's frames and width.

    The loss is the mean squared error at the last layer, and the sum of those at the others times their weight.
    """

    def __init__(self, student: FitHubertForCTC, teacher: Frozen, hint_weight: float) -> None:
        super().__init__()
        config = student.config
        self.student = student
        self.hints = nn.ModuleList(
            Restoration(config.hidden_size, config.time_reduction, config.restored_size)
            for _ in range(config.num_hidden_layers - 1)
        )
        self.teacher = teacher
        self.hint_weight = hint_weight

    def forward(self, input_values: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        batch = {"input_values": input_values, "attention_mask": attention_mask}
        targets = self.teacher.hidden_states(batch)[1:]
        states = hidden_states(self.student, batch)[1:]
        restorations = [*self.hints, self.student.restoration]
        losses = []
        for restoration, state, target in zip(restorations, states, targets, strict=True):
            restored = restoration(state).float()
            frames = min(restored.shape[1], target.shape[1])  # an odd last frame of the teacher's has no half
            valid = valid_frames(self.teacher.model, attention_mask, target.shape[1])[:, :frames]
            error = (restored[:, :frames] - target[:, :frames].float()).square().mean(-1)
            losses.append(mean_over_frames(error, valid))
        return {"loss": losses[-1] + self.hint_weight * torch.stack(losses[:-1]).sum() if self.hints else losses[-1]}


def compress(
    dense: PreTrainedModel,
    processor: Wav2Vec2Processor,
    training_set: Sequence[Utterance],
    settings: FitHubertMethod,
    folder: Path,
    *,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[PreTrainedModel, CompressionReport]:
    """Distil a thin student; its hints are dropped. Arguments as of :class:`~sparsewav.baselines.Method`."""
    set_seed(seed)
    student = make_student(dense, settings)
    distiller = Distiller(student, Frozen(dense), settings.hint_weight).to(dense.device)
    facts = thin_sizes(dense, settings) | {"front_end": list(student.config.conv_dim)}
    return student, distil(distiller, processor, training_set, settings, folder, facts, seed, progress)
