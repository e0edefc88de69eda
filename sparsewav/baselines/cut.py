"""Removing what closed gates cover from a model, and folding the values of open gates into the weights."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsewav.baselines.gates import Gates
from sparsewav.models.cut import LayerCut, cut_layers
from sparsewav.pruning.encoder import base_name, encoder_layers, layers_name


@torch.no_grad()
def cut(model: PreTrainedModel, gates: Gates) -> PreTrainedModel:
    """Make the structured model (layers of different widths) that computes the same as the gated one, up to rounding.

    The value of a gate is folded into the weights of the next layer. The last convolution is followed by a layer norm,
    so that the values of its gates stay in the model as the scale of the features.

    Args:
        model: The model that the gates are attached to; it is not changed.
        gates: New values are drawn as in evaluation.

    Returns:
        A model of :mod:`sparsewav.models.structured`, on the CPU, in evaluation mode.
    """
    was_training = gates.training
    gates.eval()
    gates.draw()
    gates.train(was_training)
    values = {name: group.value.detach().to("cpu", model.dtype) for name, group in gates.items()}
    state = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
    settings: dict[str, Any] = {}
    if "channels_0" in values:
        settings = {"conv_dim": _cut_channels(state, values, f"{base_name(model)}."), "feature_scale": True}
    layers: Any = encoder_layers(model)
    cuts = [_fold(state, values, index, layer, f"{layers_name(model)}.{index}.") for index, layer in enumerate(layers)]
    return cut_layers(model, state, cuts, settings)


def _cut_channels(state: dict[str, Tensor], values: dict[str, Tensor], base: str) -> list[int]:
    """Cut the convolutions of the model at ``base``, and give the number of channels that each keeps."""
    counts = []
    for index in range(sum(name.startswith("channels_") for name in values)):
        value = values[f"channels_{index}"]
        kept = value.nonzero().squeeze(-1)
        counts.append(len(kept))
        prefix = f"{base}feature_extractor.conv_layers.{index}."
        for name in ("conv.weight", "conv.bias", "layer_norm.weight", "layer_norm.bias"):
            if prefix + name in state:
                state[prefix + name] = state[prefix + name][kept]
        if f"channels_{index + 1}" in values:
            following = f"{base}feature_extractor.conv_layers.{index + 1}.conv.weight"
            state[following] = (state[following] * value[None, :, None])[:, kept]
        else:
            projection = f"{base}feature_projection."
            for name in ("layer_norm.weight", "layer_norm.bias"):
                if projection + name in state:
                    state[projection + name] = state[projection + name][kept]
            state[projection + "projection.weight"] = state[projection + "projection.weight"][:, kept]
            state[projection + "scale"] = value[kept]
    return counts


def _fold(state: dict[str, Tensor], values: dict[str, Tensor], index: int, layer: Any, prefix: str) -> LayerCut:
    """Multiply the weights of a transformer layer by the values of its gates, and give what of it stays."""
    attention, unit_count = layer.attention, layer.feed_forward.output_dense.in_features
    shape = attention.num_heads, attention.head_dim
    query = values.get(f"queries_{index}", torch.ones(shape).flatten())
    value = values.get(f"values_{index}", torch.ones(shape).flatten())
    if f"heads_{index}" in values:
        value = value * values[f"heads_{index}"].repeat_interleave(attention.head_dim)
    units = values.get(f"units_{index}", torch.ones(unit_count))
    state[prefix + "attention.q_proj.weight"] *= query[:, None]
    state[prefix + "attention.q_proj.bias"] *= query
    state[prefix + "attention.out_proj.weight"] *= value
    state[prefix + "feed_forward.output_dense.weight"] *= units
    return LayerCut(query=(query > 0).view(shape), value=(value > 0).view(shape), units=units > 0)
