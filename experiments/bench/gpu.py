"""``python -m experiments.bench.gpu``: the cost of pruning on a GPU, and the time that 2:4 models save there.

The models have the published shapes and random weights, which do not change what a product costs. Contestants take
turns in one process.
"""

import argparse
import copy
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pandas
import torch
from transformers import PreTrainedModel

import sparsewav
from experiments.bench.command import Part, benchmark_parser, run_parts
from experiments.bench.engine import FLOOR, OURS, PLAIN, SPARSITY, alternate, finished, show_summary, speech
from experiments.bench.inference import DENSE, MODELS, alternate_models, markdown, random_model, speedups
from experiments.bench.plain import Batch, forward, plain_prune, plain_solve
from sparsewav import Pruning, Uniform
from sparsewav.pruning import collect_hessians, prunable_matrices, prune_model
from sparsewav.pruning.allocation.allocate import traces_of
from sparsewav.pruning.plan import BATCHED_DEVICES
from sparsewav.pruning.solvers.selection import n_of_m

ONE_BY_ONE = "one input at a time"

CLIP_SECONDS = 12.7
"""Mean length of an utterance of train-clean-100."""

PROBED = 128 / 2048
"""Share of the calibration set that the sensitivities are estimated on."""


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parts = {
        "solver": Part(bench_solver, show_summary),
        "pipeline": Part(bench_pipeline, show_summary),
        "two_of_four": Part(bench_two_of_four, show_two_of_four),
    }
    example = "pipeline --models base --clips 256 --rounds 1"
    parser = benchmark_parser("gpu", "Time the engine and 2:4 models on a GPU.", parts, example)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS), help="default both")
    parser.add_argument("--layers", type=int, help="of the models, for a quick look (default as published)")
    parser.add_argument("--clips", type=int, default=2048, help="size of the calibration set (default 2048)")
    parser.add_argument("--cases", nargs="+", default=["1x20", "8x20", "64x20"], help="batch x seconds, of two_of_four")
    parser.add_argument("--no-warm-up", action="store_true", help="count the first round: for long parts")
    parser.add_argument("--no-plain", action="store_true", help="leave the plain implementation out")
    parser.add_argument("--device", default="cuda", help="default cuda")
    arguments = parser.parse_args(words)
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"PyTorch sees no GPU for --device {arguments.device}; experiments.bench.engine is for the CPU")
    return run_parts(parts, arguments, device=arguments.device, prefix="gpu_")


def show_two_of_four(table: pandas.DataFrame, path: Path) -> str:
    """The speedups, and how far the logits move."""
    deviations = table.drop_duplicates("subject")[["subject", "swapped", "deviation"]]
    return f"{markdown(speedups(table))}\n{deviations.to_string(index=False)}"


def bench_solver(arguments: argparse.Namespace) -> pandas.DataFrame:
    """The solve of all matrices: those of one width batched, one input at a time, and the plain loop.

    All have the same Hessians; the zeros are compared with those of the plain loop.
    """
    rows: list[dict[str, Any]] = []
    for name in arguments.models:
        dense = random_model(name, arguments.layers).to(arguments.device)
        collected = collect_hessians(dense, clips(min(arguments.clips, 32)))
        targets = {matrix.name: SPARSITY for matrix in prunable_matrices(dense)}
        hessians = {key: collected.of(key) for key in targets}
        results: dict[str, PreTrainedModel] = {}

        def batched(
            dense: PreTrainedModel = dense,
            collected: Any = collected,
            results: dict = results,
            key: str = OURS,
            devices: tuple[str, ...] = BATCHED_DEVICES,
        ) -> None:
            results[key] = copy.deepcopy(dense)
            settings = Pruning(allocation=Uniform())
            prune_model(results[key], [], settings, hessians=collected, batched_devices=devices)

        def one_by_one(batched: Callable = batched) -> None:
            batched(key=ONE_BY_ONE, devices=())

        def plain(
            dense: PreTrainedModel = dense, hessians: dict = hessians, targets: dict = targets, results: dict = results
        ) -> None:
            results[PLAIN] = copy.deepcopy(dense)
            plain_solve(results[PLAIN], hessians, targets)

        contestants: dict[str, Callable[[], Any]] = {OURS: batched, ONE_BY_ONE: one_by_one}
        if not arguments.no_plain:
            contestants[PLAIN] = plain
        subject = f"wav2vec2-{name}, {len(targets)} matrices"
        timed = alternate(arguments.rounds, subject, contestants, warm_up=not arguments.no_warm_up)
        reference = results.get(PLAIN, results[ONE_BY_ONE])
        rows += [row | {"same_mask": _same_zeros(results[row["contestant"]], reference)} for row in timed]
    return pandas.DataFrame(rows)


