"""Saliency: how much the layer's output changes when a weight is removed. The weights with the lowest scores go.

The paper's H is the Hessian of ||WX − ŴX||², which is 2XXᵀ. This package sums H = XXᵀ, which finds the same mask and
update wherever H stands alone; next to a gradient, the factor of 2 counts.
"""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Block:
    """What the scores need of a block of columns that is about to be masked.

    Attributes:
        weight: The current weights.
        inverse_diagonal: [H⁻¹]_pp of the remaining problem, H = XXᵀ.
        hessian_diagonal: The diagonal of XXᵀ.
        gradient: Computes the gradient of ||WX − ŴX||² at the current weights.
    """

    weight: Float[Tensor, "rows block"]
    inverse_diagonal: Float[Tensor, " block"]
    hessian_diagonal: Float[Tensor, " block"]
    gradient: Callable[[], Float[Tensor, "rows block"]]


Score = Callable[[Block], Float[Tensor, "rows block"]]
"""Gives the saliency of every weight of a block."""


def magnitude(block: Block) -> Float[Tensor, "rows block"]:
    """|w|."""
    return block.weight.abs()


def wanda(block: Block) -> Float[Tensor, "rows block"]:
    """|w| ||x||, the weight times the norm of its input (Sun et al. 2023, eq. 1)."""
    return block.weight.abs() * block.hessian_diagonal.sqrt()


def obs(block: Block) -> Float[Tensor, "rows block"]:
    """w² / [H⁻¹]_pp with H = XXᵀ, half of eq. 1 of the paper: what the removal adds to the error."""
    return block.weight.square().div_(block.inverse_diagonal)


def obs_first_order(block: Block) -> Float[Tensor, "rows block"]:
    """|w G| + w² / [H⁻¹]_pp with H = 2XXᵀ and the gradient G = 2(Ŵ − W)XXᵀ (eq. 3 of the paper)."""
    return (block.weight * block.gradient()).abs_().add_(obs(block), alpha=2)


SCORES: dict[str, Score] = {
    "magnitude": magnitude,
    "wanda": wanda,
    "obs": obs,
    "obs_first_order": obs_first_order,
}
"""The score of every saliency, by its name."""
