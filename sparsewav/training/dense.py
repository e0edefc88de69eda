"""Training a dense CTC model with random or given initial weights, for the demo or on any corpus."""

import json
import os
import shutil
import time
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from rich.console import Console
from transformers import (
    AutoConfig,
    AutoModelForCTC,
    PretrainedConfig,
    PreTrainedModel,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Processor,
    set_seed,
)

from sparsewav.data.batches import check_labels, check_lengths
from sparsewav.data.sets import Sets, find_overlap, refuse_unreadable
from sparsewav.data.text import choose_normalization, normalize, normalized
from sparsewav.data.utterances import Utterance
from sparsewav.errors import UserError
from sparsewav.files import locked, make_readable, remove_leftovers, writing
from sparsewav.inference.wer import error_rates, transcribe
from sparsewav.models import hub
from sparsewav.models.checkpoint import not_finite, some
from sparsewav.models.load import choose_device, find_model, load_pretrained, load_speech_model, take_over
from sparsewav.models.processor import Processor, agree_on_audio, agree_on_tokens, load_processor
from sparsewav.models.skeleton import HEADS
from sparsewav.pipeline import inputs, run_folder
from sparsewav.progress import print_note, print_warning, reporting, stage
from sparsewav.pruning.encoder import check_family, has_head, prunable_matrices
from sparsewav.pruning.families import ENCODERS
from sparsewav.settings.run import TrainConfig
from sparsewav.training.precision import choose_precision
from sparsewav.training.recipes import TRAINING, is_on_hub, train_if_recipe
from sparsewav.training.schedule import Stage, too_short
from sparsewav.training.trainer import Log, train_ctc, updates_of, write_training_log

LETTERS = "ETAONIHSRDLUMWCFGYPBVK'XJQZ"
"""The letters of English in the order of wav2vec 2.0, whose vocabulary has 32 tokens."""


def character_processor(folder: Path, texts: Iterable[str] = ()) -> Wav2Vec2Processor:
    """Make a processor of audio at 16 kHz whose tokens are the characters of transcripts, in any language.

    A letter with its accents is one character where Unicode has it (NFC). Transcripts in capital letters of English get
    the vocabulary of wav2vec 2.0's English models, even if they lack some letters.
    """
    letters = set(unicodedata.normalize("NFC", " ".join(texts))) - {"|"}
    letters = {letter for letter in letters if not letter.isspace()}
    tokens = ["<pad>", "<s>", "</s>", "<unk>", "|", *(LETTERS if letters <= {*LETTERS} else sorted(letters))]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = folder / "vocab.json"
    vocabulary.write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    return Wav2Vec2Processor(
        Wav2Vec2FeatureExtractor(return_attention_mask=True), Wav2Vec2CTCTokenizer(str(vocabulary))
    )


def train(config: TrainConfig, folder: Path, console: Console, begin: Callable[[], None] = lambda: None) -> None:
    """Train a model, save it in float16, and measure the word error rate of the saved one.

    The folder gets the model and processor, ``training_log.csv`` (update, epoch, loss, learning rate, gradient norm,
    WER of the development subset) and ``training.json`` (settings, seconds, WER of both subsets). Under ``torchrun``
    every process trains, and the first one writes.

    Args:
        config: What is trained, and how.
        folder: A new folder, or that of a killed training with the same settings, model and data, which goes on.
        console: The progress is shown there.
        begin: Called before anything in the folder is changed, and not where the training is done already.

    Raises:
        UserError: The data, the architecture or the initial model is wrong, the folder holds another training, or the
            training is not finite.
    """
    first = int(os.environ.get("RANK", "0")) == 0
    with locked(folder.with_name(f".{folder.name}.lock")) if first else nullcontext():
        _train(config, folder, console, begin, first)


