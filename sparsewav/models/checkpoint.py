"""Checkpoints in safetensors: which file holds which tensor, and reading them one by one."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparsewav.errors import UserError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


class Checkpoint:
    """The tensors of a folder's safetensors, read when they are asked for.

    Attributes:
        folder: of the checkpoint.
        files: which file holds each tensor, by the tensor's name.
    """

    def __init__(self, folder: Path) -> None:
        """Find out where each tensor is.

        Raises:
            UserError: there are no safetensors, or they are broken.
        """
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
        """Tensors by name. They lie in mapped memory: what is to stay must be copied.

        Raises:
            UserError: a file or a tensor in it is missing or broken.
        """
        by_file: dict[Path, list[str]] = {}
        for name in names:
            if name not in self.files:
                raise UserError(f"{self.folder} has no tensor {name}; give the checkpoint of a CTC model")
            by_file.setdefault(self.files[name], []).append(name)
        tensors: dict[str, Tensor] = {}
        # Opened anew for each layer: pages once read stay in memory as long as the file is mapped.
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
