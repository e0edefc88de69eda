"""Removing groups of columns: against brute force and exact least squares."""

import pytest
import torch
from torch import Tensor

from sparsewav import UserError
from sparsewav.pruning.solvers import groups
from sparsewav.pruning.solvers.groups import remove_groups

DAMPING = 0.01


def problem(rows: int, cols: int, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, a Hessian of strongly correlated inputs, and the damped Hessian, in float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(cols, cols, generator=generator, dtype=torch.float64) + 1
    inputs = mix @ torch.randn(cols, 4 * cols, generator=generator, dtype=torch.float64)
    hessian = inputs @ inputs.T
    weight = torch.randn(rows, cols, generator=generator, dtype=torch.float64)
    return weight, hessian, hessian + DAMPING * hessian.diagonal().mean() * torch.eye(cols, dtype=torch.float64)


def columns_of(kept: list[int], size: int) -> list[int]:
    return [group * size + index for group in kept for index in range(size)]


def least_squares(target: Tensor, hessian: Tensor, columns: list[int]) -> tuple[Tensor, float]:
    """The weights on some columns with the least tr((T − Ŵ)H(T − Ŵ)ᵀ), by the normal equations; and that error."""
    weight = torch.zeros_like(target)
    if columns:
        weight[:, columns] = torch.linalg.solve(hessian[columns][:, columns], (hessian @ target.T)[columns]).T
    return weight, squared_error(target, weight, hessian)


def squared_error(target: Tensor, weight: Tensor, hessian: Tensor) -> float:
    change = target - weight
    return float((change @ hessian * change).sum())


@pytest.fixture(autouse=True, params=[2, 64], ids=["panels of 2", "panels of 64"])
def _panels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also gather so few columns that panels end everywhere."""
    monkeypatch.setattr(groups, "PANEL", request.param)


@pytest.mark.parametrize(("count", "size"), [(9, 1), (6, 2), (5, 3)])
def test_groups_go_as_by_brute_force(count: int, size: int) -> None:
    weight, hessian, damped = problem(4, count * size)
    left = list(range(count))
    for removal in remove_groups(weight, hessian, size, range(count, -1, -1), DAMPING):
        assert removal.kept.tolist() == left
        expected, _ = least_squares(weight, damped, columns_of(left, size))
        torch.testing.assert_close(removal.weight, expected)
        assert removal.error == pytest.approx(squared_error(weight, expected, hessian), abs=1e-8)
        if left:
            errors = {
                gone: least_squares(weight, damped, columns_of([group for group in left if group != gone], size))[1]
                for gone in left
            }
            left.remove(min(errors, key=errors.__getitem__))


def test_counts_do_not_change_what_goes_and_keep_their_order() -> None:
    weight, hessian, _ = problem(4, 24)
    every = {len(removal.kept): removal for removal in remove_groups(weight, hessian, 2, range(13), DAMPING)}
    for count, removal in zip([3, 11, 3, 7], remove_groups(weight, hessian, 2, [3, 11, 3, 7], DAMPING), strict=True):
        assert removal.kept.tolist() == every[count].kept.tolist()
        assert len(removal.kept) == count
        torch.testing.assert_close(removal.weight, every[count].weight)
    assert torch.equal(every[12].weight, weight)
    assert not every[0].weight.any()


def test_the_asymmetric_target_is_fitted() -> None:
    """Given X and X̂, the kept weights minimise ||WX − ŴX̂||² + λ||W − Ŵ||², and errors differ as this does."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(8, 60, generator=generator, dtype=torch.float64)
    pruned = dense + 0.3 * torch.randn(8, 60, generator=generator, dtype=torch.float64)
    weight = torch.randn(3, 8, generator=generator, dtype=torch.float64)
    hessian, drift = pruned @ pruned.T, (dense - pruned) @ pruned.T
    small = 1e-9
    removals = remove_groups(weight, hessian, 2, [2, 1], small, drift=drift)
    outputs = []
    for removal in removals:
        columns = columns_of(removal.kept.tolist(), 2)
        expected = torch.linalg.lstsq(pruned[columns].T, (weight @ dense).T).solution.T
        torch.testing.assert_close(removal.weight[:, columns], expected, atol=1e-6, rtol=1e-6)
        outputs.append(float((weight @ dense - removal.weight @ pruned).square().sum()))
    assert removals[1].error - removals[0].error == pytest.approx(outputs[1] - outputs[0], rel=1e-5)


def test_what_counts_for_nothing_goes_first() -> None:
    weight, hessian, _ = problem(4, 12)
    hessian[4:6], hessian[:, 4:6] = 0, 0  # a dead group
    weight[:, 8:10] = 0
    removal, less = remove_groups(weight, hessian, 2, [4, 3], DAMPING)
    assert removal.kept.tolist() == [0, 1, 3, 5]
    assert removal.error == pytest.approx(0, abs=1e-8)
    assert less.error > 1


def test_float32_agrees_with_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian, _ = problem(16, 96)
    exact = remove_groups(weight, hessian, 1, [70, 20], DAMPING)
    monkeypatch.setattr(groups, "DOUBLE", 0)
    for removal, reference in zip(
        remove_groups(weight.float(), hessian.float(), 1, [70, 20], DAMPING), exact, strict=True
    ):
        assert removal.weight.dtype == torch.float32
        assert removal.kept.tolist() == reference.kept.tolist()
        assert removal.error == pytest.approx(reference.error, rel=1e-3)
        error = squared_error(weight, removal.weight.double(), hessian)
        assert error == pytest.approx(reference.error, rel=1e-3)


def test_broken_numbers_are_refused_by_name() -> None:
    weight, hessian, _ = problem(4, 6)
    with pytest.raises(UserError, match=r"Hessian of layers\.0\.out_proj has NaN"):
        remove_groups(weight, hessian / 0, 2, [1], DAMPING, "layers.0.out_proj")
    with pytest.raises(UserError, match=r"Hessian of layers\.0\.out_proj is not positive definite"):
        remove_groups(weight, hessian - 1e6 * torch.ones(6, 6), 2, [1], DAMPING, "layers.0.out_proj")
