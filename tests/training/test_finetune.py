"""Fine-tuning: masks that hold, an order that can be resumed, and the strategies."""

import json
import math
import re
import shutil
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas
import pytest
import soundfile
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Trainer

import sparsewav.cli.app  # noqa: F401  (registers the schemas)
from sparsewav import progress
from sparsewav.data.librispeech import read_librispeech_folder
from sparsewav.data.utterances import Utterance
from sparsewav.errors import UserError
from sparsewav.files import conf_folder
from sparsewav.models.load import SpeechModel, load_speech_model
from sparsewav.pruning.encoder import prunable_matrices
from sparsewav.settings.run import Config
from sparsewav.settings.training import Training
from sparsewav.training import precision as precisions
from sparsewav.training.finite_trainer import SKIPPED_IN_A_ROW, FiniteTrainer
from sparsewav.training.masks import masked_gradients, masks_of
from sparsewav.training.precision import choose_precision
from sparsewav.training.processes import train_masked_in_processes
from sparsewav.training.schedule import Stage, plan_stages, too_short
from sparsewav.training.trainer import (
    CHECKPOINTS,
    plan_updates,
    train_ctc,
    write_training_log,
)
from tests.terminal import Run


def _settings(**changes: object) -> Training:
    settings: dict[str, object] = {
        "epochs": 1,
        "batch_size": 4,
        "processes": 1,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-2,
        "betas": [0.9, 0.999],
        "epsilon": 1e-8,
        "warmup_steps": 0,
        "scheduler": "linear",
        "weight_decay": 0.1,
        "precision": "float32",
        "freeze_feature_encoder": True,
        "checkpoint_updates": 2,
        "seed": 0,
    }
    return Training(**(settings | changes))  # type: ignore[arg-type]


def _half_pruned(model_folder: Path) -> SpeechModel:
    """The tiny model with half of every prunable matrix zero."""
    speech = load_speech_model(str(model_folder))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for matrix in prunable_matrices(speech.model):
            matrix.weight[torch.rand(matrix.weight.shape, generator=generator) < 0.5] = 0
    return speech


def _zeros(state: dict[str, Tensor], masks: dict[str, Tensor]) -> None:
    for name, mask in masks.items():
        weight = state[f"{name}.weight"]
        assert not weight[~mask].any(), f"pruned weights of {name} came back"
        assert weight[mask].all(), f"weights of {name} were lost"


class _Killed(Exception):
    pass


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_masks_hold_through_decay_kill_and_resume(
    model_folder: Path, corpus: Path, tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precisions, "wrong_in_bfloat16", lambda model: None)  # right or wrong, masks hold
    training = read_librispeech_folder(corpus, "train")
    settings = _settings(precision=precision)

    def tune(folder: Path, stop_after: int | None = None) -> SpeechModel:
        def progress(done: int, total: int) -> None:
            if done == stop_after:
                raise _Killed

        speech = _half_pruned(model_folder)
        masks = masks_of(speech.model)
        train_ctc(speech.model, speech.processor, training, settings, 6, folder, masks=masks, progress=progress)
        return speech

    masks = masks_of(_half_pruned(model_folder).model)
    undisturbed = tune(tmp_path / "whole").model.state_dict()
    _zeros(undisturbed, masks)
    assert len(masks) == 12
    dense = load_speech_model(str(model_folder)).model.state_dict()
    for name, tensor in undisturbed.items():
        frozen = ".feature_extractor." in name
        assert torch.equal(tensor, dense[name]) == frozen, name

    # Killed between two checkpoints: the last one has the zeros, and no moment where a weight is masked.
    with pytest.raises(_Killed):
        tune(tmp_path / "killed", stop_after=5)
    checkpoint = tmp_path / "killed" / "checkpoint-4"
    _zeros(load_file(checkpoint / "model.safetensors"), masks)
    moments = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    by_shape = [state for state in moments.values() if state["exp_avg"].dim() == 2]
    zero_moments = sum(int((state["exp_avg_sq"] == 0).sum()) for state in by_shape)
    assert zero_moments >= sum(int((~mask).sum()) for mask in masks.values())
    resumed = tune(tmp_path / "killed").model.state_dict()
    for name, tensor in undisturbed.items():
        assert torch.equal(tensor, resumed[name]), name


def _with_a_short_recording(corpus: Path, folder: Path) -> tuple[list[Utterance], Utterance]:
    """The training set with one recording cut to a frame; also gives its utterance."""
    shutil.copytree(corpus, folder)
    training = read_librispeech_folder(folder, "train")
    samples, rate = soundfile.read(training[5].audio)
    soundfile.write(training[5].audio, samples[:1000], rate)
    return training, training[5]


