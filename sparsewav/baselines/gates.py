"""Hard-concrete gates on a speech encoder's channels, heads, head dimensions and feed-forward units.

Louizos et al., "Learning sparse neural networks through L0 regularization" (2018), with the temperature of CoFi (Xia et
al. 2022), as in DPHuBERT (Peng et al. 2023).
"""

import math
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsewav.errors import UserError
from sparsewav.models.structured import STRUCTURED
from sparsewav.pruning.encoder import base_of, projections_as_modules

TEMPERATURE = 2 / 3
"""β, which sets how sharply a sample tends to 0 or 1."""
STRETCH = 0.1
"""The distribution is stretched to (-0.1, 1.1) and clipped to [0, 1], so that 0 and 1 have positive probability."""
SHARPNESS = 0.8
"""Factor in the approximate mean of a gate, σ(0.8 log α / β)."""
SPREAD = 0.01
"""Standard deviation of log α at the start."""


def sample_gates(log_alpha: Tensor) -> Tensor:
    """Draw hard-concrete gates in [0, 1] of the shape of ``log_alpha``, differentiable with respect to it."""
    uniform = torch.rand_like(log_alpha).clamp(1e-6, 1 - 1e-6)
    concrete = torch.sigmoid((uniform.logit() + log_alpha) / TEMPERATURE)
    return (concrete * (1 + 2 * STRETCH) - STRETCH).clamp(0, 1)


def open_probability(log_alpha: Tensor) -> Tensor:
    """Give the probability that a gate is not 0, σ(log α − β log(0.1 / 1.1)); its sum is the expected L0 norm."""
    return torch.sigmoid(log_alpha - TEMPERATURE * math.log(STRETCH / (1 + STRETCH)))


def settled_gates(log_alpha: Tensor, keep_one: bool = False) -> Tensor:
    """Give the values that one group of n gates is cut with, shape (n,).

    They are 0 for the round(n − E[L0]) gates with the smallest σ(0.8 log α / β), and that value for the others.
    ``keep_one`` leaves at least one of the group open.
    """
    log_alpha = log_alpha.detach()
    soft = torch.sigmoid(SHARPNESS * log_alpha / TEMPERATURE)
    zeros = round(len(log_alpha) - float(open_probability(log_alpha).sum()))
    closed = soft.argsort(stable=True)[: min(zeros, len(soft) - keep_one)]
    return soft.index_fill(0, closed, 0.0)


class Gate(nn.Module):
    """A group of gates, whose values hold from one :meth:`draw` to the next.

    Args:
        count: Number of gates n.
        drop_rate: Probability of a closed gate at the start, where log α = log(1 − rate) − log(rate).
        straight_through: Set every open gate to 1 in the forward pass, and leave the gradient as it is.
        keep_one: Never close all gates in evaluation.

    Attributes:
        log_alpha: Parameter of shape (n,).
        value: Values of shape (n,): a sample in training, the settled values in evaluation.
    """

    value: Tensor

    def __init__(self, count: int, drop_rate: float, *, straight_through: bool = False, keep_one: bool = False) -> None:
        super().__init__()
        start = math.log(1 - drop_rate) - math.log(drop_rate)
        self.log_alpha = nn.Parameter(start + SPREAD * torch.randn(count))
        self.straight_through = straight_through
        self.keep_one = keep_one
        self.value = torch.ones(count)

    def draw(self) -> None:
        """Draw new values."""
        value = sample_gates(self.log_alpha) if self.training else settled_gates(self.log_alpha, self.keep_one)
        if self.straight_through:
            value = (value > 0).to(value.dtype) + (value - value.detach())  # exactly 0 or 1
        self.value = value


