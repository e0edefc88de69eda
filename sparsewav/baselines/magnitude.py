"""Global magnitude pruning: the smallest weights of all prunable matrices together become zero."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from sparsewav.baselines.method import CompressionReport
from sparsewav.data.utterances import Utterance
from sparsewav.models.processor import Processor
from sparsewav.pruning.encoder import prunable_matrices
from sparsewav.pruning.hessian import Progress
from sparsewav.pruning.solvers.selection import lowest
from sparsewav.settings.baselines import MagnitudePruning


@torch.no_grad()
def prune_by_magnitude(model: PreTrainedModel, sparsity: float) -> None:
    """Set the smallest weights of all prunable matrices together to zero, in place.

    The share of zeros among the prunable weights then is the sparsity, to one weight. Ties are broken by position.
    """
    matrices = prunable_matrices(model)
    magnitudes = torch.cat([matrix.weight.abs().flatten().float() for matrix in matrices])
    removed = lowest(magnitudes, round(sparsity * len(magnitudes)))
    for matrix, mask in zip(matrices, removed.split([matrix.size for matrix in matrices]), strict=True):
        matrix.weight.masked_fill_(mask.view_as(matrix.weight), 0.0)


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
