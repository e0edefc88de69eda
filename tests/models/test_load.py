"""Loading CTC models from folders and by name."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCTC, PreTrainedModel

import sparsewav
from sparsewav.cache import model_fingerprint
from sparsewav.errors import UserError
from sparsewav.models.bitmask import export
from sparsewav.models.load import load_pretrained, load_speech_model, take_over
from sparsewav.pruning.encoder import FAMILIES


def test_a_snapshot_folder_loads_with_its_processor(model_folder: Path) -> None:
    """With the files of a hub snapshot: config.json, model.safetensors, vocab.json, preprocessor_config.json."""
    assert {"config.json", "model.safetensors", "vocab.json", "preprocessor_config.json"} <= {
        path.name for path in model_folder.iterdir()
    }
    speech = load_speech_model(str(model_folder))
    assert speech.name == "tiny-wav2vec2"
    assert not speech.model.training
    assert len(speech.processor.tokenizer) == speech.model.config.vocab_size == 32
    reference = AutoModelForCTC.from_pretrained(model_folder)
    assert model_fingerprint(speech.model) == model_fingerprint(reference)
    with torch.no_grad():
        next(reference.parameters()).view(-1)[0] += 1e-3
    assert model_fingerprint(speech.model) != model_fingerprint(reference)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("vocab.json", r"has no tokenizer \(vocab\.json or tokenizer\.json\)"),
        ("preprocessor_config.json", r"has no preprocessor_config\.json"),
        ("config.json", "cannot be loaded"),
        ("model.safetensors", "the weights of .* cannot be loaded"),
    ],
)
def test_a_missing_piece_is_named(model_folder: Path, tmp_path: Path, missing: str, message: str) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "model")
    (folder / missing).unlink()
    with pytest.raises(UserError, match=message):
        load_speech_model(str(folder))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", "{", r"tokenizer\.json cannot be read \("),
        ("preprocessor_config.json", "{", r"preprocessor_config\.json is damaged"),
        (
            "preprocessor_config.json",
            '{"feature_extractor_type": "No"}',
            "names the feature extractor No, which cannot",
        ),
    ],
)
def test_no_other_processor_takes_the_place_of_a_broken_one(
    model_folder: Path, tmp_path: Path, file: str, content: str, message: str
) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "model")
    (folder / file).write_text(content)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(UserError, match=message):
        load_speech_model(str(folder))


def test_truncated_weights_are_refused(model_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"the weights of .* cannot be loaded"):
        load_speech_model(str(folder))


def test_an_unknown_family_is_refused_by_name(model_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "model")
    (folder / "config.json").write_text(json.dumps({"model_type": "speecht5"}))
    with pytest.raises(UserError, match=r"family 'speecht5', which is not supported; supported are wav2vec2, hubert"):
        load_speech_model(str(folder))


def test_a_tokenizer_of_another_model_is_refused(
    tiny_model: Callable[..., PreTrainedModel], model_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "model")
    tiny_model("wav2vec2", vocab_size=40).save_pretrained(folder)
    with pytest.raises(UserError, match="the tokenizer has 32 tokens and the model writes 40"):
        load_speech_model(str(folder))


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        load_speech_model(str(tmp_path / "nowhere"))


Tensors = dict[str, Tensor]
LAYER = "wav2vec2.encoder.layers.1."
MASK = "wav2vec2.masked_spec_embed"
POSITIONS = "wav2vec2.encoder.pos_conv_embed.conv."


@pytest.fixture
def own_folder(model_folder: Path, tmp_path: Path) -> Path:
    """A model's folder that a test may change."""
    return shutil.copytree(model_folder, tmp_path / "model")


