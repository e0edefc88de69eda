"""The figure of the front page, drawn from made-up runs."""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pandas
import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from experiments.ours.front_figure import main
from sparsewav.files import conf_folder

COMMON = {
    "model": "demo",
    "method": "sparsewav",
    "saliency": "obs_first_order",
    "objective": "symmetric",
    "quantization": "none",
    "finetune_strategy": "none",
    "n_utterances": 1,
    "updates": 0,
}
METHODS = {
    "paper": {"solver": "obs", "allocation": "hutchinson", "recovery": "none"},
    "best-oneshot": {"solver": "alps", "allocation": "uniform", "recovery": "reconstruction"},
    "best": {"solver": "alps", "allocation": "error_curves", "recovery": "global"},
}
WORTH = {"paper": 0.7, "best-oneshot": 0.4, "best": 0.3}
TARGETS = (0.5, 0.7, 0.75, 0.8, 0.85, 0.9)


def _write_runs(folder: Path, method: str, dense: float = 0.0576) -> None:
    for target in TARGETS:
        for seed in range(3):
            metrics = (
                COMMON
                | METHODS[method]
                | {
                    "seed": seed,
                    "target_sparsity": target,
                    "achieved_sparsity": target - 0.001 * seed,
                    "wer_dense": dense,
                    "wer": dense + WORTH[method] * (target**6 + 0.01 * seed),
                }
            )
            run = folder / f"{method}-{target}-{seed}"
            run.mkdir(parents=True)
            (run / "metrics.json").write_text(json.dumps(metrics))
            prediction = {"set": "test", "id": "1-0-0000", "reference": "a b", "before": "a b", "after": "a"}
            (run / "predictions.jsonl").write_text(json.dumps(prediction) + "\n")
            (run / ".hydra").mkdir()
            settings = _settings() | {"seed": seed, "sparsity": {"name": "unstructured", "target": target}}
            (run / ".hydra" / "config.yaml").write_text(yaml.safe_dump(settings))


def _settings() -> dict[str, Any]:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return OmegaConf.to_container(compose("config"), resolve=True)


def _arguments(folder: Path, output: Path) -> list[str]:
    return [*(word for method in METHODS for word in (f"--{method}", str(folder))), "--output", str(output)]


def test_it_draws_means_over_seeds_at_the_sparsity_reached(tmp_path: Path) -> None:
    """All methods may lie in one folder: each run's own record says which one it is of."""
    for method in METHODS:
        _write_runs(tmp_path / "runs", method)
    assert main(_arguments(tmp_path / "runs", tmp_path / "figures")) == 0
    table = pandas.read_csv(tmp_path / "figures" / "wer_over_sparsity.csv")
    assert table["method"].value_counts().to_dict() == {
        "the paper's method": 6,
        "best_oneshot, no labels": 6,
        "best, no labels": 6,
    }
    row = table[(table["method"] == "the paper's method") & (table["target_sparsity"] == 0.9)].iloc[0]
    assert row["achieved_sparsity"] == pytest.approx(0.899)
    assert row["wer_mean"] == pytest.approx(0.0576 + 0.7 * (0.9**6 + 0.01), rel=1e-5)
    assert row[["seeds", "updates"]].tolist() == [3, 0]
    assert len(row["runs"].split("; ")) == 3
    assert set(table["wer_dense"]) == {0.0576}
    picture = (tmp_path / "figures" / "wer_over_sparsity.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert struct.unpack(">II", picture[16:24]) == (700, 420), "as wide as a page shows it"
    assert len(picture) <= 60_000
    assert main(_arguments(tmp_path / "runs", tmp_path / "figures")) == 0
    assert (tmp_path / "figures" / "wer_over_sparsity.png").read_bytes() == picture


def test_it_refuses_runs_that_cannot_be_told_apart_or_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusal(folder: Path) -> str:
        with pytest.raises(SystemExit) as stopped:
            main(_arguments(folder, tmp_path))
        assert stopped.value.code == 1
        return capsys.readouterr().err

    for method in ("paper", "best-oneshot"):
        _write_runs(tmp_path / "runs", method)
    assert "solver=alps, objective=symmetric, allocation=error_curves" in refusal(tmp_path / "runs")
    _write_runs(tmp_path / "runs", "best", dense=0.06)
    assert "differ in the dense model's WER (0.0576 and 0.06)" in refusal(tmp_path / "runs")
    record = tmp_path / "runs" / "paper-0.5-1" / ".hydra" / "config.yaml"
    settings = record.read_text()
    record.write_text(settings.replace("alpha: 0.1", "alpha: 0.05"))
    assert "differ in other settings than sparsity and seed" in refusal(tmp_path / "runs")
    record.write_text(settings)
    metrics = tmp_path / "runs" / "paper-0.5-1" / "metrics.json"
    metrics.write_text(metrics.read_text()[:40])
    assert f"{metrics} is damaged" in refusal(tmp_path / "runs")
    metrics.unlink()
    (tmp_path / "runs" / "paper-0.5-0").rename(tmp_path / "kept")
    for name in ("one", "two"):
        shutil.copytree(tmp_path / "kept", tmp_path / "runs" / name)
    assert "several runs" in refusal(tmp_path / "runs")
