"""The bitmask format: of a pruned matrix a bit for every weight and what is kept, in few bits if it was rounded.

``BITMASK_FORMAT.md`` beside this module describes the file, :mod:`sparsewav.pruning.encoding` makes the bytes of a
tensor, :mod:`sparsewav.pruning.decoding` a tensor of them. Nothing in a file is unpickled or executed.
"""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from sparsewav.errors import UserError
from sparsewav.files import write_folder
from sparsewav.models.checkpoint import (
    INDEX,
    SETTINGS,
    WEIGHTS,
    Checkpoint,
    checksum,
    name_in,
    opened,
    read_headers,
    refuse_exported,
    shown,
    some,
)
from sparsewav.models.skeleton import check_tensors, load_whole, make_skeleton, read_config
from sparsewav.pruning.coding import AGAIN, FORMAT, VERSION, check_file, header_text, read_coding
from sparsewav.pruning.decoding import decode_masked, decode_tensors
from sparsewav.pruning.encoder import stays_single
from sparsewav.pruning.encoding import encode_tensors, file_bytes
from sparsewav.pruning.grid import find_grid

FORMATS = ("dense", "bitmask")
BITMASK_WEIGHTS = "model.bitmask.safetensors"
"""Not ``model.safetensors``, because transformers would load that file and fill missing tensors with random numbers."""

BITMASK_NOTE = """
**This folder has the weights in bitmask format**, which transformers does not read: `sparsewav.load` gives back the
model, and `sparsewav-export` a plain checkpoint.
"""


def read_model(folder: Path, dtype: torch.dtype | None, notes: list[str] | None = None) -> PreTrainedModel:
    """Load a model from a folder in dense or bitmask format, in evaluation mode, on the CPU.

    Args:
        folder: It has ``config.json`` and ``model.safetensors`` (or its shards) or ``model.bitmask.safetensors``.
        dtype: Type of the weights in memory. None keeps the stored one, bit for bit.
        notes: As in :func:`~sparsewav.models.skeleton.load_whole`.

    Raises:
        UserError: The folder holds no such model, or a broken one.
    """
    skeleton, tensors, finite = _read(folder)
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
        finite=[tensors[name] for name in finite],
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
        refuse_exported(folder)
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
        UserError: The source is broken, the destination exists, a weight is too large for float16, or float16 would
            take more bytes, because it does not hold what was rounded to few bits.
    """
    source, destination = Path(source).expanduser(), Path(destination).expanduser()
    check_export(destination, format, dtype)
    _, tensors, _ = _read(source)
    if dtype == "float16":
        halves = {name: _to_float16(tensor, name) for name, tensor in tensors.items()}
        if format == "bitmask":
            _refuse_to_grow(tensors, halves)
        tensors = halves
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
            _write_bitmask(tensors, temporary / BITMASK_WEIGHTS)
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


def stored_bytes(model: PreTrainedModel) -> tuple[int, int, int]:
    """Give the bytes of a model's weights on disk: dense in float32 and in float16, and the file in bitmask format."""
    state = model.state_dict()
    wide, narrow = (
        sum(
            tensor.numel() * (size if tensor.is_floating_point() else tensor.element_size())
            for tensor in state.values()
        )
        for size in (4, 2)
    )
    return wide, narrow, file_bytes(state)


def _to_float16(tensor: Tensor, name: str) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    half = tensor.to(torch.float16)
    if not torch.equal(half.isinf(), tensor.isinf()):
        raise UserError(f"{name} has numbers above 65,504, the largest of float16; leave out --dtype float16")
    return half


def _refuse_to_grow(tensors: dict[str, Tensor], halves: dict[str, Tensor]) -> None:
    """Refuse float16 where a matrix is whole numbers times scales, which its numbers in float16 are not.

    Raises:
        UserError: There is such a matrix.
    """
    matrices = [name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.dim() > 1]
    lost = [name for name in matrices if find_grid(tensors[name].flatten(1)) and not find_grid(halves[name].flatten(1))]
    if lost:
        raise UserError(
            f"float16 does not hold what was rounded to few bits in {some(lost)}, and the file would grow; leave out "
            "--dtype float16: the bitmask format stores these numbers in few bits as they are"
        )


def _write_bitmask(tensors: dict[str, Tensor], path: Path) -> None:
    stored, header = encode_tensors(tensors)
    header["checksum"] = checksum(stored, header_text(header))
    # One entry, because safetensors writes several in an order that changes from process to process.
    save_file(stored, path, {FORMAT: header_text(header)})


