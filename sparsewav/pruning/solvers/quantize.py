"""Rounding: the kept weights of a matrix become whole multiples of the scale of their group.

Rounding every weight to the nearest multiple is the baseline. Better is to minimise tr((W − Ŵ)(H + λI)(W − Ŵ)ᵀ) over
all Ŵ on the grid that are zero where the mask is, for which there is no efficient exact method. Three steps come close:

1. A sweep from left to right, as in GPTQ (Frantar et al. 2023): a column is rounded, and the columns to its right make
   up for it, exactly as they do in :mod:`~sparsewav.pruning.solvers.obs`. A removed weight is rounded to zero.
2. Every row goes on from the sweep's result or from that of the baseline, whichever has the smaller error.
3. Passes of coordinate descent on the grid: each weight in turn becomes the best of its multiples given all the others,
   and each scale the best given the multiples. No step makes the error larger.

With ``range=coded`` a matrix has one coarse scale, and no weight is cut off: the few large weights matter most,
and the file spends many bits on them alone. A uniform step with entropy coding is within a quarter of a bit of the best
that any code can do for a normal distribution (Gish and Pierce 1968).

All of it works on transposed matrices, shape (cols, rows), and on all rows at once.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparsewav.pruning.solvers.factorization import damp, factorize, invert_upper
from sparsewav.settings.quantization import Integers

SCALE_BITS = 4
"""Significant bits of a scale."""

RANGES = torch.logspace(0.05, -1.4, 24, base=2.0).tolist()
"""Ranges that are tried for a group, as shares of its own: what lies beyond is rounded to the end of the range."""

CODED_HIGH = 127
"""The largest whole number of ``range=coded``; the scale is made larger where a weight would be beyond it."""

PASSES = 3
"""Passes of coordinate descent at most."""

BLOCK, COLUMNS = 128, 32
"""Columns between two products with all rows of the Hessian, and between two products within a block."""


@dataclass(frozen=True)
class QuantizedMatrix:
    """A matrix of whole numbers and the scales of their groups; each product is exact in float32.

    Attributes:
        codes: The whole numbers.
        scales: The scale of every group of consecutive columns of a row.
        low: The smallest whole number that a group may have.
        high: The largest one.
        group_size: Columns of a group; the last one may have fewer.
    """

    codes: Int[Tensor, "rows cols"]
    scales: Float[Tensor, "rows groups"]
    low: Float[Tensor, "rows groups"]
    high: Float[Tensor, "rows groups"]
    group_size: int

    @property
    def weight(self) -> Float[Tensor, "rows cols"]:
        """The weights, on the grid."""
        return self.of_weights(self.scales) * self.codes

    def of_weights(self, values: Float[Tensor, "rows groups"]) -> Float[Tensor, "rows cols"]:
        """Give for every weight what its group has."""
        return values.repeat_interleave(self.group_size, 1)[:, : self.codes.shape[1]]

    def nearest(self, weight: Float[Tensor, "rows cols"]) -> Float[Tensor, "rows cols"]:
        """Round weights to the grid; zero is positive, as the file has it."""
        scales, low, high = (self.of_weights(values) for values in (self.scales, self.low, self.high))
        return (weight / scales).round_().clamp_(low, high).mul_(scales).add_(0.0)

    def split(self, rows: Sequence[int]) -> list["QuantizedMatrix"]:
        """Take apart matrices that lie one below another."""
        parts = (self.codes, self.scales, self.low, self.high)
        items = zip(*(part.split(list(rows)) for part in parts), strict=True)
        return [QuantizedMatrix(codes, scales, low, high, self.group_size) for codes, scales, low, high in items]


@dataclass(frozen=True)
class _Grid:
    """The values that weights may take: the whole numbers from low to high, times the scale of the group."""

    group_size: int
    scale: Float[Tensor, "groups rows"]
    low: Float[Tensor, "groups rows"]
    high: Float[Tensor, "groups rows"]

    def spans(self, cols: int) -> Iterator[tuple[int, slice]]:
        """Yield the number of every group and its columns."""
        for number, start in enumerate(range(0, cols, self.group_size)):
            yield number, slice(start, min(start + self.group_size, cols))


def quantize_matrices(
    weights: Sequence[Float[Tensor, "_rows _cols"]],
    hessian: Float[Tensor, "_cols _cols"],
    settings: Integers,
    bits: Sequence[float],
    *,
    keeps: Sequence[Bool[Tensor, "_rows _cols"]],
    damping: float = 0.01,
    names: Sequence[str] = ("the matrices",),
) -> list[QuantizedMatrix]:
    """Do what :func:`quantize` does for matrices that read the same input, with bits and a mask for each."""
    rows = torch.tensor([len(weight) for weight in weights])
    steps = None
    if settings.range == "coded":
        found = [coded_step(*item) for item in zip(weights, keeps, bits, strict=True)]
        steps = torch.stack(found).repeat_interleave(rows.to(weights[0].device))
    together = quantize(
        torch.cat(list(weights)),
        hessian,
        settings,
        torch.tensor(bits, dtype=torch.float32).repeat_interleave(rows).to(weights[0].device),
        keep=torch.cat(list(keeps)),
        damping=damping,
        name=", ".join(names),
        steps=steps,
    )
    return together.split(rows.tolist())


def coded_step(
    weight: Float[Tensor, "_rows _cols"], keep: Bool[Tensor, "_rows _cols"] | None, bits: float
) -> Float[Tensor, ""]:
    """Give the scale at which normally distributed weights have an entropy of so many bits, √(2πe)σ / 2^bits."""
    count = weight.numel() if keep is None else int(keep.sum())
    energy = (weight if keep is None else weight * keep).square().sum(dtype=torch.float64)
    sigma = (energy / max(count, 1)).sqrt()
    step = math.sqrt(2 * math.pi * math.e) * sigma / 2**bits
    top = weight.abs().max() / CODED_HIGH  # so that no weight is cut off
    step = round_scales(torch.maximum(step, top).float() * (1 + 2.0**-SCALE_BITS))
    return torch.where(step > 2.0**-100, step, 1.0)


def quantize(
    weight: Float[Tensor, "rows cols"],
    hessian: Float[Tensor, "cols cols"],
    settings: Integers,
    bits: float | Float[Tensor, " rows"],
    *,
    keep: Bool[Tensor, "rows cols"] | None = None,
    damping: float = 0.01,
    name: str = "the matrix",
    steps: Float[Tensor, " rows"] | None = None,
) -> QuantizedMatrix:
    """Round the kept weights of a matrix; the arguments are not changed.

    Args:
        weight: The weights, in float32 or float64: float16 does not hold the products.
        hessian: H = XXᵀ of the matrix's input X, one column a frame.
        settings: Group size, symmetry and the way of rounding.
        bits: Bits of a weight, 2 to 8; or those of every row, for matrices that read the same input, one below another.
        keep: True where a weight is kept, the others become zero; None keeps all.
        damping: λ as a share of the Hessian's mean diagonal.
        name: The matrix's name, for messages.
        steps: With ``range=coded`` the scale of every row; None takes the weights for those of one matrix.

    Raises:
        UserError: The Hessian is not positive definite even after λ was raised.
    """
    if settings.range == "coded" and steps is None:
        steps = coded_step(weight.detach(), keep, float(torch.as_tensor(bits).max())).expand(len(weight))
    dtype = torch.promote_types(torch.promote_types(weight.dtype, hessian.dtype), torch.float32)
    kept = torch.ones_like(weight, dtype=torch.bool) if keep is None else keep.to(weight.device, torch.bool)
    kept = kept.T.contiguous()
    target = (weight.detach().to(dtype).T * kept).contiguous()
    hessian = hessian.to(dtype)
    live = hessian.diagonal() > 0
    factor, added = factorize(hessian, live, damping, name)
    importance = hessian.diagonal() + added
    grid = _find_grid(target, kept, importance, settings, bits, steps)
    result = _nearest(target, grid, kept)
    if settings.rounding == "nearest":
        return _whole_numbers(result, grid)
    damped = damp(hessian.clone(), live, added)
    swept, swept_grid, error = _sweep(target, kept, factor, importance, settings, bits, steps)
    change = result - target
    better = error < (change * (damped @ change)).sum(0)
    result = torch.where(better, swept, result)
    parts = ((getattr(swept_grid, part), getattr(grid, part)) for part in ("scale", "low", "high"))
    grid = _Grid(grid.group_size, *(torch.where(better, new, old) for new, old in parts))
    for _ in range(PASSES):
        if not _descend(result, target, kept, damped, grid, refits=steps is None):
            break
    return _whole_numbers(result, grid)


def round_to_nearest(
    weight: Float[Tensor, "rows cols"],
    bits: int,
    *,
    group_size: int | None = None,
    symmetric: bool = True,
) -> Float[Tensor, "rows cols"]:
    """Round every weight to the nearest value of a grid whose scales have the smallest squared error; zero stays."""
    target = weight.detach().to(torch.promote_types(weight.dtype, torch.float32)).T.contiguous()
    kept = target != 0
    settings = Integers(group_size=group_size, symmetric=symmetric)
    grid = _find_grid(target, kept, torch.ones_like(target[:, 0]), settings, bits)
    return _whole_numbers(_nearest(target, grid, kept), grid).weight.to(weight.dtype)


def round_scales(scale: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Round positive numbers to ``SCALE_BITS`` significant bits."""
    dropped = 24 - SCALE_BITS  # of float32's bits, by whose pattern the result is exact on every device
    pattern = scale.to(torch.float32).contiguous().view(torch.int32)
    return (((pattern + (1 << (dropped - 1))) >> dropped) << dropped).view(torch.float32).to(scale.dtype)


