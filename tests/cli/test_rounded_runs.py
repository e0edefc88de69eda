"""Runs whose weights are rounded: what is on disk, what is recorded, and that tuning comes before the rounding."""

import json
import re
from pathlib import Path

import pandas
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import sparsewav
from sparsewav.pruning.encoding import file_bytes
from tests.terminal import Run, assert_one_sentence, run_folder_in

ROUNDED = ["quantization=int3", "quantization.group_size=8"]
TUNED = ["finetune_strategy=progressive", "sparsity.target=0.8", "training.epochs=4", "training.batch_size=4"]


def assert_rounded(tensors: dict[str, Tensor], layers: pandas.DataFrame) -> None:
    """Every group of a matrix has seven values at most, as many as it removed are zero, and the rest has few, too."""
    rows = layers.set_index("name")
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        if module in rows.index:
            for group in tensor.split(8, 1):
                assert all(len(row.abs().unique()) <= 4 for row in group), name
            assert int((tensor == 0).sum()) >= round(rows.sparsity[module] * tensor.numel())
        elif tensor.dim() > 1 and len(tensor) > 1:
            assert all(len(row.unique()) <= 255 for row in tensor.flatten(1)), name
        else:
            assert torch.equal(tensor, tensor.half().float()), name


@pytest.mark.parametrize("recovery", ["none", "reconstruction"])
def test_a_rounded_run_and_its_records(recovery: str, run_sparsewav: Run, small: list[str], tmp_path: Path) -> None:
    options = ["allocation=uniform", "calibration.propagation=true_sequential", f"recovery={recovery}"]
    result = run_sparsewav(*small, *options, *ROUNDED)
    assert result.returncode == 0, result.stdout + result.stderr
    folder = run_folder_in(tmp_path)
    assert "-int3-" in folder.name
    metrics = json.loads((folder / "metrics.json").read_text())
    assert (metrics["quantization"], metrics["bits"], metrics["achieved_sparsity"]) == ("int3", 3, 0.75)
    assert metrics["seconds"]["quantize"] > 0
    parts = [seconds for piece, seconds in metrics["seconds"].items() if piece not in ("prune", "finetune", "evaluate")]
    assert metrics["seconds"]["prune"] == pytest.approx(sum(parts))
    tensors, layers = load_file(folder / "model" / "model.safetensors"), pandas.read_csv(folder / "layers.csv")
    assert metrics["bytes"] == file_bytes(tensors)
    assert layers.bits.tolist() == [3] * len(layers)
    assert_rounded(tensors, layers)
    assert metrics["params_nonzero"] == sum(int(tensor.count_nonzero()) for tensor in tensors.values())
    card = (folder / "model" / "README.md").read_text()
    assert "pruned to 0.75 sparsity and rounded to int3" in card
    assert "| nominal bits of their weights | 3 |" in card
    assert re.search("name: tiny-wav2vec2-0.75-int3$", card, re.MULTILINE), "and not that of the run without rounding"
    inspected = run_sparsewav(str(folder), command="sparsewav-inspect")
    assert inspected.returncode == 0, inspected.stdout  # though more are zero than were removed
    assert any(
        int((tensors[f"{row.Index}.weight"] == 0).sum()) > round(row.sparsity * row.rows * row.cols)
        for row in layers.set_index("name").itertuples()
    )
    for words in ("bits, nominal", "with those that were rounded to zero", "quantize", "int3", "MB of weights in"):
        assert words in result.stdout


def test_a_tuned_model_is_rounded_last_and_a_stopped_run_goes_on_there(
    run_sparsewav: Run, small: list[str], tmp_path: Path
) -> None:
    arguments = [*small, *TUNED, *ROUNDED, "data.training_subset=train"]
    result = run_sparsewav(*arguments, "output_root=reference")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "word error rate, tuned and rounded" in result.stdout
    (reference,) = (tmp_path / "reference").glob("tiny*")
    metrics = json.loads((reference / "metrics.json").read_text())
    tensors, layers = load_file(reference / "model" / "model.safetensors"), pandas.read_csv(reference / "layers.csv")
    assert_rounded(tensors, layers)
    assert metrics["bits"] == 3
    assert metrics["seconds"]["quantize"] > 0
    assert metrics["wer_pruned"] == metrics["stages"][-1]["wer_pruned"]
    speech = sparsewav.load_model(str(reference / "model"))
    assert speech.model.dtype == torch.float32

    # What was tuned is not rounded, and a run that stops after the tuning only rounds.
    folder = tmp_path / "outputs" / reference.name
    (folder / "predictions.jsonl").mkdir(parents=True)
    assert_one_sentence(run_sparsewav(*arguments), r"cannot write .*predictions\.jsonl")
    (folder / "predictions.jsonl").rmdir()
    tuned = load_file(folder / "stages" / "3-finetune-0.8" / "model.safetensors")
    name = f"{layers.name[0]}.weight"
    assert len(tuned[name][0].abs().unique()) == int((tuned[name][0] != 0).sum()) + 1
    assert torch.equal(tuned[name] == 0, (tuned[name] == 0) & (tensors[name] == 0))
    (folder / "model" / "model.safetensors").write_bytes(b"damaged")
    result = run_sparsewav(*arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Going on from 3-finetune-0.8" in result.stdout
    assert "Tuning" not in result.stdout
    for name in ("model/model.safetensors", "predictions.jsonl", "layers.csv"):
        assert (folder / name).read_bytes() == (reference / name).read_bytes(), name
