"""The parts of a model that structured pruning removes: attention heads and units of feed-forward networks."""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from sparsewav.errors import UserError
from sparsewav.pruning.encoder import PrunableMatrix, encoder_layers, prunable_matrices
from sparsewav.pruning.families import FAMILIES, Kind, family_of


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
