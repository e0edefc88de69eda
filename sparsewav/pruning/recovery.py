"""Recovery: after a transformer layer is pruned, bring its output back to what the dense model's layer gives.

No labels are needed: the target of the regression is the dense layer's output on the dense model's hidden states, its
input are the hidden states of the model as pruned so far. Either the kept weights, the biases and the layer norms of
the layer learn, or its last bias, or layer norm, is solved for; what was removed stays removed.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsewav.pruning import distributed
from sparsewav.pruning.encoder import ROLES
from sparsewav.pruning.hidden_states import LayerInputs

RECOVERIES = ("none", "affine", "reconstruction")


@dataclass(frozen=True)
class LayerRecovery:
    """What the recovery of one layer reached.

    Attributes:
        error_before: ||Y − Ŷ||² / ||Y||², Y the dense model's outputs of the layer, over the calibration set.
        error: the same afterwards.
    """

    error_before: float
    error: float


def recover_layer(
    layer: nn.Module,
    run: Callable[[LayerInputs], Tensor],
    inputs: list[LayerInputs],
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> LayerRecovery:
    """Let a pruned layer learn the dense model's outputs, with Adam and a rate that falls to zero.

    A step is one calibration batch, in a process group one in every process. A layer that would end worse than it
    began stays as it was.

    Args:
        layer: changed in place; a weight that is zero stays zero.
        run: gives the layer's output for a batch, shape (batch, frames, width).
        inputs: this process's batches, with the targets as ``dense_states``.
        steps: how many.
        learning_rate: at the first step.
        seed: of the order of the batches.
        progress: called after every step.
    """
    device = next(layer.parameters()).device
    learning = list(_learning(layer))
    masks = [parameter == 0 if parameter.dim() == 2 else None for parameter in learning]
    before = [parameter.detach().clone() for parameter in learning]
    error_before = _error(run, inputs, device)
    optimizer = torch.optim.Adam(learning, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / max(steps, 1))
    batches = _in_random_order(inputs, seed)
    for step in range(steps):
        with distributed.together(), torch.enable_grad(), _requiring_gradients(learning):
            gradients, frames = _gradients(run, next(batches, None), learning, device)
        distributed.add_up(frames)
        for parameter, gradient, removed in zip(learning, gradients, masks, strict=True):
            distributed.add_up(gradient)
            gradient /= frames
            parameter.grad = gradient if removed is None else gradient.masked_fill_(removed, 0.0)
        optimizer.step()
        schedule.step()
        if progress:
            progress(step + 1, steps)
    for parameter in learning:
        parameter.grad = None
    error = _error(run, inputs, device)
    if not error < error_before:
        for parameter, value in zip(learning, before, strict=True):
            parameter.data.copy_(value)
        error = error_before
    return LayerRecovery(error_before, error)


@torch.no_grad()
def correct_layer(layer: nn.Module, run: Callable[[LayerInputs], Tensor], inputs: list[LayerInputs]) -> LayerRecovery:
    """Bring a pruned layer's outputs, channel by channel, as close to the dense model's as an affine map can.

    With y a channel's outputs and t the dense model's, the map is the least squares solution of t ≈ g·y + c. Where the
    layer ends with its layer norm, g and c go into the gain and the bias of that; elsewhere g is 1, and c, the mean of
    t − y, goes into the bias of the last matrix.

    Args:
        layer: changed in place.
        run: gives the layer's output for a batch, shape (batch, frames, width).
        inputs: this process's batches, with the targets as ``dense_states``.
    """
    device = next(layer.parameters()).device
    error_before = _error(run, inputs, device)
    norm = _last_norm(layer, run, inputs[0]) if inputs else None
    norms = [norm for norm in distributed.gather(norm) if norm]
    sums: Tensor | None = None  # of 1, t, y, y² and y·t; shape (5, width)
    with distributed.together():
        for item in inputs:
            difference, target = (part.double() for part in _difference(run, item, device))
            output = difference + target
            products = (torch.ones_like(target), target, output, output.square(), output * target)
            found = torch.stack([product.sum(0) for product in products])
            sums = found if sums is None else sums + found
    last: Any = layer.get_submodule(norms[0] if norms else _last_matrix(layer))
    bias: Tensor = last.bias.data
    if sums is None:
        sums = torch.zeros(5, len(bias), dtype=torch.float64, device=device)
    distributed.add_up(sums)
    mean_target, mean_output, square, product = sums[1:] / sums[0]
    gain = torch.ones_like(mean_output)
    if norms:
        variance = (square - mean_output.square()).clamp(min=0.0)
        live = variance > 1e-12 * square
        gain = torch.where(live, (product - mean_output * mean_target) / variance.where(live, 1.0), gain)
        last.weight.data *= gain
        bias *= gain
    bias += mean_target - gain * mean_output
    return LayerRecovery(error_before, _error(run, inputs, device))


def _last_norm(layer: nn.Module, run: Callable[[LayerInputs], Tensor], item: LayerInputs) -> str:
    """Name of the layer norm whose output is the layer's; empty if there is none."""
    outputs: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output, name=name: outputs.update({name: output}))
        for name, module in layer.named_modules()
        if isinstance(module, nn.LayerNorm)
    ]
    try:
        output = run(item)
    finally:
        for hook in hooks:
            hook.remove()
    return next((name for name, own in outputs.items() if torch.equal(own, output)), "")


