"""``recovery=global``: the loss against brute force, masks that hold, and runs that stop, go on and need no labels."""

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pandas
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoModelForAudioClassification, PreTrainedModel

import sparsewav
from sparsewav.data.librispeech import read_librispeech_folder
from sparsewav.errors import UserError
from sparsewav.models.load import load_speech_model
from sparsewav.pruning.encoder import base_of, has_head, prunable_matrices
from sparsewav.pruning.families import family_of
from sparsewav.settings import Elsa, Global, Int4, Reconstruction
from sparsewav.training.finite_trainer import FiniteTrainer
from sparsewav.training.global_recovery import OutputLoss, recover_model, recover_on_utterances, summary
from sparsewav.training.masks import masks_of
from sparsewav.training.processes import train_masked_in_processes
from tests.conftest import CONFIGS
from tests.terminal import Run, assert_one_sentence, run_folder_in
from tests.training.recoveries import QUICK, assert_a_killed_one_ends_the_same, half_pruned

Batch = dict[str, Tensor]
Factory = Callable[..., PreTrainedModel]
MakeBatch = Callable[..., Batch]

RUN = ["allocation=uniform", "recovery=global", *(f"recovery.{key}={value}" for key, value in QUICK.items())]


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("norm", ["layer", "group"])
@pytest.mark.parametrize("family", CONFIGS)
def test_the_loss_of_a_padded_batch_is_that_of_its_utterances(
    family: str,
    norm: str,
    frozen: bool,
    tiny_model: Factory,
    noise_batch: MakeBatch,
    model_input: Callable[[PreTrainedModel, Batch], Batch],
    utterances: Callable[[list[Batch]], list[Batch]],
) -> None:
    """KL and squared errors of every utterance alone, summed by plain loops over frames.

    A front end that is frozen is computed once for both models; one that learns may have changed.
    """
    dense = tiny_model(family, norm)
    pruned = half_pruned(dense)
    batch = noise_batch([1024, 768, 640])
    fronts = [base_of(model).get_submodule(family_of(model).front) for model in (dense, pruned)]
    fronts[1].requires_grad_(not frozen)
    learned = OutputLoss(pruned, dense, 0.7)
    if not frozen:
        with torch.no_grad():
            for parameter in fronts[1].parameters():
                parameter.mul_(1.1)
    made: list[Any] = []
    for front in fronts:
        front.register_forward_hook(lambda module, arguments, output: made.append(output))
    loss = float(learned(**model_input(dense, batch))["loss"].detach())
    assert made
    own, other = made[0::2], made[1::2]
    assert all((first is second) == frozen for first, second in zip(own, other, strict=True))
    divergences, errors, squares = [], 0.0, 0.0
    for item in utterances([batch]):
        own = {key: value for key, value in model_input(dense, item).items() if key != "labels"}
        states, posteriors = [], []
        for model in (dense, pruned):
            with torch.no_grad():
                states.append(base_of(model)(**own).last_hidden_state[0].double())
                posteriors.append(model(**own).logits[0].double().softmax(-1))
        for wanted, found in zip(*posteriors, strict=True):
            divergences.append(float((wanted * (wanted / found).log()).sum()))
        errors += float((states[0] - states[1]).square().sum())
        squares += float(states[0].square().sum())
    expected = sum(divergences) / len(divergences) + 0.7 * errors / squares
    assert loss == pytest.approx(expected, rel=2e-4)
    assert expected > 0.01


