"""A model that was cut computes what the model with zeros in place of the removed parts does."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCTC

from sparsewav import UserError
from sparsewav.baselines.cut import cut
from sparsewav.baselines.gates import Gates
from sparsewav.models.cut import cut_model
from sparsewav.models.structured import STRUCTURED
from sparsewav.pruning.encoder import base_of
from sparsewav.pruning.families import left_dense
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


def zero_and_cut(model: Any, parts: dict[str, list[list[int]]]) -> Any:
    """Zero what reads the parts that go, in place; give the cut model."""
    kept = {}
    for structure in structures(model):
        if structure.kind in parts:
            stays = torch.tensor(parts[structure.kind][structure.layer], dtype=torch.long)
            mask = torch.zeros(structure.count).index_fill_(0, stays, 1.0)
            structure.reader.weight.data.mul_(mask.repeat_interleave(structure.size))
            kept[structure.name] = stays
    return cut_model(model, kept)


@pytest.mark.parametrize("case", CUTS)
@pytest.mark.parametrize(("family", "norm"), MODELS)
def test_cut_model_computes_what_the_masked_one_does(
    tiny_model: Any, noise_batch: Any, tmp_path: Path, family: str, norm: str, case: str
) -> None:
    model = tiny_model(family, norm, num_attention_heads=4)
    before = sum(parameter.numel() for parameter in model.parameters())
    smaller = zero_and_cut(model, CUTS[case])
    smaller.save_pretrained(tmp_path)
    loaded: Any = AutoModelForCTC.from_pretrained(tmp_path)
    assert type(loaded) is type(smaller) is STRUCTURED[family][2]
    batch = inputs(noise_batch, norm)
    with torch.no_grad():
        expected, computed = model(**batch).logits, smaller(**batch).logits
        torch.testing.assert_close(computed, expected, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(loaded(**batch).logits, computed, atol=2e-5, rtol=1e-4)
    gone = 0
    for heads, units in zip(*CUTS[case].values(), strict=True):
        # A head: three matrices of 4 rows with their biases, 4 columns of the last; a unit: a row, its bias, a column.
        gone += (4 - len(heads)) * (3 * 4 * 17 + 4 * 16 + (family == "wavlm")) + (24 - len(units)) * 33
        if not heads and family == "wavlm":
            gone += 4 * 8 + 8  # the gate of the position bias
    assert sum(parameter.numel() for parameter in smaller.parameters()) == before - gone


@pytest.mark.parametrize(("family", "norm"), MODELS)
def test_model_with_all_heads_and_equal_layers_stays_of_its_class(
    tiny_model: Any, noise_batch: Any, tmp_path: Path, family: str, norm: str
) -> None:
    model = tiny_model(family, norm)
    smaller = zero_and_cut(model, {"units": [[0, 5, 23], [1, 2, 3]]})
    smaller.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["model_type"], saved["architectures"]) == (family, [type(model).__name__])
    assert saved["intermediate_size"] == 3
    loaded: Any = AutoModelForCTC.from_pretrained(tmp_path)
    batch = inputs(noise_batch, norm)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", STRUCTURED)
def test_cut_model_is_cut_again(tiny_model: Any, noise_batch: Any, family: str) -> None:
    """As the stages of progressive fine-tuning do; the heads of WavLM keep their own position bias."""
    model = zero_and_cut(tiny_model(family, "layer", num_attention_heads=4), UNEVEN)
    assert [structure.count for structure in structures(model)] == [2, 3, 3, 22]
    assert "not known" not in left_dense(model).values()
    smaller = zero_and_cut(model, {"heads": [[1], [0, 2]], "units": [[], [0, 7]]})
    assert [layer["heads"] for layer in smaller.config.layers] == [[3], [0, 2]]
    assert [layer["units"] for layer in smaller.config.layers] == [0, 2]
    smallest = zero_and_cut(smaller, {"heads": [[], [1]]})  # of one layer there was only a bias left
    batch = inputs(noise_batch, "layer")
    with torch.no_grad():
        torch.testing.assert_close(smallest(**batch).logits, smaller(**batch).logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", STRUCTURED)
@pytest.mark.parametrize("parts", [UNEVEN, {"units": [[1], [2]]}])
def test_encoder_without_a_head_is_cut(
    tiny_model: Any, noise_batch: Any, tmp_path: Path, family: str, parts: dict[str, list[list[int]]]
) -> None:
    model = base_of(tiny_model(family, "group", num_attention_heads=4)).eval()
    smaller = zero_and_cut(model, parts)
    smaller.save_pretrained(tmp_path)
    loaded: Any = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is type(smaller) is (STRUCTURED[family][1] if parts is UNEVEN else type(model))
    batch = inputs(noise_batch, "group")
    with torch.no_grad():
        expected = model(**batch).last_hidden_state
        torch.testing.assert_close(loaded(**batch).last_hidden_state, expected, atol=2e-5, rtol=1e-4)


def test_cut_model_is_one_of_its_own(tiny_model: Any) -> None:
    """It keeps the precision, shares no memory with the model, learns, and draws no random numbers."""
    model = tiny_model("hubert").to(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    smaller = cut_model(model, {structures(model)[0].name: torch.tensor([1])})
    assert torch.equal(torch.get_rng_state(), state)
    assert smaller.dtype == torch.bfloat16
    for parameter in smaller.parameters():
        assert parameter.requires_grad
        parameter.data.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", ["wav2vec2-conformer", "sew-d", "parakeet_ctc"])
def test_families_that_cannot_be_cut_are_refused(tiny_model: Any, family: str) -> None:
    with pytest.raises(UserError, match=f"family '{family}'.* of wav2vec2, hubert, wavlm, or sparsity=unstructured"):
        structures(tiny_model(family))


def test_heads_that_lost_dimensions_are_refused(tiny_model: Any) -> None:
    model = tiny_model("hubert")
    gates = Gates(model, ("head_dims",), {"head_dims": 0.5})
    with torch.no_grad():
        for _, gate in gates.items():
            gate.log_alpha.copy_(torch.arange(len(gate.log_alpha)) - 5.5)
    with pytest.raises(UserError, match=r"heads of hubert\.encoder\.layers\.0\.attention have lost dimensions"):
        structures(cut(model, gates))


def test_parts_that_the_model_does_not_have_are_refused(tiny_model: Any) -> None:
    model = tiny_model("hubert")
    with pytest.raises(ValueError, match=r"no structure hubert\.encoder\.layers\.7\.attention"):
        cut_model(model, {"hubert.encoder.layers.7.attention": torch.tensor([0])})
    with pytest.raises(ValueError, match="has 2 parts"):
        cut_model(model, {"hubert.encoder.layers.0.attention": torch.tensor([2])})
