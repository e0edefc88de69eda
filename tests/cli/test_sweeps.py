"""Sweeps at the terminal: failed jobs, launchers, several machines and processes."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pandas
import pytest
import torch
from filelock import FileLock
from hydra import compose, initialize_config_dir
from hydra.utils import get_class
from safetensors.torch import load_file

import sparsewav.cli.app  # noqa: F401  (registers the schemas)
from sparsewav.files import conf_folder
from tests.terminal import Run


@pytest.mark.slow
def test_summary_is_a_console_command(start_sparsewav: Run) -> None:
    result = start_sparsewav("--help", command="sparsewav-summary")
    assert (result.returncode, result.stderr) == (0, "")
    assert "usage: sparsewav-summary [-h] [--version] FOLDER" in result.stdout


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


def test_a_key_that_every_option_of_a_swept_group_has(run_sparsewav: Run, small: list[str], tmp_path: Path) -> None:
    """The default option lacks it; the summary has bits and bytes of every run."""
    sweep = ["-m", *small, "allocation=uniform", "quantization=int3,int4"]
    result = run_sparsewav(*sweep, "quantization.group_size=null")
    assert result.returncode == 0, result.stdout + result.stderr
    runs = {path: json.loads(path.read_text()) for path in tmp_path.glob("outputs/*/*/metrics.json")}
    assert sorted(metrics["quantization"] for metrics in runs.values()) == ["int3", "int4"]
    assert all(run["inputs"]["settings"]["quantization"]["group_size"] is None for run in runs.values())
    for metrics in runs.values():
        figures = rf"{metrics['quantization']} +0\.7500 +{metrics['bits']:g} +{metrics['bytes'] / 1e6:.3f} "
        assert re.search(figures, result.stdout), result.stdout
    result = run_sparsewav(*sweep[:-1], "quantization=none,int4", "quantization.group_size=8")
    assert result.returncode == 1
    assert "error: quantization has the key group_size with quantization=int2 or" in result.stdout + result.stderr


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
