"""What Weights & Biases is told: from the start of a run, whatever its end."""

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb

from sparsewav.pipeline import tracking
from sparsewav.pipeline.tracking import RunDescription, _used_options
from tests.terminal import Run, run_folder_in

TUNING = ["finetune_strategy=one_pass", "training.batch_size=4", "training.epochs=2", "data.training_subset=train"]
OFFLINE = ["tracker=wandb", "tracker.mode=offline"]


def _read_wandb(folder: Path) -> dict[str, dict[str, str]]:
    """What an offline run's file holds: configuration, the last value of everything logged, and the run itself.

    The file is a LevelDB log (blocks of 32 KiB, records of checksum, length and type) of protocol buffers.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    data, position, pieces = path.read_bytes(), 7, b""
    found: dict[str, dict[str, str]] = {"config": {}, "logged": {}, "run": {}}
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        pieces += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind not in (1, 4):  # the first or a middle part of a record
            continue
        record = Record.FromString(pieces)
        pieces = b""
        found["config"] |= {item.key or "/".join(item.nested_key): item.value_json for item in record.config.update}
        for items in (record.history.item, record.summary.update):
            found["logged"] |= {item.key or "/".join(item.nested_key): item.value_json for item in items}
        if record.HasField("run"):
            run = record.run
            found["config"] |= {item.key: item.value_json for item in run.config.update}
            found["run"] |= {"group": run.run_group, "job_type": run.job_type, "name": run.display_name}
            found["run"] |= {"project": run.project, "tags": " ".join(run.tags), "id": run.run_id}
        if record.HasField("exit"):
            found["run"]["exit"] = str(record.exit.exit_code)
    return found


def test_results_reach_wandb(run_sparsewav: Run, small: list[str], tmp_path: Path) -> None:
    run_settings = ["data.evaluation_utterances=6", "experiment=smoke", "calibration.utterances=10"]
    result = run_sparsewav(*small, *TUNING, *OFFLINE, *run_settings)
    assert result.returncode == 0, result.stdout + result.stderr
    folder = run_folder_in(tmp_path)
    metrics = json.loads((folder / "metrics.json").read_text())
    found = _read_wandb(folder)
    run = found["run"]
    assert "wandb:" not in result.stdout + result.stderr
    assert result.stdout.count(f"W&B: offline; send it later: wandb sync {folder}/wandb/*") == 1
    assert (run["project"], run["group"], run["job_type"]) == ("sparsewav", "smoke", "one_pass")
    tags = set(run["tags"].split())
    assert {"saliency=obs_first_order", "allocation=hutchinson", "finetune_strategy=one_pass"} <= tags
    # The model that was pruned, where the group's option is still the default one.
    assert [tag for tag in tags if tag.startswith("model=")] == [f"model={metrics['model']}"]
    assert metrics["model"] != "demo"
    assert "finetune_strategy=one_pass" in run["name"]
    assert run["exit"] == "0"
    assert run["id"] == folder.name.rpartition("-")[2]
    assert json.loads(found["config"]["allocation"])["alpha"] == 0.1
    logged = found["logged"]
    assert json.loads(logged["eval/wer"]) == metrics["wer"]
    assert json.loads(logged["wer_dense"]) == metrics["wer_dense"]
    assert json.loads(logged["finetune/update"]) == metrics["updates"]
    assert {"finetune/loss", "stage/wer", "stage/wer_pruned"} <= set(logged)
    for table in ("layers", "transcripts", "stages"):
        assert any(key.startswith(table) and "table" in value for key, value in logged.items()), table


def test_wandb_tags_are_of_what_the_run_used() -> None:
    """A fairseq checkpoint has its own name, and a baseline no options of our method."""
    choices = {"model": "demo", "method": "parp", "saliency": "obs", "data": "demo", "experiment": "None"}
    description = RunDescription("name-0123", {}, choices, [], None)
    metrics = {"model": "wav2vec_small_100h", "method": "parp", "saliency": None}
    used = _used_options(description, metrics)
    assert used == {"model": "wav2vec_small_100h", "method": "parp", "data": "demo"}


def test_wandb_out_of_reach_loses_nothing(run_sparsewav: Run, small: list[str], tmp_path: Path) -> None:
    """No key and nobody to ask for one: the run says so, is kept offline, and its results are there."""
    nobody = {"WANDB_API_KEY": "", "NETRC": str(tmp_path / "no-netrc"), "HOME": str(tmp_path)}
    result = run_sparsewav(*small, "tracker=wandb", "tracker.mode=online", **nobody)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"W&B cannot be reached .*; the run is kept offline", result.stdout)
    assert (run_folder_in(tmp_path) / "metrics.json").is_file()
    assert list((tmp_path / "outputs").glob("*/wandb/offline-run-*/*.wandb"))


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A stand-in for W&B: the arguments of every ``wandb.init``, and what every run was told, in order."""
    told = SimpleNamespace(begun=[], events=[], broken=False)

    def log(values: dict[str, Any], **options: Any) -> None:
        if told.broken and told.begun[-1].get("mode") != "offline":
            raise ConnectionError("the service is gone")
        finished = bool(list(Path.cwd().glob("outputs/*/metrics.json")))
        told.events += [("log", key, value, finished) for key, value in values.items()]

    def init(**arguments: Any) -> Any:
        told.begun.append(arguments)
        told.events.append(("init", bool(list(Path.cwd().glob("outputs/*/metrics.json")))))
        return SimpleNamespace(
            url="https://wandb.test/run",
            offline=arguments.get("mode") == "offline",
            disabled=False,
            log=log,
            define_metric=lambda *names, **options: None,
            summary=SimpleNamespace(update=lambda values: told.events.append(("summary", values))),
            config=SimpleNamespace(update=lambda values, **options: None),
            finish=lambda exit_code=0: told.events.append(("finish", exit_code)),
        )

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(tracking, "INTERVAL", 0.01)
    return told


