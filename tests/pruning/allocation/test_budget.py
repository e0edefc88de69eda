"""A budget in bytes: the choice against exhaustive search, and files that fit whatever decides what goes."""

import json
import re
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
from torch import Tensor

import sparsewav
from sparsewav import ALPS, Calibration, ErrorCurves, Megabytes, Search, prune
from sparsewav.pruning import prunable_matrices
from sparsewav.pruning.allocation import budget
from sparsewav.pruning.allocation.budget import Fit, UniformFit, bytes_of_rest, undominated
from sparsewav.pruning.allocation.levels import Level, choose_within
from sparsewav.pruning.encoding import file_bytes
from sparsewav.settings.quantization import Mixed
from tests.terminal import Run

Batch = dict[str, Tensor]
Factory = Callable[..., Any]
MakeBatch = Callable[..., Batch]


@pytest.fixture
def batches(noise_batch: MakeBatch) -> list[Batch]:
    """Two batches of padded noise, one of a single utterance."""
    return [noise_batch([400, 304]), noise_batch([352], seed=1)]


def levels_of(generator: np.random.Generator, unit: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Draw the bytes of four matrices, whole multiples of a unit, at 3 to 6 levels each, and the levels' costs."""
    counts = dict(zip("abcd", generator.integers(3, 7, 4), strict=True))
    sizes = {name: unit * np.sort(generator.integers(1, 900, count)) for name, count in counts.items()}
    return sizes, {name: generator.random(count) for name, count in counts.items()}


@pytest.mark.parametrize("seed", range(5))
def test_choice_within_bytes_equals_exhaustive_search(seed: int) -> None:
    """Of all choices that fit, the one whose costs add up to the least; none where nothing fits."""
    generator = np.random.default_rng(seed)
    sizes, costs = levels_of(generator, unit=7)
    costs["a"][0] = np.inf  # a level that an earlier mask rules out
    room = 7 * 1600  # in which a grain is the unit, so that nothing is rounded
    every = list(product(*(range(len(own)) for own in sizes.values())))

    def total(of: dict[str, np.ndarray], choice: tuple[int, ...]) -> float:
        return sum(of[name][index] for name, index in zip(sizes, choice, strict=True))

    best = min((total(costs, choice) for choice in every if total(sizes, choice) <= room), default=np.inf)
    chosen = choose_within(costs, sizes, room)
    if chosen is None:
        assert best == np.inf
    else:
        assert total(costs, tuple(chosen.values())) == best
        assert total(sizes, tuple(chosen.values())) <= room
    assert choose_within(costs, sizes, int(sum(own.min() for own in sizes.values())) - 1) is None


def test_choice_never_exceeds_its_bytes() -> None:
    """Bytes are rounded up: for sizes and budgets without a common divisor what is chosen fits, too."""
    generator = np.random.default_rng(0)
    for _ in range(50):
        sizes, costs = levels_of(generator, unit=1)
        sizes = {name: own * 1013 + generator.integers(0, 1013, len(own)) for name, own in sizes.items()}
        room = int(generator.integers(1_000_000, 2_500_000))
        chosen = choose_within(costs, sizes, room)
        if chosen is not None:
            assert sum(sizes[name][index] for name, index in chosen.items()) <= room


def test_levels_that_another_beats_are_dropped() -> None:
    """What stays grows in bytes and falls in error; what was dropped has one that is as good and nearly as small."""
    generator = np.random.default_rng(0)
    sizes, errors = generator.integers(100, 2000, 60), generator.random(60)
    top = int(errors.argmin())
    kept = undominated(sizes, list(errors), top)
    assert kept[-1] == top
    assert (np.diff(sizes[kept]) > 0).all()
    assert (np.diff(errors[kept]) < 0).all()
    for index in np.flatnonzero(sizes <= sizes[top]):
        assert any(errors[k] <= errors[index] and sizes[k] <= budget.CLOSEST * sizes[index] for k in kept)


@pytest.mark.parametrize("seed", range(3))
def test_a_smaller_choice_saves_what_was_asked(seed: int) -> None:
    """It saves at least so much, takes no level that is ruled out, and is None beyond the smallest levels."""
    generator = np.random.default_rng(seed)
    sizes, costs = levels_of(generator, unit=3)
    costs["b"][0] = np.inf
    levels = {name: [Level(0.1 * index, 4) for index in range(len(own))] for name, own in sizes.items()}
    fit = Fit(levels, sizes, costs, {name: len(own) - 1 for name, own in sizes.items()})

    def taken(fit: Fit) -> int:
        return int(sum(sizes[name][index] for name, index in fit.chosen.items()))

    least = sum(int(own[np.isfinite(costs[name])].min()) for name, own in sizes.items())
    for excess in (1, 50, taken(fit) - least):
        smaller = fit.smaller(excess)
        assert smaller is not None
        assert taken(smaller) <= taken(fit) - excess
        assert smaller.chosen["b"] > 0
    assert fit.smaller(taken(fit) - least + 1) is None


def test_uniform_sparsity_is_interpolated() -> None:
    """Between two measurements, at the first where all is dense, and to ask for less raises it."""
    measured = [(0.0, 1000), (0.5, 600), (0.9, 200)]
    fit = UniformFit(measured, 700.0, ["a", "b"], 4)
    assert fit.sparsities == pytest.approx({"a": 0.375, "b": 0.375})
    assert fit.bits == {"a": 4, "b": 4}
    assert UniformFit(measured, 5000.0, ["a"], None).sparsities == {"a": 0.0}
    smaller = fit.smaller(200)
    assert smaller is not None
    assert smaller.sparsities["a"] == pytest.approx(0.6)
    assert fit.smaller(501) is None


def size_of(model: Any) -> int:
    return file_bytes(model.state_dict())


@pytest.mark.parametrize(
    ("quantization", "options"),
    [
        ("none", {}),
        ("float16", {"allocation": ErrorCurves(others="pruned")}),
        ("int4", {"allocation": "uniform"}),
        ("none", {"allocation": "uniform"}),
        ("mixed", {"allocation": Search(evaluations=5)}),
        ("int3", {"allocation": ErrorCurves(effect="fisher")}),
        (
            "mixed",
            {
                "solver": ALPS(),
                "recovery": sparsewav.Reconstruction(steps=3),
                "calibration": Calibration(propagation="sequential"),
            },
        ),
    ],
    ids=["none", "float16", "uniform", "uniform floats", "search", "fisher", "recovered"],
)
def test_the_file_fits(
    quantization: str, options: dict[str, Any], tiny_model: Factory, batches: list[Batch], tmp_path: Path
) -> None:
    """Three quarters of the dense file, of the same quantisation, are not exceeded and used up but for a little."""
    dense = tiny_model("wav2vec2", hidden_size=64, intermediate_size=128)
    prune(dense, batches, 0.0, quantization="int8" if quantization == "mixed" else quantization, allocation="uniform")
    model = tiny_model("wav2vec2", hidden_size=64, intermediate_size=128)
    asked = Megabytes(round(0.75 * size_of(dense) / 1e6, 4))
    report = prune(model, batches, asked, quantization=quantization, **options)
    assert report.bytes == size_of(model)
    assert 0.97 * asked.bytes < report.bytes <= asked.bytes
    assert report.target_sparsity is None
    zeros = sum(matrix.size - int(matrix.weight.count_nonzero()) for matrix in prunable_matrices(model))
    assert zeros >= round(report.sparsity * sum(matrix.size for matrix in prunable_matrices(model)))
    frame = report.to_frame()
    if quantization == "mixed":
        assert frame["bits"].nunique() > 1
    if options.get("allocation") == "uniform":
        assert frame["target_sparsity"].nunique() == 1
    assert "MB" in repr(report)


@pytest.mark.parametrize("allocation", ["uniform", "error_curves"])
def test_more_bytes_than_the_model_needs_remove_nothing(
    allocation: str, tiny_model: Factory, batches: list[Batch]
) -> None:
    report = prune(tiny_model("wav2vec2"), batches, Megabytes(1), quantization="int4", allocation=allocation)
    (size,) = (re.search(r"nothing is removed, and with 4 nominal.* takes ([\d.]+)", line) for line in report.warnings)
    assert size is not None
    assert report.bytes == pytest.approx(1e6 * float(size[1]), abs=500)
    assert report.sparsity == 0


def test_what_comes_out_too_large_is_pruned_again(
    tiny_model: Factory, batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first choice that is meant to be 5 % too large ends in a file that fits, of the model's own weights."""
    monkeypatch.setattr(budget, "MARGIN", -0.05)
    model = tiny_model("wav2vec2", hidden_size=64, intermediate_size=128)
    report = prune(model, batches, Megabytes(0.05), quantization="int4", allocation="uniform")
    assert any(re.search("larger than 0.05 MB at first: pruned 2 times", line) for line in report.warnings)
    assert report.bytes == size_of(model) <= 50_000
    assert max(row.relative_error for row in report.matrices) < 1


def test_a_size_from_the_command_line(run_sparsewav: Run, small: list[str], tmp_path: Path) -> None:
    """The key alone chooses the budget; its file is written unasked; too small a size names one that is possible.

    What does not even hold the rest is refused before any work.
    """
    small = [*small, "quantization=mixed", "allocation.utterances=4"]
    result = run_sparsewav(*small, "sparsity.megabytes=0.001")
    said = result.stdout + result.stderr
    assert (result.returncode, "Traceback" in said, "Evaluating" in said) == (1, False, False)
    model = sparsewav.load_model(small[0].partition("=")[2]).model
    rest = bytes_of_rest(model, prunable_matrices(model), Mixed())
    assert f"is too small: what is not prunable takes {rest / 1e6:.3f} MB alone; choose more" in said
    result = run_sparsewav(*small, f"sparsity.megabytes={(rest + 50) / (1 - budget.MARGIN) / 1e6:.6f}")
    said = result.stdout + result.stderr
    assert (result.returncode, "Traceback" in said) == (1, False)
    least = re.search(r"is too small: .* choose at least ([\d.]+)", said)
    assert least, said
    result = run_sparsewav(*small, f"sparsity.megabytes={least[1]}")
    said = result.stdout + result.stderr
    assert result.returncode == 0, said
    assert "megabytes, reached" in said
    (path,) = (tmp_path / "outputs").glob(f"*-error_curves-{float(least[1]):g}MB-*/metrics.json")
    metrics = json.loads(path.read_text())
    assert metrics["bytes"] == (path.parent / "model-bitmask" / "model.bitmask.safetensors").stat().st_size
    assert metrics["bytes"] <= 1e6 * metrics["target_megabytes"] == 1e6 * float(least[1])
    assert metrics["target_sparsity"] is None
    assert 0 <= metrics["achieved_sparsity"] < 1
    assert {"target_sparsity", "bits"} <= set(pandas.read_csv(path.with_name("layers.csv")))
    assert "at most" in (path.parent / "model" / "README.md").read_text()
    result = run_sparsewav(*small, "sparsity.megabytes=5")
    assert "more than the model needs: nothing is removed" in result.stdout + result.stderr
