"""The tables and figures: their sweeps, what is drawn from finished runs, and reproduce.sh as a user runs it."""

import html
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

import sparsewav
from experiments.__main__ import main, needed_by
from experiments.bench.inference import random_cut, remove_at_random
from experiments.differences import speakers_of
from experiments.estimate import typed
from experiments.items import ITEMS, PAPER
from experiments.ours import model_costs
from experiments.ours.size import POINTS
from experiments.ours.size_figure import BUDGET
from experiments.ours.variants import VARIANTS
from experiments.paper.baselines import ROWS
from experiments.paper.table2 import OURS
from experiments.results import describe
from experiments.sweeps import MODELS, Scale, Sweep, jobs
from experiments.tables import latex_table
from sparsewav.baselines import METHODS
from sparsewav.errors import UserError
from sparsewav.files import conf_folder
from sparsewav.pipeline import run_folder
from sparsewav.pruning.encoder import prunable_matrices
from sparsewav.settings.run import Config
from sparsewav.training.schedule import plan_stages
from tests.finished import change, finish

ROOT = Path(__file__).parents[2]
PRESETS = ("best", "best_oneshot", "smallest")
EXPERIMENT_FOLDER = conf_folder() / "experiment"
EXPERIMENTS = sorted(
    str(path.relative_to(EXPERIMENT_FOLDER).with_suffix("")) for path in EXPERIMENT_FOLDER.rglob("*.yaml")
)
SWEEPS = list(dict.fromkeys(sweep for item in ITEMS.values() for sweep in item.sweeps))


def _updates(config: Config) -> int:
    return sum(stage.updates for stage in plan_stages(config, 20_000))


@pytest.mark.parametrize("scale", ["demo", "paper"])
@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda sweep: "-".join([sweep.experiment, sweep.role, *sweep.both]))
def test_every_run_of_every_sweep_is_a_valid_configuration(sweep: Sweep, scale: str) -> None:
    found = jobs(sweep, Scale(scale, Path("outputs") / scale))
    assert len({job.folder for job in found}) == len(found)
    for job in found:
        config = typed(job.config)
        config.check()
        if sweep.experiment == "paper/structured":
            assert _updates(config) == pytest.approx(
                _updates(typed(jobs(OURS[0], Scale(scale, Path()))[0].config)), abs=1
            )
        elif scale == "paper":
            assert config.training.epochs == 40
        assert config.calibration.utterances == (2048 if scale == "paper" else 128)


def test_every_experiment_belongs_to_an_item_or_says_what_it_is_for() -> None:
    used = {sweep.experiment for sweep in SWEEPS}
    assert set(EXPERIMENTS) - used == {"ours/methods", "ours/tuning_length", "smoke", *PRESETS}
    assert used >= {name for name in EXPERIMENTS if name.startswith("paper/")}
    for item in ITEMS.values():
        if item in PAPER:
            assert all(sweep.experiment.startswith("paper/") for sweep in item.sweeps), item.name
    for models in MODELS.values():
        assert all((conf_folder() / "model" / f"{model}.yaml").is_file() for model in models.values())


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_has_commands_to_copy_and_says_how_many_runs_they_are(name: str) -> None:
    text = (EXPERIMENT_FOLDER / f"{name}.yaml").read_text()
    head = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    commands = re.findall(r"^#   sparsewav (.*)$", head, re.MULTILINE)
    assert commands
    for command in commands:
        words = shlex.split(command)
        assert re.search(rf"\bexperiment=(\[\w+,)?{name}\]?$", words[0])
        grid = [word.partition("=")[2].count(",") + 1 for word in words[1:]]
        chosen = [word.partition(",")[0] for word in words[1:]]
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(conf_folder()), version_base="1.3"):
            config = compose("config", overrides=[words[0], *chosen], return_hydra_config=True)
        typed(config).check()
        if config.hydra.mode is not None:
            grid += [str(values).count(",") + 1 for values in config.hydra.sweeper.params.values()]
            (runs,) = re.findall(r"(\d+) (?:one-shot )?runs?\b", head)
            assert int(runs) == math.prod(grid)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_its_row_of_the_tables(preset: str, tmp_path: Path) -> None:
    """``experiment=best`` is the run of the accuracy table's row of that name, ``smallest`` of the budgets'."""
    sweeps = {variant.name: variant.one_shot for variant in VARIANTS} | {
        "smallest": next(point.sweep for point in POINTS if point.kind == BUDGET)
    }
    row = jobs(sweeps[preset], Scale("demo", tmp_path))[0]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        amount = "sparsity.megabytes" if preset == "smallest" else "sparsity.target"
        words = [f"experiment={preset}", f"{amount}={row.config.sparsity[amount.partition('.')[2]]}"]
        own = compose("config", overrides=words, return_hydra_config=True)
    assert Path(own.hydra.run.dir).name == row.folder.name


