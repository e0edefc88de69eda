"""``python -m experiments.bench.engine``: the cost of pruning, beside that of a plain implementation.

Every comparison alternates its contestants in one process, so that other load on the machine affects all of them alike;
what counts is the ratio of their medians.
"""

import argparse
import copy
import importlib.util
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib as mpl
import pandas
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from torch import Tensor, distributed
from transformers import PreTrainedModel, Wav2Vec2Config, Wav2Vec2ForCTC

import sparsewav
from experiments.bench.command import Part, benchmark_parser, run_parts
from experiments.bench.plain import Batch, forward, plain_hessians, plain_prune, plain_prune_matrix, plain_solve
from experiments.plots import save
from sparsewav import Calibration, Pruning
from sparsewav.cli.plots import COLORS, MARKERS, STYLE
from sparsewav.data.batches import SpeechBatches
from sparsewav.data.sets import Sets
from sparsewav.models.load import load_speech_model
from sparsewav.pruning import collect_hessians, prunable_matrices, prune_matrices, prune_model
from sparsewav.pruning.allocation.allocate import traces_of
from sparsewav.settings.data import DemoData

SPARSITY = 0.75
OURS, PLAIN, FLOOR = "SparseWAV", "plain loop", "one forward"
COMPRESSOR = "llm-compressor"

BASE_LAYER = {
    "q, k, v: 3 of 768x768": (3, 768, 768),
    "out: 768x768": (1, 768, 768),
    "fc1: 3072x768": (1, 3072, 768),
    "fc2: 768x3072": (1, 768, 3072),
}
"""Number, rows and columns of the matrices of a wav2vec2-base layer that read the same input."""

PAPER_UTTERANCES, PAPER_FRAMES = 2048, 1_300_000
"""Calibration set of the paper (its section 3.1), at train-clean-100's mean of 12.7 s an utterance, 50 frames each."""


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parts = {
        "solver": Part(bench_solver, show_summary),
        "calibration": Part(bench_calibration, show_summary),
        "pipeline": Part(bench_pipeline, show_summary),
        "scaling": Part(bench_scaling, show_scaling),
    }
    description = "Time the engine beside a plain implementation on the CPU."
    parser = benchmark_parser("engine", description, parts, "solver --rounds 7")
    parser.add_argument("--utterances", type=int, default=16, help="size of the calibration set (default 16)")
    return run_parts(parts, parser.parse_args(words))


def show_summary(table: pandas.DataFrame, path: Path) -> str:
    """The table of :func:`summary` as text."""
    return summary(table).to_string(index=False)


def show_scaling(table: pandas.DataFrame, path: Path) -> str:
    """Draw the plots and give the summary."""
    plot_scaling(path.with_suffix(""), table)
    return show_summary(table, path)


def summary(table: pandas.DataFrame) -> pandas.DataFrame:
    """Median and range of the seconds of each contestant at each subject, and how many times ours fit in them."""
    rows = []
    for subject, group in table.groupby("subject", sort=False):
        seconds = {name: part["seconds"] for name, part in group.groupby("contestant", sort=False)}
        for name, values in seconds.items():
            row = {"subject": subject, "contestant": name, "seconds, median": f"{values.median():.4g}"}
            row["range"] = f"{values.min():.4g} to {values.max():.4g}"
            row["ours x"] = f"{values.median() / seconds[OURS].median():.2f}" if OURS in seconds else "–"
            for extra in ("relative_error", "same_mask"):
                if extra in group:
                    row[extra] = f"{group[group['contestant'] == name][extra].mean():.5f}"
            rows.append(row)
    return pandas.DataFrame(rows)


def alternate(
    rounds: int, subject: str, contestants: dict[str, Callable[[], Any]], *, warm_up: bool = True
) -> list[dict[str, Any]]:
    """Time contestants in turns, after a warm-up round that does not count; a GPU is synchronised."""
    rows = []
    for number in range(0 if warm_up else 1, rounds + 1):
        for name, contestant in contestants.items():
            started = time.perf_counter()
            contestant()
            seconds = finished() - started
            if number:
                rows.append({"subject": subject, "contestant": name, "round": number, "seconds": seconds})
    return rows


