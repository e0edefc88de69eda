"""Repositories as they are on the hub: models in the forms that they were published in, and LibriSpeech."""

import io
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow
import pyarrow.parquet
import soundfile
import torch
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

LETTERS = "ETAONIHSRDLUMWCFGYPBVK'XJQZ"

CARD = """---
language: en
license: apache-2.0
datasets:
- librispeech_asr
tags:
- speech
---
# Wav2Vec2
"""

Blank = Literal["<pad>", "[PAD]"]


def vocabulary(blank: Blank) -> dict[str, int]:
    """Give ``vocab.json`` of wav2vec 2.0's own models, or as the widespread recipe of fine-tuning makes it."""
    if blank == "<pad>":
        return {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", "|", *LETTERS])}
    return {token: index for index, token in enumerate(["|", *sorted(LETTERS), "[UNK]", "[PAD]"])}


def model_files(
    model: PreTrainedModel, blank: Blank = "<pad>", weights: Literal["pickle", "shards", "safetensors"] = "pickle"
) -> dict[str, bytes]:
    """Give the files of a CTC model's repository, with the card, and the weights for two other frameworks.

    The model has an output for every token of :func:`vocabulary`, and with ``[PAD]`` two more, ``<s>`` and ``</s>``.
    """
    tokens = vocabulary(blank)
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": blank.replace("pad", "unk").replace("PAD", "UNK")}
    named["pad_token"] = blank
    config = model.config.to_dict() | {"architectures": [type(model).__name__], "transformers_version": "4.7.0"}
    config |= {"gradient_checkpointing": False, "vocab_size": model.config.vocab_size, "pad_token_id": tokens[blank]}
    config["_name_or_path"] = "facebook/wav2vec2-base"
    preprocessor = {
        "do_normalize": True,
        "feature_size": 1,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": getattr(model.config, "feat_extract_norm", "layer") == "layer",
        "sampling_rate": 16_000,
    }
    settings: dict[str, Any] = {
        "config.json": config,
        "preprocessor_config.json": preprocessor,
        "vocab.json": tokens,
        "tokenizer_config.json": named | {"do_lower_case": False, "word_delimiter_token": "|"},
        "special_tokens_map.json": named,
    }
    if blank == "[PAD]":
        settings["added_tokens.json"] = {"<s>": len(tokens), "</s>": len(tokens) + 1}
        settings["tokenizer_config.json"]["tokenizer_class"] = "Wav2Vec2CTCTokenizer"
    files = {name: json.dumps(content).encode() for name, content in settings.items()}
    others = {"README.md": CARD.encode(), ".gitattributes": b"*.bin filter=lfs\n"}
    others |= {"tf_model.h5": b"TensorFlow", "flax_model.msgpack": b"Flax"}
    return files | others | _weights(model, weights)


def _weights(model: PreTrainedModel, form: str) -> dict[str, bytes]:
    """Give the weights without ``masked_spec_embed``, and in a pickle with the old names of weight normalization."""
    state = {name: tensor.detach() for name, tensor in model.state_dict().items() if "masked_spec_embed" not in name}
    if form == "safetensors":
        return {"model.safetensors": save(state, {"format": "pt"})}
    if form == "pickle":
        buffer = io.BytesIO()
        old = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
        torch.save({_renamed(name, old): tensor for name, tensor in state.items()}, buffer)
        return {"pytorch_model.bin": buffer.getvalue()}
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    places = {name: shards[index % 2] for index, name in enumerate(state)}
    files = {shard: save(_only(state, places, shard), {"format": "pt"}) for shard in shards}
    total = sum(tensor.nbytes for tensor in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    return files | {"model.safetensors.index.json": json.dumps(index).encode()}


def _renamed(name: str, old: dict[str, str]) -> str:
    for new, before in old.items():
        name = name.replace(new, before)
    return name


def _only(state: dict[str, Tensor], places: dict[str, str], shard: str) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in state.items() if places[name] == shard}


LIBRISPEECH_SPLITS = {"clean": ("train.100", "validation", "test"), "other": ("train.500", "validation", "test")}


def librispeech(words: Sequence[str], counts: dict[str, int], seconds: float = 0.5) -> dict[str, bytes]:
    """Give ``openslr/librispeech_asr`` with noise as speech.

    Args:
        words: What the transcripts are drawn from.
        counts: Number of utterances of every split; the training splits lie in two files.
        seconds: Length of the shortest utterance; the others are up to half as long again.
    """
    files, configurations = {}, []
    for seed, (configuration, splits) in enumerate(LIBRISPEECH_SPLITS.items()):
        data_files = []
        for split in splits:
            generator = np.random.default_rng([seed, len(split), ord(split[0])])
            rows = [_row(generator, words, f"{configuration}-{split}", at, seconds) for at in range(counts[split])]
            shards = 2 if split.startswith("train") else 1
            for shard in range(shards):
                files[f"{configuration}/{split}/{shard:04}.parquet"] = _parquet(rows[shard::shards])
            data_files.append({"split": split, "path": f"{configuration}/{split}/*.parquet"})
        configurations.append({"config_name": configuration, "data_files": data_files})
    card = f"---\nlicense: cc-by-4.0\nconfigs: {json.dumps(configurations)}\n---\n# LibriSpeech\n"
    return files | {"README.md": card.encode()}


def _row(generator: np.random.Generator, words: Sequence[str], name: str, index: int, seconds: float) -> dict[str, Any]:
    samples = generator.standard_normal(int(16_000 * seconds * (1 + index % 3 / 4))) * 0.1
    audio = io.BytesIO()
    soundfile.write(audio, samples, 16_000, format="FLAC")
    identifier = f"{100 + index % 2}-{sum(map(ord, name))}-{index:04}"
    return {
        "file": f"{identifier}.flac",
        "audio": {"bytes": audio.getvalue(), "path": f"{identifier}.flac"},
        "text": " ".join(generator.choice(words, size=2)),
        "speaker_id": 100 + index % 2,
        "chapter_id": sum(map(ord, name)),
        "id": identifier,
    }


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    """Give rows as a file of the hub, in whose metadata the type of the audio stands."""
    features = {key: {"dtype": "string", "_type": "Value"} for key in ("file", "text", "id")}
    features |= {key: {"dtype": "int64", "_type": "Value"} for key in ("speaker_id", "chapter_id")}
    features["audio"] = {"sampling_rate": 16_000, "_type": "Audio"}  # type: ignore[dict-item]
    features = {key: features[key] for key in rows[0]}
    table = pyarrow.Table.from_pylist(rows)
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    with tempfile.NamedTemporaryFile() as file:
        pyarrow.parquet.write_table(table, file.name)
        return Path(file.name).read_bytes()
