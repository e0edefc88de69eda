"""The paper's scale, rehearsed: published checkpoints and LibriSpeech from a hub, all of them tiny."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas
import pytest
from huggingface_hub import ModelCard
from transformers import PreTrainedModel

from experiments.__main__ import main
from tests.hub import Hub
from tests.published import librispeech, model_files, vocabulary

ROOT = Path(__file__).parents[2]
BASE = "facebook/wav2vec2-base-100h"

SMALL = (
    *("calibration.utterances=8", "calibration.frames_per_column=null", "device=cpu"),
    *("training.epochs=1", "training.batch_size=8", "training.warmup_steps=1", "data.training_utterances=8"),
)


@pytest.mark.slow
def test_table1_from_the_hub_to_the_drawn_table(
    hub: Hub, tiny_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    """Load, stream the calibration sample, prune, two updates, evaluate, draw: ``./reproduce.sh paper table1``."""
    model = tiny_model(
        "wav2vec2", "group", vocab_size=len(vocabulary("<pad>")), conv_kernel=(20, 8), conv_stride=(20, 8)
    )
    hub.publish(BASE, model_files(model))
    counts = {"train.100": 40, "train.500": 4, "validation": 4, "test": 6}
    hub.publish("openslr/librispeech_asr", librispeech(["SEA", "SUN", "TEA"], counts), kind="datasets")
    result = subprocess.run(
        [sys.executable, "-m", "experiments", "paper", "table1", "--output", str(tmp_path / "paper"), "--", *SMALL],
        cwd=ROOT,
        env=os.environ | {"SPARSEWAV_CACHE": str(tmp_path / "cache"), "COLUMNS": "160"},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    log = result.stdout + result.stderr
    assert result.returncode == 0, log
    folder = tmp_path / "paper"
    runs = [json.loads(path.read_text()) for path in folder.glob("*/*/*/metrics.json")]
    assert len(runs) == 18
    commit = hub.repositories[f"models/{BASE}"].branches["main"]
    for run in runs:
        assert (run["model"], run["provenance"]["commit"]) == ("wav2vec2-base-100h", commit)
        assert run["provenance"]["dataset"] == "openslr/librispeech_asr"
        assert (run["n_utterances"], run["n_calibration_utterances"]) == (6, 8)
        assert run["updates"] == (0 if run["finetune_strategy"] == "none" else 2)
    card = ModelCard(next(folder.glob("*/*/*progressive*/model/README.md")).read_text()).data.to_dict()
    assert (card["base_model"], card["license"], card["language"]) == (BASE, "apache-2.0", "en")
    assert card["datasets"] == ["openslr/librispeech_asr"]
    table = pandas.read_csv(folder / "table1.csv")
    assert list(table["paper_wer"]) == pytest.approx([0.061, 0.5795, 0.5379, 0.5301, 0.0754, 0.0711])
    assert len((folder / "table1.md").read_text().splitlines()) > 6
    assert (folder / "index.html").is_file()
    # Everything is fetched once: the model of all 18 runs, the test split, the training split and three samples of it.
    large = [hub.large[line[-64:]] for line in hub.requests if line.startswith("GET /lfs/")]
    assert large.count("pytorch_model.bin") == 1
    assert len(re.findall("✓ Streaming test of openslr", log)) == 1
    assert len(re.findall(r"✓ Streaming train\.100 of openslr", log)) == 1
    assert len(re.findall(r"✓ Streaming 8 utterances of train\.100 of openslr", log)) == 3
    assert not re.search(r"Traceback|Warning:|it/s\]", log), log


def test_a_setting_that_is_not_there_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["reproduce.sh", "paper", "table1", "--", "training.epoch=1"])
    assert main() == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "error: there is no key training.epoch (did you mean training.epochs?)" in said