@pytest.mark.slow
def test_a_job_is_the_run_that_the_command_makes(
    run_sparsewav: Callable[..., subprocess.CompletedProcess[str]], corpus: Path, model_folder: Path, tmp_path: Path
) -> None:
    """Also of a grid with a preset, over groups and over plain values."""
    grid = ("allocation=uniform", "hydra.sweeper.params.seed='0,1'", "~hydra.sweeper.params.allocation")
    sweep = Sweep("paper/ablation_one_shot", "base", both=grid, preset="best_oneshot")
    scale = _small_scale(corpus, model_folder, tmp_path / "out")
    result = run_sparsewav(*sweep.arguments(scale))
    assert result.returncode == 0, result.stdout + result.stderr
    assert {path.parent for path in (tmp_path / "out").rglob("metrics.json")} == {
        job.folder for job in jobs(sweep, scale)
    }


def _small_scale(corpus: Path, model_folder: Path, output: Path) -> Scale:
    return Scale("demo", output, tuple(_small(corpus, model_folder)))


def _small(corpus: Path, model_folder: Path) -> list[str]:
    subsets = [
        f"data.{name}_subset={subset}"
        for name, subset in (("calibration", "train"), ("training", "train"), ("evaluation", "test"))
    ]
    return [
        f"model.name_or_path={model_folder}",
        "data=librispeech_dir",
        f"data.root={corpus}",
        *subsets,
        "calibration.utterances=10",
        "training.epochs=20",
        "training.batch_size=4",
        "training.checkpoint_updates=5",
        "training.precision=float32",
        "device=cpu",
    ]


def _reproduce(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["reproduce.sh", *arguments])
    monkeypatch.setenv("COLUMNS", "200")
    return main()


def test_table1_compares_rows_by_seed_and_says_where_the_ordering_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scale = Scale("demo", tmp_path)
    one_shot, tuned = ITEMS["table1"].sweeps
    base = {("obs", "uniform"): 0.20, ("obs", "hutchinson"): 0.16, ("obs_first_order", "hutchinson"): 0.20}

    def wer(settings: dict[str, str]) -> float:
        return base.get((settings["saliency"], settings["allocation"]), 0.5) + 0.01 * int(settings["seed"])

    finish(one_shot, scale, wer)
    assert _reproduce("table1", "--draw", "--output", str(tmp_path), monkeypatch=monkeypatch) == 1
    said = capsys.readouterr().out
    assert "6 of 6 runs are missing" in said
    assert (
        f"make them: sparsewav experiment=paper/ablation_finetune scale=demo model=demo output_root={tmp_path}" in said
    )

    progressive = {"0": 0.07, "1": 0.07, "2": 0.09}
    finish(tuned, scale, lambda at: 0.08 if at["finetune_strategy"] == "one_pass" else progressive[at["seed"]])
    assert _reproduce("table1", "--draw", "--output", str(tmp_path), monkeypatch=monkeypatch) == 0
    table = pandas.read_csv(tmp_path / "table1.csv")
    assert table["paper_wer"].tolist() == pytest.approx([0.061, 0.5795, 0.5379, 0.5301, 0.0754, 0.0711])
    assert table["wer_mean"].tolist()[1:4] == pytest.approx([0.21, 0.17, 0.21])
    assert table["wer_deviation"].tolist()[1:4] == pytest.approx([0.01] * 3)
    assert table["seeds"].tolist()[1:] == [3] * 5
    assert table["updates"].tolist()[1:] == [0, 0, 0, 400, 400]
    assert table["achieved_sparsity"].tolist()[1:] == pytest.approx([0.74] * 5)
    assert table["difference"].tolist()[2:4] == pytest.approx([-0.04, 0.04], abs=0.002)
    for names in table["runs"][1:]:
        assert all((tmp_path / name / "metrics.json").is_file() for name in names.split("; "))
    markdown = (tmp_path / "table1.md").read_text()
    verdicts = [line.rstrip("| ").rpartition("|")[2].strip() for line in markdown.splitlines() if line[:2] == "| "]
    assert verdicts[4:] == ["yes", "no", "yes", "not separated"]
    assert "Its ordering holds in 2 of 4 steps, is reversed in 1, and is not separated from noise in 1," in markdown
    assert "in points: after tuning +3.00, after progressive tuning +2.67; both had the same number of" in markdown
    assert "samples that draw 3 seeds, 6 speakers and 30 utterances anew" in markdown


