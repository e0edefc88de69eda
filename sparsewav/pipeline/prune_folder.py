"""Pruning a checkpoint on disk layer by layer: for models that memory does not hold whole.

The front end stays in memory. Each transformer layer is read from the checkpoint's safetensors, calibrated on what the
pruned layers before it give, pruned, run on, written to a file of its own and let go. The loop is that of propagation
``sequential`` (:func:`~sparsewav.pruning.layerwise.prune_layer_by_layer`), so that the weights are the very bytes
which :func:`sparsewav.prune` leaves in memory. Killed and called again, it runs the layers that are done and prunes on
from there.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from sparsewav.cache import code_fingerprint
from sparsewav.errors import UserError
from sparsewav.files import content_hash, locked, make_readable, write_file, writing
from sparsewav.models.checkpoint import (
    INDEX,
    SETTINGS,
    WEIGHTS,
    Checkpoint,
    checksum,
    not_finite,
    opened,
    refuse_infinite,
)
from sparsewav.models.load import choose_device, locate_model
from sparsewav.models.skeleton import check_tensors, is_encoder, load_whole, make_skeleton, read_config
from sparsewav.pruning import MatrixReport, PruneReport, Trace, prunable_matrices, prune_model
from sparsewav.pruning.batches import as_sequence
from sparsewav.pruning.encoder import encoder_layers, layers_name, whatever_modes
from sparsewav.pruning.families import encoder_config, family_of
from sparsewav.pruning.layerwise import StageProgress
from sparsewav.pruning.plan import Outcome
from sparsewav.pruning.rest import in_dtype, round_tensor
from sparsewav.settings.pruning import (
    TRANSFORMER,
    Allocation,
    Calibration,
    Pruning,
    Saliency,
    Solver,
    Sparsity,
    Structured,
    Uniform,
    resolve,
)
from sparsewav.settings.quantization import Integers, Quantization
from sparsewav.settings.run import device_faults

SHARED = ("attention.rel_attn_embed.weight",)
"""Parameters of the first layer that all layers read (WavLM's position embedding); they stay in memory."""

logger = logging.getLogger(__name__)

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
    quantization: str | Quantization = "none",
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
    checkpoint's own dtype; tensors that are not pruned keep their bytes, unless they are rounded. Memory holds the
    front end, one layer, its Hessians and the activations of one batch; the hidden states of the calibration set wait
    in the folder for temporary files.

    Args:
        source: A folder with ``config.json`` and ``model.safetensors``, or its shards with their index; or that of a
            run.
        destination: The folder to make; it appears whole when all is done, and ``AutoModelForCTC.from_pretrained``
            loads it. The settings of tokenizer and feature extractor come along. What is done lies beside it until
            then, in float32 besides the checkpoint's own dtype.
        calibration_batches: As in :func:`sparsewav.prune`, and so are the options that are not named here.
        sparsity: As there.
        saliency: As there.
        solver: As there.
        quantization: As there; the checkpoint's dtype must hold the multiples of the scales, which float16 mostly does.
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
    if not isinstance(calibration, Calibration | None):
        raise UserError(f"calibration={calibration} is no Calibration; give Calibration(propagation='sequential')")
    settings = Pruning(
        sparsity=resolve("sparsity", sparsity),
        saliency=resolve("saliency", saliency),
        solver=resolve("solver", solver),
        quantization=resolve("quantization", quantization),
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
    source, destination = Path(locate_model(str(source), "source")), Path(destination).expanduser()
    settings.check()
    if isinstance(settings.sparsity, Structured):
        raise UserError(
            "a checkpoint is pruned layer by layer in the shapes that it has, and sparsity=structured cuts them; "
            "choose another sparsity, or load the model and call sparsewav.prune"
        )
    if settings.calibration.propagation != "sequential":
        raise UserError("a checkpoint is pruned layer by layer; choose calibration.propagation=sequential")
    if settings.solver.weights_outputs:
        raise UserError(
            "solver.output_weighting=fisher takes gradients of the whole model, which is not in memory here; choose "
            "solver.output_weighting=equal, or load the model and call sparsewav.prune"
        )
    if settings.scope != TRANSFORMER:
        raise UserError(f"a checkpoint on disk is pruned in its layers alone; choose scope={TRANSFORMER}")
    if not isinstance(settings.allocation, Uniform) and traces is None:
        raise UserError(
            f"allocation {settings.allocation.name!r} takes gradients of the whole model, which is not in memory here; "
            "choose allocation='uniform', or give traces that estimate_traces found on the whole model"
        )
    for fault in device_faults(str(device)):
        raise UserError(fault)
    device = choose_device(str(device))
    if not source.is_dir():
        raise UserError(f"{source} is not a folder; give the folder of a checkpoint with config.json and {WEIGHTS}")
    with _only_process(destination), whatever_modes(device):
        if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
            raise UserError(f"{destination} is there already; remove it, or choose another folder for the pruned model")
        return _prune(source, destination, calibration_batches, settings, masks, traces, device, progress)


@contextmanager
def _only_process(destination: Path) -> Iterator[None]:
    """Let one process at a time make a destination: the next one waits, and then finds it there."""
    lock = destination.with_name(f".{destination.name}.lock")
    with locked(lock):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)  # a process that waits for it notices, and makes it again


def _prune(
    source: Path,
    destination: Path,
    calibration_batches: Iterable[Mapping[str, Tensor]],
    settings: Pruning,
    masks: Mapping[str, Tensor] | None,
    traces: Mapping[str, Trace] | None,
    device: torch.device,
    progress: StageProgress | None,
) -> PruneReport:
    checkpoint = Checkpoint(source)
    model = _model_without_layers(checkpoint, device)
    batches: Any = as_sequence(calibration_batches)
    identity = [settings, traces, str(device), code_fingerprint()]
    with _kept_folder(destination, _fingerprint(checkpoint, batches, masks or {}, identity)) as unfinished:
        layers = _Layers(checkpoint, model, unfinished, settings.quantization)
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
    report.warnings.extend(layers.warnings)
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
        digest.update(f"{path.name} {content_hash(path)}".encode())
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
        for part in unfinished.glob(".*.part"):  # what a kill left of a file that was being written
            part.unlink()
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
    config: Any = read_config(source, f"source={source}")
    if is_encoder(config, checkpoint.headers):
        raise UserError(f"{source} is an encoder without a CTC head, and not pruned from disk; use sparsewav.prune")
    whole = make_skeleton(config, checkpoint.headers, source)
    if family_of(whole).alike:
        raise UserError(
            f"{source} is of the family {config.model_type!r}, which was never tried and is not pruned from disk; use "
            "sparsewav.prune"
        )
    check_tensors(whole, checkpoint.headers, source)
    checkpoint.rename(whole)
    layers = encoder_layers(whole).float()
    front = checkpoint.read(name for name in checkpoint.files if not name.startswith(f"{layers_name(whole)}."))
    hollow: Any = AutoConfig.from_pretrained(source, trust_remote_code=False)
    encoder_config(hollow).num_hidden_layers = 0
    if getattr(config, "layers", None):  # of a structured model, with an entry for every layer
        hollow.layers = []
    options: dict[str, Any] = {"config": hollow, "state_dict": front, "dtype": torch.float32}
    model = load_whole(type(whole).from_pretrained, None, source, **options).eval().to(device)
    encoder_config(hollow).num_hidden_layers = encoder_config(config).num_hidden_layers
    if hasattr(config, "layers"):
        hollow.layers = config.layers
    encoder_layers(model).extend(layers)
    _fill(layers[0], checkpoint, [name for name, _ in layers[0].named_parameters() if name in SHARED], model, 0)
    return model


def _prefix(model: PreTrainedModel, index: int) -> str:
    """Give what the names of a layer's tensors start with."""
    return f"{layers_name(model)}.{index}."


def _fill(layer: nn.Module, checkpoint: Checkpoint, names: Iterable[str], model: PreTrainedModel, index: int) -> None:
    """Put tensors of the checkpoint into a layer, in float32 where they are floating-point numbers.

    Raises:
        UserError: A number is NaN or infinite.
    """
    prefix = _prefix(model, index)
    tensors = checkpoint.read(f"{prefix}{name}" for name in names)
    refuse_infinite(tensors, str(checkpoint.folder))
    copies = {
        name.removeprefix(prefix): tensor.to(
            model.device, torch.float32 if tensor.is_floating_point() else None, copy=True
        )
        for name, tensor in tensors.items()
    }
    layer.load_state_dict(copies, strict=False, assign=True)


class _Layers:
    """Loads layers of a checkpoint into a model one at a time, and writes each to a shard when it is done."""

    def __init__(
        self, checkpoint: Checkpoint, model: PreTrainedModel, destination: Path, quantization: Quantization
    ) -> None:
        self.checkpoint = checkpoint
        self.model = model
        self.destination = destination
        self.quantization = quantization
        self.layers = encoder_layers(model)
        self.shards = len(self.layers) + 1
        self.pruned = {f"{matrix.name}.weight": matrix for matrix in prunable_matrices(model)}
        self.weight_map: dict[str, str] = {}
        self.bytes = 0
        self.warnings: list[str] = []

    @contextmanager
    def load(self, index: int, outcome: Outcome) -> Iterator[bool]:
        """Within the block the layer has its weights; after it, what has become of them is on disk, with reports."""
        layer, prefix = self.layers[index], _prefix(self.model, index)
        hollow = layer.state_dict()  # on meta, but for what all layers share
        _fill(layer, self.checkpoint, hollow, self.model, index)
        done = self.destination / f"layer-{index}{_RESUMES}"
        own = {name: matrix for name, matrix in self.pruned.items() if name.startswith(prefix)}
        if found := self._read_done(done):
            weights, rows = found
            for name, matrix in own.items():
                matrix.parameter.data.copy_(weights[name])
            outcome.reports |= {row["name"]: MatrixReport(**row) for row in rows}
            yield True
        else:
            yield False
            # In float32, with which the layers behind were calibrated.
            weights = {name: matrix.parameter.detach().cpu().contiguous() for name, matrix in own.items()}
            text = json.dumps([asdict(outcome.reports[matrix.name]) for matrix in own.values()])
            record = json.dumps({"reports": text, "checksum": checksum(weights, text)}, sort_keys=True)
            with write_file(done) as temporary:
                save_file(weights, temporary, {"record": record})
        tensors = self.checkpoint.read(name for name in self.checkpoint.files if name.startswith(prefix))
        for name in tensors.keys() & own.keys():
            weight = own[name].parameter.detach().cpu()
            dtype = tensors[name].dtype
            exact = isinstance(self.quantization, Integers)
            tensors[name] = in_dtype(name, weight, dtype, self.quantization) if exact else weight.to(dtype)
        layer.load_state_dict(hollow, assign=True)
        self._write(index + 2, tensors)

    def _read_done(self, path: Path) -> tuple[dict[str, Tensor], list[dict[str, Any]]] | None:
        """Give the weights and reports of a layer that is done; None if it is not, or if its file was damaged."""
        if not path.is_file():
            return None
        try:
            with opened(path) as file:
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                record = json.loads((file.metadata() or {})["record"])
            if checksum(weights, record["reports"]) == record["checksum"]:
                return weights, json.loads(record["reports"])
        except (UserError, ValueError, KeyError, TypeError, AttributeError):
            pass  # reported below
        sentence = f"{path.name}, which an interrupted pruning left, was damaged; its layer is pruned again"
        logger.warning("%s", sentence)
        self.warnings.append(sentence)
        return None

    def write_rest(self) -> None:
        """Write what is not in the layers, the settings and the index."""
        self._write(1, self.checkpoint.read(name for name in self.checkpoint.files if name not in self.weight_map))
        for path in self.checkpoint.folder.iterdir():
            if path.suffix in SETTINGS and path.suffix != ".md" and not path.name.endswith(".index.json"):
                shutil.copyfile(path, self.destination / path.name)
        index = {"metadata": {"total_size": self.bytes}, "weight_map": dict(sorted(self.weight_map.items()))}
        (self.destination / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _write(self, number: int, tensors: dict[str, Tensor]) -> None:
        tensors = {
            name: round_tensor(name, tensor, self.quantization, name in self.pruned) for name, tensor in tensors.items()
        }
        if broken := not_finite(tensors):
            raise UserError(f"{broken} came to numbers that are not finite in {tensors[broken].dtype}; use float32")
        name = f"model-{number:05}-of-{self.shards:05}.safetensors"
        save_file(tensors, self.destination / name, {"format": "pt"})
        self.weight_map |= dict.fromkeys(tensors, name)
        self.bytes += sum(tensor.nbytes for tensor in tensors.values())
