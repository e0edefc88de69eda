"""The parts of a model that structured pruning removes: attention heads, feed-forward units, channels in front."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel

from sparsewav.errors import UserError
from sparsewav.pruning.encoder import FRONT, PrunableMatrix, base_of, encoder_layers, prunable_matrices
from sparsewav.pruning.families import FAMILIES, Kind, base_name, family_of
from sparsewav.settings.pruning import ENCODER


@dataclass(frozen=True)
class Structure:
    """The heads of one attention, or the units of one feed-forward network.

    Attributes:
        name: The name of its module, e.g. ``wav2vec2.encoder.layers.0.attention``.
        kind: What its parts are.
        layer: The index of its transformer layer.
        reader: The matrix whose input the parts make; a part is ``size`` consecutive columns of it.
        size: The columns of a part: the width of a head, 1 for a unit.
        count: How many parts there are.
    """

    name: str
    kind: Kind
    layer: int
    reader: PrunableMatrix
    size: int
    count: int


def structures(model: PreTrainedModel) -> list[Structure]:
    """Give the structures of a model in the order of its layers; one of which nothing is left is not among them.

    Raises:
        UserError: The model is of a family that has no class for layers without some of their parts, or its heads have
            different widths already.
    """
    family = family_of(model)
    if not family.readers or family.alike:
        able = ", ".join(name for name, member in FAMILIES.items() if member.readers)
        raise UserError(
            f"heads and units cannot be removed from a model of the family {model.config.model_type!r}; choose a model "
            f"of {able}, or sparsity=unstructured"
        )
    layers: Any = encoder_layers(model)
    found = []
    for matrix in prunable_matrices(model):
        kind = family.readers.get(matrix.role)
        if kind is None:
            continue
        size, place = 1, matrix.name.rpartition(".")[0]
        if kind == "heads":
            attention = layers[matrix.layer].attention
            size = attention.head_dim
            shape = getattr(attention, "shape", None)  # of a model that was cut before
            if shape is not None and any(width != size for width in (*shape.query_dims, *shape.value_dims)):
                raise UserError(f"the heads of {place} have lost dimensions; choose another model to remove heads from")
        found.append(Structure(place, kind, matrix.layer, matrix, size, matrix.weight.shape[1] // size))
    return found


@dataclass(frozen=True)
class ChannelSet:
    """The channels that one convolution of the front end makes.

    Attributes:
        name: The name of the convolution, e.g. ``wav2vec2.feature_extractor.conv_layers.0.conv``.
        maker: The convolution.
        reader: The matrix that reads them: the next convolution, or the projection of the features. A channel is
            ``size`` consecutive columns of it.
        size: The columns of a channel: the kernel of the next convolution, 1 for the projection.
        norms: The layer norms over these channels between the two, by name, in the order of the forward pass: what a
            channel becomes in them depends on the others.
        vectors: The names of the parameters that have one number a channel: the convolution's bias, and the weights
            and biases of all norms between the two.
        windows: (kernel, stride, padding) of the convolutions up to this one.
    """

    name: str
    maker: nn.Conv1d
    reader: PrunableMatrix
    size: int
    norms: dict[str, nn.LayerNorm]
    vectors: tuple[str, ...]
    windows: tuple[tuple[int, int, int], ...]

    @property
    def count(self) -> int:
        """How many channels there are."""
        return self.maker.out_channels


@dataclass(frozen=True)
class FrontEnd:
    """The convolutions of a front end, which all keep the same share of their channels.

    What a convolution takes is a product of the channels that it reads and of those that it makes. With one share for
    all of them it depends on this one number alone.

    Attributes:
        name: The name of its module, e.g. ``wav2vec2.feature_extractor``.
        sets: The channels of its convolutions, in the order of the forward pass.
        counts: How many every convolution had when this object was made.
    """

    name: str
    sets: tuple[ChannelSet, ...]
    counts: tuple[int, ...]
    kind: Literal["channels"] = "channels"
    layer: int = FRONT

    @property
    def count(self) -> int:
        """The channels that the widest convolution had, in which shares are counted."""
        return max(self.counts)

    @cached_property
    def readers(self) -> dict[str, PrunableMatrix]:
        """The matrices that read the channels, by name."""
        return {channels.reader.name: channels.reader for channels in self.sets}

    def kept(self, number: int) -> list[int]:
        """Give how many channels every convolution keeps where the widest one keeps ``number``; at least one."""
        return [max(round(number * own / self.count), 1) for own in self.counts]


def front_end(model: PreTrainedModel) -> FrontEnd:
    """Give the channels of a model's front end.

    Raises:
        UserError: The model is of a family whose front end is no stack of convolutions that is known.
    """
    family, base = family_of(model), base_of(model)
    convolutions: Any = getattr(base, family.front, None)
    layers: list[Any] = list(getattr(convolutions, "conv_layers", []))
    if not family.readers or family.alike or not layers:
        able = ", ".join(name for name, member in FAMILIES.items() if member.readers)
        raise UserError(
            f"channels cannot be removed from a model of the family {model.config.model_type!r}; choose a model of "
            f"{able}, or other sparsity.parts"
        )
    prefix = f"{base_name(model)}." if base_name(model) else ""
    readers = {matrix.role: matrix for matrix in prunable_matrices(model, ENCODER) if matrix.layer == FRONT}
    projection = readers["feature_projection.projection"]
    sets: list[ChannelSet] = []
    windows: tuple[tuple[int, int, int], ...] = ()
    for index, layer in enumerate(layers):
        place = f"{prefix}{family.front}.conv_layers.{index}"
        reader = readers.get(f"{family.front}.conv_layers.{index + 1}.conv", projection)
        norms = {f"{place}.layer_norm": getattr(layer, "layer_norm", None)}
        vectors = [f"{place}.conv.bias"] if layer.conv.bias is not None else []
        if reader is projection:
            norms[f"{prefix}feature_projection.layer_norm"] = getattr(base.feature_projection, "layer_norm", None)
            if getattr(base.feature_projection, "scale", None) is not None:  # of a model that gates have cut
                vectors.append(f"{prefix}feature_projection.scale")
        present = {name: norm for name, norm in norms.items() if norm is not None}
        vectors += [f"{name}.{kind}" for name in present for kind in ("weight", "bias")]
        windows += ((layer.conv.kernel_size[0], layer.conv.stride[0], 0),)
        sets.append(
            ChannelSet(
                name=f"{place}.conv",
                maker=layer.conv,
                reader=reader,
                size=reader.weight.shape[1] // layer.conv.out_channels,
                norms={name: norm for name, norm in present.items() if isinstance(norm, nn.LayerNorm)},
                vectors=tuple(vectors),
                windows=windows,
            )
        )
    return FrontEnd(f"{prefix}{family.front}", tuple(sets), tuple(channels.count for channels in sets))
