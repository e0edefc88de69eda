"""Tensors as few bytes and back, bit for bit: masks, whole numbers on grids, half precision where it is exact.

``models/BITMASK_FORMAT.md`` describes the bytes, and ``models/bitmask.py`` reads and writes the files. It is part of
the engine, because a budget in bytes needs the exact size of what a matrix becomes.
"""

import json
import math
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor

from sparsewav.errors import UserError
from sparsewav.pruning.grid import LARGEST, find_grid

FORMAT = "sparsewav-bitmask"
"""The one entry in the metadata of a file."""

VERSION = 3

_BITS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
"""Integers of the same width. Numbers are compared by their bits, so that −0 is not 0 and NaN equals itself."""

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _BITS}


@dataclass(kw_only=True)
class Coding:
    """What a file's header says of a tensor that is stored as a row of bytes.

    Attributes:
        shape: Shape of the tensor.
        bytes: Bytes of every stream, in the order in which they lie: mask, and then values, or codes and the high and
            the low bytes of the scales. A stream that is shorter than its content is deflated; a mask of no bytes: all
            weights are stored.
        dtype: The tensor's type, where that is not float32.
        values: Type of the values, where the tensor is no whole numbers on a grid.
        codes: The smallest and the largest whole number; 0 is none of them where there is a mask.
        group: Consecutive columns that share a scale.
        shift: The scales are float16 times two to the power of it.
    """

    shape: tuple[int, ...]
    bytes: tuple[int, ...]
    dtype: str | None = None
    values: str | None = None
    codes: tuple[int, int] | None = None
    group: int | None = None
    shift: int | None = None

    def entry(self) -> dict[str, Any]:
        """Give the entry of the header, which :func:`read_coding` reads."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def read_coding(entry: Any, name: str) -> Coding:
    """Read an entry of a header.

    Raises:
        UserError: It is none; ``name`` says of which tensor and file.
    """
    found = dict(entry) if isinstance(entry, dict) else {}
    streams, keys = (2, {"values"}) if "values" in found else (4, {"codes", "group", "shift"})
    right = found.keys() - {"dtype"} == {"shape", "bytes", *keys}
    right = right and _whole_numbers(found["shape"], 0) and len(found["shape"]) > 1 and min(found["shape"]) > 0
    right = right and _whole_numbers(found["bytes"], 0) and len(found["bytes"]) == streams
    right = right and all(found.get(key, "float32") in list(_DTYPES) for key in ("dtype", "values"))
    if right and streams == 4:
        codes, group, shift = found["codes"], found["group"], found["shift"]
        right = _whole_numbers(codes, -LARGEST) and len(codes) == 2 and codes[0] <= codes[1] <= LARGEST
        right = right and _whole_numbers([group, shift], -1000) and group > 0 and shift <= 1000
    check_file(right, f"the header has no readable entry for {name}")
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}
    return Coding(**fields)


def _whole_numbers(numbers: Any, least: int) -> bool:
    return isinstance(numbers, list) and all(type(number) is int and number >= least for number in numbers)


# ------------------------------------------------------------------------------------------------------ to few bytes


def encode_tensor(tensor: Tensor) -> tuple[UInt8[Tensor, " bytes"], Coding] | None:
    """Encode a tensor of floating-point numbers of at least two dimensions as a row of bytes.

    Args:
        tensor: It is taken as a matrix (first dimension, others).

    Returns:
        The bytes, and what the header says of them; None if the tensor takes no more bytes as it is, or in float16.
    """
    if tensor.dtype not in _BITS or tensor.dim() < 2 or not tensor.numel():
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
    alphabet = _alphabet(low, high, with_zero=with_zero)
    count, digits = len(alphabet), _digits(len(alphabet))
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


def _alphabet(low: int, high: int, *, with_zero: bool) -> NDArray[np.int64]:
    alphabet = np.arange(low, high + 1)
    return alphabet if with_zero else alphabet[alphabet != 0]


def _digits(count: int) -> int:
    """Give how many symbols of an alphabet of ``count`` a byte holds."""
    digits = 1
    while count >= 2 and count ** (digits + 1) <= 256:
        digits += 1
    return digits


def _encode_values(plain: Tensor, tensor: Tensor) -> tuple[list[bytes], Coding]:
    """Encode the mask of a tensor and the numbers that are not zero, as float16 if that is exact."""
    flat = plain.reshape(-1)
    integers = flat.view(_BITS[flat.dtype]).numpy()  # NumPy knows no bfloat16
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


# ---------------------------------------------------------------------------------------------------------- and back


def decode_tensor(stored: Tensor, coding: Coding, name: str) -> Tensor:
    """Decode what :func:`encode_tensor` gave, bit for bit.

    Raises:
        UserError: The bytes are not what the header says; ``name`` says of which tensor and file.
    """
    is_row = stored.dtype == torch.uint8 and stored.dim() == 1 and len(stored) == sum(coding.bytes)
    check_file(is_row, f"{name} is not a row of {sum(coding.bytes)} bytes, as its header says")
    content, ends = stored.numpy(), np.cumsum([0, *coding.bytes])
    streams = [content[start:end] for start, end in pairwise(ends)]
    size = math.prod(coding.shape)
    kept = None
    if len(streams[0]):
        kept = _positions(_inflate(streams[0], -(-size // 8), f"the mask of {name}"), size, name)
    dtype = _DTYPES[coding.dtype or "float32"]
    if coding.values is None:
        return _decode_grid(streams[1:], kept, coding, name).view(coding.shape).to(dtype)
    stored_dtype = _DTYPES[coding.values]
    whole = coding.bytes[1] % stored_dtype.itemsize == 0
    check_file(whole, f"the values of {name} are not a whole number of {coding.values}")
    # A copy, because the bytes of a file lie anywhere; torch cannot view a row of no bytes as wider numbers.
    values = torch.empty(coding.bytes[1] // stored_dtype.itemsize, dtype=stored_dtype)
    values.view(torch.uint8).numpy()[:] = streams[1]
    return _scatter(values, kept, size, name).view(coding.shape).to(dtype)


def decode_masked(bitmask: Tensor, values: Tensor, shape: tuple[int, ...], name: str) -> Tensor:
    """Decode a bit for every weight and the values of those that are kept, as versions 1 and 2 of the format have them.

    Raises:
        UserError: Bits, values and shape do not fit each other; ``name`` says of which tensor and file.
    """
    size = math.prod(shape)
    is_bytes = bitmask.dtype == torch.uint8 and bitmask.dim() == 1 and len(bitmask) == -(-size // 8)
    check_file(is_bytes, f"the bitmask of {name} is not {-(-size // 8)} bytes, one bit a weight")
    is_row = values.dtype in _BITS and values.dim() == 1
    check_file(is_row, f"the values of {name} are not one row of floating-point numbers")
    return _scatter(values, _positions(bitmask.numpy(), size, name), size, name).view(shape)


def _positions(bitmask: NDArray[np.uint8], size: int, name: str) -> NDArray[np.intp]:
    """Give the places of the weights that are kept, of bits from the lowest of every byte.

    Raises:
        UserError: There are bits behind the last weight.
    """
    check_file(
        not size % 8 or not bitmask[-1] >> (size % 8), f"the bitmask of {name} has bits set behind its last weight"
    )
    return np.flatnonzero(np.unpackbits(bitmask, count=size, bitorder="little").view(bool))


def _scatter(values: Tensor, kept: NDArray[np.intp] | None, size: int, name: str) -> Tensor:
    """Put values at their places in a row of ``size`` numbers, of which the others are zero; None: all of them.

    Raises:
        UserError: There are more or fewer values than places.
    """
    count = size if kept is None else len(kept)
    check_file(
        count == len(values), f"the bitmask of {name} counts {count} kept weights and the file has {len(values)}"
    )
    if kept is None:
        return values
    integers = values.view(_BITS[values.dtype])  # NumPy knows no bfloat16
    flat = torch.zeros(size, dtype=integers.dtype)
    flat.numpy()[kept] = integers.numpy()  # three times as fast as indexing by a mask
    return flat.view(values.dtype)


def _decode_grid(
    streams: list[NDArray[np.uint8]], kept: NDArray[np.intp] | None, coding: Coding, name: str
) -> Float[Tensor, "rows cols"]:
    assert coding.codes
    assert coding.group
    assert coding.shift is not None
    rows, cols = coding.shape[0], math.prod(coding.shape[1:])
    size = rows * cols
    alphabet = _alphabet(*coding.codes, with_zero=kept is None)
    codes = _decode_codes(streams[0], size if kept is None else len(kept), alphabet, name)
    weight = _scatter(torch.from_numpy(codes), kept, size, name).view(rows, cols)
    count = rows * -(-cols // coding.group)
    planes = [_inflate(stream, count, f"the scales of {name}") for stream in streams[1:]]
    half = np.stack(planes[::-1], axis=1).view(np.float16).reshape(rows, -1)
    scales = torch.ldexp(torch.from_numpy(half).double(), torch.tensor(coding.shift)).float()
    fine = bool(((scales > 0) & scales.isfinite()).all())
    check_file(fine, f"the scales of {name} are not all positive and finite")
    whole = cols - cols % coding.group
    if whole:
        weight[:, :whole].unflatten(1, (-1, coding.group)).mul_(scales[:, : whole // coding.group, None])
    if whole < cols:
        weight[:, whole:].mul_(scales[:, -1:])
    return weight


def _decode_codes(stream: NDArray[np.uint8], count: int, alphabet: NDArray[np.int64], name: str) -> NDArray[np.float32]:
    """Give the whole numbers, as float32."""
    values, digits = len(alphabet), _digits(len(alphabet))
    check_file(bool(values) or not count, f"{name} has weights, and its header knows no value of them")
    if values < 2:
        check_file(not len(stream), f"the codes of {name} are not 0 bytes")
        return np.full(count, alphabet[0] if values else 0, np.float32)
    wrong = f"the codes of {name} are not all codes of {values} values"
    if values > 256:
        planes = _inflate(stream, 2 * count, f"the codes of {name}").astype(np.int64)
        symbols = planes[:count] + 256 * planes[count:]
        check_file(not count or int(symbols.max()) < values, wrong)
        return alphabet.astype(np.float32)[symbols]
    packed = _inflate(stream, -(-count // digits), f"the codes of {name}")
    bound = values**digits
    check_file(bound == 256 or not count or int(packed.max()) < bound, wrong)
    check_file(not count % digits or int(packed[-1]) < values ** (count % digits), wrong)
    # What every byte stands for: its digits to the base of the number of values, the lowest first.
    table = alphabet.astype(np.float32)[np.arange(bound)[:, None] // values ** np.arange(digits) % values]
    return table[packed].reshape(-1)[:count]


def _inflate(stream: NDArray[np.uint8], size: int, name: str) -> NDArray[np.uint8]:
    """Give the content of a stream, which is deflated if it is shorter than its content."""
    if len(stream) == size:
        return stream
    check_file(len(stream) < size, f"{name} is longer than {size} bytes")
    inflate = zlib.decompressobj(-15)
    try:
        content = inflate.decompress(stream.data, size + 1)  # one byte more than there may be, which ends a bomb
    except zlib.error as error:
        raise UserError(f"{name} cannot be inflated ({error}); {AGAIN}") from error
    ends = inflate.eof and not inflate.unused_data and len(content) == size
    check_file(ends, f"{name} is not {size} bytes when inflated")
    return np.frombuffer(content, np.uint8)


# --------------------------------------------------------------------------------------------------- the whole file


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


def decode_tensors(
    stored: Mapping[str, Tensor], codings: Mapping[str, Coding], float16: str, where: str
) -> dict[str, Tensor]:
    """Decode what :func:`encode_tensors` gave.

    Args:
        stored: The stored tensors by name.
        codings: What the header says of those that are coded.
        float16: Type in memory of the others that are stored as float16.
        where: The file, for messages.

    Raises:
        UserError: The bytes are not what the header says.
    """

    def decode(name: str) -> Tensor:
        if name in codings:
            return decode_tensor(stored[name], codings[name], f"{name} in {where}")
        tensor = stored[name]
        return tensor.to(_DTYPES[float16]) if tensor.dtype == torch.float16 else tensor

    # Inflating and NumPy release the interpreter lock. The largest come first, so that no thread is left with one.
    order = sorted(stored, key=lambda name: -stored[name].nbytes)
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        return dict(zip(order, threads.map(decode, order), strict=True))


def header_text(header: Mapping[str, Any]) -> str:
    """Give the entry of a header in the metadata of a file: the same text for the same header."""
    return json.dumps(header, sort_keys=True, separators=(",", ":"))


def file_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Give the exact size of the file of a model in bitmask format, with its header.

    Args:
        tensors: By their names in a checkpoint, each once.
    """
    stored, header = encode_tensors(tensors)
    return len(save(stored, {FORMAT: header_text(header | {"checksum": "0" * 64})}))


AGAIN = "the file is broken: write it again with sparsewav-export"


def check_file(holds: bool, complaint: str) -> None:
    """Refuse a broken file with a complaint, unless what is checked holds.

    Raises:
        UserError: It does not hold.
    """
    if not holds:
        raise UserError(f"{complaint}; {AGAIN}")