def _train(config: TrainConfig, folder: Path, console: Console, begin: Callable[[], None], first: bool) -> None:
    done = folder / TRAINING
    checkpoints = folder / "checkpoints"
    started_from = checkpoints / "inputs.json"
    sets = Sets(config.data)
    if config.initial_model and is_on_hub(config.initial_model, "initial_model"):
        # Its main branch may have moved; a training that is done needs it for nothing but the comparison.
        with suppress(UserError) if done.is_file() else nullcontext():
            hub.fetch(config.initial_model, config.initial_revision, "initial_model")
    with reporting("Hashing the initial model and the utterances", console):
        made_from = inputs.of_training(config, sets)
    for path, key in ((done, "inputs"), (started_from, None)):
        if path.is_file():
            _refuse_another(path, key, made_from, config, folder)
    if not done.is_file() and not started_from.is_file():
        _refuse_to_replace(folder, checkpoints)
    if first:
        (folder / run_folder.ERROR).unlink(missing_ok=True)
    if done.is_file():
        if not any(folder.glob("*.safetensors")):
            raise UserError(f"{folder} has {TRAINING} and no weights any more; delete it to train again")
        if first:
            shutil.rmtree(checkpoints, ignore_errors=True)  # it may have been killed right before
        console.print(f"Done already: {folder} (delete it to train again)", soft_wrap=True)
        for part, reason in made_from["unread"].items():  # not in the log, which is that of the training
            print_warning(f"the {part} could not be compared with what was trained on: {reason}", log=False)
        return
    if first:
        remove_leftovers(folder, folder.parent)
    device = choose_device(config.device)
    learning, measured = sets.training(config.training.seed), _measured(sets)
    refuse_unreadable(chain(learning, *measured.values()))
    source = initial_commit = None
    if config.initial_model is not None:
        located = find_model(train_if_recipe(config.initial_model), "initial_model", config.initial_revision)
        source, initial_commit = str(located), hub.commit_of(located)
    initial = load_pretrained(source, torch.float32, "initial_model") if source else None
    kept = source if initial is not None and has_head(initial) and config.vocabulary == "initial_model" else None
    processor = load_processor(kept) if kept else _processor_of_transcripts(sets, source, checkpoints)
    overlap, notes = {}, sets.left_out()
    for name, utterances in measured.items():
        overlap[name], found = find_overlap(config.data, utterances, {"training": learning}, name)
        notes += found
    texts = (utterance.text for utterance in chain(learning, *measured.values()))
    how, assumed = choose_normalization(texts, processor.tokenizer, config.data.case, config.data.remove_characters)
    learning = normalized(learning, how)
    measured = {name: normalized(utterances, how) for name, utterances in measured.items()}
    check_labels([*learning, *chain(*measured.values())], processor, how)
    set_seed(config.training.seed)
    # The tokenizer of a model may name tokens behind its outputs.
    outputs = initial.config.vocab_size if kept and initial is not None else len(processor.tokenizer)
    letters = {"vocab_size": outputs, "pad_token_id": processor.tokenizer.pad_token_id}
    # The head of another vocabulary may have as many outputs, each for another letter.
    model: Any = _initial_model(config, source, initial, letters, console, without=() if kept else HEADS)
    for utterances in (learning, *measured.values()):
        check_lengths(utterances, model, processor, labels=utterances is learning)
    model.to(device)
    # Beside a group norm in the front end no program may use a mask; the saved settings say so.
    processor.feature_extractor.return_attention_mask = getattr(model.config, "feat_extract_norm", "layer") == "layer"
    called = f"initial_model={config.initial_model}"
    notes += [*agree_on_tokens(model, processor, called), *agree_on_audio(model, processor, called)]
    if first:
        begin()
        # Once more: the initial model of a recipe may have been trained only now.
        run_folder.write_json(started_from, inputs.of_training(config, sets))
        if lost := sets.broken():
            run_folder.write_table(folder / run_folder.LEFT_OUT, lost)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    prunable = sum(matrix.size for matrix in prunable_matrices(model))
    updates = updates_of(config.training.epochs, len(learning), config.training.batch_size)
    console.print(f"{parameters:,} parameters, {prunable:,} prunable; {len(learning):,} training utterances")
    for sentence in [*sets.recognised(), *assumed] if first else []:
        print_note(sentence)
    warnings = [*notes, *too_short(config.training, [Stage(0.0, updates)], len(learning))]
    for warning in warnings if first else []:
        print_warning(warning)
    started = time.perf_counter()

    def write_log(log: Log) -> None:
        write_training_log(folder / "training_log.csv", log)

    with writing(checkpoints), stage(console, f"Training for {updates:,} updates") as progress:
        arguments = (model, processor, learning, config.training, updates, checkpoints)
        log = train_ctc(
            *arguments, development_set=measured["development"], how=how, progress=progress, write_log=write_log
        )
    if not first:
        return
    seconds = time.perf_counter() - started
    model.to("cpu", torch.float16)
    if broken := not_finite(model.state_dict()):
        raise UserError(f"{broken} has numbers above 65,504, the largest of float16; lower training.learning_rate")
    with writing(folder):
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    make_readable(folder)
    saved = load_speech_model(str(folder), device=device)  # Accelerate still wraps the one in memory
    rates = {}
    for name, utterances in measured.items():
        with stage(console, f"Evaluating the trained model on the {name} set") as progress:
            hypotheses = transcribe(saved.model, saved.processor, utterances, progress=progress, how=how)
        rates[name] = error_rates(utterances, hypotheses)
    write_log(log)
    record = {
        "wer": {name: rate.wer for name, rate in rates.items()},
        "cer": {name: rate.cer for name, rate in rates.items()},
        "n_utterances": {name: len(utterances) for name, utterances in {"training": learning, **measured}.items()},
        "text": how.record(),
        "training_overlap": overlap,
        "left_out": sets.counts(),
        "initial_model": config.initial_model,
        "initial_commit": initial_commit,
        "parameters": parameters,
        "prunable": prunable,
        "updates": updates,
        "seconds": seconds,
        "warnings": warnings,
        "settings": asdict(config.training),
        "inputs": json.loads(started_from.read_text()),
        "training_precision": choose_precision(config.training.precision, saved.model, quietly=True),
        **run_folder.environment(device),
    }
    run_folder.write_json(done, record)
    shutil.rmtree(checkpoints)
    shown = ", ".join(
        f"{name} WER {100 * rate.wer:.2f} %, CER {100 * rate.cer:.2f} %"
        for name, rate in rates.items()
        if name != "development"
    )
    console.print(f"{shown} after {seconds / 60:.0f} minutes; the model is in {folder}")


