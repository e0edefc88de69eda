"""The plain loop that the benchmark compares with, and the benchmark's own command."""

import subprocess
import sys
from pathlib import Path

import pandas
import pytest
import torch

from experiments.bench.engine import random_problem
from experiments.bench.plain import plain_hessians, plain_prune_matrix
from sparsewav.pruning import calibrate, prune_matrices


@pytest.mark.parametrize("cols", [256, 300])
def test_solver_equals_the_plain_loop(cols: int) -> None:
    """In float32 the masks agree on 99.9 % of weights and the layer error within 0.1 % with the plain loop's."""
    weights, hessian = random_problem(2, 200, cols)
    ours = prune_matrices(weights, hessian, [0.75, 0.75])
    for weight, pruned in zip(weights, ours, strict=True):
        plain = plain_prune_matrix(weight, hessian, 0.75)
        assert ((plain != 0) == pruned.keep).float().mean() >= 0.999
        errors = [float((((other - weight) @ hessian) * (other - weight)).sum()) for other in (plain, pruned.weight)]
        assert errors[1] == pytest.approx(errors[0], rel=1e-3)


def test_calibration_equals_the_plain_sums(tiny_model, noise_batch) -> None:  # type: ignore[no-untyped-def]
    """What the benchmark times as plain is what the engine computes."""
    model = tiny_model("wav2vec2", "group")
    batches = [noise_batch([400]), noise_batch([272], seed=1)]
    calibration = calibrate(model, batches)
    for name, plain in plain_hessians(model, batches).items():
        torch.testing.assert_close(calibration.hessian(name), plain, rtol=1e-4, atol=1e-4)


def test_command_writes_what_it_measured(tmp_path: Path) -> None:
    """The solver's part of the benchmark runs by its command, and its CSV has every contestant's rounds."""
    command = [sys.executable, "-m", "experiments.bench.engine", "solver", "--rounds", "1", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    table = pandas.read_csv(tmp_path / "solver.csv")
    assert {"SparseWAV", "plain loop"} <= set(table["contestant"])
    assert (table["seconds"] > 0).all()
    assert "the layer" in done.stdout


def test_gpu_benchmark_runs_its_contestants(tmp_path: Path) -> None:
    """On the CPU in place of a GPU, with one layer: every contestant prunes, and a missing GPU is one sentence."""
    command = [sys.executable, "-m", "experiments.bench.gpu", "solver", "pipeline", "--output", str(tmp_path)]
    quick = ["--models", "base", "--layers", "1", "--clips", "8", "--rounds", "1", "--no-warm-up", "--device", "cpu"]
    done = subprocess.run([*command, *quick], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    solver, pipeline = (pandas.read_csv(tmp_path / f"gpu_{part}.csv") for part in ("solver", "pipeline"))
    assert set(solver["contestant"]) == {"SparseWAV", "one input at a time", "plain loop"}
    assert (solver["same_mask"] >= 0.97).all()  # 5000 frames for 3072 columns: nearly singular
    assert {"SparseWAV", "plain loop", "one forward"} <= set(pipeline["contestant"])
    assert {f"wav2vec2-base: {stage}" for stage in ("allocate", "calibrate", "solve")} <= set(pipeline["subject"])
    if not torch.cuda.is_available():
        refused = subprocess.run(command, capture_output=True, text=True, check=False)
        assert refused.returncode == 2
        assert "PyTorch sees no GPU" in refused.stderr