def test_a_run_is_tracked_from_its_start_and_its_loss_while_it_is_tuned(
    run_sparsewav: Run, small: list[str], tmp_path: Path, service: SimpleNamespace
) -> None:
    arguments = [*small, *TUNING, "allocation=uniform", "tracker=wandb"]
    result = run_sparsewav(*arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "W&B: https://wandb.test/run" in result.stdout
    assert service.events[0] == ("init", False)
    (began,) = service.begun
    assert began["config"]["allocation"]["name"] == "uniform"
    assert (began["resume"], began["job_type"]) == (None, "one_pass")
    losses = [event for event in service.events if event[:2] == ("log", "finetune/loss")]
    assert losses[0][3] is False, "before the run was finished"
    updates = [event[2] for event in service.events if event[:2] == ("log", "finetune/update")]
    assert updates == sorted(set(updates)), "each of them once"
    assert updates[-1] == json.loads((run_folder_in(tmp_path) / "metrics.json").read_text())["updates"]
    assert service.events[-1] == ("finish", 0)

    # Launched again it is done, and nothing is told twice; the first time with a tracker it is told.
    (run_folder_in(tmp_path) / "wandb").mkdir()  # as W&B leaves it
    assert "Tracked before: " in run_sparsewav(*arguments).stdout
    assert len(service.begun) == 1
    (run_folder_in(tmp_path) / "wandb").rmdir()
    assert run_sparsewav(*arguments).returncode == 0
    assert len(service.begun) == 2
    assert service.events[-1] == ("finish", 0)


def test_an_interrupted_run_says_so_and_goes_on_under_its_id(
    run_sparsewav: Run, small: list[str], monkeypatch: pytest.MonkeyPatch, service: SimpleNamespace
) -> None:
    arguments = [*small, "allocation=uniform", "tracker=wandb"]
    with monkeypatch.context() as patch:
        patch.setattr("sparsewav.pipeline.run.evaluate_step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        result = run_sparsewav(*arguments)
    assert result.returncode == 1
    assert "interrupted; the same command goes on where it stopped" in result.stderr
    assert service.events[-1] == ("finish", 130)
    assert run_sparsewav(*arguments).returncode == 0
    first, second = service.begun
    assert (first["resume"], second["resume"]) == (None, "allow")
    assert first["id"] == second["id"]
    assert service.events[-1] == ("finish", 0)


def test_a_failed_job_of_a_sweep_is_a_failed_run_and_the_others_are_not(
    run_sparsewav: Run, small: list[str], tmp_path: Path
) -> None:
    result = run_sparsewav("-m", *small, *OFFLINE, "sparsity.target=0.5,0.95")
    assert result.returncode == 1
    found = {path.name: _read_wandb(path) for path in tmp_path.glob("outputs/sweep-*/tiny*")}
    ends = {json.loads(item["config"]["sparsity"])["target"]: item["run"]["exit"] for item in found.values()}
    assert ends == {0.5: "0", 0.95: "1"}
    assert {item["run"]["group"] for item in found.values()} == {next(tmp_path.glob("outputs/sweep-*")).name}
    errors = [item["logged"]["error"] for item in found.values() if "error" in item["logged"]]
    assert len(errors) == 1
    assert "allocation.alpha=0.1 does not fit sparsity.target=0.95" in errors[0]


def test_wandb_that_fails_in_the_middle_loses_nothing(
    run_sparsewav: Run, small: list[str], tmp_path: Path, service: SimpleNamespace
) -> None:
    service.broken = True
    result = run_sparsewav(*small, *TUNING, "allocation=uniform", "tracker=wandb")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("W&B failed (the service is gone); the run goes on, and its results will be kept") == 1
    assert [begun.get("mode") for begun in service.begun] == [None, "offline"]
    assert service.begun[0]["id"] == service.begun[1]["id"]
    told = {event[1] for event in service.events if event[0] == "log"}
    assert {"finetune/loss", "eval/wer", "layers"} <= told
    assert service.events[-1] == ("finish", 0)


def test_without_a_tracker_the_environment_of_wandb_is_as_it_was(
    run_sparsewav: Run, small: list[str], monkeypatch: pytest.MonkeyPatch, service: SimpleNamespace
) -> None:
    own = {"WANDB_MODE": "online", "WANDB_PROJECT": "mine", "WANDB_DISABLED": "false"}
    seen: list[dict[str, str]] = []
    monkeypatch.setattr(
        "sparsewav.cli.app.show_result",
        lambda *_: seen.append({key: value for key, value in os.environ.items() if key.startswith("WANDB")}),
    )
    assert run_sparsewav(*small, *TUNING, "allocation=uniform", **own).returncode == 0
    assert seen == [own]
    assert service.begun == []
