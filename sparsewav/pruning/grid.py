"""The grid that the numbers of a matrix lie on: whole multiples of the scales of groups, found from the numbers alone.

So a model that was rounded to few bits is an ordinary model: nothing has to be carried beside it until it is stored.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

LARGEST = 255
"""The largest whole number that is looked for."""

_LEAST_GROUP = 8
"""No grid is looked for whose groups are smaller: their scales would outweigh what the integers save."""


@dataclass
class Grid:
    """A matrix as whole numbers and scales: the weight in group g of a row is ``codes * scales[row, g]``, exactly.

    Attributes:
        codes: The whole numbers, −255 to 255.
        scales: The scales, which have at most 11 significant bits; any where a group has nothing but zeros.
        group: Consecutive columns that share a scale; the last group of a row may be smaller.
    """

    codes: Int[Tensor, "rows cols"]
    scales: Float[Tensor, "rows groups"]
    group: int

    @property
    def bits(self) -> int:
        """The bits that a weight needs by its group's range, zero included: 4 for −7 to 7, and for 0 to 15."""
        padded = F.pad(self.codes, (0, -self.codes.shape[1] % self.group)).view(-1, self.group)
        values = (padded.amax(1).clamp(min=0).int() - padded.amin(1).clamp(max=0).int() + 1).max()
        return max(1, math.ceil(math.log2(int(values))))


def find_grid(weight: Float[Tensor, "rows cols"]) -> Grid | None:
    """Find the whole numbers and scales that a matrix consists of, in the groups that take the fewest bytes.

    Scales are tried from the largest: of a group whose smallest weight is m, they are m / 1, m / 2, m / 3, ...

    Args:
        weight: The matrix, in a type that float32 holds.

    Returns:
        The grid; None if the matrix is on none.
    """
    rows, single = len(weight), weight.detach().float()
    if not weight.numel() or weight.dtype == torch.float64 or rows < 2 or _has_negative_zero(single):
        return None
    sample = single[torch.linspace(0, rows - 1, min(rows, 16)).long()]
    for _ in range(8):
        # Rows that are on a grid may also be on a coarser one of smaller numbers, in smaller groups.
        found: list[Grid] = []
        bound = LARGEST
        while bound and (grid := _sampled_grid(sample, bound)):
            found.append(grid)
            bound = 2 ** (int(grid.codes.abs().max()).bit_length() - 1) - 1 if grid.codes.any() else 0
        if not found:
            return None
        grid, bad = _grid_of(single, min(found, key=_cost).group, LARGEST)
        if grid:
            return grid
        sample = torch.cat([sample, single[bad : bad + 1]])
    return None


def _sampled_grid(sample: Float[Tensor, "rows cols"], bound: int) -> Grid | None:
    """Give the grid of a few rows in the largest groups that fit, with whole numbers up to a bound."""
    cols = sample.shape[1]
    # No group is larger than the longest beginning of the rows that is on a grid by itself.
    fits, fails = 0, cols + 1
    while fails - fits > 1:
        tried = cols if fails > cols else (fits + fails) // 2
        fits, fails = (tried, fails) if _grid_of(sample[:, :tried], tried, bound)[0] else (fits, tried)
    sizes = range(fits, min(_LEAST_GROUP, cols) - 1, -1)
    return next((grid for size in sizes if (grid := _grid_of(sample, size, bound)[0])), None)


def _cost(grid: Grid) -> float:
    """Give the bytes of a grid: the entropy of its whole numbers, and two bytes a scale."""
    counts = grid.codes.unique(return_counts=True)[1]
    return float(-(counts * (counts / counts.sum()).log2()).sum()) / 8 + 2 * grid.scales.numel()


def _has_negative_zero(weight: Tensor) -> bool:
    return bool(((weight == 0) & weight.signbit()).any())


def _grid_of(weight: Float[Tensor, "rows cols"], group: int, bound: int) -> tuple[Grid | None, int]:
    """Give the grid of a group size, with whole numbers up to a bound; if there is none, a row that shows it."""
    rows, cols = weight.shape
    padded = F.pad(weight, (0, -cols % group)).view(-1, group)
    groups = len(padded) // rows
    size = padded.abs()
    largest = size.amax(1).double()
    smallest = size.masked_fill(size == 0, math.inf).amin(1).double()
    scales = torch.ones(len(padded))
    codes = torch.zeros(padded.shape, dtype=torch.int16)
    if not bool(largest.isfinite().all()):
        return None, int(largest.isfinite().logical_not().nonzero()[0]) // groups
    left = filled = largest.nonzero()[:, 0]
    for divisor in range(1, bound + 1):
        if not len(left):
            break
        scale = smallest[left] / divisor
        hopeless = left[largest[left] > bound * scale * (1 + 1e-9)]  # the scales that follow are smaller still
        if len(hopeless):
            return None, int(hopeless[0]) // groups
        mantissa = scale.frexp().mantissa * 2**11
        possible = (mantissa == mantissa.round()).nonzero()[:, 0]
        if not len(possible):
            continue
        chosen = left[possible]
        single = scale[possible].float()[:, None]
        # w / s is a whole number k exactly if k * s is w, which float32 holds: 8 and 11 bits make 19.
        part = padded if len(chosen) == len(padded) else padded[chosen]
        whole = (part / single).round_()
        settled = (whole * single == part).all(1)
        done = chosen[settled]
        scales[done] = single[settled, 0]
        codes[done] = whole[settled].short()
        unsettled = torch.ones(len(left), dtype=torch.bool)
        unsettled[possible[settled]] = False
        left = left[unsettled]
    if len(left):
        return None, int(left[0]) // groups
    if len(filled):  # a group of zeros has any scale: one that is there already takes the fewest bits
        scales[largest == 0] = scales[filled].max()
    found = codes.view(rows, -1)[:, :cols]
    return Grid(found, scales.view(rows, groups), group), 0