class Gates(nn.Module):
    """All gates of an encoder. Their values are drawn anew for every forward pass.

    A model with gates computes the same as without while all of them are 1. A layer norm over gated channels takes its
    statistics over the open ones alone, as it will after the cut.

    Args:
        model: Dense CTC model of wav2vec 2.0, HuBERT or WavLM; the gates are attached to it in place.
        units: Some of :data:`sparsewav.settings.baselines.GATED`.
        drop_rates: Probability of a closed gate at the start, by unit.
        straight_through: As :class:`Gate` takes it.

    Attributes:
        groups: The gates by ``channels_0``, ``heads_3``, ``queries_3``, ``values_3`` or ``units_3`` with the index of
            the layer.

    Raises:
        UserError: There is no class for cut models of this family.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        units: Iterable[str],
        drop_rates: dict[str, float],
        *,
        straight_through: bool = False,
    ) -> None:
        super().__init__()
        if model.config.model_type not in STRUCTURED:
            raise UserError(
                f"a model of the family {model.config.model_type!r} cannot be cut into layers of different sizes; "
                f"choose one of {', '.join(STRUCTURED)}"
            )
        self.groups = nn.ModuleDict()
        base = base_of(model)
        chosen = set(units)

        def gate(name: str, count: int, kind: str, keep_one: bool = False) -> Gate:
            made = Gate(count, drop_rates[kind], straight_through=straight_through, keep_one=keep_one)
            self.groups[name] = made
            return made

        if "channels" in chosen:
            for index, layer in enumerate(base.feature_extractor.conv_layers):
                made = gate(f"channels_{index}", layer.conv.out_channels, "channels", keep_one=True)
                _gate_channels(layer, made)
            if getattr(base.feature_projection, "layer_norm", None) is not None:
                base.feature_projection.layer_norm = OpenLayerNorm(base.feature_projection.layer_norm, made)
        for index, layer in enumerate(base.encoder.layers):
            attention, feed_forward = layer.attention, layer.feed_forward
            if "heads" in chosen:
                made = gate(f"heads_{index}", attention.num_heads, "heads")
                attention.out_proj.register_forward_pre_hook(_times(made, attention.head_dim))
            if "head_dims" in chosen:
                width = attention.out_proj.in_features
                attention.q_proj.register_forward_hook(_output_times(gate(f"queries_{index}", width, "head_dims")))
                attention.out_proj.register_forward_pre_hook(_times(gate(f"values_{index}", width, "head_dims")))
            if "units" in chosen:
                made = gate(f"units_{index}", feed_forward.output_dense.in_features, "units")
                feed_forward.output_dense.register_forward_pre_hook(_times(made))
        base.register_forward_pre_hook(lambda module, inputs: self.draw())
        self._wavlm: AbstractContextManager[None] = projections_as_modules(model)  # a reference keeps it open
        self._wavlm.__enter__()

    def draw(self) -> None:
        """Draw new values of all gates."""
        for _, group in self.items():
            group.draw()

    def items(self) -> list[tuple[str, Gate]]:
        """Give the groups of gates with their names."""
        return list(self.groups.items())  # type: ignore[arg-type]


class OpenLayerNorm(nn.LayerNorm):
    """A layer norm over the last axis whose statistics are those of the open channels; closed channels give 0."""

    def __init__(self, dense: nn.LayerNorm, gate: Gate) -> None:
        super().__init__(dense.normalized_shape, eps=dense.eps)
        self.weight, self.bias = dense.weight, dense.bias
        self._gate = [gate]  # in a list: the gate belongs to the gates, not to the model

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (..., channels)."""
        input = input.to(self.weight.dtype)  # in full precision under autocast, as every layer norm
        opened = (self._gate[0].value > 0).to(input.dtype)
        count = opened.sum().clamp(min=1)
        centred = (input - (input * opened).sum(-1, keepdim=True) / count) * opened
        variance = centred.square().sum(-1, keepdim=True) / count
        return (centred * (variance + self.eps).rsqrt() * self.weight + self.bias) * opened


def _gate_channels(layer: Any, gate: Gate) -> None:
    if isinstance(getattr(layer, "layer_norm", None), nn.LayerNorm):  # a group norm here has one channel a group
        layer.layer_norm = OpenLayerNorm(layer.layer_norm, gate)
    layer.register_forward_hook(lambda module, inputs, output: output * gate.value[:, None].to(output.dtype))


