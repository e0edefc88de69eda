"""Refit, ALPS, the asymmetric objective and the recovery against brute force."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsewav
from sparsewav import ALPS, NM, OBS, Affine, Asymmetric, Calibration, OBSRefit, Reconstruction
from sparsewav.errors import UserError
from sparsewav.pruning import prunable_matrices, prune_matrices, prune_matrix
from sparsewav.pruning.encoder import encoder_layers
from sparsewav.pruning.solvers.selection import lowest

Batch = dict[str, Tensor]
Factory = Callable[..., Any]
MakeBatch = Callable[..., Batch]


def layer_by_layer(propagation: str = "sequential") -> Calibration:
    """A calibration on the layers already pruned, without a sample of frames."""
    return Calibration(propagation=propagation, frames_per_column=None)


ASYMMETRIC: dict[str, Any] = {"objective": "asymmetric", "calibration": layer_by_layer("true_sequential")}


def random_layer(seed: int, rows: int = 24, cols: int = 32) -> tuple[Tensor, Tensor]:
    """A random weight and inputs (cols, frames) that depend on each other, as those of a network do."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator, dtype=torch.float64)
    mixing = torch.randn(cols, cols, generator=generator, dtype=torch.float64) * torch.logspace(0, -1.5, cols)
    return weight, mixing @ torch.randn(cols, 3 * cols, generator=generator).double()


def best_on_support(outputs: Tensor, inputs: Tensor, towards: Tensor, keep: Tensor, damping: float) -> Tensor:
    """Row by row, the least squares of outputs from inputs over the kept weights, damped towards some weights."""
    result = torch.zeros_like(towards)
    for row, support in enumerate(keep):
        identity = torch.eye(len(support), dtype=inputs.dtype)[:, support] * damping**0.5
        rows = torch.cat([inputs.T[:, support], identity])
        aims = torch.cat([outputs[row], damping**0.5 * towards[row]])
        result[row, support] = torch.linalg.lstsq(rows, aims[:, None]).solution[:, 0]
    return result


def damped_error(weight: Tensor, pruned: Tensor, inputs: Tensor, damping: float) -> float:
    change = weight - pruned
    return float((change @ inputs).square().sum() + damping * change.square().sum())


@pytest.mark.parametrize("solver", [OBSRefit, ALPS])
@pytest.mark.parametrize("dead", [(), (3, 20)])
def test_kept_weights_are_the_least_squares_solution(
    solver: type[OBSRefit] | type[ALPS], dead: tuple[int, ...]
) -> None:
    """On the mask that came out, a direct least-squares solver finds the same weights."""
    weight, inputs = random_layer(1)
    inputs[list(dead)] = 0
    pruned = prune_matrix(weight, inputs @ inputs.T, 0.6, saliency="obs", solver=solver(tolerance=1e-13))
    expected = best_on_support(weight @ inputs, inputs, weight, pruned.keep, pruned.damping)
    torch.testing.assert_close(pruned.weight, expected, rtol=0, atol=1e-8)
    live = weight.shape[1] - len(dead)
    assert int((~pruned.keep).sum()) == round(0.6 * live * len(weight)) + len(dead) * len(weight)
    assert not pruned.weight[:, list(dead)].any()
    assert torch.equal(pruned.weight != 0, pruned.keep)


def test_refit_keeps_the_mask_of_the_sweep() -> None:
    weight, inputs = random_layer(2)
    sweep, refit = (
        prune_matrix(weight, inputs @ inputs.T, 0.7, saliency="obs", solver=name) for name in ("obs", "obs_refit")
    )
    assert torch.equal(sweep.keep, refit.keep)


@pytest.mark.parametrize("seed", range(20))
def test_alps_never_loses_more_than_the_sweep(seed: int) -> None:
    """At the same count: the refit is better than the sweep, and ALPS better than both; float32, as in a run."""
    weight, inputs = (item.float() for item in random_layer(seed, rows=40, cols=48))
    sparsity = (0.3, 0.5, 0.7, 0.8, 0.9)[seed % 5]
    results = {
        solver: prune_matrix(weight, inputs @ inputs.T, sparsity, saliency="obs", solver=solver)
        for solver in ("obs", "obs_refit", "alps")
    }
    errors = [damped_error(weight, result.weight, inputs, result.damping) for result in results.values()]
    counts = {int((result.weight == 0).sum()) for result in results.values()}
    assert counts == {round(sparsity * weight.numel())}
    assert errors[2] < errors[1] < errors[0]


