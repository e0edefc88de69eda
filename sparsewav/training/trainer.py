"""Training on Hugging Face's Trainer: any module with a loss, and CTC models, dense or with masks."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import torch
from torch import Tensor, nn
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)

from sparsewav.data.batches import Batch, collate
from sparsewav.data.text import Normalization
from sparsewav.data.utterances import Utterance, audio_seconds
from sparsewav.errors import UserError
from sparsewav.files import write_file
from sparsewav.inference.wer import error_rates, transcribe
from sparsewav.models.checkpoint import not_finite
from sparsewav.models.processor import Processor
from sparsewav.pruning.encoder import freeze_front_end
from sparsewav.pruning.hessian import Progress
from sparsewav.settings.recovery import Global
from sparsewav.settings.training import Optimization, Training
from sparsewav.training.checkpoints import last_checkpoint
from sparsewav.training.finite_trainer import AfterUpdate, FiniteTrainer
from sparsewav.training.masks import HoldMasks, masked_gradients
from sparsewav.training.precision import choose_precision

logger = logging.getLogger(__name__)

BATCHES_SORTED_TOGETHER = 50
"""Within so many batches, utterances of similar lengths share a batch."""

LOG_COLUMNS = ["update", "epoch", "loss", "learning_rate", "grad_norm", "eval_loss", "eval_wer", "eval_cer"]

Log = list[dict[str, Any]]
"""What a training writes down as it goes: update, epoch and loss, or the development set's error rates."""

CHECKPOINTS = 10
"""So many checkpoints are written in a training by default, or more where they would be further apart than
:data:`CHECKPOINT_UPDATES`."""
CHECKPOINT_UPDATES = 500


def updates_of(epochs: float, utterances: int, batch_size: int) -> int:
    """Give the number of updates in so many epochs, at least one."""
    return max(1, math.ceil(epochs * utterances / batch_size - 1e-9))


