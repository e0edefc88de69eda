"""Fairseq checkpoints of CTC models and encoders, read without fairseq and converted to checkpoints of transformers.

The format follows from the sources of fairseq, https://github.com/facebookresearch/fairseq: ``fairseq/trainer.py`` (the
file, which ``fairseq_file.py`` reads), ``fairseq/models/wav2vec/wav2vec2.py``, ``wav2vec2_asr.py`` and
``fairseq/models/hubert`` (configuration and parameters), ``fairseq/data/dictionary.py`` (vocabulary).
"""

import ast
import json
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import (
    HubertConfig,
    HubertForCTC,
    HubertModel,
    PretrainedConfig,
    PreTrainedModel,
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2Model,
)

from sparsewav import cache
from sparsewav.errors import UserError
from sparsewav.files import content_hash
from sparsewav.models.checkpoint import first_line, named, refuse_infinite, some
from sparsewav.models.fairseq_file import read_checkpoint

KEY = "model.fairseq_checkpoint"
"""The setting that names a file."""

DICTIONARY = "dict.ltr.txt"
"""Name of the file with fairseq's vocabulary, which lies beside a checkpoint."""

SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")
"""The first four tokens of every dictionary of fairseq; the first one is the CTC blank."""

LIBRISPEECH_LETTERS = "|ETAONIHSRDLUMWCFGYPBVK'XJQZ"
"""The tokens of https://dl.fbaipublicfiles.com/fairseq/wav2vec/dict.ltr.txt, the dictionary of the published models
fine-tuned on LibriSpeech or Libri-light. ``vocab.json`` of facebook/wav2vec2-base-100h has the same."""

ENCODER = "w2v_encoder.w2v_model."
"""Prefix of the pretrained encoder's parameters in a fine-tuned model."""

HEAD = "w2v_encoder.proj"
"""The projection to the vocabulary."""

LAYER_MODULES = {
    "self_attn.q_proj": "attention.q_proj",
    "self_attn.k_proj": "attention.k_proj",
    "self_attn.v_proj": "attention.v_proj",
    "self_attn.out_proj": "attention.out_proj",
    "self_attn_layer_norm": "layer_norm",
    "fc1": "feed_forward.intermediate_dense",
    "fc2": "feed_forward.output_dense",
    "final_layer_norm": "final_layer_norm",
}
"""Modules of a transformer layer: the names of fairseq, and those of transformers."""

PRETRAINING_ONLY = ("quantizer.", "project_q.", "target_glu.", "final_proj.", "label_embs_concat")
"""Parameters of the self-supervised loss, on which no logit depends; only these are left out. fairseq removes
them when it fine-tunes (``remove_pretraining_modules``), but files that were combined from two may still have them."""

MAX_CONVOLUTIONS = 100
"""Limit of what a broken or malicious file can ask for; the published models have 7."""

ONLY = {
    "layer_type": "transformer",
    "activation_fn": "gelu",
    "quantize_input": False,
    "pos_conv_depth": 1,
    "conv_pos_batch_norm": False,
    "crop_seq_to_multiple": 1,
    "blank_weight": 0,
}
"""Settings of fairseq that must have this value if a file has them."""

TUNING_SETTINGS = {
    "dropout": "hidden_dropout",
    "attention_dropout": "attention_dropout",
    "activation_dropout": "activation_dropout",
    "dropout_input": "feat_proj_dropout",
    "final_dropout": "final_dropout",
    "layerdrop": "layerdrop",
    "mask_prob": "mask_time_prob",
    "mask_length": "mask_time_length",
    "mask_channel_prob": "mask_feature_prob",
    "mask_channel_length": "mask_feature_length",
}
"""Settings that only training uses: the names of fairseq, and those of transformers."""


