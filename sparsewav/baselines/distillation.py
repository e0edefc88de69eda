"""What the distillation methods share: hidden states of teacher and student, losses between them, and the training."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import gcd
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, set_seed

from sparsewav.baselines.method import CompressionReport, Method
from sparsewav.data.batches import Batch, collate
from sparsewav.data.utterances import Utterance
from sparsewav.errors import UserError
from sparsewav.models.processor import Processor
from sparsewav.pruning.encoder import base_of
from sparsewav.pruning.families import FAMILIES, OWN_PREFIX, encoder_config
from sparsewav.pruning.hessian import Progress
from sparsewav.settings.baselines import ThinStudent
from sparsewav.training.trainer import train

BASE_LAYERS, BASE_WIDTH, BASE_UNITS, BASE_HEADS = 12, 768, 3072, 12
"""Size of the teachers that the methods were published for."""


def hidden_states(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, ...]:
    """Give the input of every transformer layer and of the CTC head, each (batch, frames, width)."""
    output = base_of(model)(batch["input_values"], attention_mask=batch["attention_mask"], output_hidden_states=True)
    return (*output.hidden_states[:-1], output.last_hidden_state)


def valid_frames(model: PreTrainedModel, attention_mask: Tensor, frames: int) -> Tensor:
    """Turn a mask of samples, (batch, samples), into a boolean mask of frames with audio, (batch, frames)."""
    mask: Any = base_of(model)._get_feature_vector_attention_mask
    return mask(frames, attention_mask).bool()


def mean_over_frames(values: Tensor, valid: Tensor) -> Tensor:
    """Give the mean of (batch, frames) over the valid frames of a batch."""
    return values.masked_select(valid).mean()


def l1_and_cosine(predicted: Tensor, target: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Give the mean absolute difference, and the cosine similarity frame by frame.

    Args:
        predicted: Shape (batch, frames, width).
        target: Shape (batch, frames, width).
        valid: The frames that count, shape (batch, frames).

    Returns:
        The mean over valid frames and width, and the cosines of all frames, shape (batch, frames).
    """
    predicted, target = predicted.float(), target.float()
    distance = mean_over_frames((predicted - target).abs().mean(-1), valid)
    return distance, F.cosine_similarity(predicted, target, dim=-1)


def l1_and_log_cosine(
    predicted: Iterable[Tensor], targets: Iterable[Tensor], valid: Tensor, cosine_weight: float
) -> Tensor:
    """Give the loss of DistilHuBERT: L1 distance minus λ log σ(cosine), averaged over pairs of hidden states."""
    losses = []
    for prediction, target in zip(predicted, targets, strict=True):
        distance, cosine = l1_and_cosine(prediction, target, valid)
        losses.append(distance - cosine_weight * mean_over_frames(F.logsigmoid(cosine), valid))
    return sum(losses, start=losses[0].new_zeros(())) / len(losses)


class Frozen:
    """Holds a teacher outside the trained module: it has no gradients and no dropout and is in no checkpoint."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval().requires_grad_(False)

    @torch.no_grad()
    def hidden_states(self, batch: Batch) -> tuple[Tensor, ...]:
        """Give the hidden states as :func:`hidden_states` does."""
        return hidden_states(self.model, batch)


class Distiller(nn.Module):
    """A student, layers that only its training needs, and a loss against the hidden states of a frozen teacher."""

    student: PreTrainedModel

    def __init__(self, student: PreTrainedModel, teacher: Frozen) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher

    def forward(self, input_values: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Give the loss of a batch."""
        batch = {"input_values": input_values, "attention_mask": attention_mask}
        targets = self.teacher.hidden_states(batch)
        return {"loss": self.loss(hidden_states(self.student, batch), targets, attention_mask)}

    def loss(self, states: Sequence[Tensor], targets: Sequence[Tensor], attention_mask: Tensor) -> Tensor:
        """Compare the hidden states of the student with those of the teacher."""
        raise NotImplementedError


