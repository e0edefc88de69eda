"""Self-pinching gates: mask and gradient against brute force, what a student computes, and what it ends with."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from transformers import AutoModelForCTC, PreTrainedModel

import sparsewav.cli.app  # noqa: F401  (registers the schemas)
from sparsewav.baselines import METHODS
from sparsewav.baselines.self_pinching import PinchedStudent, PinchingGate, hard_mask, mean_ctc_loss, soft_mask
from sparsewav.data.librispeech import read_librispeech_folder
from sparsewav.errors import UserError
from sparsewav.files import conf_folder
from sparsewav.models.load import load_speech_model
from sparsewav.pruning.encoder import prunable_matrices
from sparsewav.pruning.families import FAMILIES
from sparsewav.settings.baselines import THRESHOLD_PATH, SelfPinching


def settings_of(*overrides: str) -> SelfPinching:
    """The method's settings as its file has them."""
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        config = compose("config", overrides=["method=self_pinching", *overrides])
    settings: Any = OmegaConf.to_object(config.method)
    assert isinstance(settings, SelfPinching)
    return settings


def zeros_of(model: PreTrainedModel) -> tuple[int, int]:
    """The zeros among a model's prunable weights, and the number of these."""
    weights = [matrix.weight for matrix in prunable_matrices(model)]
    return sum(int((weight == 0).sum()) for weight in weights), sum(weight.numel() for weight in weights)


def test_masks_are_the_published_ones_weight_by_weight() -> None:
    torch.manual_seed(0)
    weight, threshold, temperature = torch.randn(5, 7, dtype=torch.float64), torch.tensor(0.8).double(), 0.3
    weight[0, 0], weight[0, 1] = 0.8, -0.8  # as large as the threshold: kept
    soft, hard = soft_mask(weight, threshold, temperature), hard_mask(weight, threshold, temperature)
    for row in range(5):
        for col in range(7):
            value = float(weight[row, col])
            expected = 1 / (1 + math.exp(-(value**2 - 0.8**2) / (2 * temperature)))
            assert float(soft[row, col]) == pytest.approx(expected, abs=1e-7)
            assert float(hard[row, col]) == (1.0 if abs(value) >= threshold.item() else 0.0)
            assert abs(float(hard[row, col] - soft[row, col])) <= 0.5  # it is the soft one, rounded
    assert torch.equal(hard_mask(weight, -threshold, temperature), hard)  # the sign of a threshold has no meaning


def test_gradients_of_masked_weights_are_those_of_the_soft_mask_by_finite_differences() -> None:
    """Of Σ c w m, the derivative in w is c (m + w ∂σ/∂w), and in t it is Σ c w ∂σ/∂t; m is the hard mask."""
    torch.manual_seed(1)
    temperature, step = 0.2, 1e-6
    weight = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    threshold = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    slopes = torch.randn(4, 6, dtype=torch.float64)
    mask = hard_mask(weight, threshold, temperature)
    (slopes * weight * mask).sum().backward()
    assert weight.grad is not None
    assert threshold.grad is not None
    with torch.no_grad():
        of_weight = (
            soft_mask(weight + step, threshold, temperature) - soft_mask(weight - step, threshold, temperature)
        ) / (2 * step)
        of_threshold = (
            soft_mask(weight, threshold + step, temperature) - soft_mask(weight, threshold - step, temperature)
        ) / (2 * step)
        assert torch.allclose(weight.grad, slopes * (mask + weight * of_weight), atol=1e-8)
        assert torch.allclose(threshold.grad, (slopes * weight * of_threshold).sum(), atol=1e-8)
        assert (of_threshold < 0).all()  # a higher threshold closes


