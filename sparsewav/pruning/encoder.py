"""What the engine has to know about a speech encoder: its prunable matrices, its layers and its padding."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsewav.errors import UserError

FAMILIES = ("wav2vec2", "hubert", "wavlm", "data2vec-audio", "wav2vec2-conformer")
"""The ``model_type`` of every supported model family."""

OWN_PREFIX = "sparsewav-"
"""Prefix of the ``model_type`` of models that this package's methods produce and transformers has no class for."""

ROLES = (
    *("q_proj", "k_proj", "v_proj", "out_proj"),
    *("linear_q", "linear_k", "linear_v", "linear_out"),  # the conformer's names of the same four
    *("intermediate_dense", "output_dense"),
)
"""Names of the prunable linear modules in a transformer layer; the rest of the model stays dense."""


@dataclass(frozen=True)
class PrunableMatrix:
    """One weight matrix that may be pruned.

    Attributes:
        name: The name of its module, e.g. ``wav2vec2.encoder.layers.0.attention.q_proj``.
        layer: The index of its transformer layer.
        module: The linear module.
    """

    name: str
    layer: int
    module: nn.Linear

    @property
    def weight(self) -> Float[Tensor, "rows cols"]:
        return self.module.weight

    @property
    def size(self) -> int:
        """The number of weights."""
        return self.module.weight.numel()


def check_family(model_type: str, name: str) -> None:
    """Refuse a model whose family is not supported.

    Raises:
        UserError: ``model_type`` is neither in :data:`FAMILIES` nor one of this package's own.
    """
    if model_type not in FAMILIES and not model_type.startswith(OWN_PREFIX):
        raise UserError(
            f"model {name} is of the family {model_type!r}, which is not supported; supported are {', '.join(FAMILIES)}"
        )


def check_unwrapped(model: Any) -> None:
    """Refuse what is no model of a supported family, or is one within a wrapper.

    Raises:
        UserError: It is such.
    """
    kind = type(model).__name__
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise UserError(f"the model is wrapped in {kind}; give the model within, model.module")
    if isinstance(model, nn.Module) and "_orig_mod" in model._modules:
        raise UserError("the model is compiled; give the model within, model._orig_mod, and compile it afterwards")
    if not hasattr(model, "base_model_prefix"):
        raise UserError(f"the model is a {kind}; give a CTC model of transformers (AutoModelForCTC.from_pretrained)")
    check_family(model.config.model_type, kind)
    if not hasattr(model, model.base_model_prefix):
        raise UserError(f"{kind} has no CTC head; load the model with AutoModelForCTC.from_pretrained")


def check_model(model: Any, *, by_output: bool) -> None:
    """Refuse what cannot be pruned, before anything is computed.

    Args:
        model: What a user gave for a CTC model.
        by_output: Whether the allocation reads the output of the CTC head.

    Raises:
        UserError: It is no model of a supported family, or some of its weights are not there as parameters of their
            own: it is wrapped, quantised, accelerated, has adapters, or is not loaded.
    """
    check_unwrapped(model)
    kind = type(model).__name__
    if by_output and not hasattr(model, "lm_head"):
        raise UserError(f"{kind} has no CTC head; load the model with AutoModelForCTC.from_pretrained")
    precisions = {str(tensor.dtype) for tensor in model.parameters() if tensor.is_floating_point()}
    if len(precisions) > 1:
        raise UserError(
            f"the model's parameters are in {' and '.join(sorted(precisions))}; convert it, e.g. model.float()"
        )
    if any(tensor.is_meta for tensor in model.parameters()):
        raise UserError("parameters of the model are on the meta device, without values; load its weights first")
    names: dict[int, str] = {}
    for place, module in encoder_layers(model).named_modules(remove_duplicate=False):
        if place.rpartition(".")[2] not in ROLES:
            continue
        name = f"{layers_name(model)}.{place}"
        if not isinstance(module, nn.Linear) or type(module.weight.data) is not Tensor:
            raise UserError(
                f"{name} is a {type(module).__module__}.{type(module).__name__} and no torch.nn.Linear with a plain "
                "weight; prune a model before it is quantised or accelerated, and merge its adapters first"
            )
        if "weight" not in module._parameters:
            raise UserError(
                f"the weight of {name} is computed from other tensors and cannot be pruned; make it a parameter first "
                "(torch.nn.utils.prune.remove, torch.nn.utils.parametrize.remove_parametrizations)"
            )
        if module.weight.is_inference():
            raise UserError("the model was made inside torch.inference_mode(); load it outside of it")
        if names.setdefault(id(module.weight), name) != name:
            raise UserError(f"{names[id(module.weight)]} and {name} share one weight; give each a copy of its own")
    if not names:
        raise UserError(f"{kind} has no layer with a matrix that may be pruned")


