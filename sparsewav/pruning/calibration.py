"""Calibration: the layer-wise Hessian H = XXᵀ of every prunable matrix (eq. 2 of the paper).

X is the matrix's input over the calibration set, one column a frame; padded frames never count. Matrices that read the
very same tensor (query, key and value) share one Hessian.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsewav.errors import UserError
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


@dataclass
class Calibration:
    """Hessians of the prunable matrices.

    Attributes:
        hessians: one for each distinct input, shape (cols, cols), float32, keyed by the first matrix that reads it.
        reads: for every matrix the key of its Hessian.
        frames: how many frames the Hessians sum over.
    """

    hessians: dict[str, Tensor] = field(default_factory=dict)
    reads: dict[str, str] = field(default_factory=dict)
    frames: int = 0

    def hessian(self, name: str) -> Tensor:
        """The Hessian of a matrix, by the matrix's name; shape (cols, cols)."""
        return self.hessians[self.reads[name]]

    def groups(self) -> dict[str, list[str]]:
        """Names of the matrices that share each Hessian, by its key."""
        groups: dict[str, list[str]] = {key: [] for key in self.hessians}
        for name, key in self.reads.items():
            groups[key].append(name)
        return groups


class _Observer:
    """Adds the frames that reach some matrices to their Hessians."""

    def __init__(self, matrices: list[PrunableMatrix]) -> None:
        self.matrices = matrices
        self.calibration = Calibration()
        self.frame_mask: Tensor | None = None  # (batch, frames), True where there is speech
        self._seen: dict[int, tuple[str, Tensor]] = {}

    @contextmanager
    def attached(self) -> Iterator[None]:
        hooks = [matrix.module.register_forward_pre_hook(self._hook_of(matrix.name)) for matrix in self.matrices]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def start_batch(self, frame_mask: Tensor) -> None:
        self.frame_mask = frame_mask
        self.calibration.frames += int(frame_mask.sum())

    def end_batch(self) -> None:
        self._seen.clear()

    def _hook_of(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._observe(name, inputs[0])

        return hook

    def _observe(self, name: str, inputs: Tensor) -> None:
        # The tensor is kept until the batch ends: its id could otherwise be given to another one.
        key, _ = self._seen.setdefault(id(inputs), (name, inputs))
        self.calibration.reads[name] = key
        if key != name:
            return
        columns = inputs[self.frame_mask].to(torch.float32)  # (frames, cols)
        hessian = self.calibration.hessians.get(name)
        if hessian is None:
            hessian = torch.zeros(columns.shape[1], columns.shape[1], dtype=torch.float32, device=columns.device)
            self.calibration.hessians[name] = hessian
        hessian.addmm_(columns.T, columns)


def _frame_mask(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Shape (batch, frames), True where an utterance has a frame."""
    counts = frame_counts(model, batch["attention_mask"])
    frames = int(frame_counts(model, torch.ones_like(batch["attention_mask"][:1])))
    return torch.arange(frames, device=counts.device) < counts[:, None]


def _check(calibration: Calibration) -> None:
    if calibration.frames == 0:
        raise UserError("the calibration set is empty; give at least one utterance")
    for name, hessian in calibration.hessians.items():
        if not hessian.isfinite().all():
            raise UserError(
                f"the inputs of {name} on the calibration set are NaN or infinite; "
                "check the model's weights, or load it in float32"
            )


@torch.no_grad()
def calibrate(
    model: PreTrainedModel, batches: Iterable[dict[str, Tensor]], progress: Progress | None = None
) -> Calibration:
    """Accumulate all Hessians in one pass of the model as it is (propagation ``parallel``).

    Args:
        model: CTC model in evaluation mode.
        batches: calibration batches with ``input_values`` (batch, samples) and ``attention_mask`` (batch, samples).
        progress: called after every batch.

    Raises:
        UserError: the set is empty, or an activation is not finite.
    """
    observer = _Observer(prunable_matrices(model))
    batches = list(batches) if not hasattr(batches, "__len__") else batches
    with projections_as_modules(model), observer.attached():
        for index, batch in enumerate(batches):
            for inputs in model_batches(model, batch):
                observer.start_batch(_frame_mask(model, inputs))
                getattr(model, model.base_model_prefix)(inputs["input_values"], attention_mask=inputs["attention_mask"])
                observer.end_batch()
            if progress:
                progress(index + 1, len(batches))  # type: ignore[arg-type]
    _check(observer.calibration)
    return observer.calibration


class _StopForward(Exception):
    """Raised inside a forward pass that has given what was wanted of it."""


@dataclass
class _LayerInputs:
    """What one batch brings to the next layer: hidden states (batch, frames, width) and the layer's other arguments."""

    hidden_states: Tensor
    arguments: dict[str, Any]
    frame_mask: Tensor


def _first_layer_inputs(
    model: PreTrainedModel, layers: nn.ModuleList, batches: Iterable[dict[str, Tensor]]
) -> list[_LayerInputs]:
    captured: list[_LayerInputs] = []

    def capture(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        captured.append(_LayerInputs(args[0], kwargs, frame_mask))
        raise _StopForward

    hook = layers[0].register_forward_pre_hook(capture, with_kwargs=True)
    try:
        for batch in batches:
            for inputs in model_batches(model, batch):
                frame_mask = _frame_mask(model, inputs)
                with suppress(_StopForward):
                    getattr(model, model.base_model_prefix)(
                        inputs["input_values"], attention_mask=inputs["attention_mask"]
                    )
    finally:
        hook.remove()
    return captured


def _run_layer(layer: nn.Module, first_layer: nn.Module, inputs: _LayerInputs) -> Tensor:
    arguments = dict(inputs.arguments)
    if "position_bias" in arguments and layer is not first_layer:
        # WavLM's first layer makes the position bias that the others take. It is made anew for every batch and layer,
        # because keeping it for a whole calibration set would take (heads x frames²) numbers an utterance.
        batch, frames, _ = inputs.hidden_states.shape
        bias = first_layer.attention.compute_bias(frames, frames)  # type: ignore[union-attr,operator]
        arguments["position_bias"] = bias.repeat(batch, 1, 1)
    output = layer(inputs.hidden_states, **arguments)
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def calibrate_sequentially(
    model: PreTrainedModel,
    batches: Iterable[dict[str, Tensor]],
    prune_layer: Callable[[list[PrunableMatrix], Calibration], None],
    progress: Progress | None = None,
) -> None:
    """Calibrate and prune layer by layer, each on the outputs of the pruned layers before it (``sequential``).

    The hidden states of the whole calibration set are held in memory, one layer at a time.

    Args:
        model: CTC model in evaluation mode.
        batches: as in :func:`calibrate`.
        prune_layer: called with a layer's matrices and their Hessians; prunes them in place.
        progress: called after every layer.

    Raises:
        UserError: the set is empty, or an activation is not finite.
    """
    layers = encoder_layers(model)
    matrices = prunable_matrices(model)
    with projections_as_modules(model):
        inputs = _first_layer_inputs(model, layers, batches)
        for index, layer in enumerate(layers):
            observer = _Observer([matrix for matrix in matrices if matrix.layer == index])
            with observer.attached():
                for item in inputs:
                    observer.start_batch(item.frame_mask)
                    _run_layer(layer, layers[0], item)
                    observer.end_batch()
            _check(observer.calibration)
            prune_layer(observer.matrices, observer.calibration)
            for item in inputs:
                item.hidden_states = _run_layer(layer, layers[0], item)
            if progress:
                progress(index + 1, len(layers))
