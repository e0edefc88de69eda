"""How a file in bitmask format says what its bytes are: the header's entry of a tensor, and what both directions share.

``models/BITMASK_FORMAT.md`` describes the bytes, :mod:`~sparsewav.pruning.encoding` makes them of tensors,
:mod:`~sparsewav.pruning.decoding` tensors of them, and ``models/bitmask.py`` reads and writes the files. It is part of
the engine, because a budget in bytes needs the exact size of what a matrix becomes.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sparsewav.errors import UserError
from sparsewav.pruning.grid import LARGEST

FORMAT = "sparsewav-bitmask"
"""The one entry in the metadata of a file."""

VERSION = 3

BITS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
"""Integers of the same width. Numbers are compared by their bits, so that −0 is not 0 and NaN equals itself."""

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in BITS}


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
    right = right and all(found.get(key, "float32") in list(DTYPES) for key in ("dtype", "values"))
    if right and streams == 4:
        codes, group, shift = found["codes"], found["group"], found["shift"]
        right = _whole_numbers(codes, -LARGEST) and len(codes) == 2 and codes[0] <= codes[1] <= LARGEST
        right = right and _whole_numbers([group, shift], -1000) and group > 0 and shift <= 1000
    check_file(right, f"the header has no readable entry for {name}")
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}
    return Coding(**fields)


def _whole_numbers(numbers: Any, least: int) -> bool:
    return isinstance(numbers, list) and all(type(number) is int and number >= least for number in numbers)


def alphabet_of(low: int, high: int, *, with_zero: bool) -> NDArray[np.int64]:
    alphabet = np.arange(low, high + 1)
    return alphabet if with_zero else alphabet[alphabet != 0]


def digits_of(count: int) -> int:
    """Give how many symbols of an alphabet of ``count`` a byte holds."""
    digits = 1
    while count >= 2 and count ** (digits + 1) <= 256:
        digits += 1
    return digits


def header_text(header: Mapping[str, Any]) -> str:
    """Give the entry of a header in the metadata of a file: the same text for the same header."""
    return json.dumps(header, sort_keys=True, separators=(",", ":"))


AGAIN = "the file is broken: write it again with sparsewav-export"


def check_file(holds: bool, complaint: str) -> None:
    """Refuse a broken file with a complaint, unless what is checked holds.

    Raises:
        UserError: It does not hold.
    """
    if not holds:
        raise UserError(f"{complaint}; {AGAIN}")
