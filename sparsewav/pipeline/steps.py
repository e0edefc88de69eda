"""The steps of a run that change its model: pruning, fine-tuning, and rounding after it."""

import logging
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pandas
import torch
from rich.console import Console
from torch import Tensor

from sparsewav.data.batches import SpeechBatches
from sparsewav.data.utterances import Utterance
from sparsewav.files import writing
from sparsewav.inference.kernel import processor_model
from sparsewav.inference.latency import Timed
from sparsewav.inference.shapes import Shape
from sparsewav.inference.speedup import CPU, Speedup, measure_speedup, shape_timer
from sparsewav.models.cut import cut_model
from sparsewav.models.load import SpeechModel, load_speech_model
from sparsewav.pipeline import run_folder
from sparsewav.pipeline.prune_folder import prune_checkpoint
from sparsewav.pipeline.resume import (
    State,
)
from sparsewav.pipeline.shared_statistics import (
    calibration_batches,
    gather_hessians,
    gather_traces,
)
from sparsewav.pipeline.workers import in_all_processes
from sparsewav.progress import print_warning, stage
from sparsewav.pruning import PruneReport, distributed, prune_model
from sparsewav.pruning.allocation.latency import TOLERANCE, TimeShape
from sparsewav.pruning.layerwise import StageProgress
from sparsewav.pruning.prune import round_pruned
from sparsewav.pruning.rest import round_rest
from sparsewav.settings.pruning import ENCODER, Pruning, Sparsity, Structured
from sparsewav.settings.quantization import Integers
from sparsewav.settings.recovery import Elsa, Global
from sparsewav.settings.run import Config
from sparsewav.settings.training import Training
from sparsewav.training.global_recovery import recover_on_utterances, summary
from sparsewav.training.masks import masked_matrices, masks_of, sparsities_of
from sparsewav.training.processes import Learn, train_masked_in_processes
from sparsewav.training.schedule import Stage
from sparsewav.training.trainer import Log, train_ctc, write_training_log

logger = logging.getLogger(__name__)


def prune_step(
    config: Config,
    speech: SpeechModel,
    utterances: list[Utterance],
    sparsity: float | None,
    dense: dict[str, Any],
    state: State,
    folder: Path,
    console: Console,
    *,
    rounds: bool,
    timed: Timed | None = None,
) -> None:
    """Prune the model to the sparsity of the next stage, write ``layers.csv`` and note what was done.

    Its weights are changed in place; where heads and units are removed, the smaller model takes its place. The sparsity
    is None where the allocation finds it. Without ``rounds`` a later step rounds the weights to the bits
    that ``layers.csv`` has. ``timed`` is what is known of the model that is to become faster.
    """
    first = not state.stages  # later stages start from a model that no other run has: their statistics are not kept
    identity = dense if first else None
    traces, allocate_seconds, traces_cached = gather_traces(config, speech, utterances, identity, console)
    hessians, calibrate_seconds, hessians_cached = None, 0.0, False
    batches = calibration_batches(config, speech, utterances)
    if config.dense_hessians:
        hessians, calibrate_seconds, hessians_cached = gather_hessians(
            config, speech, utterances, batches, identity, console
        )
    settings = config.pruning(sparsity)
    structured = isinstance(settings.sparsity, Structured)
    # Of what the stages before have left; seconds are those of the dense model at every stage.
    if isinstance(settings.sparsity, Structured) and not first and timed is None:
        assert settings.sparsity.share is not None
        share = settings.sparsity.share / state.stages[-1]["share_left"]
        settings.sparsity = settings.sparsity.keeping(min(share, 1.0))
    recovers = config.layer_recovery is not None

    def advance(piece: str, done: int, total: int) -> None:
        if not recovers or piece == "recover":  # the bar shows what takes the longest
            progress(done, total)

    how = config.saliency.name if config.uses_saliency else config.solver.name
    # What the engine keeps on disk lies in temporary folders.
    with (
        writing(Path(tempfile.gettempdir())),
        timing_shapes(timed, speech, settings.sparsity, console) as time_shape,
        stage(console, f"Pruning to {settings.sparsity} with {how}") as progress,
    ):
        if config.model.offload:
            report = _prune_from_disk(config, speech, batches, settings, folder, advance)
        else:
            report = in_all_processes(
                prune_model,
                speech.model,
                batches,
                settings=settings,
                masks=None if first or structured else masks_of(speech.model, config.scope),
                hessians=hessians,
                traces=traces,
                rounds=rounds,
                latency=timed.table if timed else None,
                time_shape=time_shape,
                progress=advance,
            )
    new = [warning for warning in report.warnings if warning not in state.warnings]  # an earlier stage said the others
    for warning in new:
        print_warning(warning, log=False)  # by the engine
    early = sparsity is not None and sparsity != config.sparsity.fraction
    table = f"layers-{sparsity:g}.csv" if early else run_folder.LAYERS
    run_folder.write_layers(folder / table, report.structures or report.matrices)
    state.seconds["calibrate"] += report.seconds["calibrate"] + calibrate_seconds
    state.seconds["allocate"] += report.seconds["allocate"] + allocate_seconds
    _add_seconds(state, report, "solve", "recover", "quantize")
    if hessians_cached:
        state.cached["calibrate"] = calibrate_seconds
    if traces_cached:
        state.cached["allocate"] = allocate_seconds
    state.warnings += new
    achieved, share_left = report.sparsity, report.share
    if share_left is not None:
        speech.model = cut_model(speech.model, report.kept)
        if not first:
            achieved = 1 - (1 - achieved) * (1 - state.stages[-1]["achieved_sparsity"])
            share_left *= state.stages[-1]["share_left"] if timed is None else 1.0
    state.stages.append(
        {
            "sparsity": sparsity,
            "achieved_sparsity": achieved,
            # backward passes: over a batch, or over an utterance for allocation.trace=fisher
            "sensitivity_gradients": next(iter(traces.values())).gradients if traces else 0,
            "updates": 0,
        }
        | ({} if report.bits is None else {"bits": report.bits})
        | ({} if share_left is None else {"share_left": share_left})
        | ({} if report.speedup is None else {"speedup_when_chosen": report.speedup})
        | (
            {"divergence_evaluations": report.allocated.evaluations, "output_divergence": report.allocated.divergence}
            if report.allocated
            else {}
        )
    )
    if report.recoveries:
        state.stages[-1]["layer_errors"] = [asdict(recovery) for recovery in report.recoveries]


