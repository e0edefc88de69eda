"""Training a dense CTC model from nothing: the shipped demo model, or a model of any corpus."""

import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import pandas
import torch
from huggingface_hub.errors import StrictDataclassError
from rich.console import Console
from transformers import (
    AutoConfig,
    AutoModelForCTC,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Processor,
    set_seed,
)

from sparsewav import records
from sparsewav.config import TrainConfig
from sparsewav.data.batches import check_transcripts
from sparsewav.data.sets import evaluation_set, whole_subset
from sparsewav.errors import UserError
from sparsewav.evaluation import transcribe, word_error_rate
from sparsewav.files import make_readable, write_file
from sparsewav.finetune.trainer import train_ctc
from sparsewav.models import choose_device, load_speech_model
from sparsewav.pruning.encoder import check_family, prunable_matrices

LETTERS = "ETAONIHSRDLUMWCFGYPBVK'XJQZ"
"""The letters of English in wav2vec 2.0's order; its vocabulary has 32 tokens."""


def english_processor(folder: Path) -> Wav2Vec2Processor:
    """Make the processor of wav2vec 2.0's English models: 16 kHz, upper-case letters."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = ["<pad>", "<s>", "</s>", "<unk>", "|", *LETTERS]
    vocabulary = folder / "vocab.json"
    vocabulary.write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    return Wav2Vec2Processor(
        Wav2Vec2FeatureExtractor(return_attention_mask=True), Wav2Vec2CTCTokenizer(str(vocabulary))
    )


def train(config: TrainConfig, folder: Path, console: Console) -> None:
    """Train, save in float16, and measure the word error rate of what was saved.

    The folder gets the model and processor, ``training_log.csv`` (epoch, step, loss, learning rate, WER of the
    development subset) and ``training.json`` (settings, seconds, WER of the evaluation subset).

    Raises:
        UserError: the data or the architecture is wrong.
    """
    done = folder / "training.json"
    if done.is_file():
        console.print(f"Done already: {folder} (delete it to train again)")
        return
    device = choose_device(config.device)
    training_set = whole_subset(config.data, config.data.training_subset)
    development_set = whole_subset(config.data, config.data.development_subset)
    evaluation = evaluation_set(config.data)
    checkpoints = folder / "checkpoints"
    processor = english_processor(checkpoints)
    for utterances in (training_set, development_set, evaluation):
        check_transcripts(utterances, processor)
    architecture = dict(config.architecture)
    model_type = str(architecture.pop("model_type", None))
    check_family(model_type, "architecture")
    set_seed(config.training.seed)
    try:
        model = AutoModelForCTC.from_config(
            AutoConfig.for_model(model_type, **architecture, vocab_size=len(processor.tokenizer), pad_token_id=0)
        )
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise UserError(f"the architecture makes no model: {' '.join(str(error).split())}") from error
    parameters = sum(parameter.numel() for parameter in model.parameters())
    prunable = sum(matrix.size for matrix in prunable_matrices(model))
    console.print(f"{parameters:,} parameters, {prunable:,} prunable; {len(training_set):,} training utterances")
    started = time.perf_counter()
    log = train_ctc(
        model, processor, training_set, development_set, config.training, checkpoints, use_cpu=device.type == "cpu"
    )
    seconds = time.perf_counter() - started
    model.to("cpu", torch.float16).save_pretrained(folder)
    processor.save_pretrained(folder)
    make_readable(folder)
    saved = load_speech_model(str(folder))  # the one in memory is still wrapped to compute in bfloat16
    wer = {
        name: word_error_rate(utterances, transcribe(saved.model, saved.processor, utterances))
        for name, utterances in (("development", development_set), ("evaluation", evaluation))
    }
    with write_file(folder / "training_log.csv") as temporary:
        columns = ["epoch", "step", "loss", "learning_rate", "grad_norm", "eval_wer"]
        pandas.DataFrame(log).reindex(columns=columns).dropna(subset=["loss", "eval_wer"], how="all").to_csv(
            temporary, index=False
        )
    records.write_json(
        done,
        {
            "wer": wer,
            "n_utterances": {
                "training": len(training_set),
                "development": len(development_set),
                "evaluation": len(evaluation),
            },
            "parameters": parameters,
            "prunable": prunable,
            "seconds": seconds,
            "settings": asdict(config.training),
            **records.environment(device),
        },
    )
    shutil.rmtree(checkpoints)
    console.print(f"WER {100 * wer['evaluation']:.2f} % after {seconds / 60:.0f} minutes; the model is in {folder}")
