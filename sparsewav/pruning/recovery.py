"""Recovery: after a transformer layer is pruned, fit its output to that of the dense model's layer.

No labels are needed: the target of the regression is the dense layer's output on the dense model's hidden states, and
its inputs are the hidden states of the model as pruned so far. Either the kept weights, biases and layer norms of the
layer are trained (``reconstruction``), or its last bias or layer norm is solved for (``affine``); pruned weights stay
zero.

The errors of a layer's outputs can be weighted by the covariance G of the gradients there
(:mod:`~sparsewav.pruning.gradient_covariance`): the loss is dGdᵀ for the error d of a frame then, half of which is what
it does to the model's posteriors, to second order. With LLᵀ = G it is the squared error of the outputs times L.

After the weights were rounded the layer can be recovered once more on the grid: biases and norms learn as before, and a
weight moves by whole multiples of its scale, by straight-through gradients (Bengio et al. 2013): Adam moves a copy that
is not rounded, and the gradient is taken at what that copy is rounded to.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sparsewav.errors import UserError
from sparsewav.pruning import distributed
from sparsewav.pruning.encoder import PrunableMatrix
from sparsewav.pruning.hessian import Progress
from sparsewav.pruning.hidden_states import LayerInputs, valid_rows
from sparsewav.pruning.solvers.factorization import damp_covariance
from sparsewav.pruning.solvers.quantize import QuantizedMatrix
from sparsewav.settings.recovery import Affine, Reconstruction

RunLayer = Callable[[LayerInputs], Float[Tensor, "batch frames width"]]
"""Gives a layer's output for a batch."""


@dataclass(frozen=True)
class LayerRecovery:
    """What the recovery of one layer achieved.

    Attributes:
        error_before: ||Y − Ŷ||² / ||Y||² over the calibration set, where Y are the dense model's outputs of the layer,
            both times L where the outputs are weighted.
        error: The same after the recovery.
        diverged: The recovery came to numbers that are not finite, and the layer stayed as it was.
    """

    error_before: float
    error: float
    diverged: bool = False


@dataclass(frozen=True)
class ModelRecovery:
    """What the recovery of the whole model achieved.

    Attributes:
        loss_before: The loss on the utterances that were held back, before it.
        loss: The same of the model that was kept; where no moment was better, that of the model as it was pruned.
        updates: The updates that were made, of which those behind the best moment are lost.
        best_update: The update behind which the loss was least; 0 where none was better.
    """

    loss_before: float
    loss: float
    updates: int
    best_update: int

    @property
    def warnings(self) -> list[str]:
        """A sentence where nothing was gained."""
        if self.best_update or not self.loss_before:  # without a loss there is nothing to learn
            return []
        return [
            "the recovery of the whole model found none with a smaller loss on the utterances that it held back, and "
            "the model stays as it was pruned; lower recovery.learning_rate, or give more utterances"
        ]


def recover(
    layer: nn.Module,
    matrices: list[PrunableMatrix],
    run: RunLayer,
    inputs: list[LayerInputs],
    settings: Reconstruction | Affine,
    seed: int,
    progress: Progress | None = None,
    *,
    grids: Mapping[str, QuantizedMatrix] | None = None,
    covariance: Float[Tensor, "width width"] | None = None,
) -> LayerRecovery:
    """Fit a pruned layer's output to the dense model's, in place; a weight that is zero stays zero.

    Args:
        layer: The pruned layer.
        matrices: The layer's prunable matrices.
        run: Gives the layer's output for a batch.
        inputs: This process's batches, with the dense model's outputs of the layer as ``dense_states``.
        settings: How.
        seed: The seed of the order of the batches.
        progress: Called after every step.
        grids: How the matrices were rounded, by name: their scales stay, and every weight on its grid.
        covariance: That of the gradients at the layer's output, for ``Reconstruction(output_weighting="fisher")``.

    Raises:
        UserError: The outputs of the dense or of the pruned layer are not finite, as where they overflow float16.
    """
    if isinstance(settings, Reconstruction):
        steps, learning_rate, weighting = settings.steps, settings.learning_rate, None
        if settings.weights_outputs:
            assert covariance is not None
            weighting = torch.linalg.cholesky(damp_covariance(covariance, settings.output_damping))
        return reconstruct_layer(
            layer,
            matrices,
            run,
            inputs,
            steps=steps,
            learning_rate=learning_rate,
            seed=seed,
            progress=progress,
            grids=grids,
            weighting=weighting,
        )
    return correct_layer(layer, matrices, run, inputs)


