"""Models in bitmask format: the same bits come back, and a broken file is refused by name."""

import hashlib
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
from sparsewav.models.bitmask import BITMASK_WEIGHTS, export
from sparsewav.models.checkpoint import checksum
from sparsewav.pruning.encoder import prunable_matrices
from sparsewav.pruning.encoding import file_bytes
from sparsewav.pruning.families import FAMILIES

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


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_every_family_comes_back(
    family: str,
    rounded: bool,
    tiny_model: Callable[..., PreTrainedModel],
    noise_batch: Callable[..., dict[str, Tensor]],
    model_input: Callable[..., dict[str, Tensor]],
    tmp_path: Path,
) -> None:
    model = tiny_model(family)
    _prune(model)
    if rounded:
        _round(model)
    model.save_pretrained(tmp_path / "dense")
    export(tmp_path / "dense", tmp_path / "small")
    export(tmp_path / "small", tmp_path / "again", format="dense")
    assert (
        load_file(tmp_path / "again/model.safetensors").keys() == load_file(tmp_path / "dense/model.safetensors").keys()
    )
    audio = model_input(model, noise_batch([800]))
    model = sparsewav.load(tmp_path / "dense")  # which has the attention of a loaded model
    for folder in ("small", "again"):
        loaded = sparsewav.load(tmp_path / folder)
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), (folder, name)
        with torch.inference_mode():
            assert torch.equal(loaded(**audio).logits, model(**audio).logits)
    with pytest.raises(OSError, match="no file named"):  # transformers alone must not fill it with random numbers
        AutoModelForCTC.from_pretrained(tmp_path / "small")


def _round(model: PreTrainedModel, group: int = 8, significant: int = 11) -> PreTrainedModel:
    """Round every matrix to 3 bits in groups of a row, scales and all."""
    with torch.no_grad():
        for matrix in prunable_matrices(model):
            for part in matrix.weight.split(group, dim=1):
                mantissa, exponent = (part.abs().amax(1, keepdim=True) / 3).frexp()
                scale = torch.ldexp((mantissa * 2**significant).round() / 2**significant, exponent)
                part.copy_((part / scale).nan_to_num().round() * scale + 0.0)
    return model


