"""Recovery of the whole model: what is left of a pruned model learns the dense model's outputs, without labels.

The loss is KL(dense || pruned) of the characters' posteriors, averaged over the frames, plus the squared error of the
last hidden states over their squares (knowledge distillation, Hinton et al. 2015). It is trained by Hugging Face's
Trainer as the fine-tuning is. Some utterances are held back: of all moments that with the least loss on them is kept.
With :class:`~sparsewav.settings.Elsa` the mask moves first, as :mod:`sparsewav.training.elsa` describes.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from sparsewav.data.batches import Batch, collate
from sparsewav.data.utterances import Utterance, audio_seconds
from sparsewav.errors import UserError
from sparsewav.models.checkpoint import not_finite
from sparsewav.models.load import load_speech_model
from sparsewav.models.processor import Processor
from sparsewav.pruning import distributed
from sparsewav.pruning.allocation.divergence import output_mask
from sparsewav.pruning.batches import as_sequence, model_batches, pieces_of
from sparsewav.pruning.encoder import (
    base_of,
    check_model,
    has_head,
    in_evaluation_mode,
    input_key,
    prunable_matrices,
    whatever_modes,
)
from sparsewav.pruning.families import OWN_PREFIX, encoder_config, family_of
from sparsewav.pruning.hessian import Progress
from sparsewav.pruning.hidden_states import scratch_folder
from sparsewav.pruning.prune import HasModel, model_within
from sparsewav.pruning.recovery import ModelRecovery
from sparsewav.settings.pruning import ENCODER, TRANSFORMER, Pruning, Uniform, resolve
from sparsewav.settings.recovery import Elsa, Global
from sparsewav.training.elsa import MoveMasks, SplitWeights
from sparsewav.training.masks import HoldMasks, masked_gradients, masked_matrices, masks_of
from sparsewav.training.trainer import Log, train

Outputs = tuple[Tensor | None, Float[Tensor, "frames width"]]
"""Log posteriors (frames, characters) of a model with a head, and the last hidden states, of all frames with audio."""


class OutputLoss(nn.Module):
    """A pruned model, and its loss against the dense model's outputs.

    It stays in evaluation mode, so that neither dropout nor masks of SpecAugment come between the two models.

    Args:
        pruned: The model that learns.
        dense: The model that it was; it takes no gradient and is in no checkpoint.
        hidden_states: The weight of the last hidden states.
        split: What a checkpoint has to hold besides, where the mask moves.
    """

    def __init__(
        self,
        pruned: PreTrainedModel,
        dense: PreTrainedModel,
        hidden_states: float,
        split: SplitWeights | None = None,
    ) -> None:
        super().__init__()
        self.pruned, self.hidden_states, self.split = pruned, hidden_states, split
        self.reference = torch.no_grad()(partial(outputs_of, dense))
        fronts = [base_of(model).get_submodule(family_of(model).front) for model in (dense, pruned)]
        self.front_end = partial(_computed_once, *fronts) if _are_alike(*fronts) else nullcontext
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode."""
        return super().train(False)

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        """Give the loss of a batch."""
        divergence = error = squares = torch.zeros((), device=self.pruned.device)
        frames = 0
        for part in model_batches(self.pruned, batch, 0):
            with self.front_end():
                wanted, states = self.reference(part)
                found, now = outputs_of(self.pruned, part)
            if wanted is not None and found is not None:
                divergence = divergence + (wanted.exp() * (wanted - found)).sum()
            error = error + (now - states).square().sum()
            squares, frames = squares + states.square().sum(), frames + len(states)
        return {"loss": divergence / frames + self.hidden_states * error / squares}


def _are_alike(dense: nn.Module, pruned: nn.Module) -> bool:
    """Whether the second module makes the same of an input as the first one, now and, as it learns nothing, later."""
    if repr(dense) != repr(pruned) or any(parameter.requires_grad for parameter in pruned.parameters()):
        return False  # strides and activations are in the text
    pairs = zip(dense.state_dict().values(), pruned.state_dict().values(), strict=True)
    return all(first.dtype == second.dtype and torch.equal(first, second) for first, second in pairs)