def test_an_utterance_shorter_than_its_transcript_stops_the_training_by_name(
    model_folder: Path, corpus: Path, tmp_path: Path
) -> None:
    """CTC's loss is infinite for it, and its gradient NaN; transformers trains on, and logs neither."""
    training, short = _with_a_short_recording(corpus, tmp_path / "corpus")
    speech = _half_pruned(model_folder)
    assert not speech.model.config.ctc_zero_infinity
    with pytest.raises(UserError, match=r"stopped at update \d of 3: the loss is inf for utterance ") as stopped:
        train_ctc(speech.model, speech.processor, training, _settings(), 3, tmp_path / "run")
    assert f"utterance {short.id} ({short.audio}), as CTC's is" in str(stopped.value)
    assert str(stopped.value).count("inf for") == 1
    assert all(parameter.isfinite().all() for parameter in speech.model.parameters())
    speech.model.config.ctc_zero_infinity = True
    log = train_ctc(speech.model, speech.processor, training, _settings(), 3, tmp_path / "other")
    assert all(math.isfinite(entry["loss"]) and math.isfinite(entry["grad_norm"]) for entry in log)


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_gradient_that_is_not_finite_stops_before_the_weights_change(
    model_folder: Path, corpus: Path, tmp_path: Path, max_grad_norm: float
) -> None:
    """An infinite gradient, which clipping would make an update of zeros and NaN."""
    speech = _half_pruned(model_folder)
    training = read_librispeech_folder(corpus, "train")
    settings, masks = _settings(max_grad_norm=max_grad_norm), masks_of(speech.model)
    passes = []

    def spoil(gradient: Tensor) -> Tensor:
        passes.append(None)
        return gradient * torch.inf if len(passes) == 3 else gradient

    speech.model.lm_head.weight.register_hook(spoil)
    message = r"at update 3 of 6: the norm of the gradients is (nan|inf) for .* none of them alone; lower training\."
    with pytest.raises(UserError, match=message):
        train_ctc(speech.model, speech.processor, training, settings, 6, tmp_path, masks=masks)
    assert all(parameter.isfinite().all() for parameter in speech.model.parameters())
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert all(torch.equal(tensor, speech.model.state_dict()[name]) for name, tensor in saved.items())


