"""Cutting attention heads and feed-forward units out of a model: a smaller model that computes the same without them.

Channels of the front end are cut by the pruning itself (:mod:`~sparsewav.pruning.channels`), and a model without some
of them stays of its class, with a smaller ``conv_dim``.

In transformers the width of a head is ``hidden_size / num_attention_heads``, so that no class of its own can have fewer
heads of the same width. A model that keeps all heads and equally many units in every layer stays of its class, with a
smaller ``intermediate_size``; every other one becomes one of :mod:`~sparsewav.models.structured`.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from sparsewav.errors import UserError
from sparsewav.models.load import SpeechModel
from sparsewav.models.structured import STRUCTURED, LayerShape
from sparsewav.pruning.encoder import encoder_layers, layers_name
from sparsewav.pruning.report import PruneReport
from sparsewav.pruning.structure import front_end, structures

Cuttable = TypeVar("Cuttable", PreTrainedModel, SpeechModel)


@dataclass(frozen=True)
class LayerCut:
    """What stays of a transformer layer: True for a dimension of query and key, of value, and for a unit that stays.

    A head stays where a dimension of its value does; without one, its ``query`` is not read. What the layer does not
    have, because it was cut before, has no elements.
    """

    query: Bool[Tensor, "heads width"]
    value: Bool[Tensor, "heads width"]
    units: Bool[Tensor, " units"]


@torch.no_grad()
def cut_model(model: PreTrainedModel, kept: Mapping[str, Int[Tensor, " kept"]]) -> PreTrainedModel:
    """Make the smaller model that computes what a model does whose other heads and units count for nothing.

    They count for nothing where their columns of ``attention.out_proj`` and ``feed_forward.output_dense`` are zero.

    Args:
        model: A model of a family that can be cut, or one that was cut before; it is not changed.
        kept: The indices of the parts that stay, by the name of their
            :class:`~sparsewav.pruning.structure.Structure`. Structures that it does not name stay whole. The channels
            that it names, by convolution, are those that the model still has.

    Returns:
        A new model on the same device, in evaluation mode.

    Raises:
        UserError: The model's family cannot be cut (:func:`~sparsewav.pruning.structure.structures`).
        ValueError: ``kept`` names another structure or part than the model has.
    """
    layers = len(encoder_layers(model))
    query, units = [torch.ones(0, 1, dtype=torch.bool)] * layers, [torch.ones(0, dtype=torch.bool)] * layers
    found = structures(model)
    channels = {name: parts for name, parts in kept.items() if ".conv_layers." in name}
    _check_channels(model, channels)
    kept = {name: parts for name, parts in kept.items() if name not in channels}
    if unknown := set(kept) - {structure.name for structure in found}:
        raise ValueError(f"the model has no structure {', '.join(sorted(unknown))}")
    for structure in found:
        stays = torch.ones(structure.count, dtype=torch.bool)
        if structure.name in kept:
            parts = kept[structure.name].cpu()
            if len(parts) and not 0 <= int(parts.min()) <= int(parts.max()) < structure.count:
                raise ValueError(f"{structure.name} has {structure.count} parts, and is to keep {parts.tolist()}")
            stays = torch.zeros_like(stays).index_fill_(0, parts.long(), True)
        if structure.kind == "heads":
            query[structure.layer] = stays[:, None].expand(-1, structure.size)
        else:
            units[structure.layer] = stays
    cuts = [LayerCut(heads, heads, stays) for heads, stays in zip(query, units, strict=True)]
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    sizes = {int(cut.units.sum()) for cut in cuts}
    heads_stay = model.config.model_type in STRUCTURED and all(cut.value.all() for cut in cuts)
    if heads_stay and len(sizes) == 1 and 0 not in sizes:
        config = copy.deepcopy(model.config)
        config.intermediate_size = sizes.pop()
        for prefix, cut in zip(_prefixes(model), cuts, strict=True):
            _cut_units(state, prefix, cut.units)
        return _filled(type(model), config, state, model)
    return cut_layers(model, state, cuts, {})


def cut(model: Cuttable, report: PruneReport) -> Cuttable:
    """Make the smaller model out of one that :func:`sparsewav.prune` has pruned with ``Structured``.

    Args:
        model: The pruned model, or the :class:`~sparsewav.models.load.SpeechModel` that has it; it is not changed.
        report: What ``prune`` gave for it.

    Returns:
        The same, with a smaller model that computes the same, up to rounding.

    Raises:
        UserError: No heads or units were removed, or this is another model.
    """
    pruned = model.model if isinstance(model, SpeechModel) else model
    if not report.kept:
        raise UserError("the report says of no parts which stay; prune with sparsewav.Structured(...) first")
    for structure in structures(pruned):
        kept = report.kept.get(structure.name)
        columns = structure.reader.weight.detach().unflatten(1, (structure.count, structure.size))
        gone = torch.ones(structure.count, dtype=torch.bool)
        if kept is None or (len(kept) and int(kept.max()) >= structure.count):
            continue
        if columns[:, gone.index_fill_(0, kept, False)].any():
            raise UserError(f"{structure.name} has weights that the report says are zero; give the model it is of")
    try:
        smaller = cut_model(pruned, report.kept)
    except ValueError as error:
        raise UserError(f"the report is of another model: {error}") from error
    return replace(model, model=smaller) if isinstance(model, SpeechModel) else smaller


def _check_channels(model: PreTrainedModel, kept: Mapping[str, Int[Tensor, " _kept"]]) -> None:
    """Refuse channels that are not as many as the convolutions of a model have.

    Raises:
        ValueError: They are not.
    """
    counts = {channels.name: channels.count for channels in front_end(model).sets} if kept else {}
    for name, parts in kept.items():
        if len(parts) != counts.get(name):
            raise ValueError(f"{name} has {counts.get(name, 'no')} channels, and {len(parts)} are to have stayed")


def cut_layers(
    model: PreTrainedModel, state: dict[str, Tensor], cuts: Sequence[LayerCut], settings: Mapping[str, Any]
) -> PreTrainedModel:
    """Make the model of :mod:`~sparsewav.models.structured` that has what stays of a model's layers.

    Args:
        model: The model.
        state: Its tensors by their names, or others of these shapes; what is cut is replaced in it.
        cuts: What stays of every layer.
        settings: What else differs in the new model's configuration.

    Returns:
        A new model with the tensors of ``state``, in evaluation mode.
    """
    shapes = []
    layers: Any = encoder_layers(model)
    for prefix, layer, cut in zip(_prefixes(model), layers, cuts, strict=True):
        former = getattr(layer.attention, "shape", None)
        heads = cut.value.any(-1).nonzero().squeeze(-1).tolist()
        if len(cut.value):
            _cut_attention(state, prefix + "attention.", cut)
        if len(cut.units):
            _cut_units(state, prefix, cut.units)
        shapes.append(
            LayerShape(
                heads=[former.heads[head] for head in heads] if former else heads,
                query_dims=cut.query[heads].sum(-1).tolist(),
                value_dims=cut.value[heads].sum(-1).tolist(),
                units=int(cut.units.sum()),
            )
        )
    config_class, model_class = type(model.config), type(model)
    if model.config.model_type in STRUCTURED:
        config_class, *classes = STRUCTURED[model.config.model_type]
        model_class = next(structured for structured in classes if issubclass(structured, type(model)))  # head or none
    values = model.config.to_dict()
    values.pop("model_type")
    values |= {**settings, "layers": [asdict(shape) for shape in shapes], "architectures": [model_class.__name__]}
    config = config_class(**values)
    return _filled(model_class, config, state, model)


def _prefixes(model: PreTrainedModel) -> list[str]:
    """Give what the names of each layer's tensors start with."""
    return [f"{layers_name(model)}.{index}." for index in range(len(encoder_layers(model)))]