@pytest.mark.parametrize("solver", ["obs_refit", "alps"])
def test_masks_in_force_and_patterns_hold(solver: str) -> None:
    """What was removed stays removed and counts; n:m and stacked matrices get their own counts; 0 and 1 are exact."""
    weight, inputs = random_layer(3)
    hessian = inputs @ inputs.T
    keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(4)) > 0.3
    options: dict[str, Any] = {"saliency": "obs", "solver": solver}
    pruned = prune_matrix(weight, hessian, 0.6, keep=keep, **options)
    assert not (pruned.keep & ~keep).any()
    assert int((~pruned.keep).sum()) == round(0.6 * weight.numel())
    pattern = prune_matrix(weight, hessian, NM(2, 4), **options)
    assert (pattern.keep.reshape(-1, 4).sum(1) == 2).all()
    pair = prune_matrices([weight, 2 * weight], hessian, [0.5, 0.8], **options)
    assert [int((~item.keep).sum()) for item in pair] == [round(share * weight.numel()) for share in (0.5, 0.8)]
    assert torch.equal(prune_matrix(weight, hessian, 0.0, **options).weight, weight)
    assert not prune_matrix(weight, hessian, 1.0, **options).weight.any()


@pytest.mark.parametrize("solver", [OBSRefit, ALPS])
def test_asymmetric_solution_is_the_least_squares_from_other_inputs(solver: type[OBSRefit] | type[ALPS]) -> None:
    """Ŵ minimises ||WX − ŴX̂||² + λ||W − Ŵ||² over the weights that are kept."""
    weight, inputs = random_layer(5)
    pruned_inputs = inputs + 0.3 * random_layer(6)[1]
    drift = (inputs - pruned_inputs) @ pruned_inputs.T
    hessian = pruned_inputs @ pruned_inputs.T
    options: dict[str, Any] = {"saliency": "obs", "solver": solver(tolerance=1e-13)}
    pruned = prune_matrix(weight, hessian, 0.5, drift=drift, **options)
    expected = best_on_support(weight @ inputs, pruned_inputs, weight, pruned.keep, pruned.damping)
    torch.testing.assert_close(pruned.weight, expected, rtol=0, atol=1e-8)
    symmetric = prune_matrix(weight, hessian, 0.5, **options)
    errors = [float((weight @ inputs - item.weight @ pruned_inputs).square().sum()) for item in (pruned, symmetric)]
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("saliency", ["obs", "obs_first_order"])
def test_asymmetric_sweep_removes_what_the_formulas_say(saliency: str) -> None:
    """Where all columns are one block: eq. 1 and 3 at the best full weights, with the gradient by autograd."""
    weight, inputs = random_layer(7, rows=12, cols=10)
    pruned_inputs = inputs + 0.5 * random_layer(8, rows=12, cols=10)[1]
    hessian = pruned_inputs @ pruned_inputs.T
    drift = (inputs - pruned_inputs) @ pruned_inputs.T
    pruned = prune_matrix(weight, hessian, 0.5, saliency=saliency, solver=OBS(damping=1.0), drift=drift)
    everything = torch.ones_like(weight, dtype=torch.bool)
    best = best_on_support(weight @ inputs, pruned_inputs, weight, everything, pruned.damping).requires_grad_()
    error = (weight @ inputs - best @ pruned_inputs).square().sum()
    (gradient,) = torch.autograd.grad(error, best)
    damped = hessian + pruned.damping * torch.eye(10, dtype=torch.float64)
    pivots = torch.stack([torch.linalg.inv(damped[left:, left:])[0, 0] for left in range(10)])
    plain = best.detach().square() / pivots
    scores = plain + (best * gradient).detach().abs() if saliency == "obs_first_order" else plain
    assert torch.equal(~pruned.keep, lowest(scores, 60))
    if saliency == "obs_first_order":
        assert not torch.equal(~pruned.keep, lowest(plain, 60)), "or a wrong gradient would not be seen"