@contextmanager
def timing_shapes(
    timed: Timed | None, speech: SpeechModel, sparsity: Sparsity, console: Console
) -> Iterator[TimeShape | None]:
    """Give what times models with fewer heads and units of the newest model; None where no speed is asked for."""
    if timed is None:
        yield None
        return
    assert isinstance(sparsity, Structured)
    asked = sparsity

    def tell(found: Speedup) -> None:
        sentence = (
            f"a choice of heads and units was timed: {found.ratio:.3f} times as fast, {asked.speedup:g} asked for"
        )
        logger.info(sentence)
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)

    with shape_timer(timed.dense, Shape.of(speech.model), asked, tell) as time_shape:
        yield time_shape


def time_step(config: Config, speech: SpeechModel, timed: Timed, console: Console) -> dict[str, Any]:
    """Time the final model beside the dense one, both really loaded, and warn where it is slower than was asked for.

    Returns:
        What ``metrics.json`` says of it.
    """
    asked = config.sparsity
    assert isinstance(asked, Structured)
    assert asked.share is not None
    with stage(console, f"Timing the smaller model beside the dense one in {asked.runtime}"):
        dense = load_speech_model(str(speech.folder), device=CPU).model
        found = measure_speedup(dense, speech.model, asked)
    if found.ratio < 1 / (asked.share * (1 + TOLERANCE)):
        print_warning(
            f"the model is {found.ratio:.2f} times as fast as the dense one, and {asked.asked} was asked for; run "
            "again on a machine that does nothing else (force=true cache=false), or ask for more"
        )
    return {
        "asked_speedup": asked.speedup,
        "achieved_speedup": found.ratio,
        "achieved_share": 1 / found.ratio,
        "latency": {
            "conditions": timed.table.conditions,
            "runtime": asked.runtime,
            "threads": torch.get_num_threads(),
            "audio_seconds": list(asked.audio_seconds),
            "seconds_dense": found.dense,
            "seconds": found.smaller,
            "speedup_quartiles": [found.low, found.high],
            "processor": processor_model(),
            "table": "measured" if timed.source is None else "read",
        },
    }


def _add_seconds(state: State, report: PruneReport, *pieces: str) -> None:
    for piece in pieces:
        if piece in report.seconds:
            state.seconds[piece] = state.seconds.get(piece, 0.0) + report.seconds[piece]


def quantize_step(
    config: Config,
    speech: SpeechModel,
    utterances: list[Utterance],
    state: State,
    folder: Path,
    console: Console,
) -> None:
    """Round the tuned or cut model in place to the bits in ``layers.csv``.

    Removed weights stay zero, and no other goes.
    """
    with writing(Path(tempfile.gettempdir())), stage(console, f"Rounding to {config.quantization.name}") as progress:
        if not isinstance(config.quantization, Integers):
            started = time.perf_counter()
            round_rest(speech.model, config.quantization, config.scope)
            state.seconds["quantize"] = time.perf_counter() - started
            return
        # Where parts were cut, all matrices have the same bits, and layers.csv has none.
        cut = isinstance(config.sparsity, Structured)
        bits = {} if cut else pandas.read_csv(folder / run_folder.LAYERS).set_index("name")["bits"].to_dict()

        def advance(_: str, done: int, total: int) -> None:
            progress(done, total)

        batches = calibration_batches(config, speech, utterances)
        settings, masks = config.pruning(config.sparsity.fraction), masks_of(speech.model, config.scope)
        report = in_all_processes(
            round_pruned, speech.model, batches, settings=settings, masks=masks, bits=bits, progress=advance
        )
    state.stages[-1]["bits"] = report.bits
    _add_seconds(state, report, "calibrate", "solve", "quantize")


