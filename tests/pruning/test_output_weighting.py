"""ALPS with weighted outputs against brute force, and the weights, which are the Fisher information's factor."""

import copy
from collections.abc import Callable
from functools import partial
from itertools import combinations
from statistics import mean, median
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsewav
from sparsewav import ALPS, NM, Asymmetric, Calibration, ErrorCurves, Global, Int4, Pruning, Reconstruction, Uniform
from sparsewav.errors import UserError
from sparsewav.pruning import collect_hessians, prunable_matrices, prune_matrices, prune_matrix
from sparsewav.pruning.allocation.divergence import OutputDivergence
from sparsewav.pruning.encoder import encoder_layers, has_head, output_rows, projections_as_modules
from sparsewav.pruning.families import FAMILIES
from sparsewav.pruning.gradient_covariance import collect_gradient_covariances, layer_name

Batch = dict[str, Tensor]
Factory = Callable[..., Any]
MakeBatch = Callable[..., Batch]
ModelInput = Callable[[Any, Batch], Batch]


def random_problem(seed: int, rows: int, cols: int) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, H of inputs that depend on each other, and G of gradients that do; float64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator, dtype=torch.float64)

    def second_moment(width: int) -> Tensor:
        mixing = torch.randn(width, width, generator=generator).double() * torch.logspace(0, -1, width)
        sample = mixing @ torch.randn(width, 4 * width, generator=generator).double()
        return sample @ sample.T

    return weight, second_moment(cols), second_moment(rows)


def damped(matrix: Tensor, share: float) -> Tensor:
    """A matrix with a share of its mean diagonal added to it."""
    return matrix + share * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=matrix.dtype)


def weighted_error(change: Tensor, hessian: Tensor, covariance: Tensor) -> float:
    """tr(G ΔW H ΔWᵀ)."""
    return float(torch.trace(covariance @ change @ hessian @ change.T))


def best_on_support(target: Tensor, hessian: Tensor, covariance: Tensor, keep: Tensor) -> Tensor:
    """The minimum of tr(G(T − Ŵ)H(T − Ŵ)ᵀ) over the kept weights, by one dense system in the Kronecker product."""
    whole, kept = torch.kron(covariance, hessian), keep.flatten()  # of weights row by row
    result = torch.zeros_like(target).flatten()
    result[kept] = torch.linalg.solve(whole[kept][:, kept], (whole @ target.flatten())[kept])
    return result.view_as(target)


WEIGHTED = ALPS(output_weighting="fisher", output_damping=0.1, tolerance=1e-13)


def test_mask_is_among_the_best_of_all_masks() -> None:
    """ADMM is a heuristic: of all 924 masks of a tiny matrix nearly none is better, and fewer than without weights."""
    better: dict[str, list[float]] = {"fisher": [], "equal": []}
    for seed in range(20):
        weight, hessian, covariance = random_problem(seed, 3, 4)
        whole, weights = damped(hessian, WEIGHTED.damping), damped(covariance, WEIGHTED.output_damping)

        def error_of(keep: Tensor, target: Tensor = weight, left: Tensor = weights, right: Tensor = whole) -> float:
            return weighted_error(target - best_on_support(target, right, left, keep), right, left)

        errors = []
        for kept in combinations(range(12), 6):
            keep = torch.zeros(12, dtype=torch.bool)
            keep[list(kept)] = True
            errors.append(error_of(keep.view(3, 4)))
        pruned = prune_matrix(weight, hessian, 0.5, solver=WEIGHTED, covariance=covariance)
        plain = prune_matrix(weight, hessian, 0.5, solver=ALPS())
        expected = best_on_support(weight, whole, weights, pruned.keep)
        torch.testing.assert_close(pruned.weight, expected, rtol=0, atol=1e-8)
        for name, keep in (("fisher", pruned.keep), ("equal", plain.keep)):
            found = error_of(keep)
            assert min(errors) <= found * (1 + 1e-9)
            better[name].append(sum(error < found * (1 - 1e-9) for error in errors) / len(errors))
    assert median(better["fisher"]) < 0.01
    assert mean(better["fisher"]) < 0.5 * mean(better["equal"])


