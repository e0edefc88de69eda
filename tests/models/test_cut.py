"""A model that was cut computes what the model with zeros in place of the removed parts does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCTC

from sparsewav.models.cut import cut_model
from sparsewav.models.structured import STRUCTURED
from sparsewav.pruning.structure import structures

UNEVEN = {"heads": [[1, 3], [0, 1, 2]], "units": [[0, 5, 23], list(range(2, 24))]}
CUTS: dict[str, dict[str, list[list[int]]]] = {
    "uneven": UNEVEN,
    "even": {"heads": [[1, 3], [0, 2]], "units": [[0, 5, 23], [1, 2, 3]]},
    "no heads in the first": {**UNEVEN, "heads": [[], [0, 3]]},
    "no heads in the last": {**UNEVEN, "heads": [[0, 3], []]},
    "no units": {**UNEVEN, "units": [[], [4]]},
    "biases alone": {"heads": [[], []], "units": [[], []]},
}
"""Heads (of four) and units (of 24) that stay in the two layers."""
MODELS = [(family, norm) for family in STRUCTURED for norm in ("layer", "group")]


def inputs(noise_batch: Any, norm: str) -> dict[str, torch.Tensor]:
    batch = noise_batch([400, 300] if norm == "layer" else [400, 400])
    return {name: value for name, value in batch.items() if name != "labels"}


def zero_and_cut(model: Any, cut: dict[str, list[list[int]]]) -> Any:
    """Zero what reads the parts that go, in place; give the cut model."""
    kept = {}
    for structure in structures(model):
        if structure.kind in cut:
            stays = torch.tensor(cut[structure.kind][structure.layer], dtype=torch.long)
            parts = torch.zeros(structure.count).index_fill_(0, stays, 1.0)
            structure.reader.weight.data.mul_(parts.repeat_interleave(structure.size))
            kept[structure.name] = stays
    return cut_model(model, kept)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize(("family", "norm"), MODELS)
def test_cut_model_computes_what_the_masked_one_does(
    tiny_model: Any, noise_batch: Any, tmp_path: Path, family: str, norm: str, cut: str
) -> None:
    model = tiny_model(family, norm, num_attention_heads=4)
    before = sum(parameter.numel() for parameter in model.parameters())
    smaller = zero_and_cut(model, CUTS[cut])
    smaller.save_pretrained(tmp_path)
    loaded: Any = AutoModelForCTC.from_pretrained(tmp_path)
    assert type(loaded) is type(smaller) is STRUCTURED[family][2]
    batch = inputs(noise_batch, norm)
    with torch.no_grad():
        expected, computed = model(**batch).logits, smaller(**batch).logits
        torch.testing.assert_close(computed, expected, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(loaded(**batch).logits, computed, atol=2e-5, rtol=1e-4)
    gone = 0
    for heads, units in zip(*CUTS[cut].values(), strict=True):
        # A head: three matrices of 4 rows with their biases, 4 columns of the last; a unit: a row, its bias, a column.
        gone += (4 - len(heads)) * (3 * 4 * 17 + 4 * 16 + (family == "wavlm")) + (24 - len(units)) * 33
        if not heads and family == "wavlm":
            gone += 4 * 8 + 8  # the gate of the position bias
    assert sum(parameter.numel() for parameter in smaller.parameters()) == before - gone
