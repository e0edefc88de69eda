"""Calibration: the layer-wise Hessian H = XXᵀ of every prunable matrix (eq. 2 of the paper).

X is the matrix's input over the calibration set, one column a frame; padded frames never count. Matrices that read the
very same tensor (query, key and value) share one Hessian. H is symmetric, so that the blocks above its diagonal are
summed alone; and it is known well enough from some frames for each of its columns, so that of a large set a random
sample of frames will do, while every utterance has its part in it.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsewav.errors import UserError
from sparsewav.pruning import processes
from sparsewav.pruning.encoder import (
    PrunableMatrix,
    encoder_layers,
    frame_counts,
    model_batches,
    projections_as_modules,
    prunable_matrices,
)

Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""

AroundLayer = Callable[[int], AbstractContextManager[object]]
"""Called with a layer's index; the layer has its weights within the block that it gives, and need not outside."""

BLOCK = 384
"""Columns of a Hessian that are summed in one product."""
WAITING_FRAMES = 512
"""Frames that are gathered before they are multiplied: fewer would be slower than the memory that holds H."""


@dataclass
class Calibration:
    """Hessians of the prunable matrices.

    Attributes:
        hessians: one for each distinct input, shape (cols, cols), float32, keyed by the first matrix that reads it.
        reads: for every matrix the key of its Hessian.
        frames: how many frames the calibration set has.
        sampled: how many of them each Hessian was summed over, by its key; the sum is scaled to all.
    """

    hessians: dict[str, Tensor] = field(default_factory=dict)
    reads: dict[str, str] = field(default_factory=dict)
    frames: int = 0
    sampled: dict[str, int] = field(default_factory=dict)

    def hessian(self, name: str) -> Tensor:
        """The Hessian of a matrix, by the matrix's name; shape (cols, cols)."""
        return self.hessians[self.reads[name]]

    def groups(self) -> dict[str, list[str]]:
        """Names of the matrices that share each Hessian, by its key."""
        groups: dict[str, list[str]] = {key: [] for key in self.hessians}
        for name, key in self.reads.items():
            groups[key].append(name)
        return groups


class _Sum:
    """XXᵀ, summed block by block above the diagonal as frames come in."""

    def __init__(self, cols: int, device: torch.device) -> None:
        self.hessian = torch.zeros(cols, cols, dtype=torch.float32, device=device)
        self.frames = 0
        self._waiting: list[Tensor] = []

    def add(self, frames: Tensor) -> None:
        """Add frames, shape (frames, cols)."""
        self.frames += len(frames)
        self._waiting.append(frames)
        if sum(map(len, self._waiting)) >= WAITING_FRAMES:
            self._multiply()

    def finish(self) -> Tensor:
        """The sum, both halves; shape (cols, cols)."""
        self._multiply()
        for start in range(0, len(self.hessian), BLOCK):
            stop = min(start + BLOCK, len(self.hessian))
            self.hessian[stop:, start:stop] = self.hessian[start:stop, stop:].T
            corner = self.hessian[start:stop, start:stop]
            corner.copy_(corner.triu() + corner.triu(1).T)  # symmetric to the last bit
        return self.hessian

    def _multiply(self) -> None:
        if not self._waiting:
            return
        frames = torch.cat(self._waiting)
        self._waiting.clear()
        for start in range(0, len(self.hessian), BLOCK):
            stop = min(start + BLOCK, len(self.hessian))
            self.hessian[start:stop, start:].addmm_(frames[:, start:stop].T, frames[:, start:])