@pytest.mark.parametrize("seed", range(10))
def test_weighted_error_is_lower_than_without_weights(seed: int) -> None:
    """Float32, as in a run; of the plain mask, too, where the kept weights are solved for under G."""
    weight, hessian, covariance = (item.float() for item in random_problem(seed, 40, 48))
    sparsity = (0.5, 0.7, 0.8, 0.9)[seed % 4]
    whole, weights = damped(hessian, 0.01).double(), damped(covariance, 0.25).double()
    plain = prune_matrix(weight, hessian, sparsity, solver=ALPS())
    pruned = prune_matrix(weight, hessian, sparsity, solver=ALPS(output_weighting="fisher"), covariance=covariance)
    assert int((pruned.weight == 0).sum()) == int((plain.weight == 0).sum()) == round(sparsity * weight.numel())
    refit = best_on_support(weight.double(), whole, weights, plain.keep)
    errors = [weighted_error((weight - item).double(), whole, weights) for item in (pruned.weight, refit, plain.weight)]
    assert errors[0] < errors[1] < errors[2]
    # The conjugate gradients have converged, in single precision.
    exact = best_on_support(weight.double(), whole, weights, pruned.keep)
    assert errors[0] < (1 + 1e-4) * weighted_error(weight.double() - exact, whole, weights)


@pytest.mark.parametrize("covariance", [torch.eye(24), torch.zeros(24, 24)], ids=["identity", "zero"])
def test_equal_weights_change_nothing(covariance: Tensor) -> None:
    """G = I is the plain error; where the model's output does not depend on a matrix, the plain error is taken."""
    weight, hessian, _ = random_problem(3, 24, 32)
    plain = prune_matrix(weight, hessian, 0.7, solver=ALPS(tolerance=1e-13))
    pruned = prune_matrix(weight, hessian, 0.7, solver=WEIGHTED, covariance=covariance)
    assert torch.equal(pruned.keep, plain.keep)
    torch.testing.assert_close(pruned.weight, plain.weight, rtol=0, atol=1e-9)


def test_scale_of_the_weights_changes_nothing() -> None:
    weight, hessian, covariance = random_problem(3, 24, 32)
    one, other = (
        prune_matrix(weight, hessian, 0.7, solver=WEIGHTED, covariance=scale * covariance) for scale in (1, 1e-6)
    )
    assert torch.equal(one.keep, other.keep)
    torch.testing.assert_close(one.weight, other.weight, rtol=0, atol=1e-9)


def test_masks_patterns_drifts_and_stacks() -> None:
    """Masks in force hold and count; n:m holds; with a drift it is the solution for its target; dead inputs go."""
    weight, hessian, covariance = random_problem(5, 24, 32)
    other, _, other_covariance = random_problem(6, 12, 32)
    keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(4)) > 0.3
    pruned = prune_matrix(weight, hessian, 0.6, solver=WEIGHTED, covariance=covariance, keep=keep)
    assert not (pruned.keep & ~keep).any()
    assert int((~pruned.keep).sum()) == round(0.6 * weight.numel())
    pattern = prune_matrix(weight, hessian, NM(2, 4), solver=WEIGHTED, covariance=covariance)
    assert (pattern.keep.reshape(-1, 4).sum(1) == 2).all()

    drift = 0.1 * random_problem(7, 1, 32)[1]
    together = prune_matrices(
        [weight, other],
        hessian,
        [0.5, 0.8],
        solver=WEIGHTED,
        drift=drift,
        covariances=[covariance, other_covariance],
    )
    whole = damped(hessian, WEIGHTED.damping)
    for matrix, weights, sparsity, found in (
        (weight, covariance, 0.5, together[0]),
        (other, other_covariance, 0.8, together[1]),
    ):
        assert int((~found.keep).sum()) == round(sparsity * matrix.numel())
        target = matrix + torch.linalg.solve(whole, drift.T @ matrix.T).T
        expected = best_on_support(target, whole, damped(weights, WEIGHTED.output_damping), found.keep)
        torch.testing.assert_close(found.weight, expected, rtol=0, atol=1e-7)

    dead = hessian.clone()
    dead[[3, 20]] = dead[:, [3, 20]] = 0
    emptied = prune_matrix(weight, dead, 0.6, solver=WEIGHTED, covariance=covariance)
    assert not emptied.keep[:, [3, 20]].any()
    assert int((~emptied.keep).sum()) == round(0.6 * 30 * 24) + 2 * 24
    assert torch.equal(prune_matrix(weight, hessian, 0.0, solver=WEIGHTED, covariance=covariance).weight, weight)
    assert not prune_matrix(weight, hessian, 1.0, solver=WEIGHTED, covariance=covariance).weight.any()


