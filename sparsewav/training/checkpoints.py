"""The checkpoints of a training: the newest one that is whole, from which a killed training goes on."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from sparsewav.files import CHECKSUMS, damage
from sparsewav.models.checkpoint import WEIGHTS, first_line, not_finite
from sparsewav.progress import print_warning


def last_checkpoint(folder: Path) -> str | None:
    """Give the newest checkpoint that is whole, and delete those that are not."""
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    while checkpoints:
        newest = checkpoints.pop()
        if not (newest / "trainer_state.json").is_file():  # the Trainer writes it last: it was killed before
            shutil.rmtree(newest, ignore_errors=True)
            continue
        fault = _fault_of(newest)
        if fault is None:
            return str(newest)
        print_warning(f"{newest} {fault}; the training goes on from the one before, or starts anew")
        shutil.rmtree(newest, ignore_errors=True)
    return None


def _fault_of(checkpoint: Path) -> str | None:
    """Say what is wrong with a checkpoint: a file is not as it was written, or has numbers that are not finite."""
    # It may have been killed between the Trainer's last file and the checksums.
    if (checkpoint / CHECKSUMS).is_file() and (damaged := damage(checkpoint)):
        return f"is damaged in {damaged}"
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
        moments = torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True)["state"]
        tensors = load_file(checkpoint / WEIGHTS) | {
            f"optimizer {index} {name}": torch.as_tensor(value)
            for index, state in moments.items()
            for name, value in state.items()
        }
    except Exception as error:  # damaged files raise almost any error
        return f"is damaged ({first_line(error)})"
    broken = not_finite(tensors)
    return f"has numbers in {broken} that are not finite" if broken else None
