"""A model's tensors from the bytes of a file in bitmask format, bit for bit; what the bytes cannot be is refused."""

import math
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from sparsewav.errors import UserError
from sparsewav.pruning.coding import AGAIN, BITS, DTYPES, Coding, alphabet_of, check_file, digits_of

CHUNK = 1 << 18
"""About so many weights are decoded at a time, which fit the processor's cache in float32."""


def decode_tensors(
    stored: Mapping[str, Tensor], codings: Mapping[str, Coding], float16: str, where: str
) -> dict[str, Tensor]:
    """Decode what :func:`~sparsewav.pruning.encoding.encode_tensors` gave.

    Args:
        stored: The stored tensors by name.
        codings: What the header says of those that are coded.
        float16: Type in memory of the others that are stored as float16.
        where: The file, for messages.

    Returns:
        The tensors by name. Those that are whole numbers on a grid are finite.

    Raises:
        UserError: The bytes are not what the header says.
    """

    def decode(name: str) -> Tensor:
        if name in codings:
            return decode_tensor(stored[name], codings[name], f"{name} in {where}")
        tensor = stored[name]
        return tensor.to(DTYPES[float16]) if tensor.dtype == torch.float16 else tensor

    # Inflating and NumPy release the interpreter lock. The largest come first, so that no thread is left with one.
    order = sorted(stored, key=lambda name: -stored[name].nbytes)
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        return dict(zip(order, threads.map(decode, order), strict=True))


