"""Encoders without a head: pruned from the terminal, saved as their class, measured by their hidden states."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCTC,
    PreTrainedModel,
    SequenceFeatureExtractor,
    UniSpeechSatConfig,
    UniSpeechSatForPreTraining,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForPreTraining,
    Wav2Vec2ForSequenceClassification,
)

import sparsewav
from sparsewav.data.librispeech import read_librispeech_folder
from sparsewav.errors import UserError
from sparsewav.inference.representations import hidden_state_divergence
from sparsewav.models.load import load_speech_model
from sparsewav.pruning.encoder import base_of
from sparsewav.pruning.families import FAMILIES

Run = Callable[..., Any]
FRONT: dict[str, Any] = {"conv_dim": (16, 16), "conv_kernel": (20, 8), "conv_stride": (20, 8)}


@pytest.fixture
def encoder(tiny_model: Callable[..., PreTrainedModel], tmp_path: Path) -> Path:
    """The folder of a HuBERT as ``HubertModel.save_pretrained`` leaves it, without a tokenizer."""
    folder = tmp_path / "encoder"
    model: Any = tiny_model("hubert", "group", **FRONT)
    model.hubert.save_pretrained(folder)
    Wav2Vec2FeatureExtractor(return_attention_mask=False).save_pretrained(folder)
    return folder


@pytest.fixture
def speech(own_corpus: Path) -> list[str]:
    """Arguments that name speech without transcripts."""
    for path in own_corpus.rglob("*.trans.txt"):
        path.write_text("".join(f"{line.split()[0]}\n" for line in path.read_text().splitlines()))
    subsets = ["data.calibration_subset=train", "data.evaluation_subset=test", "data.training_subset=train"]
    return ["data=librispeech_dir", f"data.root={own_corpus}", *subsets, "calibration.utterances=12", "device=cpu"]


def _states(folder: Path, audio: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return list(AutoModel.from_pretrained(folder).eval()(audio, output_hidden_states=True).hidden_states[1:])


@pytest.mark.parametrize("allocation", ["uniform", "search"])
def test_an_encoder_is_pruned_without_transcripts(
    allocation: str, encoder: Path, speech: list[str], own_corpus: Path, run_sparsewav: Run, tmp_path: Path
) -> None:
    swaps = ["allocation.evaluations=3"] if allocation == "search" else []
    result = run_sparsewav(
        f"model.name_or_path={encoder}", *speech, f"allocation={allocation}", *swaps, "export.format=bitmask"
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = (tmp_path / "outputs").glob("*/metrics.json")
    metrics = json.loads(path.read_text())
    assert {metrics[key] for key in ("wer", "wer_dense", "wer_pruned", "cer", "cer_dense", "cer_pruned")} == {None}
    model = path.parent / "model"
    assert json.loads((model / "config.json").read_text())["architectures"] == ["HubertModel"]
    pruned, dense = load_file(model / "model.safetensors"), load_file(encoder / "model.safetensors")
    assert pruned.keys() == dense.keys()
    assert "encoder.layers.0.attention.q_proj.weight" in pruned
    assert not sorted(model.glob("*vocab*")) + sorted(model.glob("token*"))
    for name, tensor in sparsewav.load(path.parent / "model-bitmask").state_dict().items():
        assert torch.equal(tensor, AutoModel.from_pretrained(model).state_dict()[name])
    # The figures, computed again from what transformers loads, an utterance at a time.
    extractor = Wav2Vec2FeatureExtractor.from_pretrained(model)
    errors, squares, cosines, of_utterance = torch.zeros(2), torch.zeros(2), [[], []], {}
    for utterance in read_librispeech_folder(own_corpus, "test"):
        audio = extractor(soundfile.read(utterance.audio)[0], sampling_rate=16_000, return_tensors="pt")["input_values"]
        for index, (before, after) in enumerate(zip(_states(encoder, audio), _states(model, audio), strict=True)):
            errors[index] += (before - after).square().sum()
            squares[index] += before.square().sum()
            cosines[index].append(torch.nn.functional.cosine_similarity(before, after, dim=-1).flatten())
            of_utterance[utterance.id] = float((before - after).square().sum() / before.square().sum())
    layers = metrics["evaluation"][0]["layers"]
    assert [layer["relative_error"] for layer in layers] == pytest.approx((errors / squares).tolist(), rel=1e-4)
    expected = [float(torch.cat(of_layer).mean()) for of_layer in cosines]
    assert [layer["cosine_similarity"] for layer in layers] == pytest.approx(expected, rel=1e-4)
    assert metrics["divergence"] == pytest.approx(float(errors[-1] / squares[-1]), rel=1e-4)
    assert 0.001 < metrics["divergence"] < 1  # the hidden states are sane: nothing, or all of them, would be lost
    rows = [json.loads(line) for line in (path.parent / "predictions.jsonl").read_text().splitlines()]
    assert {row["id"]: row["divergence"] for row in rows} == pytest.approx(of_utterance, rel=1e-4)
    assert "hidden states, last" in result.stdout
    assert "word error rate" not in result.stdout
    again = run_sparsewav(
        f"model.name_or_path={encoder}", *speech, f"allocation={allocation}", *swaps, "export.format=bitmask"
    )
    assert "Done already" in again.stdout


def test_a_sweep_of_encoders_has_a_column_for_the_divergence(
    encoder: Path, speech: list[str], run_sparsewav: Run, tmp_path: Path
) -> None:
    arguments = [f"model.name_or_path={encoder}", *speech, "allocation=uniform"]
    result = run_sparsewav(*arguments, "sparsity.target=0.3,0.9", "-m")
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = (tmp_path / "outputs").rglob("summary.csv")
    table = pandas.read_csv(path)
    assert table["wer"].isna().all()
    assert table["divergence"][0] < table["divergence"][1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "allocation=hutchinson takes the CTC loss; choose allocation=uniform, error_curves or search"),
        (["allocation=hawq"], "allocation=hawq takes the CTC loss; choose allocation=uniform, error_curves or search"),
        (["allocation=error_curves", "allocation.effect=fisher"], "choose allocation.effect=output"),
        (["finetune_strategy=one_pass"], "tunes with the CTC loss; choose finetune_strategy=none, or train a head"),
        (["method=parp"], "method=parp learns recognition; choose method=sparsewav, or train a head first"),
    ],
)
def test_what_takes_a_head_is_refused_for_an_encoder(
    arguments: list[str], message: str, encoder: Path, speech: list[str], run_sparsewav: Run
) -> None:
    result = run_sparsewav(f"model.name_or_path={encoder}", *speech, *arguments)
    assert result.returncode == 1
    (sentence,) = re.findall(r"^error: .*", result.stdout, re.MULTILINE)
    assert "without a CTC head" in sentence or "has no CTC head" in sentence
    assert message in sentence


def test_an_encoder_transcribes_nothing(encoder: Path, own_corpus: Path, run_sparsewav: Run) -> None:
    audio = next(own_corpus.rglob("*.flac"))
    result = run_sparsewav(str(audio), "--model", str(encoder), command="sparsewav-transcribe")
    assert result.returncode == 1
    assert "is an encoder without a CTC head and writes no text" in result.stderr
    speech = ["--data", "data=librispeech_dir", f"data.root={own_corpus}", "data.evaluation_subset=test"]
    result = run_sparsewav(str(encoder), *speech, command="sparsewav-evaluate")
    assert result.returncode == 1
    assert "is an encoder without a CTC head and writes no text" in result.stderr


def test_a_pretrained_checkpoint_is_an_encoder_and_says_what_it_leaves_out(tmp_path: Path) -> None:
    """Of ``Wav2Vec2ForPreTraining``, whose names have the prefix of the encoder."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    codes = {"num_codevectors_per_group": 4, "codevector_dim": 8, "proj_codevector_dim": 8}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    torch.manual_seed(0)
    Wav2Vec2ForPreTraining(Wav2Vec2Config(**sizes, **codes, **positions, **FRONT)).save_pretrained(tmp_path)
    Wav2Vec2FeatureExtractor(return_attention_mask=False).save_pretrained(tmp_path)
    loaded = load_speech_model(str(tmp_path))
    assert type(loaded.model).__name__ == "Wav2Vec2Model"
    assert loaded.processor.tokenizer is None
    (note,) = [warning for warning in loaded.warnings if "left out" in warning]
    assert "project_hid.bias" in note
    stored = load_file(tmp_path / "model.safetensors")
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, stored[f"wav2vec2.{name}"])


