"""Sensitivities against the exact Hessian: twice differentiating a CTC loss written in plain operations."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsewav import HAWQ, Hutchinson, Uniform
from sparsewav.errors import UserError
from sparsewav.pruning.allocation import sensitivity
from sparsewav.pruning.allocation.allocate import doubtful_traces
from sparsewav.pruning.allocation.sensitivity import (
    LEAST_BATCHES,
    Trace,
    estimate_traces,
    rank_displacement,
    unseparated_neighbors,
)
from sparsewav.pruning.encoder import prunable_matrices

Batch = dict[str, Tensor]
Factory = Callable[..., Any]  # tiny models, whose submodules mypy does not know


def plain_loss(model: PreTrainedModel, utterances: list[Batch], plain_ctc: Callable[..., Tensor]) -> Tensor:
    """CTC loss summed over utterances that are run one by one without padding; it can be differentiated twice."""
    total = torch.zeros((), dtype=model.dtype)
    for utterance in utterances:
        logits = model(utterance["input_values"].to(model.dtype)).logits[0]
        labels = utterance["labels"][0]
        total = total + plain_ctc(logits, labels[labels >= 0])
    return total


def matrix_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    return {matrix.name: matrix.weight for matrix in prunable_matrices(model)}


@pytest.fixture(scope="module")
def exact(
    tiny_model: Factory,
    noise_batch: Callable[..., Batch],
    utterances: Callable[..., list[Batch]],
    plain_ctc: Callable[..., Tensor],
) -> tuple[PreTrainedModel, Batch, Tensor, dict[str, slice]]:
    """A model of 240 prunable weights, two utterances, the Hessian of their mean loss and where each matrix lies."""
    model = tiny_model("wav2vec2", num_hidden_layers=1, hidden_size=6, intermediate_size=8).double()
    batch = noise_batch([176, 140])
    weights = matrix_weights(model)
    loss = plain_loss(model, utterances([batch]), plain_ctc) / 2
    gradient = torch.cat(
        [part.flatten() for part in torch.autograd.grad(loss, list(weights.values()), create_graph=True)]
    )
    rows = [
        torch.cat([part.flatten() for part in torch.autograd.grad(element, list(weights.values()), retain_graph=True)])
        for element in gradient
    ]
    spans, start = {}, 0
    for name, weight in weights.items():
        spans[name] = slice(start, start + weight.numel())
        start += weight.numel()
    return model, batch, torch.stack(rows), spans


def test_plain_ctc_is_the_ctc_loss(plain_ctc: Callable[..., Tensor]) -> None:
    """The oracle's loss and its gradient with respect to the logits are those of PyTorch's CTC, repeats included."""
    generator = torch.Generator().manual_seed(0)
    for labels in ([3], [1, 1], [2, 2, 2, 5], [4, 1, 4, 4, 6, 6]):
        logits = torch.randn(12, 7, generator=generator, dtype=torch.float64, requires_grad=True)
        mine = plain_ctc(logits, torch.tensor(labels))
        # Logits, not log-probabilities: PyTorch folds the gradient of the log-softmax into that of its loss.
        theirs = torch.nn.functional.ctc_loss(
            logits.log_softmax(-1), torch.tensor(labels), torch.tensor(12), torch.tensor(len(labels)), reduction="sum"
        )
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
        gradients = (torch.autograd.grad(loss, logits)[0] for loss in (mine, theirs))
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("family", "norm"), [("wav2vec2", "layer"), ("wav2vec2", "group"), ("hubert", "layer"), ("wavlm", "layer")]
)
@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_central_difference_is_the_hessian_vector_product(
    family: str,
    norm: str,
    distribution: str,
    tiny_model: Factory,
    noise_batch: Callable[..., Batch],
    utterances: Callable[..., list[Batch]],
    plain_ctc: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every zᵢᵀ(Hz)ᵢ of the mean loss, in float32, equals float64 double backward on single utterances.

    Batches count by their utterances.
    """
    model = tiny_model(family, norm)
    batches = [noise_batch([260, 208]), noise_batch([240], seed=1)]
    drawn: list[Tensor] = []
    draw = sensitivity._draw

    def recorded(*arguments: object) -> Tensor:
        drawn.append(draw(*arguments))  # type: ignore[arg-type]
        return drawn[-1]

    monkeypatch.setattr(sensitivity, "_draw", recorded)
    traces = estimate_traces(model, batches, distribution=distribution)
    weights = matrix_weights(model.double())
    expected = dict.fromkeys(weights, 0.0)
    for index, batch in enumerate(batches):
        z = [part.double() for part in drawn[index * len(weights) : (index + 1) * len(weights)]]
        loss = plain_loss(model, utterances([batch]), plain_ctc)
        gradient = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        products = torch.autograd.grad(gradient, list(weights.values()), z)
        for name, direction, product in zip(weights, z, products, strict=True):
            expected[name] += float((direction * product).sum()) / 3
    scale = max(abs(value) for value in expected.values())
    for name, value in expected.items():
        assert traces[name].value == pytest.approx(value, rel=3e-3, abs=3e-3 * scale), name
        assert traces[name].size == weights[name].numel()
        assert traces[name].sensitivity == traces[name].value / weights[name].numel()
    assert not torch.equal(drawn[0], drawn[len(weights)])  # more batches are to mean more probes
    if distribution == "rademacher":
        assert all(torch.equal(z.abs(), torch.ones_like(z)) for z in drawn)


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_traces_agree_with_the_exact_hessian(
    distribution: str, exact: tuple[PreTrainedModel, Batch, Tensor, dict[str, slice]]
) -> None:
    """Estimates lie within four standard errors of the exact traces, and those errors are what theory says."""
    model, batch, hessian, spans = exact
    probes = 150
    traces = estimate_traces(model, [batch], probes=probes, distribution=distribution, seed=3)
    assert list(traces) == list(spans)
    for name, span in spans.items():
        # Var zᵢᵀ(Hz)ᵢ: twice the squares of the own block (Rademacher: off its diagonal), once those of the others.
        own = hessian[span, span]
        variance = own.square().sum() + hessian[span].square().sum()
        if distribution == "rademacher":
            variance -= 2 * own.diagonal().square().sum()
        error = float((variance / probes).sqrt())
        assert abs(traces[name].value - float(own.trace())) < 4 * traces[name].standard_error, name
        assert traces[name].standard_error == pytest.approx(error, rel=0.35), name


