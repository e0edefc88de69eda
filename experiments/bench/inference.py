"""``python -m experiments.bench.inference``: the time and memory that a pruned model's zeros save on the CPU.

The models have the published shapes and random weights, removed at random: neither changes what a product costs. Dense
and accelerated models, and other ways to run the dense one, take turns in one process; memory is that of fresh
processes.
"""

import argparse
import copy
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas
import torch
from matplotlib.figure import Figure
from torch import Tensor
from transformers import PreTrainedModel, Wav2Vec2Config, Wav2Vec2ForCTC

import sparsewav
from experiments.bench.command import MACHINE, Part, benchmark_parser, run_parts
from experiments.bench.engine import OURS, alternate, finished, show_summary
from experiments.plots import save
from sparsewav.cli.plots import COLORS, MARKERS, STYLE
from sparsewav.errors import UserError
from sparsewav.files import write_file
from sparsewav.inference.alternatives import ALTERNATIVES, TRIAL, Alternative, alternative, audio_of, run_model
from sparsewav.inference.kernel import sparse_kernel
from sparsewav.inference.shapes import with_parts
from sparsewav.inference.sparse_modules import SparseConv1d, SparseLinear
from sparsewav.inference.timing import WIDTHS
from sparsewav.pruning.encoder import encoder_layers, prunable_matrices
from sparsewav.pruning.structure import FrontEnd, Structure, front_end, structures
from sparsewav.settings.pruning import ENCODER, SCOPES, TRANSFORMER

DENSE = "dense"

MODELS: dict[str, dict[str, Any]] = {
    "base": {},
    "large": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "feat_extract_norm": "layer",
        "do_stable_layer_norm": True,
        "conv_bias": True,
    },
}
"""wav2vec2-base and wav2vec2-large as published."""

SHAPES = ((768, 768), (3072, 768), (768, 3072), (1024, 1024), (4096, 1024), (1024, 4096))
SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
KEPT = (0.5, 0.25)
CUT_RUN_BY = ("PyTorch bfloat16", "ONNX Runtime int8", "OpenVINO int8")
"""The alternatives that models with fewer parts are run by, besides PyTorch in float32."""
CONVOLUTIONS = ((3, 15_999), (3, 7_999), (3, 3_999), (3, 1_999), (2, 999), (2, 499))
"""Kernel and length of the input of the convolutions behind the first for 5 s of audio: 512 channels, stride 2."""

CASES = ("1x5", "1x20", "8x5", "8x20")
KEYS = ("subject", "contestant", "threads")


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parts = {
        "products": Part(bench_products, show_summary),
        "convolutions": Part(bench_convolutions, show_summary),
        "inference": Part(bench_inference, show_speedups),
        "alternatives": Part(bench_alternatives, show_alternatives),
        "memory": Part(bench_memory, show_memory),
    }
    description = (
        "Time pruned models on the CPU, dense and accelerated. A part adds its rows to its CSV file and replaces those "
        "of the same subject: a long sweep can be run in pieces."
    )
    example = "inference --models base --threads 1 --cases 1x5 1x20 --rounds 5"
    parser = benchmark_parser("inference", description, parts, example)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS), help="default both")
    parser.add_argument("--sparsities", nargs="+", type=float, default=list(SPARSITIES), help="default 0.5 to 0.95")
    parser.add_argument(
        "--kept",
        nargs="*",
        type=float,
        default=list(KEPT),
        help="of alternatives and memory: shares of heads, units and channels (default 0.5 0.25)",
    )
    parser.add_argument(
        "--scope",
        default=TRANSFORMER,
        choices=SCOPES,
        help="of inference: the matrices with zeros (default %(default)s)",
    )
    parser.add_argument("--cases", nargs="+", default=list(CASES), help=f"batch x seconds (default {' '.join(CASES)})")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="default 1 2")
    parser.add_argument("--frames", nargs="+", type=int, default=[250, 1000], help="of products (default 250 1000)")
    parser.add_argument("--layers", type=int, help="of the models, for a quick look (default as published)")
    parser.add_argument("--no-warm-up", action="store_true", help="count the first round: for long cases")
    return run_parts(parts, parser.parse_args(words), keys=KEYS)


