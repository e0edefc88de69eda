"""What the distilling methods share: hidden states side by side, their valid frames, and losses between them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, Wav2Vec2Processor

from sparsewav.data.batches import Batch, collate
from sparsewav.data.utterances import Utterance


def base_of(model: PreTrainedModel) -> Any:
    """The model below the CTC head."""
    return getattr(model, model.base_model_prefix)


def hidden_states(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, ...]:
    """What every transformer layer of a CTC model reads and the last one gives: each (batch, frames, width)."""
    return base_of(model)(
        batch["input_values"], attention_mask=batch["attention_mask"], output_hidden_states=True
    ).hidden_states


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


def reader(processor: Wav2Vec2Processor) -> Callable[[Sequence[Utterance]], Batch]:
    """What turns the utterances of an update into a batch, for :func:`sparsewav.finetune.trainer.train`."""
    return lambda utterances: collate(utterances, processor)