def _times(gate: Gate, repeats: int = 1) -> Any:
    def multiply(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        return (inputs[0] * gate.value.repeat_interleave(repeats).to(inputs[0].dtype),)

    return multiply


def _output_times(gate: Gate) -> Any:
    return lambda module, inputs, output: output * gate.value.to(output.dtype)


def encoder_parameters(model: PreTrainedModel) -> int:
    """Count the parameters of a CTC model without its head."""
    return sum(parameter.numel() for parameter in base_of(model).parameters())


def left_parameters(model: PreTrainedModel, opened: Mapping[str, Tensor]) -> Tensor:
    """Give the expected number of parameters that gates leave in the encoder, without the CTC head.

    The gates are independent, so that the expectation of a product is the product of expectations. Where all
    probabilities are 0 or 1, the result is the count of the cut model.

    Args:
        model: The model that the gates are attached to.
        opened: Probabilities of open gates by group, each of shape (n,).

    Returns:
        A scalar, differentiable with respect to the probabilities.
    """
    base = base_of(model)
    width = model.config.hidden_size
    total = torch.as_tensor(float(encoder_parameters(model)), device=next(iter(opened.values())).device)
    incoming, dense_incoming = torch.ones_like(total), 1
    for index, layer in enumerate(base.feature_extractor.conv_layers if "channels_0" in opened else []):
        channels = opened[f"channels_{index}"].sum()
        dense, kernel = layer.conv.out_channels, layer.conv.kernel_size[0]
        once = (layer.conv.bias is not None) + 2 * (getattr(layer, "layer_norm", None) is not None)
        total = total + channels * (incoming * kernel + once) - dense * (dense_incoming * kernel + once)
        incoming, dense_incoming = channels, dense
    if "channels_0" in opened:
        once = width + 2 * (getattr(base.feature_projection, "layer_norm", None) is not None)
        total = total + incoming * (once + 1) - dense_incoming * once  # the scale of the features adds one a channel
    for index, layer in enumerate(base.encoder.layers):
        attention = layer.attention
        gru = getattr(attention, "gru_rel_pos_linear", None)  # WavLM's: a factor for each head, a matrix for all
        factor, shared = (0, 0) if gru is None else (1, sum(parameter.numel() for parameter in gru.parameters()))
        if f"heads_{index}" in opened:
            heads = opened[f"heads_{index}"]
            total = total - (1 - heads).sum() * (attention.head_dim * (4 * width + 3) + factor)
            total = total - (1 - heads).prod() * shared
        elif f"values_{index}" in opened:
            queries, values = (
                opened[f"{kind}_{index}"].view(attention.num_heads, -1) for kind in ("queries", "values")
            )
            dead = (1 - values).prod(-1)  # a head without values has no use for its queries
            total = total - (queries.shape[-1] - queries.sum(-1) * (1 - dead)).sum() * 2 * (width + 1)
            total = total - (1 - values).sum() * (2 * width + 1) - dead.sum() * factor - dead.prod() * shared
        if f"units_{index}" in opened:
            total = total - (1 - opened[f"units_{index}"]).sum() * (2 * width + 1)
    return total


def expected_parameters(model: PreTrainedModel, gates: Gates) -> Tensor:
    """Give the expected number of parameters of a gated encoder; see :func:`left_parameters`."""
    return left_parameters(model, {name: open_probability(gate.log_alpha) for name, gate in gates.items()})


@torch.no_grad()
def meet_target(model: PreTrainedModel, gates: Gates, parameters: float) -> float:
    """Shift all log α by the same amount so that the cut leaves at most so many parameters, and hardly fewer.

    Args:
        model: The model that the gates are attached to.
        gates: Changed in place.
        parameters: Number of parameters to leave in the encoder, without the CTC head.

    Returns:
        The amount, which is about 0 after a training that reached its target.

    Raises:
        UserError: More is left even with all gates closed.
    """

    def left(shift: float) -> float:
        settled = {name: settled_gates(gate.log_alpha + shift, gate.keep_one) for name, gate in gates.items()}
        return float(left_parameters(model, {name: (value > 0).float() for name, value in settled.items()}))

    if left(-40.0) > parameters:
        raise UserError(
            f"method.target is out of reach: {left(-40.0):,.0f} of {encoder_parameters(model):,} parameters have no "
            "gate; choose a lower target, or gate more"
        )
    shift = 0.0
    if left(0.0) > parameters or left(1e-3) <= parameters:
        low, high = -40.0, 40.0
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if left(middle) <= parameters else (low, middle)
        shift = low
    for _, gate in gates.items():
        gate.log_alpha.add_(shift)
    return shift
