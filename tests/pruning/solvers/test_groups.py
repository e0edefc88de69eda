"""Removing groups of columns: against brute force and exact least squares."""

import pytest
import torch
from torch import Tensor

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


def columns_of(groups: list[int], size: int) -> list[int]:
    return [group * size + index for group in groups for index in range(size)]


def least_squares(target: Tensor, hessian: Tensor, columns: list[int]) -> tuple[Tensor, float]:
    """The weights on some columns with the least tr((T − Ŵ)H(T − Ŵ)ᵀ), by the normal equations; and that error."""
    weight = torch.zeros_like(target)
    if columns:
        weight[:, columns] = torch.linalg.solve(hessian[columns][:, columns], (hessian @ target.T)[columns]).T
    change = target - weight
    return weight, float((change @ hessian * change).sum())


@pytest.mark.parametrize(("groups", "size"), [(9, 1), (6, 2), (5, 3)])
def test_groups_go_as_by_brute_force(groups: int, size: int) -> None:
    weight, hessian, damped = problem(4, groups * size)
    found = remove_groups(weight, hessian, size, range(groups + 1), DAMPING)
    left = list(range(groups))
    for count in range(groups, -1, -1):
        removal = found[count]
        assert removal.kept.tolist() == left
        expected, _ = least_squares(weight, damped, columns_of(left, size))
        torch.testing.assert_close(removal.weight, expected)
        change = weight - expected
        assert removal.error == pytest.approx(float((change @ hessian * change).sum()), abs=1e-8)
        if left:
            errors = {
                gone: least_squares(weight, damped, columns_of([group for group in left if group != gone], size))[1]
                for gone in left
            }
            left.remove(min(errors, key=errors.__getitem__))