def test_float16_may_skip_updates_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradients overflow until the scaler has found its scale; a loss that is not finite stops it at once."""
    model = torch.nn.Linear(1, 1)
    trainer: Any = object.__new__(FiniteTrainer)
    trainer.accelerator = SimpleNamespace(sync_gradients=True, scaler=object())
    stops: list[tuple[float, float]] = []
    trainer.stop = lambda *what: stops.append(what)

    def step(loss: float, gradient: float) -> None:
        model.weight.grad = torch.full((1, 1), gradient)
        monkeypatch.setattr(Trainer, "training_step", lambda *_: torch.tensor(loss))
        trainer.training_step(model)

    for _ in range(SKIPPED_IN_A_ROW):
        step(1.0, torch.inf)
    step(1.0, 1.0)
    for _ in range(SKIPPED_IN_A_ROW):
        step(1.0, torch.inf)
    assert not stops
    step(1.0, torch.inf)
    assert stops == [(1.0, torch.inf)]
    step(1.0, 1.0)
    step(torch.inf, 1.0)
    assert stops[1:] == [(torch.inf, 1.0)]


def test_a_training_killed_halfway_goes_on_from_its_last_checkpoint(
    model_folder: Path, corpus: Path, tmp_path: Path
) -> None:
    """The checkpoints come by themselves; the log on disk is that of an undisturbed training.

    It has entries every 6 updates and checkpoints every 7: the mean loss of an entry spans the kill.
    """
    training = read_librispeech_folder(corpus, "train")
    settings, updates = _settings(checkpoint_updates=None, batch_size=8), 66
    calls: list[int] = []

    def tune(name: str, stop_after: int | None = None) -> dict[str, Tensor]:
        def count(done: int, total: int) -> None:
            calls.append(done)
            if done == stop_after:
                raise _Killed

        speech = _half_pruned(model_folder)
        train_ctc(
            speech.model,
            speech.processor,
            training,
            settings,
            updates,
            tmp_path / name,
            progress=count,
            write_log=lambda log: write_training_log(tmp_path / f"{name}.csv", log),
        )
        return speech.model.state_dict()

    whole = tune("whole")
    with pytest.raises(_Killed):
        tune("killed", stop_after=33)
    (checkpoint,) = (tmp_path / "killed").glob("checkpoint-*")
    assert checkpoint.name == f"checkpoint-{4 * -(-updates // CHECKPOINTS)}"
    assert pandas.read_csv(tmp_path / "killed.csv")["update"].tolist() == [6, 12, 18, 24, 30]
    calls.clear()
    resumed = tune("killed")
    assert calls == list(range(29, 67))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    assert (tmp_path / "killed.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    log = pandas.read_csv(tmp_path / "whole.csv")
    assert log["epoch"].tolist() == [update * 8 / 12 for update in log["update"]]


@pytest.mark.parametrize("fault", ["flipped", "not finite", "cut off"])
def test_a_damaged_checkpoint_is_not_gone_on_from(
    model_folder: Path, corpus: Path, tmp_path: Path, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is named, and the training starts anew and ends as if it had not been killed."""
    training = read_librispeech_folder(corpus, "train")

    def tune(stop_after: int | None = None) -> dict[str, Tensor]:
        def count(done: int, total: int) -> None:
            if done == stop_after:
                raise _Killed

        speech = _half_pruned(model_folder)
        train_ctc(speech.model, speech.processor, training, _settings(), 3, tmp_path, progress=count)
        return speech.model.state_dict()

    with pytest.raises(_Killed):
        tune(stop_after=3)
    path = tmp_path / "checkpoint-2" / "model.safetensors"
    if fault == "flipped":
        data = bytearray(path.read_bytes())
        data[-2] ^= 4
        path.write_bytes(data)
    elif fault == "cut off":
        path.write_bytes(path.read_bytes()[:-4])
        (path.parent / "checksums.json").unlink()  # as if it had been killed right before they were written
    else:
        tensors = load_file(path)
        tensors["lm_head.bias"][3] = torch.nan
        save_file(tensors, path)
        (path.parent / "checksums.json").unlink()
    assert not capsys.readouterr().out
    result = tune()
    said = {"flipped": "is damaged in model.safetensors", "not finite": "in lm_head.bias that are not", "cut off": "is"}
    assert said[fault] in " ".join(capsys.readouterr().out.split())
    shutil.rmtree(tmp_path / "checkpoint-3")
    whole = tune()
    assert all(torch.equal(tensor, result[name]) for name, tensor in whole.items())


def test_an_overflow_under_the_mask_is_no_nan(model_folder: Path) -> None:
    speech = _half_pruned(model_folder)
    matrix = prunable_matrices(speech.model)[0]
    mask = masks_of(speech.model)[matrix.name]
    with masked_gradients(speech.model, {matrix.name: mask}):
        (matrix.weight * torch.where(mask, 1.0, torch.inf)).sum().backward()
    assert matrix.weight.grad is not None
    assert torch.equal(matrix.weight.grad, mask.float())
    matrix.weight.grad = None
    matrix.weight.sum().backward()  # outside of the block gradients are whole again
    assert matrix.weight.grad.all()


@pytest.fixture
def plain_model(model_folder: Path, tmp_path: Path) -> Path:
    """The tiny model without dropout and SpecAugment: its gradients do not depend on how a batch is split."""
    folder = shutil.copytree(model_folder, tmp_path / "plain")
    config = json.loads((folder / "config.json").read_text())
    config |= {key: 0.0 for key in config if key.endswith(("dropout", "layerdrop"))} | {"apply_spec_augment": False}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_accumulated_passes_make_the_same_update(plain_model: Path, corpus: Path, tmp_path: Path) -> None:
    training = read_librispeech_folder(corpus, "train")
    results = []
    for accumulation in (1, 2):
        speech = load_speech_model(str(plain_model))
        # So large an ε makes Adam's step proportional to the gradient: a wrong scale would show.
        settings = _settings(
            gradient_accumulation_steps=accumulation, epsilon=10.0, learning_rate=1.0, weight_decay=0.0
        )
        train_ctc(speech.model, speech.processor, training, settings, 1, tmp_path / str(accumulation))
        results.append(speech.model.state_dict())
    before = load_speech_model(str(plain_model)).model.state_dict()
    for name, tensor in results[0].items():
        step, other = tensor - before[name], results[1][name] - before[name]
        assert float((step - other).norm()) <= 1e-3 * float(step.norm()) + 1e-9, name


