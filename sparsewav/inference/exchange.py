"""Models for other runtimes: ONNX and OpenVINO files, in float32 or quantised to int8 by the runtimes' own tools.

An export may succeed and give other numbers, for instance at lengths that it was not traced with. So every file is run,
and its logits are compared with the model's, before it appears (:mod:`~sparsewav.inference.agreement`).
"""

import contextlib
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsewav import __version__
from sparsewav.data.batches import Batch, SpeechBatches
from sparsewav.data.utterances import Utterance
from sparsewav.errors import UserError
from sparsewav.inference.agreement import TRACED, check_same, noise
from sparsewav.inference.runtime import LOGITS, MASK, ExportedModel, exported_model, of_extra
from sparsewav.models.bitmask import BITMASK_NOTE
from sparsewav.models.checkpoint import EXPORTED, first_line
from sparsewav.models.load import SpeechModel
from sparsewav.pruning.encoder import input_key, projections_as_modules, takes_padding

OPSET = 17
"""Of ONNX: the newest that PyTorch's exporter writes without a change of version."""

WHOLE_FILE = 1_900_000_000
"""Bytes of weights from which they lie in a file of their own: a file of ONNX ends at 2 GB."""

CALIBRATED = 32
"""Utterances at most that int8 is calibrated on."""

RECORD = "sparsewav_export.json"
"""Says in the folder what it is, how it was made, and how it scored."""

NOTE = """
**This folder has the model for {runtime}** (`{file}`), written by `sparsewav-export`: `sparsewav-transcribe --model`
and `sparsewav-evaluate` run it. `{record}` says how it compares with the model that it was made from.
"""

RUNTIMES = {"onnx": "ONNX Runtime", "openvino": "OpenVINO"}

EXTRAS = {"onnx": ("onnx", "onnxruntime"), "openvino": ("onnx", "openvino")}
"""The libraries that each format needs."""

_KNOWN_WARNINGS = (
    "You are using the legacy TorchScript-based ONNX export",
    "The feature will be removed",  # of the same exporter, from its own code
    "Exporting aten::index operator of advanced indexing",  # negative indices, of which the models have none
    "Constant folding - Only steps=1",
    "To copy construct from a tensor",  # SEW-D
)


def check_libraries(format: str, *, int8: bool) -> None:
    """Check that what an export needs is installed.

    Raises:
        UserError: It is not.
    """
    for module in (*EXTRAS[format], *(["nncf"] if int8 and format == "openvino" else [])):
        of_extra(module, format)


def int8_calibration(speech: SpeechModel, utterances: Sequence[Utterance]) -> SpeechBatches:
    """Give batches that int8 is calibrated on: each utterance alone, without its transcript."""
    return SpeechBatches([replace(one, text="") for one in utterances], speech.processor, 1e-3, padding=False)


def write_exchange(
    speech: SpeechModel, folder: Path, format: str, calibration: Sequence[Batch] | None = None
) -> ExportedModel:
    """Write a model for another runtime into a folder, with the settings and the processor that belong to it.

    Takes the arguments of :func:`write_graph`, gives what it does, and raises its errors.
    """
    exported = write_graph(speech, folder, format, calibration)
    card = speech.folder / "README.md" if speech.folder else None
    if card is not None and card.is_file():
        note = NOTE.format(runtime=RUNTIMES[format], file=exported.path.name, record=RECORD)
        text = card.read_text(encoding="utf-8").replace(BITMASK_NOTE, "").rstrip()
        (folder / card.name).write_text(f"{text}\n{note}", encoding="utf-8")
    speech.model.config.save_pretrained(folder)
    speech.processor.save_pretrained(folder)
    return exported


def write_graph(
    speech: SpeechModel, folder: Path, format: str, calibration: Sequence[Batch] | None = None
) -> ExportedModel:
    """Write a model for another runtime into a folder, without what belongs to it.

    The float32 file is compared with the model before it is quantised. ONNX Runtime quantises the weights of the
    matrix products and, at run time, what they read; NNCF quantises both as for transformers, with ranges that it
    takes from the calibration set. Convolutions of more than one frame stay in float32: quantised, they cost accuracy.

    Args:
        speech: A CTC model on the CPU in float32.
        folder: An empty folder.
        format: ``onnx`` or ``openvino``.
        calibration: Batches to calibrate int8 on, which ONNX Runtime does not read; None for float32.

    Returns:
        The written model.

    Raises:
        UserError: A library is missing, or the model's family cannot be exported: the exporter fails, or its file gives
            other numbers.
    """
    check_libraries(format, int8=calibration is not None)
    path = folder / EXPORTED[format]
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        traced = Path(temporary) / EXPORTED["onnx"]
        _trace(speech, traced)
        if format == "onnx":
            _convert_onnx(traced, path, int8=calibration is not None, check=speech)
        else:
            _convert_openvino(traced, path, calibration, check=speech)
    return _started(path, speech)


