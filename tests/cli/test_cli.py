"""What a user does at the terminal: runs, sweeps, mistakes and interruptions."""

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jiwer
import numpy as np
import pandas
import pytest
import soundfile
import torch
from filelock import FileLock
from hydra import compose, initialize_config_dir
from hydra.utils import get_class
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCTC

import sparsewav.cli.app  # noqa: F401  (registers the schemas)
from sparsewav.files import conf_folder

Run = Callable[..., subprocess.CompletedProcess[str]]


def _folder(tmp_path: Path) -> Path:
    (metrics,) = (tmp_path / "outputs").glob("*/metrics.json")
    return metrics.parent


def _assert_one_sentence(result: subprocess.CompletedProcess[str], pattern: str) -> None:
    """The message on the terminal: one line that says it, code 1, no traceback."""
    output = result.stdout + result.stderr
    assert result.returncode == 1, output
    assert "Traceback" not in output
    assert len(re.findall(r"^error: ", output, re.MULTILINE)) == 1, output
    assert re.search(pattern, output), output


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("sparsewav", "Worth copying"),
        ("sparsewav-train", "Worth copying"),
        ("sparsewav-export", "bitmask"),
        ("sparsewav-inspect", "heat map"),
        ("sparsewav-transcribe", "said in audio files"),
    ],
)
def test_help_does_not_wait_for_pytorch(command: str, words: str, start_sparsewav: Run) -> None:
    result = start_sparsewav("--help", command=command, PYTHONPROFILEIMPORTTIME="1")
    assert result.returncode == 0, result.stderr
    assert words in result.stdout
    assert re.search(r"\| +sparsewav\.cli$", result.stderr, re.MULTILINE)
    assert not re.search(r"\| +(torch|transformers)$", result.stderr, re.MULTILINE)


def test_help_ends_without_a_word_where_its_reader_does() -> None:
    command = f"{shlex.quote(sys.executable)} -u -m sparsewav --help | head -n 1"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (result.stdout.count("\n"), result.stderr) == (1, "")


@pytest.mark.slow
def test_summary_is_a_console_command(start_sparsewav: Run) -> None:
    result = start_sparsewav("--help", command="sparsewav-summary")
    assert (result.returncode, result.stderr) == (0, "")
    assert "usage: sparsewav-summary [-h] [--version] FOLDER" in result.stdout


def test_a_process_fails_with_one_sentence(start_sparsewav: Run) -> None:
    result = start_sparsewav("saliency=obz")
    _assert_one_sentence(result, r"^error: saliency=obz does not exist")
    assert result.stdout == ""


def test_a_run_writes_what_it_promises(
    run_sparsewav: Run, small: list[str], tmp_path: Path, model_folder: Path
) -> None:
    result = run_sparsewav(*small, "sparsity.target=0.6")
    assert result.returncode == 0, result.stdout + result.stderr
    for words in ("word error rate, dense", "word error rate, pruned", "sparsity, asked", "sparsity, reached"):
        assert words in result.stdout
    folder = _folder(tmp_path)
    assert folder.name.startswith("tiny-wav2vec2-obs_first_order-hutchinson-0.6-")

    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["model"] == "tiny-wav2vec2"
    assert (metrics["saliency"], metrics["allocation"]) == ("obs_first_order", "hutchinson")
    assert (metrics["method"], metrics["finetune_strategy"], metrics["seed"]) == ("sparsewav", "none", 0)
    seconds = metrics["seconds"]
    assert seconds["prune"] == pytest.approx(seconds["calibrate"] + seconds["allocate"] + seconds["solve"])
    assert {"device", "dtype", "versions", "git_commit", "peak_memory_bytes"} <= set(metrics)

    layers = pandas.read_csv(folder / "layers.csv")
    assert len(layers) == 12
    assert sorted(layers["rank"]) == list(range(12))
    sizes = layers["rows"] * layers["cols"]
    assert metrics["achieved_sparsity"] == pytest.approx((layers["sparsity"] * sizes).sum() / sizes.sum())
    assert layers["target_sparsity"].between(0.5 - 1e-9, 0.7 + 1e-9).all()

    # The model loads by itself, and its zeros are those that the table counts.
    model = AutoModelForCTC.from_pretrained(folder / "model")
    dense = load_file(model_folder / "model.safetensors")
    for row in layers.itertuples():
        weight = model.get_submodule(row.name).weight
        assert int((weight == 0).sum()) == round(row.target_sparsity * weight.numel())
    assert metrics["params_nonzero"] == sum(int(p.count_nonzero()) for p in model.parameters())
    pruned_names = {f"{name}.weight" for name in layers["name"]}
    for name, tensor in load_file(folder / "model" / "model.safetensors").items():
        assert name in pruned_names or torch.equal(tensor, dense[name]), name

    predictions = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert len(predictions) == metrics["n_utterances"] == 6
    references = [row["reference"] for row in predictions]
    assert metrics["wer"] == pytest.approx(jiwer.wer(references, [row["after"] for row in predictions]))
    assert metrics["wer_dense"] == pytest.approx(jiwer.wer(references, [row["before"] for row in predictions]))
    assert (folder / ".hydra" / "config.yaml").is_file()
    assert not list(folder.rglob("*.part"))
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in folder.rglob("*")), "for others to read, too"

    log = (folder / "sparsewav.log").read_text()
    assert [log.count(warning) for warning in metrics["warnings"]] == [1] * len(metrics["warnings"])

    # Launched again it is done, and says so without touching anything, its settings and its log included.
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    again = run_sparsewav(*small, "sparsity.target=0.6")
    assert again.returncode == 0
    assert "Done already" in again.stdout
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}

    # Cached statistics give the same bytes as fresh ones, and force=true does the run again.
    weights = (folder / "model" / "model.safetensors").read_bytes()
    for arguments in (["force=true"], ["force=true", "cache=false"]):
        forced = run_sparsewav(*small, "sparsity.target=0.6", *arguments)
        assert forced.returncode == 0
        assert (folder / "model" / "model.safetensors").stat().st_mtime_ns not in before.values()
        assert (folder / "model" / "model.safetensors").read_bytes() == weights