def _last_matrix(layer: nn.Module) -> str:
    names = [name for name, module in layer.named_modules() if isinstance(module, nn.Linear)]
    return [name for name in names if name.rpartition(".")[2] in ROLES][-1]


def _learning(layer: nn.Module) -> Iterator[nn.Parameter]:
    """Weights and biases of the prunable matrices, and the layer norms."""
    for name, module in layer.named_modules():
        if isinstance(module, nn.LayerNorm) or (isinstance(module, nn.Linear) and name.rpartition(".")[2] in ROLES):
            yield from module.parameters()


@contextmanager
def _requiring_gradients(parameters: list[nn.Parameter]) -> Iterator[None]:
    wanted = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, before in zip(parameters, wanted, strict=True):
            parameter.requires_grad_(before)


def _in_random_order(inputs: list[LayerInputs], seed: int) -> Iterator[LayerInputs]:
    """The batches, again and again, each time in another order."""
    generator = torch.Generator().manual_seed(seed)
    while inputs:
        for index in torch.randperm(len(inputs), generator=generator).tolist():
            yield inputs[index]


def _gradients(
    run: Callable[[LayerInputs], Tensor], item: LayerInputs | None, learning: list[nn.Parameter], device: torch.device
) -> tuple[list[Tensor], Tensor]:
    """Gradients of the squared error summed over a batch's frames, and how many numbers those frames have."""
    if item is None:  # a process without a share of the set
        return [torch.zeros_like(parameter) for parameter in learning], torch.zeros((), device=device)
    difference, target = _difference(run, item, device)
    gradients = torch.autograd.grad(difference.square().sum(), learning)
    return [gradient.contiguous() for gradient in gradients], torch.tensor(float(target.numel()), device=device)


def _difference(run: Callable[[LayerInputs], Tensor], item: LayerInputs, device: torch.device) -> tuple[Tensor, Tensor]:
    """Output less target, and target, of a batch's frames; both (frames, width)."""
    _, frame_mask = item.load("others", device)
    target = item.load("dense_states", device)[frame_mask]
    return run(item)[frame_mask] - target, target


@torch.no_grad()
def _error(run: Callable[[LayerInputs], Tensor], inputs: list[LayerInputs], device: torch.device) -> float:
    sums = torch.zeros(2, dtype=torch.float64)
    with distributed.together():
        for item in inputs:
            parts = _difference(run, item, device)
            sums += torch.stack([part.square().sum(dtype=torch.float64).cpu() for part in parts])
    found = distributed.gather(sums.tolist())
    return sum(error for error, _ in found) / max(sum(energy for _, energy in found), 1e-30)
