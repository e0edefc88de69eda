"""Measurements of the size of models on disk and of their time on a CPU."""

import copy
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import pandas
import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

import sparsewav
from sparsewav.errors import UserError
from sparsewav.inference.timing import in_turns
from sparsewav.pipeline.run_folder import count_parameters, device_name
from sparsewav.progress import quieten_libraries, stage
from sparsewav.pruning.coding import file_bytes
from sparsewav.settings.run import Model
from sparsewav.training.recipes import load_or_train

AUDIO = 10  # seconds
ROUNDS = 15


def measure_models(dense_model: Model, runs: list[Path]) -> pandas.DataFrame:
    """Measure the models of runs, and the dense model that they come from.

    Each model and the dense one take turns on the CPU with ten seconds of noise. Models from which weights were removed
    are accelerated.

    Args:
        dense_model: The settings that the dense model is loaded by.
        runs: Folders of the runs.

    Returns:
        A row a model, the dense one first, with the columns run; megabytes on disk in float16, in bitmask format where
        weights were removed, as they are where that takes fewer; milliseconds for a second of audio;
        milliseconds_dense, the dense model's in the same turns; faster, the ratio of the two; swapped, the number of
        matrices that multiply sparse; and audio_seconds, rounds, threads and machine of the measurement.

    Raises:
        UserError: A run has no model.
    """
    for run in runs:
        if not (run / "model").is_dir():
            raise UserError(f"{run} has no model; run it again with save_model=true force=true")
    quieten_libraries()
    audio = torch.randn(1, 16_000 * AUDIO, generator=torch.Generator().manual_seed(0))
    dense = load_or_train(dense_model).model
    rows = []
    with stage(Console(), "Measuring size and speed") as progress:
        for done, run in enumerate(runs, start=1):
            rows.append({"run": str(run)} | _measure(run / "model", dense, audio))
            progress(done, len(runs))
    table = pandas.DataFrame(rows)
    first = {
        "run": dense_model.source,
        "megabytes": _megabytes(dense, "dense"),
        "milliseconds": table["milliseconds_dense"].median(),
        "milliseconds_dense": table["milliseconds_dense"].median(),
        "faster": 1.0,
        "swapped": 0,
    }
    return pandas.concat([pandas.DataFrame([first]), table], ignore_index=True).assign(
        audio_seconds=AUDIO,
        rounds=ROUNDS,
        threads=torch.get_num_threads(),
        machine=device_name(torch.device("cpu")),
    )


def _measure(folder: Path, dense: PreTrainedModel, audio: Tensor) -> dict[str, Any]:
    """The columns of one model."""
    model: Any = sparsewav.load(folder, torch.float32)
    total, nonzero = count_parameters(model)
    pruned = nonzero < 0.9 * total  # weights were removed, where other methods make matrices smaller
    megabytes = _megabytes(model, "bitmask" if pruned else "dense")
    swapped = sparsewav.accelerate(model).swapped if pruned else 0
    with torch.inference_mode():
        before, after = in_turns(ROUNDS, [partial(dense, audio), partial(model, audio)])
    return {
        "megabytes": megabytes,
        "milliseconds": 1000 * after / AUDIO,
        "milliseconds_dense": 1000 * before / AUDIO,
        "faster": before / after,
        "swapped": swapped,
    }


def _megabytes(model: PreTrainedModel, format: str) -> float:
    """Size of a model's weights on disk in float16; in bitmask format, as they are if that is smaller."""
    half = copy.deepcopy(model).half()
    if format == "bitmask":
        return min(file_bytes(model.state_dict()), file_bytes(half.state_dict())) / 1e6
    with tempfile.TemporaryDirectory() as temporary:
        half.save_pretrained(temporary)
        return sum(path.stat().st_size for path in Path(temporary).glob("*.safetensors")) / 1e6
