"""Allocation over levels: the choice against exhaustive search, the divergence against the plain model, the search."""

import copy
import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from torch import Tensor

import sparsewav
from sparsewav import ALPS, HAWQ, OBS, Asymmetric, Calibration, ErrorCurves, Search
from sparsewav.errors import UserError
from sparsewav.pruning import collect_hessians, prunable_matrices, prune_matrices, prune_matrix
from sparsewav.pruning.allocation.divergence import OutputDivergence
from sparsewav.pruning.allocation.levels import build_level_store, choose_levels, exact_sparsities, level_grid
from sparsewav.pruning.allocation.search import measure_costs, search_swaps
from tests.terminal import Run

Batch = dict[str, Tensor]
Factory = Callable[..., Any]
MakeBatch = Callable[..., Batch]


def solve(matrices: list[Any], hessian: Tensor, sparsities: list[float]) -> list[Any]:
    return prune_matrices([matrix.weight for matrix in matrices], hessian, sparsities, saliency="obs")


@pytest.fixture
def batches(noise_batch: MakeBatch) -> list[Batch]:
    """Two batches of padded noise, one of a single utterance."""
    return [noise_batch([400, 304]), noise_batch([352], seed=1)]


@pytest.mark.parametrize("seed", range(5))
def test_choice_equals_exhaustive_search(seed: int) -> None:
    """Of all choices that meet the budget the dynamic programme finds the one whose costs add up to the least."""
    generator = np.random.default_rng(seed)
    sizes = {name: int(size) for name, size in zip("abcd", generator.choice([600, 1200, 2400], 4), strict=True)}
    grid = level_grid(0.7, 0.1, 0.2)
    costs = {name: generator.random(5) for name in sizes}
    costs["a"][0] = np.inf  # a level that an earlier mask rules out
    feasible = {
        steps: sum(costs[name][grid.index(step)] for name, step in zip(sizes, steps, strict=True))
        for steps in product(grid.offsets, repeat=4)
        if sum(size * step for size, step in zip(sizes.values(), steps, strict=True)) == 0
    }
    chosen = choose_levels(sizes, costs, grid)
    assert feasible[tuple(chosen.values())] == min(feasible.values()) < np.inf


@pytest.mark.parametrize("target", [0.0, 0.137, 0.5, 0.93, 1.0])
def test_budget_is_met_to_one_weight(target: float) -> None:
    """Whatever the target and the sizes, those without a common divisor too, the counts add up to the budget."""
    generator = np.random.default_rng(0)
    sizes = {"q": 4097, "k": 4096, "up": 16_383, "down": 12_007}
    grid = level_grid(target, 0.05, 0.25)
    assert 0 in grid.offsets
    assert all(0 <= grid.sparsity(offset) <= 1 for offset in grid.offsets)
    costs = {name: generator.random(len(grid.offsets)) for name in sizes}
    sparsities = exact_sparsities(sizes, choose_levels(sizes, costs, grid), grid)
    counts = [sparsities[name] * sizes[name] for name in sizes]
    assert counts == pytest.approx([round(count) for count in counts], abs=1e-6)
    assert round(sum(counts)) == round(target * sum(sizes.values()))


def test_impossible_budget_is_refused() -> None:
    """When earlier masks leave no choice, it says so."""
    grid = level_grid(0.5, 0.1, 0.1)
    with pytest.raises(UserError, match=r"no choice of levels.*allocation\.spread"):
        choose_levels({"a": 10, "b": 10}, {name: np.array([np.inf, np.inf, 1.0]) for name in "ab"}, grid)