def _find_grid(
    weight: Float[Tensor, "cols rows"],
    keep: Bool[Tensor, "cols rows"],
    importance: Float[Tensor, " cols"],
    settings: Integers,
    bits: float | Float[Tensor, " rows"],
    given: Float[Tensor, " rows"] | None = None,
) -> _Grid:
    """Give every group the range with the smallest error of its kept weights, squared and times their importance.

    Scales that are given are taken as they are, with as many whole numbers as there are.
    """
    cols, rows = weight.shape
    size = min(settings.group_size or cols, cols)
    if given is not None:
        scale = given.to(weight).repeat(-(-cols // size), 1)
        high = torch.full_like(scale, CODED_HIGH)
        return _Grid(size, scale, -high, high)
    steps = 2.0 ** torch.as_tensor(bits, device=weight.device, dtype=weight.dtype) - (2 if settings.symmetric else 1)
    grids = []
    for start in range(0, cols, size):  # group by group, so that a group stays in the processor's cache
        span = slice(start, min(start + size, cols))
        grids.append(_find_scale(weight[span] * keep[span], importance[span], settings.symmetric, steps.expand(rows)))
    scale, low, high = (torch.stack(items) for items in zip(*grids, strict=True))
    return _Grid(size, scale, low, high)


def _find_scale(
    weight: Float[Tensor, "size rows"],
    importance: Float[Tensor, " size"],
    symmetric: bool,
    steps: Float[Tensor, " rows"],
) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"], Float[Tensor, " rows"]]:
    """Give scale, low and high of one group of every row; ``steps`` is high minus low."""
    least, most = weight.amin(0).clamp(max=0), weight.amax(0).clamp(min=0)
    if symmetric:
        most = torch.maximum(most, -least)
        least = -most
    width = (most - least) / steps
    empty = width < 2.0**-100  # nothing but zeros, or numbers whose multiples float32 does not hold
    width = torch.where(empty, 1.0, width)
    best = torch.full_like(width, torch.inf)
    found = (torch.ones_like(width), torch.zeros_like(width), torch.zeros_like(width))
    for share in RANGES:
        scale = round_scales(share * width)
        low = -steps / 2 if symmetric else torch.round(share * least / scale).clamp(min=-steps)
        candidate = (scale, low, low + steps)
        multiples = weight / scale
        error = importance @ (multiples - multiples.round().clamp(low, low + steps)).square() * scale.square()
        better = error < best
        best = torch.where(better, error, best)
        found = tuple(torch.where(better, new, old) for new, old in zip(candidate, found, strict=True))  # type: ignore[assignment]
    return found


def _nearest(
    weight: Float[Tensor, "cols rows"], grid: _Grid, keep: Bool[Tensor, "cols rows"]
) -> Float[Tensor, "cols rows"]:
    result = torch.empty_like(weight)
    for group, span in grid.spans(len(weight)):
        multiples = (weight[span] / grid.scale[group]).round_().clamp_(grid.low[group], grid.high[group])
        torch.mul(multiples * keep[span], grid.scale[group], out=result[span])
    return result


def _whole_numbers(result: Float[Tensor, "cols rows"], grid: _Grid) -> QuantizedMatrix:
    codes = torch.empty(result.T.shape, dtype=torch.int16, device=result.device)
    for group, span in grid.spans(len(result)):
        codes[:, span] = (result[span] / grid.scale[group]).round_().T
    scales, low, high = (part.T.contiguous() for part in (grid.scale, grid.low, grid.high))
    return QuantizedMatrix(codes, scales, low, high, grid.group_size)


def _spans(cols: int, group_size: int) -> list[slice]:
    """Cut the columns into blocks in which no group is cut."""
    size = max(BLOCK // group_size, 1) * group_size
    return [slice(start, min(start + size, cols)) for start in range(0, cols, size)]


def _sweep(
    target: Float[Tensor, "cols rows"],
    keep: Bool[Tensor, "cols rows"],
    factor: Float[Tensor, "cols cols"],
    importance: Float[Tensor, " cols"],
    settings: Integers,
    bits: float | Float[Tensor, " rows"],
    given: Float[Tensor, " rows"] | None = None,
) -> tuple[Float[Tensor, "cols rows"], _Grid, Float[Tensor, " rows"]]:
    """Round column by column, while the columns to come make up for it; a block's scales are found when it begins.

    Returns:
        The rounded weights, their grid, and the error of every row, with damping.
    """
    error = torch.zeros_like(target[0])
    result = torch.zeros_like(target)  # (ΔR)ᵀ in the columns to come, Δ the change of those that are settled
    grids = []
    for span in _spans(len(target), min(settings.group_size or len(target), len(target))):
        upper = invert_upper(factor[span, span])
        block = torch.addmm(target[span], upper.T, result[span], alpha=-1)
        grids.append(_find_grid(block, keep[span], importance[span], settings, bits, given))
        coefficients = (upper / upper.diagonal()[:, None]).T.contiguous()
        result[span], rounding = _settle(block, coefficients, grids[-1], 0, keep[span])
        error += upper.diagonal().pow(-2) @ rounding.square()
        if span.stop < len(target):
            result[span.stop :].addmm_(factor[span, span.stop :].T, result[span] - target[span])
    parts = (torch.cat([getattr(grid, key) for grid in grids]) for key in ("scale", "low", "high"))
    return result, _Grid(grids[0].group_size, *parts), error


def _settle(
    weight: Float[Tensor, "block rows"],
    coefficients: Float[Tensor, "block block"],
    grid: _Grid,
    first: int,
    keep: Bool[Tensor, "block rows"],
    current: Float[Tensor, "block rows"] | None = None,
) -> tuple[Float[Tensor, "block rows"], Float[Tensor, "block rows"]]:
    """Round one column after the other; each time the columns below change by minus their coefficients times the error.

    Args:
        weight: What is rounded.
        coefficients: Below the diagonal, how much a column changes by the error of each column before it.
        grid: The grid, in which the block begins with the column ``first``.
        first: A multiple of the group size.
        keep: False where a weight becomes zero.
        current: What the error is the distance from; None for the weight before it is rounded.

    Returns:
        The rounded weights and their errors.
    """
    result, errors, kept = weight.clone(), torch.empty_like(weight), keep.to(weight.dtype)
    for start in range(0, len(result), COLUMNS):
        stop = min(start + COLUMNS, len(result))
        if start:
            result[start:stop].addmm_(coefficients[start:stop, :start], errors[:start], alpha=-1)
        for column in range(start, stop):
            value, group = result[column], (first + column) // grid.group_size
            if column > start:
                value.addmv_(errors[start:column].T, coefficients[column, start:column], alpha=-1)
            scale = grid.scale[group]
            rounded = (value / scale).round_().clamp_(grid.low[group], grid.high[group]).mul_(scale).mul_(kept[column])
            torch.sub(value if current is None else current[column], rounded, out=errors[column])
            value.copy_(rounded)
    return result, errors


def _descend(
    result: Float[Tensor, "cols rows"],
    target: Float[Tensor, "cols rows"],
    keep: Bool[Tensor, "cols rows"],
    damped: Float[Tensor, "cols cols"],
    grid: _Grid,
    *,
    refits: bool,
) -> bool:
    """Improve every scale (``refits``) and every weight once, in place; tell whether anything has changed."""
    change, changed = result - target, False
    for span in _spans(len(target), grid.group_size):
        corner = damped[span, span]
        before = result[span].clone()
        gradient = damped[span] @ change  # half of the error's gradient
        if refits:
            _refit_scales(result[span], gradient, corner, grid, span.start)
        pivots = corner.diagonal()[:, None]
        best = torch.addcdiv(result[span], gradient, pivots, value=-1)
        result[span], _ = _settle(best, -corner / pivots, grid, span.start, keep[span], result[span])
        change[span] += result[span] - before
        changed = changed or not torch.equal(result[span], before)
    return changed


def _refit_scales(
    weight: Float[Tensor, "block rows"],
    gradient: Float[Tensor, "block rows"],
    corner: Float[Tensor, "block block"],
    grid: _Grid,
    first: int,
) -> None:
    """Give the groups of a block the scales with the least error, as far as they have few bits; all in place."""
    for start in range(0, len(weight), grid.group_size):
        span = slice(start, min(start + grid.group_size, len(weight)))
        scale = grid.scale[(first + start) // grid.group_size]
        codes = weight[span] / scale
        image = corner[:, span] @ codes
        curvature = (image[span] * codes).sum(0)
        slope = (gradient[span] * codes).sum(0)
        best = scale - slope / curvature.clamp(min=torch.finfo(curvature.dtype).tiny)
        # A scale of few bits may be no better than the one there, and far away curvature and slope are rounded.
        step = round_scales(best.clamp(scale / 2, 2 * scale)) - scale
        step = torch.where(step * (2 * slope + step * curvature) < 0, step, 0.0)
        scale += step
        weight[span] = codes.round_().mul_(scale)
        gradient += image * step
