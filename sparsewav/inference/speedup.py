"""How many times as fast as the dense model a smaller one is, timed in turns in the runtime that it is to run in."""

import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from sparsewav.errors import UserError
from sparsewav.inference.agreement import noise_of
from sparsewav.inference.alternatives import ALTERNATIVES, BFLOAT16, Run, run_model
from sparsewav.inference.exchange import check_libraries
from sparsewav.inference.shapes import Shape, with_parts
from sparsewav.inference.timing import rounds_in_turns, rounds_within
from sparsewav.models.checkpoint import first_line
from sparsewav.pruning.allocation.latency import TimeShape
from sparsewav.pruning.encoder import has_head, in_evaluation_mode, whatever_modes
from sparsewav.settings.sparsity import Structured
from sparsewav.training.precision import wrong_in_bfloat16

RATE = 16_000
"""Samples in a second, of all families that can be cut."""

SECONDS, LEAST, MOST = 20.0, 7, 60
"""Two models are timed about so many seconds, and in so many rounds at least and at most."""

EXPORTED_AS = {"onnx_int8": "onnx", "openvino_int8": "openvino"}
"""The runtimes that take an exported model, with their formats."""

_NAMES = {"bfloat16": BFLOAT16, "onnx_int8": "ONNX Runtime int8", "openvino_int8": "OpenVINO int8"}

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Speedup:
    """The times of a dense and a smaller model.

    Attributes:
        dense, smaller: Median seconds for every length of audio.
        ratio: How many times as fast the smaller model is, for one utterance of every length: the median over the
            rounds of the ratio within a round, which other work on the machine changes least.
        low, high: The quartiles of that ratio, which say how far it is to be trusted.
    """

    dense: tuple[float, ...]
    smaller: tuple[float, ...]
    ratio: float
    low: float
    high: float


def check_runtime(asked: Structured, model: PreTrainedModel | None = None) -> None:
    """Refuse a runtime that is not installed, that does not take a model, or that this machine computes wrongly in.

    Raises:
        UserError: It says so.
    """
    if asked.speedup is None:
        return
    if asked.runtime == "bfloat16" and model is not None and (wrong := wrong_in_bfloat16(model)):
        raise UserError(
            f"sparsity.runtime=bfloat16 gives something else than the model: this machine computes {wrong} wrongly in "
            "bfloat16; choose another runtime"
        )
    if asked.runtime not in EXPORTED_AS:
        return
    check_libraries(EXPORTED_AS[asked.runtime], int8=True)
    if model is not None and not has_head(model):
        raise UserError(
            f"sparsity.runtime={asked.runtime} runs exported CTC models, and {type(model).__name__} has no CTC head; "
            "choose sparsity.runtime=pytorch or bfloat16"
        )


def prepared(runtime: str, model: PreTrainedModel, folder: Path) -> Run:
    """Give what runs a model in a runtime.

    Args:
        runtime: One of :data:`~sparsewav.settings.sparsity.RUNTIMES`.
        model: The model in float32 on the CPU, in evaluation mode.
        folder: An empty folder, which an exported model is written to.

    Raises:
        UserError: The runtime does not run the model.
    """
    if runtime not in _NAMES:
        return partial(run_model, model)
    try:
        return ALTERNATIVES[_NAMES[runtime]](model, folder)
    except UserError:
        raise
    except Exception as error:  # runtimes raise almost any error
        raise UserError(
            f"sparsity.runtime={runtime} does not run a {type(model).__name__} ({first_line(error)}); choose another"
        ) from error


def audio_of_length(model: PreTrainedModel, seconds: float) -> Float[Tensor, "1 samples"]:
    """Make noise of so many seconds."""
    return noise_of([round(seconds * RATE)], model)[0]


@torch.inference_mode()
def time_beside(dense: Run, smaller: Run, audio: Sequence[Tensor]) -> Speedup:
    """Time two models in turns on all utterances."""
    contestants: list[Callable[[], Tensor]] = [partial(run, one) for one in audio for run in (dense, smaller)]
    rounds = rounds_within(SECONDS, contestants, LEAST, MOST)
    seconds = rounds_in_turns(rounds, contestants)
    before, after = seconds[::2], seconds[1::2]
    sums = [[sum(one) for one in zip(*times, strict=True)] for times in (before, after)]
    low, middle, high = statistics.quantiles([dense / smaller for dense, smaller in zip(*sums, strict=True)], n=4)
    medians = [tuple(map(statistics.median, times)) for times in (before, after)]
    return Speedup(medians[0], medians[1], middle, low, high)


def measure_speedup(dense: PreTrainedModel, smaller: PreTrainedModel, asked: Structured) -> Speedup:
    """Time a smaller model beside the dense one on the CPU, as was asked for; neither is changed.

    Raises:
        UserError: The runtime does not run one of them.
    """
    with tempfile.TemporaryDirectory(prefix="sparsewav-") as folder, whatever_modes(CPU):
        runs = []
        audio = [audio_of_length(dense, seconds) for seconds in asked.audio_seconds]
        for name, model in (("dense", dense), ("smaller", smaller)):
            place = Path(folder) / name
            place.mkdir()
            # A model that lies elsewhere or in another precision is timed by one of its shape.
            own = model if (model.device, model.dtype) == (CPU, torch.float32) else Shape.of(model).build()
            with in_evaluation_mode(own):
                runs.append(prepared(asked.runtime, own, place))
        with in_evaluation_mode(dense), in_evaluation_mode(smaller):
            return time_beside(runs[0], runs[1], audio)


@contextmanager
def shape_timer(
    dense: Shape, now: Shape, asked: Structured, tell: Callable[[Speedup], None] = lambda _: None
) -> Iterator[TimeShape]:
    """Give a function that times models of any numbers of parts beside the dense one, each once.

    Args:
        dense: The shape of the dense model.
        now: That of the model whose parts are counted; the dense one's, unless it was cut before.
        asked: The runtime and the lengths of audio.
        tell: Called with every time that was measured.
    """
    known: dict[tuple[tuple[str, int], ...], float] = {}
    with tempfile.TemporaryDirectory(prefix="sparsewav-") as folder:

        def run_of(model: PreTrainedModel) -> Run:
            return prepared(asked.runtime, model, Path(tempfile.mkdtemp(dir=folder)))

        whole, current = cache(lambda: run_of(dense.build())), cache(now.build)

        def time_shape(kept: Mapping[str, int]) -> float:
            key = tuple(sorted(kept.items()))
            if key not in known:
                with whatever_modes(CPU):
                    smaller = with_parts(current(), kept)
                    audio = [audio_of_length(smaller, seconds) for seconds in asked.audio_seconds]
                    found = time_beside(whole(), run_of(smaller), audio)
                known[key] = 1 / found.ratio
                tell(found)
            return known[key]

        yield time_shape