@pytest.mark.parametrize("on_disk", [False, True])
def test_library_holds_what_the_solver_gives_for_every_level(
    on_disk: bool, tiny_model: Factory, batches: list[Batch]
) -> None:
    """A level out of the stacked sweep is the matrix pruned alone, and its errors are those of its weights."""
    model = tiny_model("wav2vec2").eval()
    matrices, hessians = prunable_matrices(model), collect_hessians(model, batches)
    grid = level_grid(0.6, 0.2, 0.4)
    sparsities = [grid.sparsity(offset) for offset in grid.offsets]
    with build_level_store(matrices, hessians, sparsities, solve, memory=0 if on_disk else 1e9) as library:
        for matrix in matrices:
            hessian = hessians.of(matrix.name)
            for offset in grid.offsets:
                level = library.weight(matrix.name, grid.index(offset))
                alone = prune_matrix(matrix.weight, hessian, grid.sparsity(offset), saliency="obs")
                torch.testing.assert_close(level, alone.weight, rtol=1e-4, atol=1e-5)
                change = matrix.weight.detach() - level
                index = grid.index(offset)
                assert library.changes[matrix.name][index] == pytest.approx(float(change.square().sum()), rel=1e-4)
                error = ((change @ hessian) * change).sum(1) + alone.damping * change.square().sum(1)
                torch.testing.assert_close(
                    library.row_errors[matrix.name][index].float(), error, rtol=2e-3, atol=1e-4 * float(error.max())
                )


@pytest.mark.parametrize("family", ["wav2vec2", "wavlm", "wav2vec2-conformer"])
def test_divergence_is_that_of_the_plain_model(family: str, tiny_model: Factory, batches: list[Batch]) -> None:
    """With what is kept of the front end and of earlier layers it is the plain model's on single utterances."""
    model = tiny_model(family).eval()
    dense = copy.deepcopy(model)
    divergence = OutputDivergence(model, batches, prunable_matrices(model))
    assert divergence.measure() == pytest.approx(0, abs=1e-6)
    matrices = prunable_matrices(model)
    for matrix in matrices[:1] + matrices[-1:]:
        matrix.weight.data.mul_(torch.rand_like(matrix.weight))
    with torch.no_grad():
        total, frames = 0.0, 0
        for batch in batches:
            for samples, row in zip(batch["attention_mask"].sum(-1).tolist(), batch["input_values"], strict=True):
                one, other = (
                    each(row[None, :samples], attention_mask=torch.ones(1, samples, dtype=torch.long))
                    .logits[0]
                    .double()
                    .log_softmax(-1)
                    for each in (dense, model)
                )
                total, frames = total + float((one.exp() * (one - other)).sum()), frames + len(one)
    expected = total / frames
    assert frames == divergence.frames
    assert expected > 1e-4
    assert divergence.measure() == pytest.approx(expected, rel=1e-3)
    with divergence.resuming_at(matrices[-1].layer):
        assert divergence.measure() == pytest.approx(expected, rel=1e-3)
        matrices[-1].weight.data.zero_()
        changed = divergence.measure()
    assert changed != pytest.approx(expected, rel=1e-3)
    assert divergence.measure() == pytest.approx(changed, rel=1e-5)


def test_fisher_predicts_the_divergence_of_a_small_error(tiny_model: Factory, noise_batch: MakeBatch) -> None:
    """½ F ||δX||² is the divergence that an error in one row of a matrix makes, while it is small."""
    model = tiny_model("wav2vec2").eval()
    batches = [noise_batch([4000] * 4, seed=seed) for seed in range(4)]
    divergence = OutputDivergence(model, batches, prunable_matrices(model))
    fisher = divergence.output_fisher()
    assert all(parameter.grad is None for parameter in model.parameters())
    matrix = prunable_matrices(model)[-1]
    hessian = collect_hessians(model, batches).of(matrix.name)
    predicted = measured = 0.0
    dense = matrix.weight.detach().clone()
    for row in range(len(dense)):
        change = 1e-2 * torch.randn(dense.shape[1], generator=torch.Generator().manual_seed(row))
        matrix.weight.data[row] += change
        measured += divergence.measure()
        matrix.weight.data.copy_(dense)
        predicted += 0.5 * float(fisher[matrix.name][row] * (change @ hessian @ change)) / divergence.frames
    assert predicted == pytest.approx(measured, rel=0.35)  # labels are drawn, and frames are not independent


def test_search_is_never_worse_than_its_start_and_repeats_itself(tiny_model: Factory, batches: list[Batch]) -> None:
    """More measurements give no larger divergence; the same seed gives the same levels, which keep the budget."""
    model = tiny_model("wav2vec2").eval()
    matrices, hessians = prunable_matrices(model), collect_hessians(model, batches)
    sizes = {matrix.name: matrix.size for matrix in matrices}
    grid = level_grid(0.6, 0.1, 0.3)
    divergence = OutputDivergence(model, batches, prunable_matrices(model))
    sparsities = [grid.sparsity(offset) for offset in grid.offsets]
    start = dict.fromkeys(sizes, grid.index(0))
    with build_level_store(matrices, hessians, sparsities, solve, memory=1e9) as library:
        costs = {name: np.zeros(len(grid.offsets)) for name in sizes}
        found = [search_swaps(divergence, matrices, library, costs, start, evaluations) for evaluations in (0, 30, 30)]
    assert found[1] == found[2]
    assert found[1][1] < found[0][1]
    assert sum(sizes[name] * (index - start[name]) for name, index in found[1][0].items()) == 0


