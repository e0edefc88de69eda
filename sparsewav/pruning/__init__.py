"""The pruning engine, which works on tensors and modules alone.

In the order of the method: :mod:`encoder` finds the matrices, :mod:`hessian` sums their Hessians, :mod:`allocation`
chooses the sparsity of each, :mod:`solvers` decides which weights are removed and updates the others, :mod:`recovery`
brings a layer's output closer to the dense model's, :mod:`layerwise` is the loop over the layers, and :mod:`prune` runs
it all.
"""

from sparsewav.pruning.allocation.rank import allocate_by_rank, allocate_uniformly
from sparsewav.pruning.allocation.sensitivity import Trace, estimate_traces
from sparsewav.pruning.encoder import PrunableMatrix, prunable_matrices
from sparsewav.pruning.hessian import Hessians, collect_hessians
from sparsewav.pruning.prune import prune_model
from sparsewav.pruning.report import MatrixReport, PruneReport
from sparsewav.pruning.solvers.solve import PrunedMatrix, prune_matrices, prune_matrix

__all__ = [
    "Hessians",
    "MatrixReport",
    "PrunableMatrix",
    "PruneReport",
    "PrunedMatrix",
    "Trace",
    "allocate_by_rank",
    "allocate_uniformly",
    "collect_hessians",
    "estimate_traces",
    "prunable_matrices",
    "prune_matrices",
    "prune_matrix",
    "prune_model",
]
