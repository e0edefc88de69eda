"""Rounding against the baseline on random layers, and against every point of the grid on tiny ones."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from sparsewav.pruning.solvers.quantize import SCALE_BITS, quantize, quantize_matrices, round_to_nearest
from sparsewav.settings.quantization import Integers

DAMPING = 0.01


def layer(rows: int, cols: int, sparsity: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A float32 weight, the H = XXᵀ of inputs that differ in scale over two decades, and a random mask."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator) * torch.randn(rows, 1, generator=generator).exp()
    mixing = torch.randn(cols, cols, generator=generator) * torch.logspace(0, -2, cols)
    inputs = mixing @ torch.randn(cols, 4 * cols, generator=generator)
    return weight, inputs @ inputs.T, torch.rand(rows, cols, generator=generator) >= sparsity


def damped(hessian: Tensor) -> Tensor:
    """H + λI in double precision."""
    hessian = hessian.double()
    return hessian + DAMPING * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)


def errors(weight: Tensor, rounded: Tensor, hessian: Tensor) -> Tensor:
    """(w − ŵ)(H + λI)(w − ŵ)ᵀ of every row."""
    change = (weight - rounded).double()
    return ((change @ damped(hessian)) * change).sum(1)


LAYERS = [
    # rows, cols, sparsity, bits, settings; 128 columns are a block, and groups may be cut at the end of a row
    (16, 64, 0.0, 4, Integers()),
    (16, 64, 0.5, 4, Integers(group_size=16)),
    (16, 64, 0.8, 4, Integers(group_size=64)),
    (16, 64, 0.95, 4, Integers(group_size=8)),
    (24, 96, 0.0, 3, Integers(group_size=32)),
    (24, 96, 0.5, 3, Integers(group_size=40)),
    (24, 96, 0.8, 3, Integers(group_size=None)),
    (8, 200, 0.0, 2, Integers(group_size=64)),
    (8, 200, 0.5, 2, Integers(group_size=128)),
    (8, 200, 0.8, 2, Integers(group_size=None)),
    (40, 300, 0.6, 8, Integers(group_size=None)),
    (40, 140, 0.6, 8, Integers(group_size=1)),
    (4, 33, 0.3, 4, Integers(group_size=10)),
    (16, 64, 0.0, 4, Integers(group_size=16, symmetric=False)),
    (16, 64, 0.5, 4, Integers(group_size=64, symmetric=False)),
    (24, 96, 0.5, 3, Integers(group_size=40, symmetric=False)),
    (24, 96, 0.8, 3, Integers(group_size=None, symmetric=False)),
    (8, 200, 0.0, 2, Integers(group_size=64, symmetric=False)),
    (8, 200, 0.8, 2, Integers(group_size=128, symmetric=False)),
    (40, 300, 0.6, 8, Integers(group_size=128, symmetric=False)),
]


@pytest.mark.parametrize("case", range(len(LAYERS)))
def test_no_row_has_a_larger_error_than_by_rounding(case: int) -> None:
    """20 layers of several shapes, sparsities, bits and groups; on the grid, within the mask, and the same twice."""
    rows, cols, sparsity, bits, settings = LAYERS[case]
    weight, hessian, keep = layer(rows, cols, sparsity, seed=case)
    baseline = quantize(weight, hessian, replace(settings, rounding="nearest"), bits, keep=keep, damping=DAMPING)
    found = quantize(weight, hessian, settings, bits, keep=keep, damping=DAMPING)
    before, after = (errors(weight * keep, item.weight, hessian) for item in (baseline, found))
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < 0.9 * before.sum()

    size = settings.group_size or cols
    for item in (baseline, found):
        assert item.scales.shape == (rows, -(-cols // size))
        assert item.weight.dtype == torch.float32
        assert not item.weight[~keep].any()
        mantissas = torch.frexp(item.scales).mantissa * 2**SCALE_BITS
        assert torch.equal(mantissas, mantissas.round())
        assert (item.scales > 0).all()
        for index, group in enumerate(item.codes.split(size, 1)):
            low, high = group.amin(1).clamp(max=0), group.amax(1).clamp(min=0)
            if settings.symmetric:
                assert torch.maximum(high, -low).max() <= 2 ** (bits - 1) - 1
            else:
                assert (high - low).max() <= 2**bits - 1
            # The product that is in the model's weight has nothing rounded away: it is the same in double precision.
            exact = item.scales[:, index : index + 1].double() * group
            assert torch.equal(exact, item.weight.split(size, 1)[index].double())


def test_all_points_of_the_grid() -> None:
    """With the scales that were found no point is better than the optimum, and most rows have found the optimum."""
    optimal = total = 0
    for seed in range(12):
        symmetric = bool(seed % 2)
        weight, hessian, keep = layer(4, 6, 0.3, seed=100 + seed)
        found = quantize(weight, hessian, Integers(group_size=3, symmetric=symmetric), 2, keep=keep, damping=DAMPING)
        zeros = (-found.codes.split(3, 1)[0].amin(1).clamp(max=0), -found.codes.split(3, 1)[1].amin(1).clamp(max=0))
        for row in range(4):
            values = []
            for column in range(6):
                scale = float(found.scales[row, column // 3])
                zero = int(zeros[column // 3][row])
                codes = range(-1, 2) if symmetric else range(-zero, 4 - zero)
                values.append([scale * code for code in codes] if keep[row, column] else [0.0])
            points = torch.tensor(list(product(*values)))
            best = errors((weight * keep)[row], points, hessian).min()
            own = errors((weight * keep)[row : row + 1], found.weight[row : row + 1], hessian)[0]
            assert own >= best * (1 - 1e-6)
            optimal += bool(own <= best * (1 + 1e-6))
            total += 1
    assert optimal >= 0.7 * total, f"{optimal} of {total}"


def test_rows_with_bits_of_their_own() -> None:
    """Matrices of one input are rounded together as they are one by one."""
    weight, hessian, keep = layer(20, 64, 0.5, seed=3)
    settings = Integers(group_size=32)
    weights, keeps = weight.split([5, 15]), keep.split([5, 15])
    together = quantize_matrices(weights, hessian, settings, [2, 8], keeps=keeps)
    for found, part, kept, width in zip(together, weights, keeps, (2, 8), strict=True):
        alone = quantize(part, hessian, settings, width, keep=kept)
        torch.testing.assert_close(found.weight, alone.weight, rtol=0, atol=0)


def test_nothing_to_round() -> None:
    """Groups without a weight, dead inputs and tiny weights are no trouble, and what is on a grid already stays."""
    weight, hessian, keep = layer(6, 40, 0.5, seed=4)
    keep[:3] = False
    keep[:, :20] = False
    hessian[30:], hessian[:, 30:] = 0, 0
    weight[5] = 1e-40
    for symmetric in (True, False):
        found = quantize(weight, hessian, Integers(group_size=10, symmetric=symmetric), 4, keep=keep)
        assert found.weight.isfinite().all()
        assert not found.weight[~keep].any()
        assert not found.weight[5].any()
        assert found.weight[3:5, 20:30].any()
        assert not quantize(weight, 0 * hessian, Integers(), 4, keep=torch.zeros_like(keep)).weight.any()
    # Numbers that are on the grid already stay: seven values around zero, with the scale a power of two.
    exact = torch.randint(-3, 4, (6, 40)).float() / 64
    assert torch.equal(quantize(exact, layer(6, 40, 0, seed=5)[1], Integers(group_size=20), 3).weight, exact)
    assert torch.equal(round_to_nearest(exact, 3), exact)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_coded_weights_have_one_scale_and_the_entropy_asked_for(bits: int) -> None:
    """Nothing is cut off, not even a weight that is far from all others; and the mask holds."""
    weight, hessian, keep = layer(48, 96, 0.0, seed=5)
    weight = torch.randn(48, 96, generator=torch.Generator().manual_seed(1))
    weight[3, 7] = 9.0
    found = quantize(weight, hessian, Integers(range="coded"), bits)
    assert len(found.scales.unique()) == 1
    shares = found.codes.unique(return_counts=True)[1] / found.codes.numel()
    assert float(-(shares * shares.log2()).sum()) == pytest.approx(bits, abs=0.3)
    assert (
        errors(weight, found.weight, hessian).sum()
        < errors(weight, (weight / found.scales[0, 0]).round() * found.scales[0, 0], hessian).sum()
    )
    keep = keep & (torch.arange(96) % 3 > 0)
    assert not quantize(weight, hessian, Integers(range="coded"), bits, keep=keep).weight[~keep].any()