@pytest.mark.parametrize("head", [True, False])
def test_recovery_brings_the_outputs_nearer_and_keeps_every_zero(
    head: bool, tiny_model: Factory, noise_batch: MakeBatch, tmp_path: Path
) -> None:
    """Without labels; an encoder without a head learns its hidden states; what is in front stays as it is."""
    model: Any = tiny_model("wav2vec2")
    if not head:
        model.save_pretrained(tmp_path)
        model = AutoModel.from_pretrained(tmp_path).eval()
    assert has_head(model) == head
    dense, plain = copy.deepcopy(model), copy.deepcopy(model)
    batches = [noise_batch([1600] * 6, seed=seed) for seed in range(4)]
    unlabelled = [{key: batch[key] for key in ("input_values", "attention_mask")} for batch in batches]
    for item in (plain, model):
        sparsewav.prune(item, unlabelled, 0.6, allocation="uniform")
    found = sparsewav.recover(model, dense, unlabelled, Global(**QUICK))
    assert found.loss < 0.8 * found.loss_before
    assert found.best_update > 0
    assert not found.warnings
    for matrix, own in zip(prunable_matrices(plain), prunable_matrices(model), strict=True):
        assert torch.equal(own.weight == 0, matrix.weight == 0)
        assert not torch.equal(own.weight, matrix.weight)
    front = {name for name, _ in model.named_parameters() if "feature_extractor" in name}
    assert front
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad
        assert parameter.grad is None
        if name in front:
            assert torch.equal(parameter, dense.get_parameter(name))
    # It is nearer on speech that it has not seen.
    with torch.no_grad():
        new = noise_batch([1600] * 4, seed=9)["input_values"]
        wanted, *states = (base_of(item)(new).last_hidden_state for item in (dense, plain, model))
    before, after = (float((item - wanted).square().sum()) for item in states)
    assert after < before


@pytest.mark.parametrize("quantization", ["none", "float16", "int4"])
def test_pruning_recovers_and_then_rounds(quantization: str, tiny_model: Factory, noise_batch: MakeBatch) -> None:
    """In one call as in three."""
    model = tiny_model("wav2vec2")
    dense, steps = copy.deepcopy(model), copy.deepcopy(model)
    batches = [noise_batch([1600] * 6, seed=seed) for seed in range(4)]
    rounding: Any = {"allocation": "uniform", "quantization": quantization}
    if quantization == "int4":
        rounding["quantization"] = Int4(group_size=8)
    report = sparsewav.prune(model, batches, 0.6, recovery=Global(**QUICK), **rounding)
    sparsewav.prune(steps, batches, 0.6, allocation="uniform")
    found = sparsewav.recover(steps, dense, batches, Global(**QUICK))
    if quantization != "none":
        sparsewav.prune(steps, batches, 0.0, **rounding)
    assert all(torch.equal(tensor, steps.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert report.recovery == found
    assert report.bits == (4 if quantization == "int4" else None)
    assert ("quantize" in report.seconds) == (quantization != "none")


def test_pruning_tells_of_the_mask_that_has_moved(tiny_model: Factory, noise_batch: MakeBatch) -> None:
    model = tiny_model("wav2vec2")
    pruned = copy.deepcopy(model)
    batches = [noise_batch([1600] * 6, seed=seed) for seed in range(4)]
    before = sparsewav.prune(pruned, batches, 0.6, allocation="uniform")
    report = sparsewav.prune(model, batches, 0.6, allocation="uniform", recovery=Elsa(**QUICK, interval=1))
    assert report.recovery
    assert report.recovery.best_update > 0
    assert report.sparsity == before.sparsity
    matrices = {matrix.name: matrix.weight != 0 for matrix in prunable_matrices(model)}
    assert any(not torch.equal(mask, before.masks[name]) for name, mask in report.masks.items()), "it has moved"
    for matrix in report.matrices:
        assert torch.equal(report.masks[matrix.name], matrices[matrix.name])
        assert matrix.sparsity == pytest.approx(float((~matrices[matrix.name]).float().mean()))


def test_where_no_moment_is_better_the_model_stays_as_it_was_pruned(
    tiny_model: Factory, noise_batch: MakeBatch
) -> None:
    dense, pruned = tiny_model("wav2vec2"), half_pruned(tiny_model("wav2vec2"))
    batches = [noise_batch([800] * 4, seed=seed) for seed in range(2)]
    settings = Global(**QUICK | {"learning_rate": 20.0, "patience": 2})
    before = {name: tensor.clone() for name, tensor in pruned.state_dict().items()}
    found = sparsewav.recover(pruned, dense, batches, settings)
    assert (found.best_update, found.loss) == (0, found.loss_before)
    assert found.updates < settings.updates, "it stopped early"
    assert ["stays as it was pruned" in warning for warning in found.warnings] == [True]
    assert all(torch.equal(tensor, before[name]) for name, tensor in pruned.state_dict().items())


def test_the_model_that_is_kept_has_the_loss_that_is_told(tiny_model: Factory, noise_batch: MakeBatch) -> None:
    """Losses are measured where there are checkpoints, wherever the log has entries."""
    dense, pruned = tiny_model("wav2vec2"), half_pruned(tiny_model("wav2vec2"))
    inputs = [noise_batch([800], seed=seed)["input_values"][0] for seed in range(8)]
    rising = {"learning_rate": 1.0, "scheduler": "constant_with_warmup", "warmup_steps": 20}  # too high in the end
    settings = Global(**QUICK | rising | {"checkpoint_updates": 3, "patience": 4})

    def read(rows: Any) -> Batch:
        return {"input_values": torch.stack(list(rows))}

    with TemporaryDirectory() as folder:
        log = recover_model(
            *(pruned, dense, inputs, read, len, settings, settings.updates, Path(folder)),
            masks={},
            front_end=False,
            seed=0,
        )
    measured = [entry["update"] for entry in log if "eval_loss" in entry]
    assert measured == list(range(0, measured[-1] + 1, 3))
    found = summary(log)
    assert 0 < found.best_update < found.updates == found.best_update + 9, "three checkpoints: 8 updates and more"
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0)).tolist()
    loss = OutputLoss(pruned, dense, settings.hidden_states)(**read([inputs[index] for index in order[:2]]))["loss"]
    assert float(loss.detach()) == pytest.approx(found.loss, rel=1e-5)