@pytest.mark.parametrize(
    ("solver", "covariance", "says"),
    [
        (WEIGHTED, None, "which needs it; give both, or none"),
        (ALPS(), torch.eye(4), "goes with solver=alps and solver.output_weighting=fisher"),
        ("obs", torch.eye(4), "goes with solver=alps and solver.output_weighting=fisher"),
        (WEIGHTED, torch.eye(5), r"has shape \(5, 5\); its weight \(4, 8\) needs \(4, 4\)"),
        (WEIGHTED, torch.full((4, 4), torch.nan), "the covariance of the gradients of the matrix has NaN"),
        (ALPS(output_weighting="kfac"), torch.eye(4), "output_weighting=kfac does not exist; choose one of equal"),
        (ALPS(output_weighting="fisher", output_damping=0.0), torch.eye(4), "output_damping=0 must be above 0"),
    ],
)
def test_wrong_arguments_are_refused(solver: Any, covariance: Tensor | None, says: str) -> None:
    with pytest.raises(UserError, match=says):
        prune_matrix(torch.ones(4, 8), torch.eye(8), 0.5, solver=solver, covariance=covariance)


def gradients_at_outputs(model: Any, batch: Batch) -> tuple[Tensor, Callable[[Tensor], dict[str, Tensor]]]:
    """The log posteriors (or hidden states) of one utterance that is not padded, and what gives Σ gᵀg of a scalar.

    g are the scalar's gradients at every row of the output of every matrix and layer, by name.
    """
    caught: list[tuple[str, Callable[[Tensor], Tensor], Tensor]] = []
    hooks = []
    for matrix in prunable_matrices(model):

        def catch(module: nn.Module, args: Any, output: Tensor, matrix: Any = matrix) -> None:
            caught.append((matrix.name, partial(output_rows, matrix.module), output))

        hooks.append(matrix.module.register_forward_hook(catch))
    for index, layer in enumerate(encoder_layers(model)):

        def catch_layer(module: nn.Module, args: Any, output: Any, name: str = layer_name(model, index)) -> None:
            caught.append((name, lambda rows: rows, output[0] if isinstance(output, tuple) else output))

        hooks.append(layer.register_forward_hook(catch_layer))
    with torch.enable_grad(), projections_as_modules(model):
        output = model(**{key: value for key, value in batch.items() if key != "labels"})
    for hook in hooks:
        hook.remove()
    values = output.logits[0].log_softmax(-1) if has_head(model) else output.last_hidden_state[0]

    def moments(scalar: Tensor) -> dict[str, Tensor]:
        outputs = [item for *_, item in caught]
        gradients = torch.autograd.grad(scalar, outputs, retain_graph=True, materialize_grads=True, allow_unused=True)
        sums: dict[str, Tensor] = {}
        for (name, rows_of, _), gradient in zip(caught, gradients, strict=True):
            rows = rows_of(gradient).flatten(0, 1)
            sums[name] = sums.get(name, 0) + rows.T @ rows
        return sums

    return values, moments


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("family", [*FAMILIES, "wav2vec2 without a head"])
def test_covariance_is_that_of_every_utterance_alone(
    family: str,
    tiny_model: Factory,
    noise_batch: MakeBatch,
    utterances: Callable[..., Any],
    model_input: ModelInput,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For the labels that were drawn, in every family, padded batch or not."""
    model = tiny_model(family.split()[0])
    if " " in family:
        model = model.wav2vec2
    padded = noise_batch([560, 411, 288])
    alone = [model_input(model, item) for item in utterances([padded])]
    name_of_draw = "multinomial" if has_head(model) else "randn"
    draw, draws = getattr(torch, name_of_draw), []

    def remember(*args: Any, **kwargs: Any) -> Tensor:
        draws.append(draw(*args, **kwargs))
        return draws[-1]

    positions = {matrix.name for matrix in prunable_matrices(model) if matrix.positions}
    for batches in (alone, [model_input(model, padded)]):
        draws.clear()
        with monkeypatch.context() as patch:
            patch.setattr(torch, name_of_draw, remember)
            found = collect_gradient_covariances(model, batches, of_layers=True, seed=1)
        matrices, layers = (
            collect_gradient_covariances(model, batches, of_matrices=first, of_layers=not first, seed=1)
            for first in (True, False)
        )
        assert list(found) == [*matrices, *layers]
        assert len(layers) == 2
        assert all(torch.equal(found[name], item) for name, item in (matrices | layers).items())
        drawn, expected, frames = torch.cat(draws), {name: torch.zeros_like(item) for name, item in found.items()}, 0
        for batch in alone:
            values, moments = gradients_at_outputs(model, batch)
            own, frames = drawn[frames : frames + len(values)], frames + len(values)
            scalar = values.gather(1, own).sum() if has_head(model) else (values * own).sum()
            for name, moment in moments(scalar).items():
                expected[name] += moment
        assert len(drawn) == frames
        for name, total in expected.items():
            assert total.any(), name
            if name in positions and len(batches) == 1:  # the gradients of a batch's utterances are added up there
                continue
            scale = float(total.diagonal().mean()) / frames
            torch.testing.assert_close(found[name], total / frames, rtol=1e-3, atol=1e-3 * scale, msg=name)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("headless", [False, True])
def test_mean_over_draws_is_the_enumeration_of_the_labels(
    headless: bool, tiny_model: Factory, noise_batch: MakeBatch
) -> None:
    """Σ over frames t and labels c of p(c) gᵀg for log p(c) of frame t; of hidden states over all of their elements."""
    model = tiny_model("wav2vec2")
    model = model.wav2vec2 if headless else model
    batch, draws = noise_batch([192]), 100
    values, moments = gradients_at_outputs(model, batch)
    expected = {matrix.name: torch.zeros(matrix.weight.shape[:1] * 2) for matrix in prunable_matrices(model)}
    for value in values.flatten():
        share = 1.0 if headless else float(value.detach().exp())
        found = moments(value)
        for name in expected:
            expected[name] += share * found[name] / len(values)
    drawn = [collect_gradient_covariances(model, [batch], seed=seed) for seed in range(draws)]
    sizes = squares = variances = 0.0
    for name, exact in expected.items():
        sample = torch.stack([item[name] for item in drawn])
        scale = float(exact.diagonal().mean())
        sizes += float((exact / scale).square().mean())
        squares += float(((sample.mean(0) - exact) / scale).square().mean())
        variances += float((sample / scale).var(0).mean()) / draws
    assert 0 < variances < 0.25 * sizes  # so that a wrong factor of two would be seen
    assert squares < 2 * variances  # expected to be equal


def test_half_of_it_is_the_divergence_of_a_small_error(tiny_model: Factory, noise_batch: MakeBatch) -> None:
    """½ tr(G ΔW H ΔWᵀ) / frames against the divergence that a small ΔW of a whole matrix really makes."""
    model = tiny_model("wav2vec2").eval()
    batches = [noise_batch([4000] * 4, seed=seed) for seed in range(4)]
    covariances, hessians = collect_gradient_covariances(model, batches), collect_hessians(model, batches)
    matrix = prunable_matrices(model)[-1]
    divergence = OutputDivergence(model, batches, [matrix])
    dense = matrix.weight.detach().clone()
    predicted = measured = 0.0
    for seed in range(8):
        change = 1e-2 * torch.randn(dense.shape, generator=torch.Generator().manual_seed(seed))
        matrix.weight.data.copy_(dense + change)
        measured += divergence.measure()
        predicted += 0.5 * weighted_error(change, hessians.of(matrix.name), covariances[matrix.name]) / hessians.frames
    assert predicted == pytest.approx(measured, rel=0.35)  # labels are drawn, and frames are not independent


def test_labels_are_not_read_and_a_seed_repeats_itself(tiny_model: Factory, noise_batch: MakeBatch) -> None:
    """The same seed gives the same bits, whatever the labels and whatever else was drawn; another one others."""
    model = tiny_model("wav2vec2")
    batch = noise_batch([800, 400])
    first = collect_gradient_covariances(model, [batch], seed=3)
    torch.rand(5)
    unlabelled = {key: value for key, value in batch.items() if key != "labels"}
    again = collect_gradient_covariances(model, [unlabelled], seed=3)
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = collect_gradient_covariances(model, [batch], seed=4)
    assert not all(torch.equal(first[name], other[name]) for name in first)
    with pytest.raises(UserError, match="the calibration set is empty"):
        collect_gradient_covariances(model, [])


def test_gradients_that_are_not_finite_are_refused(tiny_model: Factory, noise_batch: MakeBatch) -> None:
    """Of an output beyond float32, and of gradients whose squares are."""
    model = tiny_model("wav2vec2")
    broken = copy.deepcopy(model)
    broken.lm_head.weight.data[3] = torch.inf
    with pytest.raises(UserError, match="the model's outputs on the calibration set are NaN or infinite"):
        collect_gradient_covariances(broken, [noise_batch([800])])
    encoder = model.wav2vec2
    encoder.encoder.layer_norm.weight.data.fill_(1e25)
    with pytest.raises(UserError, match=r"gradients at the output of encoder\.layers.* are NaN or infinite"):
        collect_gradient_covariances(encoder, [noise_batch([800])])


PARALLEL = Calibration(frames_per_column=None)
SEQUENTIAL = Calibration(propagation="sequential", frames_per_column=None)
TRUE_SEQUENTIAL = Calibration(propagation="true_sequential", frames_per_column=None)


WEIGHTED_RECOVERY = Reconstruction(steps=2, output_weighting="fisher")


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("wav2vec2", {"allocation": Uniform(), "calibration": PARALLEL}),
        ("wavlm", {"allocation": Uniform(), "calibration": TRUE_SEQUENTIAL, "objective": Asymmetric()}),
        ("hubert", {"allocation": Uniform(), "calibration": SEQUENTIAL, "recovery": WEIGHTED_RECOVERY}),
        ("wav2vec2", {"allocation": ErrorCurves(step=0.2, spread=0.2), "calibration": PARALLEL}),
        ("wav2vec2", {"allocation": Uniform(), "calibration": PARALLEL, "scope": "encoder"}),
        (
            "wav2vec2",
            {"allocation": Uniform(), "calibration": SEQUENTIAL, "quantization": Int4(), "recovery": WEIGHTED_RECOVERY},
        ),
    ],
    ids=["parallel", "asymmetric", "recovered", "error curves", "encoder", "rounded"],
)
def test_a_model_is_pruned_to_the_weight_and_by_the_weighting(
    family: str, options: dict[str, Any], tiny_model: Factory, noise_batch: MakeBatch
) -> None:
    """The count is exact, twice the same bits come out, and others than with equal weights."""
    dense = tiny_model(family)
    batches = [noise_batch([800, 560], seed=seed) for seed in range(2)]
    results = []
    for weighting in ("fisher", "fisher", "equal"):
        model = copy.deepcopy(dense)
        report = sparsewav.prune(model, batches, 0.6, solver=ALPS(output_weighting=weighting), **options)
        removed = sum(int((~mask).sum()) for mask in report.masks.values())
        assert removed == sum(round(item.sparsity * item.rows * item.cols) for item in report.matrices)
        assert report.sparsity == pytest.approx(0.6, abs=2e-3)
        results.append(torch.cat([mask.flatten() for mask in report.masks.values()]))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_weighted_recovery_lowers_the_weighted_error(
    tiny_model: Factory, noise_batch: MakeBatch, utterances: Callable[..., Any]
) -> None:
    """Σ dGdᵀ over Σ yGyᵀ of the first layer's errors and outputs, with every utterance alone.

    It is what the report says, it falls, and further than where all outputs count alike.
    """
    dense = tiny_model("wav2vec2")
    batches = [noise_batch([1600, 1200], seed=seed) for seed in range(3)]
    settings = Reconstruction(steps=60, output_weighting="fisher", output_damping=0.1)
    covariances = collect_gradient_covariances(dense, batches, of_layers=True)
    weights = damped(covariances[layer_name(dense, 0)].double(), settings.output_damping)

    def outputs(model: Any) -> Tensor:
        found: list[Tensor] = []
        hook = encoder_layers(model)[0].register_forward_hook(lambda module, args, output: found.append(output[0]))
        with torch.no_grad():
            for item in utterances(batches):
                model(item["input_values"])
        hook.remove()
        return torch.cat(found).double()

    aims = outputs(dense)
    errors, reports = {}, {}
    for name, recovery in (("fisher", settings), ("equal", Reconstruction(steps=60)), ("none", "none")):
        model = copy.deepcopy(dense)
        options: dict[str, Any] = {"allocation": Uniform(), "calibration": SEQUENTIAL, "recovery": recovery}
        reports[name] = sparsewav.prune(model, batches, 0.6, **options)
        changes = outputs(model) - aims
        errors[name] = float(((changes @ weights) * changes).sum() / ((aims @ weights) * aims).sum())
    assert errors["fisher"] < 0.98 * errors["equal"] < errors["none"]
    assert reports["fisher"].recoveries[0].error_before == pytest.approx(errors["none"], rel=1e-3)
    assert reports["fisher"].recoveries[0].error == pytest.approx(errors["fisher"], rel=1e-3)


def test_masks_of_an_earlier_stage_hold(tiny_model: Factory, noise_batch: MakeBatch) -> None:
    model, batches = tiny_model("wav2vec2"), [noise_batch([800, 560])]
    options: dict[str, Any] = {"solver": ALPS(output_weighting="fisher"), "allocation": Uniform()}
    first = sparsewav.prune(model, batches, 0.4, **options)
    second = sparsewav.prune(model, batches, 0.7, masks=first.masks, **options)
    for name, mask in second.masks.items():
        assert not (mask & ~first.masks[name]).any()
    assert second.sparsity == pytest.approx(0.7, abs=1e-3)


def test_layer_steps_of_the_global_recovery_are_weighted_as_it_says() -> None:
    weighted: dict[str, Any] = {"output_weighting": "fisher", "output_damping": 0.5}
    found = Pruning(recovery=Global(steps=7, **weighted)).layer_recovery
    assert found == Reconstruction(steps=7, **weighted)
    assert Pruning(recovery=Global(**weighted)).layer_recovery is None


def test_weighted_recovery_of_what_loses_whole_parts(tiny_model: Factory, noise_batch: MakeBatch) -> None:
    """The layers' weighted errors fall, and the removed columns stay zero; the solver knows no weights there."""
    model, batches = tiny_model("wav2vec2"), [noise_batch([800, 560], seed=seed) for seed in range(2)]
    recovery = Reconstruction(steps=20, output_weighting="fisher")
    options: dict[str, Any] = {"allocation": Uniform(), "calibration": SEQUENTIAL, "recovery": recovery}
    report = sparsewav.prune(model, batches, sparsewav.Structured(parameters=0.8), **options)
    assert len(report.recoveries) == 2
    assert all(item.error < item.error_before for item in report.recoveries)
    matrices = {matrix.name: matrix for matrix in prunable_matrices(model)}
    zero = sum(int((matrix.weight == 0).all(0).sum()) for matrix in matrices.values())
    assert zero == sum((item.parts - item.kept) * item.size for item in report.structures) > 0