def _prune_from_disk(
    config: Config,
    speech: SpeechModel,
    batches: SpeechBatches,
    settings: Pruning,
    folder: Path,
    progress: StageProgress,
) -> PruneReport:
    """Let go of the dense model, prune its checkpoint, and take the pruned model in its place."""
    device = speech.model.device
    speech.model.eval().to("meta")  # what is left is its shape and configuration
    pruned = folder / run_folder.STAGES / "offloaded"
    shutil.rmtree(pruned, ignore_errors=True)  # of a launch that was killed later
    assert speech.folder is not None
    report = prune_checkpoint(speech.folder, pruned, batches, settings, device=device, progress=progress)
    speech.model = load_speech_model(str(pruned), device=device).model
    return report


def tune_step(
    config: Config,
    speech: SpeechModel,
    training: list[Utterance],
    item: Stage,
    checkpoints: Path,
    state: State,
    folder: Path,
    console: Console,
) -> None:
    """Tune the model in place, and note what was done; masks are held, unless a baseline has none."""
    # What an earlier run pruned in front of the layers stays so, too.
    masks = masks_of(speech.model, ENCODER) if state.compression.get("masked", True) else None
    tuning = stage(console, f"Tuning at {item.sparsity:g} for {item.updates:,} updates")
    with writing(checkpoints), tuning as progress:
        started = time.perf_counter()
        write_log = partial(_write_log, folder / run_folder.TRAINING_LOG, state.log, item.sparsity)
        arguments = (training, config.training, item.updates, checkpoints)
        log = _train(speech, train_ctc, *arguments, masks=masks, progress=progress, write_log=write_log)
        state.seconds["finetune"] += time.perf_counter() - started
    for matrix in masked_matrices(speech.model, masks or {}):
        assert masks is not None
        if matrix.weight.detach()[~masks[matrix.name].to(matrix.weight.device)].any():
            raise AssertionError(f"pruned weights of {matrix.name} came back in the tuning")
    state.stages[-1]["updates"] = item.updates
    state.log += [{"stage": item.sparsity, **entry} for entry in log]


def recover_step(
    config: Config,
    speech: SpeechModel,
    utterances: list[Utterance],
    item: Stage,
    checkpoints: Path,
    state: State,
    folder: Path,
    console: Console,
) -> None:
    """Let the pruned model learn the dense model's outputs, in place, and note what was gained.

    Masks are held; where they move, as many weights stay removed, and ``layers.csv`` gets the sparsities that they end
    with.
    """
    settings = config.recovery
    assert isinstance(settings, Global)
    assert speech.folder is not None
    learn = partial(recover_on_utterances, Path(speech.folder), config.reach == ENCODER, config.seed)
    masks = masks_of(speech.model, ENCODER)
    recovering = stage(console, f"Recovering on {len(utterances)} utterances for {settings.updates:,} updates at most")
    with writing(checkpoints), recovering as progress:
        started = time.perf_counter()
        write_log = partial(_write_log, folder / run_folder.RECOVERY_LOG, state.recovery_log, item.sparsity)
        arguments = (utterances, settings, settings.updates, checkpoints)
        log = _train(speech, learn, *arguments, masks=masks, progress=progress, write_log=write_log)
        state.seconds["recover"] = state.seconds.get("recover", 0.0) + time.perf_counter() - started
    after = masks_of(speech.model, ENCODER)
    if isinstance(settings, Elsa):
        run_folder.rewrite_sparsities(folder / run_folder.LAYERS, sparsities_of(after))
    removed = [sum(int((~mask).sum()) for mask in items.values()) for items in (masks, after)]
    if removed[1] < removed[0]:
        raise AssertionError(f"{removed[0] - removed[1]} removed weights came back in the recovery")
    found = summary(log)
    for warning in found.warnings:
        print_warning(warning)
    state.warnings += found.warnings
    state.stages[-1]["recovery"] = asdict(found)
    state.recovery_log += [{"stage": item.sparsity, **entry} for entry in log]


def _train(
    speech: SpeechModel,
    learn: Learn,
    utterances: list[Utterance],
    settings: Training | Global,
    updates: int,
    checkpoints: Path,
    *,
    masks: Mapping[str, Tensor] | None,
    **shown: Any,
) -> Log:
    """Train the model here, or in new processes where several are asked for; ``shown`` is what tells of it."""
    arguments = (speech.processor, utterances, settings, updates, checkpoints)
    # Beside this process's group the Trainer would take the processes that wait in it for its own.
    if settings.processes == 1 and distributed.world() == 1:
        return learn(speech.model, *arguments, masks=masks, **shown)
    speech.model, log = train_masked_in_processes(speech.model, *arguments, learn=learn, **shown)
    return log


def _write_log(path: Path, before: Log, sparsity: float | None, log: Log) -> None:
    """Write the log of a stage so far behind that of the stages before."""
    write_training_log(path, [*before, *({"stage": sparsity, **entry} for entry in log)])