def test_encoders_of_every_family_are_loaded_and_pruned(
    tiny_model: Callable[..., PreTrainedModel],
    noise_batch: Callable[..., dict[str, Tensor]],
    model_input: Callable[..., dict[str, Tensor]],
    extractors: dict[str, SequenceFeatureExtractor],
    tmp_path: Path,
) -> None:
    """Also those whose configuration has no vocabulary, given batches with labels, which they do not read."""
    for family in FAMILIES.keys() - {"granite_speech5_ctc"}:
        encoder: Any = base_of(tiny_model(family))
        encoder.save_pretrained(tmp_path / family)
        extractors.get(family, Wav2Vec2FeatureExtractor()).save_pretrained(tmp_path / family)
        speech = load_speech_model(str(tmp_path / family))
        assert type(speech.model) is type(encoder), family
        report = sparsewav.prune(speech, [model_input(encoder, noise_batch([640]))], 0.5, allocation="uniform")
        assert report.sparsity == pytest.approx(0.5, abs=0.01), family


def test_the_tensors_of_every_pretraining_are_left_out(tmp_path: Path) -> None:
    """Of UniSpeech-SAT, which has other ones than wav2vec 2.0."""
    codes = {"num_codevectors_per_group": 4, "codevector_dim": 8, "proj_codevector_dim": 8, "num_clusters": 4}
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    UniSpeechSatForPreTraining(UniSpeechSatConfig(**codes, **sizes, **FRONT)).save_pretrained(tmp_path)
    Wav2Vec2FeatureExtractor(return_attention_mask=False).save_pretrained(tmp_path)
    assert type(load_speech_model(str(tmp_path)).model).__name__ == "UniSpeechSatModel"


