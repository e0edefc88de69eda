"""ALPS: mask and weights of a layer together, by ADMM (Meng, Behdin, Wang and Mazumder 2024).

One copy of the weights is free and fits the layer's outputs, the other one has the zeros; a penalty ρ that grows draws
them together, so that weights may still come back for a while that a sweep would have removed for good. The free copy
solves a ridge problem, (H + ρI)⁻¹ of which costs two products a step once H = QMQᵀ is known. All weights of a matrix
compete. When the mask has come to rest, the weights on it are solved exactly (:mod:`~sparsewav.pruning.solvers.refit`).
"""

from collections.abc import Callable

import torch
from torch import Tensor

FIRST_PENALTY = 0.1
"""ρ at the beginning, for a Hessian scaled to a unit diagonal."""
CHECK_EVERY = 3
"""Steps between two looks at how much of the mask has moved."""
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
"""ρ grows by the factor beside the first share that the moved weights are at least of those that stay."""


def find_mask(
    target: Tensor, hessian: Tensor, project: Callable[[Tensor], Tensor], max_steps: int
) -> tuple[Tensor, Tensor]:
    """Find which weights go.

    Args:
        target: what the weights would be if none went, shape (cols, rows).
        hessian: damped, shape (cols, cols).
        project: takes scores (cols, rows) and gives a mask of the same shape, True where a weight goes.
        max_steps: of ADMM.

    Returns:
        The mask, True where a weight goes, and the weights at the end, zero there; both (cols, rows).
    """
    # In units in which every input has the norm one, the weights that go are those with the smallest outputs.
    scale = hessian.diagonal().rsqrt()[:, None]  # (cols, 1)
    values, vectors = torch.linalg.eigh(hessian * scale * scale.T)
    values = values.clamp(min=0)[:, None]
    target = target / scale
    product = vectors @ (values * (vectors.T @ target))  # HT
    sparse, dual = target, torch.zeros_like(target)
    removed = torch.zeros_like(target, dtype=torch.bool)
    checked = removed
    penalty = FIRST_PENALTY
    for step in range(max_steps):
        free = vectors @ ((vectors.T @ (product - dual + penalty * sparse)) / (values + penalty))
        shifted = free + dual / penalty
        removed = project(shifted.square())
        sparse = shifted.masked_fill(removed, 0.0)
        dual += penalty * (free - sparse)
        if step % CHECK_EVERY == CHECK_EVERY - 1:
            moved = int((removed ^ checked).count_nonzero())
            if moved == 0:
                break
            kept = max(int((~removed).count_nonzero()), 1)
            penalty *= next(factor for share, factor in GROWTH if moved >= share * kept)
            checked = removed
    return removed, sparse * scale
