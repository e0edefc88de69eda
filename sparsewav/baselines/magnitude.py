"""Global magnitude pruning: the smallest weights of all prunable matrices together become zero."""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from sparsewav.baselines.method import CompressionReport
from sparsewav.data.utterances import Utterance
from sparsewav.models.processor import Processor
from sparsewav.pruning.encoder import PrunableMatrix, prunable_matrices
from sparsewav.pruning.hessian import Progress
from sparsewav.pruning.solvers.selection import lowest_together
from sparsewav.settings.baselines import MagnitudePruning


@torch.no_grad()
def prune_by_magnitude(model: PreTrainedModel, sparsity: float) -> None:
    """Set the smallest weights of all prunable matrices together to zero, in place.

    The share of zeros among the prunable weights then is the sparsity, to one weight. Ties are broken by position.
    """
    matrices = prunable_matrices(model)
    prune_lowest(matrices, [matrix.weight.abs().float() for matrix in matrices], sparsity)


@torch.no_grad()
def prune_lowest(
    matrices: Sequence[PrunableMatrix], scores: Sequence[Float[Tensor, "*shape"]], sparsity: float
) -> float:
    """Set the weights with the lowest scores of all matrices together to zero, and give the highest score of these.

    Where nothing is removed that is 0.
    """
    masks = lowest_together(scores, round(sparsity * sum(map(torch.numel, scores))))
    for matrix, mask in zip(matrices, masks, strict=True):
        matrix.weight.masked_fill_(mask.view_as(matrix.weight), 0.0)
    return max((float(score[mask].max()) for score, mask in zip(scores, masks, strict=True) if mask.any()), default=0.0)


def compress(
    dense: PreTrainedModel,
    processor: Processor,
    training_set: Sequence[Utterance],
    settings: MagnitudePruning,
    folder: Path,
    *,
    seed: int,
    progress: Progress | None = None,
) -> tuple[PreTrainedModel, CompressionReport]:
    """Prune once; the fine-tuning keeps the zeros. See :class:`~sparsewav.baselines.Method` for the arguments."""
    prune_by_magnitude(dense, settings.sparsity)
    return dense, CompressionReport(updates=0, batch_size=0, masked=True)