def write_record(
    folder: Path, speech: SpeechModel, exported: ExportedModel, *, int8: bool, figures: dict[str, Any]
) -> None:
    """Write what an exported folder is: format, family, sampling rate, versions, and figures as they were measured."""
    format = next(format for format, name in EXPORTED.items() if name == exported.path.name)
    libraries = [*EXTRAS[format], *(["nncf"] if int8 and format == "openvino" else []), "torch", "transformers"]
    record = {
        "format": format,
        "file": exported.path.name,
        "inputs": exported.inputs,
        "int8": int8,
        "opset": OPSET,
        "family": speech.model.config.model_type,
        "sampling_rate": speech.processor.feature_extractor.sampling_rate,
        "source": speech.name,
        "versions": {"sparsewav": __version__} | {name: version(name) for name in libraries},
    }
    (folder / RECORD).write_text(json.dumps(record | figures, indent=1) + "\n", encoding="utf-8")


def _started(path: Path, speech: SpeechModel) -> ExportedModel:
    return exported_model(path, type(speech.model), speech.model.config)


class _Logits(nn.Module):
    """A model that takes its inputs by position and gives a tensor, as the exporter wants it."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        arguments = {} if attention_mask is None else {MASK: attention_mask}
        return self.model(**{input_key(self.model): inputs}, **arguments).logits


def _trace(speech: SpeechModel, path: Path) -> None:
    """Write the ONNX file of a model in float32, with any number and length of utterances.

    Raises:
        UserError: The exporter fails.
    """
    model, onnx = speech.model, of_extra("onnx", "onnx")
    key, padded = input_key(model), takes_padding(model)
    # An odd number of frames, so that what SEW adds to one is traced; it adds nothing to an even one.
    inputs, mask = noise(model, [TRACED, TRACED - 13 * padded])
    axes = {name: {0: "batch", 1: "length"} for name in (key, MASK)} | {LOGITS: {0: "batch", 1: "frames"}}
    names = [key, MASK] if padded else [key]
    attention = model.config._attn_implementation
    try:
        model.set_attn_implementation("eager")
        with _quiet_exporter(), _nothing_printed(), torch.no_grad(), projections_as_modules(model):
            torch.onnx.export(
                _Logits(model).eval(),
                (inputs, mask) if padded else (inputs,),
                str(path),
                input_names=names,
                output_names=[LOGITS],
                dynamic_axes={name: axes[name] for name in (*names, LOGITS)},
                opset_version=OPSET,
                dynamo=False,
            )
        if sum(parameter.nbytes for parameter in model.parameters()) > WHOLE_FILE:
            graph = onnx.load(path)
            for item in path.parent.iterdir():  # PyTorch writes a file for every tensor
                item.unlink()
            onnx.save(graph, path, save_as_external_data=True, location=f"{path.name}.data")
    except Exception as error:  # the exporter raises almost any error
        raise UserError(
            f"{speech.name}, of the family {model.config.model_type!r}, cannot be exported: PyTorch's exporter fails "
            f"({first_line(error)[:200]}); nothing was written"
        ) from error
    finally:
        model.set_attn_implementation(attention)


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    with warnings.catch_warnings():
        for message in _KNOWN_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        # That a branch or a number of the traced batch is fixed: check_same finds out whether one matters.
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        yield


@contextlib.contextmanager
def _nothing_printed() -> Iterator[None]:
    """Within the block, nothing is printed: no bar of NNCF, and not the whole graph where PyTorch's exporter fails."""
    kept = os.dup(1)
    sys.stdout.flush()
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            os.dup2(nowhere.fileno(), 1)  # the graph is printed by C++
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _convert_onnx(traced: Path, path: Path, *, int8: bool, check: SpeechModel) -> None:
    check_same(check, _started(traced, check))
    if not int8:
        for item in traced.parent.iterdir():
            item.replace(path.parent / item.name)
        return
    quantization = of_extra("onnxruntime.quantization", "onnx")
    with _quiet_logger(""):  # it recommends a preparation that changes nothing here
        quantization.quantize_dynamic(
            traced,
            path,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            weight_type=quantization.QuantType.QInt8,
            reduce_range=True,  # 7 bits: the products of 8 overflow on x86 processors without VNNI
            extra_options={"WeightSymmetric": True},  # so that zero stays zero
            use_external_data_format=any(item != traced for item in traced.parent.iterdir()),
        )


def _convert_openvino(traced: Path, path: Path, calibration: Sequence[Batch] | None, *, check: SpeechModel) -> None:
    openvino = of_extra("openvino", "openvino")
    model = openvino.Core().read_model(str(traced))
    whole = traced.parent / path.name
    openvino.save_model(model, str(whole), compress_to_fp16=False)
    check_same(check, _started(whole, check))
    if calibration is None:
        for item in (whole, whole.with_suffix(".bin")):
            item.replace(path.parent / item.name)
        return
    nncf = of_extra("nncf", "openvino")
    padded, key = takes_padding(check.model), input_key(check.model)
    feeds = [{name: batch[name].numpy() for name in ((key, MASK) if padded else (key,))} for batch in calibration]
    with _quiet_logger("nncf"), _nothing_printed():
        quantised = nncf.quantize(
            model,
            nncf.Dataset(feeds),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(feeds),
            ignored_scope=nncf.IgnoredScope(types=["Convolution", "GroupConvolution"], validate=False),
        )
    openvino.save_model(quantised, str(path), compress_to_fp16=False)


@contextlib.contextmanager
def _quiet_logger(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def size_of(exported: ExportedModel) -> int:
    """Give the bytes of the files with the graph and the weights."""
    return sum(os.path.getsize(file) for file in exported.files)