def show_speedups(table: pandas.DataFrame, path: Path) -> str:
    """Write the speedups as Markdown and as a plot, and give them as text."""
    overview = speedups(table)
    with write_file(path.with_suffix(".md")) as temporary:
        temporary.write_text(markdown(overview), encoding="utf-8")
    plot_speedups(path.with_suffix(""), overview)
    return overview.to_string(index=False)


def show_memory(table: pandas.DataFrame, path: Path) -> str:
    """The figures without the machine."""
    return table.drop(columns=list(MACHINE)).to_string(index=False)


@torch.inference_mode()
def bench_products(arguments: argparse.Namespace) -> pandas.DataFrame:
    """Each shape of matrix: dense, our kernel in each layout, PyTorch's CSR and BSR products."""
    sparse_kernel()  # compiled before anything is timed
    rows: list[dict[str, Any]] = []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for height, cols in SHAPES:
            for frames in arguments.frames:
                inputs = torch.randn(frames, cols)
                for sparsity in arguments.sparsities:
                    linear = torch.nn.Linear(cols, height)
                    remove_at_random(linear.weight, sparsity)
                    contestants: dict[str, Callable[[], Any]] = {DENSE: partial(linear, inputs)}
                    for width in WIDTHS:
                        contestants[f"kernel, {width} columns"] = partial(SparseLinear(linear, width), inputs)
                    contestants["CSR"] = partial(SparseLinear(linear, None), inputs)
                    blocks = linear.weight.detach().to_sparse_bsr((16, 16))  # few blocks of random zeros are empty
                    contestants["BSR 16x16"] = partial(torch.nn.functional.linear, inputs, blocks, linear.bias)
                    subject = f"{height}x{cols}, {sparsity:.0%} zero, {frames} frames, {threads} threads"
                    found = {"threads": threads, "rows": height, "cols": cols, "sparsity": sparsity, "frames": frames}
                    rows += [row | found for row in alternate(arguments.rounds, subject, contestants)]
    return pandas.DataFrame(rows)


@torch.inference_mode()
def bench_convolutions(arguments: argparse.Namespace) -> pandas.DataFrame:
    """Each convolution of the front end: dense, and our kernel in each layout; 5 s of audio, as base has its input."""
    sparse_kernel()  # compiled before anything is timed
    rows: list[dict[str, Any]] = []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for kernel, length in CONVOLUTIONS:
            inputs = torch.randn(1, 512, length)
            for sparsity in arguments.sparsities:
                convolution = torch.nn.Conv1d(512, 512, kernel, 2, bias=False)
                remove_at_random(convolution.weight, sparsity)
                contestants: dict[str, Callable[[], Any]] = {DENSE: partial(convolution, inputs)}
                for width in WIDTHS:
                    contestants[f"kernel, {width} columns"] = partial(SparseConv1d(convolution, width), inputs)
                subject = f"kernel {kernel}, length {length}, {sparsity:.0%} zero, {threads} threads"
                found = {"threads": threads, "kernel": kernel, "length": length, "sparsity": sparsity}
                rows += [row | found for row in alternate(arguments.rounds, subject, contestants)]
    return pandas.DataFrame(rows)


@torch.inference_mode()
def bench_inference(arguments: argparse.Namespace) -> pandas.DataFrame:
    """Whole models, dense and accelerated: seconds for a second of audio, also of the transformer layers alone."""
    rows: list[dict[str, Any]] = []
    for name in arguments.models:
        dense, shown = random_model(name, arguments.layers), with_layers(name, arguments.layers)
        shown += ", front end pruned, too" if arguments.scope == ENCODER else ""
        for sparsity in sorted(arguments.sparsities):
            for matrix in prunable_matrices(dense, arguments.scope):
                remove_at_random(matrix.weight, sparsity)  # the same random numbers: what is removed stays removed
            for threads in arguments.threads:
                torch.set_num_threads(threads)
                accelerated = copy.deepcopy(dense)
                report = sparsewav.accelerate(accelerated)
                for case in arguments.cases:
                    batch, seconds = map(int, case.split("x"))
                    audio = torch.randn(batch, 16_000 * seconds, generator=torch.Generator().manual_seed(0))
                    subject = f"{shown}, {sparsity:.0%} zero, {batch} x {seconds} s, {threads} threads"
                    found = {"model": shown, "sparsity": sparsity, "batch": batch, "audio": seconds, "threads": threads}
                    found |= {"swapped": report.swapped, "matrices": len(report.matrices)}
                    timed = alternate_models(arguments, subject, {DENSE: dense, OURS: accelerated}, audio)
                    rows += [row | found for row in timed]
                    print(".", end="", flush=True)
    print()
    return pandas.DataFrame(rows)