@pytest.mark.parametrize("others", ["dense", "pruned"])
def test_measured_costs_are_those_of_one_matrix_at_one_level(
    others: str, tiny_model: Factory, batches: list[Batch]
) -> None:
    """Every cost is the divergence with that matrix at that level and the others as they are said to be."""
    model = tiny_model("wav2vec2").eval()
    matrices, hessians = prunable_matrices(model), collect_hessians(model, batches)
    grid = level_grid(0.6, 0.2, 0.2)
    dense = [matrix.weight.detach().clone() for matrix in matrices]
    divergence = OutputDivergence(model, batches, prunable_matrices(model))
    sparsities = [grid.sparsity(offset) for offset in grid.offsets]
    with build_level_store(matrices, hessians, sparsities, solve, memory=1e9) as library:
        library.reference = {matrix.name: grid.index(0) for matrix in matrices}
        costs = measure_costs(divergence, matrices, library, others)
        for place in (0, len(matrices) - 1):
            for index in range(len(sparsities)):
                for other, weight in zip(matrices, dense, strict=True):
                    other.weight.data.copy_(weight if others == "dense" else library.weight(other.name, grid.index(0)))
                matrices[place].weight.data.copy_(library.weight(matrices[place].name, index))
                assert costs[matrices[place].name][index] == pytest.approx(divergence.measure(), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize(
    ("allocation", "options"),
    [
        (Search(step=0.1, spread=0.2, evaluations=5), {}),
        (Search(effect="fisher", step=0.1, spread=0.2, evaluations=5), {"solver": ALPS()}),
        (
            Search(step=0.1, spread=0.2, evaluations=5),
            {
                "solver": ALPS(),
                "objective": Asymmetric(),
                "calibration": Calibration(propagation="true_sequential", frames_per_column=None),
            },
        ),
        (HAWQ(step=0.1, spread=0.2, rank_tolerance=0.0), {}),
        (ErrorCurves(step=0.1, spread=0.2), {}),
    ],
    ids=["output", "fisher", "asymmetric", "trace", "no-search"],
)
def test_pruned_model_meets_the_budget_and_earlier_masks_hold(
    allocation: HAWQ | ErrorCurves, options: dict[str, Any], tiny_model: Factory, batches: list[Batch]
) -> None:
    """In two stages: counts are exact at both, and what the first removed stays removed."""
    model = tiny_model("wav2vec2")
    size = sum(matrix.size for matrix in prunable_matrices(model))
    options = {"calibration": Calibration(frames_per_column=None)} | options
    masks: dict[str, Tensor] = {}
    for sparsity in (0.5, 0.6):
        before = copy.deepcopy(masks)
        report = sparsewav.prune(model, batches, sparsity, allocation=allocation, masks=masks, **options)
        masks = report.masks
        assert sum(int((~mask).sum()) for mask in masks.values()) == round(sparsity * size)
        assert not any((masks[name] & ~mask).any() for name, mask in before.items())
        assert len({row.target_sparsity for row in report.matrices}) > 1
        assert report.allocated is not None
        assert (report.allocated.evaluations > 0) == (not isinstance(allocation, HAWQ))
        assert report.seconds["allocate"] > 0


@pytest.mark.parametrize("within", ["block_quotas", "matrix"])
def test_weights_that_compete_over_the_whole_matrix(within: str) -> None:
    """The count is exact; the lowest w² / [H⁻¹]_pp of the matrix go, or their number in every block."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 96, generator=generator, dtype=torch.float64) * torch.linspace(0.2, 2, 96)
    inputs = torch.randn(96, 300, generator=generator, dtype=torch.float64)
    hessian = inputs @ inputs.T
    keep = torch.rand(weight.shape, generator=generator) > 0.1
    solver = OBS(damping=0.0, block_size=32, comparison_group=within)
    pruned = prune_matrix(weight, hessian, 0.6, saliency="obs", solver=solver, keep=keep)
    scores = (weight.square() / torch.linalg.inv(hessian).diagonal()).masked_fill(~keep, -1.0)
    lowest = torch.zeros(weight.numel(), dtype=torch.bool)
    lowest[scores.flatten().argsort()[: round(0.6 * weight.numel())]] = True
    lowest = lowest.reshape(weight.shape)
    assert not (pruned.keep & ~keep).any()
    if within == "matrix":
        assert torch.equal(~pruned.keep, lowest)
    else:
        counts = [[int(part.sum()) for part in mask.split(32, dim=1)] for mask in (~pruned.keep, lowest)]
        assert counts[0] == counts[1]
        assert len(set(counts[0])) == 3
    rebuilt = torch.zeros_like(weight)  # the sweep's weights against its own objective: no better than the best refit
    for row, mask in enumerate(pruned.keep):
        rebuilt[row, mask] = torch.linalg.solve(hessian[mask][:, mask], hessian[mask] @ weight[row])
    errors = [float(((weight - other) @ inputs).square().sum()) for other in (rebuilt, pruned.weight)]
    assert errors[0] <= errors[1] < 2 * errors[0]


@pytest.fixture
def small(model_folder: Path, corpus: Path) -> list[str]:
    """Arguments of a run on the tiny model and corpus."""
    subsets = ["data.calibration_subset=train", "data.evaluation_subset=test", "calibration.utterances=12"]
    return [f"model.name_or_path={model_folder}", "data=librispeech_dir", f"data.root={corpus}", *subsets, "device=cpu"]


def test_a_search_from_the_command_line(run_sparsewav: Run, small: list[str], tmp_path: Path) -> None:
    """With the other accurate choices it meets the target, records what it measured, and gives the same bytes again."""
    search = ["allocation=search", "allocation.evaluations=6", "allocation.step=0.1", "sparsity.target=0.6"]
    search += ["solver=alps", "calibration.propagation=sequential", "recovery=reconstruction", "recovery.steps=2"]
    found = []
    for output in ("one", "two"):
        result = run_sparsewav(*small, *search, f"output_root={output}")
        assert result.returncode == 0, result.stdout + result.stderr
        (path,) = (tmp_path / output).glob("*-search-0.6-*/metrics.json")
        found.append((json.loads(path.read_text()), path.with_name("layers.csv"), path.parent / "model"))
    metrics, layers, _ = found[0]
    sizes = pandas.read_csv(layers).eval("rows * cols")
    assert round(metrics["achieved_sparsity"] * sizes.sum()) == round(0.6 * sizes.sum())
    # A measurement for each of the 12 matrices at each of 5 levels, one of the start, and the swaps.
    assert 12 * 5 + 1 < metrics["stages"][0]["divergence_evaluations"] <= 12 * 5 + 1 + 6
    assert metrics["stages"][0]["output_divergence"] > 0
    assert metrics["seconds"]["allocate"] > 0
    assert pandas.read_csv(layers)["target_sparsity"].nunique() > 1
    assert layers.read_bytes() == found[1][1].read_bytes()
    assert (found[0][2] / "model.safetensors").read_bytes() == (found[1][2] / "model.safetensors").read_bytes()


def test_wrong_settings_are_all_named_at_once(run_sparsewav: Run, small: list[str]) -> None:
    """Every key out of range, and a competition over the matrix for a pattern that has none; ALPS has no such key."""
    wrong = ["allocation.effect=loss", "allocation.step=0.5", "allocation.evaluations=0"]
    result = run_sparsewav(*small, "allocation=search", *wrong, "sparsity=n_m", "solver.comparison_group=matrix")
    said = result.stdout + result.stderr
    assert result.returncode == 1
    assert "Traceback" not in said
    for words in (
        "allocation.effect=loss",
        "allocation.step=0.5",
        "allocation.evaluations=0",
        "solver.comparison_group=matrix",
    ):
        assert words in said
    result = run_sparsewav(*small, "solver=alps", "solver.comparison_group=matrix")
    assert result.returncode == 1
    assert "comparison_group" in result.stdout + result.stderr
    assert "Traceback" not in result.stdout + result.stderr