@contextmanager
def _computed_once(dense: nn.Module, pruned: nn.Module) -> Iterator[None]:
    """Within the block, in which the first module is called before the second, the second gives what the first made.

    Convolutions take up to half of the forward pass, and nobody learns them.
    """
    made: list[Any] = []
    own = vars(pruned).get("forward")  # where another library has put one in place of the class's
    hook = dense.register_forward_hook(lambda module, arguments, output: made.append(output))
    pruned.forward = lambda *arguments, **keywords: made.pop()
    try:
        yield
    finally:
        hook.remove()
        del pruned.forward
        if own is not None:
            pruned.forward = own


def outputs_of(model: PreTrainedModel, batch: Batch) -> Outputs:
    """Give what a model makes of a batch that :func:`~sparsewav.pruning.batches.model_batches` has prepared."""
    caught: list[Tensor] = []
    hook = base_of(model).register_forward_hook(
        lambda module, arguments, output: caught.append(output.last_hidden_state)
    )
    try:
        output: Any = model(**{key: value for key, value in batch.items() if key != "labels"})
    finally:
        hook.remove()
    valid = output_mask(model, batch)
    posteriors = output.logits.float().log_softmax(-1)[valid] if has_head(model) else None
    return posteriors, caught[0].float()[valid]


def recover_model(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    inputs: Sequence[Any],
    read: Callable[[Sequence[Any]], Batch],
    seconds: Callable[[Any], float],
    settings: Global,
    updates: int,
    folder: Path,
    *,
    masks: Mapping[str, Tensor],
    front_end: bool,
    seed: int,
    progress: Progress | None = None,
    write_log: Callable[[Log], None] | None = None,
) -> Log:
    """Train a pruned model in place on the dense model's outputs; where no moment is better, it stays as it was.

    Args:
        model: The pruned model.
        dense: The dense model, on the same device.
        inputs: What is learned from, an item for every utterance; some are held back.
        read: Turns some of these into a batch.
        seconds: Gives the length of one of them, by which they are sorted into batches.
        settings: Loss and schedule.
        updates: Updates at most.
        folder: Where checkpoints are written; the newest whole one in it is resumed.
        masks: Boolean masks (rows, cols) by pruned matrix, True where a weight is kept; the others stay zero, or, of
            what is pruned now, as many where the mask moves.
        front_end: Whether the convolutions in front of the layers learn, too, as where they were pruned now.
        seed: Draws what is held back, and the order of the others.
        progress: Called with (updates done, updates) after every update.
        write_log: Called with the log so far whenever it grows.

    Returns:
        The log; :func:`summary` reads it.

    Raises:
        UserError: There are fewer than two utterances, or updates where the mask moves; nothing that could be learned;
            the dense model is not finite; or :func:`~sparsewav.training.trainer.train` refuses.
    """
    check_learnable(model, settings, len(inputs))
    if broken := not_finite(dense.state_dict()):
        raise UserError(f"{broken} of the dense model has numbers that are not finite; load another one")
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed)).tolist()
    count = min(max(1, round(settings.held_back * len(inputs))), len(inputs) - 1)
    held_back, learned = [inputs[index] for index in order[:count]], [inputs[index] for index in sorted(order[count:])]
    before = {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}
    better = False
    split, held = None, masks
    if isinstance(settings, Elsa):  # weights change places among the matrices that were pruned now, and no others
        own = {matrix.name for matrix in prunable_matrices(model, ENCODER if front_end else TRANSFORMER)}
        moving = {name: mask for name, mask in masks.items() if name in own}
        held = {name: mask for name, mask in masks.items() if name not in own}
        split = SplitWeights(masked_matrices(model, moving), moving, settings, updates)
    moves = None if split is None else MoveMasks(split)
    try:
        with _learning(model, dense, front_end=front_end), masked_gradients(model, held), moves or nullcontext():
            log = train(
                OutputLoss(model, dense, settings.hidden_states, split),
                read,
                learned,
                settings,
                updates,
                folder,
                seed=seed,
                frozen=[dense],
                seconds=seconds,
                held_back=held_back,
                patience=settings.patience / 10,
                compare_from=0 if split is None else split.moving,
                callbacks=[HoldMasks(model, held), *([moves] if moves else [])],
                progress=progress,
                write_log=write_log,
            )
        better = summary(log).best_update > 0
    finally:
        if not better:
            model.load_state_dict(before)
    return log


