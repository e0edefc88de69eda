"""Models of other sizes than a given one's, with random weights: how long they take depends on their shape alone."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from sparsewav.models.cut import cut_model
from sparsewav.models.structured import STRUCTURED, LayerShape
from sparsewav.pruning.encoder import has_head
from sparsewav.pruning.families import OWN_PREFIX
from sparsewav.pruning.structure import front_end

THIN = 16
"""Channels of the convolutions of a probe, whose layers alone are of interest."""


@dataclass(frozen=True, eq=False)
class Shape:
    """The class and the configuration of a model, which say what it computes but for its weights."""

    kind: type[PreTrainedModel]
    config: PretrainedConfig

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Shape":
        """Give that of a model, which may change afterwards."""
        return cls(type(model), copy.deepcopy(model.config))

    def build(self) -> PreTrainedModel:
        """Make a model with random weights in float32 on the CPU, in evaluation mode."""
        return _built(self.kind, copy.deepcopy(self.config))


def probe_of(
    model: PreTrainedModel, layers: int, heads: int = 0, units: int = 0, conv_dim: Sequence[int] | None = None
) -> PreTrainedModel:
    """Make a model that differs from another in its layers, all alike, and has next to nothing around them.

    Its convolutions have :data:`THIN` channels and its positional convolution two frames, so that as many frames reach
    the layers and little time passes before. It is of the classes that cut models have.

    Args:
        model: A model of a family that can be cut.
        layers: How many layers.
        heads: Attention heads of each, of the width that the model's heads have.
        units: Feed-forward units of each.
        conv_dim: The channels of the convolutions, if these are of interest.
    """
    values: dict[str, Any] = model.config.to_dict()
    config_class, encoder, recognizer = STRUCTURED[values.pop("model_type").removeprefix(OWN_PREFIX)]
    width = values["hidden_size"] // values["num_attention_heads"]
    shape = LayerShape(list(range(heads)), [width] * heads, [width] * heads, units)
    values |= {
        "num_hidden_layers": layers,
        "conv_dim": list(conv_dim or [THIN] * len(values["conv_dim"])),
        "num_conv_pos_embeddings": 2,
        "layers": [asdict(shape)] * layers,
        "feature_scale": False,
    }
    return _built(recognizer if has_head(model) else encoder, config_class(**values))


def with_parts(model: PreTrainedModel, kept: Mapping[str, int]) -> PreTrainedModel:
    """Cut a model to so many parts of every structure that is named; which of them stay is of no interest.

    With fewer channels the weights are random ones.
    """
    front, kept = front_end(model), dict(kept)
    number = kept.pop(front.name, front.count)
    if number < front.count:
        shape = Shape.of(model)
        shape.config.conv_dim = type(shape.config.conv_dim)(front.kept(number))
        model = shape.build()
    return cut_model(model, {name: torch.arange(count) for name, count in kept.items()})


def _built(kind: Any, config: PretrainedConfig) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made: PreTrainedModel = kind(config)
    return made.float().eval()
