"""Channels of the front end that are removed whole: which, how many, and what the smaller model computes."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCTC

import sparsewav
from sparsewav import Calibration, ErrorCurves, Structured
from sparsewav.errors import UserError
from sparsewav.pruning import layerwise
from sparsewav.pruning.allocation.parts import part_budget
from sparsewav.pruning.channels import ChannelCut, cut_set, fit_norms, front_tensors, put_front, remove_channels
from sparsewav.pruning.encoder import base_of, prunable_matrices
from sparsewav.pruning.hessian import collect_hessian_in_front
from sparsewav.pruning.solvers.groups import remove_groups
from sparsewav.pruning.structure import front_end
from tests.pruning.test_structured import SHAPE, encoder_size, logits

Batch = dict[str, Tensor]

UNEVEN = SHAPE | {"conv_dim": (16, 12, 20), "conv_kernel": (10, 3, 4), "conv_stride": (10, 4, 4)}
"""Convolutions of different widths."""


@pytest.fixture
def batches(noise_batch: Callable[..., Batch]) -> list[Batch]:
    """A batch of padded noise, and one more."""
    return [noise_batch([6000, 5000]), noise_batch([5500], seed=1)]


def smaller_front(model: Any, batches: list[Batch], number: int, **options: Any) -> Any:
    return remove_channels(model, front_end(model), number, batches, 0.01, Calibration(), 0, **options)


@pytest.mark.parametrize(
    ("family", "norm", "asked", "options"),
    [
        ("wav2vec2", "group", Structured(macs=0.97, parts=["channels"]), {"allocation": "uniform"}),
        ("wav2vec2", "layer", Structured(parameters=0.8, parts=["heads", "units", "channels"]), {}),
        ("hubert", "layer", Structured(parameters=0.9, parts=["channels", "units"]), {"allocation": "search"}),
        (
            "hubert",
            "group",
            Structured(parameters=0.9, parts=["channels"]),
            {"allocation": ErrorCurves(effect="fisher"), "calibration": Calibration(propagation="parallel")},
        ),
        (
            "wavlm",
            "layer",
            Structured(macs=0.9, parts=["channels", "units"], uniform=True),
            {"objective": "asymmetric", "recovery": "affine"},
        ),
    ],
)
def test_so_much_of_the_encoder_stays_and_a_checkpoint_computes_the_same(
    tiny_model: Any,
    batches: list[Batch],
    tmp_path: Path,
    family: str,
    norm: str,
    asked: Structured,
    options: dict[str, Any],
) -> None:
    """The share is that of the cut model really, and without heads it is of transformers' own class."""
    model = tiny_model(family, norm, **UNEVEN)
    config, before = model.config, encoder_size(model, asked.counts)
    weights = sum(matrix.size for matrix in prunable_matrices(model, "encoder"))
    options = {"calibration": Calibration(propagation="sequential")} | options
    report = sparsewav.prune(model, batches, asked, **options)
    smaller = sparsewav.cut(model, report)
    assert asked.share is not None
    assert report.share == encoder_size(smaller, asked.counts) / before
    assert report.share <= asked.share
    left = sum(matrix.size for matrix in prunable_matrices(smaller, "encoder"))
    assert report.sparsity == pytest.approx(1 - left / weights)
    torch.testing.assert_close(logits(smaller), logits(model), atol=2e-5, rtol=1e-5)
    table = report.to_frame()
    channels = table[table["kind"] == "channels"]
    assert list(channels["parts"]) == [16, 12, 20] == list(config.conv_dim)  # of what was given, maybe to other models
    assert (
        list(channels["kept"]) == list(smaller.config.conv_dim) == [len(report.kept[name]) for name in channels.index]
    )
    assert channels["relative_error"].between(0, 1).all()
    if asked.parts == ["channels"]:
        assert (channels["kept"] < channels["parts"]).all()
        assert type(smaller) is type(model)
        assert json.loads(json.dumps(smaller.config.to_dict()))["model_type"] == family
    smaller.save_pretrained(tmp_path)
    loaded: Any = AutoModelForCTC.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded), logits(smaller), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("norm", ["group", "layer"])