def _rewrite(folder: Path, change: Callable[[Tensors], object], form: str = "safetensors") -> None:
    """Change the tensors of a folder, and store them in one file, in two shards or as PyTorch does."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    path.unlink()
    if form == "safetensors":
        save_file(tensors, path, {"format": "pt"})
    elif form == "pickle":
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        shards = {name: f"part-{index % 2}.safetensors" for index, name in enumerate(tensors)}
        for shard in set(shards.values()):
            save_file({name: tensors[name] for name in tensors if shards[name] == shard}, folder / shard)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


def _change(path: Path, **settings: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def _prefix_all(tensors: Tensors) -> None:
    for name in list(tensors):
        tensors[f"module.{name}"] = tensors.pop(name)


def _relabel(tensors: Tensors) -> None:
    tensors["lm_head.bias"] = tensors["lm_head.bias"].view(torch.int32)


OTHER_MODELS: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "no head": (lambda t: (t.pop("lm_head.weight"), t.pop("lm_head.bias")), r"lacks lm_head\.bias, lm_head\.weight;"),
    "no bias": (lambda t: t.pop(f"{LAYER}layer_norm.bias"), rf"lacks {LAYER}layer_norm\.bias;"),
    "prefix": (_prefix_all, "lacks lm_head.bias, lm_head.weight, wav2vec2.* more;"),
    "shape": (lambda t: t.update({"lm_head.bias": torch.zeros(31)}), r"lm_head\.bias \(\(31,\) instead of \(32,\)\)"),
    "more": (
        lambda t: t.update({f"{LAYER}adapter.weight": torch.zeros(1)}),
        rf"knows nothing of: {LAYER}adapter\.weight",
    ),
    "integers": (_relabel, "lm_head.bias in int32, where floating-point numbers belong"),
    "not finite": (lambda t: t[f"{LAYER}layer_norm.bias"][3].fill_(torch.nan), r"layer_norm\.bias that are NaN"),
}


@pytest.mark.parametrize("form", ["safetensors", "shards", "pickle"])
@pytest.mark.parametrize("kind", OTHER_MODELS)
def test_tensors_of_another_model_are_refused_by_name(kind: str, form: str, own_folder: Path) -> None:
    """By the command's loader in every format, by the package's, and by what writes the model anew."""
    change, message = OTHER_MODELS[kind]
    _rewrite(own_folder, change, form)
    loaders: list[Callable[[], object]] = [
        lambda: load_speech_model(str(own_folder)),
        lambda: sparsewav.load(own_folder),
    ]
    if form != "pickle":
        loaders.append(lambda: sparsewav.prune_folder(own_folder, own_folder.with_name("pruned"), [_noise()]))
    for load in loaders:
        with pytest.raises(UserError, match=message):
            load()


def _noise() -> dict[str, Tensor]:
    return {"input_values": torch.randn(1, 8000, generator=torch.Generator().manual_seed(0))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("form", ["safetensors", "shards", "pickle"])
def test_python_loads_every_format_of_the_command_and_keeps_its_bits(
    form: str, dtype: torch.dtype, own_folder: Path, tmp_path: Path
) -> None:
    sparsewav.load(own_folder, dtype).save_pretrained(own_folder)
    expected = load_file(own_folder / "model.safetensors")
    _rewrite(own_folder, lambda tensors: None, form)
    for place in (own_folder, tmp_path):  # a model, and the run in whose folder it is
        model = sparsewav.load(place)
        assert model.dtype == dtype
        assert not model.training
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in expected.items())


def test_a_checkpoint_without_the_mask_embedding_is_one_model(own_folder: Path, tmp_path: Path) -> None:
    """Whoever loads it: published checkpoints lack it, and a random one made of every load another model."""
    _rewrite(own_folder, lambda tensors: tensors.pop(MASK))
    torch.manual_seed(1)
    speech = load_speech_model(str(own_folder))
    state = torch.get_rng_state()
    again = load_speech_model(str(own_folder))
    assert torch.equal(torch.get_rng_state(), state)
    assert model_fingerprint(speech.model) == model_fingerprint(again.model)
    assert not speech.model.get_parameter(MASK).any()
    assert re.search("masked_spec_embed.* is zero", speech.warnings[0])
    sparsewav.prune_folder(own_folder, tmp_path / "pruned", [_noise()], 0.6)
    for source in (own_folder, tmp_path / "pruned"):
        for format in ("dense", "bitmask"):
            small = sparsewav.load(export(source, tmp_path / f"{source.name}-{format}", format))
            assert small.state_dict().keys() == speech.model.state_dict().keys()
            assert not small.get_parameter(MASK).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_every_family_loads_as_it_is_saved(
    family: str, tiny_model: Callable[..., PreTrainedModel], extractors: dict[str, Any], own_folder: Path
) -> None:
    model = tiny_model(family, vocab_size=32)
    model.save_pretrained(own_folder)
    if family in extractors:
        extractors[family].save_pretrained(own_folder)
    loaded = load_pretrained(str(own_folder), torch.float32, "model").state_dict()
    if family != "granite_speech5_ctc":  # whose feature extractor needs torchaudio
        assert load_speech_model(str(own_folder)).processor.feature_extractor.model_input_names[0] == (
            model.main_input_name
        )
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


def test_words_are_not_joined_as_older_tokenizers_say(own_folder: Path) -> None:
    _change(own_folder / "tokenizer_config.json", clean_up_tokenization_spaces=True)
    tokenizer = load_speech_model(str(own_folder)).processor.tokenizer
    vocabulary = {token.lower(): index for token, index in tokenizer.get_vocab().items()}
    (own_folder / "vocab.json").write_text(json.dumps(vocabulary))
    tokenizer = load_speech_model(str(own_folder)).processor.tokenizer
    assert tokenizer.decode(tokenizer("it 's").input_ids) == "it 's"


def test_what_others_wrote_loads(own_folder: Path, tmp_path: Path) -> None:
    """Names of weight normalization before PyTorch 2.1, and a snapshot of the hub's cache, which is made of links."""
    expected = load_speech_model(str(own_folder)).model.state_dict()

    def rename(tensors: Tensors) -> None:
        for old, new in (("0", "g"), ("1", "v")):
            tensors[f"{POSITIONS}weight_{new}"] = tensors.pop(f"{POSITIONS}parametrizations.weight.original{old}")

    _rewrite(own_folder, rename, "shards")
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for path in own_folder.iterdir():
        (snapshot / path.name).symlink_to(Path("../../model") / path.name)
    sparsewav.prune_folder(snapshot, tmp_path / "pruned", [_noise()], 0.6)
    for model in (load_speech_model(str(snapshot)).model, sparsewav.load(own_folder)):
        assert model.state_dict().keys() == expected.keys()
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in expected.items())
    pruned = sparsewav.load(tmp_path / "pruned").state_dict()
    assert all(torch.equal(pruned[name], tensor) for name, tensor in expected.items() if "encoder.layers" not in name)