class _Observer:
    """Adds the frames that reach some matrices to their Hessians."""

    def __init__(self, matrices: list[PrunableMatrix], frames_per_column: float | None, seed: int) -> None:
        self.matrices = matrices
        self.frames_per_column = frames_per_column
        self.seed = seed
        self.frames = 0
        self.reads: dict[str, str] = {}
        self._sums: dict[str, _Sum] = {}
        self._seen: dict[int, tuple[str, Tensor]] = {}
        self._layer: int | None = None
        self._order = torch.empty(0, dtype=torch.long)  # places of the batch's frames, shuffled where they are sampled
        self._share = 0.0

    @contextmanager
    def attached(self) -> Iterator[None]:
        hooks = [matrix.module.register_forward_pre_hook(self._hook_of(matrix)) for matrix in self.matrices]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def start_batch(self, frame_mask: Tensor, number: int, share: float) -> None:
        """Get ready for a batch.

        Args:
            frame_mask: shape (batch, frames), True where an utterance has a frame.
            number: of the batch; with the seed it settles which frames are taken.
            share: of the batch in the whole set's sample.
        """
        self._order = frame_mask.flatten().nonzero().flatten()
        if self.frames_per_column is not None:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
            shuffled = torch.randperm(len(self._order), generator=generator)
            self._order = self._order[shuffled.to(self._order.device)]
        self.frames += len(self._order)
        self._share = share

    def end_batch(self) -> None:
        self._seen.clear()

    def finish(self) -> Calibration:
        """Give the Hessians, summed over the processes.

        Raises:
            UserError: there was no frame, or an activation that is not finite.
        """
        found = processes.gather((self.frames, self.reads, {name: total.frames for name, total in self._sums.items()}))
        frames = sum(count for count, _, _ in found)
        if frames == 0:
            raise UserError("the calibration set is empty; give at least one utterance")
        # A process that had no batch saw nothing read, the others saw the same.
        calibration = Calibration(reads=next(reads for _, reads, _ in found if reads), frames=frames)
        modules = {matrix.name: matrix.module for matrix in self.matrices}
        for name in dict.fromkeys(calibration.reads.values()):
            weight = modules[name].weight
            total = self._sums.get(name) or _Sum(weight.shape[1], weight.device)
            calibration.hessians[name] = total.finish()
            processes.add_up(calibration.hessians[name])
            calibration.sampled[name] = sum(sampled.get(name, 0) for _, _, sampled in found)
            if not calibration.hessians[name].isfinite().all():
                raise UserError(
                    f"the inputs of {name} on the calibration set are NaN or infinite; "
                    "check the model's weights, or load it in float32"
                )
        return calibration

    def _hook_of(self, matrix: PrunableMatrix) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._observe(matrix.name, matrix.layer, inputs[0])

        return hook

    def _observe(self, name: str, layer: int, inputs: Tensor) -> None:
        if layer != self._layer:  # no input is shared between layers, and those of a large model fill gigabytes
            self._layer = layer
            self._seen.clear()
        # The tensor is kept until the layer is through: its id could otherwise be given to another one.
        key, _ = self._seen.setdefault(id(inputs), (name, inputs))
        self.reads[name] = key
        if key != name:
            return
        cols, order = inputs.shape[-1], self._order
        if self.frames_per_column is not None:
            order = order[: math.ceil(self.frames_per_column * cols * self._share)]
        frames = inputs.reshape(-1, cols)[order].to(torch.float32)  # (frames, cols)
        if len(order) < len(self._order):
            frames *= (len(self._order) / len(order)) ** 0.5
        if name not in self._sums:
            self._sums[name] = _Sum(cols, inputs.device)
        self._sums[name].add(frames)


