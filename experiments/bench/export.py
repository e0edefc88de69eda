"""``python -m experiments.bench.export``: bytes on disk and seconds to load, dense and as bitmask.

The model is full-size wav2vec2-base with random weights, of which the smallest in the transformer are zero: in float32,
in float16, and rounded to the nearest in 8 and 4 bits, the rest in 8 bits. The size of the dense file after general
compressors is measured, too. Every load is that of a new process.
"""

import argparse
import copy
import shutil
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

import matplotlib as mpl
import pandas
import torch
from matplotlib.figure import Figure
from rich.console import Console
from transformers import PreTrainedModel

from experiments.bench.engine import OURS, random_base, summary
from experiments.plots import save
from sparsewav.cli.plots import COLORS, MARKERS, STYLE
from sparsewav.files import write_file
from sparsewav.models.bitmask import BITMASK_WEIGHTS, export
from sparsewav.models.checkpoint import WEIGHTS
from sparsewav.models.load import load
from sparsewav.pruning import prunable_matrices
from sparsewav.pruning.solvers.quantize import round_scales

SPARSITIES = (0.5, 0.7, 0.8, 0.9)
COMPRESSORS = {"gzip": ("gzip", "-6"), "zstd": ("zstd", "-3", "-q")}
ROUNDED = {"int8": 8, "int4": 4}
GROUP = 128
NUMBERS = ("float32", "float16", *ROUNDED)


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m experiments.bench.export", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="how often each file is loaded (default 5)")
    parser.add_argument("--sparsities", type=float, nargs="+", default=SPARSITIES, help="default: 0.5 0.7 0.8 0.9")
    parser.add_argument("--numbers", nargs="+", default=NUMBERS, choices=NUMBERS, help="default: all")
    parser.add_argument("--output", type=Path, default=Path("outputs/bench"), help="folder (default outputs/bench)")
    arguments = parser.parse_args()
    console = Console(width=140)
    sizes: list[dict[str, Any]] = []
    seconds: list[dict[str, Any]] = []
    for sparsity in arguments.sparsities:
        with TemporaryDirectory() as folder:
            measured, timed = measure(sparsity, arguments.numbers, Path(folder), arguments.rounds)
        sizes += measured
        seconds += timed
    table = pandas.DataFrame(sizes)
    dense = table[table["form"] == "dense"]["bytes"].max()  # that of float32, in which rounded models are written, too
    table["share"] = table["bytes"] / dense
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, frame in (("export_bytes", table), ("export_seconds", pandas.DataFrame(seconds))):
        with write_file(arguments.output / f"{name}.csv") as temporary:
            frame.to_csv(temporary, index=False)
    shown = table.pivot_table(index=["numbers", "form"], columns="sparsity", values="share")
    console.print("share of the dense float32 file's bytes", shown.round(3).to_string(), highlight=False)
    console.print(summary(pandas.DataFrame(seconds)).to_string(index=False), highlight=False)
    plot(arguments.output / "export", table)
    console.print(f"{arguments.output / 'export.png'}", highlight=False)
    return 0


def measure(
    sparsity: float, numbers: Sequence[str], folder: Path, rounds: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Write a model in every format, and load it in turns.

    Args:
        sparsity: Share of every matrix that is zero.
        numbers: The names of what the weights are rounded to.
        folder: Where the files go.
        rounds: How often each file is loaded.

    Returns:
        Rows with bytes, and rows with seconds.
    """
    model = random_base()
    with torch.no_grad():
        for matrix in prunable_matrices(model):
            size = matrix.weight.abs()
            matrix.weight[size <= size.flatten().kthvalue(round(sparsity * size.numel())).values] = 0
    sizes, seconds = [], []
    for name in numbers:
        dense, bitmask = folder / f"dense-{name}", folder / f"bitmask-{name}"
        _rounded(model, name).save_pretrained(dense)
        export(dense, bitmask)
        found = {"dense": _size(dense / WEIGHTS), "bitmask": _size(bitmask / BITMASK_WEIGHTS)}
        for compressor, command in COMPRESSORS.items():
            if shutil.which(compressor):
                found[compressor] = _compressed(command, dense / WEIGHTS)
        sizes += [{"sparsity": sparsity, "numbers": name, "form": form, "bytes": size} for form, size in found.items()]
        if name != "float16":
            forms = {OURS: bitmask, "dense": dense}
            for number in range(1, rounds + 1):
                for form, path in forms.items():
                    row = {"subject": f"load {name} at {sparsity:g}", "contestant": form, "round": number}
                    seconds.append(row | {"seconds": _in_own_process(path)})
        shutil.rmtree(dense)
    return sizes, seconds


@torch.no_grad()
def _rounded(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """Give a copy of a model with other numbers."""
    model = copy.deepcopy(model)
    if name == "float16":
        return model.half()
    if name in ROUNDED:
        prunable = {f"{matrix.name}.weight" for matrix in prunable_matrices(model)}
        for parameter, weight in model.named_parameters():
            if weight.dim() > 1 and len(weight) > 1:
                bits, group = (ROUNDED[name], GROUP) if parameter in prunable else (8, weight[0].numel())
                groups = weight.view(-1, group)
                largest = 2 ** (bits - 1) - 1
                scales = round_scales(groups.abs().amax(1, keepdim=True).clamp(min=1e-6) / largest)
                codes = (groups / scales).round().clamp(-largest, largest)
                weight.copy_((codes * scales + 0.0).view_as(weight))  # no −0
            else:
                weight.copy_(weight.half())
    return model


def _in_own_process(folder: Path) -> float:
    """Give the seconds of a load by a process that has loaded nothing yet, and whose memory is new."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(_load_and_touch, folder).result()


def _load_and_touch(folder: Path) -> float:
    started = time.perf_counter()
    # Mapped weights are read from the file when they are first used; the time includes that.
    for parameter in load(folder).parameters():
        parameter.sum()
    return time.perf_counter() - started


def _size(path: Path) -> int:
    return path.stat().st_size


def _compressed(command: tuple[str, ...], path: Path) -> int:
    with TemporaryFile() as file:
        subprocess.run([*command, "-c", str(path)], stdout=file, check=True)
        return file.tell()


def plot(path: Path, table: pandas.DataFrame) -> None:
    """Draw the bytes over the sparsity to ``<path>.png`` and ``<path>.pdf``."""
    with mpl.rc_context(STYLE):
        parts = [(str(numbers), part) for numbers, part in table.groupby("numbers", sort=False)]
        figure = Figure(figsize=(1 + 2.6 * len(parts), 3.2), layout="constrained")
        panels = figure.subplots(1, len(parts), sharey=True, squeeze=False)[0]
        for axes, (numbers, part) in zip(panels, parts, strict=True):
            for index, (form, curve) in enumerate(part.groupby("form", sort=False)):
                axes.plot(
                    100 * curve["sparsity"],
                    curve["bytes"] / 1e6,
                    color=COLORS[index],
                    marker=MARKERS[index],
                    label=form,
                )
            axes.set_title(numbers)
            axes.set_xlabel("Sparsity of matrices, %")
        figure.axes[0].set_ylim(bottom=0)  # after both are drawn: they share it
        figure.axes[0].set_ylabel("MB on disk")
        figure.axes[0].legend()
        save(figure, path)


if __name__ == "__main__":
    raise SystemExit(main())
