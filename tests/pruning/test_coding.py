"""Tensors as few bytes and back: every bit comes back, grids are found from the numbers, bytes are near the entropy."""

import json
import math
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

import sparsewav
from sparsewav.errors import UserError
from sparsewav.pruning.coding import FORMAT, header_text, read_coding
from sparsewav.pruning.decoding import decode_tensor, decode_tensors
from sparsewav.pruning.encoding import coded_bytes, encode_tensor, encode_tensors, file_bytes
from sparsewav.pruning.grid import find_grid


def _rounded(
    weight: Tensor, bits: int, group: int, *, symmetric: bool = True, sparsity: float = 0.0, significant: int = 11
) -> Tensor:
    """Round a matrix to the nearest numbers of a grid, group by group; the smallest are zero."""
    groups = F.pad(weight, (0, -weight.shape[1] % group)).view(-1, group)
    low, high = groups.amin(1, keepdim=True).clamp(max=0), groups.amax(1, keepdim=True).clamp(min=0)
    levels = 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1
    mantissa, exponent = ((torch.maximum(-low, high) if symmetric else high - low) / levels).frexp()
    scale = torch.ldexp((mantissa * 2**significant).round() / 2**significant, exponent)
    zero = torch.full_like(scale, levels) if symmetric else (-low / scale).round()
    top = levels if symmetric else levels - zero
    codes = torch.minimum(torch.maximum((groups / scale).round(), -zero), torch.as_tensor(top))
    result = (codes * scale + 0.0).view(len(weight), -1)[:, : weight.shape[1]].contiguous()  # no −0
    if not sparsity:
        return result
    return torch.where(
        weight.abs() > weight.abs().flatten().kthvalue(round(sparsity * weight.numel())).values, result, 0.0
    )


def _normal(rows: int, cols: int, seed: int = 0) -> Tensor:
    return 0.02 * torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(_bits(one), _bits(other))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _there_and_back(tensor: Tensor) -> Tensor:
    """Through the bytes and through the text of the header, as in a file."""
    stored, header = encode_tensors({"w": tensor})
    header = json.loads(header_text(header))
    codings = {name: read_coding(entry, name) for name, entry in header["coded"].items()}
    return decode_tensors(stored, codings, header["float16"], "here")["w"]


@pytest.mark.parametrize(
    ("bits", "group", "symmetric", "sparsity"),
    [
        *((bits, 16, True, sparsity) for bits in (2, 3, 4, 8) for sparsity in (0.0, 0.5, 0.9)),
        *((bits, 40, False, 0.5) for bits in (2, 4, 8)),
        (4, 96, True, 0.5),  # the whole row
        (3, 36, True, 0.3),  # 36, 36 and 24 columns
        (8, 96, False, 0.0),
    ],
)
def test_a_rounded_matrix_is_found_to_be_one(bits: int, group: int, symmetric: bool, sparsity: float) -> None:
    """Without being told: the group that it was rounded in, its bits, and every bit of it."""
    weight = _rounded(_normal(60, 96), bits, group, symmetric=symmetric, sparsity=sparsity)
    grid = find_grid(weight)
    assert grid is not None
    assert grid.group == group
    assert grid.bits == bits
    scales = grid.scales.repeat_interleave(group, 1)[:, :96]
    assert torch.equal(grid.codes * scales, weight)
    assert (grid.scales.frexp().mantissa * 2**11 % 1 == 0).all()
    encoded = encode_tensor(weight)
    assert encoded is not None
    assert encoded[1].codes is not None
    assert _same_bits(_there_and_back(weight), weight)


