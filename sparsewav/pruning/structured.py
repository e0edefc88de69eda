"""Removing heads and units: the parts of a structure that count least, and what is said of it, and of channels."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from sparsewav.pruning.encoder import prunable_matrices
from sparsewav.pruning.solvers.groups import GroupRemoval, remove_groups
from sparsewav.pruning.solvers.solve import PrunedMatrix
from sparsewav.pruning.structure import Structure


@dataclass(frozen=True)
class StructureReport:
    """The result of removing parts of one attention, feed-forward network or convolution, in figures.

    Attributes:
        name: The name of its module.
        layer: The index of its transformer layer, or :data:`~sparsewav.pruning.encoder.FRONT`.
        kind: What its parts are: ``heads``, ``units`` or ``channels``.
        size: The columns of the matrix that reads them, for each part.
        parts: How many there were.
        kept: How many stay.
        relative_error: Of the output of the matrix that reads them, as in
            :class:`~sparsewav.pruning.report.MatrixReport`.
    """

    name: str
    layer: int
    kind: str
    size: int
    parts: int
    kept: int
    relative_error: float


def remove_parts(
    structure: Structure,
    hessian: Float[Tensor, "cols cols"],
    counts: Iterable[int],
    damping: float,
    drift: Float[Tensor, "cols cols"] | None = None,
) -> list[GroupRemoval]:
    """Give what the matrix that reads a structure becomes with fewer parts, for every count; nothing is changed.

    The arguments and errors are those of :func:`~sparsewav.pruning.solvers.groups.remove_groups`.
    """
    reader = structure.reader
    return remove_groups(reader.weight.detach(), hessian, structure.size, counts, damping, reader.name, drift)


def as_pruned(structure: Structure, removal: GroupRemoval) -> PrunedMatrix:
    """Give the result as that of a solver that removes single weights."""
    stays = torch.zeros(structure.count, dtype=torch.bool, device=removal.weight.device)
    columns = stays.index_fill_(0, removal.kept, True).repeat_interleave(structure.size)
    return PrunedMatrix(removal.weight, columns.expand_as(removal.weight))


def removed_weights(model: PreTrainedModel, reports: Mapping[str, StructureReport]) -> int:
    """Count the weights of prunable matrices that go with the parts that these reports say were removed."""
    removed = 0
    for report in reports.values():
        matrices = [matrix for matrix in prunable_matrices(model) if matrix.name.startswith(f"{report.name}.")]
        # The columns of one matrix and as many rows of the others.
        sides = (matrix.weight.shape[matrix.name not in reports] for matrix in matrices)
        removed += (report.parts - report.kept) * report.size * sum(sides)
    return removed
