"""The summary of a sweep: what varies, what every run gave, and that all of it can be read."""

import io
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import pandas
import pytest
import yaml
from rich.console import Console
from wandb_workspaces.reports.v2 import BarPlot, Config, LinePlot, PanelGrid, ScatterPlot, SummaryMetric

from sparsewav.cli.summary import summarize
from sparsewav.cli.sweep_figure import _points
from sparsewav.cli.sweep_runs import read_sweep
from sparsewav.cli.wandb_report import build_report, build_workspace, paper_parts, sweep_part
from tests.terminal import Run

SPARSITIES = {"sparsity.target": [0.5, 0.7, 0.9]}
NAMES: dict[str, Sequence[Any]] = {"saliency": ["obs", "wanda"], "solver": ["obs", "obs_refit"]}
MANY = {
    "model.name_or_path": ["/home/me/models/base/final", "/home/me/models/large/final"],
    "allocation.alpha": [0.05, 0.1],
    "calibration.propagation": ["parallel", "true_sequential"],
    "calibration.utterances": [128, 1024],
    "finetune_strategy": ["none", "progressive"],
    "seed": [0, 1],
}


def _write_run(folder: Path, overrides: Mapping[str, Any], **changes: Any) -> None:
    """Write what a finished run leaves that a summary reads."""
    metrics = {
        "model": "tiny",
        "method": "sparsewav",
        "saliency": overrides.get("saliency", "obs"),
        "allocation": "uniform",
        "finetune_strategy": overrides.get("finetune_strategy", "none"),
        "seed": overrides.get("seed", 0),
        "target_sparsity": overrides.get("sparsity.target", 0.75),
        "achieved_sparsity": overrides.get("sparsity.target", 0.75) - 0.01,
        "wer_dense": 0.0576,
        "wer_pruned": 0.25,
        "wer": 0.125,
        "updates": 0,
        "n_utterances": 300,
        "seconds": {"prune": 12.3},
        "seconds_cached": {"calibrate": 3.5, "allocate": 2.0, "evaluate": 20.0},
    }
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(metrics | changes))
    (folder / ".hydra").mkdir()
    lines = [f"{key}={value}" for key, value in overrides.items()]
    (folder / ".hydra/overrides.yaml").write_text(yaml.safe_dump([*lines, "output_root=out", "tracker=none"]))


def _write_sweep(folder: Path, axes: Mapping[str, Sequence[Any]], **changes: Any) -> Path:
    for number, values in enumerate(itertools.product(*axes.values())):
        point = dict(zip(axes, values, strict=True))
        _write_run(folder / f"tiny-{number:08x}", point, **changes)
    return folder


