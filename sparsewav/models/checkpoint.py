"""Checkpoints in safetensors: which file holds which tensor, and reading tensors one by one."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparsewav.errors import UserError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


class Checkpoint:
    """The tensors in the safetensors of a folder, read on request.

    Attributes:
        folder: Folder of the checkpoint.
        files: The file that holds each tensor, by the name of the tensor.

    Raises:
        UserError: There are no safetensors, or they are broken.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if (folder / INDEX).is_file():
            try:
                names = json.loads((folder / INDEX).read_text())["weight_map"]
            except (ValueError, KeyError) as error:
                raise UserError(f"{folder / INDEX} is not an index of safetensors; fetch it again") from error
            self.files = {name: folder / file for name, file in names.items()}
        elif (folder / WEIGHTS).is_file():
            with _opened(folder / WEIGHTS) as file:
                self.files = dict.fromkeys(file.keys(), folder / WEIGHTS)
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
            with _opened(path) as file:
                tensors |= {name: file.get_tensor(name) for name in wanted}
        return tensors


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is missing or broken ({error}); fetch it again") from error


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Give the name of the first tensor that has NaN or infinite numbers; None if there is none."""
    return next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None)