def _read(folder: Path) -> tuple[PreTrainedModel, dict[str, Tensor], list[str]]:
    """Give the model that a folder describes, without weights, its tensors, and which of them cannot but be finite.

    Raises:
        UserError: The files are broken, or the tensors are not those of the model by name, shape and type.
    """
    is_dense = format_of(folder) == "dense"
    config = read_config(str(folder), str(folder))
    if is_dense:
        checkpoint = Checkpoint(folder)
        skeleton = make_skeleton(config, checkpoint.headers, str(folder))
        check_tensors(skeleton, checkpoint.headers, str(folder))
        return skeleton, checkpoint.read(checkpoint.files), []
    skeleton = make_skeleton(config, read_headers(folder / BITMASK_WEIGHTS), str(folder))
    tensors, finite = _read_bitmask(folder / BITMASK_WEIGHTS, skeleton)
    check_tensors(skeleton, tensors, str(folder))
    return skeleton, tensors, finite


def _read_bitmask(path: Path, skeleton: PreTrainedModel) -> tuple[dict[str, Tensor], list[str]]:
    """Give all tensors by their names in a dense checkpoint, and the names of those that cannot but be finite.

    Raises:
        UserError: The file violates ``BITMASK_FORMAT.md``, or belongs to another model.
    """
    with opened(path) as file:
        header = _header(path, file.metadata() or {})
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (the file is no dictionary)
        claimed = header.pop("checksum", None)
        # The hash releases the interpreter lock.
        with ThreadPoolExecutor(1) as thread:
            if header["version"] == VERSION:
                found = thread.submit(checksum, stored, header_text(header))
                tensors, finite = _decode(path, header, stored, skeleton)
            else:
                found = thread.submit(checksum, stored, json.dumps(header.get("shapes"), sort_keys=True))
                tensors, finite = _decode_older(path, header.get("shapes"), stored, skeleton), []
        sealed = header["version"] == 1 or found.result() == claimed
        check_file(sealed, f"{path} does not have the checksum that its header says")
        return tensors, finite


def _header(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    """Give what the metadata of the file says; version 1 had three entries, where the others have one."""
    try:
        if metadata.get("format") == FORMAT:
            shapes = json.loads(metadata.get("shapes", "null"))
            header: Any = {"version": int(metadata.get("version", "0")), "shapes": shapes}
        else:
            header = json.loads(metadata.get(FORMAT, "null"))
        json.dumps(header)  # what is nested too deep for it is no header
    except (ValueError, RecursionError):
        header = None
    check_file(isinstance(header, dict), f"{path} has no readable header of the format {FORMAT}, version {VERSION}")
    version = header.get("version")
    if type(version) is not int or not 1 <= version <= VERSION or (version == 1) != (FORMAT not in metadata):
        raise UserError(
            f"{path} is of version {shown(repr(version))} of {FORMAT}, and this SparseWAV reads 1 to {VERSION}; "
            "update SparseWAV, or write the file again with sparsewav-export"
        )
    return header


def _decode(
    path: Path, header: dict[str, Any], stored: dict[str, Tensor], skeleton: PreTrainedModel
) -> tuple[dict[str, Tensor], list[str]]:
    entries, float16 = header.get("coded", {}), header.get("float16", "")
    readable = isinstance(entries, dict) and float16 in ("float16", "float32")
    check_file(readable, f"{path} has no readable header of the format {FORMAT}, version {VERSION}")
    codings = {name: read_coding(entry, f"{shown(name)} in {path}") for name, entry in entries.items()}
    _check_shapes(path, {name: coding.shape for name, coding in codings.items()}, skeleton)
    for name in codings:
        check_file(name in stored, f"{path} lacks {name}")
    rounded = [name for name, coding in codings.items() if coding.values is None]
    return decode_tensors(stored, codings, float16, str(path)), rounded


def _decode_older(path: Path, shapes: Any, stored: dict[str, Tensor], skeleton: PreTrainedModel) -> dict[str, Tensor]:
    """Decode what versions 1 and 2 have: ``NAME.bitmask`` and ``NAME.values``, and all others as they are."""
    check_file(isinstance(shapes, dict), f"{path} has no readable shapes in its metadata")
    _check_shapes(path, shapes, skeleton)
    tensors = dict(stored)
    for name, shape in shapes.items():
        for part in (f"{name}.bitmask", f"{name}.values"):
            check_file(part in tensors, f"{path} lacks {part}")
        check_file(name not in tensors, f"{path} has {name} both dense and as a bitmask")
        bitmask, values = tensors.pop(f"{name}.bitmask"), tensors.pop(f"{name}.values")
        tensors[name] = decode_masked(bitmask, values, tuple(shape), f"{name} in {path}")
    return tensors


def _check_shapes(path: Path, shapes: dict[str, Any], skeleton: PreTrainedModel) -> None:
    """Compare shapes in the header of the file with those of the model, before anything is allocated."""
    expected = skeleton.state_dict()
    for name, shape in shapes.items():
        known = expected.get(name_in(skeleton, name, expected))
        if known is None:
            raise UserError(f"{path} has a bitmask for {shown(name)}, which is no matrix of its config.json; {AGAIN}")
        fits = isinstance(shape, list | tuple) and list(shape) == list(known.shape)
        fits = fits and all(type(size) is int for size in shape)
        check_file(fits, f"{path} gives {name} the shape {shown(str(shape))}, and its config.json {list(known.shape)}")
