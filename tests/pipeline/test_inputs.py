"""What runs and trainings read is known by content, without loading, fetching, training or speaking anything."""

import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest

from sparsewav.errors import UserError
from sparsewav.pipeline import inputs
from sparsewav.settings.data import LibriSpeechFolder
from sparsewav.settings.run import Config, Model, TrainConfig
from sparsewav.settings.training import OnePass


@pytest.fixture(autouse=True)
def _empty_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEWAV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def _on_corpus(root: Path, **settings: object) -> Config:
    data = LibriSpeechFolder(
        root=str(root), calibration_subset="train", evaluation_subset="test", training_subset="train"
    )
    config = Config(data=data, **settings)  # type: ignore[arg-type]
    config.calibration.utterances = 12
    return config


def test_a_model_of_the_hub_is_known_by_the_files_of_its_commit(tmp_path: Path, model_folder: Path) -> None:
    config = Config(model=Model(name_or_path="somebody/model"))
    absent = inputs.of_run(config)
    assert absent["unread"] == {"model": "somebody/model is not on this machine"}
    repository = tmp_path / "hub" / "models--somebody--model"
    (repository / "refs").mkdir(parents=True)
    found = []
    for commit in ("1" * 40, "2" * 40):
        snapshot = shutil.copytree(model_folder, repository / "snapshots" / commit)
        if commit[0] == "2":
            (snapshot / "model.safetensors").write_bytes(b"other weights")
        (repository / "refs" / "main").write_text(commit)
        found.append(inputs.of_run(config))
    assert inputs.changes(found[0], found[1], "somebody/model") == "model.safetensors of somebody/model"
    assert not inputs.changes(found[0], absent, "somebody/model")  # what is gone cannot be compared
    assert found[0]["content"]["evaluation set"].startswith("demo")
    assert not (tmp_path / "cache" / "demo-speech-v1-seed0").exists()


def test_a_recipe_that_was_never_trained_and_a_missing_fairseq_file_are_not_there(tmp_path: Path) -> None:
    assert inputs.of_run(Config(model=Model(name_or_path="demo-hubert")))["unread"].keys() == {"model"}
    checkpoint = tmp_path / "w2v.pt"
    config = Config(model=Model(fairseq_checkpoint=str(checkpoint)))
    assert inputs.of_run(config)["unread"] == {"model": f"{checkpoint} is not there"}
    checkpoint.write_bytes(b"weights")
    first = inputs.of_run(config)
    (tmp_path / "dict.ltr.txt").write_text("E 1\n")
    assert inputs.changes(first, inputs.of_run(config), "w2v.pt") == "dict.ltr.txt of w2v.pt"


def test_only_the_sets_that_a_run_reads_count(own_corpus: Path) -> None:
    tuned = _on_corpus(own_corpus, finetune_strategy=OnePass())
    before = {name: inputs.of_run(config) for name, config in (("one-shot", _on_corpus(own_corpus)), ("tuned", tuned))}
    transcript = next((own_corpus / "train").rglob("*.trans.txt"))
    lines = transcript.read_text().splitlines()
    transcript.write_text("\n".join([f"{lines[0]} SEA", *lines[1:]]))
    assert inputs.changes(before["one-shot"], inputs.of_run(_on_corpus(own_corpus)), "demo") == "the calibration set"
    assert inputs.changes(before["tuned"], inputs.of_run(tuned), "demo") == "the calibration set, the training set"


def test_other_settings_are_named_with_both_values(tmp_path: Path) -> None:
    before = inputs.of_training(TrainConfig(initial_model="demo", output="here"))
    now = TrainConfig(initial_model="demo", output="elsewhere", device="cpu")
    now.training.checkpoint_updates = 7
    inputs.refuse_other_settings(before, inputs.of_training(now), tmp_path, "delete it")
    now.training.betas = [0.9, 0.98]
    now.initial_model = None
    said = r'\(initial_model was "demo" and is null; '
    said += r"training\.betas was \[0\.9, 0\.999\] and is \[0\.9, 0\.98\]\); delete it$"
    with pytest.raises(UserError, match=said):
        inputs.refuse_other_settings(before, inputs.of_training(now), tmp_path, "delete it")
