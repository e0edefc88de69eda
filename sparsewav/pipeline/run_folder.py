"""What a run leaves in its folder, and how it is read again."""

import json
import platform
import resource
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas
import torch
from transformers import PreTrainedModel

from sparsewav.data.utterances import Utterance
from sparsewav.errors import UserError
from sparsewav.files import write_file, write_folder
from sparsewav.models.bitmask import check_export, export
from sparsewav.models.checkpoint import not_finite
from sparsewav.models.load import SpeechModel, require_speech_model
from sparsewav.models.processor import Processor
from sparsewav.pruning import MatrixReport
from sparsewav.pruning.structured import StructureReport

METRICS = "metrics.json"
LAYERS = "layers.csv"
PREDICTIONS = "predictions.jsonl"
MODEL = "model"
ERROR = "error.json"
TRAINING_LOG = "training_log.csv"
RECOVERY_LOG = "recovery_log.csv"
COMPRESSION_LOG = "compression_log.csv"
"""The trainer's log of a baseline's compression, before the fine-tuning."""
LEFT_OUT = "left_out.csv"
"""The utterances that ``data.skip_broken`` left out."""
STAGES = "stages"
"""Models of the steps before the last one and the trainer's checkpoints; deleted when the run is done."""
INPUTS = "inputs.json"
"""Lies beside them and says what the run is made from."""
STEP = "step.json"
"""Lies beside the model of every step until the run is done: a killed run goes on from the newest one."""


RATES = tuple(f"{rate}{model}" for rate in ("wer", "cer") for model in ("_dense", "_pruned", ""))
"""The error rates of a run: of the dense model, of the pruned one before fine-tuning, and of the final one."""


SPEED = ("asked_speedup", "achieved_speedup", "latency")
"""How many times as fast as the dense model the final one was to be and is, and what was timed and how."""


def export_folder(folder: Path, format: str, dtype: str) -> Path | None:
    """Give the folder of a run's model in another format than that of ``model/``; None for that format."""
    parts = [part for part, plain in ((format, "dense"), (dtype, "model")) if part != plain]
    return folder / "-".join([MODEL, *parts]) if parts else None


def model_folders(folder: Path) -> list[Path]:
    """List the folders that a run may write its model to, in every format."""
    formats = ((format, dtype) for format in ("dense", "bitmask") for dtype in ("model", "float16"))
    return [export_folder(folder, *names) or folder / MODEL for names in formats]


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write a record, whole or not at all."""
    with write_file(path) as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def read_metrics(folder: Path) -> dict[str, Any]:
    """Read the metrics of a finished run.

    Raises:
        UserError: The file is damaged, or holds something else.
    """
    path = folder / METRICS
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); do the run again") from error
    targets = ("target_sparsity", "target_megabytes", "target_parameters", "target_macs", "achieved_share")
    numbers = (*targets, "asked_speedup", "achieved_speedup", "achieved_sparsity", *RATES, "updates", "seed")
    if (
        not isinstance(metrics, dict)
        or not isinstance(metrics.get("seconds"), dict)
        or not all(isinstance(metrics.get(key), int | float | None) for key in numbers)
    ):
        raise UserError(f"{path} does not hold the metrics of a run; do the run again")
    return metrics


def write_layers(path: Path, reports: Sequence[MatrixReport] | Sequence[StructureReport]) -> None:
    """Write a row for every matrix, or for every attention and feed-forward network."""
    write_table(path, [asdict(report) for report in reports])


def rewrite_sparsities(path: Path, sparsities: Mapping[str, float]) -> None:
    """Write the sparsities that matrices have now into a table of :func:`write_layers`; the rest of it stays.

    Args:
        path: The table.
        sparsities: Those of its matrices by name.
    """
    rows = pandas.read_csv(path, float_precision="round_trip")
    rows["sparsity"] = [sparsities[name] for name in rows["name"]]
    with write_file(path) as temporary:
        rows.to_csv(temporary, index=False)


def write_table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write dictionaries as the rows of a CSV file."""
    with write_file(path) as temporary:
        pandas.DataFrame(list(rows)).to_csv(temporary, index=False)


