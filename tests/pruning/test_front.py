"""``scope=encoder``: the convolutions and projections in front of the layers, against windows unfolded one by one."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import sparsewav
from sparsewav import Calibration, Reconstruction
from sparsewav.errors import UserError
from sparsewav.pruning import collect_hessians, estimate_traces, hessian, prunable_matrices, prune_matrix
from sparsewav.pruning.allocation.divergence import OutputDivergence
from sparsewav.pruning.encoder import FRONT, PrunableMatrix, base_of, encoder_layers
from sparsewav.pruning.families import FAMILIES, names_any
from sparsewav.pruning.macs import multiply_accumulates

Batch = dict[str, Tensor]
Factory = Callable[..., Any]  # tiny models, whose submodules mypy does not know
ModelInput = Callable[[PreTrainedModel, Batch], Batch]

DEEP = {"conv_dim": (8, 8, 6), "conv_kernel": (8, 3, 2), "conv_stride": (4, 2, 2), "num_feat_extract_layers": 3}
"""Two convolutions behind the first, of different windows, channels and rates."""

ADAPTER = {"add_adapter": True, "output_hidden_size": 16, "num_adapter_layers": 1}


def in_front(model: PreTrainedModel) -> list[PrunableMatrix]:
    return [matrix for matrix in prunable_matrices(model, "encoder") if matrix.layer == FRONT]


def columns(matrix: PrunableMatrix, model: PreTrainedModel, utterance: Batch) -> Tensor:
    """X (cols, windows) of a matrix for one utterance without padding, window by window; W X + b is the output."""
    caught: list[Tensor] = []
    hook = matrix.module.register_forward_hook(lambda module, args, output: caught.extend((args[0][0], output[0])))
    with torch.no_grad():
        model(utterance[model.main_input_name])
    hook.remove()
    states, output = caught
    if isinstance(matrix.module, nn.Conv1d):
        (kernel,), (stride,) = matrix.module.kernel_size, matrix.module.stride
        windows = [
            torch.stack([states[channel, start + place] for channel in range(len(states)) for place in range(kernel)])
            for start in range(0, states.shape[1] - kernel + 1, stride)
        ]
        states, output = torch.stack(windows), output.T
    bias = 0 if matrix.module.bias is None else matrix.module.bias
    torch.testing.assert_close(states @ matrix.weight.T + bias, output, rtol=1e-4, atol=1e-4)
    return states.T.double()


@pytest.mark.parametrize("options", [{}, ADAPTER])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_outside_of_the_layers_is_known(
    family: str, options: dict[str, object], tiny_model: Factory
) -> None:
    """It is pruned with the encoder, or the table says why it is not."""
    model, table = tiny_model(family, **options), FAMILIES[family]
    pruned = {matrix.module for matrix in in_front(model)}
    assert pruned
    for name, module in base_of(model).named_modules():
        inside = name.startswith(f"{table.layers}.")
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d) and not inside:
            assert (module in pruned) != names_any(table.front_dense, name), name


@pytest.mark.parametrize(
    ("family", "norm"),
    [
        ("wav2vec2", "layer"),
        ("wav2vec2", "group"),
        ("sew", "layer"),
        *((name, "") for name in ("wav2vec2-bert", "parakeet_ctc", "lasr_ctc", "granite_speech5_ctc")),
    ],
)
def test_hessians_are_those_of_the_unfolded_input(
    family: str,
    norm: str,
    tiny_model: Factory,
    noise_batch: Callable[..., Batch],
    utterances: Callable[..., list[Batch]],
    model_input: ModelInput,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a padded batch, in pieces: XXᵀ over the windows of every utterance alone, whatever the padding holds."""
    model = tiny_model(family, norm, **DEEP)
    batch = noise_batch([560, 411, 288])
    single = [model_input(model, utterance) for utterance in utterances([batch])]
    monkeypatch.setattr(hessian, "ROWS_AT_ONCE", 7)
    found = collect_hessians(model, [model_input(model, batch)], scope="encoder")
    layers = collect_hessians(model, [model_input(model, batch)])
    assert found.frames == layers.frames
    assert all(torch.equal(found.of(name), layers.of(name)) for name in layers.reads)
    for matrix in in_front(model):
        inputs = torch.cat([columns(matrix, model, utterance) for utterance in single], 1)
        expected = inputs @ inputs.T
        assert found.sampled[matrix.name] == found.rows[matrix.name] == inputs.shape[1], matrix.name
        scale = float(expected.diagonal().max())
        torch.testing.assert_close(found.of(matrix.name).double(), expected, rtol=0, atol=2e-5 * scale, msg=matrix.name)


