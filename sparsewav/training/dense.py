"""Training a dense CTC model with random or given initial weights, for the demo or on any corpus."""

import json
import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from rich.console import Console
from rich.markup import escape
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
from sparsewav.data.sets import evaluation_set, find_overlap, left_out, training_set, whole_subset
from sparsewav.errors import UserError
from sparsewav.files import make_readable
from sparsewav.inference.wer import transcribe, word_error_rate
from sparsewav.models.load import choose_device, load_pretrained, load_speech_model, locate_model, take_over
from sparsewav.pipeline import run_folder
from sparsewav.progress import stage
from sparsewav.pruning.encoder import check_family, prunable_matrices
from sparsewav.settings.run import TrainConfig
from sparsewav.training.recipes import train_if_recipe
from sparsewav.training.trainer import choose_precision, train_ctc, updates_of, write_training_log

LETTERS = "ETAONIHSRDLUMWCFGYPBVK'XJQZ"
"""The letters of English in the order of wav2vec 2.0, whose vocabulary has 32 tokens."""


def english_processor(folder: Path) -> Wav2Vec2Processor:
    """Make the processor of wav2vec 2.0's English models: 16 kHz and upper-case letters."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = ["<pad>", "<s>", "</s>", "<unk>", "|", *LETTERS]
    vocabulary = folder / "vocab.json"
    vocabulary.write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    return Wav2Vec2Processor(
        Wav2Vec2FeatureExtractor(return_attention_mask=True), Wav2Vec2CTCTokenizer(str(vocabulary))
    )


def train(config: TrainConfig, folder: Path, console: Console) -> None:
    """Train a model, save it in float16, and measure the word error rate of the saved one.

    The folder gets the model and processor, ``training_log.csv`` (update, loss, learning rate, gradient norm, WER of
    the development subset) and ``training.json`` (settings, seconds, WER of both subsets). Under ``torchrun`` every
    process trains, and the first one writes.

    Raises:
        UserError: The data, the architecture or the initial model is wrong.
    """
    done = folder / "training.json"
    if done.is_file():
        console.print(f"Done already: {folder} (delete it to train again)")
        return
    device = choose_device(config.device)
    learning = training_set(config.data, config.training.seed)
    development = whole_subset(config.data, "development_subset")
    evaluation = evaluation_set(config.data)
    checkpoints = folder / "checkpoints"
    processor = english_processor(checkpoints)
    for utterances in (learning, development, evaluation):
        check_labels(utterances, processor)
    overlap, notes = {}, left_out(config.data, ["training_subset", "development_subset", "evaluation_subset"])
    for name, utterances in (("development", development), ("evaluation", evaluation)):
        overlap[name], found = find_overlap(config.data, utterances, {"training": learning}, name)
        notes += found
    for note in notes:
        console.print(f"[yellow]! {escape(note)}[/yellow]")
    set_seed(config.training.seed)
    model: Any = _initial_model(config, processor)
    for utterances in (learning, development, evaluation):
        check_lengths(utterances, model, processor, labels=utterances is learning)
    model.to(device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    prunable = sum(matrix.size for matrix in prunable_matrices(model))
    updates = updates_of(config.training.epochs, len(learning), config.training.batch_size)
    console.print(f"{parameters:,} parameters, {prunable:,} prunable; {len(learning):,} training utterances")
    started = time.perf_counter()
    with stage(console, f"Training for {updates:,} updates") as progress:
        arguments = (model, processor, learning, config.training, updates, checkpoints)
        log = train_ctc(*arguments, development_set=development, progress=progress)
    if int(os.environ.get("RANK", "0")):
        return
    seconds = time.perf_counter() - started
    model.to("cpu", torch.float16).save_pretrained(folder)
    processor.save_pretrained(folder)
    make_readable(folder)
    saved = load_speech_model(str(folder), device=device)  # Accelerate still wraps the one in memory
    with stage(console, "Evaluating the trained model"):
        wer = {
            name: word_error_rate(utterances, transcribe(saved.model, saved.processor, utterances))
            for name, utterances in (("development", development), ("evaluation", evaluation))
        }
    write_training_log(folder / "training_log.csv", log)
    record = {
        "wer": wer,
        "n_utterances": {"training": len(learning), "development": len(development), "evaluation": len(evaluation)},
        "training_overlap": overlap,
        "warnings": notes,
        "initial_model": config.initial_model,
        "parameters": parameters,
        "prunable": prunable,
        "updates": updates,
        "seconds": seconds,
        "settings": asdict(config.training),
        "training_precision": choose_precision(config.training.precision, device),
        **run_folder.environment(device),
    }
    run_folder.write_json(done, record)
    shutil.rmtree(checkpoints)
    console.print(f"WER {100 * wer['evaluation']:.2f} % after {seconds / 60:.0f} minutes; the model is in {folder}")


def _initial_model(config: TrainConfig, processor: Wav2Vec2Processor) -> PreTrainedModel:
    """Make a model with random weights, and copy the weights of the initial model that fit."""
    letters = {"vocab_size": len(processor.tokenizer), "pad_token_id": processor.tokenizer.pad_token_id}
    source = config.initial_model and locate_model(train_if_recipe(config.initial_model), "initial_model")
    try:
        if config.architecture:
            architecture = dict(config.architecture)
            model_type = str(architecture.pop("model_type", None))
            check_family(model_type, "architecture")
            settings: PretrainedConfig = AutoConfig.for_model(model_type, **architecture, **letters)
        else:
            assert source is not None
            assert config.initial_model is not None
            settings = AutoConfig.from_pretrained(source, **letters, ctc_zero_infinity=True, ctc_loss_reduction="mean")
            check_family(settings.model_type, config.initial_model)
        # Otherwise a checkpoint of half precision would set the precision.
        model = AutoModelForCTC.from_config(settings, dtype=torch.float32)
    except (OSError, ValueError, TypeError, KeyError, StrictDataclassError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"the architecture makes no model: {' '.join(str(error).split())}") from error
    if source is not None:
        taken = take_over(model, load_pretrained(source, torch.float32, "initial_model"))
        if not taken:
            raise UserError(f"initial_model={config.initial_model} has no parameter that fits the architecture")
    return model
