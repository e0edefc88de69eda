"""A whole model whose weights are rounded: every tensor on its grid, masks held, errors those of what is there."""

import copy
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import sparsewav
from sparsewav.errors import UserError
from sparsewav.pruning import collect_hessians, prunable_matrices, prune_matrix, prune_model
from sparsewav.pruning.encoder import encoder_layers
from sparsewav.pruning.solvers.quantize import quantize
from sparsewav.settings import (
    NM,
    Affine,
    Calibration,
    Int2,
    Int3,
    Int4,
    Int8,
    Pruning,
    Reconstruction,
    Uniform,
    Unstructured,
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


@pytest.mark.parametrize(
    "options", [{}, {"objective": "asymmetric", "calibration": Calibration(propagation="sequential")}]
)
def test_a_pruned_model_that_is_only_rounded_keeps_its_zeros(
    options: dict[str, Any], tiny_model: Callable[..., PreTrainedModel], noise_batch: Callable[..., dict[str, Tensor]]
) -> None:
    model, batches = tiny_model("wav2vec2"), [noise_batch([800, 640])]
    sparsewav.prune(model, batches, 0.6, allocation="uniform")
    zeros = {matrix.name: matrix.weight == 0 for matrix in prunable_matrices(model)}
    report = sparsewav.prune(model, batches, 0.0, allocation="uniform", quantization=Int4(group_size=8), **options)
    assert all(bool((matrix.weight[zeros[matrix.name]] == 0).all()) for matrix in prunable_matrices(model))
    assert report.sparsity == pytest.approx(0.6, abs=0.01)
    assert not report.warnings


@torch.no_grad()
def test_rounding_after_each_layer_is_seen_by_the_next(
    tiny_model: Callable[..., PreTrainedModel], noise_batch: Callable[..., dict[str, Tensor]]
) -> None:
    """Without a recovery the second layer is calibrated on what the rounded first layer gives; errors are the model's.

    The second layer's matrices are solved and rounded one by one here, with the final first layer before them. A sum in
    another order may round a few weights another way.
    """
    batches = [noise_batch([800, 640], seed=seed) for seed in range(3)]
    settings = Pruning(
        sparsity=Unstructured(0.5),
        allocation=Uniform(),
        quantization=Int2(group_size=8, rest="model"),
        calibration=Calibration(propagation="sequential", frames_per_column=None),
    )
    model, dense = tiny_model("wav2vec2"), tiny_model("wav2vec2")
    report = prune_model(model, batches, settings)
    half = copy.deepcopy(dense)
    encoder_layers(half)[0].load_state_dict(encoder_layers(model)[0].state_dict())
    hessians = collect_hessians(half, batches, frames_per_column=None)
    for matrix, start, row in zip(prunable_matrices(model), prunable_matrices(dense), report.matrices, strict=True):
        if matrix.layer == 0:
            continue
        hessian = hessians.of(matrix.name)
        pruned = prune_matrix(start.weight.detach(), hessian, 0.5)
        expected = quantize(pruned.weight, hessian, settings.quantization, 2, keep=pruned.keep).weight
        assert (matrix.weight == expected).float().mean() > 0.97, matrix.name
        change = start.weight - matrix.weight
        energy = float(((start.weight @ hessian) * start.weight).sum())
        error = float(((change @ hessian) * change).sum())
        assert row.relative_error == pytest.approx(error / energy, rel=1e-3)


def test_every_number_in_half_precision(
    tiny_model: Callable[..., PreTrainedModel], noise_batch: Callable[..., dict[str, Tensor]]
) -> None:
    """In float32 and bfloat16 models, and in an encoder without a head."""
    batches = [noise_batch([800, 640])]
    for model in (tiny_model("wav2vec2"), tiny_model("hubert").bfloat16(), tiny_model("wavlm").wavlm):
        dtype = model.dtype
        report = sparsewav.prune(model, batches, 0.5, allocation="uniform", quantization="float16")
        assert report.bits is None
        assert model.dtype == dtype
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, tensor.half().to(tensor.dtype)), name


def test_what_cannot_be_rounded_is_refused_and_the_model_stays(
    tiny_model: Callable[..., PreTrainedModel], noise_batch: Callable[..., dict[str, Tensor]]
) -> None:
    batches = [noise_batch([800, 640])]
    for dtype in (torch.float16, torch.bfloat16):
        with pytest.raises(UserError, match=r"which b?float16 does not hold; load the model in float32"):
            sparsewav.prune(tiny_model("wav2vec2").to(dtype), batches, 0.5, allocation="uniform", quantization="int8")
    with pytest.raises(UserError, match="quantization=mixed gives every matrix the bits"):
        sparsewav.prune(tiny_model("wav2vec2"), batches, 0.5, allocation="uniform", quantization="mixed")
    model = tiny_model("wav2vec2")
    with torch.no_grad():
        model.lm_head.bias[0] = 1e6
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=r"lm_head\.bias has numbers beyond float16.*choose quantization\.rest=model"):
        sparsewav.prune(model, batches, 0.5, allocation="uniform", quantization="int4")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("family", "propagation", "quantization", "recovery"),
    [
        ("wav2vec2", "sequential", Int3(group_size=8), Reconstruction(steps=40)),
        ("wavlm", "true_sequential", Int4(group_size=None), Reconstruction(steps=40)),
        ("encoder", "sequential", Int3(range="coded"), Reconstruction(steps=40)),
        ("wav2vec2", "sequential", Int2(symmetric=False, group_size=16), Affine()),
    ],
)
def test_a_recovery_on_the_grid_keeps_mask_and_grid(
    family: str,
    propagation: str,
    quantization: Any,
    recovery: Any,
    tiny_model: Callable[..., PreTrainedModel],
    noise_batch: Callable[..., dict[str, Tensor]],
) -> None:
    """The layers' errors fall after the rounding; what was pruned stays zero; a seed gives the same bytes."""
    dense: Any = tiny_model("hubert").hubert if family == "encoder" else tiny_model(family)
    batches = [noise_batch([800, 640], seed=seed) for seed in range(3)]
    models = [copy.deepcopy(dense) for _ in range(2)]
    options: dict[str, Any] = {"allocation": "uniform", "calibration": Calibration(propagation=propagation)}
    options |= {"quantization": quantization, "recovery": recovery}
    reports = [sparsewav.prune(model, batches, 0.4, **options) for model in models]
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other)
    bits = 8 if quantization.range == "coded" else quantization.widths[0]
    for matrix in prunable_matrices(models[0]):
        assert not matrix.weight[~reports[0].masks[matrix.name]].any()
        size = quantization.group_size or matrix.weight.shape[1]
        assert on_grid(matrix.weight, bits, size, quantization.symmetric), matrix.name
    before, after = ([getattr(item, part) for item in reports[0].recoveries] for part in ("error_before", "error"))
    assert all(new <= old for new, old in zip(after, before, strict=True))
    assert sum(after) < 0.97 * sum(before)


def test_an_error_gives_the_front_end_back(
    tiny_model: Callable[..., PreTrainedModel],
    noise_batch: Callable[..., dict[str, Tensor]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("wav2vec2")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def fails(*_arguments: object) -> None:
        raise RuntimeError("late")

    monkeypatch.setattr(importlib.import_module("sparsewav.pruning.prune"), "_warnings", fails)
    with pytest.raises(RuntimeError, match="late"):
        sparsewav.prune(model, [noise_batch([800, 640])], 0.5, quantization="int4", allocation="uniform")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
