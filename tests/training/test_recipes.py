"""Models of recipes: trained on first use, found afterwards, and never trained by loading alone."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sparsewav.errors import UserError
from sparsewav.models.load import locate_model
from sparsewav.settings.run import Model
from sparsewav.training import recipes


def test_a_recipe_is_trained_once_and_other_names_are_given_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SPARSEWAV_CACHE", str(tmp_path))
    commands: list[list[str]] = []
    code = 1

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        if not code:
            folder = Path(command[-1].removeprefix("output="))
            folder.mkdir(parents=True)
            (folder / "training.json").write_text("{}")
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr(subprocess, "run", run)
    for name in ("demo", "facebook/wav2vec2-base-100h", str(tmp_path)):
        assert recipes.train_if_recipe(name) == name
    assert locate_model("demo-hubert") == "demo-hubert"  # locating a model trains none
    assert commands == []
    with pytest.raises(UserError, match=r"^the training of demo-hubert failed"):
        recipes.train_if_recipe("demo-hubert")
    code = 0
    folder = recipes.trained_model_folder("demo-hubert")
    assert [recipes.train_if_recipe("demo-hubert") for _ in range(2)] == [str(folder)] * 2
    train = [sys.executable, "-m", "sparsewav.training", "recipe=demo-hubert", f"output={folder}"]
    assert commands == [train, train]  # the one that failed, and the first of the two that followed
    (folder / "training.json").write_text('{"edited": 1}')
    assert recipes.train_if_recipe("demo-hubert") == str(folder)
    assert commands == [train, train, train]
    assert (folder / "training.json").read_text() == "{}"
    assert "training.json is damaged; demo-hubert is trained again" in capsys.readouterr().out.replace("\n", "")
    assert recipes.lineage("demo-large-100h")[0] == "demo-large-100h"


@pytest.mark.parametrize(
    ("named", "settings"),
    [
        ("demo", Model("demo")),
        ("facebook/some-model", Model("facebook/some-model")),
        ("wav2vec2-base-100h", Model("facebook/wav2vec2-base-100h")),
        ("wav2vec2-large-10m", Model("./models/wav2vec2-large-10m", fairseq_checkpoint="./models/wav2vec_big_10m.pt")),
        ("mine.pt", Model(fairseq_checkpoint="mine.pt")),
        ("demo-wavlm", Model("demo-wavlm")),
        ("hubert-base-100h", Model("hubert-base-100h")),  # a folder here goes before an option of that name
    ],
)
def test_python_names_models_as_the_command_does(
    named: str, settings: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.pt").touch()
    (tmp_path / "hubert-base-100h").mkdir()
    found: list[Model] = []

    class Enough(Exception):
        pass

    def load(settings: Model, device: object, key: str) -> None:
        found.append(settings)
        raise Enough

    monkeypatch.setattr(recipes, "load_or_train", load)
    with pytest.raises(Enough):
        recipes.load_model(named, device="cpu")
    assert found == [settings]
    with pytest.raises(UserError, match="device=gpu is not known; choose auto, cpu, cuda or cuda:1"):
        recipes.load_model(named, device="gpu")
