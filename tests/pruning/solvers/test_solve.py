"""The solver against brute force: least squares column by column, sorting by hand, exact counts."""

import logging
import random
from fractions import Fraction
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsewav.errors import UserError
from sparsewav.pruning.solvers.saliency import SCORES, Block
from sparsewav.pruning.solvers.selection import group_quotas
from sparsewav.pruning.solvers.solve import MatrixGroup, prune_groups, prune_matrices, prune_matrix
from sparsewav.settings import ALPS, NM, OBS, OBSRefit, Pruning, Uniform
from sparsewav.settings.pruning import resolve

UPDATING = ("obs", "obs_first_order")


def problem(rows: int, cols: int, *, seed: int = 0, frames: int | None = None, dead: tuple[int, ...] = ()) -> tuple:
    """A random float64 weight and the H = XXᵀ of correlated inputs, some of which never fire."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator, dtype=torch.float64)
    mixing = torch.randn(cols, cols, generator=generator, dtype=torch.float64) / cols**0.5
    inputs = (torch.eye(cols) + mixing) @ torch.randn(cols, frames or 4 * cols, generator=generator).double()
    inputs[list(dead)] = 0
    return weight, inputs @ inputs.T


def ill_conditioned_problem(rows: int, cols: int, seed: int) -> tuple[Tensor, Tensor]:
    """A random weight and an H whose eigenvalues spread over four decades, like that of a network's activations."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator).double()
    mixing = torch.randn(cols, cols, generator=generator).double() * torch.logspace(0, -2, cols)
    inputs = mixing @ torch.randn(cols, 4 * cols, generator=generator).double()
    return weight, inputs @ inputs.T


