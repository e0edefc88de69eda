"""Runs that remove heads and units: what is on disk, what is recorded, and how they go on."""

import json
from collections.abc import Callable
from pathlib import Path

import pandas
import pytest
import torch
from transformers import AutoModelForCTC

from sparsewav.models.load import load
from sparsewav.pipeline.steps import tune_step
from sparsewav.pruning.encoder import base_of
from tests.terminal import Run, assert_one_sentence, run_folder_in


@pytest.fixture
def small(model_folder: Path, corpus: Path) -> list[str]:
    """Arguments of a run on the tiny model and corpus."""
    subsets = ["data.calibration_subset=train", "data.evaluation_subset=test", "data.training_subset=train"]
    return [
        f"model.name_or_path={model_folder}",
        "data=librispeech_dir",
        f"data.root={corpus}",
        *subsets,
        "device=cpu",
        "calibration.utterances=12",
    ]


def encoder_parameters(folder: Path) -> int:
    return sum(parameter.numel() for parameter in base_of(load(folder)).parameters())


def test_a_run_that_cuts_rounds_and_records_it(
    run_sparsewav: Run, small: list[str], model_folder: Path, tmp_path: Path
) -> None:
    options = ["sparsity.parameters=0.85", "quantization=int4", "quantization.group_size=8", "allocation.step=0.25"]
    result = run_sparsewav(*small, *options)
    assert result.returncode == 0, result.stdout + result.stderr
    folder = run_folder_in(tmp_path)
    assert "-obs-error_curves-0.85parameters-int4-" in folder.name
    metrics = json.loads((folder / "metrics.json").read_text())
    layers = pandas.read_csv(folder / "layers.csv").set_index("name")
    share = encoder_parameters(folder / "model") / encoder_parameters(model_folder)
    assert metrics["achieved_share"] == pytest.approx(share)
    assert 0.83 < share <= 0.85
    assert (metrics["target_parameters"], metrics["target_macs"], metrics["target_sparsity"]) == (0.85, None, None)
    assert (metrics["saliency"], metrics["bits"]) == (None, 4)
    model = AutoModelForCTC.from_pretrained(folder / "model")
    assert metrics["params_total"] == sum(parameter.numel() for parameter in model.parameters())
    assert metrics["params_dense"] == sum(parameter.numel() for parameter in load(model_folder).parameters())
    for index, layer in enumerate(model.wav2vec2.encoder.layers):
        kept = layers["kept"][f"wav2vec2.encoder.layers.{index}.feed_forward"]
        weight = layer.feed_forward.output_dense.weight.detach()
        assert weight.shape[1] == kept
        assert all(len(row.abs().unique()) <= 9 for group in weight.split(8, 1) for row in group)
    for words in ("parameters, asked", "parameters, reached", "word error rate, rounded", "MB of weights"):
        assert words in result.stdout
    card = (folder / "model" / "README.md").read_text()
    assert "pruned to 0.85 of the encoder's parameters and rounded to int4" in card
    assert f"{metrics['params_total']:,}; {metrics['params_dense']:,} before" in card
    inspected = run_sparsewav(str(folder), command="sparsewav-inspect")
    assert inspected.returncode == 0, inspected.stdout
    layers.assign(kept=layers["kept"] - 1).to_csv(folder / "layers.csv")
    assert run_sparsewav(str(folder), command="sparsewav-inspect").returncode == 1