def test_a_gate_is_the_same_for_a_matrix_on_another_scale() -> None:
    torch.manual_seed(2)
    weight = torch.randn(20, 30)
    small, large = PinchingGate(weight, 0.9, 0.1), PinchingGate(1000 * weight, 0.9, 0.1)
    assert torch.equal(small(weight), large(1000 * weight))
    below = weight.abs() < 0.9 * weight.square().mean().sqrt()
    assert torch.equal(small(weight) == 0, below)
    assert torch.equal(small.margin(weight) < 1, below)
    empty = torch.zeros(3, 4)  # as in a model that was pruned already
    gate = PinchingGate(empty, 0.9, 0.1)
    (gate(empty) * 2.0).sum().backward()
    assert not gate(empty).any()
    assert gate.threshold.grad is not None
    assert gate.threshold.grad.isfinite()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_that_of_the_model_with_these_weights_at_zero(
    family: str, tiny_model: Callable[..., PreTrainedModel], noise_batch: Callable[..., Any], model_input: Any
) -> None:
    """The penalty besides, from a count of the zeros; the weights beneath the masks are as they were."""
    model = tiny_model(family).eval()
    batch = model_input(model, noise_batch([400, 320]))
    dense = copy.deepcopy(model)
    settings = settings_of("sparsity.target=0.8", "method.ramp_updates=10", "method.sparsity_weight=3")
    student = PinchedStudent(model, settings)
    torch.manual_seed(0)
    with torch.no_grad():
        for _, gate in student.items():
            gate.threshold.fill_(0.2 + 1.5 * torch.rand(()))
    by_hand = copy.deepcopy(model)
    for matrix, (_, gate) in zip(prunable_matrices(by_hand), student.items(), strict=True):
        with torch.no_grad():
            root = matrix.weight.square().mean().sqrt()
            matrix.weight[matrix.weight.abs() < gate.threshold * root] = 0.0
    zeros, size = zeros_of(by_hand)
    assert 0.2 < zeros / size < 0.9
    assert float(student.expected_sparsity()) == pytest.approx(zeros / size, abs=1e-6)
    for student.update, target in ((0, 0.0), (5, 0.4), (10, 0.8), (30, 0.8)):
        expected = by_hand(**batch).loss.item() + 3 * (zeros / size - target) ** 2
        assert student(**batch).loss.item() == pytest.approx(expected, rel=1e-5)
    student(**batch).loss.backward()
    assert all(gate.threshold.grad is not None and gate.threshold.grad.abs() > 0 for _, gate in student.items())
    for matrix, before in zip(prunable_matrices(model), prunable_matrices(dense), strict=True):
        assert torch.equal(matrix.weight, before.weight)
        assert matrix.parameter.grad is not None


def test_pruning_meets_the_target_to_one_weight_with_one_factor_of_all_thresholds(
    tiny_model: Callable[..., PreTrainedModel],
) -> None:
    model = tiny_model("wav2vec2")
    student = PinchedStudent(model, settings_of("sparsity.target=0.6", "allocation=uniform"))
    torch.manual_seed(3)
    with torch.no_grad():
        for _, gate in student.items():
            gate.threshold.fill_(0.3 + torch.rand(()))
    before = [matrix.weight.detach().clone() for matrix, _ in student.items()]
    factor = student.prune()
    zeros, size = zeros_of(model)
    assert zeros == round(0.6 * size)
    for weight, (matrix, gate) in zip(before, student.items(), strict=True):
        limit = factor * gate.threshold.item() * float(weight.square().mean().sqrt())
        gone = matrix.weight == 0
        assert weight[gone].abs().max() <= limit * (1 + 1e-5)
        assert weight[~gone].abs().min() >= limit * (1 - 1e-5)
        assert torch.equal(matrix.weight[~gone], weight[~gone])
    assert len({round(float((matrix.weight == 0).float().mean()), 2) for matrix, _ in student.items()}) > 3


