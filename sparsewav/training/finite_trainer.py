"""What the Trainer of Hugging Face lacks: a look at every update before the weights change, and whole checkpoints."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparsewav.errors import UserError
from sparsewav.files import CHECKSUMS, checksums, write_file
from sparsewav.pruning.hessian import Progress

SKIPPED_IN_A_ROW = 40
"""The scaler of float16 starts at 2¹⁶ and halves at every update that it skips: after so many no scale helps."""


class FiniteTrainer(Trainer):
    """A Trainer that looks at the losses and gradients of every update before the weights change.

    It also sums the losses that the log does not have yet, which the Trainer forgets when it is killed.

    Attributes:
        stop: Called where the loss or the norm of the gradients is not finite, with both; it raises an error.
        unlogged: The sum of the losses of all updates since the log's last one.
    """

    stop: Callable[[float, float], None]
    unlogged: Tensor | float = 0.0
    loss: Tensor | float = 0.0  # of the passes of an update so far
    skipped = 0  # updates in a row

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Do a forward and a backward pass, and check after the last one of an update."""
        loss = super().training_step(model, *args, **kwargs)
        self.loss, self.unlogged = self.loss + loss.float(), self.unlogged + loss.float()
        if not self.accelerator.sync_gradients:
            return loss
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        total, norm = self.loss, nn.utils.get_total_norm(gradients).to(loss.device)
        self.loss = 0.0
        if math.isfinite(float(total + norm)):  # one wait for a GPU, in place of that of the Trainer's filter
            self.skipped = 0
            return loss
        # float16: gradients that overflow are usual at first, and the scaler skips the update.
        self.skipped += 1
        if self.accelerator.scaler is None or not math.isfinite(total) or self.skipped > SKIPPED_IN_A_ROW:
            self.stop(float(total), float(norm))
        return loss

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, None, None]:
        """Give the loss of a batch that is held back; the Trainer's own looks for labels."""
        with torch.no_grad(), self.compute_loss_context_manager():
            loss: Any = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach().mean(), None, None

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write a tensor that several modules share once: safetensors refuses to write it again."""
        if state_dict is None and not isinstance(self.model, PreTrainedModel):  # which leaves them out itself
            assert self.model is not None
            first: dict[int, str] = {}
            state_dict = {
                name: tensor
                for name, tensor in self.model.state_dict().items()
                if not tensor.numel() or first.setdefault(tensor.data_ptr(), name) == name
            }
        super()._save(output_dir, state_dict)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Refuse a checkpoint that lacks weights; of those that are one tensor it has one."""
        assert self.model is not None
        named = self.model.state_dict()
        there = {tensor.data_ptr() for name, tensor in named.items() if name not in load_result.missing_keys}
        lacking = [
            name for name in load_result.missing_keys if named[name].numel() and named[name].data_ptr() not in there
        ]
        if lacking or load_result.unexpected_keys:
            what = (
                f"lacks {lacking[0]}" if lacking else f"has {load_result.unexpected_keys[0]}, which the model has not"
            )
            raise UserError(f"the checkpoint {what}; delete {self.args.output_dir}, and launch the run again")

    def mean_unlogged(self) -> float:
        """Give ``unlogged``, averaged over the processes."""
        own = torch.as_tensor(self.unlogged, dtype=torch.float32, device=self.args.device)
        return float(self.accelerator.reduce(own, "mean"))

    def log(self, logs: dict[str, float], *args: Any) -> None:
        """Add an entry to the log, with the mean loss of all updates since the last one."""
        if "loss" in logs:
            before = max((entry["step"] for entry in self.state.log_history if "loss" in entry), default=0)
            logs["loss"] = self.mean_unlogged() / (self.state.global_step - before)
            self.unlogged = 0.0
        super().log(logs, *args)


class AfterUpdate(TrainerCallback):
    """Calls functions after every update and whenever the log grows, and completes the checkpoints.

    Args:
        trainer: The trainer that it is a callback of.
        act: Called with the Trainer's state after every update.
        progress: Called with (updates done, updates) after every update.
        log: Called with the Trainer's state after every entry of the log.
    """

    def __init__(
        self,
        trainer: FiniteTrainer,
        act: Callable[[TrainerState], None] | None,
        progress: Progress | None,
        log: Callable[[TrainerState], None],
    ) -> None:
        self.trainer, self.act, self.progress, self.log = trainer, act, progress, log

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        newest = next((entry for entry in reversed(state.log_history) if {"loss", "unlogged"} & entry.keys()), {})
        self.trainer.unlogged = newest.get("unlogged", 0.0)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.act:
            self.act(state)
        if self.progress:
            self.progress(state.global_step, state.max_steps)
        if control.should_save:
            state.log_history.append({"step": state.global_step, "unlogged": self.trainer.mean_unlogged()})

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.log(state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.world_size > 1:
            torch.distributed.barrier()  # every process writes a file
        if state.is_world_process_zero:
            checkpoint = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            with write_file(checkpoint / CHECKSUMS) as temporary:
                temporary.write_text(json.dumps(checksums(checkpoint)))