def write_predictions(
    path: Path,
    evaluation: Mapping[str, Sequence[Utterance]],
    before: Mapping[str, Sequence[str]],
    after: Mapping[str, Sequence[str]],
) -> None:
    """Write reference and hypotheses of every utterance of every set, a JSON object a line."""
    rows = [
        {"set": name, "id": item.id}
        | ({} if item.speaker is None else {"speaker": item.speaker})
        | {"reference": item.text, "before": dense, "after": pruned}
        for name, utterances in evaluation.items()
        for item, dense, pruned in zip(utterances, before[name], after[name], strict=True)
    ]
    with write_file(path) as temporary:
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_divergences(
    path: Path, evaluation: Mapping[str, Sequence[Utterance]], divergences: Mapping[str, Sequence[float]]
) -> None:
    """Write how far an encoder is from the dense one on every utterance of every set, a JSON object a line."""
    rows = [
        {"set": name, "id": item.id, "divergence": divergence}
        for name, utterances in evaluation.items()
        for item, divergence in zip(utterances, divergences[name], strict=True)
    ]
    with write_file(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@contextmanager
def write_model(path: Path, model: PreTrainedModel, processor: Processor) -> Iterator[Path]:
    """Write a model that ``from_pretrained`` of its class loads, and its processor.

    Yields:
        A temporary folder; what the block puts there appears together with the model.

    Raises:
        UserError: A tensor of the model has numbers that are not finite.
    """
    if broken := not_finite(model.state_dict()):
        raise UserError(
            f"{path} was not written: {broken} has numbers that are not finite; look for them in the model that it was "
            "made from, and use float32"
        )
    with write_folder(path) as temporary:
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        yield temporary


def save(speech: SpeechModel, folder: str | Path, *, format: str = "dense", dtype: str = "model") -> Path:
    """Write a model with its processor into a new folder, which appears whole or not at all.

    Args:
        speech: What :func:`sparsewav.load_model` gave, pruned or not.
        folder: The folder; it must not exist.
        format: ``dense``, which ``AutoModelForCTC.from_pretrained`` loads, or ``bitmask``: a bit for every weight and
            the values that are not zero, which :func:`sparsewav.load_model` and :func:`sparsewav.load` read.
        dtype: ``model`` keeps every number, and ``float16`` rounds them.

    Returns:
        The folder.

    Raises:
        UserError: The folder exists or cannot be written, or the model has numbers that are not finite or too large.
    """
    require_speech_model(speech)
    folder = Path(folder).expanduser()
    check_export(folder, format, dtype)
    total, nonzero = count_parameters(speech.model)
    card = f"""---
library_name: transformers
tags: [sparsewav, speech]
---
# {speech.name}

Written by SparseWAV. {nonzero:,} of {total:,} parameters are not zero.
"""
    plain = (format, dtype) == ("dense", "model")
    with TemporaryDirectory(prefix="sparsewav-") as temporary:
        dense = folder if plain else Path(temporary) / MODEL
        with write_model(dense, speech.model, speech.processor) as written:
            (written / "README.md").write_text(card, encoding="utf-8")
        return folder if plain else export(dense, folder, format, dtype)


def environment(device: torch.device) -> dict[str, Any]:
    """Give hardware and versions that a run's figures were measured with."""
    packages = ("sparsewav", "torch", "transformers", "datasets", "jiwer", "numpy")
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "git_commit": git_commit(),
    }


def device_name(device: torch.device) -> str:
    """Give the device in words, e.g. ``cuda (NVIDIA GeForce RTX 4090)``."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"{device.type} ({platform.machine()}, {platform.system()})"


def git_commit() -> str | None:
    """Give the commit of this checkout, with ``-dirty`` if it was changed since; None outside of a checkout."""
    folder = Path(__file__).parents[1]
    try:
        top = subprocess.run(
            ["git", "rev-parse", "--show-toplevel", "HEAD"], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.split("\n")
        if Path(top[0]) != folder.parent:
            return None  # installed inside somebody else's repository
        changes = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return top[1] + ("-dirty" if changes.strip() else "")


def peak_memory(device: torch.device) -> int:
    """Give the most memory in bytes that this process has held: the GPU's on a GPU, the resident set elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):  # Linux; ru_maxrss counts the process there that started this one, too
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes everywhere but on macOS


def count_parameters(model: PreTrainedModel) -> tuple[int, int]:
    """Give the number of parameters, and of those that are not zero."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(int(p.count_nonzero()) for p in parameters)