def _index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    _rewrite(folder, lambda tensors: None, "shards")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


INDEXES: dict[str, tuple[Any, str]] = {
    "outside": ("../outside/part-0.safetensors", "'../outside/part-0.safetensors', no file in its folder"),
    "absolute": ("/dev/zero", "'/dev/zero', no file in its folder"),
    "device": ("zero.safetensors", "zero.safetensors is missing or broken"),
    "folder": ("..", "'..', no file in its folder|missing or broken"),
    "number": (3, "is not an index"),
    "null": (None, "is not an index"),
    "missing": ("part-7.safetensors", "part-7.safetensors is missing or broken"),
    "other shard": ("part-0.safetensors", "is wrong about lm_head.bias in part-"),
}


@pytest.mark.parametrize("kind", INDEXES)
def test_an_index_names_files_of_its_folder_only(kind: str, own_folder: Path, tmp_path: Path) -> None:
    file, message = INDEXES[kind]
    (own_folder / "zero.safetensors").symlink_to("/dev/zero")  # has no end: reading it would take all memory

    def change(names: dict[str, Any]) -> None:
        # Of a tensor whose shard it is not.
        names["lm_head.bias"] = "part-1.safetensors" if names["lm_head.bias"] == file else file

    _index(own_folder, change)
    (tmp_path / "outside").mkdir()
    shutil.copyfile(own_folder / "part-0.safetensors", tmp_path / "outside" / "part-0.safetensors")
    for load in (lambda: load_speech_model(str(own_folder)), lambda: sparsewav.load(own_folder)):
        with pytest.raises(UserError, match=message):
            load()
    with pytest.raises(UserError, match=message):
        sparsewav.prune_folder(own_folder, tmp_path / "pruned", [_noise()])