def test_a_sweep_survives_a_failed_job_and_is_resumed(run_sparsewav: Run, small: list[str], tmp_path: Path) -> None:
    # α = 0.1 does not fit 0.95: that job fails, the others must not.
    sweep = ["-m", *small, "sparsity.target=0.5,0.95,0.7", "saliency=magnitude,obs", "output_root=out"]
    result = run_sparsewav(*sweep)
    output = result.stdout + result.stderr
    assert result.returncode == 1, output
    assert "Traceback" not in output
    assert output.count("error: allocation.alpha=0.1 does not fit sparsity.target=0.95") == 2
    (summary_path,) = (tmp_path / "out").glob("sweep-*/summary.csv")
    summary = pandas.read_csv(summary_path)
    assert len(summary) == 6
    assert (summary["status"] == "failed").sum() == 2
    numbers = re.findall(r"^job (\d) of 6: (tiny\S+)$", result.stdout, re.MULTILINE)
    assert [number for number, _ in numbers] == list("123456")
    assert {name for _, name in numbers} == set(summary["run"])
    assert all(
        f"job {number} of 6: {name}" in (summary_path.parent / name / "sparsewav.log").read_text()
        for number, name in numbers
        if "0.95" not in name
    )
    done = summary[summary["status"] == "done"]
    assert sorted(zip(done["saliency"], done["target_sparsity"], strict=True)) == [
        ("magnitude", 0.5),
        ("magnitude", 0.7),
        ("obs", 0.5),
        ("obs", 0.7),
    ]
    (failed, _) = summary_path.parent.glob("*/error.json")
    assert "Traceback" in json.loads(failed.read_text())["traceback"]
    assert "Traceback" in (failed.parent / "sparsewav.log").read_text()

    again = run_sparsewav(*sweep, "cache=false", "hydra/launcher=basic")  # which change no result
    assert again.stdout.count("Done already") == 4
    shown = run_sparsewav(str(summary_path.parent), command="sparsewav-summary")
    assert shown.returncode == 1
    assert "6 runs" in shown.stdout


