"""The steps of a run: each leaves a model and what is known after it, from which a killed run goes on."""

import json
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from sparsewav.data.text import Normalization
from sparsewav.data.utterances import Utterance
from sparsewav.errors import UserError
from sparsewav.files import checksums, damage, write_file
from sparsewav.inference.representations import hidden_state_divergence
from sparsewav.inference.wer import error_rates, transcribe
from sparsewav.models.bitmask import export
from sparsewav.models.load import SpeechModel, load_speech_model
from sparsewav.pipeline import run_folder
from sparsewav.pipeline.model_card import CARD, make_card
from sparsewav.pipeline.utterances import on_set
from sparsewav.progress import print_warning, stage
from sparsewav.settings.baselines import OURS
from sparsewav.settings.run import Config

EVALUATED = {
    "prune": "pruned",
    "recover": "recovered",
    "compress": "compressed",
    "finetune": "tuned",
    "quantize": "rounded",
}
"""The kinds of steps, and what the model is after each. A baseline has ``compress`` where ours has ``prune``; only a
model that was tuned is rounded by a step of its own."""


@dataclass
class State:
    """What is known after a step of a run; it is written beside the model that the step made.

    Attributes:
        identity: A hash of all that the step's model came from.
        steps: The number of steps done.
        stages: A record of every stage with its sparsity, word error rates and updates.
        evaluation: A record of every evaluation set: its name, utterances and overlap with the sets that the model is
            made from, and the error rates of the dense, the pruned and the newest model.
        hypotheses: The newest model's hypotheses by the names of the evaluation sets; None until it is evaluated.
        divergences: Of an encoder without a head, the divergence of every utterance, by the names of the sets.
        seconds: Seconds by kind of work, over all stages.
        cached: Of the seconds, those of the first stage that were spent by an earlier run, whose results the cache
            had, by kind of work.
        warnings: Sentences for the user.
        log: The entries of the fine-tuning's trainer, over all stages.
        recovery_log: Those of the recovery of the whole model.
        compression: What a baseline reports of its compression; empty for ours.
        latency: How long the dense model and its parts took when the run began; empty where no speed is asked for.
        files: Hashes of the files of the step's model, by which damage is noticed.
    """

    identity: str
    steps: int = 0
    stages: list[dict[str, Any]] = field(default_factory=list)
    evaluation: list[dict[str, Any]] = field(default_factory=list)
    hypotheses: dict[str, list[str]] | None = None
    divergences: dict[str, list[float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("calibrate", "allocate", "solve", "finetune", "evaluate"), 0.0)
    )
    cached: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    log: list[dict[str, Any]] = field(default_factory=list)
    recovery_log: list[dict[str, Any]] = field(default_factory=list)
    compression: dict[str, Any] = field(default_factory=dict)
    latency: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)


def newest_step(folder: Path, identity: str) -> tuple[State, Path] | None:
    """Give what a killed launch got to, if it came from these very settings, model, data and code, and is whole."""
    found = []
    steps = [
        path / run_folder.STEP for path in (folder / run_folder.MODEL, *(folder / run_folder.STAGES).glob("[0-9]*"))
    ]
    for path in steps:
        if path.is_file():
            try:
                found.append((State(**json.loads(path.read_text())), path.parent))
            except (OSError, ValueError, TypeError):
                print_warning(f"{path} is damaged; going on from the step before it")
    ours = [(state, path) for state, path in found if state.identity == identity]
    for state, path in sorted(ours, key=lambda item: item[0].steps, reverse=True):
        damaged = damage(path, state.files)
        if damaged is None:
            return state, path
        print_warning(f"{path / damaged} is damaged; going on from the step before it")
    if len(ours) < len(found):
        print_warning("an earlier, interrupted launch had other data, another model or other code; starting over")
    return None


def write_step(step_folder: Path, speech: SpeechModel, state: State) -> None:
    """Write the model of a step and the state after it."""
    with run_folder.write_model(step_folder, speech.model, speech.processor) as temporary:
        state.files = checksums(temporary)
        (temporary / run_folder.STEP).write_text(json.dumps(asdict(state)))


def evaluate_step(
    config: Config,
    speech: SpeechModel,
    evaluation: Mapping[str, list[Utterance]],
    how: Normalization,
    kind: str,
    state: State,
    step_folder: Path,
    console: Console,
) -> None:
    """Add the newest model's error rates to the records of the sets and of its stage, on disk, too."""
    if not speech.writes:
        _compare_encoders(config, speech, evaluation, state, console)
        run_folder.write_json(step_folder / run_folder.STEP, asdict(state))
        return
    hypotheses = {}
    for record in state.evaluation:
        name = record["name"]
        with stage(console, f"Evaluating the {EVALUATED[kind]} model{on_set(name, evaluation)}") as progress:
            started = time.perf_counter()
            hypotheses[name] = transcribe(
                speech.model, speech.processor, evaluation[name], config.seconds_per_batch, progress, how
            )
            state.seconds["evaluate"] += time.perf_counter() - started
        rates = asdict(error_rates(evaluation[name], hypotheses[name]))
        smaller = kind in ("prune", "recover", "compress")
        record |= rates | ({f"{key}_pruned": rate for key, rate in rates.items()} if smaller else {})
    state.hypotheses = hypotheses
    first = state.evaluation[0]
    if kind != "quantize":  # which belongs to no stage
        state.stages[-1] |= {key: first[key] for key in ("wer_pruned", "wer", "cer_pruned", "cer")}
    run_folder.write_json(step_folder / run_folder.STEP, asdict(state))