def test_the_order_has_every_utterance_once_an_epoch(corpus: Path) -> None:
    training = read_librispeech_folder(corpus, "train")
    plan = plan_updates(training, batch_size=4, updates=6, seed=0)
    assert len(plan) == 24
    assert sorted(utterance.id for utterance in plan) == sorted(2 * [utterance.id for utterance in training])
    assert plan == plan_updates(training, batch_size=4, updates=6, seed=0)
    assert plan != plan_updates(training, batch_size=4, updates=6, seed=1)


def test_tuning_without_a_terminal_says_how_far_it_is(
    run_sparsewav: Run, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the output and in the log file; the development set's WER and the losses are in the latter."""
    monkeypatch.setattr(progress, "INTERVAL", 0.1)
    arguments = [
        "finetune_strategy=one_pass",
        "training.epochs=20",
        "training.batch_size=4",
        "data.training_subset=train",
    ]
    result = run_sparsewav(*small, *arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    (folder,) = (tmp_path / "outputs").glob("tiny*")
    line = r"Tuning at 0\.75 for 120 updates: \d+ of 120, 0:\d\d, about 0:\d\d left"
    log = (folder / "sparsewav.log").read_text()
    assert re.search(f"^{line}$", result.stdout, re.MULTILINE), result.stdout
    assert re.search(line, log)
    assert re.search(r"update 48 of 120: loss \d", log)
    assert not re.search("\x1b", result.stdout)
    table = pandas.read_csv(folder / "training_log.csv")
    assert table["epoch"].iloc[-1] == 40  # 20, twice as many at 75 %


@pytest.mark.parametrize(
    ("changes", "stages", "utterances", "said"),
    [
        (
            {"epochs": 0.16},
            [Stage(0.75, 10)],
            500,
            r"epochs=0\.16 comes to 10 updates of 16 utter.* has 500, .* raise",
        ),
        ({"epochs": 0.16}, [Stage(0.7, 5), Stage(0.8, 5)], 500, "comes to 10 updates"),
        ({"epochs": 0.0256}, [Stage(0.5, 32)], 20_000, None),  # the demo's short preset
        ({"epochs": 40}, [Stage(0.5, 71_348)], 28_539, None),
        ({}, [Stage(0.5, 0)], 0, None),
        ({"warmup_steps": 1000}, [Stage(0.7, 900), Stage(0.8, 1001)], 28_539, r"warmup_steps=1000 .* the 900 updates"),
        ({"warmup_steps": 0.1}, [Stage(0.7, 900)], 28_539, None),
        ({"warmup_steps": 900}, [Stage(0.7, 901)], 28_539, None),
    ],
)
def test_a_training_that_is_too_short_to_be_meant_is_said_in_a_line(
    changes: dict[str, float], stages: list[Stage], utterances: int, said: str | None
) -> None:
    found = too_short(_settings(batch_size=16, **changes), stages, utterances)
    assert len(found) == (said is not None)
    assert said is None or re.search(said, found[0])


def _config(*overrides: str) -> Config:
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return OmegaConf.to_object(compose("config", list(overrides)))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("overrides", "stages"),
    [
        (["finetune_strategy=none"], [Stage(0.75, 0)]),
        # 40 epochs of 28,539 utterances in batches of 16 at 50 %, twice as many at 75 %
        (["finetune_strategy=one_pass", "sparsity.target=0.5"], [Stage(0.5, 71_348)]),
        (["finetune_strategy=one_pass", "sparsity.target=0.3"], [Stage(0.3, 71_348)]),
        (["finetune_strategy=one_pass"], [Stage(0.75, 142_695)]),
        (["finetune_strategy=progressive"], [Stage(0.7, 71_348), Stage(0.75, 71_347)]),
        (
            ["finetune_strategy=progressive", "sparsity.target=0.9", "finetune_strategy.more_when_sparser=false"],
            [Stage(0.7, 23_783), Stage(0.8, 23_783), Stage(0.9, 23_782)],
        ),
        (
            ["finetune_strategy=progressive", "sparsity.target=0.8", "finetune_strategy.same_updates=false"],
            [Stage(0.7, 118_913), Stage(0.8, 178_369)],
        ),
        (["finetune_strategy=progressive", "sparsity.target=0.6"], [Stage(0.6, 89_185)]),
    ],
)
def test_strategies_plan_their_stages(overrides: list[str], stages: list[Stage]) -> None:
    assert plan_stages(_config("training=paper", *overrides), 28_539) == stages


@pytest.mark.slow
def test_masks_hold_in_two_processes(model_folder: Path, corpus: Path, tmp_path: Path) -> None:
    training = read_librispeech_folder(corpus, "train")
    speech = _half_pruned(model_folder)
    masks = masks_of(speech.model)
    before = {name: tensor.clone() for name, tensor in speech.model.state_dict().items()}
    tuned, log = train_masked_in_processes(
        speech.model,
        speech.processor,
        training,
        _settings(processes=2),
        3,
        tmp_path,
        write_log=partial(write_training_log, tmp_path / "log.csv"),
    )
    after = tuned.state_dict()
    _zeros(after, masks)
    assert log[-1]["update"] == 3
    assert pandas.read_csv(tmp_path / "log.csv")["loss"].tolist() == pytest.approx([entry["loss"] for entry in log])
    assert all(not torch.equal(before[f"{name}.weight"], after[f"{name}.weight"]) for name in masks)


@pytest.mark.slow
def test_two_processes_stop_with_the_same_sentence_as_one(model_folder: Path, corpus: Path, tmp_path: Path) -> None:
    training, short = _with_a_short_recording(corpus, tmp_path / "corpus")
    speech = _half_pruned(model_folder)
    message = r"^the training stopped at update \d of 3: the loss is inf for utterance " + short.id
    with pytest.raises(UserError, match=message):
        train_masked_in_processes(speech.model, speech.processor, training, _settings(processes=2), 3, tmp_path / "run")


@pytest.mark.parametrize(("capability", "precision"), [("avx512_bf16", "bfloat16"), ("avx2", "float32")])
def test_automatic_precision_is_the_one_that_the_processor_multiplies(
    monkeypatch: pytest.MonkeyPatch, capability: str, precision: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {capability: True, "avx512_f": True})
    assert choose_precision("auto", torch.nn.Linear(32, 32)) == precision
    assert choose_precision("float32", torch.nn.Linear(32, 32)) == "float32"


@pytest.mark.parametrize("spoiled", ["output", "gradient"])
def test_a_processor_that_computes_wrongly_in_bfloat16_trains_in_float32(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, spoiled: str
) -> None:
    """Found on a processor with AMX: the positional convolution gave garbage, and the training learned from it."""
    model = torch.nn.ModuleDict({"dense": torch.nn.Linear(64, 64), "conv": torch.nn.Conv1d(64, 64, 3)})
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    assert choose_precision("auto", model) == "bfloat16"
    rightly = torch.nn.functional.conv1d

    def wrongly(*arguments: Any) -> Tensor:
        output = rightly(*arguments)
        if not torch.is_autocast_enabled("cpu"):
            return output
        if spoiled == "gradient":
            return output.detach() + output.flip(-1) - output.flip(-1).detach()
        return output.flip(-1)

    monkeypatch.setattr(torch.nn.functional, "conv1d", wrongly)
    assert choose_precision("auto", model) == "float32"
    assert "this machine computes conv wrongly in bfloat16; training in float32" in caplog.text
    teacher, student = model, torch.nn.Linear(64, 64)
    assert choose_precision("auto", student) == "bfloat16"
    assert choose_precision("auto", student, [teacher]) == "float32"
    assert choose_precision("float32", model) == "float32"
    with pytest.raises(UserError, match=r"wrongly in bfloat16; choose training\.precision=float32"):
        choose_precision("bfloat16", model)


@pytest.mark.slow
def test_torchrun_processes_share_every_batch(
    run_sparsewav: Run, start_sparsewav: Run, corpus: Path, plain_model: Path, tmp_path: Path
) -> None:
    arguments = [
        *("data=librispeech_dir", f"data.root={corpus}", "data.training_subset=train", "data.evaluation_subset=test"),
        *("data.development_subset=test", f"initial_model={plain_model}", "architecture=same", "device=cpu"),
        *("training.epochs=1", "training.batch_size=4", "training.precision=float32", "training.epsilon=1"),
        "training.learning_rate=1",
    ]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29517", "-m", "sparsewav.training"]
    both = start_sparsewav(*launcher, *arguments, "output=two", command=Path(sys.executable).name)
    assert both.returncode == 0, both.stdout + both.stderr
    one = run_sparsewav(*arguments, "output=one", command="sparsewav-train")
    assert one.returncode == 0, one.stdout + one.stderr
    start = load_file(plain_model / "model.safetensors")
    alone, shared = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, tensor in alone.items():
        step, other = tensor.float() - start[name], shared[name].float() - start[name]
        assert float((step - other).norm()) <= 0.02 * float(step.norm()) + 1e-3, name
