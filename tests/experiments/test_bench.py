"""The plain loop that the benchmarks compare with, and their commands."""

import re
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pandas
import pytest
import torch

from experiments.bench import engine, gpu, inference
from experiments.bench.command import Part, run_parts
from experiments.bench.engine import random_problem
from experiments.bench.plain import plain_hessians, plain_prune_matrix
from sparsewav.inference import alternatives
from sparsewav.pruning import collect_hessians, prune_matrices


@pytest.mark.parametrize("cols", [256, 300])
def test_solver_equals_the_plain_loop(cols: int) -> None:
    """In float32 the masks agree on 99.9 % of weights and the layer error within 0.1 % with the plain loop's."""
    weights, hessian = random_problem(2, 200, cols)
    ours = prune_matrices(weights, hessian, [0.75, 0.75], saliency="obs")
    for weight, pruned in zip(weights, ours, strict=True):
        plain = plain_prune_matrix(weight, hessian, 0.75)
        assert ((plain != 0) == pruned.keep).float().mean() >= 0.999
        errors = [float((((other - weight) @ hessian) * (other - weight)).sum()) for other in (plain, pruned.weight)]
        assert errors[1] == pytest.approx(errors[0], rel=1e-3)


def test_calibration_equals_the_plain_sums(tiny_model, noise_batch) -> None:  # type: ignore[no-untyped-def]
    """What the benchmark times as plain is what the engine computes."""
    model = tiny_model("wav2vec2", "group")
    batches = [noise_batch([400]), noise_batch([272], seed=1)]
    hessians = collect_hessians(model, batches)
    for name, plain in plain_hessians(model, batches).items():
        torch.testing.assert_close(hessians.of(name), plain, rtol=1e-4, atol=1e-4)


def test_command_writes_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The CSV of the solver's part has every contestant's rounds, on a layer that is small here."""
    layer = {name: (count, rows // 8, cols // 8) for name, (count, rows, cols) in engine.BASE_LAYER.items()}
    monkeypatch.setattr(engine, "BASE_LAYER", layer)
    assert engine.main(["solver", "--rounds", "1", "--output", str(tmp_path)]) == 0
    table = pandas.read_csv(tmp_path / "solver.csv")
    assert {"SparseWAV", "plain loop"} <= set(table["contestant"])
    assert (table["seconds"] > 0).all()
    assert {"machine", "threads", "versions"} <= set(table)
    assert "the layer" in capsys.readouterr().out


def test_gpu_benchmark_runs_its_contestants(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the CPU in place of a GPU, with one small layer: all contestants prune, and a missing GPU is one sentence."""
    narrow = {"hidden_size": 192, "intermediate_size": 768, "conv_dim": (32,) * 7}
    monkeypatch.setitem(inference.MODELS, "base", narrow)
    command = ["solver", "pipeline", "--output", str(tmp_path)]
    quick = ["--models", "base", "--layers", "1", "--clips", "8", "--rounds", "1", "--no-warm-up", "--device", "cpu"]
    assert gpu.main([*command, *quick]) == 0
    solver, pipeline = (pandas.read_csv(tmp_path / f"gpu_{part}.csv") for part in ("solver", "pipeline"))
    assert set(solver["contestant"]) == {"SparseWAV", "one input at a time", "plain loop"}
    assert (solver["same_mask"] >= 0.97).all()
    assert {"SparseWAV", "plain loop", "one forward"} <= set(pipeline["contestant"])
    assert {f"wav2vec2-base: {stage}" for stage in ("allocate", "calibrate", "solve")} <= set(pipeline["subject"])
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="2"):
            gpu.main(command)
        assert "PyTorch sees no GPU" in capsys.readouterr().err