def _frame_mask(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Shape (batch, frames), True where an utterance has a frame."""
    counts = frame_counts(model, batch["attention_mask"])
    frames = int(frame_counts(model, torch.ones_like(batch["attention_mask"][:1])))
    return torch.arange(frames, device=counts.device) < counts[:, None]


def _shares(model: PreTrainedModel, parts: list[dict[str, Tensor]], batches: int) -> list[float]:
    """Of every part of a batch, in the sample of a set of so many batches."""
    frames = [int(frame_counts(model, part["attention_mask"]).sum()) for part in parts]
    return [count / sum(frames) / batches for count in frames]


@torch.no_grad()
def calibrate(
    model: PreTrainedModel,
    batches: Iterable[dict[str, Tensor]],
    progress: Progress | None = None,
    *,
    frames_per_column: float | None = None,
    seed: int = 0,
) -> Calibration:
    """Accumulate all Hessians in one pass of the model as it is (propagation ``parallel``).

    Of several processes each takes its share of the batches, and all get the Hessians of the whole set.

    Args:
        model: CTC model in evaluation mode.
        batches: calibration batches with ``input_values`` (batch, samples) and ``attention_mask`` (batch, samples).
        progress: called after every batch.
        frames_per_column: of each Hessian's inputs take a random sample of about so many frames for every column, each
            batch with an equal part in it; None takes all frames.
        seed: of that sample.

    Raises:
        UserError: the set is empty, or an activation is not finite.
    """
    observer = _Observer(prunable_matrices(model), frames_per_column, seed)
    sized: Any = batches if hasattr(batches, "__len__") else list(batches)
    with processes.together(), projections_as_modules(model), observer.attached():
        for index, batch in processes.share(sized):
            parts = list(model_batches(model, batch))
            for number, (part, share) in enumerate(zip(parts, _shares(model, parts, len(sized)), strict=True)):
                observer.start_batch(_frame_mask(model, part), 1000 * index + number, share)
                getattr(model, model.base_model_prefix)(part["input_values"], attention_mask=part["attention_mask"])
                observer.end_batch()
            if progress:
                progress(min(index + processes.world(), len(sized)), len(sized))
    return observer.finish()


class _StopForward(Exception):
    """Raised inside a forward pass that has given what was wanted of it."""


@dataclass(frozen=True)
class _LayerInputs:
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
        return torch.load(self.folder / f"{self.number}-{piece}.pt", map_location=device, weights_only=True)

    def save(self, piece: str, value: Any) -> None:
        torch.save(value, self.folder / f"{self.number}-{piece}.pt")


def _first_layer_inputs(
    model: PreTrainedModel, layers: nn.ModuleList, batches: Iterable[dict[str, Tensor]], folder: Path
) -> list[_LayerInputs]:
    caught: list[tuple[Tensor, dict[str, Any]]] = []

    def catch(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        caught.append((args[0], kwargs))
        raise _StopForward

    items: list[_LayerInputs] = []
    sized: Any = batches if hasattr(batches, "__len__") else list(batches)
    hook = layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    try:
        for index, batch in processes.share(sized):
            parts = list(model_batches(model, batch))
            for number, (part, share) in enumerate(zip(parts, _shares(model, parts, len(sized)), strict=True)):
                with suppress(_StopForward):
                    getattr(model, model.base_model_prefix)(part["input_values"], attention_mask=part["attention_mask"])
                hidden_states, arguments = caught.pop()
                item = _LayerInputs(folder, 1000 * index + number, share)
                item.save("hidden_states", hidden_states)
                item.save("others", (arguments, _frame_mask(model, part)))
                items.append(item)
    finally:
        hook.remove()
    return items


def _run_layer(layer: nn.Module, first_layer: nn.Module, hidden_states: Tensor, arguments: dict[str, Any]) -> Tensor:
    if "position_bias" in arguments and layer is not first_layer:
        # WavLM's first layer makes the position bias that the others take. It is made anew for every batch and layer,
        # because keeping it for a whole calibration set would take (heads x frames²) numbers an utterance.
        batch, frames, _ = hidden_states.shape
        bias = first_layer.attention.compute_bias(frames, frames)  # type: ignore[union-attr,operator]
        arguments = arguments | {"position_bias": bias.repeat(batch, 1, 1)}
    output = layer(hidden_states, **arguments)
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def calibrate_sequentially(
    model: PreTrainedModel,
    batches: Iterable[dict[str, Tensor]],
    prune_layer: Callable[[list[PrunableMatrix], Calibration], None],
    progress: Progress | None = None,
    *,
    frames_per_column: float | None = None,
    seed: int = 0,
    around_layer: AroundLayer = nullcontext,
) -> None:
    """Calibrate and prune layer by layer, each on the outputs of the pruned layers before it (``sequential``).

    The hidden states of the calibration set wait on disk, in the folder for temporary files; of them, one batch of one
    layer is in memory at a time. Of several processes each takes its share of the batches; ``prune_layer`` is called in
    all of them with the Hessians of the whole set.

    Args:
        model: CTC model in evaluation mode.
        batches: as in :func:`calibrate`.
        prune_layer: called with a layer's matrices and their Hessians; prunes them in place.
        progress: called after every layer.
        frames_per_column: as in :func:`calibrate`.
        seed: as in :func:`calibrate`.
        around_layer: all that is done with a layer is done within its block. Outside of it the layer's parameters may
            be anywhere (on the meta device), but for the first layer's position embedding, if it has one.

    Raises:
        UserError: the set is empty, or an activation is not finite.
    """
    layers = encoder_layers(model)
    matrices = prunable_matrices(model)
    with projections_as_modules(model), TemporaryDirectory(prefix="sparsewav-") as folder:
        with processes.together():
            inputs = _first_layer_inputs(model, layers, batches, Path(folder))
        for index, layer in enumerate(layers):
            with around_layer(index):
                observer = _Observer([matrix for matrix in matrices if matrix.layer == index], frames_per_column, seed)
                with processes.together(), observer.attached():
                    for item in inputs:
                        arguments, frame_mask = item.load("others", model.device)
                        observer.start_batch(frame_mask, item.number, item.share)
                        _run_layer(layer, layers[0], item.load("hidden_states", model.device), arguments)
                        observer.end_batch()
                prune_layer(observer.matrices, observer.finish())
                for item in inputs if index + 1 < len(layers) else []:
                    arguments, _ = item.load("others", model.device)
                    hidden_states = item.load("hidden_states", model.device)
                    item.save("hidden_states", _run_layer(layer, layers[0], hidden_states, arguments))
            if progress:
                progress(index + 1, len(layers))
