"""One run: load, evaluate, then calibrate, allocate, solve and tune at every stage, evaluate, save and record.

Where the model is tuned, which takes weights off their grid, or heads and units are cut out of it, its weights are
rounded after the last stage. A baseline has its own compression in the place of calibrating, allocating and solving.
"""

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from sparsewav import cache
from sparsewav.data.sets import Sets
from sparsewav.data.utterances import Utterance
from sparsewav.errors import UserError
from sparsewav.files import damage, locked, remove_leftovers
from sparsewav.inference.latency import Timed
from sparsewav.inference.speedup import check_runtime
from sparsewav.inference.wer import unspaced
from sparsewav.models import hub
from sparsewav.models.checkpoint import Checkpoint
from sparsewav.models.load import SpeechModel, choose_device, load_speech_model
from sparsewav.pipeline import compress, inputs, model_card, run_folder
from sparsewav.pipeline.resume import (
    State,
    clear,
    evaluate_step,
    finish_folder,
    missing,
    newest_step,
    refuse_to_replace,
    write_step,
)
from sparsewav.pipeline.shared_statistics import (
    Evaluation,
    evaluate_model,
    gather_latency,
    identity_of,
)
from sparsewav.pipeline.steps import prune_step, quantize_step, recover_step, time_step, tune_step
from sparsewav.pipeline.utterances import choose_utterances, leave_unlabelled, on_set
from sparsewav.progress import collect_warnings, print_note, print_warning, reporting, stage
from sparsewav.pruning import distributed
from sparsewav.pruning.allocation.allocate import check_allocation
from sparsewav.pruning.allocation.budget import byte_budget
from sparsewav.pruning.allocation.latency import LatencyTable
from sparsewav.pruning.allocation.parts import part_budget
from sparsewav.pruning.encoding import file_bytes
from sparsewav.pruning.macs import multiply_accumulates, silence
from sparsewav.settings.baselines import OURS
from sparsewav.settings.pruning import Megabytes, Structured
from sparsewav.settings.run import Config
from sparsewav.settings.sparsity import COUNTED
from sparsewav.training.precision import choose_precision
from sparsewav.training.recipes import load_or_train, present_folder
from sparsewav.training.schedule import plan_stages, too_short
from sparsewav.training.trainer import write_training_log

OTHER_SETTINGS = "choose another folder, or force=true to replace this one"

TRAINED = ("compress", "recover", "finetune")
"""The steps that train the model."""

USELESS = 0.8
"""Above this word error rate a dense model does not recognise the speech that it is given."""


def run(
    config: Config,
    folder: Path,
    console: Console,
    *,
    starts: Callable[[], None] = lambda: None,
    begin: Callable[[], None] = lambda: None,
    wait: bool = True,
) -> dict[str, Any]:
    """Run a configuration, or find it done; if the content of its model or data has changed, it is done again.

    Args:
        config: A configuration that was checked.
        folder: The run's own folder; :mod:`sparsewav.pipeline.run_folder` describes what it holds.
        console: The progress is shown there.
        starts: Called when there is work to do, before the model is loaded; not where the run is done already.
        begin: Called later, before anything in the folder is changed.
        wait: Whether to wait for another process that is on this run.

    Returns:
        The run's metrics, as in ``metrics.json``.

    Raises:
        UserError: Something is wrong with the configuration, the model or the data.
        Held: Another process is on this run, and ``wait`` is false.
    """
    # Another launcher of the sweep may be on this run, or a process that a killed launch left behind.
    with locked(folder.with_name(f".{folder.name}.lock"), wait=wait), collect_warnings() as warnings:
        remove_leftovers(folder, folder.parent)
        return _run(config, folder, console, starts, begin, warnings)


