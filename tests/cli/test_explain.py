"""Mistakes on the command line: one sentence that names the key, what is wrong and what to choose."""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]

MISTAKES = [
    (["sparsity=0.5"], "sparsity=0.5 does not exist; choose one of n_m, unstructured, or give .* sparsity.target=0.5"),
    (["-m", "sparsity=0.5,0.6"], "sparsity=0.5 does not exist; choose one of n_m, unstructured"),
    (["solver=null"], "solver=null does not exist; choose one of alps, obs, obs_refit"),
    (["saliency={}"], "saliency={} does not exist; choose one of magnitude, obs, obs_first_order, wanda"),
    (["recovery={steps:3}"], "recovery={'steps': 3} does not exist; choose one of affine, none, reconstruction"),
    (["saliency=[obs]"], "saliency=['obs'] does not exist (did you mean obs?); choose one of"),
    (["experiment=null"], "experiment=null does not exist; .*, or leave it out"),
    (
        ["solver.damping="],
        "solver.damping= has the wrong type: .* to Float; give another value, e.g. solver.damping=0.01",
    ),
    (
        ["solver.max_steps=3"],
        "solver has the key max_steps with solver=alps alone; choose that, or drop solver.max_steps",
    ),
    (["solver=alps", "solver.block_size=3"], "the key block_size with solver=obs or obs_refit alone"),
    (["solver=alps", "solver.max_step=3"], "no key solver.max_step (did you mean solver.max_steps?)"),
    (["method.reprune=3"], "no key method.reprune (did you mean method.reprunes?)"),
    (["nonsense.of.mine=1"], "there is no key nonsense.of.mine; conf/README.md lists them all"),
    (
        ["hydra/launcher=jobli"],
        "hydra/launcher=jobli does not exist (did you mean joblib?); choose one of basic, joblib",
    ),
    (["experiment=paper/bseline"], "experiment=paper/bseline does not exist (did you mean paper/baseline?)"),
    (["output_root=null"], "output_root=null has no meaning; give a value, e.g. output_root=outputs"),
    (["output_root="], "output_root= is empty; give a value"),
    (["export=bitmask"], "export=bitmask gives one value to a group .*: export.format, export.dtype"),
    (["~seed"], "~seed would leave a key without a value; give it another one, seed=..."),
    (["~solver"], "~solver would leave a key without a value"),
    (["recipe=demo-hubert"], "recipe is a key of sparsewav-train, and sparsewav has none"),
    (["tracker=wandb", "tracker.mode=foo"], "tracker.mode=foo does not exist; choose one of online, offline, disabled"),
    (["model.name_or_path="], "model.name_or_path= is empty; give a value"),
    (
        ["method=parp", "sparsity=n_m"],
        "method.sparsity follows sparsity.target, .* choose sparsity=unstructured, or give",
    ),
    (["sparsity.target=0.5,0.6"], "sparsity.target=0.5,0.6 has several values; add -m to run each of them$"),
    (
        ["finetune_strategy=progressive", "finetune_strategy.stages=0.5,0.6"],
        "or write a list: finetune_strategy.stages=[",
    ),
    (["target=0.5"], "there is no key target (did you mean sparsity.target or method.target?)"),
    (["--config-name=foo"], "--config-name=foo does not exist; leave it out"),
    (["saliency=obs", "-m", "sparsity.target=2"], "sparsity.target=2 is not between 0 and 1"),
    (["sparsity.target"], "sparsity.target has no value; write it as sparsity.target=..."),
    (["sparsity.target=[0.5"], "sparsity.target=[0.5 cannot be read"),
    (
        ["finetune_strategy=progressive", "finetune_strategy.stages=0.5"],
        "finetune_strategy.stages=0.5 has the wrong type: .*, e.g. finetune_strategy.stages=[0.7,0.8,0.9]",
    ),
]

TRAIN_MISTAKES = [
    (["experiment=best"], "experiment is a key of sparsewav, and sparsewav-train has none"),
    (["sparsity.target=0.5"], "sparsity.target is a key of sparsewav, and sparsewav-train has none"),
    (["architecture.hiden_size=3"], "no key architecture.hiden_size (did you mean architecture.hidden_size?)"),
    (["architecture=same", "architecture.hidden_size=3"], "the chosen architecture does not have the key hidden_size;"),
    (["recipe=demo-hubrt"], "recipe=demo-hubrt does not exist (did you mean demo-hubert?)"),
    (["output="], "output= is empty; give a value"),
]


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [("sparsewav", *mistake) for mistake in MISTAKES] + [("sparsewav-train", *mistake) for mistake in TRAIN_MISTAKES],
)
def test_riddles_have_an_answer(command: str, arguments: list[str], message: str, run_sparsewav: Run) -> None:
    result = run_sparsewav(*arguments, command=command)
    said = result.stdout + result.stderr
    assert result.returncode == 1
    assert "Traceback" not in said
    (line,) = (line for line in said.splitlines() if line.startswith("error: "))
    assert re.search(re.escape(message).replace(r"\.\*", ".*").replace(r"\$", "$"), line), line


@pytest.mark.parametrize(
    ("command", "seeds"),
    [
        ("sparsewav", ["seed draws", "training.seed draws", "data.seed makes"]),
        ("sparsewav-train", ["training.seed draws"]),
    ],
)
def test_the_help_says_what_each_seed_draws(command: str, seeds: list[str], run_sparsewav: Run) -> None:
    said = run_sparsewav("--help", command=command).stdout
    assert all(seed in said for seed in seeds)


def test_a_missing_value_hides_no_other_fault(run_sparsewav: Run) -> None:
    result = run_sparsewav("data=librispeech_dir", "sparsity.target=7", "calibration.utterances=0")
    assert result.returncode == 1
    for fault in (
        "sparsity.target=7 is not",
        "calibration.utterances=0 must",
        "data.root has no value; give it: data.root=",
    ):
        assert fault in result.stdout


@pytest.mark.parametrize("choices", [["allocation.alpha=0.6"], ["saliency=magnitude", "solver=alps"]])
def test_a_baseline_takes_choices_that_it_does_not_read(
    choices: list[str], run_sparsewav: Run, small: list[str], tmp_path: Path
) -> None:
    result = run_sparsewav(*small, "data.training_subset=train", "method=magnitude", *choices)
    assert result.returncode == 0, result.stdout + result.stderr
    (metrics,) = tmp_path.glob("outputs/*/metrics.json")
    assert json.loads(metrics.read_text())["wer"] > 0