@pytest.mark.parametrize("family", ["wav2vec2", "wavlm", "wav2vec2-conformer"])
def test_a_rounded_model_comes_back_and_its_size_is_known_without_a_file(
    family: str, tiny_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    model = _round(tiny_model(family, hidden_size=48, intermediate_size=96))
    model.save_pretrained(tmp_path / "dense")
    small = export(tmp_path / "dense", tmp_path / "small") / BITMASK_WEIGHTS
    export(tmp_path / "small", tmp_path / "again", format="dense")
    loaded = sparsewav.load(tmp_path / "small")
    assert type(loaded) is type(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    dense, again = (load_file(tmp_path / folder / "model.safetensors") for folder in ("dense", "again"))
    assert dense.keys() == again.keys()
    assert small.stat().st_size == file_bytes(dense) == file_bytes(model.state_dict())
    with safe_open(small, framework="pt") as file:
        coded = json.loads(file.metadata()["sparsewav-bitmask"])["coded"]
    assert {name for name, entry in coded.items() if entry.get("group") == 8} >= {
        f"{matrix.name}.weight" for matrix in prunable_matrices(model)
    }


def test_float16_is_refused_where_it_would_take_more_bytes(
    tiny_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    """Products with scales of eleven significant bits are no numbers of float16; those with scales of eight are."""
    _round(tiny_model("wav2vec2")).save_pretrained(tmp_path / "eleven")
    with pytest.raises(sparsewav.UserError, match=r"float16 does not hold .*, and the file would grow"):
        export(tmp_path / "eleven", tmp_path / "small", dtype="float16")
    assert not (tmp_path / "small").exists()
    model = _round(tiny_model("wav2vec2"), significant=8)
    model.save_pretrained(tmp_path / "eight")
    whole, half = (export(tmp_path / "eight", tmp_path / dtype, dtype=dtype) for dtype in ("model", "float16"))
    assert (half / BITMASK_WEIGHTS).stat().st_size < (whole / BITMASK_WEIGHTS).stat().st_size
    state = sparsewav.load(half).state_dict()
    for matrix in prunable_matrices(model):
        assert torch.equal(state[f"{matrix.name}.weight"].float(), matrix.weight)


@pytest.mark.parametrize("version", [1, 2])
def test_files_of_older_versions_load(version: int, dense_folder: Path, tmp_path: Path) -> None:
    """As they were written then, and damage of them is found as it was then."""
    tensors = load_file(dense_folder / "model.safetensors")
    stored, shapes = dict(tensors), {}
    for name in [name for name in tensors if re.search(r"proj\.weight$|dense\.weight$", name) and "layers" in name]:
        weight = stored.pop(name)
        bits = [int(value != 0) for value in weight.flatten()]
        octets = [sum(bit << place for place, bit in enumerate(bits[at : at + 8])) for at in range(0, len(bits), 8)]
        stored[f"{name}.bitmask"] = torch.tensor(octets, dtype=torch.uint8)
        stored[f"{name}.values"] = weight[weight != 0]
        shapes[name] = list(weight.shape)
    assert len(shapes) >= 8
    listed = json.dumps(shapes, sort_keys=True)
    if version == 1:
        metadata = {"format": "sparsewav-bitmask", "version": "1", "shapes": listed}
    else:
        digest = hashlib.sha256(listed.encode())
        for name, tensor in sorted(stored.items()):
            digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode() + tensor.numpy().tobytes())
        header = {"version": 2, "shapes": shapes, "checksum": digest.hexdigest()}
        metadata = {"sparsewav-bitmask": json.dumps(header, sort_keys=True)}
    small = tmp_path / "small"
    shutil.copytree(dense_folder, small, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(stored, small / BITMASK_WEIGHTS, metadata)
    state = sparsewav.load(small).state_dict()
    for name, tensor in sparsewav.load(dense_folder).state_dict().items():
        assert torch.equal(state[name], tensor), name
    bits = stored[f"{Q_PROJ}.bitmask"]
    for change, complaint in ((1, "counts"), (128, "behind its last weight")):
        damaged = torch.cat([bits[:-1], bits[-1:] ^ change])
        save_file(stored | {f"{Q_PROJ}.bitmask": damaged}, small / BITMASK_WEIGHTS, metadata)
        with pytest.raises(sparsewav.UserError, match=complaint):
            sparsewav.load(small)
    flipped = stored | {NORM: stored[NORM].flip(0).contiguous()}
    if version == 2:
        save_file(flipped, small / BITMASK_WEIGHTS, metadata)
        with pytest.raises(sparsewav.UserError, match="checksum"):
            sparsewav.load(small)


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


def _entry(**changes: object) -> Callable[[Tensors, Header], object]:
    return lambda tensors, header: header["coded"][Q_PROJ].update(changes)


def _flip(place: int, mask: int) -> Callable[[Tensors, Header], object]:
    return lambda tensors, header: tensors[Q_PROJ][place].bitwise_xor_(mask)


# What contradicts the model is refused also where somebody has made the checksum fit.
TAMPERED: dict[str, tuple[Callable[[Tensors, Header], object], str]] = {
    "short": (lambda t, h: t.update({Q_PROJ: t[Q_PROJ][:-1].clone()}), "not a row of .* bytes"),
    "wide": (lambda t, h: t.update({Q_PROJ: t[Q_PROJ].int()}), "not a row of .* bytes"),
    "count": (lambda t, h: h["coded"][Q_PROJ]["bytes"].__setitem__(0, 3), "not a row of .* bytes"),
    "trailing": (_flip(28, 128), "behind its last weight"),
    "other count": (_flip(3, 1), "kept weights and the file has"),
    "mixed": (_entry(dtype="float16"), "floating-point types"),
    "no type": (_entry(values="int8"), "no readable entry"),
    "both kinds": (_entry(group=3), "no readable entry"),
    "relabelled bias": (
        lambda t, h: t.update({"lm_head.bias": t["lm_head.bias"].view(torch.int32)}),
        "lm_head.bias in",
    ),
    "relabelled norm": (lambda t, h: t.update({NORM: t[NORM].view(torch.int32)}), f"{NORM} in int32"),
    "infinite": (lambda t, h: t[NORM].fill_(float("inf")), f"{NORM} that are NaN or infinite"),
    "overflow": (_entry(shape=[2**62, 2**62]), "the shape"),
    "negative": (_entry(shape=[-15, -15]), "no readable entry"),
    "long": (_entry(shape=[1] * 100_000), "the shape"),
    "named in two lines": (
        lambda t, h: h["coded"].update({"more\nthan": h["coded"][Q_PROJ]}),
        r"more\\nthan', which is no",
    ),
    "a long name": (lambda t, h: h["coded"].update({"x" * 100_000: h["coded"][Q_PROJ]}), "xxx..., which is no matrix"),
    "an extra name in two lines": (lambda t, h: t.update({"more\nthan": torch.zeros(1)}), r"nothing of: 'more\\nthan'"),
    "transposed size": (_entry(shape=[225, 1]), "the shape"),
    "fraction": (_entry(shape=[15.0, 15.0]), "no readable entry"),
    "no entries": (lambda t, h: h.update(coded=None), "no readable header"),
    "list": (lambda t, h: h.update(coded=[]), "no readable header"),
    "not a type": (lambda t, h: h.update(float16="int8"), "no readable header"),
    "version": (lambda t, h: h.update(version=4), "version 4"),
    "older version": (lambda t, h: h.update(version=1), "version 1"),
    "no bytes": (lambda t, h: t.pop(Q_PROJ), f"lacks {Q_PROJ}"),
    "no head": (lambda t, h: t.pop("lm_head.bias"), "lacks lm_head.bias"),
    "extra": (lambda t, h: t.update(more=torch.zeros(1)), "more"),
    "unknown": (lambda t, h: h["coded"].update(more=h["coded"][Q_PROJ]), "more, which is no matrix"),
    "one tensor by two names": (
        lambda t, h: t.update({NORM.removeprefix("wav2vec2."): t[NORM] + 1}),
        f"has {NORM.removeprefix('wav2vec2.')} and {NORM}, of which the model has one",
    ),
    "bias": (lambda t, h: t.update({"lm_head.bias": torch.zeros(3)}), "lm_head.bias"),
}


def _change(folder: Path, tamper: Callable[[Tensors, Header], object], *, sealed: bool) -> None:
    """Change a file, with the checksum that fits or with the one it had."""
    path = folder / BITMASK_WEIGHTS
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["sparsewav-bitmask"])
    tamper(tensors, header)
    if sealed:
        header.pop("checksum")
        header["checksum"] = checksum(tensors, json.dumps(header, sort_keys=True, separators=(",", ":")))
    save_file(tensors, path, {"sparsewav-bitmask": json.dumps(header)})


def _tampered(folder: Path, tamper: Callable[[Tensors, Header], object], *, sealed: bool) -> str:
    """Change a file so, and give the message with which it is refused."""
    _change(folder, tamper, sealed=sealed)
    with pytest.raises(sparsewav.UserError) as refused:
        sparsewav.load(folder)
    assert str(folder) in str(refused.value)
    assert re.fullmatch(".*; .*", str(refused.value)), "one line, with what to do"
    assert len(str(refused.value)) < 1500
    return str(refused.value)


@pytest.mark.parametrize("kind", TAMPERED)
def test_a_tampered_file_is_refused_by_name(kind: str, dense_folder: Path, tmp_path: Path) -> None:
    export(dense_folder, tmp_path / "small")
    tamper, message = TAMPERED[kind]
    assert re.search(message, _tampered(tmp_path / "small", tamper, sealed=True))


def test_scales_that_make_infinite_weights_are_refused(
    tiny_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    """Scales may be finite where their products with whole numbers are not; in half precision fewer products are."""
    _round(tiny_model("wav2vec2")).save_pretrained(tmp_path / "dense")
    export(tmp_path / "dense", tmp_path / "small")
    path = tmp_path / "small" / BITMASK_WEIGHTS
    written = path.read_bytes()
    largest = load_file(tmp_path / "dense/model.safetensors")[Q_PROJ].abs().max().log2().floor().int()

    def grow(exponent: int) -> Callable[[Tensors, Header], object]:
        """Give the largest weight this power of two, rounded down."""
        return lambda tensors, header: header["coded"][Q_PROJ].update(
            shift=header["coded"][Q_PROJ]["shift"] + exponent - int(largest)
        )

    _change(tmp_path / "small", grow(127), sealed=True)
    assert sparsewav.load(tmp_path / "small").state_dict()[Q_PROJ].abs().max() >= 2.0**127
    with pytest.raises(sparsewav.UserError, match=f"{Q_PROJ} that are NaN or infinite"):
        sparsewav.load(tmp_path / "small", torch.float16)
    path.write_bytes(written)
    assert f"the scales of {Q_PROJ}" in _tampered(tmp_path / "small", grow(128), sealed=True)


def _move_a_bit(tensors: Tensors, header: Header) -> None:
    """Keep another weight of the first eight than the one that was kept; the count stays."""
    bits = tensors[Q_PROJ][:29]  # 225 bits, too few to be deflated
    byte = next(index for index, value in enumerate(bits.tolist()) if value not in (0, 255))
    value = int(bits[byte])
    kept, lost = (next(bit for bit in range(8) if value >> bit & 1 == wanted) for wanted in (1, 0))
    bits[byte] = value ^ (1 << kept) ^ (1 << lost)


CORRUPTED: dict[str, Callable[[Tensors, Header], object]] = {
    "mask": _move_a_bit,
    "value": _flip(-1, 1),
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
        {"format": "sparsewav-bitmask", "version": "one", "shapes": "{}"},
        {"format": "pt"},
        {"sparsewav-bitmask": "[" * 100_000},
        {"sparsewav-bitmask": "[]"},
    ],
)
def test_another_header_is_refused(metadata: dict[str, str], dense_folder: Path, tmp_path: Path) -> None:
    export(dense_folder, tmp_path / "small")
    path = tmp_path / "small" / BITMASK_WEIGHTS
    save_file({name: tensor.clone() for name, tensor in load_file(path).items()}, path, metadata)
    with pytest.raises(sparsewav.UserError, match=f"{BITMASK_WEIGHTS} has no readable header .* version 3"):
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
