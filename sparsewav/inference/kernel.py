"""The sparse product and convolution in C++: compiled for this processor on first use, cached, called through ctypes.

Loading a library runs what is in it. So it is loaded from the cache only if nobody else could have written it there:
the file and the folders up to ``kernels`` belong to this user, and no other may write to them.
"""

import ctypes
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jaxtyping import Float, Int16, Int32
from torch import Tensor

from sparsewav.cache import cached_folder
from sparsewav.errors import UserError
from sparsewav.files import cache_folder

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("product.cpp")
LIBRARY = "product.so"

MAX_COLUMNS = 2**16
"""Column indices are stored in 16 bits, from 0."""


class NoKernel(Exception):
    """The kernel cannot be compiled or loaded on this machine, for the reason in the message."""


@dataclass(frozen=True)
class Kernel:
    """The compiled functions of ``product.cpp``, which says what they take.

    Attributes:
        product: ``sparsewav_product``.
        convolution: ``sparsewav_convolution``.
    """

    product: Callable[..., None]
    convolution: Callable[..., None]


@cache
def sparse_kernel() -> Kernel:
    """Give the functions of ``product.cpp``, compiled on first use by one process for all.

    Where the cache cannot be written, or others can write to it, they are compiled for this process alone.

    Raises:
        NoKernel: There is no compiler, or it failed, or what it made does not load.
    """
    compiler = _compiler()
    try:
        return _from_cache(compiler)
    except (UserError, OSError, AttributeError) as error:
        log.warning("the sparse kernel is compiled for this process alone: %s", error)
    try:
        with TemporaryDirectory(prefix="sparsewav-") as folder:  # of this user alone; what is loaded stays loaded
            _compile(compiler, Path(folder))
            return _load(Path(folder))
    except (OSError, AttributeError) as error:
        raise NoKernel(f"the compiled kernel does not load: {error}") from error


def _from_cache(compiler: list[str]) -> Kernel:
    """Load the kernel from the cache, compiling it if it is not there or damaged."""
    source = SOURCE.read_text(encoding="utf-8")
    identity = {"source": source, "compiler": compiler, "processor": processor_name(), "flags": _FLAGS}
    kernels = cache_folder() / "kernels"
    kernels.parent.mkdir(parents=True, exist_ok=True)
    kernels.mkdir(mode=0o755, exist_ok=True)  # a cache whose group may write is common: it is this user's own group
    _refuse_foreign(kernels)
    folder, _ = cached_folder(kernels.name, identity, lambda made: _compile(compiler, made), enabled=True)
    for path in (folder, folder / LIBRARY):
        _refuse_foreign(path)
    return _load(folder)


def _refuse_foreign(path: Path) -> None:
    """Refuse a file or folder that another user owns or may write to.

    Raises:
        UserError: There is one.
    """
    if sys.platform == "win32":  # has other permissions, which these bits do not show
        return
    status = path.stat()
    if status.st_uid != os.getuid():
        raise UserError(f"{path} belongs to another user; give this user a cache of its own ($SPARSEWAV_CACHE)")
    if status.st_mode & 0o022:
        raise UserError(f"other users may write to {path}; forbid it (chmod go-w {shlex.quote(str(path))})")


def _load(folder: Path) -> Kernel:
    """Load the kernel from a folder that :func:`_compile` filled.

    Raises:
        OSError: It does not load.
        AttributeError: It lacks a function.
    """
    library: Any = ctypes.CDLL(str(folder / LIBRARY))
    functions = (library.sparsewav_product, library.sparsewav_convolution)
    for function, sizes in zip(functions, (4, 8), strict=True):
        function.argtypes = [ctypes.c_void_p, *[ctypes.c_int64] * sizes, *[ctypes.c_void_p] * 6, ctypes.c_int]
        function.restype = None
    return Kernel(*functions)


TILE = 64
"""Frames in a tile of the kernel, of which its buffer holds a multiple."""

_OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]  # Apple's compiler lacks it
_FLAGS = ["-O3", "-march=native", "-std=c++17", "-fPIC", *_OPENMP]


def _compiler() -> list[str]:
    asked = os.environ.get("CXX")
    for name in [asked] if asked else ["c++", "g++", "clang++"]:
        words = shlex.split(name)
        if words and shutil.which(words[0]):
            return words
    raise NoKernel(f"there is no C++ compiler ({asked or 'c++, g++ or clang++'})")


