"""Calibration batches: what is read of one, how it is checked, and the form in which a model takes it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsewav.errors import UserError
from sparsewav.pruning.encoder import frame_counts, has_head, input_key, output_counts, takes_padding

INPUTS = {"input_values": "(batch, samples)", "input_features": "(batch, feature frames, bins)"}
"""The audio of a batch: the keys that models take it under, and its shape."""


def pieces_of(batch: Any) -> dict[str, Tensor]:
    """Give the tensors of a calibration batch that are read: what is there of the following, and nothing else.

    ``input_values`` (batch, samples) or ``input_features`` (batch, feature frames, bins), whichever the model takes;
    ``attention_mask`` (batch, samples or feature frames; 1 for audio, 0 for the padding after it) and ``labels``
    (batch, characters).

    Raises:
        UserError: The batch is no dictionary of such tensors.
    """
    if not isinstance(batch, Mapping):
        raise UserError(f"a calibration batch is a {type(batch).__name__}; give dictionaries with input_values")
    pieces = {key: batch[key] for key in (*INPUTS, "attention_mask", "labels") if batch.get(key) is not None}
    keys = [key for key in INPUTS if key in pieces]
    if len(keys) != 1:
        raise UserError(
            f"a calibration batch has no {' or '.join(INPUTS)}, but {', '.join(map(str, batch)) or 'nothing'}"
        )
    key = keys[0]
    for name, value in pieces.items():
        shape = INPUTS.get(name, "(batch, characters)" if name == "labels" else INPUTS[key].replace(", bins", ""))
        if not isinstance(value, Tensor) or value.dim() != shape.count(",") + 1:
            found = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise UserError(f"{name} of a calibration batch is {found}; give a tensor of shape {shape}")
    values, mask, labels = pieces[key], pieces.get("attention_mask"), pieces.get("labels")
    if not values.is_floating_point():
        raise UserError(
            f"{key} of a calibration batch are {values.dtype}; give the floating-point numbers that the model's "
            "feature extractor makes of the audio"
        )
    if not values.numel():
        raise UserError("a calibration batch is empty; leave it out")
    if mask is not None and mask.shape != values.shape[:2]:
        raise UserError(
            f"attention_mask of a calibration batch has shape {tuple(mask.shape)}, and its {key} "
            f"{tuple(values.shape)}; give a number for every {'sample' if values.dim() == 2 else 'feature frame'}"
        )
    if mask is not None and (((mask != 0) & (mask != 1)).any() or (mask[:, 1:] > mask[:, :-1]).any()):
        raise UserError("attention_mask of a calibration batch must be 1 for the audio and 0 for the padding after it")
    if labels is not None and (labels.is_floating_point() or len(labels) != len(values) or not labels.numel()):
        raise UserError(
            f"labels of a calibration batch are {labels.dtype} of shape {tuple(labels.shape)}; give whole numbers, a "
            f"row for each of its {len(values)} utterances"
        )
    return pieces


def model_batches(model: PreTrainedModel, batch: Any, number: int) -> Iterator[dict[str, Tensor]]:
    """Put a batch on the model's device, in the form that the model takes.

    If the model must not see padding, a padded batch is split into single utterances.

    Args:
        model: A CTC model.
        batch: As :func:`pieces_of` reads it; ``attention_mask`` and ``labels`` may be missing.
        number: The place of the batch among the calibration batches, for messages.

    Yields:
        Batches that always have an ``attention_mask``.

    Raises:
        UserError: The batch has another form, a sample is NaN or infinite, an utterance is shorter than a frame, or a
            label is not in the vocabulary.
    """
    pieces = {key: value.clone() if value.is_inference() else value for key, value in pieces_of(batch).items()}
    key = input_key(model)
    if key not in pieces:
        raise UserError(
            f"calibration batch {number} has {', '.join(pieces)}, and a {type(model).__name__} takes {key}; make the "
            "batches with the model's own feature extractor"
        )
    values = pieces[key].to(model.device, model.dtype)
    called = f"of calibration batch {number}"
    broken = ~values.flatten(1).isfinite().all(1)
    if broken.any():
        raise UserError(
            f"row {int(broken.nonzero()[0])} {called} holds samples that are NaN or infinite; repair or remove "
            "that audio"
        )
    mask = pieces.get("attention_mask")
    mask = values.new_ones(values.shape[:2], dtype=torch.long) if mask is None else mask.to(model.device, torch.long)
    if values.dim() == 3:  # convolutions over features reach one frame into the padding
        values = values * mask[:, :, None]
    short = torch.minimum(frame_counts(model, mask), output_counts(model, mask.sum(-1))) < 1
    if short.any():
        raise UserError(
            f"row {int(short.nonzero()[0])} {called} is too short for a single frame; remove that utterance"
        )
    labels = {"labels": pieces["labels"].to(model.device)} if "labels" in pieces and has_head(model) else {}
    if labels and labels["labels"].max() >= model.config.vocab_size:
        raise UserError(
            f"row {int(labels['labels'].max(1).values.argmax())} {called} has the label {int(labels['labels'].max())}, "
            f"and the model's vocabulary ends at {model.config.vocab_size - 1}; take the tokenizer that the model was "
            "trained with"
        )
    if takes_padding(model) or bool(mask.all()):
        yield {key: values, "attention_mask": mask, **labels}
        return
    yield from single_utterances(model, {key: values, "attention_mask": mask, **labels})


def single_utterances(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Take a batch of :func:`model_batches` apart: every utterance alone and without padding."""
    key = input_key(model)
    for index, length in enumerate(batch["attention_mask"].sum(-1).tolist()):
        row = {name: value[index : index + 1] for name, value in batch.items()}
        yield row | {name: row[name][:, :length] for name in (key, "attention_mask")}


def count_utterances(batches: Sequence[Any]) -> int:
    """Count the utterances of batches."""
    return sum(len(next(iter(pieces_of(batch).values()))) for batch in batches)


def as_sequence(batches: Any) -> Sequence[Any]:
    """Give batches that are the same every time they are read: a sequence itself, or a list of an iterable's items.

    A ``DataLoader`` becomes a list, too, because it may shuffle, and needs not know its length.

    Raises:
        UserError: It is one batch, or nothing that holds batches.
    """
    if isinstance(batches, Mapping | str | Tensor) or not hasattr(batches, "__iter__") | hasattr(
        batches, "__getitem__"
    ):
        raise UserError(
            f"calibration_batches={type(batches).__name__} holds no batches; give a list of them, or a DataLoader"
        )
    sized: Any = batches if hasattr(batches, "__len__") and hasattr(batches, "__getitem__") else list(batches)
    return sized


def first_utterances(batches: Sequence[Any], count: int) -> Sequence[Any]:
    """Give the first utterances of a calibration set, in batches.

    Args:
        batches: The batches; their method ``first`` is called if they have one.
        count: The number of utterances at most.
    """
    if hasattr(batches, "first"):
        return batches.first(count)
    taken: list[dict[str, Tensor]] = []
    for batch in batches:
        pieces = pieces_of(batch)
        taken.append({name: value[:count] for name, value in pieces.items()})
        count -= len(next(iter(pieces.values())))
        if count <= 0:
            break
    return taken
