"""Publishing a run's model on the hub: what is uploaded, what its card says, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCTC, PreTrainedModel

from sparsewav.models.load import load_speech_model
from sparsewav.pipeline.model_card import make_card
from tests.hub import TOKEN, USER, Hub
from tests.published import model_files, vocabulary
from tests.terminal import Run

BASE = "facebook/wav2vec2-base-100h"


@pytest.fixture
def run_folder(
    hub: Hub, tiny_model: Callable[..., PreTrainedModel], small: list[str], run_sparsewav: Run, tmp_path: Path
) -> Path:
    """The folder of a finished run on a model of the hub."""
    model = tiny_model(
        "wav2vec2", "group", vocab_size=len(vocabulary("<pad>")), conv_kernel=(20, 8), conv_stride=(20, 8)
    )
    hub.publish(BASE, model_files(model))
    result = run_sparsewav(*small, f"model.name_or_path={BASE}", "allocation=uniform", "model.revision=main")
    assert result.returncode == 0, result.stdout + result.stderr
    (metrics,) = (tmp_path / "outputs").glob("*/metrics.json")
    return metrics.parent


def test_a_runs_model_is_published_with_its_figures(
    hub: Hub, run_folder: Path, run_sparsewav: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def push(*arguments: str) -> str:
        result = run_sparsewav(str(run_folder), "pruned", *arguments, command="sparsewav-push", HF_TOKEN=TOKEN)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    shown = push("--dry-run")
    assert "model-index:" in shown
    assert f"models/{USER}/pruned" not in hub.repositories
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert f"{hub.url}/{USER}/pruned" in push("--private")
    repository = hub.repositories[f"models/{USER}/pruned"]
    assert repository.private
    files = repository.commits[repository.branches["main"]]
    assert {"README.md", "config.json", "model.safetensors", "vocab.json", "processor_config.json"} <= files.keys()
    assert {"layers.csv", ".gitattributes"} <= files.keys()
    assert not any(str(run_folder.parents[1]).encode() in content for content in files.values())  # no private path

    metrics = json.loads((run_folder / "metrics.json").read_text())
    commit = hub.repositories[f"models/{BASE}"].branches["main"]
    assert metrics["provenance"]["commit"] == commit
    assert metrics["inputs"]["settings"]["model"] == {"name_or_path": BASE, "revision": "main", "offload": False}
    card = ModelCard(files["README.md"].decode())
    known = card.data.to_dict()
    assert (known["license"], known["language"], known["base_model"]) == ("apache-2.0", "en", BASE)
    assert (known["library_name"], known["pipeline_tag"]) == ("transformers", "automatic-speech-recognition")
    assert {"sparsewav", "pruning"} <= set(known["tags"])
    rates = [rate for rate in ("wer", "cer") if metrics.get(rate) is not None]
    assert known["metrics"] == rates
    found = {item.metric_type: item for item in card.data.eval_results}
    assert {rate: item.metric_value for rate, item in found.items()} == {
        rate: round(100 * metrics[rate], 2) for rate in rates
    }
    assert (found["wer"].dataset_type, found["wer"].dataset_split) == ("custom", "test")
    row = f"| test | 6 | WER | {100 * metrics['wer_dense']:.2f} % | {100 * metrics['wer_pruned']:.2f} % |"
    assert row in card.text
    assert f"`{BASE}` (commit `{commit}`)" in card.text

    speech = load_speech_model(f"{USER}/pruned")
    assert not [warning for warning in speech.warnings if "masked_spec_embed" not in warning]
    local = AutoModelForCTC.from_pretrained(run_folder / "model").state_dict()
    assert all(torch.equal(local[name], tensor) for name, tensor in speech.model.state_dict().items())

    # Another format replaces the weights, which would be loaded instead; a branch has its own.
    push("--branch", "half", "--dtype", "float16")
    push("--format", "bitmask", "--license", "mit")
    files = repository.commits[repository.branches["main"]]
    assert {name for name in files if name.endswith(".safetensors")} == {"model.bitmask.safetensors"}
    assert ModelCard(files["README.md"].decode()).data.license == "mit"
    assert b"bitmask format" in files["README.md"]
    assert len(repository.commits[repository.branches["half"]]["model.safetensors"]) < 0.6 * len(
        (run_folder / "model/model.safetensors").read_bytes()
    )
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    again = load_speech_model(f"{USER}/pruned").model.state_dict()
    assert all(torch.equal(local[name], tensor) for name, tensor in again.items())


def test_what_cannot_be_published_is_one_sentence(
    hub: Hub, run_folder: Path, run_sparsewav: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(message: str, *arguments: str, token: str = TOKEN) -> None:
        result = run_sparsewav(*arguments, command="sparsewav-push", HF_TOKEN=token)
        assert result.returncode == 1
        assert "Traceback" not in result.stderr
        assert message in result.stderr
        assert len(result.stderr.splitlines()) == 1, result.stderr

    run = str(run_folder)
    refused("pruned cannot be published without a token; put one that may write into HF_TOKEN", run, "pruned", token="")
    refused("has no metrics.json; give the folder of a finished run", str(run_folder / "model"), "pruned")
    refused("does not let your token do that", run, "pruned", token="hf_old")
    refused("does not let your token do that", run, "somebody/pruned")
    refused("a name is <owner>/<name> of letters", run, "a b")
    hub.publish(f"{USER}/public", {"README.md": b""})
    refused("is there already, and everybody sees it; leave out --private", run, "public", "--private")
    hub.broken = True
    refused("503", run, "pruned")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused("because HF_HUB_OFFLINE is set", run, "pruned")
    assert list(hub.repositories) == [f"models/{BASE}", f"models/{USER}/public"]
    other = shutil.copytree(run_folder, tmp_path / "other")
    (other / "model/config.json").write_text("{}")
    refused("model/config.json is not as the run wrote it", str(other), "pruned")
    shutil.rmtree(other / "model")
    refused("has no model/ with weights; do the run again with save_model=true", str(other), "pruned")


def test_a_card_states_no_licence_that_is_not_known_and_every_set_and_rate_that_is(run_folder: Path) -> None:
    metrics = json.loads((run_folder / "metrics.json").read_text())
    origin = metrics["provenance"]
    for key in ("license", "language"):
        del origin[key]
    origin |= {"base_model": None, "commit": None, "dataset": "openslr/librispeech_asr", "corpus": "LibriSpeech"}
    rates = {f"{rate}{of}": 0.125 for rate in ("wer", "cer") for of in ("_dense", "_pruned", "")}
    metrics["evaluation"] = [
        {"name": name, "n_utterances": 7, "overlap": 0, **rates} for name in ("clean/test", "other/test")
    ]
    metrics["updates"] = 3
    card = ModelCard(make_card(metrics))
    known = card.data.to_dict()
    assert {"license", "language", "base_model"}.isdisjoint(known)
    assert known["datasets"] == ["openslr/librispeech_asr"]
    assert [
        (item.dataset_config, item.dataset_split, item.metric_type, item.metric_value)
        for item in card.data.eval_results
    ] == [(configuration, "test", rate, 12.5) for configuration in ("clean", "other") for rate in ("wer", "cer")]
    assert card.text.count("| 12.50 % | 12.50 % | 12.50 % |") == 4
