"""Runs that remove heads and units: what is on disk, what is recorded, and how they go on."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from transformers import AutoModelForCTC

from sparsewav.inference import latency, speedup
from sparsewav.models.load import load
from sparsewav.pipeline.steps import prune_step, tune_step
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


@pytest.fixture
def wide(small: list[str], tiny_model: Callable[..., Any], model_folder: Path, tmp_path: Path) -> list[str]:
    """The same arguments for a model whose time is that of its layers, timed for a moment alone."""
    folder = tmp_path / "wide"
    shutil.copytree(model_folder, folder)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 768}
    convolutions = {"conv_dim": (16, 16), "conv_kernel": (20, 8), "conv_stride": (20, 8)}
    tiny_model("wav2vec2", vocab_size=32, **sizes, **convolutions).save_pretrained(folder)
    speed = ["sparsity.speedup=1.1", "sparsity.audio_seconds=[4,8]"]
    return [*small, f"model.name_or_path={folder}", *speed]


@pytest.fixture
def briefly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is timed for long, and nothing was timed before."""
    for module in (latency, speedup):
        monkeypatch.setattr(module, "SECONDS", 0.5)
    monkeypatch.setenv("SPARSEWAV_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("briefly")
def test_a_run_that_is_to_be_faster_records_what_was_asked_for_and_measured(
    run_sparsewav: Run, wide: list[str], tmp_path: Path
) -> None:
    """With the real clock, of which nothing is expected: the machine may be busy."""
    result = run_sparsewav(*wide, "allocation.step=0.25")
    assert result.returncode == 0, result.stdout + result.stderr
    folder = run_folder_in(tmp_path)
    assert "-obs-error_curves-1.1x-" in folder.name
    metrics = json.loads((folder / "metrics.json").read_text())
    assert (metrics["asked_speedup"], metrics["target_macs"], metrics["target_sparsity"]) == (1.1, None, None)
    assert metrics["achieved_share"] == pytest.approx(1 / metrics["achieved_speedup"])
    how = metrics["latency"]
    assert (how["runtime"], how["audio_seconds"], how["table"]) == ("pytorch", [4, 8], "measured")
    assert how["threads"] == torch.get_num_threads()
    assert all(len(how[key]) == 2 and min(how[key]) > 0 for key in ("seconds_dense", "seconds"))
    low, high = how["speedup_quartiles"]
    assert low <= metrics["achieved_speedup"] <= high
    kept = pandas.read_csv(folder / "layers.csv")
    removed = (kept["kept"] < kept["parts"]).any()  # nothing, where the dense model was once so fast by chance
    assert (metrics["params_total"] < metrics["params_dense"]) == removed
    for words in ("latencies measured on this machine now: pytorch", "speed-up, asked", "speed-up, measured"):
        assert words in result.stdout
    assert f"{metrics['achieved_speedup']:.2f} (asked for: 1.1)" in (folder / "model" / "README.md").read_text()
    assert run_sparsewav(str(folder), command="sparsewav-inspect").returncode == 0
    sweep = run_sparsewav("-m", *wide, "seed=1,2", "allocation=uniform", "save_model=false", "output_root=sweep")
    assert sweep.returncode == 0, sweep.stdout + sweep.stderr
    assert sweep.stdout.count("latencies read from") == 2
    (summary,) = (tmp_path / "sweep").glob("**/summary.csv")
    assert (pandas.read_csv(summary)["achieved_speedup"] > 0).sum() == 2


@pytest.mark.usefixtures("briefly")
def test_stages_share_the_latencies_of_the_dense_model(
    run_sparsewav: Run, wide: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that goes on has those that it began with, wherever the cache is then."""
    options = ["finetune_strategy=progressive", "finetune_strategy.stages=[0.05]", "allocation=uniform"]
    options += ["training.epochs=1", "training.batch_size=4"]
    with monkeypatch.context() as patch:
        patch.setattr("sparsewav.pipeline.run.tune_step", _stop_at_the_second())
        stopped = run_sparsewav(*wide, *options)
        assert stopped.returncode != 0
    (step,) = (tmp_path / "outputs").glob("*/stages/2-prune*/step.json")
    begun = json.loads(step.read_text())
    seen: list[Any] = []

    def note(*arguments: Any, **options: Any) -> None:
        seen.append(options["timed"].table.record())
        prune_step(*arguments, **options)

    shutil.rmtree(step.parent)  # the second stage is done again
    monkeypatch.setenv("SPARSEWAV_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr("sparsewav.pipeline.run.prune_step", note)
    result = run_sparsewav(*wide, *options)
    assert result.returncode == 0, result.stdout + result.stderr
    assert seen == [begun["latency"]]
    stages = json.loads((run_folder_in(tmp_path) / "metrics.json").read_text())["stages"]
    assert [stage["speedup_when_chosen"] > 0 for stage in stages] == [True, True]  # by the real clock


@pytest.mark.usefixtures("briefly")
def test_speeds_that_cannot_be_are_refused(
    run_sparsewav: Run, wide: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments, sentence in (
        (["sparsity.speedup=500"], r"speedup=500 is out of reach: .* choose sparsity\.speedup=[0-9.]+ at most"),
        (["sparsity.speedup=1"], "speedup=1 must be above 1"),
        (["sparsity.macs=0.5"], "are two sizes; give one of them"),
        (["sparsity.runtime=tflite"], "choose one of pytorch, bfloat16, onnx_int8, openvino_int8"),
        (["sparsity.audio_seconds=[]"], "must be some lengths from 0.1 to 60 seconds"),
    ):
        assert_one_sentence(run_sparsewav(*wide, *arguments), sentence)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = run_sparsewav(*wide, "sparsity.runtime=onnx_int8")
    assert_one_sentence(result, r"onnxruntime is not installed; install it: pip install 'sparsewav\[onnx\]'")
    assert "Loading" not in result.stdout