def test_a_recovery_killed_halfway_ends_with_the_same_model_and_log(
    model_folder: Path, corpus: Path, tmp_path: Path
) -> None:
    """So does the best moment, which lies before the kill."""
    rising = {"learning_rate": 1.0, "scheduler": "constant_with_warmup", "warmup_steps": 20}  # too high in the end
    settings = Global(**QUICK | rising | {"patience": 4})
    log = assert_a_killed_one_ends_the_same(settings, 9, model_folder, corpus, tmp_path)
    assert (summary(log).best_update, summary(log).updates) == (4, 12)


def test_a_run_recovers_on_audio_without_transcripts_then_rounds_and_says_so(
    run_sparsewav: Run, small: list[str], corpus: Path, model_folder: Path, tmp_path: Path
) -> None:
    """The manifest of the calibration set has no column of transcripts; the test set's has one."""
    rows = [(item.source, item.text) for item in read_librispeech_folder(corpus, "test")]
    (tmp_path / "unlabelled.csv").write_text(
        "audio\n" + "\n".join(str(item.source) for item in read_librispeech_folder(corpus, "train"))
    )
    (tmp_path / "test.csv").write_text("audio,text\n" + "\n".join(f"{audio},{text}" for audio, text in rows))
    data = ["data=manifest", "data.test=test.csv", "data.calibration=unlabelled.csv", "calibration.utterances=8"]
    model = [f"model.name_or_path={model_folder}", "device=cpu"]
    result = run_sparsewav(*model, *data, *RUN, "quantization=int4", "quantization.group_size=null")
    assert result.returncode == 0, result.stdout + result.stderr
    folder = run_folder_in(tmp_path)
    metrics = json.loads((folder / "metrics.json").read_text())
    found = metrics["stages"][0]["recovery"]
    assert found["loss"] < found["loss_before"]
    assert metrics["seconds"]["recover"] > 0
    assert metrics["bits"] == 4
    log = pandas.read_csv(folder / "recovery_log.csv")
    assert log["eval_loss"].dropna().tolist()[0] == pytest.approx(found["loss_before"])
    assert metrics["achieved_sparsity"] == pytest.approx(0.75, abs=1e-3)
    tensors = load_file(folder / "model" / "model.safetensors")
    layers = pandas.read_csv(folder / "layers.csv").set_index("name")
    assert all(len(tensors[f"{name}.weight"][0].unique()) <= 16 for name in layers.index)
    (tmp_path / "one.csv").write_text("".join((tmp_path / "unlabelled.csv").read_text().splitlines(keepends=True)[:2]))
    alone = run_sparsewav(*model, *data, *RUN, "data.calibration=one.csv", "calibration.utterances=1")
    assert_one_sentence(alone, "recovery=global has 1 utterances, of which one is held back; give two or more")
    assert "Evaluating" not in alone.stdout  # nothing was computed in vain
    with_labels = run_sparsewav(*model, *data, "allocation=hutchinson", "allocation.alpha=0.05")
    assert_one_sentence(with_labels, "unlabelled.csv")
    # Nor are transcripts read that the model could not write.
    (tmp_path / "foreign.csv").write_text(
        "audio,text\n" + "\n".join(f"{item.source},жук" for item in read_librispeech_folder(corpus, "train"))
    )
    foreign = run_sparsewav(*model, *data, "data.calibration=foreign.csv", *RUN, "recovery.updates=2")
    assert foreign.returncode == 0, foreign.stdout + foreign.stderr