def finished() -> float:
    """The time once the GPU, if any, has finished its work."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def bench_solver(arguments: argparse.Namespace) -> pandas.DataFrame:
    """A layer of wav2vec2-base: ours, the plain loop, and llm-compressor's sparsify_weight if it is installed.

    The factorisation is included; errors and masks are compared with those of the plain loop.
    """
    rows: list[dict[str, Any]] = []
    for subject, (count, height, cols) in BASE_LAYER.items():
        weights, hessian = random_problem(count, height, cols)
        contestants: dict[str, Callable[[], list[Tensor]]] = {
            OURS: partial(_ours, weights, hessian),
            PLAIN: partial(_plain, weights, hessian),
        }
        if importlib.util.find_spec("llmcompressor"):
            contestants[COMPRESSOR] = partial(_compressor, weights, hessian)
        timed = alternate(arguments.rounds, subject, contestants)
        reference = contestants[PLAIN]()
        for name, contestant in contestants.items():
            results = contestant()
            quality = {
                "relative_error": _relative_error(weights, results, hessian),
                "same_mask": _same_mask(results, reference),
            }
            rows += [row | quality for row in timed if row["contestant"] == name]
    table = pandas.DataFrame(rows)
    layer = table.groupby(["contestant", "round"], sort=False, as_index=False)["seconds"].sum()
    return pandas.concat([table, layer.assign(subject="the layer")], ignore_index=True)


def random_problem(count: int, rows: int, cols: int, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """Random weights and the XXᵀ of correlated inputs, whose spectrum falls as that of activations does."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(cols, cols, generator=generator) / cols**0.5 * torch.logspace(0, -1.5, cols)
    inputs = (mixing + 0.1 * torch.eye(cols)) @ torch.randn(cols, 4 * cols, generator=generator)
    weights = [torch.randn(rows, cols, generator=generator) / cols**0.5 for _ in range(count)]
    return weights, inputs @ inputs.T


def _ours(weights: list[Tensor], hessian: Tensor) -> list[Tensor]:
    return [pruned.weight for pruned in prune_matrices(weights, hessian, [SPARSITY] * len(weights), saliency="obs")]


def _plain(weights: list[Tensor], hessian: Tensor) -> list[Tensor]:
    return [plain_prune_matrix(weight, hessian, SPARSITY) for weight in weights]


def _compressor(weights: list[Tensor], hessian: Tensor) -> list[Tensor]:
    from llmcompressor.modifiers.pruning.sparsegpt.sgpt_sparsify import sparsify_weight

    results = []
    for weight in weights:
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight.data = weight.clone()
        results.append(sparsify_weight(linear, {linear: hessian.clone()}, SPARSITY, 0, 0, 128, 0.01, False)[1])
    return results


def _relative_error(weights: list[Tensor], results: list[Tensor], hessian: Tensor) -> float:
    dense = torch.cat(weights)
    change = torch.cat(results) - dense
    return float(((change @ hessian) * change).sum() / ((dense @ hessian) * dense).sum())


def _same_mask(results: list[Tensor], reference: list[Tensor]) -> float:
    return float(((torch.cat(results) == 0) == (torch.cat(reference) == 0)).float().mean())


def bench_calibration(arguments: argparse.Namespace) -> pandas.DataFrame:
    """Hessians of full-size wav2vec2-base (random weights) for 1000 frames, and the forward pass alone."""
    model = random_base()
    batches = speech(arguments.utterances)
    frames = collect_hessians(model, batches).frames
    contestants: dict[str, Callable[[], Any]] = {
        OURS: lambda: collect_hessians(model, batches, frames_per_column=_scaled_sample(frames)),
        "SparseWAV, all frames": lambda: collect_hessians(model, batches),
        "plain, XXᵀ for each matrix": lambda: plain_hessians(model, batches),
        FLOOR: lambda: forward(model, batches),
    }
    table = pandas.DataFrame(alternate(arguments.rounds, f"1000 frames ({frames:,} measured)", contestants))
    table["seconds"] *= 1000 / frames
    return table


def bench_pipeline(arguments: argparse.Namespace) -> pandas.DataFrame:
    """Calibrate, allocate and solve full-size wav2vec2-base: the paper's set-up, all its counts scaled down alike."""
    dense = random_base()
    batches = speech(arguments.utterances)
    frames = collect_hessians(dense, batches).frames
    probed = batches[: max(round(len(batches) * 128 / PAPER_UTTERANCES), 1)]

    solve_seconds: list[float] = []

    def ours() -> None:
        model = copy.deepcopy(dense)
        settings = Pruning(calibration=Calibration(frames_per_column=_scaled_sample(frames)))
        report = prune_model(model, batches, settings, traces=traces_of(model, probed, settings))
        solve_seconds.append(report.seconds["solve"])

    contestants: dict[str, Callable[[], Any]] = {
        OURS: ours,
        "plain": lambda: plain_prune(copy.deepcopy(dense), batches, probed, SPARSITY),
        FLOOR: lambda: forward(dense, batches),
    }
    rows = alternate(arguments.rounds, f"wav2vec2-base, {frames:,} frames", contestants)
    whole, floor = ([row["seconds"] for row in rows if row["contestant"] == name] for name in (OURS, FLOOR))
    for number, solve in enumerate(solve_seconds[1:]):  # the first round does not count
        row = {"contestant": OURS, "round": number + 1}
        rows.append(row | {"subject": "of it the solve", "seconds": solve})
        rest = (whole[number] - solve) / floor[number]
        rows.append(row | {"subject": "the rest, in forwards of the same round", "seconds": rest})
    return pandas.DataFrame(rows)