@torch.no_grad()
def reconstruct_layer(
    layer: nn.Module,
    matrices: list[PrunableMatrix],
    run: RunLayer,
    inputs: list[LayerInputs],
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    progress: Progress | None = None,
    grids: Mapping[str, QuantizedMatrix] | None = None,
    weighting: Float[Tensor, "width width"] | None = None,
) -> LayerRecovery:
    """Train a pruned layer on the dense model's outputs, with Adam and a learning rate that falls linearly to zero.

    A step takes one calibration batch, in a process group one in every process. The layer is restored if its error has
    not fallen in the end. The arguments are those of :func:`recover` and ``Reconstruction``; ``weighting`` is L.
    """
    device = next(layer.parameters()).device
    grid_of = {matrix.parameter: grids[matrix.name] for matrix in matrices} if grids else {}
    learning = list(_learning(layer, matrices))
    masks = [parameter == 0 if parameter.dim() > 1 else None for parameter in learning]
    before = [parameter.detach().clone() for parameter in learning]
    error_before = _finite_error(run, inputs, device, weighting)
    # Of a rounded weight Adam has a copy that moves freely, of one in half precision a copy that does not lose its
    # small steps, and of any other parameter the parameter itself.
    copied = {item for item in learning if item in grid_of or item.dtype.itemsize < torch.float32.itemsize}
    moved = [
        item.detach().to(torch.promote_types(item.dtype, torch.float32), copy=True) if item in copied else item
        for item in learning
    ]
    optimizer = torch.optim.Adam(moved, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / max(steps, 1))
    batches = _in_random_order(inputs, seed)
    for step in range(steps):
        with distributed.together(), torch.enable_grad(), _requiring_gradients(learning):
            gradients, frames = _gradients(run, next(batches, None), learning, device, weighting)
        distributed.add_up(frames)
        for free, gradient, removed in zip(moved, gradients, masks, strict=True):
            distributed.add_up(gradient)
            gradient /= frames
            free.grad = (gradient if removed is None else gradient.masked_fill_(removed, 0.0)).to(free.dtype)
        optimizer.step()
        schedule.step()
        for parameter, free in zip(learning, moved, strict=True):
            if grid := grid_of.get(parameter):
                parameter.copy_(grid.nearest(free.flatten(1)).view_as(parameter))
            elif parameter in copied:
                parameter.copy_(free)
        if progress:
            progress(step + 1, steps)
    for parameter in learning:
        parameter.grad = None
    return _keep_if_better(LayerRecovery(error_before, _error(run, inputs, device, weighting)), learning, before)


@torch.no_grad()
def correct_layer(
    layer: nn.Module, matrices: list[PrunableMatrix], run: RunLayer, inputs: list[LayerInputs]
) -> LayerRecovery:
    """Fit a pruned layer's outputs to the dense model's by an affine map of every channel, in place.

    With y a channel's outputs and t the dense model's, the map is the least squares solution of t ≈ g·y + c. Where the
    layer ends with a layer norm, g and c are merged into its gain and bias; elsewhere g is 1, and c, the mean of t − y,
    is added to the bias of the last matrix. Where there is no such bias, c is 0. The arguments are those of
    :func:`recover`.
    """
    device = next(layer.parameters()).device
    error_before = _finite_error(run, inputs, device)
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
    last: Any = layer.get_submodule(norms[0]) if norms else matrices[-1].module
    learning = list(last.parameters())
    before = [parameter.detach().clone() for parameter in learning]
    if sums is None:
        sums = torch.zeros(5, len(last.weight), dtype=torch.float64, device=device)
    distributed.add_up(sums)
    mean_target, mean_output, square, product = sums[1:] / sums[0]
    if last.bias is None:
        mean_target, mean_output = torch.zeros_like(mean_target), torch.zeros_like(mean_output)
    gain = torch.ones_like(mean_output)
    if norms:
        variance = (square - mean_output.square()).clamp(min=0.0)
        live = variance > 1e-12 * square
        gain = torch.where(live, (product - mean_output * mean_target) / variance.where(live, 1.0), gain)
        for parameter in learning:
            parameter.data *= gain
    if last.bias is not None:
        last.bias.data += mean_target - gain * mean_output
    return _keep_if_better(LayerRecovery(error_before, _error(run, inputs, device)), learning, before)