def bench_alternatives(arguments: argparse.Namespace) -> pandas.DataFrame:
    """Whole models: dense, pruned, in lower precision, and in other runtimes; seconds for a second of audio.

    The column difference says how far the outputs are from those of the model with the same weights in float32 in
    PyTorch, relative to the largest one. What is not installed or does not suit the processor is left out.
    """
    rows: list[dict[str, Any]] = []
    for name in arguments.models:
        dense, shown = random_model(name, arguments.layers), with_layers(name, arguments.layers)
        with tempfile.TemporaryDirectory() as folder:
            for threads in arguments.threads:
                torch.set_num_threads(threads)
                contestants = {DENSE: Alternative(partial(run_model, dense), 0.0)}
                contestants |= ours_at(dense, sorted(arguments.sparsities))
                contestants |= prepared(dense, Path(folder) / DENSE, ALTERNATIVES)
                for share in arguments.kept:
                    contestants |= cut_to(dense, share, Path(folder) / f"{share:g}")
                for case in arguments.cases:
                    batch, seconds = map(int, case.split("x"))
                    audio = torch.randn(batch, 16_000 * seconds, generator=torch.Generator().manual_seed(0))
                    subject = f"{shown}, {batch} x {seconds} s, {threads} threads"
                    found = {"model": shown, "batch": batch, "audio": seconds, "threads": threads}
                    runs: dict[str, Callable[[], Any]] = {
                        name: partial(contestant.run, audio) for name, contestant in contestants.items()
                    }
                    with torch.inference_mode():
                        timed = alternate(arguments.rounds, subject, runs, warm_up=not arguments.no_warm_up)
                    for row in timed:
                        row["seconds"] /= audio.numel() / 16_000
                        rows.append(row | found | {"difference": contestants[row["contestant"]].difference})
                    print(".", end="", flush=True)
    print()
    return pandas.DataFrame(rows)


def ours_at(dense: PreTrainedModel, sparsities: Sequence[float]) -> dict[str, Alternative]:
    """Accelerated models with these shares of zeros, compared with themselves before they were accelerated."""
    found = {}
    for sparsity in sparsities:
        model = copy.deepcopy(dense)
        for matrix in prunable_matrices(model):
            remove_at_random(matrix.weight, sparsity)
        audio = audio_of(model, TRIAL)
        with torch.inference_mode():
            expected = run_model(model, audio)
        swapped = sparsewav.accelerate(model, alternatives=()).swapped
        with torch.inference_mode():
            difference = (run_model(model, audio) - expected).abs().max() / expected.abs().max()
        name = f"{OURS}, {sparsity:.0%} zero" + ("" if swapped else ", left dense")
        found[name] = Alternative(partial(run_model, model), float(difference))
    return found


def prepared(model: PreTrainedModel, folder: Path, names: Iterable[str]) -> dict[str, Alternative]:
    """The alternatives of a model in PyTorch, with a printed sentence on each that is left out."""
    found = {}
    for name in names:
        try:
            found[name] = alternative(name, model, folder)
        except UserError as error:
            print(f"{name} is left out: {error}")
    return found


def cut_to(dense: PreTrainedModel, share: float, folder: Path) -> dict[str, Alternative]:
    """A model with this share of the heads, units and channels, in PyTorch and by other runtimes."""
    model = random_cut(dense, share)
    found = {"": Alternative(partial(run_model, model), 0.0)} | prepared(model, folder, CUT_RUN_BY)
    return {", ".join(filter(None, [f"{OURS} structured, {share:.0%} kept", by])): own for by, own in found.items()}


