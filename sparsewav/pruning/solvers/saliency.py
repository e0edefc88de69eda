"""Saliency: how much the layer's output changes when a weight is removed.

Every score takes the same four things of a block of columns; the lowest scores are pruned.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True)
class Block:
    """A block of columns about to be masked.

    Attributes:
        weight: current weights, shape (rows, block).
        inverse_diagonal: [H⁻¹]_pp of the problem that remains, shape (block,).
        hessian_diagonal: diagonal of H, shape (block,).
        gradient: gives the gradient of ||WX − ŴX||² at the current weights, shape (rows, block).
    """

    weight: Tensor
    inverse_diagonal: Tensor
    hessian_diagonal: Tensor
    gradient: Callable[[], Tensor]


def magnitude(block: Block) -> Tensor:
    """|w|; (rows, block)."""
    return block.weight.abs()


def wanda(block: Block) -> Tensor:
    """|w| ||x||, the weight times the norm of its input (Sun et al. 2023, eq. 1); (rows, block)."""
    return block.weight.abs() * block.hessian_diagonal.sqrt()


def obs(block: Block) -> Tensor:
    """w² / [H⁻¹]_pp (eq. 1 of the paper); (rows, block)."""
    return block.weight.square().div_(block.inverse_diagonal)


def obs_first_order(block: Block) -> Tensor:
    """|w G| + w² / [H⁻¹]_pp (eq. 3 of the paper); (rows, block)."""
    return (block.weight * block.gradient()).abs_().add_(obs(block))


@dataclass(frozen=True)
class Saliency:
    """A score and how its method uses it.

    Attributes:
        score: the function above.
        updates: whether the kept weights are updated to make up for the removed ones (OBS).
        comparison_group: the weights whose scores compete; OBS compares within a block of columns.
    """

    score: Callable[[Block], Tensor]
    updates: bool
    comparison_group: Literal["matrix", "row", "block"]


SALIENCIES = {
    "magnitude": Saliency(magnitude, updates=False, comparison_group="matrix"),
    "wanda": Saliency(wanda, updates=False, comparison_group="row"),
    "obs": Saliency(obs, updates=True, comparison_group="block"),
    "obs_first_order": Saliency(obs_first_order, updates=True, comparison_group="block"),
}