def _run(
    config: Config,
    folder: Path,
    console: Console,
    starts: Callable[[], None],
    begin: Callable[[], None],
    warnings: list[str],
) -> dict[str, Any]:
    sets = Sets(config.data)
    if (folder / run_folder.METRICS).is_file() and not config.force:
        metrics = _find_done(config, sets, folder, console)
        if metrics is not None:
            return metrics
    starts()
    named = config.model
    refuse_to_replace(folder, None if named.fairseq_checkpoint else present_folder(named.name_or_path, named.revision))
    device = choose_device(config.device)
    ours = config.method.name == OURS
    if config.model.offload:
        _check_offload(config)
    if not ours:
        compress.check(config)
    elif isinstance(config.sparsity, Structured):
        check_runtime(config.sparsity)
    with stage(console, f"Loading {config.model.source}"):
        speech = load_or_train(config.model, device)
    for warning in speech.warnings:
        print_warning(warning)
    params_dense, _ = run_folder.count_parameters(speech.model)
    timed: Timed | None = None
    if ours and isinstance(config.sparsity, Structured):
        timed = gather_latency(config, speech, console)
        part_budget(speech.model, config.sparsity, timed.table if timed else None)  # refuses what is out of reach
    sets.needs_text = speech.writes
    leave_unlabelled(config, sets)
    if not speech.writes:
        _check_encoder(config, speech)
    if ours:
        byte_budget(speech.model, config)  # a hopeless one is refused before anything is measured
    with reporting("Reading and hashing model and utterances", console):
        chosen = choose_utterances(config, sets, speech)
        origin = model_card.provenance(config, speech)
        made_from = inputs.of_run(config, sets, origin["commit"])
    for sentence in [*sets.recognised(), *chosen.assumed]:
        print_note(sentence)
    started_from = folder / run_folder.STAGES / run_folder.INPUTS
    if not config.force:
        _refuse_interrupted(started_from, made_from, folder)
    evaluation, calibration, training, how = chosen.evaluation, chosen.calibration, chosen.training, chosen.how
    for note in chosen.notes:
        print_warning(note)
    dense = identity_of(speech, config.seconds_per_batch)  # of the dense model, before anything changes it
    before = evaluate_model(speech, "the dense model", evaluation, how, dense, console, enabled=config.cache)
    for name, rates in before.rates.items():
        characters = unspaced([utterance.text for utterance in evaluation[name]])
        kind, rate = ("character", rates.cer) if characters else ("word", rates.wer)
        if rate > USELESS:
            print_warning(
                f"the dense model's {kind} error rate{on_set(name, evaluation)} is {100 * rate:.0f} %: check its "
                "tokenizer, sampling rate and language, and that its CTC head was trained, before you trust what "
                "pruning does to it"
            )
    stages = plan_stages(config, len(training))
    for warning in too_short(config.training, stages, len(training)):
        print_warning(warning)
    state = State(
        _run_identity(made_from, dense, *evaluation.values(), calibration, chosen.recovery, training),
        evaluation=[
            {"name": name, "n_utterances": len(utterances), "overlap": chosen.overlap[name]}
            | dict.fromkeys(run_folder.RATES)  # what an encoder has none of
            | ({f"{key}_dense": rate for key, rate in asdict(before.rates[name]).items()} if speech.writes else {})
            for name, utterances in evaluation.items()
        ],
        latency=timed.table.record() if timed else {},
    )
    smaller = "prune" if ours else "compress"
    steps = [
        (kind, item)
        for item in stages
        for kind, wanted in ((smaller, True), ("recover", config.recovers_globally), ("finetune", item.updates > 0))
        if wanted
    ]
    tunes = any(item.updates for item in stages)
    cuts = ours and isinstance(config.sparsity, Structured)
    later = (
        tunes or cuts or config.recovers_globally
    )  # weights are rounded in the shapes that they end with, once no more is learned
    if later and config.quantization.name != "none":
        steps.append(("quantize", stages[-1]))
    done = None if config.force else newest_step(folder, state.identity)
    begin()
    (folder / run_folder.ERROR).unlink(missing_ok=True)
    if done is None:
        clear(folder)
        run_folder.write_json(started_from, made_from)
        if broken := sets.broken():
            run_folder.write_table(folder / run_folder.LEFT_OUT, broken)
    else:
        state, step_folder = done
        console.print(f"Going on from {step_folder.name}, which an earlier, interrupted launch left")
        speech.model = load_speech_model(str(step_folder), device=device).model
        if timed:  # all stages share the first one's latencies
            timed = replace(timed, table=LatencyTable.of_record(state.latency))
        if state.hypotheses is None:
            evaluate_step(config, speech, evaluation, how, steps[state.steps - 1][0], state, step_folder, console)
    for number, (kind, item) in enumerate(steps):
        if number < state.steps:
            continue
        last = number == len(steps) - 1
        step_folder = folder / (run_folder.MODEL if last else f"{run_folder.STAGES}/{number}-{kind}-{item.sparsity:g}")
        checkpoints = folder / run_folder.STAGES / f"checkpoints-{number}-{state.identity[:8]}"
        if kind == "prune":
            prune_step(
                *(config, speech, calibration, item.sparsity, dense, state, folder, console),
                rounds=not later,
                timed=timed,
            )
        elif kind == "recover":
            recover_step(config, speech, chosen.recovery, item, checkpoints, state, folder, console)
        elif kind == "quantize":
            quantize_step(config, speech, calibration, state, folder, console)
        elif kind == "compress":
            compress.compress(config, speech, training, state, checkpoints, console)
        else:
            tune_step(config, speech, training, item, checkpoints, state, folder, console)
        state.steps, state.hypotheses = number + 1, None
        write_step(step_folder, speech, state)
        if kind in TRAINED:  # Accelerate's autocast stays around its model: go on with the saved one
            speech.model = load_speech_model(str(step_folder), device=device).model
        evaluate_step(config, speech, evaluation, how, kind, state, step_folder, console)
    speed = time_step(config, speech, timed, console) if timed else dict.fromkeys(run_folder.SPEED)
    replayed = state.cached | ({"evaluate": before.seconds_cached} if before.seconds_cached else {})
    about = {
        "params_dense": params_dense,
        "n_calibration_utterances": len(calibration),
        "text": how.record(),
        "seconds_cached": replayed,
        "warnings": list(dict.fromkeys([*warnings, *state.warnings])),
        "left_out": sets.counts(),
        "inputs": made_from,
        "provenance": origin,
        "model_files": state.files,
        **speed,
    }
    return _finish(config, folder, speech, state, evaluation, before, about)


