"""Measurements of models: their time on a CPU, also in int8, and their bytes and WER when they are rounded."""

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import pandas
import safetensors.torch
import torch
from jaxtyping import Float
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

import sparsewav
from sparsewav.data.sets import Sets
from sparsewav.data.utterances import Utterance
from sparsewav.errors import UserError
from sparsewav.inference.exchange import CALIBRATED, check_libraries, int8_calibration, write_exchange
from sparsewav.inference.runtime import load_exported
from sparsewav.inference.timing import in_turns
from sparsewav.models.load import SpeechModel, choose_device
from sparsewav.pipeline.run_folder import count_parameters, device_name
from sparsewav.progress import quieten_libraries, stage
from sparsewav.pruning.encoding import file_bytes
from sparsewav.pruning.rest import round_tensor
from sparsewav.settings.quantization import Float16, Int8, NoQuantization, Quantization
from sparsewav.settings.run import Config, Model
from sparsewav.training.recipes import load_or_train

AUDIO = 10  # seconds
ROUNDS = 15
ROUNDINGS: dict[str, tuple[int, Quantization]] = {
    "float32": (32, NoQuantization()),
    "float16": (16, Float16()),
    "int8": (8, Int8(rest="int8")),
}
"""How numbers are stored: their bits, and how they are rounded."""


def measure_times(dense_model: Model, runs: list[Path]) -> pandas.DataFrame:
    """Time the models of runs, and the dense model that they come from.

    Each model and the dense one take turns on the CPU with ten seconds of noise. Models from which weights were removed
    are accelerated.

    Args:
        dense_model: The settings that the dense model is loaded by.
        runs: Folders of the runs.

    Returns:
        A row a model, the dense one first, with the columns run; bits of its numbers; milliseconds for a second of
        audio; milliseconds_dense, the dense model's in the same turns; faster, the ratio of the two; swapped, the
        number of matrices that multiply sparse; and audio_seconds, rounds, threads and machine of the measurement.

    Raises:
        UserError: A run has no model.
    """
    _require_models(runs)
    quieten_libraries()
    audio = _audio()
    dense = load_or_train(dense_model).model
    rows = []
    with stage(Console(), "Measuring speed") as progress:
        for done, run in enumerate(runs, start=1):
            rows.append({"run": str(run)} | _time(run / "model", dense, audio))
            progress(done, len(runs))
    table = pandas.DataFrame(rows)
    first = {
        "run": dense_model.source,
        "milliseconds": table["milliseconds_dense"].median(),
        "milliseconds_dense": table["milliseconds_dense"].median(),
        "faster": 1.0,
        "swapped": 0,
    }
    return pandas.concat([pandas.DataFrame([first]), table], ignore_index=True).assign(
        bits=32,
        audio_seconds=AUDIO,
        rounds=ROUNDS,
        threads=torch.get_num_threads(),
        machine=device_name(torch.device("cpu")),
    )


def _audio() -> Float[Tensor, "1 samples"]:
    return torch.randn(1, 16_000 * AUDIO, generator=torch.Generator().manual_seed(0))


def measure_int8(config: Config, runs: list[Path]) -> pandas.DataFrame:
    """Export the models of runs, and the dense model that they come from, as int8 for OpenVINO; time and evaluate them.

    Each takes turns with the dense model in PyTorch. The ranges are those of so many utterances of the
    calibration set as ``sparsewav-export`` takes.

    Args:
        config: The settings that the dense model is loaded by, and the sets of speech.
        runs: Folders of the runs.

    Returns:
        A row a model, the dense one first, with the columns run, bits, milliseconds, milliseconds_dense and faster as
        of :func:`measure_times`; wer.

    Raises:
        UserError: OpenVINO is not installed, or a run has no model.
    """
    check_libraries("openvino", int8=True)
    _require_models(runs)
    quieten_libraries()
    sets = Sets(config.data)
    sets.leave_calibration_unlabelled(["evaluation"])
    utterances = next(iter(sets.evaluation().values()))
    calibration = sets.calibration(CALIBRATED, 0, fewer=True)
    audio, dense = _audio(), load_or_train(config.model).model
    rows = []
    with stage(Console(), "Measuring int8") as progress, tempfile.TemporaryDirectory() as folder:
        for done, run in enumerate([None, *runs]):
            speech = load_or_train(config.model if run is None else Model(str(run / "model")))
            place = Path(folder) / str(done)
            place.mkdir()
            write_exchange(speech, place, "openvino", int8_calibration(speech, calibration))
            exported = load_exported(place)
            with torch.inference_mode():
                before, after = in_turns(ROUNDS, [partial(dense, audio), partial(exported.model, audio)])
            row = {"run": config.model.source if run is None else str(run), "bits": 8}
            row |= {"milliseconds": 1000 * after / AUDIO, "milliseconds_dense": 1000 * before / AUDIO}
            rows.append(row | {"faster": before / after, "wer": _wer(exported, utterances, config)})
            progress(done, len(runs))
    return pandas.DataFrame(rows)


