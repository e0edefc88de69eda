"""Reading fairseq's checkpoints: files written here in its layout, from random weights."""

import json
import os
import re
import shutil
import subprocess
import sys
import types
import zipfile
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoModelForCTC, PreTrainedModel

from sparsewav.errors import UserError
from sparsewav.models.fairseq import converted_folder
from sparsewav.models.load import load_fairseq_model
from sparsewav.settings.run import Model
from sparsewav.training.recipes import load_model, load_or_train

Make = Callable[..., PreTrainedModel]

RENAMED = [  # transformers to fairseq, in this order
    (r"^(wav2vec2|hubert)\.", "w2v_encoder.w2v_model."),
    (r"^lm_head", "w2v_encoder.proj"),
    (r"masked_spec_embed", "mask_emb"),
    (r"feature_projection\.projection", "post_extract_proj"),
    (r"feature_projection\.layer_norm", "layer_norm"),
    (r"(conv_layers\.\d+)\.conv\.", r"\1.0."),
    (r"pos_conv_embed\.conv\.parametrizations\.weight\.original0", "pos_conv.0.weight_g"),
    (r"pos_conv_embed\.conv\.parametrizations\.weight\.original1", "pos_conv.0.weight_v"),
    (r"pos_conv_embed\.conv", "pos_conv.0"),
    (r"(encoder\.layers\.\d+)\.layer_norm", r"\1.self_attn_layer_norm"),
    (r"\.attention\.", ".self_attn."),
    (r"feed_forward\.intermediate_dense", "fc1"),
    (r"feed_forward\.output_dense", "fc2"),
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEWAV_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def small(tiny_model: Make) -> Make:
    """Make a model that can hear 16 kHz: (family, norm, **config); 160 samples a frame, 32 tokens."""

    def make(family: str = "wav2vec2", norm: str = "group", **options: Any) -> PreTrainedModel:
        options = {"vocab_size": 32, "conv_bias": norm == "layer", "attn_implementation": "sdpa"} | options
        return tiny_model(family, norm, conv_dim=(16, 16), conv_kernel=(20, 8), conv_stride=(20, 8), **options)

    return make


def _tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, tensor in model.state_dict().items():
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        norm = "2.1" if model.config.feat_extract_norm == "layer" else "2"
        tensors[re.sub(r"(conv_layers\.\d+)\.layer_norm", rf"\1.{norm}", name)] = tensor
    return tensors


def _encoder_settings(model: PreTrainedModel) -> dict[str, Any]:
    config = model.config
    return {
        "extractor_mode": "layer_norm" if config.feat_extract_norm == "layer" else "default",
        "encoder_layers": config.num_hidden_layers,
        "encoder_embed_dim": config.hidden_size,
        "encoder_ffn_embed_dim": config.intermediate_size,
        "encoder_attention_heads": config.num_attention_heads,
        "activation_fn": "gelu",
        "layer_norm_first": config.do_stable_layer_norm,
        "conv_feature_layers": "[(16, 20, 20)] + [(16,8,8)] * 1",
        "conv_bias": config.conv_bias,
        "conv_pos": config.num_conv_pos_embeddings,
        "conv_pos_groups": config.num_conv_pos_embedding_groups,
        "final_dim": 256,
        "dropout": 0.1,
        "latent_temp": (2, 0.5, 0.999995),
    }


TUNING = {
    "dropout": 0.0,
    "activation_dropout": 0.2,
    "layerdrop": 0.05,
    "final_dropout": 0.0,
    "apply_mask": True,
    "mask_prob": 0.65,
    "mask_length": 5,
    "mask_channel_prob": 0.25,
    "mask_channel_length": 4,
    "normalize": "${task.normalize}",
    "w2v_path": "/checkpoint/somebody/wav2vec_small.pt",
}


def _args(model: PreTrainedModel, *, normalize: bool = False) -> dict[str, Any]:
    """A file as fairseq wrote it in 2020."""
    family = model.config.model_type
    encoder = Namespace(arch=family, task="audio_pretraining", normalize=normalize, **_encoder_settings(model))
    settings = TUNING | {"arch": f"{family}_ctc", "task": "audio_pretraining", "normalize": normalize}
    return {
        "args": Namespace(w2v_args=encoder, **settings),
        "model": _tensors(model),
        "optimizer_history": [{"criterion_name": "CtcCriterion", "lr_scheduler_state": {"best": None}}],
        "extra_state": {"train_iterator": {"epoch": 3}, "best": np.float64(3.5)},
    }


def _cfg(model: PreTrainedModel, *, normalize: bool = True) -> dict[str, Any]:
    """A file as fairseq writes it since 2021."""
    family, task = model.config.model_type, {"_name": "audio_pretraining", "normalize": normalize}
    encoder = {"model": {"_name": family, **_encoder_settings(model)}, "task": task, "criterion": None}
    cfg = {"model": {"_name": f"{family}_ctc", **TUNING, "w2v_args": encoder}, "task": task, "common": {"seed": 1}}
    return {"args": None, "cfg": cfg, "model": _tensors(model), "criterion": None, "task_state": {}}


class Mode(Enum):
    default = "default"
    layer_norm = "layer_norm"


@dataclass
class EncoderConfig:
    extractor_mode: Mode = Mode.default
    encoder_layers: int = 12
    encoder_embed_dim: int = 768
    encoder_ffn_embed_dim: int = 3072
    encoder_attention_heads: int = 12
    layer_norm_first: bool = False
    conv_feature_layers: str = ""
    conv_bias: bool = False
    conv_pos: int = 128
    conv_pos_groups: int = 16
    dropout: float | None = None
    labels: list[str] = field(default_factory=list)


class Dictionary:
    def __init__(self, symbols: list[str]) -> None:
        self.symbols, self.bos_index = symbols, 0


@pytest.fixture
def of_fairseq(monkeypatch: pytest.MonkeyPatch) -> Callable[[type], type]:
    """Put a class where fairseq has it, so that a pickle names it so."""

    def put(item: type) -> type:
        module = types.ModuleType("fairseq.parts")
        setattr(module, item.__name__, item)
        monkeypatch.setattr(item, "__module__", "fairseq.parts")
        monkeypatch.setitem(sys.modules, "fairseq", types.ModuleType("fairseq"))
        monkeypatch.setitem(sys.modules, "fairseq.parts", module)
        return item

    return put


def _save(checkpoint: dict[str, Any], path: Path, **options: Any) -> str:
    torch.save(checkpoint, path, **options)
    for name in [name for name in sys.modules if name.partition(".")[0] == "fairseq"]:
        del sys.modules[name]  # what reads the file must do without
    return str(path)


def _assert_same(path: str, model: PreTrainedModel) -> None:
    speech = load_or_train(Model(name_or_path="counts for nothing", fairseq_checkpoint=path))
    assert speech.name == Path(path).stem
    assert type(speech.model) is type(model)
    expected, got = model.state_dict(), speech.model.state_dict()
    assert expected.keys() == got.keys()
    assert all(torch.equal(tensor, got[name]) for name, tensor in expected.items())
    audio = torch.randn(2, 3200)
    with torch.no_grad():
        assert torch.equal(speech.model(audio).logits, model(audio).logits)


def _assert_refused(
    model: PreTrainedModel, change: Callable[[dict[str, Any]], Any], message: str, folder: Path
) -> None:
    """Convert a changed file of a model: it is refused in one sentence that names the key, and nothing is left."""
    checkpoint = _cfg(model)
    change(checkpoint)
    with pytest.raises(UserError, match=message) as error:
        converted_folder(_save(checkpoint, folder / "best.pt"))
    assert "model.fairseq_checkpoint=" in str(error.value)
    assert "\n" not in str(error.value)
    assert not list((folder / "cache" / "fairseq").glob("*/")), "nothing half made stays"


@pytest.mark.parametrize("norm", ["group", "layer"])
@pytest.mark.parametrize("family", ["wav2vec2", "hubert"])
@pytest.mark.parametrize("style", [_args, _cfg])
def test_a_file_gives_the_model_it_came_from(
    small: Make, tmp_path: Path, family: str, norm: str, style: Callable[..., dict[str, Any]]
) -> None:
    model = small(family, norm)
    path = _save(style(model, normalize=norm == "layer"), tmp_path / "best.pt")
    _assert_same(path, model)
    speech = load_fairseq_model(path)
    assert speech.processor.feature_extractor.do_normalize == (norm == "layer")
    assert speech.processor.feature_extractor.return_attention_mask == (norm == "layer")
    config = speech.model.config
    assert (config.hidden_dropout, config.activation_dropout, config.layerdrop) == (0.0, 0.2, 0.05)
    assert (config.apply_spec_augment, config.mask_time_prob, config.mask_feature_length) == (True, 0.65, 4)
    # The head's columns: the blank first, and then fairseq's other special tokens and letters.
    vocabulary = speech.processor.tokenizer.get_vocab()
    tokens = ["<pad>", "<s>", "</s>", "<unk>", "|", "E", "T", "A", "O", "N", "I", "H", "S", "R", "D", "L", "U", "M"]
    tokens += ["W", "C", "F", "G", "Y", "P", "B", "V", "K", "'", "X", "J", "Q", "Z"]
    assert sorted(vocabulary, key=vocabulary.__getitem__) == tokens
    assert speech.processor.tokenizer.pad_token_id == config.pad_token_id == 0
    assert speech.processor.tokenizer.decode([6, 6, 0, 5, 4, 4, 7]) == "TE A"


def test_every_form_that_fairseq_has_written(small: Make, tmp_path: Path, of_fairseq: Callable[[type], type]) -> None:
    model = small("hubert", "layer")
    # Before PyTorch 1.6.
    _assert_same(_save(_args(model), tmp_path / "old.pt", _use_new_zipfile_serialization=False), model)
    # omegaconf's containers, typed by fairseq's classes.
    checkpoint = _cfg(model)
    of_fairseq(Mode)
    settings = {key: value for key, value in _encoder_settings(model).items() if key in EncoderConfig.__annotations__}
    mode = settings.pop("extractor_mode")
    encoder = OmegaConf.structured(EncoderConfig(extractor_mode=Mode(mode), **settings))
    module = sys.modules["fairseq.parts"]
    EncoderConfig.__module__, module.EncoderConfig = "fairseq.parts", EncoderConfig  # type: ignore[attr-defined]
    checkpoint["cfg"]["model"]["w2v_args"] = {"model": {"_name": "hubert"}, "task": {"normalize": True}}
    checkpoint["cfg"] = OmegaConf.create(checkpoint["cfg"])
    checkpoint["cfg"].model.w2v_args.model = encoder
    _assert_same(_save(checkpoint, tmp_path / "typed.pt"), model)
    # A namespace inside a dictionary, half precision, and what pretraining leaves behind.
    checkpoint = _cfg(model)
    checkpoint["cfg"]["model"]["w2v_args"] = _args(model)["args"].w2v_args
    checkpoint["model"] |= {
        "w2v_encoder.w2v_model.final_proj.weight": torch.zeros(4, 16),
        "w2v_encoder.w2v_model.label_embs_concat": torch.zeros(504, 4),
    }
    checkpoint["last_optimizer_state"] = {"state": {0: {"exp_avg": torch.zeros(3)}}}
    _assert_same(_save(checkpoint, tmp_path / "mixed.pt"), model)
    checkpoint["model"] = {name: tensor.half() for name, tensor in checkpoint["model"].items()}
    half = load_fairseq_model(_save(checkpoint, tmp_path / "half.pt"))
    assert half.model.dtype == torch.float32
    assert torch.equal(half.model.lm_head.weight, model.lm_head.weight.half().float())


def test_the_vocabulary_is_beside_the_file_or_in_it(
    small: Make, tmp_path: Path, of_fairseq: Callable[[type], type]
) -> None:
    model = small(vocab_size=9)

    def letters(path: str) -> list[str]:
        vocabulary = load_fairseq_model(path).processor.tokenizer.get_vocab()
        return sorted(vocabulary, key=vocabulary.__getitem__)

    plain = _save(_cfg(model), tmp_path / "plain.pt")
    with pytest.raises(UserError, match=r"writes 9 tokens and does not say which; put the dict\.ltr\.txt"):
        load_fairseq_model(plain)
    checkpoint = _cfg(model)
    symbols = ["<s>", "<pad>", "</s>", "<unk>", "|", "e", "n", "s", "ß"]
    checkpoint["task_state"] = {"target_dictionary": of_fairseq(Dictionary)(symbols)}
    inside = _save(checkpoint, tmp_path / "inside.pt")
    assert letters(inside) == ["<pad>", "<s>", *symbols[2:]]
    (tmp_path / "dict.ltr.txt").write_text("| 9\nA 8\nB 7\nC 6\nD 5\n")
    for path in (plain, inside):  # the folder that the cache has is of another dictionary
        assert letters(path) == ["<pad>", "<s>", "</s>", "<unk>", "|", "A", "B", "C", "D"]
    (tmp_path / "dict.ltr.txt").write_text("| 9\nA 8\n")
    with pytest.raises(UserError, match=r"writes 9 tokens, which .*dict\.ltr\.txt does not fit: it has 6 different"):
        load_fairseq_model(plain)


class Malice:
    """Writes a file when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("function", "name"),
    [(os.system, r"\w+\.system"), (eval, "eval"), (os.mkdir, r"\w+\.mkdir"), (shutil.copy, r"shutil\.copy")],
)
def test_a_file_that_would_run_something_is_refused_by_name(
    small: Make, tmp_path: Path, function: Callable[..., Any], name: str, zipped: bool
) -> None:
    trace = tmp_path / "ran"
    arguments = {
        "system": (f"touch {trace}",),
        "eval": (f"__import__('pathlib').Path({str(trace)!r}).touch()",),
        "mkdir": (str(trace),),
        "copy": (__file__, str(trace)),
    }
    checkpoint = _args(small()) | {"extra_state": Malice(function, *arguments[function.__name__])}
    path = _save(checkpoint, tmp_path / "bad.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=rf"bad\.pt needs {name} to be read, which might run anything and is refused"):
        load_fairseq_model(path)
    assert not trace.exists()
    torch.load(path, weights_only=False)  # as others would read it
    assert trace.exists()


def test_what_has_fairseqs_name_is_not_run_either(small: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where a module of that name can be imported."""
    package = tmp_path / "modules" / "fairseq"
    package.mkdir(parents=True)
    trace = tmp_path / "ran"
    (package / "__init__.py").write_text(
        f"open({str(trace)!r}, 'w').close()\ndef build(*arguments):\n    open({str(trace)!r}, 'w').close()\n"
    )
    monkeypatch.syspath_prepend(package.parent)
    import fairseq

    checkpoint = _args(small()) | {"extra_state": Malice(fairseq.build, 1)}
    path = _save(checkpoint, tmp_path / "best.pt")
    trace.unlink()
    load_fairseq_model(path)
    assert not trace.exists()


def _without(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda checkpoint: checkpoint["model"].pop(name)


def _with(name: str, *shape: int) -> Callable[[dict[str, Any]], Any]:
    return lambda checkpoint: checkpoint["model"].update({name: torch.zeros(shape)})


def _setting(**settings: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda checkpoint: checkpoint["cfg"]["model"]["w2v_args"]["model"].update(settings)


E = "w2v_encoder.w2v_model."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without(f"{E}encoder.layers.1.fc2.bias"), rf"lacks {E}encoder\.layers\.1\.fc2\.bias; fetch"),
        (_without(f"{E}encoder.pos_conv.0.weight_v"), rf"lacks {E}encoder\.pos_conv\.0\.weight_v; fetch"),
        (_without("w2v_encoder.proj.bias"), r"lacks w2v_encoder\.proj\.bias"),
        (
            _without("w2v_encoder.proj.weight"),
            r"has no CTC head \(w2v_encoder\.proj\.weight\): it writes with a decoder",
        ),
        (_with(f"{E}encoder.layers.0.adapter.weight", 2), rf"has {E}encoder\.layers\.0\.adapter\.weight, which this"),
        (_with("decoder.layers.0.fc1.weight", 2), r"has decoder\.layers\.0\.fc1\.weight, which this kind"),
        (_with(f"{E}encoder.layers.0.fc2.weight", 16, 25), r"fc2\.weight of shape \(16, 25\), .* want \(16, 24\)"),
        (_with(f"{E}encoder.layers.0.fc1.weight", 16), r"fc1\.weight of shape \(16,\), where 2 dimensions belong"),
        (_with(f"{E}feature_extractor.conv_layers.0.0.weight", 16, 1, 10), r"conv_layers\.0\.0\.weight of shape"),
        (_setting(encoder_layers=12), "settings say encoder_layers=12, its tensors 2"),
        (_setting(extractor_mode="layer_norm"), "settings say extractor_mode=layer_norm, its tensors default"),
        (_setting(encoder_attention_heads=3), "encoder_attention_heads=3, which does not divide its width 16"),
        (_setting(conv_feature_layers="__import__('os').mkdir('ran')"), "conv_feature_layers=__import__.* is no list"),
        (_setting(conv_feature_layers="[(16, 20)]"), r"conv_feature_layers=\[\(16, 20\)\], which is no list"),
        (_setting(conv_feature_layers="[(16, 20, 20)] * 9999999999"), "which is no list"),
        (_setting(layer_type="conformer"), "layer_type=conformer, which is not supported"),
        (_setting(_name="data2vec_audio"), "is a data2vec model"),
        (lambda c: c["cfg"]["model"]["w2v_args"]["model"].pop("layer_norm_first"), "does not say layer_norm_first"),
        (
            lambda c: c["cfg"]["model"].update(w2v_args=None),
            r"does not hold the settings of its encoder \('w2v_args'\)",
        ),
        (lambda c: c.pop("cfg"), "has neither 'cfg' nor 'args'"),
        (lambda c: c.pop("model"), "has no 'model'"),
        (lambda c: c.update(model={"a": 1}), "has more than tensors"),
    ],
)
def test_what_does_not_fit_is_named(
    small: Make, tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    _assert_refused(small(), change, message, tmp_path)


def _odd(make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, Any]], Any]:
    def change(checkpoint: dict[str, Any]) -> None:
        checkpoint["model"]["w2v_encoder.proj.weight"] = make(checkpoint["model"]["w2v_encoder.proj.weight"])

    return change