NO_INDEX = ("[]", "null", "3", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": "b", "a": "b"}}')


@pytest.mark.parametrize("text", [*NO_INDEX, "[" * 100_000])
def test_what_is_no_index_is_refused(text: str, own_folder: Path) -> None:
    for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        for path in own_folder.glob("model.safetensors*"):
            path.unlink()
        (own_folder / name).write_text(text)
        with pytest.raises(UserError, match=rf"{name} is not an index of a checkpoint's files; fetch it again"):
            load_speech_model(str(own_folder))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_hidden_layers": 10**7}, r"has no tensor wav2vec2\.encoder\.layers\.2\.\*.*num_hidden_layers=10000000"),
        ({"num_hidden_layers": 1}, r"knows nothing of: wav2vec2\.encoder\.layers\.1\."),
        ({"num_hidden_layers": -1}, "knows nothing of|does not describe a model"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers"),
        ({"vocab_size": 10**12}, r"lm_head\.bias \(\(32,\) instead of \(1000000000000,\)\)"),
        ({"vocab_size": None}, "vocab_size=None"),
        ({"hidden_size": 10**9, "num_attention_heads": 1}, "no tensor that is as wide as hidden_size=1000000000"),
        ({"num_labels": 10**12}, "has num_labels=1000000000000"),
        ({"hidden_size": -16}, "does not describe a model"),
        ({"num_attention_heads": 0}, "does not describe a model"),
        ({"conv_dim": [16] * 10**5}, r"has no tensor wav2vec2\.feature_extractor\.conv_layers\.2|cannot be loaded"),
        ({"conv_stride": [20, 0]}, r"conv_stride=\[20, 0\]"),
        ({"add_adapter": True, "num_adapter_layers": 10**7}, "has no tensor adapter.layers.0"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps=nan"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "has quantization_config in its config.json"),
        ({"transformers_weights": "other.safetensors"}, "has transformers_weights in its config.json"),
        ({"model_type": "nothing"}, "nothing"),
        ({"model_type": "nothing", "auto_map": {"AutoConfig": "evil.Config"}}, "cannot be loaded"),
    ],
)
def test_an_absurd_configuration_is_refused(settings: dict[str, Any], message: str, own_folder: Path) -> None:
    """In one sentence, at once: a skeleton of ten million layers would take hours and all memory."""
    (own_folder / "evil.py").write_text("raise SystemExit('ran')")
    _change(own_folder / "config.json", **settings)
    for load in (lambda: load_speech_model(str(own_folder)), lambda: sparsewav.load(own_folder)):
        with pytest.raises(UserError, match=message) as refused:
            load()
        assert "\n" not in str(refused.value)


def test_a_configuration_that_is_nested_without_end_is_refused(own_folder: Path) -> None:
    (own_folder / "config.json").write_text('{"a":' * 100_000)
    with pytest.raises(UserError, match="cannot be loaded"):
        load_speech_model(str(own_folder))


@pytest.mark.parametrize("said", [1, None])
def test_the_blank_of_the_loss_is_that_of_decoding(said: int | None, own_folder: Path) -> None:
    expected = load_speech_model(str(own_folder)).model
    _change(own_folder / "config.json", pad_token_id=said)
    speech = load_speech_model(str(own_folder))
    assert speech.model.config.pad_token_id == speech.processor.tokenizer.pad_token_id == 0
    assert f"pad_token_id={said}, and the tokenizer's blank is 0 (<pad>)" in speech.warnings[0]
    batch = _noise() | {"labels": torch.tensor([[5, 6, 6]])}
    assert speech.model(**batch).loss == expected(**batch).loss


def _vocabulary(folder: Path, change: Callable[[dict[str, int]], object]) -> None:
    (folder / "tokenizer_config.json").unlink()
    path = folder / "vocab.json"
    vocabulary = json.loads(path.read_text())
    change(vocabulary)
    path.write_text(json.dumps(vocabulary))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update({"Z": 32}), "vocab.json names 0 tokens for output 31 of the model"),
        (lambda v: v.update({"Z": 31, "Ä": 32}), "the tokenizer writes Ä, which is none of the model's 32 outputs"),
        (lambda v: v.update({"Z": 30, "Ä": 31, "Ö": 32}), r"names 2 tokens for output 30 of the model \(Q Z\)"),
        (lambda v: v.update({"[PAD]": v.pop("<pad>")}), "the CTC blank, is <pad> and none of the model's 32 outputs"),
    ],
)
def test_a_vocabulary_that_the_model_does_not_write_is_refused(
    change: Callable[[dict[str, int]], object], message: str, own_folder: Path
) -> None:
    _vocabulary(own_folder, change)
    with pytest.raises(UserError, match=message):
        load_speech_model(str(own_folder))