@pytest.mark.parametrize(
    ("bits", "symmetric", "sparsity"),
    [(2, True, 0.5), (3, True, 0.9), (4, True, 0.0), (4, False, 0.5), (8, False, 0.2)],
)
def test_the_page_of_the_format_reads_what_is_written(bits: int, symmetric: bool, sparsity: float) -> None:
    """The code on the page, run as it is there."""
    weight = _rounded(_normal(60, 96), bits, 40, symmetric=symmetric, sparsity=sparsity)
    encoded = encode_tensor(weight)
    assert encoded is not None
    page = (Path(sparsewav.__file__).parent / "models" / "BITMASK_FORMAT.md").read_text(encoding="utf-8")
    names = {"numpy": np, "zlib": zlib, "math": math, "stored": encoded[0].numpy(), "entry": encoded[1].entry()}
    exec(page.partition("```python\n")[2].partition("```")[0], names)
    assert _same_bits(torch.from_numpy(names["weight"]), weight)


def _ulp(weight: Tensor) -> Tensor:
    """One weight in the middle is the next float32."""
    place = tuple(weight.nonzero()[weight.count_nonzero() // 2])
    weight[place] = torch.nextafter(weight[place], torch.tensor(math.inf))
    return weight


def _with(weight: Tensor, value: float) -> Tensor:
    weight[3, 5] = value
    return weight


EDGES: dict[str, Callable[[], Tensor]] = {
    "off by one ulp": lambda: _ulp(_rounded(_normal(60, 96), 4, 32)),
    "minus zero": lambda: _with(_rounded(_normal(60, 96), 4, 32, sparsity=0.5), -0.0),
    "NaN": lambda: _with(_rounded(_normal(60, 96), 4, 32, sparsity=0.5), math.nan),
    "infinite": lambda: _with(_rounded(_normal(60, 96), 4, 32, sparsity=0.5), math.inf),
    "denormal": lambda: torch.randint(-3, 4, (60, 96)) * torch.tensor(2.0**-149),
    "denormal group": lambda: torch.cat([_rounded(_normal(60, 32), 4, 32), torch.full((60, 32), 2.0**-149)], 1),
    "far apart": lambda: _rounded(_normal(60, 96), 4, 32) * torch.logspace(-30, 30, 60, base=2).exp2().round()[:, None],
    "all zero": lambda: torch.zeros(60, 96),
    "one row of zeros": lambda: torch.zeros(1, 960),
    "zeros in double precision": lambda: torch.zeros(60, 96, dtype=torch.float64),
    "all the same": lambda: torch.full((60, 96), 0.375),
    "two values": lambda: torch.where(_normal(60, 96) > 0, 0.5, -0.5),
    "some rows zero": lambda: _rounded(_normal(60, 96), 4, 32) * (torch.arange(60) % 3 > 0)[:, None],
    "one column": lambda: _rounded(_normal(96, 1), 8, 1),
    "one row": lambda: _rounded(_normal(1, 960), 8, 32),
    "empty": lambda: torch.zeros(0, 96),
    "no columns": lambda: torch.zeros(96, 0),
    "convolution of kernel 1": lambda: _rounded(_normal(60, 96), 4, 32, sparsity=0.5)[:, :, None],
    "convolution": lambda: _rounded(_normal(60, 96), 8, 96).view(60, 12, 8),
    "vector": lambda: _normal(1, 96)[0],
    "scalar": lambda: torch.tensor(3.5),
    "integers": lambda: torch.arange(60).view(6, 10),
    "booleans": lambda: torch.ones(6, 10, dtype=torch.bool),
    "transposed": lambda: _rounded(_normal(60, 96), 4, 32).T,
}


@pytest.mark.parametrize("edge", EDGES)
def test_every_bit_of_any_tensor_comes_back(edge: str) -> None:
    tensor = EDGES[edge]()
    assert _same_bits(_there_and_back(tensor), tensor)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.95])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bits", [None, 3])
