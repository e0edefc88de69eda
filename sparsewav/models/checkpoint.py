"""Checkpoints on disk: what a folder says that it holds, whether it does, and reading it tensor by tensor.

Headers tell names, shapes and types of all tensors, without a tensor being read.
"""

import hashlib
import json
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    PreTrainedModel,
)

from sparsewav.errors import UserError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"

WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.bin.index.json")
"""Patterns of the files with weights, whole or in shards, and of their indices."""

EXPORTED = {"onnx": "model.onnx", "openvino": "openvino_model.xml"}
"""The file of a model that was exported for another runtime, by its format; Hugging Face's Optimum names them so."""

SETTINGS = (".json", ".md", ".model", ".txt")
"""Suffixes of the files beside the weights: configuration, card, and those of tokenizer and feature extractor."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The types of safetensors that may occur in a model of speech."""


def refuse_exported(path: Path) -> None:
    """Refuse a model that was exported to another runtime, its folder or its file, where its weights are asked for.

    Raises:
        UserError: It is one.
    """
    named = [path] if path.is_file() else [path / name for name in EXPORTED.values()]
    if exported := [file.name for file in named if file.suffix in (".onnx", ".xml") and file.is_file()]:
        raise UserError(
            f"{path} was exported ({exported[0]}), and only sparsewav-transcribe and sparsewav-evaluate run it; give "
            "the model that it was made from"
        )


def weight_files(folder: Path) -> list[Path]:
    """Give the files of a folder with the weights of its model: safetensors, where there are some, else PyTorch's."""
    return [*folder.glob("*.safetensors")] or [*folder.glob("pytorch_model*.bin")]


class Checkpoint:
    """The tensors in the safetensors of a folder, read on request.

    Attributes:
        folder: Folder of the checkpoint.
        files: The file that holds each tensor, by the name of the tensor.
        headers: Shape and type of each tensor, as a tensor on the meta device.
        stored_names: The names in the files of those tensors that have another one now.

    Raises:
        UserError: There are no safetensors, they are broken, or their index names something else than their tensors.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stored_names: dict[str, str] = {}
        if (folder / WEIGHTS).is_file():  # before the index, as in transformers
            self.headers = read_headers(folder / WEIGHTS)
            self.files = dict.fromkeys(self.headers, folder / WEIGHTS)
        elif (folder / INDEX).is_file():
            self.files = read_index(folder / INDEX)
            self.headers = {}
            for path in dict.fromkeys(self.files.values()):
                headers = read_headers(path)
                # transformers reads whole files: a tensor that the index does not know would be taken, too.
                listed = {name for name, file in self.files.items() if file == path}
                if listed != headers.keys():
                    wrong = sorted(listed ^ headers.keys())
                    raise UserError(f"{folder / INDEX} is wrong about {some(wrong)} in {path.name}; fetch both again")
                self.headers |= headers
        else:
            raise UserError(
                f"{folder} has no {WEIGHTS}, nor its shards with {INDEX}; a checkpoint of another format is turned "
                "into one by loading it and calling save_pretrained"
            )

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Give tensors by name. They lie in memory that maps the file; copy a tensor to keep it in memory.

        Raises:
            UserError: A file or a tensor in it is missing or broken.
        """
        by_file: dict[Path, list[str]] = {}
        for name in names:
            if name not in self.files:
                raise UserError(f"{self.folder} has no tensor {name}; give the checkpoint of a CTC model")
            by_file.setdefault(self.files[name], []).append(name)
        tensors: dict[str, Tensor] = {}
        # Opened anew for every call, because pages that were read stay in memory for as long as the file is mapped.
        for path, wanted in by_file.items():
            with opened(path) as file:
                tensors |= {name: file.get_tensor(self.stored_names.get(name, name)) for name in wanted}
        return tensors

    def rename(self, model: PreTrainedModel) -> None:
        """Call the tensors as a model does, whatever they are called in the files."""
        expected = model.state_dict()
        names = {name: name_in(model, name, expected) for name in self.files}
        self.files = {names[name]: path for name, path in self.files.items()}
        self.headers = {names[name]: header for name, header in self.headers.items()}
        self.stored_names = {new: old for old, new in names.items()}


@contextmanager
def opened(path: Path) -> Iterator[safe_open]:
    """Open a file of safetensors, and turn what is wrong with it into one sentence."""
    if not path.is_file():  # a device has no end
        raise UserError(f"{path} is missing or broken (no file); fetch it again")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is missing or broken ({error}); fetch it again") from error


def read_headers(path: Path) -> dict[str, Tensor]:
    """Give shape and type of every tensor of a file of safetensors, as tensors on the meta device."""
    headers = {}
    with opened(path) as file:
        for name in file.keys():  # noqa: SIM118  (the file is no dictionary)
            stored = file.get_slice(name)
            dtype = DTYPES.get(stored.get_dtype())
            if dtype is None:
                raise UserError(
                    f"{path} has {shown(name)} in {stored.get_dtype()}, which is not read; save it in float32"
                )
            headers[name] = torch.empty(stored.get_shape(), dtype=dtype, device="meta")
    return headers


