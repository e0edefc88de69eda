"""Removing channels of the front end's convolutions: they go out of what makes them and of what reads them, at once.

The channels of one convolution after the other are chosen, on the front end without those that were removed before, by
what the next convolution (or the projection of the features) can make up for: a channel is a group of the columns of
the matrix that reads it (:mod:`~sparsewav.pruning.solvers.groups`), unfolded. They are cut out of the model in place,
which has smaller modules and a smaller ``conv_dim`` in its configuration then, and is of its class as before. So the
model that is measured, and that the layers are calibrated on, is the smaller one itself.

A group norm has a group for each channel: without one, the others stay what they are, and the matrix that reads them
has the exact least squares solution. A layer norm is over all channels; without some of them its mean and its deviation
are others at every frame. This cannot be made up for exactly. It stands behind every convolution of models with
``feat_extract_norm="layer"``, and before the projection in all (but some HuBERT models). Here the norm's weight and
bias become those with which it gives each channel most nearly what the norm over all channels gave (least squares on
the calibration set), and the matrix that reads them is then fitted anew to what it had put out. With the asymmetric
objective every such matrix is fitted, to what it puts out in the dense front end, which is run beside; its
``strength`` is not read here.
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsewav.pruning import distributed
from sparsewav.pruning.encoder import run_base
from sparsewav.pruning.families import windows_in
from sparsewav.pruning.hessian import Hessians, InputObserver, collect_hessian_in_front
from sparsewav.pruning.hidden_states import StopForward, calibration_parts, layer_masks
from sparsewav.pruning.output_error import output_energy, output_error
from sparsewav.pruning.solvers.groups import GroupRemoval, remove_groups
from sparsewav.pruning.solvers.solve import check_finite
from sparsewav.pruning.structure import ChannelSet, FrontEnd
from sparsewav.pruning.structured import StructureReport
from sparsewav.settings.pruning import Calibration

ROWS = 4096
"""Frames of a batch at most that the norms are fitted on; they are spread evenly over it."""

Fit = tuple[Float[Tensor, " kept"], Float[Tensor, " kept"]]
"""What a normalized channel is multiplied by, and what is added to it, so that it is nearest to what it was."""


@dataclass(frozen=True)
class ChannelCut:
    """What becomes of a channel set.

    Attributes:
        kept: The channels that stay, ascending.
        weight: The matrix that reads them; the columns of the others are zero.
        norms: What the layer norms over them are corrected by, by name.
    """

    kept: Int[Tensor, " kept"]
    weight: Float[Tensor, "rows cols"]
    norms: dict[str, Fit] = field(default_factory=dict)


def front_tensors(model: PreTrainedModel, front: FrontEnd) -> dict[str, Tensor]:
    """Give the values of the parameters that removing channels changes, by name; they are not copied."""
    names = [name for channels in front.sets for name in (f"{channels.name}.weight", *channels.vectors)]
    return {name: model.get_parameter(name).data for name in [*names, f"{front.sets[-1].reader.name}.weight"]}


def put_front(model: PreTrainedModel, front: FrontEnd, tensors: Mapping[str, Tensor]) -> None:
    """Give a model these values of :func:`front_tensors`, and its modules and configuration their sizes."""
    for name, tensor in tensors.items():
        parameter = model.get_parameter(name)
        if parameter.shape != tensor.shape:
            parameter.grad = None
        parameter.data = tensor
        module: Any = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, nn.Conv1d):
            module.out_channels, module.in_channels = module.weight.shape[:2]
        elif isinstance(module, nn.Linear):
            module.in_features = module.weight.shape[1]
        elif isinstance(module, nn.GroupNorm):
            module.num_groups = module.num_channels = len(module.weight)
        elif isinstance(module, nn.LayerNorm):
            module.normalized_shape = tuple(module.weight.shape)
    former: Any = model.config
    sizes = [channels.count for channels in front.sets]
    if list(former.conv_dim) != sizes:
        config = copy.deepcopy(former)  # it may be another model's, too
        config.conv_dim = type(former.conv_dim)(sizes)
        for module in model.modules():
            if getattr(module, "config", None) is former:
                module.config = config


def cut_set(tensors: Mapping[str, Tensor], channels: ChannelSet, cut: ChannelCut) -> dict[str, Tensor]:
    """Give the values of :func:`front_tensors` without the channels of one set that do not stay."""
    result = dict(tensors)
    for name in (f"{channels.name}.weight", *channels.vectors):
        result[name] = tensors[name][cut.kept]
    for name, (scale, shift) in cut.norms.items():
        weight = result[f"{name}.weight"]
        result[f"{name}.bias"] = result[f"{name}.bias"] + weight * shift.to(weight.dtype)
        result[f"{name}.weight"] = weight * scale.to(weight.dtype)
    reader = f"{channels.reader.name}.weight"
    result[reader] = cut.weight.view(tensors[reader].shape)[:, cut.kept].contiguous()
    return result


@torch.no_grad()
def remove_channels(
    model: PreTrainedModel,
    front: FrontEnd,
    number: int,
    batches: Sequence[dict[str, Tensor]],
    damping: float,
    calibration: Calibration,
    seed: int,
    hessians: Hessians | None = None,
    *,
    asymmetric: bool = False,
) -> list[tuple[StructureReport, Int[Tensor, " _kept"]]]:
    """Remove channels of every convolution in place, from the first to the last.

    Args:
        model: A model in evaluation mode.
        front: Its front end.
        number: How many channels the widest convolution keeps; the others keep the same share of theirs.
        batches: Calibration batches.
        damping: λ as a share of the mean diagonal of a Hessian.
        calibration: How many frames a Hessian is summed over.
        seed: The seed of their sample.
        hessians: Those of the dense model, for propagation ``parallel``; None to sum each on the smaller front end.
        asymmetric: Whether what reads channels is fitted to the dense front end's outputs.

    Returns:
        For every convolution what is said of it, and the channels that stay.

    Raises:
        UserError: The set is empty, or a value is not finite.
    """
    done: list[tuple[StructureReport, Tensor]] = []
    dense_front = front_tensors(model, front)
    for channels, count in zip(front.sets, front.kept(number), strict=True):
        dense, parts, error = channels.reader.weight.detach().clone(), channels.count, 0.0
        kept = torch.arange(parts)
        if count < parts:
            sample = calibration.frames_per_column
            found = hessians or collect_hessian_in_front(
                model, channels.reader, batches, frames_per_column=sample, seed=seed
            )
            hessian = found.of(channels.reader.name)
            removal = remove_groups(dense, hessian, channels.size, [count], damping, channels.reader.name)[0]
            norms = fit_norms(model, batches, channels, removal.kept)
            cut = ChannelCut(removal.kept, removal.weight, norms)
            cut = distributed.broadcast(cut)  # GPU sums are not deterministic, and all processes must agree
            before = front_tensors(model, front)
            put_front(model, front, cut_set(before, channels, cut))
            error, kept = removal.error, cut.kept.cpu()
            if channels.norms or asymmetric:
                beside = dense_front if asymmetric else before
                fitted = _fit_reader(model, front, channels, cut, beside, batches, damping, calibration, seed)
                channels.reader.parameter.data = fitted.weight.view(channels.reader.parameter.shape)
                error += fitted.error
            check_finite(channels.reader.weight, channels.reader.name)
            error /= output_energy(dense, found, channels.reader.name)
        report = StructureReport(channels.name, front.layer, front.kind, channels.size, parts, count, error)
        done.append((report, kept))
    return done


def fit_norms(
    model: PreTrainedModel, batches: Sequence[dict[str, Tensor]], channels: ChannelSet, kept: Int[Tensor, " kept"]
) -> dict[str, Fit]:
    """Fit layer norms over fewer channels to those over all, channel by channel, in one pass; nothing is changed.

    Args:
        model: A model in evaluation mode.
        batches: Calibration batches.
        channels: The channels.
        kept: Those that are to stay.

    Returns:
        The corrections by the name of the norm.
    """
    moments = {name: torch.zeros(5, len(kept), dtype=torch.float64, device=kept.device) for name in channels.norms}
    if not moments:
        return {}
    lengths: Tensor = torch.zeros(0)

    def watch(name: str, norm: nn.LayerNorm) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            counts, values = lengths, inputs[0]
            for window in channels.windows:
                counts = windows_in(counts, *window)
            rows = values[torch.arange(values.shape[1], device=values.device) < counts[:, None]].float()
            rows = rows[:: math.ceil(len(rows) / ROWS)]
            target = nn.functional.layer_norm(rows, rows.shape[1:], eps=norm.eps)[:, kept]
            own = nn.functional.layer_norm(rows[:, kept], kept.shape, eps=norm.eps)
            pieces = (torch.ones_like(own), own, target, own * own, own * target)
            moments[name] += torch.stack([piece.sum(0, dtype=torch.float64) for piece in pieces])

        return norm.register_forward_pre_hook(hook)

    hooks = [watch(name, norm) for name, norm in channels.norms.items()]
    try:
        with distributed.together(), _stopping_at(channels.reader.module):
            for _, part, _ in calibration_parts(model, batches):
                lengths = part["attention_mask"].sum(1)
                with suppress(StopForward):
                    run_base(model, part)
    finally:
        for handle in hooks:
            handle.remove()
    for total in moments.values():
        distributed.add_up(total)
    return {name: _regression(total) for name, total in moments.items()}


def _regression(moments: Float[Tensor, "5 kept"]) -> Fit:
    """Give the line through (own, target) for every channel, from their number, sums and products."""
    number, own, target, square, product = moments
    own, target, square, product = (total / number.clamp(min=1) for total in (own, target, square, product))
    variance = square - own.square()
    varies = variance > 1e-9
    scale = torch.where(varies, (product - own * target) / torch.where(varies, variance, 1.0), 1.0)
    return scale.float(), (target - scale * own).float()


def _fit_reader(
    model: PreTrainedModel,
    front: FrontEnd,
    channels: ChannelSet,
    cut: ChannelCut,
    beside: Mapping[str, Tensor],
    batches: Sequence[dict[str, Tensor]],
    damping: float,
    calibration: Calibration,
    seed: int,
) -> GroupRemoval:
    """Give the matrix that makes of the channels after a cut most nearly what it makes of them in another front end.

    It is the asymmetric objective (:mod:`~sparsewav.pruning.solvers.solve`) between the two front ends, which are run
    one after the other on every batch. The other one (``beside``, values of :func:`front_tensors`) has all channels of
    this set, of which those that were removed are not read.
    """
    after, reader = front_tensors(model, front), channels.reader
    # They stand for the reader in both front ends, and see the channels that stay.
    now, then = copy.deepcopy(reader.module), copy.deepcopy(reader.module)
    observer = InputObserver([replace(reader, module=now)], calibration.frames_per_column, seed, {reader.name: then})
    with distributed.together(), observer.attached():
        for number, part, share in calibration_parts(model, batches):
            observer.start_batch(layer_masks(model, part), number, share)
            put_front(model, front, beside)
            read = _input_of(model, reader.module, part)
            then(read.index_select(1 if isinstance(then, nn.Conv1d) else 2, cut.kept))
            put_front(model, front, after)
            now(_input_of(model, reader.module, part))
            observer.end_batch()
    found = observer.finish()
    weight, hessian, drift = reader.weight.detach(), found.of(reader.name), found.drifts[reader.name]
    groups = weight.shape[1] // channels.size
    fitted = remove_groups(weight, hessian, channels.size, [groups], damping, reader.name, drift)[0]
    error = output_error(weight, fitted.weight, found, reader.name)
    return distributed.broadcast(replace(fitted, error=max(error, 0.0)))


def _input_of(model: PreTrainedModel, module: nn.Module, part: dict[str, Tensor]) -> Float[Tensor, "batch _ _"]:
    """Run a model on a batch as far as a module, and give what that reads."""
    read: list[Tensor] = []
    with module_hook(module, lambda _, inputs: read.append(inputs[0])), _stopping_at(module), suppress(StopForward):
        run_base(model, part)
    return read[0]


@contextmanager
def module_hook(module: nn.Module, hook: Any) -> Iterator[None]:
    """Within the block, call a hook with (module, inputs) before a module is run."""
    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _stopping_at(module: nn.Module) -> Any:
    """Within the block, end every forward pass at a module."""

    def stop(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        raise StopForward

    return module_hook(module, stop)


@dataclass
class FrontLevels:
    """A front end at several levels: with fewer and fewer channels.

    Attributes:
        model: The model.
        front: Its front end.
        numbers: How many channels the widest convolution keeps at every level, ascending.
        dense: The values of :func:`front_tensors` in the dense model.
        levels: Those at every level.
    """

    model: PreTrainedModel
    front: FrontEnd
    numbers: list[int]
    dense: dict[str, Tensor]
    levels: list[dict[str, Tensor]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The name of the front end."""
        return self.front.name

    @property
    def layer(self) -> int:
        """What stands for the index of its layer."""
        return self.front.layer

    def put(self, index: int | None) -> None:
        """Give the model the front end at a level; None for the dense one."""
        put_front(self.model, self.front, self.dense if index is None else self.levels[index])


def front_levels(
    model: PreTrainedModel,
    front: FrontEnd,
    numbers: Sequence[int],
    batches: Sequence[dict[str, Tensor]],
    *arguments: Any,
    **options: Any,
) -> FrontLevels:
    """Remove channels as :func:`remove_channels` does, for several numbers; the model is the same afterwards.

    Its arguments are those of :func:`remove_channels`. The levels are in memory; together they are as large as a third
    of so many front ends.
    """
    found = FrontLevels(model, front, list(numbers), front_tensors(model, front))
    try:
        for number in numbers:
            remove_channels(model, front, number, batches, *arguments, **options)
            found.levels.append(front_tensors(model, front))
            found.put(None)
    finally:
        found.put(None)
    return found
