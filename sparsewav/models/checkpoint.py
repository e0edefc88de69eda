"""Checkpoints on disk: what a folder says that it holds, whether it does, and reading it tensor by tensor.

Headers tell names, shapes and types of all tensors, so that a folder is refused before anything is allocated.
"""

import hashlib
import json
import math
import re
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    MODEL_FOR_CTC_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCTC,
    PretrainedConfig,
    PreTrainedModel,
)

from sparsewav.errors import UserError
from sparsewav.pruning.encoder import check_family
from sparsewav.pruning.families import encoder_config, family_of, known_family

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"

WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.bin.index.json")
"""Patterns of the files with weights, whole or in shards, and of their indices."""

MASK_EMBEDDING = "masked_spec_embed"
COUNT = ".num_batches_tracked"
OPTIONAL = (MASK_EMBEDDING, COUNT)
"""How the names end of what published checkpoints may lack, which is zero then. The embedding replaces masked frames in
training, and nothing else reads it; SpecAugment's paper sets what it masks to zero, and a random number would make of
every load another model. No batch norm that has a momentum reads the count of batches, which a model in half precision
may have stored in float32."""

SETTINGS = (".json", ".md", ".model", ".txt")
"""Suffixes of the files beside the weights: configuration, card, and those of tokenizer and feature extractor."""

HEADS = ("lm_head.", "ctc_head.")
"""What the names of a CTC head's tensors start with."""

PRETRAINING = (
    *("quantizer.", "project_q.", "project_hid.", "ctc_proj.", "speaker_proj."),
    *("label_embeddings_concat", "layer_norm_for_extract."),
)
"""What the names of tensors start with that self-supervised pretraining alone needs, in transformers' classes of it."""

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
        names = {name: _name_in(model, name, expected) for name in self.files}
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
                raise UserError(f"{path} has {name} in {stored.get_dtype()}, which is not read; save it in float32")
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
            raise UserError(f"{path} says that {name} is in {file!r}, which is no file in its folder; fetch it again")
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


def read_config(source: str, called: str) -> PretrainedConfig:
    """Read the configuration of a CTC model in a folder; code that it names is never run.

    Args:
        source: The folder.
        called: What the user called it, for messages.

    Raises:
        UserError: There is none, its family is unknown, or it is broken.
    """
    try:
        path = Path(source) / "config.json"
        if path.parent.is_dir() and not path.is_file():
            raise ValueError(f"{source} is no model's folder: it has no config.json")
        if path.is_file():
            settings = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(settings, dict):
                raise ValueError("config.json is not a JSON object")
            labels = settings.get("num_labels")
            if isinstance(labels, int) and labels > 100_000:  # transformers makes a name for each
                raise ValueError(f"config.json has num_labels={labels}, which no CTC model needs")
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        numbers = _numbers(config.to_dict())
    except Exception as error:  # a broken configuration raises almost any error
        raise UserError(
            f"{called} cannot be loaded: {first_line(error)} (give the whole folder of one model)"
        ) from error
    if type(config) not in MODEL_FOR_CTC_MAPPING:  # otherwise its layers may tell how it is treated
        check_family(config.model_type, called)
    for key in ("quantization_config", "transformers_weights"):
        if getattr(config, key, None) is not None:
            raise UserError(f"{called} has {key} in its config.json, which is not supported; give a plain checkpoint")
    for key, number in numbers:
        if not math.isfinite(number):
            raise UserError(f"{called} has {key}={number} in its config.json; give it a finite number")
    size: Any = getattr(config, "vocab_size", None)  # an encoder of some families has no such setting
    if not (isinstance(size, int) and size >= 1) and not (size is None and is_encoder(config, None)):
        raise UserError(f"{called} has vocab_size={size} in its config.json; give the size of its head")
    for key in ("conv_kernel", "conv_stride"):
        if min(getattr(config, key, (1,)), default=0) < 1:  # a model that takes features has none
            raise UserError(
                f"{called} has {key}={getattr(config, key)} in its config.json; numbers from 1 belong there"
            )
    return config


