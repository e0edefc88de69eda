"""Heads and units that are removed whole: how many, what stays, and what the cut model computes."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import sparsewav
from sparsewav import Calibration, PruneReport, Reconstruction, Structured
from sparsewav.errors import UserError
from sparsewav.models.cut import cut_model
from sparsewav.pruning.allocation.parts import part_budget
from sparsewav.pruning.encoder import base_of, prunable_matrices
from sparsewav.pruning.macs import counted_modules

Batch = dict[str, Tensor]

SHAPE = {"num_attention_heads": 4, "intermediate_size": 48, "conv_kernel": (8, 20), "conv_stride": (8, 20)}


@pytest.fixture
def batches(noise_batch: Callable[..., Batch]) -> list[Batch]:
    """A batch of padded noise, and one more."""
    return [noise_batch([4000, 3000]), noise_batch([3500], seed=1)]


def encoder_size(model: Any, counts: str) -> int:
    """Count the parameters of an encoder, or its multiply-accumulates for ten seconds."""
    if counts == "macs":
        return counted_modules(base_of(model), torch.zeros(1, 160_000))[""]
    return sum(parameter.numel() for parameter in base_of(model).parameters())


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(torch.randn(2, 4000, generator=torch.Generator().manual_seed(5))).logits


@pytest.mark.parametrize(
    ("family", "norm", "asked", "options"),
    [
        ("wav2vec2", "layer", Structured(parameters=0.8), {}),
        ("wav2vec2", "group", Structured(macs=0.85), {"allocation": "uniform"}),
        ("hubert", "group", Structured(parameters=0.8, uniform=True), {}),
        ("hubert", "layer", Structured(parameters=0.9, parts=["units"]), {"allocation": "search"}),
        ("wavlm", "group", Structured(macs=0.8), {}),
        ("wavlm", "layer", Structured(parameters=0.8), {"allocation": "uniform"}),
    ],
)
def test_so_much_of_the_encoder_stays_and_the_cut_model_computes_the_same(
    tiny_model: Any, batches: list[Batch], family: str, norm: str, asked: Structured, options: dict[str, str]
) -> None:
    """The share is that of the cut model really; a unit more in every layer would be too much."""
    model = tiny_model(family, norm, **SHAPE)
    before, weights = encoder_size(model, asked.counts), sum(matrix.size for matrix in prunable_matrices(model))
    report = sparsewav.prune(model, batches, asked, **options)  # type: ignore[arg-type]
    smaller = sparsewav.cut(model, report)
    assert asked.share is not None
    assert report.share == encoder_size(smaller, asked.counts) / before
    assert report.share <= asked.share
    unit = 2 * model.config.hidden_size * (1000 if asked.counts == "macs" else 1) + (asked.counts != "macs")
    table = report.to_frame()
    units = table[table["kind"] == "units"]
    if (units["kept"] < units["parts"]).all():
        assert encoder_size(smaller, asked.counts) + 2 * unit > asked.share * before
    assert report.sparsity == pytest.approx(1 - sum(matrix.size for matrix in prunable_matrices(smaller)) / weights)
    torch.testing.assert_close(logits(smaller), logits(model), atol=2e-5, rtol=1e-5)
    assert (table["kept"] < table["parts"]).any()
    sizes = table.groupby("kind")["kept"].nunique()
    if asked.uniform or options.get("allocation") == "uniform":
        assert (sizes == 1).all()
    if asked.parts == ["units"]:
        assert list(sizes.index) == ["units"]
        assert type(smaller).__name__.startswith("Structured") == (sizes["units"] > 1)


def test_the_levels_are_the_cheapest_that_fit(tiny_model: Any) -> None:
    """By brute force over all choices, for all layers alike and for each alone."""
    model = tiny_model("wav2vec2", **SHAPE)
    generator = np.random.default_rng(0)
    for uniform in (False, True):
        budget = part_budget(model, Structured(parameters=0.8, uniform=uniform))
        names, kinds = list(budget.structures), [structure.kind for structure in budget.structures.values()]
        costs = {name: np.sort(generator.random(3))[::-1].copy() for name in names}
        sizes = {name: own[[0, len(own) // 2, -1]] for name, own in budget.amounts.items()}
        every = pandas.DataFrame(np.ndindex(*[3] * len(names)), columns=names)
        alike = every.apply(lambda choice, kinds=kinds: len(set(zip(kinds, choice, strict=True))) == 2, axis=1)
        every["size"], every["cost"] = (sum(own[name][every[name]] for name in names) for own in (sizes, costs))
        # Sizes are rounded up to a 1600th of the budget, four times at most.
        fitting = every[(every["size"] <= 0.997 * budget.room) & (alike | (not uniform))]
        chosen = every[(every[names] == budget.choose(costs, sizes)).all(axis=1)].squeeze()
        assert chosen["size"] <= budget.room
        assert chosen["cost"] <= fitting["cost"].min()
        assert alike[chosen.name] or not uniform


def test_learned_layers_lose_less_and_removed_parts_stay_removed(tiny_model: Any, batches: list[Batch]) -> None:
    model = tiny_model("wav2vec2", **SHAPE)
    report = sparsewav.prune(
        model,
        batches,
        Structured(parameters=0.8),
        allocation="uniform",
        objective="asymmetric",
        recovery=Reconstruction(steps=40),
        calibration=Calibration(propagation="true_sequential"),
    )
    torch.testing.assert_close(logits(sparsewav.cut(model, report)), logits(model), atol=2e-5, rtol=1e-5)
    assert all(item.error < 0.9 * item.error_before for item in report.recoveries)


def test_a_layer_without_any_heads_left_learns_all_the_same(tiny_model: Any, batches: list[Batch]) -> None:
    """The norm before its attention has no part in what it puts out."""
    model = tiny_model("wav2vec2", "layer", **SHAPE)
    heads = [f"wav2vec2.encoder.layers.{index}.attention" for index in range(2)]
    model = cut_model(model, {heads[0]: torch.arange(0), heads[1]: torch.arange(2)})
    report = sparsewav.prune(
        model,
        batches,
        Structured(parameters=0.9),
        allocation="uniform",
        recovery=Reconstruction(steps=5),
        calibration=Calibration(propagation="sequential"),
    )
    assert len(report.recoveries) == 2
    assert not any(recovery.diverged for recovery in report.recoveries)


def test_what_cannot_be_is_refused_and_the_model_stays(tiny_model: Any, batches: list[Batch]) -> None:
    model = tiny_model("wav2vec2", **SHAPE)
    before = copy.deepcopy(model.state_dict())
    name = prunable_matrices(model)[0].name
    masks = {name: prunable_matrices(model)[0].weight != 0}
    for sparsity, options, sentence in (
        (Structured(parameters=0.1), {}, r"out of reach: without any heads and units .* choose at least 0\.\d+"),
        (Structured(parameters=0.5, parts=["heads"]), {}, "or more of sparsity.parts"),
        (Structured(), {}, "does not say how small"),
        (Structured(parameters=0.5, macs=0.5), {}, "are two sizes"),
        (Structured(parameters=0.5, parts=["layers"]), {}, "must be some of heads, units"),
        (Structured(parameters=0.8), {"allocation": "hawq"}, "choose allocation=error_curves"),
        (Structured(parameters=0.8, uniform=True), {"allocation": "search"}, "gives all the same"),
        (Structured(parameters=0.8), {"solver": "alps"}, "choose solver=obs"),
        (Structured(parameters=0.8), {"saliency": "wanda"}, "choose saliency=obs"),
        (Structured(parameters=0.8), {"quantization": "int4"}, "rounds the model that is cut"),
        (Structured(parameters=0.8), {"masks": masks}, "give no masks"),
    ):
        with pytest.raises(UserError, match=sentence):
            sparsewav.prune(model, batches, sparsity, **options)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="heads and units cannot be removed from a model of the family 'sew'"):
        sparsewav.prune(tiny_model("sew"), batches, Structured(parameters=0.8))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    report = sparsewav.prune(model, batches, Structured(parameters=0.8))
    with pytest.raises(UserError, match="has weights that the report says are zero"):
        sparsewav.cut(tiny_model("wav2vec2", **SHAPE), report)
    with pytest.raises(UserError, match="of another model"):
        sparsewav.cut(sparsewav.cut(model, report), report)
    with pytest.raises(UserError, match=r"prune with sparsewav\.Structured"):
        sparsewav.cut(model, PruneReport([], {}, 0.0, 0.0, {}))
    uneven = sparsewav.cut(model, report)
    if report.to_frame().groupby("kind")["kept"].nunique().max() > 1:
        with pytest.raises(UserError, match=r"choose sparsity\.uniform=false"):
            sparsewav.prune(uneven, batches, Structured(parameters=0.95, uniform=True))
