"""Selection: how many weights every group loses, and which ones, given their scores.

Counts are exact: ties are broken by position, and what an earlier mask removed counts.
"""

import numpy as np
import torch
from torch import Tensor


def group_quotas(total: int, sizes: Tensor, removed: Tensor) -> Tensor:
    """Share a number of removals among groups as evenly as what is already removed allows.

    Every group gets the same share of its size, except one that has lost more already: it keeps that, and the others
    get the less.

    Args:
        total: removals over all groups, those already made among them.
        sizes: of the groups, shape (groups,).
        removed: already removed in every group, shape (groups,).

    Returns:
        Removals of every group, shape (groups,), int64: at least ``removed``, summing to ``max(total, sum(removed))``.
    """
    total = max(total, int(removed.sum()))
    sizes, removed = sizes.double().cpu(), removed.double().cpu()
    # The share is where the piecewise linear sum of max(removed, share * size) reaches the total: groups drop out of it
    # one by one, those with the largest share already removed first.
    open_groups = torch.ones_like(sizes, dtype=torch.bool)
    while True:
        size = float(sizes[open_groups].sum())
        share = (total - float(removed[~open_groups].sum())) / size if size else 0.0
        full = open_groups & (removed > share * sizes)
        if not full.any():
            break
        open_groups &= ~full
    wanted = torch.where(open_groups, share * sizes, removed)
    # Rounding the running sum spreads the fractions evenly and keeps the total.
    ends = (wanted.cumsum(0) + 1e-6).floor()
    ends[-1] = total
    quotas = torch.diff(ends, prepend=torch.zeros(1, dtype=torch.float64)).to(torch.int64)
    return _repair(quotas, removed.to(torch.int64), sizes.to(torch.int64))


def _repair(quotas: Tensor, removed: Tensor, sizes: Tensor) -> Tensor:
    """Move single removals between groups until none has fewer than it already lost, or more than it holds."""
    bounded = quotas.clamp(removed, sizes)
    surplus = int((quotas - bounded).sum())
    while surplus:
        step = 1 if surplus > 0 else -1
        room = bounded < sizes if surplus > 0 else bounded > removed
        for index in room.nonzero().flatten()[: abs(surplus)].tolist():
            bounded[index] += step
            surplus -= step
    return bounded


def lowest(scores: Tensor, count: int) -> Tensor:
    """Mark the ``count`` lowest of all scores, the first ones where they tie; any shape, boolean out."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    flat = scores.reshape(-1)
    if flat.device.type == "cpu":  # a vectorised selection, some ten times faster than PyTorch's
        threshold = torch.from_numpy(np.partition(flat.numpy(), count - 1)[count - 1 : count])
    else:
        threshold = flat.kthvalue(count).values
    marked = flat <= threshold
    surplus = int(marked.count_nonzero()) - count
    if surplus:
        ties = (flat == threshold).nonzero().flatten()
        marked[ties[len(ties) - surplus :]] = False
    return marked.reshape(scores.shape)


def lowest_of_rows(scores: Tensor, keep: Tensor, quotas: Tensor) -> Tensor:
    """Mark the lowest scores of every row, as many as its quota says; what ``keep`` removed goes first.

    Args:
        scores: shape (rows, candidates).
        keep: shape (rows, candidates).
        quotas: shape (rows,).

    Returns:
        Shape (rows, candidates), boolean.
    """
    scores = scores.masked_fill(~keep, float("-inf"))
    if len(scores) == 1:
        return lowest(scores, int(quotas))
    marked = torch.zeros_like(keep)
    most = int(quotas.max())
    if most == 0:
        return marked
    order = scores.topk(most, largest=False, sorted=True).indices  # (rows, most)
    wanted = torch.arange(most, device=scores.device) < quotas.to(scores.device)[:, None]
    return marked.scatter(1, order, wanted)


def n_of_m(scores: Tensor, keep: Tensor, n: int, m: int) -> Tensor:
    """Mask that keeps at most n of every m consecutive columns; all (rows, cols)."""
    groups, kept = scores.reshape(-1, m), keep.reshape(-1, m)
    quotas = torch.full((len(groups),), m - n)
    return (~lowest_of_rows(groups, kept, quotas) & kept).reshape(scores.shape)


def block_quotas(removed: Tensor, untouched: bool, live: Tensor, sparsity: float, block_size: int) -> Tensor:
    """How many weights of one matrix (cols, rows) every block of columns loses, dead columns left out of the count."""
    sizes = torch.stack([part.sum() for part in live.split(block_size)]) * removed.shape[1]
    counts = torch.zeros_like(live, dtype=torch.int64) if untouched else removed.sum(1) * live
    already = torch.stack([part.sum() for part in counts.split(block_size)])
    return group_quotas(round(sparsity * int(sizes.sum())), sizes, already)


def counts_of_blocks(marked: Tensor, block_size: int) -> Tensor:
    """How many weights of every block of columns are marked (cols, rows)."""
    return torch.stack([part.sum() for part in marked.split(block_size)])


def mark_lowest(removed: Tensor, scores: Tensor, live: Tensor, quota: int) -> None:
    """Let ``removed`` have exactly ``quota`` of the live columns' weights, its own first; all (block, rows)."""
    scores = scores.masked_fill(removed, float("-inf")).masked_fill(~live[:, None], float("inf"))
    removed |= lowest(scores, quota)
