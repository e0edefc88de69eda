"""Removing what closed gates cover from a model, and folding the values of open gates into the weights."""

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsewav.baselines.gates import Gates
from sparsewav.models.structured import STRUCTURED, LayerShape
from sparsewav.pruning.encoder import base_of


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
    values = {name: group.value.detach().cpu() for name, group in gates.items()}
    state = {name: tensor.detach().cpu().clone() for name, tensor in base_of(model).state_dict().items()}
    changes: dict[str, Any] = {}
    if "channels_0" in values:
        changes = {"conv_dim": _cut_channels(state, values), "feature_scale": True}
    base = base_of(model)
    shapes = [_cut_layer(state, values, index, layer) for index, layer in enumerate(base.encoder.layers)]
    config_class, model_class = STRUCTURED[model.config.model_type]
    settings = model.config.to_dict()
    settings.pop("model_type")
    settings |= changes | {"layers": [asdict(shape) for shape in shapes], "architectures": [model_class.__name__]}
    smaller: Any = model_class(config_class(**settings))
    base_of(smaller).load_state_dict(state)
    smaller.lm_head.load_state_dict(model.lm_head.state_dict())
    return smaller.to(model.dtype).eval()


def _cut_channels(state: dict[str, Tensor], values: dict[str, Tensor]) -> list[int]:
    """Cut the convolutions, and give the number of channels that each keeps."""
    counts = []
    for index in range(sum(name.startswith("channels_") for name in values)):
        value = values[f"channels_{index}"]
        kept = value.nonzero().squeeze(-1)
        counts.append(len(kept))
        prefix = f"feature_extractor.conv_layers.{index}."
        for name in ("conv.weight", "conv.bias", "layer_norm.weight", "layer_norm.bias"):
            if prefix + name in state:
                state[prefix + name] = state[prefix + name][kept]
        if f"channels_{index + 1}" in values:
            following = f"feature_extractor.conv_layers.{index + 1}.conv.weight"
            state[following] = (state[following] * value[None, :, None])[:, kept]
        else:
            for name in ("feature_projection.layer_norm.weight", "feature_projection.layer_norm.bias"):
                if name in state:
                    state[name] = state[name][kept]
            state["feature_projection.projection.weight"] = state["feature_projection.projection.weight"][:, kept]
            state["feature_projection.scale"] = value[kept]
    return counts


def _cut_layer(state: dict[str, Tensor], values: dict[str, Tensor], index: int, layer: Any) -> LayerShape:
    """Cut one transformer layer, and give its shape."""
    attention = layer.attention
    heads, head_dim = attention.num_heads, attention.head_dim
    ones = torch.ones(heads * head_dim)
    query = values.get(f"queries_{index}", ones)
    value = values.get(f"values_{index}", ones)
    if f"heads_{index}" in values:
        value = value * values[f"heads_{index}"].repeat_interleave(head_dim)
    prefix = f"encoder.layers.{index}.attention."
    value_open = (value > 0).view(heads, head_dim)
    alive = value_open.any(-1)
    query_open = (query > 0).view(heads, head_dim) & alive[:, None]
    state[prefix + "q_proj.weight"] = state[prefix + "q_proj.weight"] * query[:, None]
    state[prefix + "q_proj.bias"] = state[prefix + "q_proj.bias"] * query
    for name, opened in (("q_proj", query_open), ("k_proj", query_open), ("v_proj", value_open)):
        for kind in ("weight", "bias"):
            state[f"{prefix}{name}.{kind}"] = state[f"{prefix}{name}.{kind}"][opened.flatten()]
    state[prefix + "out_proj.weight"] = (state[prefix + "out_proj.weight"] * value)[:, value_open.flatten()]
    if prefix + "gru_rel_pos_const" in state:
        state[prefix + "gru_rel_pos_const"] = state[prefix + "gru_rel_pos_const"][:, alive]
    if not alive.any():
        state[prefix + "constant.bias"] = state[prefix + "out_proj.bias"]
        for name in [name for name in state if name.startswith(prefix) and "rel_attn_embed" not in name]:
            if name != prefix + "constant.bias":
                del state[name]
    units = values.get(f"units_{index}", torch.ones(layer.feed_forward.output_dense.in_features))
    prefix = f"encoder.layers.{index}.feed_forward."
    for kind in ("weight", "bias"):
        state[f"{prefix}intermediate_dense.{kind}"] = state[f"{prefix}intermediate_dense.{kind}"][units > 0]
    state[prefix + "output_dense.weight"] = (state[prefix + "output_dense.weight"] * units)[:, units > 0]
    if not (units > 0).any():
        state[prefix + "bias"] = state[prefix + "output_dense.bias"]
        for name in [name for name in state if name.startswith(prefix) and name != prefix + "bias"]:
            del state[name]
    return LayerShape(
        heads=alive.nonzero().squeeze(-1).tolist(),
        query_dims=query_open.sum(-1)[alive].tolist(),
        value_dims=value_open.sum(-1)[alive].tolist(),
        units=int((units > 0).sum()),
    )