def converted_folder(path_or_name: str, key: str = KEY) -> Path:
    """Convert a file of fairseq to a checkpoint of transformers in the cache, on first use, and give its folder.

    The vocabulary is that of ``dict.ltr.txt`` beside the file, or else the one inside the file, or else, for 32 tokens,
    :data:`LIBRISPEECH_LETTERS`.

    Args:
        path_or_name: File of a wav2vec 2.0 or HuBERT, fine-tuned with a CTC head, e.g. ``wav2vec_small_100h.pt``, or
            pretrained only, e.g. ``hubert_base_ls960.pt``, which gives an encoder.
        key: The setting that names the file, for messages; empty for an argument that has no name.

    Returns:
        A folder with ``config.json``, ``model.safetensors`` (float32), ``preprocessor_config.json`` and, of a CTC
        model, ``vocab.json``.

    Raises:
        UserError: The file does not exist, is broken, holds more than tensors and plain data, is another kind of model,
            or does not fit its own configuration by name and shape.
    """
    called = named(key, path_or_name)
    path = Path(path_or_name).expanduser()
    if not path.is_file():
        raise UserError(f"{called} is not a file; check the path")
    dictionary = path.with_name(DICTIONARY)
    identity = {
        "file": content_hash(path),
        "dictionary": dictionary.read_bytes().hex() if dictionary.is_file() else None,
        "code": [cache.code_fingerprint(), transformers.__version__],
    }
    folder, _ = cache.cached_folder("fairseq", identity, lambda folder: _convert(path, called, folder), enabled=True)
    return folder


def _convert(path: Path, called: str, folder: Path) -> None:
    checkpoint = read_checkpoint(path, called)
    try:
        tensors = _parameters(checkpoint, called)
        writes = f"{HEAD}.weight" in tensors
        tuning, encoder, normalize = _settings(checkpoint, called, writes)
        outputs = tensors[f"{HEAD}.weight"].shape[0] if writes else 0
        tokens = _vocabulary(checkpoint, path.with_name(DICTIONARY), outputs, called) if writes else []
        config = _model_config(tuning, encoder, tensors, called)
        model = _fill(config, tensors, called)
    except UserError:
        raise
    except Exception as error:  # settings of a wrong type raise almost any error
        raise UserError(f"{called} has settings that make no model: {first_line(error)}; fetch it again") from error
    model.save_pretrained(folder)
    if writes:
        vocabulary = folder / "vocab.json"
        vocabulary.write_text(json.dumps({token: index for index, token in enumerate(tokens)}, ensure_ascii=False))
        Wav2Vec2CTCTokenizer(str(vocabulary)).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(
        do_normalize=normalize, return_attention_mask=config.feat_extract_norm == "layer"
    ).save_pretrained(folder)


def _parameters(checkpoint: dict[str, Any], called: str) -> dict[str, Tensor]:
    """Give the parameters without those of the pretraining, by their names in a fine-tuned model."""
    tensors = checkpoint["model"]
    pretrained = "encoder.layers.0.fc1.weight" in tensors  # and nothing else: the names have no prefix
    if pretrained:
        tensors = {f"{ENCODER}{name}": tensor for name, tensor in tensors.items()}
    dropped = tuple(ENCODER + name for name in PRETRAINING_ONLY)
    tensors = {name: tensor for name, tensor in tensors.items() if not str(name).startswith(dropped)}
    if not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items()):
        raise UserError(f"{called} is no checkpoint of fairseq: its 'model' has more than tensors")
    for name, tensor in tensors.items():
        plain = type(tensor) is Tensor and tensor.layout == torch.strided and tensor.device.type == "cpu"
        # An expanded tensor would take more memory than the file.
        if not plain or not tensor.is_floating_point() or tensor.nbytes > tensor.untyped_storage().nbytes():
            kind = f"{tensor.layout}, {tensor.device.type}, {tensor.dtype}".replace("torch.", "")
            raise UserError(
                f"{called} has {name} as an unusual tensor ({kind}); save it as plain floating-point numbers"
            )
    refuse_infinite(tensors, called)
    if not pretrained:
        if f"{HEAD}.weight" not in tensors:
            raise UserError(
                f"{called} has no CTC head ({HEAD}.weight): it writes with a decoder, or lost it; take a file that was "
                "fine-tuned with CTC, or the pretrained one"
            )
        _shape(tensors, f"{HEAD}.weight", 2, called)
    return tensors


def _shape(tensors: dict[str, Tensor], name: str, dimensions: int, called: str) -> tuple[int, ...]:
    """Give the shape of a tensor, which must exist and have so many dimensions."""
    if name not in tensors:
        raise UserError(f"{called} lacks {name}; fetch it again")
    shape = tuple(tensors[name].shape)
    if len(shape) != dimensions or 0 in shape:
        raise UserError(f"{called} has {name} of shape {shape}, where {dimensions} dimensions belong; fetch it again")
    return shape