@pytest.mark.parametrize("family", ["wav2vec2", "hubert"])
def test_every_number_of_channels_takes_what_a_model_of_it_does(tiny_model: Any, family: str, norm: str) -> None:
    for counts in ("parameters", "macs"):
        options = {"conv_bias": norm == "layer"} | ({"feat_proj_layer_norm": False} if family == "hubert" else {})
        model = tiny_model(family, norm, **UNEVEN | options)
        budget = part_budget(model, Structured(parts=["channels"]).changed(**{counts: 0.99}))
        assert budget.front is not None
        dense = front_tensors(model, budget.front)
        assert budget.total == encoder_size(model, counts)
        for number in (1, 7, 10, 19, 20):
            tensors = dense
            for channels, kept in zip(budget.front.sets, budget.front.kept(number), strict=True):
                cut = ChannelCut(torch.arange(kept), channels.reader.weight.detach())
                tensors = cut_set(tensors, channels, cut)
            put_front(model, budget.front, tensors)
            assert budget.share({budget.front.name: number}) * budget.total == pytest.approx(
                encoder_size(model, counts)
            )
            put_front(model, budget.front, dense)


def test_the_channel_goes_that_least_squares_miss_least(tiny_model: Any, batches: list[Batch]) -> None:
    """By brute force over the channels of one convolution, on the unfolded input of the next."""
    model = tiny_model("wav2vec2", "group", **UNEVEN)
    alone = [{"input_values": batch["input_values"][:1, :5000]} for batch in batches]
    channels = front_end(model).sets[0]
    convolution: Any = channels.reader.module
    read: list[Tensor] = []
    with convolution.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0])), torch.no_grad():
        for batch in alone:
            model(**batch)
    rows = torch.cat([item.unfold(2, 3, 4).transpose(1, 2).flatten(2)[0] for item in read]).double()  # channels, kernel
    weight = convolution.weight.detach().flatten(1).double()
    errors, solutions = [], []
    for channel in range(16):
        stays = (torch.arange(48) // 3 != channel).nonzero().squeeze(-1)
        solution = torch.linalg.lstsq(rows[:, stays], rows @ weight.T).solution
        errors.append(float((rows[:, stays] @ solution - rows @ weight.T).square().sum()))
        solutions.append(solution.T)
    found = collect_hessian_in_front(model, channels.reader, alone)
    removal = remove_groups(channels.reader.weight.detach(), found.of(channels.reader.name), 3, [15], 1e-7)[0]
    gone = int(np.argmin(errors))
    assert sorted({*range(16)} - {*removal.kept.tolist()}) == [gone]
    assert removal.error == pytest.approx(errors[gone], rel=1e-2)
    before = copy.deepcopy(base_of(model).feature_extractor)
    done = smaller_front(model, alone, 19)  # of the widest: 15 of these
    assert [report.kept for report, _ in done] == [15, 11, 19]
    first: Any = before.conv_layers[0].conv
    assert torch.equal(first.weight[done[0][1]], base_of(model).feature_extractor.conv_layers[0].conv.weight)
    columns = removal.weight.unflatten(1, (16, 3))[:, removal.kept].flatten(1)
    torch.testing.assert_close(columns.double(), solutions[gone], atol=2e-3, rtol=2e-2)


def test_behind_a_group_norm_the_cut_is_exact(tiny_model: Any, batches: list[Batch]) -> None:
    """The front end without channels puts out what the one does in which nothing reads them."""
    model = tiny_model("wavlm", "group", **UNEVEN)
    front = front_end(model)
    tensors = front_tensors(model, front)
    masked = copy.deepcopy(model)
    for channels in front.sets[:-1]:
        kept = torch.arange(1, channels.count, 2)
        columns = torch.zeros(channels.count).index_fill_(0, kept, 1.0).repeat_interleave(channels.size)
        tensors = cut_set(tensors, channels, ChannelCut(kept, channels.reader.weight.detach() * columns))
        masked.get_submodule(channels.reader.name).weight.data.flatten(1).mul_(columns)
    put_front(model, front, tensors)
    assert model.config.conv_dim == (8, 6, 20)
    torch.testing.assert_close(logits(model), logits(masked), atol=2e-5, rtol=1e-5)


def test_behind_a_layer_norm_the_others_are_fitted(tiny_model: Any, batches: list[Batch]) -> None:
    """The corrected norm is nearer to what the norm over all channels gave, and the projection to its outputs."""
    model = tiny_model("wav2vec2", "layer", **UNEVEN)
    front = front_end(model)
    norms = front.sets[-1].norms
    assert list(norms) == [
        "wav2vec2.feature_extractor.conv_layers.2.layer_norm",
        "wav2vec2.feature_projection.layer_norm",
    ]
    kept = torch.arange(10)
    (name, norm), seen = next(iter(norms.items())), []
    with norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])), torch.no_grad():
        model(batches[1]["input_values"])
    scale, shift = fit_norms(model, batches[1:], front.sets[-1], kept)[name]
    rows = seen[0][0]
    whole, own = nn.functional.layer_norm(rows, (20,))[:, :10], nn.functional.layer_norm(rows[:, :10], (10,))
    assert (own * scale + shift - whole).square().sum() < 0.9 * (own - whole).square().sum()
    line = torch.stack([own[:, 3], torch.ones(len(own))], 1)
    torch.testing.assert_close(torch.linalg.lstsq(line, whole[:, 3]).solution, torch.stack([scale[3], shift[3]]))

    def distance(smaller: Any) -> float:
        with torch.no_grad():
            states = [
                base_of(one).feature_projection(base_of(one).feature_extractor(batches[1]["input_values"]).mT)[0]
                for one in (model, smaller)
            ]
        return float((states[0] - states[1]).square().sum())

    plain, fitted = copy.deepcopy(model), copy.deepcopy(model)
    done = smaller_front(fitted, batches, 14)
    own_front = front_end(plain)
    tensors = front_tensors(plain, own_front)
    for channels, (_, stays) in zip(own_front.sets, done, strict=True):
        hessian = collect_hessian_in_front(plain, channels.reader, batches).of(channels.reader.name)
        removal = remove_groups(channels.reader.weight.detach(), hessian, channels.size, [len(stays)], 0.01)[0]
        tensors = cut_set(tensors, channels, ChannelCut(removal.kept, removal.weight))
    put_front(plain, own_front, tensors)
    assert distance(fitted) < 0.9 * distance(plain)
    asymmetric = copy.deepcopy(model)
    smaller_front(asymmetric, batches, 14, asymmetric=True)
    assert distance(asymmetric) < distance(fitted)