def _find_done(config: Config, sets: Sets, folder: Path, console: Console) -> dict[str, Any] | None:
    """Give the metrics of a finished run; None, after a warning, if it was made from something else or is damaged.

    Raises:
        UserError: The folder, which the user has named, was made with other settings.
    """
    tell = partial(print_warning, log=False)  # the log is that of the finished run until the next one begins
    try:
        metrics = run_folder.read_metrics(folder)
    except UserError as error:
        tell(f"{str(error).removesuffix('; do the run again')}; doing it again")
        return None
    before = metrics.get("inputs")
    if not isinstance(before, dict) or not all(isinstance(before.get(key), dict) for key in ("settings", "content")):
        tell(f"{folder / run_folder.METRICS} does not say what the run was made from; doing it again")
        return None
    sets.needs_text = metrics.get("divergence") is None  # otherwise it was of an encoder
    leave_unlabelled(config, sets)
    now = inputs.of_run(config, sets, _newest_commit(config, metrics))
    inputs.refuse_other_settings(before, now, folder, OTHER_SETTINGS)
    if changed := inputs.changes(before, now, config.model.source):
        tell(f"{changed} changed since this run was made; doing it again")
        return None
    if gone := missing(config, folder):
        what = "has no weights" if gone.is_dir() else "is missing"
        tell(f"{gone} {what}; doing this run again")
        return None
    model = folder / run_folder.MODEL
    if model.is_dir() and (damaged := damage(model, metrics.get("model_files", {}), remember=True)):
        tell(f"{model / damaged} is not as this run wrote it; force=true writes it again")
    finish_folder(config, folder, metrics)  # it may have been killed right before
    (folder / run_folder.ERROR).unlink(missing_ok=True)
    code = "" if before.get("code") == now["code"] else "made by another version of the code; "
    console.print(f"Done already: {folder} ({code}force=true does it again)", soft_wrap=True)
    for part, reason in now["unread"].items():
        tell(f"the {part} could not be compared with what this run was made from: {reason}")
    return metrics


def _newest_commit(config: Config, metrics: dict[str, Any]) -> str | None:
    """Give the commit that the model of a finished run is at on the hub now; None where that is not known.

    Where it is another one than the run's, its files are fetched, because they may be the same.
    """
    before = metrics.get("provenance", {}).get("commit")
    commit = hub.newest_commit(config.model.name_or_path, config.model.revision) if before else None
    if commit not in (before, None):
        with suppress(UserError):  # what cannot be fetched cannot be compared, of which a line tells
            hub.fetch(config.model.name_or_path, commit)
    return commit


