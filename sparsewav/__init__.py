"""SparseWAV: one-shot unstructured pruning of speech foundation models.

>>> from sparsewav import ALPS, Reconstruction, prune
>>> report = prune(model, calibration_batches, 0.8, solver=ALPS(max_steps=300))  # doctest: +SKIP
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sparsewav.errors import UserError
from sparsewav.settings import *  # noqa: F403
from sparsewav.settings import __all__ as _options

if TYPE_CHECKING:
    from sparsewav.inference import AccelerationReport, accelerate  # noqa: F401
    from sparsewav.models.load import load  # noqa: F401
    from sparsewav.pipeline.prune_folder import prune_folder  # noqa: F401
    from sparsewav.pruning import MatrixReport, PruneReport, prune, prune_matrix  # noqa: F401

__version__ = "0.1.0"

_LATER = {
    "AccelerationReport": "sparsewav.inference",
    "MatrixReport": "sparsewav.pruning",
    "PruneReport": "sparsewav.pruning",
    "accelerate": "sparsewav.inference",
    "load": "sparsewav.models.load",  # which registers the package's own classes, too
    "prune": "sparsewav.pruning",
    "prune_folder": "sparsewav.pipeline.prune_folder",
    "prune_matrix": "sparsewav.pruning",
}
"""What is imported on first use, so that ``sparsewav --help`` does not wait for PyTorch; by name, its module."""

__all__ = ["UserError", "__version__", *_options, *_LATER]


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module 'sparsewav' has no attribute {name!r}")
