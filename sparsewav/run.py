"""One run: load, evaluate, calibrate, allocate, solve, evaluate, save and record."""

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sparsewav import cache, records
from sparsewav.config import Config, HutchinsonAllocation, ObsSaliency
from sparsewav.data.batches import SpeechBatches, check_transcripts
from sparsewav.data.sets import calibration_set, evaluation_set
from sparsewav.data.utterances import Utterance
from sparsewav.evaluation import transcribe, word_error_rate
from sparsewav.models import SpeechModel, choose_device, load_speech_model
from sparsewav.pruning import Calibration, Trace, calibrate, estimate_traces, prune
from sparsewav.pruning.encoder import takes_padding

logger = logging.getLogger(__name__)

METHOD = "sparsewav"


@dataclass
class _Stages:
    """The display of a run's stages, and the seconds that each took."""

    console: Console

    @contextmanager
    def stage(self, description: str) -> Iterator[Callable[[int, int], None]]:
        """Show a progress bar; yields what to call with (steps done, steps in all)."""
        started = time.perf_counter()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        hidden = not self.console.is_terminal  # in a file or a pipe a bar would only leave blank lines
        with Progress(*columns, console=self.console, transient=True, disable=hidden) as progress:
            task = progress.add_task(description, total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total)
        seconds = time.perf_counter() - started
        logger.info("%s: %.2f s", description, seconds)
        self.console.print(f"[green]✓[/green] {description} [dim]{seconds:.1f} s[/dim]")


def run(config: Config, folder: Path, console: Console) -> dict[str, Any]:
    """Run a configuration, or find it done.

    Args:
        config: validated.
        folder: the run's own folder; what it holds is described in :mod:`sparsewav.records`.
        console: where the progress is shown.

    Returns:
        The run's metrics, as in ``metrics.json``.

    Raises:
        UserError: something is wrong with the configuration, the model or the data.
    """
    metrics_path = folder / records.METRICS
    if metrics_path.is_file() and not config.force:
        console.print(f"Done already: {folder} (force=true does it again)")
        return json.loads(metrics_path.read_text())
    (folder / records.ERROR).unlink(missing_ok=True)
    device = choose_device(config.device)
    stages = _Stages(console)
    with stages.stage(f"Loading {config.model.name_or_path}"):
        speech = load_speech_model(config.model.name_or_path, device=device)
    evaluation, calibration = _utterances(config, speech)
    identity = _identity(config, speech)  # of the dense model, before anything changes it
    before, wer_dense, evaluate_seconds = _evaluate_dense(config, speech, evaluation, identity, stages)
    solved_identity = [identity["model"], cache.utterances_fingerprint(calibration), identity["code"]]
    solved = _solved(folder, solved_identity) if not config.force else None
    if solved:
        console.print("Going on from the pruned model that an earlier, interrupted launch left")
        speech.model = load_speech_model(str(folder / records.MODEL), device=device).model
    else:
        solved = _prune(config, speech, calibration, identity, folder, stages) | {"identity": solved_identity}
        metrics_path.unlink(missing_ok=True)  # of the run that force=true replaces
        write_pruned_model(folder, config, speech, solved)
        records.write_json(folder / records.SOLVED, solved)
    with stages.stage("Evaluating the pruned model") as progress:
        started = time.perf_counter()
        after = transcribe(speech.model, speech.processor, evaluation, config.seconds_per_batch, progress)
        wer = word_error_rate(evaluation, after)
        evaluate_seconds += time.perf_counter() - started
    records.write_predictions(folder / records.PREDICTIONS, evaluation, before, after)
    seconds = solved["seconds"] | {"finetune": 0.0, "evaluate": evaluate_seconds}
    metrics = {
        "model": speech.name,
        "method": METHOD,
        "saliency": config.saliency.name,
        "allocation": config.allocation.name,
        "finetune_strategy": config.finetune_strategy.name,
        "seed": config.seed,
        "pattern": config.sparsity_name if config.n_m else None,
        "target_sparsity": config.target_sparsity,
        "achieved_sparsity": solved["achieved_sparsity"],
        "params_total": solved["params_total"],
        "params_nonzero": solved["params_nonzero"],
        "wer_dense": wer_dense,
        "wer_pruned": wer,
        "wer": wer,
        "n_utterances": len(evaluation),
        "n_calibration_utterances": len(calibration),
        "seconds": seconds,
        "cached": solved["cached"],
        "warnings": solved["warnings"],
        "peak_memory_bytes": records.peak_memory(device),
        "dtype": str(speech.model.dtype).removeprefix("torch."),
        **records.environment(device),
    }
    records.write_json(metrics_path, metrics)
    (folder / records.SOLVED).unlink()
    return metrics