def test_few_windows_are_unfolded(tiny_model: Factory, noise_batch: Callable[..., Batch]) -> None:
    """The sample is drawn before anything is unfolded, and stands for all windows of the convolution's own rate."""
    model = tiny_model("wav2vec2", **DEEP)
    convolution = in_front(model)[0]
    found = collect_hessians(model, [noise_batch([4000])] * 2, scope="encoder", frames_per_column=1, seed=1)
    assert found.sampled[convolution.name] == convolution.weight.shape[1] == 24
    assert found.rows[convolution.name] == 2 * int(convolution.count_rows(torch.tensor(4000))) == 2 * 499
    whole = collect_hessians(model, [noise_batch([4000])] * 2, scope="encoder")
    ratio = float(found.of(convolution.name).trace() / whole.of(convolution.name).trace())
    assert ratio == pytest.approx(1, abs=0.5)


@pytest.mark.parametrize("propagation", ["parallel", "sequential", "true_sequential"])
@pytest.mark.parametrize(("family", "norm"), [("wav2vec2", "layer"), ("wav2vec2", "group"), ("lasr_ctc", "")])
def test_only_the_scope_changes(
    propagation: str,
    family: str,
    norm: str,
    tiny_model: Factory,
    noise_batch: Callable[..., Batch],
    model_input: ModelInput,
) -> None:
    """Exact counts in front and in the layers, reports of all in this order, and every other tensor as it was.

    Every matrix in front is pruned on what the model gives it: the dense one, or the one that is pruned so far.
    """
    model = tiny_model(family, norm, **DEEP)
    batches = [model_input(model, noise_batch([560, 560])), model_input(model, noise_batch([411], seed=1))]
    dense = copy.deepcopy(model)
    calibration = Calibration(propagation=propagation, frames_per_column=None)
    report = sparsewav.prune(model, batches, 0.5, allocation="uniform", scope="encoder", calibration=calibration)
    matrices = prunable_matrices(model, "encoder")
    assert report.scope == "encoder"
    assert f"the encoder's {len(matrices)} matrices" in repr(report)
    assert [row.name for row in report.matrices] == [matrix.name for matrix in matrices]
    for row, matrix in zip(report.matrices, matrices, strict=True):
        assert int((matrix.parameter == 0).sum()) == round(row.sparsity * matrix.size) == round(0.5 * matrix.size)
    changed = {f"{matrix.name}.weight" for matrix in matrices}
    for name, value in dense.state_dict().items():
        assert torch.equal(model.state_dict()[name], value) == (name not in changed), name
    before = copy.deepcopy(dense)
    for matrix in in_front(model):
        (own,) = (item for item in in_front(before) if item.name == matrix.name)
        found = collect_hessians(before, batches, scope="encoder").of(matrix.name)
        expected = prune_matrix(own.weight.detach(), found, 0.5).weight
        torch.testing.assert_close(matrix.weight.detach(), expected, rtol=1e-4, atol=1e-4)
        if propagation != "parallel":
            own.weight.data.copy_(matrix.weight)


