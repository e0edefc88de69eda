"""Timing dense and sparse products on this machine, and storing the timings beside the model."""

import json
import logging
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sparsewav.errors import UserError
from sparsewav.files import write_file
from sparsewav.inference.kernel import MAX_COLUMNS, SOURCE, processor_name
from sparsewav.inference.sparse_modules import SparseConv1d, SparseLinear

log = logging.getLogger(__name__)

Read = TypeVar("Read")

WIDTHS = (96, 192)
"""Columns in a block of the kernel's layout. Inputs of narrow blocks fit the first-level cache; wide blocks have more
nonzeros in a row."""

MARGIN = 1.1
"""A dense product is replaced if the sparse one is at least so many times as fast."""

ROUNDS = 5

LONGEST = 2048
"""Frames that convolutions are timed with at most: longer inputs take both kinds proportionally longer."""

REMEMBERED = "acceleration.json"
"""File in the folder of a model with the timings of each machine and setting."""


@dataclass(frozen=True)
class Timing:
    """Timings of the dense and the best sparse product for matrices of one shape and similar sparsity.

    Attributes:
        rows, cols: Shape of the matrix; the columns of a convolution are channels times kernel.
        sparsity: Sparsity of the timed matrix, the least sparse of those that share the timing.
        dense, sparse: Median seconds of a product for each number of frames.
        width: Columns in a block of the best layout, or None for PyTorch's CSR product.
    """

    rows: int
    cols: int
    sparsity: float
    dense: tuple[float, ...]
    sparse: tuple[float, ...]
    width: int | None

    @property
    def worth_it(self) -> bool:
        """Whether the sparse product is faster by :data:`MARGIN` at every number of frames."""
        return all(dense >= MARGIN * sparse for dense, sparse in zip(self.dense, self.sparse, strict=True))


def in_turns(rounds: int, contestants: Sequence[Callable[[], Any]]) -> list[float]:
    """Give the median seconds of each function, called in turns after a warm-up round."""
    return [statistics.median(times) for times in rounds_in_turns(rounds, contestants)]


def rounds_in_turns(
    rounds: int,
    contestants: Sequence[Callable[[], Any]],
    advance: Callable[[], None] = lambda: None,
    *,
    shuffled: bool = False,
) -> list[list[float]]:
    """Give the seconds of each function in every round, called in turns after a warm-up round.

    Args:
        rounds: How many rounds count.
        contestants: The functions.
        advance: Called after every round, the first included.
        shuffled: Take another order in every round, so that none always follows one that leaves the caches full.
    """
    seconds: list[list[float]] = [[] for _ in contestants]
    order = list(range(len(contestants)))
    shuffle = Random(0).shuffle
    for number in range(rounds + 1):
        if shuffled:
            shuffle(order)
        for index in order:
            started = time.perf_counter()
            contestants[index]()
            if number:
                seconds[index].append(time.perf_counter() - started)
        advance()
    return seconds


def rounds_within(seconds: float, contestants: Sequence[Callable[[], Any]], least: int, most: int) -> int:
    """Give how many rounds of all functions take about so many seconds, by one round behind a warm-up of each."""
    taken = 0.0
    for contestant in contestants:
        contestant()
        started = time.perf_counter()
        contestant()
        taken += time.perf_counter() - started
    return min(max(int(seconds / max(taken, 1e-9)), least), most)


def time_linear(linear: nn.Linear, frames: Sequence[int], kernel: bool) -> Timing:
    """Time a float32 module on the CPU, dense and in every sparse layout.

    Args:
        linear: The module.
        frames: Numbers of frames in a product.
        kernel: Whether there is a kernel; otherwise PyTorch's CSR product is timed.
    """
    widths: tuple[int | None, ...] = WIDTHS if kernel and linear.in_features <= MAX_COLUMNS else (None,)
    candidates = [SparseLinear(linear, width) for width in widths]
    return _time(linear, candidates, [(1, count, linear.in_features) for count in frames])


def time_convolution(convolution: nn.Conv1d, frames: Sequence[int]) -> Timing:
    """Time a float32 convolution on the CPU, dense and in every layout of the kernel.

    Args:
        convolution: The module, which a :class:`~sparsewav.inference.sparse_modules.SparseConv1d` can replace.
        frames: Numbers of frames in its output.
    """
    candidates = [SparseConv1d(convolution, width) for width in WIDTHS]
    (kernel,), (stride,) = convolution.kernel_size, convolution.stride
    lengths = [(min(count, LONGEST) - 1) * stride + kernel for count in frames]
    return _time(convolution, candidates, [(1, convolution.in_channels, length) for length in lengths])


