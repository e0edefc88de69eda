"""The engine as a whole: what it touches, how much it removes, and what it reports."""

import contextlib
import copy
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.data import DataLoader, IterableDataset
from transformers import (
    BertConfig,
    BertForMaskedLM,
    PreTrainedModel,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    Wav2Vec2ForSequenceClassification,
)

import sparsewav
from sparsewav import ALPS, NM, OBS, Calibration, Hutchinson, Pruning, Reconstruction, Unstructured
from sparsewav.errors import UserError
from sparsewav.inference.sparse_modules import SparseLinear
from sparsewav.pruning import collect_hessians, estimate_traces, layerwise, prunable_matrices, prune_matrix, prune_model
from sparsewav.pruning.encoder import encoder_layers
from sparsewav.pruning.families import FAMILIES

Batch = dict[str, Tensor]
Factory = Callable[..., Any]  # tiny models, whose submodules mypy does not know
MakeBatch = Callable[..., Batch]

ModelInput = Callable[[PreTrainedModel, Batch], Batch]

LEFT_DENSE = {"wavlm": {"attention.gru_rel_pos_linear"}}
"""The modules in a layer that multiply by a matrix and are not to be pruned."""


@pytest.fixture
def batches(noise_batch: MakeBatch) -> list[Batch]:
    """Two batches of padded noise with transcripts."""
    return [noise_batch([400, 304]), noise_batch([352], seed=1)]


def every_frame(propagation: str = "parallel") -> Calibration:
    """A calibration without a sample of frames."""
    return Calibration(propagation=propagation, frames_per_column=None)


def same_bytes(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    states = one.state_dict(), other.state_dict()
    return list(states[0]) == list(states[1]) and all(
        torch.equal(states[0][name], states[1][name]) for name in states[0]
    )


def zeros(model: PreTrainedModel) -> tuple[int, int]:
    """Zero weights and all weights of the prunable matrices."""
    weights = [matrix.weight for matrix in prunable_matrices(model)]
    return sum(int((weight == 0).sum()) for weight in weights), sum(weight.numel() for weight in weights)


def inputs_of(model: PreTrainedModel, utterances: list[Batch]) -> dict[str, Tensor]:
    """X (cols, frames) of every matrix whose module is called, one unpadded utterance after the other."""
    caught: dict[str, list[Tensor]] = {}
    hooks = [
        matrix.module.register_forward_pre_hook(
            lambda module, args, name=matrix.name: caught.setdefault(name, []).append(args[0][0].double())
        )
        for matrix in prunable_matrices(model)
    ]
    with torch.no_grad():
        for utterance in utterances:
            model(utterance["input_values"])
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(frames).T for name, frames in caught.items()}


def matrices_of(layer: nn.Module) -> set[str]:
    """The names of all modules that multiply every frame by one matrix: linear ones, and convolutions of kernel 1."""
    return {
        name
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv1d) and module.weight.shape[1:] != (1, 3))
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("propagation", ["parallel", "sequential"])
def test_only_the_prunable_matrices_change(
    family: str, propagation: str, tiny_model: Factory, batches: list[Batch], model_input: ModelInput
) -> None:
    """Every matrix of a layer is pruned to the count asked for, or known to stay; other tensors are the same bytes."""
    relative = {"position_embeddings_type": "relative"} if family.startswith("wav2vec2-") else {}
    model = tiny_model(family, **relative)
    batches = [model_input(model, batch) for batch in batches]
    dense = copy.deepcopy(model)
    layers = encoder_layers(model)
    place = next(name for name, module in model.named_modules() if module is layers)
    roles = matrices_of(layers[0]) - LEFT_DENSE.get(family, set())
    assert len(roles) >= 6
    assert len(layers) == 2
    expected = {f"{place}.{layer}.{role}" for layer in range(2) for role in roles}
    assert {matrix.name for matrix in prunable_matrices(model)} == expected
    allocation = Hutchinson(exact_budget=True, rank_tolerance=0.0)
    report = sparsewav.prune(model, batches, 0.7, allocation=allocation, calibration=every_frame(propagation))
    state = model.state_dict()
    for name, value in dense.state_dict().items():
        module, _, kind = name.rpartition(".")
        assert torch.equal(state[name], value) == (module not in expected or kind != "weight"), name
    assert zeros(model) == (round(0.7 * zeros(model)[1]), sum(matrix.size for matrix in prunable_matrices(model)))
    assert [row.name for row in report.matrices] == list(report.masks) == [m.name for m in prunable_matrices(model)]
    for row in report.matrices:
        weight = model.get_submodule(row.name).weight
        assert torch.equal(report.masks[row.name], weight.flatten(1) != 0)
        assert (row.rows, row.cols) == weight.flatten(1).shape
        assert row.sparsity == int((weight == 0).sum()) / weight.numel()
        assert row.sparsity == pytest.approx(row.target_sparsity, abs=0.5 / weight.numel() + 1e-12)
    assert report.sparsity == zeros(model)[0] / zeros(model)[1]


