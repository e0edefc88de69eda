"""What runs of one model share: hypotheses of dense models, Hessians and sensitivities, kept in the cache."""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from rich.console import Console

from sparsewav import cache
from sparsewav.data.batches import SpeechBatches
from sparsewav.data.text import Normalization
from sparsewav.data.utterances import Utterance
from sparsewav.inference.latency import Timed, latency_table
from sparsewav.inference.runtime import ExportedModel
from sparsewav.inference.shapes import Shape
from sparsewav.inference.wer import ErrorRates, error_rates, transcribe
from sparsewav.models.load import SpeechModel
from sparsewav.models.processor import describe
from sparsewav.pipeline import run_folder
from sparsewav.pipeline.utterances import on_set
from sparsewav.pipeline.workers import in_all_processes
from sparsewav.progress import print_note, stage
from sparsewav.pruning import Hessians, Trace, collect_hessians
from sparsewav.pruning.allocation.allocate import traces_of
from sparsewav.pruning.encoder import takes_padding
from sparsewav.settings.pruning import Structured, Traced
from sparsewav.settings.run import Config


def identity_of(speech: SpeechModel, seconds_per_batch: float) -> dict[str, Any]:
    """Give what the shared results of a model depend on, besides the utterances."""
    model = speech.model
    return {
        "model": model.fingerprint if isinstance(model, ExportedModel) else cache.model_fingerprint(model),
        "processor": describe(speech.processor),
        "code": cache.code_fingerprint(),
        "device": run_folder.device_name(speech.model.device),
        "seconds_per_batch": seconds_per_batch,
    }


@dataclass
class Evaluation:
    """What a model writes on every evaluation set, by the sets' names.

    Attributes:
        hypotheses: In the order of the set.
        rates: The error rates.
        seconds: What transcribing took.
        seconds_cached: Of these, what an earlier run spent, whose result the cache had.
    """

    hypotheses: dict[str, list[str]] = field(default_factory=dict)
    rates: dict[str, ErrorRates] = field(default_factory=dict)
    seconds: float = 0.0
    seconds_cached: float = 0.0


def evaluate_model(
    speech: SpeechModel,
    called: str,
    evaluation: Mapping[str, list[Utterance]],
    how: Normalization,
    identity: dict[str, Any],
    console: Console,
    *,
    enabled: bool,
) -> Evaluation:
    """Evaluate a model on every set; each set's hypotheses are kept for themselves. An encoder writes none.

    Args:
        speech: The model and its processor.
        called: Its name on the terminal.
        evaluation: Utterances with normalized transcripts, by the names of the sets.
        how: What they are normalized by.
        identity: From :func:`identity_of`, with the limit of the audio in a batch.
        console: The progress is shown there.
        enabled: Take results from the cache.
    """
    result = Evaluation()
    if not speech.writes:
        return result
    for name, utterances in evaluation.items():

        def make(folder: Path, name: str = name, utterances: list[Utterance] = utterances) -> None:
            with stage(console, f"Evaluating {called}{on_set(name, evaluation)}") as progress:
                started = time.perf_counter()
                limit = identity["seconds_per_batch"]
                hypotheses = transcribe(speech.model, speech.processor, utterances, limit, progress, how)
                seconds = time.perf_counter() - started
            (folder / "hypotheses.json").write_text(json.dumps({"hypotheses": hypotheses, "seconds": seconds}))

        own = identity | {"utterances": cache.utterances_fingerprint(utterances), "normalization": asdict(how)}
        folder, cached = cache.cached_folder("hypotheses", own, make, enabled=enabled)
        record = json.loads((folder / "hypotheses.json").read_text())
        result.hypotheses[name] = record["hypotheses"]
        result.rates[name] = error_rates(utterances, record["hypotheses"])
        result.seconds += record["seconds"]
        result.seconds_cached += record["seconds"] if cached else 0.0
    return result


def calibration_batches(config: Config, speech: SpeechModel, utterances: list[Utterance]) -> SpeechBatches:
    """Give batches of utterances, padded only where the model may see padding."""
    return SpeechBatches(utterances, speech.processor, config.seconds_per_batch, padding=takes_padding(speech.model))