def _compare_encoders(
    config: Config, speech: SpeechModel, evaluation: Mapping[str, list[Utterance]], state: State, console: Console
) -> None:
    """Add the divergence of the newest encoder's hidden states from the dense one's to the records of the sets."""
    with stage(console, f"Loading {config.model.source} again"):
        dense = load_speech_model(str(speech.folder), device=speech.model.device).model
    for record in state.evaluation:
        name = record["name"]
        with stage(console, f"Comparing hidden states with the dense encoder's{on_set(name, evaluation)}") as progress:
            started = time.perf_counter()
            divergence = hidden_state_divergence(
                dense, speech.model, speech.processor, evaluation[name], config.seconds_per_batch, progress
            )
            state.seconds["evaluate"] += time.perf_counter() - started
        record |= {"divergence": divergence.relative_error, "layers": [asdict(layer) for layer in divergence.layers]}
        state.divergences[name] = divergence.utterances
    state.hypotheses = {}
    state.stages[-1] |= {"divergence": state.evaluation[0]["divergence"]}


def finish_folder(config: Config, folder: Path, metrics: dict[str, Any]) -> None:
    """Write the model's card, and the model in the format that is asked for, and delete what a done run does not need.

    The model that an earlier launch kept stays, whatever ``save_model`` is now.
    """
    shutil.rmtree(folder / run_folder.STAGES, ignore_errors=True)
    model = folder / run_folder.MODEL
    unfinished = (model / run_folder.STEP).is_file()
    if unfinished:
        with write_file(model / CARD) as temporary:
            temporary.write_text(make_card(metrics), encoding="utf-8")
        (model / run_folder.STEP).unlink()
    exported = run_folder.export_folder(folder, config.weights_format, config.export.dtype)
    if exported and not exported.exists():
        export(model, exported, config.weights_format, config.export.dtype)
    if unfinished and not config.save_model:
        shutil.rmtree(model, ignore_errors=True)


def clear(folder: Path) -> None:
    """Delete what an earlier run left in a folder, so that nothing of it lies beside the results of the next."""
    for path in [folder / run_folder.STAGES, *run_folder.model_folders(folder)]:
        shutil.rmtree(path, ignore_errors=True)
    logs = (run_folder.TRAINING_LOG, run_folder.RECOVERY_LOG, run_folder.COMPRESSION_LOG)
    names = (run_folder.METRICS, run_folder.PREDICTIONS, run_folder.LEFT_OUT, *logs)
    for path in [*(folder / name for name in names), *folder.glob("layers*.csv")]:
        if path.is_file():
            path.unlink()


def refuse_to_replace(folder: Path, source: Path | None) -> None:
    """Refuse a folder where a run would replace what no run wrote, or the model that it reads.

    Raises:
        UserError: It names what would be replaced.
    """
    finished = any(
        (folder / name).is_file() for name in (run_folder.METRICS, run_folder.PREDICTIONS, run_folder.LAYERS)
    )
    for path in run_folder.model_folders(folder):
        if source is not None and source.resolve().is_relative_to(path.resolve()):
            raise UserError(f"{folder} holds the model that is to be pruned, {source}; choose another folder")
        if path.exists() and not finished and not (path / run_folder.STEP).is_file():
            raise UserError(f"{path} was not written by a run and would be replaced; choose another folder, or move it")
    stages = folder / run_folder.STAGES
    ours = re.compile(r"\d+-|checkpoints-|offloaded|inputs\.json|\.")
    strangers = [path for path in stages.glob("*") if not ours.match(path.name)]
    if strangers:
        raise UserError(f"{strangers[0]} was not written by a run and would be deleted; choose another folder")


def missing(config: Config, folder: Path) -> Path | None:
    """Give what a finished run was to leave, and neither is there nor can be made from what is."""
    tables = [run_folder.PREDICTIONS, *([run_folder.LAYERS] if config.method.name == OURS else [])]
    if gone := [folder / name for name in tables if not (folder / name).is_file()]:
        return gone[0]
    model = folder / run_folder.MODEL
    if any(model.glob("*.safetensors")):
        return None
    exported = run_folder.export_folder(folder, config.weights_format, config.export.dtype)
    if config.save_model:
        return model
    return exported if exported and not exported.is_dir() else None