def _keep_if_better(result: LayerRecovery, learned: list[nn.Parameter], before: list[Tensor]) -> LayerRecovery:
    """Take the learned values back where the error has not fallen, or is not finite."""
    if result.error < result.error_before:
        return result
    for parameter, value in zip(learned, before, strict=True):
        parameter.data.copy_(value)
    return LayerRecovery(result.error_before, result.error_before, diverged=not math.isfinite(result.error))


def _last_norm(layer: nn.Module, run: RunLayer, item: LayerInputs) -> str:
    """Give the name of the layer norm whose output is the layer's output; empty if there is none."""
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


def _learning(layer: nn.Module, matrices: list[PrunableMatrix]) -> Iterator[nn.Parameter]:
    """Yield the weights and biases of the prunable matrices and the layer norms."""
    pruned = {matrix.module for matrix in matrices}
    for module in layer.modules():
        if isinstance(module, nn.LayerNorm) or module in pruned:
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
    """Repeat the batches without end, each time in another order."""
    generator = torch.Generator().manual_seed(seed)
    while inputs:
        for index in torch.randperm(len(inputs), generator=generator).tolist():
            yield inputs[index]


def _gradients(
    run: RunLayer,
    item: LayerInputs | None,
    learning: list[nn.Parameter],
    device: torch.device,
    weighting: Float[Tensor, "width width"] | None,
) -> tuple[list[Tensor], Float[Tensor, ""]]:
    """Give the gradients of the squared error summed over a batch, and the number of elements summed over."""
    if item is None:  # a process without any batch
        return [torch.zeros_like(parameter) for parameter in learning], torch.zeros((), device=device)
    difference, target = _difference(run, item, device, weighting)
    # The norm before an attention of which nothing is left has no part in the output.
    gradients = torch.autograd.grad(difference.square().sum(), learning, allow_unused=True, materialize_grads=True)
    return [gradient.contiguous() for gradient in gradients], torch.tensor(float(target.numel()), device=device)


def _difference(
    run: RunLayer, item: LayerInputs, device: torch.device, weighting: Float[Tensor, "width width"] | None = None
) -> tuple[Float[Tensor, "frames width"], Float[Tensor, "frames width"]]:
    """Give the output minus the target, and the target, of a batch's frames, both times L if there is one."""
    _, frame_mask = item.load("others", device)
    target = item.load("dense_states", device)
    frame_mask = valid_rows(frame_mask, target.shape[1])
    target = target[frame_mask]
    difference = run(item)[frame_mask] - target
    if weighting is None:
        return difference, target
    return difference @ weighting.to(target.dtype), target @ weighting.to(target.dtype)


def _finite_error(
    run: RunLayer,
    inputs: list[LayerInputs],
    device: torch.device,
    weighting: Float[Tensor, "width width"] | None = None,
) -> float:
    error = _error(run, inputs, device, weighting)
    if not math.isfinite(error):
        raise UserError(
            "the outputs of the dense or of the pruned layer are not finite on the calibration set; load the model in "
            "float32"
        )
    return error


@torch.no_grad()
def _error(
    run: RunLayer,
    inputs: list[LayerInputs],
    device: torch.device,
    weighting: Float[Tensor, "width width"] | None = None,
) -> float:
    sums = torch.zeros(2, dtype=torch.float64)
    with distributed.together():
        for item in inputs:
            parts = _difference(run, item, device, weighting)
            sums += torch.stack([part.square().sum(dtype=torch.float64).cpu() for part in parts])
    found = distributed.gather(sums.tolist())
    return sum(error for error, _ in found) / max(sum(energy for _, energy in found), 1e-30)