def test_a_run_is_done_again_when_what_it_was_made_from_has_other_content(
    run_sparsewav: Run, small: list[str], tmp_path: Path, model_folder: Path, own_corpus: Path
) -> None:
    """Same names, other weights or transcripts: never the old figures. What is gone leaves them, and a line."""
    own_model = shutil.copytree(model_folder, tmp_path / "own")
    arguments = [*small, f"model.name_or_path={own_model}", f"data.root={own_corpus}", "allocation=uniform"]
    assert run_sparsewav(*arguments).returncode == 0
    folder = _folder(tmp_path)
    first = json.loads((folder / "metrics.json").read_text())
    settings = (folder / ".hydra" / "config.yaml").read_text()

    weights = own_model / "model.safetensors"
    whole = weights.read_bytes()
    save_file({name: 0.9 * tensor for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    result = run_sparsewav(*arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    said = f"model.safetensors of {own_model} changed since this run was made; doing it again"
    assert said in result.stdout
    second = json.loads((folder / "metrics.json").read_text())
    assert said in second["warnings"]
    assert first["inputs"]["content"]["calibration set"] == second["inputs"]["content"]["calibration set"]
    changed = load_file(folder / "model" / "model.safetensors")["lm_head.weight"]
    assert torch.equal(changed, load_file(weights)["lm_head.weight"])
    assert "Done already" in run_sparsewav(*arguments).stdout

    # A launch that fails leaves the finished run as it was; then one whose inputs are right again finds it.
    content = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    changed_bytes = weights.read_bytes()
    weights.write_bytes(changed_bytes[:1000])
    _assert_one_sentence(run_sparsewav(*arguments), "weights of model.name_or_path=.* cannot be loaded")
    assert content == {path: path.read_bytes() for path in content}
    assert (folder / "error.json").is_file()
    weights.write_bytes(changed_bytes)
    assert "Done already" in run_sparsewav(*arguments).stdout
    assert not (folder / "error.json").exists()

    transcript = next((own_corpus / "test").rglob("*.trans.txt"))
    lines = transcript.read_text().splitlines()
    transcript.write_text("\n".join(lines[:-1]) + "\n")
    result = run_sparsewav(*arguments)
    assert "the evaluation set changed since this run was made; doing it again" in result.stdout
    third = json.loads((folder / "metrics.json").read_text())
    assert (first["n_utterances"], third["n_utterances"]) == (6, 5)
    assert (folder / ".hydra" / "config.yaml").read_text() == settings

    for gone, part in ((own_corpus, "evaluation set"), (own_model, "model")):
        shutil.rmtree(gone)
        result = run_sparsewav(*arguments)
        assert result.returncode == 0
        assert "Done already" in result.stdout
        assert f"the {part} could not be compared" in result.stdout
    assert json.loads((folder / "metrics.json").read_text()) == third
    assert len(whole) == len(changed_bytes)

    for broken, said in (
        ('{"model": ', "is damaged"),
        ('["a", "list"]', "does not hold the metrics of a run"),
        (json.dumps(third | {"wer": "good"}), "does not hold the metrics of a run"),
    ):
        (folder / "metrics.json").write_text(broken)
        shown = run_sparsewav(str(folder.parent), command="sparsewav-summary")
        assert re.search(rf"left out: .*metrics\.json {said}", shown.stdout), shown.stdout
        assert "Traceback" not in shown.stdout + shown.stderr


def test_a_folder_that_the_user_named_is_not_taken_for_a_run_of_other_settings(
    run_sparsewav: Run, small: list[str], tmp_path: Path
) -> None:
    named = [*small, "allocation=uniform", "hydra.run.dir=mine"]
    assert run_sparsewav(*named).returncode == 0
    before = {path: path.read_bytes() for path in (tmp_path / "mine").rglob("*") if path.is_file()}
    result = run_sparsewav(*named, "sparsity.target=0.5")
    _assert_one_sentence(result, r"mine was made with other settings \(sparsity\.target was 0\.75 and is 0\.5\)")
    assert before == {path: path.read_bytes() for path in before}
    # Nor without its model, which would be a reason to do the run again.
    shutil.rmtree(tmp_path / "mine" / "model")
    _assert_one_sentence(run_sparsewav(*named, "sparsity.target=0.5"), "mine was made with other settings")


def test_a_run_replaces_no_model_that_is_not_its_own(
    run_sparsewav: Run, small: list[str], tmp_path: Path, model_folder: Path
) -> None:
    arguments = [*small, "allocation=uniform", "hydra.run.dir=mine"]
    shutil.copytree(model_folder, tmp_path / "mine" / "models" / "own")
    assert run_sparsewav(*arguments).returncode == 0
    assert (tmp_path / "mine" / "models" / "own" / "model.safetensors").is_file()

    itself = [*arguments, f"model.name_or_path={tmp_path / 'mine'}", "force=true"]
    _assert_one_sentence(run_sparsewav(*itself), "mine holds the model that is to be pruned, .*mine/model;")
    shutil.copytree(model_folder, tmp_path / "other" / "model")
    for _ in range(2):  # the record of a failure makes it no folder of a run
        result = run_sparsewav(*arguments, "hydra.run.dir=other")
        _assert_one_sentence(result, "other/model was not written by a run and would be replaced")
    weights = (tmp_path / "other" / "model" / "model.safetensors").read_bytes()
    assert weights == (model_folder / "model.safetensors").read_bytes()


def test_the_model_of_a_finished_run_is_kept_and_its_loss_or_damage_is_noticed(
    run_sparsewav: Run, small: list[str], tmp_path: Path
) -> None:
    arguments = [*small, "allocation=uniform"]
    assert run_sparsewav(*arguments).returncode == 0
    weights = _folder(tmp_path) / "model" / "model.safetensors"
    whole = weights.read_bytes()
    assert "Done already" in run_sparsewav(*arguments, "save_model=false").stdout
    assert weights.read_bytes() == whole

    weights.write_bytes(whole[:-5] + bytes([whole[-5] ^ 0x40]) + whole[-4:])
    result = run_sparsewav(*arguments)
    assert "Done already" in result.stdout
    assert f"{weights} is not as this run wrote it; force=true writes it again" in result.stdout
    weights.unlink()
    assert f"{weights.parent} has no weights; doing this run again" in run_sparsewav(*arguments).stdout
    assert weights.read_bytes() == whole
    (_folder(tmp_path) / "layers.csv").unlink()
    assert "layers.csv is missing; doing this run again" in run_sparsewav(*arguments).stdout
    assert (_folder(tmp_path) / "layers.csv").is_file()


def test_a_sweep_goes_on_past_a_run_that_another_launcher_is_on_and_comes_back(
    run_sparsewav: Run, small: list[str], tmp_path: Path
) -> None:
    sweep = ["-m", *small, "sparsity.target=0.5,0.7", "saliency=magnitude,obs", "output_root=out"]
    assert run_sparsewav(*sweep).returncode == 0
    (summary,) = tmp_path.glob("out/sweep-*/summary.csv")
    first, *others = sorted((path.parent for path in summary.parent.glob("*/metrics.json")), key=_finished)
    for path in (first, *others):
        shutil.rmtree(path)
    summary.unlink()
    held = threading.Event()

    def hold_until_the_others_are_done() -> None:
        with FileLock(summary.parent / f".{first.name}.lock"):
            held.set()
            while not all((path / "metrics.json").is_file() for path in others):
                time.sleep(0.05)

    holder = threading.Thread(target=hold_until_the_others_are_done, daemon=True)
    holder.start()
    held.wait()
    result = run_sparsewav(*sweep)
    holder.join()
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("Another process is on this run; going on with the next") == 1
    assert result.stdout.count("Pruning to") == 4
    assert max((first, *others), key=_finished) == first
    assert len(pandas.read_csv(summary)) == 4


def _finished(folder: Path) -> int:
    return (folder / "metrics.json").stat().st_mtime_ns


@pytest.mark.slow
def test_two_launchers_share_a_sweep_and_one_does_it_all_when_the_other_is_killed(
    small: list[str], tmp_path: Path, environment: dict[str, str]
) -> None:
    """They share a folder, as machines that share a file system do; the locks are the system's, on both."""
    long = ["solver=alps", "allocation=uniform", "recovery=reconstruction", "calibration.propagation=sequential"]
    sweep = ["-m", *small, *long, "recovery.steps=60", "sparsity.target=0.4,0.5,0.6,0.7"]

    def launch(root: str, number: int) -> tuple[subprocess.Popen[bytes], Path]:
        log = tmp_path / f"{root}-{number}.log"
        command = [str(Path(sys.executable).parent / "sparsewav"), *sweep, f"output_root={root}"]
        with log.open("wb") as file:
            process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=file, stderr=subprocess.STDOUT)
        return process, log

    both = [launch("shared", number) for number in range(2)]
    assert [process.wait(300) for process, _ in both] == [0, 0]
    said = [log.read_text() for _, log in both]
    assert sum(text.count("Evaluating the pruned model") for text in said) == 4, said  # no run twice, and none lost
    assert all(text.count("Evaluating the pruned model") > 0 for text in said), said
    assert all("4 runs in" in text for text in said)
    (summary,) = tmp_path.glob("shared/*/summary.csv")
    expected = pandas.read_csv(summary)[["run", "status", "wer"]]

    (killed, log), (other, _) = (launch("killed", number) for number in range(2))
    while killed.poll() is None and log.read_text().count("Loading") < 2:  # in the middle of its second run
        time.sleep(0.01)
    killed.kill()
    assert (other.wait(300), killed.wait(300)) == (0, -9)
    (summary,) = tmp_path.glob("killed/*/summary.csv")
    pandas.testing.assert_frame_equal(pandas.read_csv(summary)[["run", "status", "wer"]], expected)


def test_what_the_cache_gave_is_told_from_what_was_measured_now(
    run_sparsewav: Run, small: list[str], tmp_path: Path
) -> None:
    first = run_sparsewav(*small, "sparsity.target=0.5", "output_root=first")
    second = run_sparsewav(*small, "sparsity.target=0.6", "output_root=second")
    (hessians,) = (tmp_path / "cache").glob("hessians/*/hessians.json")
    hessians.write_text("{}")
    third = run_sparsewav(*small, "sparsity.target=0.7", "output_root=third")
    found = [
        json.loads(next((tmp_path / root).glob("*/metrics.json")).read_text()) for root in ("first", "second", "third")
    ]
    assert found[0]["seconds_cached"] == {}
    assert set(found[1]["seconds_cached"]) == {"calibrate", "allocate", "evaluate"}
    for piece in ("calibrate", "allocate"):
        assert found[1]["seconds_cached"][piece] == found[1]["seconds"][piece] == found[0]["seconds"][piece]
    assert found[1]["seconds_cached"]["evaluate"] < found[1]["seconds"]["evaluate"]
    assert "cached" not in first.stdout
    assert len(re.findall(r"(?:calibrate|allocate|evaluate) [0-9.]+ \([0-9.]+ cached\)", second.stdout)) == 3
    assert "cached: spent by an earlier run" in second.stdout
    # What was damaged in the cache is measured now, and the record says so.
    assert set(found[2]["seconds_cached"]) == {"allocate", "evaluate"}
    assert f"{hessians} is damaged; it is made again" in found[2]["warnings"]
    assert third.stdout.count("it is made again") == 1
    # These random models recognise nothing, which is said.
    assert re.search(r"the dense model's word error rate is \d+ %: check its tokenizer", first.stdout)
    assert any("the dense model's word error rate" in warning for warning in found[0]["warnings"])


NO_RAY = pytest.mark.skipif(
    importlib.util.find_spec("hydra_plugins.hydra_ray_launcher") is None,
    reason="Ray is not installed (pip install '.[ray]', in an environment without joblib's launcher)",
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
        pytest.param(["hydra/launcher=ray", "+hydra.launcher.ray.init.num_cpus=2"], marks=NO_RAY),
        ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=10"],
        ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=10", "hydra.launcher.tasks_per_node=2"],
    ],
    ids=["joblib", "ray", "submitit", "submitit-two-processes"],
)
def test_a_launcher_gives_the_same_results(
    run_sparsewav: Run, start_sparsewav: Run, small: list[str], tmp_path: Path, launcher: list[str]
) -> None:
    jobs = [*small, "sparsity.target=0.5,0.7", "allocation=uniform"]
    assert run_sparsewav("-m", *jobs, "output_root=serial").returncode == 0
    result = start_sparsewav("-m", *launcher, *jobs, "output_root=parallel", SPARSEWAV_CACHE=str(tmp_path / "other"))
    assert result.returncode == 0, result.stdout + result.stderr
    logs = [path.read_text() for path in (tmp_path / "parallel").glob("sweep-*/*/sparsewav.log")]
    assert sorted(number for log in logs for number in re.findall(r"job (\d) of 2: tiny", log)) == ["1", "2"]
    serial, parallel_summary = (
        pandas.read_csv(next((tmp_path / root).glob("sweep-*/summary.csv"))) for root in ("serial", "parallel")
    )
    columns = ["run", "wer", "achieved_sparsity", "params_nonzero"]
    pandas.testing.assert_frame_equal(serial[columns], parallel_summary[columns])


@pytest.mark.parametrize(
    ("launcher", "class_name"),
    [
        ("joblib", "JoblibLauncher"),
        pytest.param("ray_cluster", "RayLauncher", marks=NO_RAY),
        ("submitit_local", "LocalLauncher"),
        ("submitit_slurm", "SlurmLauncher"),
    ],
)
def test_the_launchers_are_there(launcher: str, class_name: str) -> None:
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        settings = compose("config", [f"hydra/launcher={launcher}"], return_hydra_config=True).hydra.launcher
    assert get_class(settings._target_).__name__ == class_name


def test_the_slurm_launcher_asks_for_a_gpu_a_run() -> None:
    overrides = ["hydra/launcher=slurm_gpu", "hydra.launcher.partition=gpu"]
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        launcher = compose("config", overrides, return_hydra_config=True).hydra.launcher
        overrides.append("hydra.launcher.tasks_per_node=4")
        wider = compose("config", overrides, return_hydra_config=True).hydra.launcher
    assert (launcher.gpus_per_node, launcher.partition, launcher.timeout_min) == (1, "gpu", 1440)
    assert launcher._target_.endswith("SlurmLauncher")
    assert (wider.gpus_per_node, wider.tasks_per_node) == (4, 4)


@pytest.mark.slow
def test_torchrun_gives_the_same_results(start_sparsewav: Run, small: list[str], tmp_path: Path) -> None:
    """A sweep that tunes and fails by turns, in two processes: what one process writes, and one report of each kind."""
    training = ["training.epochs=1", "training.batch_size=4", "training.precision=float32", "training.warmup_steps=1"]
    tuned = ["finetune_strategy=progressive", "finetune_strategy.stages=[0.5]", "data.training_subset=train", *training]
    sweep = ["-m", *small, "sparsity.target=0.7,0.95", "calibration.propagation=parallel,sequential", *tuned]
    processes = ["--standalone", "--nproc-per-node", "2", "-m", "sparsewav"]
    alone = start_sparsewav(*sweep, "output_root=one", OMP_NUM_THREADS="1")
    # Its own cache, or it would read Hessians instead of summing them.
    changes = {"OMP_NUM_THREADS": "1", "SPARSEWAV_CACHE": str(tmp_path / "other")}
    tracker = ["tracker=wandb", "tracker.mode=offline"]
    several = start_sparsewav(*processes, *sweep, *tracker, "output_root=two", command="torchrun", **changes)
    output = several.stdout + several.stderr
    assert (alone.returncode, several.returncode) == (1, 1), output  # α does not fit 0.95
    assert output.count("error: allocation.alpha=0.1 does not fit sparsity.target=0.95") == 2, output
    one, two = (sorted((tmp_path / root).glob("sweep-*/*/metrics.json")) for root in ("one", "two"))
    assert [path.parent.name for path in one] == [path.parent.name for path in two]
    assert len(one) == 2
    tracked = [path.parents[1].name for path in (tmp_path / "two").glob("sweep-*/*/wandb/offline-run-*")]
    assert sorted(tracked) == sorted({path.name for path in (tmp_path / "two").glob("sweep-*/tiny*")}), "by one process"
    for ours, theirs in zip(one, two, strict=True):
        metrics, others = (json.loads(path.read_text()) for path in (ours, theirs))
        for key in ("wer", "wer_pruned", "wer_dense", "achieved_sparsity", "params_nonzero", "updates"):
            assert metrics[key] == others[key], key
        for name in ("layers.csv", "layers-0.5.csv"):
            pandas.testing.assert_frame_equal(
                pandas.read_csv(ours.parent / name), pandas.read_csv(theirs.parent / name), rtol=1e-4
            )
        weights, other_weights = (load_file(path.parent / "model" / "model.safetensors") for path in (ours, theirs))
        for name, weight in weights.items():
            assert torch.equal(weight == 0, other_weights[name] == 0), name
            torch.testing.assert_close(weight, other_weights[name], rtol=1e-3, atol=1e-4)

    again = start_sparsewav(*processes, *sweep, *tracker, "output_root=two", command="torchrun", **changes)
    assert again.stdout.count("Done already") == 2, again.stdout + again.stderr


@pytest.mark.slow
def test_torchrun_ends_at_once_when_a_run_cannot_start(start_sparsewav: Run, small: list[str]) -> None:
    started = time.monotonic()
    processes = ["--standalone", "--nproc-per-node", "2", "-m", "sparsewav"]
    result = start_sparsewav(*processes, *small, "sparsity.target=1.5", command="torchrun")
    assert time.monotonic() - started < 60
    assert result.returncode == 1
    output = result.stdout + result.stderr  # torchrun adds a report of its own, traceback included, to whatever fails
    assert output.count("sparsity.target=1.5 is not between 0 and 1") == 1, output
    assert "sparsewav/cli" not in output


def test_a_stopped_run_goes_on_and_ends_with_the_same_bytes(
    run_sparsewav: Run, small: list[str], tmp_path: Path
) -> None:
    """A folder in the place of the predictions stops a run between its pruning and its end."""
    assert run_sparsewav(*small, "output_root=reference", SPARSEWAV_CACHE=str(tmp_path / "other")).returncode == 0
    (reference,) = (tmp_path / "reference").glob("tiny*")
    folder = tmp_path / "outputs" / reference.name
    (folder / "predictions.jsonl").mkdir(parents=True)
    _assert_one_sentence(run_sparsewav(*small), r"cannot write .*predictions\.jsonl")
    (folder / "predictions.jsonl").rmdir()
    result = run_sparsewav(*small)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Going on from model" in result.stdout
    for name in ("model/model.safetensors", "layers.csv", "predictions.jsonl"):
        assert (folder / name).read_bytes() == (reference / name).read_bytes(), name
    assert {path.name for path in folder.iterdir()} == {path.name for path in reference.iterdir()}


def test_a_stopped_run_whose_newest_step_is_damaged_goes_on_from_the_step_before(
    run_sparsewav: Run, small: list[str], tmp_path: Path
) -> None:
    tuning = ["finetune_strategy=one_pass", "training.batch_size=4", "training.epochs=1", "data.training_subset=train"]
    arguments = [*small, *tuning, "allocation=uniform"]
    assert run_sparsewav(*arguments, "output_root=reference").returncode == 0
    (reference,) = (tmp_path / "reference").glob("tiny*")
    folder = tmp_path / "outputs" / reference.name
    (folder / "predictions.jsonl").mkdir(parents=True)
    _assert_one_sentence(run_sparsewav(*arguments), r"cannot write .*predictions\.jsonl")
    (folder / "predictions.jsonl").rmdir()
    weights = folder / "model" / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-5] ^= 0x40
    weights.write_bytes(damaged)
    result = run_sparsewav(*arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{weights} is damaged; going on from the step before it" in result.stdout.replace("\n", "")
    assert "Going on from 0-prune-0.75" in result.stdout
    for name in ("model/model.safetensors", "predictions.jsonl", "training_log.csv"):
        assert (folder / name).read_bytes() == (reference / name).read_bytes(), name


def test_a_stopped_run_does_not_score_the_words_of_another_evaluation_set(
    run_sparsewav: Run, small: list[str], own_corpus: Path, tmp_path: Path
) -> None:
    arguments = [*small, f"data.root={own_corpus}", "allocation=uniform", "hydra.run.dir=mine"]
    (tmp_path / "mine" / "predictions.jsonl").mkdir(parents=True)
    _assert_one_sentence(run_sparsewav(*arguments), r"cannot write .*predictions\.jsonl")
    (tmp_path / "mine" / "predictions.jsonl").rmdir()
    other = run_sparsewav(*arguments, "sparsity.target=0.5")
    _assert_one_sentence(other, r"mine was made with other settings \(sparsity\.target was 0\.75 and is 0\.5\)")
    first, *others = sorted((own_corpus / "test").rglob("*.flac"))
    first.write_bytes(others[0].read_bytes())
    result = run_sparsewav(*arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "starting over" in result.stdout
    rows = [json.loads(line) for line in (tmp_path / "mine" / "predictions.jsonl").read_text().splitlines()]
    hypotheses = {row["id"]: row["after"] for row in rows}
    assert hypotheses[first.stem] == hypotheses[others[0].stem]


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(
    run_sparsewav: Run, small: list[str], tmp_path: Path, environment: dict[str, str]
) -> None:
    reference = run_sparsewav(*small, "output_root=reference", SPARSEWAV_CACHE=str(tmp_path / "other"))
    assert reference.returncode == 0
    (expected,) = (tmp_path / "reference").glob("*/model/model.safetensors")
    root = _kill_after_solve(small, tmp_path, environment)
    assert not list(root.glob("*/metrics.json"))
    result = run_sparsewav(*small, f"output_root={root}")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Going on from model" in result.stdout
    (weights,) = root.glob("*/model/model.safetensors")
    assert weights.read_bytes() == expected.read_bytes()
    assert list(root.glob("*/metrics.json"))
    assert not list(root.rglob("step.json"))


@pytest.mark.slow
def test_a_tuned_run_killed_before_its_tuning_ends_with_the_same_records(
    run_sparsewav: Run, small: list[str], tmp_path: Path, environment: dict[str, str]
) -> None:
    tuning = ["finetune_strategy=one_pass", "training.batch_size=4", "training.epochs=2", "data.training_subset=train"]
    assert run_sparsewav(*small, *tuning, "output_root=reference").returncode == 0
    root = _kill_after_solve([*small, *tuning], tmp_path, environment, "stages/0-prune-0.75")
    result = run_sparsewav(*small, *tuning, f"output_root={root}")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Going on from 0-prune-0.75" in result.stdout
    (expected,), (folder,) = (tmp_path / "reference").glob("tiny*"), root.glob("tiny*")
    for name in ("model/model.safetensors", "layers.csv", "predictions.jsonl", "training_log.csv"):
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), name
    before, after = (json.loads((path / "metrics.json").read_text()) for path in (expected, folder))
    for key in ("stages", "wer_dense", "wer_pruned", "wer", "updates", "achieved_sparsity", "params_nonzero"):
        assert before[key] == after[key], key


def _kill_after_solve(small: list[str], tmp_path: Path, environment: dict[str, str], model: str = "model") -> Path:
    """Kill a run as soon as its pruned model is on disk, without a chance to clean up; gives its output root."""
    for attempt in range(10):  # the moment lasts a few hundredths of a second and can be missed on a busy machine
        root = tmp_path / f"killed-{attempt}"
        process = subprocess.Popen(
            [str(Path(sys.executable).parent / "sparsewav"), *small, f"output_root={root}"],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None:
            if list(root.glob(f"*/{model}/step.json")):
                process.kill()
                process.wait()
                if not list(root.glob("*/metrics.json")):
                    return root
            time.sleep(0.002)
    raise AssertionError("no run could be killed between its solve and its end")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["saliency=obz"], r"saliency=obz does not exist \(did you mean obs\?\); choose one of magnitude, obs"),
        (["sparsity.targte=0.5"], r"no key sparsity\.targte \(did you mean sparsity\.target\?\)"),
        (["+sparsity.foo=1"], r"no key sparsity\.foo"),
        (["sparsity.target=abc"], r"sparsity\.target=abc has the wrong type"),
        (["sparsity.target=1.2"], r"sparsity\.target=1\.2 is not between 0 and 1"),
        (["sparsity.target=0.95"], r"choose an alpha from 0 to 0\.05"),
        (
            ["model.offload=true", "calibration.propagation=sequential"],
            r"choose calibration\.propagation=sequential and allocation=uniform with it",
        ),
        (["sparsity=n_m"], "choose allocation=uniform"),
        (["objective=asymmetric"], r"choose calibration\.propagation=true_sequential \(or sequential\) with it"),
        (["solver=alps", "saliency=wanda"], r"solver=alps updates the kept weights, and saliency=wanda does not"),
        (["data.root=/nowhere"], r"data\.root=/nowhere is not a folder"),
        (["data.evaluation_subset=tset"], r"data\.evaluation_subset=tset is not in .*; it holds test, train"),
        (["device=cuda:99"], r"device=cuda:99 is not there"),
        (["calibration.utterances=500"], r"calibration\.utterances=500 asks for more than the 12"),
        (["output_root=/dev/null/outputs"], r"cannot write /dev/null/outputs"),
    ],
)
def test_mistakes_get_one_sentence(run_sparsewav: Run, small: list[str], arguments: list[str], message: str) -> None:
    _assert_one_sentence(run_sparsewav(*small, *arguments), message)