def test_full_size_base_model_has_its_72_matrices() -> None:
    """wav2vec2-base has 72 prunable matrices of 84,934,656 weights, as in the paper."""
    with torch.device("meta"):
        model = Wav2Vec2ForCTC(Wav2Vec2Config())
    matrices = prunable_matrices(model)
    assert len(matrices) == 72
    assert sum(matrix.size for matrix in matrices) == 84_934_656


def test_unknown_family_is_refused_by_name() -> None:
    """A model whose layers are like those of no family is named, with what is supported."""
    with torch.device("meta"):
        model = BertForMaskedLM(BertConfig(num_hidden_layers=1, vocab_size=5))
    with pytest.raises(UserError, match=r"BertForMaskedLM.*'bert'.*wav2vec2, .*parakeet_ctc"):
        sparsewav.prune(model, [], 0.5)


class HomemadeConfig(Wav2Vec2Config):
    model_type = "homemade"


class Homemade(Wav2Vec2ForCTC):
    config_class = HomemadeConfig


@pytest.mark.parametrize("propagation", ["parallel", "sequential"])
def test_a_family_that_looks_like_a_known_one_is_tried_with_a_warning(
    propagation: str, tiny_model: Factory, batches: list[Batch], caplog: pytest.LogCaptureFixture
) -> None:
    """It is pruned as that one, utterance by utterance; the warning says what is pruned and what is left."""
    known = tiny_model("wav2vec2")
    config = HomemadeConfig(**{key: value for key, value in known.config.to_dict().items() if key != "model_type"})
    model = Homemade(config).eval()
    model.load_state_dict(known.state_dict())
    for layer in model.wav2vec2.encoder.layers:
        layer.extra = nn.Linear(16, 16)
    dense = copy.deepcopy(model)
    report = sparsewav.prune(model, batches, 0.5, allocation="uniform", calibration=every_frame(propagation))
    sparsewav.prune(known, batches, 0.5, allocation="uniform", calibration=every_frame(propagation))
    assert [m.name for m in prunable_matrices(model)] == [m.name for m in prunable_matrices(known)]
    for mine, other in zip(prunable_matrices(model), prunable_matrices(known), strict=True):
        assert torch.equal(mine.weight != 0, other.weight != 0)
    (warning,) = report.warnings
    for part in ("'homemade' was never tried", "like those of wav2vec2", "attention.q_proj, ", "and extra of"):
        assert part in warning
    assert warning in caplog.messages
    quick = sparsewav.Global(updates=2, batch_size=2, precision="float32")
    assert sparsewav.recover(model, dense, batches, quick).updates == 2


