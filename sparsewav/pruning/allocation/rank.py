"""Allocation: how many weights each matrix loses."""

import math
from collections.abc import Mapping

from sparsewav.errors import UserError


def allocate_uniformly(sizes: Mapping[str, int], sparsity: float) -> dict[str, float]:
    """Give every matrix the same sparsity.

    Raises:
        UserError: ``sparsity`` is not between 0 and 1.
    """
    _check_sparsity(sparsity)
    return dict.fromkeys(sizes, sparsity)


def largest_alpha(sparsity: float) -> float:
    """The largest α that keeps s − α and s + α between 0 and 1, to six digits."""
    return math.floor(min(sparsity, 1 - sparsity) * 1e6 + 1e-3) / 1e6


def rank_by_sensitivity(sensitivities: Mapping[str, float]) -> dict[str, int]:
    """Rank matrices, 0 for the most sensitive; equal sensitivities go by name."""
    ordered = sorted(sensitivities, key=lambda name: (-sensitivities[name], name))
    return {name: rank for rank, name in enumerate(ordered)}


def allocate_by_rank(
    sizes: Mapping[str, int],
    sensitivities: Mapping[str, float],
    sparsity: float,
    alpha: float = 0.1,
    *,
    exact_budget: bool = False,
) -> dict[str, float]:
    """Give the rank-th most sensitive matrix sparsity (s − α) + rank · 2α / (N − 1) (eq. 6 and 7 of the paper).

    The progression does not know the matrices' sizes, so the sparsity of the whole model misses ``sparsity`` as soon
    as sizes and ranks go together.

    Args:
        sizes: weights of every matrix.
        sensitivities: mean Hessian trace of every matrix (eq. 5).
        sparsity: s, over all matrices.
        alpha: α, half the range.
        exact_budget: shift both bounds by the same amount until the size-weighted sum is s to one weight.

    Returns:
        A sparsity for every matrix, by name, in the order of ``sizes``.

    Raises:
        UserError: a matrix would get a sparsity below 0 or above 1.
    """
    _check_sparsity(sparsity)
    fitting = largest_alpha(sparsity)
    if alpha < 0 or sparsity - alpha < -1e-9 or sparsity + alpha > 1 + 1e-9:
        raise UserError(
            f"allocation.alpha={alpha:g} does not fit sparsity {sparsity:g}: matrices would get "
            f"{sparsity - alpha:g} to {sparsity + alpha:g}; choose allocation.alpha between 0 and {fitting:g}"
        )
    ranks = rank_by_sensitivity(sensitivities)
    step = 2 * alpha / (len(sizes) - 1) if len(sizes) > 1 else 0.0
    lowest = sparsity - alpha if len(sizes) > 1 else sparsity
    allocated = {name: min(max(lowest + ranks[name] * step, 0.0), 1.0) for name in sizes}
    return _shift_to_budget(sizes, allocated, sparsity, alpha) if exact_budget else allocated


def _shift_to_budget(
    sizes: Mapping[str, int], allocated: Mapping[str, float], sparsity: float, alpha: float
) -> dict[str, float]:
    total = sum(sizes.values())
    shift = sparsity - sum(sizes[name] * allocated[name] for name in sizes) / total
    lowest, highest = min(allocated.values()) + shift, max(allocated.values()) + shift
    if lowest < -1e-9 or highest > 1 + 1e-9:
        # The shift is proportional to α, so the largest α that fits follows from this one's excess.
        room, need = (1 - sparsity, highest - sparsity) if highest > 1 else (sparsity, sparsity - lowest)
        fitting = int(alpha * room / need * 1e4) / 1e4
        raise UserError(
            f"allocation.alpha={alpha:g} with allocation.exact_budget=true would give a matrix sparsity "
            f"{highest if highest > 1 else lowest:.4f}; choose allocation.alpha up to {fitting:g}"
        )
    wanted = {name: sizes[name] * min(max(allocated[name] + shift, 0.0), 1.0) for name in sizes}
    counts = {name: int(wanted[name]) for name in sizes}
    missing = round(sparsity * total) - sum(counts.values())
    by_remainder = sorted(sizes, key=lambda name: (counts[name] - wanted[name], name))
    for name in by_remainder[:missing]:
        counts[name] += 1
    return {name: counts[name] / sizes[name] for name in sizes}


def _check_sparsity(sparsity: float) -> None:
    if not 0 <= sparsity <= 1:
        raise UserError(f"sparsity {sparsity:g} is not between 0 and 1; 0.75 removes three weights of four")