def decode_tensor(stored: Tensor, coding: Coding, name: str) -> Tensor:
    """Decode what :func:`~sparsewav.pruning.encoding.encode_tensor` gave, bit for bit.

    Raises:
        UserError: The bytes are not what the header says; ``name`` says of which tensor and file.
    """
    is_row = stored.dtype == torch.uint8 and stored.dim() == 1 and len(stored) == sum(coding.bytes)
    check_file(is_row, f"{name} is not a row of {sum(coding.bytes)} bytes, as its header says")
    content, ends = stored.numpy(), np.cumsum([0, *coding.bytes])
    streams = [content[start:end] for start, end in pairwise(ends)]
    size, mask = math.prod(coding.shape), None
    if len(streams[0]):
        mask = _inflate(streams[0], -(-size // 8), f"the mask of {name}")
        _check_end(mask, size, name)
    dtype = DTYPES[coding.dtype or "float32"]
    if coding.values is None:
        return _decode_grid(streams[1:], mask, coding, name).view(coding.shape).to(dtype)
    stored_dtype = DTYPES[coding.values]
    whole = coding.bytes[1] % stored_dtype.itemsize == 0
    check_file(whole, f"the values of {name} are not a whole number of {coding.values}")
    # A copy, because the bytes of a file lie anywhere; torch cannot view a row of no bytes as wider numbers.
    values = torch.empty(coding.bytes[1] // stored_dtype.itemsize, dtype=stored_dtype)
    values.view(torch.uint8).numpy()[:] = streams[1]
    return _scatter(values, mask, size, name).view(coding.shape).to(dtype)


def decode_masked(bitmask: Tensor, values: Tensor, shape: tuple[int, ...], name: str) -> Tensor:
    """Decode a bit for every weight and the values of those that are kept, as versions 1 and 2 of the format have them.

    Raises:
        UserError: Bits, values and shape do not fit each other; ``name`` says of which tensor and file.
    """
    size = math.prod(shape)
    is_bytes = bitmask.dtype == torch.uint8 and bitmask.dim() == 1 and len(bitmask) == -(-size // 8)
    check_file(is_bytes, f"the bitmask of {name} is not {-(-size // 8)} bytes, one bit a weight")
    is_row = values.dtype in BITS and values.dim() == 1
    check_file(is_row, f"the values of {name} are not one row of floating-point numbers")
    _check_end(bitmask.numpy(), size, name)
    return _scatter(values, bitmask.numpy(), size, name).view(shape)


def _check_end(mask: NDArray[np.uint8], size: int, name: str) -> None:
    """Check a bit for every weight, from the lowest of every byte.

    Raises:
        UserError: There are bits behind the last weight.
    """
    check_file(not size % 8 or not mask[-1] >> (size % 8), f"the bitmask of {name} has bits set behind its last weight")


def _count(mask: NDArray[np.uint8] | None, size: int) -> int:
    """Give the number of weights that a mask keeps; None: all of them."""
    return size if mask is None else int(np.bitwise_count(mask).sum(dtype=np.int64))


def _chunks(
    mask: NDArray[np.uint8] | None, size: int, chunk: int
) -> Iterator[tuple[slice, slice | NDArray[np.intp], slice]]:
    """Go through the weights a chunk at a time, which the processor's cache holds with all that is made for it.

    Args:
        mask: A bit for every weight; None: all are kept.
        size: Number of weights.
        chunk: Weights in a chunk, a multiple of 8.

    Returns:
        The places of a chunk, those of the kept weights within it, and those of their values.
    """
    start = 0
    for first in range(0, size, chunk):
        place = slice(first, min(first + chunk, size))
        if mask is None:
            yield place, slice(None), place
            continue
        bits = np.unpackbits(mask[first // 8 : (first + chunk) // 8], count=place.stop - first, bitorder="little")
        kept = np.flatnonzero(bits.view(bool))  # three times as fast as indexing by a mask
        yield place, kept, slice(start, start + len(kept))
        start += len(kept)


def _scatter(values: Tensor, mask: NDArray[np.uint8] | None, size: int, name: str) -> Tensor:
    """Put values at their places in a row of ``size`` numbers, of which the others are zero.

    Raises:
        UserError: There are more or fewer values than places.
    """
    count = _count(mask, size)
    check_file(
        count == len(values), f"the bitmask of {name} counts {count} kept weights and the file has {len(values)}"
    )
    if mask is None:
        return values
    integers = values.view(BITS[values.dtype]).numpy()  # NumPy knows no bfloat16
    flat = torch.empty(size, dtype=values.dtype)
    weight = flat.view(BITS[values.dtype]).numpy()
    for place, kept, own in _chunks(mask, size, CHUNK):
        part = weight[place]
        part.fill(0)  # here, where it is in the cache
        part[kept] = integers[own]
    return flat


def _decode_grid(
    streams: list[NDArray[np.uint8]], mask: NDArray[np.uint8] | None, coding: Coding, name: str
) -> Float[Tensor, "rows cols"]:
    assert coding.codes
    assert coding.group
    assert coding.shift is not None
    rows, cols = coding.shape[0], math.prod(coding.shape[1:])
    alphabet = alphabet_of(*coding.codes, with_zero=mask is None)
    packed, table = _decode_codes(streams[0], _count(mask, rows * cols), alphabet, name)
    count = rows * -(-cols // coding.group)
    planes = [_inflate(stream, count, f"the scales of {name}") for stream in streams[1:]]
    half = np.stack(planes[::-1], axis=1).view(np.float16).reshape(rows, -1)
    scales = torch.ldexp(torch.from_numpy(half).double(), torch.tensor(coding.shift)).float().numpy()
    check_file(
        bool(((scales > 0) & np.isfinite(scales)).all()), f"the scales of {name} are not all positive and finite"
    )
    # Rounding keeps the order, so that no weight is larger than this one is.
    largest = torch.tensor(float(scales.max(initial=0)) * max(map(abs, coding.codes)), dtype=torch.float32)
    fits = bool(largest.to(DTYPES[coding.dtype or "float32"]).isfinite())
    check_file(fits, f"the scales of {name} are too large for its type")
    # Not of NumPy's memory, whose large pages may cost more time than all the rest.
    flat = torch.empty(rows * cols)
    weight = flat.numpy()
    height = 8 * max(1, CHUNK // (8 * cols))  # rows in a chunk
    for place, kept, own in _chunks(mask, rows * cols, height * cols):
        part, scale = weight[place], scales[place.start // cols : place.stop // cols]
        if mask is not None:
            part.fill(0)
        part[kept] = _codes_at(own, packed, table)
        if cols % coding.group:
            grouped, scale = part.reshape(-1, cols), np.repeat(scale, coding.group, axis=1)[:, :cols]
        else:
            grouped, scale = part.reshape(-1, coding.group), scale.reshape(-1, 1)
        np.multiply(grouped, scale, out=grouped)
    return flat.view(rows, cols)


def _decode_codes(
    stream: NDArray[np.uint8], count: int, alphabet: NDArray[np.int64], name: str
) -> tuple[NDArray[np.unsignedinteger], NDArray[np.float32]]:
    """Give whole numbers as they are packed, and the table of what every packed number stands for: one code or more.

    Raises:
        UserError: The stream is not that of so many codes.
    """
    values, digits = len(alphabet), digits_of(len(alphabet))
    check_file(bool(values) or not count, f"{name} has weights, and its header knows no value of them")
    if values < 2:
        check_file(not len(stream), f"the codes of {name} are not 0 bytes")
        return np.zeros(count, np.uint8), alphabet.astype(np.float32)[:, None]
    wrong = f"the codes of {name} are not all codes of {values} values"
    if values > 256:
        planes = _inflate(stream, 2 * count, f"the codes of {name}")
        symbols = planes[:count] + (planes[count:].astype(np.uint16) << 8)
        check_file(not count or int(symbols.max()) < values, wrong)
        return symbols, alphabet.astype(np.float32)[:, None]
    packed = _inflate(stream, -(-count // digits), f"the codes of {name}")
    bound = values**digits
    check_file(bound == 256 or not count or int(packed.max()) < bound, wrong)
    check_file(not count % digits or int(packed[-1]) < values ** (count % digits), wrong)
    # What every byte stands for: its digits to the base of the number of values, the lowest first.
    return packed, alphabet.astype(np.float32)[np.arange(bound)[:, None] // values ** np.arange(digits) % values]


def _codes_at(place: slice, packed: NDArray[np.unsignedinteger], table: NDArray[np.float32]) -> NDArray[np.float32]:
    """Give some of the codes that :func:`_decode_codes` gave."""
    digits = table.shape[1]
    first = place.start // digits
    together = table.view(np.dtype((np.void, table.itemsize * digits))).reshape(-1)
    codes = together.take(packed[first : -(-place.stop // digits)]).view(np.float32)
    return codes[place.start - first * digits : place.stop - first * digits]


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
