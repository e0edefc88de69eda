"""Covariance of the gradients at the output of every matrix, or layer: how the model's output depends on errors there.

An error ΔW of a matrix changes its output by ΔWX. To second order the divergence of the model's posteriors that it
causes is half of its Fisher information, which K-FAC takes for the Kronecker product of two small matrices (Martens and
Grosse 2015, section 3): with H = XXᵀ of the input and G the mean of ggᵀ over the frames, where g is the gradient of
log p(c) at the matrix's output for a label c drawn from the frame's posteriors,

    KL(dense || pruned) ≈ ½ tr(G ΔW H ΔWᵀ) / frames.

The labels are drawn from the dense model's own posteriors, so that no transcripts are read. Of an encoder without a
head it is the same for half the squared error of the last hidden states, the divergence of normal distributions of
variance one around them.
"""

from collections.abc import Iterable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from sparsewav.errors import UserError
from sparsewav.pruning import distributed
from sparsewav.pruning.allocation.divergence import backpropagate_samples, model_output, output_mask
from sparsewav.pruning.allocation.sensitivity import only_matrices_trainable
from sparsewav.pruning.batches import as_sequence
from sparsewav.pruning.encoder import (
    encoder_layers,
    has_head,
    in_evaluation_mode,
    layers_name,
    projections_as_modules,
    prunable_matrices,
)
from sparsewav.pruning.families import encoder_config
from sparsewav.pruning.hessian import Progress
from sparsewav.pruning.hidden_states import calibration_parts, layer_masks
from sparsewav.settings.pruning import TRANSFORMER


def collect_gradient_covariances(
    model: PreTrainedModel,
    batches: Iterable[dict[str, Tensor]],
    *,
    scope: str = TRANSFORMER,
    of_matrices: bool = True,
    of_layers: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Float[Tensor, "_rows _rows"]]:
    """Give G of every matrix and every layer by name, from one forward and backward pass over all batches.

    In a process group each process takes its share of the batches, and all get those of the whole set. In float32 those
    of the matrices take 0.6 GB for a base model (12 layers, 768 wide) and 2.1 GB for a large one (24, 1024).

    Args:
        model: A CTC model, or an encoder without a head; its parameters, and their gradients, stay as they are.
        batches: Calibration batches, as :func:`~sparsewav.pruning.batches.pieces_of` reads them; labels are not read.
        scope: Of which matrices, as in :func:`~sparsewav.pruning.encoder.prunable_matrices`.
        of_matrices: Whether to give those at the outputs of the matrices.
        of_layers: Whether to give those at the outputs of the layers, by the names of :func:`layer_name`.
        seed: The seed of the labels that are drawn, from which every batch has its own.
        progress: Called after every batch.

    Raises:
        UserError: The set is empty, or a gradient is not finite.
    """
    every, sized = prunable_matrices(model, scope), as_sequence(batches)
    watched = every if of_matrices else []
    layers = {layer_name(model, index): layer for index, layer in enumerate(encoder_layers(model) if of_layers else ())}
    widths = {matrix.name: len(matrix.weight) for matrix in watched}
    widths |= dict.fromkeys(layers, encoder_config(model.config).hidden_size)
    sums = {name: torch.zeros(width, width, dtype=torch.float32, device=model.device) for name, width in widths.items()}
    frames = 0

    def add(name: str, gradients: Float[Tensor, "rows features"]) -> None:
        gradients = gradients.float()
        sums[name].addmm_(gradients.T, gradients)

    with (
        distributed.together(),
        in_evaluation_mode(model),
        only_matrices_trainable(model, every),
        projections_as_modules(model),
        torch.enable_grad(),
    ):
        for number, part, _ in calibration_parts(model, sized):
            unlabelled = {name: value for name, value in part.items() if name != "labels"}
            mask = output_mask(model, part)
            frames += int(mask.sum())
            backpropagate_samples(
                partial(model_output, model, unlabelled, mask),
                watched,
                layer_masks(model, part),
                torch.Generator().manual_seed(seed * 1_000_003 + number),  # the same in any number of processes
                add,
                of_posteriors=has_head(model),
                layers=layers,
            )
            for matrix in every:
                matrix.parameter.grad = None
            if progress:
                progress(min(number // 1000 + distributed.world(), len(sized)), len(sized))
    count = sum(distributed.gather(frames))
    if count == 0:
        raise UserError("the calibration set is empty; give at least one utterance")
    for name, total in sums.items():
        distributed.add_up(total)
        total /= count
        if not total.isfinite().all():
            raise UserError(
                f"the gradients at the output of {name} on the calibration set are NaN or infinite; check the model's "
                "weights, or load it in float32"
            )
    return sums


def layer_name(model: PreTrainedModel, index: int) -> str:
    """Give the name of a layer, e.g. ``wav2vec2.encoder.layers.0``."""
    return f"{layers_name(model)}.{index}"