def test_what_cannot_be_is_refused_and_the_model_stays(
    tiny_model: Any, batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("wav2vec2", **UNEVEN)
    before, output = copy.deepcopy(model.state_dict()), logits(model)
    channels = Structured(parameters=0.95, parts=["channels"])
    for asked, options, sentence in (
        (
            Structured(parameters=0.1, parts=["channels"]),
            {},
            "with one channel a convolution .* more of sparsity.parts",
        ),
        (
            Structured(macs=0.01, parts=["heads", "channels"]),
            {},
            "without any heads and with one channel a convolution",
        ),
        (channels, {"scope": "encoder"}, "and channels among sparsity.parts"),
        (channels, {"quantization": "int4"}, "rounds the model that is cut"),
    ):
        with pytest.raises(UserError, match=sentence):
            sparsewav.prune(model, batches, asked, **options)  # type: ignore[arg-type]
    for family in ("sew", "unispeech", "wav2vec2-bert"):
        with pytest.raises(UserError, match=f"channels cannot be removed from a model of the family '{family}'"):
            sparsewav.prune(tiny_model(family), batches, channels)
    sequentially: Any = {"allocation": "uniform", "calibration": Calibration(propagation="sequential")}
    with monkeypatch.context() as patch:  # an error after the front end is smaller
        patch.setattr(layerwise, "first_layer_inputs", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sparsewav.prune(model, batches, Structured(parameters=0.9, parts=["channels", "units"]), **sequentially)
    assert list(model.config.conv_dim) == [16, 12, 20]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(logits(model), output)
    report = sparsewav.prune(model, batches, channels, allocation="uniform")
    with pytest.raises(UserError, match=r"of another model: .*conv_layers\.0\.conv has 16 channels"):
        sparsewav.cut(tiny_model("wav2vec2", **UNEVEN), report)
    again = sparsewav.prune(model, batches, channels, allocation="uniform")  # as the stages of progressive tuning do
    assert again.share is not None
    assert 0.9 < again.share <= 0.95