def test_a_row_at_another_sparsity_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scale = Scale("demo", tmp_path)
    for sweep in ITEMS["table1"].sweeps:
        finish(sweep, scale, lambda settings: 0.2)
        for job in jobs(sweep, scale):
            if job.config.allocation.name == "hutchinson":
                change(job.folder, achieved_sparsity=0.732 - 0.001 * job.config.seed)
    assert _reproduce("table1", "--draw", "--output", str(tmp_path), monkeypatch=monkeypatch) == 0
    markdown = (tmp_path / "table1.md").read_text()
    rows = [line for line in markdown.splitlines() if line.startswith("| +")]
    assert ["at −0.9 points of sparsity †" in row for row in rows] == [True, False, False, False]
    assert ["| 73.1 % |" in row for row in rows] == [True] * 4, "the mean of what the seeds reached"
    assert "- † Not at the same sparsity as the row above." in markdown


DAMAGE = {
    "truncated": (lambda path: path.write_text(path.read_text()[:100]), "is damaged"),
    "a list": (lambda path: path.write_text("[]"), "is damaged"),
    "without a key": (
        lambda path: path.write_text(path.read_text().replace('"achieved_sparsity"', '"achieved"')),
        "has no achieved_sparsity",
    ),
    "not a number": (lambda path: change(path.parent, wer=math.nan), "wer is nan, which is not a finite number"),
    "another seed": (lambda path: change(path.parent, seed=7), "is of another run (seed=7 instead of 1)"),
    "another method": (lambda path: change(path.parent, saliency="wanda"), "saliency=wanda instead of obs"),
    "another dense model": (lambda path: change(path.parent, wer_dense=0.06), "the dense model's WER (0.05 and 0.06)"),
    "other weights of the same name": (
        lambda path: change(path.parent, inputs={"content": {"model/model.safetensors": "0"}}),
        "two runs differ in the content of the model's files",
    ),
    "another model": (
        lambda path: change(path.parent, model="other"),
        "two runs differ in the model (demo and other)",
    ),
    "another length of tuning": (lambda path: change(path.parent, updates=9), "differ in updates (0, 9)"),
    "other transcripts": (
        lambda path: (file := path.with_name("predictions.jsonl")).write_text(file.read_text().replace("word9", "x")),
        "two runs differ in the evaluated utterances or their transcripts",
    ),
    "fewer transcripts": (
        lambda path: (file := path.with_name("predictions.jsonl")).write_text(file.read_text().split("\n")[0]),
        "predictions.jsonl has 1 utterances and metrics.json says 30",
    ),
    "no transcripts": (lambda path: path.with_name("predictions.jsonl").unlink(), "predictions.jsonl is missing"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_runs_that_are_damaged_or_not_the_same_are_not_averaged(damage: str, tmp_path: Path) -> None:
    """The sentence names the run."""
    damages, said = DAMAGE[damage]
    item, scale = ITEMS["table1"], Scale("demo", tmp_path)
    for sweep in item.sweeps:
        finish(sweep, scale, lambda settings: 0.2)
    job = next(job for job in jobs(item.sweeps[0], scale) if job.config.seed == 1 and job.config.saliency.name == "obs")
    damages(job.folder / run_folder.METRICS)
    with pytest.raises(UserError) as refused:
        item.make(item, scale)
    assert said in str(refused.value)
    assert str(job.folder) in str(refused.value)
    assert not (tmp_path / "table1.csv").exists()


def test_one_model_for_all_runs_is_not_compared_with_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is run for a figure of three models that a setting makes one."""
    words = ("figure4", "--output", str(tmp_path), "--", "model.name_or_path=/my/model")
    assert _reproduce(*words, monkeypatch=monkeypatch) == 1
    assert "/my/model would stand for large_10m and for large_100h" in capsys.readouterr().out
    assert not list(tmp_path.rglob("*"))


def test_the_page_names_the_command_that_made_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its folder and settings, quoted so that a shell reads the same words again."""
    folder = tmp_path / "my runs"
    overrides = ("data=librispeech_dir", "data.root=/with space/$HOME", "training.batch_size=4")
    scale = Scale("demo", folder, overrides)
    for sweep in ITEMS["table1"].sweeps:
        finish(sweep, scale, lambda settings: 0.2)
    words = ["table1", "--output", str(folder), "--", *overrides, "hydra/launcher=joblib"]
    assert _reproduce("--draw", *words, monkeypatch=monkeypatch) == 0
    (commands,) = re.findall("<pre>(.*?)</pre>", (folder / "index.html").read_text(), re.DOTALL)
    first, *launched = html.unescape(commands).splitlines()
    assert shlex.split(first) == ["./reproduce.sh", "demo", *words[:-1]]
    assert [shlex.split(line)[1:] for line in launched] == [sweep.arguments(scale) for sweep in ITEMS["table1"].sweeps]


@pytest.mark.slow
def test_a_latex_table_compiles_and_has_its_notes_below(tmp_path: Path) -> None:
    """Its caption is not numbered twice, minus is no hyphen, and any text is escaped."""
    table = pandas.DataFrame({"Method": ["a_b & 100 %", "{c}^~\\#$"], "WER": ["−3.00 ± 0.10", "<5 (α, ≤, ×)"]})
    text = latex_table("table_1", "Ablation", table, ["||WX − ŴX||² – of dense.", "† Not the same."])
    assert r"\caption{Ablation}" in text
    assert "$-$3.00 $\\pm$ 0.10" in text
    assert text.index(r"\end{tabular}") < text.index("Not the same") < text.index(r"\end{table}")
    if not shutil.which("pdflatex"):
        pytest.skip("no LaTeX compiler")
    document = "\\documentclass{article}\n\\usepackage{booktabs}\n\\begin{document}\n" + text + "\\end{document}\n"
    (tmp_path / "paper.tex").write_text(document)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-2000:]
    assert "Overfull" not in result.stdout


@pytest.mark.slow
def test_figures_table2_and_table3_are_drawn_from_finished_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scale = Scale("demo", tmp_path)
    better = {"large_10m": 0.5, "large_100h": 0.2, "large_960h": 0.1, "large": 0.1}

    def wer(settings: dict[str, str]) -> float:
        return 0.05 + float(settings.get("sparsity.target", "0.85")) ** 6 * (1 + 0.1 * int(settings.get("seed", "0")))

    for sweep in SWEEPS:
        dense = better.get(sweep.role, 0.05)
        if sweep not in ITEMS["table1"].sweeps:
            finish(sweep, scale, lambda settings, dense=dense: dense + wer(settings), dense)
    items = [name for name in ITEMS if name not in ("table1", "size", "budgets", "speed")]
    assert _reproduce(*items, "--draw", "--output", str(tmp_path), monkeypatch=monkeypatch) == 0
    for name in ("figure1", "figure2", "figure3", "figure4", "accuracy_curves"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    points = pandas.read_csv(tmp_path / "figure1.csv")
    assert len(points) == 9 + 9 + 2
    assert (points["achieved_sparsity"] - points["target_sparsity"]).tolist() == pytest.approx([-0.01] * 20)
    shot = points[(points["finetune_strategy"] == "none") & (points["target_sparsity"] == 0.9)].iloc[0]
    assert shot["seeds"] == 3
    assert shot["wer_mean"] == pytest.approx(0.1 + 0.9**6 * 1.1, rel=1e-5)
    compression = pandas.read_csv(tmp_path / "table2.csv").set_index("method")
    assert compression.loc["HuBERT Base", "paper_wer"] == 0.0642
    assert compression.loc["HuBERT Base", "wer_dense"] == 0.05
    assert pandas.isna(compression.loc["Ours, HuBERT", "paper_wer"])
    assert compression.loc["DistilHuBERT", "left"] == 0.25
    assert compression.loc["DistilHuBERT", "updates"] == 400
    assert compression.loc["DistilHuBERT", "achieved_sparsity"] == pytest.approx(0.84)
    assert "| 200 x 24 + 400 x 16 |" in (tmp_path / "table2.md").read_text()
    assert {row.method for row in ROWS.values()} >= set(METHODS), "every method has a row"
    assert compression["wer_mean"].notna().sum() == 4 + sum(row.method in METHODS for row in ROWS.values())
    cut = compression.loc["SparseWAV, structured"]
    assert cut[["achieved_sparsity", "updates", "seeds"]].tolist() == [0.6, 400, 3]
    assert compression.loc["SparseWAV2VEC2", "params"] == 800_000
    spread = [0.05 + 0.05 + 0.85**6 * 1.1, 0.1 * 0.85**6, 3]
    for method in ("SparseWAV2VEC2", "PARP"):
        measured = compression.loc[method, ["wer_mean", "wer_deviation", "seeds"]]
        assert measured.tolist() == pytest.approx(spread, rel=1e-5), "three short runs"
    timing = pandas.read_csv(tmp_path / "table3.csv")
    ours = timing[timing["method"] == "SparseWAV"]
    assert ours[["seconds_mean", "seconds_deviation", "seeds"]].to_numpy().tolist() == [[6, 0, 3]] * 2
    assert timing.set_index("method").loc["DistilHuBERT", "times_as_long"] == 10.0
    assert timing.set_index("method").loc["SparseWAV, structured", "times_as_long"] == 1.0
    assert (
        "divided by 1000, and learning rates multiplied by 4, for all methods alike"
        in (tmp_path / "table3.md").read_text()
    )

    ours = pandas.read_csv(tmp_path / "accuracy_table.csv")
    assert ours["method"].unique().tolist() == [variant.name for variant in VARIANTS]
    assert set(ours["layer_error"]) == {0.15}
    assert set(ours["seeds"]) == {3}
    same = ours[ours["method"] != VARIANTS[0].name]
    assert not same[["difference", "low", "high"]].to_numpy().any(), "the same errors in every row"
    assert "Did not help" in (tmp_path / "accuracy_table.md").read_text()
    assert "| 0 + 1,000 without labels |" in (tmp_path / "accuracy_table.md").read_text()
    assert set(ours["recovery_updates"][ours["method"] == "best"]) == {1000}
    assert not ours["recovery_updates"][ours["method"] != "best"].any()
    curves = pandas.read_csv(tmp_path / "accuracy_curves.csv")["curve"].unique().tolist()
    assert curves == [
        f"{method}, {kind}"
        for method in ("the paper's method", "best_oneshot", "best")
        for kind in ("one-shot", "tuned")
    ]

    page = (tmp_path / "index.html").read_text()
    assert re.findall(r'<section id="(\w+)">', page) == items
    assert page.count("data:image/png;base64,") == 5
    assert not re.search(r'(src|href)="https?:', page), "the page is self-contained"
    # Drawn again from the same runs, everything has the same bytes.
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert _reproduce(*items, "--draw", "--output", str(tmp_path), monkeypatch=monkeypatch) == 0
    assert before == {path: path.read_bytes() for path in before}


def _int8_as_measured(config: Config, runs: list[Path]) -> pandas.DataFrame:
    rows = [{"run": run, "bits": 8, "wer": 0.12, "faster": 4.0} for run in (config.model.source, *map(str, runs))]
    return pandas.DataFrame(rows).assign(milliseconds=1.0, milliseconds_dense=4.0)


def test_speed_is_measured_once_on_the_models_of_the_runs(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_costs, "AUDIO", 1)
    monkeypatch.setattr(model_costs, "ROUNDS", 3)
    monkeypatch.setattr(model_costs, "measure_int8", _int8_as_measured)
    item, scale = ITEMS["speed"], Scale("demo", tmp_path, (f"model.name_or_path={model_folder}",))
    assert item.measure is not None
    for sweep in item.sweeps:
        finish(sweep, scale, lambda settings: 0.1)
        for job in jobs(sweep, scale):
            model = sparsewav.load(model_folder)
            if "parameters" in job.config.sparsity:
                model = random_cut(model, 0.5)
            elif job.config.method.name in ("sparsewav", "magnitude", "parp", "parp_p", "self_pinching"):
                for matrix in prunable_matrices(model):
                    remove_at_random(matrix.weight, job.config.sparsity.target)
            model.save_pretrained(job.folder / "model")
    with pytest.raises(UserError, match=r"not measured; measure them: \./reproduce\.sh demo speed"):
        item.make(item, scale)
    item.measure(item, scale)
    result = item.make(item, scale)
    assert result.table is not None
    rows = result.table.set_index("Model")
    measured = tmp_path / "speed-measured.csv"
    assert rows.index.tolist()[:4] == ["dense", "SparseWAV, 69.0 %", "SparseWAV, 84.0 %", "SparseWAV, 89.0 %"]
    assert (rows["Times faster"].astype(float) > 0).all()
    in_int8 = [name for name in rows.index if name.endswith(", OpenVINO int8")]
    left = ("75 %", "50 %", "23.5 %")
    assert in_int8 == [
        f"{name}, OpenVINO int8" for name in ("dense", *(f"SparseWAV, structured, {share} left" for share in left))
    ]
    assert rows.loc[in_int8, "WER %"].tolist() == ["12.00"] * 4
    assert rows.loc["SparseWAV, structured, 50 % left", "WER %"] == "10.00"
    assert rows.loc[in_int8, "ms"].astype(float).tolist() == pytest.approx(
        [float(rows.loc["dense", "ms"]) / 4] * 4, abs=0.01
    )
    assert (tmp_path / "speed.png").is_file()
    before = measured.read_bytes()
    item.measure(item, scale)
    assert measured.read_bytes() == before, "measured already"
    updates = pandas.read_csv(tmp_path / "speed.csv").set_index("model")["updates"].dropna()
    assert updates.tolist() == [400] * (len(rows) - 2), "all but the dense model's two"
    change(jobs(item.sweeps[0], scale)[0].folder, wer=0.2)
    with pytest.raises(UserError, match="not measured"):
        item.make(item, scale)


@pytest.mark.slow
def test_int8_is_timed_and_transcribed_by_its_own_runtime(
    model_folder: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_costs, "AUDIO", 1)
    monkeypatch.setattr(model_costs, "ROUNDS", 3)
    overrides = (f"model.name_or_path={model_folder}", "data=librispeech_dir", f"data.root={corpus}")
    subsets = ("data.evaluation_subset=test", "data.calibration_subset=train", "data.training_subset=train")
    config = typed(jobs(OURS[0], Scale("demo", tmp_path, (*overrides, *subsets)))[0].config)
    speech = sparsewav.load_model(str(model_folder))
    own = speech.model
    speech.model = random_cut(own, 0.5)
    sparsewav.save(speech, tmp_path / "run" / "model")
    heard: list[str] = []
    transcribe = sparsewav.evaluate
    monkeypatch.setattr(
        sparsewav,
        "evaluate",
        lambda model, *args, **more: heard.append(model.model.runtime) or transcribe(model, *args, **more),
    )
    table = model_costs.measure_int8(config, [tmp_path / "run"])
    assert table[["run", "bits"]].to_numpy().tolist() == [[str(model_folder), 8], [str(tmp_path / "run"), 8]]
    assert [runtime.partition(" ")[0] for runtime in heard] == ["openvino"] * 2
    assert all(wer >= 0 for wer in table["wer"])
    assert (table["milliseconds_dense"] / table["milliseconds"]).tolist() == pytest.approx(table["faster"].tolist())


def test_speakers_are_read_from_ids_like_librispeechs() -> None:
    assert speakers_of(["3-0-0001", "7-1-0002"]) == ["3", "7"]
    assert speakers_of(["3-0-0001", "call_7"]) == []


def test_dry_run_at_paper_scale_lists_every_job(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _reproduce("paper", "--dry-run", monkeypatch=monkeypatch) == 0
    usual = capsys.readouterr().out
    assert "accuracy_one_shot" not in usual  # hours more: full has it
    assert _reproduce("paper", "full", "--dry-run", monkeypatch=monkeypatch) == 0
    said = capsys.readouterr().out
    assert said.count("  to do  ") > usual.count("  to do  ")
    assert said.count("  to do  ") == sum(len(jobs(sweep, Scale("paper", Path("outputs/paper")))) for sweep in SWEEPS)
    assert "sparsewav experiment=paper/curve_progressive scale=paper model=wavlm-base-plus-100h" in said


def test_dry_run_says_which_items_need_a_sweep(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also those that were not asked for."""
    assert _reproduce("table2", "--dry-run", monkeypatch=monkeypatch) == 0
    lines = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    needed: list[list[str]] = []  # a row may go over several lines, of which the first has the number of runs
    for _, item, runs, *_ in lines:
        needed += [[]] if runs.strip() else []
        needed[-1] += [item.strip()] if item.strip() else []
    sweeps = ITEMS["table2"].sweeps
    assert needed[: len(sweeps)] == (by_items := [needed_by(sweep) for sweep in sweeps])
    assert by_items[0] == ["table2", "size", "speed"]
    assert ["table2", "table3", "size", "speed"] in by_items
    assert needed_by(ITEMS["figure1"].sweeps[0]) == ["figure1"]


def test_help_and_errors_name_every_item(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _reproduce("--help", monkeypatch=monkeypatch)
    said = capsys.readouterr().out
    for item in ITEMS.values():
        assert re.search(rf"^  {item.name} +{re.escape(item.title)}$", said, re.MULTILINE)
    assert "every item but accuracy_table, accuracy_curves, size and budgets (default)" in said
    with pytest.raises(SystemExit):
        _reproduce("table4", monkeypatch=monkeypatch)
    assert "table4 is none of demo, paper, all, full, table1" in capsys.readouterr().err


@pytest.mark.slow
def test_reproduce_killed_in_a_fine_tuning_ends_with_the_same_table(
    corpus: Path, model_folder: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    command = [sys.executable, "-m", "experiments", "table1", "--output"]
    settings = ["--", *_small(corpus, model_folder)]
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])}

    def reproduce(output: str) -> str:
        result = subprocess.run(
            [*command, output, *settings], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    process = subprocess.Popen(
        [*command, "killed", *settings],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("killed/ablation_finetune/*/*progressive*/stages/3-*/checkpoint-*")) and not list(
        tmp_path.glob("killed/ablation_finetune/*/*progressive*/stages/checkpoints-3-*/checkpoint-*")
    ):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, 9)
    process.wait()
    assert "Going on from" in reproduce("killed")
    reproduce("whole")
    for name in ("table1.csv", "table1.md", "table1.tex"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    for job in (tmp_path / "whole").rglob("model.safetensors"):
        assert job.read_bytes() == (tmp_path / "killed" / job.relative_to(tmp_path / "whole")).read_bytes()
    started = time.monotonic()
    assert "Loading" not in reproduce("whole"), "nothing is run again"
    assert time.monotonic() - started < 60
    metrics = json.loads(next((tmp_path / "whole").rglob("*progressive*/metrics.json")).read_text())
    assert [stage["sparsity"] for stage in metrics["stages"]] == [0.7, 0.75]
    assert OmegaConf.load(next((tmp_path / "whole").rglob("*progressive*/.hydra/config.yaml"))).save_model


def test_warnings_that_differ_in_their_numbers_alone_are_told_once() -> None:
    warned = [["3 of 35 traces are noise"], ["7 of 35 traces are noise", "layer 2 diverged"], []]
    runs = pandas.DataFrame(
        {"device": "cpu", "model": "demo", "seed": range(3), "n_utterances": 30, "warnings": pandas.Series(warned)}
    )
    assert describe(runs, Scale("demo", Path("outputs")))[1] == (
        "Warnings of the runs: 3 of 35 traces are noise (2 of 3 runs, with other numbers); "
        "layer 2 diverged (1 of 3 runs)."
    )