@pytest.mark.parametrize(
    "method", [["allocation=uniform"], ["method=magnitude", "data.training_subset=test", "training.epochs=1"]]
)
def test_evaluation_utterances_that_were_learned_are_refused_or_shown(
    run_sparsewav: Run, small: list[str], method: list[str], tmp_path: Path
) -> None:
    """By the terminal, the metrics, the summary and the model's card; and audio without a transcript in a line."""
    corpus = shutil.copytree(small[2].partition("=")[2], tmp_path / "corpus")
    soundfile.write(corpus / "test/100/7/more.wav", np.zeros(8000), 16_000)
    arguments = [*small, *method, f"data.root={corpus}", "data.calibration_subset=test", "calibration.utterances=4"]
    seen, kind = (6, "training") if "data.training_subset=test" in method else (4, "calibration")
    _assert_one_sentence(
        run_sparsewav(*arguments),
        rf"{seen} of 6 evaluation utterances are in the {kind} set, .* allow it with data\.allow_overlap=true",
    )
    result = run_sparsewav(*arguments, "data.allow_overlap=true")
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{seen} of its utterances are in the calibration or training set, too" in result.stdout
    assert result.stdout.count("! audio without a transcript in test is left out: 1 files") == 1
    metrics = json.loads((_folder(tmp_path) / "metrics.json").read_text())
    assert metrics["evaluation_overlap"] == seen
    assert [note for note in metrics["warnings"] if "data.allow_overlap=true" in note or "more.wav" in note]
    card = (_folder(tmp_path) / "model/README.md").read_text()
    assert f"| evaluation utterances that the model was made from, too | {seen} |\n" in card
    summary = run_sparsewav("outputs", command="sparsewav-summary").stdout
    assert re.search(r"evaluated\b.*\bon seen", summary, re.DOTALL)


