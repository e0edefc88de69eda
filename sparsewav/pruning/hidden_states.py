"""Hidden states: what each calibration batch brings to the next layer of the encoder, and how a layer is run on it."""

import inspect
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsewav.errors import UserError
from sparsewav.pruning import distributed
from sparsewav.pruning.batches import as_sequence, model_batches
from sparsewav.pruning.encoder import FRONT, PrunableMatrix, base_of, encoder_layers, frame_counts, run_base
from sparsewav.pruning.families import encoder_config, family_of

try:
    import fcntl
except ImportError:  # on Windows, where nothing tells a killed process's folder from a living one's
    fcntl = None  # type: ignore[assignment]

_PREFIX, _LOCK = "sparsewav-", "lock"


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Give a folder for what a pruning keeps on disk, in the folder for temporary files, and delete it in the end.

    A process holds a lock in its folder, which the system takes from it when it ends: folders that nobody holds are
    those of processes that were killed, and are deleted before.
    """
    _delete_abandoned()
    with TemporaryDirectory(prefix=_PREFIX) as folder:
        # Renamed when it is held, so that nobody takes a folder that is being made for an abandoned one.
        new = Path(folder) / f"{_LOCK}.new"
        with new.open("w") as lock:
            if fcntl:
                fcntl.flock(lock, fcntl.LOCK_EX)
                new.rename(Path(folder) / _LOCK)
            yield Path(folder)


def _delete_abandoned() -> None:
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/{_LOCK}"):
        with suppress(OSError):  # held, of another user, or deleted by another process meanwhile
            handle = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path.parent)
            finally:
                os.close(handle)


def frame_mask_of(model: PreTrainedModel, batch: dict[str, Tensor], layer: int = 0) -> Bool[Tensor, "batch frames"]:
    """Give a mask that is True where an utterance has a frame of a layer's input."""
    counts = frame_counts(model, batch["attention_mask"])
    frames = int(frame_counts(model, torch.ones_like(batch["attention_mask"][:1])))
    mask = torch.arange(frames, device=counts.device) < counts[:, None]
    for halving in _halving_layers(model):
        mask = valid_rows(mask, mask.shape[1] // 2) if halving < layer else mask
    return mask


def layer_masks(model: PreTrainedModel, batch: dict[str, Tensor]) -> dict[int, Bool[Tensor, "_batch _length"]]:
    """Give the mask of :func:`frame_mask_of` for every layer, and that of the model's input for what is in front."""
    first, halving = frame_mask_of(model, batch), _halving_layers(model)
    masks = {
        layer: frame_mask_of(model, batch, layer) if halving else first for layer in range(len(encoder_layers(model)))
    }
    return masks | {FRONT: batch["attention_mask"].bool()}


def _halving_layers(model: PreTrainedModel) -> Sequence[int]:
    setting = family_of(model).halving
    return getattr(encoder_config(model.config), setting) if setting else ()


def valid_rows(
    frame_mask: Bool[Tensor, "batch frames"], length: int, *, positions: bool = False
) -> Bool[Tensor, "batch {length}"]:
    """Tell which rows of a tensor within a layer belong to an utterance.

    Most have a row for each frame of the layer's input. Some are padded on the right to whole blocks of attention, and
    a layer may halve the frames on its way.

    Args:
        frame_mask: True where an utterance has a frame of the layer's input.
        length: The rows of the tensor.
        positions: Whether the tensor may be one of position embeddings: one for each distance of two frames, from
            frames − 1 to 1 − frames, or a table that does not depend on the utterance.
    """
    frames, counts = frame_mask.shape[1], frame_mask.sum(1, keepdim=True)
    if length == frames:
        return frame_mask
    places = torch.arange(length, device=frame_mask.device)[None]
    if positions:
        return ((places - frames + 1).abs() < counts) | (length != 2 * frames - 1)
    return places < (counts if length > frames else counts // 2)


def valid_rows_of(
    matrix: PrunableMatrix, masks: Mapping[int, Bool[Tensor, "_batch _length"]], length: int
) -> Bool[Tensor, "batch {length}"]:
    """Tell which of the rows that a matrix reads belong to an utterance, from the masks of :func:`layer_masks`."""
    mask = masks[matrix.layer]
    if matrix.layer != FRONT:
        return valid_rows(mask, length, positions=matrix.positions)
    return torch.arange(length, device=mask.device) < matrix.count_rows(mask.sum(1, keepdim=True))


def calibration_parts(
    model: PreTrainedModel, batches: Sequence[dict[str, Tensor]]
) -> Iterator[tuple[int, dict[str, Tensor], float]]:
    """Give this process's batches in the form that the model takes (:func:`~sparsewav.pruning.batches.model_batches`).

    Yields:
        A number that identifies the part of a batch, the part, and its share in a sample of the frames of the whole
        set, in which every batch has an equal share.
    """
    for index, batch in distributed.share(batches):
        parts = list(model_batches(model, batch, index))
        frames = [int(frame_counts(model, part["attention_mask"]).sum()) for part in parts]
        for number, (part, count) in enumerate(zip(parts, frames, strict=True)):
            yield 1000 * index + number, part, count / sum(frames) / len(batches)


class StopForward(Exception):
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

    def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = list(inspect.signature(module.forward).parameters)  # some are given by their place
        caught.append((args[0], dict(zip(names[1:], args[1:], strict=False)) | kwargs))
        raise StopForward

    items: list[LayerInputs] = []
    hook = encoder_layers(model)[0].register_forward_pre_hook(catch, with_kwargs=True)
    try:
        for number, part, share in calibration_parts(model, as_sequence(batches)):
            with suppress(StopForward):
                run_base(model, part)
            hidden_states, arguments = caught.pop()
            frame_mask = frame_mask_of(model, part)
            if hidden_states.shape[:2] != frame_mask.shape:
                raise UserError(
                    f"{hidden_states.shape[1]} frames reach the first layer of {type(model).__name__}, where its "
                    f"configuration says {frame_mask.shape[1]}; this model is not supported"
                )
            item = LayerInputs(folder, number, share)
            item.save("hidden_states", hidden_states)
            item.save("others", (arguments, frame_mask))
            items.append(item)
    finally:
        hook.remove()
    return items


def run_layer(
    layer: nn.Module,
    first_layer: nn.Module,
    hidden_states: Float[Tensor, "batch frames width"],
    arguments: dict[str, Any],
) -> Float[Tensor, "batch _frames width"]:
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


def save_next_inputs(
    model: PreTrainedModel, index: int, item: LayerInputs, outputs: dict[str, Float[Tensor, "_batch _frames _width"]]
) -> None:
    """Save what a batch brings to the layer after one, from the outputs of that one.

    Args:
        model: The model.
        index: The index of the layer.
        item: The batch.
        outputs: The layer's outputs, by the pieces ``hidden_states`` and, where the dense model runs beside,
            ``dense_states``.
    """
    between = family_of(model).between
    if between is None:
        item.save("hidden_states", outputs["hidden_states"])
        return
    arguments, frame_mask = item.load("others", model.device)
    changed = arguments
    for piece, output in outputs.items():
        hidden_states, changed = between(base_of(model), index, output, arguments)
        item.save(piece, hidden_states)
    item.save("others", (changed, valid_rows(frame_mask, outputs["hidden_states"].shape[1])))
