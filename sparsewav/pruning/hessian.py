"""Calibration: the layer-wise Hessian H = XXᵀ of every prunable matrix (eq. 2 of the paper).

X is the matrix's input over the calibration set, one column a frame, without padded frames; where a matrix reads
position embeddings, there is a column for each of them that an utterance uses. Matrices that read the very same tensor
(query, key and value) share one Hessian. H is symmetric, so that only the blocks on and above its diagonal are summed.
Some frames for each of its columns estimate it well enough, so that a random sample of the frames of all utterances may
stand for a large set.

A convolution multiplies windows of frames, one window a column of X, at the rate of its own output. Only the windows of
the sample are unfolded, and never many at a time.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsewav.errors import UserError
from sparsewav.pruning import distributed
from sparsewav.pruning.batches import as_sequence
from sparsewav.pruning.encoder import (
    FRONT,
    PrunableMatrix,
    input_length,
    input_rows,
    projections_as_modules,
    prunable_matrices,
    run_base,
)
from sparsewav.pruning.hidden_states import StopForward, calibration_parts, layer_masks, valid_rows_of
from sparsewav.settings.pruning import TRANSFORMER

T = TypeVar("T")

Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""

BLOCK = 384
"""Columns of a Hessian that are summed in one product."""
ROWS_AT_ONCE = 8192
"""Rows of an input that are copied in one piece."""
WAITING_FRAMES = 512
"""Frames that are gathered before they are multiplied: with fewer, access to the memory of H would limit the speed."""


@dataclass
class Hessians:
    """Hessians of the prunable matrices, one for each distinct input.

    Attributes:
        by_input: The Hessians in float32, by their keys: the name of the first matrix that reads the input.
        reads: The key of every matrix's Hessian.
        frames: The number of frames of the calibration set.
        sampled: The number of frames that each Hessian was summed over, by key; the sum is scaled to all of them.
        rows: The number of all of them, by key; it differs from ``frames`` in front of the layers, where layers have
            fewer frames, and for position embeddings.
        drifts: (X − X̂)X̂ᵀ by key, where X is the input in the dense model and X̂ the input in the pruned model, which
            the Hessian is computed on; empty where the dense model is not run beside.
        drift_sums: (X − X̂)(X − X̂)ᵀ, likewise.
    """

    by_input: dict[str, Float[Tensor, "_cols _cols"]] = field(default_factory=dict)
    reads: dict[str, str] = field(default_factory=dict)
    frames: int = 0
    sampled: dict[str, int] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    drifts: dict[str, Float[Tensor, "_cols _cols"]] = field(default_factory=dict)
    drift_sums: dict[str, Float[Tensor, "_cols _cols"]] = field(default_factory=dict)

    def of(self, name: str) -> Float[Tensor, "cols cols"]:
        """Give the Hessian of a matrix by the matrix's name."""
        return self.by_input[self.reads[name]]

    def groups(self) -> dict[str, list[str]]:
        """Give the names of the matrices that share each Hessian, by its key."""
        groups: dict[str, list[str]] = {key: [] for key in self.by_input}
        for name, key in self.reads.items():
            groups[key].append(name)
        return groups

    def restricted(self, names: Iterable[str]) -> "Hessians":
        """Give those of some matrices alone, which are not copied."""
        reads = {name: self.reads[name] for name in names}
        keys = set(reads.values())

        def of(values: dict[str, T]) -> dict[str, T]:
            return {key: value for key, value in values.items() if key in keys}

        sums = (of(values) for values in (self.drifts, self.drift_sums))
        return Hessians(of(self.by_input), reads, self.frames, of(self.sampled), of(self.rows), *sums)


class _Sum:
    """A running sum of XXᵀ, of which only the blocks on and above the diagonal are kept up to date."""

    def __init__(self, cols: int, device: torch.device) -> None:
        self.hessian = torch.zeros(cols, cols, dtype=torch.float32, device=device)
        self.frames = 0
        self._waiting: list[Tensor] = []

    def add(self, frames: Float[Tensor, "frames cols"]) -> None:
        """Add frames to the sum."""
        self.frames += len(frames)
        self._waiting.append(frames)
        if sum(map(len, self._waiting)) >= WAITING_FRAMES:
            self._multiply()

    def finish(self) -> Float[Tensor, "cols cols"]:
        """Give the whole sum, both triangles."""
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