@pytest.mark.parametrize("solver", ["obs", "obs_refit", "alps"])
def test_asymmetric_is_symmetric_where_nothing_has_drifted(solver: str) -> None:
    """To the last bit: the first matrices of a model have the same inputs before and after."""
    weight, inputs = random_layer(9)
    hessian = inputs @ inputs.T
    plain = prune_matrix(weight, hessian, 0.6, saliency="obs", solver=solver)
    drifted = prune_matrix(weight, hessian, 0.6, saliency="obs", solver=solver, drift=torch.zeros_like(hessian))
    assert torch.equal(plain.weight, drifted.weight)


@pytest.fixture
def batches(noise_batch: MakeBatch) -> list[Batch]:
    """Two batches, without padding so that a test can read frames off the modules."""
    return [noise_batch([400, 400]), noise_batch([352], seed=1)]


def inputs_of(model: nn.Module, batches: list[Batch], names: list[str]) -> dict[str, Tensor]:
    """X (cols, frames) of some modules."""
    caught: dict[str, list[Tensor]] = {name: [] for name in names}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: caught[name].append(args[0].flatten(0, 1))
        )
        for name in names
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch["input_values"])
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(frames).T.double() for name, frames in caught.items()}


@pytest.mark.parametrize("objective", ["symmetric", "asymmetric"])
def test_reports_hold_the_error_of_what_is_saved(objective: str, tiny_model: Factory, batches: list[Batch]) -> None:
    """Matrix by matrix: X of the dense model, X̂ of the model pruned up to that matrix."""
    model = tiny_model("wav2vec2")
    dense = copy.deepcopy(model)
    report = sparsewav.prune(
        model,
        batches,
        0.6,
        solver="alps",
        objective=objective,
        allocation="uniform",
        calibration=layer_by_layer("true_sequential"),
    )
    names = [row.name for row in report.matrices]
    of_dense, so_far = inputs_of(dense, batches, names), copy.deepcopy(dense)
    for layer in range(2):
        for roles in (("q_proj", "k_proj", "v_proj"), ("out_proj",), ("intermediate_dense",), ("output_dense",)):
            group = [row for row in report.matrices if f".{layer}." in row.name and row.name.endswith(roles)]
            of_pruned = inputs_of(so_far, batches, names)
            for row in group:
                weight, pruned = (item.get_submodule(row.name).weight.detach().double() for item in (dense, model))
                inputs = (of_dense if objective == "asymmetric" else of_pruned)[row.name]
                expected = (weight @ inputs - pruned @ of_pruned[row.name]).square().sum()
                assert row.relative_error == pytest.approx(
                    float(expected / (weight @ inputs).square().sum()), rel=1e-3
                ), row.name
            for row in group:
                so_far.get_submodule(row.name).weight.data.copy_(model.get_submodule(row.name).weight)


@pytest.mark.parametrize("propagation", ["sequential", "true_sequential"])
def test_asymmetric_brings_the_outputs_closer(propagation: str, tiny_model: Factory, batches: list[Batch]) -> None:
    """The last layer's output, far from all that any single matrix was fitted to."""
    dense = tiny_model("hubert")
    errors = []
    for objective in ("symmetric", "asymmetric"):
        model = copy.deepcopy(dense)
        sparsewav.prune(
            model, batches, 0.5, objective=objective, allocation="uniform", calibration=layer_by_layer(propagation)
        )
        with torch.no_grad():
            outputs = [
                [item.base_model(batch["input_values"]).last_hidden_state for batch in batches]
                for item in (model, dense)
            ]
        errors.append(sum(float((ours - theirs).square().sum()) for ours, theirs in zip(*outputs, strict=True)))
    assert errors[1] < errors[0]