def _filled(kind: Any, config: PretrainedConfig, state: dict[str, Tensor], model: PreTrainedModel) -> PreTrainedModel:
    """Give the model of a class and configuration with these tensors, in the types that they have."""
    config._attn_implementation = model.config._attn_implementation
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        made: PreTrainedModel = kind(config)
    made.load_state_dict(state, assign=True)
    return made.eval()


def _cut_attention(state: dict[str, Tensor], prefix: str, cut: LayerCut) -> None:
    """Cut the matrices of an attention; where no head stays, leave the bias of the last."""
    alive = cut.value.any(-1)
    if not alive.any():
        _leave_bias(state, prefix, "out_proj.bias", "constant.bias", besides="rel_attn_embed.weight")
        return
    query = (cut.query & alive[:, None]).flatten()
    for name, stays in (("q_proj", query), ("k_proj", query), ("v_proj", cut.value.flatten())):
        for kind in ("weight", "bias"):
            state[f"{prefix}{name}.{kind}"] = state[f"{prefix}{name}.{kind}"][stays]
    state[prefix + "out_proj.weight"] = state[prefix + "out_proj.weight"][:, cut.value.flatten()]
    if prefix + "gru_rel_pos_const" in state:
        state[prefix + "gru_rel_pos_const"] = state[prefix + "gru_rel_pos_const"][:, alive]


def _cut_units(state: dict[str, Tensor], prefix: str, units: Bool[Tensor, " units"]) -> None:
    """Cut the matrices of a layer's feed-forward network; where no unit stays, leave the bias of the last."""
    prefix += "feed_forward."
    if not units.any():
        _leave_bias(state, prefix, "output_dense.bias", "bias")
        return
    for kind in ("weight", "bias"):
        state[f"{prefix}intermediate_dense.{kind}"] = state[f"{prefix}intermediate_dense.{kind}"][units]
    state[prefix + "output_dense.weight"] = state[prefix + "output_dense.weight"][:, units]


def _leave_bias(state: dict[str, Tensor], prefix: str, bias: str, name: str, besides: str = "") -> None:
    """Rename the one tensor that is left of a sublayer, and drop the others."""
    state[prefix + name] = state.pop(prefix + bias)
    for other in [other for other in state if other.startswith(prefix)]:
        if other.removeprefix(prefix) not in (name, besides):
            del state[other]