@pytest.mark.parametrize(
    "options",
    [
        ["sparsity=structured", "sparsity.parameters=0.7", "sparsity.parts=[heads,units,channels]"],
        ["finetune_strategy=one_pass", "training.batch_size=4", "training.epochs=1", "data.training_subset=train"],
        ["scope=encoder"],
    ],
    ids=["structured", "tuned", "front end"],
)
def test_a_stopped_run_goes_on_behind_its_recovery(
    options: list[str], run_sparsewav: Run, small: list[str], tmp_path: Path
) -> None:
    arguments = [*small, *RUN, *options]
    result = run_sparsewav(*arguments, "output_root=reference")
    assert result.returncode == 0, result.stdout + result.stderr
    (reference,) = (tmp_path / "reference").glob("tiny*")
    folder = tmp_path / "outputs" / reference.name
    (folder / "predictions.jsonl").mkdir(parents=True)
    assert_one_sentence(run_sparsewav(*arguments), r"cannot write .*predictions\.jsonl")
    (folder / "predictions.jsonl").rmdir()
    again = run_sparsewav(*arguments)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "Recovering" in result.stdout
    assert "Recovering" not in again.stdout
    for name in ("model/model.safetensors", "predictions.jsonl", "recovery_log.csv"):
        assert (folder / name).read_bytes() == (reference / name).read_bytes(), name
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["stages"][0]["recovery"]["updates"] > 0
    if "scope=encoder" in options:  # what was pruned in front learns, too
        before = json.loads((reference / "metrics.json").read_text())
        assert before["stages"][0]["recovery"] == metrics["stages"][0]["recovery"]


