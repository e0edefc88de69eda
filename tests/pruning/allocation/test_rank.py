"""Allocation: the paper's linear progression over the sensitivity ranks, and the budget it has to keep."""

import random
import re

import pytest

from sparsewav.errors import UserError
from sparsewav.pruning.allocation.rank import allocate_by_rank, allocate_uniformly

EQUAL_SIZES = dict.fromkeys("abcde", 100)
SENSITIVITIES = {"a": 0.1, "b": 5.0, "c": -2.0, "d": 0.7, "e": 3.0}  # from most to least: b e d a c


def random_matrices(generator: random.Random) -> tuple[dict[str, int], dict[str, float]]:
    """Matrices of very different sizes with random sensitivities, some of them equal."""
    names = [f"matrix{index}" for index in range(generator.randint(1, 30))]
    sizes = {name: generator.choice([1, 7, 64, 589, 9216, 36864]) for name in names}
    return sizes, {name: float(generator.randint(-5, 5)) for name in names}


def test_progression_by_hand() -> None:
    """Five matrices at s = 0.7 and α = 0.1 get 0.60, 0.65, ... 0.80, the most sensitive the least."""
    allocated = allocate_by_rank(EQUAL_SIZES, SENSITIVITIES, 0.7, 0.1)
    assert list(allocated) == list("abcde")
    assert allocated == pytest.approx({"b": 0.6, "e": 0.65, "d": 0.7, "a": 0.75, "c": 0.8}, abs=1e-12)


def test_ties_go_by_name() -> None:
    """Equal sensitivities rank by name, whatever order the matrices come in."""
    sizes = dict.fromkeys(["z", "m", "a"], 10)
    allocated = allocate_by_rank(sizes, dict.fromkeys(sizes, 1.0), 0.5, 0.1)
    assert allocated == pytest.approx({"a": 0.4, "m": 0.5, "z": 0.6}, abs=1e-12)


def test_one_matrix_gets_the_target() -> None:
    """With a single matrix there is no range to spread over."""
    assert allocate_by_rank({"a": 8}, {"a": 1.0}, 0.7, 0.1) == {"a": 0.7}


@pytest.mark.parametrize("seed", range(40))
def test_exact_budget_is_met_to_one_weight(seed: int) -> None:
    """Pruned weights sum to round(s · total), and the sparsities still rise with the rank by the same steps."""
    generator = random.Random(seed)
    sizes, sensitivities = random_matrices(generator)
    sparsity = generator.choice([0.3, 0.5, 2 / 3, 0.8])
    alpha = 0.1
    allocated = allocate_by_rank(sizes, sensitivities, sparsity, alpha, exact_budget=True)
    pruned = {name: round(allocated[name] * sizes[name]) for name in sizes}
    assert sum(pruned.values()) == round(sparsity * sum(sizes.values()))
    assert all(0 <= pruned[name] <= sizes[name] for name in sizes)
    plain = allocate_by_rank(sizes, sensitivities, sparsity, alpha)
    total = sum(sizes.values())
    shift = sparsity - sum(sizes[name] * plain[name] for name in sizes) / total
    for name, size in sizes.items():
        assert abs(allocated[name] * size - (plain[name] + shift) * size) < 1 + 1e-6


@pytest.mark.parametrize("sparsity", [0.05, 0.4, 0.9, 0.97, 1 / 3, 2 / 3, 0.1234567, 0.8765432])
def test_alpha_that_does_not_fit_is_refused_and_the_named_one_accepted(sparsity: float) -> None:
    """A range that leaves [0, 1] is an error, and the α that the message offers works and is the largest (to 1e-5)."""
    with pytest.raises(UserError, match=r"allocation\.alpha") as error:
        allocate_by_rank(EQUAL_SIZES, SENSITIVITIES, sparsity, min(sparsity, 1 - sparsity) + 0.001)
    offered = re.search(r"from 0 to (\S+)", str(error.value))
    assert offered
    allocated = allocate_by_rank(EQUAL_SIZES, SENSITIVITIES, sparsity, float(offered[1]))
    assert all(0 <= share <= 1 for share in allocated.values())
    assert float(offered[1]) == pytest.approx(min(sparsity, 1 - sparsity), abs=1e-5)


@pytest.mark.parametrize("large_is_sensitive", [True, False])
def test_exact_budget_that_overflows_is_refused_and_the_named_alpha_accepted(large_is_sensitive: bool) -> None:
    """When the shifted bounds leave [0, 1], the message's α fits and a slightly larger one does not."""
    sizes = {"huge": 1_000_000, "small": 1_000, "tiny": 10}
    order = sorted(sizes, key=sizes.get, reverse=large_is_sensitive)  # type: ignore[arg-type]
    sensitivities = {name: -float(rank) for rank, name in enumerate(order)}
    sparsity = 0.9 if large_is_sensitive else 0.1
    with pytest.raises(UserError, match="exact_budget") as error:
        allocate_by_rank(sizes, sensitivities, sparsity, 0.1, exact_budget=True)
    offered = re.search(r"up to (\S+)", str(error.value))
    assert offered
    allocated = allocate_by_rank(sizes, sensitivities, sparsity, float(offered[1]), exact_budget=True)
    assert sum(round(allocated[name] * sizes[name]) for name in sizes) == round(sparsity * sum(sizes.values()))
    with pytest.raises(UserError, match="exact_budget"):
        allocate_by_rank(sizes, sensitivities, sparsity, float(offered[1]) + 0.001, exact_budget=True)


def test_bounds_at_zero_and_one_are_accepted() -> None:
    """The paper's own 90 % with α = 0.1 ends at exactly 1; 10 % begins at exactly 0."""
    assert allocate_by_rank(EQUAL_SIZES, SENSITIVITIES, 0.9, 0.1)["c"] == pytest.approx(1.0, abs=1e-9)
    assert allocate_by_rank(EQUAL_SIZES, SENSITIVITIES, 0.1, 0.1)["b"] == pytest.approx(0.0, abs=1e-9)
    assert max(allocate_by_rank(EQUAL_SIZES, SENSITIVITIES, 0.9, 0.1).values()) <= 1


@pytest.mark.parametrize("sparsity", [-0.1, 1.2, float("nan")])
def test_sparsity_outside_its_range_is_refused(sparsity: float) -> None:
    """A sparsity that is not a share is the user's mistake in both allocations."""
    with pytest.raises(UserError, match="sparsity"):
        allocate_uniformly(EQUAL_SIZES, sparsity)
    with pytest.raises(UserError, match="sparsity"):
        allocate_by_rank(EQUAL_SIZES, SENSITIVITIES, sparsity, 0.1)


def test_negative_alpha_is_refused() -> None:
    """A negative α would give the most sensitive matrix the highest sparsity."""
    with pytest.raises(UserError, match=r"allocation\.alpha"):
        allocate_by_rank(EQUAL_SIZES, SENSITIVITIES, 0.5, -0.1)
