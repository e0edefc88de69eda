"""What an NVIDIA GPU alone can show; skipped where there is none."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCTC

import sparsewav
from experiments.bench.engine import random_problem
from experiments.bench.gpu import keep_two_of_four
from experiments.bench.inference import random_model
from sparsewav.inference import acceleration
from sparsewav.pruning import prunable_matrices, prune_matrices
from sparsewav.pruning.solvers.quantize import SCALE_BITS, quantize
from sparsewav.pruning.solvers.solve import MatrixGroup, prune_groups
from sparsewav.settings import Int4, Pruning, SecondOrder, Uniform

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no NVIDIA GPU")


def _error(weight: Tensor, pruned: Tensor, hessian: Tensor) -> float:
    change = (pruned - weight).double()
    return float(((change @ hessian.double()) * change).sum())


def test_batched_matrices_equal_one_at_a_time_and_the_cpu() -> None:
    """On a GPU, groups of one width swept together lose the weights that they lose by themselves, and on the CPU."""
    problems = [random_problem(count, 768, 768, seed=seed) for seed, count in enumerate((3, 1, 1))]
    groups = [
        MatrixGroup(
            weights=[weight.cuda() for weight in weights],
            hessian=hessian.cuda(),
            sparsities=[0.75] * len(weights),
            keeps=[None] * len(weights),
            drift=None,
            names=[f"matrix {index}" for index in range(len(weights))],
        )
        for weights, hessian in problems
    ]
    settings = Pruning(saliency=SecondOrder(), allocation=Uniform())
    together = prune_groups(groups, settings)
    for (weights, hessian), group, batched in zip(problems, groups, together, strict=True):
        alone = prune_groups([group], settings)[0]
        on_cpu = prune_matrices(weights, hessian, [0.75] * len(weights), saliency="obs")
        for weight, mine, other, reference in zip(weights, batched, alone, on_cpu, strict=True):
            assert (mine.keep == other.keep).float().mean() >= 0.999
            assert (mine.keep.cpu() == reference.keep).float().mean() >= 0.999
            expected = _error(weight, reference.weight, hessian)
            assert _error(weight, mine.weight.cpu(), hessian) == pytest.approx(expected, rel=1e-3)


def test_a_matrix_is_rounded_as_well_as_on_the_cpu() -> None:
    """Every weight on a grid that the GPU's arithmetic has left exact, zeros kept, and the error of the CPU."""
    (weight,), hessian = random_problem(1, 512, 768, seed=3)
    keep = torch.rand(512, 768, generator=torch.Generator().manual_seed(0)) > 0.5
    settings = Int4(group_size=64)
    on_gpu = quantize(weight.cuda(), hessian.cuda(), settings, 4, keep=keep.cuda())
    on_cpu = quantize(weight, hessian, settings, 4, keep=keep)
    assert not on_gpu.weight[~keep.cuda()].any()
    mantissas = torch.frexp(on_gpu.scales).mantissa * 2**SCALE_BITS
    assert torch.equal(mantissas, mantissas.round())
    expected = _error(weight * keep, on_cpu.weight, hessian)
    assert _error(weight * keep, on_gpu.weight.cpu(), hessian) == pytest.approx(expected, rel=2e-2)


@torch.inference_mode()
@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor:UserWarning")
def test_two_of_four_products_equal_the_dense_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """With every 2:4 matrix swapped, faster or not, the logits stay those of the dense products."""
    monkeypatch.setattr(acceleration, "_time_on_gpu", lambda dense, sparse, frames: ((2.0,), (1.0,)))
    model = random_model("large", 2).to("cuda", torch.float16)
    keep_two_of_four(model)
    audio = torch.randn(16, 160_000, device="cuda", dtype=torch.float16)
    expected = model(audio).logits
    report = sparsewav.accelerate(model, frames=8000, pattern="2:4")
    assert report.swapped == len(report.matrices), report
    torch.testing.assert_close(model(audio).logits, expected, rtol=0.02, atol=0.02)


def test_a_run_on_the_gpu_prunes_as_one_on_the_cpu(
    small: list[str], environment: dict[str, str], tmp_path: Path
) -> None:
    """The command prunes on a GPU what it prunes on the CPU, and tunes there with the zeros held."""
    tuning = ["finetune_strategy=one_pass", "training.batch_size=4", "training.epochs=2", "data.training_subset=train"]
    masks = {}
    for device in ("cpu", "cuda"):
        command = [sys.executable, "-m", "sparsewav", *small, *tuning, f"device={device}", f"output_root={device}"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        (folder,) = (path.parent for path in (tmp_path / device).glob("*/metrics.json"))
        metrics = json.loads((folder / "metrics.json").read_text())
        assert metrics["device"].startswith(device)
        model = AutoModelForCTC.from_pretrained(folder / "model")
        masks[device] = torch.cat([(matrix.weight != 0).flatten() for matrix in prunable_matrices(model)])
    assert masks["cpu"].sum() == masks["cuda"].sum()
    assert (masks["cpu"] == masks["cuda"]).float().mean() >= 0.98
