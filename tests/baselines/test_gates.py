"""Hard-concrete gates: their statistics, the count of parameters they expect, and the cut that makes it true."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCTC, HubertConfig, HubertForCTC, PreTrainedModel, WavLMConfig, WavLMForCTC

from sparsewav import UserError
from sparsewav.baselines.cut import cut
from sparsewav.baselines.gates import (
    Gates,
    encoder_parameters,
    expected_parameters,
    left_parameters,
    meet_target,
    open_probability,
    sample_gates,
)
from sparsewav.models.load import load_pretrained
from sparsewav.pruning.encoder import prunable_matrices
from sparsewav.pruning.macs import multiply_accumulates

DROP_RATES = {"channels": 0.3, "heads": 0.4, "head_dims": 0.5, "units": 0.5}
FAMILIES = [(family, norm) for family in ("wav2vec2", "hubert", "wavlm") for norm in ("layer", "group")]
HOW = {"dphubert": ("channels", "heads", "units"), "wang2023": ("head_dims", "units")}


def gated_pair(
    tiny_model: Callable[..., PreTrainedModel], family: str, norm: str, units: tuple[str, ...], spread: float = 2.0
) -> tuple[Any, Gates]:
    """A gated model whose gates differ much from one another."""
    model = tiny_model(family, norm, conv_dim=(8, 6), num_attention_heads=4)
    gates = Gates(model, units, DROP_RATES)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, group in gates.items():
            group.log_alpha.add_(spread * torch.randn(len(group.log_alpha), generator=generator))
    return model, gates.eval()


def inputs(noise_batch: Callable[..., dict[str, torch.Tensor]], norm: str) -> dict[str, torch.Tensor]:
    batch = noise_batch([400, 300] if norm == "layer" else [400, 400])
    return {name: value for name, value in batch.items() if name != "labels"}


def test_samples_have_the_probabilities_that_the_formula_gives() -> None:
    torch.manual_seed(0)
    log_alpha = torch.tensor([-3.0, -1.0, 0.0, 1.5, 4.0])
    samples = sample_gates(log_alpha.expand(200_000, -1))
    assert ((samples >= 0) & (samples <= 1)).all()
    torch.testing.assert_close((samples > 0).float().mean(0), open_probability(log_alpha), atol=0.005, rtol=0)
    assert (samples == 1).float().mean(0)[-1] > 0.9


def test_gates_start_at_their_drop_rates_and_settle_on_the_expected_number(tiny_model: Any) -> None:
    gates = Gates(tiny_model("hubert", "group", intermediate_size=400), ("heads", "units"), DROP_RATES).eval()
    gates.draw()
    group = dict(gates.items())["units_0"]
    log_alpha, value = group.log_alpha.detach(), group.value
    assert float(log_alpha.mean()) == pytest.approx(0.0, abs=0.005)  # log(1 - 0.5) - log(0.5)
    expected = float(open_probability(log_alpha).sum())
    assert int((value > 0).sum()) == 400 - round(400 - expected)
    assert value[log_alpha.argmax()] == value.max()


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(("family", "norm"), FAMILIES)
def test_cut_model_computes_what_the_gated_one_does(
    tiny_model: Any, noise_batch: Any, family: str, norm: str, how: str, tmp_path: Path
) -> None:
    model, gates = gated_pair(tiny_model, family, norm, HOW[how])
    smaller: Any = cut(model, gates)
    batch = inputs(noise_batch, norm)
    with torch.no_grad():
        dense = tiny_model(family, norm, conv_dim=(8, 6), num_attention_heads=4)(**batch).logits
        gated, after = model(**batch).logits, smaller(**batch).logits
    assert (gated - dense).abs().max() > 0.1  # the gates do something
    torch.testing.assert_close(after, gated, atol=2e-5, rtol=1e-4)
    assert encoder_parameters(smaller) < encoder_parameters(model)
    smaller.save_pretrained(tmp_path)
    loaded: Any = load_pretrained(str(tmp_path), torch.float32, "model.name_or_path").eval()
    assert type(loaded) is type(smaller)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in smaller.state_dict().items())
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, after)
    assert len(prunable_matrices(loaded)) == 12  # ours can prune it on


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(("family", "norm"), [("wav2vec2", "layer"), ("hubert", "group"), ("wavlm", "group")])
@pytest.mark.parametrize("layer_dies", [False, True])
def test_expected_parameters_are_those_of_the_cut_model(
    tiny_model: Any, noise_batch: Any, family: str, norm: str, how: str, layer_dies: bool
) -> None:
    model, gates = gated_pair(tiny_model, family, norm, HOW[how], spread=100.0)  # all certainly open or closed
    with torch.no_grad():
        for name, group in gates.items():
            log_alpha = group.log_alpha
            log_alpha.copy_(torch.where(log_alpha > 0, 60.0, -60.0))
            if layer_dies and name in ("heads_1", "values_1", "units_0"):
                log_alpha.fill_(-60.0)
            elif name.startswith(("heads", "channels", "units")):
                log_alpha[0] = 60.0
    smaller: Any = cut(model, gates)
    assert float(expected_parameters(model, gates).detach()) == encoder_parameters(smaller)
    batch = inputs(noise_batch, norm)
    with torch.no_grad():
        torch.testing.assert_close(smaller(**batch).logits, model(**batch).logits, atol=2e-5, rtol=1e-4)
    # Also where nothing but a bias is left of a layer.
    assert multiply_accumulates(smaller, torch.zeros(1, 1600))[0] > 0


@pytest.mark.parametrize("how", HOW)
def test_expected_parameters_are_the_mean_over_samples(tiny_model: Any, how: str) -> None:
    model, gates = gated_pair(tiny_model, "wavlm", "layer", HOW[how], spread=0.5)
    expected = float(expected_parameters(model, gates).detach())
    torch.manual_seed(0)
    counts = [
        left_parameters(model, {name: (sample_gates(group.log_alpha) > 0).float() for name, group in gates.items()})
        for _ in range(1500)
    ]
    sampled = torch.stack(counts)
    assert expected == pytest.approx(float(sampled.mean()), abs=4 * float(sampled.std()) / 1500**0.5)


def test_straight_through_gates_are_hard_and_still_learn(tiny_model: Any, noise_batch: Any) -> None:
    model = tiny_model("hubert", "layer")
    gates = Gates(model, ("head_dims", "units"), DROP_RATES, straight_through=True).train()
    loss = model(**inputs(noise_batch, "layer")).logits.square().mean()
    for _, group in gates.items():
        assert set(group.value.detach().tolist()) == {0.0, 1.0}
        gradient = torch.autograd.grad(loss, group.log_alpha, retain_graph=True)[0]
        assert gradient.abs().max() > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_class", "config", "how", "target", "published", "tolerance"),
    [
        (HubertForCTC, HubertConfig, "dphubert", 0.75, 23.59e6, 0.01),
        (WavLMForCTC, WavLMConfig, "dphubert", 0.75, 23.59e6, 0.01),
        (WavLMForCTC, WavLMConfig, "wang2023", 0.7185, 26.57e6, 0.02),
    ],
)
def test_full_size_models_are_cut_to_the_published_size(
    model_class: Any, config: Any, how: str, target: float, published: float, tolerance: float
) -> None:
    """Gates that expect the published sparsity, at random weights, leave the published number of parameters."""
    model = model_class(config(vocab_size=32))
    gates = Gates(model, HOW[how], {"channels": 0.01, "heads": 0.01, "head_dims": 0.01, "units": 0.5})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, group in gates.items():
            group.log_alpha.copy_(torch.randn(len(group.log_alpha), generator=generator))
    meet_target(model, gates, (1 - target) * encoder_parameters(model))
    smaller = cut(model, gates)
    assert encoder_parameters(smaller) == pytest.approx(published, rel=tolerance)


def test_other_families_are_refused_in_a_sentence(tiny_model: Any) -> None:
    with pytest.raises(UserError, match="wav2vec2-conformer"):
        Gates(tiny_model("wav2vec2-conformer"), ("units",), DROP_RATES)


def test_structured_classes_are_registered(tiny_model: Any, tmp_path: Path) -> None:
    model, gates = gated_pair(tiny_model, "wavlm", "group", HOW["dphubert"])
    cut(model, gates).save_pretrained(tmp_path)
    assert type(AutoModelForCTC.from_pretrained(tmp_path)).__name__ == "StructuredWavLMForCTC"
