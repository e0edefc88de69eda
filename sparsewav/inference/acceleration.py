"""``sparsewav.accelerate``: replace dense products of a pruned model by sparse ones where these are faster."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsewav.errors import UserError
from sparsewav.inference.alternatives import ALTERNATIVES, BFLOAT16, copy_with_its_weights
from sparsewav.inference.comparison import Comparison, remembered_or_compared
from sparsewav.inference.kernel import NoKernel, sparse_kernel
from sparsewav.inference.sparse_modules import SparseConv1d, SparseLinear, SparseModule, why_dense
from sparsewav.inference.timing import (
    LONGEST,
    MARGIN,
    Timing,
    in_turns,
    remember,
    remembered,
    setting,
    sparsity,
    time_convolution,
    time_linear,
)
from sparsewav.models.hub import commit_of
from sparsewav.pruning.encoder import FRONT, PrunableMatrix, check_unwrapped, prunable_matrices
from sparsewav.settings.pruning import ENCODER

log = logging.getLogger(__name__)

FRAMES = (250, 1000)
"""Numbers of frames that products are timed with by default, 5 and 20 seconds of audio."""

BUCKET = 0.05
"""Matrices of one shape with sparsities in the same interval share a timing, that of the least sparse one."""

CONVOLUTIONS_NEED_KERNEL = "it is a convolution, which only the kernel multiplies sparse"

NOT_FASTER = "the sparse product is not clearly faster"

NOT_FASTER_AT_ALL = "the whole model is slower with the sparse products than without"


@dataclass(frozen=True)
class AcceleratedMatrix:
    """The decision for one matrix.

    Attributes:
        name: Name of its module.
        rows, cols: Its shape; the columns of a convolution are channels times kernel.
        sparsity: Share of zeros.
        reason: Why it stays dense; empty if it was swapped.
        dense, sparse: Seconds of a product for each number of frames; empty if none was timed. In front of the layers
            the product is that of as many rows as make so many frames, at most
            :data:`~sparsewav.inference.timing.LONGEST`.
        kernel: The kernel of a convolution, in frames; 1 for a linear module.
    """

    name: str
    rows: int
    cols: int
    sparsity: float
    reason: str = ""
    dense: tuple[float, ...] = ()
    sparse: tuple[float, ...] = ()
    kernel: int = 1

    @property
    def swapped(self) -> bool:
        """Whether the product is sparse now."""
        return not self.reason

    def __str__(self) -> str:
        """The zeros, and how many times as fast as dense the sparse product is at each number of frames."""
        faster = " and ".join(f"{dense / sparse:.2f}" for dense, sparse in zip(self.dense, self.sparse, strict=True))
        return f"{self.name} ({self.sparsity:.1%} zero, {faster} times as fast as dense)"


@dataclass
class AccelerationReport:
    """The decisions of :func:`accelerate`.

    Attributes:
        matrices: The decision for every prunable matrix.
        frames: Numbers of frames that products were timed with.
        threads: Number of threads that products were timed with, for which the choice holds.
        product: How sparse products are computed: ``kernel``, ``CSR`` or ``2:4``.
        without_kernel: Why there is no kernel; empty if there is one.
        comparison: How fast the whole model and its alternatives are; None with ``pattern="2:4"``.
    """

    matrices: list[AcceleratedMatrix]
    frames: tuple[int, ...]
    threads: int
    product: str
    without_kernel: str = ""
    comparison: Comparison | None = None

    @property
    def swapped(self) -> int:
        """Number of matrices with sparse products."""
        return sum(matrix.swapped for matrix in self.matrices)

    def __str__(self) -> str:
        lines = [f"{self.swapped} of {len(self.matrices)} matrices multiply sparse ({self.product})"]
        reasons = [matrix.reason for matrix in self.matrices if matrix.reason]
        convolutions = [str(matrix) for matrix in self.matrices if matrix.swapped and matrix.kernel > 1]
        if convolutions:
            lines.append(f"{len(convolutions)} of these are convolutions: {', '.join(convolutions)}")
        lines += [f"{reasons.count(reason)} left dense: {reason}" for reason in dict.fromkeys(reasons)]
        if self.without_kernel:
            lines.append(f"no kernel, PyTorch's slower CSR products are used instead: {self.without_kernel}")
        if self.comparison:
            lines.append(str(self.comparison))
        return "\n".join(lines)


@torch.inference_mode(False)  # what is made in inference mode could not be used outside of it
def accelerate(
    model: PreTrainedModel,
    *,
    frames: int | Sequence[int] = FRAMES,
    folder: Path | str | None = None,
    pattern: Literal["any", "2:4"] = "any",
    alternatives: Sequence[str] | Literal["all"] = (BFLOAT16,),
) -> AccelerationReport:
    """Make a pruned model skip its zeros, in place, for inference.

    Every prunable matrix of the layers and in front of them, convolutions included, whose sparse product is faster on
    this machine is swapped, and its dense weight is freed. The outputs are equal up to rounding. Products are timed
    with the current number of threads of PyTorch; then the whole model is timed in turns with the dense one, and is
    left dense if it is slower. The report says which plain alternative is faster still. The timings are stored in the
    folder of the model.

    Args:
        model: CTC model, in float32 on the CPU (``pattern="2:4"``: in float16 or bfloat16 on a GPU).
        frames: Number of frames in a batch (50 for a second of audio, times the utterances), or several of them; a
            matrix is swapped if its sparse product is faster with all of them.
        folder: Where the timings are stored; by default the folder that the model was loaded from.
        pattern: ``any`` zeros on the CPU, or ``2:4`` on an NVIDIA GPU by
            :func:`torch.sparse.to_sparse_semi_structured`.
        alternatives: On the CPU, the other ways to run the dense model to compare with, ``all`` or names of
            :data:`~sparsewav.inference.alternatives.ALTERNATIVES`. They are measured in this call; exporting a model
            to int8 takes minutes. By default PyTorch's bfloat16 alone, of which the timing is remembered, too.

    Raises:
        UserError: The model's family is unknown, the model is accelerated already, there are no sparse products for
            its device and precision, or there is no such alternative.
    """
    compared = tuple(ALTERNATIVES) if alternatives == "all" else tuple(alternatives)
    for name in compared:
        if name not in ALTERNATIVES:
            raise UserError(f"alternatives={alternatives!r} must be 'all' or some of {', '.join(ALTERNATIVES)}")
    counts = (frames,) if isinstance(frames, int) else tuple(frames)
    if not counts or min(counts) < 1:
        raise UserError(f"frames={frames} must be one or more numbers above 0")
    check_unwrapped(model)
    if any(isinstance(module, SparseModule) for module in model.modules()):
        raise UserError("the model is accelerated already; load it again to choose anew")
    if pattern == "2:4":
        return _accelerate_on_gpu(model, prunable_matrices(model), counts)
    if pattern != "any":
        raise UserError(f"pattern={pattern!r} is none of 'any' and '2:4'")
    if model.device.type != "cpu" or model.dtype != torch.float32:
        raise UserError(
            f"the model is {model.dtype} on {model.device}, and sparse products compute in float32 on the CPU; "
            "convert it, or on an NVIDIA GPU ask for pattern='2:4'"
        )
    without_kernel = ""
    try:
        sparse_kernel()
    except NoKernel as error:
        without_kernel = str(error)
        log.warning("no sparse kernel: %s; PyTorch's CSR products are used where they are faster", error)
    matrices = prunable_matrices(model, ENCODER)
    reasons = [_reason(model, matrix, CONVOLUTIONS_NEED_KERNEL if without_kernel else "") for matrix in matrices]
    rates = _rates(matrices)
    buckets = [_bucket(*pair) for pair in zip(matrices, rates, strict=True)]
    place = Path(folder) if folder is not None else _folder(model)
    key = setting(counts, kernel=not without_kernel)
    timings = remembered(place, counts, kernel=not without_kernel)
    known = set(timings)
    # The least sparse matrix of a bucket comes first, and the others share its timing.
    for index in sorted(range(len(matrices)), key=lambda index: sparsity(matrices[index].weight)):
        if not reasons[index] and buckets[index] not in timings:
            module, made = matrices[index].module, [_rows(count, rates[index]) for count in counts]
            timings[buckets[index]] = (
                time_convolution(module, made)
                if isinstance(module, nn.Conv1d)
                else time_linear(module, made, kernel=not without_kernel)
            )
    if set(timings) != known:
        remember(place, key, timings)
    rows = [
        _decide(matrix, reason, timings.get(bucket))
        for matrix, reason, bucket in zip(matrices, reasons, buckets, strict=True)
    ]
    layers = {
        matrix.name: _sparse(matrix.module, timings[bucket])
        for matrix, bucket, row in zip(matrices, buckets, rows, strict=True)
        if row.swapped
    }
    accelerated = copy_with_its_weights(model) if layers else model
    for name, layer in layers.items():
        accelerated.set_submodule(name, layer)
    # What was asked for is measured now; only what is measured always is remembered.
    kept = place if set(compared) <= {BFLOAT16} else None
    comparison = remembered_or_compared(model, accelerated, counts, compared, kept, key)
    if not comparison.worth_it:
        rows, layers = [replace(row, reason=NOT_FASTER_AT_ALL) if row.swapped else row for row in rows], {}
    del accelerated
    for name, layer in layers.items():
        dense: Any = model.get_submodule(name)
        dense.weight = nn.Parameter(torch.empty(0))  # other references to the module then hold no memory
        model.set_submodule(name, layer)
    if layers:
        _leave_mapped_file(model)
    product = "CSR" if without_kernel else "kernel"
    return AccelerationReport(rows, counts, torch.get_num_threads(), product, without_kernel, comparison)


def restore(model: PreTrainedModel) -> int:
    """Undo :func:`accelerate` on the CPU in place, and give the number of matrices that had been swapped."""
    swapped = [(name, module) for name, module in model.named_modules() if isinstance(module, SparseModule)]
    for name, module in swapped:
        model.set_submodule(name, module.dense_module())
    return len(swapped)


def _folder(model: PreTrainedModel) -> Path | None:
    """Give the folder that a model was loaded from; None for the hub, for a new model, and for this package's own."""
    folder = Path(model.name_or_path) if model.name_or_path else None
    package = Path(__file__).parents[1]
    if not folder or not folder.is_dir() or commit_of(folder) or package in folder.resolve().parents:
        return None
    return folder


