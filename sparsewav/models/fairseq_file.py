"""A file that fairseq saved, read without running anything that it contains or names, and without fairseq."""

import pickle
import pickletools
import re
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sparsewav.errors import UserError
from sparsewav.models.checkpoint import check_archive

STAND_INS = re.compile(
    r"argparse\.Namespace|(fairseq|omegaconf|typing)\..+|_?operator\.getitem|collections\.defaultdict"
    r"|numpy\.(dtype|ndarray)|numpy\._?core\.multiarray\.(scalar|_reconstruct)"
    r"|builtins\.(bool|bytes|dict|float|int|list|object|str|tuple|type)"
)
"""Names in the pickle of a checkpoint that get a stand-in. fairseq stores beside the weights its arguments or its
configuration with the types, the dictionary, and the records of the training with numbers of NumPy."""


class StandIn:
    """Replaces a class or function that a pickle names, and only stores what it is given.

    The named object is neither imported nor called, so that neither its effect nor its version matters.
    """

    arguments: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


def read_checkpoint(path: Path, called: str) -> dict[str, Any]:
    """Read a file of fairseq without running anything that it contains or names.

    The ``weights_only`` unpickler of PyTorch makes tensors and plain data. The names in :data:`STAND_INS` get a
    :class:`StandIn`, and every other name is refused.

    Args:
        path: The file, in PyTorch's zip format or the older one.
        called: Name of the file in messages.

    Returns:
        The file's dictionary: ``model`` (tensors by name), ``args``, ``cfg`` and ``task_state`` (plain data), and more.

    Raises:
        UserError: The file is broken, is no dictionary, or names something else.
    """
    check_archive(path, called)
    try:
        with torch.serialization.safe_globals(list(_stand_ins(path))):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(checkpoint, dict):
            checkpoint |= {key: _plain(checkpoint.get(key)) for key in ("args", "cfg", "task_state")}
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        if not name:
            raise UserError(f"{called} is broken, or no checkpoint of PyTorch; fetch it again") from error
        raise UserError(
            f"{called} needs {name[1]} to be read, which might run anything and is refused; load the file with fairseq "
            "where you trust it, and save its 'model' and its 'cfg' or 'args' alone"
        ) from error
    except Exception as error:  # a broken file raises almost any error
        raise UserError(f"{called} is broken, or no checkpoint of PyTorch; fetch it again") from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("model"), dict):
        raise UserError(f"{called} is no checkpoint of fairseq: it has no 'model'; name a file that fairseq saved")
    return checkpoint


def _stand_ins(path: Path) -> Iterator[type]:
    """Make a class for every permitted name in the pickle of a file, whose instructions are read and not executed."""
    for module, name in sorted(_names_in_pickle(path)):
        if STAND_INS.fullmatch(f"{module}.{name}"):
            yield type(name, (StandIn,), {"__module__": module, "__qualname__": name})


def _names_in_pickle(path: Path) -> set[tuple[str, str]]:
    names = set()

    def gather(source: Any) -> None:
        for instruction, argument, _ in pickletools.genops(source):
            if instruction.name == "GLOBAL":
                module, _, name = str(argument).partition(" ")
                # PyTorch writes protocol 2, which uses the names of Python 2.
                names.add(NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name)))

    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for entry in archive.namelist():
                if entry.endswith("/data.pkl"):
                    gather(archive.read(entry))
    else:
        with path.open("rb") as file:
            for _ in range(4):  # magic number, version, description of the machine, object
                gather(file)
    return names


def _plain(value: Any) -> Any:
    """Turn stand-ins, which are namespaces and containers of OmegaConf, into dictionaries and lists."""
    if isinstance(value, StandIn):
        if isinstance(value.state, dict):
            for key in ("_content", "_val"):  # of a container and of a value of OmegaConf
                if key in value.state:
                    return _plain(value.state[key])
            return _plain(value.state)
        return _plain(value.arguments[0]) if len(value.arguments) == 1 else None  # an enumeration of fairseq, by value
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
