"""The bitmask format: a pruned matrix is stored as a bit for every weight and the values that are kept.

``BITMASK_FORMAT.md`` beside this module describes the file. Nothing in a file is unpickled or executed.
"""

import json
import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from sparsewav.errors import UserError
from sparsewav.files import write_folder
from sparsewav.models.checkpoint import INDEX, SETTINGS, WEIGHTS, Checkpoint, checksum, opened, read_headers
from sparsewav.models.skeleton import check_tensors, load_whole, make_skeleton, read_config
from sparsewav.pruning.encoder import prunable_matrices, stays_single

FORMATS = ("dense", "bitmask")
FORMAT = "sparsewav-bitmask"
VERSION = 2
BITMASK_WEIGHTS = "model.bitmask.safetensors"
"""Not ``model.safetensors``, because transformers would load that file and fill missing tensors with random numbers."""

BITMASK_NOTE = """
**This folder has the weights in bitmask format**, which transformers does not read: `sparsewav.load` gives back the
model, and `sparsewav-export` a plain checkpoint.
"""

_BITS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
"""Integers of the same width. A weight is zero if all its bits are, so that −0 is preserved."""


def encode(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Encode a floating-point matrix (rows, cols), or (rows, cols, 1) for a convolution of kernel 1, on the CPU.

    Returns:
        The bits, shape (⌈rows·cols / 8⌉,), uint8: weight i in row-major order is kept if bit i mod 8, counted from the
        lowest, of byte ⌊i / 8⌋ is set. The kept values, shape (kept,), in the same order.
    """
    flat = weight.detach().contiguous().flatten()
    kept = flat.view(_BITS[flat.dtype]) != 0
    return torch.from_numpy(np.packbits(kept.numpy(), bitorder="little")), flat[kept]


def decode(bitmask: Tensor, values: Tensor, shape: tuple[int, ...], name: str) -> Tensor:
    """Decode what :func:`encode` gave, bit for bit, into a matrix of a shape (rows, cols), or (rows, cols, 1).

    Raises:
        UserError: Bits, values and shape do not fit each other; ``name`` says of which matrix and file.
    """
    size = math.prod(shape)
    is_bytes = bitmask.dtype == torch.uint8 and bitmask.dim() == 1 and len(bitmask) == -(-size // 8)
    _check(is_bytes, f"the bitmask of {name} is not {-(-size // 8)} bytes, one bit a weight")
    is_row = values.dtype in _BITS and values.dim() == 1
    _check(is_row, f"the values of {name} are not one row of floating-point numbers")
    bits = bitmask.numpy()
    _check(not size % 8 or not bits[-1] >> (size % 8), f"the bitmask of {name} has bits set behind its last weight")
    kept = np.unpackbits(bits, count=size, bitorder="little").view(bool)
    count = int(np.count_nonzero(kept))
    _check(count == len(values), f"the bitmask of {name} counts {count} kept weights and the file has {len(values)}")
    integers = values.view(_BITS[values.dtype])  # NumPy knows no bfloat16
    flat = torch.zeros(size, dtype=integers.dtype)
    flat.numpy()[np.flatnonzero(kept)] = integers.numpy()  # three times as fast as indexing by the mask
    return flat.view(values.dtype).view(shape)


_AGAIN = "the file is broken: write it again with sparsewav-export"


def _check(holds: bool, complaint: str) -> None:
    if not holds:
        raise UserError(f"{complaint}; {_AGAIN}")


def read_model(folder: Path, dtype: torch.dtype | None, notes: list[str] | None = None) -> PreTrainedModel:
    """Load a model from a folder in dense or bitmask format, in evaluation mode, on the CPU.

    Args:
        folder: It has ``config.json`` and ``model.safetensors`` (or its shards) or ``model.bitmask.safetensors``.
        dtype: Type of the weights in memory. None keeps the stored one, bit for bit.
        notes: As in :func:`~sparsewav.models.skeleton.load_whole`.

    Raises:
        UserError: The folder holds no such model, or a broken one.
    """
    skeleton, tensors = _read(folder)
    kinds = {
        tensor.dtype
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and not stays_single(skeleton, name)
    }
    if dtype is None and len(kinds) != 1:
        raise UserError(f"{folder} has weights of {len(kinds)} floating-point types; give it one with sparsewav-export")
    model = load_whole(
        type(skeleton).from_pretrained,
        None,
        str(folder),
        notes=notes,
        config=skeleton.config,
        state_dict=tensors,
        dtype=dtype or kinds.pop(),
    )
    model.config.name_or_path = str(folder)
    return model.eval()


def format_of(folder: Path) -> str:
    """Tell whether a model's folder is ``dense`` or ``bitmask``.

    Raises:
        UserError: It is neither, or both.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is no model's folder: it has no config.json; check the path")
    dense = (folder / WEIGHTS).is_file() or (folder / INDEX).is_file()
    bitmask = (folder / BITMASK_WEIGHTS).is_file()
    if dense and bitmask:
        raise UserError(f"{folder} has both {BITMASK_WEIGHTS} and dense weights; keep one of them")
    if not dense and not bitmask:
        pickles = sorted(
            p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl") for p in folder.glob(pattern)
        )
        reason = f"; {pickles[0]} is a pickle, which may run code and is never opened" if pickles else ""
        raise UserError(f"{folder} has neither {WEIGHTS} nor {BITMASK_WEIGHTS}{reason}; give a model in safetensors")
    return "dense" if dense else "bitmask"


def export(source: str | Path, destination: str | Path, format: str = "bitmask", dtype: str = "model") -> Path:
    """Write the folder of a model in another format.

    Args:
        source: Folder in either format.
        destination: Folder to write. It must not exist, and appears whole or not at all.
        format: ``dense`` or ``bitmask``.
        dtype: ``model`` keeps every number, and ``float16`` rounds them.

    Returns:
        The destination.

    Raises:
        UserError: The source is broken, the destination exists, or a weight is too large for float16.
    """
    source, destination = Path(source).expanduser(), Path(destination).expanduser()
    check_export(destination, format, dtype)
    skeleton, tensors = _read(source)
    if dtype == "float16":
        tensors = {name: _to_float16(tensor, name) for name, tensor in tensors.items()}
    with write_folder(destination) as temporary:
        for path in source.iterdir():
            if path.suffix in SETTINGS and not path.name.endswith(".index.json"):
                shutil.copyfile(path, temporary / path.name)
        if dtype == "float16":
            config = json.loads((source / "config.json").read_text())
            config.pop("torch_dtype", None)  # the key of older versions of transformers
            (temporary / "config.json").write_text(json.dumps(config | {"dtype": "float16"}, indent=2) + "\n")
        _amend_card(temporary / "README.md", format)
        if format == "dense":
            save_file(
                {name: tensor.contiguous() for name, tensor in tensors.items()}, temporary / WEIGHTS, {"format": "pt"}
            )
        else:
            _write_bitmask(tensors, temporary / BITMASK_WEIGHTS, skeleton)
    return destination


def check_export(destination: Path, format: str, dtype: str) -> None:
    """Check what :func:`export` is asked for.

    Raises:
        UserError: There is no such format or type, or the destination exists.
    """
    if format not in FORMATS or dtype not in ("model", "float16"):
        raise UserError(f"format={format}, dtype={dtype}: give dense or bitmask, and model or float16")
    if destination.exists():
        raise UserError(f"{destination} is there already; delete it or choose another folder")


def _amend_card(card: Path, format: str) -> None:
    """State in the model card how the weights beside it are loaded."""
    if not card.is_file():
        return
    text = card.read_text(encoding="utf-8").replace(BITMASK_NOTE, "").rstrip()
    card.write_text(f"{text}\n{BITMASK_NOTE if format == 'bitmask' else ''}", encoding="utf-8")


def stored_bytes(model: PreTrainedModel) -> tuple[int, int]:
    """Give the bytes of a model's tensors on disk, without headers, in dense and in bitmask format."""
    prunable = _prunable_shapes(model)
    dense = bitmask = 0
    for name, tensor in model.state_dict().items():
        dense += tensor.nbytes
        kept = int(tensor.count_nonzero()) * tensor.element_size() + -(-tensor.numel() // 8)
        bitmask += min(kept, tensor.nbytes) if name in prunable else tensor.nbytes
    return dense, bitmask


def _to_float16(tensor: Tensor, name: str) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    half = tensor.to(torch.float16)
    if not torch.equal(half.isinf(), tensor.isinf()):
        raise UserError(f"{name} has numbers above 65,504, the largest of float16; leave out --dtype float16")
    return half


def _write_bitmask(tensors: dict[str, Tensor], path: Path, skeleton: PreTrainedModel) -> None:
    stored: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    prunable = _prunable_shapes(skeleton)
    for name, tensor in tensors.items():
        if name in prunable and tensor.dtype in _BITS:
            bitmask, values = encode(tensor)
            if bitmask.nbytes + values.nbytes < tensor.nbytes:  # otherwise the bits cost more than the zeros save
                stored |= {f"{name}.bitmask": bitmask, f"{name}.values": values}
                shapes[name] = list(tensor.shape)
                continue
        stored[name] = tensor.contiguous()
    header = {"version": VERSION, "shapes": shapes, "checksum": _checksum(stored, shapes)}
    # One entry, because safetensors writes several in an order that changes from process to process.
    save_file(stored, path, {FORMAT: json.dumps(header, sort_keys=True)})


def _checksum(stored: dict[str, Tensor], shapes: Any) -> str:
    return checksum(stored, json.dumps(shapes, sort_keys=True))


def _read(folder: Path) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """Give the model that a folder in either format describes, without weights, and its tensors.

    Raises:
        UserError: The files are broken, or the tensors are not those of the model by name, shape and type.
    """
    is_dense = format_of(folder) == "dense"
    config = read_config(str(folder), str(folder))
    if is_dense:
        checkpoint = Checkpoint(folder)
        skeleton = make_skeleton(config, checkpoint.headers, str(folder))
        check_tensors(skeleton, checkpoint.headers, str(folder))
        return skeleton, checkpoint.read(checkpoint.files)
    skeleton = make_skeleton(config, read_headers(folder / BITMASK_WEIGHTS), str(folder))
    tensors = _read_bitmask(folder / BITMASK_WEIGHTS, skeleton)
    check_tensors(skeleton, tensors, str(folder))
    return skeleton, tensors


def _prunable_shapes(skeleton: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    return {f"{matrix.name}.weight": tuple(matrix.parameter.shape) for matrix in prunable_matrices(skeleton)}


def _read_bitmask(path: Path, skeleton: PreTrainedModel) -> dict[str, Tensor]:
    """Give all tensors by their names in a dense checkpoint.

    Raises:
        UserError: The file violates ``BITMASK_FORMAT.md``, or belongs to another model.
    """
    with opened(path) as file:
        header = _header(path, (file.metadata() or {}).get(FORMAT))
        shapes = _shapes(path, header.get("shapes"), _prunable_shapes(skeleton))
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (the file is no dictionary)
        rest = dict(stored)
        encoded: dict[str, tuple[Tensor, Tensor]] = {}
        for name in shapes:
            parts = (f"{name}.bitmask", f"{name}.values")
            for part in parts:
                _check(part in rest, f"{path} lacks {part}")
            _check(name not in rest, f"{path} has {name} both dense and as a bitmask")
            encoded[name] = (rest.pop(parts[0]), rest.pop(parts[1]))
        # NumPy and the hash release the interpreter lock.
        with ThreadPoolExecutor(torch.get_num_threads() + 1) as threads:
            found = threads.submit(_checksum, stored, header.get("shapes"))
            matrices = threads.map(lambda name: decode(*encoded[name], shapes[name], f"{name} in {path}"), shapes)
            tensors = dict(zip(shapes, matrices, strict=True)) | rest
        _check(found.result() == header.get("checksum"), f"{path} does not have the checksum that its header says")
        return tensors


def _header(path: Path, text: str | None) -> dict[str, Any]:
    """Give what the one entry in the metadata of the file says."""
    try:
        header = json.loads(text or "null")
    except (ValueError, RecursionError):
        header = None
    _check(isinstance(header, dict), f"{path} has no readable header of the format {FORMAT}, version {VERSION}")
    if header.get("version") != VERSION:
        raise UserError(
            f"{path} is of version {header.get('version')!r} of {FORMAT}, and this SparseWAV reads {VERSION}; "
            "update SparseWAV, or write the file again with sparsewav-export"
        )
    return header


def _shapes(path: Path, shapes: Any, expected: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Give the shapes in the header of the file, after comparing them with those of the model."""
    _check(isinstance(shapes, dict), f"{path} has no readable shapes in its metadata")
    for name, shape in shapes.items():
        known = name in expected
        _check(known, f"{path} has a bitmask for {name}, which is no prunable matrix of its config.json")
        fits = shape == list(expected[name]) and all(type(size) is int for size in shape)
        _check(fits, f"{path} gives {name} the shape {shape}, and its config.json {list(expected[name])}")
    return {name: expected[name] for name in shapes}
