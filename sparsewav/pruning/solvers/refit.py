"""Refit: the exact least squares solution of every row over the weights that it keeps.

The sweep settles a column for good when it has passed it, so that weights on the left do not compensate for what is
removed on their right. Given the mask, the best weights of row w solve (H + λI)_SS ŵ_S = ((H + λI) w)_S, S the columns
that the row keeps. The systems of all rows are solved together by preconditioned conjugate gradients: an iteration of
all of them is one product with H, whereas factoring each system would take O(cols³) a row.

Where a matrix G weights the errors of the outputs, it couples the rows: a full G leaves one system for the whole
matrix, of as many unknowns as weights are kept, and an iteration is a product with H and one with G.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

MAX_ITERATIONS = 1000
"""Far more than a damped Hessian takes; it bounds the rows that rounding keeps from converging."""


def solve_on_support(
    target: Float[Tensor, "cols rows"],
    hessian: Float[Tensor, "cols cols"],
    keep: Bool[Tensor, "cols rows"],
    start: Float[Tensor, "cols rows"],
    tolerance: float,
) -> Float[Tensor, "cols rows"]:
    """Minimise tr((Ŵ − T)ᵀ H (Ŵ − T)) over the kept weights of Ŵ.

    Args:
        target: T.
        hessian: The damped Hessian, positive definite.
        keep: True where a weight is kept; Ŵ is zero elsewhere.
        start: The weights that the iteration starts from.
        tolerance: A row has converged when its residual, in the norm of the preconditioner (the inverse diagonal of
            H), is this share of the residual of all-zero weights.
    """
    diagonal = hessian.diagonal()[:, None]
    product = hessian @ target
    limits = tolerance**2 * ((product * keep).square() / diagonal).sum(0)  # (rows,)
    result = start * keep
    active = torch.arange(target.shape[1], device=target.device)  # rows that have not converged
    weight, mask = result.clone(), keep.to(target.dtype)
    residual = (product - hessian @ weight) * mask
    step = residual / diagonal
    norm = (residual * step).sum(0)
    for _ in range(MAX_ITERATIONS):
        open_rows = norm > limits[active]
        count = int(open_rows.count_nonzero())
        if count < 0.8 * len(active):  # the products dominate the time, so converged rows are left out of them
            result[:, active] = weight
            active = active[open_rows]
            weight, residual, step, mask = (item[:, open_rows] for item in (weight, residual, step, mask))
            norm = norm[open_rows]
        if count == 0:
            break
        image = (hessian @ step) * mask
        length = norm / (step * image).sum(0).clamp(min=torch.finfo(norm.dtype).tiny)
        weight = weight + length * step
        residual = residual - length * image
        preconditioned = residual / diagonal
        before, norm = norm, (residual * preconditioned).sum(0)
        step = preconditioned + (norm / before.clamp(min=torch.finfo(norm.dtype).tiny)) * step
    result[:, active] = weight
    return result


def solve_weighted_on_support(
    target: Float[Tensor, "cols rows"],
    hessian: Float[Tensor, "cols cols"],
    covariance: Float[Tensor, "rows rows"],
    keep: Bool[Tensor, "cols rows"],
    start: Float[Tensor, "cols rows"],
    tolerance: float,
) -> Float[Tensor, "cols rows"]:
    """Minimise tr(G(Ŵ − T)ᵀ H (Ŵ − T)) over the kept weights of Ŵ.

    Args:
        target: T.
        hessian: The damped Hessian, positive definite.
        covariance: G, positive definite.
        keep: True where a weight is kept; Ŵ is zero elsewhere.
        start: The weights that the iteration starts from.
        tolerance: The iteration ends when the residual of the whole matrix, in the norm of the preconditioner (the
            inverse diagonals of H and G), is this share of the residual of all-zero weights.
    """
    diagonal = hessian.diagonal()[:, None] * covariance.diagonal()  # (cols, rows)
    mask = keep.to(target.dtype)
    image = (hessian @ target @ covariance) * mask
    limit = tolerance**2 * float((image.square() / diagonal).sum())
    weight = start * mask
    residual = image - (hessian @ weight @ covariance) * mask
    step = residual / diagonal
    norm = (residual * step).sum()
    for _ in range(MAX_ITERATIONS):
        if float(norm) <= limit:
            break
        image = (hessian @ step @ covariance) * mask
        length = norm / (step * image).sum().clamp(min=torch.finfo(norm.dtype).tiny)
        weight = weight + length * step
        residual = residual - length * image
        preconditioned = residual / diagonal
        before, norm = norm, (residual * preconditioned).sum()
        step = preconditioned + (norm / before.clamp(min=torch.finfo(norm.dtype).tiny)) * step
    return weight