@torch.inference_mode()
def _time(
    dense: nn.Linear | nn.Conv1d, candidates: Sequence[SparseLinear | SparseConv1d], shapes: Sequence[tuple[int, ...]]
) -> Timing:
    """Time a module and sparse ones in turns on noise of each shape, and choose the fastest of the sparse ones."""
    seconds = []
    for shape in shapes:
        inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        seconds.append(in_turns(ROUNDS, [lambda x=inputs, m=module: m(x) for module in (dense, *candidates)]))  # type: ignore[misc]
    totals = [sum(row[1 + index] / row[0] for row in seconds) for index in range(len(candidates))]
    best = totals.index(min(totals))
    return Timing(
        candidates[best].rows,
        candidates[best].cols,
        sparsity(dense.weight),
        tuple(row[0] for row in seconds),
        tuple(row[1 + best] for row in seconds),
        candidates[best].width,
    )


def sparsity(weight: Tensor) -> float:
    """Give the share of zeros in a weight."""
    return 1 - int(weight.count_nonzero()) / weight.numel()


def setting(frames: Sequence[int], kernel: bool) -> str:
    """Describe all that timings depend on besides the matrix, as the key under which they are stored."""
    source = blake2b(SOURCE.read_bytes(), digest_size=4).hexdigest() if kernel else "csr"
    threads = torch.get_num_threads()
    processor = blake2b(processor_name().encode(), digest_size=4).hexdigest()
    return f"{processor}, {threads} threads, PyTorch {torch.__version__}, kernel {source}, frames {list(frames)}"


def remembered(folder: Path | None, frames: Sequence[int], kernel: bool) -> dict[str, Timing]:
    """Read the timings of a setting from the folder of a model; a file that holds anything else gives none."""

    def timings(entries: Any) -> dict[str, Timing]:
        return {name: _timing(name, entry, len(frames), kernel) for name, entry in entries.items()}

    return read_remembered(folder, setting(frames, kernel), timings, "the products are timed again") or {}


def read_remembered(folder: Path | None, key: str, check: Callable[[Any], Read], otherwise: str) -> Read | None:
    """Read what :func:`remember` stored under a key; None if there is nothing, or nothing that can be used.

    Args:
        folder: Of the model.
        key: The setting.
        check: Gives what the file holds under the key in its own form, or raises an error.
        otherwise: What is done instead where it raises one, for the log.
    """
    path = folder / REMEMBERED if folder else None
    if path is None or not path.is_file():
        return None
    try:
        return check(json.loads(path.read_text(encoding="utf-8")).get(key, {}))
    # a file that is nested a thousand times exceeds the recursion limit
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        log.warning("%s holds no timings that can be used (%s); %s", path, error, otherwise)
        return None


def check_seconds(seconds: Any, frames: int) -> tuple[float, ...]:
    """Give the seconds that a file holds for so many numbers of frames.

    Raises:
        ValueError: They cannot have been measured.
    """
    values = tuple(seconds)
    if len(values) != frames or not all(type(value) is float and 0 < value < math.inf for value in values):
        raise ValueError(f"{frames} numbers of seconds above 0, not {seconds}")
    return values


def _timing(name: str, entry: Any, frames: int, kernel: bool) -> Timing:
    """Give the timing that a file holds under a name for so many numbers of frames.

    Raises:
        ValueError: It cannot have been measured.
    """
    timing = Timing(**entry | {name: check_seconds(entry[name], frames) for name in ("dense", "sparse")})
    widths = WIDTHS if kernel and timing.cols <= MAX_COLUMNS else (None,)
    if timing.width not in widths or isinstance(timing.width, float):
        raise ValueError(f"blocks of {timing.width} columns for {timing.cols}")
    if not name.startswith(f"{timing.rows}x{timing.cols}, "):
        raise ValueError(f"a matrix of {timing.rows}x{timing.cols} for one of {name}")
    return timing


def remember(folder: Path | None, key: str, timings: Mapping[str, Any]) -> None:
    """Add the timings of a setting, dataclasses by name, to the file in a model's folder, or log why they are not."""
    if folder is None:
        return
    path = folder / REMEMBERED
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        record = {}
    record = record if isinstance(record, dict) else {}
    record[key] = {name: asdict(timing) for name, timing in sorted(timings.items())}
    try:
        with write_file(path) as temporary:
            temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    except UserError as error:
        log.warning("the timings are not remembered: %s", error)
