"""Selection: how many weights are removed from every group, and which ones, given their scores.

Counts are exact: ties are broken by position, and weights that an earlier mask removed count.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def group_quotas(total: int, sizes: Int[Tensor, " groups"], removed: Int[Tensor, " groups"]) -> Int[Tensor, " groups"]:
    """Share a number of removals among groups as evenly as the weights already removed allow.

    Every group gets the same share of its size, except one that has already lost more: it stays at that, and the
    others get correspondingly less.

    Args:
        total: The removals over all groups, including those already made.
        sizes: The number of weights in every group.
        removed: The number of weights already removed from every group.

    Returns:
        The removals of every group: at least ``removed``, with the sum ``max(total, sum(removed))``.
    """
    total = max(total, int(removed.sum()))
    sizes, removed = sizes.double().cpu(), removed.double().cpu()
    # The share is where the piecewise linear sum of max(removed, share * size) reaches the total; groups that have
    # lost more than their share drop out of the equation until none is left that has.
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


def _repair(
    quotas: Int[Tensor, " groups"], removed: Int[Tensor, " groups"], sizes: Int[Tensor, " groups"]
) -> Int[Tensor, " groups"]:
    """Move single removals between groups until every quota is between ``removed`` and ``sizes``."""
    bounded = quotas.clamp(removed, sizes)
    surplus = int((quotas - bounded).sum())
    while surplus:
        step = 1 if surplus > 0 else -1
        room = bounded < sizes if surplus > 0 else bounded > removed
        for index in room.nonzero().flatten()[: abs(surplus)].tolist():
            bounded[index] += step
            surplus -= step
    return bounded


def lowest(scores: Float[Tensor, "*shape"], count: int) -> Bool[Tensor, "*shape"]:
    """Mark the ``count`` lowest of all scores; where they tie, the first ones."""
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


def lowest_together(scores: Sequence[Float[Tensor, "..."]], count: int) -> list[Bool[Tensor, "..."]]:
    """Mark the ``count`` lowest scores of several tensors together, in each of them; where they tie, the first ones."""
    marked = lowest(torch.cat([part.flatten() for part in scores]), count)
    parts = marked.split([part.numel() for part in scores])
    return [part.view_as(own) for part, own in zip(parts, scores, strict=True)]


def lowest_of_rows(
    scores: Float[Tensor, "rows candidates"], keep: Bool[Tensor, "rows candidates"], quotas: Int[Tensor, " rows"]
) -> Bool[Tensor, "rows candidates"]:
    """Mark the lowest scores of every row, as many as its quota; what ``keep`` has removed already comes first."""
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


def n_of_m(
    scores: Float[Tensor, "rows cols"], keep: Bool[Tensor, "rows cols"], n: int, m: int
) -> Bool[Tensor, "rows cols"]:
    """Give the mask that keeps at most n of every m consecutive weights of a row, of those that ``keep`` has left."""
    groups, kept = scores.reshape(-1, m), keep.reshape(-1, m)
    quotas = torch.full((len(groups),), m - n)
    return (~lowest_of_rows(groups, kept, quotas) & kept).reshape(scores.shape)


def block_quotas(
    removed: Bool[Tensor, "cols rows"], untouched: bool, live: Bool[Tensor, " cols"], sparsity: float, block_size: int
) -> Int[Tensor, " blocks"]:
    """Give the removals of one matrix in every block of columns; dead columns are not counted.

    ``untouched`` says that no earlier mask has removed anything, so that ``removed`` need not be read.
    """
    sizes = torch.stack([part.sum() for part in live.split(block_size)]) * removed.shape[1]
    counts = torch.zeros_like(live, dtype=torch.int64) if untouched else removed.sum(1) * live
    already = torch.stack([part.sum() for part in counts.split(block_size)])
    return group_quotas(round(sparsity * int(sizes.sum())), sizes, already)


def counts_of_blocks(marked: Bool[Tensor, "cols rows"], block_size: int) -> Int[Tensor, " blocks"]:
    """Count the marked weights of every block of columns."""
    return torch.stack([part.sum() for part in marked.split(block_size)])


def mark_lowest(
    removed: Bool[Tensor, "cols rows"], scores: Float[Tensor, "cols rows"], live: Bool[Tensor, " cols"], quota: int
) -> None:
    """Add the lowest scores to ``removed`` until it has ``quota`` of the live columns' weights."""
    scores = scores.masked_fill(removed, float("-inf")).masked_fill(~live[:, None], float("inf"))
    removed |= lowest(scores, quota)
