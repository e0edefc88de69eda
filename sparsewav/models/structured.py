"""Structured CTC models: layers of different widths in heads, head dimensions and feed-forward units.

Structured pruning and the gated methods make such models, and transformers has no class for them. Importing this
module registers the classes, so that ``AutoModelForCTC.from_pretrained`` loads them from an ordinary checkpoint without
code in its folder, and ``AutoModel.from_pretrained`` those without a head.
"""

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCTC,
    HubertConfig,
    HubertForCTC,
    HubertModel,
    PretrainedConfig,
    PreTrainedModel,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    Wav2Vec2Model,
    WavLMConfig,
    WavLMForCTC,
    WavLMModel,
)
from transformers.models.wavlm.modeling_wavlm import WavLMAttention

from sparsewav.pruning.encoder import base_of
from sparsewav.pruning.families import OWN_PREFIX


@dataclass(frozen=True)
class LayerShape:
    """The size of one transformer layer.

    Attributes:
        heads: Indices of the remaining heads among those of the dense model.
        query_dims: Dimensions of query and key for every remaining head; they may be 0.
        value_dims: Dimensions of value for every remaining head, at least 1.
        units: Units of the feed-forward network.
    """

    heads: list[int] = field(default_factory=list)
    query_dims: list[int] = field(default_factory=list)
    value_dims: list[int] = field(default_factory=list)
    units: int = 0


class StructuredWav2Vec2Config(Wav2Vec2Config):
    """Configuration of a structured wav2vec 2.0.

    Attributes:
        layers: A :class:`LayerShape` as a dictionary for every transformer layer.
        feature_scale: Whether a vector scales the features of the convolutions before the projection.
    """

    model_type = OWN_PREFIX + "wav2vec2"
    layers: list | None = None
    feature_scale: bool = False


class StructuredHubertConfig(HubertConfig):
    """Configuration of a structured HuBERT; see :class:`StructuredWav2Vec2Config`."""

    model_type = OWN_PREFIX + "hubert"
    layers: list | None = None
    feature_scale: bool = False


class StructuredWavLMConfig(WavLMConfig):
    """Configuration of a structured WavLM; see :class:`StructuredWav2Vec2Config`."""

    model_type = OWN_PREFIX + "wavlm"
    layers: list | None = None
    feature_scale: bool = False


class Constant(nn.Module):
    """A sublayer of which only the bias of the last matrix is left."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Give the bias at every frame, (batch, frames, width)."""
        return torch.zeros_like(hidden_states) + self.bias  # hooks must not get a view of the parameter


class _Projections(nn.Module):
    """The four matrices of an attention whose heads have different dimensions."""

    dropout: float

    def make_projections(self, width: int, shape: LayerShape, head_dim: int) -> None:
        self.head_dim, self.shape = head_dim, shape
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Initializing zero-element tensors")  # no query dimensions
            self.q_proj = nn.Linear(width, sum(shape.query_dims))
            self.k_proj = nn.Linear(width, sum(shape.query_dims))
        self.v_proj = nn.Linear(width, sum(shape.value_dims))
        self.out_proj = nn.Linear(sum(shape.value_dims), width)

    def attend(self, hidden_states: Tensor, mask: Tensor | None) -> Tensor:
        """Attend from (batch, frames, width) to the same shape; scores are scaled as in the dense model."""
        query, key = (
            split_heads(projection(hidden_states), self.shape.query_dims) for projection in (self.q_proj, self.k_proj)
        )
        value = split_heads(self.v_proj(hidden_states), self.shape.value_dims)
        mixed = nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.head_dim**-0.5,
        )
        return self.out_proj(join_heads(mixed, self.shape.value_dims))


def split_heads(projected: Tensor, dims: list[int]) -> Tensor:
    """Turn (batch, frames, sum of dims) into (batch, heads, frames, largest of dims), padded with zeros.

    The zeros change neither a product of query and key nor the other values.
    """
    batch, frames, _ = projected.shape
    if len(set(dims)) == 1:
        return projected.view(batch, frames, len(dims), dims[0]).transpose(1, 2)
    heads = [nn.functional.pad(part, (0, max(dims) - part.shape[-1])) for part in projected.split(dims, dim=-1)]
    return torch.stack(heads, dim=1)


def join_heads(mixed: Tensor, dims: list[int]) -> Tensor:
    """Turn (batch, heads, frames, largest of dims) into (batch, frames, sum of dims)."""
    if len(set(dims)) == 1:
        return mixed.transpose(1, 2).flatten(2)
    return torch.cat([mixed[:, head, :, :dim] for head, dim in enumerate(dims)], dim=-1)


class StructuredAttention(_Projections):
    """Self-attention of wav2vec 2.0 and HuBERT over the remaining heads."""

    def __init__(self, width: int, dropout: float, shape: LayerShape, head_dim: int) -> None:
        super().__init__()
        self.dropout = dropout
        if shape.heads:
            self.make_projections(width, shape, head_dim)
        else:
            self.constant = Constant(width)
        self.has_heads = bool(shape.heads)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from (batch, frames, width) to the same shape; the mask is that of transformers' SDPA attention."""
        if not self.has_heads:
            return self.constant(hidden_states), None
        return self.attend(hidden_states, attention_mask), None


