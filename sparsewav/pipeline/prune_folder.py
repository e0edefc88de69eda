"""Pruning a checkpoint on disk layer by layer: for models that memory does not hold whole.

The front end stays in memory. Each transformer layer is read from the checkpoint's safetensors, calibrated on what the
pruned layers before it give, pruned, run on, written to a file of its own and let go. The loop is that of propagation
``sequential`` (:func:`~sparsewav.pruning.layerwise.prune_layer_by_layer`), so that the weights are the very bytes
which :func:`sparsewav.prune` leaves in memory. Killed and called again, it runs the layers that are done and prunes on
from there.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCTC, PreTrainedModel
from transformers.utils import logging as transformers_logging

from sparsewav.cache import code_fingerprint
from sparsewav.errors import UserError
from sparsewav.files import make_readable, write_file, writing
from sparsewav.models.checkpoint import INDEX, WEIGHTS, Checkpoint, not_finite
from sparsewav.models.load import load_pretrained
from sparsewav.pruning import MatrixReport, PruneReport, Trace, prunable_matrices, prune_model
from sparsewav.pruning.encoder import as_sequence, encoder_layers
from sparsewav.pruning.layerwise import Outcome, StageProgress
from sparsewav.settings.pruning import Allocation, Calibration, Pruning, Saliency, Solver, Sparsity, Uniform, resolve

SHARED = ("attention.rel_attn_embed.weight",)
"""Parameters of the first layer that all layers read (WavLM's position embedding); they stay in memory."""

_FINGERPRINT = "fingerprint"
_RESUMES = ".resume.safetensors"
"""The suffix of the files that a killed pruning goes on from, one for every layer that is done."""


def prune_folder(
    source: str | Path,
    destination: str | Path,
    calibration_batches: Iterable[Mapping[str, Tensor]],
    sparsity: float | Sparsity = 0.75,
    *,
    saliency: str | Saliency = "obs_first_order",
    solver: str | Solver = "obs",
    allocation: str | Allocation = "uniform",
    calibration: Calibration | None = None,
    seed: int = 0,
    masks: Mapping[str, Tensor] | None = None,
    traces: Mapping[str, Trace] | None = None,
    device: torch.device | str = "cpu",
    progress: StageProgress | None = None,
) -> PruneReport:
    """Prune a CTC checkpoint into a new folder, with one transformer layer in memory at a time.

    It does the same as :func:`sparsewav.prune` with propagation ``sequential``, computes in float32 and writes the
    checkpoint's own dtype; tensors that are not pruned keep their bytes. Memory holds the front end, one layer, its
    Hessians and the activations of one batch; the hidden states of the calibration set wait in the folder for temporary
    files.

    Args:
        source: A folder with ``config.json`` and ``model.safetensors``, or its shards with their index.
        destination: The folder to make; it appears whole when all is done, and ``AutoModelForCTC.from_pretrained``
            loads it. The settings of tokenizer and feature extractor come along. What is done lies beside it until
            then, in float32 besides the checkpoint's own dtype.
        calibration_batches: As in :func:`sparsewav.prune`, and so are the options that are not named here.
        sparsity: As there.
        saliency: As there.
        solver: As there.
        allocation: ``uniform``; or ``hutchinson``, where ``traces`` are given.
        calibration: As there; its propagation must be ``sequential``.
        seed: As there.
        masks: As there.
        traces: Hessian traces computed earlier: they take gradients of the whole model.
        device: Where to compute.
        progress: As there.

    Returns:
        The report, without masks: they would take a byte for every weight, and the zeros on disk are the same. What
        reading and writing took counts as ``calibrate``.

    Raises:
        UserError: A file of the source is missing or broken, the destination is there already or cannot be written, or
            what :func:`sparsewav.prune` refuses.
    """
    settings = Pruning(
        sparsity=resolve("sparsity", sparsity),
        saliency=resolve("saliency", saliency),
        solver=resolve("solver", solver),
        allocation=resolve("allocation", allocation),
        calibration=calibration or Calibration(propagation="sequential"),
        seed=seed,
    )
    return prune_checkpoint(
        source, destination, calibration_batches, settings, masks=masks, traces=traces, device=device, progress=progress
    )


def prune_checkpoint(
    source: str | Path,
    destination: str | Path,
    calibration_batches: Iterable[Mapping[str, Tensor]],
    settings: Pruning,
    *,
    masks: Mapping[str, Tensor] | None = None,
    traces: Mapping[str, Trace] | None = None,
    device: torch.device | str = "cpu",
    progress: StageProgress | None = None,
) -> PruneReport:
    """Do :func:`prune_folder` with all options in one object."""
    source, destination = Path(source), Path(destination)
    settings.check()
    if settings.calibration.propagation != "sequential":
        raise UserError("a checkpoint is pruned layer by layer; choose calibration.propagation=sequential")
    if not isinstance(settings.allocation, Uniform) and traces is None:
        raise UserError(
            f"allocation {settings.allocation.name!r} takes gradients of the whole model, which is not in memory here; "
            "choose allocation='uniform', or give traces that estimate_traces found on the whole model"
        )
    if not source.is_dir():
        raise UserError(f"{source} is not a folder; give the folder of a checkpoint with config.json and {WEIGHTS}")
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise UserError(f"{destination} is there already; remove it, or choose another folder for the pruned model")
    checkpoint = Checkpoint(source)
    model = _model_without_layers(checkpoint, torch.device(device))
    batches: Any = as_sequence(calibration_batches)
    identity = [settings, traces, str(device), code_fingerprint()]
    with _kept_folder(destination, _fingerprint(checkpoint, batches, masks or {}, identity)) as unfinished:
        layers = _Layers(checkpoint, model, unfinished)
        report = prune_model(
            model,
            batches,
            settings,
            masks=masks,
            traces=traces,
            load_layer=layers.load,
            keep_masks=False,
            progress=progress,
        )
        layers.write_rest()
    return report


def _fingerprint(
    checkpoint: Checkpoint,
    batches: Iterable[Any],
    masks: Mapping[str, Any],
    identity: list[Any],
) -> str:
    """Hash of all that the pruned weights depend on."""
    digest = hashlib.blake2b(repr(identity).encode(), digest_size=16)
    for path in sorted({*checkpoint.files.values(), checkpoint.folder / "config.json"}):
        status = path.stat()
        digest.update(f"{path.resolve()} {status.st_size} {status.st_mtime_ns}".encode())
    for batch in chain(batches, [dict(sorted(masks.items()))]):
        for name, tensor in batch.items():
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


@contextmanager
def _kept_folder(path: Path, fingerprint: str) -> Iterator[Path]:
    """Give a folder to fill, which is named ``path`` in the end and is found again after a kill.

    One with another fingerprint, of other settings or data, is emptied. An error that says what is wrong with the input
    leaves no folder behind.
    """
    unfinished = path.with_name(f".{path.name}.unfinished")
    mark = unfinished / _FINGERPRINT
    with writing(path):
        if not mark.is_file() or mark.read_text() != fingerprint:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            mark.write_text(fingerprint)
        try:
            yield unfinished
        except UserError:
            shutil.rmtree(unfinished)
            raise
        for file in (mark, *unfinished.glob(f"*{_RESUMES}")):
            file.unlink()
        make_readable(unfinished)
        if path.exists():
            path.rmdir()  # empty, or it would have been refused
        unfinished.replace(path)


def _model_without_layers(checkpoint: Checkpoint, device: torch.device) -> PreTrainedModel:
    """Load a model in float32 and evaluation mode, whose transformer layers are on the meta device."""
    source = str(checkpoint.folder)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # or every tensor of the layers is listed as one too many
    try:
        model = load_pretrained(source, torch.float32, "source", num_hidden_layers=0).eval().to(device)
    finally:
        transformers_logging.set_verbosity(verbosity)
    checkpoint.read(["lm_head.weight"])  # or a head of random numbers would have come unnoticed
    config = AutoConfig.from_pretrained(source)
    with torch.device("meta"):
        layers = encoder_layers(AutoModelForCTC.from_config(config, dtype=torch.float32))
    model.config.num_hidden_layers = config.num_hidden_layers
    encoder_layers(model).extend(layers)
    shared = {name: tensor for name, tensor in layers[0].named_parameters() if name in SHARED}
    _fill(layers[0], checkpoint.read(f"{_prefix(model, 0)}{name}" for name in shared), _prefix(model, 0), device)
    return model


def _prefix(model: PreTrainedModel, index: int) -> str:
    """Give what the names of a layer's tensors start with."""
    return f"{model.base_model_prefix}.encoder.layers.{index}."


def _fill(layer: nn.Module, tensors: Mapping[str, Tensor], prefix: str, device: torch.device) -> None:
    """Put tensors of the checkpoint into a layer, in float32 where they are floating-point numbers.

    Raises:
        UserError: A tensor has another shape than in the layer.
    """
    copies = {
        name.removeprefix(prefix): tensor.to(device, torch.float32 if tensor.is_floating_point() else None, copy=True)
        for name, tensor in tensors.items()
    }
    try:
        layer.load_state_dict(copies, strict=False, assign=True)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"layer {prefix.rstrip('.')} does not fit the checkpoint's config.json: {reason}") from error