def plan_updates(
    utterances: Sequence[Any],
    batch_size: int,
    updates: int,
    seed: int,
    seconds: Callable[[Any], float] = audio_seconds,
) -> list[Any]:
    """Draw the utterances of all updates at once, so that a resumed training sees the same ones.

    Every epoch takes each utterance once, in random order. Within :data:`BATCHES_SORTED_TOGETHER` batches, utterances
    of similar lengths share a batch.

    Returns:
        ``updates * batch_size`` utterances, update after update.
    """
    generator = np.random.default_rng(seed)
    count = updates * batch_size
    epochs = [generator.permutation(len(utterances)) for _ in range(-(-count // len(utterances)))]
    order = np.concatenate(epochs)[:count]
    lengths = {index: seconds(utterances[index]) for index in set(order.tolist())}
    plan: list[int] = []
    for start in range(0, count, BATCHES_SORTED_TOGETHER * batch_size):
        together = sorted(order[start : start + BATCHES_SORTED_TOGETHER * batch_size].tolist(), key=lengths.__getitem__)
        batches = [together[first : first + batch_size] for first in range(0, len(together), batch_size)]
        generator.shuffle(batches)
        plan += [index for batch in batches for index in batch]
    return [utterances[index] for index in plan]


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with a learning rate of their own.

    Attributes:
        parameters: Some of the parameters of the trained model.
        learning_rate: Peak of the schedule for them.
        ascend: Maximize the loss instead of minimizing it, as for a Lagrange multiplier.
    """

    parameters: Sequence[nn.Parameter]
    learning_rate: float
    ascend: bool = False


def train(
    model: nn.Module,
    read: Callable[[Sequence[Any]], Batch],
    training_set: Sequence[Any],
    settings: Optimization,
    updates: int,
    folder: Path,
    *,
    seed: int,
    frozen: Sequence[nn.Module] = (),
    seconds: Callable[[Any], float] = audio_seconds,
    held_back: Sequence[Any] = (),
    patience: float = 1.0,
    compare_from: int = 0,
    callbacks: Sequence[TrainerCallback] = (),
    after_update: Callable[[TrainerState], None] | None = None,
    parameter_groups: Sequence[ParameterGroup] = (),
    progress: Progress | None = None,
    write_log: Callable[[Log], None] | None = None,
) -> Log:
    """Train any module with a loss in place, on its device.

    Accelerate leaves its autocast around ``model.forward``, so that measurements should use a saved and loaded copy.
    Under ``torchrun`` the processes share every batch.

    Args:
        model: Module that takes a batch as keywords and returns an object with a ``loss``. Checkpoints hold its state
            dictionary, which should not include frozen parts such as a teacher.
        read: Turns the utterances of an update into a batch.
        training_set: Utterances to learn from, in any form that ``read`` and ``seconds`` take.
        settings: Schedule, precision and clipping.
        updates: Number of optimizer steps.
        folder: Where checkpoints are written. The newest complete one in it is resumed.
        seed: Seed of the order and of dropout.
        frozen: Models that the loss is computed with and that do not learn, such as a teacher; the precision has to
            suit them, too.
        seconds: Gives the length of an utterance, by which utterances are sorted into batches.
        held_back: Utterances that are not learned from. The log has the loss on them before the first update and at
            every checkpoint, and the model ends as it was at the checkpoint with the least.
        patience: The training stops after this share of the updates without a lower one.
        compare_from: Between the first update and this one the loss on them is not measured, and no checkpoint counts.
        callbacks: Further callbacks of the Trainer.
        after_update: Called with the state of the Trainer after every update.
        parameter_groups: Parameters with their own learning rates and without weight decay. All other parameters that
            take a gradient follow ``settings``.
        progress: Called with (updates done, updates) after every update.
        write_log: Called with the log so far whenever it grows.

    Returns:
        The log, a dictionary with update, epoch and loss for every entry.

    Raises:
        UserError: The precision does not fit the device, the processes cannot share the batch evenly, or a loss, a
            gradient or a weight is not finite; the last checkpoint before that stays.
    """
    device = next(model.parameters()).device
    precision = choose_precision(settings.precision, model, frozen, group=settings.group)
    plan = plan_updates(training_set, settings.batch_size, updates, seed, seconds)
    known = [*plan, *held_back]
    checkpoint = last_checkpoint(folder)
    every = settings.checkpoint_updates or min(CHECKPOINT_UPDATES, math.ceil(updates / CHECKPOINTS))
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=updates,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        learning_rate=settings.learning_rate,
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        adam_epsilon=settings.epsilon,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        warmup_steps=settings.warmup_steps if settings.warmup_steps < 1 else round(settings.warmup_steps),
        lr_scheduler_type=settings.scheduler,
        bf16=precision == "bfloat16",
        fp16=precision == "float16",
        seed=seed,
        use_cpu=device.type == "cpu",
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        save_steps=every,
        save_total_limit=1,  # besides the best one
        **(_keeping_the_best(every, starts=checkpoint is None, compare_from=compare_from) if held_back else {}),
        logging_steps=min(50, max(1, updates // 10)),
        logging_nan_inf_filter=False,  # it would hide what stops the training
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    if arguments.n_gpu > 1:
        # A process uses one GPU; otherwise the Trainer would use all it sees, with a batch for each.
        arguments._n_gpu = 1
    arguments.per_device_train_batch_size = _share_of_a_batch(settings, arguments.world_size)
    arguments.per_device_eval_batch_size = arguments.per_device_train_batch_size

    def log_of(state: TrainerState) -> Log:
        # The Trainer counts epochs of the whole plan, of which there is one.
        entries = [
            {"update": entry["step"], **entry, "epoch": entry["step"] * settings.batch_size / len(training_set)}
            for entry in state.log_history
        ]
        return [entry for entry in entries if {"loss", "eval_loss", "eval_wer"} & entry.keys()]

    def grow_log(state: TrainerState) -> None:
        newest = state.log_history[-1]
        if "loss" in newest and trainer.is_world_process_zero():  # there is none in the Trainer's summary at the end
            logger.info("update %d of %d: loss %.4g", state.global_step, updates, newest["loss"])
            if write_log:
                write_log(log_of(state))

    trainer = FiniteTrainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_dict({"index": range(len(plan))}),
        eval_dataset=datasets.Dataset.from_dict({"index": range(len(plan), len(known))}) if held_back else None,
        data_collator=lambda batch: read([known[row["index"]] for row in batch]),
        callbacks=[*callbacks, *([EarlyStoppingCallback(math.ceil(patience * updates / every))] if held_back else [])],
        optimizers=(_optimizer(model, settings, parameter_groups), None) if parameter_groups else (None, None),
    )

    def stop(loss: float, norm: float) -> None:
        done = trainer.state.global_step
        utterances = plan[done * settings.batch_size : (done + 1) * settings.batch_size]
        raise UserError(
            f"the training stopped at update {done + 1} of {updates}: "
            f"{_culprit(model, read, utterances, loss, norm, settings.group)}"
        )

    trainer.stop = stop
    trainer.add_callback(AfterUpdate(trainer, after_update, progress, grow_log))
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    # Otherwise the Trainer expects the model to divide the loss by the accumulation steps, which CTC models do not.
    trainer.model_accepts_loss_kwargs = False
    trainer.train(resume_from_checkpoint=checkpoint)
    if broken := not_finite(model.state_dict()):
        raise UserError(f"the training ended with numbers in {broken} that are not finite; lower the learning rate")
    return log_of(trainer.state)


def _culprit(
    model: nn.Module,
    read: Callable[[Sequence[Utterance]], Batch],
    utterances: Sequence[Utterance],
    loss: float,
    norm: float,
    key: str,
) -> str:
    """Say which weight or which of an update's utterances makes its loss or gradients not finite, and what to do."""
    if broken := not_finite(model.state_dict()):
        return f"{broken} has numbers that are not finite; lower {key}.learning_rate, or start from another model"
    device = next(model.parameters()).device
    model.eval()
    losses = {}
    for utterance in dict.fromkeys(utterances):  # one may end an epoch and begin the next
        with torch.no_grad():
            output: Any = model(**{name: tensor.to(device) for name, tensor in read([utterance]).items()})
        losses[utterance] = float(output["loss"])
    culprits = {item: alone for item, alone in losses.items() if not math.isfinite(alone)}
    if not culprits or len(culprits) == len(losses) > 1:
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the norm of the gradients is {norm}"
        return (
            f"{what} for the utterances {', '.join(item.id for item in losses)} together, and not finite for "
            f"{'each' if culprits else 'none'} of them alone; lower {key}.learning_rate, set {key}.precision=float32, "
            "or remove them"
        )
    named = ", ".join(f"{alone} for utterance {item.id} ({item.source})" for item, alone in culprits.items())
    if key == Global.group:
        return f"the loss is {named}; remove what is named, or lower {key}.learning_rate"
    return (
        f"the loss is {named}, as CTC's is where a transcript is longer than the recording has frames; remove or "
        "correct what is named, or set ctc_zero_infinity to true in the model's config.json to train on the others"
    )


def _optimizer(model: nn.Module, settings: Optimization, groups: Sequence[ParameterGroup]) -> torch.optim.Optimizer:
    """Make AdamW with the settings, and with the learning rates and directions of the groups."""
    apart = {id(parameter) for group in groups for parameter in group.parameters}
    rest = [item for item in model.parameters() if item.requires_grad and id(item) not in apart]
    options: list[dict[str, Any]] = [
        {"params": list(group.parameters), "lr": group.learning_rate, "maximize": group.ascend, "weight_decay": 0.0}
        for group in groups
    ]
    if rest:
        options.insert(0, {"params": rest})
    return torch.optim.AdamW(
        options,
        lr=settings.learning_rate,
        betas=(settings.betas[0], settings.betas[1]),
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
    )


def train_ctc(
    model: PreTrainedModel,
    processor: Processor,
    training_set: Sequence[Utterance],
    settings: Training,
    updates: int,
    folder: Path,
    *,
    masks: Mapping[str, Tensor] | None = None,
    development_set: Sequence[Utterance] = (),
    how: Normalization | None = None,
    progress: Progress | None = None,
    write_log: Callable[[Log], None] | None = None,
) -> Log:
    """Train a CTC model in place; see :func:`train` for arguments and errors.

    The log also has ``eval_wer`` and ``eval_cer``. Transcripts are learned as the utterances have them.

    Args:
        settings: Schedule, precision and seed; its number of epochs is not used.
        masks: Boolean masks (rows, cols) by pruned matrix, True where a weight is kept; the others stay zero.
        development_set: Utterances whose error rates are logged after every epoch, and used for nothing else.
        how: What its transcripts are normalized by.
    """

    def log_error_rate(state: TrainerState) -> None:
        step = state.global_step
        before, now = (update * settings.batch_size // len(training_set) for update in (step - 1, step))
        if step == state.max_steps or now > before:  # an epoch need not end with an update
            rates = error_rates(development_set, transcribe(model, processor, development_set, how=how))
            state.log_history.append({"step": step, "eval_wer": rates.wer, "eval_cer": rates.cer})
            shown = (step, updates, rates.wer, rates.cer)
            logger.info("update %d of %d: WER %.4g, CER %.4g of the development set", *shown)

    if settings.freeze_feature_encoder:
        freeze_front_end(model)
    with masked_gradients(model, masks) if masks else nullcontext():
        return train(
            model,
            partial(collate, processor=processor),
            training_set,
            settings,
            updates,
            folder,
            seed=settings.seed,
            callbacks=[HoldMasks(model, masks)] if masks else [],
            after_update=log_error_rate if development_set else None,
            progress=progress,
            write_log=write_log,
        )


def _keeping_the_best(every: int, *, starts: bool, compare_from: int) -> dict[str, Any]:
    """Give the Trainer's arguments with which it ends with the checkpoint that has the least loss on other speech."""
    return {
        "eval_strategy": "steps",
        "eval_steps": every,  # a moment that no checkpoint has could not be kept
        "eval_on_start": starts,
        "eval_delay": compare_from,
        "restore_callback_states_from_checkpoint": True,  # how long ago it was better
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "prediction_loss_only": True,
    }


def _share_of_a_batch(settings: Optimization, processes: int) -> int:
    """Give the number of utterances that one process takes in a forward pass."""
    share, rest = divmod(settings.batch_size, settings.gradient_accumulation_steps * processes)
    if rest:
        raise UserError(
            f"{settings.group}.batch_size={settings.batch_size} cannot be shared by {processes} processes in "
            f"{settings.gradient_accumulation_steps} passes; make it a multiple of "
            f"{settings.gradient_accumulation_steps * processes}"
        )
    return share


def write_training_log(path: Path, log: Sequence[Mapping[str, Any]]) -> None:
    """Write a row for every entry of the log with the stage and :data:`LOG_COLUMNS`."""
    table = pandas.DataFrame(log)
    columns = [column for column in ("stage", *LOG_COLUMNS) if column in table or column in LOG_COLUMNS]
    with write_file(path) as temporary:
        table.reindex(columns=columns).to_csv(temporary, index=False)
