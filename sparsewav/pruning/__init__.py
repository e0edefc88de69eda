"""The pruning engine: tensors and modules in, tensors and modules out.

In the order of the method: :mod:`encoder` finds the matrices, :mod:`calibration` gathers their Hessians,
:mod:`sensitivity` and :mod:`allocation` decide how much each loses, :mod:`saliency` and :mod:`solver` which weights go
and how the others make up for them, and :mod:`engine` runs it all.
"""

from sparsewav.pruning.allocation.rank import allocate_by_rank, allocate_uniformly
from sparsewav.pruning.allocation.sensitivity import Trace, estimate_traces
from sparsewav.pruning.encoder import PrunableMatrix, prunable_matrices
from sparsewav.pruning.hessian import Calibration, calibrate
from sparsewav.pruning.layerwise import MatrixReport
from sparsewav.pruning.prune import PruneReport, prune
from sparsewav.pruning.solvers.solve import PrunedMatrix, prune_matrices, prune_matrix

__all__ = [
    "Calibration",
    "MatrixReport",
    "PrunableMatrix",
    "PruneReport",
    "PrunedMatrix",
    "Trace",
    "allocate_by_rank",
    "allocate_uniformly",
    "calibrate",
    "estimate_traces",
    "prunable_matrices",
    "prune",
    "prune_matrices",
    "prune_matrix",
]