def test_the_thresholds_learn_their_target_and_spare_the_matrix_that_matters(
    tiny_model: Callable[..., PreTrainedModel], noise_batch: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a loss that holds one matrix as it was, and only that one; the others make up for it."""
    model, batch = tiny_model("wav2vec2"), noise_batch([400])
    student = PinchedStudent(model, settings_of("sparsity.target=0.7", "method.ramp_updates=100"))
    precious = student.matrices[0]
    wanted = precious.weight.detach().clone()

    def held(module: Any, masked: dict[str, torch.Tensor], kwargs: Any) -> Any:
        error = (masked[f"{precious.name}.weight"] - wanted).square().sum() / wanted.square().sum()
        return type("Output", (), {"loss": 50 * error})

    monkeypatch.setattr("sparsewav.baselines.self_pinching.functional_call", held)
    optimizer = torch.optim.Adam([gate.threshold for _, gate in student.items()], lr=0.03)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=300)
    for student.update in range(300):
        optimizer.zero_grad()
        student(**batch).loss.backward()
        optimizer.step()
        schedule.step()
    assert float(student.expected_sparsity()) == pytest.approx(0.7, abs=0.02)
    shares = [float((mask == 0).float().mean()) for mask in student.masks()]
    assert shares[0] < 0.4
    assert min(shares[1:]) > 0.6


def test_the_ctc_loss_is_a_mean_for_every_model(
    tiny_model: Callable[..., PreTrainedModel], noise_batch: Callable[..., Any]
) -> None:
    model, batch = tiny_model("wav2vec2").eval(), noise_batch([400, 320])
    model.config.ctc_loss_reduction = "mean"
    mean = model(**batch).loss.item()
    model.config.ctc_loss_reduction = "sum"
    assert model(**batch).loss.item() != pytest.approx(mean)
    with mean_ctc_loss(model):
        assert model(**batch).loss.item() == mean
    assert model.config.ctc_loss_reduction == "sum"


def test_settings_shorten_and_the_thresholds_still_have_far_enough_to_climb() -> None:
    settings = settings_of("sparsity.target=0.85", "allocation=uniform")
    assert settings.sparsity == 0.85
    short = settings.scaled(1000, 4)
    assert (short.updates, short.ramp_updates) == (80, settings.ramp_updates // 1000)
    assert short.learning_rate == pytest.approx(4 * settings.learning_rate)
    assert short.gate_learning_rate == pytest.approx(THRESHOLD_PATH / 80)
    assert settings.scaled(1, 1) == settings


@pytest.mark.parametrize("key", ["temperature", "first_threshold", "sparsity_weight", "gate_learning_rate"])
def test_a_value_without_sense_is_refused(key: str) -> None:
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        config: Any = OmegaConf.to_object(compose("config", overrides=["method=self_pinching", f"method.{key}=0"]))
    with pytest.raises(UserError, match=rf"method\.{key}=0 must be above 0"):
        config.check()


def test_the_method_ends_with_its_target_of_real_zeros(model_folder: Path, corpus: Path, tmp_path: Path) -> None:
    """The model loads as any other; the front end is as it was; what the gates learned is in the report."""
    settings = settings_of(
        *("sparsity.target=0.6", "allocation=uniform", "method.batch_size=4", "method.precision=float32"),
        *("method.updates=40", "method.ramp_updates=20", "method.gate_learning_rate=0.1"),
    )
    speech, dense = load_speech_model(str(model_folder)), load_speech_model(str(model_folder)).model
    utterances = read_librispeech_folder(corpus, "train")
    reduction = speech.model.config.ctc_loss_reduction
    smaller, report = METHODS["self_pinching"](
        speech.model, speech.processor, utterances, settings, tmp_path / "checkpoints", seed=0
    )
    zeros, size = zeros_of(smaller)
    assert zeros == round(0.6 * size)
    assert report.masked
    assert report.updates == 40
    assert report.facts["learned_sparsity"] == pytest.approx(0.6, abs=0.05)
    shares = report.facts["sparsities"]
    assert [*shares] == [matrix.name for matrix in prunable_matrices(smaller)]
    assert sum(shares[matrix.name] * matrix.size for matrix in prunable_matrices(smaller)) == pytest.approx(zeros)
    assert any("expected_sparsity" in entry for entry in report.log)
    assert smaller.config.ctc_loss_reduction == reduction
    for name, parameter in smaller.named_parameters():
        if "feature_extractor" in name:
            assert torch.equal(parameter, dense.get_parameter(name)), name
    moved = [
        not torch.equal(matrix.weight[matrix.weight != 0], before.weight[matrix.weight != 0])
        for matrix, before in zip(prunable_matrices(smaller), prunable_matrices(dense), strict=True)
    ]
    assert all(moved)
    smaller.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCTC.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in smaller.state_dict().items())


def test_gates_that_miss_their_target_are_said_to(model_folder: Path, corpus: Path, tmp_path: Path) -> None:
    settings = settings_of(
        *("sparsity.target=0.6", "allocation=uniform", "method.batch_size=4", "method.updates=2"),
        *("method.gate_learning_rate=1e-6",),
    )
    speech = load_speech_model(str(model_folder))
    utterances = read_librispeech_folder(corpus, "train")
    smaller, report = METHODS["self_pinching"](speech.model, speech.processor, utterances, settings, tmp_path, seed=0)
    zeros, size = zeros_of(smaller)
    assert zeros == round(0.6 * size)  # by the factor alone
    [warning] = report.warnings
    assert "not 0.6" in warning
    assert f"multiplied by {report.facts['thresholds_times']:.2f}" in warning
    assert report.facts["thresholds_times"] > 2