def test_missing_values_and_broken_files_get_one_sentence(
    run_sparsewav: Run, small: list[str], own_corpus: Path, model_folder: Path, tmp_path: Path
) -> None:
    _assert_one_sentence(run_sparsewav("data=librispeech_dir"), r"data\.root has no value; give it: data\.root=\.\.\.")
    no_tokenizer = shutil.copytree(model_folder, tmp_path / "no-tokenizer")
    (no_tokenizer / "vocab.json").unlink()
    _assert_one_sentence(run_sparsewav(*small, f"model.name_or_path={no_tokenizer}"), "has no tokenizer")
    audio = next((own_corpus / "test/100/7").glob("*.flac"))
    audio.write_bytes(audio.read_bytes()[:2000])
    result = run_sparsewav(*small, f"data.root={own_corpus}")
    _assert_one_sentence(result, rf"{audio.name} is (truncated|damaged)")
    (error,) = (tmp_path / "outputs").glob("tiny*/error.json")
    assert json.loads(error.read_text())["status"] == "failed"


def test_a_full_disk_loses_nothing_computed(
    run_sparsewav: Run, small: list[str], tmp_path: Path, environment: dict[str, str]
) -> None:
    """A limit on the size of a file stands for the full disk; once it is gone the run goes on from what is cached."""
    command = ["bash", "-c", 'ulimit -f 24; exec "$0" "$@"', str(Path(sys.executable).parent / "sparsewav"), *small]
    limited = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    _assert_one_sentence(limited, r"cannot write .*: .*; free some space, or choose another folder")
    assert not list((tmp_path / "outputs").rglob("model.safetensors"))
    assert list((tmp_path / "cache").rglob("hypotheses.json"))
    result = run_sparsewav(*small)
    assert result.returncode == 0, result.stdout + result.stderr
    assert not list((tmp_path / "outputs").rglob("error.json"))