def test_layers_learn_what_the_dense_front_end_gives(tiny_model: Factory, noise_batch: Callable[..., Batch]) -> None:
    """The first layer is recovered to its output in the dense model, not to that behind the pruned front end."""
    model = tiny_model("wav2vec2", **DEEP)
    dense, batch = copy.deepcopy(model), noise_batch([560, 560])
    report = sparsewav.prune(
        model,
        [batch],
        0.5,
        allocation="uniform",
        scope="encoder",
        objective="asymmetric",
        recovery=Reconstruction(steps=1, learning_rate=1e-12),
        calibration=Calibration(propagation="sequential", frames_per_column=None),
    )
    outputs: list[Tensor] = []
    for one in (dense, model):
        encoder_layers(one)[0].register_forward_hook(
            lambda module, args, output: outputs.append(output[0] if isinstance(output, tuple) else output)
        )
        with torch.no_grad():
            one(batch["input_values"])
    error = float((outputs[0] - outputs[1]).square().sum() / outputs[0].square().sum())
    assert report.recoveries[0].error_before == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize("family", ["wav2vec2", "lasr_ctc"])
def test_divergence_follows_a_front_end_that_changes(
    family: str, tiny_model: Factory, noise_batch: Callable[..., Batch], model_input: ModelInput
) -> None:
    """It is that of the model as it is, also where layers are measured behind a pruned front end; then it is dense."""
    model = tiny_model(family, **DEEP)
    batches = [model_input(model, noise_batch([560, 560]))]
    matrices = prunable_matrices(model, "encoder")
    divergence = OutputDivergence(model, batches, matrices)
    before = copy.deepcopy(model.state_dict())
    assert divergence.measure() == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        dense = model(**batches[0]).logits.log_softmax(-1)

        def plain() -> float:
            return float((dense.exp() * (dense - model(**batches[0]).logits.log_softmax(-1))).sum(-1).mean())

        for layer in (FRONT, 0, 1):
            with divergence.resuming_at(layer):
                for matrix in matrices:
                    if matrix.layer == layer:
                        matrix.weight[:, ::2] = 0
                assert plain() > 1e-3
                assert divergence.measure() == pytest.approx(plain(), rel=1e-3)
        model.load_state_dict(before)
    assert divergence.measure() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    "allocation",
    [
        sparsewav.Hutchinson(exact_budget=True),
        sparsewav.HAWQ(step=0.25),
        sparsewav.ErrorCurves(step=0.25, effect="fisher"),
        sparsewav.ErrorCurves(step=0.25, others="pruned"),
        sparsewav.Search(step=0.25, evaluations=4),
    ],
)
def test_allocations_share_the_sparsity_with_the_front_end(
    allocation: sparsewav.Hutchinson, tiny_model: Factory, noise_batch: Callable[..., Batch]
) -> None:
    """The target is met over the whole scope, to one weight; the dense model is what costs are measured from."""
    model = tiny_model("wav2vec2", **DEEP)
    report = sparsewav.prune(model, [noise_batch([560, 411])], 0.5, allocation=allocation, scope="encoder")
    matrices = prunable_matrices(model, "encoder")
    removed = sum(int((matrix.weight == 0).sum()) for matrix in matrices)
    size = sum(matrix.size for matrix in matrices)
    assert removed == round(0.5 * size)
    assert report.sparsity == removed / size
    assert len({row.target_sparsity for row in report.matrices}) > 1


def test_fisher_of_a_convolution_predicts_its_divergence(
    tiny_model: Factory, noise_batch: Callable[..., Batch]
) -> None:
    """½ Σ F_r ||δ_r X||² / windows is the divergence of a small random change, on average over such changes."""
    model = tiny_model("wav2vec2", **DEEP)
    batch = noise_batch([4000])
    convolution = in_front(model)[0]
    divergence = OutputDivergence(model, [batch], in_front(model))
    fisher = sum(divergence.output_fisher(seed)[convolution.name] for seed in range(8)) / 8
    found = collect_hessians(model, [batch], scope="encoder")
    before, generator = convolution.weight.detach().clone(), torch.Generator().manual_seed(0)
    measured = predicted = 0.0
    for _ in range(24):
        change = 3e-3 * torch.randn(before.shape, generator=generator)
        convolution.weight.data.copy_(before + change)
        measured += divergence.measure()
        errors = ((change @ found.of(convolution.name)) * change).sum(1).double()
        predicted += float(0.5 * (errors @ fisher) / found.rows[convolution.name])
    assert predicted / measured == pytest.approx(1, abs=0.6)  # four times as much, if windows counted as frames