def gather_hessians(
    config: Config,
    speech: SpeechModel,
    utterances: list[Utterance],
    batches: SpeechBatches,
    identity: dict[str, Any] | None,
    console: Console,
) -> tuple[Hessians, float, bool]:
    """Give Hessians, the seconds that summing them took when it was really done, and whether they were cached.

    Without an identity they are not kept.
    """

    sample = config.calibration.frames_per_column

    def gather() -> tuple[Hessians, float]:
        with stage(console, f"Calibrating on {len(utterances)} utterances") as progress:
            started = time.perf_counter()
            hessians = in_all_processes(
                collect_hessians,
                speech.model,
                batches,
                scope=config.reach,
                progress=progress,
                frames_per_column=sample,
                seed=config.seed,
            )
        cache.check_finite(hessians.by_input, "the Hessian")
        return hessians, time.perf_counter() - started

    def make(folder: Path) -> None:
        hessians, seconds = gather()
        cache.save_hessians(hessians, folder)
        (folder / "seconds.json").write_text(json.dumps(seconds))

    if identity is None:
        return *gather(), False
    identity = identity | {"utterances": cache.utterances_fingerprint(utterances), "scope": config.reach}
    if sample is not None:
        identity |= {"frames_per_column": sample, "seed": config.seed}
    folder, cached = cache.cached_folder("hessians", identity, make, enabled=config.cache)
    return (
        cache.load_hessians(folder, speech.model.device),
        json.loads((folder / "seconds.json").read_text()),
        cached,
    )


def gather_traces(
    config: Config,
    speech: SpeechModel,
    utterances: list[Utterance],
    identity: dict[str, Any] | None,
    console: Console,
) -> tuple[dict[str, Trace] | None, float, bool]:
    """Give traces, if the allocation asks for them; seconds and cached as in :func:`gather_hessians`."""
    allocation = config.allocation
    if not isinstance(allocation, Traced):
        return None, 0.0, False
    utterances = utterances[: allocation.utterances]

    def estimate() -> tuple[dict[str, Trace], float]:
        with stage(console, f"Estimating sensitivities on {len(utterances)} utterances") as progress:
            started = time.perf_counter()
            batches = calibration_batches(config, speech, utterances)
            settings = config.pruning(config.sparsity.fraction)
            traces = in_all_processes(traces_of, speech.model, batches, settings=settings, progress=progress)
        cache.check_finite({name: trace.value for name, trace in traces.items()}, "the trace")
        return traces, time.perf_counter() - started

    def make(folder: Path) -> None:
        traces, seconds = estimate()
        record = {"traces": {name: asdict(trace) for name, trace in traces.items()}, "seconds": seconds}
        (folder / "traces.json").write_text(json.dumps(record))

    if identity is None:
        return *estimate(), False
    identity = identity | {
        "utterances": cache.utterances_fingerprint(utterances),
        "settings": {item.name: getattr(allocation, item.name) for item in fields(Traced) if item.init},
        "scope": config.scope,
        "seed": config.seed,
    }
    folder, cached = cache.cached_folder("traces", identity, make, enabled=config.cache)
    record = json.loads((folder / "traces.json").read_text())
    traces = {name: Trace(**trace) for name, trace in record["traces"].items()}
    cache.check_finite({name: trace.value for name, trace in traces.items()}, f"the trace in {folder}")
    return traces, record["seconds"], cached


def gather_latency(config: Config, speech: SpeechModel, console: Console) -> Timed | None:
    """Time the dense model and its parts, or read what was timed on this machine; None where no speed is asked for."""
    asked = config.sparsity
    if not isinstance(asked, Structured) or asked.speedup is None:
        return None
    with stage(console, f"Timing the model and its parts in {asked.runtime}") as progress:
        table, source = latency_table(speech.model, asked, enabled=config.cache, progress=progress)
    where = "measured on this machine now" if source is None else f"read from {source}"
    print_note(f"latencies {where}: {table.conditions}; the whole model takes {table.total / 1e9:.4g} s")
    return Timed(Shape.of(speech.model), table, source)
