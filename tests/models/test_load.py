"""Loading CTC models from folders and by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCTC, PreTrainedModel

from sparsewav.cache import model_fingerprint
from sparsewav.errors import UserError
from sparsewav.models.load import load_speech_model


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
        ("vocab.json", r"has no tokenizer \(vocab\.json\)"),
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


def test_truncated_weights_are_refused(model_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"the weights of .* cannot be loaded"):
        load_speech_model(str(folder))


def test_an_unknown_family_is_refused_by_name(model_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "sew"}))
    with pytest.raises(UserError, match=r"family 'sew', which is not supported; supported are wav2vec2, hubert"):
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
