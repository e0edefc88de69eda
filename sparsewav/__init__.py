"""SparseWAV: one-shot unstructured pruning of speech foundation models.

>>> import sparsewav
>>> report = sparsewav.prune(model, calibration_batches, sparsity=0.8)  # doctest: +SKIP
"""

from typing import TYPE_CHECKING, Any

from sparsewav.errors import UserError

if TYPE_CHECKING:
    from sparsewav.inference import AccelerationReport, accelerate
    from sparsewav.models.bitmask import load
    from sparsewav.pipeline.prune_folder import prune_folder
    from sparsewav.pruning import MatrixReport, PruneReport, prune

__version__ = "0.1.0"
__all__ = [
    "AccelerationReport",
    "MatrixReport",
    "PruneReport",
    "UserError",
    "__version__",
    "accelerate",
    "load",
    "prune",
    "prune_folder",
]


def __getattr__(name: str) -> Any:
    # The engine is imported on first use, so that `sparsewav --help` does not wait for PyTorch.
    import importlib

    if name in ("AccelerationReport", "accelerate"):
        return getattr(importlib.import_module("sparsewav.inference"), name)
    if name == "prune_folder":
        return importlib.import_module("sparsewav.pipeline.prune_folder").prune_folder
    if name == "load":
        return importlib.import_module("sparsewav.models.load").load  # which knows the package's own classes, too
    if name in ("MatrixReport", "PruneReport", "prune", "pruning"):
        pruning = importlib.import_module("sparsewav.pruning")
        return pruning if name == "pruning" else getattr(pruning, name)
    raise AttributeError(f"module 'sparsewav' has no attribute {name!r}")
