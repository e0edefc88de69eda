"""The families of CTC models: where a family's layers are, what of them is pruned, and how it takes padding.

:data:`FAMILIES` is the one place that knows them. A model of another family whose layers have the names of one of these
is treated like that one, with a warning (:func:`family_of`); every other model is refused.
"""

import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeGuard

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from sparsewav.errors import UserError

OWN_PREFIX = "sparsewav-"
"""Prefix of the ``model_type`` of models that this package's methods produce and transformers has no class for."""

Kind = Literal["heads", "units", "channels"]
"""What structured pruning removes."""

Frames = Callable[[Any, Int[Tensor, "..."]], Int[Tensor, "..."]]
"""Gives the frames that reach a model's first layer, from (model, lengths of its input in samples or features)."""

Between = Callable[[Any, int, Tensor, dict[str, Any]], tuple[Tensor, dict[str, Any]]]
"""Gives what the next layer is called with, from (base model, index of a layer, its output, its other arguments)."""


def windows_in(lengths: Int[Tensor, "..."], kernel: int, stride: int, padding: int = 0) -> Int[Tensor, "..."]:
    """Count the outputs of a convolution over inputs of these lengths."""
    return torch.div(lengths + 2 * padding - kernel, stride, rounding_mode="floor") + 1


def _convolved(model: Any, lengths: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    for kernel, stride in zip(model.config.conv_kernel, model.config.conv_stride, strict=True):
        lengths = windows_in(lengths, kernel, stride)
    return lengths


def _squeezed(model: Any, lengths: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """SEW's pooling drops the frames that do not fill a last window; its upsampling gives them back as zeros."""
    return torch.div(_convolved(model, lengths), model.config.squeeze_factor, rounding_mode="floor")


def _subsampled(model: Any, lengths: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    return model._get_subsampling_output_length(lengths).to(torch.int64)


def _unchanged(model: Any, lengths: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    return lengths


def _between_granite_layers(
    encoder: Any, index: int, hidden_states: Float[Tensor, "batch frames width"], arguments: dict[str, Any]
) -> tuple[Float[Tensor, "batch frames width"], dict[str, Any]]:
    """Halve the mask after a layer that halves the frames, and add the posteriors of the middle layer."""
    if index in encoder.config.subsample_layers and arguments["attention_mask"] is not None:
        mask = arguments["attention_mask"]
        half = mask.shape[1] // 2
        arguments = arguments | {"attention_mask": mask[:, : 2 * half].unflatten(1, (half, 2)).all(2)}
    if index + 1 == len(encoder.layers) // 2:
        hidden_states = hidden_states + encoder.out_mid(encoder.out(hidden_states).softmax(-1))
    return hidden_states, arguments


@dataclass(frozen=True)
class Family:
    """What the engine has to know about a family.

    Attributes:
        prunable: The names, within a layer, of the modules whose matrices are pruned: linear ones and convolutions,
            which multiply every frame, or every window of frames, by the same matrix. A model may lack some of them.
        dense: The other such modules of a layer, and why they stay dense.
        front_prunable: The names, below the base model, of the modules in front of the layers whose matrices are pruned
            besides with ``scope=encoder``, in the order of the forward pass; ``*`` stands for a number.
        front_dense: The other modules with a matrix or a convolution outside of the layers, and why they stay dense
            with any scope. What is named here is not pruned where ``front_prunable`` names it, too.
        positions: Those of ``prunable`` that read position embeddings, alone or beside the hidden states.
        readers: Those of ``prunable`` whose inputs can be removed together with what makes them, and what these inputs
            come from: ``heads`` of an attention or ``units`` of a feed-forward network. Empty where no class can hold
            layers that lack some.
        layers: Where the list of the layers is, below the base model.
        base: Where the base model is; None for the class's ``base_model_prefix``, and empty for the model itself.
        head: The name of the CTC head.
        front: The module below the base model that the audio passes first.
        frames: How many frames reach the first layer.
        padding: Whether a padded utterance gives the same as alone. A group norm in the front end, which takes its
            statistics over the padding, and an adapter, whose convolutions reach into it, rule this out besides.
        halving: The setting that lists the layers which halve the number of frames; empty where none do.
        between: What the encoder does between its layers; None for nothing.
        alike: The name of the family that a model which is not in the table is treated as.
    """

    prunable: tuple[str, ...]
    dense: dict[str, str] = field(default_factory=dict)
    front_prunable: tuple[str, ...] = ()
    front_dense: dict[str, str] = field(default_factory=dict)
    positions: frozenset[str] = frozenset()
    readers: dict[str, Kind] = field(default_factory=dict)
    layers: str = "encoder.layers"
    base: str | None = None
    head: str = "lm_head"
    front: str = "feature_extractor"
    frames: Frames = _convolved
    padding: bool = True
    halving: str = ""
    between: Between | None = None
    alike: str = ""


def _of(parent: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{parent}.{name}" for name in names)


_ADAPTER = {f"adapter_layer.linear_{number}": "a language's adapter, small and trained alone" for number in (1, 2)}

_FRONT = ("feature_extractor.conv_layers.*.conv", "feature_projection.projection")

_POSITIONAL = (
    "the positional convolution: in groups, so that no frame meets all of its weights, and with a norm of its weights, "
    "which are computed from other tensors"
)
_BEHIND = "behind the layers"

_FRONT_DENSE = {
    "feature_extractor.conv_layers.0.conv": "one channel wide: a row has ten weights or so",
    "encoder.pos_conv_embed.conv": _POSITIONAL,
    **{f"adapter.{name}": _BEHIND for name in ("proj", "layers.*.conv")},
}

_TRANSFORMER = Family(
    prunable=(
        *_of("attention", "q_proj", "k_proj", "v_proj", "out_proj"),
        *_of("feed_forward", "intermediate_dense", "output_dense"),
    ),
    dense=_ADAPTER,
    front_prunable=_FRONT,
    front_dense=_FRONT_DENSE,
)

_SQUEEZED = replace(
    _TRANSFORMER,
    dense={},
    front_prunable=("feature_extractor.conv_layers.*.conv", "feature_projection"),
    front_dense=_FRONT_DENSE | {"encoder.upsample.projection": _BEHIND},
    frames=_squeezed,
    padding=False,  # a window of the pooling holds padding beside the last frames of an utterance
)

_CUTTABLE = replace(_TRANSFORMER, readers={"attention.out_proj": "heads", "feed_forward.output_dense": "units"})

_CONFORMER = Family(
    prunable=(
        *_of("ffn1", "intermediate_dense", "output_dense"),
        *_of("self_attn", "linear_q", "linear_k", "linear_v", "linear_pos", "linear_out"),
        *_of("conv_module", "pointwise_conv1", "pointwise_conv2"),
        *_of("ffn2", "intermediate_dense", "output_dense"),
    ),
    front_prunable=_FRONT,
    front_dense=_FRONT_DENSE,
    positions=frozenset({"self_attn.linear_pos"}),
)

_FAST_CONFORMER = Family(
    prunable=(
        *_of("feed_forward1", "linear1", "linear2"),
        *_of("self_attn", "q_proj", "k_proj", "v_proj", "relative_k_proj", "o_proj"),
        *_of("conv", "pointwise_conv1", "pointwise_conv2"),
        *_of("feed_forward2", "linear1", "linear2"),
    ),
    positions=frozenset({"self_attn.relative_k_proj"}),
    layers="layers",
    base="encoder",
    head="ctc_head",
    front="subsampling",
    frames=_subsampled,
)

FAMILIES: dict[str, Family] = {
    "wav2vec2": _CUTTABLE,
    "hubert": _CUTTABLE,
    "wavlm": replace(_CUTTABLE, dense={"attention.gru_rel_pos_linear": "the gate of the position bias, 8 rows"}),
    "unispeech": _TRANSFORMER,
    "unispeech-sat": _TRANSFORMER,
    # The stacked positional convolutions reach across the mask.
    "data2vec-audio": replace(
        _TRANSFORMER,
        front_dense=_FRONT_DENSE | {"encoder.pos_conv_embed.layers.*.conv": "positional convolutions, in groups"},
        padding=False,
    ),
    "sew": _SQUEEZED,
    "sew-d": replace(
        _SQUEEZED,
        prunable=(
            *_of("attention.self", "query_proj", "key_proj", "value_proj", "pos_key_proj", "pos_query_proj"),
            "attention.output.dense",
            "intermediate.dense",
            "output.dense",
        ),
        # The query and key project the relative positions, too, unless these have projections of their own.
        positions=frozenset(_of("attention.self", "query_proj", "key_proj", "pos_key_proj", "pos_query_proj")),
        layers="encoder.encoder.layer",
    ),
    # The convolutions in the layers reach across the mask.
    "wav2vec2-conformer": replace(_CONFORMER, padding=False),
    "wav2vec2-bert": replace(
        _CONFORMER,
        front="feature_projection",
        front_prunable=("feature_projection.projection",),
        front_dense={
            **{f"adapter.{name}": _BEHIND for name in ("proj", "layers.*.residual_conv", "layers.*.self_attn_conv")},
            **{f"adapter.layers.*.self_attn.linear_{name}": _BEHIND for name in ("q", "k", "v", "out")},
            **{f"adapter.layers.*.ffn.{name}_dense": _BEHIND for name in ("intermediate", "output")},
        },
        frames=_unchanged,
    ),
    "parakeet_ctc": replace(
        _FAST_CONFORMER,
        front_prunable=("subsampling.linear",),
        front_dense={"subsampling.layers.*": "a convolution over frames and bins"},
    ),
    "lasr_ctc": replace(
        _FAST_CONFORMER,
        front="subsampler",
        front_prunable=_of("subsampler", "dense_0", "conv_0", "conv_1", "dense_1"),
    ),
    "granite_speech5_ctc": replace(
        _FAST_CONFORMER,
        prunable=tuple(name.replace("pointwise_conv", "pointwise_lin") for name in _FAST_CONFORMER.prunable),
        front="input_linear",
        front_prunable=("input_linear",),
        front_dense=dict.fromkeys(("out", "out_mid"), "the head in the middle of the layers"),
        frames=_unchanged,
        halving="subsample_layers",
        between=_between_granite_layers,
    ),
}
"""The families by the ``model_type`` of their CTC models, as transformers names them."""

ENCODERS = {
    "parakeet_encoder": "parakeet_ctc",
    "lasr_encoder": "lasr_ctc",
    "granite_speech5_encoder": "granite_speech5_ctc",
}
"""The ``model_type`` of encoders without a head, where it is another one than that of the family."""


def known_family(model_type: str) -> Family | None:
    """Give the family of a ``model_type``; None for one that is not in the table."""
    if model_type.startswith(OWN_PREFIX):
        return FAMILIES.get(model_type.removeprefix(OWN_PREFIX), _TRANSFORMER)
    return FAMILIES.get(ENCODERS.get(model_type, model_type))


def encoder_config(config: PretrainedConfig) -> Any:
    """Give the part of a CTC model's configuration that describes its encoder."""
    return getattr(config, "encoder_config", config)


def is_matrix(module: nn.Module) -> TypeGuard[nn.Linear | nn.Conv1d]:
    """Tell whether a module multiplies every frame, or every window of frames, by one matrix.

    It is a linear one, or a convolution without groups, padding and dilation.
    """
    return isinstance(module, nn.Linear) or (
        isinstance(module, nn.Conv1d)
        and (module.groups, module.dilation) == (1, (1,))
        and module.padding in ((0,), "valid")
    )


def family_of(model: PreTrainedModel) -> Family:
    """Give the family of a model, from the table or by the names in its layers.

    Raises:
        UserError: The family is not in the table, and no list of modules has layers like those of one that is.
    """
    return known_family(model.config.model_type) or _family_alike(model)


def _family_alike(model: PreTrainedModel) -> Family:
    prefix = model.base_model_prefix
    for name, family in FAMILIES.items():
        for place, layers in model.named_modules():
            if not isinstance(layers, nn.ModuleList) or not len(layers) or not _look_alike(layers, family):
                continue
            below = prefix and place.startswith(f"{prefix}.")
            found = replace(
                family,
                layers=place.removeprefix(f"{prefix}.") if below else place,
                base=prefix if below else "",
                padding=False,
                alike=name,
            )
            with suppress(AttributeError):  # it lacks a front end, or what tells how many frames it makes
                model.get_submodule(".".join(filter(None, (found.base, found.front))))
                found.frames(model, torch.tensor(16_000))
                return found
    raise UserError(
        f"model {type(model).__name__} is of the family {model.config.model_type!r}, which is not supported; supported "
        f"are {', '.join(FAMILIES)}"
    )


def _look_alike(layers: nn.ModuleList, family: Family) -> bool:
    wanted = set(family.prunable) - family.positions
    return all(wanted <= {name for name, module in layer.named_modules() if is_matrix(module)} for layer in layers)


def names_any(patterns: Iterable[str], name: str) -> bool:
    """Tell whether one of the names in a family's table is this one; ``*`` stands for a number."""
    return any(re.fullmatch(re.escape(pattern).replace(r"\*", r"\d+"), name) for pattern in patterns)


def left_dense(model: PreTrainedModel) -> dict[str, str]:
    """Give the names, within a layer, of the modules that multiply by a matrix and are not pruned, and why."""
    family = family_of(model)
    layers: Any = model.get_submodule(".".join(filter(None, (base_name(model), family.layers))))
    names = dict.fromkeys(name for layer in layers for name, module in layer.named_modules() if is_matrix(module))
    return {name: family.dense.get(name, "not known") for name in names if name not in family.prunable}


def base_name(model: PreTrainedModel) -> str:
    """Give the attribute of a model that has the model below its head; empty if it is that itself."""
    base = family_of(model).base
    name = model.base_model_prefix if base is None else base
    return name if hasattr(model, name) else ""


def untried(model: PreTrainedModel) -> list[str]:
    """Warn, in a sentence, of a model whose family is not in the table: what was found in it, and what is left."""
    family = family_of(model)
    if not family.alike:
        return []
    left = ", ".join(left_dense(model)) or "none"
    return [
        f"the family {model.config.model_type!r} was never tried: its layers look like those of {family.alike}, so "
        f"that {', '.join(family.prunable)} are pruned, and {left} of the other matrices in a layer left dense; "
        "utterances are not padded"
    ]