@pytest.mark.parametrize("saliency", ["magnitude", "wanda", "obs", "obs_first_order"])
@pytest.mark.parametrize("propagation", ["parallel", "sequential"])
def test_report_holds_what_was_done(
    saliency: str,
    propagation: str,
    tiny_model: Factory,
    batches: list[Batch],
    utterances: Callable[[list[Batch]], list[Batch]],
) -> None:
    """The relative error is ||(W − Ŵ)X||² / ||WX||² of the inputs as dense or as pruned so far."""
    model = tiny_model("wav2vec2")
    dense = copy.deepcopy(model)
    report = sparsewav.prune(
        model,
        batches,
        0.6,
        saliency=saliency,
        solver=OBS(damping=0.05),
        allocation="uniform",
        calibration=every_frame(propagation),
    )
    so_far = copy.deepcopy(dense)
    for layer in range(2):
        inputs = inputs_of(so_far, utterances(batches))
        for row in report.matrices:
            if f".layers.{layer}." not in row.name:
                continue
            weight = dense.get_submodule(row.name).weight.detach().double()
            change = weight - model.get_submodule(row.name).weight.detach().double()
            expected = (change @ inputs[row.name]).square().sum() / (weight @ inputs[row.name]).square().sum()
            assert row.relative_error == pytest.approx(float(expected), rel=1e-3), row.name
            assert row.sensitivity is None
            assert row.rank is None
            assert row.target_sparsity == 0.6
            if propagation == "sequential":
                so_far.get_submodule(row.name).weight.data.copy_(model.get_submodule(row.name).weight)
    assert report.target_sparsity == 0.6
    assert set(report.seconds) == {"calibrate", "allocate", "solve"}
    assert all(seconds >= 0 for seconds in report.seconds.values())


def test_a_preset_gives_what_its_options_give_one_by_one(tiny_model: Factory, batches: list[Batch]) -> None:
    """And an option that is given besides goes before the preset's."""
    unlabeled = [{key: value for key, value in batch.items() if key != "labels"} for batch in batches]
    models = [tiny_model("wav2vec2") for _ in range(3)]
    reports = [
        sparsewav.prune(models[0], unlabeled, 0.6, preset="best_oneshot"),
        sparsewav.prune(
            models[1],
            batches,
            0.6,
            solver=ALPS(output_weighting="fisher"),
            allocation="uniform",
            recovery=Reconstruction(steps=50, output_weighting="fisher"),
            calibration=Calibration(propagation="sequential"),
        ),
        sparsewav.prune(models[2], batches, 0.6, preset="best_oneshot", recovery="none"),
    ]
    assert same_bytes(models[0], models[1])
    assert not same_bytes(models[0], models[2])
    assert [len(report.recoveries) for report in reports] == [2, 2, 0]


def test_the_report_is_a_table_and_fits_a_screen(tiny_model: Factory, batches: list[Batch]) -> None:
    report = sparsewav.prune(tiny_model("wav2vec2"), batches, 0.6)
    table = report.to_frame()
    assert list(table.index) == [matrix.name for matrix in report.matrices]
    sizes = table["rows"] * table["cols"]
    assert (table["sparsity"] * sizes).sum() / sizes.sum() == pytest.approx(report.sparsity)
    shown = repr(report)
    assert len(shown.splitlines()) <= 3 + len(report.warnings)
    assert (
        f"{report.sparsity:.2%} of the weights of the transformer's 12 matrices are zero (asked for: 60.00%)" in shown
    )
    assert table["relative_error"].idxmax() in shown
    assert all(warning in shown for warning in report.warnings)