def _solved(folder: Path, identity: list[str]) -> dict[str, Any] | None:
    """What a killed launch had written of its pruned model, if it came from this very model, data and code."""
    path = folder / records.SOLVED
    if not path.is_file():
        return None
    solved = json.loads(path.read_text())
    return solved if solved["identity"] == identity else None


def _utterances(config: Config, speech: SpeechModel) -> tuple[list[Utterance], list[Utterance]]:
    evaluation = evaluation_set(config.data)
    calibration = calibration_set(config.data, config.calibration.utterances, config.seed)
    for utterances in (evaluation, calibration):
        check_transcripts(utterances, speech.processor)
    return evaluation, calibration


def _evaluate_dense(
    config: Config, speech: SpeechModel, utterances: list[Utterance], identity: dict[str, Any], stages: _Stages
) -> tuple[dict[str, str], float, float]:
    """Hypotheses of the dense model, its WER, and the seconds that transcribing took when it was really done."""

    def make(folder: Path) -> None:
        with stages.stage("Evaluating the dense model") as progress:
            started = time.perf_counter()
            hypotheses = transcribe(speech.model, speech.processor, utterances, config.seconds_per_batch, progress)
            seconds = time.perf_counter() - started
        (folder / "dense.json").write_text(json.dumps({"hypotheses": hypotheses, "seconds": seconds}))

    identity = identity | {"utterances": cache.utterances_fingerprint(utterances)}
    folder, _ = cache.cached_folder("dense", identity, make, enabled=config.cache)
    record = json.loads((folder / "dense.json").read_text())
    return record["hypotheses"], word_error_rate(utterances, record["hypotheses"]), record["seconds"]


def _identity(config: Config, speech: SpeechModel) -> dict[str, Any]:
    return {
        "model": cache.model_fingerprint(speech.model),
        "processor": speech.processor.to_json_string(),
        "vocabulary": speech.processor.tokenizer.get_vocab(),
        "code": cache.code_fingerprint(),
        "device": records.device_name(speech.model.device),
        "seconds_per_batch": config.seconds_per_batch,
    }


def _prune(
    config: Config,
    speech: SpeechModel,
    utterances: list[Utterance],
    identity: dict[str, Any],
    folder: Path,
    stages: _Stages,
) -> dict[str, Any]:
    """Prune the model in place, write ``layers.csv``, and give what ``metrics.json`` has to say of it."""
    traces, allocate_seconds, traces_cached = _traces(config, speech, utterances, identity, stages)
    calibration, calibrate_seconds, hessians_cached = None, 0.0, False
    batches = _batches(config, speech, utterances)
    if config.calibration.propagation == "parallel":
        calibration, calibrate_seconds, hessians_cached = _calibration(
            config, speech, utterances, batches, identity, stages
        )
    options: dict[str, Any] = {}
    if isinstance(config.saliency, ObsSaliency):
        options |= {"percdamp": config.saliency.percdamp, "block_size": config.saliency.block_size}
    if isinstance(config.allocation, HutchinsonAllocation):
        options |= {"alpha": config.allocation.alpha, "exact_budget": config.allocation.exact_budget}
    with stages.stage(f"Pruning to {config.sparsity_name} with {config.saliency.name}") as progress:
        report = prune(
            speech.model,
            batches,
            config.target_sparsity,
            saliency=config.saliency.name,
            allocation=config.allocation.name,
            n_m=config.n_m,
            propagation=config.calibration.propagation,
            seed=config.seed,
            calibration=calibration,
            traces=traces,
            progress=lambda stage, done, total: progress(done, total),
            **options,
        )
    for warning in report.warnings:
        stages.console.print(f"[yellow]! {warning}[/yellow]")
    records.write_layers(folder / records.LAYERS, report.matrices)
    total, nonzero = records.count_parameters(speech.model)
    seconds = {
        "calibrate": report.seconds["calibrate"] + calibrate_seconds,
        "allocate": allocate_seconds,
        "solve": report.seconds["solve"],
    }
    return {
        "achieved_sparsity": report.sparsity,
        "params_total": total,
        "params_nonzero": nonzero,
        "seconds": seconds | {"prune": sum(seconds.values())},
        "cached": [stage for stage, hit in (("calibrate", hessians_cached), ("allocate", traces_cached)) if hit],
        "warnings": report.warnings,
    }


