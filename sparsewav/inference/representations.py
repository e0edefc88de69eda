"""How far the hidden states of a pruned encoder are from those of the dense one: what its users read in place of text.

Downstream models (s3prl's SUPERB, DPHuBERT's users) take a weighted sum of all hidden states, so that each counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from sparsewav.data.batches import SpeechBatches
from sparsewav.data.utterances import Utterance
from sparsewav.models.processor import Processor
from sparsewav.pruning.encoder import in_evaluation_mode, input_key
from sparsewav.pruning.hessian import Progress


@dataclass(frozen=True)
class LayerDivergence:
    """The distance of the hidden states behind a layer from the dense encoder's, over all frames of a set.

    Attributes:
        layer: The number of the layer, from 1.
        relative_error: The squared error over the squares of the dense states; 0 is equal.
        cosine_similarity: The mean over the frames; 1 is equal.
    """

    layer: int
    relative_error: float
    cosine_similarity: float


@dataclass(frozen=True)
class Divergence:
    """The distance of an encoder from the dense one.

    Attributes:
        relative_error: That of the last hidden states, over all frames.
        layers: That of every layer.
        utterances: The relative error of the last hidden states of every utterance, in their order.
    """

    relative_error: float
    layers: list[LayerDivergence]
    utterances: list[float]


@torch.inference_mode()
def hidden_state_divergence(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    processor: Processor,
    utterances: Sequence[Utterance],
    seconds_per_batch: float = 60.0,
    progress: Progress | None = None,
) -> Divergence:
    """Compare the hidden states of two encoders of one shape; utterances are never padded, nor their text read.

    Args:
        dense: The encoder that is the reference, without a head.
        pruned: The other one, on the same device.
        processor: The feature extractor of both.
        utterances: Held-out speech.
        seconds_per_batch: Limit of the audio in a batch.
        progress: Called with (batches done, batches) after every batch.
    """
    batches = SpeechBatches(utterances, processor, seconds_per_batch, padding=False)
    sums: Any = 0.0  # squared error, squares and cosines of every layer, shape (layers, 3)
    frames = 0
    of_utterance: dict[int, tuple[float, float]] = {}
    with in_evaluation_mode(dense), in_evaluation_mode(pruned):
        for number, group in enumerate(batches.groups):
            batch = batches[number]
            audio = batch[input_key(dense)][:, : int(batch["attention_mask"].sum(-1).max())]
            outputs = [
                model(audio.to(model.device, model.dtype), output_hidden_states=True) for model in (dense, pruned)
            ]
            layers = list(zip(*(output.hidden_states[1:] for output in outputs), strict=True))
            sums = sums + torch.stack([_compare(*pair).sum(0) for pair in layers])
            frames += outputs[0].hidden_states[-1].shape[:2].numel()
            last = _compare(*(output.last_hidden_state for output in outputs)).tolist()
            of_utterance |= {place: (error, squares) for place, (error, squares, _) in zip(group, last, strict=True)}
            if progress:
                progress(number + 1, len(batches))
    pairs = [of_utterance[place] for place in range(len(utterances))]
    return Divergence(
        sum(error for error, _ in pairs) / sum(squares for _, squares in pairs),
        [
            LayerDivergence(layer, error / squares, cosine / frames)
            for layer, (error, squares, cosine) in enumerate(sums.tolist(), 1)
        ],
        [error / squares for error, squares in pairs],
    )


def _compare(
    dense: Float[Tensor, "batch frames width"], pruned: Float[Tensor, "batch frames width"]
) -> Float[Tensor, "batch 3"]:
    """Give squared error, squares of the dense states, and the sum of the frames' cosines, for every utterance."""
    dense, pruned = dense.double(), pruned.double()
    cosines = torch.nn.functional.cosine_similarity(dense, pruned, dim=-1)
    return torch.stack([(dense - pruned).square().sum((1, 2)), dense.square().sum((1, 2)), cosines.sum(1)], 1)