def read_index(path: Path) -> dict[str, Path]:
    """Give the file of each tensor from the index of a sharded checkpoint.

    The files lie in the folder of the index under plain names; they may be links, as in the hub's cache.

    Raises:
        UserError: It is no such index, or names a file outside of the folder.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError
        return dict(pairs)

    try:
        index = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
        names = index["weight_map"]
        valid = names and all(isinstance(name, str) for name in names.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is not an index of a checkpoint's files; fetch it again") from error
    if not valid:
        raise UserError(f"{path} is not an index of a checkpoint's files; fetch it again")
    for name, file in names.items():
        if file != Path(file).name or "\\" in file or "\0" in file:
            raise UserError(
                f"{path} says that {shown(name)} is in {shown(repr(file))}, no file in its folder; fetch it again"
            )
        if not (path.parent / file).is_file():
            raise UserError(f"{path.parent / file} is missing or broken (no file); fetch it again")
    return {name: path.parent / file for name, file in names.items()}


def read_pickled_headers(folder: Path) -> dict[str, Tensor] | None:
    """Give shape and type of every tensor of PyTorch's files in a folder; None if it has none.

    Raises:
        UserError: A file is broken, or holds more than tensors.
    """
    if (folder / PICKLE).is_file():
        paths = [folder / PICKLE]
    elif (folder / PICKLE_INDEX).is_file():
        paths = list(dict.fromkeys(read_index(folder / PICKLE_INDEX).values()))
    else:
        return None
    headers: dict[str, Tensor] = {}
    for path in paths:
        check_archive(path, str(path))
        try:
            state = torch.load(path, map_location="meta", weights_only=True)
        except Exception as error:  # a broken file raises almost any error
            raise UserError(f"{path} is broken, or holds more than tensors; fetch it again") from error
        if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
            raise UserError(f"{path} is broken, or holds more than tensors; fetch it again")
        headers |= state
    return headers


def check_archive(path: Path, called: str) -> None:
    """Check the checksums of a file of PyTorch, which itself reads past them, and that it takes no more than its size.

    Raises:
        UserError: A part is damaged, or compressed, which PyTorch never does, or the parts are larger than the file.
    """
    if not zipfile.is_zipfile(path):
        return  # PyTorch's older format, or broken, which reading it says
    held = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
            size = sum(part.file_size for part in parts)
            packed = any(part.compress_type != zipfile.ZIP_STORED for part in parts) or size > held
            damaged = None if packed else archive.testzip()
    except (OSError, EOFError, zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{called} is damaged ({first_line(error)}); fetch it again") from error
    if packed:
        raise UserError(
            f"{called} is compressed, {size:,} bytes in a file of {held:,}, which PyTorch never does; fetch it again"
        )
    if damaged:
        raise UserError(f"{called} is damaged: {damaged} in it has another checksum; fetch it again")


def name_in(model: PreTrainedModel, name: str, expected: Collection[str]) -> str:
    """Give a tensor's name in the model, which old checkpoints and those of a bare encoder differ from."""
    for old, new in ((".weight_g", "0"), (".weight_v", "1")):  # weight normalization before PyTorch 2.1
        if name.endswith(old):
            name = f"{name.removesuffix(old)}.parametrizations.weight.original{new}"
    prefix = f"{model.base_model_prefix}."
    if name in expected:
        return name
    other = name.removeprefix(prefix) if name.startswith(prefix) else prefix + name
    return other if other in expected else name


def refuse_infinite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse tensors with NaN or infinite numbers.

    Raises:
        UserError: There is one.
    """
    if name := not_finite(tensors):
        raise UserError(f"{where} has numbers in {name} that are NaN or infinite; fetch it again")


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Give the name of the first tensor that has NaN or infinite numbers; None if there is none."""
    for name, tensor in tensors.items():
        # The extremes are NaN if any number is; they take a quarter of the time of isfinite and no memory.
        if tensor.is_floating_point() and tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            return name
    return None


def checksum(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """Hash names, types, shapes and bytes of tensors on the CPU, and a text."""
    digest = hashlib.sha256(text.encode())  # twice as fast as BLAKE2b where the processor has instructions for it
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def shown(text: str) -> str:
    """Give what a file says as it fits into a sentence: in one line, and at most 200 characters."""
    line = text if text.isprintable() else ascii(text)
    return line if len(line) <= 200 else f"{line[:200]}..."


def some(names: Iterable[str]) -> str:
    """List the first three names, and how many more there are."""
    names = list(names)
    return ", ".join(map(shown, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def named(key: str, value: str) -> str:
    """Give what a user named with the setting that named it, or alone where it has none, as a command's argument."""
    return f"{key}={value}" if key else value


def first_line(error: Exception) -> str:
    """Give the first line of an error's message, or its type if it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
