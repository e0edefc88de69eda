"""Allocation by rank: the sparsity of every matrix from the order of the sensitivities (the paper's)."""

from collections.abc import Mapping

from sparsewav.errors import UserError
from sparsewav.settings.pruning import alpha_faults


def allocate_uniformly(sizes: Mapping[str, int], sparsity: float) -> dict[str, float]:
    """Give every matrix the same sparsity.

    Raises:
        UserError: The sparsity is not between 0 and 1.
    """
    _check_sparsity(sparsity)
    return dict.fromkeys(sizes, sparsity)


def rank_by_sensitivity(sensitivities: Mapping[str, float]) -> dict[str, int]:
    """Rank matrices by sensitivity, 0 for the highest; ties are broken by name."""
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
    """Give each of the N matrices the sparsity (s − α) + rank · 2α / (N − 1) (eq. 6 and 7 of the paper).

    The progression ignores the matrices' sizes, so that the sparsity of the whole model misses s where sizes and ranks
    are correlated.

    Args:
        sizes: The number of weights of every matrix.
        sensitivities: The mean Hessian trace of every matrix (eq. 5).
        sparsity: s, over all matrices.
        alpha: α, half the range of sparsities.
        exact_budget: Whether to shift the range until the whole model has sparsity s to one weight.

    Returns:
        The sparsity of every matrix, by name, in the order of ``sizes``.

    Raises:
        UserError: A matrix would get a sparsity below 0 or above 1.
    """
    _check_sparsity(sparsity)
    for fault in alpha_faults(alpha, sparsity):
        raise UserError(fault)
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