class StructuredWavLMAttention(_Projections, WavLMAttention):
    """WavLM's self-attention over the remaining heads.

    The position bias passes through the layers with all heads of the dense model, because each layer keeps different
    ones.
    """

    def __init__(self, dense: WavLMAttention, shape: LayerShape, bucket_bias: bool) -> None:
        super().__init__(  # the dense attention, whose matrices are replaced below
            dense.embed_dim, dense.num_heads, dense.dropout, dense.num_buckets, dense.max_distance, bucket_bias
        )
        del self.q_proj, self.k_proj, self.v_proj, self.out_proj
        self.has_heads = bool(shape.heads)
        if self.has_heads:
            self.make_projections(dense.embed_dim, shape, dense.head_dim)
            self.gru_rel_pos_const = nn.Parameter(torch.ones(1, len(shape.heads), 1, 1))
        else:
            del self.gru_rel_pos_const, self.gru_rel_pos_linear
            self.constant = Constant(dense.embed_dim)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        index: int = 0,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Any]:
        """Attend from (batch, frames, width) to the same shape; the mask (batch, frames) is True at audio."""
        batch, frames, _ = hidden_states.shape
        if position_bias is None:
            bias = self.compute_bias(frames, frames)
            position_bias = bias.unsqueeze(0).repeat(batch, 1, 1, 1).view(batch * self.num_heads, frames, frames)
        if not self.has_heads:
            return self.constant(hidden_states), None, position_bias
        heads = self.shape.heads
        gated = hidden_states.view(batch, frames, self.num_heads, -1)[:, :, heads].transpose(1, 2)
        gates = self.gru_rel_pos_linear(gated).view(batch, len(heads), frames, 2, 4).sum(-1).sigmoid()
        gate = gates[..., :1] * (gates[..., 1:] * self.gru_rel_pos_const - 1.0) + 2.0
        scores = gate * position_bias.view(batch, self.num_heads, frames, frames)[:, heads]
        if attention_mask is not None:
            scores = scores.masked_fill(attention_mask.ne(1)[:, None, None, :], float("-inf"))
        return self.attend(hidden_states, scores), None, position_bias


def make_structured(model: PreTrainedModel) -> None:
    """Replace modules of a new dense model by modules of the sizes in its configuration, which is a structured one."""
    config: Any = model.config
    base = base_of(model)
    if config.feature_scale:
        base.feature_projection.scale = nn.Parameter(torch.ones(config.conv_dim[-1]))
        base.feature_projection.register_forward_pre_hook(_scale_features)
    for index, (layer, kept) in enumerate(
        zip(base.encoder.layers, config.layers or [], strict=config.layers is not None)
    ):
        shape = LayerShape(**kept)
        dense = layer.attention
        if isinstance(dense, WavLMAttention):
            layer.attention = StructuredWavLMAttention(dense, shape, bucket_bias=index == 0)
        else:
            layer.attention = StructuredAttention(dense.embed_dim, dense.dropout, shape, dense.head_dim)
        if shape.units:
            width = config.hidden_size
            layer.feed_forward.intermediate_dense = nn.Linear(width, shape.units)
            layer.feed_forward.output_dense = nn.Linear(shape.units, width)
        else:
            layer.feed_forward = Constant(config.hidden_size)


def _scale_features(feature_projection: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (inputs[0] * feature_projection.scale,)


class StructuredWav2Vec2Model(Wav2Vec2Model):
    """wav2vec 2.0 with layers of different widths and without a head."""

    config_class = StructuredWav2Vec2Config

    def __init__(self, config: StructuredWav2Vec2Config) -> None:
        super().__init__(config)
        make_structured(self)


class StructuredWav2Vec2ForCTC(Wav2Vec2ForCTC):
    """wav2vec 2.0 with layers of different widths and a CTC head."""

    config_class = StructuredWav2Vec2Config

    def __init__(self, config: StructuredWav2Vec2Config, target_lang: str | None = None) -> None:
        super().__init__(config, target_lang)
        make_structured(self)


class StructuredHubertModel(HubertModel):
    """HuBERT with layers of different widths and without a head."""

    config_class = StructuredHubertConfig

    def __init__(self, config: StructuredHubertConfig) -> None:
        super().__init__(config)
        make_structured(self)


class StructuredHubertForCTC(HubertForCTC):
    """HuBERT with layers of different widths and a CTC head."""

    config_class = StructuredHubertConfig

    def __init__(self, config: StructuredHubertConfig, target_lang: str | None = None) -> None:
        super().__init__(config, target_lang)
        make_structured(self)


class StructuredWavLMModel(WavLMModel):
    """WavLM with layers of different widths and without a head."""

    config_class = StructuredWavLMConfig

    def __init__(self, config: StructuredWavLMConfig) -> None:
        super().__init__(config)
        make_structured(self)


class StructuredWavLMForCTC(WavLMForCTC):
    """WavLM with layers of different widths and a CTC head."""

    config_class = StructuredWavLMConfig

    def __init__(self, config: StructuredWavLMConfig, target_lang: str | None = None) -> None:
        super().__init__(config, target_lang)
        make_structured(self)


STRUCTURED: dict[str, tuple[type[PretrainedConfig], type[PreTrainedModel], type[PreTrainedModel]]] = {
    "wav2vec2": (StructuredWav2Vec2Config, StructuredWav2Vec2Model, StructuredWav2Vec2ForCTC),
    "hubert": (StructuredHubertConfig, StructuredHubertModel, StructuredHubertForCTC),
    "wavlm": (StructuredWavLMConfig, StructuredWavLMModel, StructuredWavLMForCTC),
}
"""Configuration, encoder and CTC model of the families that can be cut, by the ``model_type`` of the dense model."""

for _config, _encoder, _model in STRUCTURED.values():
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _encoder)
    AutoModelForCTC.register(_config, _model)