def test_every_matrix_is_what_the_solver_makes_of_it(tiny_model: Factory, batches: list[Batch]) -> None:
    """Each matrix equals the solver's answer for its Hessian, sparsity, mask and options, called directly."""
    model = tiny_model("wav2vec2")
    dense = copy.deepcopy(model)
    options: dict[str, Any] = {"saliency": "obs_first_order", "solver": OBS(block_size=5, damping=0.3)}
    keep = torch.rand(16, 16, generator=torch.Generator().manual_seed(0)) < 0.9
    masks = {prunable_matrices(model)[1].name: keep}
    allocation = Hutchinson(alpha=0.2, rank_tolerance=0.0)
    report = sparsewav.prune(
        model, batches, 0.7, allocation=allocation, calibration=every_frame(), masks=masks, **options
    )
    hessians = collect_hessians(dense, batches)
    for row in report.matrices:
        expected = prune_matrix(
            dense.get_submodule(row.name).weight.detach(),
            hessians.of(row.name),
            row.target_sparsity,
            keep=masks.get(row.name),
            **options,
        )
        assert torch.equal(report.masks[row.name], expected.keep)
        torch.testing.assert_close(model.get_submodule(row.name).weight.detach(), expected.weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("propagation", "room", "calls"), [("parallel", 2**31, 2), ("sequential", 2**31, 4), ("parallel", 0, 8)]
)
def test_matrices_solved_together_as_on_a_gpu(
    propagation: str,
    room: int,
    calls: int,
    tiny_model: Factory,
    batches: list[Batch],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Inputs of one width are solved by one call, with as many as memory has room for; the model is the same."""
    model = tiny_model("wav2vec2")
    alone = copy.deepcopy(model)
    settings = Pruning(sparsity=Unstructured(0.6), calibration=every_frame(propagation))
    one_by_one = prune_model(alone, batches, settings)
    prune_groups, groups_of_calls = layerwise.prune_groups, []

    def counted(groups: list, settings: Pruning) -> Any:
        groups_of_calls.append(len(groups))
        return prune_groups(groups, settings)

    monkeypatch.setattr(layerwise, "BATCHED_BYTES", room)
    monkeypatch.setattr(layerwise, "prune_groups", counted)
    together = prune_model(model, batches, settings, batched_devices=("cpu",))
    assert (len(groups_of_calls), sum(groups_of_calls)) == (calls, 8)
    assert [report.sparsity for report in together.matrices] == [report.sparsity for report in one_by_one.matrices]
    for mine, other in zip(prunable_matrices(model), prunable_matrices(alone), strict=True):
        assert torch.equal(together.masks[mine.name], one_by_one.masks[mine.name])
        torch.testing.assert_close(mine.weight, other.weight, rtol=0, atol=1e-5)


def test_hutchinson_spares_the_sensitive(tiny_model: Factory, batches: list[Batch]) -> None:
    """Rank 0 has the highest sensitivity and s − α, the last rank s + α; weak rankings are said to be weak."""
    model = tiny_model("wav2vec2", "group")
    report = sparsewav.prune(model, batches, 0.7, allocation=Hutchinson(alpha=0.15))
    rows = sorted(report.matrices, key=lambda row: row.rank if row.rank is not None else -1)
    assert [row.rank for row in rows] == list(range(12))
    sensitivities = [row.sensitivity for row in rows]
    assert sensitivities == sorted(sensitivities, reverse=True)  # type: ignore[type-var]
    assert [row.target_sparsity for row in rows] == pytest.approx([0.55 + 0.3 * rank / 11 for rank in range(12)])
    (warning,) = report.warnings
    assert "standard error" in warning
    assert "choose allocation.trace=fisher" in warning


def test_a_model_that_is_sparser_already_is_warned_about(tiny_model: Factory, batches: list[Batch]) -> None:
    model = tiny_model("wav2vec2")
    assert not sparsewav.prune(model, batches, 0.5, allocation="uniform").warnings
    (warning,) = sparsewav.prune(model, batches, 0.3, allocation="uniform").warnings
    assert re.match(r"the model had (20\.0|19\.9)\d% more zeros .* pruned before; ask for a higher sparsity", warning)
    assert not sparsewav.prune(model, batches, 0.6, allocation="uniform").warnings
    (warning,) = sparsewav.prune(model, batches, sparsewav.Structured(parameters=0.8), allocation="uniform").warnings
    assert re.match(r"the model had \d\d\.\d\d% zeros .* may have fewer now", warning)


def test_emptied_matrix_is_warned_about(tiny_model: Factory, batches: list[Batch]) -> None:
    """The paper's own 90 % with α = 0.1 empties a matrix; the report says which."""
    model = tiny_model("wav2vec2")
    report = sparsewav.prune(model, batches, 0.9)
    (emptied,) = [row.name for row in report.matrices if row.sparsity == 1]
    assert any(emptied in warning and "all of its weights" in warning for warning in report.warnings)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("propagation", ["parallel", "sequential"])
def test_same_seed_gives_the_same_bytes(propagation: str, tiny_model: Factory, batches: list[Batch]) -> None:
    """Runs repeat to the byte, from a list or a generator of batches, in training mode or not."""
    dense = tiny_model("wavlm")
    models = [copy.deepcopy(dense) for _ in range(4)]

    def generated() -> Iterator[Batch]:
        yield from batches

    models[2].train()  # dropout and masking are on then; the engine has to switch them off, and on again
    sources: list[Any] = [batches, generated(), batches, batches]
    reports = [
        sparsewav.prune(model, source, 0.7, calibration=Calibration(propagation=propagation), seed=seed)
        for model, source, seed in zip(models, sources, [3, 3, 3, 4], strict=True)
    ]
    assert same_bytes(models[0], models[1])
    assert same_bytes(models[0], models[2])
    assert models[2].training
    assert not models[0].training
    assert reports[0].matrices == reports[1].matrices == reports[2].matrices
    sensitivities = [[row.sensitivity for row in report.matrices] for report in reports]
    assert sensitivities[0] != sensitivities[3]


@pytest.mark.parametrize("saliency", ["magnitude", "obs_first_order"])
@pytest.mark.parametrize("allocation", ["uniform", "hutchinson"])
def test_stages_are_nested(saliency: str, allocation: str, tiny_model: Factory, batches: list[Batch]) -> None:
    """75 % on top of the masks of 50 % removes all that was gone, and exactly 75 % of every matrix's target."""
    model = tiny_model("hubert")
    first = sparsewav.prune(model, batches, 0.5, saliency="magnitude", allocation="uniform")
    torch.manual_seed(0)
    with torch.no_grad():  # fine-tuning that forgot the masks, so that what was gone looks worth keeping
        for matrix in prunable_matrices(model):
            matrix.weight.add_(torch.randn_like(matrix.weight))
    second = sparsewav.prune(model, batches, 0.75, saliency=saliency, allocation=allocation, masks=first.masks)
    for row in second.matrices:
        weight = model.get_submodule(row.name).weight
        assert not weight[~first.masks[row.name]].any()
        assert not (second.masks[row.name] & ~first.masks[row.name]).any()
        assert int((weight == 0).sum()) == round(row.target_sparsity * weight.numel())


def test_pattern_through_the_engine(tiny_model: Factory, batches: list[Batch]) -> None:
    """2:4 holds in every matrix; n of m must be a pattern, and another allocation than uniform does not fit one."""
    model = tiny_model("wavlm")
    report = sparsewav.prune(model, batches, NM(2, 4), allocation="uniform")
    assert report.sparsity == report.target_sparsity == 0.5
    for matrix in prunable_matrices(model):
        assert ((matrix.weight != 0).reshape(-1, 4).sum(1) == 2).all()
    with pytest.raises(UserError, match=r"sparsity\.n=4 and sparsity\.m=4"):
        sparsewav.prune(model, batches, NM(4, 4), allocation="uniform")
    with pytest.raises(UserError, match="2:4"):
        sparsewav.prune(model, batches, NM(2, 4))


def test_obs_leaves_less_error_than_masks_alone(tiny_model: Factory, batches: list[Batch]) -> None:
    """Over all matrices OBS has a lower mean relative error than Wanda, and Wanda than magnitude or about so."""
    means = {}
    for saliency in ("obs", "wanda", "magnitude"):
        rows = sparsewav.prune(tiny_model("wav2vec2"), batches, 0.6, saliency=saliency, allocation="uniform").matrices
        means[saliency] = sum(row.relative_error for row in rows) / len(rows)
    assert means["obs"] < 0.8 * min(means["wanda"], means["magnitude"])
    assert means["wanda"] < 1.1 * means["magnitude"]


def test_ready_made_results_equal_fresh_ones(tiny_model: Factory, batches: list[Batch]) -> None:
    """Hessians and traces computed earlier give the bytes that computing them here gives, and no batch is read."""
    dense = tiny_model("wavlm")
    fresh, cached = copy.deepcopy(dense), copy.deepcopy(dense)
    allocation = Hutchinson(probes=2, rank_tolerance=0.0)
    sparsewav.prune(fresh, batches, 0.7, allocation=allocation, calibration=every_frame(), seed=5)
    hessians = collect_hessians(dense, batches)
    traces = estimate_traces(dense, batches, probes=2, seed=5)
    report = prune_model(cached, [], Pruning(sparsity=Unstructured(0.7)), hessians=hessians, traces=traces)
    assert same_bytes(fresh, cached)
    assert report.seconds["calibrate"] == report.seconds["allocate"] == 0


def without_labels(batch: Batch) -> Batch:
    return {name: value for name, value in batch.items() if name != "labels"}


def with_nan(batch: Batch) -> Batch:
    values = batch["input_values"].clone()
    values[1, 5] = float("nan")
    return batch | {"input_values": values}


def too_short(batch: Batch) -> Batch:
    mask = batch["attention_mask"].clone()
    mask[1, 9:] = 0
    return batch | {"attention_mask": mask}


def outside_the_vocabulary(batch: Batch) -> Batch:
    labels = batch["labels"].clone()
    labels[1, 0] = 50
    return batch | {"labels": labels}


@pytest.mark.parametrize(
    ("options", "spoil"),
    [
        ({"saliency": "obd"}, None),
        ({"allocation": "fisher"}, None),
        ({"calibration": Calibration(propagation="sideways")}, None),
        ({"sparsity": 1.2}, None),
        ({"sparsity": 0.95}, None),  # + α = 0.1 is above 1
        ({"masks": {"encoder.layers.0.attention.q_proj": torch.ones(16, 16).bool()}}, None),  # prefix forgotten
        ({}, with_nan),
        ({}, without_labels),
        ({}, outside_the_vocabulary),
        ({}, too_short),
        ({"allocation": "uniform"}, too_short),
        ({"allocation": "error_curves"}, too_short),
    ],
)
def test_what_cannot_be_done_is_refused(
    options: dict[str, Any], spoil: Callable[[Batch], Batch] | None, tiny_model: Factory, batches: list[Batch]
) -> None:
    """A wrong argument or broken calibration data is a user's error, and the model is as it was."""
    model = tiny_model("wav2vec2").train()
    before = copy.deepcopy(model)
    faulty = [batches[1], spoil(batches[0]) if spoil else batches[0]]
    place = "^row 1 of calibration batch 1 " if spoil in (with_nan, outside_the_vocabulary, too_short) else None
    with pytest.raises(UserError, match=place):
        sparsewav.prune(model, faulty, **({"sparsity": 0.6} | options))
    assert same_bytes(model, before)
    assert model.training


# The annotations, which the tests check at every call, refuse other types before the function can say so.
untyped_prune: Callable[..., Any] = inspect.unwrap(sparsewav.prune)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda batch: batch["input_values"], "a calibration batch is a Tensor; give dictionaries"),
        (lambda batch: {"speech": batch["input_values"]}, "no input_values or input_features, but speech"),
        (
            lambda batch: batch | {"input_values": batch["input_values"][0]},
            r"shape \(400,\); give .* \(batch, samples\)",
        ),
        (
            lambda batch: batch | {"input_values": batch["input_values"].tolist()},
            "input_values .* is a list; give",
        ),
        (
            lambda batch: batch | {"input_values": (3000 * batch["input_values"]).short()},
            "input_values .*int16.*extractor",
        ),
        (lambda batch: batch | {"input_values": batch["input_values"] + 1j}, "input_values .*complex64"),
        (lambda batch: {key: value[:0] for key, value in batch.items()}, "is empty; leave it out"),
        (lambda batch: batch | {"attention_mask": batch["attention_mask"][:, 1:]}, r"\(2, 399\), and its input_values"),
        (lambda batch: batch | {"attention_mask": batch["attention_mask"].flip(1)}, "0 for the padding after it"),
        (lambda batch: batch | {"labels": batch["labels"][:1]}, r"labels .* \(1, 4\); .* each of its 2 utterances"),
        (lambda batch: batch | {"labels": batch["labels"].float()}, "labels .*float32.* give whole numbers"),
        (lambda batch: batch | {"labels": None}, "labels, or choose allocation.trace=fisher or allocation=uniform"),
    ],
)
def test_batches_of_another_form_are_refused(
    spoil: Callable[[Batch], Any], message: str, tiny_model: Factory, batches: list[Batch]
) -> None:
    """Calibration data that would be misread, or end in an error of PyTorch, is refused in one sentence."""
    model = tiny_model("wav2vec2")
    dense = copy.deepcopy(model)
    with pytest.raises(UserError, match=message):
        untyped_prune(model, [spoil(batches[0])], 0.6)
    assert same_bytes(model, dense)


