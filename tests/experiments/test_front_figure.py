"""The figure of the front page, drawn from made-up runs."""

import json
import struct
from pathlib import Path

import pandas
import pytest

from experiments.ours.front_figure import main

METHODS = {
    "paper": {"solver": "obs", "allocation": "hutchinson", "recovery": "none"},
    "best-oneshot": {"solver": "alps", "allocation": "uniform", "recovery": "reconstruction"},
    "best": {"solver": "alps", "allocation": "error_curves", "recovery": "reconstruction"},
}
WORTH = {"paper": 0.7, "best-oneshot": 0.4, "best": 0.3}
TARGETS = (0.5, 0.7, 0.75, 0.8, 0.85, 0.9)


def _write_runs(folder: Path, method: str, dense: float = 0.0576) -> None:
    for target in TARGETS:
        for seed in range(3):
            metrics = METHODS[method] | {
                "saliency": "obs_first_order",
                "seed": seed,
                "target_sparsity": target,
                "achieved_sparsity": target - 0.001 * seed,
                "wer_dense": dense,
                "wer": dense + WORTH[method] * (target**6 + 0.01 * seed),
            }
            run = folder / f"{method}-{target}-{seed}"
            run.mkdir(parents=True)
            (run / "metrics.json").write_text(json.dumps(metrics))


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
    assert row["wer"] == pytest.approx(0.0576 + 0.7 * (0.9**6 + 0.01), rel=1e-5)
    assert row["seeds"] == 3
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
    assert "no finished run of saliency=obs_first_order, solver=alps, allocation=error_curves" in refusal(
        tmp_path / "runs"
    )
    _write_runs(tmp_path / "runs", "best", dense=0.06)
    assert "different dense word error rates: 0.0576, 0.0600" in refusal(tmp_path / "runs")
    (tmp_path / "runs" / "paper-0.5-0").rename(tmp_path / "kept")
    for name in ("one", "two"):
        (tmp_path / "runs" / name).mkdir()
        (tmp_path / "runs" / name / "metrics.json").write_bytes((tmp_path / "kept" / "metrics.json").read_bytes())
    assert "several runs" in refusal(tmp_path / "runs")