def random_cut(dense: PreTrainedModel, share: float) -> PreTrainedModel:
    """A model with random weights that has this share of the heads, units and channels of another."""
    parts: list[Structure | FrontEnd] = [*structures(dense), front_end(dense)]
    return with_parts(dense, {item.name: round(share * item.count) for item in parts})


def alternate_models(
    arguments: argparse.Namespace, subject: str, models: dict[str, PreTrainedModel], audio: Tensor
) -> list[dict[str, Any]]:
    """Time models in turns; ``seconds`` and ``transformer`` are for a second of audio."""
    layers: list[float] = []

    def forward(model: PreTrainedModel) -> None:
        marks: list[float] = []
        modules = encoder_layers(model)
        hooks = [
            modules[0].register_forward_pre_hook(lambda *_: marks.append(finished())),
            modules[-1].register_forward_hook(lambda *_: marks.append(finished())),
        ]
        model(audio)
        for hook in hooks:
            hook.remove()
        layers.append(marks[1] - marks[0])

    contestants: dict[str, Callable[[], Any]] = {name: partial(forward, model) for name, model in models.items()}
    rows = alternate(arguments.rounds, subject, contestants, warm_up=not arguments.no_warm_up)
    spoken = audio.numel() / 16_000
    return [
        row | {"seconds": row["seconds"] / spoken, "transformer": seconds / spoken}
        for row, seconds in zip(rows, layers[-len(rows) :], strict=True)
    ]


def speedups(table: pandas.DataFrame) -> pandas.DataFrame:
    """A row for every case: median seconds for a second of audio, and how many times faster it is accelerated."""
    rows = []
    columns = ["model", "threads", "batch", "audio", "sparsity"]
    for values, group in table.groupby(columns, sort=True):
        parts = {name: part[["seconds", "transformer"]].median() for name, part in group.groupby("contestant")}
        row = dict(zip(columns, values, strict=True)) | {"rounds": int(group["round"].max())}
        row |= {"dense": parts[DENSE]["seconds"], "accelerated": parts[OURS]["seconds"]}
        row["whole x"] = parts[DENSE]["seconds"] / parts[OURS]["seconds"]
        row["transformer x"] = parts[DENSE]["transformer"] / parts[OURS]["transformer"]
        row["swapped"] = f"{group['swapped'].iloc[0]} of {group['matrices'].iloc[0]}"
        rows.append(row)
    return pandas.DataFrame(rows)


def show_alternatives(table: pandas.DataFrame, path: Path) -> str:
    """Draw the plot, and give how many times as fast as dense every contestant is, by the medians."""
    overview = beside_dense(table)
    plot_alternatives(path.with_suffix(""), overview)
    return overview.to_string(index=False)


def beside_dense(table: pandas.DataFrame) -> pandas.DataFrame:
    """A row for every case and contestant: median and range of the seconds for a second of audio, times faster."""
    rows = []
    columns = ["model", "threads", "batch", "audio"]
    for values, group in table.groupby(columns, sort=True):
        seconds = {name: part["seconds"] for name, part in group.groupby("contestant", sort=False)}
        for name, own in seconds.items():
            row = dict(zip(columns, values, strict=True)) | {"contestant": name, "rounds": len(own)}
            row |= {"median": own.median(), "least": own.min(), "most": own.max()}
            row["times faster"] = seconds[DENSE].median() / own.median()
            row["difference"] = group[group["contestant"] == name]["difference"].max()
            rows.append(row)
    return pandas.DataFrame(rows).round(4)