def bench_scaling(arguments: argparse.Namespace) -> pandas.DataFrame:
    """Time over the width of a matrix, calibration frames, layers and processes, one at a time."""
    rows: list[dict[str, Any]] = []
    pair: dict[str, Callable[[], Any]]
    for cols in (256, 512, 1024, 2048, 4096):
        weights, hessian = random_problem(1, 1024, cols)
        pair = {OURS: partial(_ours, weights, hessian), PLAIN: partial(_plain, weights, hessian)}
        rows += _at("columns of a matrix of 1024 rows", cols, alternate(arguments.rounds, f"{cols} columns", pair))
    model = random_base(layers=2)
    for count in (2, 4, 8, 16):
        batches = speech(count)
        frames = collect_hessians(model, batches).frames
        pair = {
            OURS: partial(collect_hessians, model, batches),
            PLAIN: partial(plain_hessians, model, batches),
            FLOOR: partial(forward, model, batches),
        }
        rows += _at("calibration frames, 2 layers", frames, alternate(arguments.rounds, f"{frames} frames", pair))
    batches = speech(2)
    for layers in (1, 2, 4, 8):
        model = random_base(layers=layers)
        pair = {
            OURS: partial(_pruned_uniformly, model, batches),
            PLAIN: partial(_pruned_uniformly_by_the_plain_loop, model, batches),
        }
        rows += _at("layers, pruned on 2 utterances", layers, alternate(arguments.rounds, f"{layers} layers", pair))
    for number in range(
        arguments.rounds
    ):  # every measurement starts new processes, so that the numbers of processes take turns
        for count in (1, 2):
            row = {"subject": f"{count} processes", "contestant": OURS, "round": number + 1}
            rows += _at("processes of one thread, 4 layers", count, [row | {"seconds": _seconds_together(count)}])
    return pandas.DataFrame(rows)


def _seconds_together(count: int) -> float:
    """Seconds that ``count`` processes of one thread take to prune a model together, after a warm-up."""
    with TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_prune_together, (count, Path(folder)), nprocs=count)
        return float((Path(folder) / "seconds").read_text())


def _prune_together(rank: int, count: int, folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=count)
    model, batches = random_base(layers=4), speech(4)
    for _ in range(2):
        distributed.barrier()
        started = time.perf_counter()
        _pruned_uniformly(model, batches)
        seconds = time.perf_counter() - started
    if rank == 0:
        (folder / "seconds").write_text(str(seconds))
    distributed.destroy_process_group()


def _pruned_uniformly(dense: PreTrainedModel, batches: list[Batch]) -> None:
    sparsewav.prune(copy.deepcopy(dense), batches, SPARSITY, allocation="uniform")


def _pruned_uniformly_by_the_plain_loop(dense: PreTrainedModel, batches: list[Batch]) -> None:
    model = copy.deepcopy(dense)
    targets = {matrix.name: SPARSITY for matrix in prunable_matrices(model)}
    plain_solve(model, plain_hessians(model, batches), targets)


def _at(axis: str, size: int, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row | {"axis": axis, "size": size} for row in rows]


def plot_scaling(path: Path, table: pandas.DataFrame) -> None:
    """Draw the median seconds over each size to ``<path>.png`` and ``<path>.pdf``."""
    axes_names = list(dict.fromkeys(table["axis"]))
    names = list(dict.fromkeys(table["contestant"]))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.1 * len(axes_names), 3.2), layout="constrained")
        for axes, axis in zip(figure.subplots(1, len(axes_names)), axes_names, strict=True):
            for index, name in enumerate(names):
                part = table[(table["axis"] == axis) & (table["contestant"] == name)]
                if len(part):
                    seconds = part.groupby("size")["seconds"].median()
                    axes.plot(seconds.index, seconds, color=COLORS[index], marker=MARKERS[index], label=name)
            axes.set_xlabel(axis.capitalize())
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(sorted(set(table[table["axis"] == axis]["size"])))
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
            axes.minorticks_off()
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        figure.axes[0].set_ylabel("Seconds, median")
        handles = {str(line.get_label()): line for axes in figure.axes for line in axes.get_lines()}
        figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=len(handles))
        save(figure, path)


def random_base(layers: int = 12) -> PreTrainedModel:
    """wav2vec2-base at full width with random weights, on which the costs do not depend."""
    torch.manual_seed(0)
    config = Wav2Vec2Config(num_hidden_layers=layers, ctc_loss_reduction="mean")
    return Wav2Vec2ForCTC(config).eval()


def speech(utterances: int) -> list[Batch]:
    """Batches of the demo's speech, one utterance each, as wav2vec2-base takes them."""
    processor = load_speech_model("demo").processor
    return list(SpeechBatches(Sets(DemoData()).calibration(utterances, 0), processor, 1.0, padding=False))


def _scaled_sample(frames: int) -> float:
    """Frames per column that take the same share of these frames as the default takes of the paper's set."""
    return 64 * frames / PAPER_FRAMES


if __name__ == "__main__":
    raise SystemExit(main())