def _wer(speech: SpeechModel, utterances: list[Utterance], config: Config) -> float:
    rates = sparsewav.evaluate(
        speech,
        utterances,
        seconds_per_batch=config.seconds_per_batch,
        case=config.data.case,
        remove_characters=config.data.remove_characters,
    )
    return rates.wer


def _require_models(runs: list[Path]) -> None:
    for run in runs:
        if not (run / "model").is_dir():
            raise UserError(f"{run} has no model; run it again with save_model=true force=true")


def _time(folder: Path, dense: PreTrainedModel, audio: Tensor) -> dict[str, Any]:
    """The columns of one model."""
    model: Any = sparsewav.load(folder, torch.float32)
    total, nonzero = count_parameters(model)
    pruned = nonzero < 0.9 * total  # weights were removed, where other methods make matrices smaller
    swapped = sparsewav.accelerate(model).swapped if pruned else 0
    with torch.inference_mode():
        before, after = in_turns(ROUNDS, [partial(dense, audio), partial(model, audio)])
    return {
        "milliseconds": 1000 * after / AUDIO,
        "milliseconds_dense": 1000 * before / AUDIO,
        "faster": before / after,
        "swapped": swapped,
    }


def measure_rounded(config: Config, runs: list[Path]) -> pandas.DataFrame:
    """Round the models of runs, and the dense model that they come from; count their bytes and transcribe anew.

    Args:
        config: The settings that the dense model is loaded by, and the evaluation set.
        runs: Folders of the runs.

    Returns:
        A row for every model and way of rounding, the dense one first, with the columns run; rounding: float32 (as it
        is; the dense model alone), float16, int8; bytes of the weights file in bitmask format, but of the dense model
        in float32 those of a plain checkpoint; bits of a weight of the transformer's matrices; wer.

    Raises:
        UserError: A run has no model.
    """
    _require_models(runs)
    quieten_libraries()
    device = choose_device(config.device)
    utterances = next(iter(Sets(config.data).evaluation().values()))
    rows = []
    with stage(Console(), "Measuring rounded models") as progress:
        for done, run in enumerate([None, *runs]):
            for rounding, (bits, quantization) in ROUNDINGS.items():
                if run is not None and rounding == "float32":  # Table 2 has it
                    continue
                speech = load_or_train(config.model if run is None else Model(str(run / "model")), device)
                speech.model = speech.model.float()
                round_numbers(speech.model, quantization)
                name = config.model.source if run is None else str(run)
                state = speech.model.state_dict()
                size = len(safetensors.torch.save(state)) if rounding == "float32" else file_bytes(state)
                row = {"run": name, "rounding": rounding, "bytes": size}
                rows.append(row | {"bits": bits, "wer": _wer(speech, utterances, config)})
            progress(done, len(runs))
    return pandas.DataFrame(rows)


@torch.no_grad()
def round_numbers(model: PreTrainedModel, quantization: Quantization) -> None:
    """Round all weights of a float32 model in place, whether matrices were cut or pruned, as the rest of ours is."""
    for name, parameter in model.named_parameters():
        parameter.copy_(round_tensor(name, parameter, quantization, prunable=False))
