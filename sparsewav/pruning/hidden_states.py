"""Going through an encoder layer by layer: what every calibration batch brings to the next one, and how it is run."""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsewav.pruning import distributed
from sparsewav.pruning.encoder import base_of, frame_counts, model_batches


def frame_mask_of(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Shape (batch, frames), True where an utterance has a frame."""
    counts = frame_counts(model, batch["attention_mask"])
    frames = int(frame_counts(model, torch.ones_like(batch["attention_mask"][:1])))
    return torch.arange(frames, device=counts.device) < counts[:, None]


def shares_of(model: PreTrainedModel, parts: list[dict[str, Tensor]], batches: int) -> list[float]:
    """Of every part of a batch, in the sample of a set of so many batches."""
    frames = [int(frame_counts(model, part["attention_mask"]).sum()) for part in parts]
    return [count / sum(frames) / batches for count in frames]


class _StopForward(Exception):
    """Raised inside a forward pass that has given what was wanted of it."""


@dataclass(frozen=True)
class LayerInputs:
    """What one batch brings to the next layer; the large pieces lie on disk, so that memory does not grow with the set.

    Attributes:
        folder: holds the hidden states (batch, frames, width) and the layer's other arguments.
        number: of the batch.
        share: of the batch in the sample of frames.
    """

    folder: Path
    number: int
    share: float

    def load(self, piece: str, device: torch.device) -> Any:
        """Read ``hidden_states``, ``others`` (the layer's other arguments, and where there is a frame) or another."""
        return torch.load(self.folder / f"{self.number}-{piece}.pt", map_location=device, weights_only=True)

    def save(self, piece: str, value: Any) -> None:
        """Write a piece that :meth:`load` reads."""
        torch.save(value, self.folder / f"{self.number}-{piece}.pt")


def first_layer_inputs(
    model: PreTrainedModel, layers: nn.ModuleList, batches: Iterable[dict[str, Tensor]], folder: Path
) -> list[LayerInputs]:
    """Run the front end on this process's share of the batches, and keep what reaches the first layer."""
    caught: list[tuple[Tensor, dict[str, Any]]] = []

    def catch(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        caught.append((args[0], kwargs))
        raise _StopForward

    items: list[LayerInputs] = []
    sized: Any = batches if hasattr(batches, "__len__") else list(batches)
    hook = layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    try:
        for index, batch in distributed.share(sized):
            parts = list(model_batches(model, batch))
            for number, (part, share) in enumerate(zip(parts, shares_of(model, parts, len(sized)), strict=True)):
                with suppress(_StopForward):
                    base_of(model)(part["input_values"], attention_mask=part["attention_mask"])
                hidden_states, arguments = caught.pop()
                item = LayerInputs(folder, 1000 * index + number, share)
                item.save("hidden_states", hidden_states)
                item.save("others", (arguments, frame_mask_of(model, part)))
                items.append(item)
    finally:
        hook.remove()
    return items


def run_layer(layer: nn.Module, first_layer: nn.Module, hidden_states: Tensor, arguments: dict[str, Any]) -> Tensor:
    """A layer's output, shape (batch, frames, width); ``arguments`` are those that the first layer was called with."""
    if "position_bias" in arguments and layer is not first_layer:
        # WavLM's first layer makes the position bias that the others take. It is made anew for every batch and layer,
        # because keeping it for a whole calibration set would take (heads x frames²) numbers an utterance.
        batch, frames, _ = hidden_states.shape
        bias = first_layer.attention.compute_bias(frames, frames)  # type: ignore[union-attr,operator]
        arguments = arguments | {"position_bias": bias.repeat(batch, 1, 1)}
    output = layer(hidden_states, **arguments)
    return output[0] if isinstance(output, tuple) else output
