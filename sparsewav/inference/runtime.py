"""Models that were exported, run by ONNX Runtime or OpenVINO, with what transcribing asks of a model.

:mod:`~sparsewav.inference.exchange` writes them. They run on the CPU, in as many threads as PyTorch has.
"""

import copy
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import MODEL_FOR_CTC_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from sparsewav.errors import UserError
from sparsewav.files import content_hash
from sparsewav.models.checkpoint import EXPORTED, WEIGHT_FILES, first_line
from sparsewav.models.load import SpeechModel, choose_device
from sparsewav.models.processor import agree_on_audio, agree_on_tokens, load_processor
from sparsewav.models.skeleton import read_config
from sparsewav.pruning.encoder import input_key
from sparsewav.settings.run import Model
from sparsewav.training.recipes import load_or_train

MASK = "attention_mask"
LOGITS = "logits"

Session = Callable[[dict[str, np.ndarray]], np.ndarray]
"""Gives the logits (batch, frames, vocabulary) of the inputs by their names."""


class ExportedModel(PreTrainedModel):
    """A model in a file; :func:`exported_model` makes it a model of transformers, whose own weights take no memory.

    Attributes:
        path: The file.
        files: All files with its graph and weights.
        inputs: The names of what it takes.
        runtime: Name and version of what runs it.
    """

    path: Path
    files: list[Path]
    inputs: list[str]
    runtime: str
    session: Session

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Of the inputs."""
        return torch.float32

    def forward(self, inputs: Tensor, attention_mask: Tensor | None = None) -> CausalLMOutput:
        """Give the logits, as the model of transformers does."""
        return CausalLMOutput(logits=torch.from_numpy(self.run(inputs, attention_mask)))

    def run(
        self, inputs: Float[Tensor, "batch length ..."], attention_mask: Int[Tensor, "batch length"] | None = None
    ) -> Float[np.ndarray, "batch frames vocabulary"]:
        """Give the logits; without a mask nothing is padded.

        Raises:
            UserError: Utterances are padded, and the file has no input for their mask.
        """
        feed = {input_key(self): inputs.numpy()}
        if MASK in self.inputs:
            mask = torch.ones(inputs.shape[:2], dtype=torch.long) if attention_mask is None else attention_mask
            feed[MASK] = mask.to(torch.long).numpy()
        elif attention_mask is not None and not attention_mask.all():
            raise UserError(
                f"{self.path} takes no {MASK}, without which padding would change what it writes; write it with "
                "sparsewav-export"
            )
        return self.session(feed)

    def __repr__(self) -> str:
        return f"{type(self).__name__} in {self.path}, run by {self.runtime}"

    @property
    def fingerprint(self) -> list[Any]:
        """What its output depends on: the bytes of its files, what runs it, and in how many threads."""
        settings = self.config.to_json_string(use_diff=False)
        return [[content_hash(file) for file in self.files], self.runtime, torch.get_num_threads(), settings]


def exported_model(
    path: Path, kind: type[PreTrainedModel], config: PretrainedConfig, *, bfloat16: bool = False
) -> ExportedModel:
    """Start the runtime of an exported model.

    Args:
        path: The file of the model.
        kind: The class of transformers that it was made from.
        config: Its configuration.
        bfloat16: Whether what the file has in float32 is computed in bfloat16, which OpenVINO alone can do.

    Raises:
        UserError: A file is missing or broken or that of another model, its runtime is not installed, or there is no
            bfloat16 on this processor.
    """
    files = exported_files(path)
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} is missing, which belongs to {path}; copy the whole folder")
    try:
        session, inputs, outputs, runtime = _START["onnx" if path.suffix == ".onnx" else "openvino"](path, bfloat16)
    except UserError:
        raise
    except Exception as error:  # a broken file raises almost any error
        raise UserError(
            f"{path} cannot be loaded: {first_line(error)}; write it again with sparsewav-export"
        ) from error
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            model: Any = kind(copy.deepcopy(config)).eval()
    except Exception as error:  # a broken configuration raises almost any error
        raise UserError(f"the config.json of {path} does not describe a CTC model ({first_line(error)})") from error
    key = input_key(model)
    if not {key} <= set(inputs) <= {key, MASK} or LOGITS not in outputs:
        raise UserError(
            f"{path} takes {', '.join(inputs)} and gives {', '.join(outputs)}; a {kind.__name__} takes {key}, perhaps "
            f"{MASK}, and gives {LOGITS}: write it with sparsewav-export"
        )
    model.__class__ = type(kind.__name__, (ExportedModel, kind), {"__module__": ExportedModel.__module__})
    model.path, model.files, model.inputs, model.runtime, model.session = path, files, inputs, runtime, session
    return model


def load_exported(path: str | Path) -> SpeechModel:
    """Load a model that was exported, with its processor.

    >>> speech = load_exported("small-onnx")  # doctest: +SKIP
    >>> sparsewav.transcribe(speech, "talk.wav")[0].text  # doctest: +SKIP

    Args:
        path: A folder that ``sparsewav-export --format onnx`` or ``openvino`` wrote, or the model's file in it. A file
            of another exporter will do that has the inputs and the output of the model of transformers.

    Raises:
        UserError: There is no such model, a file is missing or broken, or its runtime is not installed.
    """
    file = exported_file(path)
    if file is None:
        raise UserError(f"{path} holds no exported model ({' or '.join(EXPORTED.values())}); check the path")
    config = read_config(str(file.parent), str(path))
    kind: Any = MODEL_FOR_CTC_MAPPING.get(type(config), None)
    if kind is None:
        raise UserError(f"{path} is of the family {config.model_type!r}, of which there is no CTC model")
    model = exported_model(file, kind, config)
    processor = load_processor(str(file.parent))
    warnings = agree_on_tokens(model, processor, str(path)) + agree_on_audio(model, processor, str(path))
    return SpeechModel(Path(path).name, model, processor, warnings, file.parent)


def load_runnable(settings: Model, device: str = "auto") -> SpeechModel:
    """Load a model that transcribes: an exported one, or what :func:`~sparsewav.training.recipes.load_or_train` takes.

    Args:
        settings: Name the model.
        device: As of the commands. An exported model runs on the CPU.

    Raises:
        UserError: There is no such model, it is broken, or it does not run on the device.
    """
    if exported_file(settings.name_or_path) is None:
        return load_or_train(settings, choose_device(device), key="")
    if device not in ("auto", "cpu"):
        raise UserError(
            f"{settings.name_or_path} is an exported model, which runs on the CPU; leave out device={device}"
        )
    return load_exported(settings.name_or_path)


def exported_file(path: str | Path) -> Path | None:
    """Give the file of an exported model that a user named, or its folder; None for anything else.

    Raises:
        UserError: The file that is named does not exist, or the folder holds two.
    """
    path = Path(path).expanduser()
    if path.suffix in (".onnx", ".xml") and not path.is_dir():
        if not path.is_file():
            raise UserError(f"{path} does not exist; check the path")
        return path
    found = [path / name for name in EXPORTED.values() if (path / name).is_file()]
    if not found or any(next(path.glob(pattern), None) for pattern in WEIGHT_FILES):
        return None
    if len(found) > 1:
        raise UserError(f"{path} holds {' and '.join(file.name for file in found)}; name one of them")
    return found[0]


def exported_files(path: Path) -> list[Path]:
    """Give all files of an exported model: that of the graph, and that of the weights where they are apart."""
    if path.suffix == ".xml":
        return [path, path.with_suffix(".bin")]
    return [path, *(data for data in [path.with_name(f"{path.name}.data")] if data.is_file())]


def of_extra(module: str, extra: str) -> Any:
    """Import a library that comes with one of the package's extras.

    Raises:
        UserError: It is not installed, or broken.
    """
    if extra == "openvino":
        # On its import OpenVINO would report the use to its makers; without this package of theirs it cannot.
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        return import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            raise UserError(f"{name} is not installed; install it: pip install 'sparsewav[{extra}]'") from error
        raise UserError(
            f"{name} cannot be imported ({first_line(error)}); install it again: pip install 'sparsewav[{extra}]'"
        ) from error


Started = tuple[Session, list[str], list[str], str]
"""A session, the names of its inputs and outputs, and what runs it."""


def _start_onnx(path: Path, bfloat16: bool) -> Started:
    if bfloat16:
        raise UserError("ONNX Runtime has no bfloat16 on the CPU")
    onnxruntime = of_extra("onnxruntime", "onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.log_severity_level = 3  # errors, which are raised, too
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        return session.run([LOGITS], dict(inputs))[0]

    names = [[item.name for item in items] for items in (session.get_inputs(), session.get_outputs())]
    return run, names[0], names[1], f"onnxruntime {onnxruntime.__version__}"


def _start_openvino(path: Path, bfloat16: bool) -> Started:
    openvino = of_extra("openvino", "openvino")
    core = openvino.Core()
    if bfloat16 and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise UserError("this processor does not multiply bfloat16, for which OpenVINO would compute in float32")
    # Some processors would round to bfloat16 unasked.
    precision = "bf16" if bfloat16 else "f32"
    options = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    model = core.compile_model(str(path), "CPU", options | {"PERFORMANCE_HINT": "LATENCY"})

    def run(inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        return np.array(model(dict(inputs))[LOGITS])  # a copy, because the next call overwrites it

    names = [[name for item in items for name in item.get_names()] for items in (model.inputs, model.outputs)]
    return run, names[0], names[1], f"openvino {openvino.__version__}{', bfloat16' * bfloat16}"


_START: dict[str, Callable[[Path, bool], Started]] = {"onnx": _start_onnx, "openvino": _start_openvino}