def plot_alternatives(path: Path, overview: pandas.DataFrame) -> None:
    """Draw bars of the times faster than dense, with the range of the rounds, to ``<path>.png`` and ``<path>.pdf``."""
    settings = list(dict.fromkeys(zip(overview["model"], overview["threads"], strict=True)))
    names = list(dict.fromkeys(overview["contestant"]))
    with mpl.rc_context(STYLE):
        width = 0.075 * max(map(len, names)) + 2.6 * len(settings)
        figure = Figure(figsize=(width, 1.6 + 0.4 * len(names)), layout="constrained")
        for axes, (model, threads) in zip(figure.subplots(1, len(settings), squeeze=False)[0], settings, strict=True):
            part = overview[(overview["model"] == model) & (overview["threads"] == threads)]
            cases = list(part.groupby(["batch", "audio"]))
            for index, ((batch, audio), case) in enumerate(cases):
                places = [names.index(name) + 0.8 * (index + 0.5) / len(cases) - 0.4 for name in case["contestant"]]
                faster = case["times faster"]
                spread = [faster * (1 - case["median"] / case["most"]), faster * (case["median"] / case["least"] - 1)]
                style: dict[str, Any] = {"color": COLORS[index], "label": f"{batch} x {audio} s"}
                axes.barh(places, faster, 0.8 / len(cases), xerr=spread, error_kw={"linewidth": 0.8}, **style)
            axes.axvline(1.0, color="#444444", linewidth=1.0)
            axes.set_yticks(range(len(names)), names if axes is figure.axes[0] else [""] * len(names))
            axes.set_ylim(len(names) - 0.5, -0.5)
            axes.set_title(f"{model}, {threads} thread{'s' * (threads > 1)}", fontsize=10)
            axes.set_xlabel("Times faster than dense")
        labelled = {str(bars.get_label()): bars for axes in figure.axes for bars in axes.containers}
        bars_of: dict[str, Any] = {label: bars for label, bars in labelled.items() if " x " in label}
        figure.legend(list(bars_of.values()), list(bars_of), loc="outside lower center", ncols=len(bars_of))
        save(figure, path)


def markdown(overview: pandas.DataFrame) -> str:
    """A table of :func:`speedups`: a row for every model, number of threads and case, a column for every sparsity."""
    sparsities = sorted(overview["sparsity"].unique())
    head = ["model", "threads", "audio", "rounds", "dense", *(f"{sparsity:.0%}" for sparsity in sparsities)]
    lines = [head, ["---"] * len(head)]
    for (model, threads, batch, audio), case in overview.groupby(["model", "threads", "batch", "audio"]):
        faster = {
            row["sparsity"]: f"{row['whole x']:.2f} ({row['transformer x']:.2f})" for row in case.to_dict("records")
        }
        rounds = sorted({str(count) for count in case["rounds"]})
        cells = [model, threads, f"{batch} x {audio} s", " or ".join(rounds), f"{case['dense'].median():.3f}"]
        lines.append([str(cell) for cell in cells] + [faster.get(sparsity, "") for sparsity in sparsities])
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return f"{table}\nTimes faster than dense, the whole model (its transformer layers); dense: seconds for a second.\n"


def plot_speedups(path: Path, overview: pandas.DataFrame) -> None:
    """Draw how many times faster the accelerated models are, over sparsity, to ``<path>.png`` and ``<path>.pdf``."""
    settings = list(dict.fromkeys(zip(overview["model"], overview["threads"], strict=True)))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(max(2.8 * len(settings), 5.2), 3.4), layout="constrained")
        for axes, (model, threads) in zip(figure.subplots(1, len(settings), squeeze=False)[0], settings, strict=True):
            part = overview[(overview["model"] == model) & (overview["threads"] == threads)]
            for index, ((batch, audio), case) in enumerate(part.groupby(["batch", "audio"])):
                style: dict[str, Any] = {"color": COLORS[index], "marker": MARKERS[index]}
                sparsity = 100 * case["sparsity"]
                axes.plot(sparsity, case["whole x"], label=f"whole model, {batch} x {audio} s", **style)
                label = f"transformer, {batch} x {audio} s"
                axes.plot(sparsity, case["transformer x"], label=label, linestyle="--", **style)
            axes.axhline(1.0, color="#444444", linewidth=1.0)
            axes.set_title(f"wav2vec2-{model}, {threads} thread{'s' * (threads > 1)}", fontsize=10)
            axes.set_xlabel("Zeros (%)")
            axes.set_ylim(bottom=0)
        figure.axes[0].set_ylabel("Times faster than dense")
        handles = {str(line.get_label()): line for axes in figure.axes for line in axes.get_lines()}
        named = {label: line for label, line in handles.items() if not label.startswith("_")}
        columns = 4 if len(settings) > 2 else 2
        figure.legend(list(named.values()), list(named), loc="outside lower center", ncols=columns)
        save(figure, path)