def _settings(checkpoint: dict[str, Any], called: str, tuned: bool) -> tuple[dict[str, Any], dict[str, Any], bool]:
    """Give the settings of the fine-tuning, those of the pretrained encoder, and whether audio is normalized.

    Newer files have ``cfg`` with sections for the model and the task, and older ones ``args`` without sections.
    Both hold the settings of the encoder in ``w2v_args``, in either style; a file that was pretrained only has nothing
    but those, and no settings of a fine-tuning.
    """
    settings = checkpoint.get("cfg") or checkpoint.get("args")
    if not isinstance(settings, dict):
        raise UserError(f"{called} is no checkpoint of fairseq: it has neither 'cfg' nor 'args'")
    tuning, task = _section(settings, "model"), _section(settings, "task")
    encoder = tuning.get("w2v_args") or settings.get("w2v_args") if tuned else settings
    if not isinstance(encoder, dict):
        raise UserError(
            f"{called} does not hold the settings of its encoder ('w2v_args'): it was saved by a fairseq that looked "
            "them up in the pretrained file; take the newer file of that name, or save it again with a newer fairseq"
        )
    for source in (task, tuning, _section(encoder, "task")):
        if isinstance(source.get("normalize"), bool):
            return tuning if tuned else {}, _section(encoder, "model"), source["normalize"]
    raise UserError(f"{called} does not say whether audio is normalised ('normalize' of its 'task' or 'args')")


def _section(settings: dict[str, Any], name: str) -> dict[str, Any]:
    """Give a section of ``cfg``, or all of ``args``, which has no sections."""
    section = settings.get(name)
    return section if isinstance(section, dict) else settings


def _vocabulary(checkpoint: dict[str, Any], dictionary: Path, size: int, called: str) -> list[str]:
    """Give the tokens in the order of the rows of the head, with the blank named ``<pad>`` as in transformers."""
    task_state = checkpoint.get("task_state")
    saved = task_state.get("target_dictionary") if isinstance(task_state, dict) else None
    if dictionary.is_file():
        try:
            lines = dictionary.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise UserError(f"{dictionary} is no dictionary of fairseq: it is not UTF-8") from error
        tokens = [*SPECIAL_TOKENS, *(line.rsplit(" ", 1)[0] for line in lines if line.strip())]
        source = str(dictionary)
    elif isinstance(saved, dict) and isinstance(saved.get("symbols"), list):
        tokens, source = saved["symbols"], "the dictionary inside it"
    elif size == len(SPECIAL_TOKENS) + len(LIBRISPEECH_LETTERS):
        tokens, source = [*SPECIAL_TOKENS, *LIBRISPEECH_LETTERS], "LibriSpeech's dictionary"
    else:
        raise UserError(
            f"{called} writes {size} tokens and does not say which; put the {DICTIONARY} that it was trained with "
            "beside it"
        )
    if len(tokens) != size or len(set(tokens)) != size or tuple(tokens[:4]) != SPECIAL_TOKENS or "|" not in tokens:
        raise UserError(
            f"{called} writes {size} tokens, which {source} does not fit: it has {len(set(tokens))} different ones, "
            f"and must have {' '.join(SPECIAL_TOKENS)} first and | between words; put the {DICTIONARY} that the model "
            "was trained with beside it"
        )
    return ["<pad>", "<s>", *tokens[2:]]


