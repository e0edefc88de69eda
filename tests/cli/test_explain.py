"""Mistakes on the command line: one sentence that names the key, what is wrong and what to choose."""

import json
import re
import tomllib
from pathlib import Path

import pytest
from hydra.core.config_store import ConfigStore

import sparsewav
from tests.terminal import Run

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


MISTAKES = [
    (["sparsity=megabytes"], "sparsity.megabytes has no value; give it: sparsity.megabytes=..."),
    (["sparsity.megabytes=0"], "sparsity.megabytes=0 must be above 0"),
    (["sparsity.megabytes=1", "allocation=hawq"], "allocation=hawq knows no bytes, .*; choose allocation=error_curves"),
    (["sparsity.megabytes=1", "allocation=uniform", "quantization=mixed"], "choose .*, or quantization=int4"),
    (["sparsity.megabytes=1", "finetune_strategy=one_pass"], "finetune_strategy=one_pass changes the weights whose"),
    (
        ["sparsity.megabytes=1", "method=distilhubert"],
        "sparsity=megabytes goes with method=spars",
    ),
    (["sparsity.megabytes=1", "export.dtype=float16"], "choose export.dtype=model, and quantization=float16"),
    (
        ["quantization=int4", "export.format=bitmask", "export.dtype=float16"],
        "that quantization=int4 rounds to; choose",
    ),
    (["sparsity.megabytes=1", "sparsity.target=0.5"], "sparsity has the key target with sparsity=unstructured alone"),
    (
        ["sparsity=0.5"],
        "sparsity=0.5 does not exist (did you mean sparsity.target=0.5?); choose one of megabytes, n_m, ",
    ),
    (["-m", "sparsity=0.5,0.6"], "sparsity=0.5 does not exist (did you mean sparsity.target=0.5?)"),
    (
        ["-m", "seed=0,1", "allocation=hutchinson,0.3"],
        "allocation=0.3 does not exist (did you mean allocation.alpha=0.3",
    ),
    (["-m", "calibration=small,128"], "(did you mean calibration.utterances=128?); choose one of paper, small"),
    (["-m", "sparsity=range(1,3)"], "sparsity=1 does not exist (did you mean sparsity.target=1?)"),
    (["-m", "solver=obs,ALPS"], "solver=ALPS does not exist (did you mean alps?)"),
    (["-m", "model=demo,/my/model"], "/my/model does not exist (did you mean model.name_or_path=/my/model?); choose"),
    (["model=facebook/hubert-large-ls960-ft"], "(did you mean model.name_or_path=facebook/hubert-large-ls960-ft?)"),
    (["data=/my/corpus"], "(did you mean data=librispeech_dir data.root=/my/corpus?); choose one of demo, "),
    (["data=/my/dev.tsv"], "data=/my/dev.tsv does not exist (did you mean data=manifest data.test=/my/dev.tsv?)"),
    (["data=mozilla/common_voice"], "(did you mean data=hf data.path=mozilla/common_voice?)"),
    (["-m", "seed="], "seed= is empty; give a value, e.g. seed=0"),
    (["-m", "sparsity.target=0.5,half"], "sparsity.target=half has the wrong type"),
    (["-m", "seed=0,1", "hydra/sweeper=optuna"], "hydra/sweeper=optuna is not offered; allocation=search takes its"),
    (
        ["-m", "seed=0,1", "hydra/launcher=ray"],
        "hydra/launcher=ray is not installed; install it: pip install 'sparsewav[ray]'",
    ),
    (["solver=null"], "solver=null does not exist; choose one of alps, obs, obs_refit"),
    (["saliency={}"], "saliency={} does not exist; choose one of magnitude, obs, obs_first_order, wanda"),
    (
        ["recovery={steps:3}"],
        "recovery={'steps': 3} does not exist; choose one of affine, elsa, global, none, reconstruction",
    ),
    (["saliency=[obs]"], "saliency=['obs'] does not exist (did you mean obs?); choose one of"),
    (["experiment=null"], "experiment=null does not exist; .*, or leave it out"),
    (
        ["solver.damping="],
        "solver.damping= is empty; give a value, e.g. solver.damping=0.01",
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
    (["-m", "sparsity.target=0.5,", "0.8"], "sparsity.target=0.5, ends with a comma; write several values without"),
    (["preset=best"], "there is no key preset (did you mean experiment?)"),
    (
        ["experiment=best", "recovery=none"],
        "experiment=best sets recovery.steps, which recovery=elsa or global or reconstruction alone has; choose that, "
        "or leave experiment=best out, and write what is wanted of it: solver=alps allocation=error_curves "
        "calibration.propagation=sequential solver.output_weighting=fisher$",
    ),
    (["experiment=best_oneshot", "solver=obs"], "out, and write what is wanted of it: allocation=uniform recovery=rec"),
    (
        ["experiment=paper/structured", "sparsity=n_m"],
        "sets sparsity.parameters, which sparsity=structured alone has; choose that, or leave experiment=.*out$",
    ),
    (["recovery=global", "recovery.betas=[null,0.9]"], "recovery.betas=[null,0.9] has the wrong type"),
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


def test_an_experiment_of_ones_own_is_explained_without_its_file(run_sparsewav: Run, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nrecovery: {steps: 3}\n")
    result = run_sparsewav("--config-dir", str(tmp_path), "experiment=mine")
    assert result.returncode == 1
    assert result.stderr.strip().splitlines() == [
        "error: experiment=mine sets recovery.steps, which recovery=elsa or global or reconstruction alone has; choose "
        "that, or leave experiment=mine out"
    ]
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nrecovery: {stepz: 3}\n")
    wrong = run_sparsewav("--config-dir", str(tmp_path), "experiment=mine")
    assert wrong.stderr.startswith(
        "error: experiment=mine: there is no key recovery.stepz (did you mean recovery.steps"
    )


@pytest.mark.parametrize(
    ("launcher", "plugin", "extra"),
    [("joblib", "joblib", "joblib"), ("submitit_local", "submitit", "slurm"), ("slurm_gpu", "submitit", "slurm")],
)
def test_a_launcher_whose_extra_is_missing_is_named_with_the_command_that_installs_it(
    launcher: str, plugin: str, extra: str, run_sparsewav: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ConfigStore.instance().repo["hydra"]["launcher"]
    for name in [name for name in store if plugin in name]:
        monkeypatch.delitem(store, name)
    result = run_sparsewav("-m", f"hydra/launcher={launcher}", "seed=0,1")
    assert (result.returncode, result.stdout) == (1, "")
    assert re.fullmatch(
        rf"error: hydra/launcher=[a-z_]+ is not installed; install it: pip install 'sparsewav\[{extra}\]'\n",
        result.stderr,
    )


@pytest.mark.parametrize("command", tomllib.loads(PYPROJECT.read_text())["project"]["scripts"])
def test_every_command_says_our_version(command: str, run_sparsewav: Run) -> None:
    assert run_sparsewav("--version", command=command).stdout == f"{command} {sparsewav.__version__}\n"


@pytest.mark.parametrize("shell", ["bash", "fish"])
def test_completion_offers_options_and_no_schemas(shell: str, run_sparsewav: Run) -> None:
    result = run_sparsewav("-sc", f"query={shell}", COMP_LINE="sparsewav sparsity=")
    assert result.stdout.split() == [
        "sparsity=megabytes",
        "sparsity=n_m",
        "sparsity=structured",
        "sparsity=unstructured",
    ]
    every = run_sparsewav("-sc", f"query={shell}", COMP_LINE="sparsewav ").stdout.split()
    assert {"sparsity=", "sparsity.", "seed="} <= set(every)


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
