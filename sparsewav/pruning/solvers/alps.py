"""ALPS: the mask and the weights of a matrix together, by ADMM (Meng, Behdin, Wang and Mazumder 2024).

One copy of the weights is dense and minimises the error of the output, the other one is sparse; a growing penalty ρ
draws them together. Until they agree, a weight may still return to the support, which the OBS sweep never allows. The
dense copy is the solution of a ridge problem; with H = QMQᵀ known, (H + ρI)⁻¹ costs two products a step. All weights of
a matrix compete. When the mask no longer changes, :mod:`~sparsewav.pruning.solvers.refit` solves for the weights on it.

Where the errors of the outputs are weighted by a matrix G (:mod:`~sparsewav.pruning.gradient_covariance`), the error
tr(G(T − Ŵ)H(T − Ŵ)ᵀ) couples the rows. With G = PNPᵀ known, too, the free step stays elementwise between the two
eigenbases: a division by mᵢnⱼ + ρ.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

FIRST_PENALTY = 0.1
"""The first ρ, for a Hessian that is scaled to a unit diagonal."""
CHECK_EVERY = 3
"""The mask's change is measured, and ρ raised, every so many steps."""
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
"""Pairs of a share and a factor: ρ grows by the factor of the first share that the mask's change, relative to the
number of kept weights, reaches."""


def find_mask(
    target: Float[Tensor, "cols rows"],
    hessian: Float[Tensor, "cols cols"],
    project: Callable[[Float[Tensor, "cols rows"]], Bool[Tensor, "cols rows"]],
    max_steps: int,
    covariance: Float[Tensor, "rows rows"] | None = None,
) -> tuple[Bool[Tensor, "cols rows"], Float[Tensor, "cols rows"]]:
    """Find which weights are removed.

    Args:
        target: T, the weights that minimise the error without any sparsity.
        hessian: The damped Hessian.
        project: Gives the mask of the weights to remove, given scores of which the lowest are removed.
        max_steps: The number of ADMM steps at most.
        covariance: G, positive definite; None where the errors of all outputs count alike.

    Returns:
        The mask, True where a weight is removed, and the sparse weights at the end.
    """
    # Scaled so that every input has norm one, the weights with the smallest magnitude contribute least to the output.
    scale = hessian.diagonal().rsqrt()[:, None]  # (cols, 1)
    values, vectors = torch.linalg.eigh(hessian * scale * scale.T)
    values = values.clamp(min=0)[:, None]
    output_vectors: Tensor | None = None
    if covariance is not None:
        output_scale = covariance.diagonal().rsqrt()[None]  # (1, rows)
        output_values, output_vectors = torch.linalg.eigh(covariance * output_scale * output_scale.T)
        scale, values = scale * output_scale, values * output_values.clamp(min=0)  # (cols, rows)

    def rotate(matrix: Float[Tensor, "cols rows"]) -> Float[Tensor, "cols rows"]:
        """Go to the eigenbases; the outputs have one only where they are weighted."""
        return vectors.T @ matrix if output_vectors is None else vectors.T @ matrix @ output_vectors

    def rotate_back(matrix: Float[Tensor, "cols rows"]) -> Float[Tensor, "cols rows"]:
        return vectors @ matrix if output_vectors is None else vectors @ matrix @ output_vectors.T

    target = target / scale
    product = rotate_back(values * rotate(target))  # HT, or HTG
    sparse, dual = target, torch.zeros_like(target)
    removed = torch.zeros_like(target, dtype=torch.bool)
    checked = removed
    penalty = FIRST_PENALTY
    for step in range(max_steps):
        dense = rotate_back(rotate(product - dual + penalty * sparse) / (values + penalty))
        shifted = dense + dual / penalty
        removed = project(shifted.square())
        sparse = shifted.masked_fill(removed, 0.0)
        dual += penalty * (dense - sparse)
        if step % CHECK_EVERY == CHECK_EVERY - 1:
            changed = int((removed ^ checked).count_nonzero())
            if changed == 0:
                break
            kept = max(int((~removed).count_nonzero()), 1)
            penalty *= next(factor for share, factor in GROWTH if changed >= share * kept)
            checked = removed
    return removed, sparse * scale