def _refuse_interrupted(started_from: Path, made_from: dict[str, Any], folder: Path) -> None:
    """Refuse a folder with an interrupted run of other settings, which the user has named."""
    try:
        before = json.loads(started_from.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # there is none, or it is damaged: it decides nothing but this
        return
    if isinstance(before, dict) and isinstance(before.get("settings"), dict):
        inputs.refuse_other_settings(before, made_from, folder, OTHER_SETTINGS)


def _finish(
    config: Config,
    folder: Path,
    speech: SpeechModel,
    state: State,
    evaluation: dict[str, list[Utterance]],
    before: Evaluation,
    about: dict[str, Any],
) -> dict[str, Any]:
    """Write what is left to write, ``metrics.json`` last; it gets ``about`` besides what is known here."""
    assert state.hypotheses is not None
    predictions = folder / run_folder.PREDICTIONS
    if speech.writes:
        run_folder.write_predictions(predictions, evaluation, before.hypotheses, state.hypotheses)
    else:
        run_folder.write_divergences(predictions, evaluation, state.divergences)
    for name, log in ((run_folder.TRAINING_LOG, state.log), (run_folder.RECOVERY_LOG, state.recovery_log)):
        if log:
            write_training_log(folder / name, log)
    compression_log = state.compression.pop("log", [])
    if compression_log:
        run_folder.write_table(folder / run_folder.COMPRESSION_LOG, compression_log)
    device = speech.model.device
    ours = config.method.name == OURS
    pieces = ("calibrate", "allocate", "solve", "recover", "quantize", "compress")
    prune_seconds = sum(state.seconds.get(piece, 0.0) for piece in pieces)
    seconds = state.seconds | {"prune": prune_seconds, "evaluate": state.seconds["evaluate"] + before.seconds}
    total, nonzero = run_folder.count_parameters(speech.model)
    executed, nonzero_products = multiply_accumulates(speech.model, silence(speech.processor.feature_extractor))
    saved = Checkpoint(folder / run_folder.MODEL)
    first = state.evaluation[0]
    metrics = {
        "model": speech.name,
        "model_type": speech.model.config.model_type,
        "method": config.method.name,
        **{
            group: getattr(config, group).name if ours else None
            for group in ("saliency", "solver", "objective", "recovery", "quantization", "allocation")
        },
        **({} if config.uses_saliency else {"saliency": None}),
        "scope": config.reach if ours else config.scope,
        "finetune_strategy": config.finetune_strategy.name,
        "seed": config.seed,
        "pattern": str(config.sparsity) if config.sparsity.pattern else None,
        "target_sparsity": None if isinstance(config.sparsity, Structured) else config.sparsity.fraction,
        **{f"target_{key}": getattr(config.sparsity, key, None) for key in COUNTED},
        "target_megabytes": config.sparsity.megabytes if isinstance(config.sparsity, Megabytes) else None,
        "achieved_sparsity": state.stages[-1]["achieved_sparsity"],
        "achieved_share": state.stages[-1].get("share_left"),
        "bits": state.stages[-1].get("bits"),
        "params_total": total,
        "params_nonzero": nonzero,
        "bytes": file_bytes(saved.read(saved.files)),
        "macs_per_second": executed,
        "macs_per_second_nonzero": nonzero_products,
        **{key: first[key] for key in run_folder.RATES},
        "divergence": first.get("divergence"),
        "updates": sum(record["updates"] for record in state.stages),
        "training_precision": choose_precision(config.training.precision, speech.model, quietly=True)
        if state.log
        else None,
        "compression": None
        if ours
        else state.compression | {"update_divisor": config.update_divisor, "lr_multiplier": config.lr_multiplier},
        "stages": state.stages,
        "n_utterances": first["n_utterances"],
        "evaluation_overlap": first["overlap"],
        "evaluation": state.evaluation,
        "seconds": seconds,
        **about,
        "peak_memory_bytes": run_folder.peak_memory(device),
        "dtype": str(speech.model.dtype).removeprefix("torch."),
        **run_folder.environment(device),
    }
    run_folder.write_json(folder / run_folder.METRICS, metrics)
    finish_folder(config, folder, metrics)
    return metrics


def _run_identity(made_from: dict[str, Any], dense: dict[str, Any], *sets: list[Utterance]) -> str:
    """Hash what a run's models and hypotheses come from: settings, model, processor, code and sets of utterances."""
    dense = {key: value for key, value in dense.items() if key != "device"}
    parts = [made_from["settings"], dense, *map(cache.utterances_fingerprint, sets)]
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _check_encoder(config: Config, speech: SpeechModel) -> None:
    """Refuse at once what takes a CTC head.

    Raises:
        UserError: It names the option, and what an encoder can have.
    """
    called = f"{config.model.source} is an encoder without a CTC head"
    head = f"or train a head first with sparsewav-train initial_model={config.model.source}"
    if config.method.name != OURS:
        raise UserError(f"{called}, and method={config.method.name} learns recognition; choose method={OURS}, {head}")
    if config.finetune_strategy.name != "none":
        raise UserError(
            f"{called}, and finetune_strategy={config.finetune_strategy.name} tunes with the CTC loss; choose "
            f"finetune_strategy=none, {head}"
        )
    if config.model.offload:
        raise UserError(f"{called}, and model.offload=true reads CTC models alone; choose model.offload=false")
    check_allocation(speech.model, config.allocation)


def _check_offload(config: Config) -> None:
    """Refuse at once what pruning from disk cannot do."""
    if distributed.world() > 1:
        raise UserError("model.offload=true prunes in one process; start it without torchrun")