class _Layers:
    """Loads layers of a checkpoint into a model one at a time, and writes each to a shard when it is done."""

    def __init__(self, checkpoint: Checkpoint, model: PreTrainedModel, destination: Path) -> None:
        self.checkpoint = checkpoint
        self.model = model
        self.destination = destination
        self.layers = encoder_layers(model)
        self.shards = len(self.layers) + 1
        self.pruned = {f"{matrix.name}.weight": matrix for matrix in prunable_matrices(model)}
        self.weight_map: dict[str, str] = {}
        self.bytes = 0

    @contextmanager
    def load(self, index: int, outcome: Outcome) -> Iterator[bool]:
        """Within the block the layer has its weights; after it, what has become of them is on disk, with reports."""
        layer, prefix = self.layers[index], _prefix(self.model, index)
        hollow = layer.state_dict()  # on meta, but for what all layers share
        _fill(layer, self.checkpoint.read(f"{prefix}{name}" for name in hollow), prefix, self.model.device)
        done = self.destination / f"layer-{index}{_RESUMES}"
        own = {name: matrix for name, matrix in self.pruned.items() if name.startswith(prefix)}
        if done.is_file():
            with safe_open(done, framework="pt") as file:
                for name, matrix in own.items():
                    matrix.weight.data.copy_(file.get_tensor(name))
                rows = json.loads(file.metadata()["reports"])
            outcome.reports |= {row["name"]: MatrixReport(**row) for row in rows}
            yield True
        else:
            yield False
            # In float32, with which the layers behind were calibrated.
            weights = {name: matrix.weight.detach().cpu().contiguous() for name, matrix in own.items()}
            rows = [asdict(outcome.reports[matrix.name]) for matrix in own.values()]
            with write_file(done) as temporary:
                save_file(weights, temporary, {"reports": json.dumps(rows)})
        tensors = self.checkpoint.read(name for name in self.checkpoint.files if name.startswith(prefix))
        for name in tensors.keys() & own.keys():
            tensors[name] = own[name].weight.detach().to("cpu", tensors[name].dtype)
        layer.load_state_dict(hollow, assign=True)
        self._write(index + 2, tensors)

    def write_rest(self) -> None:
        """Write what is not in the layers, the settings and the index."""
        self._write(1, self.checkpoint.read(name for name in self.checkpoint.files if name not in self.weight_map))
        for path in self.checkpoint.folder.glob("*.json"):
            if not path.name.endswith(".index.json"):
                shutil.copyfile(path, self.destination / path.name)
        index = {"metadata": {"total_size": self.bytes}, "weight_map": dict(sorted(self.weight_map.items()))}
        (self.destination / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _write(self, number: int, tensors: dict[str, Tensor]) -> None:
        if broken := not_finite(tensors):
            raise UserError(f"{broken} came to numbers that are not finite in {tensors[broken].dtype}; use float32")
        name = f"model-{number:05}-of-{self.shards:05}.safetensors"
        save_file(tensors, self.destination / name, {"format": "pt"})
        self.weight_map |= dict.fromkeys(tensors, name)
        self.bytes += sum(tensor.nbytes for tensor in tensors.values())