@pytest.mark.slow
def test_two_processes_share_every_update(model_folder: Path, corpus: Path, tmp_path: Path) -> None:
    utterances = read_librispeech_folder(corpus, "train")
    speech = load_speech_model(str(model_folder))
    pruned = half_pruned(speech.model)
    found = []
    for processes in (1, 2):
        settings = Global(**QUICK | {"processes": processes})
        model, log = train_masked_in_processes(
            copy.deepcopy(pruned),
            speech.processor,
            utterances,
            settings,
            settings.updates,
            tmp_path / str(processes),
            learn=partial(recover_on_utterances, model_folder, False, 0),
        )
        for matrix, own in zip(prunable_matrices(pruned), prunable_matrices(model), strict=True):
            assert not own.weight[matrix.weight == 0].any()
        found.append(summary(log))
    assert found[0].loss < found[0].loss_before
    assert found[1].loss < found[1].loss_before
    assert found[0].loss_before == pytest.approx(found[1].loss_before, rel=0.05)  # batches of other sizes are averaged


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["sparsity=megabytes", "sparsity.megabytes=1"], "recovery=global changes the weights whose bytes"),
        (["model.offload=true", "calibration.propagation=sequential"], "cannot recover the whole model"),
        (["recovery.steps=5"], r"recovery=global needs what the pruned layers give"),
        (["recovery.held_back=1"], r"recovery\.held_back=1 must be below 1"),
        (["recovery.utterances=1"], r"recovery\.utterances=1 must be at least 2"),
        (["recovery.batch_size=3", "recovery.processes=2"], r"recovery\.batch_size=3 cannot be split into 2"),
    ],
)
def test_what_does_not_go_with_it(options: list[str], message: str, run_sparsewav: Run, small: list[str]) -> None:
    assert_one_sentence(run_sparsewav(*small, *RUN, *options), message)


def test_mistakes_from_python_leave_the_model_as_it_was(tiny_model: Factory, noise_batch: MakeBatch) -> None:
    dense, pruned = tiny_model("wav2vec2"), half_pruned(tiny_model("wav2vec2"))
    batches = [noise_batch([800] * 4), noise_batch([800] * 4, seed=1)]
    broken = [batches[0], noise_batch([800] * 4) | {"input_values": torch.full((4, 800), torch.nan)}]
    before = {name: tensor.clone() for name, tensor in pruned.state_dict().items()}
    short = [batches[0], noise_batch([800, 2, 800])]
    quick = Global(**QUICK)
    for arguments, message in [
        (([noise_batch([800])], quick), "has 1 utterances, of which one is held back; give two or more"),
        ((broken, quick), "^row 0 of calibration batch 1 holds samples that are NaN or infinite"),
        ((short, quick), "^row 1 of calibration batch 1 is too short"),
        (([{"input_features": torch.zeros(2, 9, 4)}], quick), "has input_features, and a Wav2Vec2ForCTC takes"),
        ((batches, Global(held_back=2.0)), r"^recovery\.held_back=2 must be below 1$"),
        ((batches, Global(betas=None)), r"^recovery\.betas=null has no meaning"),  # type: ignore[arg-type]
        ((batches, Global(processes=None)), r"^recovery\.processes=null has no meaning"),  # type: ignore[arg-type]
        ((batches, Global(**QUICK | {"processes": 2})), r"^recovery\.processes=2 is of the command sparsewav"),
        ((batches, "gradual"), "^recovery=gradual does not exist; choose one of"),
        ((batches, Reconstruction()), "^recovery=reconstruction goes with prune alone; choose recovery=global"),
        ((batches, Global), r"^recovery=Global is the class; give an object of it"),
    ]:
        with pytest.raises(UserError, match=message):
            sparsewav.recover(pruned, dense, *arguments)
        assert all(torch.equal(tensor, before[name]) for name, tensor in pruned.state_dict().items())
    for other, message in [
        (pruned, "are the same object; copy the dense model before you prune it"),
        ("demo", "^dense: the model is a str; give a CTC model of transformers"),
        (torch.nn.DataParallel(dense), r"^dense: the model is wrapped in DataParallel"),
        (copy.deepcopy(dense).to("meta"), "^dense: parameters of the model are on the meta device"),
        (copy.deepcopy(dense).half(), "differ in the precision .torch.float32 and torch.float16."),
        (tiny_model("wavlm"), "^model is a Wav2Vec2ForCTC and dense a WavLMForCTC; give the dense model"),
        (tiny_model("hubert"), "^model is a Wav2Vec2ForCTC and dense a HubertForCTC; give the dense model"),
        (
            AutoModelForAudioClassification.from_config(dense.config),
            "^dense: Wav2Vec2ForSequenceClassification has no CTC",
        ),
    ]:
        with pytest.raises(UserError, match=message):
            sparsewav.recover(pruned, other, batches, quick)
    for wrong in ({"seed": -1}, {"scope": "front"}):
        with pytest.raises(UserError, match=f"^{next(iter(wrong))}="):
            sparsewav.recover(pruned, dense, batches, quick, **wrong)  # type: ignore[arg-type]
    encoder = AutoModel.from_config(dense.config)
    with pytest.raises(UserError, match=r"has no head, whose posteriors alone count with recovery\.hidden_states=0"):
        sparsewav.prune(encoder, batches, 0.5, preset="best", recovery=Global(**QUICK, hidden_states=0.0))
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    settings = Global(**QUICK | {"learning_rate": 1e30, "warmup_steps": 0})
    with pytest.raises(UserError, match=r"lower recovery\.learning_rate"):
        sparsewav.prune(dense, batches, 0.5, allocation="uniform", recovery=settings)
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())


