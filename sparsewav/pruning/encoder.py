"""What the engine has to know of a speech encoder: its prunable matrices, its layers and its padding."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsewav.errors import UserError

FAMILIES = ("wav2vec2", "hubert", "wavlm", "data2vec-audio", "wav2vec2-conformer")
"""``model_type`` of every supported model family."""

OWN_PREFIX = "sparsewav-"
"""Starts the ``model_type`` of what this package's own methods make and transformers has no class for."""

ROLES = (
    *("q_proj", "k_proj", "v_proj", "out_proj"),
    *("linear_q", "linear_k", "linear_v", "linear_out"),  # the conformer's names of the same four
    *("intermediate_dense", "output_dense"),
)
"""Names of the prunable linear modules of a transformer layer; everything else of the model stays dense."""


@dataclass(frozen=True)
class PrunableMatrix:
    """One weight matrix that may be pruned.

    Attributes:
        name: of its module, e.g. ``wav2vec2.encoder.layers.0.attention.q_proj``.
        layer: index of its transformer layer.
        module: the linear module; its weight has shape (rows, cols).
    """

    name: str
    layer: int
    module: nn.Linear

    @property
    def weight(self) -> Tensor:
        return self.module.weight

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.module.weight.numel()


def check_family(model_type: str, name: str) -> None:
    """Refuse a model whose encoder is not known here.

    Raises:
        UserError: ``model_type`` is not in :data:`FAMILIES`.
    """
    if model_type not in FAMILIES and not model_type.startswith(OWN_PREFIX):
        raise UserError(
            f"model {name} is of the family {model_type!r}, which is not supported; supported are {', '.join(FAMILIES)}"
        )


def base_of(model: PreTrainedModel) -> Any:
    """The model below the CTC head."""
    return getattr(model, model.base_model_prefix)


def encoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The transformer layers of a CTC model.

    Raises:
        UserError: the model's family is not supported.
    """
    check_family(model.config.model_type, type(model).__name__)
    return base_of(model).encoder.layers


def prunable_matrices(model: PreTrainedModel) -> list[PrunableMatrix]:
    """Every prunable matrix of a CTC model, in the order of its layers.

    Raises:
        UserError: the model's family is not supported.
    """
    prefix = f"{model.base_model_prefix}.encoder.layers"
    return [
        PrunableMatrix(f"{prefix}.{index}.{name}", index, module)
        for index, layer in enumerate(encoder_layers(model))
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in ROLES
    ]


def takes_padding(model: PreTrainedModel) -> bool:
    """Tell whether padded batches with an attention mask are right for a model.

    They are not where zeros leak into valid frames: a group norm in the front end (wav2vec2-base, hubert-base,
    wavlm-base) takes its statistics over the whole padded signal, and the stacked positional convolutions of
    data2vec-audio and the convolutions inside the layers of wav2vec2-conformer reach across the mask.
    """
    if model.config.model_type in ("data2vec-audio", "wav2vec2-conformer"):
        return False
    return model.config.feat_extract_norm != "group"


def frame_counts(model: PreTrainedModel, attention_mask: Tensor) -> Tensor:
    """How many frames of the encoder each padded utterance fills.

    Args:
        model: CTC model.
        attention_mask: shape (batch, samples), 1 where there is audio.

    Returns:
        Counts, shape (batch,), int64; not above 0 where the audio is shorter than a frame.
    """
    counts = attention_mask.sum(-1).to(torch.int64)
    for kernel, stride in zip(model.config.conv_kernel, model.config.conv_stride, strict=True):
        counts = torch.div(counts - kernel, stride, rounding_mode="floor") + 1
    return counts


def model_batches(model: PreTrainedModel, batch: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Put a batch on the model's device, in the form that the model was made for.

    A padded batch for a model that must not see padding is taken apart into single utterances.

    Args:
        model: CTC model.
        batch: ``input_values`` (batch, samples), optionally ``attention_mask`` (batch, samples) and ``labels``.

    Yields:
        Batches with an ``attention_mask`` always.

    Raises:
        UserError: samples are NaN or infinite, an utterance is shorter than a frame, or a label is not in the
            vocabulary.
    """
    values = batch["input_values"].to(model.device, model.dtype)
    if not values.isfinite().all():
        raise UserError("a calibration batch holds samples that are NaN or infinite; repair or remove that audio")
    mask = batch.get("attention_mask")
    mask = torch.ones_like(values, dtype=torch.long) if mask is None else mask.to(model.device)
    if frame_counts(model, mask).min() < 1:
        raise UserError("a calibration batch holds an utterance that is too short for a single frame; remove it")
    labels = {"labels": batch["labels"].to(model.device)} if "labels" in batch else {}
    if labels and labels["labels"].max() >= model.config.vocab_size:
        raise UserError(
            f"a calibration batch has the label {int(labels['labels'].max())}, and the model's vocabulary ends at "
            f"{model.config.vocab_size - 1}; take the tokenizer that the model was trained with"
        )
    if takes_padding(model) or bool(mask.all()):
        yield {"input_values": values, "attention_mask": mask, **labels}
        return
    for index, samples in enumerate(mask.sum(-1).tolist()):
        row = {"input_values": values[index : index + 1, :samples]}
        row["attention_mask"] = torch.ones_like(row["input_values"], dtype=torch.long)
        yield row | {name: value[index : index + 1] for name, value in labels.items()}


@contextmanager
def projections_as_modules(model: PreTrainedModel) -> Iterator[None]:
    """Within the block, let every attention call its projection modules, so that their inputs can be observed.

    WavLM hands the weights of its projections to one fused function of PyTorch and never calls the modules. Here its
    attention is spelled out, equal up to rounding; the other families are left alone.
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
    attention: Any, hidden_states: Tensor, attention_mask: Tensor | None, gated_position_bias: Tensor
) -> tuple[Tensor, None]:
    """WavLM's self-attention: (batch, frames, width) in and out; the bias is (batch * heads, frames, frames)."""
    batch, frames, width = hidden_states.shape
    heads = attention.num_heads

    def split(projected: Tensor) -> Tensor:
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