def test_inference_is_measured_beside_its_alternatives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every contestant has its rounds and how far its outputs are from float32; what cannot be had is said."""
    monkeypatch.setitem(inference.MODELS, "base", {"hidden_size": 192, "intermediate_size": 768, "conv_dim": (32,) * 7})
    contestants = ("PyTorch int8", "ONNX Runtime float32", "OpenVINO float32")
    monkeypatch.setattr(inference, "ALTERNATIVES", {name: alternatives.ALTERNATIVES[name] for name in contestants})
    monkeypatch.setattr(inference, "CUT_RUN_BY", contestants[1:2])
    monkeypatch.setitem(sys.modules, "openvino", None)
    command = ["alternatives", "--models", "base", "--layers", "1", "--rounds", "3", "--sparsities", "0.9"]
    command += ["--kept", "0.5"]
    assert inference.main([*command, "--cases", "1x1", "2x1", "--threads", "1", "--output", str(tmp_path)]) == 0
    assert "OpenVINO float32 is left out: openvino is not installed" in capsys.readouterr().out
    table = pandas.read_csv(tmp_path / "alternatives.csv")
    counts = table.groupby(["subject", "contestant"]).size()
    assert len(counts) == 2 * 6
    assert set(counts) == {3}
    differences = table.groupby("contestant")["difference"].agg(["min", "max"])
    assert differences.loc["dense", "max"] == 0
    assert differences.loc["ONNX Runtime float32", "max"] < 1e-4
    assert 1e-4 < differences.loc["PyTorch int8", "min"] < 0.5
    (ours,) = (name for name in differences.index if name.startswith("SparseWAV, 90% zero"))
    assert differences.loc[ours, "max"] < 1e-4
    assert differences.loc["SparseWAV structured, 50% kept, ONNX Runtime float32", "max"] < 1e-4
    assert (tmp_path / "alternatives.png").stat().st_size > 10_000


def test_convolutions_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense and both layouts of the kernel take turns, here on one short input."""
    monkeypatch.setattr(inference, "CONVOLUTIONS", ((3, 9),))
    command = ["convolutions", "--rounds", "1", "--threads", "1", "--sparsities", "0.9", "--output", str(tmp_path)]
    assert inference.main(command) == 0
    table = pandas.read_csv(tmp_path / "convolutions.csv")
    assert list(table["contestant"]) == ["dense", "kernel, 96 columns", "kernel, 192 columns"]
    assert (table["seconds"] > 0).all()


@pytest.mark.parametrize("benchmark", [engine, gpu, inference])
def test_every_benchmark_describes_its_parts_and_refuses_others(
    benchmark: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")  # a line for the list of the parts
    with pytest.raises(SystemExit, match="0"):
        benchmark.main(["--help"])
    said = capsys.readouterr().out
    name = benchmark.__name__.rpartition(".")[2]
    assert re.search(rf"^  python -m experiments\.bench\.{name} \w+", said, re.MULTILINE), "a command worth copying"
    (listed,) = re.findall(r"^  part +(.+) \(default all\)", said, re.MULTILINE)
    assert all(re.search(rf"^  {part} +\S.+\.$", said, re.MULTILINE) for part in listed.split(", "))
    with pytest.raises(SystemExit, match="2"):
        benchmark.main(["slover"])
    assert f"slover is none of {listed}" in capsys.readouterr().err


def test_rows_of_a_benchmark_are_replaced_when_they_are_measured_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A long sweep can be run in pieces: what is not measured again stays."""
    seconds = iter((1.0, 2.0, 3.0))
    parts = {
        "one": Part(
            lambda options: pandas.DataFrame([{"subject": options.subject, "seconds": next(seconds)}]),
            lambda table, path: f"{len(table)} rows",
        )
    }
    for subject in ("a", "b", "a"):
        run_parts(parts, Namespace(parts=["one"], output=tmp_path, subject=subject), keys=("subject", "threads"))
    table = pandas.read_csv(tmp_path / "one.csv")
    assert table.set_index("subject")["seconds"].to_dict() == {"a": 3.0, "b": 2.0}
    assert capsys.readouterr().out.count("2 rows") == 2
    # Rows of another machine are not mixed with new ones: it stops before it measures.
    table.assign(machine="another one").to_csv(tmp_path / "one.csv", index=False)
    with pytest.raises(SystemExit, match=r"one\.csv has rows measured on another one, and this is cpu"):
        run_parts(parts, Namespace(parts=["one"], output=tmp_path, subject="a"), keys=("subject", "threads"))