def test_a_run_that_removes_channels_is_recorded_tuned_and_rounded(
    run_sparsewav: Run, small: list[str], model_folder: Path, tmp_path: Path
) -> None:
    options = ["sparsity.parameters=0.9", "sparsity.parts=[channels]", "quantization=int8", "training.batch_size=4"]
    options += ["finetune_strategy=one_pass", "training.epochs=1"]
    result = run_sparsewav(*small, *options)
    assert result.returncode == 0, result.stdout + result.stderr
    folder = run_folder_in(tmp_path)
    metrics = json.loads((folder / "metrics.json").read_text())
    layers = pandas.read_csv(folder / "layers.csv").set_index("name")
    model = AutoModelForCTC.from_pretrained(folder / "model")
    assert type(model).__name__ == "Wav2Vec2ForCTC"
    assert list(model.config.conv_dim) == list(layers["kept"])
    assert list(layers["kind"]) == ["channels", "channels"]
    assert (layers["kept"] < layers["parts"]).all()
    share = encoder_parameters(folder / "model") / encoder_parameters(model_folder)
    assert metrics["achieved_share"] == pytest.approx(share)
    assert 0.8 < share <= 0.9
    assert (metrics["scope"], metrics["bits"]) == ("encoder", 8)
    assert run_sparsewav(str(folder), command="sparsewav-inspect").returncode == 0
    layers.assign(kept=layers["kept"] - 1).to_csv(folder / "layers.csv")
    assert run_sparsewav(str(folder), command="sparsewav-inspect").returncode == 1


def test_stages_are_shares_of_the_dense_encoder_and_a_stopped_run_goes_on(
    run_sparsewav: Run, small: list[str], model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["sparsity.parameters=0.8", "finetune_strategy=progressive", "finetune_strategy.stages=[0.1]"]
    options += ["allocation=uniform", "training.epochs=2", "training.batch_size=4", "training.learning_rate=1e-4"]
    with monkeypatch.context() as patch:
        patch.setattr("sparsewav.pipeline.run.tune_step", _stop_at_the_second())
        assert run_sparsewav(*small, *options).returncode != 0
    result = run_sparsewav(*small, *options)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Going on from 2-prune" in result.stdout
    folder = run_folder_in(tmp_path)
    metrics = json.loads((folder / "metrics.json").read_text())
    first, second = metrics["stages"]
    dense, final = encoder_parameters(model_folder), encoder_parameters(folder / "model")
    assert (first["sparsity"], second["sparsity"]) == (0.1, 0.2)
    assert first["share_left"] <= 0.9
    assert 0.75 < second["share_left"] <= 0.8
    assert second["share_left"] == pytest.approx(final / dense)
    assert first["achieved_sparsity"] < second["achieved_sparsity"] == metrics["achieved_sparsity"]
    assert (folder / "layers-0.1.csv").is_file()
    assert metrics["updates"] > 0
    whole = run_sparsewav(*small, *options, "output_root=again")
    assert whole.returncode == 0
    (again,) = (tmp_path / "again").glob("*/model")
    states = load(folder / "model").state_dict(), load(again).state_dict()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def _stop_at_the_second() -> Callable[..., None]:
    calls: list[int] = []

    def stop(*arguments: object) -> None:
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        tune_step(*arguments)

    return stop


def test_a_sweep_and_what_is_refused(run_sparsewav: Run, small: list[str], tmp_path: Path) -> None:
    result = run_sparsewav("-m", *small, "sparsity.parameters=0.9,0.8,0.1", "allocation=uniform", "save_model=false")
    assert result.returncode == 1
    assert "sparsity.parameters=0.1 is out of reach" in result.stdout + result.stderr
    (summary,) = (tmp_path / "outputs").glob("*/summary.csv")
    runs = pandas.read_csv(summary).set_index("sparsity.parameters")
    assert runs["achieved_sparsity"][0.8] > runs["achieved_sparsity"][0.9]
    for arguments, sentence in (
        (["method=distilhubert"], "sparsity=structured goes with method=sparsewav alone"),
        (["sparsity.macs=0.5"], "are two sizes; give one of them"),
        (["model.offload=true", "calibration.propagation=sequential", "allocation=uniform"], "cuts them; choose"),
        (["allocation=hutchinson"], "allocation=hutchinson shares weights"),
    ):
        assert_one_sentence(run_sparsewav(*small, "sparsity.parameters=0.8", *arguments), sentence)