@pytest.mark.parametrize("recovery", [Global(**QUICK), Elsa(**QUICK, interval=2)], ids=["global", "elsa"])
def test_what_was_pruned_in_front_stays_pruned_whatever_learns(
    recovery: Global, tiny_model: Factory, noise_batch: MakeBatch
) -> None:
    """The projection in front of the layers learns with every scope."""
    dense = tiny_model("data2vec-audio")
    model = copy.deepcopy(dense)
    batches = [noise_batch([1600] * 6, seed=seed) for seed in range(3)]
    sparsewav.prune(model, batches, 0.6, allocation="uniform", scope="encoder")
    before = masks_of(model, "encoder")
    projection = model.get_parameter("data2vec_audio.feature_projection.projection.weight").detach().clone()
    sparsewav.recover(model, dense, batches, recovery)
    after = masks_of(model, "encoder")
    assert not torch.equal(model.get_parameter("data2vec_audio.feature_projection.projection.weight"), projection)
    front = before.keys() - masks_of(model).keys()
    assert front
    for name in front if isinstance(recovery, Elsa) else before:
        assert torch.equal(before[name], after[name])
    assert sum(int(mask.sum()) for mask in before.values()) == sum(int(mask.sum()) for mask in after.values())


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("recovery", [Global(**QUICK), Elsa(**QUICK, interval=2)], ids=["global", "elsa"])
def test_a_model_in_half_precision_learns_as_one_in_single(
    recovery: Global, precision: torch.dtype, tiny_model: Factory, noise_batch: MakeBatch
) -> None:
    """Its small steps are not lost, and both models are in the same precision as before; nobody else's dice move."""
    half = tiny_model("wav2vec2").to(precision)
    batches = [noise_batch([1600] * 6, seed=seed) for seed in range(3)]
    found = []
    for dense in (half, copy.deepcopy(half).float()):
        model = half_pruned(dense)
        torch.manual_seed(3)
        wanted = torch.rand(2)
        torch.manual_seed(3)
        learned = sparsewav.recover(model, dense, batches, recovery)
        assert torch.equal(torch.rand(2), wanted)
        assert model.dtype == dense.dtype
        found.append((learned, model.to(precision).state_dict()))
    assert half.dtype == precision
    assert found[0][0] == found[1][0]
    assert all(torch.equal(tensor, found[1][1][name]) for name, tensor in found[0][1].items())


def test_a_tensor_that_two_modules_share_is_kept_once(
    tiny_model: Factory, noise_batch: MakeBatch, model_input: Any
) -> None:
    """Granite's head is its output layer as well."""
    dense = tiny_model("granite_speech5_ctc")
    model = half_pruned(dense)
    batches = [model_input(dense, noise_batch([1600, 1200] * 3, seed=seed)) for seed in range(3)]
    found = sparsewav.recover(model, dense, batches, Global(**QUICK))
    assert found.best_update > 0
    assert model.get_parameter("ctc_head.weight") is model.get_parameter("encoder.out.weight")
    with torch.no_grad():
        losses = [float(OutputLoss(item, dense, 1.0)(**batches[0])["loss"]) for item in (half_pruned(dense), model)]
    assert losses[1] < losses[0]


