"""Refit: the exact least squares of every row over the weights that it keeps.

The sweep settles a column for good when it has passed it, so that weights at the left do not answer to what is removed
at their right. Given the mask, the best weights of row w solve (H + λI)_SS ŵ_S = ((H + λI) w)_S, S the columns that the
row keeps. The systems of all rows are solved side by side by preconditioned conjugate gradients: a step of all of them
is one product with H, where factoring each would take cols³ a row.
"""

import torch
from torch import Tensor

MOST_ITERATIONS = 1000
"""Far more than a damped Hessian takes; what rounding keeps from converging ends here."""


def solve_on_support(target: Tensor, hessian: Tensor, keep: Tensor, start: Tensor, tolerance: float) -> Tensor:
    """Minimise tr((Ŵ − T)ᵀ H (Ŵ − T)) over the kept weights of Ŵ.

    Args:
        target: T, shape (cols, rows): matrices lie transposed here, as in the solver.
        hessian: damped, positive definite, shape (cols, cols).
        keep: True where a weight stays, shape (cols, rows).
        start: where to begin, shape (cols, rows).
        tolerance: stop a row once its residual, in the norm of H's inverse diagonal, is this share of what it is with
            all weights at zero.

    Returns:
        Ŵ, shape (cols, rows), zero where ``keep`` is False.
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
    for _ in range(MOST_ITERATIONS):
        open_rows = norm > limits[active]
        count = int(open_rows.count_nonzero())
        if count < 0.8 * len(active):  # the products are what takes the time: leave out the rows that are done
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
