"""Factorisation of the damped Hessian: H + λI = RRᵀ with R upper triangular.

The OBS sweep needs R alone; the Hessian is never inverted. Once the columns left of p are settled, the Hessian of the
remaining problem is the trailing part of RRᵀ from p on, and the first diagonal element of its inverse is 1 / R_pp². A
change Δ of the settled columns is best compensated by the change of the others that makes (ΔR) zero on them: one
product and one small triangular solve for each block of columns. This is SparseGPT's update with the Cholesky factor U
of H⁻¹ (U = R⁻¹, with pivots U_pp = 1 / R_pp), at a quarter of its factorisation's cost and with one rounding less.
"""

import logging

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sparsewav.errors import UserError
from sparsewav.pruning.solvers.workspace import workspace

logger = logging.getLogger(__name__)

DAMPING_ATTEMPTS = 5
BLOCK = 256
"""Columns that are factored together; the rest of the work is matrix products, which run at full speed."""


def factorize(
    hessian: Float[Tensor, "cols cols"], live: Bool[Tensor, " cols"], damping_share: float, name: str, number: int = 0
) -> tuple[Float[Tensor, "cols cols"], float]:
    """Give R and the λ that was added; the Hessian is not changed.

    Args:
        hessian: H = XXᵀ.
        live: True for inputs that are not always zero.
        damping_share: λ as a share of the mean diagonal over the live inputs.
        name: The matrix's name, for messages.
        number: The workspace that holds R; the next call with the same number overwrites it.

    Returns:
        R, of which only the upper triangle is defined, and λ.

    Raises:
        UserError: H + λI is not positive definite even after λ was raised tenfold five times.
    """
    mean = float(hessian.diagonal()[live].mean()) if live.any() else 1.0
    damping = damping_share * mean
    for attempt in range(DAMPING_ATTEMPTS + 1):
        damped = damp(_upper_blocks(hessian, number), live, damping)
        if _factor_in_place(damped):
            return damped, damping
        if attempt < DAMPING_ATTEMPTS:
            damping = max(10 * damping, 1e-6 * mean)
            logger.warning("The Hessian of %s is not positive definite; raising its damping to %.3g", name, damping)
    raise UserError(
        f"the Hessian of {name} is not positive definite even with damping {damping:.3g}; "
        "calibrate on more or other utterances, or raise solver.damping"
    )


def _upper_blocks(matrix: Float[Tensor, "cols cols"], number: int) -> Float[Tensor, "cols cols"]:
    """Copy the diagonal blocks and everything above them; the rest of the copy stays undefined."""
    copy = workspace(f"factor {number}", matrix.shape, matrix)
    for start in range(0, len(matrix), BLOCK):
        copy[start : start + BLOCK, start:] = matrix[start : start + BLOCK, start:]
    return copy


def damp(
    hessian: Float[Tensor, "cols cols"], live: Bool[Tensor, " cols"], damping: float
) -> Float[Tensor, "cols cols"]:
    """Add λ to the diagonal in place; dead inputs get a one there, because nothing is coupled to them."""
    hessian.diagonal().add_(damping)
    hessian.diagonal()[~live] = 1.0
    return hessian


def damp_covariance(covariance: Float[Tensor, "rows rows"], share: float) -> Float[Tensor, "rows rows"]:
    """Give the covariance of the gradients at some outputs, divided by its mean diagonal, plus a share of identity.

    Outputs that the model's output does not depend on have no gradients and count alike: of a covariance that is zero
    the identity is given.
    """
    mean = float(covariance.diagonal().mean())
    identity = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    return covariance / mean + share * identity if mean > 0 else identity


def invert_upper(factor: Float[Tensor, "cols cols"]) -> Float[Tensor, "cols cols"]:
    """Invert an upper triangular matrix; what lies below its diagonal is not read."""
    identity = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    return torch.linalg.solve_triangular(factor, identity, upper=True)


def _factor_in_place(matrix: Float[Tensor, "cols cols"]) -> bool:
    """Overwrite the upper triangle with R; return False if the matrix is not positive definite."""
    failed = torch.zeros((), dtype=torch.bool, device=matrix.device)
    for stop in range(len(matrix), 0, -BLOCK):
        start = max(stop - BLOCK, 0)
        corner = matrix[start:stop, start:stop]
        # With the order of rows and columns reversed, the upper factor is LAPACK's lower one.
        lower, info = torch.linalg.cholesky_ex(corner.flip(0, 1))
        failed |= info.ne(0) | ~lower.isfinite().all()
        corner.copy_(lower.flip(0, 1))
        if start == 0:
            break
        above = matrix[:start, start:stop]
        inverse = invert_upper(corner)
        middle = len(inverse) // 2  # the inverse is zero below its diagonal, which saves a quarter of the product
        left_part = above @ inverse[:middle].T
        above[:, middle:] = above[:, middle:] @ inverse[middle:, middle:].T
        above[:, :middle] = left_part
        for left in range(0, start, BLOCK):
            right = min(left + BLOCK, start)
            matrix[:right, left:right].addmm_(above[:right], above[left:right].T, alpha=-1)
    return not bool(failed)
