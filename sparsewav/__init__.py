"""SparseWAV: one-shot unstructured pruning of speech foundation models.

>>> import sparsewav
>>> speech = sparsewav.load_model("demo")  # or a folder, a run, a name on the hub, a file of fairseq
>>> batches = sparsewav.calibration_batches("demo", speech, utterances=128)  # or your files, arrays, data set
>>> report = sparsewav.prune(speech, batches, 0.8, preset="best_oneshot")  # in place
>>> report.to_frame()  # a row for every matrix
>>> sparsewav.evaluate(speech, "demo")  # or your files with transcripts: WER and CER
>>> sparsewav.transcribe(speech, "talk.wav")[0].text
>>> sparsewav.save(speech, "small", format="bitmask")

The options are those of the command: ``help(sparsewav.prune)`` lists them, and objects such as ``ALPS(max_steps=100)``
or ``Calibration(propagation="sequential")`` set their keys. Wrong input raises :class:`UserError`, with
one sentence that says what to do.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sparsewav.errors import UserError
from sparsewav.settings import *  # noqa: F403
from sparsewav.settings import __all__ as _options

if TYPE_CHECKING:
    from sparsewav.data.given import calibration_batches  # noqa: F401
    from sparsewav.data.utterances import Utterance  # noqa: F401
    from sparsewav.inference import AccelerationReport, accelerate  # noqa: F401
    from sparsewav.inference.transcription import Transcript, transcribe  # noqa: F401
    from sparsewav.inference.wer import ErrorRates, evaluate  # noqa: F401
    from sparsewav.models.cut import cut  # noqa: F401
    from sparsewav.models.load import SpeechModel, load  # noqa: F401
    from sparsewav.pipeline.prune import prune  # noqa: F401
    from sparsewav.pipeline.prune_folder import prune_folder  # noqa: F401
    from sparsewav.pipeline.run_folder import save  # noqa: F401
    from sparsewav.pruning import MatrixReport, PruneReport, prune_matrix  # noqa: F401
    from sparsewav.training.global_recovery import recover  # noqa: F401
    from sparsewav.training.recipes import load_model  # noqa: F401

__version__ = "0.1.0"

_LATER = {
    "AccelerationReport": "sparsewav.inference",
    "ErrorRates": "sparsewav.inference.wer",
    "MatrixReport": "sparsewav.pruning",
    "PruneReport": "sparsewav.pruning",
    "SpeechModel": "sparsewav.models.load",
    "Transcript": "sparsewav.inference.transcription",
    "Utterance": "sparsewav.data.utterances",
    "accelerate": "sparsewav.inference",
    "calibration_batches": "sparsewav.data.given",
    "cut": "sparsewav.models.cut",
    "evaluate": "sparsewav.inference.wer",
    "load": "sparsewav.models.load",  # which registers the package's own classes, too
    "load_model": "sparsewav.training.recipes",
    "prune": "sparsewav.pipeline.prune",
    "prune_folder": "sparsewav.pipeline.prune_folder",
    "prune_matrix": "sparsewav.pruning",
    "recover": "sparsewav.training.global_recovery",
    "save": "sparsewav.pipeline.run_folder",
    "transcribe": "sparsewav.inference.transcription",
}
"""What is imported on first use, so that ``sparsewav --help`` does not wait for PyTorch; by name, its module."""

__all__ = ["UserError", "__version__", *_options, *_LATER]


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module 'sparsewav' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