def _batches(config: Config, speech: SpeechModel, utterances: list[Utterance]) -> SpeechBatches:
    return SpeechBatches(utterances, speech.processor, config.seconds_per_batch, padding=takes_padding(speech.model))


def _calibration(
    config: Config,
    speech: SpeechModel,
    utterances: list[Utterance],
    batches: SpeechBatches,
    identity: dict[str, Any],
    stages: _Stages,
) -> tuple[Calibration, float, bool]:
    """Hessians, the seconds that gathering them took when it was really done, and whether they were cached."""

    def make(folder: Path) -> None:
        with stages.stage(f"Calibrating on {len(utterances)} utterances") as progress:
            started = time.perf_counter()
            calibration = calibrate(speech.model, batches, progress)
            seconds = time.perf_counter() - started
        cache.save_calibration(calibration, folder)
        (folder / "seconds.json").write_text(json.dumps(seconds))

    identity = identity | {"utterances": cache.utterances_fingerprint(utterances)}
    folder, cached = cache.cached_folder("hessians", identity, make, enabled=config.cache)
    return (
        cache.load_calibration(folder, speech.model.device),
        json.loads((folder / "seconds.json").read_text()),
        cached,
    )


def _traces(
    config: Config,
    speech: SpeechModel,
    utterances: list[Utterance],
    identity: dict[str, Any],
    stages: _Stages,
) -> tuple[dict[str, Trace] | None, float, bool]:
    """Hessian traces, if the allocation wants them; seconds and cached as in :func:`_calibration`."""
    allocation = config.allocation
    if not isinstance(allocation, HutchinsonAllocation):
        return None, 0.0, False
    utterances = utterances[: allocation.utterances]

    def make(folder: Path) -> None:
        with stages.stage(f"Estimating sensitivities on {len(utterances)} utterances") as progress:
            started = time.perf_counter()
            traces = estimate_traces(
                speech.model,
                _batches(config, speech, utterances),
                probes=allocation.probes,
                distribution=allocation.distribution,  # type: ignore[arg-type]
                seed=config.seed,
                progress=progress,
            )
            seconds = time.perf_counter() - started
        record = {"traces": {name: asdict(trace) for name, trace in traces.items()}, "seconds": seconds}
        (folder / "traces.json").write_text(json.dumps(record))

    identity = identity | {
        "utterances": cache.utterances_fingerprint(utterances),
        "probes": allocation.probes,
        "distribution": allocation.distribution,
        "seed": config.seed,
    }
    folder, cached = cache.cached_folder("traces", identity, make, enabled=config.cache)
    record = json.loads((folder / "traces.json").read_text())
    return {name: Trace(**trace) for name, trace in record["traces"].items()}, record["seconds"], cached


def write_pruned_model(folder: Path, config: Config, speech: SpeechModel, solved: dict[str, Any]) -> None:
    """Write ``model/`` with a card that says what was done."""
    card = f"""---
library_name: transformers
pipeline_tag: automatic-speech-recognition
tags: [sparsewav, pruning, speech]
---
# {speech.name}, pruned to {config.sparsity_name} sparsity

Made by SparseWAV from `{config.model.name_or_path}` in one shot, without fine-tuning.

| | |
|---|---|
| saliency | {config.saliency.name} |
| allocation | {config.allocation.name} |
| sparsity of the transformer's matrices | {solved["achieved_sparsity"]:.4f} (asked for: {config.sparsity_name}) |
| parameters | {solved["params_nonzero"]:,} of {solved["params_total"]:,} are not zero |
| calibration | {config.calibration.utterances} utterances of {config.data.calibration_subset}, seed {config.seed} |

The weights are stored dense, with zeros: `AutoModelForCTC.from_pretrained` loads them as any other model. The word
error rates are in the run's `metrics.json`, beside this folder.
"""
    records.write_model(folder / records.MODEL, speech.model, speech.processor, card)