def _model_config(
    tuning: dict[str, Any], encoder: dict[str, Any], tensors: dict[str, Tensor], called: str
) -> Wav2Vec2Config | HubertConfig:
    """Make the configuration of transformers, and compare the settings with the shapes of the tensors."""
    for key, only in ONLY.items():
        for settings in (tuning, encoder):
            if settings.get(key, only) not in (only, None):
                raise UserError(f"{called} has {key}={settings[key]}, which is not supported; only {key}={only} is")
    sizes = _sizes(tensors, called)
    for key, size in sizes.items():
        if encoder.get(key, size) != size:
            raise UserError(f"{called} contradicts itself: its settings say {key}={encoder[key]}, its tensors {size}")
    for key in ("conv_feature_layers", "encoder_attention_heads", "layer_norm_first"):
        if key not in encoder:
            raise UserError(f"{called} does not say {key}, which its tensors do not tell; save it again with fairseq")
    convolutions = _convolutions(encoder["conv_feature_layers"], called)
    by_layer = sizes["extractor_mode"] == "layer_norm"
    heads, width = encoder["encoder_attention_heads"], sizes["encoder_embed_dim"]
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise UserError(f"{called} has encoder_attention_heads={heads}, which does not divide its width {width}")
    options: dict[str, Any] = {
        ours: tuning[theirs] for theirs, ours in TUNING_SETTINGS.items() if tuning.get(theirs) is not None
    }
    for theirs, ours in TUNING_SETTINGS.items():
        value, is_length = options.get(ours, 1), theirs.endswith("length")
        if type(value) not in ((int,) if is_length else (int, float)) or not (
            value >= 1 if is_length else 0 <= value <= 1
        ):
            belongs = "a number of frames from 1" if is_length else "a number from 0 to 1"
            raise UserError(f"{called} has {theirs}={value}, where {belongs} belongs; fetch it again")
    if not isinstance(encoder["layer_norm_first"], bool):
        raise UserError(f"{called} has layer_norm_first={encoder['layer_norm_first']}, where true or false belongs")
    masked = tuning.get("apply_mask", True) and (tuning.get("mask_prob") or tuning.get("mask_channel_prob"))
    if not masked:  # transformers leaves out an unused embedding of the mask
        options = {key: value for key, value in options.items() if not key.startswith("mask_")}
    options |= {
        "apply_spec_augment": bool(masked),
        **({"vocab_size": tensors[f"{HEAD}.weight"].shape[0]} if f"{HEAD}.weight" in tensors else {}),
        "hidden_size": width,
        "num_hidden_layers": sizes["encoder_layers"],
        "intermediate_size": sizes["encoder_ffn_embed_dim"],
        "num_attention_heads": heads,
        "conv_dim": [width for width, _, _ in convolutions],
        "conv_kernel": [kernel for _, kernel, _ in convolutions],
        "conv_stride": [stride for _, _, stride in convolutions],
        "conv_bias": sizes["conv_bias"],
        "feat_extract_norm": "layer" if by_layer else "group",
        "do_stable_layer_norm": bool(encoder["layer_norm_first"]),
        "num_conv_pos_embeddings": sizes["conv_pos"],
        "num_conv_pos_embedding_groups": sizes["conv_pos_groups"],
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    names = [str(settings.get(key)) for settings in (tuning, encoder) for key in ("_name", "arch")]
    if any("data2vec" in name for name in names):
        raise UserError(f"{called} is a data2vec model; only wav2vec 2.0 and HuBERT are read from fairseq's files")
    kind = HubertConfig if any("hubert" in name for name in names) else Wav2Vec2Config
    try:
        return kind(**options)
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise UserError(f"{called} has settings that make no model: {' '.join(str(error).split())}") from error


def _sizes(tensors: dict[str, Tensor], called: str) -> dict[str, Any]:
    """Read the sizes of the encoder off the tensors, by the names of fairseq."""
    matches = [re.match(re.escape(ENCODER) + r"encoder\.layers\.(\d+)\.", name) for name in tensors]
    layers = {match[1] for match in matches if match}
    if missing := [str(index) for index in range(len(layers)) if str(index) not in layers]:
        raise UserError(f"{called} lacks {ENCODER}encoder.layers.{missing[0]}; fetch it again")
    ffn, width = _shape(tensors, f"{ENCODER}encoder.layers.0.fc1.weight", 2, called)
    _, group_width, positions = _shape(tensors, f"{ENCODER}encoder.pos_conv.0.weight_v", 3, called)
    return {
        "encoder_embed_dim": width,
        "encoder_layers": len(layers),
        "encoder_ffn_embed_dim": ffn,
        "conv_bias": ENCODER + "feature_extractor.conv_layers.0.0.bias" in tensors,
        # One group norm after the first convolution, or a layer norm after each.
        "extractor_mode": "layer_norm"
        if ENCODER + "feature_extractor.conv_layers.0.2.1.weight" in tensors
        else "default",
        "conv_pos": positions,
        "conv_pos_groups": width // group_width,
    }


def _convolutions(text: Any, called: str) -> list[tuple[int, int, int]]:
    """Parse width, kernel and stride of every convolution, e.g. from ``[(512, 10, 5)] + [(512, 3, 2)] * 4``.

    fairseq evaluates this text as Python. Here only lists of tuples of numbers, ``+`` and ``*`` are accepted.
    """

    def evaluate(node: ast.expr) -> list[Any]:
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            layers = evaluate(node.left) + evaluate(node.right)
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            layers = evaluate(node.left) * min(ast.literal_eval(node.right), MAX_CONVOLUTIONS + 1)
        else:
            layers = list(ast.literal_eval(node))
        if len(layers) > MAX_CONVOLUTIONS:
            raise ValueError("too many")
        return layers

    try:
        layers = evaluate(ast.parse(text, mode="eval").body)
        if layers and all(type(number) is int and number > 0 for layer in layers for number in layer):
            return [(width, kernel, stride) for width, kernel, stride in layers]
    except (TypeError, ValueError, SyntaxError, RecursionError, MemoryError, ArithmeticError):
        pass  # reported below
    raise UserError(f"{called} has conv_feature_layers={text}, which is no list of (width, kernel, stride)")


def parameter_names(config: PretrainedConfig) -> dict[str, str]:
    """Map the names of all parameters of a wav2vec 2.0 or HuBERT with a CTC head from fairseq to transformers."""
    ours = f"{config.model_type}."
    modules = {
        HEAD: "lm_head",
        f"{ENCODER}layer_norm": f"{ours}feature_projection.layer_norm",
        f"{ENCODER}post_extract_proj": f"{ours}feature_projection.projection",
        f"{ENCODER}encoder.layer_norm": f"{ours}encoder.layer_norm",
    }
    by_layer = config.feat_extract_norm == "layer"
    for index in range(len(config.conv_dim) if by_layer else 1):
        norm = f"feature_extractor.conv_layers.{index}."
        modules[f"{ENCODER}{norm}{'2.1' if by_layer else '2'}"] = f"{ours}{norm}layer_norm"
    for index in range(config.num_hidden_layers):
        layer = f"encoder.layers.{index}."
        modules |= {ENCODER + layer + theirs: ours + layer + name for theirs, name in LAYER_MODULES.items()}
    names = {f"{theirs}.{kind}": f"{name}.{kind}" for theirs, name in modules.items() for kind in ("weight", "bias")}
    for index in range(len(config.conv_dim)):
        convolution = f"feature_extractor.conv_layers.{index}."
        for kind in ("weight", "bias") if config.conv_bias else ("weight",):
            names[f"{ENCODER}{convolution}0.{kind}"] = f"{ours}{convolution}conv.{kind}"
    positions = f"{ours}encoder.pos_conv_embed.conv."
    return names | {
        f"{ENCODER}encoder.pos_conv.0.bias": f"{positions}bias",
        # Length and direction of a weight-normalized kernel.
        f"{ENCODER}encoder.pos_conv.0.weight_g": f"{positions}parametrizations.weight.original0",
        f"{ENCODER}encoder.pos_conv.0.weight_v": f"{positions}parametrizations.weight.original1",
        f"{ENCODER}mask_emb": f"{ours}masked_spec_embed",
    }


def _fill(config: Wav2Vec2Config | HubertConfig, tensors: dict[str, Tensor], called: str) -> PreTrainedModel:
    """Make the model that a configuration describes out of exactly these tensors, an encoder if they have no head."""
    names = parameter_names(config)
    writes = f"{HEAD}.weight" in tensors
    if not writes:
        prefix = f"{config.model_type}."
        names = {theirs: name.removeprefix(prefix) for theirs, name in names.items() if name.startswith(prefix)}
    if missing := sorted(names.keys() - tensors.keys()):
        raise UserError(f"{called} lacks {some(missing)}; fetch it again")
    if extra := sorted(tensors.keys() - names.keys()):
        raise UserError(f"{called} has {some(extra)}, which this kind of model does not have; it is not supported")
    model: PreTrainedModel
    # Shapes take no memory, and a run that converts must draw the same random numbers as one that finds the folder.
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        kinds: tuple[Any, Any] = (
            (HubertModel, HubertForCTC) if isinstance(config, HubertConfig) else (Wav2Vec2Model, Wav2Vec2ForCTC)
        )
        model = kinds[writes](config)
    shapes = {name: parameter.shape for name, parameter in model.state_dict().items()}
    for theirs, name in names.items():
        if tensors[theirs].shape != shapes[name]:
            raise UserError(
                f"{called} has {theirs} of shape {tuple(tensors[theirs].shape)}, and its settings want "
                f"{tuple(shapes[name])}; fetch it again"
            )
    model.load_state_dict({name: tensors[theirs].float() for theirs, name in names.items()}, assign=True)
    return model