def bench_pipeline(arguments: argparse.Namespace) -> pandas.DataFrame:
    """Sensitivities, calibration and solve of the paper's set-up: 2048 clips of 12.7 s.

    The seconds of each step are rows of their own.
    """
    rows: list[dict[str, Any]] = []
    batches = clips(arguments.clips)
    probed = batches[: max(round(len(batches) * PROBED), 1)]
    for name in arguments.models:
        dense = random_model(name, arguments.layers).to(arguments.device)
        forward(dense, batches[:2])  # libraries choose their kernels
        stages: list[dict[str, float]] = []
        peaks: dict[str, float] = {}

        def measured(contestant: str, run: Callable[[], Any], peaks: dict = peaks) -> Callable[[], None]:
            def measure() -> None:
                if torch.cuda.is_initialized():
                    torch.cuda.reset_peak_memory_stats()
                run()
                if torch.cuda.is_initialized():
                    peaks[contestant] = torch.cuda.max_memory_allocated() / 2**30

            return measure

        def ours(dense: PreTrainedModel = dense, stages: list = stages) -> None:
            model = copy.deepcopy(dense)
            started = finished()
            traces = traces_of(model, probed, Pruning())
            allocate = finished() - started
            report = prune_model(model, batches, Pruning(), traces=traces, keep_masks=False)
            stages.append(report.seconds | {"allocate": allocate})

        runs: dict[str, Callable[[], Any]] = {OURS: ours, FLOOR: partial(forward, dense, batches)}
        if not arguments.no_plain:
            runs[PLAIN] = partial(_plainly_pruned, dense, batches, probed)
        contestants = {contestant: measured(contestant, run) for contestant, run in runs.items()}
        subject = f"wav2vec2-{name}, {len(batches)} batches, {arguments.clips} clips"
        timed = alternate(arguments.rounds, subject, contestants, warm_up=not arguments.no_warm_up)
        rows += [row | {"peak_gib": peaks.get(row["contestant"])} for row in timed]
        for number, seconds in enumerate(stages[-arguments.rounds :]):
            row = {"contestant": OURS, "round": number + 1}
            rows += [row | {"subject": f"wav2vec2-{name}: {key}", "seconds": value} for key, value in seconds.items()]
    return pandas.DataFrame(rows)


@torch.inference_mode()
def bench_two_of_four(arguments: argparse.Namespace) -> pandas.DataFrame:
    """2:4 models in half precision, dense and through PyTorch's semi-structured products.

    Seconds of the forward pass are for a second of audio; the deviation is that of the logits.
    """
    rows: list[dict[str, Any]] = []
    for name in arguments.models:
        dense = random_model(name, arguments.layers).to(arguments.device, torch.float16)
        keep_two_of_four(dense)
        for case in arguments.cases:
            batch, seconds = map(int, case.split("x"))
            audio = torch.randn(batch, 16_000 * seconds, generator=torch.Generator().manual_seed(0))
            audio = audio.to(dense.device, dense.dtype)
            accelerated = copy.deepcopy(dense)
            report = sparsewav.accelerate(accelerated, frames=50 * batch * seconds, pattern="2:4")
            expected = dense(audio).logits.float()
            deviation = (accelerated(audio).logits.float() - expected).norm() / expected.norm()
            subject = f"{name}, 2:4, {batch} x {seconds} s"
            found = {"model": name, "sparsity": 0.5, "batch": batch, "audio": seconds, "threads": 1}
            found |= {"swapped": report.swapped, "matrices": len(report.matrices), "deviation": float(deviation)}
            timed = alternate_models(arguments, subject, {DENSE: dense, OURS: accelerated}, audio)
            rows += [row | found for row in timed]
    return pandas.DataFrame(rows)


@torch.no_grad()
def keep_two_of_four(model: PreTrainedModel) -> None:
    """Zero the two smallest of every four neighbours in all prunable matrices, in place."""
    for matrix in prunable_matrices(model):
        matrix.weight.mul_(n_of_m(matrix.weight.abs(), torch.ones_like(matrix.weight, dtype=torch.bool), 2, 4))


def clips(count: int) -> list[Batch]:
    """Batches of at most 60 s: clips of 12.7 s, cut from the demo's speech, which repeats."""
    spoken = speech(64)
    whole = torch.cat([batch["input_values"].flatten() for batch in spoken])
    labels = torch.cat([batch["labels"].flatten() for batch in spoken])
    samples = round(16_000 * CLIP_SECONDS)
    parts = whole[: len(whole) // samples * samples].view(-1, samples)  # (clips, samples)
    written = labels[: len(labels) // len(parts) * len(parts)].view(len(parts), -1)
    order = torch.tensor(list(islice(cycle(range(len(parts))), count)))
    return [
        {"input_values": parts[chosen], "labels": written[chosen]} for chosen in order.split(int(60 / CLIP_SECONDS))
    ]


def _plainly_pruned(dense: PreTrainedModel, batches: list[Batch], probed: list[Batch]) -> None:
    plain_prune(copy.deepcopy(dense), batches, probed, SPARSITY)


def _same_zeros(model: PreTrainedModel, reference: PreTrainedModel) -> float:
    pairs = zip(prunable_matrices(model), prunable_matrices(reference), strict=True)
    same = [((mine.weight == 0) == (other.weight == 0)).float().mean() for mine, other in pairs]
    return float(torch.stack(same).mean())


if __name__ == "__main__":
    raise SystemExit(main())