def is_encoder(config: PretrainedConfig, stored: Iterable[str] | None) -> bool:
    """Tell whether a checkpoint is an encoder without a CTC head.

    It is one if it has no tensor of a head, and its ``architectures`` do not say that it should.

    Args:
        config: Its configuration.
        stored: The names of its tensors; None if they are not known, and the configuration alone tells.
    """
    said = config.architectures or []
    if stored is None and not said:
        return False
    return not any(name.endswith("ForCTC") for name in said) and not any(
        name.startswith(HEADS) for name in stored or ()
    )


def _numbers(settings: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """Give all numbers of a configuration, each with its key."""
    if isinstance(settings, dict):
        for name, value in settings.items():
            yield from _numbers(value, str(name))
    elif isinstance(settings, list | tuple):
        for value in settings:
            yield from _numbers(value, key)
    elif isinstance(settings, float):
        yield key, settings


def make_skeleton(config: PretrainedConfig, stored: Mapping[str, Tensor], where: str) -> PreTrainedModel:
    """Give the model that a configuration describes on the meta device, where its weights take no memory.

    Args:
        config: The configuration.
        stored: The headers of the stored tensors: a configuration that wants more layers than they have, or wider ones,
            is refused first.
        where: The folder or file, for messages.

    Raises:
        UserError: The configuration describes no model, or another one.
    """
    # The settings that say how many modules of a kind there are: sizes take no memory here, but modules take time.
    encoder, family = encoder_config(config), known_family(config.model_type)
    counts = {"num_hidden_layers": family.layers} if family else {}
    if family is None or family.front == "feature_extractor":
        counts["conv_dim"] = "feature_extractor.conv_layers"
    if getattr(config, "add_adapter", False):
        counts["num_adapter_layers"] = "adapter.layers"
    if config.model_type == "data2vec-audio":
        counts["num_conv_pos_embeddings"] = "encoder.pos_conv_embed.layers"
    for key, part in counts.items():
        wanted: Any = getattr(encoder, key, None)
        wanted = len(wanted) if isinstance(wanted, list | tuple) else wanted
        matches = [match for name in stored if (match := re.match(rf"(.*\b{re.escape(part)})\.(\d+)\.", name))]
        found = {int(match[2]): match[1] for match in matches}
        if isinstance(wanted, int) and wanted > len(found):
            missing = next(index for index in range(wanted) if index not in found)
            raise UserError(
                f"{where} has no tensor {next(iter(found.values()), part)}.{missing}.*, and its config.json says "
                f"{key}={getattr(encoder, key)}; give the whole folder of one model"
            )
    # transformers makes the embedding of masked frames in memory, also of what takes none otherwise.
    width = max((size for tensor in stored.values() for size in tensor.shape), default=0)
    if encoder.hidden_size > width:
        raise UserError(
            f"{where} has no tensor that is as wide as hidden_size={encoder.hidden_size} in its config.json; give the "
            "whole folder of one model"
        )
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            kind = AutoModel if is_encoder(config, stored) else AutoModelForCTC
            skeleton: PreTrainedModel = kind.from_config(config)
    except Exception as error:  # a broken configuration raises almost any error
        raise UserError(
            f"the config.json of {where} does not describe a model ({first_line(error)}); fetch it again"
        ) from error
    family_of(skeleton)
    return skeleton


def check_tensors(skeleton: PreTrainedModel, stored: Mapping[str, Tensor], where: str) -> None:
    """Compare the names, shapes and types of stored tensors with those of the model.

    Args:
        skeleton: The model, whose values do not matter.
        stored: The tensors by their names in the file, or their headers.
        where: The folder or file, for messages.

    Raises:
        UserError: They are not the same, as far as :func:`refuse_differences` minds.
    """
    expected = skeleton.state_dict()
    found = {_name_in(skeleton, name, expected): tensor for name, tensor in stored.items()}
    both = expected.keys() & found.keys()
    refuse_differences(
        skeleton,
        where,
        missing=expected.keys() - both,
        unexpected=found.keys() - both,
        mismatched=[
            f"{name} ({tuple(found[name].shape)} instead of {tuple(expected[name].shape)})"
            for name in both
            if expected[name].shape != found[name].shape
        ],
    )
    for name in sorted(name for name in both if not name.endswith(COUNT)):
        wanted, given = expected[name], found[name]
        if given.is_floating_point() != wanted.is_floating_point() or (
            not wanted.is_floating_point() and given.dtype != wanted.dtype
        ):
            kind = "floating-point numbers" if wanted.is_floating_point() else str(wanted.dtype).removeprefix("torch.")
            given_kind = str(given.dtype).removeprefix("torch.")
            raise UserError(f"{where} has {name} in {given_kind}, where {kind} belong; fetch it again")


def _name_in(model: PreTrainedModel, name: str, expected: Collection[str]) -> str:
    """Give a tensor's name in the model, which old checkpoints and those of a bare encoder differ from."""
    for old, new in ((".weight_g", "0"), (".weight_v", "1")):  # weight normalization before PyTorch 2.1
        if name.endswith(old):
            name = f"{name.removesuffix(old)}.parametrizations.weight.original{new}"
    prefix = f"{model.base_model_prefix}."
    if name in expected:
        return name
    other = name.removeprefix(prefix) if name.startswith(prefix) else prefix + name
    return other if other in expected else name


def refuse_differences(
    model: PreTrainedModel,
    where: str,
    *,
    missing: Collection[str],
    unexpected: Collection[str],
    mismatched: Collection[str],
) -> None:
    """Refuse a checkpoint whose tensors are not those of the model.

    Raises:
        UserError: There are differences, except that :data:`OPTIONAL` may be missing and :data:`PRETRAINING` more.
    """
    ties: Any = model._tied_weights_keys or {}  # of two names for one tensor, a file has one
    tied = {name: other for pair in dict(ties).items() for name, other in (pair, pair[::-1])}
    missing = {name for name in missing if not name.endswith(OPTIONAL) and tied.get(name, name) in missing}
    unexpected = {name for name in unexpected if not name.startswith(PRETRAINING)}
    said = (model.config.architectures or [type(model).__name__])[0]
    if unexpected and not missing and not said.endswith(("ForCTC", "ForPreTraining", "Model", "Encoder")):
        raise UserError(
            f"{where} is a {said} by its config.json, with {some(sorted(unexpected))}; give a CTC model, or an encoder "
            "without a head"
        )
    for what, names in (
        ("lacks", missing),
        ("has tensors that its config.json knows nothing of:", unexpected),
        ("has another shape than its config.json says for", mismatched),
    ):
        if names:
            remedy = "give the whole folder of one model"
            if names is missing and all(name.startswith(HEADS) for name in names):
                remedy += f", or train a head with sparsewav-train initial_model={where}"
            raise UserError(f"{where} {what} {some(sorted(names))}; {remedy}")


def load_whole(
    load: Callable[..., Any], source: str | None, where: str, *, notes: list[str] | None = None, **options: Any
) -> PreTrainedModel:
    """Load a model with ``from_pretrained``, and refuse it if any of its tensors did not come from the checkpoint.

    Nothing that is loaded depends on the state of the random generators, or changes it.

    Args:
        load: ``from_pretrained`` of a class.
        source: Its first argument.
        where: The folder or file, for messages.
        notes: Gets a sentence about what was left out, because only the pretraining needs it.
        options: Further arguments of ``from_pretrained``.

    Raises:
        UserError: A tensor is missing, unknown, of another shape, NaN or infinite.
    """
    with torch.random.fork_rng(devices=[]):
        # Mismatched sizes are reported below.
        model, info = load(source, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    mismatched = [item if isinstance(item, str) else item[0] for item in info["mismatched_keys"]]
    missing, unexpected = info["missing_keys"], info["unexpected_keys"]
    refuse_differences(model, where, missing=missing, unexpected=unexpected, mismatched=mismatched)
    state = model.state_dict()
    for name in missing:
        if name.endswith(OPTIONAL):
            state[name].zero_()
    refuse_infinite(state, where)
    if unexpected and notes is not None:
        notes.append(f"{where} has {some(sorted(unexpected))}, which the pretraining alone needs; left out")
    return model


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


def some(names: Iterable[str]) -> str:
    """List the first three names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def first_line(error: Exception) -> str:
    """Give the first line of an error's message, or its type if it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