def _compile(compiler: list[str], folder: Path) -> None:
    # Linked without an OpenMP library, so that the kernel uses the one that PyTorch has loaded, and its threads. A
    # second library would start a second pool of threads on the same cores.
    object_file = folder / "product.o"
    for command in (
        [*compiler, *_FLAGS, "-c", str(SOURCE), "-o", str(object_file)],
        [*compiler, "-shared", str(object_file), "-o", str(folder / LIBRARY)],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
            raise NoKernel(f"{shlex.join(command)} failed: {lines[0]}")
    object_file.unlink()


def processor_model() -> str:
    """Give the name that the processor's maker gives it, or the kind of machine where that is not known."""
    fields = _processor()
    return fields.get("model name") or fields.get("CPU part") or platform.processor() or platform.machine()


def _processor() -> dict[str, str]:
    """Read what Linux says of the processor; empty on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return {key.strip(): value.strip() for key, value in fields.items()}


@cache
def processor_name() -> str:
    """Describe the processor and its instruction sets, on which the result of ``-march=native`` depends."""
    fields = _processor()
    if not fields:
        return f"{platform.machine()} {platform.processor()}"
    names = ("vendor_id", "cpu family", "model", "model name", "flags", "Features", "CPU part")
    return " ".join([platform.machine(), *(fields[name] for name in names if name in fields)])


def multiply(
    inputs: Tensor, rows: int, width: int, offsets: Tensor, columns: Tensor, values: Tensor, bias: Tensor | None
) -> Tensor:
    """Compute ``inputs @ weight.T + bias``, (frames, rows) in float32, with a weight stored in blocks of columns.

    Args:
        inputs: Shape (frames, cols), float32, contiguous, on the CPU.
        rows: Rows of the weight.
        width: Columns in a block of the weight.
        offsets: Shape (blocks * rows + 1,), int32: the start of each row of each block in ``columns`` and ``values``.
        columns: Shape (nonzeros,), int16 with the bits of unsigned numbers.
        values: Shape (nonzeros,), float32.
        bias: Shape (rows,), float32.
    """
    frames, cols = inputs.shape
    tiles = inputs.new_empty((frames + TILE - 1) // TILE * TILE * cols)
    outputs = inputs.new_empty(frames, rows)
    sparse_kernel().product(
        *(inputs.data_ptr(), frames, rows, cols, -(-cols // width)),
        *(offsets.data_ptr(), columns.data_ptr(), values.data_ptr(), bias.data_ptr() if bias is not None else None),
        *(tiles.data_ptr(), outputs.data_ptr(), torch.get_num_threads()),
    )
    return outputs


def convolve(
    inputs: Float[Tensor, "batch channels length"],
    rows: int,
    kernel: int,
    stride: int,
    width: int,
    offsets: Int32[Tensor, " blocks_rows_and_one"],
    columns: Int16[Tensor, " nonzeros"],
    values: Float[Tensor, " nonzeros"],
    bias: Float[Tensor, " rows"] | None,
) -> Float[Tensor, "batch rows frames"]:
    """Compute a convolution without padding in float32, with a weight stored in blocks of columns.

    Inputs that are a transposed (batch, length, channels) are read as they lie, and so lie the outputs then.

    Args:
        inputs: float32 on the CPU, at least one utterance of at least the length of the kernel.
        rows: The channels of the outputs.
        kernel, stride: Of the convolution, in frames.
        width, offsets, columns, values, bias: As of :func:`multiply`; a column is channel * kernel + tap.
    """
    batch, channels, length = inputs.shape
    frames = (length - kernel) // stride + 1
    threads = torch.get_num_threads()
    frame_major = not inputs.is_contiguous() and inputs.transpose(1, 2).is_contiguous()
    inputs = inputs if frame_major else inputs.contiguous()
    shape = (batch, frames, rows) if frame_major else (batch, rows, frames)
    outputs = inputs.new_empty(shape)
    tiles = inputs.new_empty(threads * channels * kernel * TILE)
    sparse_kernel().convolution(
        *(inputs.data_ptr(), batch, channels, length, kernel, stride, int(frame_major), rows),
        *(-(-channels * kernel // width), offsets.data_ptr(), columns.data_ptr(), values.data_ptr()),
        *(bias.data_ptr() if bias is not None else None, tiles.data_ptr(), outputs.data_ptr(), threads),
    )
    return outputs.transpose(1, 2) if frame_major else outputs
