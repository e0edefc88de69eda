"""What the distilling methods share: hidden states side by side, their valid frames, and losses between them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, Wav2Vec2Processor

from sparsewav.baselines import CompressionReport
from sparsewav.data.batches import Batch, collate
from sparsewav.data.utterances import Utterance
from sparsewav.pruning.encoder import base_of
from sparsewav.settings.baselines import DistilHubertConfig, ThinStudent
from sparsewav.training.trainer import train

BASE_LAYERS, BASE_WIDTH, BASE_UNITS, BASE_HEADS = 12, 768, 3072, 12
"""Size of the teachers that the methods were published for."""


def hidden_states(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, ...]:
    """What every transformer layer of a CTC model reads, and what the CTC head reads: each (batch, frames, width)."""
    output = base_of(model)(batch["input_values"], attention_mask=batch["attention_mask"], output_hidden_states=True)
    return (*output.hidden_states[:-1], output.last_hidden_state)


def valid_frames(model: PreTrainedModel, attention_mask: Tensor, frames: int) -> Tensor:
    """Which frames hold audio: (batch, samples) to a boolean mask (batch, frames)."""
    mask: Any = base_of(model)._get_feature_vector_attention_mask
    return mask(frames, attention_mask).bool()


def mean_over_frames(values: Tensor, valid: Tensor) -> Tensor:
    """Mean of (batch, frames) over the valid frames of a batch."""
    return values.masked_select(valid).mean()


def l1_and_cosine(predicted: Tensor, target: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Mean absolute difference, and cosine similarity frame by frame.

    Args:
        predicted: (batch, frames, width).
        target: the same.
        valid: frames that count, (batch, frames).

    Returns:
        The mean over valid frames and width, and the cosines of all frames, (batch, frames).
    """
    predicted, target = predicted.float(), target.float()
    distance = mean_over_frames((predicted - target).abs().mean(-1), valid)
    return distance, F.cosine_similarity(predicted, target, dim=-1)


class Frozen:
    """Holds a teacher outside of the module that is trained: no gradients, no dropout, not in its checkpoints."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval().requires_grad_(False)

    @torch.no_grad()
    def hidden_states(self, batch: Batch) -> tuple[Tensor, ...]:
        """As :func:`hidden_states`."""
        return hidden_states(self.model, batch)


class GradientScale(nn.Module):
    """Passes its input on, and a share of the gradient back."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, values: Tensor) -> Tensor:
        return values * self.share + values.detach() * (1 - self.share)


@contextmanager
def scaled_front_end_gradient(model: PreTrainedModel, share: float) -> Iterator[None]:
    """Within the block, let so much of the gradient into the convolutions of the front end."""
    scale = GradientScale(share)
    handle = base_of(model).feature_extractor.register_forward_hook(lambda module, inputs, output: scale(output))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def no_masking(model: PreTrainedModel) -> Iterator[None]:
    """Within the block, let a model hear all of its input in all of its layers: no SpecAugment, no LayerDrop."""
    config = model.config
    saved = config.apply_spec_augment, config.layerdrop
    config.apply_spec_augment, config.layerdrop = False, 0.0
    try:
        yield
    finally:
        config.apply_spec_augment, config.layerdrop = saved


def in_proportion(published: int, reference: int, actual: int) -> int:
    """Scale a published size, made for a teacher of a reference size, to the size of another teacher; at least 1."""
    return max(1, round(published * actual / reference))


def layers_in_proportion(published: Sequence[int], depth: int) -> list[int]:
    """Scale numbers of layers of a teacher 12 deep to another depth."""
    return sorted({in_proportion(layer, BASE_LAYERS, depth) for layer in published})


def plain_config(model: PreTrainedModel, **changes: Any) -> PretrainedConfig:
    """A copy of a model's configuration, changed."""
    return type(model.config).from_dict(model.config.to_dict() | changes)


def take_over(student: PreTrainedModel, teacher: PreTrainedModel, *, without: Sequence[str] = ()) -> list[str]:
    """Copy the teacher's parameters into the student wherever name and shape agree.

    Args:
        student: changed in place.
        teacher: where they come from.
        without: parts of names that are left as they are.

    Returns:
        Names of what was copied.
    """
    source = teacher.state_dict()
    own = student.state_dict()
    taken = [
        name
        for name, tensor in own.items()
        if name in source and source[name].shape == tensor.shape and not any(part in name for part in without)
    ]
    student.load_state_dict(own | {name: source[name] for name in taken})
    return taken


def reader(processor: Wav2Vec2Processor) -> Callable[[Sequence[Utterance]], Batch]:
    """What turns the utterances of an update into a batch, for :func:`sparsewav.training.trainer.train`."""
    return lambda utterances: collate(utterances, processor)


def distil(
    distiller: nn.Module,
    processor: Wav2Vec2Processor,
    training_set: Sequence[Utterance],
    settings: DistilHubertConfig | ThinStudent,
    folder: Path,
    facts: dict[str, Any],
    seed: int,
    progress: Callable[[int, int], None] | None,
) -> CompressionReport:
    """Train a module with a ``student`` on its own loss; the student hears all of its input.

    Args:
        distiller: student, teacher and what is between them; changed in place.
        facts: for the report; the rest is as in :class:`~sparsewav.baselines.Method`.
    """
    student: Any = distiller.student
    with no_masking(student), scaled_front_end_gradient(student, settings.front_end_gradient):
        log = train(
            distiller, reader(processor), training_set, settings, settings.updates, folder, seed=seed, progress=progress
        )
    return CompressionReport(
        updates=settings.updates,
        batch_size=settings.batch_size,
        log=[{"phase": "distil", **entry} for entry in log],
        facts=facts,
    )