@contextmanager
def scaled_front_end_gradient(model: PreTrainedModel, share: float) -> Iterator[None]:
    """Within the block, scale the gradient that reaches the convolutions of the front end."""

    def scale(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output * share + output.detach() * (1 - share)

    handle = base_of(model).feature_extractor.register_forward_hook(scale)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def no_masking(model: PreTrainedModel) -> Iterator[None]:
    """Within the block, train a model without SpecAugment and without LayerDrop."""
    # data2vec-audio's configuration need not say the first, and some encoders hold the second themselves.
    parts: list[tuple[Any, str, float]] = [(model.config, "apply_spec_augment", False)]
    for part in (encoder_config(model.config), base_of(model)):
        parts += [(part, "layerdrop", 0.0)] if hasattr(part, "layerdrop") else []
    saved: list[Any] = [getattr(part, key, None) for part, key, _ in parts]
    for part, key, value in parts:
        setattr(part, key, value)
    try:
        yield
    finally:
        for (part, key, _), before in zip(parts, saved, strict=True):
            delattr(part, key) if before is None else setattr(part, key, before)


def check_teacher(model: PreTrainedModel, needed: Sequence[str], method: str) -> None:
    """Refuse a teacher that a distillation was not made for.

    Args:
        model: The teacher.
        needed: The keys of its configuration that the method reads.
        method: The name of the method.

    Raises:
        UserError: It has no front end of convolutions over samples, makes other numbers of frames in its layers than in
            the front end, or lacks one of the keys.
    """
    kind, plain = model.config.model_type, FAMILIES["wav2vec2"]
    suits = [
        name
        for name, family in FAMILIES.items()
        if (family.front, family.frames) == (plain.front, plain.frames)
        and all(hasattr(AutoConfig.for_model(name), key) for key in needed)
    ]
    if kind in suits or kind.startswith(OWN_PREFIX):
        return
    raise UserError(
        f"method={method} makes a student of wav2vec 2.0's form, which a model of the family {kind!r} does not have; "
        f"choose a model of {', '.join(suits)}, or method=magnitude or parp"
    )


def in_proportion(published: int, reference: int, actual: int) -> int:
    """Scale a size published for a teacher of a reference size to the size of another teacher; at least 1."""
    return max(1, round(published * actual / reference))


def thin_sizes(teacher: PreTrainedModel, settings: ThinStudent) -> dict[str, int]:
    """Give a thin student's sizes in proportion to the teacher's, with a width that is a multiple of the heads."""
    config = teacher.config
    heads = in_proportion(settings.heads, BASE_HEADS, config.num_attention_heads)
    width = in_proportion(settings.width, BASE_WIDTH * heads, config.hidden_size) * heads
    return {
        "hidden_size": width,
        "intermediate_size": in_proportion(settings.units, BASE_UNITS, config.intermediate_size),
        "num_attention_heads": heads,
        "num_conv_pos_embedding_groups": gcd(config.num_conv_pos_embedding_groups, width),
    }


def changed_config(model: PreTrainedModel, **changes: Any) -> PretrainedConfig:
    """Give a copy of a model's configuration with changes."""
    return type(model.config).from_dict(model.config.to_dict() | changes)


def distilling(build: Callable[[PreTrainedModel, Any], tuple[Distiller, dict[str, Any]]]) -> Method:
    """Make a compression method out of a function that builds a student and its loss.

    The student is trained without masking, and what only its training needs is dropped.

    Args:
        build: Takes the dense model and the method's settings; gives the module to train, and facts for the report.
    """

    def compress(
        dense: PreTrainedModel,
        processor: Processor,
        training_set: Sequence[Utterance],
        settings: Any,
        folder: Path,
        *,
        seed: int,
        progress: Progress | None = None,
    ) -> tuple[PreTrainedModel, CompressionReport]:
        set_seed(seed)
        distiller, facts = build(dense, settings)
        distiller.to(dense.device)
        student, updates = distiller.student, settings.updates
        read = partial(collate, processor=processor)
        with no_masking(student), scaled_front_end_gradient(student, settings.front_end_gradient):
            frozen = [distiller.teacher.model]
            log = train(
                *(distiller, read, training_set, settings, updates, folder),
                seed=seed,
                frozen=frozen,
                progress=progress,
            )
        entries = [{"phase": "distil", **entry} for entry in log]
        return student, CompressionReport(updates, settings.batch_size, log=entries, facts=facts)

    return compress
