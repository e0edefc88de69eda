"""Other ways to run a model on the CPU, which sparse products compete with: a lower precision, other runtimes.

:data:`ALTERNATIVES` is their table. :func:`alternative` prepares one, and refuses it where it gives something else than
the model or cannot be had here.
"""

import copy
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsewav.errors import UserError
from sparsewav.inference.agreement import noise, noise_of
from sparsewav.inference.exchange import write_graph
from sparsewav.inference.runtime import MASK, exported_model
from sparsewav.models.checkpoint import EXPORTED, first_line
from sparsewav.models.load import SpeechModel
from sparsewav.models.processor import Parts
from sparsewav.pruning.encoder import input_key, output_counts, takes_padding
from sparsewav.pruning.families import family_of

Run = Callable[[Float[Tensor, "batch length ..."]], Float[Tensor, "batch frames outputs"]]
"""Gives the logits of audio without padding, or the last hidden states of an encoder."""

TRIAL = 10
"""Frames of the audio that every alternative is tried on."""

HOPELESS = 5
"""An alternative is refused if it takes so many times as long as the model on that audio. bfloat16 does, many times
over, where the processor does not multiply it."""

UNLIKE = 0.5
"""Norm of the difference of two outputs, relative to that of the model's, from which they are another model's. Those of
two models that have nothing in common differ by more than 1, and int8 comes to some hundredths."""

UTTERANCE = 1000
"""Frames of the longest utterance that a model is timed with: 20 seconds, beyond which recordings are cut."""


@dataclass(frozen=True)
class Alternative:
    """A prepared alternative.

    Attributes:
        run: Computes the outputs.
        difference: Largest difference from the model's outputs on the trial's audio, relative to the largest output.
    """

    run: Run
    difference: float


def run_model(model: PreTrainedModel, audio: Float[Tensor, "batch length ..."]) -> Float[Tensor, "batch frames _"]:
    """Give the outputs of a model in PyTorch for audio without padding."""
    return model(**{input_key(model): audio})[0]


def alternative(name: str, model: PreTrainedModel, folder: Path) -> Alternative:
    """Prepare an alternative of :data:`ALTERNATIVES` for as many threads as PyTorch has, and try it.

    Args:
        name: Its name.
        model: The model, in float32 on the CPU and in evaluation mode; not changed.
        folder: Where exported models are, and are written if they are not there yet.

    Raises:
        UserError: Its library is not installed, it fails, its outputs are not the model's, or it is hopelessly slow.
    """
    audio = audio_of(model, TRIAL)
    expected, dense = _timed(partial(run_model, model), audio)
    try:
        run = ALTERNATIVES[name](model, folder)
        found, seconds = _timed(run, audio)
        if seconds > HOPELESS * dense:  # the first call may have compiled something
            seconds = _timed(run, audio)[1]
    except UserError:
        raise
    except Exception as error:  # runtimes raise almost any error
        raise UserError(f"it does not run a {type(model).__name__} ({first_line(error)})") from error
    deviation = math.inf if found.shape != expected.shape else float((found - expected).norm() / expected.norm())
    if not deviation <= UNLIKE:
        raise UserError(f"its outputs differ from the model's by {deviation:.1e} of their norm")
    if seconds > HOPELESS * dense:
        raise UserError(f"it takes {seconds / dense:.0f} times as long as float32 in PyTorch")
    return Alternative(run, float((found - expected).abs().max() / expected.abs().max()))


@torch.inference_mode()
def _timed(run: Run, audio: Tensor) -> tuple[Tensor, float]:
    started = time.perf_counter()
    return run(audio), time.perf_counter() - started


def audio_of(model: PreTrainedModel, frames: int) -> Float[Tensor, "batch length ..."]:
    """Make a batch of noise of which so many frames reach the layers, in equal utterances of at most 20 seconds."""
    utterances = -(-frames // UTTERANCE)
    lengths = torch.arange(2**19)
    enough = (family_of(model).frames(model, lengths) >= -(-frames // utterances)) & (output_counts(model, lengths) > 0)
    return noise_of([int(enough.nonzero()[0])] * utterances, model)[0]


def copy_with_its_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Give a model with modules of its own that has the same tensors, so that it takes no memory for them."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _bfloat16(model: PreTrainedModel, folder: Path) -> Run:
    def run(audio: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return run_model(model, audio).float()

    return run


def _dynamic_int8(model: PreTrainedModel, folder: Path) -> Run:
    with warnings.catch_warnings():
        # Both say that PyTorch will lose it; torchao, which replaces it, is slower on the CPU.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message="torch.quantize_per_tensor")
        quantised = torch.ao.quantization.quantize_dynamic(
            copy_with_its_weights(model), {nn.Linear}, dtype=torch.qint8, inplace=True
        )
    return partial(run_model, quantised)


def _exported(model: PreTrainedModel, folder: Path, *, format: str, int8: bool = False, bfloat16: bool = False) -> Run:
    place = folder / (f"{format}-int8" if int8 else format)
    path = place / EXPORTED[format]
    if not path.is_file():
        place.mkdir(parents=True, exist_ok=True)
        # Ranges of noise: what they are does not change how long a product takes.
        calibration = [_batch(model, frames) for frames in (50, 100, 150, 200)] if int8 else None
        write_graph(SpeechModel("the model", model, Parts(None)), place, format, calibration)
    exported = exported_model(path, type(model), model.config, bfloat16=bfloat16)
    return lambda audio: torch.from_numpy(exported.run(audio))


def _batch(model: PreTrainedModel, frames: int) -> dict[str, Tensor]:
    audio, mask = noise(model, [frames], seed=frames)
    return {input_key(model): audio} | ({MASK: mask} if takes_padding(model) else {})


BFLOAT16 = "PyTorch bfloat16"

ALTERNATIVES: dict[str, Callable[[PreTrainedModel, Path], Run]] = {
    BFLOAT16: _bfloat16,
    "PyTorch int8": _dynamic_int8,
    "ONNX Runtime float32": partial(_exported, format="onnx"),
    "ONNX Runtime int8": partial(_exported, format="onnx", int8=True),
    "OpenVINO float32": partial(_exported, format="openvino"),
    "OpenVINO bfloat16": partial(_exported, format="openvino", bfloat16=True),
    "OpenVINO int8": partial(_exported, format="openvino", int8=True),
}
"""What prepares each alternative, from a model and the folder of exported ones. PyTorch's bfloat16 is automatic mixed
precision, its int8 the dynamic quantisation of linear modules; :mod:`~sparsewav.inference.exchange` writes the others.
"""
