"""The methods that the paper compares with: each takes a dense CTC model and gives a smaller one.

A method is a function with the signature of :class:`Method`, a dataclass in :mod:`sparsewav.settings.baselines`, a file
in ``conf/method``, and a line in :data:`METHODS`.
"""

from sparsewav.baselines import deep_vs_wide, distilhubert, fithubert, l0, magnitude, parp, self_pinching
from sparsewav.baselines.distillation import distilling
from sparsewav.baselines.method import CompressionReport, Method

__all__ = ["METHODS", "CompressionReport", "Method"]

METHODS: dict[str, Method] = {
    "distilhubert": distilling(distilhubert.build),
    "fithubert": distilling(fithubert.build),
    "deep_vs_wide": distilling(deep_vs_wide.build),
    "dphubert": l0.compress,
    "dpwavlm": l0.compress,
    "wang2023": l0.compress,
    "l0_finetune": l0.compress,
    "magnitude": magnitude.compress,
    "parp": parp.compress,
    "parp_p": parp.compress,
    "self_pinching": self_pinching.compress,
}
"""The methods by the value of ``method.name``."""