def _rates(matrices: list[PrunableMatrix]) -> list[int]:
    """Count the rows that each matrix multiplies for a frame of the layers: more than one before the last stride."""
    strides = [math.prod(stride for _, stride, _ in matrix.windows) for matrix in matrices]
    return [
        max(1, max(strides) // own) if matrix.layer == FRONT else 1
        for matrix, own in zip(matrices, strides, strict=True)
    ]


def _rows(frames: int, rate: int) -> int:
    """Count the rows that a matrix is timed with."""
    return min(frames * rate, max(frames, LONGEST))


def _bucket(matrix: PrunableMatrix, rate: int) -> str:
    """Name what matrices have in common that share a timing."""
    module, (rows, cols) = matrix.module, matrix.weight.shape
    facts = [f"{rows}x{cols}"]
    if isinstance(module, nn.Conv1d):
        facts.append(f"kernel {module.kernel_size[0]}, stride {module.stride[0]}")
    if rate > 1:
        facts.append(f"{rate} rows a frame")
    step = math.floor(sparsity(matrix.weight) / BUCKET + 1e-9)
    return ", ".join([*facts, f"{step * BUCKET:.2f} of it zero or more"])


def _reason(model: PreTrainedModel, matrix: PrunableMatrix, convolutions: str) -> str:
    """Say why a matrix must stay dense; empty if its timing decides.

    Args:
        model, matrix: The matrix in its model.
        convolutions: Why convolutions must; empty if they need not.
    """
    if sparsity(matrix.weight) < 0.2:
        return "hardly any of it is zero"
    parent = model.get_submodule(matrix.name.rpartition(".")[0])
    if hasattr(parent, "torch_multi_head_self_attention"):
        return "WavLM's attention is one fused function that takes the dense weights"
    if type(matrix.module) is nn.Conv1d:
        if why := why_dense(matrix.module):
            return f"it is a convolution without a sparse product: {why}"
        return convolutions
    if type(matrix.module) is not nn.Linear:
        return f"it is a {type(matrix.module).__name__}, which may do more than multiply"
    return ""


def _decide(matrix: PrunableMatrix, reason: str, timing: Timing | None) -> AcceleratedMatrix:
    """Give the decision for a matrix that stays dense for a reason, or else has a timing."""
    rows, cols = matrix.weight.shape
    kernel = matrix.module.kernel_size[0] if isinstance(matrix.module, nn.Conv1d) else 1
    made = AcceleratedMatrix(matrix.name, rows, cols, sparsity(matrix.weight), reason, kernel=kernel)
    if reason or timing is None:
        return made
    return replace(made, reason="" if timing.worth_it else NOT_FASTER, dense=timing.dense, sparse=timing.sparse)


def _sparse(module: nn.Linear | nn.Conv1d, timing: Timing) -> SparseModule:
    """Give the sparse module that stands for a dense one, in the fastest layout."""
    if isinstance(module, nn.Linear):
        return SparseLinear(module, timing.width)
    assert timing.width is not None  # the kernel's layout, or the convolution had a reason to stay
    return SparseConv1d(module, timing.width)


def _leave_mapped_file(model: PreTrainedModel) -> None:
    """Copy the remaining tensors, because one tensor in a mapped checkpoint keeps all of it in memory."""
    for tensor in [*model.parameters(), *model.buffers()]:
        with torch.inference_mode(tensor.is_inference()):  # it stays what it was: a mix of both cannot be computed with
            tensor.data = tensor.data.clone()


@torch.inference_mode()
def _accelerate_on_gpu(
    model: PreTrainedModel, matrices: list[PrunableMatrix], frames: tuple[int, ...]
) -> AccelerationReport:
    if model.device.type != "cuda" or torch.cuda.get_device_capability(model.device) < (8, 0):
        raise UserError(
            f"2:4 products need an NVIDIA GPU of compute capability 8.0 or newer, and the model is on {model.device}; "
            "on the CPU, sparsewav.accelerate(model) takes zeros of any pattern"
        )
    if model.dtype not in (torch.float16, torch.bfloat16):
        raise UserError(f"2:4 products compute in float16 or bfloat16, and the model is {model.dtype}; convert it")
    rows = []
    for matrix in matrices:
        height, cols = matrix.weight.shape
        reason = _reason(model, matrix, "it is a convolution, for which there is no 2:4 product")
        if not reason and not two_of_four(matrix.weight):
            reason = "it is not 2:4 (at most two nonzeros in every four neighbours of a row)"
        dense: tuple[float, ...] = ()
        sparse: tuple[float, ...] = ()
        if not reason:
            weight = matrix.module.weight
            compressed = nn.Parameter(torch.sparse.to_sparse_semi_structured(weight), requires_grad=False)
            dense, sparse = _time_on_gpu(weight, compressed, frames)
            if all(before >= MARGIN * after for before, after in zip(dense, sparse, strict=True)):
                matrix.module.weight = compressed
            else:
                reason = NOT_FASTER
        share = sparsity(matrix.weight) if reason else 0.5
        rows.append(AcceleratedMatrix(matrix.name, height, cols, share, reason, dense, sparse))
    return AccelerationReport(rows, frames, torch.get_num_threads(), "2:4")


def two_of_four(weight: Tensor) -> bool:
    """Tell whether every four neighbours in a row have at most two nonzeros."""
    return weight.shape[1] % 4 == 0 and bool(((weight.view(-1, 4) != 0).sum(1) <= 2).all())


def _time_on_gpu(dense: Tensor, sparse: Tensor, frames: tuple[int, ...]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    seconds = []
    for count in frames:
        inputs = torch.randn(count, dense.shape[1], device=dense.device, dtype=dense.dtype)

        def product(weight: Tensor, inputs: Tensor = inputs) -> None:
            nn.functional.linear(inputs, weight)
            torch.cuda.synchronize(inputs.device)

        seconds.append(in_turns(5, [lambda: product(dense), lambda: product(sparse)]))
    return tuple(row[0] for row in seconds), tuple(row[1] for row in seconds)
