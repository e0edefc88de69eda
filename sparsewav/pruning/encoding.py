"""A model's tensors as few bytes: masks, whole numbers on grids, half precision where it is exact; a file's size."""

import json
import math
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor

from sparsewav.pruning.coding import BITS, FORMAT, VERSION, Coding, alphabet_of, digits_of, header_text
from sparsewav.pruning.grid import find_grid


def encode_tensors(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Encode the tensors of a model.

    Args:
        tensors: By their names in a checkpoint.

    Returns:
        The tensors to store, by the same names, and the header without its checksum.
    """
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:  # deflating releases the interpreter lock
        encoded = dict(zip(tensors, threads.map(encode_tensor, tensors.values()), strict=True))
    # Tensors of float16 in the file are float32 in the model, unless it has some itself.
    narrows = not any(tensor.dtype == torch.float16 for tensor in tensors.values())
    stored, entries = {}, {}
    for name, tensor in tensors.items():
        if part := encoded[name]:
            stored[name], entries[name] = part[0], part[1].entry()
        else:
            plain = tensor.detach().cpu().contiguous()
            stored[name] = _narrowed(plain) if narrows else plain
    return stored, {"version": VERSION, "coded": entries, "float16": "float32" if narrows else "float16"}


def file_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Give the exact size of the file of a model in bitmask format, with its header.

    Args:
        tensors: By their names in a checkpoint, each once.
    """
    stored, header = encode_tensors(tensors)
    return len(save(stored, {FORMAT: header_text(header | {"checksum": "0" * 64})}))


def encode_tensor(tensor: Tensor) -> tuple[UInt8[Tensor, " bytes"], Coding] | None:
    """Encode a tensor of floating-point numbers of at least two dimensions as a row of bytes.

    Args:
        tensor: It is taken as a matrix (first dimension, others).

    Returns:
        The bytes, and what the header says of them; None if the tensor takes no more bytes as it is, or in float16.
    """
    if tensor.dtype not in BITS or tensor.dim() < 2 or not tensor.numel():
        return None
    tensor = tensor.detach().cpu().contiguous()
    plain = _narrowed(tensor)
    streams, coding = _encode_grid(tensor) or _encode_values(plain, tensor)
    # A tensor that is stored as it is needs no entry.
    if sum(coding.bytes) + len(json.dumps(coding.entry())) >= plain.nbytes:
        return None
    return torch.frombuffer(bytearray(b"".join(streams)), dtype=torch.uint8), coding


def coded_bytes(weight: Float[Tensor, "rows cols"]) -> int:
    """Give the bytes that a matrix takes in a file, without its lines in the headers."""
    encoded = encode_tensor(weight)
    return len(encoded[0]) if encoded else _narrowed(weight.detach()).nbytes


def _narrowed(tensor: Tensor) -> Tensor:
    """Give float32 as float16 where that loses no bit."""
    if tensor.dtype != torch.float32:
        return tensor
    half = tensor.half()
    return half if torch.equal(half.float().view(torch.int32), tensor.view(torch.int32)) else tensor


def _dtype_name(tensor: Tensor) -> str | None:
    return None if tensor.dtype == torch.float32 else str(tensor.dtype).removeprefix("torch.")


def _encode_grid(tensor: Tensor) -> tuple[list[bytes], Coding] | None:
    grid = find_grid(tensor.reshape(len(tensor), -1))
    scales = _encode_scales(grid.scales) if grid else None
    if grid is None or scales is None:
        return None
    flat = grid.codes.reshape(-1).numpy()
    kept = flat != 0
    # Where zeros are rare, they take fewer bytes among the codes.
    mask, (codes, low, high) = min(
        (b"", _encode_codes(flat, with_zero=True)),
        (_deflate(np.packbits(kept, bitorder="little")), _encode_codes(flat[kept], with_zero=False)),
        key=lambda choice: len(choice[0]) + len(choice[1][0]),
    )
    shift, planes = scales
    streams = [mask, codes, *planes]
    coding = Coding(
        shape=tuple(tensor.shape),
        bytes=tuple(len(stream) for stream in streams),
        dtype=_dtype_name(tensor),
        codes=(low, high),
        group=grid.group,
        shift=shift,
    )
    return streams, coding


def _encode_scales(scales: Float[Tensor, "rows groups"]) -> tuple[int, list[bytes]] | None:
    """Give the power of two, and the high and the low bytes of the float16; None if float16 does not reach so far."""
    shift = math.frexp(float(scales.max()))[1] - 15
    shifted = torch.ldexp(scales.double(), torch.tensor(-shift))
    half = shifted.half()
    if not torch.equal(half.double(), shifted) or not bool((half > 0).all()):
        return None
    planes = half.reshape(-1).numpy().view(np.uint8).reshape(-1, 2)  # the low byte is the first
    return shift, [_deflate(planes[:, 1].copy()), _deflate(planes[:, 0].copy())]


def _encode_codes(codes: NDArray[np.int16], *, with_zero: bool) -> tuple[bytes, int, int]:
    """Pack whole numbers, as many to a byte as there is room for; gives the smallest and the largest, too."""
    low, high = (int(codes.min()), int(codes.max())) if len(codes) else (0, 0)
    alphabet = alphabet_of(low, high, with_zero=with_zero)
    count, digits = len(alphabet), digits_of(len(alphabet))
    if count < 2:
        return b"", low, high
    symbols = np.zeros(high - low + 1, np.uint16)
    symbols[alphabet - low] = np.arange(count)
    indices = symbols[codes - low]
    if count > 256:
        return _deflate(np.concatenate([indices & 255, indices >> 8]).astype(np.uint8)), low, high
    padded = np.zeros(-(-len(indices) // digits) * digits, np.uint8)
    padded[: len(indices)] = indices
    packed = padded[::digits].copy()
    for digit in range(1, digits):
        packed += padded[digit::digits] * np.uint8(count**digit)
    return _deflate(packed), low, high


def _encode_values(plain: Tensor, tensor: Tensor) -> tuple[list[bytes], Coding]:
    """Encode the mask of a tensor and the numbers that are not zero, as float16 if that is exact."""
    flat = plain.reshape(-1)
    integers = flat.view(BITS[flat.dtype]).numpy()  # NumPy knows no bfloat16
    kept = integers != 0
    streams = [_deflate(np.packbits(kept, bitorder="little")), integers[kept].tobytes()]
    coding = Coding(
        shape=tuple(tensor.shape),
        bytes=tuple(len(stream) for stream in streams),
        dtype=_dtype_name(tensor),
        values=str(plain.dtype).removeprefix("torch."),
    )
    return streams, coding


def _deflate(content: NDArray[np.uint8]) -> bytes:
    """Give the shortest of the bytes as they are, deflated with Huffman codes alone, and with repetitions."""
    shortest = content.tobytes()
    # Repetitions are rare, and long where there are some, as of rows of zeros: a quick search finds them.
    for level, strategy in ((6, zlib.Z_HUFFMAN_ONLY), (1, zlib.Z_DEFAULT_STRATEGY)):
        deflate = zlib.compressobj(level, zlib.DEFLATED, -15, 9, strategy)
        deflated = deflate.compress(content.data) + deflate.flush()
        if len(deflated) < len(shortest):
            shortest = deflated
    return shortest