def _shown(folder: Path, width: int) -> str:
    console = Console(width=width, file=io.StringIO())
    summarize(folder, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_everything_that_varies_is_a_column_and_the_rest_the_title(tmp_path: Path) -> None:
    """Also of failed runs, and where a launch did not name a key that another one changed."""
    folder = _write_sweep(tmp_path / "sweep", MANY | {"data": ["librispeech_dir"]})
    failed = (
        dict.fromkeys(MANY) | {key: values[0] for key, values in MANY.items()} | {"seed": 7, "data": "librispeech_dir"}
    )
    (folder / "tiny-failed").mkdir()
    record = {"status": "failed", "error": "it broke", "choices": {}, "traceback": ""}
    (folder / "tiny-failed/error.json").write_text(
        json.dumps(record | {"overrides": [f"{key}={value}" for key, value in failed.items()]})
    )
    plain = folder / "tiny-plain"
    _write_run(
        plain,
        {key: values[0] for key, values in MANY.items() if key != "calibration.propagation"}
        | {"seed": 8, "data": "librispeech_dir"},
    )
    (plain / ".hydra/config.yaml").write_text(yaml.safe_dump({"calibration": {"propagation": "sequential"}}))
    shown = _shown(folder, 240)
    table = pandas.read_csv(folder / "summary.csv")
    assert set(MANY) <= set(table.columns)
    runs = table[table["status"] == "done"].set_index("run")
    expected = [tuple(map(str, values)) for values in itertools.product(*MANY.values())]
    found = runs.drop("tiny-plain")[list(MANY)].astype(str)
    assert sorted(map(tuple, found.to_numpy())) == sorted(expected)
    assert runs.loc["tiny-plain", "calibration.propagation"] == "sequential"
    assert runs["seconds_cached"].unique().tolist() == [5.5], "what pruning took from the cache"
    (lost,) = table[table["status"] == "failed"].to_dict("records")
    assert {key: lost[key] for key in failed} == failed
    assert re.search(r"base/final +0\.05 +parallel +128 +none +7 +- .* failed", shown)
    assert "failed: tiny-failed: it broke" in shown
    title, table_shown = shown.split("─", 1)
    assert "data=librispeech_dir" in title
    assert "dense WER 5.76 % of 300 utterances" in title
    assert "librispeech_dir" not in table_shown


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("count", [0, 2, len(MANY)])
def test_what_varies_and_the_results_can_be_read_at_any_width(count: int, width: int, tmp_path: Path) -> None:
    axes = SPARSITIES | dict(list(MANY.items())[:count])
    rates = {"cer": 0.0432, "cer_dense": 0.01, "cer_pruned": 0.0432}
    others = {"evaluation": [{"name": "clean"}, {"name": "noisy", "wer": 0.3333}]}
    folder = _write_sweep(tmp_path / "sweep", axes, **rates, **others)
    lines = _shown(folder, width).splitlines()
    assert "…" not in "".join(lines)
    assert max(map(len, lines[1:-1])) <= width  # the others name the folder
    text = "\n".join(lines)
    runs = 3 * 2**count
    for figure, times in (("12.50", runs), ("4.32", runs), ("33.33", runs), ("0.6900", runs // 3)):
        assert text.count(figure) == times, text
    for key in axes:
        assert key in text.replace(".\n", ".") or key.partition(".")[2] in text or key in text


def test_the_difference_to_the_dense_model_has_a_paired_interval(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    words = ["SEA", "SUN", "TEA", "NET"]
    rows = []
    for number in range(120):
        reference = list(generator.choice(words, size=5))
        before = [word if generator.random() > 0.1 else "X" for word in reference]
        after = [word if generator.random() > 0.2 else "Y" for word in before]
        rows.append([" ".join(text) for text in (reference, before, after)] + [f"{number}"])
    wers = {
        key: jiwer.wer([row[0] for row in rows], [row[place] for row in rows]) for key, place in (("d", 1), ("p", 2))
    }
    _write_run(tmp_path / "sweep/tiny-1", {}, wer=wers["p"], wer_dense=wers["d"])
    _write_run(tmp_path / "sweep/tiny-2", {"seed": 1}, wer=wers["p"] + 0.01, wer_dense=wers["d"])
    for run in ("tiny-1", "tiny-2"):  # the second one's transcripts do not give the rate of its metrics
        with (tmp_path / "sweep" / run / "predictions.jsonl").open("w") as file:
            for reference, before, after, name in rows:
                row = {"set": "test", "id": name, "reference": reference, "before": before, "after": after}
                file.write(json.dumps(row) + "\n")
            file.write(json.dumps(row | {"set": "other", "after": "WRONG"}) + "\n")
    shown = _shown(tmp_path / "sweep", 100)
    table = pandas.read_csv(tmp_path / "sweep/summary.csv").set_index("run")
    value, low, high = (table.loc["tiny-1", f"wer_delta{end}"] for end in ("", "_low", "_high"))
    assert value == pytest.approx(wers["p"] - wers["d"])
    edits = np.array([[jiwer.wer(row[0], row[2]) * 5 - jiwer.wer(row[0], row[1]) * 5] for row in rows])
    drawn = [edits[generator.integers(120, size=120)].sum() / 600 for _ in range(4000)]
    assert (low, high) == pytest.approx(np.quantile(drawn, (0.025, 0.975)), abs=0.004)
    assert f"{100 * value:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]" in shown
    assert pandas.isna(table.loc["tiny-2", "wer_delta"])


def test_a_divergence_stands_in_the_place_of_word_error_rates(tmp_path: Path) -> None:
    none = dict.fromkeys(("wer", "wer_dense", "wer_pruned"))
    shown = _shown(_write_sweep(tmp_path / "sweep", SPARSITIES, divergence=0.0321, **none), 80)
    assert shown.count("0.0321") == 3
    assert "WER" not in shown
    points = _points(read_sweep(tmp_path / "sweep"))
    assert points["y"].tolist() == [0.0321] * 3
    assert (tmp_path / "sweep/summary.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("axes", "across", "labels"),
    [
        (SPARSITIES, "Sparsity reached", [""]),
        (SPARSITIES | NAMES | {"seed": [0, 1]}, "Sparsity reached", ["obs, obs", "obs, obs_refit", "wanda, obs"]),
        ({"calibration.utterances": [16, 64]} | NAMES, "calibration.utterances", ["obs, obs", "wanda, obs_refit"]),
        (NAMES, None, ["obs, obs", "obs, obs_refit", "wanda, obs", "wanda, obs_refit"]),
        ({"seed": [0, 1]}, None, ["0", "1"]),
        ({}, None, [""]),
    ],
)
def test_the_figure_has_the_axes_of_the_sweep(
    axes: dict[str, Sequence[Any]], across: str | None, labels: list[str], tmp_path: Path
) -> None:
    folder = _write_sweep(tmp_path / "sweep", axes)
    for path in folder.glob("*/metrics.json"):  # rates that differ by seed, of which the figure has the mean
        metrics = json.loads(path.read_text())
        path.write_text(json.dumps(metrics | {"wer": 0.1 + 0.02 * metrics["seed"]}))
    points = _points(read_sweep(folder))
    assert set(labels) <= set(points["label"])
    assert points["x"].isna().all() if across is None else str(points.attrs["x"]).startswith(across)
    if across == "Sparsity reached":
        assert sorted(set(points["x"].round(6))) == [49.0, 69.0, 89.0]
    if "seed" in axes and len(axes) > 1:
        assert points["y"].tolist() == pytest.approx([11.0] * len(points))
        assert points["deviation"].tolist() == pytest.approx([2**0.5] * len(points))
    assert points["dense"].tolist() == pytest.approx([5.76] * len(points))
    _shown(folder, 80)
    assert (folder / "summary.png").read_bytes().startswith(b"\x89PNG")


def test_a_report_on_wandb_compares_by_what_varies(tmp_path: Path) -> None:
    axes = SPARSITIES | {"saliency": ["obs", "wanda"], "calibration": ["small", "paper"], "model": ["a", "b"]}
    folder = _write_sweep(tmp_path / "sweep", axes, updates=10, cer=0.1)
    part = sweep_part(read_sweep(folder))
    assert part.runs == "Group in ['sweep']"
    bars = {panel.title: panel.groupby for panel in part.panels if isinstance(panel, BarPlot)}
    assert bars["WER by sparsity.target"] == Config("sparsity.target")
    assert bars["WER by saliency"] == Config("options.saliency")
    assert bars["CER by calibration"] == Config("options.calibration")
    assert {type(panel) for panel in part.panels} == {BarPlot, ScatterPlot, LinePlot}
    report, workspace = (build("me", "sparsewav", [part]) for build in (build_report, build_workspace))
    (grid,) = (block for block in report.blocks if isinstance(block, PanelGrid))
    assert len(grid.panels) == len(workspace.sections[0].panels) == len(part.panels)
    assert "'sweep'" in str(grid.runsets[0].filters)
    assert "'sweep'" in str(workspace.runset_settings.filters)
    _write_sweep(tmp_path / "named", SPARSITIES | {"experiment": ["ours/methods"]})
    assert sweep_part(read_sweep(tmp_path / "named")).groups == ("ours/methods",)


def test_the_report_on_the_paper_has_the_ablation_the_curves_and_the_timing() -> None:
    report = build_report("me", "sparsewav", paper_parts())
    grids = [block for block in report.blocks if isinstance(block, PanelGrid)]
    assert [len(grid.panels) for grid in grids] == [3, 3, 1]
    assert "'paper/ablation_one_shot', 'paper/ablation_finetune'" in str(grids[0].runsets[0].filters)
    assert grids[0].panels[0].groupby == Config("saliency.name")
    assert grids[1].panels[0].x == SummaryMetric("achieved_sparsity")


def test_a_report_that_cannot_be_saved_is_one_sentence(run_sparsewav: Run, tmp_path: Path) -> None:
    command = "sparsewav-wandb-report"
    result = run_sparsewav("nowhere", "--entity", "me", command=command)
    assert (result.returncode, result.stderr) == (1, "error: nowhere is not a folder; give the folder of a sweep\n")
    (tmp_path / "empty").mkdir()
    assert run_sparsewav("empty", command="sparsewav-summary").stdout == "empty has no runs\n"
    result = run_sparsewav("empty", "--entity", "me", command=command)
    assert (result.returncode, result.stderr.count("empty has no finished runs")) == (1, 1)
    nobody = {"WANDB_API_KEY": "", "NETRC": str(tmp_path / "no-netrc"), "HOME": str(tmp_path), "WANDB_MODE": "offline"}
    result = run_sparsewav("--entity", "me", command=command, **nobody)
    assert result.returncode == 1
    assert re.search(r"^error: W&B does not save it: .*wandb login", result.stderr, re.MULTILINE)
    assert "Traceback" not in result.stderr