class _DriftSum:
    """A running sum of (X − X̂)X̂ᵀ; it is exactly zero where X and X̂ are the same."""

    def __init__(self, cols: int, device: torch.device) -> None:
        self._drift = torch.zeros(cols, cols, dtype=torch.float32, device=device)
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def add(self, difference: Float[Tensor, "frames cols"], frames: Float[Tensor, "frames cols"]) -> None:
        """Add X − X̂ and X̂ of some frames."""
        self._waiting.append((difference, frames))
        if sum(len(waiting) for waiting, _ in self._waiting) >= WAITING_FRAMES:
            self.finish()

    def finish(self) -> Float[Tensor, "cols cols"]:
        """Give the sum."""
        if self._waiting:
            difference, frames = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
            self._waiting.clear()
            self._drift.addmm_(difference.T, frames)
        return self._drift


class InputObserver:
    """Sums the Hessians of some matrices from the inputs that their modules are called with.

    Args:
        matrices: The matrices whose inputs are observed.
        frames_per_column: As in :func:`collect_hessians`.
        seed: As in :func:`collect_hessians`.
        dense: The module of every matrix in the dense model, which must be run before the pruned one on every batch;
            None where the dense model is not run beside.
    """

    def __init__(
        self,
        matrices: list[PrunableMatrix],
        frames_per_column: float | None,
        seed: int,
        dense: dict[str, nn.Module] | None = None,
    ) -> None:
        self.matrices = matrices
        self.dense = dense
        self.frames_per_column = frames_per_column
        self.seed = seed
        self.frames = 0
        self.reads: dict[str, str] = {}
        self._rows: dict[str, int] = {}
        self._sums: dict[str, _Sum] = {}
        self._drifts: dict[str, _DriftSum] = {}
        self._drift_sums: dict[str, _Sum] = {}
        self._dense_inputs: dict[str, list[Tensor]] = {}
        self._seen: dict[tuple[int, bool], tuple[str, Tensor]] = {}
        self._layer: int | None = None
        self._masks: dict[int, Tensor] = {}
        self._orders: dict[tuple[int, int, bool, tuple[tuple[int, int, int], ...]], Tensor] = {}
        self._number, self._share = 0, 0.0

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Observe the modules within the block."""
        hooks = [matrix.module.register_forward_pre_hook(self._hook_of(matrix)) for matrix in self.matrices]
        for name, module in (self.dense or {}).items():
            hooks.append(module.register_forward_pre_hook(self._dense_hook_of(name)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def start_batch(self, frame_masks: Mapping[int, Bool[Tensor, "_batch _length"]], number: int, share: float) -> None:
        """Prepare for a batch; to be called before the model is run on it.

        Args:
            frame_masks: True where an utterance has a frame of a layer's input, by the index of the layer
                (:func:`~sparsewav.pruning.hidden_states.layer_masks`).
            number: The number of the batch, which together with the seed determines the sampled frames.
            share: The batch's share in the sample of the whole calibration set.
        """
        self._masks, self._number, self._share = dict(frame_masks), number, share
        self.frames += int(next(iter(self._masks.values())).sum())

    def end_batch(self) -> None:
        """Release the tensors of a batch; to be called after the model was run on it."""
        self._seen.clear()
        self._dense_inputs.clear()
        self._orders.clear()

    def _order(self, matrix: PrunableMatrix, length: int) -> Int[Tensor, " rows"]:
        """Give the indices of the rows of a batch that belong to utterances, shuffled if they are sampled."""
        # Most tensors of all layers have the same rows.
        key = (id(self._masks[matrix.layer]), length, matrix.positions, matrix.windows)
        if key not in self._orders:
            order = valid_rows_of(matrix, self._masks, length).flatten().nonzero().flatten()
            if self.frames_per_column is not None:
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self._number)
                order = order[torch.randperm(len(order), generator=generator).to(order.device)]
            self._orders[key] = order
        return self._orders[key]

    def finish(self) -> Hessians:
        """Give the Hessians, summed over the processes.

        Raises:
            UserError: There was no frame, or an activation is not finite.
        """
        found = distributed.gather(
            (self.frames, self.reads, {name: total.frames for name, total in self._sums.items()}, self._rows)
        )
        frames = sum(count for count, *_ in found)
        if frames == 0:
            raise UserError("the calibration set is empty; give at least one utterance")
        # A process without a batch observed nothing; all others observed the same.
        hessians = Hessians(reads=next(reads for _, reads, *_ in found if reads), frames=frames)
        weights = {matrix.name: matrix.weight for matrix in self.matrices}
        for name in dict.fromkeys(hessians.reads.values()):
            weight = weights[name]
            total = self._sums.get(name) or _Sum(weight.shape[1], weight.device)
            hessians.by_input[name] = total.finish()
            distributed.add_up(hessians.by_input[name])
            hessians.sampled[name] = sum(sampled.get(name, 0) for _, _, sampled, _ in found)
            hessians.rows[name] = sum(rows.get(name, 0) for *_, rows in found)
            if not hessians.by_input[name].isfinite().all():
                raise UserError(
                    f"the inputs of {name} on the calibration set are NaN or infinite; "
                    "check the model's weights, or load it in float32"
                )
            if self.dense is not None:
                drift = self._drifts.get(name) or _DriftSum(weight.shape[1], weight.device)
                total = self._drift_sums.get(name) or _Sum(weight.shape[1], weight.device)
                hessians.drifts[name], hessians.drift_sums[name] = drift.finish(), total.finish()
                distributed.add_up(hessians.drifts[name])
                distributed.add_up(hessians.drift_sums[name])
        return hessians

    def _hook_of(self, matrix: PrunableMatrix) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._observe(matrix, inputs[0])

        return hook

    def _dense_hook_of(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._dense_inputs.setdefault(name, []).append(inputs[0])

        return hook

    def _observe(self, matrix: PrunableMatrix, inputs: Float[Tensor, "batch _ _"]) -> None:
        name = matrix.name
        # No input is shared between layers, nor in front of them, and those of a large model fill gigabytes.
        if matrix.layer != self._layer or matrix.layer == FRONT:
            self._layer = matrix.layer
            self._seen.clear()
        # The tensor is kept until the layer is done, because its id could otherwise be given to another one. A matrix
        # that reads positions beside the hidden states shares its Hessian only with those that do, too.
        key, _ = self._seen.setdefault((id(inputs), matrix.positions), (name, inputs))
        self.reads[name] = key
        dense = self._dense_inputs[name].pop(0) if self.dense is not None else None  # called as often, in this order
        if key != name:
            return
        cols = matrix.weight.shape[1]
        every = self._order(matrix, input_length(matrix.module, inputs))
        order = every
        if self.frames_per_column is not None:
            order = every[: math.ceil(self.frames_per_column * cols * self._share)]
        scale = (len(every) / len(order)) ** 0.5 if len(order) < len(every) else 1.0
        self._rows[name] = self._rows.get(name, 0) + len(every)
        if name not in self._sums:
            self._sums[name] = _Sum(cols, inputs.device)
            if dense is not None:
                self._drifts[name] = _DriftSum(cols, inputs.device)
                self._drift_sums[name] = _Sum(cols, inputs.device)
        for places in order.split(ROWS_AT_ONCE):
            frames = input_rows(matrix.module, inputs, places).to(torch.float32) * scale
            self._sums[name].add(frames)
            if dense is not None:
                difference = input_rows(matrix.module, dense, places).to(torch.float32) * scale - frames
                self._drifts[name].add(difference, frames)
                self._drift_sums[name].add(difference)


@torch.no_grad()
def collect_hessians(
    model: PreTrainedModel,
    batches: Iterable[dict[str, Tensor]],
    *,
    scope: str = TRANSFORMER,
    frames_per_column: float | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Hessians:
    """Sum the Hessians of all matrices in one pass of the model as it is (propagation ``parallel``).

    In a process group each process takes its share of the batches, and all get the Hessians of the whole set.

    Args:
        model: A CTC model in evaluation mode.
        batches: Calibration batches, as :func:`~sparsewav.pruning.batches.pieces_of` reads them.
        scope: Of which matrices, as in :func:`~sparsewav.pruning.encoder.prunable_matrices`.
        frames_per_column: Each Hessian is estimated from a random sample of so many frames for each of its columns, to
            which every batch contributes equally. None takes all frames.
        seed: The seed of that sample.
        progress: Called after every batch.

    Raises:
        UserError: The set is empty, or an activation is not finite.
    """
    observer = InputObserver(prunable_matrices(model, scope), frames_per_column, seed)
    sized = as_sequence(batches)
    with distributed.together(), projections_as_modules(model), observer.attached():
        for number, part, share in calibration_parts(model, sized):
            observer.start_batch(layer_masks(model, part), number, share)
            run_base(model, part)
            observer.end_batch()
            if progress:
                progress(min(number // 1000 + distributed.world(), len(sized)), len(sized))
    return observer.finish()


@torch.no_grad()
def collect_hessian_in_front(
    model: PreTrainedModel,
    matrix: PrunableMatrix,
    batches: Iterable[dict[str, Tensor]],
    *,
    frames_per_column: float | None = None,
    seed: int = 0,
) -> Hessians:
    """Sum the Hessian of one matrix in front of the layers, running the model as far as that; otherwise as above."""

    def stop(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        raise StopForward

    observer = InputObserver([matrix], frames_per_column, seed)
    with distributed.together(), observer.attached():
        hook = matrix.module.register_forward_pre_hook(stop)  # called after the observer's
        try:
            for number, part, share in calibration_parts(model, as_sequence(batches)):
                observer.start_batch(layer_masks(model, part), number, share)
                with suppress(StopForward):
                    run_base(model, part)
                observer.end_batch()
        finally:
            hook.remove()
    return observer.finish()
