"""Runs that are done, stopped or killed, and what the same command makes of them."""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.terminal import Run, assert_one_sentence, run_folder_in


def test_a_run_is_done_again_when_what_it_was_made_from_has_other_content(
    run_sparsewav: Run, small: list[str], tmp_path: Path, model_folder: Path, own_corpus: Path
) -> None:
    """Same names, other weights or transcripts: never the old figures. What is gone leaves them, and a line."""
    own_model = shutil.copytree(model_folder, tmp_path / "own")
    arguments = [*small, f"model.name_or_path={own_model}", f"data.root={own_corpus}", "allocation=uniform"]
    assert run_sparsewav(*arguments).returncode == 0
    folder = run_folder_in(tmp_path)
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
    assert_one_sentence(run_sparsewav(*arguments), "weights of model.name_or_path=.* cannot be loaded")
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
    assert_one_sentence(result, r"mine was made with other settings \(sparsity\.target was 0\.75 and is 0\.5\)")
    assert before == {path: path.read_bytes() for path in before}
    # Nor without its model, which would be a reason to do the run again.
    shutil.rmtree(tmp_path / "mine" / "model")
    assert_one_sentence(run_sparsewav(*named, "sparsity.target=0.5"), "mine was made with other settings")


def test_a_run_replaces_no_model_that_is_not_its_own(
    run_sparsewav: Run, small: list[str], tmp_path: Path, model_folder: Path
) -> None:
    arguments = [*small, "allocation=uniform", "hydra.run.dir=mine"]
    shutil.copytree(model_folder, tmp_path / "mine" / "models" / "own")
    assert run_sparsewav(*arguments).returncode == 0
    assert (tmp_path / "mine" / "models" / "own" / "model.safetensors").is_file()

    itself = [*arguments, f"model.name_or_path={tmp_path / 'mine'}", "force=true"]
    assert_one_sentence(run_sparsewav(*itself), "mine holds the model that is to be pruned, .*mine/model;")
    shutil.copytree(model_folder, tmp_path / "other" / "model")
    for _ in range(2):  # the record of a failure makes it no folder of a run
        result = run_sparsewav(*arguments, "hydra.run.dir=other")
        assert_one_sentence(result, "other/model was not written by a run and would be replaced")
    weights = (tmp_path / "other" / "model" / "model.safetensors").read_bytes()
    assert weights == (model_folder / "model.safetensors").read_bytes()


def test_the_model_of_a_finished_run_is_kept_and_its_loss_or_damage_is_noticed(
    run_sparsewav: Run, small: list[str], tmp_path: Path
) -> None:
    arguments = [*small, "allocation=uniform"]
    assert run_sparsewav(*arguments).returncode == 0
    weights = run_folder_in(tmp_path) / "model" / "model.safetensors"
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
    (run_folder_in(tmp_path) / "layers.csv").unlink()
    assert "layers.csv is missing; doing this run again" in run_sparsewav(*arguments).stdout
    assert (run_folder_in(tmp_path) / "layers.csv").is_file()


def test_a_stopped_run_goes_on_and_ends_with_the_same_bytes(
    run_sparsewav: Run, small: list[str], tmp_path: Path
) -> None:
    """A folder in the place of the predictions stops a run between its pruning and its end."""
    assert run_sparsewav(*small, "output_root=reference", SPARSEWAV_CACHE=str(tmp_path / "other")).returncode == 0
    (reference,) = (tmp_path / "reference").glob("tiny*")
    folder = tmp_path / "outputs" / reference.name
    (folder / "predictions.jsonl").mkdir(parents=True)
    assert_one_sentence(run_sparsewav(*small), r"cannot write .*predictions\.jsonl")
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
    assert_one_sentence(run_sparsewav(*arguments), r"cannot write .*predictions\.jsonl")
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
    assert_one_sentence(run_sparsewav(*arguments), r"cannot write .*predictions\.jsonl")
    (tmp_path / "mine" / "predictions.jsonl").rmdir()
    other = run_sparsewav(*arguments, "sparsity.target=0.5")
    assert_one_sentence(other, r"mine was made with other settings \(sparsity\.target was 0\.75 and is 0\.5\)")
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