def test_no_drift_strength_is_symmetric(tiny_model: Factory, batches: list[Batch]) -> None:
    models = [tiny_model("wav2vec2") for _ in range(2)]
    sparsewav.prune(models[0], batches, 0.5, allocation="uniform", calibration=ASYMMETRIC["calibration"])
    sparsewav.prune(models[1], batches, 0.5, allocation="uniform", **ASYMMETRIC | {"objective": Asymmetric(0.0)})
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other)


def layer_outputs(model: nn.Module, batches: list[Batch], index: int) -> Tensor:
    caught: list[Tensor] = []
    layer = encoder_layers(model)[index]  # type: ignore[arg-type]
    hook = layer.register_forward_hook(
        lambda module, args, output: caught.append((output[0] if isinstance(output, tuple) else output).flatten(0, 1))
    )
    with torch.no_grad():
        for batch in batches:
            model(batch["input_values"])
    hook.remove()
    return torch.cat(caught)


def test_recovery_learns_the_dense_layers_outputs(tiny_model: Factory, batches: list[Batch]) -> None:
    """Masks hold, the layers' outputs come closer, the reports tell what is saved, and a seed gives the same bytes."""
    dense = tiny_model("wav2vec2")
    options: dict[str, Any] = {"allocation": "uniform", "calibration": layer_by_layer(), "seed": 3}
    plain = copy.deepcopy(dense)
    sparsewav.prune(plain, batches, 0.6, **options)
    models = [copy.deepcopy(dense) for _ in range(2)]
    reports = [sparsewav.prune(item, batches, 0.6, **options, recovery=Reconstruction(steps=60)) for item in models]
    model, report = models[0], reports[0]
    for one, other in zip(*(item.parameters() for item in models), strict=True):
        assert torch.equal(one, other)
    for matrix in prunable_matrices(model):
        assert torch.equal(report.masks[matrix.name], matrix.weight != 0)
    for layer, recovery in enumerate(report.recoveries):
        target = layer_outputs(dense, batches, layer)
        error = (layer_outputs(model, batches, layer) - target).square().sum() / target.square().sum()
        assert recovery.error == pytest.approx(float(error), rel=1e-4)
        assert recovery.error < 0.9 * recovery.error_before
    first = layer_outputs(plain, batches, 0)
    target = layer_outputs(dense, batches, 0)
    before = float((first - target).square().sum() / target.square().sum())
    assert report.recoveries[0].error_before == pytest.approx(before, rel=1e-4)
    names = [row.name for row in report.matrices if ".0." in row.name]
    inputs = inputs_of(dense, batches, names)  # the first layer's matrices were calibrated in the dense layer
    for row in report.matrices[: len(names)]:
        weight, pruned = (item.get_submodule(row.name).weight.detach().double() for item in (dense, model))
        error = ((weight - pruned) @ inputs[row.name]).square().sum() / (weight @ inputs[row.name]).square().sum()
        assert row.relative_error == pytest.approx(float(error), rel=1e-3)
    changed = {name for name, value in dense.state_dict().items() if not torch.equal(value, model.state_dict()[name])}
    assert changed
    assert all(".encoder.layers." in name for name in changed)
    assert all("proj" in name or "dense" in name or "layer_norm" in name for name in changed)
    assert any(name.endswith("layer_norm.weight") for name in changed)