def test_every_bit_comes_back_in_every_type(dtype: torch.dtype, bits: int | None, sparsity: float) -> None:
    weight = _normal(60, 95)
    weight = (
        _rounded(weight, bits, 19, sparsity=sparsity, significant=5)
        if bits
        else weight * (weight.abs() >= weight.abs().quantile(sparsity))
    )
    tensor = weight.to(dtype)
    assert _same_bits(_there_and_back(tensor), tensor)
    assert coded_bytes(tensor) <= tensor.nbytes
    if bits and dtype != torch.float64:  # a grid that the type holds is found in it
        assert 8 * coded_bytes(tensor) / tensor.numel() < bits + 16 / 19 + 0.5


@pytest.mark.parametrize(("bits", "sparsity"), [(8, 0.0), (8, 0.8), (4, 0.0), (4, 0.8), (3, 0.5), (2, 0.5), (2, 0.9)])
def test_a_matrix_takes_hardly_more_bytes_than_its_entropy(bits: int, sparsity: float) -> None:
    """That of independent weights of these frequencies, and 16 bits a scale."""
    weight = _normal(512, 1024)
    scale = 2.0**-6 / 2 ** (bits - 2)
    top = 2 ** (bits - 1) - 1
    codes = (weight / scale).round().clamp(-top, top)
    codes[torch.rand(512, 1024, generator=torch.Generator().manual_seed(1)) < sparsity] = 0
    scales = scale * (1 + torch.randint(0, 1024, (512, 8), generator=torch.Generator().manual_seed(2)) / 1024)
    weight = codes * scales.repeat_interleave(128, 1) + 0.0
    shares = np.unique(codes.numpy(), return_counts=True)[1] / codes.numel()
    least = -(shares * np.log2(shares)).sum() * codes.numel() + 16 * scales.numel()
    assert 8 * coded_bytes(weight) < 1.03 * least


def test_the_size_of_a_file_is_exact_and_the_same_model_has_the_same_bytes(tmp_path: Path) -> None:
    tensors = {name: make() for name, make in EDGES.items()} | {"norm": torch.ones(96), "half": _normal(9, 9)}
    files = []
    for path in (tmp_path / "one", tmp_path / "other"):
        stored, header = encode_tensors(tensors)
        save_file(stored, path, {FORMAT: header_text(header | {"checksum": "f" * 64})})
        files.append(path.read_bytes())
    assert files[0] == files[1]
    assert len(files[0]) == file_bytes(tensors)


def test_damaged_bytes_are_refused_or_are_another_matrix() -> None:
    """Whatever the bytes and the header say: one sentence, or a matrix of that shape; never another error."""
    weight = _rounded(_normal(60, 96), 3, 36, sparsity=0.6)
    encoded = encode_tensor(weight)
    assert encoded is not None
    row, coding = encoded
    generator = np.random.default_rng(0)
    refused = 0
    for number in range(400):
        damaged, entry = row.clone(), json.loads(json.dumps(coding.entry()))
        if number % 2:
            place = int(generator.integers(len(row)))
            damaged[place] ^= 1 << int(generator.integers(8))
        else:
            key = ["bytes", "codes", "group", "shift"][number // 2 % 4]
            numbers = entry[key] if isinstance(entry[key], list) else [entry[key]]
            numbers[int(generator.integers(len(numbers)))] += int(generator.choice([-300, -5, -1, 1, 5, 300]))
            entry[key] = numbers if isinstance(entry[key], list) else numbers[0]
        try:
            back = decode_tensor(damaged, read_coding(entry, "w"), "w")
        except UserError as error:
            refused += str(error).count("\n") == 0
        else:
            assert back.shape == weight.shape
    assert refused > 200


def test_a_stream_that_inflates_without_end_is_cut_off() -> None:
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = deflate.compress(bytes(10**8)) + deflate.flush()
    entry = {"shape": [4000, 4000], "bytes": [len(bomb), 0, 1, 1], "codes": [1, 1], "group": 4000, "shift": 0}
    row = torch.frombuffer(bytearray(bomb + b"\0\0"), dtype=torch.uint8)
    with pytest.raises(UserError, match="the mask of w is not 2000000 bytes when inflated"):
        decode_tensor(row, read_coding(entry, "w"), "w")