def _measured(sets: Sets) -> dict[str, list[Utterance]]:
    """Give what the model is measured on: ``development``, and ``evaluation``, with a name for each of several."""
    found = sets.evaluation()
    evaluation = {
        "evaluation" if len(found) == 1 else f"evaluation {name}": utterances for name, utterances in found.items()
    }
    return {"development": sets.development(), **evaluation}


def _refuse_to_replace(folder: Path, checkpoints: Path) -> None:
    """Refuse a folder with a model, or with checkpoints, of something else than a training by this function.

    Raises:
        UserError: It names what would be replaced.
    """
    # A training that was refused before it began has left the vocabulary.
    found = [path for path in checkpoints.glob("*") if path.name != "vocab.json"]
    found += [path for name in ("config.json", "*.safetensors") for path in folder.glob(name)]
    if found:
        raise UserError(f"{found[0]} was not written by a training and would be replaced; choose another output=")


def _refuse_another(path: Path, key: str | None, made_from: dict[str, Any], config: TrainConfig, folder: Path) -> None:
    """Refuse a folder with a training of other settings, of another initial model or on other data.

    Raises:
        UserError: It says what differs.
    """
    remedy = f"choose another output=, or delete {folder} to train again"
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        before = before if key is None else before[key]
        inputs.refuse_other_settings(before, made_from, folder, remedy)
        changed = inputs.changes(before, made_from, config.initial_model)
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is damaged, or does not say what was trained; {remedy}") from error
    if changed:
        raise UserError(f"{changed} changed since {folder} was trained; {remedy}")


def _processor_of_transcripts(sets: Sets, source: str | None, folder: Path) -> Processor:
    """Make a processor with the characters of the whole training subset, also where a sample of it is learned.

    The feature extractor is that of the initial model, if it has one.
    """
    texts = [utterance.text for utterance in chain(*sets.read("training").values())]
    how, _ = choose_normalization(texts, None, sets.data.case, sets.data.remove_characters)
    processor = character_processor(folder, (normalize(text, how) for text in texts))
    if source is not None:
        with suppress(UserError):
            processor.feature_extractor = load_processor(source, has_head=False).feature_extractor
    return processor


def _initial_model(
    config: TrainConfig,
    source: str | None,
    initial: PreTrainedModel | None,
    letters: dict[str, int],
    console: Console,
    without: Sequence[str],
) -> PreTrainedModel:
    """Make a model with random weights and so many outputs, and copy the weights of the initial model that fit.

    Those whose names have a part that is in ``without`` are not copied.
    """
    try:
        if config.architecture:
            architecture = dict(config.architecture)
            model_type = str(architecture.pop("model_type", None))
            check_family(model_type, "architecture")
            settings: PretrainedConfig = AutoConfig.for_model(model_type, **architecture, **letters)
        else:
            assert source is not None
            assert config.initial_model is not None
            loss: dict[str, Any] = {**letters, "ctc_zero_infinity": True, "ctc_loss_reduction": "mean"}
            settings = AutoConfig.from_pretrained(source, **loss)
            if settings.model_type in ENCODERS:  # whose settings are a part of those of the model with a head
                encoder = AutoConfig.from_pretrained(source).to_dict()
                settings = AutoConfig.for_model(ENCODERS[settings.model_type], encoder_config=encoder, **loss)
            check_family(settings.model_type, config.initial_model)
        # Otherwise a checkpoint of half precision would set the precision.
        model = AutoModelForCTC.from_config(settings, dtype=torch.float32)
    except (OSError, ValueError, TypeError, KeyError, StrictDataclassError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"the architecture makes no model: {' '.join(str(error).split())}") from error
    if initial is not None:
        left = take_over(model, initial, without)
        if len(left) == len(model.state_dict()):
            raise UserError(f"initial_model={config.initial_model} has no parameter that fits the architecture")
        if left:
            console.print(
                f"[yellow]! {len(left)} of {len(model.state_dict())} tensors begin with random numbers, because "
                f"initial_model={config.initial_model} has none of their name, shape and vocabulary: {some(left)}"
                "[/yellow]"
            )
    return model
