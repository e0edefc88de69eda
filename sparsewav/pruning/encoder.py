"""What the engine has to know about a speech encoder: its prunable matrices, its layers and its frames."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsewav.errors import UserError
from sparsewav.pruning.families import (
    FAMILIES,
    base_name,
    family_of,
    is_matrix,
    known_family,
    names_any,
    windows_in,
)
from sparsewav.settings.pruning import TRANSFORMER

FRONT = -1
"""What stands for the index of a layer where something is in front of the layers."""


@dataclass(frozen=True)
class PrunableMatrix:
    """One weight matrix that may be pruned.

    Attributes:
        name: The name of its module, e.g. ``wav2vec2.encoder.layers.0.attention.q_proj``.
        layer: The index of its transformer layer, or :data:`FRONT`.
        module: The linear module, or the convolution.
        role: The name of the module within its layer, e.g. ``attention.q_proj``, or below the base model.
        positions: Whether the module reads position embeddings, alone or beside the hidden states.
        windows: Of a matrix in front of the layers (kernel, stride, padding) of the convolutions that the audio has
            passed when the matrix has multiplied it, its own included: they make the number of rows that it reads.
    """

    name: str
    layer: int
    module: nn.Linear | nn.Conv1d
    role: str = ""
    positions: bool = False
    windows: tuple[tuple[int, int, int], ...] = ()

    @property
    def parameter(self) -> nn.Parameter:
        """The weight as the module has it; a convolution's is (rows, channels, kernel)."""
        weight: Any = self.module.weight
        return weight

    @property
    def weight(self) -> Float[Tensor, "rows cols"]:
        """The parameter itself, or a view of a convolution's, whose columns are channels times kernel.

        What is written to it is written to the parameter.
        """
        weight = self.parameter
        return weight if weight.dim() == 2 else weight.view(len(weight), -1)

    @property
    def size(self) -> int:
        """The number of weights."""
        return self.module.weight.numel()

    def count_rows(self, lengths: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        """Count the rows that a matrix in front of the layers reads of utterances, from the lengths of their input."""
        for window in self.windows:
            lengths = windows_in(lengths, *window)
        return lengths


def check_family(model_type: str, name: str) -> None:
    """Refuse a ``model_type`` that is not in :data:`~sparsewav.pruning.families.FAMILIES` and not this package's own.

    Raises:
        UserError: It is such.
    """
    if known_family(model_type) is None:
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


def check_model(model: Any, *, by_output: bool, scope: str) -> None:
    """Refuse what cannot be pruned, before anything is computed.

    Args:
        model: What a user gave for a CTC model.
        by_output: Whether the allocation reads the output of the CTC head.
        scope: What is to be pruned.

    Raises:
        UserError: It is no model of a supported family, or some of its weights are not there as parameters of their
            own: it is wrapped, quantised, accelerated, has adapters, or is not loaded.
    """
    check_unwrapped(model)
    kind = type(model).__name__
    family = family_of(model)
    if by_output and has_head(model) and not hasattr(model, family.head):
        raise UserError(f"{kind} has no CTC head; load the model with AutoModelForCTC.from_pretrained")
    precisions = {
        str(tensor.dtype)
        for name, tensor in model.named_parameters()
        if tensor.is_floating_point() and not stays_single(model, name)
    }
    if len(precisions) > 1:
        raise UserError(
            f"the model's parameters are in {' and '.join(sorted(precisions))}; convert it, e.g. model.float()"
        )
    if any(tensor.is_meta for tensor in model.parameters()):
        raise UserError("parameters of the model are on the meta device, without values; load its weights first")
    names: dict[int, str] = {}
    for name, _, _, module in _named_prunable(model, scope):
        if not is_matrix(module) or type(module.weight.data) is not Tensor:
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


def stays_single(model: Any, name: str) -> bool:
    """Tell whether a tensor is in float32 in a model of any precision, as transformers loads it."""
    parts: Any = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    return any(part in name for part in parts)


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
    return model.get_submodule(base_name(model))


def has_head(model: PreTrainedModel) -> bool:
    """Tell whether a model has a head; an encoder has none."""
    return base_of(model) is not model or hasattr(model, family_of(model).head)


def layers_name(model: PreTrainedModel) -> str:
    """Give the name of the list of a model's layers, e.g. ``wav2vec2.encoder.layers``."""
    return ".".join(filter(None, (base_name(model), family_of(model).layers)))


def encoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Give the transformer or conformer layers of a model.

    Raises:
        UserError: The model's family is not supported.
    """
    return model.get_submodule(layers_name(model))  # type: ignore[return-value]


def prunable_matrices(model: PreTrainedModel, scope: str = TRANSFORMER) -> list[PrunableMatrix]:
    """Give every prunable matrix of a model, in the order of the forward pass through what is in front and the layers.

    Args:
        model: The model.
        scope: ``transformer`` for the matrices of the layers, ``encoder`` for those in front of them, too.

    Raises:
        UserError: The model's family is not supported.
    """
    positions = family_of(model).positions
    return [
        PrunableMatrix(name, layer, module, role, role in positions, _windows_before(model, role, layer))
        for name, layer, role, module in _named_prunable(model, scope)
        if is_matrix(module)
    ]


def _named_prunable(model: PreTrainedModel, scope: str) -> Iterator[tuple[str, int, str, Any]]:
    """Yield name, layer, role and module of what the table of families says is prunable, whatever module it is."""
    family, base = family_of(model), base_name(model)
    if scope != TRANSFORMER:
        places = dict(base_of(model).named_modules())
        for pattern in family.front_prunable:
            for place, module in places.items():
                if names_any([pattern], place) and not names_any(family.front_dense, place):
                    yield ".".join(filter(None, (base, place))), FRONT, place, module
    for place, module in encoder_layers(model).named_modules(remove_duplicate=False):
        index, _, role = place.partition(".")
        if role in family.prunable:
            yield f"{layers_name(model)}.{place}", int(index), role, module


def _windows_before(model: PreTrainedModel, role: str, layer: int) -> tuple[tuple[int, int, int], ...]:
    """Give the windows of a matrix in front of the layers, as :class:`PrunableMatrix` has them."""
    if layer != FRONT:
        return ()
    front = family_of(model).front
    windows = []
    for place, module in base_of(model).get_submodule(front).named_modules(prefix=front):
        if isinstance(module, nn.Conv1d | nn.Conv2d):  # of two axes the first is that of the frames
            padding: Any = module.padding
            windows.append((module.kernel_size[0], module.stride[0], 0 if padding == "valid" else padding[0]))
        if place == role:
            break
    return tuple(windows)


def freeze_front_end(model: PreTrainedModel) -> None:
    """Train nothing of what the audio passes before the layers: convolutions, or the projection of features."""
    front: Any = base_of(model).get_submodule(family_of(model).front)
    if hasattr(front, "_freeze_parameters"):  # it also keeps no activations then
        front._freeze_parameters()
    front.requires_grad_(False)


def input_length(module: nn.Module, inputs: Float[Tensor, "batch _ _"]) -> int:
    """Count the rows of an utterance that a prunable module multiplies; a convolution's input ends with the frames."""
    if isinstance(module, nn.Conv1d):
        return (inputs.shape[2] - module.kernel_size[0]) // module.stride[0] + 1
    return inputs.shape[1]


def input_rows(
    module: nn.Module, inputs: Float[Tensor, "batch _ _"], places: Int[Tensor, " rows"]
) -> Float[Tensor, "rows cols"]:
    """Give some of the rows that a prunable module multiplies, those of a convolution unfolded.

    Args:
        module: The module.
        inputs: Its input.
        places: The rows, numbered through the utterances of the batch; again from the first one on where they are more
            than the input has, which may be one for all utterances.
    """
    length = input_length(module, inputs)
    places = places % (len(inputs) * length)
    if not isinstance(module, nn.Conv1d):
        return inputs.reshape(len(inputs) * length, -1)[places]
    steps = torch.arange(module.kernel_size[0], device=places.device)
    frames = (places % length)[:, None] * module.stride[0] + steps
    return inputs.transpose(1, 2)[(places // length)[:, None], frames].transpose(1, 2).flatten(1)


def output_rows(module: nn.Module, outputs: Float[Tensor, "batch _ _"]) -> Float[Tensor, "batch rows features"]:
    """Give what a prunable module makes of every row that it multiplies, from its output."""
    return outputs.transpose(1, 2) if isinstance(module, nn.Conv1d) else outputs


def takes_padding(model: PreTrainedModel) -> bool:
    """Tell whether a model may be given padded batches with an attention mask.

    It may not where padding leaks into valid frames (:class:`~sparsewav.pruning.families.Family`).
    """
    config = model.config
    leaks = getattr(config, "feat_extract_norm", None) == "group" or getattr(config, "add_adapter", False)
    return family_of(model).padding and not leaks


def run_base(model: PreTrainedModel, batch: dict[str, Tensor]) -> None:
    """Run the model below its head for what hooks see of it, on what ``pruning.batches.model_batches`` gives."""
    base_of(model)(batch[input_key(model)], attention_mask=batch["attention_mask"])


def input_key(model: PreTrainedModel) -> str:
    """Give the key of the audio in a batch of the model, one of :data:`~sparsewav.pruning.batches.INPUTS`."""
    return model.main_input_name


def frame_counts(model: PreTrainedModel, attention_mask: Shaped[Tensor, "batch length"]) -> Int[Tensor, " batch"]:
    """Count the frames of each padded utterance that reach the first layer; one too short for a frame gets 0 or less.

    The attention mask is 1 where there is audio, over the samples or over the feature frames of the input.
    """
    return family_of(model).frames(model, attention_mask.sum(-1).to(torch.int64))


def output_counts(model: Any, lengths: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
    """Count the frames of the logits for inputs of these lengths, which an adapter may have made fewer.

    The lengths are in samples, or in feature frames where the model takes features.
    """
    counted = getattr(model, "_get_feat_extract_output_lengths", None) or model._get_subsampling_output_length
    return counted(lengths).to(torch.int64)


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