class Utterances(IterableDataset):
    """Utterances one after the other, in another order every time; nobody knows how many."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches, self.passes = batches, 0

    def __iter__(self) -> Iterator[Batch]:
        self.passes += 1
        yield from self.batches if self.passes % 2 else reversed(self.batches)


@pytest.mark.parametrize("allocation", ["uniform", "hutchinson"])
def test_a_data_loader_is_read_once(allocation: str, tiny_model: Factory, batches: list[Batch]) -> None:
    """What has no length, or shuffles, gives the model that a list of its batches gives."""
    models = [tiny_model("wav2vec2") for _ in range(2)]
    utterances = Utterances(batches)
    sparsewav.prune(models[0], batches, 0.6, allocation=allocation)
    sparsewav.prune(models[1], DataLoader(utterances, batch_size=None), 0.6, allocation=allocation)
    assert same_bytes(*models)
    assert utterances.passes == 1
    for wrong in (None, 3, batches[0], "batches"):
        with pytest.raises(UserError, match="holds no batches; give a list"):
            untyped_prune(models[0], wrong, 0.6)


class Adapter(nn.Module):
    """A linear module within another, as adapters have it."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer


def change(name: str, make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Put another module in the place of one."""

    def changed(model: Any) -> Any:
        model.set_submodule(name, make(model.get_submodule(name)))
        return model

    return changed


QUERY = "wav2vec2.encoder.layers.0.attention.q_proj"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda model: "facebook/wav2vec2-base-960h", "the model is a str; give a CTC model of transformers"),
        (lambda model: nn.Linear(3, 3), "the model is a Linear; give a CTC model"),
        (nn.DataParallel, r"wrapped in DataParallel; give .* model\.module"),
        (lambda model: torch.compile(model, backend="eager"), r"compiled; give .* model\._orig_mod"),
        (
            lambda model: model.wav2vec2,
            "Wav2Vec2Model has no CTC head, .*uniform, error_curves or search",
        ),
        (lambda model: Wav2Vec2ForSequenceClassification(model.config), "SequenceClassification has no CTC head"),
        (lambda model: model.to("meta"), "meta device"),
        (change("lm_head", lambda head: head.half()), "float16 and torch.float32; convert it"),
        (change(QUERY, Adapter), "q_proj is a .*Adapter and no torch.nn.Linear"),
        (change(QUERY, lambda linear: SparseLinear(linear, None)), "q_proj is a .*SparseLinear .*before it is"),
        (change(QUERY, weight_norm), "q_proj is computed from other tensors"),
        (
            lambda model: change(QUERY, lambda _: model.get_submodule(QUERY.replace("q_", "k_")))(model),
            "share one weight",
        ),
    ],
)
def test_models_whose_weights_are_not_there_are_refused(
    spoil: Callable[[Any], Any], message: str, tiny_model: Factory, batches: list[Batch]
) -> None:
    """What is wrapped, quantised, accelerated, adapted or not loaded is refused before anything is computed."""
    with pytest.raises(UserError, match=message):
        untyped_prune(spoil(tiny_model("wav2vec2")), batches, 0.6)


def test_the_modes_of_the_caller_do_not_matter(tiny_model: Factory, batches: list[Batch]) -> None:
    """Without gradients, in automatic half precision, on top of old gradients: the same bytes, and no mode left."""
    expected = tiny_model("wav2vec2")
    sparsewav.prune(expected, batches, 0.6)
    for mode in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16)):
        model = tiny_model("wav2vec2").requires_grad_(False)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        model.wav2vec2.encoder.layers[0].train()  # a part alone
        modes = [module.training for module in model.modules()]
        with mode:
            sparsewav.prune(model, [{key: value.clone() for key, value in batch.items()} for batch in batches], 0.6)
        assert same_bytes(model, expected)
        assert [module.training for module in model.modules()] == modes
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert all((parameter.grad == 1).all() for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("solver", ["obs", "alps"])
def test_other_precisions_reach_the_same_error(
    dtype: torch.dtype, solver: str, tiny_model: Factory, batches: list[Batch]
) -> None:
    """The asymmetric objective works in every precision; what it reports is what it reports in float32, nearly."""
    options: dict[str, Any] = {"objective": "asymmetric", "allocation": "uniform", "solver": solver}
    reports = [
        sparsewav.prune(tiny_model("wav2vec2").to(kind), batches, 0.6, calibration=every_frame("sequential"), **options)
        for kind in (torch.float32, dtype)
    ]
    errors = [sum(row.relative_error for row in report.matrices) for report in reports]
    assert errors[1] == pytest.approx(errors[0], rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_layers_learn_in_half_precision_as_in_single(
    dtype: torch.dtype, tiny_model: Factory, batches: list[Batch]
) -> None:
    """The small steps of Adam are not lost, and its ε is not zero."""
    single, half = (
        sparsewav.prune(tiny_model("wav2vec2").to(kind), batches, 0.6, preset="best_oneshot").recoveries
        for kind in (torch.float32, dtype)
    )
    for one, other in zip(single, half, strict=True):
        assert one.error < 0.9 * one.error_before
        assert other.error / other.error_before == pytest.approx(one.error / one.error_before, rel=0.1)


class Stop(BaseException):
    """An interruption, as Ctrl-C is one."""


@pytest.mark.parametrize("propagation", ["parallel", "sequential", "true_sequential"])
@pytest.mark.parametrize("stage", ["calibrate", "allocate", "solve", "recover"])
def test_an_interruption_leaves_the_model_as_it_was(
    stage: str, propagation: str, tiny_model: Factory, batches: list[Batch]
) -> None:
    """At whatever step the callback raises: weights, modes, hooks and what requires gradients are as before."""
    recovery = "none" if propagation == "parallel" else "reconstruction"
    for step in (1, 2):
        model = tiny_model("wavlm").train()
        model.lm_head.requires_grad_(False)
        dense = copy.deepcopy(model)
        steps: list[str] = []

        def progress(name: str, done: int, of: int, step: int = step, steps: list[str] = steps) -> None:
            steps.append(name)
            if steps.count(stage) == step:
                raise Stop

        calls = contextlib.nullcontext() if _never(stage, propagation) else pytest.raises(Stop)
        with calls:
            sparsewav.prune(
                model, batches, 0.6, calibration=every_frame(propagation), recovery=recovery, progress=progress
            )
        if stage in steps:
            assert same_bytes(model, dense)
        for module, before in zip(model.modules(), dense.modules(), strict=True):
            assert module.training == before.training
            assert module.__dict__.keys() == before.__dict__.keys()
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
        for parameter, before in zip(model.parameters(), dense.parameters(), strict=True):
            assert parameter.requires_grad == before.requires_grad
            assert not parameter._post_accumulate_grad_hooks


def _never(stage: str, propagation: str) -> bool:
    """Tell whether no progress of a stage is reported: layers are solved and recovered one by one, or not at all."""
    return stage == ("recover" if propagation == "parallel" else "solve")


def test_statistics_that_are_not_finite_are_refused_by_name(tiny_model: Factory, batches: list[Batch]) -> None:
    """NaN in a Hessian or a trace, as a damaged cache has it, is an error that names the matrix."""
    model = tiny_model("wav2vec2")
    traces = estimate_traces(model, batches)
    hessians = collect_hessians(model, batches)
    settings = Pruning(sparsity=Unstructured(0.6))
    broken = traces | {QUERY: replace(traces[QUERY], value=float("nan"))}
    with pytest.raises(UserError, match=f"the sensitivity of {QUERY} is nan"):
        prune_model(model, [], settings, hessians=hessians, traces=broken)
    hessians.by_input[hessians.reads[QUERY]][2, 2] = float("inf")
    with pytest.raises(UserError, match=r"the Hessian of wav2vec2\.encoder.* has NaN or infinite"):
        prune_model(model, [], settings, hessians=hessians, traces=traces)


def test_an_option_given_as_its_class(tiny_model: Factory, batches: list[Batch]) -> None:
    """The class in place of an object, an object of another group, and values by position are told apart."""
    model = tiny_model("wav2vec2")
    with pytest.raises(UserError, match=r"solver=ALPS is the class; give an object of it, solver=ALPS\(\)"):
        untyped_prune(model, batches, 0.6, solver=ALPS)
    with pytest.raises(UserError, match="solver=hutchinson does not exist; choose one of obs, obs_refit, alps"):
        untyped_prune(model, batches, 0.6, solver=Hutchinson())
    with pytest.raises(TypeError, match="positional"):
        ALPS(300)  # type: ignore[misc]
