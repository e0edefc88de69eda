"""What a configuration describes: the model without its weights, and whether a checkpoint holds that model's tensors.

A folder is refused by headers alone, before anything is allocated.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
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
from sparsewav.models.checkpoint import first_line, name_in, refuse_infinite, shown, some
from sparsewav.pruning.encoder import check_family
from sparsewav.pruning.families import encoder_config, family_of, known_family

MASK_EMBEDDING = "masked_spec_embed"
COUNT = ".num_batches_tracked"
OPTIONAL = (MASK_EMBEDDING, COUNT)
"""How the names end of what published checkpoints may lack, which is zero then. The embedding replaces masked frames in
training, and nothing else reads it; SpecAugment's paper sets what it masks to zero, and a random number would make of
every load another model. No batch norm that has a momentum reads the count of batches, which a model in half precision
may have stored in float32."""

HEADS = ("lm_head.", "ctc_head.")
"""What the names of a CTC head's tensors start with."""

PRETRAINING = (
    *("quantizer.", "project_q.", "project_hid.", "ctc_proj.", "speaker_proj."),
    *("label_embeddings_concat", "layer_norm_for_extract."),
)
"""What the names of tensors start with that self-supervised pretraining alone needs, in transformers' classes of it."""


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
    names = {name: name_in(skeleton, name, expected) for name in stored}
    if len(set(names.values())) < len(names):
        twice = next(name for name, count in Counter(names.values()).items() if count > 1)
        same = " and ".join(shown(name) for name, other in names.items() if other == twice)
        raise UserError(f"{where} has {same}, of which the model has one; fetch it again")
    found = {names[name]: tensor for name, tensor in stored.items()}
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
    load: Callable[..., Any],
    source: str | None,
    where: str,
    *,
    notes: list[str] | None = None,
    finite: Iterable[Tensor] = (),
    **options: Any,
) -> PreTrainedModel:
    """Load a model with ``from_pretrained``, and refuse it if any of its tensors did not come from the checkpoint.

    Nothing that is loaded depends on the state of the random generators, or changes it.

    Args:
        load: ``from_pretrained`` of a class.
        source: Its first argument.
        where: The folder or file, for messages.
        notes: Gets a sentence about what was left out, because only the pretraining needs it.
        finite: Tensors without NaN or infinite numbers. What lies in the same memory is not read again for that.
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
    known = {_memory_of(tensor) for tensor in finite}
    refuse_infinite({name: tensor for name, tensor in state.items() if _memory_of(tensor) not in known}, where)
    if unexpected and notes is not None:
        notes.append(f"{where} has {some(sorted(unexpected))}, which the pretraining alone needs; left out")
    return model


def _memory_of(tensor: Tensor) -> tuple[int, torch.dtype, torch.Size, tuple[int, ...]]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
