"""The error of a matrix's output on the calibration set, from the statistics of its input."""

import torch
from jaxtyping import Float
from torch import Tensor

from sparsewav.pruning.hessian import Hessians


def output_energy(dense: Float[Tensor, "rows cols"], hessians: Hessians, name: str) -> float:
    """Give ||WX||² on the calibration set, bounded away from zero."""
    return max(output_error(dense, torch.zeros_like(dense), hessians, name), 1e-30)


def output_error(
    dense: Float[Tensor, "rows cols"], pruned: Float[Tensor, "rows cols"], hessians: Hessians, name: str
) -> float:
    """Give ||WX − ŴX̂||² on the calibration set for the matrix ``name``; with Ŵ zero it is ||WX||²."""
    key = hessians.reads[name]
    dense = dense.to(torch.promote_types(dense.dtype, torch.float32))
    change = dense - pruned
    error = _energy(change, hessians.by_input[key])
    if key in hessians.drifts:
        mixed = ((dense @ hessians.drifts[key].to(dense.dtype)) * change).sum(dtype=torch.float64)
        error += 2 * float(mixed) + _energy(dense, hessians.drift_sums[key])
    return error


def _energy(weight: Float[Tensor, "rows cols"], hessian: Float[Tensor, "cols cols"], block_size: int = 512) -> float:
    """Give ||WX||² from W and H = XXᵀ, of which only the blocks on and above the diagonal are multiplied."""
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    total = 0.0
    for start in range(0, len(hessian), block_size):
        stop = min(start + block_size, len(hessian))
        block = hessian[start:stop].to(weight.dtype)
        product = torch.addmm(
            weight[:, start:stop] @ block[:, start:stop], weight[:, stop:], block[:, stop:].T, beta=1, alpha=2
        )
        total += float((product * weight[:, start:stop]).sum(dtype=torch.float64))
    return total