def test_standard_error_shrinks_with_the_root_of_the_probes(
    exact: tuple[PreTrainedModel, Batch, Tensor, dict[str, slice]],
) -> None:
    """Nine times the probes cut the standard error to a third; of two it is half their difference, of one unknown."""
    model, batch, _, _ = exact
    few, many = (estimate_traces(model, [batch], probes=probes, seed=probes) for probes in (10, 90))
    ratios = [few[name].standard_error / many[name].standard_error for name in few]
    assert sum(ratios) / len(ratios) == pytest.approx(3, rel=0.3)
    one, two = (estimate_traces(model, [batch], probes=probes) for probes in (1, 2))
    for name in one:
        # The mean of two lies half their difference from the first.
        assert two[name].standard_error == pytest.approx(abs(one[name].value - two[name].value), rel=1e-6)
        assert math.isnan(one[name].standard_error)


@pytest.mark.parametrize(("family", "norm"), [("wav2vec2", "group"), ("wavlm", "layer")])
def test_model_is_as_it_was(family: str, norm: str, tiny_model: Factory, noise_batch: Callable[..., Batch]) -> None:
    """Weights are the same bytes, gradients are switched as they were, the configuration too, and seeds reproduce."""
    model = tiny_model(family, norm, ctc_loss_reduction="mean", ctc_zero_infinity=True)
    model.freeze_feature_encoder()
    weights = copy.deepcopy(model.state_dict())
    requires_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    config = model.config.to_dict()
    batches = [noise_batch([260, 208])]
    first = estimate_traces(model, batches, probes=2, seed=7)
    torch.manual_seed(99)  # the state of the global generator must not matter
    assert estimate_traces(model, batches, probes=2, seed=7) == first
    assert estimate_traces(model, batches, probes=2, seed=8) != first
    for faulty in ({"labels": torch.ones(2, 200, dtype=torch.long)}, None):
        batch = {name: value for name, value in batches[0].items() if name != "labels"} | (faulty or {})
        with pytest.raises(UserError):
            estimate_traces(model, [batch])
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.config.to_dict() == config


def test_transcript_longer_than_its_frames_is_refused(tiny_model: Factory, noise_batch: Callable[..., Batch]) -> None:
    """An utterance whose transcript cannot be aligned is reported, even in a model that zeroes infinite losses."""
    model = tiny_model("wav2vec2", ctc_zero_infinity=True)
    batch = noise_batch([260, 208], characters=14)  # 15 and 12 frames
    with pytest.raises(UserError, match="transcript"):
        estimate_traces(model, [batch])


def test_what_cannot_give_sensitivities_is_refused(tiny_model: Factory, noise_batch: Callable[..., Batch]) -> None:
    """No labels, no batches and half precision each get a sentence that says what to do."""
    model = tiny_model("wav2vec2")
    batch = noise_batch([260])
    with pytest.raises(UserError, match="labels"):
        estimate_traces(model, [{name: value for name, value in batch.items() if name != "labels"}])
    with pytest.raises(UserError, match="empty"):
        estimate_traces(model, [])
    with pytest.raises(UserError, match="float32"):
        estimate_traces(model.to(torch.bfloat16), [batch])


