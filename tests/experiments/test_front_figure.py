"""The figure of the front page, drawn from made-up runs."""

import struct
from pathlib import Path

import pandas
import pytest

from experiments.ours.front_figure import BEST, BEST_ONESHOT, PAPER, main
from experiments.sweeps import Scale, jobs
from sparsewav.pipeline import run_folder
from tests.finished import change, finish

WORTH = {PAPER: 0.7, BEST_ONESHOT: 0.4, BEST: 0.3}
SETTING = "data.calibration_subset=train"


def _finish(folder: Path, *settings: str) -> Scale:
    scale = Scale("demo", folder, settings)
    for variant, worth in WORTH.items():

        def wer(point: dict[str, str], worth: float = worth) -> float:
            return 0.0576 + worth * (float(point["sparsity.target"]) ** 6 + 0.01 * int(point["seed"]))

        finish(variant.one_shot, scale, wer, 0.0576)
    return scale


def test_it_draws_means_over_seeds_at_the_sparsity_reached(tmp_path: Path) -> None:
    _finish(tmp_path / "runs", SETTING)
    arguments = ["--runs", str(tmp_path / "runs"), "--output", str(tmp_path / "figures"), "--", SETTING]
    assert main(arguments) == 0
    table = pandas.read_csv(tmp_path / "figures" / "wer_over_sparsity.csv")
    assert table["method"].value_counts().to_dict() == {
        "the paper's method": 6,
        "best_oneshot, no labels": 6,
        "best, no labels": 6,
    }
    row = table[(table["method"] == "the paper's method") & (table["target_sparsity"] == 0.9)].iloc[0]
    assert row["achieved_sparsity"] == pytest.approx(0.89), "made-up runs reach 1 point less"
    assert row["wer_mean"] == pytest.approx(0.0576 + 0.7 * (0.9**6 + 0.01), rel=1e-5)
    assert row["seeds"] == 3
    assert not table.map(lambda cell: str(tmp_path) in str(cell)).any().any(), "it is committed"
    assert set(table["wer_dense"]) == {0.0576}
    picture = (tmp_path / "figures" / "wer_over_sparsity.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert struct.unpack(">II", picture[16:24]) == (700, 420), "as wide as a page shows it"
    assert len(picture) <= 60_000
    assert main(arguments) == 0
    assert (tmp_path / "figures" / "wer_over_sparsity.png").read_bytes() == picture


def test_it_refuses_runs_that_are_missing_damaged_or_of_another_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scale = _finish(tmp_path / "runs", SETTING)

    def refusal(*settings: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            main(["--runs", str(scale.folder), "--output", str(tmp_path / "figures"), "--", *settings])
        assert stopped.value.code == 1
        assert not (tmp_path / "figures").exists()
        return capsys.readouterr().err

    assert "18 of 18 runs are missing" in refusal(), "those of other settings do not count"
    assert "data.calibration_subsets" in refusal("data.calibration_subsets=train")
    run = jobs(BEST.one_shot, scale)[0].folder
    change(run, wer_dense=0.06)
    assert "differ in the dense model's WER" in refusal(SETTING)
    (run / run_folder.METRICS).write_text("{")
    assert f"{run / run_folder.METRICS} is damaged" in refusal(SETTING)
