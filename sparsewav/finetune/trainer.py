"""CTC training on Hugging Face's Trainer."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    Wav2Vec2Processor,
)

from sparsewav.config import TrainingConfig
from sparsewav.data.batches import Batch, collate
from sparsewav.data.utterances import Utterance, audio_seconds
from sparsewav.evaluation import transcribe, word_error_rate


class _WordErrorRate(TrainerCallback):
    """Log the development set's WER after every epoch."""

    def __init__(self, processor: Wav2Vec2Processor, utterances: Sequence[Utterance]) -> None:
        self.processor = processor
        self.utterances = utterances
        self.trainer: Trainer | None = None

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        hypotheses = transcribe(kwargs["model"], self.processor, self.utterances)
        assert self.trainer is not None
        self.trainer.log({"eval_wer": word_error_rate(self.utterances, hypotheses)})


def train_ctc(
    model: PreTrainedModel,
    processor: Wav2Vec2Processor,
    training_set: Sequence[Utterance],
    development_set: Sequence[Utterance],
    settings: TrainingConfig,
    folder: Path,
    *,
    use_cpu: bool = False,
) -> list[dict[str, float]]:
    """Train a CTC model in place.

    Args:
        model: what to train; all of its parameters that require gradients.
        processor: its feature extractor and tokenizer.
        training_set: utterances to learn from.
        development_set: utterances whose WER is logged after every epoch; no choice is made on it.
        settings: schedule and seed.
        folder: where checkpoints go; a checkpoint found there is resumed.
        use_cpu: leave a GPU alone that is there.

    Returns:
        The log: one dictionary an entry, with epoch, step and loss or eval_wer.
    """
    rows = datasets.Dataset.from_dict(
        {
            "index": list(range(len(training_set))),
            "length": [audio_seconds(utterance) for utterance in training_set],
        }
    )
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        lr_scheduler_type=settings.scheduler,
        weight_decay=settings.weight_decay,
        bf16=settings.bf16,
        seed=settings.seed,
        use_cpu=use_cpu,
        train_sampling_strategy="group_by_length",
        length_column_name="length",
        remove_unused_columns=False,
        save_strategy="epoch",
        save_total_limit=1,
        logging_steps=50,
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
    )

    def read(batch: list[dict[str, int]]) -> Batch:
        return collate([training_set[row["index"]] for row in batch], processor)

    evaluation = _WordErrorRate(processor, development_set)
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=read, callbacks=[evaluation])
    evaluation.trainer = trainer
    trainer.train(resume_from_checkpoint=_last_checkpoint(folder))
    return list(trainer.state.log_history)


def _last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint; one that a killed training left half written is deleted."""
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    while checkpoints:
        newest = checkpoints.pop()
        try:
            json.loads((newest / "trainer_state.json").read_text())  # the Trainer writes it last
        except (OSError, ValueError):
            shutil.rmtree(newest)
        else:
            return str(newest)
    return None
