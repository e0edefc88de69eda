"""Models in bitmask format: the same bits come back, and a broken file is refused by name."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCTC, PreTrainedModel

import sparsewav
from sparsewav.models.bitmask import BITMASK_WEIGHTS, decode, encode, export
from sparsewav.pruning.encoder import prunable_matrices

Q_PROJ = "wav2vec2.encoder.layers.0.attention.q_proj.weight"
Tensors = dict[str, Tensor]
Metadata = dict[str, str]


def _prune(model: PreTrainedModel, sparsity: float = 0.8) -> None:
    with torch.no_grad():
        for matrix in prunable_matrices(model):
            scores = matrix.weight.abs()
            matrix.weight[scores <= scores.flatten().kthvalue(int(sparsity * matrix.size)).values] = 0


@pytest.fixture
def dense_folder(tiny_model: Callable[..., PreTrainedModel], tmp_path: Path) -> Path:
    # 15 wide: the last byte of a 15x15 matrix's bitmask has bits left over.
    model = tiny_model("wav2vec2", hidden_size=15, num_attention_heads=3, num_conv_pos_embedding_groups=3)
    _prune(model)
    model.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (8, 16), (7, 9)])
def test_every_bit_of_a_matrix_comes_back(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.7] = 0
    weight[0, 0] = -0.0
    weight[-1, -1] = float("nan")
    bitmask, values = encode(weight)
    kept = [bool(bitmask[i // 8] >> (i % 8) & 1) for i in range(weight.numel())]  # as the format's page has it
    assert torch.equal(weight.flatten()[kept].view(torch.uint8), values.view(torch.uint8))
    assert torch.equal(decode(bitmask, values, shape, "w").view(torch.uint8), weight.view(torch.uint8))


@pytest.mark.parametrize("family", ["wav2vec2", "hubert", "wavlm", "data2vec-audio", "wav2vec2-conformer"])
def test_a_model_of_every_family_comes_back(
    family: str, tiny_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    model = tiny_model(family)
    _prune(model)
    model.save_pretrained(tmp_path / "dense")
    export(tmp_path / "dense", tmp_path / "small")
    export(tmp_path / "small", tmp_path / "again", format="dense")
    assert (
        load_file(tmp_path / "again/model.safetensors").keys() == load_file(tmp_path / "dense/model.safetensors").keys()
    )
    audio = torch.randn(1, 800)
    for folder in ("dense", "small", "again"):
        loaded = sparsewav.load(tmp_path / folder)
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), (folder, name)
        with torch.inference_mode():
            torch.testing.assert_close(loaded(audio).logits, model(audio).logits)
    with pytest.raises(OSError, match="no file named"):  # transformers alone must not fill it with random numbers
        AutoModelForCTC.from_pretrained(tmp_path / "small")


def test_float16_rounds_once_and_halves(dense_folder: Path, tmp_path: Path) -> None:
    export(dense_folder, tmp_path / "half", dtype="float16")
    loaded = sparsewav.load(tmp_path / "half")
    for name, tensor in load_file(dense_folder / "model.safetensors").items():
        assert torch.equal(loaded.state_dict()[name], tensor.half())
    tensors = load_file(dense_folder / "model.safetensors")
    tensors[Q_PROJ][0, 0] = 1e5
    save_file(tensors, dense_folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(sparsewav.UserError, match=f"{Q_PROJ}.*65,504"):
        export(dense_folder, tmp_path / "inf", dtype="float16")
    assert not (tmp_path / "inf").exists()


def _shape(rows: object, cols: object) -> Callable[[Tensors, Metadata], object]:
    def tamper(tensors: Tensors, metadata: Metadata) -> None:
        metadata["shapes"] = json.dumps(json.loads(metadata["shapes"]) | {Q_PROJ: [rows, cols]})

    return tamper


TAMPERED: dict[str, tuple[Callable[[Tensors, Metadata], object], str]] = {
    "count": (lambda t, m: t[f"{Q_PROJ}.bitmask"].bitwise_xor_(1), "counts"),
    "trailing": (lambda t, m: t[f"{Q_PROJ}.bitmask"][-1].bitwise_or_(128), "behind its last weight"),
    "short": (lambda t, m: t.update({f"{Q_PROJ}.bitmask": t[f"{Q_PROJ}.bitmask"][:-1].clone()}), "bytes"),
    "integers": (lambda t, m: t.update({f"{Q_PROJ}.values": t[f"{Q_PROJ}.values"].int()}), "floating-point"),
    "mixed": (lambda t, m: t.update({f"{Q_PROJ}.values": t[f"{Q_PROJ}.values"].half()}), "floating-point types"),
    "wide bits": (lambda t, m: t.update({f"{Q_PROJ}.bitmask": t[f"{Q_PROJ}.bitmask"].int()}), "bytes"),
    "overflow": (_shape(2**62, 2**62), "the shape"),
    "negative": (_shape(-15, -15), "the shape"),
    "transposed size": (_shape(225, 1), "the shape"),
    "fraction": (_shape(15.0, 15.0), "the shape"),
    "no shapes": (lambda t, m: m.pop("shapes"), "shapes"),
    "list": (lambda t, m: m.update(shapes="[]"), "shapes"),
    "nested": (lambda t, m: m.update(shapes="[" * 100_000), "shapes"),
    "version": (lambda t, m: m.update(version="2"), "version '2'"),
    "format": (lambda t, m: m.update(format="pt"), "format 'pt'"),
    "no values": (lambda t, m: t.pop(f"{Q_PROJ}.values"), f"lacks {Q_PROJ}.values"),
    "no head": (lambda t, m: t.pop("lm_head.weight"), "lacks lm_head.weight"),
    "extra": (lambda t, m: t.update(more=torch.zeros(1)), "more"),
    "twice": (lambda t, m: t.update({Q_PROJ: torch.zeros(15, 15)}), "both"),
    "bias": (lambda t, m: t.update({"lm_head.bias": torch.zeros(3)}), "lm_head.bias"),
}


@pytest.mark.parametrize("kind", TAMPERED)
def test_a_tampered_file_is_refused_by_name(kind: str, dense_folder: Path, tmp_path: Path) -> None:
    export(dense_folder, tmp_path / "small")
    path = tmp_path / "small" / BITMASK_WEIGHTS
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tamper, message = TAMPERED[kind]
    tamper(tensors, metadata)
    save_file(tensors, path, metadata)
    with pytest.raises(sparsewav.UserError, match=message) as refused:
        sparsewav.load(tmp_path / "small")
    assert str(tmp_path / "small") in str(refused.value)


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_a_truncated_file_is_refused(length: int, dense_folder: Path, tmp_path: Path) -> None:
    export(dense_folder, tmp_path / "small")
    path = tmp_path / "small" / BITMASK_WEIGHTS
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(sparsewav.UserError, match=BITMASK_WEIGHTS):
        sparsewav.load(tmp_path / "small")


class _Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", BITMASK_WEIGHTS])
def test_a_pickle_is_never_opened(name: str, dense_folder: Path, tmp_path: Path) -> None:
    (dense_folder / "model.safetensors").unlink()
    (dense_folder / name).write_bytes(pickle.dumps(_Trap(tmp_path / "sprung")))
    with pytest.raises(sparsewav.UserError, match=name):
        sparsewav.load(dense_folder)
    assert not (tmp_path / "sprung").exists()


def test_the_command_exports_and_refuses(run_sparsewav: Callable[..., Any], dense_folder: Path) -> None:
    done = run_sparsewav("dense", "small", command="sparsewav-export")
    assert done.returncode == 0, done.stderr
    assert "bitmask" in done.stdout
    again = run_sparsewav("dense", "small", command="sparsewav-export")
    assert again.returncode == 1
    assert again.stderr.count("\n") == 1
    assert "is there already" in again.stderr