@pytest.mark.parametrize(
    ("limit", "arguments", "message"),
    [
        (24, ["calibration.propagation=sequential"], "cannot write {tmp}: it could not be written in full"),
        (1, ["-m", "sparsity.target=0.5,0.6"], r"cannot write {here}/outputs/sweep-\w+: File too large"),
        (
            45,
            [
                *("finetune_strategy=one_pass", "training.batch_size=4", "training.epochs=2"),
                *("training.checkpoint_updates=1", "data.training_subset=train"),
            ],
            r"cannot write {here}/outputs/tiny[\w.-]+/stages/checkpoints-1-\w+: it could not be written in full",
        ),
    ],
    ids=["temporary", "output", "checkpoints"],
)
def test_a_full_disk_is_named_wherever_it_is(
    small: list[str], tmp_path: Path, environment: dict[str, str], limit: int, arguments: list[str], message: str
) -> None:
    """A limit on the size of a file, in KiB, stands for a full disk."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    command = ["bash", "-c", f'ulimit -f {limit}; exec "$0" "$@"', str(Path(sys.executable).parent / "sparsewav")]
    limited = subprocess.run(
        [*command, *arguments, *small, "allocation=uniform", f"output_root={tmp_path}/outputs"],
        cwd=tmp_path,
        env=environment | {"TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
        check=False,
    )
    _assert_one_sentence(limited, message.format(tmp=temporary, here=tmp_path))
    assert not list(temporary.iterdir())


def test_n_m_and_sequential_runs(run_sparsewav: Run, small: list[str], tmp_path: Path) -> None:
    result = run_sparsewav(*small, "sparsity=n_m", "allocation=uniform", "calibration.propagation=sequential")
    assert result.returncode == 0, result.stdout + result.stderr
    folder = _folder(tmp_path)
    model = AutoModelForCTC.from_pretrained(folder / "model")
    for name in pandas.read_csv(folder / "layers.csv")["name"]:
        groups = model.get_submodule(name).weight.reshape(-1, 4)
        assert ((groups == 0).sum(1) == 2).all()
    assert json.loads((folder / "metrics.json").read_text())["pattern"] == "2:4"


def test_a_run_of_the_more_accurate_choices_records_them(run_sparsewav: Run, small: list[str], tmp_path: Path) -> None:
    """Solver, objective and recovery reach the engine and the records; runs without them keep their folders."""
    settings = ["allocation=uniform", "calibration.propagation=true_sequential", "output_root=out"]
    plain = run_sparsewav(*small, *settings)
    assert plain.returncode == 0, plain.stdout + plain.stderr
    others = ["solver=alps", "objective=asymmetric", "recovery=reconstruction", "recovery.steps=15"]
    result = run_sparsewav(*small, *settings, *others)
    assert result.returncode == 0, result.stdout + result.stderr
    for words in ("Pruning to 0.75 with alps", "alps, uniform, asymmetric, reconstruction", "recover"):
        assert words in result.stdout
    assert "obs_first_order" not in result.stdout  # ALPS uses no saliency
    (folder,) = (tmp_path / "out").glob("tiny*-alps-uniform-0.75-asymmetric-reconstruction-*")
    (plain_folder,) = set((tmp_path / "out").glob("tiny*")) - {folder}
    metrics, before = (json.loads((path / "metrics.json").read_text()) for path in (folder, plain_folder))
    assert (metrics["solver"], metrics["objective"], metrics["recovery"]) == ("alps", "asymmetric", "reconstruction")
    assert (before["solver"], before["objective"], before["recovery"]) == ("obs", "symmetric", "none")
    assert (metrics["saliency"], before["saliency"]) == (None, "obs_first_order")
    assert "| saliency | none |" in (folder / "model" / "README.md").read_text()
    seconds = metrics["seconds"]
    assert seconds["recover"] > 0
    assert seconds["prune"] == pytest.approx(sum(seconds[key] for key in ("calibrate", "allocate", "solve", "recover")))
    errors = metrics["stages"][0]["layer_errors"]
    assert len(errors) == 2
    assert all(item["error"] < item["error_before"] for item in errors)
    layers = [pandas.read_csv(path / "layers.csv") for path in (folder, plain_folder)]
    assert list(layers[0]["sparsity"]) == list(layers[1]["sparsity"])


def test_progressive_stages_nest_their_masks_and_record_what_tuning_did(
    run_sparsewav: Run, small: list[str], tmp_path: Path
) -> None:
    training = ["training.epochs=4", "training.batch_size=4", "data.training_subset=train", "training.weight_decay=0.1"]
    result = run_sparsewav(*small, "finetune_strategy=progressive", "sparsity.target=0.8", *training)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"word error rate, tuned .* after 30 updates", result.stdout)
    folder = _folder(tmp_path)
    assert folder.name.startswith("tiny-wav2vec2-obs_first_order-hutchinson-0.8-progressive-")
    metrics = json.loads((folder / "metrics.json").read_text())
    stages = metrics["stages"]
    assert [stage["sparsity"] for stage in stages] == [0.7, 0.8]
    assert [stage["updates"] for stage in stages] == [15, 15]  # 4 epochs of 12 utterances, 2.5 times as many at 80 %
    assert metrics["updates"] == 30
    assert metrics["training_precision"] in ("float32", "bfloat16")  # what auto came to here
    assert {"wer_pruned", "wer"} <= set(stages[0])
    assert (metrics["wer_pruned"], metrics["wer"]) == (stages[1]["wer_pruned"], stages[1]["wer"])
    assert metrics["seconds"]["finetune"] > 0

    # What the first stage removed is removed in the second, and both meet the sparsities that they were given.
    first, last = (pandas.read_csv(folder / name) for name in ("layers-0.7.csv", "layers.csv"))
    weights = load_file(folder / "model" / "model.safetensors")
    for before, after in zip(first.itertuples(), last.itertuples(), strict=True):
        assert after.sparsity >= before.sparsity - 1e-9
        weight = weights[f"{after.name}.weight"]
        assert int((weight == 0).sum()) == round(after.sparsity * weight.numel())
    assert metrics["achieved_sparsity"] > 0.78
    log = pandas.read_csv(folder / "training_log.csv")
    assert sorted(set(log["stage"])) == [0.7, 0.8]
    assert log.groupby("stage")["update"].max().tolist() == [15, 15]
    assert not (folder / "stages").exists()
    assert "0.7 and 15 updates, then 0.8 and 15 updates" in (folder / "model" / "README.md").read_text()


def test_layers_from_disk_give_the_bytes_of_memory(run_sparsewav: Run, small: list[str], tmp_path: Path) -> None:
    """model.offload=true changes how much memory a run takes, and nothing that it writes."""
    options = ["calibration.propagation=sequential", "allocation=uniform", "saliency=obs"]
    folders = []
    for stream in ("false", "true"):
        result = run_sparsewav(*small, *options, f"model.offload={stream}", f"output_root=streamed-{stream}")
        assert result.returncode == 0, result.stdout + result.stderr
        (metrics,) = (tmp_path / f"streamed-{stream}").glob("*/metrics.json")
        folders.append(metrics.parent)
    whole, streamed = folders
    for name in ("model/model.safetensors", "model/config.json", "layers.csv", "predictions.jsonl"):
        assert (whole / name).read_bytes() == (streamed / name).read_bytes(), name
    assert not (streamed / "stages").exists()