MEASURE = """
import json, sys, torch, sparsewav, sparsewav.models.structured
from functools import partial
from pathlib import Path
from transformers import AutoConfig, AutoModelForCTC
from sparsewav.inference.alternatives import ALTERNATIVES, run_model
from sparsewav.pipeline.run_folder import peak_memory
torch.set_num_threads(1)
folder, exported, contestant = sys.argv[1:]
resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4096
start = resident()
if contestant in ALTERNATIVES and not contestant.startswith("PyTorch"):
    with torch.device("meta"):  # the file has the weights
        model = AutoModelForCTC.from_config(AutoConfig.from_pretrained(folder)).eval()
else:
    model = AutoModelForCTC.from_pretrained(folder).eval()
if contestant == "SparseWAV":
    sparsewav.accelerate(model, alternatives=())
run = ALTERNATIVES[contestant](model, Path(exported)) if contestant in ALTERNATIVES else partial(run_model, model)
loaded = resident()
with torch.inference_mode():
    run(torch.randn(1, 80_000))
found = {"libraries": start, "loaded": loaded, "running": resident(), "peak": peak_memory(torch.device("cpu"))}
print(json.dumps(found))
"""


def bench_memory(arguments: argparse.Namespace) -> pandas.DataFrame:
    """Resident memory of a loaded model: dense, accelerated, in lower precision, and in other runtimes.

    In MiB: Python and its libraries, with the model loaded, after 5 s of audio, and at most. On Linux, where a mapped
    checkpoint counts as far as it was read. Models are loaded from dense checkpoints, and by other runtimes from their
    files, one process for each figure.
    """
    rows: dict[tuple[str, str], dict[str, Any]] = {}

    def measure(subject: str, contestant: str, folder: str, exported: str) -> None:
        command = [sys.executable, "-W", "ignore", "-c", MEASURE, folder, exported, contestant]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        measured = {key: round(value / 2**20) for key, value in json.loads(done.stdout).items()}
        rows[subject, contestant] = {"subject": subject, "contestant": contestant} | measured

    for name in arguments.models:
        model, shown = random_model(name, arguments.layers), with_layers(name, arguments.layers)
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as exported:
            model.save_pretrained(folder)
            for contestant in (DENSE, *prepared(model, Path(exported), ALTERNATIVES)):
                measure(shown, contestant, folder, exported)
        for share in arguments.kept:
            cut = random_cut(model, share)
            with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as exported:
                cut.save_pretrained(folder)
                for contestant in (DENSE, *prepared(cut, Path(exported), CUT_RUN_BY)):
                    measure(f"{shown}, {share:.0%} kept", contestant, folder, exported)
        for sparsity in sorted(arguments.sparsities):
            for matrix in prunable_matrices(model):
                remove_at_random(matrix.weight, sparsity)
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                for _ in range(2):  # the first process times the products; the second finds what it remembered
                    measure(f"{shown}, {sparsity:.0%} zero", OURS, folder, "")
    return pandas.DataFrame(list(rows.values()))


def with_layers(name: str, layers: int | None) -> str:
    """The name of a model in results: one with fewer layers is another model."""
    return f"{name} with {layers} layers" if layers else name


def random_model(name: str, layers: int | None = None) -> PreTrainedModel:
    """wav2vec2-base or -large with random weights."""
    torch.manual_seed(0)
    options = MODELS[name] | ({"num_hidden_layers": layers} if layers else {})
    return Wav2Vec2ForCTC(Wav2Vec2Config(**options, ctc_loss_reduction="mean")).eval()


@torch.no_grad()
def remove_at_random(weight: Tensor, sparsity: float) -> None:
    """Zero a random share of a matrix, in place; a larger share contains a smaller one."""
    generator = torch.Generator().manual_seed(0)
    weight[torch.rand(weight.shape, generator=generator) < sparsity] = 0.0


if __name__ == "__main__":
    raise SystemExit(main())