def test_traces_of_the_front_end_are_those_of_the_loss(tiny_model: Factory, noise_batch: Callable[..., Batch]) -> None:
    """A projection's trace is the sum of second differences of the loss along its weights."""
    model = tiny_model("wav2vec2", **DEEP).double()
    batch = noise_batch([560])
    batch["input_values"] = batch["input_values"].double()
    traces = estimate_traces(model, [batch], scope="encoder", probes=64, distribution="rademacher")
    assert list(traces) == [matrix.name for matrix in prunable_matrices(model, "encoder")]
    matrix = in_front(model)[0]
    assert traces[matrix.name].size == matrix.size

    def loss() -> float:
        with torch.no_grad():
            return float(model(**batch).loss)

    model.config.ctc_loss_reduction, exact, step = "sum", 0.0, 1e-3
    flat = matrix.weight.data
    for row, col in [(row, col) for row in range(flat.shape[0]) for col in range(flat.shape[1])]:
        here, value = loss(), float(flat[row, col])
        flat[row, col] = value + step
        above = loss()
        flat[row, col] = value - step
        exact += (above - 2 * here + loss()) / step**2
        flat[row, col] = value
    assert traces[matrix.name].value == pytest.approx(exact, abs=4 * traces[matrix.name].standard_error)


@pytest.mark.parametrize("quantization", ["none", "int4"])
def test_budget_in_bytes_takes_from_the_front_end(
    quantization: str, tiny_model: Factory, noise_batch: Callable[..., Batch]
) -> None:
    """The file has at most the bytes asked for, and weights in front of the layers are among those removed."""
    model = tiny_model("wav2vec2", **DEEP)
    batch = noise_batch([560, 411])
    size = 0.024 if quantization == "none" else 0.013
    report = sparsewav.prune(
        model, [batch], sparsewav.Megabytes(size), scope="encoder", quantization=quantization, allocation="uniform"
    )
    assert report.bytes is not None
    assert 0.9e6 * size < report.bytes <= 1e6 * size
    assert all(int((matrix.weight == 0).sum()) > 0 for matrix in in_front(model))


def test_zeros_of_convolutions_are_not_multiplied(tiny_model: Factory, noise_batch: Callable[..., Batch]) -> None:
    """Half of a convolution's weights zero: half of its windows' products fewer, of every ten seconds."""
    model = tiny_model("wav2vec2", **DEEP)
    audio = torch.zeros(1, 160_000)
    executed, nonzero = multiply_accumulates(model, audio)
    convolution = in_front(model)[0]
    convolution.weight.data[:, ::2] = 0
    fewer = convolution.size // 2 * int(convolution.count_rows(torch.tensor(160_000)))
    assert multiply_accumulates(model, audio) == (executed, pytest.approx(nonzero - fewer / 10, abs=1))


def test_what_cannot_be_pruned_is_refused(tiny_model: Factory, noise_batch: Callable[..., Batch]) -> None:
    """A scope that does not exist, and a convolution whose weight is computed; the model stays as it was."""
    model = tiny_model("wav2vec2", **DEEP)
    batches = [noise_batch([560])]
    with pytest.raises(UserError, match=r"scope=front does not exist; choose one of transformer, encoder"):
        sparsewav.prune(model, batches, 0.5, allocation="uniform", scope="front")
    nn.utils.parametrizations.weight_norm(model.wav2vec2.feature_extractor.conv_layers[1].conv)
    with pytest.raises(UserError, match=r"conv_layers\.1\.conv is computed"):
        sparsewav.prune(model, batches, 0.5, allocation="uniform", scope="encoder")
    sparsewav.prune(model, batches, 0.5, allocation="uniform")