@contextmanager
def in_evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    """Within the block, no module of the model is in training mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def whatever_modes(device: torch.device) -> Iterator[None]:
    """Within the block, PyTorch computes the same in whatever modes the caller is: inference, automatic precision."""
    with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
        yield


def base_of(model: PreTrainedModel) -> Any:
    """Give the model below the CTC head; a model without a head is one itself."""
    return getattr(model, model.base_model_prefix, model)


def has_head(model: PreTrainedModel) -> bool:
    """Tell whether a model has a head; an encoder has none."""
    return base_of(model) is not model


def layers_name(model: PreTrainedModel) -> str:
    """Give the name of the list of a model's layers, e.g. ``wav2vec2.encoder.layers``."""
    return f"{model.base_model_prefix}.encoder.layers" if has_head(model) else "encoder.layers"


def encoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Give the transformer layers of a CTC model.

    Raises:
        UserError: The model's family is not supported.
    """
    check_family(model.config.model_type, type(model).__name__)
    return base_of(model).encoder.layers


def prunable_matrices(model: PreTrainedModel) -> list[PrunableMatrix]:
    """Give every prunable matrix of a CTC model, in the order of its layers.

    Raises:
        UserError: The model's family is not supported.
    """
    prefix = layers_name(model)
    return [
        PrunableMatrix(f"{prefix}.{index}.{name}", index, module)
        for index, layer in enumerate(encoder_layers(model))
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in ROLES
    ]


def takes_padding(model: PreTrainedModel) -> bool:
    """Tell whether a model may be given padded batches with an attention mask.

    It may not where padding leaks into valid frames: a group norm in the front end (wav2vec2-base, hubert-base,
    wavlm-base) takes its statistics over the whole padded signal, and the stacked positional convolutions of
    data2vec-audio and the convolutions in the layers of wav2vec2-conformer reach across the mask.
    """
    if model.config.model_type in ("data2vec-audio", "wav2vec2-conformer"):
        return False
    return model.config.feat_extract_norm != "group"


def input_key(model: PreTrainedModel) -> str:
    """Give the key of the audio in a batch of the model."""
    return model.main_input_name


def output_counts(model: Any, lengths: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
    """Count the frames of the logits for inputs of these lengths, which an adapter may have made fewer."""
    return model._get_feat_extract_output_lengths(lengths).to(torch.int64)


def frame_counts(model: PreTrainedModel, attention_mask: Shaped[Tensor, "batch samples"]) -> Int[Tensor, " batch"]:
    """Count the encoder frames of each padded utterance; an utterance shorter than a frame gets 0 or less.

    The attention mask is 1 where there is audio.
    """
    counts = attention_mask.sum(-1).to(torch.int64)
    for kernel, stride in zip(model.config.conv_kernel, model.config.conv_stride, strict=True):
        counts = torch.div(counts - kernel, stride, rounding_mode="floor") + 1
    return counts


def pieces_of(batch: Any) -> dict[str, Tensor]:
    """Give the tensors of a calibration batch that are read: what is there of the following, and nothing else.

    ``input_values`` (batch, samples), ``attention_mask`` (batch, samples; 1 for audio, 0 for the padding after it) and
    ``labels`` (batch, characters).

    Raises:
        UserError: The batch is no dictionary of such tensors.
    """
    if not isinstance(batch, Mapping):
        raise UserError(f"a calibration batch is a {type(batch).__name__}; give dictionaries with input_values")
    pieces = {key: batch[key] for key in ("input_values", "attention_mask", "labels") if batch.get(key) is not None}
    if "input_values" not in pieces:
        raise UserError(f"a calibration batch has no input_values, but {', '.join(map(str, batch)) or 'nothing'}")
    for key, value in pieces.items():
        if not isinstance(value, Tensor) or value.dim() != 2:
            found = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            what = "characters" if key == "labels" else "samples"
            raise UserError(f"{key} of a calibration batch is {found}; give a tensor of shape (batch, {what})")
    values, mask, labels = pieces["input_values"], pieces.get("attention_mask"), pieces.get("labels")
    if not values.is_floating_point():
        raise UserError(
            f"input_values of a calibration batch are {values.dtype}; give the floating-point numbers that the model's "
            "feature extractor makes of the audio"
        )
    if not values.numel():
        raise UserError("a calibration batch is empty; leave it out")
    if mask is not None and mask.shape != values.shape:
        raise UserError(
            f"attention_mask of a calibration batch has shape {tuple(mask.shape)}, and its input_values "
            f"{tuple(values.shape)}; give a number for every sample"
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
    values = pieces["input_values"].to(model.device, model.dtype)
    called = f"of calibration batch {number}"
    broken = ~values.isfinite().all(1)
    if broken.any():
        raise UserError(
            f"row {int(broken.nonzero()[0])} {called} holds samples that are NaN or infinite; repair or remove "
            "that audio"
        )
    mask = pieces.get("attention_mask")
    mask = torch.ones_like(values, dtype=torch.long) if mask is None else mask.to(model.device, torch.long)
    short = frame_counts(model, mask) < 1
    if short.any():
        raise UserError(
            f"row {int(short.nonzero()[0])} {called} is too short for a single frame; remove that utterance"
        )
    labels = {"labels": pieces["labels"].to(model.device)} if "labels" in pieces else {}
    if labels and labels["labels"].max() >= model.config.vocab_size:
        raise UserError(
            f"row {int(labels['labels'].max(1).values.argmax())} {called} has the label {int(labels['labels'].max())}, "
            f"and the model's vocabulary ends at {model.config.vocab_size - 1}; take the tokenizer that the model was "
            "trained with"
        )
    if takes_padding(model) or bool(mask.all()):
        yield {"input_values": values, "attention_mask": mask, **labels}
        return
    for index, samples in enumerate(mask.sum(-1).tolist()):
        row = {"input_values": values[index : index + 1, :samples]}
        row["attention_mask"] = torch.ones_like(row["input_values"], dtype=torch.long)
        yield row | {name: value[index : index + 1] for name, value in labels.items()}


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
        if count > 0:
            pieces = pieces_of(batch)
            taken.append({name: value[:count] for name, value in pieces.items()})
            count -= len(pieces["input_values"])
    return taken


@contextmanager
def projections_as_modules(model: PreTrainedModel) -> Iterator[None]:
    """Within the block, let every attention call its projection modules, so that hooks observe their inputs.

    WavLM passes the weights of its projections to a fused function of PyTorch and never calls the modules. It is
    replaced by an explicit attention, which is equal up to rounding; the other families are not changed.
    """
    attentions = [module for module in model.modules() if hasattr(module, "torch_multi_head_self_attention")]
    for attention in attentions:
        attention.torch_multi_head_self_attention = _attend_through_modules.__get__(attention)
    try:
        yield
    finally:
        for attention in attentions:
            del attention.torch_multi_head_self_attention


def _attend_through_modules(
    attention: Any,
    hidden_states: Float[Tensor, "batch frames width"],
    attention_mask: Shaped[Tensor, "batch frames"] | None,
    gated_position_bias: Float[Tensor, "batch_heads frames frames"],
) -> tuple[Float[Tensor, "batch frames width"], None]:
    """Compute WavLM's self-attention."""
    batch, frames, width = hidden_states.shape
    heads = attention.num_heads

    def split(projected: Float[Tensor, "batch frames width"]) -> Float[Tensor, "batch heads frames head_width"]:
        return projected.view(batch, frames, heads, width // heads).transpose(1, 2)

    query, key, value = (
        split(projection(hidden_states)) for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    scores = query @ key.transpose(-1, -2) * attention.scaling
    scores = scores + gated_position_bias.view(batch, heads, frames, frames)
    if attention_mask is not None:
        scores = scores.masked_fill(attention_mask.ne(1)[:, None, None, :], float("-inf"))
    mixed = scores.softmax(-1) @ value
    return attention.out_proj(mixed.transpose(1, 2).reshape(batch, frames, width)), None