def test_a_checkpoint_that_lacks_a_weight_is_refused() -> None:
    """One that lacks the second name of a tensor is whole."""
    trainer: Any = object.__new__(FiniteTrainer)
    layer = torch.nn.Linear(2, 2)
    trainer.model = torch.nn.ModuleDict({"first": layer, "second": layer})
    trainer.args = SimpleNamespace(output_dir="here")

    def load(lacking: list[str], unknown: list[str]) -> None:
        trainer._issue_warnings_after_load(SimpleNamespace(missing_keys=lacking, unexpected_keys=unknown))

    load(["second.weight"], [])
    with pytest.raises(UserError, match=r"lacks first\.weight; delete here, and launch the run again"):
        load(["first.weight", "second.weight"], [])
    with pytest.raises(UserError, match=r"has third\.weight, which the model has not; delete here"):
        load([], ["third.weight"])


def test_the_layers_of_a_preset_learn_before_the_whole_model(tiny_model: Factory, noise_batch: MakeBatch) -> None:
    dense = tiny_model("wav2vec2")
    model, layers_alone = copy.deepcopy(dense), copy.deepcopy(dense)
    batches = [noise_batch([1600] * 6, seed=seed) for seed in range(3)]
    settings = Global(**QUICK, steps=3, output_weighting="fisher")
    report = sparsewav.prune(model, batches, 0.6, preset="best", recovery=settings)
    assert report.recovery is not None
    assert report.recovery.best_update > 0
    assert report.recoveries  # of the layers
    weighted = Reconstruction(steps=3, output_weighting="fisher")
    sparsewav.prune(layers_alone, batches, 0.6, preset="best", recovery=weighted)
    assert report.recovery == sparsewav.recover(layers_alone, dense, batches, settings)
    assert all(torch.equal(tensor, layers_alone.state_dict()[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(UserError, match=r"^recovery\.processes=2 is of the command sparsewav"):
        sparsewav.prune(
            dense,
            batches,
            0.6,
            preset="best",
            recovery=settings.changed(processes=2),
            progress=lambda *_: pytest.fail("too late"),
        )


def test_masks_that_are_given_hold_no_mask_that_moves(tiny_model: Factory, noise_batch: MakeBatch) -> None:
    model = tiny_model("wav2vec2")
    with pytest.raises(UserError, match="lets removed weights return, and masks hold them; choose recovery=global"):
        sparsewav.prune(model, [noise_batch([800] * 4)], 0.5, recovery="elsa", preset="best", masks=masks_of(model))


def test_where_nothing_was_lost_no_learning_rate_is_to_blame(tiny_model: Factory, noise_batch: MakeBatch) -> None:
    dense = tiny_model("wav2vec2")
    found = sparsewav.recover(copy.deepcopy(dense), dense, [noise_batch([800] * 4)], Global(**QUICK))
    assert (found.loss_before, found.warnings) == (0.0, [])


def test_audio_that_breaks_the_loss_is_named(model_folder: Path, corpus: Path, tmp_path: Path) -> None:
    utterances = read_librispeech_folder(corpus, "train")
    speech = load_speech_model(str(model_folder))
    pruned = half_pruned(speech.model)
    with torch.no_grad():
        speech.model.get_parameter("wav2vec2.encoder.layer_norm.weight")[1] = 1e30  # its square is infinite

    def recover() -> None:
        recover_on_utterances(
            *(speech.model, False, 0, pruned, speech.processor, utterances, Global(**QUICK), 20, tmp_path),
            masks=masks_of(pruned),
        )

    with pytest.raises(UserError, match=r"^the training stopped at update 1 of 20: the loss is nan"):
        recover()
    with torch.no_grad():
        speech.model.get_parameter("lm_head.bias")[1] = torch.inf
    with pytest.raises(UserError, match=r"^lm_head\.bias of the dense model has numbers that are not finite"):
        recover()
