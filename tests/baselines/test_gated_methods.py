"""DPHuBERT, fine-grained pruning and L0 with the CTC loss: each one's characteristic part, on tiny models."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from transformers import AutoModelForCTC, HubertConfig, HubertForCTC, PreTrainedModel

import sparsewav.cli.app  # noqa: F401  (registers the schemas)
from sparsewav.baselines import METHODS
from sparsewav.baselines.gated import Distillation, GatedStudent, ctc_loss, distilled_layers
from sparsewav.baselines.gates import Gates, encoder_parameters, open_probability
from sparsewav.data.librispeech import read_librispeech_folder
from sparsewav.files import conf_folder
from sparsewav.models.load import load_speech_model
from sparsewav.settings.baselines import Gated
from sparsewav.settings.run import Config


def settings_of(name: str, *overrides: str) -> Gated:
    """The published settings of a method, from its file."""
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        composed = compose("config", overrides=[f"method={name}", *overrides])
    config: Any = OmegaConf.to_object(composed)
    assert isinstance(config, Config)
    assert isinstance(config.method, Gated)
    assert list(config.method.faults()) == []
    return config.method


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dphubert", {"gated": ["channels", "heads", "units"], "teacher": True, "final_updates": 25_000}),
        ("dpwavlm", {"gated": ["channels", "heads", "units"], "teacher": True, "final_updates": 25_000}),
        ("wang2023", {"gated": ["head_dims", "units"], "teacher": True, "straight_through": True}),
        ("l0_finetune", {"gated": ["channels", "heads", "units"], "teacher": False, "final_updates": 0}),
    ],
)
def test_published_settings_compose_and_shorten(name: str, expected: dict[str, Any]) -> None:
    settings = settings_of(name)
    common = {"updates": 50_000, "warmup_steps": 15_000, "ramp_updates": 5000, "learning_rate": 2e-4}
    for key, value in (common | {"gate_learning_rate": 0.02} | expected).items():
        assert getattr(settings, key) == value
    short = settings.scaled(1000, 1)
    assert (short.updates, short.warmup_steps, short.ramp_updates) == (50, 15, 5)
    assert (short.gate_learning_rate, short.multiplier_learning_rate) == pytest.approx((0.6, 0.6))
    assert short.final_updates == (25 if settings.teacher else 0)
    assert settings.scaled(1, 1) == settings


def test_a_wrong_setting_is_refused_in_a_sentence() -> None:
    settings = replace(settings_of("dphubert"), gated=["heads", "head_dims"], target=1.5)
    assert len([line for line in settings.faults() if line.startswith(("gated=", "target="))]) == 2


def test_layers_that_are_compared() -> None:
    assert [distilled_layers(depth) for depth in (12, 6, 24)] == [[0, 4, 8, 12], [0, 2, 4, 6], [0, 8, 16, 24]]


def test_distillation_is_minus_one_for_a_copy_and_sees_no_padding(
    tiny_model: Callable[..., PreTrainedModel], noise_batch: Any
) -> None:
    teacher, student = tiny_model("hubert", "layer"), tiny_model("hubert", "layer")
    objective = Distillation(teacher, [0, 1, 2])
    batch = noise_batch([400, 240])
    loss = objective(student, batch)
    assert float(loss.detach()) == pytest.approx(-1.0, abs=1e-5)  # distance 0, cosine 1
    other = tiny_model("hubert", "layer", seed=1)
    with torch.no_grad():
        assert float(objective(other, batch)) > -0.9
    louder = batch | {"input_values": torch.where(batch["attention_mask"] == 0, 3.0, batch["input_values"])}
    kept = {name: value[1:, :240] for name, value in louder.items() if name != "labels"}
    alone = {name: value[1:] for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        assert float(objective(other, alone)) == pytest.approx(float(objective(other, kept)), abs=1e-5)
    loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("target", [0.4, 0.5])
def test_lagrangian_brings_the_expected_sparsity_to_its_target(tiny_model: Any, target: float) -> None:
    """Against a loss that wants every gate open, some more and some less; without ascent all of them would be."""
    torch.manual_seed(0)
    model = tiny_model("wav2vec2", "layer", intermediate_size=200)
    gates = Gates(model, ("channels", "heads", "units"), {"channels": 0.01, "heads": 0.01, "units": 0.5})
    worth = {name: 7e-4 * torch.rand(len(gate.log_alpha)) for name, gate in gates.items()}

    def wants_open(model: PreTrainedModel, batch: Any) -> torch.Tensor:
        losses = [((1 - open_probability(gate.log_alpha)) * worth[name]).sum() for name, gate in gates.items()]
        return torch.stack(losses).sum()

    student = GatedStudent(model, gates, wants_open, target, 40)
    optimizer = torch.optim.Adam(
        [
            {"params": list(gates.parameters()), "lr": 0.1},
            {"params": list(student.lagrangian.parameters()), "lr": 0.1, "maximize": True},
        ]
    )
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=600)
    for student.update in range(600):
        optimizer.zero_grad()
        student().loss.backward()
        optimizer.step()
        schedule.step()
    assert float(student.expected_sparsity().detach()) == pytest.approx(target, abs=0.03)


def test_target_rises_over_its_ramp(tiny_model: Any) -> None:
    model = tiny_model("wav2vec2", "layer")
    gates = Gates(model, ("units",), {"units": 0.5})
    student = GatedStudent(model, gates, ctc_loss, 0.8, 10)
    targets = []
    for student.update in (0, 5, 10, 20):
        targets.append(student.current_target())
    assert targets == pytest.approx([0.0, 0.4, 0.8, 0.8])


SHORT = ["method.batch_size=4", "method.checkpoint_updates=4", "method.target=0.5", "method.precision=float32"]


@pytest.mark.parametrize("name", ["dphubert", "wang2023", "l0_finetune"])
def test_method_trains_cuts_and_trains_on(name: str, model_folder: Path, corpus: Path, tmp_path: Path) -> None:
    """Each method on a tiny model: what it gates gets smaller, the rest is whole, and it resumes to the bit."""
    training = read_librispeech_folder(corpus, "train")
    settings = settings_of(name, *SHORT).scaled(8000, 1)

    def compress(folder: Path) -> tuple[Any, Any]:
        speech = load_speech_model(str(model_folder))
        method = METHODS[name]
        return method(speech.model, speech.processor, training, settings, folder, seed=0)

    smaller, report = compress(tmp_path / "once")
    dense = load_speech_model(str(model_folder)).model
    left = encoder_parameters(smaller) / encoder_parameters(dense)
    assert left <= 0.5
    assert report.facts["encoder_parameters"] == encoder_parameters(smaller)
    assert report.updates == settings.updates + settings.final_updates
    assert {entry["phase"] for entry in report.log} == (
        {"with gates", "after the cut"} if settings.final_updates else {"with gates"}
    )
    assert any("expected_sparsity" in entry for entry in report.log)
    channels = tuple(smaller.config.conv_dim)
    assert (channels == tuple(dense.config.conv_dim)) == (name == "wang2023")
    if name == "wang2023":
        dims = [layer["value_dims"] for layer in smaller.config.layers]
        assert any(0 < dim < 8 for layer in dims for dim in layer)  # heads were thinned, not only removed
    else:
        assert all(dim == 8 for layer in smaller.config.layers for dim in layer["value_dims"])
    again, _ = compress(tmp_path / "once")  # all of it lies there: nothing is trained anew, or to the same end
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in smaller.state_dict().items())
    smaller.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCTC.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in smaller.state_dict().items())


def test_command_compresses_tunes_and_saves(
    run_sparsewav: Any, model_folder: Path, corpus: Path, tmp_path: Path
) -> None:
    done = run_sparsewav(
        *("method=dphubert", "update_divisor=25000", *SHORT),
        *(f"model.name_or_path={model_folder}", "data=librispeech_dir", f"data.root={corpus}"),
        *("data.training_subset=train", "data.evaluation_subset=test", "data.calibration_subset=train"),
        *("finetune_strategy=one_pass", "training.epochs=1", "training.batch_size=4", "training.precision=float32"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [metrics_path] = (tmp_path / "outputs").glob("*/metrics.json")
    metrics = json.loads(metrics_path.read_text())
    assert metrics["method"] == "dphubert"
    loaded = load_speech_model(str(metrics_path.parent / "model")).model
    assert metrics["params_total"] == sum(parameter.numel() for parameter in loaded.parameters())
    assert "import sparsewav.models.load" in (metrics_path.parent / "model" / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dphubert", "wang2023", "l0_finetune"])
def test_full_size_takes_two_updates(name: str, tmp_path: Path, corpus: Path, model_folder: Path) -> None:
    """HuBERT base with random weights, the published settings cut to two updates of one utterance each."""
    settings = replace(
        settings_of(name),
        updates=2,
        final_updates=2 if name != "l0_finetune" else 0,
        warmup_steps=1,
        final_warmup_steps=1,
        batch_size=1,
    )
    torch.manual_seed(0)
    dense = HubertForCTC(HubertConfig(vocab_size=32))
    aim = (1 - settings.target) * encoder_parameters(dense)
    processor = load_speech_model(str(model_folder)).processor
    smaller, _ = METHODS[name](
        dense, processor, read_librispeech_folder(corpus, "train")[:2], settings, tmp_path, seed=0
    )
    assert encoder_parameters(smaller) == pytest.approx(aim, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dphubert", "parp"])
def test_killed_while_it_compresses_it_ends_with_the_same_model(
    method: str, run_sparsewav: Any, environment: dict[str, str], model_folder: Path, corpus: Path, tmp_path: Path
) -> None:
    """Gates, multipliers and optimizers, or what PARP has pruned so far, come back from the last checkpoint."""
    arguments = [
        *(f"method={method}", "update_divisor=4000"),
        *("method.checkpoint_updates=2", "method.batch_size=4", "method.precision=float32"),
        *(f"model.name_or_path={model_folder}", "data=librispeech_dir", f"data.root={corpus}"),
        *("data.training_subset=train", "data.evaluation_subset=test", "data.calibration_subset=train"),
    ]
    assert run_sparsewav(*arguments, "output_root=whole").returncode == 0
    process = subprocess.Popen(
        [str(Path(sys.executable).parent / "sparsewav"), *arguments, "output_root=killed"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 300
    while not [path for path in tmp_path.glob("killed/**/checkpoint-*") if path.name != "checkpoint-0"]:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, 9)
    process.wait()
    assert not list(tmp_path.glob("killed/*/model"))
    assert run_sparsewav(*arguments, "output_root=killed").returncode == 0
    [whole] = (tmp_path / "whole").glob("*/model/model.safetensors")
    assert whole.read_bytes() == (tmp_path / "killed" / whole.relative_to(tmp_path / "whole")).read_bytes()
