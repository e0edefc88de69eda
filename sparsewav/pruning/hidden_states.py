"""Hidden states: what each calibration batch brings to the next layer of the encoder, and how a layer is run on it."""

import os
import platform
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsewav.pruning import distributed
from sparsewav.pruning.encoder import as_sequence, base_of, encoder_layers, frame_counts, model_batches


def frame_mask_of(model: PreTrainedModel, batch: dict[str, Tensor]) -> Bool[Tensor, "batch frames"]:
    """Give a mask that is True where an utterance has a frame of the encoder."""
    counts = frame_counts(model, batch["attention_mask"])
    frames = int(frame_counts(model, torch.ones_like(batch["attention_mask"][:1])))
    return torch.arange(frames, device=counts.device) < counts[:, None]


def calibration_parts(
    model: PreTrainedModel, batches: Sequence[dict[str, Tensor]]
) -> Iterator[tuple[int, dict[str, Tensor], float]]:
    """Give this process's batches in the form that the model takes (:func:`~sparsewav.pruning.encoder.model_batches`).

    Yields:
        A number that identifies the part of a batch, the part, and its share in a sample of the frames of the whole
        set, in which every batch has an equal share.
    """
    for index, batch in distributed.share(batches):
        parts = list(model_batches(model, batch))
        frames = [int(frame_counts(model, part["attention_mask"]).sum()) for part in parts]
        for number, (part, count) in enumerate(zip(parts, frames, strict=True)):
            yield 1000 * index + number, part, count / sum(frames) / len(batches)


def temporary_folder() -> TemporaryDirectory[str]:
    """Make a folder that is deleted in the end; its name says whose it is, should its process be killed."""
    return TemporaryDirectory(prefix=f"sparsewav-{platform.node()}-{os.getpid()}-")


class _StopForward(Exception):
    """Raised to end a forward pass whose remainder is not needed."""


@dataclass(frozen=True)
class LayerInputs:
    """What one batch brings to the next layer.

    The large pieces lie on disk, so that memory does not grow with the set. They are the hidden states (batch, frames,
    width), the layer's other arguments and, where the dense model runs beside, its hidden states.

    Attributes:
        folder: The folder of the pieces.
        number: The number of the batch.
        share: The share of the batch in the sample of frames.
    """

    folder: Path
    number: int
    share: float

    def load(self, piece: str, device: torch.device) -> Any:
        """Read a piece: ``hidden_states``, ``dense_states``, or ``others`` for the arguments and the frame mask."""
        return torch.load(self.folder / f"{self.number}-{piece}.pt", map_location=device, weights_only=True)

    def save(self, piece: str, value: Any) -> None:
        """Write a piece that :meth:`load` reads."""
        torch.save(value, self.folder / f"{self.number}-{piece}.pt")


def first_layer_inputs(model: PreTrainedModel, batches: Iterable[dict[str, Tensor]], folder: Path) -> list[LayerInputs]:
    """Run the front end on this process's share of the batches, and save what reaches the first layer."""
    caught: list[tuple[Tensor, dict[str, Any]]] = []

    def catch(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        caught.append((args[0], kwargs))
        raise _StopForward

    items: list[LayerInputs] = []
    hook = encoder_layers(model)[0].register_forward_pre_hook(catch, with_kwargs=True)
    try:
        for number, part, share in calibration_parts(model, as_sequence(batches)):
            with suppress(_StopForward):
                base_of(model)(part["input_values"], attention_mask=part["attention_mask"])
            hidden_states, arguments = caught.pop()
            item = LayerInputs(folder, number, share)
            item.save("hidden_states", hidden_states)
            item.save("others", (arguments, frame_mask_of(model, part)))
            items.append(item)
    finally:
        hook.remove()
    return items


def run_layer(
    layer: nn.Module,
    first_layer: nn.Module,
    hidden_states: Float[Tensor, "batch frames width"],
    arguments: dict[str, Any],
) -> Float[Tensor, "batch frames width"]:
    """Give a layer's output.

    Args:
        layer: The layer to run.
        first_layer: The model's first layer, which has WavLM's position embedding.
        hidden_states: The layer's input.
        arguments: The other arguments that the first layer was called with.
    """
    if "position_bias" in arguments and layer is not first_layer:
        # WavLM's first layer computes the position bias that the others take. It is computed again for every batch and
        # layer, because keeping it for a whole calibration set would take (heads x frames²) numbers an utterance.
        batch, frames, _ = hidden_states.shape
        bias = first_layer.attention.compute_bias(frames, frames)  # type: ignore[union-attr,operator]
        arguments = arguments | {"position_bias": bias.repeat(batch, 1, 1)}
    output = layer(hidden_states, **arguments)
    return output[0] if isinstance(output, tuple) else output
