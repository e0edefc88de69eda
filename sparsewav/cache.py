"""A cache of results between runs, keyed by everything that they depend on."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from sparsewav.data.utterances import Utterance
from sparsewav.errors import UserError
from sparsewav.files import cache_folder, damage, locked, write_checksums, write_folder
from sparsewav.models.checkpoint import not_finite
from sparsewav.progress import print_warning
from sparsewav.pruning.hessian import Hessians


def model_fingerprint(model: PreTrainedModel) -> str:
    """Hash the configuration of a model and every byte of its weights."""
    digest = hashlib.blake2b(model.config.to_json_string(use_diff=False).encode(), digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def utterances_fingerprint(utterances: Iterable[Utterance]) -> str:
    """Hash ids, transcripts, speakers and the content of the audio, with the times of parts of it, in their order."""
    rows = [
        (
            item.id,
            item.text,
            item.speaker,
            item.content_hash(),
            *((item.start, item.end) if item.start or item.end else ()),
        )
        for item in utterances
    ]
    return hashlib.blake2b(json.dumps(rows).encode(), digest_size=16).hexdigest()


@cache
def code_fingerprint() -> str:
    """Hash the version of PyTorch and all code of this package, so that any change invalidates cached results."""
    digest = hashlib.blake2b(torch.__version__.encode(), digest_size=16)
    for path in code_files():
        digest.update(path.read_bytes())
    return digest.hexdigest()


def code_files() -> list[Path]:
    """List the files of code of the package, in Python and C++, in all subfolders."""
    return sorted(path for suffix in ("py", "cpp") for path in Path(__file__).parent.rglob(f"*.{suffix}"))


def cached_folder(
    kind: str, identity: dict[str, Any], make: Callable[[Path], None], *, enabled: bool
) -> tuple[Path, bool]:
    """Give the folder of a cached result, which is made if it does not exist or is damaged.

    Processes that need the same result wait for the first one to make it. Every file is checked each time.

    Args:
        kind: Kind of the result, e.g. ``hessians``.
        identity: Everything that the result depends on.
        make: Writes the result into an empty folder.
        enabled: Use an existing result; otherwise it is made again.

    Returns:
        The folder, and whether it existed and was whole.
    """
    key = hashlib.blake2b(json.dumps([kind, identity], sort_keys=True).encode(), digest_size=16).hexdigest()
    folder = cache_folder() / kind / key
    with locked(folder.with_suffix(".lock")):
        if enabled and folder.is_dir():
            damaged = damage(folder)
            if damaged is None:
                return folder, True
            print_warning(f"{folder / damaged} is damaged; it is made again")
        with write_folder(folder) as temporary:
            make(temporary)
            (temporary / "identity.json").write_text(json.dumps(identity, indent=1, sort_keys=True))
            write_checksums(temporary)
    return folder, False


def check_finite(values: Mapping[str, Tensor | float], what: str) -> None:
    """Refuse statistics with NaN or infinite numbers.

    Raises:
        UserError: It names the first matrix with one.
    """
    if name := not_finite({name: torch.as_tensor(value) for name, value in values.items()}):
        raise UserError(
            f"{what} of {name} is not finite; look for NaN and infinite numbers in the model's weights and for "
            "damaged calibration audio, then run again with cache=false"
        )


_COUNTS = ("reads", "frames", "sampled", "rows")
"""What of Hessians is kept beside their tensors."""


def save_hessians(hessians: Hessians, folder: Path) -> None:
    """Write Hessians as safetensors, and the names of the matrices that use each."""
    save_file(
        {name: hessian.contiguous() for name, hessian in hessians.by_input.items()}, folder / "hessians.safetensors"
    )
    record = {key: getattr(hessians, key) for key in _COUNTS}
    (folder / "hessians.json").write_text(json.dumps(record))


def load_hessians(folder: Path, device: torch.device) -> Hessians:
    """Read what :func:`save_hessians` wrote.

    Raises:
        UserError: One has a number that is not finite.
    """
    record = json.loads((folder / "hessians.json").read_text())
    by_input = load_file(folder / "hessians.safetensors", device=str(device))
    check_finite(by_input, f"the Hessian in {folder}")
    order = dict.fromkeys(record["reads"].values())
    return Hessians({name: by_input[name] for name in order}, **{key: record[key] for key in _COUNTS})
