"""Factorisation of the damped Hessian: H + λI = RRᵀ with R upper triangular.

R is all that the OBS sweep needs, and no inverse of the Hessian is ever made. Where the columns left of p are settled,
the H of the problem that remains is the trailing part of RRᵀ from p on, whose inverse begins with 1 / R_pp². A change
Δ of the settled columns asks for the change of the others that makes (ΔR) zero there: one product and a small
triangular solve for each block of columns. That is SparseGPT's update with the Cholesky factor U of H⁻¹ (U = R⁻¹ and
pivots U_pp = 1 / R_pp), at a quarter of its factorisation's work and with one rounding less.
"""

import logging

import torch
from torch import Tensor

from sparsewav.errors import UserError
from sparsewav.pruning.solvers.workspace import workspace

logger = logging.getLogger(__name__)

DAMPING_ATTEMPTS = 5
BLOCK = 256
"""Columns that are factored together; the rest of the work is products, which run at the machine's full speed."""


def factorize(hessian: Tensor, live: Tensor, percdamp: float, name: str, number: int = 0) -> tuple[Tensor, float]:
    """Give R and the λ that it took.

    Args:
        hessian: XXᵀ, shape (cols, cols); not changed.
        live: inputs that are ever other than zero, shape (cols,).
        percdamp: λ as a share of the mean diagonal over live inputs.
        name: of the matrix, for messages.
        number: of the memory that R takes; the next call with the same number takes it again.

    Returns:
        R, shape (cols, cols), of which only the upper triangle holds numbers that mean something; and λ.

    Raises:
        UserError: H + λI is not positive definite even with λ raised tenfold five times.
    """
    mean = float(hessian.diagonal()[live].mean()) if live.any() else 1.0
    damping = percdamp * mean
    for attempt in range(DAMPING_ATTEMPTS + 1):
        damped = damp(_upper_blocks(hessian, number), live, damping)
        if _factor_in_place(damped):
            return damped, damping
        if attempt < DAMPING_ATTEMPTS:
            damping = max(10 * damping, 1e-6 * mean)
            logger.warning("The Hessian of %s is not positive definite; raising its damping to %.3g", name, damping)
    raise UserError(
        f"the Hessian of {name} is not positive definite even with damping {damping:.3g}; "
        "calibrate on more or other utterances, or raise saliency.percdamp"
    )


def _upper_blocks(matrix: Tensor, number: int) -> Tensor:
    """Copy what lies above the diagonal, and the blocks on it; the rest of the memory is not touched."""
    copy = workspace(f"factor {number}", matrix.shape, matrix)
    for start in range(0, len(matrix), BLOCK):
        copy[start : start + BLOCK, start:] = matrix[start : start + BLOCK, start:]
    return copy


def damp(hessian: Tensor, live: Tensor, damping: float) -> Tensor:
    """Add λ to the diagonal (cols, cols) in place; dead inputs get a one there: nothing couples to them."""
    hessian.diagonal().add_(damping)
    hessian.diagonal()[~live] = 1.0
    return hessian


def invert_upper(factor: Tensor) -> Tensor:
    """Inverse of an upper triangular matrix (cols, cols); what lies below its diagonal is not read."""
    identity = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    return torch.linalg.solve_triangular(factor, identity, upper=True)


def _factor_in_place(matrix: Tensor) -> bool:
    """Put R into the upper triangle of a positive definite matrix (cols, cols); False if it is not one."""
    failed = torch.zeros((), dtype=torch.bool, device=matrix.device)
    for stop in range(len(matrix), 0, -BLOCK):
        start = max(stop - BLOCK, 0)
        corner = matrix[start:stop, start:stop]
        # With its rows and columns turned around, the upper factor is LAPACK's lower one.
        lower, info = torch.linalg.cholesky_ex(corner.flip(0, 1))
        failed |= info.ne(0) | ~lower.isfinite().all()
        corner.copy_(lower.flip(0, 1))
        if start == 0:
            break
        above = matrix[:start, start:stop]
        inverse = invert_upper(corner)
        middle = len(inverse) // 2  # below the diagonal it is zero: the right half of the columns need not the left
        left_part = above @ inverse[:middle].T
        above[:, middle:] = above[:, middle:] @ inverse[middle:, middle:].T
        above[:, :middle] = left_part
        for left in range(0, start, BLOCK):
            right = min(left + BLOCK, start)
            matrix[:right, left:right].addmm_(above[:right], above[left:right].T, alpha=-1)
    return not bool(failed)
