"""Other ways to run a model: each gives the model's outputs or is left out with a reason, and the report names it."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsewav
from sparsewav.errors import UserError
from sparsewav.inference import alternatives
from sparsewav.inference.alternatives import ALTERNATIVES, alternative, audio_of, copy_with_its_weights, run_model
from sparsewav.inference.comparison import Comparison, compare
from sparsewav.models.load import load_speech_model
from sparsewav.pruning.encoder import encoder_layers
from sparsewav.training.precision import wrong_in_bfloat16
from tests.conftest import CONFIGS


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "OpenVINO int8")) for name in ALTERNATIVES]
)
def test_every_alternative_gives_the_outputs_of_the_model(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On other audio than it was tried on, as closely as its precision allows; the model stays as it was."""
    monkeypatch.setattr(alternatives, "HOPELESS", 1e9)
    model = load_speech_model("demo").model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        found = alternative(name, model, tmp_path)
    except UserError as error:  # of the processor, as all libraries are installed
        lacking = name == "OpenVINO bfloat16" and "does not multiply bfloat16" in str(error)
        wrong = name.endswith("bfloat16") and "its outputs differ" in str(error) and wrong_in_bfloat16(model)
        if not (lacking or wrong):
            raise
        return
    audio = torch.randn(3, 12_000, generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        expected, outputs = run_model(model, audio), found.run(audio)
    assert outputs.shape == expected.shape
    assert outputs.dtype == torch.float32
    deviation = float((outputs - expected).norm() / expected.norm())
    low, high = {"float32": (0, 1e-4), "bfloat16": (1e-5, 0.05), "int8": (1e-5, 0.5)}[name.rpartition(" ")[2]]
    assert low <= deviation <= high, "a lower precision shows, and is no other model"
    assert low <= found.difference <= 2 * high
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_cannot_be_had_is_left_out_with_its_reason(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another model's outputs, too long a time, a failure, a library that is not installed."""
    model = tiny_model("wav2vec2")

    def slow(*_: Any) -> Any:
        return lambda audio: [run_model(model, audio) for _ in range(200)][-1]

    broken: dict[str, Any] = {
        "other": lambda *_: lambda audio: -run_model(model, audio),
        "shorter": lambda *_: lambda audio: run_model(model, audio)[:, 1:],
        "not a number": lambda *_: lambda audio: run_model(model, audio) * float("nan"),
        "slow": slow,
        "failing": lambda *_: lambda audio: [][1],
    }
    monkeypatch.setattr(alternatives, "ALTERNATIVES", ALTERNATIVES | broken)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    found = compare(model, model, [20], [*broken, "ONNX Runtime float32"])
    assert not found.alternatives
    reasons = {name: found.left_out[name] for name in (*broken, "ONNX Runtime float32")}
    assert reasons["other"] == "its outputs differ from the model's by 2.0e+00 of their norm"
    assert "differ from the model's by inf" in reasons["shorter"]
    assert "differ from the model's by nan" in reasons["not a number"]
    assert "times as long as float32 in PyTorch" in reasons["slow"]
    assert reasons["failing"] == "it does not run a Wav2Vec2ForCTC (list index out of range)"
    assert "pip install 'sparsewav[onnx]'" in reasons["ONNX Runtime float32"]
    assert all(f"{name} left out: {reason}" in str(found) for name, reason in reasons.items())


@pytest.mark.parametrize("family", CONFIGS)
def test_noise_has_the_frames_that_were_asked_for(
    family: str, tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many rows reach the first layer, in equal utterances that are not too long."""
    monkeypatch.setattr(alternatives, "UTTERANCE", 20)
    model = tiny_model(family)
    rows: list[torch.Size] = []
    hook = encoder_layers(model)[0].register_forward_pre_hook(
        lambda _, inputs, named: rows.append((inputs or (named["hidden_states"],))[0].shape), with_kwargs=True
    )
    with torch.inference_mode():
        run_model(model, audio_of(model, 7))
        run_model(model, audio_of(model, 45))
    hook.remove()
    assert [shape[:2] for shape in rows] == [(1, 7), (3, 15)]


def test_a_copy_shares_the_weights_and_nothing_else(tiny_model: Any) -> None:
    model = tiny_model("wav2vec2")
    twin = copy_with_its_weights(model)
    assert {id(tensor) for tensor in twin.parameters()} == {id(tensor) for tensor in model.parameters()}
    assert not {id(module) for module in twin.modules()} & {id(module) for module in model.modules()}


def test_the_report_says_which_alternative_is_faster(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside times of the dense model; those that are faster at any number of frames come first, fastest first."""
    monkeypatch.setattr(alternatives, "HOPELESS", 1e9)  # the machine may be busy
    found = Comparison(
        (250, 1000),
        (1.0, 4.0),
        (0.5, 2.0),
        {"a": (0.6, 2.1), "b": (0.4, 2.5), "c": (0.25, 1.0)},
        {"d": "it is not installed"},
    )
    assert str(found) == (
        "times as fast as dense at 250 and 1000 frames: this model 2.00 and 2.00; faster: c 4.00 and 4.00, b 2.50 and "
        "1.60; not faster: a 1.67 and 1.90; d left out: it is not installed"
    )
    model = tiny_model("wav2vec2")
    report = sparsewav.accelerate(model, frames=20, alternatives=["PyTorch int8"])
    assert report.comparison is not None
    assert [len(seconds) for seconds in report.comparison.alternatives.values()] == [1]
    assert report.comparison.dense == report.comparison.accelerated, "nothing is pruned"
    assert "PyTorch int8" in str(report).splitlines()[-1]
    with pytest.raises(UserError, match="must be 'all' or some of PyTorch bfloat16"):
        sparsewav.accelerate(model, alternatives=["int8"])
