"""Calibration: the layer-wise Hessian H = XXᵀ of every prunable matrix (eq. 2 of the paper).

X is the matrix's input over the calibration set, one column a frame; padded frames never count. Matrices that read the
very same tensor (query, key and value) share one Hessian. H is symmetric, so that the blocks above its diagonal are
summed alone; and it is known well enough from some frames for each of its columns, so that of a large set a random
sample of frames will do, while every utterance has its part in it.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsewav.errors import UserError
from sparsewav.pruning import distributed
from sparsewav.pruning.encoder import (
    PrunableMatrix,
    base_of,
    encoder_layers,
    model_batches,
    projections_as_modules,
    prunable_matrices,
)
from sparsewav.pruning.hidden_states import LayerInputs, first_layer_inputs, frame_mask_of, run_layer, shares_of

Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""

AroundLayer = Callable[[int], AbstractContextManager[bool]]
"""Called with a layer's index; the layer has its weights within the block that it gives, and need not outside."""

AfterLayer = Callable[[nn.Module, Callable[[LayerInputs], Tensor], list[LayerInputs]], None]
"""Called with a pruned layer, what runs it on a batch, and the batches, with the dense model's outputs of the layer."""

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
        drifts: (X − X̂)X̂ᵀ of the inputs that the matrices have in the dense model, X, and those that the Hessians are
            of, X̂; shape (cols, cols), by the Hessian's key; empty where there is no other model.
        drift_sums: (X − X̂)(X − X̂)ᵀ, likewise.
    """

    hessians: dict[str, Tensor] = field(default_factory=dict)
    reads: dict[str, str] = field(default_factory=dict)
    frames: int = 0
    sampled: dict[str, int] = field(default_factory=dict)
    drifts: dict[str, Tensor] = field(default_factory=dict)
    drift_sums: dict[str, Tensor] = field(default_factory=dict)

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


class _DriftSum:
    """(X − X̂)X̂ᵀ, summed as pairs of frames come in; zero to the last bit where they are the same."""

    def __init__(self, cols: int, device: torch.device) -> None:
        self._drift = torch.zeros(cols, cols, dtype=torch.float32, device=device)
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def add(self, difference: Tensor, frames: Tensor) -> None:
        """Add X − X̂ and X̂ of some frames, each of shape (frames, cols)."""
        self._waiting.append((difference, frames))
        if sum(len(waiting) for waiting, _ in self._waiting) >= WAITING_FRAMES:
            self.finish()

    def finish(self) -> Tensor:
        """The sum; shape (cols, cols)."""
        if self._waiting:
            difference, frames = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
            self._waiting.clear()
            self._drift.addmm_(difference.T, frames)
        return self._drift


class _Observer:
    """Adds the frames that reach some matrices to their Hessians.

    Args:
        matrices: whose inputs are observed.
        frames_per_column: as in :func:`calibrate`.
        seed: as in :func:`calibrate`.
        dense: for every matrix its module in the dense model, which is run before the pruned one on every batch; None
            where there is no other model.
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
        self._sums: dict[str, _Sum] = {}
        self._drifts: dict[str, _DriftSum] = {}
        self._drift_sums: dict[str, _Sum] = {}
        self._dense_inputs: dict[str, Tensor] = {}
        self._seen: dict[int, tuple[str, Tensor]] = {}
        self._layer: int | None = None
        self._order = torch.empty(0, dtype=torch.long)  # places of the batch's frames, shuffled where they are sampled
        self._share = 0.0

    @contextmanager
    def attached(self) -> Iterator[None]:
        hooks = [matrix.module.register_forward_pre_hook(self._hook_of(matrix)) for matrix in self.matrices]
        for name, module in (self.dense or {}).items():
            hooks.append(module.register_forward_pre_hook(self._dense_hook_of(name)))
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
        self._dense_inputs.clear()

    def finish(self) -> Calibration:
        """Give the Hessians, summed over the processes.

        Raises:
            UserError: there was no frame, or an activation that is not finite.
        """
        found = distributed.gather(
            (self.frames, self.reads, {name: total.frames for name, total in self._sums.items()})
        )
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
            distributed.add_up(calibration.hessians[name])
            calibration.sampled[name] = sum(sampled.get(name, 0) for _, _, sampled in found)
            if not calibration.hessians[name].isfinite().all():
                raise UserError(
                    f"the inputs of {name} on the calibration set are NaN or infinite; "
                    "check the model's weights, or load it in float32"
                )
            if self.dense is not None:
                drift = self._drifts.get(name) or _DriftSum(weight.shape[1], weight.device)
                total = self._drift_sums.get(name) or _Sum(weight.shape[1], weight.device)
                calibration.drifts[name], calibration.drift_sums[name] = drift.finish(), total.finish()
                distributed.add_up(calibration.drifts[name])
                distributed.add_up(calibration.drift_sums[name])
        return calibration

    def _hook_of(self, matrix: PrunableMatrix) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._observe(matrix.name, matrix.layer, inputs[0])

        return hook

    def _dense_hook_of(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._dense_inputs[name] = inputs[0]

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

        def sample(states: Tensor) -> Tensor:
            frames = states.reshape(-1, cols)[order].to(torch.float32)  # (frames, cols)
            if len(order) < len(self._order):
                frames *= (len(self._order) / len(order)) ** 0.5
            return frames

        frames = sample(inputs)
        if name not in self._sums:
            self._sums[name] = _Sum(cols, inputs.device)
        self._sums[name].add(frames)
        if self.dense is not None:
            difference = sample(self._dense_inputs[name]) - frames
            if name not in self._drifts:
                self._drifts[name] = _DriftSum(cols, inputs.device)
                self._drift_sums[name] = _Sum(cols, inputs.device)
            self._drifts[name].add(difference, frames)
            self._drift_sums[name].add(difference)


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
    with distributed.together(), projections_as_modules(model), observer.attached():
        for index, batch in distributed.share(sized):
            parts = list(model_batches(model, batch))
            for number, (part, share) in enumerate(zip(parts, shares_of(model, parts, len(sized)), strict=True)):
                observer.start_batch(frame_mask_of(model, part), 1000 * index + number, share)
                base_of(model)(part["input_values"], attention_mask=part["attention_mask"])
                observer.end_batch()
            if progress:
                progress(min(index + distributed.world(), len(sized)), len(sized))
    return observer.finish()


@torch.no_grad()
def calibrate_sequentially(
    model: PreTrainedModel,
    batches: Iterable[dict[str, Tensor]],
    prune_layer: Callable[[list[PrunableMatrix], Calibration], None],
    progress: Progress | None = None,
    *,
    frames_per_column: float | None = None,
    seed: int = 0,
    around_layer: AroundLayer = lambda _: nullcontext(False),
    true_sequential: bool = False,
    against_dense: bool = False,
    after_layer: AfterLayer | None = None,
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
        around_layer: all that is done with a layer is done within its block, which is given True for a layer that is
            pruned already and has but to be run. Outside of the block the layer's parameters may be anywhere (on the
            meta device), but for the first layer's position embedding, if it has one.
        true_sequential: within a layer, too, prune the matrices one input after the other, each on what those before
            it give once they are pruned.
        against_dense: run the dense layers on the dense hidden states beside, and gather how the inputs have drifted.
        after_layer: called when all of a layer is pruned, before the next one gets its outputs; may change the layer.
            The batches then hold the dense model's outputs of the layer as ``dense_states``.

    Raises:
        UserError: the set is empty, or an activation is not finite.
    """
    layers = encoder_layers(model)
    matrices = prunable_matrices(model)
    two_models = against_dense or after_layer is not None
    with projections_as_modules(model), TemporaryDirectory(prefix="sparsewav-") as folder:
        with distributed.together():
            inputs = first_layer_inputs(model, layers, batches, Path(folder))
            for item in inputs if two_models else []:
                item.save("dense_states", item.load("hidden_states", model.device))
        for index, layer in enumerate(layers):

            def run(item: LayerInputs, layer: nn.Module = layer, piece: str = "hidden_states") -> Tensor:
                arguments, _ = item.load("others", model.device)
                return run_layer(layer, layers[0], item.load(piece, model.device), arguments)

            with around_layer(index) as pruned_already:
                dense_layer = copy.deepcopy(layer) if two_models else layer
                groups = [] if pruned_already else [[matrix for matrix in matrices if matrix.layer == index]]
                if true_sequential and groups:
                    groups = _in_order_of_reading(groups[0], inputs, run)
                for group in groups:
                    dense = _same_modules(group, layer, dense_layer) if against_dense else None
                    observer = _Observer(group, frames_per_column, seed, dense)
                    with distributed.together(), observer.attached():
                        for item in inputs:
                            observer.start_batch(item.load("others", model.device)[1], item.number, item.share)
                            if against_dense:
                                run(item, dense_layer, "dense_states")
                            run(item)
                            observer.end_batch()
                    prune_layer(group, observer.finish())
                for item in inputs if two_models else []:
                    item.save("dense_states", run(item, dense_layer, "dense_states"))
                if after_layer:
                    after_layer(layer, run, inputs)
                for item in inputs if index + 1 < len(layers) else []:
                    item.save("hidden_states", run(item))
            if progress:
                progress(index + 1, len(layers))


def _in_order_of_reading(
    matrices: list[PrunableMatrix], inputs: list[LayerInputs], run: Callable[[LayerInputs], Tensor]
) -> list[list[PrunableMatrix]]:
    """A layer's matrices, those that read the very same tensor together, in the order in which they read."""
    seen: dict[int, tuple[Tensor, list[str]]] = {}

    def hook_of(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, read: seen.setdefault(id(read[0]), (read[0], []))[1].append(name)

    hooks = [matrix.module.register_forward_pre_hook(hook_of(matrix.name)) for matrix in matrices]
    for item in inputs[:1]:
        run(item)
    for hook in hooks:
        hook.remove()
    by_name = {matrix.name: matrix for matrix in matrices}
    found = distributed.gather([names for _, names in seen.values()])
    order = next((groups for groups in found if groups), [list(by_name)])  # a process without a batch saw none
    return [[by_name[name] for name in by_name if name in names] for names in order]


def _same_modules(matrices: list[PrunableMatrix], layer: nn.Module, other: nn.Module) -> dict[str, nn.Module]:
    """The modules of another copy of a layer that stand where some matrices do in the layer, by the matrices' names."""
    places = {module: place for place, module in layer.named_modules()}
    return {matrix.name: other.get_submodule(places[matrix.module]) for matrix in matrices}