def check_learnable(model: PreTrainedModel, settings: Global, utterances: int) -> None:
    """Refuse a recovery that has nothing to learn from, before anything is computed.

    Raises:
        UserError: There are fewer than two utterances, or the model has no head and hidden states do not count.
    """
    if utterances < 2:
        raise UserError(
            f"recovery={settings.name} has {utterances} utterances, of which one is held back; give two or more"
        )
    if not has_head(model) and not settings.hidden_states:
        raise UserError(
            f"{type(model).__name__} has no head, whose posteriors alone count with recovery.hidden_states=0; give "
            "recovery.hidden_states=1"
        )


def check_one_process(settings: Global) -> None:
    """Refuse several processes in Python, where nobody starts them, or where they are a group that prunes together."""
    if settings.processes > 1:
        raise UserError(
            f"recovery.processes={settings.processes} is of the command sparsewav; from Python one process learns"
        )
    if distributed.world() > 1:
        raise UserError(
            f"recovery={settings.name} is not shared by the processes of a group; prune in one process, or run the "
            "command sparsewav with recovery.processes"
        )


def summary(log: Log) -> ModelRecovery:
    """Give what a recovery's log says of it."""
    measured = [(entry["update"], entry["eval_loss"]) for entry in log if "eval_loss" in entry]
    best_update, loss = min(measured, key=lambda pair: pair[1])
    return ModelRecovery(measured[0][1], loss, max(entry["update"] for entry in log), best_update)


def recover(
    model: PreTrainedModel | HasModel,
    dense: PreTrainedModel | HasModel,
    calibration_batches: Any,
    recovery: str | Global = "global",
    *,
    scope: str = TRANSFORMER,
    seed: int = 0,
    progress: Progress | None = None,
) -> ModelRecovery:
    """Let a pruned model learn the dense model's outputs, in place and without labels; pruned weights stay zero.

    >>> dense = copy.deepcopy(speech.model)  # doctest: +SKIP
    >>> sparsewav.prune(speech, batches, 0.8, preset="best_oneshot")  # doctest: +SKIP
    >>> sparsewav.recover(speech, dense, batches)  # doctest: +SKIP

    Rounded weights leave their grid: recover first, and round afterwards, with ``prune`` at a sparsity of 0. A model in
    half precision learns in float32, and is rounded to its precision in the end.

    Args:
        model: A model that :func:`sparsewav.prune` or :func:`sparsewav.cut` left, or what has one as ``model``.
        dense: The model that it was, on the same device.
        calibration_batches: As ``prune`` takes them; labels are not read.
        recovery: The loss, the schedule and the number of updates, ``Global(updates=1000)`` or ``Elsa()``, or the
            name of one for its defaults. Its ``steps`` are those of ``prune``, which came before.
        scope: What was pruned; with ``encoder`` the convolutions in front of the layers learn, too, and a mask moves
            there as well. What is zero in front of the layers stays zero with ``transformer``.
        seed: Draws the utterances that are held back, and the order of the others.
        progress: Called with (updates done, updates) after every update.

    Raises:
        UserError: An option, a batch or the number of utterances is wrong, or the loss is not finite. After this and
            any other error the model is as it was.
    """
    settings = resolve("recovery", recovery)
    if not isinstance(settings, Global):
        raise UserError(f"recovery={settings.name} goes with prune alone; choose recovery=global or elsa")
    pruned, reference = model_within(model), model_within(dense)
    if reference is pruned:
        raise UserError("model and dense are the same object; copy the dense model before you prune it (copy.deepcopy)")
    Pruning(recovery=settings.changed(steps=0), allocation=Uniform(), scope=scope, seed=seed).check()
    check_one_process(settings)
    _check_pair(pruned, reference, scope)
    key = input_key(pruned)
    utterances: list[_Row] = []
    with whatever_modes(pruned.device):
        for number, batch in enumerate(as_sequence(calibration_batches)):
            pieces = pieces_of(batch)
            pieces.pop("labels", None)
            for _ in model_batches(pruned, pieces, number):  # refuses what cannot be learned from, by its place
                pass
            utterances += _utterances_of(pieces, key, number)
        with scratch_folder() as folder, _in_single_precision(pruned, reference), _random_state_kept(pruned.device):
            log = recover_model(
                *(pruned, reference, utterances[: settings.utterances], partial(_padded, key), _length),
                *(settings, settings.updates, folder),
                masks=masks_of(pruned, ENCODER),
                front_end=scope == ENCODER,
                seed=seed,
                progress=progress,
            )
    return summary(log)


