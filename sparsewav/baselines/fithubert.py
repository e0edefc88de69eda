"""FitHuBERT: as deep as the teacher and thin, with half the frames and hints at every layer (Lee et al. 2022)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsewav.baselines.distillation import (
    Distiller,
    Frozen,
    check_teacher,
    mean_over_frames,
    thin_sizes,
    valid_frames,
)
from sparsewav.models.fithubert import FitHubertConfig, FitHubertForCTC, Restoration
from sparsewav.settings.baselines import FitHuBERT

TIME_REDUCTION = 2

KEPT = (
    *("num_hidden_layers", "feat_extract_norm", "feat_extract_activation", "conv_bias", "num_conv_pos_embeddings"),
    *("do_stable_layer_norm", "layer_norm_eps", "hidden_act", "hidden_dropout", "attention_dropout"),
    *("activation_dropout", "feat_proj_dropout", "final_dropout", "layerdrop", "vocab_size", "pad_token_id"),
    *("bos_token_id", "eos_token_id", "ctc_loss_reduction", "ctc_zero_infinity", "apply_spec_augment"),
    *("mask_time_prob", "mask_time_length", "mask_feature_prob", "mask_feature_length"),
)
"""The keys of the configuration that the student takes over from the teacher."""


def thin_front_end(widths: Sequence[int], kernels: Sequence[int], strides: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Make the teacher's convolutions narrower, and append the time reduction.

    Published for seven convolutions of width 512: the first has a quarter of the width, the next four half of it, the
    last two all of it, and a 1 x 1 convolution stands wherever the share changes.

    Args:
        widths: Channels of each of the teacher's convolutions.
        kernels: Kernel size of each.
        strides: Stride of each.

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


def make_student(teacher: PreTrainedModel, settings: FitHuBERT) -> FitHubertForCTC:
    """Make a new thin model. It has the teacher's CTC head, whose input it learns to reproduce."""
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


class FitHubert(Distiller):
    """The student with a restoration to the teacher's frames and width for each of its layers but the last.

    The loss is the mean squared error at the last layer, plus the sum of those at the other layers times their weight.
    """

    student: FitHubertForCTC

    def __init__(self, student: FitHubertForCTC, teacher: Frozen, hint_weight: float) -> None:
        super().__init__(student, teacher)
        config = student.config
        self.hints = nn.ModuleList(
            Restoration(config.hidden_size, config.time_reduction, config.restored_size)
            for _ in range(config.num_hidden_layers - 1)
        )
        self.hint_weight = hint_weight

    def loss(self, states: Sequence[Tensor], targets: Sequence[Tensor], attention_mask: Tensor) -> Tensor:
        losses = []
        for restoration, state, target in zip(
            [*self.hints, self.student.restoration], states[1:], targets[1:], strict=True
        ):
            restored = restoration(state).float()
            frames = min(restored.shape[1], target.shape[1])  # the student drops an odd last frame
            valid = valid_frames(self.teacher.model, attention_mask, target.shape[1])[:, :frames]
            error = (restored[:, :frames] - target[:, :frames].float()).square().mean(-1)
            losses.append(mean_over_frames(error, valid))
        return losses[-1] + self.hint_weight * torch.stack(losses[:-1]).sum() if self.hints else losses[-1]


def build(teacher: PreTrainedModel, settings: FitHuBERT) -> tuple[FitHubert, dict[str, Any]]:
    """Make the student and its loss; see :func:`~sparsewav.baselines.distillation.distilling`."""
    check_teacher(teacher, KEPT, settings.name)
    student = make_student(teacher, settings)
    facts = thin_sizes(teacher, settings) | {"front_end": list(student.config.conv_dim)}
    return FitHubert(student, Frozen(teacher), settings.hint_weight), facts