def test_tokens_behind_the_vocabulary_that_no_label_has_are_fine(
    tiny_model: Callable[..., PreTrainedModel], own_folder: Path
) -> None:
    """Many published models were trained without <s> and </s>, which their tokenizers add."""
    model = load_pretrained(str(own_folder), torch.float32, "model")
    tiny_model("wav2vec2", vocab_size=30, conv_dim=(16, 16), conv_kernel=(20, 8), conv_stride=(20, 8)).save_pretrained(
        own_folder
    )

    def without_sentences(vocabulary: dict[str, int]) -> None:
        letters = [token for token in vocabulary if token not in ("<s>", "</s>")]
        vocabulary.clear()
        vocabulary.update({token: index for index, token in enumerate(letters)})

    _vocabulary(own_folder, without_sentences)
    speech = load_speech_model(str(own_folder))
    assert len(speech.processor.tokenizer) == 32 > speech.model.config.vocab_size
    assert take_over(speech.model, model) == ["lm_head.weight", "lm_head.bias"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampling_rate": 8000}, "sampling_rate=8000, and the model takes 16000"),
        ({"padding_side": "left"}, "padding_side=left, and the model takes right"),
        ({"feature_size": 80}, "feature_size=80, and the model takes 1"),
    ],
)
def test_a_preprocessor_of_another_model_is_refused(settings: dict[str, Any], message: str, own_folder: Path) -> None:
    _change(own_folder / "preprocessor_config.json", **settings)
    with pytest.raises(UserError, match=message):
        load_speech_model(str(own_folder))


@pytest.mark.parametrize("norm", ["group", "layer"])
def test_the_saved_preprocessor_says_how_the_model_is_run(
    norm: str, tiny_model: Callable[..., PreTrainedModel], own_folder: Path
) -> None:
    tiny_model(
        "wav2vec2", norm, vocab_size=32, conv_dim=(16, 16), conv_kernel=(20, 8), conv_stride=(20, 8)
    ).save_pretrained(own_folder)
    wrong = norm == "group"
    _change(own_folder / "preprocessor_config.json", return_attention_mask=wrong, do_normalize=False)
    speech = load_speech_model(str(own_folder))
    assert speech.processor.feature_extractor.return_attention_mask != wrong
    said = " ".join(speech.warnings)
    assert f"return_attention_mask={str(wrong).lower()}, and a model with feat_extract_norm={norm}" in said
    assert ("do_normalize=false" in said) == (norm == "layer")


def test_every_file_of_a_tokenizer_comes_along(own_folder: Path, tmp_path: Path) -> None:
    """SentencePiece's model and lists of pieces beside the JSON files, in another format and pruned from disk."""
    for name in ("spiece.model", "merges.txt"):
        (own_folder / name).write_text("pieces")
    export(own_folder, tmp_path / "small")
    sparsewav.prune_folder(own_folder, tmp_path / "pruned", [_noise()])
    for folder in (tmp_path / "small", tmp_path / "pruned"):
        assert {"spiece.model", "merges.txt", "vocab.json"} <= {path.name for path in folder.iterdir()}