@pytest.mark.parametrize("norm_first", [False, True])
def test_closed_form_recovery_is_the_least_squares_solution(
    norm_first: bool, tiny_model: Factory, batches: list[Batch]
) -> None:
    """Gain and bias of a channel where the layer ends with its norm, the bias alone where it does not."""
    dense = tiny_model("wav2vec2", do_stable_layer_norm=norm_first)
    plain, model = copy.deepcopy(dense), copy.deepcopy(dense)
    options: dict[str, Any] = {"allocation": "uniform", "calibration": layer_by_layer()}
    sparsewav.prune(plain, batches, 0.7, **options)
    report = sparsewav.prune(model, batches, 0.7, **options, recovery=Affine())
    target, output = (layer_outputs(item, batches, 0).flatten(0, -2).double() for item in (dense, plain))
    fitted = []
    for channel in range(target.shape[1]):
        own, wanted = output[:, channel], target[:, channel]
        basis = torch.ones(len(own), 1) if norm_first else torch.stack([own, torch.ones_like(own)], 1)
        rest = wanted - own if norm_first else wanted
        solution = torch.linalg.lstsq(basis.double(), rest[:, None]).solution
        fitted.append(basis.double() @ solution + (own[:, None] if norm_first else 0.0))
    corrected = layer_outputs(model, batches, 0).flatten(0, -2).double()
    assert torch.allclose(corrected, torch.cat(fitted, 1), atol=1e-4)
    assert all(recovery.error < recovery.error_before for recovery in report.recoveries)
    changed = {name for name, value in plain.state_dict().items() if not torch.equal(value, model.state_dict()[name])}
    first = {name.partition("layers.0.")[2] for name in changed if "layers.0." in name}
    assert first == (
        {"feed_forward.output_dense.bias"} if norm_first else {"final_layer_norm.weight", "final_layer_norm.bias"}
    )


@pytest.mark.parametrize(("learning_rate", "finite"), [(100.0, True), (1e30, False)])
def test_a_recovery_that_diverges_is_undone(
    tiny_model: Factory, batches: list[Batch], learning_rate: float, finite: bool
) -> None:
    """Where it leaves the finite numbers it says so, too."""
    plain, model = (tiny_model("wav2vec2") for _ in range(2))
    options: dict[str, Any] = {"allocation": "uniform", "calibration": layer_by_layer()}
    sparsewav.prune(plain, batches, 0.6, **options)
    recovery = Reconstruction(steps=3, learning_rate=learning_rate)
    report = sparsewav.prune(model, batches, 0.6, **options, recovery=recovery)
    for one, other in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert all(recovery.error == recovery.error_before for recovery in report.recoveries)
    assert [recovery.diverged for recovery in report.recoveries] == [not finite] * 2
    said = [warning for warning in report.warnings if "not finite" in warning]
    assert len(said) == (0 if finite else 2)
    assert finite or said[1].startswith("the recovery of layer 1 came to numbers that are not finite")


@pytest.mark.parametrize("family", ["wavlm", "data2vec-audio", "wav2vec2-conformer"])
def test_other_families_are_matched_to_their_dense_layers(
    family: str, tiny_model: Factory, noise_batch: MakeBatch
) -> None:
    """Padded batches of models with position biases, and of those that must not see padding."""
    model = tiny_model(family)
    sizes = sum(matrix.size for matrix in prunable_matrices(model))
    batches = [noise_batch([400, 304]), noise_batch([352], seed=1)]
    report = sparsewav.prune(
        model,
        batches,
        0.6,
        allocation="uniform",
        **ASYMMETRIC,
        solver="alps",
        recovery=Reconstruction(steps=20),
    )
    assert sum(int((matrix.weight == 0).sum()) for matrix in prunable_matrices(model)) / sizes == report.sparsity
    assert len(report.recoveries) == 2
    assert all(recovery.error < recovery.error_before for recovery in report.recoveries)
    assert [row.name for row in report.matrices] == [matrix.name for matrix in prunable_matrices(model)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "admm"}, "choose one of obs, obs_refit, alps"),
        ({"solver": "alps", "saliency": "wanda"}, "choose saliency=obs or obs_first_order"),
        ({"objective": "asymmetric"}, r"choose calibration\.propagation=true_sequential \(or sequential\)"),
        ({"recovery": "reconstruction"}, r"choose calibration\.propagation=true_sequential \(or sequential\)"),
        ({**ASYMMETRIC, "saliency": "magnitude"}, "choose saliency=obs or obs_first_order"),
        ({**ASYMMETRIC, "objective": Asymmetric(strength=1.5)}, "not between 0 and 1"),
    ],
)
def test_what_does_not_go_together_is_refused(
    options: dict[str, Any], message: str, tiny_model: Factory, batches: list[Batch]
) -> None:
    with pytest.raises(UserError, match=message):
        sparsewav.prune(tiny_model("wav2vec2"), batches, 0.5, **({"allocation": "uniform"} | options))
