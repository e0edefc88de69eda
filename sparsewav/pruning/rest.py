"""Rounding what is not prunable: a dense front end, the head, biases, norms; and all of a model in half precision."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsewav.errors import UserError
from sparsewav.pruning.encoder import prunable_matrices
from sparsewav.pruning.solvers.quantize import round_to_nearest
from sparsewav.settings.quantization import Integers, Quantization, Rounded


@torch.no_grad()
def round_rest(model: PreTrainedModel, quantization: Quantization, scope: str) -> None:
    """Round in place all tensors of a model but the matrices that :mod:`~sparsewav.pruning.solvers.quantize` rounds.

    Those are the prunable ones of the scope. Tensors on the meta device stay. The dtype of every tensor stays, too.

    Raises:
        UserError: A number is beyond float16.
    """
    prunable = {f"{matrix.name}.weight" for matrix in prunable_matrices(model, scope)}
    saved = model.state_dict().keys()
    named = [*model.named_parameters(), *((name, tensor) for name, tensor in model.named_buffers() if name in saved)]
    rounded = {  # all of them before any is changed, because one may be refused
        name: round_tensor(name, tensor, quantization, name in prunable) for name, tensor in named if not tensor.is_meta
    }
    for name, tensor in named:
        if name in rounded:
            tensor.copy_(rounded[name])


def round_tensor(name: str, tensor: Tensor, quantization: Quantization, prunable: bool) -> Tensor:
    """Round one tensor of a model, unless it is a prunable matrix and those are rounded to whole numbers; same dtype.

    Raises:
        UserError: A number is beyond float16, or the tensor's own dtype does not hold what it is rounded to.
    """
    whole_numbers = isinstance(quantization, Integers)
    rest = quantization.rest if isinstance(quantization, Rounded) and not prunable else quantization.name
    if not tensor.is_floating_point() or rest in ("none", "model") or (prunable and whole_numbers):
        return tensor
    if rest in ("int8", "int6") and tensor.dim() > 1 and len(tensor) > 1:
        single = tensor.float()
        result = round_to_nearest(single.flatten(1), int(rest.removeprefix("int"))).reshape(tensor.shape)
    else:
        result = tensor.to(torch.float16)
        if not result.isfinite().all():
            raise UserError(
                f"{name} has numbers beyond float16, and quantization={quantization.name} rounds it to that; choose "
                + ("quantization.rest=model" if whole_numbers else "quantization=none")
            )
    return in_dtype(name, result, tensor.dtype, quantization)


def in_dtype(name: str, tensor: Tensor, dtype: torch.dtype, quantization: Quantization) -> Tensor:
    """Convert a rounded tensor to a dtype that must hold its numbers as they are.

    Raises:
        UserError: It does not.
    """
    converted = tensor.to(dtype)
    if not torch.equal(converted.double(), tensor.double()):
        raise UserError(
            f"{str(dtype).removeprefix('torch.')} does not hold what quantization={quantization.name} rounds {name} "
            "to; convert the model to float32 first"
        )
    return converted
