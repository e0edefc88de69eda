"""Sparse convolutions beside the dense ones: the same outputs, the same errors, and what is timed."""

import copy
import random
from typing import Any

import pytest
import torch
from torch import nn

import sparsewav
from sparsewav.inference.sparse_modules import SparseConv1d, why_dense
from sparsewav.inference.timing import LONGEST, WIDTHS, time_convolution


def _sparse_convolution(channels: int, rows: int, kernel: int, stride: int, share: float, *, bias: bool) -> nn.Conv1d:
    convolution = nn.Conv1d(channels, rows, kernel, stride, bias=bias)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        convolution.weight.mul_(torch.rand(convolution.weight.shape, generator=generator) >= share)
        convolution.weight[: rows // 4] = 0.0
    return convolution.eval()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.usefixtures("compiled")
def test_convolution_equals_the_dense_one(threads: int) -> None:
    """Random shapes, strides, kernels and lengths, one frame and several tiles: equal to float64 up to rounding.

    Inputs that lie as (batch, length, channels), as layer norms leave them, give the same, bit for bit.
    """
    before, draw = torch.get_num_threads(), random.Random(threads)
    torch.set_num_threads(threads)
    try:
        for trial in range(60):
            channels, rows = draw.choice([1, 3, 8, 40]), draw.choice([1, 5, 16, 257])
            kernel, stride = draw.randint(1, 5), draw.randint(1, 4)
            frames, utterances = draw.choice([1, 2, 63, 64, 65, 130, 400]), draw.choice([1, 2, 3])
            length = (frames - 1) * stride + kernel + draw.randint(0, stride - 1)
            share, bias = draw.choice([0.0, 0.8, 1.0]), draw.random() < 0.5
            convolution = _sparse_convolution(channels, rows, kernel, stride, share, bias=bias)
            inputs = torch.randn(utterances, channels, length, generator=torch.Generator().manual_seed(trial))
            sparse = SparseConv1d(convolution, draw.choice([4, 96, 192]))
            assert torch.equal(sparse.weight, convolution.weight)
            with torch.no_grad():
                exact = copy.deepcopy(convolution).double()(inputs.double()).float()
                outputs = sparse(inputs)
                turned = sparse(inputs.transpose(1, 2).contiguous().transpose(1, 2))
                strided = sparse(inputs.repeat_interleave(2, dim=2)[..., ::2])
                alone = sparse(inputs[0])
            torch.testing.assert_close(outputs, exact, rtol=1e-5, atol=1e-4)
            assert torch.equal(turned, outputs)
            assert torch.equal(strided, outputs)
            assert torch.equal(alone, outputs[0])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "shape", [(0, 3, 10), (2, 4, 10), (1, 3, 2), (2, 3, 0), (3,), (1, 1, 3, 9), (3, 0, 9), (3, 2), (0, 10)], ids=str
)
@pytest.mark.usefixtures("compiled")
def test_convolution_refuses_what_the_dense_one_refuses(shape: tuple[int, ...]) -> None:
    """Inputs of another shape, too short or empty: the same error, or the same outputs."""
    convolution = _sparse_convolution(3, 4, 3, 2, 0.5, bias=True)
    found: list[Any] = []
    for module in (convolution, SparseConv1d(convolution, 96)):
        try:
            found.append(module(torch.ones(shape)).shape)
        except RuntimeError as error:
            found.append(str(error))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"padding": 1}, "it pads its input"),
        ({"padding": "same"}, "it pads its input"),
        ({"groups": 2}, "its channels are in groups"),
        ({"dilation": 2}, "it is dilated"),
        ({"kernel_size": 2**15}, "channels times kernel are more than 65536"),
    ],
)
def test_convolutions_of_other_kinds_are_refused(options: Any, reason: str) -> None:
    with pytest.raises(sparsewav.UserError, match=f"no sparse product, because {reason}"):
        SparseConv1d(nn.Conv1d(**{"in_channels": 4, "out_channels": 4, "kernel_size": 3} | options), 96)


def test_padding_of_zero_frames_is_none() -> None:
    assert not why_dense(nn.Conv1d(4, 4, 3, padding="valid"))


@pytest.mark.usefixtures("compiled")
def test_long_convolutions_are_timed_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is timed has as many frames as are asked for, up to a limit."""
    lengths: list[int] = []
    forward = nn.Conv1d.forward

    def counted(module: nn.Conv1d, inputs: Any) -> Any:
        lengths.append(inputs.shape[2])
        return forward(module, inputs)

    monkeypatch.setattr(nn.Conv1d, "forward", counted)
    timing = time_convolution(_sparse_convolution(4, 8, 3, 2, 0.8, bias=True), [50, 10**9])
    assert set(lengths) == {101, 2 * LONGEST + 1}
    assert (timing.rows, timing.cols, len(timing.dense), len(timing.sparse)) == (8, 12, 2, 2)
    assert timing.width in WIDTHS