def test_unseparated_neighbors_by_hand() -> None:
    """Neighbours in the order of sensitivity count when their difference is below their standard errors together."""
    traces = {
        "a": Trace(10.0, 3.0, 10),  # 1.0 ± 0.3
        "b": Trace(140.0, 40.0, 100),  # 1.4 ± 0.4: closer to a than the 0.5 of both
        "c": Trace(4.0, 0.1, 1),  # 4.0 ± 0.1: far away
        "d": Trace(8.3, 0.8, 2),  # 4.15 ± 0.4
    }
    assert unseparated_neighbors(traces) == 2
    nan = float("nan")
    assert unseparated_neighbors({"a": Trace(1.0, nan, 1), "b": Trace(9.0, nan, 1)}) == 1


def test_rank_displacement_by_hand() -> None:
    """Two matrices a standard error of their difference apart are in the wrong order with the normal's 15.9 %."""
    traces = {"a": Trace(1.0, 3.0, 1), "b": Trace(6.0, 4.0, 1)}
    assert rank_displacement(traces) == pytest.approx(0.158655, rel=1e-5)
    assert rank_displacement(traces | {"c": Trace(1e6, 1.0, 1)}) == pytest.approx(2 * 0.158655 / 3 / 2, rel=1e-5)
    assert rank_displacement({"a": Trace(1.0, 0.0, 1), "b": Trace(2.0, 0.0, 1)}) == 0
    assert math.isnan(rank_displacement({"a": Trace(1.0, math.nan, 1), "b": Trace(2.0, math.nan, 1)}))


def test_doubtful_traces_are_told_in_one_sentence() -> None:
    """Ranks within standard errors and negative traces together, with what to do; nothing where all is settled."""
    more = "raise allocation.probes, or choose allocation=error_curves, which reads no traces"
    remedy = f"; choose allocation.trace=fisher, {more}"
    close = "1 of 2 neighbours in the sensitivity ranking differ by less than their standard error"
    negative = "1 of 3 sensitivities are below 0, because the CTC loss is not convex"
    traces = {"a": Trace(-1.0, 3.0, 1), "b": Trace(1.0, 4.0, 1), "c": Trace(90.0, 4.0, 1)}
    assert doubtful_traces(Hutchinson(), traces) == f"{close} and {negative}{remedy}"
    assert doubtful_traces(HAWQ(), traces) == f"{negative}{remedy}", "it reads no ranks"
    assert doubtful_traces(Hutchinson(rank_tolerance=0.4), traces) == f"{negative}{remedy}"
    positive = traces | {"a": Trace(0.5, 3.0, 1)}
    assert doubtful_traces(Hutchinson(), positive) == f"{close}{remedy}"
    assert doubtful_traces(Hutchinson(trace="fisher"), positive) == f"{close}; {more}"
    assert doubtful_traces(HAWQ(trace="fisher"), positive) is None
    settled = {"a": Trace(1.0, 0.1, 1), "b": Trace(2.0, 0.1, 1)}
    assert doubtful_traces(Hutchinson(), settled) is None
    assert doubtful_traces(Uniform(), None) is None
    single = {name: Trace(trace.value, math.nan, 1) for name, trace in settled.items()}
    assert doubtful_traces(Hutchinson(), single) == f"1 of 1 {close[7:]}{remedy}"


def test_probing_stops_when_the_ranks_are_settled(tiny_model: Factory, noise_batch: Callable[..., Batch]) -> None:
    """A tolerance that is met ends it after the fewest batches, in their random order; one that is not takes all."""
    model = tiny_model("wav2vec2", "layer")
    batches = [noise_batch([240], seed=seed) for seed in range(LEAST_BATCHES + 4)]
    calls: list[tuple[int, int]] = []
    early = estimate_traces(
        model, batches, rank_tolerance=0.6, progress=lambda done, total: calls.append((done, total))
    )
    everything = estimate_traces(model, batches)
    assert {trace.samples for trace in early.values()} == {LEAST_BATCHES}
    assert {trace.samples for trace in everything.values()} == {len(batches)}
    assert calls[-1] == (len(batches), len(batches))  # the bar fills up
    assert early != everything
    assert estimate_traces(model, batches, rank_tolerance=1e-9) == everything


def test_the_modes_of_model_and_caller_do_not_matter(tiny_model: Factory, noise_batch: Callable[..., Batch]) -> None:
    batches = [noise_batch([800, 640]), noise_batch([480], seed=1)]
    expected = estimate_traces(tiny_model("wav2vec2"), batches)
    for mode in (torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16)):
        model = tiny_model("wav2vec2", hidden_dropout=0.5).train()
        with mode:
            assert estimate_traces(model, batches) == expected
        assert all(module.training for module in model.modules())


@pytest.mark.parametrize("options", [{"probes": 0}, {"distribution": "cauchy"}])
def test_probes_that_do_not_exist_are_refused(
    options: dict[str, Any], tiny_model: Factory, noise_batch: Callable[..., Batch]
) -> None:
    with pytest.raises(UserError, match=r"probes=\d, distribution=\w+: give"):
        estimate_traces(tiny_model("wav2vec2"), [noise_batch([800])], **options)
