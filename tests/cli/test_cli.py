"""What a user does at the terminal: runs and mistakes."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jiwer
import numpy as np
import pandas
import pytest
import soundfile
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCTC

from tests.terminal import Run, assert_one_sentence, run_folder_in


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


def test_a_process_fails_with_one_sentence(start_sparsewav: Run) -> None:
    result = start_sparsewav("saliency=obz")
    assert_one_sentence(result, r"^error: saliency=obz does not exist")
    assert result.stdout == ""


def test_a_run_writes_what_it_promises(
    run_sparsewav: Run, small: list[str], tmp_path: Path, model_folder: Path
) -> None:
    result = run_sparsewav(*small, "sparsity.target=0.6")
    assert result.returncode == 0, result.stdout + result.stderr
    for words in ("word error rate, dense", "word error rate, pruned", "sparsity, asked", "sparsity, reached"):
        assert words in result.stdout
    folder = run_folder_in(tmp_path)
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
        (
            [
                *("solver=alps", "solver.output_weighting=fisher", "model.offload=true", "allocation=uniform"),
                "calibration.propagation=sequential",
            ],
            "takes gradients of the whole model; choose solver.output_weighting=equal with it",
        ),
        (["sparsity=n_m"], "choose allocation=uniform"),
        (["objective=asymmetric"], r"choose calibration\.propagation=true_sequential \(or sequential\) with it"),
        (["solver=alps", "saliency=wanda"], r"solver=alps updates the kept weights, and saliency=wanda does not"),
        (
            ["quantization=mixed"],
            r"choose sparsity=megabytes with it, or the same bits for all, e\.g\. quantization=int4",
        ),
        (["quantization=int4", "method=magnitude"], "quantization=int4 goes with method=sparsewav alone"),
        (["quantization=int5"], r"quantization=int5 does not exist \(did you mean int\d\?\)"),
        (["quantization=int4", "quantization.group_size=0"], r"quantization\.group_size=0 must be at least 1"),
        (["data.root=/nowhere"], r"data\.root=/nowhere is not a folder"),
        (["data.evaluation_subset=tset"], r"data\.evaluation_subset=tset is not in .*; it holds test, train"),
        (["device=cuda:99"], r"device=cuda:99 is not there"),
        (["calibration.utterances=500"], r"calibration\.utterances=500 asks for more than the 12"),
        (["output_root=/dev/null/outputs"], r"cannot write /dev/null/outputs"),
    ],
)
def test_mistakes_get_one_sentence(run_sparsewav: Run, small: list[str], arguments: list[str], message: str) -> None:
    assert_one_sentence(run_sparsewav(*small, *arguments), message)


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
    assert_one_sentence(
        run_sparsewav(*arguments),
        rf"{seen} of 6 evaluation utterances are in the {kind} set, .* allow it with data\.allow_overlap=true",
    )
    result = run_sparsewav(*arguments, "data.allow_overlap=true")
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{seen} of its utterances are in the calibration or training set, too" in result.stdout
    assert result.stdout.count("! audio without a transcript in test is left out: 1 files") == 1
    metrics = json.loads((run_folder_in(tmp_path) / "metrics.json").read_text())
    assert metrics["evaluation_overlap"] == seen
    assert [note for note in metrics["warnings"] if "data.allow_overlap=true" in note or "more.wav" in note]
    card = (run_folder_in(tmp_path) / "model/README.md").read_text()
    assert f"| evaluation utterances that the model was made from, too | {seen} |\n" in card
    summary = run_sparsewav("outputs", command="sparsewav-summary").stdout
    assert re.search(r"evaluated\b.*\bon seen", summary, re.DOTALL)


def test_missing_values_and_broken_files_get_one_sentence(
    run_sparsewav: Run, small: list[str], own_corpus: Path, model_folder: Path, tmp_path: Path
) -> None:
    assert_one_sentence(run_sparsewav("data=librispeech_dir"), r"data\.root has no value; give it: data\.root=\.\.\.")
    no_tokenizer = shutil.copytree(model_folder, tmp_path / "no-tokenizer")
    (no_tokenizer / "vocab.json").unlink()
    assert_one_sentence(run_sparsewav(*small, f"model.name_or_path={no_tokenizer}"), "has no tokenizer")
    audio = next((own_corpus / "test/100/7").glob("*.flac"))
    audio.write_bytes(audio.read_bytes()[:2000])
    result = run_sparsewav(*small, f"data.root={own_corpus}")
    assert_one_sentence(result, rf"{audio.name} is (truncated|damaged)")
    (error,) = (tmp_path / "outputs").glob("tiny*/error.json")
    assert json.loads(error.read_text())["status"] == "failed"


def test_a_full_disk_loses_nothing_computed(
    run_sparsewav: Run, small: list[str], tmp_path: Path, environment: dict[str, str]
) -> None:
    """A limit on the size of a file stands for the full disk; once it is gone the run goes on from what is cached."""
    command = ["bash", "-c", 'ulimit -f 24; exec "$0" "$@"', str(Path(sys.executable).parent / "sparsewav"), *small]
    limited = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert_one_sentence(limited, r"cannot write .*: .*; free some space, or choose another folder")
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
    assert_one_sentence(limited, message.format(tmp=temporary, here=tmp_path))
    assert not list(temporary.iterdir())


def test_n_m_and_sequential_runs(run_sparsewav: Run, small: list[str], tmp_path: Path) -> None:
    result = run_sparsewav(*small, "sparsity=n_m", "allocation=uniform", "calibration.propagation=sequential")
    assert result.returncode == 0, result.stdout + result.stderr
    folder = run_folder_in(tmp_path)
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
    folder = run_folder_in(tmp_path)
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


@pytest.mark.parametrize("quantization", ["none", "float16", "int3"])
def test_layers_from_disk_give_the_bytes_of_memory(
    quantization: str, run_sparsewav: Run, small: list[str], tmp_path: Path
) -> None:
    """model.offload=true changes how much memory a run takes, and nothing that it writes."""
    options = ["calibration.propagation=sequential", "allocation=uniform", "saliency=obs"]
    options.append(f"quantization={quantization}")
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
