"""A whole model whose weights are rounded: every tensor on its grid, masks held, errors those of what is there."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import sparsewav
from sparsewav.pruning import prunable_matrices
from sparsewav.settings import (
    NM,
    Int2,
    Int3,
    Int4,
    Int8,
)


def on_grid(weight: Tensor, bits: int, size: int, symmetric: bool) -> bool:
    """Whether every group of columns is a scale of few significant bits times whole numbers of so many bits.

    The scale is looked for among the smallest differences of neighbouring values, and their halves, thirds and so on.
    """
    for group in weight.detach().double().split(size, 1):
        for row in group:
            values = torch.cat([row, torch.zeros(1)]).unique()
            if len(values) > 1 and not any(
                fits(values, values.diff().min() / divisor, bits, symmetric) for divisor in range(1, 2**bits)
            ):
                return False
    return True


def fits(values: Tensor, scale: Tensor, bits: int, symmetric: bool) -> bool:
    """Whether values are whole multiples of a scale of four significant bits, and few enough."""
    codes, mantissa = values / scale, torch.frexp(scale).mantissa * 16
    width = float(2 * codes.abs().max() if symmetric else codes.max() - codes.min())
    return (
        bool((codes - codes.round()).abs().max() < 1e-9 and (mantissa - mantissa.round()).abs() < 1e-9)
        and round(width) < 2**bits
    )


@pytest.mark.parametrize(
    ("family", "quantization", "options"),
    [
        ("wav2vec2", Int4(group_size=8), {"sparsity": 0.5}),
        ("wavlm", Int2(group_size=None), {"sparsity": 0.5, "preset": "best_oneshot"}),
        ("wav2vec2-conformer", Int3(group_size=10, symmetric=False), {"sparsity": 0.6, "solver": "obs_refit"}),
        ("wav2vec2", Int8(), {"sparsity": 0.0, "saliency": "wanda"}),
        ("hubert", Int4(rest="float16"), {"sparsity": NM(2, 4), "saliency": "magnitude"}),
    ],
)
def test_every_tensor_is_on_its_grid(
    family: str,
    quantization: Any,
    options: dict[str, Any],
    tiny_model: Callable[..., PreTrainedModel],
    noise_batch: Callable[..., dict[str, Tensor]],
    model_input: Callable[..., dict[str, Tensor]],
) -> None:
    """With solvers, recovery, patterns and none at all; and the errors reported are those of the rounded model."""
    model = tiny_model(family)
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batches = [model_input(model, noise_batch([800, 640], seed=seed)) for seed in range(3)]
    report = sparsewav.prune(model, batches, **options, allocation="uniform", quantization=quantization)
    bits = quantization.widths[0]
    assert report.bits == bits
    assert "quantize" in report.seconds
    own = {f"{matrix.name}.weight": matrix for matrix in prunable_matrices(model)}
    for name, tensor in model.state_dict().items():
        if matrix := own.get(name):
            size = quantization.group_size or matrix.weight.shape[1]
            assert on_grid(matrix.weight, bits, size, quantization.symmetric), name
            assert not matrix.weight[~report.masks[matrix.name]].any()
        elif tensor.dim() > 1 and len(tensor) > 1 and quantization.rest == "int8":
            flat = tensor.flatten(1)
            assert on_grid(flat, 8, flat.shape[1], symmetric=True), name
            assert (tensor - dense[name]).abs().max() < 0.02 * dense[name].abs().max()
        elif tensor.is_floating_point():
            assert torch.equal(tensor, tensor.half().float()), name
