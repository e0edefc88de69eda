"""Models in bitmask format: the same bits come back, and a broken file is refused by name."""

import json
import os
import pickle
import re
import shutil
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
from sparsewav.models.checkpoint import checksum
from sparsewav.pruning.encoder import prunable_matrices

Q_PROJ = "wav2vec2.encoder.layers.0.attention.q_proj.weight"
NORM, NORM_BIAS = (f"wav2vec2.encoder.layers.0.layer_norm.{kind}" for kind in ("weight", "bias"))
BIAS = "lm_head.bias"
Tensors = dict[str, Tensor]
Header = dict[str, Any]


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


def _shape(rows: object, cols: object) -> Callable[[Tensors, Header], object]:
    return lambda tensors, header: header["shapes"].update({Q_PROJ: [rows, cols]})


# What contradicts the model is refused also where somebody has made the checksum fit.
TAMPERED: dict[str, tuple[Callable[[Tensors, Header], object], str]] = {
    "count": (lambda t, h: t[f"{Q_PROJ}.bitmask"].bitwise_xor_(1), "counts"),
    "trailing": (lambda t, h: t[f"{Q_PROJ}.bitmask"][-1].bitwise_or_(128), "behind its last weight"),
    "short": (lambda t, h: t.update({f"{Q_PROJ}.bitmask": t[f"{Q_PROJ}.bitmask"][:-1].clone()}), "bytes"),
    "integers": (lambda t, h: t.update({f"{Q_PROJ}.values": t[f"{Q_PROJ}.values"].int()}), "floating-point"),
    "mixed": (lambda t, h: t.update({f"{Q_PROJ}.values": t[f"{Q_PROJ}.values"].half()}), "floating-point types"),
    "wide bits": (lambda t, h: t.update({f"{Q_PROJ}.bitmask": t[f"{Q_PROJ}.bitmask"].int()}), "bytes"),
    "relabelled bias": (
        lambda t, h: t.update({"lm_head.bias": t["lm_head.bias"].view(torch.int32)}),
        "lm_head.bias in",
    ),
    "relabelled norm": (lambda t, h: t.update({NORM: t[NORM].view(torch.int32)}), f"{NORM} in int32"),
    "infinite": (lambda t, h: t[NORM].fill_(float("inf")), f"{NORM} that are NaN or infinite"),
    "overflow": (_shape(2**62, 2**62), "the shape"),
    "negative": (_shape(-15, -15), "the shape"),
    "transposed size": (_shape(225, 1), "the shape"),
    "fraction": (_shape(15.0, 15.0), "the shape"),
    "no shapes": (lambda t, h: h.pop("shapes"), "shapes"),
    "list": (lambda t, h: h.update(shapes=[]), "shapes"),
    "version": (lambda t, h: h.update(version=3), "version 3"),
    "no values": (lambda t, h: t.pop(f"{Q_PROJ}.values"), f"lacks {Q_PROJ}.values"),
    "no head": (lambda t, h: t.pop("lm_head.weight"), "lacks lm_head.weight"),
    "extra": (lambda t, h: t.update(more=torch.zeros(1)), "more"),
    "twice": (lambda t, h: t.update({Q_PROJ: torch.zeros(15, 15)}), "both"),
    "bias": (lambda t, h: t.update({"lm_head.bias": torch.zeros(3)}), "lm_head.bias"),
}


def _tampered(folder: Path, tamper: Callable[[Tensors, Header], object], *, sealed: bool) -> str:
    """Change a file, with the checksum that fits or with the one it had; give the message with which it is refused."""
    path = folder / BITMASK_WEIGHTS
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["sparsewav-bitmask"])
    tamper(tensors, header)
    if sealed:
        header["checksum"] = checksum(tensors, json.dumps(header.get("shapes"), sort_keys=True))
    save_file(tensors, path, {"sparsewav-bitmask": json.dumps(header)})
    with pytest.raises(sparsewav.UserError) as refused:
        sparsewav.load(folder)
    assert str(folder) in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("kind", TAMPERED)
def test_a_tampered_file_is_refused_by_name(kind: str, dense_folder: Path, tmp_path: Path) -> None:
    export(dense_folder, tmp_path / "small")
    tamper, message = TAMPERED[kind]
    assert re.search(message, _tampered(tmp_path / "small", tamper, sealed=True))


def _move_a_bit(tensors: Tensors, header: Header) -> None:
    """Keep another weight of the first eight than the one that was kept; the count stays."""
    bits = tensors[f"{Q_PROJ}.bitmask"]
    byte = next(index for index, value in enumerate(bits.tolist()) if value not in (0, 255))
    value = int(bits[byte])
    kept, lost = (next(bit for bit in range(8) if value >> bit & 1 == wanted) for wanted in (1, 0))
    bits[byte] = value ^ (1 << kept) ^ (1 << lost)


CORRUPTED: dict[str, Callable[[Tensors, Header], object]] = {
    "mask": _move_a_bit,
    "value": lambda t, h: t[f"{Q_PROJ}.values"].view(torch.int32)[0].bitwise_xor_(1 << 23),
    "bias": lambda t, h: t["lm_head.bias"].view(torch.int32)[0].bitwise_xor_(1),
    "swapped": lambda t, h: t.update(
        {NORM: t[NORM.replace("weight", "bias")], NORM.replace("weight", "bias"): t[NORM]}
    ),
    "checksum": lambda t, h: h.update(checksum="0" * 64),
    "no checksum": lambda t, h: h.pop("checksum"),
}


@pytest.mark.parametrize("kind", CORRUPTED)
def test_a_flipped_bit_is_refused(kind: str, dense_folder: Path, tmp_path: Path) -> None:
    """Names, shapes, types and counts are those of the model, and the numbers are not."""
    export(dense_folder, tmp_path / "small")
    assert "does not have the checksum" in _tampered(tmp_path / "small", CORRUPTED[kind], sealed=False)


@pytest.mark.parametrize(
    "metadata",
    [
        {"format": "sparsewav-bitmask", "version": "1", "shapes": "{}"},
        {"format": "pt"},
        {"sparsewav-bitmask": "[" * 100_000},
        {"sparsewav-bitmask": "[]"},
    ],
)
def test_another_header_is_refused(metadata: dict[str, str], dense_folder: Path, tmp_path: Path) -> None:
    export(dense_folder, tmp_path / "small")
    path = tmp_path / "small" / BITMASK_WEIGHTS
    save_file({name: tensor.clone() for name, tensor in load_file(path).items()}, path, metadata)
    with pytest.raises(sparsewav.UserError, match=f"{BITMASK_WEIGHTS} has no readable header .* version 2"):
        sparsewav.load(tmp_path / "small")


def test_exports_of_a_model_are_the_same_bytes(dense_folder: Path, tmp_path: Path) -> None:
    """In both formats: safetensors writes several entries of a header in another order every time."""
    for format, name in (("bitmask", BITMASK_WEIGHTS), ("dense", "model.safetensors")):
        folders = [export(dense_folder, tmp_path / f"{format}-{number}", format) for number in range(5)]
        assert len({(folder / name).read_bytes() for folder in folders}) == 1


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
    run = dense_folder.parent / "run"
    shutil.copytree(dense_folder, run / "model")
    done = run_sparsewav("run", "small", command="sparsewav-export")
    assert done.returncode == 0, done.stderr
    assert "bitmask" in done.stdout
    again = run_sparsewav("dense", "small", command="sparsewav-export")
    assert again.returncode == 1
    assert again.stderr.count("\n") == 1
    assert "is there already" in again.stderr