def test_a_model_with_another_head_is_called_what_it_is(
    tiny_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    Wav2Vec2ForSequenceClassification(tiny_model("wav2vec2", **FRONT).config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"is a Wav2Vec2ForSequenceClassification by its config\.json, with classifier"):
        load_speech_model(str(tmp_path))


def test_harmless_differences_of_a_ctc_checkpoint_are_taken(
    tiny_model: Callable[..., PreTrainedModel], model_folder: Path, tmp_path: Path
) -> None:
    """The pretraining's tensors, which are left out in one line, and a conformer without counts of batches."""
    folder = shutil.copytree(model_folder, tmp_path / "quantizer")
    weights = load_file(folder / "model.safetensors")
    more = {"quantizer.codevectors": torch.ones(1, 4, 4), "project_q.weight": torch.ones(4, 4)}
    save_file(weights | more, folder / "model.safetensors", {"format": "pt"})
    loaded = load_speech_model(str(folder))
    assert [warning for warning in loaded.warnings if "project_q.weight, quantizer.codevectors, which" in warning]
    assert loaded.model.state_dict().keys() == weights.keys()
    folder = shutil.copytree(model_folder, tmp_path / "conformer")
    tiny_model("wav2vec2-conformer", vocab_size=32, **FRONT).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.endswith("num_batches_tracked")}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    state = load_speech_model(str(folder)).model.state_dict()
    assert all(not state[name].any() for name in weights.keys() - kept.keys())


def test_a_ctc_checkpoint_without_its_head_is_not_taken_for_an_encoder(model_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    headless = {name: tensor for name, tensor in weights.items() if not name.startswith("lm_head")}
    save_file(headless, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks lm_head\.bias, lm_head\.weight; .*sparsewav-train initial_model="):
        load_speech_model(str(folder))
    assert AutoModelForCTC.from_pretrained(folder).lm_head is not None  # transformers makes a random one


def test_an_encoder_does_not_differ_from_itself(encoder: Path, corpus: Path) -> None:
    loaded = load_speech_model(str(encoder))
    utterances = read_librispeech_folder(corpus, "test")
    divergence = hidden_state_divergence(loaded.model, loaded.model, loaded.processor, utterances, 1.0)
    assert divergence.relative_error == 0
    assert [layer.cosine_similarity for layer in divergence.layers] == pytest.approx([1, 1])
    assert divergence.utterances == [0.0] * 6
