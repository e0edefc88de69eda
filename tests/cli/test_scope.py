"""Runs with ``scope=encoder``: what they write and say of it, and what does not go with it."""

import json
from pathlib import Path

import pandas
import pytest
import torch

import sparsewav
from sparsewav.pruning import prunable_matrices
from sparsewav.pruning.encoder import FRONT
from tests.conftest import Run

TUNED = [
    "data.training_subset=train",
    "training.epochs=2",
    "training.batch_size=4",
    "training.freeze_feature_encoder=false",
]
PROGRESSIVE = ["finetune_strategy=progressive", "finetune_strategy.stages=[0.25]", *TUNED]


@pytest.mark.parametrize("more", [PROGRESSIVE, ["quantization=int4", "export.format=bitmask"]])
def test_a_run_prunes_the_front_end_and_says_so(
    more: list[str], run_sparsewav: Run, small: list[str], tmp_path: Path
) -> None:
    """Zeros in front hold through stages, tuning and rounding; files, table, card and inspection agree."""
    options = ["allocation=uniform", "sparsity.target=0.5", "scope=encoder", *more]
    done = run_sparsewav(*small, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0.5000   of the encoder's matrices" in done.stdout
    (folder,) = (path.parent for path in tmp_path.glob("outputs/*/metrics.json"))
    assert "-encoder-" in folder.name
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["scope"] == "encoder"
    layers = pandas.read_csv(folder / "layers.csv").set_index("name")
    for where in ["model", *(["model-bitmask"] if "export.format=bitmask" in more else [])]:
        matrices = prunable_matrices(sparsewav.load(folder / where), "encoder")
        assert list(layers.index) == [matrix.name for matrix in matrices]
        assert sum(matrix.layer == FRONT for matrix in matrices) == 2
        removed = 0
        for matrix in matrices:
            removed += round(layers.sparsity[matrix.name] * matrix.size)
            zeros = int((matrix.parameter == 0).sum())
            assert zeros == matrix.size // 2 or (
                zeros > matrix.size // 2 and more is not PROGRESSIVE
            )  # or rounded to 0
        assert metrics["achieved_sparsity"] == pytest.approx(removed / sum(matrix.size for matrix in matrices))
    assert "sparsity of the encoder's matrices | 0.5000" in (folder / "model" / "README.md").read_text()
    inspected = run_sparsewav(str(folder), command="sparsewav-inspect")
    assert "front" in inspected.stdout
    if more is PROGRESSIVE:
        assert (inspected.returncode, "weights before it" in inspected.stdout) == (0, True), inspected.stdout
        dense, tuned = sparsewav.load(small[0].partition("=")[2]), sparsewav.load(folder / "model")
        front = "wav2vec2.feature_extractor.conv_layers.0.conv.weight"
        assert not torch.equal(dense.get_parameter(front), tuned.get_parameter(front))  # it was really trained
        # A later run that prunes the layers alone, and tunes everything, brings no weight in front back.
        again = [f"model.name_or_path={folder / 'model'}", "allocation=uniform", "sparsity.target=0.6", *TUNED]
        assert run_sparsewav(*small, *again, "finetune_strategy=one_pass", "output_root=again").returncode == 0
        (later,) = (path.parent for path in tmp_path.glob("again/*/metrics.json"))
        last = sparsewav.load(later / "model")
        for before, now in zip(prunable_matrices(tuned, "encoder"), prunable_matrices(last, "encoder"), strict=True):
            assert not now.parameter[before.parameter == 0].any()
            assert not torch.equal(before.parameter, now.parameter)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["scope=front"], "scope=front does not exist; choose one of transformer, encoder"),
        (["method=magnitude"], "scope=encoder goes with method=sparsewav alone; choose scope=transformer"),
        (
            ["model.offload=true", "calibration.propagation=sequential"],
            "model.offload=true prunes the layers alone; choose scope=transformer with it",
        ),
    ],
)
def test_what_does_not_go_with_it(options: list[str], message: str, run_sparsewav: Run, small: list[str]) -> None:
    """One sentence, before anything is loaded."""
    refused = run_sparsewav(*small, "allocation=uniform", "scope=encoder", *options)
    assert refused.returncode == 1
    assert message in refused.stdout
    assert "Traceback" not in refused.stdout + refused.stderr