def random_mask(rows: int, cols: int, removed: int, *, seed: int = 0) -> Tensor:
    """A mask, True where a weight stays, that removes so many weights anywhere."""
    order = torch.randperm(rows * cols, generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(rows * cols, dtype=torch.bool)
    mask[order[:removed]] = False
    return mask.reshape(rows, cols)


def damped_errors(weight: Tensor, pruned: Tensor, hessian: Tensor, damping: float) -> Tensor:
    """||(W − Ŵ)X||² + λ||W − Ŵ||² of every row."""
    change = weight - pruned
    return ((change @ hessian) * change).sum(1) + damping * change.square().sum(1)


def solve_column_by_column(weight: Tensor, damped: Tensor, keep: Tensor) -> Tensor:
    """Go left to right: freeze a column (at zero where masked), solve the least squares of all columns after it."""
    result = weight.clone()
    for row in range(len(weight)):
        change = torch.zeros_like(weight[row])
        for column in range(weight.shape[1]):
            if not keep[row, column]:
                change[column] = -weight[row, column]
            fixed, free = slice(0, column + 1), slice(column + 1, None)
            if column + 1 < weight.shape[1]:
                change[free] = torch.linalg.solve(damped[free, free], -damped[free, fixed] @ change[fixed])
        result[row] = weight[row] + change
    return result.masked_fill(~keep, 0.0)


@pytest.mark.parametrize("saliency", UPDATING)
@pytest.mark.parametrize("block_size", [1, 3, 128])
def test_sweep_is_the_least_squares_optimum_of_what_is_free(saliency: str, block_size: int) -> None:
    """With a given mask the sweep ends where solving every step's damped least squares directly ends."""
    weight, hessian = problem(5, 11, seed=1)
    keep = random_mask(5, 11, 33, seed=2)
    pruned = prune_matrix(
        weight, hessian, 33 / 55, saliency=saliency, solver=OBS(damping=0.05, block_size=block_size), keep=keep
    )
    assert torch.equal(pruned.keep, keep)
    assert pruned.damping == pytest.approx(0.05 * float(hessian.diagonal().mean()), rel=1e-12)
    damped = hessian + pruned.damping * torch.eye(11, dtype=torch.float64)
    torch.testing.assert_close(pruned.weight, solve_column_by_column(weight, damped, keep), rtol=0, atol=1e-10)


@pytest.mark.parametrize("saliency", UPDATING)
def test_mask_is_that_of_the_formulas(saliency: str) -> None:
    """Block by block, eq. 1 and 3 with H = 2XXᵀ, direct inverses and a gradient by autograd remove the same weights."""
    rows, cols, block_size = 20, 12, 4
    weight, hessian = ill_conditioned_problem(rows, cols, seed=20)
    pruned = prune_matrix(weight, hessian, 0.5, saliency=saliency, solver=OBS(damping=2.0, block_size=block_size))
    damped = hessian + pruned.damping * torch.eye(cols, dtype=torch.float64)
    keep = torch.ones(rows, cols, dtype=torch.bool)
    gradient_matters = False
    for start in range(0, cols, block_size):
        block = slice(start, start + block_size)
        # With nothing masked from here on, the least squares of the last frozen column gives the current weights.
        current = solve_column_by_column(weight, damped, keep).requires_grad_()
        change = weight - current
        (gradient,) = torch.autograd.grad(((change @ hessian) * change).sum(), current)
        scores = torch.zeros(rows, block_size, dtype=torch.float64)
        for offset in range(block_size):
            left = slice(start + offset, None)
            inverse_diagonal = torch.linalg.inv(2 * damped[left, left])[0, 0]
            scores[:, offset] = current[:, start + offset].detach().square() / inverse_diagonal
        plain = scores.flatten().argsort()[: rows * block_size // 2]
        if saliency == "obs_first_order":
            scores += (current * gradient).detach()[:, block].abs()
        lowest = scores.flatten().argsort()[: rows * block_size // 2]
        gradient_matters |= set(lowest.tolist()) != set(plain.tolist())
        keep[:, block] = torch.ones(rows * block_size).index_fill(0, lowest, 0).reshape(rows, block_size).bool()
    assert torch.equal(pruned.keep, keep)
    assert gradient_matters == (saliency == "obs_first_order")  # or this test would not see a wrong gradient


def test_first_order_saliency_is_equation_3() -> None:
    """|w G| + w² / [H⁻¹]_pp, where G and H are the first and second derivative of one loss, both by autograd."""
    generator = torch.Generator().manual_seed(30)
    weight, current = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    inputs = torch.randn(5, 9, generator=generator, dtype=torch.float64)

    def loss(pruned: Tensor) -> Tensor:
        return (weight @ inputs - pruned @ inputs).square().sum()

    gradient: Any = torch.autograd.functional.jacobian(loss, current)
    hessian: Any = torch.autograd.functional.hessian(loss, current)
    expected = torch.empty_like(current)
    for row in range(3):
        expected[row] = (current * gradient)[row].abs() + current[row].square() / hessian[row, :, row].inverse().diag()
    squares = inputs @ inputs.T
    block = Block(current, squares.inverse().diag(), squares.diag(), lambda: gradient)
    torch.testing.assert_close(SCORES["obs_first_order"](block), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("saliency", UPDATING)
@pytest.mark.parametrize("dead", [(), (0, 4, 12)])
@pytest.mark.parametrize("damping", [0.0, 0.01, 1.0])
def test_increments_sum_to_the_damped_error(saliency: str, dead: tuple[int, ...], damping: float) -> None:
    """What the removals cost one by one (eq. 1) is the damped error of the whole row, dead inputs aside."""
    weight, hessian = problem(6, 13, seed=3, dead=dead)
    pruned = prune_matrix(weight, hessian, 0.6, saliency=saliency, solver=OBS(damping=damping, block_size=4))
    live = hessian.diagonal() > 0
    expected = damped_errors(weight[:, live], pruned.weight[:, live], hessian[live][:, live], pruned.damping)
    torch.testing.assert_close(pruned.increments, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_first_order_term_vanishes_without_damping(seed: int) -> None:
    """At λ = 0 and full rank the gradient of what remains is zero, so both saliencies choose the same weights."""
    weight, hessian = problem(16, 24, seed=seed)
    plain, first_order = (
        prune_matrix(weight, hessian, 0.6, saliency=saliency, solver=OBS(damping=0.0, block_size=6))
        for saliency in UPDATING
    )
    assert torch.equal(plain.keep, first_order.keep)
    torch.testing.assert_close(plain.weight, first_order.weight, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("damping", "lowest", "highest"), [(1.0, 0.0, 0.985), (0.01, 0.97, 1.03)])
def test_first_order_term_lowers_the_error_under_heavy_damping(damping: float, lowest: float, highest: float) -> None:
    """On average over random layers the first-order term lowers ||(W − Ŵ)X||² where λ is large.

    At the default λ it works through a hundredth of that and the two saliencies tie within their spread.
    """
    ratios = []
    for seed in range(30):
        weight, hessian = ill_conditioned_problem(32, 48, seed)
        plain, first_order = (
            prune_matrix(weight, hessian, 0.9, saliency=saliency, solver=OBS(damping=damping, block_size=8)).weight
            for saliency in UPDATING
        )
        error, first_order_error = (damped_errors(weight, pruned, hessian, 0).sum() for pruned in (plain, first_order))
        ratios.append(float(first_order_error / error))
    assert lowest < sum(ratios) / len(ratios) < highest


def test_updates_beat_masks_and_obs_beats_random_masks() -> None:
    """On correlated inputs OBS leaves less error than Wanda, Wanda than magnitude, and OBS's mask than a random one."""
    errors: dict[str, float] = dict.fromkeys(("obs", "wanda", "magnitude", "random"), 0.0)
    for seed in range(5):
        weight, hessian = problem(24, 32, seed=seed)
        hessian = hessian * torch.linspace(0.3, 3, 32).outer(torch.linspace(0.3, 3, 32))
        for name in ("obs", "wanda", "magnitude"):
            pruned = prune_matrix(weight, hessian, 0.5, saliency=name).weight
            errors[name] += float(damped_errors(weight, pruned, hessian, 0).sum())
        keep = random_mask(24, 32, 24 * 16, seed=seed)
        errors["random"] += float(
            damped_errors(
                weight, prune_matrix(weight, hessian, 0.5, saliency="obs", keep=keep).weight, hessian, 0
            ).sum()
        )
    assert errors["obs"] < errors["wanda"] < errors["magnitude"]
    assert errors["obs"] < errors["random"]


@pytest.mark.parametrize("saliency", SCORES)
def test_stacked_matrices_equal_one_at_a_time(saliency: str) -> None:
    """Query, key and value solved together, each with its own sparsity and mask, come out as if solved alone."""
    _, hessian = problem(1, 12, seed=5)
    weights = [problem(rows, 12, seed=rows)[0] for rows in (4, 6, 9)]
    sparsities = [0.25, 0.6, 0.8]
    keeps = [None, random_mask(6, 12, 30), None]
    together = prune_matrices(weights, hessian, sparsities, saliency=saliency, solver=OBS(block_size=5), keeps=keeps)
    for weight, sparsity, keep, stacked in zip(weights, sparsities, keeps, together, strict=True):
        alone = prune_matrix(weight, hessian, sparsity, saliency=saliency, solver=OBS(block_size=5), keep=keep)
        assert torch.equal(stacked.keep, alone.keep)
        torch.testing.assert_close(stacked.weight, alone.weight, rtol=0, atol=1e-12)
        if alone.increments is not None:
            torch.testing.assert_close(stacked.increments, alone.increments, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("saliency", SCORES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sparsity": NM(2, 4)},
        {"solver": OBS(block_size=40, comparison_group="block_quotas")},
        {"solver": OBS(block_size=40, comparison_group="matrix")},
        {"solver": OBSRefit(block_size=40)},
        {"solver": ALPS()},
    ],
    ids=["block", "2:4", "block_quotas", "matrix", "obs_refit", "alps"],
)
def test_groups_solved_together_equal_one_at_a_time(saliency: str, options: dict[str, Any]) -> None:
    """Different Hessians of one width, different heights, a mask, a drift and dead inputs: each as if solved alone."""
    if saliency not in UPDATING and "solver" in options:
        pytest.skip("goes with weight updates alone")
    groups = []
    for seed, (heights, dead) in enumerate([((4, 6), ()), ((9,), (2, 70)), ((3,), ())]):
        hessian = problem(1, 72, seed=seed, dead=dead)[1]
        weights = [problem(height, 72, seed=10 * seed + height)[0] for height in heights]
        sparsities = [0.5] * len(weights) if "sparsity" in options else [0.4 + 0.1 * height / 3 for height in heights]
        keeps = [random_mask(len(weight), 72, 20) if seed == 2 else None for weight in weights]
        drift = 0.1 * problem(1, 72, seed=7)[1] if seed == 0 and saliency in UPDATING else None
        groups.append(MatrixGroup(weights, hessian, sparsities, keeps, drift, [f"{seed}-{i}" for i in heights]))
    options = {"solver": OBS(block_size=40)} | options
    settings = Pruning(saliency=resolve("saliency", saliency), allocation=Uniform(), **options)
    settings.check()
    together = prune_groups(groups, settings)
    for group, batched in zip(groups, together, strict=True):
        for pruned, alone in zip(batched, prune_groups([group], settings)[0], strict=True):
            assert torch.equal(pruned.keep, alone.keep)
            torch.testing.assert_close(pruned.weight, alone.weight, rtol=0, atol=1e-9)  # conjugate gradients stop early
            if alone.increments is not None:
                torch.testing.assert_close(pruned.increments, alone.increments, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("saliency", SCORES)
@pytest.mark.parametrize("sparsity", [0.0, 0.333, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("weights", ["random", "equal", "zero"])
@pytest.mark.parametrize(("rows", "cols", "block_size"), [(7, 13, 4), (1, 5, 128), (9, 1, 2)])
def test_count_is_exact(saliency: str, sparsity: float, weights: str, rows: int, cols: int, block_size: int) -> None:
    """round(sparsity · size) weights go, at odd shapes, with uneven blocks and when all weights tie."""
    weight, hessian = problem(rows, cols, seed=6)
    weight = {"random": weight, "equal": torch.ones_like(weight), "zero": torch.zeros_like(weight)}[weights]
    pruned = prune_matrix(weight, hessian, sparsity, saliency=saliency, solver=OBS(block_size=block_size))
    assert int((~pruned.keep).sum()) == round(sparsity * rows * cols)
    assert not pruned.weight[~pruned.keep].any()


def skewed_masks(rows: int, cols: int) -> dict[str, Tensor]:
    """Masks that removed half of the weights, or nearly, very unevenly over columns or rows."""
    masks = {name: torch.ones(rows, cols, dtype=torch.bool) for name in ("left", "right", "top", "one_left")}
    masks["left"][:, : cols // 2] = False
    masks["right"][:, cols - cols // 2 :] = False
    masks["top"][: rows // 2] = False
    masks["one_left"][1:, : cols * 2 // 3] = False
    return masks


@pytest.mark.parametrize("saliency", SCORES)
@pytest.mark.parametrize("mask", ["left", "right", "top", "one_left"])
@pytest.mark.parametrize("sparsity", [0.7, 0.7777, 0.999, 1.0])
def test_count_is_exact_on_top_of_a_skewed_mask(saliency: str, mask: str, sparsity: float) -> None:
    """A later stage meets its sparsity over the whole matrix and brings nothing back, however uneven the mask."""
    rows, cols = 10, 21
    weight, hessian = problem(rows, cols, seed=7)
    keep = skewed_masks(rows, cols)[mask]
    pruned = prune_matrix(weight, hessian, sparsity, saliency=saliency, solver=OBS(block_size=4), keep=keep)
    assert int((~pruned.keep).sum()) == round(sparsity * rows * cols)
    assert not (pruned.keep & ~keep).any()
    assert not pruned.weight[~pruned.keep].any()


@pytest.mark.parametrize("saliency", SCORES)
@pytest.mark.parametrize("mask", ["left", "one_left"])
def test_nothing_more_goes_when_the_mask_removed_more_than_asked(saliency: str, mask: str) -> None:
    """A mask that is past the sparsity already stays as it is."""
    weight, hessian = problem(10, 21, seed=8)
    keep = skewed_masks(10, 21)[mask]
    pruned = prune_matrix(weight, hessian, 0.3, saliency=saliency, solver=OBS(block_size=4), keep=keep)
    assert torch.equal(pruned.keep, keep)


@pytest.mark.parametrize("saliency", UPDATING)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.77, 1.0])
def test_dead_inputs_are_emptied_outside_the_quota(saliency: str, sparsity: float) -> None:
    """Columns of inputs that never fire are all zero; the live ones lose exactly their own share, as if alone."""
    dead = (0, 3, 4, 5, 6, 7, 16)  # 4 to 7 are a whole block
    live = [column for column in range(17) if column not in dead]
    weight, hessian = problem(9, 17, seed=9, dead=dead)
    pruned = prune_matrix(weight, hessian, sparsity, saliency=saliency, solver=OBS(block_size=4))
    assert not pruned.weight[:, list(dead)].any()
    assert not pruned.keep[:, list(dead)].any()
    assert int((~pruned.keep[:, live]).sum()) == round(sparsity * 9 * len(live))
    alone = prune_matrix(
        weight[:, live],
        hessian[live][:, live],
        sparsity,
        saliency=saliency,
        solver=OBS(block_size=4),
        keep=pruned.keep[:, live],
    )
    torch.testing.assert_close(pruned.weight[:, live], alone.weight, rtol=0, atol=1e-9)


@pytest.mark.parametrize("saliency", SCORES)
def test_all_inputs_dead(saliency: str) -> None:
    """A layer that never sees a signal is pruned without a crash and without NaN."""
    pruned = prune_matrix(torch.ones(3, 4), torch.zeros(4, 4), 0.5, saliency=saliency)
    assert pruned.weight.isfinite().all()
    assert int((~pruned.keep).sum()) >= 6


def indefinite(lowest_eigenvalue: float) -> Tensor:
    """A symmetric 6 x 6 matrix with ones on its diagonal and one pair of inputs that cannot be so correlated."""
    hessian = torch.eye(6, dtype=torch.float64)
    hessian[0, 1] = hessian[1, 0] = 1 - lowest_eigenvalue
    return hessian


@pytest.mark.parametrize("saliency", UPDATING)
def test_damping_is_raised_until_the_hessian_is_positive_definite(
    saliency: str, caplog: pytest.LogCaptureFixture
) -> None:
    """At a lowest eigenvalue of −0.5 and λ = 0.01 it takes 0.1, then 1; both are logged and the result is sound."""
    weight, hessian = problem(4, 6, seed=10)[0], indefinite(-0.5)
    with caplog.at_level(logging.WARNING):
        pruned = prune_matrix(weight, hessian, 0.5, saliency=saliency, name="layer 7's key")
    assert pruned.damping == pytest.approx(1.0)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert all("layer 7's key" in record.getMessage() for record in caplog.records)
    damped = hessian + pruned.damping * torch.eye(6, dtype=torch.float64)
    expected = solve_column_by_column(weight, damped, pruned.keep)
    torch.testing.assert_close(pruned.weight, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("saliency", UPDATING)
def test_gives_up_by_name_after_five_raises(saliency: str, caplog: pytest.LogCaptureFixture) -> None:
    """A Hessian beyond help is the user's to hear about, with the name of the matrix."""
    with caplog.at_level(logging.WARNING), pytest.raises(UserError, match="layer 7's key"):
        prune_matrix(torch.ones(4, 6), indefinite(-1e6), 0.5, saliency=saliency, name="layer 7's key")
    assert len(caplog.records) == 5
    with pytest.raises(UserError, match="layer 7's key"):
        prune_matrix(torch.ones(4, 6), indefinite(float("nan")), 0.5, saliency=saliency, name="layer 7's key")


@pytest.mark.parametrize("saliency", SCORES)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4)])
@pytest.mark.parametrize("block_size", [3, 10, 128])
def test_pattern_holds_in_every_group(saliency: str, n: int, m: int, block_size: int) -> None:
    """n:m keeps exactly n of every m consecutive weights of a row, at block sizes that are no multiple of m too."""
    weight, hessian = problem(5, 24, seed=11)
    pruned = prune_matrix(weight, hessian, NM(n, m), saliency=saliency, solver=OBS(block_size=block_size))
    assert torch.equal(pruned.keep.reshape(-1, m).sum(1), torch.full((5 * 24 // m,), n))
    assert not pruned.weight[~pruned.keep].any()
    if saliency in UPDATING:
        expected = damped_errors(weight, pruned.weight, hessian, pruned.damping)
        torch.testing.assert_close(pruned.increments, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("saliency", SCORES)
def test_pattern_on_top_of_a_mask(saliency: str) -> None:
    """2:4 on top of a mask: what was removed counts in its group, and a group that lost more keeps what it has."""
    weight, hessian = problem(6, 16, seed=12)
    keep = random_mask(6, 16, 50, seed=13)
    pruned = prune_matrix(weight, hessian, NM(2, 4), saliency=saliency, keep=keep)
    assert not (pruned.keep & ~keep).any()
    assert torch.equal(pruned.keep.reshape(-1, 4).sum(1), keep.reshape(-1, 4).sum(1).clamp(max=2))


@pytest.mark.parametrize("saliency", SCORES)
@pytest.mark.parametrize("sparsity", [0.5, NM(2, 4)], ids=str)
def test_arguments_are_not_changed(saliency: str, sparsity: float | NM) -> None:
    """Weight, Hessian and mask are the same bytes afterwards, dead inputs and all."""
    weight, hessian = problem(5, 8, seed=14, dead=(2,))
    keep = random_mask(5, 8, 10)
    before = weight.clone(), hessian.clone(), keep.clone()
    prune_matrix(weight, hessian, sparsity, saliency=saliency, keep=keep)
    assert all(torch.equal(old, new) for old, new in zip(before, (weight, hessian, keep), strict=True))


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.8])
def test_magnitude_equals_sorting_the_whole_matrix(sparsity: float) -> None:
    """Magnitude removes the smallest |w| of the matrix and leaves the others bit for bit."""
    weight, hessian = problem(8, 15, seed=15)
    weight *= torch.linspace(0.1, 3, 8, dtype=torch.float64)[:, None]  # rows differ, so per-row pruning would show
    pruned = prune_matrix(weight, hessian, sparsity, saliency="magnitude")
    threshold = sorted(abs(value) for value in weight.flatten().tolist())[round(sparsity * 120)]
    assert torch.equal(pruned.keep, weight.abs() >= threshold)
    assert torch.equal(pruned.weight[pruned.keep], weight[pruned.keep])
    assert pruned.increments is None


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.75])
def test_wanda_equals_sorting_every_row(sparsity: float) -> None:
    """Wanda removes the same number in every row, those with the smallest |w| · ||x||, and leaves the others."""
    weight, hessian = problem(8, 16, seed=16)
    hessian = hessian * torch.linspace(0.1, 5, 16).outer(torch.linspace(0.1, 5, 16))  # inputs differ in norm
    weight *= torch.linspace(0.1, 3, 8, dtype=torch.float64)[:, None]
    pruned = prune_matrix(weight, hessian, sparsity, saliency="wanda")
    for row in range(8):
        scores = [abs(float(weight[row, column])) * float(hessian[column, column]) ** 0.5 for column in range(16)]
        lowest = sorted(range(16), key=scores.__getitem__)[: round(sparsity * 16)]
        assert sorted((~pruned.keep[row]).nonzero().flatten().tolist()) == sorted(lowest)
    assert torch.equal(pruned.weight[pruned.keep], weight[pruned.keep])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("saliency", SCORES)
def test_weight_keeps_its_dtype(saliency: str, dtype: torch.dtype) -> None:
    """Half-precision weights are solved in float32 and handed back as they came, with the exact count."""
    weight, hessian = problem(8, 16, seed=17)
    pruned = prune_matrix(weight.to(dtype), hessian.float(), 0.6, saliency=saliency)
    assert pruned.weight.dtype == dtype
    assert int((~pruned.keep).sum()) == round(0.6 * 128)
    reference = prune_matrix(weight.to(dtype).float(), hessian.float(), 0.6, saliency=saliency)
    assert torch.equal(pruned.weight, reference.weight.to(dtype))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"saliency": "obd"}, "obd"),
        ({"sparsity": 1.2}, "sparsity"),
        ({"sparsity": -0.1}, "sparsity"),
        ({"sparsity": float("nan")}, "sparsity"),
        ({"hessian": torch.eye(5)}, "shape"),
        ({"hessian": torch.ones(8, 1)}, "shape"),
        ({"keep": torch.ones(1, 8, dtype=torch.bool)}, "shape"),
        ({"keep": torch.ones(8, 4, dtype=torch.bool)}, "shape"),
        ({"sparsity": NM(2, 3)}, "2:3"),
        ({"sparsity": NM(5, 4)}, r"sparsity\.n=5 and sparsity\.m=4"),
    ],
)
def test_wrong_arguments_are_refused(changes: dict, says: str) -> None:
    """A wrong saliency, sparsity, shape or pattern is a user's error that names it."""
    arguments = {"weight": torch.ones(4, 8), "hessian": torch.eye(8), "sparsity": 0.5} | changes
    with pytest.raises(UserError, match=says):
        prune_matrix(**arguments)


def fill_by_trying_all(total: int, sizes: list[int], removed: list[int]) -> list[Fraction]:
    """Exact water level: try every set of groups that might be above it, and take the one that is consistent."""
    groups = range(len(sizes))
    for count in range(len(sizes)):
        for above in combinations(groups, count):
            below = [group for group in groups if group not in above]
            size = sum(sizes[group] for group in below)
            if not size:
                continue
            share = Fraction(total - sum(removed[group] for group in above), size)
            if all(removed[group] <= share * sizes[group] for group in below) and all(
                removed[group] >= share * sizes[group] for group in above
            ):
                return [Fraction(removed[group]) if group in above else share * sizes[group] for group in groups]
    return [Fraction(value) for value in removed]


@pytest.mark.parametrize("seed", range(100))
def test_quotas_fill_up_evenly(seed: int) -> None:
    """Quotas sum to the total, lie between removed and size, and are within one of the exact common water level."""
    generator = random.Random(seed)
    sizes = [generator.choice([0, 1, 2, 5, 24, 100]) for _ in range(generator.randint(1, 6))]
    removed = [generator.choice([0, size, generator.randint(0, size)]) for size in sizes]
    total = generator.randint(0, sum(sizes))
    quotas = group_quotas(total, torch.tensor(sizes), torch.tensor(removed)).tolist()
    level = fill_by_trying_all(max(total, sum(removed)), sizes, removed)
    assert sum(quotas) == max(total, sum(removed))
    for quota, size, gone, exact in zip(quotas, sizes, removed, level, strict=True):
        assert gone <= quota <= size
        assert abs(quota - exact) < 1