def _tuning(**settings: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda checkpoint: checkpoint["cfg"]["model"].update(settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_odd(lambda t: t.to_sparse()), r"proj\.weight as an unusual tensor \(sparse_coo, cpu, float32\)"),
        (_odd(lambda t: t.to("meta")), r"proj\.weight as an unusual tensor \(strided, meta, float32\)"),
        (_odd(lambda t: t.to(torch.complex64)), r"proj\.weight as an unusual tensor \(strided, cpu, complex64\)"),
        (_odd(lambda t: t.int()), r"proj\.weight as an unusual tensor \(strided, cpu, int32\)"),
        (_odd(lambda t: torch.zeros(1).expand(10**6, 10**6)), r"proj\.weight as an unusual tensor"),
        (_odd(lambda t: t.fill_(torch.nan)), r"numbers in w2v_encoder\.proj\.weight that are NaN or infinite"),
        (_odd(lambda t: t.fill_(torch.inf)), r"numbers in w2v_encoder\.proj\.weight that are NaN or infinite"),
        (_tuning(dropout=5), "dropout=5, where a number from 0 to 1 belongs"),
        (_tuning(layerdrop=float("nan")), "layerdrop=nan, where a number from 0 to 1 belongs"),
        (_tuning(mask_prob="often"), "mask_prob=often, where a number from 0 to 1 belongs"),
        (_tuning(mask_length=-3), "mask_length=-3, where a number of frames from 1 belongs"),
        (_setting(conv_feature_layers="[(16, 20, 1e400)]"), "which is no list"),
        (_setting(conv_feature_layers="[(16, 20.5, 20)]"), "which is no list"),
        (_setting(conv_feature_layers="[(16, -20, 20)]"), "which is no list"),
        (_setting(conv_feature_layers=7), "which is no list"),
        (_setting(layer_norm_first="false"), "layer_norm_first=false, where true or false belongs"),
        (_setting(encoder_attention_heads=-2), "encoder_attention_heads=-2"),
        (_setting(encoder_layers=-2), "settings say encoder_layers=-2, its tensors 2"),
        (_with(f"{E}encoder.layers.99999999.fc1.bias", 2), rf"lacks {E}encoder\.layers\.2;"),
    ],
)
def test_hostile_tensors_and_settings_are_one_sentence(
    small: Make, tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    _assert_refused(small(), change, message, tmp_path)


def test_a_zip_bomb_is_refused_by_its_directory(small: Make, tmp_path: Path) -> None:
    """Nothing of it is unpacked: a few kilobytes may stand for all memory."""
    path, bomb = Path(_save(_cfg(small()), tmp_path / "best.pt")), tmp_path / "bomb.pt"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as packed:
        for part in source.namelist():
            packed.writestr(part, source.read(part))
        packed.writestr("best/data/999", bytes(10**8))
    with pytest.raises(UserError, match=r"bomb\.pt is compressed, 10\d,\d{3},\d{3} bytes in a file of"):
        converted_folder(str(bomb))


def test_a_file_that_is_no_checkpoint(small: Make, tmp_path: Path) -> None:
    path = Path(_save(_cfg(small()), tmp_path / "best.pt"))
    old = Path(_save(_args(small()), tmp_path / "old.pt", _use_new_zipfile_serialization=False))
    whole, broken = path.read_bytes(), "is broken, or no checkpoint of PyTorch; fetch it again"
    for contents in (whole[: len(whole) // 2], old.read_bytes()[:5000], old.read_bytes()[:-100], b"", b"<html>\n"):
        path.write_bytes(contents)
        with pytest.raises(UserError, match=f"^model.fairseq_checkpoint={path} {broken}"):
            load_fairseq_model(str(path))
        with pytest.raises(UserError, match=f"^{path} {broken}"):  # an argument is not called a setting
            load_model(path)
    with pytest.raises(UserError, match="no checkpoint of fairseq: it has no 'model'"):
        load_fairseq_model(_save(_tensors(small()), path))
    with pytest.raises(UserError, match="is not a file; check the path"):
        load_fairseq_model(str(tmp_path / "nowhere.pt"))


def test_a_model_that_was_tuned_without_masks_keeps_the_embedding(small: Make, tmp_path: Path) -> None:
    model, checkpoint = small(), _cfg(small())
    checkpoint["cfg"]["model"] |= {"mask_prob": 0.0, "mask_channel_prob": 0.0}
    path = _save(checkpoint, tmp_path / "best.pt")
    _assert_same(path, model)
    assert not load_fairseq_model(path).model.config.apply_spec_augment


def test_a_run_on_a_file(
    run_sparsewav: Callable[..., subprocess.CompletedProcess[str]], small: Make, corpus: Path, tmp_path: Path
) -> None:
    _save(_args(small("wav2vec2", "layer"), normalize=True), tmp_path / "wav2vec_tiny.pt")
    arguments = [
        *("model.fairseq_checkpoint=wav2vec_tiny.pt", "data=librispeech_dir", f"data.root={corpus}"),
        *("data.calibration_subset=train", "data.training_subset=train", "data.evaluation_subset=test"),
        *("calibration.utterances=6", "device=cpu", "sparsity.target=0.6", "allocation=uniform"),
        *("finetune_strategy=one_pass", "training.epochs=1", "training.batch_size=4"),
    ]
    result = run_sparsewav("model=wav2vec2-large-100h", *arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    (folder,) = (path.parent for path in (tmp_path / "outputs").glob("*/metrics.json"))
    assert folder.name.startswith("wav2vec_tiny-obs_first_order-uniform-0.6-one_pass-")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["model"] == "wav2vec_tiny"
    assert metrics["achieved_sparsity"] == pytest.approx(0.6, abs=1e-3)
    assert "`wav2vec_tiny`" in (folder / "model" / "README.md").read_text()
    assert len(AutoModelForCTC.from_pretrained(folder / "model").wav2vec2.encoder.layers) == 2
    # The file names the model, whatever else is said of it.
    again = run_sparsewav("model=demo", *arguments)
    assert "Done already" in again.stdout


@pytest.mark.parametrize("family", ["wav2vec2", "hubert"])
@pytest.mark.parametrize("form", ["args", "cfg"])
def test_a_file_that_was_pretrained_only_gives_the_encoder(family: str, form: str, small: Make, tmp_path: Path) -> None:
    model: Any = small(family, "layer")
    prefix = "w2v_encoder.w2v_model."
    tensors = {name.removeprefix(prefix): tensor for name, tensor in _tensors(model).items() if name.startswith(prefix)}
    tensors |= {"final_proj.weight": torch.ones(4, 16), "quantizer.vars": torch.ones(1, 4, 4)}
    settings = _encoder_settings(model) | {"mask_prob": 0.65}
    if form == "args":
        task = {"task": "audio_pretraining", "normalize": True}
        content: dict[str, Any] = {"args": Namespace(arch=family, **task, **settings), "model": tensors}
    else:
        task = {"_name": f"{family}_pretraining", "normalize": True}
        content = {"args": None, "cfg": {"model": {"_name": family, **settings}, "task": task}, "model": tensors}
    torch.save(content, tmp_path / "base.pt")
    speech = load_fairseq_model(str(tmp_path / "base.pt"))
    assert type(speech.model) is type(model.base_model)
    assert not speech.writes
    assert speech.processor.feature_extractor.do_normalize
    audio = torch.randn(1, 8000, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.base_model(audio).last_hidden_state
        torch.testing.assert_close(speech.model(audio).last_hidden_state, expected)


def test_converting_draws_no_random_numbers(small: Make, tmp_path: Path) -> None:
    """A first run, which converts, and a later one, which finds the folder, must end with the same bytes."""
    path = _save(_cfg(small()), tmp_path / "best.pt")
    state = torch.get_rng_state()
    converted_folder(path)
    assert torch.equal(torch.get_rng_state(), state)