def _check_pair(model: Any, dense: Any, scope: str) -> None:
    """Refuse two models of which one cannot have been the other, before it was pruned."""
    for called, item in (("model", model), ("dense", dense)):
        try:
            check_model(item, by_output=True, scope=scope)
        except UserError as error:
            raise UserError(f"{called}: {error}") from None
    given = (model, dense)
    widths = [encoder_config(item.config).hidden_size for item in given]
    heads = [item.config.vocab_size if has_head(item) else 0 for item in given]
    for what, pair in {
        "device": [str(item.device) for item in given],
        "precision": [str(item.dtype) for item in given],
        "width of the hidden states": widths,
        "number of characters, 0 without a head": heads,
    }.items():
        if pair[0] != pair[1]:
            raise UserError(
                f"model and dense differ in the {what} ({pair[0]} and {pair[1]}); give the dense model that was pruned"
            )
    kinds = {item.config.model_type.removeprefix(OWN_PREFIX) for item in given}
    if len(kinds) > 1:
        raise UserError(
            f"model is a {type(model).__name__} and dense a {type(dense).__name__}; give the dense model that was "
            "pruned"
        )


@contextmanager
def _in_single_precision(*models: nn.Module) -> Iterator[None]:
    """Within the block the parameters of models in half precision are in float32: there the steps of Adam are lost.

    Afterwards they have their precision again, and what has not changed its numbers.
    """
    halves = [
        (tensor, tensor.dtype)
        for model in models
        for tensor in (*model.parameters(), *model.buffers())
        if tensor.is_floating_point() and tensor.dtype.itemsize < torch.float32.itemsize
    ]
    for tensor, _ in halves:
        tensor.data = tensor.data.float()
    try:
        yield
    finally:
        for tensor, precision in halves:
            tensor.data = tensor.data.to(precision)


@contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    """Behind the block the caller's random numbers go on as if the Trainer had seeded none."""
    plain, numbers = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(plain)
        np.random.set_state(numbers)


def recover_on_utterances(
    dense: PreTrainedModel | Path,
    front_end: bool,
    seed: int,
    model: PreTrainedModel,
    processor: Processor,
    utterances: Sequence[Utterance],
    settings: Global,
    updates: int,
    folder: Path,
    *,
    masks: Mapping[str, Tensor],
    progress: Progress | None = None,
    write_log: Callable[[Log], None] | None = None,
) -> Log:
    """Recover a model on utterances as :func:`recover_model` does; the dense model may be the folder that has it."""
    reference = load_speech_model(str(dense), device=model.device).model if isinstance(dense, Path) else dense
    read = partial(collate, processor=processor)
    return recover_model(
        *(model, reference, utterances, read, audio_seconds, settings, updates, folder),
        masks=masks,
        front_end=front_end,
        seed=seed,
        progress=progress,
        write_log=write_log,
    )


@dataclass(frozen=True, eq=False)
class _Row:
    """An utterance of a calibration batch without its padding, (samples) or (feature frames, bins)."""

    id: str
    source: str
    values: Tensor


def _utterances_of(batch: Batch, key: str, number: int) -> Iterator[_Row]:
    for index, row in enumerate(batch[key].cpu()):
        values = row[: int(batch["attention_mask"][index].sum())] if "attention_mask" in batch else row
        yield _Row(f"{number}-{index}", f"row {index} of calibration batch {number}", values)


def _length(row: _Row) -> float:
    return float(len(row.values))


def _padded(key: str, rows: Sequence[_Row]) -> Batch:
    lengths = torch.tensor([len(row.values) for row in rows])
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    return {key: pad_sequence([row.values for row in rows], batch_first=True), "attention_mask": mask}


@contextmanager
def _learning(model: PreTrainedModel, dense: PreTrainedModel, *, front_end: bool) -> Iterator[None]:
    """Within the block both models are in evaluation mode, and every parameter of the first takes a gradient.

    The convolutions in front of its layers do so with ``front_end`` alone.
    """
    before = [(parameter, parameter.requires_grad) for item in (model, dense) for parameter in item.parameters()]
    dense.requires_grad_(False)
    model.requires_grad_(True)
    if not front_end:
        base_of(model).get_submodule(family_of(model).front).requires_grad_(False)
    try:
        with in_evaluation_mode(model), in_evaluation_mode(dense):
            yield
    finally:
        for parameter, wanted in before:
            parameter.requires_grad_(wanted)
        model.zero_grad()
